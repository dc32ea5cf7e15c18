"""What the claims on binary convolutions share: a small network on digits, its training, and its accuracy.

The stem and the head are in full precision; three convolutions between them are binary. What the network is scored on
are the 719 digits that no training sees: the validation and the test samples together, since nothing is chosen by them
within a claim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.task import Split
from torchgraft.bench.tasks.digits import correct, splits
from torchgraft.bench.training import Objective, supervised, train
from torchgraft.claims.images import images_of

__all__ = ["BATCH", "held_out", "network", "score", "steps_of", "trained"]

#: Samples a step; the training digits make eight batches.
BATCH = 128


def network(conv: Callable[[int, int], nn.Module], widths: tuple[int, int, int], seed: int) -> nn.Module:
    """Return the network with random weights: a stem, binary convolutions made by ``conv(inputs, outputs)``, a head."""
    first, second, third = widths
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, first, 3, padding=1, bias=False),
            nn.MaxPool2d(2),
            nn.BatchNorm2d(first),
            conv(first, second),
            nn.MaxPool2d(2),
            nn.BatchNorm2d(second),
            conv(second, third),
            nn.BatchNorm2d(third),
            conv(third, third),
            nn.BatchNorm2d(third),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(third, 10),
        )


def steps_of(epochs: int) -> int:
    """Return how many steps ``epochs`` take."""
    return epochs * (len(splits()[0]) // BATCH)


def trained(
    model: nn.Module,
    *,
    epochs: int,
    lr: float,
    seed: int,
    objective: Objective | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> nn.Module:
    """Return ``model``, trained in place on the digits by AdamW without weight decay, a cosine to zero."""
    train(
        model,
        splits()[0],
        supervised(F.cross_entropy) if objective is None else objective,
        steps=steps_of(epochs),
        batch_size=BATCH,
        lr=lr,
        seed=seed,
        weight_decay=0.0,
        on_step=on_step,
    )
    return model


def held_out() -> Split:
    """Return the digits that training does not see."""
    _, second, third = splits()
    return Split(torch.cat([images_of(second), images_of(third)]), torch.cat([second.target, third.target]))


def score(model: nn.Module, split: Split | None = None) -> float:
    """Return the share of the digits that training does not see (or of ``split``) which ``model`` names rightly."""
    data = held_out() if split is None else split
    model.eval()
    with torch.no_grad():
        found: Tensor = correct(model(images_of(data)), data.target)
    return float(found.mean())
