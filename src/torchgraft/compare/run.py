"""Train several mixers in the same model on one task, each with the same budget and the same seeds."""

from __future__ import annotations

import itertools
import math
import time as clock
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import nn

from torchgraft.bench.files import write_atomic
from torchgraft.bench.task import Task
from torchgraft.bench.tasks import load_task
from torchgraft.bench.training import evaluate
from torchgraft.claims.sequences import accuracy_by_length, train_mixer
from torchgraft.compare.record import Cell, Comparison, Settings, read
from torchgraft.errors import BadInput
from torchgraft.parts.blocks.sequence_model import SequenceModel, build_mixer

__all__ = ["Moment", "try_"]

#: Steps of training where neither steps nor time were given.
_STEPS = 400
#: Steps from which the time of one is estimated, after the first few.
_WARM, _TIMED = 2, 5


@dataclass(frozen=True)
class Moment:
    """How far a comparison is.

    Args:
        key: the mixer in training.
        seed: its seed.
        cell: its place among all cells, from 0.
        cells: how many there are.
        step: steps done.
        steps: steps to do.
        loss: the last loss.
        done: the cell, once it is finished.
    """

    key: str
    seed: int
    cell: int
    cells: int
    step: int
    steps: int
    loss: float
    done: Cell | None = None


def try_(
    keys: Sequence[str],
    task: str | Task,
    *,
    seeds: int | Sequence[int] = 3,
    steps: int | None = None,
    seconds: float | None = None,
    d_model: int = 64,
    layers: int = 2,
    batch_size: int | None = None,
    lr: float | None = None,
    out: Path | str | None = None,
    save: Path | str | None = None,
    progress: Callable[[Moment], None] | None = None,
) -> Comparison:
    """Train a :class:`SequenceModel` with each mixer on ``task`` and return the test scores of every seed.

    Args:
        keys: mixers of the catalogue; the others are compared with the first.
        task: a task on sequences: a built-in name, a file with a ``task()`` function, or a task.
        seeds: how many seeds, from 0 on, or the seeds.
        steps: optimiser steps of every run; default 400.
        seconds: time of every run instead of ``steps``: a mixer whose steps are faster makes more of them.
        d_model: width.
        layers: blocks.
        batch_size: samples a step; default: the task's own.
        lr: the highest learning rate; default: the task's own.
        out: folder of ``try.json``, written after every run; the same call goes on where it was interrupted.
        save: folder in which the model of each mixer with the first seed is kept, ``save/KEY``.
        progress: called during training.

    Raises:
        BadInput: a key is no mixer, the task is not on sequences, an argument is out of range, or ``out`` holds a
            comparison with other settings.

    Example:
        >>> found = try_(["softmax-attention"], "parity", seeds=1, steps=1, d_model=8, layers=1)
        >>> [row.key for row in found.rows()]
        ['softmax-attention']
    """
    chosen = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not chosen or min(chosen) < 0 or len(set(chosen)) < len(chosen):
        raise BadInput(f"seeds must be a number above 0, or different numbers of at least 0, got {seeds}")
    if not keys or len(set(keys)) < len(keys):
        raise BadInput(f"keys must be different mixers, at least one, got {list(keys)}")
    if steps is not None and seconds is not None:
        raise BadInput("give steps or a time for each run, not both")
    if steps is not None and steps < 1:
        raise BadInput(f"steps must be at least 1, got {steps}")
    if seconds is not None and not (seconds > 0 and math.isfinite(seconds)):
        raise BadInput(f"seconds must be above 0, got {seconds}")
    made = load_task(task) if isinstance(task, str) else task
    settings = Settings(
        task=made.source or made.name,
        steps=None if seconds is not None else _STEPS if steps is None else steps,
        seconds=seconds,
        d_model=d_model,
        layers=layers,
        batch_size=made.batch_size if batch_size is None else batch_size,
        lr=made.learning_rate if lr is None else lr,
    )
    for key in keys:  # a mistake in the last key must not cost the runs of those before it
        with torch.random.fork_rng(devices=[]):
            build_mixer(key, d_model)
    path = None if out is None else Path(out) / "try.json"
    found = _begun(path, settings, list(keys), chosen, made.reference)
    cells = [(key, seed) for key in keys for seed in chosen]
    for index, (key, seed) in enumerate(cells):
        folder = Path(save) / key if save is not None and seed == chosen[0] else None
        if found.cell(key, seed) is not None and (folder is None or (folder / "config.json").exists()):
            continue
        known = next((cell.steps for cell in found.cells if cell.key == key), None)

        def say(
            step: int,
            total: int,
            loss: float,
            done: Cell | None = None,
            *,
            place: tuple[int, str, int] = (index, key, seed),
        ) -> None:
            if progress is not None:
                progress(Moment(place[1], place[2], place[0], len(cells), step, total, loss, done))

        cell, model = _run(made, settings, key, seed, known, say)
        if folder is not None:
            model.save_pretrained(folder)
        others = [other for other in found.cells if (other.key, other.seed) != (key, seed)]
        found = found.model_copy(update={"cells": [*others, cell]})
        if path is not None:
            write_atomic(path, found.model_dump_json(indent=1) + "\n")
        say(cell.steps, cell.steps, math.nan, cell)
    if path is not None:
        write_atomic(path, found.model_dump_json(indent=1) + "\n")
    return found


