"""What a run of ``fit`` leaves behind as data: ``front.json`` (a list of candidates) and ``run.json`` (all the rest).

Every model refuses unknown keys and non-finite numbers. ``run.json`` carries the schema version of both files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from torchgraft.errors import BadInput

__all__ = [
    "FRONT",
    "RUN",
    "SCHEMA_VERSION",
    "Applied",
    "Candidate",
    "Contribution",
    "CostRecord",
    "Interval",
    "Limit",
    "NotHelped",
    "ProfileRow",
    "Refused",
    "RunRecord",
    "Trial",
    "dump_front",
    "dump_run",
    "load_front",
    "load_run",
]

SCHEMA_VERSION = 1
FRONT = "front.json"
RUN = "run.json"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Interval(_Record):
    """A number with its 95 % interval (all three equal where it is exact)."""

    value: float
    low: float
    high: float

    @model_validator(mode="after")
    def _ordered(self) -> Interval:
        if self.low > self.high:
            raise ValueError(f"low must not exceed high, got low {self.low} and high {self.high}")
        return self


class CostRecord(Interval):
    """A measured cost, and its ratio to the original's.

    Args:
        value: the median, or the exact count.
        low: lower end of the 95 % interval.
        high: upper end.
        unit: ``"ms"``, ``"B"`` or ``""`` for a count.
        ratio: candidate / original, from paired rounds where it is a time.
        ratio_low: lower end of the ratio's interval.
        ratio_high: upper end.
    """

    unit: str
    ratio: float
    ratio_low: float
    ratio_high: float


class Applied(_Record):
    """One procedure as it was applied.

    Args:
        key: the method.
        title: its name in words.
        strength: from 0 to 1.
        sites: names of the places that it acted on.
        changes: site or module name -> what was done there, in words.
    """

    key: str
    title: str
    strength: float
    sites: list[str]
    changes: dict[str, str]


class Candidate(_Record):
    """One model of the front.

    Args:
        name: ``"original"``, or a short unique name.
        procedures: what was done, in order; none for the original.
        validation: the validation score.
        drop: the paired fall of the validation score against the original; positive is worse.
        test: the test score, only where the model was chosen.
        costs: cost name -> reading.
        feasible: whether it meets every limit and the largest allowed drop.
        chosen: whether it was chosen and therefore met the test split.
        best: whether it is the model that was saved.
        verdict: ``"original"``, ``"helped"``, ``"tie"``, ``"harmed"`` or ``"cannot tell"``.
        why: one sentence that explains the verdict.
        recovery_steps: training steps spent on recovery.
    """

    name: str
    procedures: list[Applied]
    validation: Interval
    drop: Interval
    test: Interval | None
    costs: dict[str, CostRecord]
    feasible: bool
    chosen: bool
    best: bool
    verdict: str
    why: str
    recovery_steps: int


class Trial(_Record):
    """One trial of the search, whatever became of it.

    Args:
        number: its number in the study.
        state: how it ended.
        procedures: method key -> strength.
        validation: the validation score, or ``None`` where it was not reached (NaN becomes ``None``).
        ratios: cost name -> ratio to the original.
        reason: why it was stopped or failed, or empty.
        seconds: wall-clock time.
    """

    number: int
    state: Literal["complete", "stopped early", "failed"]
    procedures: dict[str, float]
    validation: float | None
    ratios: dict[str, float]
    reason: str
    seconds: float

    @field_validator("validation", mode="before")
    @classmethod
    def _no_score_is_none(cls, value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value


class Limit(_Record):
    """One limit of the budget.

    Args:
        cost: which cost it limits.
        text: as it was written, such as ``"latency=0.5x"``.
        limit: the largest allowed value.
        ratio: the same as a share of the original's cost.
    """

    cost: str
    text: str
    limit: float
    ratio: float


class ProfileRow(_Record):
    """What one module costs: ``ms`` of its own time in a forward pass, and ``share`` (0 to 1) of the whole."""

    module: str
    type: str
    ms: float
    share: float
    params: int
    macs: int


class NotHelped(_Record):
    """Something that was tried and did not help: what, why, and the number that shows it."""

    what: str
    why: str
    evidence: str


class Contribution(_Record):
    """What a procedure on the front contributed.

    Args:
        key: the method.
        title: its name in words.
        models: how many models of the front use it.
        lost_without: the share, 0 to 1, of the front's hypervolume that is lost when all that use it are left out.
    """

    key: str
    title: str
    models: int
    lost_without: float


class Refused(_Record):
    """A place where a procedure could not act, the reason, and the source line where one is known."""

    procedure: str
    site: str
    reason: str
    line: str | None = None


class RunRecord(_Record):
    """Everything about a run that is not a candidate of the front.

    Args:
        schema_version: version of ``run.json`` and of the ``front.json`` beside it.
        task: name of the task.
        command: what to type to run it again.
        budget: the limits.
        max_drop: the largest allowed fall of the validation score, or ``None`` where none was set.
        costs: names of the measured costs.
        seed: the seed.
        threads: threads of torch while measuring.
        machine: the processor and system, in words.
        torch: version of torch.
        torchgraft: version of torchgraft.
        date: when the run ended, ISO 8601.
        seconds: wall-clock time of the run.
        reference: the score that the original is known to reach on the test split, or ``None``.
        trials: every trial of the search.
        profile: ``"original"`` and, where there is one, ``"best"`` -> cost by module.
        refused: where procedures could not act.
        not_helped: what was tried and did not help.
        contributions: what each procedure on the front contributed, the most first.
        notes: anything else that a reader needs.
        feasible: whether a model meets the budget.
        nearest: name of the candidate nearest to the budget where none meets it.
        best: name of the model that was saved, or ``None``.
    """

    schema_version: int = Field(default=SCHEMA_VERSION)
    task: str
    command: str
    budget: list[Limit]
    max_drop: float | None
    costs: list[str]
    seed: int
    threads: int
    machine: str
    torch: str
    torchgraft: str
    date: str
    seconds: float
    reference: float | None
    trials: list[Trial]
    profile: dict[str, list[ProfileRow]]
    refused: list[Refused]
    not_helped: list[NotHelped]
    contributions: list[Contribution] = []
    notes: list[str]
    feasible: bool
    nearest: str | None
    best: str | None


_FRONT: TypeAdapter[list[Candidate]] = TypeAdapter(list[Candidate])


def dump_front(candidates: Sequence[Candidate]) -> str:
    """Return the text of ``front.json``, the original first.

    Raises:
        BadInput: the list is empty, the original is not first, or two candidates share a name.
    """
    candidates = list(candidates)
    _check_front(candidates, FRONT)
    return _FRONT.dump_json(candidates, indent=1).decode("utf-8") + "\n"


def dump_run(record: RunRecord) -> str:
    """Return the text of ``run.json``."""
    return record.model_dump_json(indent=1) + "\n"


def load_front(path: Path | str) -> list[Candidate]:
    """Return the candidates of the ``front.json`` at ``path`` (or in the folder ``path``), the original first.

    Raises:
        BadInput: the file is missing, damaged, holds an unknown key, or does not start with the original.
    """
    path = _file(path, FRONT)
    data = _read_json(path)
    if not isinstance(data, list):
        raise BadInput(f"{path} must hold a list of candidates, got {type(data).__name__}; run fit again to write it")
    try:
        candidates = _FRONT.validate_python(data)
    except ValidationError as error:
        raise BadInput(_one_line(path, error)) from None
    _check_front(candidates, str(path))
    return candidates


def load_run(path: Path | str) -> RunRecord:
    """Return the record of the ``run.json`` at ``path`` (or in the folder ``path``).

    Raises:
        BadInput: the file is missing, damaged, holds an unknown key, or was written by another schema version.
    """
    path = _file(path, RUN)
    data = _read_json(path)
    if not isinstance(data, dict):
        raise BadInput(f"{path} must hold one record, got {type(data).__name__}; run fit again to write it")
    version = data.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        advice = "update torchgraft" if newer else "run fit again to write it anew"
        raise BadInput(f"{path} has schema_version {version!r}, this torchgraft reads {SCHEMA_VERSION}; {advice}")
    try:
        return RunRecord.model_validate(data)
    except ValidationError as error:
        raise BadInput(_one_line(path, error)) from None


def _file(path: Path | str, name: str) -> Path:
    path = Path(path)
    return path / name if path.is_dir() else path


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist; a run of `torchgraft fit` writes it") from None
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is damaged or is no JSON ({error}); run fit again to write it") from None


def _one_line(path: Path, error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "the file"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{path} is not valid: {where}: {first['msg']}{more}; run fit again to write it"


def _check_front(candidates: list[Candidate], where: str) -> None:
    if not candidates or candidates[0].name != "original":
        first = candidates[0].name if candidates else "an empty list"
        raise BadInput(f"{where} must start with the candidate named 'original', got {first!r}")
    names = [candidate.name for candidate in candidates]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise BadInput(f"{where} holds two candidates named {twice[0]!r}; names must be unique")
    if sum(candidate.best for candidate in candidates) > 1:
        raise BadInput(f"{where} marks more than one candidate as best")
