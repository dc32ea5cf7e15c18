"""A byte transformer of 12 layers and width 64 with and without LayerNorm Scaling.

Text: the standard library's own source, windows of 32 bytes, two a step, 1200 steps of AdamW with a cosine schedule at
3e-3, the rate of the harness (the entry asks for windows of 64, which do not fit into two minutes). Both models start
from the same weights and see the same data. The variance ratio is that of the stream before the last block over that
after the first, on held-out files; the loss increase is the mean over the last four blocks, each left out alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor

from torchgraft.bench.models import ByteTransformer
from torchgraft.bench.tasks.stdlib_bytes import byte_loss, byte_splits
from torchgraft.bench.training import supervised, train
from torchgraft.claims.record import ClaimRecord, judge
from torchgraft.parts.norms.layernorm_scaling import CARD, apply_layernorm_scaling, depth_report

__all__ = ["run"]

_DEPTH, _CONTEXT, _STEPS, _BATCH, _RATE, _LAST = 12, 32, 1200, 2, 3e-3, 4


def _measured(scaled: bool, seed: int) -> tuple[float, float, float]:
    """Return validation loss, variance ratio, and the loss increase of leaving out one of the last blocks."""
    text, held_out, _ = byte_splits(_CONTEXT, 4096, 256)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ByteTransformer(256, _CONTEXT, d_model=64, depth=_DEPTH, num_heads=4, spread=0.3)
    if scaled:
        apply_layernorm_scaling(model)
    train(model, text, supervised(byte_loss), steps=_STEPS, batch_size=_BATCH, lr=_RATE, seed=seed)
    inputs = held_out.inputs
    if not isinstance(inputs, Tensor):
        raise TypeError("bytes are one tensor")
    with torch.no_grad():
        loss = float(byte_loss(model(inputs), held_out.target))
    rows = depth_report(model, inputs, loss=lambda out: byte_loss(out, held_out.target))
    return loss, rows[-1].variance / rows[1].variance, fmean(row.drop_loss for row in rows[-_LAST:])


def run(seeds: Sequence[int] = (0, 1, 2)) -> ClaimRecord:
    """Run the claim.

    Args:
        seeds: weights and order of the data.
    """
    begun = time.perf_counter()
    metrics: dict[str, list[float]] = {}
    for seed in seeds:
        for name, scaled in (("pre-norm", False), ("scaled", True)):
            for what, value in zip(
                ("loss", "variance ratio", "drop-one increase"), _measured(scaled, seed), strict=True
            ):
                metrics.setdefault(f"{name}: {what}", []).append(round(value, 5))
    mean = {name: fmean(values) for name, values in metrics.items()}
    effects = {
        "variance ratio, pre-norm over scaled": mean["pre-norm: variance ratio"] / mean["scaled: variance ratio"],
        "drop-one increase, scaled over pre-norm": mean["scaled: drop-one increase"]
        / max(mean["pre-norm: drop-one increase"], 1e-9),
        "loss, scaled less pre-norm": mean["scaled: loss"] - mean["pre-norm: loss"],
    }
    return judge(
        CARD.key,
        CARD.claim.figure if CARD.claim is not None else "",
        metrics=metrics,
        effects={name: round(value, 4) for name, value in effects.items()},
        parts={
            "variance ratio at least 2x lower": effects["variance ratio, pre-norm over scaled"] >= 2.0,
            "drop-one increase doubles": effects["drop-one increase, scaled over pre-norm"] >= 2.0,
            "loss at most pre-norm's": effects["loss, scaled less pre-norm"] <= 0.0,
        },
        seeds=seeds,
        seconds=time.perf_counter() - begun,
    )
