"""A byte transformer of 12 layers with pre-, post- and peri-norm at three learning rates.

Text: the standard library's own source, windows of 32 bytes, four a step. AdamW and a cosine schedule for 220 steps, so
that 27 runs fit into two minutes (the entry asks for 800 steps); width 64, four heads. Losses are in nats a byte on
held-out files. A rise is a step at which the loss, averaged over 10 steps, is 1.3 times the lowest such average so far.
Nothing was tuned: steps and batch were chosen by time alone, the rates are those of the entry.

The law is for branches that are uncorrelated. Untrained they are, and it holds to 1 % (``benchmarks/norms_depth.py``).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import fmean
from typing import Literal

import torch
from torch import Tensor, nn

from torchgraft.bench.models import ByteTransformer
from torchgraft.bench.task import Split
from torchgraft.bench.tasks.stdlib_bytes import byte_loss, byte_splits
from torchgraft.bench.training import supervised, train
from torchgraft.claims.record import ClaimRecord, judge
from torchgraft.engines.normalize.attach import NormedInput, NormedOutput
from torchgraft.engines.normalize.placement import find_blocks
from torchgraft.errors import BadInput
from torchgraft.parts.norms.peri_ln import CARD, set_norm_placement, variance_profile

__all__ = ["run"]

_DEPTH, _CONTEXT, _STEPS, _BATCH = 12, 32, 220, 4
_RATES = (1e-3, 3e-3, 1e-2)
_KINDS: tuple[Literal["pre", "post", "peri"], ...] = ("pre", "post", "peri")
_FAILED = 2.8
_DIVERGED = 99.0


def _inputs(split: Split) -> Tensor:
    if not isinstance(split.inputs, Tensor):
        raise TypeError("bytes are one tensor")
    return split.inputs


def _rises(losses: Sequence[float]) -> int:
    """Return at how many steps the averaged loss is 1.3 times its lowest value so far."""
    smooth = [fmean(losses[place - 10 : place]) for place in range(10, len(losses) + 1)]
    return sum(value > 1.3 * min(smooth[: place + 1]) for place, value in enumerate(smooth))


def _stated(model: nn.Module, start: float) -> float:
    """Return Var(x_0) plus the mean squared gain of every output norm."""
    squares = start
    for block in find_blocks(model):
        for layer in block.sublayers:
            last = model.get_submodule(layer.exit)
            if isinstance(last, NormedOutput):
                squares += float(last.get_parameter("output_norm.weight").detach().square().mean())
    return squares


def _trained(kind: Literal["pre", "post", "peri"], rate: float, seed: int) -> tuple[float, float, float, int]:
    """Return validation loss, variance of the last hidden state, the variance that peri-norm is to have, and rises."""
    text, held_out, _ = byte_splits(_CONTEXT, 4096, 128)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ByteTransformer(256, _CONTEXT, d_model=64, depth=_DEPTH, num_heads=4, spread=0.3)
        set_norm_placement(model, kind)
    losses: list[float] = []
    try:
        train(
            model,
            text,
            supervised(byte_loss),
            steps=_STEPS,
            batch_size=_BATCH,
            lr=rate,
            seed=seed,
            on_step=lambda _, loss: losses.append(loss),
        )
    except BadInput:  # the loss is no number any more
        return _DIVERGED, float("nan"), float("nan"), _STEPS
    with torch.no_grad():
        loss = float(byte_loss(model(_inputs(held_out)), held_out.target))
    profile = variance_profile(model, _inputs(held_out)[:16])
    start = 1.0 if isinstance(model.blocks[0], NormedInput) else profile[0].variance
    if isinstance(model.blocks[0], NormedInput):
        gain = model.blocks[0].get_parameter("input_norm.weight").detach()
        start = float(gain.square().mean())
    return loss, profile[-1].variance, _stated(model, start), _rises(losses)


def run(seeds: Sequence[int] = (0, 1, 2)) -> ClaimRecord:
    """Run the claim.

    Args:
        seeds: weights and order of the data.
    """
    begun = time.perf_counter()
    metrics: dict[str, list[float]] = {}
    for seed in seeds:
        for kind in _KINDS:
            for rate in _RATES:
                loss, variance, stated, rises = _trained(kind, rate, seed)
                for name, value in (("loss", loss), ("last variance", variance), ("rises", float(rises))):
                    metrics.setdefault(f"{kind}, {rate:g}: {name}", []).append(round(value, 4))
                if kind == "peri":
                    metrics.setdefault(f"peri, {rate:g}: variance over the law", []).append(round(variance / stated, 4))
    mean = {name: fmean(values) for name, values in metrics.items()}
    best = {kind: min(_RATES, key=lambda rate, kind=kind: mean[f"{kind}, {rate:g}: loss"]) for kind in _KINDS}  # type: ignore[misc]  # a default
    ratios = [value for rate in _RATES for value in metrics[f"peri, {rate:g}: variance over the law"]]
    failing = [rate for rate in _RATES if mean[f"post, {rate:g}: loss"] > _FAILED > mean[f"peri, {rate:g}: loss"]]
    gap = mean[f"peri, {best['peri']:g}: loss"] - mean[f"pre, {best['pre']:g}: loss"]
    steps = {kind: sum(mean[f"{kind}, {rate:g}: rises"] for rate in _RATES) for kind in ("pre", "peri")}
    over = max(mean[f"peri, {rate:g}: last variance"] / mean[f"pre, {rate:g}: last variance"] for rate in _RATES)
    return judge(
        CARD.key,
        CARD.claim.figure if CARD.claim is not None else "",
        metrics=metrics,
        effects={
            "peri's variance over the law, lowest": min(ratios),
            "peri's variance over the law, highest": max(ratios),
            "peri's variance over pre's, at most": round(over, 4),
            "rates at which post fails and peri does not": float(len(failing)),
            "peri's best loss less pre's": round(gap, 4),
            "steps in a rise, peri less pre": steps["peri"] - steps["pre"],
        },
        parts={
            "variance within 2x of the law": min(ratios) >= 0.5 and max(ratios) <= 2.0,
            "variance below pre's": over < 1.0,
            "post fails where peri trains": bool(failing),
            "loss at most pre's + 0.02": gap <= 0.02,
            "no more rises than pre": steps["peri"] <= steps["pre"],
        },
        seeds=seeds,
        seconds=time.perf_counter() - begun,
    )
