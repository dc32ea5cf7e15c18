"""Copying a sequence, and copying only what matters of it.

The data is synthetic and fixed, independent of the seed. ``copying`` reads 24 letters of an alphabet of 26, a sign to
begin, and its own answer so far: ``s1 ... s24 > s1 ... s23``, where each next letter is wanted from the sign on.
``selective-copying`` reads 8 letters of an alphabet of 16 at random places among 48, noise at the others, and then 8
marks; at the marks the letters are wanted in their order. A sample scores the share of its letters that are right;
guessing gives 1/26 and 1/16.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from torchgraft.bench.models import ByteTransformer
from torchgraft.bench.task import Split, Task
from torchgraft.bench.tasks.baseline import Settings, cached_weights, seeded
from torchgraft.bench.tasks.recall import IGNORED, answered, recall_loss
from torchgraft.bench.training import supervised

__all__ = ["copies", "copying", "selective_copies", "selective_copying"]

_LETTERS, _LENGTH = 26, 24
_CHOICES, _KEPT, _PLACES = 16, 8, 48
_NOISE, _MARK = _CHOICES, _CHOICES + 1


def copies(samples: int, seed: int) -> Split:
    """Return tokens (N, 48) and targets (N, 48); letters are below 26, and 26 is the sign to begin.

    Example:
        >>> split = copies(1, 0)
        >>> bool(torch.equal(split.target[0, 24:], split.inputs[0, :24]))
        True
    """
    letters = torch.randint(_LETTERS, (samples, _LENGTH), generator=torch.Generator().manual_seed(seed))
    begin = torch.full((samples, 1), _LETTERS)
    tokens = torch.cat([letters, begin, letters[:, :-1]], dim=1)
    return Split(tokens, torch.cat([torch.full_like(letters, IGNORED), letters], dim=1))


def selective_copies(samples: int, seed: int) -> Split:
    """Return tokens (N, 56) and targets (N, 56); letters are below 16, 16 is noise and 17 a mark.

    Example:
        >>> split = selective_copies(1, 0)
        >>> tokens, target = split.inputs[0], split.target[0]
        >>> bool(torch.equal(tokens[tokens < 16], target[target >= 0]))
        True
    """
    generator = torch.Generator().manual_seed(seed)
    letters = torch.randint(_CHOICES, (samples, _KEPT), generator=generator)
    places = torch.rand(samples, _PLACES, generator=generator).argsort(dim=1)[:, :_KEPT].sort(dim=1).values
    shown = torch.full((samples, _PLACES), _NOISE).scatter(1, places, letters)
    tokens = torch.cat([shown, torch.full_like(letters, _MARK)], dim=1)
    return Split(tokens, torch.cat([torch.full_like(shown, IGNORED), letters], dim=1))


def _task(
    name: str,
    seed: int,
    settings: Settings,
    build: Callable[[], nn.Module],
    draw: Callable[[int, int], Split],
    reference: float,
) -> Task:
    train = draw(16384, 1)
    architecture = seeded(build, seed)
    return Task(
        model=architecture,
        train=train,
        val=draw(512, 2),
        test=draw(512, 3),
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


def copying(seed: int = 0) -> Task:
    """Return a causal transformer of two blocks and width 64 that repeats 24 letters."""
    settings = Settings(
        steps=600,
        batch_size=32,
        lr=3e-3,
        model=(("d_model", 64), ("depth", 2), ("num_heads", 4), ("spread", 1.0)),
        data=(("letters", _LETTERS), ("length", _LENGTH)),
    )
    return _task(
        "copying",
        seed,
        settings,
        lambda: ByteTransformer(_LETTERS + 1, 2 * _LENGTH, d_model=64, depth=2, num_heads=4, spread=1.0),
        copies,
        1.0,
    )


def selective_copying(seed: int = 0) -> Task:
    """Return a causal transformer of two blocks and width 64 that repeats 8 letters found among noise."""
    settings = Settings(
        steps=800,
        batch_size=32,
        lr=3e-3,
        model=(("d_model", 64), ("depth", 2), ("num_heads", 4), ("spread", 1.0)),
        data=(("letters", _CHOICES), ("kept", _KEPT), ("places", _PLACES)),
    )
    return _task(
        "selective-copying",
        seed,
        settings,
        lambda: ByteTransformer(_CHOICES + 2, _PLACES + _KEPT, d_model=64, depth=2, num_heads=4, spread=1.0),
        selective_copies,
        0.99,
    )
