"""Associative recall by linear attention of growing state, by its normalisers, and by the qLSTM under two gates.

Every mixer reads its inputs through one short convolution (the same for all), without which no value is tied to the key
before it. The sequences are the built-in task's, of 24 tokens with 8 pairs. The learning rate and the number of steps
were chosen on seed 100, which is no seed of the claim. Softmax attention is reported beside the rest; the figure asks
nothing of it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from statistics import fmean

from torch import Tensor

from torchgraft.bench.tasks import builtin
from torchgraft.claims.record import ClaimRecord, judge
from torchgraft.claims.sequences import accuracy, train_mixer
from torchgraft.engines.recurrence.heads import ShortConvolution
from torchgraft.engines.recurrence.mixer import Mixer
from torchgraft.parts.mixers.dynamical_systems_framework import CARD, GatedNetwork, NormalizedAttention
from torchgraft.parts.mixers.softmax_attention import SoftmaxAttention

__all__ = ["run"]

_STATES = (8, 16, 32, 64)
#: Steps of the attentions, and of the gated networks, which are slower and are compared with each other only.
_STEPS, _GATED_STEPS, _BATCH, _LR = 200, 100, 32, 1e-2


class _Read(Mixer):
    """A mixer behind a short convolution."""

    def __init__(self, mixer: Mixer) -> None:
        super().__init__(mixer.d_model)
        self.convolution = ShortConvolution(mixer.d_model, 3)
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        """Mix (B, T, D)."""
        y: Tensor = self.mixer(self.convolution(self.checked(x))[0])
        return y


def _stepped(mixer: GatedNetwork) -> GatedNetwork:
    """Run the recurrence token by token: the same numbers, and for states of one number on 24 tokens the fastest."""
    mixer.form = "step"
    return mixer


def _mixers() -> dict[str, Callable[[int], Mixer]]:
    found: dict[str, Callable[[int], Mixer]] = {}
    for n in _STATES:
        found[f"linear attention, n = {n}"] = lambda width, n=n: NormalizedAttention(width, features=n, eta="sum")  # type: ignore[misc]
    found["exp, n = 16"] = lambda width: NormalizedAttention(width, features=16, eta="exp")
    found["softplus, n = 16"] = lambda width: NormalizedAttention(width, features=16, eta="softplus")
    found["qLSTM"] = lambda width: _stepped(GatedNetwork(width))
    found["qLSTM, reversed sigmoid"] = lambda width: _stepped(GatedNetwork(width, gate="reversed"))
    found["softmax"] = lambda width: SoftmaxAttention(width, num_heads=1)
    return found


def run(seeds: Sequence[int] = (0, 1, 2)) -> ClaimRecord:
    """Run the claim.

    Args:
        seeds: weights and order of the data.
    """
    begun = time.perf_counter()
    task = builtin("recall")
    metrics: dict[str, list[float]] = {}
    for seed in seeds:
        for name, build in _mixers().items():
            model = train_mixer(
                task,
                lambda width, build=build: _Read(build(width)),  # type: ignore[misc]
                steps=_GATED_STEPS if name.startswith("qLSTM") else _STEPS,
                batch_size=_BATCH,
                lr=_LR,
                seed=seed,
                hidden=0,
            )
            metrics.setdefault(f"accuracy, {name}", []).append(round(accuracy(model, task), 4))
    mean = {name.removeprefix("accuracy, "): fmean(values) for name, values in metrics.items()}
    growing = [mean[f"linear attention, n = {n}"] for n in _STATES]
    effects = {
        "least gain as n doubles": min(after - before for before, after in itertools.pairwise(growing)),
        "gain from n = 8 to 64": growing[-1] - growing[0],
        "exp above classic at n = 16": mean["exp, n = 16"] - growing[1],
        "softplus above classic at n = 16": mean["softplus, n = 16"] - growing[1],
        "reversed sigmoid above sigmoid": mean["qLSTM, reversed sigmoid"] - mean["qLSTM"],
    }
    return judge(
        CARD.key,
        CARD.claim.figure if CARD.claim is not None else "",
        metrics=metrics,
        effects={name: round(value, 4) for name, value in effects.items()},
        parts={
            "accuracy never falls by more than 0.02 as n doubles": effects["least gain as n doubles"] >= -0.02,
            "accuracy rises from n = 8 to n = 64": effects["gain from n = 8 to 64"] > 0,
            "exp above the classic normaliser": effects["exp above classic at n = 16"] > 0,
            "softplus above the classic normaliser": effects["softplus above classic at n = 16"] > 0,
            "reversed sigmoid at least the qLSTM's": effects["reversed sigmoid above sigmoid"] >= 0,
        },
        seeds=seeds,
        seconds=time.perf_counter() - begun,
    )
