"""What a run writes: its record, the models, the front, the report; and the note of its settings."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from time import monotonic

import torch

from torchgraft.bench import meters
from torchgraft.bench.files import pack_tensors, write_atomic
from torchgraft.bench.task import Task
from torchgraft.errors import BadInput
from torchgraft.fit import storage
from torchgraft.fit.export import export_model
from torchgraft.fit.workshop import Workshop
from torchgraft.report import records, render

__all__ = ["make_record", "note_settings", "write_outputs"]


def fingerprint_of(workshop: Workshop, settings: Mapping[str, object]) -> str:
    """Return what tells runs apart: the task, the weights of the original, the settings."""
    weights = hashlib.sha256(pack_tensors(workshop.original.state_dict())).hexdigest()
    text = json.dumps({"task": workshop.task.name, "weights": weights, **settings}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def note_settings(folder: Path, workshop: Workshop, settings: Mapping[str, object]) -> str:
    """Note the settings of a run in its folder and return their fingerprint.

    Raises:
        BadInput: the folder holds a run with other settings.
    """
    with storage.folder_lock(folder):
        return _noted(folder, fingerprint_of(workshop, settings), settings)


def _noted(folder: Path, fingerprint: str, settings: Mapping[str, object]) -> str:
    path = folder / "settings.json"
    if path.exists():
        try:
            written = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            written = {}
        if written.get("fingerprint") == fingerprint:
            return fingerprint
        before = written.get("settings", {})
        changed = [k for k, v in settings.items() if json.loads(json.dumps(v, default=str)) != before.get(k)]
        what = ", ".join(changed) or "the model's weights or the version of torchgraft"
        raise BadInput(f"{folder} holds a run with other settings ({what}); choose another --out or delete it")
    write_atomic(path, json.dumps({"fingerprint": fingerprint, "settings": settings}, indent=1, default=str) + "\n")
    return fingerprint


def _command() -> str:
    words = [Path(sys.argv[0]).name, *sys.argv[1:]] if sys.argv and sys.argv[0] else ["python"]
    return shlex.join(words)


def _profile(workshop: Workshop, model: torch.nn.Module) -> list[records.ProfileRow]:
    return [
        records.ProfileRow(
            module=row.name, type=row.type, ms=row.milliseconds, share=row.share, params=row.params, macs=row.macs
        )
        for row in meters.profile(model, workshop.task.example)
    ]


def make_record(
    workshop: Workshop,
    max_drop: float | None,
    begun: float,
    *,
    trials: list[records.Trial],
    refused: list[records.Refused],
    not_helped: list[records.NotHelped],
    contributions: list[records.Contribution],
    nearest: str | None,
    best: str | None,
    model: torch.nn.Module | None,
) -> records.RunRecord:
    """Return the record of a run; ``model`` is the best one, whose profile is taken."""
    profile = {"original": _profile(workshop, workshop.original)}
    if model is not None:
        profile["best"] = _profile(workshop, model)
    return records.RunRecord(
        task=workshop.task.name,
        command=_command(),
        budget=[
            records.Limit(
                cost=limit.cost,
                text=limit.text,
                limit=limit.absolute(workshop.baseline.readings[limit.cost].value),
                ratio=workshop.bound(limit.cost),
            )
            for limit in workshop.limits
        ],
        max_drop=max_drop,
        costs=list(workshop.costs),
        seed=workshop.seed,
        threads=torch.get_num_threads(),
        machine=f"{platform.processor() or platform.machine()}, {platform.system()}",
        torch=torch.__version__,
        torchgraft=version("torchgraft"),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        seconds=monotonic() - begun,
        reference=workshop.task.reference,
        trials=trials,
        profile=profile,
        refused=refused,
        not_helped=not_helped,
        contributions=contributions,
        notes=[],
        feasible=best is not None,
        nearest=nearest,
        best=best,
    )


def write_outputs(
    folder: Path,
    front: Sequence[records.Candidate],
    record: records.RunRecord,
    save: Callable[[], Path] | None,
    model: torch.nn.Module | None,
    task: Task,
    export: str | None,
) -> None:
    """Write everything that a run leaves behind; ``save`` writes the model, where there is one."""
    failed: BadInput | None = None
    with storage.folder_lock(folder):
        if save is not None:
            save()
        else:
            for stale in ("recipe.yaml", "model.safetensors"):
                with contextlib.suppress(FileNotFoundError):
                    (folder / stale).unlink()
        if model is not None and export is not None:
            try:
                record.notes.append(export_model(model, task.example, folder, export))
            except BadInput as error:  # everything else of the run is written before this is raised
                failed = error
                record.notes.append(f"export failed: {error}")
        write_atomic(folder / records.FRONT, records.dump_front(front))
        write_atomic(folder / records.RUN, records.dump_run(record))
        render(folder)
    if failed is not None:
        raise failed
