"""Train a mixer in a :class:`SequenceModel` by fixed settings, and score it: one harness for claims and comparisons.

Settings are AdamW, a linear rise over the first tenth of the steps, a cosine to zero, gradients clipped at norm 1. One
seed decides the weights and the order of the data; the number of steps, never a clock, ends a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch.nn import functional as F

from torchgraft.bench.task import Split, Task, call
from torchgraft.bench.training import supervised, train
from torchgraft.errors import BadInput
from torchgraft.parts.blocks.sequence_model import Build, Option, SequenceModel

__all__ = ["accuracy", "accuracy_by_length", "bits_per_byte", "train_mixer"]

_IGNORED = -100


def train_mixer(
    task: Task,
    mixer: str | Build,
    *,
    steps: int,
    d_model: int = 64,
    layers: int = 2,
    batch_size: int = 32,
    lr: float = 3e-3,
    weight_decay: float = 0.01,
    seed: int = 0,
    hidden: int | None = None,
    mixer_options: Mapping[str, Option] | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> SequenceModel:
    """Return a model with ``mixer``, trained on ``task`` and in eval mode.

    Args:
        task: a task on sequences.
        mixer: key of a mixer, or a function from the width to one.
        steps: optimiser steps.
        d_model: width.
        layers: blocks.
        batch_size: samples a step.
        lr: the highest learning rate.
        weight_decay: AdamW's, on parameters of two dimensions or more.
        seed: decides weights and order of the data.
        hidden: width of the SwiGLU; 0 leaves it out.
        mixer_options: keyword arguments of a mixer named by key.
        on_step: called after every step with the number of steps done and the loss.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SequenceModel.for_task(task, d_model, layers, mixer, hidden=hidden, mixer_options=mixer_options)
    train(
        model,
        task.train,
        supervised(task.loss),
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        seed=seed,
        weight_decay=weight_decay,
        on_step=on_step,
    )
    return model


def _split(task: Task, split: str | Split) -> Split:
    if isinstance(split, Split):
        return split
    if split not in ("train", "val", "test"):
        raise BadInput(f"split must be 'train', 'val' or 'test', got {split!r}")
    chosen: Split = getattr(task, split)
    return chosen


def _right(model: torch.nn.Module, task: Task, split: str | Split) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which answers are right and which are asked for, (N, T) or (N, 1) each."""
    right, asked = [], []
    model.eval()
    with torch.no_grad():
        for inputs, target in _split(task, split).batches(task.batch_size):
            found = call(model, inputs).argmax(dim=-1)
            right.append((found == target).view(len(target), -1))
            asked.append((target != _IGNORED).view(len(target), -1))
    return torch.cat(right), torch.cat(asked)


def accuracy(model: torch.nn.Module, task: Task, split: str | Split = "test") -> float:
    """Return the share of the answers asked for that are right, between 0 and 1.

    Args:
        model: the model.
        task: whose targets are the right symbols, -100 where nothing is asked.
        split: ``"train"``, ``"val"``, ``"test"``, or samples of one's own.
    """
    right, asked = _right(model, task, split)
    return float(right.sum() / asked.sum())


def accuracy_by_length(model: torch.nn.Module, task: Task, split: str | Split = "test") -> dict[int, float]:
    """Return the accuracy of samples of each length, by length, where a sample ends with its last answer asked for.

    Args are those of :func:`accuracy`.
    """
    right, asked = _right(model, task, split)
    places = torch.arange(1, asked.shape[1] + 1)
    length = (asked * places).amax(dim=1)
    return {
        each: float(right[length == each].sum() / asked[length == each].sum()) for each in sorted(set(length.tolist()))
    }


def bits_per_byte(model: torch.nn.Module, task: Task, split: str | Split = "test") -> float:
    """Return the mean cross-entropy of the next symbol in bits.

    Args are those of :func:`accuracy`.
    """
    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for inputs, target in _split(task, split).batches(task.batch_size):
            output = call(model, inputs)
            total += float(
                F.cross_entropy(output.flatten(0, -2), target.flatten(), ignore_index=_IGNORED, reduction="sum")
            )
            count += int((target != _IGNORED).sum())
    return total / count / math.log(2)
