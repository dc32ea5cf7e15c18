"""A byte transformer of 3 layers and width 96 with layer norm, batch norm and PowerNorm, pre-norm.

Text: the standard library's own source, windows of 64 bytes, four a step, 800 steps of AdamW (1500 do not fit into
two minutes) with a cosine schedule at 3e-3, the rate of the harness; batch norm is over the tokens of a batch and uses
running statistics in evaluation. PowerNorm scales each token first, as the released code does, and warms up for a tenth
of the steps. The distance of batch to running statistics is |batch - running| / |running|, averaged over norms and
eight training batches of the trained model: of variances for batch norm, else of quadratic means.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.bench.models import ByteTransformer
from torchgraft.bench.task import Split
from torchgraft.bench.tasks.stdlib_bytes import byte_loss, byte_splits
from torchgraft.bench.training import supervised, train
from torchgraft.claims.record import ClaimRecord, judge
from torchgraft.engines.normalize.norm import RunningNorm
from torchgraft.engines.surgery.swap import swap
from torchgraft.parts.norms.powernorm import CARD, PowerNorm, convert_ln

__all__ = ["run"]

_CONTEXT, _STEPS, _BATCH, _RATE = 64, 800, 4, 3e-3


class _TokenBatchNorm(RunningNorm):
    """Batch norm of every channel over all tokens of the batch, (B, T, D) -> (B, T, D)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.standardized(x)


def _built(kind: str, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ByteTransformer(256, _CONTEXT, d_model=96, depth=3, num_heads=4, spread=0.3)
    if kind == "batch norm":
        swap(model, nn.LayerNorm, lambda old, _: _TokenBatchNorm(96))
    elif kind == "powernorm":
        convert_ln(model, warmup=_STEPS // 10, group_scale=1)
    return model


def _inputs(split: Split) -> Tensor:
    if not isinstance(split.inputs, Tensor):
        raise TypeError("bytes are one tensor")
    return split.inputs


def _distance(model: nn.Module, batches: Sequence[Tensor]) -> float:
    """Return the mean relative distance of a batch's statistics to the running ones."""
    found: list[float] = []

    def seen(module: Any, args: tuple[Tensor, ...], _: Any) -> None:
        x = args[0].detach().flatten(0, 1)
        if isinstance(module, PowerNorm):
            scaled = x * torch.rsqrt(x.square().mean(1, keepdim=True) + module.eps)
            batch, running = scaled.square().mean(0), module.running_square
        else:
            batch, running = x.var(0), module.running_var
        found.append(float((batch - running).norm() / running.norm()))

    twin = copy.deepcopy(model).eval()
    handles = [m.register_forward_hook(seen) for m in twin.modules() if isinstance(m, PowerNorm | _TokenBatchNorm)]
    with torch.no_grad():
        for batch in batches:
            twin(batch)
    for handle in handles:
        handle.remove()
    return fmean(found)


def run(seeds: Sequence[int] = (0, 1, 2)) -> ClaimRecord:
    """Run the claim.

    Args:
        seeds: weights and order of the data.
    """
    begun = time.perf_counter()
    metrics: dict[str, list[float]] = {}
    text, held_out, _ = byte_splits(_CONTEXT, 3200, 256)  # 200 kB
    batches = list(torch.split(_inputs(text)[: 8 * _BATCH], _BATCH))
    for seed in seeds:
        for kind in ("layer norm", "batch norm", "powernorm"):
            model = _built(kind, seed)
            train(model, text, supervised(byte_loss), steps=_STEPS, batch_size=_BATCH, lr=_RATE, seed=seed)
            with torch.no_grad():
                loss = float(byte_loss(model(_inputs(held_out)), held_out.target))
            metrics.setdefault(f"{kind}: loss", []).append(round(loss, 4))
            if kind != "layer norm":
                metrics.setdefault(f"{kind}: distance of batch statistics", []).append(
                    round(_distance(model, batches), 4)
                )
    mean = {name: fmean(values) for name, values in metrics.items()}
    effects = {
        "powernorm's loss less layer norm's": mean["powernorm: loss"] - mean["layer norm: loss"],
        "batch norm's loss less powernorm's": mean["batch norm: loss"] - mean["powernorm: loss"],
        "distance of batch statistics, batch norm over powernorm": mean["batch norm: distance of batch statistics"]
        / mean["powernorm: distance of batch statistics"],
    }
    return judge(
        CARD.key,
        CARD.claim.figure if CARD.claim is not None else "",
        metrics=metrics,
        effects={name: round(value, 4) for name, value in effects.items()},
        parts={
            "loss at most layer norm's + 0.03": effects["powernorm's loss less layer norm's"] <= 0.03,
            "batch norm worse by 0.05, or 5x as far": effects["batch norm's loss less powernorm's"] >= 0.05
            or effects["distance of batch statistics, batch norm over powernorm"] >= 5.0,
        },
        seeds=seeds,
        seconds=time.perf_counter() - begun,
    )
