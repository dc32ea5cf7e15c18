"""Sigmoid attention on bytes of the standard library: b = -log n beside softmax, and beside b = 0.

Two layers of width 96, four heads, equal steps and data; learning rate 3e-3, the default of ``train_mixer``, for all.
The size of the attention's first output is its root mean square at the first layer before training, last 16 tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from statistics import fmean

import torch
from torch import nn

from torchgraft.bench.task import Task, call
from torchgraft.bench.tasks.stdlib_bytes import stdlib_bytes
from torchgraft.claims.record import ClaimRecord, judge
from torchgraft.claims.sequences import bits_per_byte, train_mixer
from torchgraft.engines.recurrence.mixer import Mixer
from torchgraft.parts.blocks.sequence_model import SequenceModel
from torchgraft.parts.mixers.sigmoid_attention import CARD, SigmoidAttention
from torchgraft.parts.mixers.softmax_attention import SoftmaxAttention

__all__ = ["run"]

_WIDTH = 96
_MIXERS: dict[str, Callable[[int], Mixer]] = {
    "softmax": lambda width: SoftmaxAttention(width, num_heads=4),
    "b = -log n": lambda width: SigmoidAttention(width, num_heads=4),
    "b = 0": lambda width: SigmoidAttention(width, num_heads=4, bias=0.0),
    "b = 0, qk norm": lambda width: SigmoidAttention(width, num_heads=4, bias=0.0, qk_norm=True),
}


def _first_size(build: Callable[[int], Mixer], task: Task, seed: int) -> float:
    """Return the root mean square of the first layer's attention, before any training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = SequenceModel.for_task(task, _WIDTH, 1, build)
    found: list[float] = []

    def note(module: nn.Module, given: object, out: torch.Tensor) -> None:
        found.append(float(out[:, -16:].square().mean().sqrt()))

    mixer = next(module for module in model.modules() if isinstance(module, Mixer))
    hook = mixer.register_forward_hook(note)
    with torch.no_grad():
        inputs, _ = next(iter(task.val.batches(8)))
        call(model, inputs)
    hook.remove()
    return found[0]


def run(seeds: Sequence[int] = (0, 1, 2), steps: int = 150) -> ClaimRecord:
    """Run the claim.

    Args:
        seeds: weights and order of the data.
        steps: optimiser steps of every method.
    """
    begun = time.perf_counter()
    task = stdlib_bytes()
    metrics: dict[str, list[float]] = {}
    for seed in seeds:
        for name, build in _MIXERS.items():
            model = train_mixer(task, build, steps=steps, d_model=_WIDTH, batch_size=16, seed=seed)
            nats = bits_per_byte(model, task, "val") * math.log(2)
            metrics.setdefault(f"nats a byte, {name}", []).append(round(nats, 4))
            metrics.setdefault(f"first output, {name}", []).append(round(_first_size(build, task, seed), 4))
    mean = {name: fmean(values) for name, values in metrics.items()}
    behind = mean["nats a byte, b = -log n"] - mean["nats a byte, softmax"]
    worse = mean["nats a byte, b = 0"] - mean["nats a byte, b = -log n"]
    larger = mean["first output, b = 0"] / mean["first output, b = -log n"]
    return judge(
        CARD.key,
        CARD.claim.figure if CARD.claim is not None else "",
        metrics=metrics,
        effects={
            "nats behind softmax": round(behind, 4),
            "nats that b = 0 is worse": round(worse, 4),
            "times larger first output of b = 0": round(larger, 2),
        },
        parts={
            "b = -log n within 0.02 nats of softmax": behind <= 0.02,
            "b = 0 worse by 0.1 nats, or its first output 10 times as large": worse >= 0.1 or larger >= 10.0,
        },
        seeds=seeds,
        seconds=time.perf_counter() - begun,
    )
