"""Parity and modular arithmetic: the sum so far, modulo 2 or 3, at every place of a sequence of random digits.

The data is synthetic and fixed, independent of the seed. Training and validation sequences have 32 digits and ask for
the running sum at each. Test sequences have 32, 64, 96 or 128 digits, a quarter of the samples each, followed by
padding, and ask for the running sum at the last 32 digits only: so the accuracy at each length says how far beyond
the trained length a model still keeps count. A sample scores the share of its answers that are right; guessing gives
1/2 or 1/3.
"""

from __future__ import annotations

import torch

from torchgraft.bench.models import RecurrentNet
from torchgraft.bench.task import Split, Task
from torchgraft.bench.tasks.baseline import Settings, cached_weights, seeded
from torchgraft.bench.tasks.recall import IGNORED, answered, recall_loss
from torchgraft.bench.training import supervised

__all__ = ["modular_arithmetic", "parity", "running_sums"]

_LENGTH = 32
_LONGER = (1, 2, 3, 4)


def running_sums(samples: int, seed: int, modulus: int, *, longer: tuple[int, ...] = (1,)) -> Split:
    """Return digits (N, T), ``modulus`` where there is padding, and targets (N, T), -100 where nothing is asked.

    Args:
        samples: N.
        seed: decides the digits.
        modulus: the digits are smaller than it.
        longer: lengths in units of 32, one after another; T is the longest.

    Example:
        >>> split = running_sums(2, 0, 2, longer=(1, 4))
        >>> split.inputs.shape, [int((row >= 0).sum()) for row in split.target]
        (torch.Size([2, 128]), [32, 32])
    """
    generator = torch.Generator().manual_seed(seed)
    total = max(longer) * _LENGTH
    digits = torch.randint(modulus, (samples, total), generator=generator)
    length = torch.tensor(longer).repeat(-(-samples // len(longer)))[:samples, None] * _LENGTH  # (N, 1)
    place = torch.arange(total)
    asked = (place >= length - _LENGTH) & (place < length)
    target = (digits.cumsum(dim=1) % modulus).masked_fill(~asked, IGNORED)
    return Split(digits.masked_fill(place >= length, modulus), target)


def _task(name: str, modulus: int, seed: int, settings: Settings, reference: float) -> Task:
    train = running_sums(16384, 1, modulus)
    width = dict(settings.model)["d_model"]
    architecture = seeded(lambda: RecurrentNet(modulus + 1, modulus, d_model=int(width)), seed)
    return Task(
        model=architecture,
        train=train,
        val=running_sums(512, 2, modulus),
        test=running_sums(512, 3, modulus, longer=_LONGER),
        loss=recall_loss,
        score=answered,
        name=name,
        batch_size=settings.batch_size,
        learning_rate=settings.lr,
        reference=reference,
        source=name,
        weights=cached_weights(
            name, seed, settings, build=architecture, split=train, objective=supervised(recall_loss)
        ),
    )


def _settings(modulus: int, steps: int) -> Settings:
    return Settings(
        steps=steps,
        batch_size=64,
        lr=1e-2,
        weight_decay=0.0,
        model=(("d_model", 32), ("depth", 1)),
        data=(("modulus", modulus), ("length", _LENGTH)),
    )


def parity(seed: int = 0) -> Task:
    """Return an LSTM of width 32 that tells whether it has seen an odd number of ones."""
    return _task("parity", 2, seed, _settings(2, 400), 1.0)


def modular_arithmetic(seed: int = 0) -> Task:
    """Return an LSTM of width 32 that adds digits modulo 3."""
    return _task("modular-arithmetic", 3, seed, _settings(3, 400), 1.0)
