"""Seeded training that survives being killed, and scoring with intervals.

The order of the data depends on the seed and the epoch alone, never on torch's global generator, and a checkpoint
holds everything else that decides the next step. So a run that was killed and resumed equals one that was not, bit for
bit, on the same machine with the same number of threads.

A damaged checkpoint is an error and not a silent restart: writes are atomic, so a kill cannot have caused the damage,
and whoever owns the file should decide whether the hours in it are lost.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from torchgraft.bench.files import read_tensors, write_tensors
from torchgraft.bench.task import Inputs, Split, Task, call, take
from torchgraft.errors import BadInput, UnsafeFile

__all__ = [
    "Objective",
    "TrainRecord",
    "evaluate",
    "evaluate_loss",
    "paired_drop",
    "score_interval",
    "supervised",
    "train",
]

#: ``objective(model, inputs, target, rows)`` -> scalar to minimise; ``rows`` are the samples' places in the split.
Objective: TypeAlias = "Callable[[nn.Module, Inputs, Tensor, Tensor], Tensor]"

_FORMAT = "torchgraft.training/1"
_Z95 = 1.959963984540054


@dataclass(frozen=True)
class TrainRecord:
    """What a training run did.

    Args:
        losses: the objective at every step, from the first, resumed steps included.
        steps: how many steps the run has behind it.
        seconds: wall-clock seconds of this process.
        resumed_at: the step at which a checkpoint was taken up; 0 where there was none.
        stopped_by_deadline: whether the deadline came before the last step.
    """

    losses: tuple[float, ...]
    steps: int
    seconds: float
    resumed_at: int = 0
    stopped_by_deadline: bool = False


def supervised(loss: Callable[[Any, Tensor], Tensor]) -> Objective:
    """Return the objective that applies ``loss(output, target)`` to the model's output.

    Example:
        >>> objective = supervised(nn.functional.mse_loss)
        >>> x = torch.ones(2, 1)
        >>> float(objective(nn.Identity(), x, torch.zeros(2, 1), torch.arange(2)))
        1.0
    """

    def objective(model: nn.Module, inputs: Inputs, target: Tensor, rows: Tensor) -> Tensor:
        return loss(call(model, inputs), target)

    return objective


def train(
    model: nn.Module,
    split: Split,
    objective: Objective,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    weight_decay: float = 0.01,
    schedule: str = "cosine",
    warmup: float = 0.1,
    clip: float | None = 1.0,
    checkpoint: Path | None = None,
    checkpoint_every: int = 100,
    deadline: float | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> TrainRecord:
    """Train ``model`` in place by AdamW and leave it in eval mode.

    Args:
        model: the model; only parameters with ``requires_grad`` move.
        split: the samples; every epoch is a fresh permutation, and an incomplete last batch is left out.
        objective: what to minimise; :func:`supervised` makes one from a loss.
        steps: number of optimiser steps.
        batch_size: samples a step.
        lr: the highest learning rate.
        seed: decides the order of the data and the random numbers that the model draws.
        weight_decay: AdamW's, on parameters of two dimensions or more.
        schedule: ``"cosine"`` falls to zero at the last step, ``"constant"`` does not.
        warmup: the share of the steps over which the rate rises linearly from zero.
        clip: the largest norm of the whole gradient, or ``None``.
        checkpoint: a file that is written every ``checkpoint_every`` steps and at the end; where it already stands,
            the run goes on from it.
        checkpoint_every: steps between checkpoints.
        deadline: a value of ``time.monotonic()`` after which no further step starts; the schedule is not shortened.
        on_step: called after every step with the number of steps done and the loss.

    Raises:
        BadInput: a setting is out of range, the loss becomes NaN or infinite, or the checkpoint is of another run.
        UnsafeFile: the checkpoint is damaged or is a pickle.
    """
    if steps < 0 or batch_size < 1 or checkpoint_every < 1:
        raise BadInput(
            f"training needs steps >= 0, batch_size >= 1 and checkpoint_every >= 1, got steps {steps}, "
            f"batch_size {batch_size}, checkpoint_every {checkpoint_every}"
        )
    if not lr > 0 or not 0 <= warmup <= 1:
        raise BadInput(f"training needs lr > 0 and warmup in [0, 1], got lr {lr}, warmup {warmup}")
    if schedule not in ("cosine", "constant"):
        raise BadInput(f"schedule must be 'cosine' or 'constant', got {schedule!r}")
    started = time.monotonic()
    moving = [p for p in model.parameters() if p.requires_grad]
    settings = {
        "steps": steps,
        "batch_size": batch_size,
        "lr": lr,
        "seed": seed,
        "weight_decay": weight_decay,
        "schedule": schedule,
        "warmup": warmup,
        "clip": clip,
        "samples": len(split),
    }
    if not moving or steps == 0:
        model.eval()
        return TrainRecord((), 0, time.monotonic() - started)
    optimizer = _adamw(moving, lr, weight_decay)
    losses: list[float] = []
    device = moving[0].device
    with _own_randomness(device):
        torch.manual_seed(seed)
        if checkpoint is not None and Path(checkpoint).exists():
            losses = _resume(Path(checkpoint), model, optimizer, moving, settings)
        first = len(losses)
        model.train()
        stopped = False
        epoch, order = -1, torch.empty(0, dtype=torch.long)
        size = min(batch_size, len(split))
        batches = len(split) // size
        for step in range(first, steps):
            if deadline is not None and time.monotonic() >= deadline:
                stopped = True
                break
            if step // batches != epoch:
                epoch = step // batches
                order = _order(len(split), seed, epoch)
            rows = order[(step % batches) * size : (step % batches + 1) * size]
            for group in optimizer.param_groups:
                group["lr"] = lr * _rate(step, steps, schedule, warmup)
            losses.append(_step(model, optimizer, moving, split, rows, objective, clip, step, device))
            if on_step is not None:
                on_step(step + 1, losses[-1])
            if checkpoint is not None and (step + 1) % checkpoint_every == 0 and step + 1 < steps:
                _save(Path(checkpoint), model, optimizer, moving, settings, losses)
        if checkpoint is not None and len(losses) > first:
            _save(Path(checkpoint), model, optimizer, moving, settings, losses)
    model.eval()
    return TrainRecord(tuple(losses), len(losses), time.monotonic() - started, first, stopped)


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    moving: list[nn.Parameter],
    split: Split,
    rows: Tensor,
    objective: Objective,
    clip: float | None,
    step: int,
    device: torch.device,
) -> float:
    inputs, target = _to(take(split.inputs, rows), device), split.target[rows].to(device)
    optimizer.zero_grad(set_to_none=True)
    loss = objective(model, inputs, target, rows)
    if loss.ndim != 0:
        raise BadInput(f"the loss must be a scalar, got shape {tuple(loss.shape)}")
    value = float(loss.detach())
    if not math.isfinite(value):
        raise BadInput(f"the loss became {value} at step {step + 1}; lower the learning rate or look at the data")
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    if clip is not None:
        nn.utils.clip_grad_norm_(moving, clip)
    optimizer.step()
    return value


def _adamw(moving: list[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in moving if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in moving if p.ndim < 2], "weight_decay": 0.0},
    ]
    # The fused kernel is one call for all parameters: the looped one costs as much as the model on small models.
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, fused=True)


def _order(samples: int, seed: int, epoch: int) -> Tensor:
    """Return the permutation of ``epoch``, a function of its arguments alone."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(samples, generator=generator)


