"""Handwritten digits read one pixel at a time: 64 steps of one number, and the class after the last.

The images, the split and the score are those of ``digits-vit``; rows follow one another from the top.
"""

from __future__ import annotations

import torch.nn.functional as F

from torchgraft.bench.models import RecurrentNet
from torchgraft.bench.task import Split, Task
from torchgraft.bench.tasks.baseline import Settings, cached_weights, seeded
from torchgraft.bench.tasks.digits import correct, splits
from torchgraft.bench.training import supervised

__all__ = ["pixel_splits", "sequential_digits"]

_SETTINGS = Settings(steps=600, batch_size=64, lr=1e-2, weight_decay=0.0, model=(("d_model", 64), ("depth", 1)))


def pixel_splits() -> tuple[Split, Split, Split]:
    """Return train, validation and test samples: pixels (N, 64, 1) in [0, 1], classes (N,)."""
    first, second, third = (Split(part.inputs.view(len(part), 64, 1), part.target) for part in splits())  # type: ignore[union-attr]  # images are one tensor
    return first, second, third


def sequential_digits(seed: int = 0) -> Task:
    """Return an LSTM of width 64 that reads digits pixel by pixel."""
    train, val, test = pixel_splits()
    architecture = seeded(lambda: RecurrentNet(None, 10, d_model=64, pooled=True), seed)
    return Task(
        model=architecture,
        train=train,
        val=val,
        test=test,
        loss=F.cross_entropy,
        score=correct,
        name="sequential-digits",
        batch_size=_SETTINGS.batch_size,
        learning_rate=_SETTINGS.lr,
        reference=0.91,
        source="sequential-digits",
        weights=cached_weights(
            "sequential-digits", seed, _SETTINGS, build=architecture, split=train, objective=supervised(F.cross_entropy)
        ),
    )
