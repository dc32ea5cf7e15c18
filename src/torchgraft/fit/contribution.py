"""What each procedure contributed to a run: the front that is left without it (leave-one-out)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torchgraft.catalogue import registry
from torchgraft.fit.pareto import hypervolume
from torchgraft.report.records import Candidate, Contribution, Trial

__all__ = ["contributions", "gains", "promise"]

#: The share of the original's score, in size, that may be lost before a model is worth nothing here.
SPAN = 0.1
#: What recovery at length leaves of the fall that a trial has after its own, about (from a tenth to nine tenths).
LEFT = 0.35


def gains(
    validation: float, ratios: Sequence[float], original: float, *, span: float | None = None
) -> tuple[float, ...]:
    """Return what a model gains, as coordinates whose origin is worth nothing.

    The first is 1 where the original's score is kept and falls to 0 where ``span`` is lost; the others are the halvings
    of each cost, log2(1 / ratio), so that a step from 0.5 to 0.25 counts like one from 1 to 0.5.

    Args:
        validation: the model's score.
        ratios: its costs over the original's.
        original: the original's score.
        span: the fall at which nothing is kept; by default a tenth of the original's score, in size.

    Example:
        >>> gains(0.9, [0.5, 0.25], 0.9)
        (1.0, 1.0, 2.0)
    """
    wide = SPAN * max(abs(original), 1e-9) if span is None else span
    kept = 1.0 + (validation - original) / wide
    return (max(kept, 0.0), *(math.log2(1.0 / ratio) if ratio > 0 else 0.0 for ratio in ratios))


def promise(
    validation: float, ratios: Sequence[float], original: float, *, span: float | None = None, left: float = LEFT
) -> tuple[float, ...]:
    """Return what a trial may gain once it is recovered at length, which leaves about ``left`` of what it has lost.

    Args:
        validation: the trial's score after its few steps of recovery.
        ratios: its costs over the original's.
        original: the original's score.
        span: as for :func:`gains`.
        left: the share of the fall that stays.

    Example:
        >>> [round(value, 3) for value in promise(0.8, [0.5], 1.0)]
        [0.3, 1.0]
    """
    return gains(max(validation, original - left * (original - validation)), ratios, original, span=span)


def contributions(candidates: Sequence[Candidate], trials: Sequence[Trial], costs: Sequence[str]) -> list[Contribution]:
    """Return, for each procedure on the front, how much of the front's hypervolume is lost without it.

    Without a procedure, every model and every complete trial that does not use it remains, so what another procedure
    can do as well is not counted. Shares need not add up to 1.

    Args:
        candidates: the front, the original first.
        trials: all trials of the run.
        costs: which costs span the volume.
    """
    original = candidates[0].validation.value
    points = [
        (
            {applied.key for applied in candidate.procedures},
            gains(candidate.validation.value, [candidate.costs[cost].ratio for cost in costs], original),
        )
        for candidate in candidates[1:]
    ]
    standing = {key: 0 for keys, _ in points for key in sorted(keys)}
    for keys, _ in points:
        for key in keys:
            standing[key] += 1
    points += [
        (set(trial.procedures), gains(trial.validation, [trial.ratios[cost] for cost in costs], original))
        for trial in trials
        if trial.state == "complete" and trial.validation is not None and all(cost in trial.ratios for cost in costs)
    ]
    whole = hypervolume([point for _, point in points])
    found = []
    for key, models in standing.items():
        rest = hypervolume([point for keys, point in points if key not in keys])
        lost = 1.0 - rest / whole if whole > 0 else 0.0
        found.append(Contribution(key=key, title=registry.lookup(key).title, models=models, lost_without=lost))
    return sorted(found, key=lambda row: -row.lost_without)