def _rate(step: int, steps: int, schedule: str, warmup: float) -> float:
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    if schedule == "constant":
        return 1.0
    return 0.5 * (1.0 + math.cos(math.pi * (step - rising + 1) / max(1, steps - rising)))


def _to(inputs: Inputs, device: torch.device) -> Inputs:
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if isinstance(inputs, tuple):
        return tuple(value.to(device) for value in inputs)
    return {name: value.to(device) for name, value in inputs.items()}


@contextlib.contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


def _save(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    moving: list[nn.Parameter],
    settings: dict[str, Any],
    losses: list[float],
) -> None:
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise BadInput(f"the model's state {name!r} is no tensor and cannot be kept in a checkpoint")
        tensors[f"model/{name}"] = value
    for index, parameter in enumerate(moving):
        for name, value in optimizer.state[parameter].items():
            tensors[f"optimizer/{index}/{name}"] = value
    tensors["random/cpu"] = torch.get_rng_state()
    if moving[0].device.type == "cuda":
        tensors["random/cuda"] = torch.cuda.get_rng_state(moving[0].device)
    tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
    notes = {"format": _FORMAT, "settings": json.dumps(settings, sort_keys=True), "torch": torch.__version__}
    write_tensors(path, tensors, notes)


def _resume(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    moving: list[nn.Parameter],
    settings: dict[str, Any],
) -> list[float]:
    """Load the checkpoint at ``path`` into model, optimiser and generators, and return the losses so far."""
    try:
        tensors, notes = read_tensors(path)
    except UnsafeFile as error:
        raise UnsafeFile(f"checkpoint {error}; delete it to start over") from None
    if notes.get("format") != _FORMAT:
        raise UnsafeFile(f"{path} is no training checkpoint of this version; delete it to start over")
    kept = json.loads(notes["settings"])
    differing = [name for name in settings if kept.get(name) != settings[name]]
    if differing:
        name = differing[0]
        raise BadInput(
            f"checkpoint {path} is of another run: {name} was {kept.get(name)}, now {settings[name]}; "
            "delete it to start over"
        )
    try:
        state = {name[6:]: value for name, value in tensors.items() if name.startswith("model/")}
        model.load_state_dict(state, strict=True)
        for index, parameter in enumerate(moving):
            prefix = f"optimizer/{index}/"
            kept_state = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
            if kept_state:
                optimizer.state[parameter] = {name: value.to(parameter.device) for name, value in kept_state.items()}
        torch.set_rng_state(tensors["random/cpu"])
        if "random/cuda" in tensors and moving[0].device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random/cuda"], moving[0].device)
        return [float(value) for value in tensors["losses"]]
    except (KeyError, RuntimeError, TypeError) as error:
        first = str(error).strip().splitlines()[-1].strip()
        raise UnsafeFile(f"checkpoint {path} does not fit this model: {first}; delete it to start over") from None


