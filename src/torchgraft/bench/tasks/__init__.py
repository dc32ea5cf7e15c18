"""Tasks by name, by file, or by a local Hugging Face checkpoint."""

from __future__ import annotations

import importlib
from pathlib import Path

from torchgraft.bench.task import Task
from torchgraft.errors import BadInput, nearest

__all__ = ["BUILTIN", "builtin", "load_task"]

_HOMES = {
    "digits-vit": "digits:digits_vit",
    "digits-cnn": "digits:digits_cnn",
    "digits-mlp": "digits:digits_mlp",
    "stdlib-bytes": "stdlib_bytes:stdlib_bytes",
    "stdlib-search": "stdlib_search:stdlib_search",
    "recall": "recall:recall",
    "parity": "running_sums:parity",
    "modular-arithmetic": "running_sums:modular_arithmetic",
    "copying": "copying:copying",
    "selective-copying": "copying:selective_copying",
    "induction": "induction:induction",
    "long-bytes": "long_bytes:long_bytes",
    "sequential-digits": "sequential_digits:sequential_digits",
    "wine": "tabular:wine",
    "diabetes": "tabular:diabetes",
}
#: The names of the built-in tasks.
BUILTIN: tuple[str, ...] = tuple(_HOMES)


def builtin(name: str, seed: int = 0) -> Task:
    """Return the built-in task ``name``; its model is trained, or read from the cache, when it is first asked for.

    Args:
        name: one of :data:`BUILTIN`.
        seed: decides the initial weights and the order of training; never the split.

    Raises:
        BadInput: there is no such task.

    Example:
        >>> builtin("wine").train.inputs.shape[1]
        13
    """
    if name not in _HOMES:
        raise BadInput(f"there is no built-in task {name!r}{nearest(name, list(BUILTIN))}")
    if seed < 0:
        raise BadInput(f"seed must be at least 0, got {seed}")
    module, function = _HOMES[name].split(":")
    task: Task = getattr(importlib.import_module(f"{__name__}.{module}"), function)(seed)
    return task


def load_task(source: str, *, data: Path | None = None, seed: int = 0) -> Task:
    """Return the task that ``source`` names.

    Args:
        source: a built-in name; the path of a ``.py`` file with a function ``task()``; ``hf:DIR`` for a local Hugging
            Face checkpoint; or a task's own ``source``, which for the last is ``hf:DIR?data=FILE``.
        data: for ``hf:DIR``, the JSONL file of data.
        seed: for a built-in task, its seed.

    Raises:
        BadInput: there is no such task, or it cannot be used.
    """
    if not isinstance(source, str) or not source:
        raise BadInput(f"a task is a built-in name, a .py file or hf:DIR, got {source!r}")
    if source.startswith("hf:"):
        from torchgraft.bench.tasks.hf import load_hf

        folder, _, noted = source[3:].partition("?data=")
        chosen = data if data is not None else Path(noted) if noted else None
        if chosen is None:
            raise BadInput(f"{source} needs data: give a JSONL file with --data FILE")
        return load_hf(Path(folder), Path(chosen))
    if data is not None:
        raise BadInput(f"--data belongs to hf:DIR tasks; {source!r} brings its own data")
    if source.endswith(".py") or (source not in _HOMES and Path(source).is_file()):
        from torchgraft.bench.tasks.file_task import load_file

        return load_file(Path(source))
    if Path(source).is_dir() and (Path(source) / "config.json").is_file():
        raise BadInput(f"{source} is a checkpoint folder; write hf:{source} and give --data FILE")
    if source not in _HOMES:
        raise BadInput(f"there is no task {source!r}{nearest(source, list(BUILTIN))}; or give a .py file or hf:DIR")
    return builtin(source, seed)