def _begun(
    path: Path | None, settings: Settings, keys: list[str], seeds: list[int], reference: float | None
) -> Comparison:
    """Return the comparison that stands at ``path``, if it has the same settings, or an empty one."""
    from torchgraft import __version__

    cells: list[Cell] = []
    if path is not None and path.exists():
        kept = read(path)
        for name, value in settings.model_dump().items():
            if (before := getattr(kept.settings, name)) != value:
                raise BadInput(
                    f"{path} holds a comparison with {name} {before}, not {value}; delete it or give another folder"
                )
        cells = kept.cells
    return Comparison(
        torchgraft=__version__,
        torch=torch.__version__,
        settings=settings,
        keys=keys,
        seeds=seeds,
        reference=reference,
        cells=cells,
    )


def _trained(
    task: Task, settings: Settings, key: str, seed: int, steps: int, say: Callable[[int, int, float], None]
) -> tuple[SequenceModel, list[float]]:
    """Return the trained model and the time of every step."""
    ticks: list[float] = [clock.perf_counter()]

    def on_step(step: int, loss: float) -> None:
        ticks.append(clock.perf_counter())
        say(step, steps, loss)

    model = train_mixer(
        task,
        key,
        steps=steps,
        d_model=settings.d_model,
        layers=settings.layers,
        batch_size=settings.batch_size,
        lr=settings.lr,
        seed=seed,
        on_step=on_step,
    )
    return model, [after - before for before, after in itertools.pairwise(ticks)]


def _run(
    task: Task, settings: Settings, key: str, seed: int, known: int | None, say: Callable[[int, int, float], None]
) -> tuple[Cell, SequenceModel]:
    steps = settings.steps if settings.steps is not None else known
    if steps is None:  # every seed of a mixer makes the steps that the first one had time for
        _, short = _trained(task, settings, key, seed, _WARM + _TIMED, lambda step, total, loss: None)
        steps = max(1, round((settings.seconds or 0.0) / median(short[_WARM:])))
    model, times = _trained(task, settings, key, seed, steps, say)
    inputs, target = task.test.inputs, task.test.target
    length = int(inputs.shape[1]) if isinstance(inputs, torch.Tensor) else 1
    by_length = accuracy_by_length(model, task) if _has_lengths(target) else {}
    return (
        Cell(
            key=key,
            seed=seed,
            score=float(evaluate(model, task, "test").mean()),
            scores_by_length=by_length,
            steps=steps,
            seconds_per_step=median(times),
            parameters=_parameters(model),
            state_bytes=model.state_bytes(length),
            state_bytes_later=model.state_bytes(2 * length),
        ),
        model,
    )


def _parameters(model: nn.Module) -> int:
    return sum(value.numel() for value in model.parameters())


def _has_lengths(target: torch.Tensor) -> bool:
    """Say whether samples end with their last answer at different places."""
    if target.ndim != 2:
        return False
    last = ((target >= 0) * torch.arange(1, target.shape[1] + 1)).amax(dim=1)
    return bool((last != last[0]).any())