def evaluate(model: nn.Module, task: Task, split: Split | str) -> Tensor:
    """Return the score of every sample, shape (N,), in batches of ``task.batch_size``.

    Args:
        model: the model; its mode is restored afterwards.
        task: whose score is taken.
        split: the samples, or the name of one of the task's splits: ``"train"``, ``"val"``, ``"test"``.

    Raises:
        BadInput: the score is not one finite number a sample.
    """
    return torch.cat([_checked_score(task.score(o, t), len(t)) for o, t in _outputs(model, task, split)]).clone()


def evaluate_loss(model: nn.Module, task: Task, split: Split | str) -> float:
    """Return the mean loss of ``model`` over a split, in batches of ``task.batch_size``.

    Args and errors are those of :func:`evaluate`.
    """
    total, samples = 0.0, 0
    for output, target in _outputs(model, task, split):
        total += float(task.loss(output, target)) * len(target)
        samples += len(target)
    return total / max(samples, 1)


def _outputs(model: nn.Module, task: Task, split: Split | str) -> Iterator[tuple[Any, Tensor]]:
    """Yield the output and the target of every batch, in evaluation mode; the model's mode is restored at the end."""
    if isinstance(split, str):
        if split not in ("train", "val", "test"):
            raise BadInput(f"split must be 'train', 'val' or 'test', got {split!r}")
        chosen = getattr(task, split)
    else:
        chosen = split
    anchor = next(model.parameters(), None)
    device = anchor.device if anchor is not None else torch.device("cpu")
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            for inputs, target in chosen.batches(task.batch_size):
                yield call(model, _to(inputs, device)), target.to(device)
    finally:
        for module, mode in modes.items():
            module.training = mode


def _checked_score(found: Any, samples: int) -> Tensor:
    if not isinstance(found, Tensor) or found.shape != (samples,):
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise BadInput(f"the task's score must return one number a sample, shape ({samples},), got {got}")
    scores = found.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(scores).all()):
        raise BadInput("the task's score is NaN or infinite for some samples")
    return scores


def score_interval(scores: Tensor) -> tuple[float, float, float]:
    """Return the mean of per-sample ``scores`` and its 95 % interval by the normal approximation, (mean, low, high).

    Example:
        >>> mean, low, high = score_interval(torch.tensor([0.0, 1.0, 1.0, 0.0]))
        >>> mean, round(low, 3), round(high, 3)
        (0.5, -0.066, 1.066)
    """
    values = scores.double()
    mean = float(values.mean())
    half = _Z95 * float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return mean, mean - half, mean + half


def paired_drop(before: Tensor, after: Tensor) -> tuple[float, float, float]:
    """Return how far the mean score fell from ``before`` to ``after`` on the same samples, with its 95 % interval.

    Example:
        >>> paired_drop(torch.ones(4), torch.ones(4))
        (0.0, 0.0, 0.0)

    Raises:
        BadInput: the two do not hold the same number of samples.
    """
    if before.shape != after.shape:
        raise BadInput(f"paired scores need one shape, got {tuple(before.shape)} and {tuple(after.shape)}")
    return score_interval(before.double() - after.double())
