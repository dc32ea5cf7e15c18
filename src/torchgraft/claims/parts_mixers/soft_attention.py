"""SOFT on digits as 64 tokens of one pixel, beside softmax and positive random features; growth with the tokens.

Four blocks of width 48, three heads, 250 steps of the settings in ``claims/images.py`` for all.
The size at 1024 tokens is the largest output of an untrained layer, without its convolution, on 16 landmarks, for
tokens that are near each other (a constant plus a tenth of noise), as neighbouring patches are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from statistics import fmean, median

import torch
from torch import Tensor

from torchgraft.claims.images import accuracy, digits, train_images
from torchgraft.claims.record import ClaimRecord, judge
from torchgraft.engines.attention.mixer import AttentionMixer
from torchgraft.engines.recurrence.mixer import Mixer
from torchgraft.parts.blocks.vision_model import SelfAttention, VisionModel
from torchgraft.parts.mixers.soft_attention import CARD, SoftAttention

__all__ = ["run"]

TIMED = True
_WIDTH, _LAYERS, _HEADS = 48, 4, 3


class _RandomFeatures(AttentionMixer):
    """Performer: exp(w . x - |x|^2 / 2) for fixed normal w, as many as channels of a head times four."""

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model, num_heads=_HEADS, rotary=False, causal=False)
        self.register_buffer("w", torch.randn(self.key_size, 4 * self.key_size))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = self.get_buffer("w")
        q, k = (x * self.key_size**-0.25 for x in (q, k))
        raised = [x @ w - x.square().sum(-1, keepdim=True) / 2 for x in (q, k)]
        phi_q = (raised[0] - raised[0].amax(-1, keepdim=True)).exp() + 1e-6
        phi_k = (raised[1] - raised[1].amax((1, 3), keepdim=True)).exp() + 1e-6
        memory = torch.einsum("bshf,bshv->bhfv", phi_k, v)
        total = torch.einsum("bthf,bhf->bth", phi_q, phi_k.sum(1))
        return torch.einsum("bthf,bhfv->bthv", phi_q, memory) / total[..., None]


def _methods() -> dict[str, Callable[[int], Mixer]]:
    return {
        "softmax": lambda width: SelfAttention(width, num_heads=_HEADS),
        "random features": _RandomFeatures,
        "soft": lambda width: SoftAttention(width, num_heads=_HEADS, landmarks=16, grid=(8, 8), symmetric=False),
        "soft++": lambda width: SoftAttention(width, num_heads=_HEADS, landmarks=16, grid=(8, 8)),
    }


def _largest(symmetric: bool, seed: int) -> float:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = SoftAttention(_WIDTH, num_heads=_HEADS, landmarks=16, symmetric=symmetric, kernel=0)
        x = torch.randn(1, 1, _WIDTH) + 0.1 * torch.randn(4, 1024, _WIDTH)
    with torch.no_grad():
        return float(layer(x).abs().max())


def _exponent() -> float:
    layer = SoftAttention(_WIDTH, num_heads=_HEADS, landmarks=16)
    found: dict[int, list[float]] = {256: [], 4096: []}
    with torch.no_grad():
        for _ in range(9):
            for tokens, seconds in found.items():
                x = torch.randn(4, tokens, _WIDTH)
                begun = time.perf_counter()
                layer(x)
                seconds.append(time.perf_counter() - begun)
    return math.log(median(found[4096]) / median(found[256])) / math.log(16)


def run(seeds: Sequence[int] = (0, 1, 2), steps: int = 250) -> ClaimRecord:
    """Run the claim.

    Args:
        seeds: weights and order of the data.
        steps: optimiser steps of every method.
    """
    begun = time.perf_counter()
    training, _, test = digits()
    metrics: dict[str, list[float]] = {}
    for seed in seeds:
        for name, mixer in _methods().items():

            def build(mixer: Callable[[int], Mixer] = mixer) -> VisionModel:
                return VisionModel(_WIDTH, _LAYERS, mixer, patch_size=1, class_token=False, hidden=2 * _WIDTH)

            model = train_images(build, training, steps=steps, batch_size=32, seed=seed)
            metrics.setdefault(f"accuracy, {name}", []).append(round(accuracy(model, test), 4))
        for name, symmetric in (("soft", False), ("soft++", True)):
            metrics.setdefault(f"largest output, {name}", []).append(round(_largest(symmetric, seed), 4))
    mean = {name: fmean(values) for name, values in metrics.items()}
    gap = mean["accuracy, soft++"] - mean["accuracy, softmax"]
    over = mean["accuracy, soft++"] - mean["accuracy, random features"]
    larger = mean["largest output, soft"] / mean["largest output, soft++"]
    exponent = _exponent()
    finite = all(math.isfinite(value) for values in metrics.values() for value in values)
    return judge(
        CARD.key,
        CARD.claim.figure if CARD.claim is not None else "",
        metrics=metrics,
        effects={
            "accuracy over softmax": round(gap, 4),
            "accuracy over random features": round(over, 4),
            "times larger output without the normalisation": round(larger, 2),
            "exponent of time": round(exponent, 3),
        },
        parts={
            "within 1 point of softmax": gap >= -0.01,
            "above random features": over > 0.0,
            "finite, and 5 times smaller than without the normalisation": finite and larger >= 5.0,
            "exponent of time <= 1.2": exponent <= 1.2,
        },
        seeds=seeds,
        seconds=time.perf_counter() - begun,
    )
