"""LSSL beside a GRU: digits pixel by pixel, the frequency of a noisy sine, and the sine at half the sampling rate.

Both stand in the same model of two blocks of width 32 without a feed-forward part; the learning rates were found on
seed 100, outside the claim, as were the numbers of steps and the noise of the sines. The steps are few, and the GRU is
far from trained: what is compared is who learns faster. The thresholds did not move.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.task import Split
from torchgraft.bench.tasks.sequential_digits import pixel_splits
from torchgraft.bench.training import supervised, train
from torchgraft.claims.record import ClaimRecord, judge
from torchgraft.engines.recurrence.mixer import Mixer
from torchgraft.parts.blocks.sequence_model import SequenceModel
from torchgraft.parts.mixers.lssl import CARD, LSSL

__all__ = ["run"]

_WIDTH, _LENGTH, _CLASSES = 32, 1000, 10
_DIGIT_STEPS, _SINE_STEPS = 160, 60
_RATES = {"lssl": 1e-2, "gru": 1e-2}


class _GRU(Mixer):
    """torch's own GRU of width D, as a mixer."""

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model)
        self.gru = nn.GRU(d_model, d_model, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.gru(x)[0]
        return y


def _lssl(d_model: int) -> Mixer:
    return LSSL(d_model, d_state=32)


def _sines(count: int, seed: int) -> Split:
    """Return sines of 4, 6, ... 22 periods in 1000 steps, any phase, under noise of deviation 1/2; (N, 1000, 1)."""
    draw = torch.Generator().manual_seed(seed)
    label = torch.randint(_CLASSES, (count,), generator=draw)
    phase = torch.rand(count, 1, generator=draw)
    moment = torch.arange(_LENGTH) / _LENGTH
    clean = (2 * torch.pi * ((4 + 2 * label[:, None]) * moment + phase)).sin()
    return Split((clean + 0.5 * torch.randn(count, _LENGTH, generator=draw))[..., None], label)


def _thinned(split: Split) -> Split:
    """Return every second point of every sample."""
    if not isinstance(split.inputs, Tensor):
        raise TypeError("the sines are one tensor")
    return Split(split.inputs[:, ::2], split.target)


def _accuracy(model: nn.Module, split: Split) -> float:
    with torch.no_grad():
        right = [(model(x).argmax(-1) == y).float() for x, y in split.batches(100)]
    return float(torch.cat(right).mean())


def _trained(name: str, split: Split, steps: int, batch_size: int, seed: int) -> SequenceModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        build = _lssl if name == "lssl" else _GRU
        model = SequenceModel(_WIDTH, 2, build, in_features=1, outputs=10, pool="mean", hidden=0)
    loss = supervised(F.cross_entropy)
    train(model, split, loss, steps=steps, batch_size=batch_size, lr=_RATES[name], seed=seed)
    return model


def run(seeds: Sequence[int] = (0, 1, 2)) -> ClaimRecord:
    """Run the claim.

    Args:
        seeds: weights, order of the data, and the sines.
    """
    begun = time.perf_counter()
    metrics: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        metrics.setdefault(name, []).append(round(value, 4))

    images, _, unseen = pixel_splits()
    for seed in seeds:
        waves, fresh = _sines(1024, 2 * seed), _sines(400, 2 * seed + 1)
        for name in ("lssl", "gru"):
            model = _trained(name, images, _DIGIT_STEPS, 32, seed)
            note(f"{name}: parameters", sum(value.numel() for value in model.parameters()))
            note(f"{name}: accuracy on digits", _accuracy(model, unseen))
            model = _trained(name, waves, _SINE_STEPS, 16, seed)
            note(f"{name}: accuracy on sines", _accuracy(model, fresh))
            if name == "lssl":
                half = _thinned(fresh)
                note("lssl: accuracy on sines at half rate, dt as it was", _accuracy(model, half))
                slower = copy.deepcopy(model)
                for mixer in slower.mixers():
                    if isinstance(mixer, LSSL):
                        mixer.resample_(2.0)
                note("lssl: accuracy on sines at half rate, dt doubled", _accuracy(slower, half))
    mean = {name: fmean(values) for name, values in metrics.items()}
    effects = {
        "digits, LSSL minus GRU": mean["lssl: accuracy on digits"] - mean["gru: accuracy on digits"],
        "sines, LSSL minus GRU": mean["lssl: accuracy on sines"] - mean["gru: accuracy on sines"],
        "sines, lost at half rate": mean["lssl: accuracy on sines"]
        - mean["lssl: accuracy on sines at half rate, dt doubled"],
    }
    return judge(
        CARD.key,
        CARD.claim.figure if CARD.claim is not None else "",
        metrics=metrics,
        effects={name: round(value, 4) for name, value in effects.items()},
        parts={
            "digits: at least 1 point above the GRU": effects["digits, LSSL minus GRU"] >= 0.01,
            "sines: at least 10 points above the GRU": effects["sines, LSSL minus GRU"] >= 0.10,
            "half rate with dt doubled: at most 3 points lost": effects["sines, lost at half rate"] <= 0.03,
        },
        seeds=seeds,
        seconds=time.perf_counter() - begun,
    )
