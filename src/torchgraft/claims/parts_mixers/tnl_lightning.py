"""TransNormerLLM on bytes of the standard library, beside a softmax transformer and itself without decay.

Two layers of width 64 and equal steps. The softmax transformer has rotary positions and SwiGLU; the model without decay
is TransNormerLLM, LRPE-d included, with every log decay 0. The learning rate is the default of ``train_mixer``. Tokens
a second are those of forward and backward through two layers of width 128, 4096 tokens a step in rows of 512 or in one
row.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean, median

import torch
from torch import Tensor
from torch.nn import functional as F

from torchgraft.bench.task import Task
from torchgraft.bench.tasks.stdlib_bytes import stdlib_bytes
from torchgraft.bench.training import supervised, train
from torchgraft.claims.record import ClaimRecord, judge
from torchgraft.claims.sequences import bits_per_byte
from torchgraft.engines.recurrence.linear_mixer import Tokens
from torchgraft.engines.recurrence.mixer import State
from torchgraft.parts.blocks.sequence_model import SequenceModel
from torchgraft.parts.mixers.softmax_attention import SoftmaxAttention
from torchgraft.parts.mixers.tnl_lightning import CARD, TNLAttention, TransNormerLLM

__all__ = ["TIMED", "run"]

#: Its verdict rests on times, which a busy machine may change.
TIMED = True

_LR = 3e-3
_ROW, _LONG = 512, 4096


class _WithoutDecay(TNLAttention):
    def tokens(self, x: Tensor, state: State) -> tuple[Tokens, State]:
        found, rest = super().tokens(x, state)
        return replace(found, log_decay=None), rest


def _without_decay() -> SequenceModel:
    model = TransNormerLLM(64, 2)
    for block in model.blocks:
        own = block.mixer
        if isinstance(own, TNLAttention):
            block.mixer = _WithoutDecay(64, layer=own.layer, layers=own.layers)
            block.mixer.load_state_dict(own.state_dict())
    return model


_MODELS: dict[str, Callable[[], SequenceModel]] = {
    "tnl": lambda: TransNormerLLM(64, 2),
    "without decay": _without_decay,
    "softmax": lambda: SequenceModel(64, 2, SoftmaxAttention),
}
_WIDE: dict[str, Callable[[], SequenceModel]] = {
    "tnl": lambda: TransNormerLLM(128, 2),
    "softmax": lambda: SequenceModel(128, 2, SoftmaxAttention),
}


def _built(build: Callable[[], SequenceModel], seed: int) -> SequenceModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def _loss(build: Callable[[], SequenceModel], task: Task, steps: int, lr: float, seed: int) -> float:
    """Train a model and return its nats a byte."""
    model = _built(build, seed)
    train(model, task.train, supervised(task.loss), steps=steps, batch_size=16, lr=lr, seed=seed)
    return bits_per_byte(model, task) * math.log(2)


def _speeds(seed: int, rounds: int) -> dict[str, float]:
    """Return thousands of tokens a second, by model and length, of all in turn."""
    models = {name: _built(build, seed) for name, build in _WIDE.items()}
    text = torch.randint(256, (_LONG,), generator=torch.Generator().manual_seed(seed))
    spent: dict[str, list[float]] = {}
    for turn in range(rounds + 1):
        for length in (_ROW, _LONG):
            tokens = text.view(-1, length)
            for name, model in models.items():
                begun = time.perf_counter()
                F.cross_entropy(model(tokens).flatten(0, 1), text).backward()  # type: ignore[no-untyped-call]  # torch's
                if turn:
                    spent.setdefault(f"{name}, {length} tokens", []).append(time.perf_counter() - begun)
    return {name: _LONG / median(times) / 1e3 for name, times in spent.items()}


def run(seeds: Sequence[int] = (0, 1, 2), steps: int = 120, rounds: int = 3, lr: float = _LR) -> ClaimRecord:
    """Run the claim.

    Args:
        seeds: weights and order of the data.
        steps: optimiser steps of every method.
        rounds: measured steps of every model and length.
        lr: the highest learning rate.
    """
    begun = time.perf_counter()
    task = stdlib_bytes()
    metrics: dict[str, list[float]] = {}
    for seed in seeds:
        for name, build in _MODELS.items():
            metrics.setdefault(f"nats a byte, {name}", []).append(round(_loss(build, task, steps, lr, seed), 4))
        for name, speed in _speeds(seed, rounds).items():
            metrics.setdefault(f"thousand tokens/s, {name}", []).append(round(speed, 2))
    mean = {name: fmean(values) for name, values in metrics.items()}
    over_softmax = mean["nats a byte, tnl"] / mean["nats a byte, softmax"]
    below_linear = mean["nats a byte, without decay"] - mean["nats a byte, tnl"]

    def kept(name: str) -> float:
        long, row = (metrics[f"thousand tokens/s, {name}, {length} tokens"] for length in (_LONG, _ROW))
        return median(long) / median(row)

    return judge(
        CARD.key,
        CARD.claim.figure if CARD.claim is not None else "",
        metrics=metrics,
        effects={
            "loss over that of softmax": round(over_softmax, 4),
            "nats below the model without decay": round(below_linear, 4),
            "tokens/s at 4096 over 512, tnl": round(kept("tnl"), 3),
            "tokens/s at 4096 over 512, softmax": round(kept("softmax"), 3),
        },
        parts={
            "loss <= 1.03x softmax": over_softmax <= 1.03,
            "loss <= without decay - 0.05 nats": below_linear >= 0.05,
            "tokens/s at 4096 within 20% of 512": abs(kept("tnl") - 1) <= 0.20,
            "softmax at 4096 at most half of 512": kept("softmax") <= 0.5,
        },
        seeds=seeds,
        seconds=time.perf_counter() - begun,
    )
