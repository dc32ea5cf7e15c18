"""Training all levels of a nested network at once: which levels a step trains, and the loop around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from torchgraft.bench.task import Inputs, Task, take
from torchgraft.bench.training import Objective, evaluate, supervised, train
from torchgraft.engines.distill import Teacher, objective
from torchgraft.engines.nesting.nested import Nested, recalibrate
from torchgraft.errors import BadInput

__all__ = ["Sampler", "across", "batches", "calibrate", "draws", "evaluate_levels", "train_levels"]

#: The name of a rule by which the levels of a step are chosen.
Sampler: TypeAlias = Literal["uniform", "sandwich", "all"]
_CALIBRATION_BATCHES = 8


def draws(sampler: Sampler, levels: int, count: int, seed: int) -> Callable[[], list[int]]:
    """Return a function that draws the levels that one step trains.

    Args:
        sampler: ``"uniform"``: ``count`` levels, each drawn from all with equal chance; ``"sandwich"``: the least, the
            greatest and random ones between, ``count`` in all; ``"all"``: every level.
        levels: how many levels there are.
        count: how many are trained a step.
        seed: makes the draws.

    Example:
        >>> sorted(draws("sandwich", 5, 3, seed=0)())[::2]
        [0, 4]

    Raises:
        BadInput: the sampler is unknown, or a number is below 1 (below 2 for the sandwich).
    """
    if sampler not in ("uniform", "sandwich", "all"):
        raise BadInput(f"sampler must be 'uniform', 'sandwich' or 'all', got {sampler!r}")
    if levels < 1 or count < (2 if sampler == "sandwich" else 1):
        raise BadInput(f"sampler {sampler!r} cannot draw {count} of {levels} levels")
    generator = torch.Generator().manual_seed(seed)

    def uniform(number: int) -> list[int]:
        return torch.randint(levels, (number,), generator=generator).tolist()

    def draw() -> list[int]:
        if sampler == "all" or levels == 1:
            return list(range(levels))
        if sampler == "sandwich":
            return [levels - 1, 0, *uniform(count - 2)]
        return uniform(count)

    return draw


def across(loss: Objective, draw: Callable[[], list[int]]) -> Objective:
    """Return the objective that is the mean of ``loss`` over the levels that ``draw`` names, on one batch."""

    def mean(model: nn.Module, inputs: Inputs, target: Tensor, rows: Tensor) -> Tensor:
        if not isinstance(model, Nested):
            raise BadInput(f"levels are those of a Nested, got {type(model).__name__}")
        parts = [loss(model.use(level), inputs, target, rows) for level in draw()]
        return torch.stack(parts).mean()

    return mean


def train_levels(
    nested: Nested,
    task: Task,
    *,
    steps: int,
    teacher: nn.Module | None = None,
    sampler: Sampler = "uniform",
    count: int = 2,
    temperature: float = 4.0,
    alpha: float = 0.9,
    lr: float | None = None,
    weight_decay: float = 0.0,
    seed: int = 0,
    deadline: float | None = None,
) -> int:
    """Train the levels of ``nested`` in place, recalibrate their batch norms, and return the steps taken.

    Args:
        nested: the network; left in eval mode, at the level that was set.
        task: training samples and loss.
        steps: optimiser steps; none changes nothing.
        teacher: the model whose outputs the levels follow; without, only labels are learned.
        sampler: see :func:`draws`.
        count: levels trained a step, all on the same batch.
        temperature: of the distillation.
        alpha: share of the distillation.
        lr: highest learning rate; default: the task's.
        weight_decay: 0 by default, since it would shrink weights that no level of a step uses.
        seed: makes every random choice.
        deadline: a :func:`time.monotonic` moment after which no step is begun.

    Raises:
        BadInput: ``steps`` is negative, or a setting is out of range.
    """
    if steps < 0:
        raise BadInput(f"steps must not be negative, got {steps}")
    if steps == 0:
        return 0
    level = nested.level
    if teacher is None:
        loss = supervised(task.loss)
    else:
        guide = Teacher(teacher, task)
        guide.prepare(steps * task.batch_size)
        loss = objective(guide, temperature=temperature, alpha=alpha)
    record = train(
        nested,
        task.train,
        across(loss, draws(sampler, len(nested.edits), count, seed)),
        steps=steps,
        batch_size=task.batch_size,
        lr=task.learning_rate if lr is None else lr,
        seed=seed,
        weight_decay=weight_decay,
        deadline=deadline,
    )
    calibrate(nested, task, seed=seed)
    nested.use(level)
    return record.steps


def batches(task: Task, *, seed: int = 0) -> list[Inputs]:
    """Return inputs of a few random batches of training samples."""
    order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(seed))
    rows = torch.split(order, task.batch_size)[:_CALIBRATION_BATCHES]
    return [take(task.train.inputs, each) for each in rows if len(each) > 1]


def calibrate(nested: Nested, task: Task, *, seed: int = 0) -> None:
    """Set the batch norms of every level to the statistics of some training samples."""
    recalibrate(nested, batches(task, seed=seed))


def evaluate_levels(nested: Nested, task: Task, split: str = "val") -> list[float]:
    """Return the mean score of every level; the level that is set stays."""
    kept = nested.level
    scores = [float(evaluate(nested.use(level), task, split).mean()) for level in range(len(nested.edits))]
    nested.use(kept)
    return scores
