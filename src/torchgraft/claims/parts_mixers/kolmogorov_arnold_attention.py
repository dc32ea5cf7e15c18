"""Kolmogorov-Arnold attention beside softmax on digits: an operator a block, one for all, and one on the simplex.

All four are the same small vision transformer, 16 patches of 2x2 pixels and a class token with learned positions, width
48, 3 heads, 3 blocks, trained for 320 steps of 64 samples (20 epochs, to stay within two minutes; the entry says 60).
Rates were chosen among 1e-3, 3e-3 and 6e-3 by validation accuracy on seed 100, once for softmax and once for KArAt.
Singular values are counted on the weights of 64 test digits, all blocks and heads; that no unprojected operator has
more than R of them holds by construction.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean

import torch
from torch import nn

from torchgraft.bench.task import Split
from torchgraft.claims.images import accuracy, digits, images_of, train_images
from torchgraft.claims.record import ClaimRecord, judge
from torchgraft.parts.blocks.vision_model import SelfAttention, VisionModel
from torchgraft.parts.mixers.kolmogorov_arnold_attention import CARD, KolmogorovArnoldAttention, row_operators

__all__ = ["build", "run"]

_LAYERS, _HEADS, _WIDTH, _TOKENS = 3, 3, 48, 17
_STEPS, _RATES = 320, {"softmax": 3e-3, "karat": 1e-3}


def build(name: str) -> VisionModel:
    """Return the untrained model ``"softmax"``, ``"G3B"``, ``"G3U"`` or ``"G3B on the simplex"``."""
    if name == "softmax":
        return VisionModel(_WIDTH, _LAYERS, partial(SelfAttention, num_heads=_HEADS))
    operators = row_operators(
        _LAYERS, num_heads=_HEADS, tokens=_TOKENS, share="universal" if name == "G3U" else "block"
    )
    project = name == "G3B on the simplex"
    mixers = [
        partial(KolmogorovArnoldAttention, num_heads=_HEADS, operator=operator, project=project)
        for operator in operators
    ]
    return VisionModel(_WIDTH, _LAYERS, mixers)


def _singular_values(model: VisionModel, split: Split) -> float:
    """Return the mean number of singular values above 1e-3 of the largest."""
    counts = []
    with torch.no_grad():
        for mixer, x in zip(model.mixers(), model.seen_by_mixers(images_of(split)[:64]), strict=True):
            if isinstance(mixer, KolmogorovArnoldAttention):
                values = torch.linalg.svdvals(mixer.attention(x).double())
                counts.append(float((values > 1e-3 * values[..., :1]).sum(-1).double().mean()))
    return fmean(counts)


def run(seeds: Sequence[int] = (0, 1, 2)) -> ClaimRecord:
    """Run the claim.

    Args:
        seeds: weights and order of the data.
    """
    begun = time.perf_counter()
    metrics: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        metrics.setdefault(name, []).append(round(value, 4))

    training, _, test = digits()
    for seed in seeds:
        for name in ("softmax", "G3B", "G3U", "G3B on the simplex"):
            rate = _RATES["softmax" if name == "softmax" else "karat"]
            made: Callable[[], nn.Module] = partial(build, name)
            model = train_images(made, training, steps=_STEPS, lr=rate, seed=seed)
            note(f"{name}: accuracy", accuracy(model, test))
            note(f"{name}: parameters", sum(value.numel() for value in model.parameters()))
            if name != "softmax" and isinstance(model, VisionModel):
                note(f"{name}: singular values", _singular_values(model, test))
    mean = {name: fmean(values) for name, values in metrics.items()}
    own = mean["G3B: accuracy"] - mean["softmax: accuracy"]
    shared = mean["G3U: accuracy"] - mean["softmax: accuracy"]
    effects = {
        "G3B over softmax": own,
        "G3U over softmax": shared,
        "G3B on the simplex over G3B": mean["G3B on the simplex: accuracy"] - mean["G3B: accuracy"],
        "most singular values, unprojected": max(mean["G3B: singular values"], mean["G3U: singular values"]),
        "singular values on the simplex": mean["G3B on the simplex: singular values"],
    }
    return judge(
        CARD.key,
        CARD.claim.figure if CARD.claim is not None else "",
        metrics=metrics,
        effects={name: round(value, 4) for name, value in effects.items()},
        parts={
            "unprojected between 1 point below and 3 above": -0.01 <= own <= 0.03 or -0.01 <= shared <= 0.03,
            "the projected one not better": effects["G3B on the simplex over G3B"] <= 0,
            "at most 12 singular values": effects["most singular values, unprojected"] <= 12,
        },
        seeds=seeds,
        seconds=time.perf_counter() - begun,
    )
