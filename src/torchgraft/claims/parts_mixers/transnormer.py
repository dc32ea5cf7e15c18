"""TransNormer on bytes of the standard library, beside linear attention with its denominator and softmax attention.

Two layers of width 64 and equal steps; all have rotary positions and the library's SwiGLU. The denominator's features
are not turned, so that it stays positive. The norm of the whole gradient is taken before clipping, and the largest
after the rise of the learning rate (the first tenth of the steps) is divided by the median. The learning rate is
the default of ``train_mixer`` for all three.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from statistics import fmean, median

import torch
from torch import Tensor, nn

from torchgraft.bench.task import Task
from torchgraft.bench.tasks.stdlib_bytes import stdlib_bytes
from torchgraft.bench.training import supervised, train
from torchgraft.claims.record import ClaimRecord, judge
from torchgraft.claims.sequences import bits_per_byte
from torchgraft.engines.recurrence.heads import merge_heads, split_heads
from torchgraft.engines.recurrence.linear import with_state
from torchgraft.engines.recurrence.mixer import Mixer
from torchgraft.parts.blocks.sequence_model import SequenceModel
from torchgraft.parts.mixers.softmax_attention import SoftmaxAttention
from torchgraft.parts.mixers.transnormer import CARD, NormAttention, TransNormer, feature

__all__ = ["run"]

_LR = 3e-3


class _LinearAttention(Mixer):
    """1 + elu linear attention with its denominator."""

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model)
        self.turned = NormAttention(d_model)

    def forward(self, x: Tensor) -> Tensor:
        self.checked(x)
        heads = self.turned.heads
        tokens, _ = self.turned.tokens(x, self.turned.init_state(len(x)))
        q, k = (split_heads(feature(project(x)), heads.num_heads) for project in (heads.query, heads.key))
        o, _ = with_state(tokens.q, tokens.k, tokens.v)
        total, _ = with_state(q, k, torch.ones_like(tokens.v[..., :1]))
        return heads.write(merge_heads(o / total))


def _models(seed: int) -> dict[str, SequenceModel]:
    builders: dict[str, Callable[[], SequenceModel]] = {
        "transnormer": lambda: TransNormer(64, 2),
        "linear attention": lambda: SequenceModel(64, 2, _LinearAttention),
        "softmax attention": lambda: SequenceModel(64, 2, SoftmaxAttention),
    }
    found = {}
    for name, build in builders.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            found[name] = build()
    return found


def _trained(model: nn.Module, task: Task, steps: int, lr: float, seed: int) -> list[float]:
    """Train ``model`` and return the norm of the gradient at every step, before it is clipped."""
    squares = [0.0]

    def note(parameter: Tensor) -> None:
        if parameter.grad is not None:
            squares[-1] += float(parameter.grad.square().sum())

    hooks = [
        p.register_post_accumulate_grad_hook(note)  # type: ignore[no-untyped-call]  # torch's
        for p in model.parameters()
    ]
    train(
        model,
        task.train,
        supervised(task.loss),
        steps=steps,
        batch_size=16,
        lr=lr,
        seed=seed,
        on_step=lambda _step, _loss: squares.append(0.0),
    )
    for hook in hooks:
        hook.remove()
    return [math.sqrt(square) for square in squares[:steps]]


def run(seeds: Sequence[int] = (0, 1, 2), steps: int = 120, lr: float = _LR) -> ClaimRecord:
    """Run the claim.

    Args:
        seeds: weights and order of the data.
        steps: optimiser steps of every method.
        lr: the highest learning rate.
    """
    begun = time.perf_counter()
    task = stdlib_bytes()
    metrics: dict[str, list[float]] = {}
    for seed in seeds:
        for name, model in _models(seed).items():
            norms = _trained(model, task, steps, lr, seed)[steps // 10 :]
            metrics.setdefault(f"nats a byte, {name}", []).append(round(bits_per_byte(model, task) * math.log(2), 4))
            metrics.setdefault(f"largest gradient over the median, {name}", []).append(
                round(max(norms) / median(norms), 3)
            )
    mean = {name: fmean(values) for name, values in metrics.items()}
    over_softmax = mean["nats a byte, transnormer"] / mean["nats a byte, softmax attention"]
    below_linear = mean["nats a byte, linear attention"] - mean["nats a byte, transnormer"]
    calmer = (
        mean["largest gradient over the median, linear attention"]
        / mean["largest gradient over the median, transnormer"]
    )
    return judge(
        CARD.key,
        CARD.claim.figure if CARD.claim is not None else "",
        metrics=metrics,
        effects={
            "loss over that of softmax": round(over_softmax, 4),
            "nats below linear attention": round(below_linear, 4),
            "times smaller the largest relative gradient is": round(calmer, 2),
        },
        parts={
            "loss <= 1.03x softmax": over_softmax <= 1.03,
            "loss <= linear attention - 0.05 nats": below_linear >= 0.05,
            "largest relative gradient >= 5x smaller than linear attention": calmer >= 5.0,
        },
        seeds=seeds,
        seconds=time.perf_counter() - begun,
    )
