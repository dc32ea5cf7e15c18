"""Gates that the input decides against none, against fixed ones, and against softmax attention.

A byte language model over the standard library's sources, two layers of width 64, the same number of steps for all
four mixers: gated linear attention, the same without gates, the same with one fixed decay a head (retention), and
softmax attention. The learning rate, 3e-3, is the harness's own; nothing was tuned for one of them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor

from torchgraft.bench.tasks import builtin
from torchgraft.claims.record import ClaimRecord, judge
from torchgraft.claims.sequences import bits_per_byte, train_mixer
from torchgraft.engines.recurrence.linear_mixer import Tokens
from torchgraft.engines.recurrence.mixer import State
from torchgraft.parts.mixers.gated_linear_attention import CARD, GatedLinearAttention
from torchgraft.parts.mixers.softmax_attention import SoftmaxAttention

__all__ = ["run"]

STEPS = 120


class _Ungated(GatedLinearAttention):
    """Linear attention: nothing is forgotten."""

    def tokens(self, x: Tensor, state: State) -> tuple[Tokens, State]:
        found, rest = super().tokens(x, state)
        return Tokens(found.q, found.k, found.v, scale=found.scale), rest


class _FixedDecay(GatedLinearAttention):
    """Retention: head h forgets by a constant, ``1 - 2^(-5 - h)``."""

    def tokens(self, x: Tensor, state: State) -> tuple[Tokens, State]:
        found, rest = super().tokens(x, state)
        decay = torch.log1p(-(2.0 ** (-5.0 - torch.arange(self.num_heads))))
        return Tokens(found.q, found.k, found.v, log_decay=decay.to(x.device), scale=found.scale), rest


def run(seeds: Sequence[int] = (0, 1, 2)) -> ClaimRecord:
    """Run the claim."""
    begun = time.monotonic()
    mixers = {
        "gated": GatedLinearAttention,
        "ungated": _Ungated,
        "fixed decay": _FixedDecay,
        "softmax": SoftmaxAttention,
    }
    bits: dict[str, list[float]] = {name: [] for name in mixers}
    for seed in seeds:
        task = builtin("stdlib-bytes", seed)
        for name, mixer in mixers.items():
            bits[name].append(bits_per_byte(train_mixer(task, mixer, steps=STEPS, seed=seed), task))
    mean = {name: fmean(values) for name, values in bits.items()}
    effects = {
        "bits below ungated": mean["ungated"] - mean["gated"],
        "bits below fixed decay": mean["fixed decay"] - mean["gated"],
        "bits above softmax": mean["gated"] - mean["softmax"],
    }
    return judge(
        CARD.key,
        CARD.claim.figure if CARD.claim else "",
        metrics={f"bits per byte, {name}": values for name, values in bits.items()},
        effects=effects,
        parts={
            "at least 0.02 below ungated": effects["bits below ungated"] >= 0.02,
            "at least 0.02 below fixed decay": effects["bits below fixed decay"] >= 0.02,
            "at most 0.05 above softmax": effects["bits above softmax"] <= 0.05,
        },
        seeds=seeds,
        seconds=time.monotonic() - begun,
    )
