"""Flow-Attention beside linear attention with the same sigmoid features and no conservation of flow.

On associative recall of eight pairs, 24 symbols (the harness's own task), and on the standard library's bytes. Neither
mixer knows positions, so both stand behind the same causal convolution of four tokens. The learning rates, one
for both mixers, are 1e-2 on recall, found on seed 100 outside the claim, and the harness's own 3e-3 on bytes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor

from torchgraft.bench.tasks import builtin
from torchgraft.claims.record import ClaimRecord, judge
from torchgraft.claims.sequences import accuracy, bits_per_byte, train_mixer
from torchgraft.contracts.mixers import Meter
from torchgraft.engines.recurrence.heads import ShortConvolution, merge_heads
from torchgraft.engines.recurrence.linear import linear_recurrence
from torchgraft.engines.recurrence.mixer import Mixer
from torchgraft.engines.recurrence.prefix import prefix_sum
from torchgraft.parts.mixers.flow_attention import CARD, FlowAttention

__all__ = ["run"]

_STEPS = {"recall": 300, "stdlib-bytes": 100}
_BATCH = {"recall": 64, "stdlib-bytes": 8}
_RATES = {"recall": 1e-2, "stdlib-bytes": 3e-3}


class _Plain(FlowAttention):
    """Linear attention: sigmoid features, divided by the sum of the weights."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._heads(x)
        q, k = q.sigmoid(), k.sigmoid()
        mixed = linear_recurrence(q, k, v)
        if not isinstance(mixed, Tensor):
            raise TypeError("no state was asked for")
        y: Tensor = self.out(merge_heads(mixed / (q * prefix_sum(k)).sum(-1, keepdim=True)))
        return y


class _BehindConvolution(Mixer):
    """A mixer that reads a causal convolution of four tokens."""

    def __init__(self, mixer: Mixer) -> None:
        super().__init__(mixer.d_model)
        self.convolution, self.mixer = ShortConvolution(mixer.d_model), mixer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mixer(self.convolution(x)[0])
        return y


def _flow(d_model: int) -> Mixer:
    return _BehindConvolution(FlowAttention(d_model))


def _plain(d_model: int) -> Mixer:
    return _BehindConvolution(_Plain(d_model))


def _work(tokens: int) -> int:
    mixer, x = FlowAttention(64), torch.randn(1, tokens, 64)
    with torch.no_grad(), Meter() as meter:
        mixer(x)
    return int(meter.work)


def run(seeds: Sequence[int] = (0, 1, 2)) -> ClaimRecord:
    """Run the claim.

    Args:
        seeds: weights and order of the data.
    """
    begun = time.perf_counter()
    metrics: dict[str, list[float]] = {}
    for seed in seeds:
        for task_name, steps in _STEPS.items():
            task = builtin(task_name, seed)
            for name, build in (("flow", _flow), ("plain", _plain)):
                size, rate = _BATCH[task_name], _RATES[task_name]
                model = train_mixer(task, build, steps=steps, batch_size=size, lr=rate, seed=seed)
                if task_name == "recall":
                    metrics.setdefault(f"{name}: accuracy", []).append(round(accuracy(model, task), 4))
                else:
                    nats = bits_per_byte(model, task) * math.log(2)
                    metrics.setdefault(f"{name}: nats a byte", []).append(round(nats, 4))
    mean = {name: fmean(values) for name, values in metrics.items()}
    effects = {
        "accuracy above plain": mean["flow: accuracy"] - mean["plain: accuracy"],
        "nats below plain": mean["plain: nats a byte"] - mean["flow: nats a byte"],
        "work at 4096 tokens over 512": _work(4096) / _work(512),
        "softmax scores at 4096 tokens over 512": 4096**2 / 512**2,
    }
    return judge(
        CARD.key,
        CARD.claim.figure if CARD.claim is not None else "",
        metrics=metrics,
        effects={name: round(value, 4) for name, value in effects.items()},
        parts={
            "accuracy at least 3 points above": effects["accuracy above plain"] >= 0.03,
            "loss at least 0.02 nats below": effects["nats below plain"] >= 0.02,
            "work grows less than 12x": effects["work at 4096 tokens over 512"] < 12,
            "softmax scores grow more than 25x": effects["softmax scores at 4096 tokens over 512"] > 25,
        },
        seeds=seeds,
        seconds=time.perf_counter() - begun,
    )
