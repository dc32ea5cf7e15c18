"""What the claims on mixers of image tokens share: digits of several sizes and shares, training, and accuracy.

Settings are those of :func:`torchgraft.bench.training.train`: AdamW, a linear rise over the first tenth of the steps, a
cosine to zero, gradients clipped at norm 1. One seed decides the weights and the order of the data.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.task import Split
from torchgraft.bench.tasks.digits import splits
from torchgraft.bench.training import Objective, supervised, train
from torchgraft.errors import BadInput

__all__ = ["accuracy", "digits", "images_of", "noisy", "train_images"]


def images_of(split: Split) -> Tensor:
    """Return the images of ``split``, (N, 1, size, size)."""
    if not isinstance(split.inputs, Tensor):
        raise BadInput(f"the inputs of a split of images must be one tensor, got {type(split.inputs).__name__}")
    return split.inputs


def noisy(split: Split, deviation: float, *, copies: int, seed: int) -> Split:
    """Return every image ``copies`` times, each time with other Gaussian noise of that deviation."""
    images = images_of(split).repeat(copies, 1, 1, 1)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return Split(images + deviation * noise, split.target.repeat(copies))


def _larger(split: Split, size: int) -> Split:
    images = images_of(split)
    if size == images.shape[-1]:
        return split
    return Split(F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False), split.target)


def _share(split: Split, share: float, seed: int) -> Split:
    """Return ``share`` of the samples of each class, at least one, drawn by ``seed``."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for label in sorted(set(split.target.tolist())):
        where = (split.target == label).nonzero().flatten()
        count = max(1, round(share * len(where)))
        rows.append(where[torch.randperm(len(where), generator=draw)[:count]])
    return split[torch.cat(rows).sort().values]


def digits(*, size: int = 8, share: float = 1.0, seed: int = 0) -> tuple[Split, Split, Split]:
    """Return training, validation and test digits: images (N, 1, size, size) in [0, 1], classes (N,).

    Args:
        size: height and width; other than 8 the images are resized bilinearly.
        share: of the training samples of each class that is kept.
        seed: decides which.

    Example:
        >>> training, _, test = digits(size=16, share=0.1)
        >>> training.inputs.shape, test.inputs.shape
        (torch.Size([109, 1, 16, 16]), torch.Size([360, 1, 16, 16]))

    Raises:
        BadInput: a setting is out of range.
    """
    if size < 1 or not 0 < share <= 1:
        raise BadInput(f"digits need size >= 1 and a share in (0, 1], got size {size}, share {share}")
    training, validation, test = (_larger(split, size) for split in splits())
    return (training if share == 1 else _share(training, share, seed)), validation, test


def train_images(
    build: Callable[[], nn.Module],
    split: Split,
    *,
    steps: int,
    batch_size: int = 64,
    lr: float = 2e-3,
    weight_decay: float = 0.05,
    seed: int = 0,
    objective: Objective | None = None,
) -> nn.Module:
    """Return what ``build`` makes under ``seed``, trained on ``split`` and in eval mode.

    Args:
        build: makes the model; a model that stands already may be returned, and is then trained in place.
        split: the samples.
        steps: optimiser steps.
        batch_size: samples a step.
        lr: the highest learning rate.
        weight_decay: AdamW's, on parameters of two dimensions or more.
        seed: decides weights and order of the data.
        objective: what to minimise; by default the cross-entropy of the classes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
    train(
        model,
        split,
        supervised(F.cross_entropy) if objective is None else objective,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        seed=seed,
        weight_decay=weight_decay,
    )
    return model


def accuracy(model: nn.Module, split: Split, *, batch_size: int = 180) -> float:
    """Return the share of ``split`` whose class ``model``, put into eval mode, names rightly."""
    model.eval()
    with torch.no_grad():
        right = [(model(image).argmax(-1) == target).float() for image, target in split.batches(batch_size)]
    return float(torch.cat(right).mean())
