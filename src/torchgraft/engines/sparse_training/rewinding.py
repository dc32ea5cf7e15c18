"""Train, prune, put the weights that are left back to where they were, and again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchgraft.bench.task import Task
from torchgraft.bench.training import supervised, train
from torchgraft.engines.masks import apply_masks, prunable
from torchgraft.errors import BadInput

__all__ = ["Prune", "Rewound", "Round", "TrainFn", "prune_and_rewind", "trainer"]

#: ``train(model, stop)`` trains ``model`` in place: the whole run, or only its first ``stop`` steps.
TrainFn = Callable[[nn.Module, "int | None"], object]
#: ``prune(end, start, masks)`` -> masks: weights after and before a round's training, and the masks of that round.
Prune = Callable[[Mapping[str, Tensor], Mapping[str, Tensor], Mapping[str, Tensor]], "dict[str, Tensor]"]


@dataclass(frozen=True)
class Round:
    """One round.

    Args:
        masks: the masks under which the round was trained.
        trained: the model after it, with these masks on.
    """

    masks: dict[str, Tensor]
    trained: nn.Module

    @property
    def density(self) -> float:
        """The share of the weights that the masks keep."""
        return _density(self.masks)


def _density(masks: Mapping[str, Tensor]) -> float:
    return sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())


@dataclass(frozen=True)
class Rewound:
    """All rounds, the masks that are left after the last, and the weights that every round starts from.

    Args:
        origin: the model to which every round went back, without masks.
        rounds: the rounds, the dense one first.
        masks: what the last round left.
    """

    origin: nn.Module
    rounds: tuple[Round, ...]
    masks: dict[str, Tensor]

    @property
    def density(self) -> float:
        """The share of the weights that is left at the end."""
        return _density(self.masks)

    def masks_of(self, number: int | None = None) -> dict[str, Tensor]:
        """Return the masks after ``number`` prunings; all of them by default."""
        if number is None or number == len(self.rounds):
            return self.masks
        if not 0 <= number < len(self.rounds):
            raise BadInput(f"number must lie in [0, {len(self.rounds)}], got {number}")
        return self.rounds[number].masks

    def ticket(self, number: int | None = None) -> nn.Module:
        """Return the origin under the masks after ``number`` prunings (all by default), ready to be trained."""
        return _masked(self.origin, self.masks_of(number))

    def reinitialized(self, number: int | None = None, *, seed: int = 0) -> nn.Module:
        """Return the same sparse model with fresh weights, by ``reset_parameters`` of each module that has it."""
        fresh = copy.deepcopy(self.origin)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for module in fresh.modules():
                reset = getattr(module, "reset_parameters", None)
                if callable(reset):
                    reset()
        return _masked(fresh, self.masks_of(number))

    def shuffled(self, number: int | None = None, *, seed: int = 0) -> nn.Module:
        """Return the origin under masks that keep as many weights of each layer, at random places."""
        generator = torch.Generator().manual_seed(seed)
        mixed = {
            name: mask.flatten()[torch.randperm(mask.numel(), generator=generator)].reshape(mask.shape)
            for name, mask in self.masks_of(number).items()
        }
        return _masked(self.origin, mixed)


def _masked(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    made = copy.deepcopy(model)
    apply_masks(made, masks)
    return made


def trainer(
    task: Task, *, steps: int = 400, lr: float | None = None, batch_size: int | None = None, seed: int = 0
) -> TrainFn:
    """Return a function that trains a model on ``task`` at a constant rate, so that the first k steps are a run of k.

    Args:
        task: where the samples and the loss come from.
        steps: steps of a whole run.
        lr: the learning rate of Adam; the task's by default.
        batch_size: samples a step; the task's by default.
        seed: of the order of the data.
    """

    def run(model: nn.Module, stop: int | None) -> object:
        return train(
            model,
            task.train,
            supervised(task.loss),
            steps=steps if stop is None else stop,
            batch_size=batch_size or task.batch_size,
            lr=lr or task.learning_rate,
            seed=seed,
            weight_decay=0.0,
            schedule="constant",
            warmup=0.0,
            clip=None,
        )

    return run


def prune_and_rewind(
    model: nn.Module,
    train_fn: Task | TrainFn,
    prune: Prune,
    rounds: int,
    *,
    rewind_step: int = 0,
    names: Collection[str] | None = None,
) -> Rewound:
    """Train, prune and rewind ``rounds`` times; ``model`` itself is left as it was.

    Args:
        model: the model with its first weights.
        train_fn: a function that trains a model in place, or a task for :func:`trainer`.
        prune: decides which weights stay.
        rounds: how often.
        rewind_step: go back to the weights after so many steps of the first run, instead of the first weights.
        names: the only weights that are masked; by default all that can be.

    Raises:
        BadInput: ``rounds`` is below 1, ``rewind_step`` below 0, or the model has no prunable weight of these names.
    """
    if rounds < 1 or rewind_step < 0:
        raise BadInput(f"rewinding needs rounds >= 1 and rewind_step >= 0, got {rounds} and {rewind_step}")
    run = trainer(train_fn) if isinstance(train_fn, Task) else train_fn
    origin = copy.deepcopy(model)
    if rewind_step:
        run(origin, rewind_step)
    found = {name: weight for name, weight in prunable(origin).items() if names is None or name in names}
    start = {name: weight.detach().clone() for name, weight in found.items()}
    if not start:
        raise BadInput(f"{type(model).__name__} has no prunable weight")
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in start.items()}
    done: list[Round] = []
    for _ in range(rounds):
        trained = _masked(origin, masks)
        run(trained, None)
        done.append(Round(masks, trained))
        end = {name: weight.detach().clone() for name, weight in prunable(trained).items() if name in start}
        masks = prune(end, {name: torch.where(masks[name], weight, 0.0) for name, weight in start.items()}, masks)
    return Rewound(origin, tuple(done), masks)
