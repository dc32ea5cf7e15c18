"""What a comparison found, as it stands in ``try.json``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from torchgraft.errors import BadInput

__all__ = ["Cell", "Comparison", "Row", "Settings", "Verdict", "read"]

Verdict = Literal["first", "better", "worse", "cannot tell"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Settings(_Strict):
    """What all cells of a comparison share.

    Args:
        task: where the task comes from.
        steps: optimiser steps, or ``None`` where each mixer got ``seconds``.
        seconds: time of one training run, or ``None`` where steps were given.
        d_model, layers, batch_size, lr: as for :func:`torchgraft.compare.try_`.
    """

    task: str
    steps: int | None
    seconds: float | None
    d_model: int
    layers: int
    batch_size: int
    lr: float


class Cell(_Strict):
    """One mixer, trained once.

    Args:
        key: the mixer.
        seed: decides weights and order of the data.
        score: mean score on the test split.
        scores_by_length: where test samples differ in length, the score at each.
        steps: optimiser steps.
        seconds_per_step: median time of a step.
        parameters: of the whole model.
        state_bytes: what the model remembers of one sequence of the task's length; ``None`` where it keeps no state.
        state_bytes_later: the same after twice as many tokens.
    """

    key: str
    seed: int
    score: float
    scores_by_length: dict[int, float] = {}
    steps: int
    seconds_per_step: float
    parameters: int
    state_bytes: int | None
    state_bytes_later: int | None


class Row(_Strict):
    """One mixer over all seeds.

    Args:
        key: the mixer.
        scores: by seed.
        mean: of the scores.
        spread: their standard deviation; NaN for one seed.
        verdict: against the first mixer, by the 95 % interval of the paired differences.
        difference: mean score less that of the first mixer.
        steps: optimiser steps.
        parameters: of the whole model.
        seconds_per_step: median over all steps of all seeds.
        state_bytes: what one sequence costs to remember.
        state_grows: whether a longer one costs more.
    """

    key: str
    scores: list[float]
    mean: float
    spread: float
    verdict: Verdict
    difference: float
    steps: int
    parameters: int
    seconds_per_step: float
    state_bytes: int | None
    state_grows: bool


# The 97.5 % points of Student's t for 1, 2, ... degrees of freedom; the last is the normal one.
_T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.0)


def _verdict(differences: Sequence[float]) -> Verdict:
    """Return whether the paired differences are credibly above or below zero."""
    if len(differences) < 2:
        return "cannot tell"
    half = _T975[min(len(differences) - 2, len(_T975) - 1)] * stdev(differences) / math.sqrt(len(differences))
    mean = fmean(differences)
    return "better" if mean - half > 0 else "worse" if mean + half < 0 else "cannot tell"


class Comparison(_Strict):
    """Every mixer with every seed on one task.

    Args:
        format: the layout of the file.
        torchgraft, torch: the versions.
        settings: what all cells share.
        keys: the mixers, the one that others are compared with first.
        seeds: the seeds.
        reference: the score that the task's own trained model is known to reach, where there is one.
        cells: what was measured; more than ``keys`` and ``seeds`` ask for, where an earlier run asked for others.
    """

    format: Literal["torchgraft.try/1"] = "torchgraft.try/1"
    torchgraft: str = ""
    torch: str = ""
    settings: Settings
    keys: list[str]
    seeds: list[int]
    reference: float | None = None
    cells: list[Cell] = []

    def cell(self, key: str, seed: int) -> Cell | None:
        """Return the cell of ``key`` and ``seed``, or ``None`` where it was not run yet."""
        return next((cell for cell in self.cells if (cell.key, cell.seed) == (key, seed)), None)

    def rows(self) -> list[Row]:
        """Return one row a mixer that has finished every seed, in the order of ``keys``."""
        found: list[Row] = []
        first: list[float] | None = None
        for key in self.keys:
            cells = [cell for cell in (self.cell(key, seed) for seed in self.seeds) if cell is not None]
            if len(cells) < len(self.seeds):
                continue
            scores = [cell.score for cell in cells]
            first = scores if first is None else first
            differences = [one - other for one, other in zip(scores, first, strict=True)]
            found.append(
                Row(
                    key=key,
                    scores=scores,
                    mean=fmean(scores),
                    spread=stdev(scores) if len(scores) > 1 else math.nan,
                    verdict="first" if not found else _verdict(differences),
                    difference=fmean(differences),
                    steps=round(fmean([cell.steps for cell in cells])),
                    parameters=cells[0].parameters,
                    seconds_per_step=median(cell.seconds_per_step for cell in cells),
                    state_bytes=cells[0].state_bytes,
                    state_grows=cells[0].state_bytes != cells[0].state_bytes_later,
                )
            )
        return found


def read(path: Path) -> Comparison:
    """Return the comparison that stands in the file ``path``.

    Raises:
        BadInput: it cannot be read or is no comparison of this version.
    """
    try:
        return Comparison.model_validate_json(path.read_bytes())
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror or error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise BadInput(
            f"{path} is no comparison of this version ({place}: {first['msg']}); delete it or choose another folder"
        ) from None
