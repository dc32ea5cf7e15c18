"""Training inside a procedure: a bounded number of steps on the task, with ignored parts held still."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from torchgraft.bench.task import Task
from torchgraft.bench.training import supervised, train
from torchgraft.engines.sites import ignored

__all__ = ["finetune", "holding"]


@contextmanager
def holding(model: nn.Module, ignore: Sequence[str]) -> Iterator[None]:
    """Hold what ``ignore`` names still: its parameters take no gradient, and its modules stay in eval mode.

    Modes are restored at the end, and so are the flags of the parameters that were held.

    Args:
        model: the model, trained in place meanwhile.
        ignore: globs of module names.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> with holding(model, ["0"]):
        ...     [name for name, value in model.named_parameters() if value.requires_grad]
        ['1.weight', '1.bias']
    """
    modes = [(module, module.training) for module in model.modules()]
    still = [module for name, module in model.named_modules() if name and ignored(name, ignore)]
    named = model.named_parameters(remove_duplicate=False)
    held = [value for name, value in named if value.requires_grad and ignored(name, ignore)]

    def rest(root: nn.Module, args: object) -> None:
        for module in still:
            module.eval()

    handle = model.register_forward_pre_hook(rest)
    for value in held:
        value.requires_grad_(False)
    try:
        yield
    finally:
        handle.remove()
        for value in held:
            value.requires_grad_(True)
        for module, training in modes:
            module.training = training


def finetune(
    model: nn.Module,
    task: Task,
    *,
    steps: int,
    lr: float | None = None,
    seed: int = 0,
    ignore: Sequence[str] = (),
    on_step: Callable[[int, float], None] | None = None,
) -> None:
    """Train ``model`` in place on the training samples of ``task``, by AdamW without decay on a cosine.

    Args:
        model: the model; modes and flags of its parameters stay as they are.
        task: where samples and loss come from.
        steps: optimiser steps.
        lr: the highest learning rate; default: the task's.
        seed: of the order of the data, and of what the model draws.
        ignore: globs of module names that stay as they are.
        on_step: called after every step with the number of steps done and the loss.
    """
    with holding(model, ignore):
        train(
            model,
            task.train,
            supervised(task.loss),
            steps=steps,
            batch_size=task.batch_size,
            lr=task.learning_rate if lr is None else lr,
            seed=seed,
            weight_decay=0.0,
            on_step=on_step,
        )
