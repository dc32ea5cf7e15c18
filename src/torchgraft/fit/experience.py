"""Which procedure to try first: the price of a unit of gain, from what was measured before and in this run.

The gain of a trial is the mean number of halvings, log2(1 / ratio), of the costs that are aimed at, times what is kept
of the score, exp(-fall / 0.03) with the fall as a share of the original's. ``experience.json`` beside this file holds
both, and the time, of each procedure alone on built-in tasks, as ``benchmarks/shrink.py --learn`` measured them; what a
run measures itself counts more. Only scores and costs of the run are used, never its times, so that runs on exact costs
repeat themselves.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from torchgraft.report.records import Trial

__all__ = ["Known", "gain", "kept", "known", "price"]

#: The fall of the score, as a share of the original's, that makes a gain e times smaller.
SCALE = 0.03
#: The least gain that is reckoned with; a method that gains nothing is dear, not infinitely so.
LEAST = 0.01
#: How many trials the shipped measurements weigh as, and those of other procedures of the same stage.
SHIPPED, STAGE_MATES = 2.0, 1.0
#: Relative seconds of a trial by ``Procedure.expense``, and the gain, where nothing was measured.
SECONDS, UNKNOWN = (1.0, 1.2, 2.0, 6.0), 0.2


@dataclass(frozen=True)
class Known:
    """What is known of a procedure beforehand.

    Args:
        kept: what is kept of the score, exp(-fall / 0.03).
        halvings: mean halvings by cost; empty where nothing was measured.
        seconds: time of a trial, as a multiple of that of the quickest procedure.
    """

    kept: float
    halvings: Mapping[str, float]
    seconds: float

    def gain(self, aims: Sequence[str]) -> float:
        """Return the expected gain in the costs ``aims``; a cost that was not measured counts as the mean of all."""
        if not self.halvings:
            return UNKNOWN
        mean = sum(self.halvings.values()) / len(self.halvings)
        return self.kept * sum(max(self.halvings.get(cost, mean), 0.0) for cost in aims) / max(len(aims), 1)


@cache
def _shipped() -> Mapping[str, Known]:
    source = resources.files("torchgraft.fit").joinpath("experience.json")
    try:
        written = json.loads(source.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return {key: Known(**row) for key, row in written["procedures"].items()}


def known(key: str, expense: int) -> Known:
    """Return what is known of procedure ``key`` before a run."""
    return _shipped().get(key, Known(1.0, {}, SECONDS[min(expense, len(SECONDS) - 1)]))


def kept(trial: Trial, original: float) -> float:
    """Return what a finished trial keeps of the score, from 1 to 0."""
    if trial.validation is None or trial.state == "failed":
        return 0.0
    fall = max(original - trial.validation, 0.0) / max(abs(original), 1e-9)
    return math.exp(-min(fall / SCALE, 50.0))


def gain(trial: Trial, original: float, aims: Sequence[str]) -> float:
    """Return the gain of a finished trial in the costs ``aims``; 0 where it has no score or is dearer in all of them.

    Args:
        trial: the trial.
        original: the original's validation score.
        aims: which costs count.
    """
    found = [max(-math.log2(max(trial.ratios[cost], 1e-9)), 0.0) for cost in aims if cost in trial.ratios]
    return kept(trial, original) * sum(found) / max(len(aims), 1)


def price(
    key: str,
    expense: int,
    *,
    aims: Sequence[str],
    mates: Sequence[str] = (),
    trials: Sequence[Trial] = (),
    original: float = 1.0,
) -> float:
    """Return the expected cost of a unit of gain; lower should be tried sooner.

    The expected gain is the mean of what was known, as two trials, the mean of what procedures of the same stage gained
    in this run, as one, and every trial of this run with the procedure.

    Args:
        key: the procedure.
        expense: its :attr:`~torchgraft.engines.procedure.Procedure.expense`.
        aims: the costs of the budget, or all that are measured where there is none.
        mates: keys of the other procedures of its stage.
        trials: finished trials of this run.
        original: the original's validation score.
    """
    before = known(key, expense)
    own = [gain(trial, original, aims) for trial in trials if key in trial.procedures]
    others = [gain(trial, original, aims) for trial in trials if set(mates) & trial.procedures.keys()]
    total, weight = SHIPPED * before.gain(aims) + sum(own), SHIPPED + len(own)
    if others:
        total, weight = total + STAGE_MATES * sum(others) / len(others), weight + STAGE_MATES
    return before.seconds / max(total / weight, LEAST)
