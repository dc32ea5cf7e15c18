"""The artefact of a fit: one safetensors file and one YAML recipe that rebuild a model without data or procedures.

The recipe names the task whose architecture is the starting point, lists the edits, and carries the checksum of the
weights. Replaying the edits gives modules of the right shapes; loading the weights makes the model equal bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from torchgraft.bench.files import pack_tensors, unpack_tensors, write_atomic
from torchgraft.bench.task import Task
from torchgraft.bench.tasks import load_task
from torchgraft.engines.nesting import ElasticModule
from torchgraft.engines.surgery.edits import apply_edits, edit_from_record, edit_to_record, history
from torchgraft.errors import BadInput, UnsafeFile

__all__ = ["SCHEMA", "Recipe", "apply", "read_recipe", "rebuild", "save"]

SCHEMA = 1


class Recipe(BaseModel):
    """What rebuilds a model.

    Args:
        schema_version: version of this written form.
        torchgraft: version of the library that wrote it.
        torch: version of torch that wrote it.
        task: where the original architecture comes from: a built-in name, a file, or ``hf:PATH``.
        seed: the seed of the run.
        procedures: key of each procedure that was applied -> its strength.
        edits: what was done to the structure, in order.
        weights: name of the safetensors file beside the recipe.
        sha256: checksum of that file.
        costs: what was measured, for the reader; nothing is computed from it.
        validation: validation score, for the reader.
        recovery_steps: how many steps of recovery by distillation the model has had.
        budget: for an elastic model, the budget that it is set to when it is rebuilt.
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    torchgraft: str
    torch: str
    task: str
    seed: int = 0
    procedures: dict[str, float] = {}
    edits: list[dict[str, Any]]
    weights: str = "model.safetensors"
    sha256: str
    costs: dict[str, str] = {}
    validation: float | None = None
    recovery_steps: int = 0
    budget: float | None = None


def save(
    model: nn.Module,
    folder: Path | str,
    *,
    task: str,
    seed: int = 0,
    procedures: Mapping[str, float] | None = None,
    costs: Mapping[str, str] | None = None,
    validation: float | None = None,
    recovery_steps: int = 0,
    budget: float | None = None,
) -> Path:
    """Write ``model.safetensors`` and ``recipe.yaml`` into ``folder`` and return the path of the recipe.

    Args:
        model: a model made by procedures; its edit history goes into the recipe.
        folder: where to write; made if it is missing.
        task: the source of the original architecture.
        seed: the seed of the run.
        procedures: key -> strength, for the reader.
        costs: cost -> words, for the reader.
        validation: validation score, for the reader.
        recovery_steps: steps of recovery by distillation, for the reader and for citing.
        budget: for an elastic model, the budget that it is set to when it is rebuilt.

    Raises:
        BadInput: the disk is full; a recipe that was there before is still whole.
    """
    folder = Path(folder)
    data = pack_tensors(model.state_dict())
    digest = hashlib.sha256(data).hexdigest()
    recipe = Recipe(
        torchgraft=version("torchgraft"),
        torch=torch.__version__,
        task=task,
        seed=seed,
        procedures=dict(procedures or {}),
        edits=[edit_to_record(edit) for edit in history(model)],
        sha256=digest,
        costs=dict(costs or {}),
        validation=validation,
        recovery_steps=recovery_steps,
        budget=budget,
    )
    write_atomic(folder / recipe.weights, data)
    path = folder / "recipe.yaml"
    write_atomic(path, yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=120, allow_unicode=True))
    return path


def read_recipe(path: Path | str) -> Recipe:
    """Return the recipe at ``path`` (a file, or the folder that holds ``recipe.yaml``).

    Raises:
        BadInput: there is no such file, it is no recipe, or a newer torchgraft wrote it.
    """
    path = _recipe_path(path)
    try:
        record = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UnsafeFile(f"{path} is damaged: {str(error).splitlines()[0]}") from None
    if not isinstance(record, dict):
        raise UnsafeFile(f"{path} is no recipe: a mapping is expected, got {type(record).__name__}")
    form = record.get("schema_version")
    if isinstance(form, int) and form > SCHEMA:
        raise BadInput(
            f"{path} was written in form {form} by torchgraft {record.get('torchgraft', '?')}; this torchgraft reads "
            f"up to form {SCHEMA}: upgrade it"
        )
    try:
        return Recipe.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        raise BadInput(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def rebuild(recipe: Recipe, architecture: nn.Module, folder: Path | str) -> nn.Module:
    """Return the model of ``recipe``, in eval mode, from a fresh ``architecture`` and the weights in ``folder``.

    Raises:
        UnsafeFile: the weights are damaged, pickled, or not the ones that the recipe was written with.
        BadInput: the architecture is not the one that the recipe was made from.
    """
    folder = Path(folder)
    path = folder / recipe.weights
    if Path(recipe.weights).name != recipe.weights:
        raise UnsafeFile(f"the recipe names weights outside its folder: {recipe.weights!r}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror or error}") from None
    tensors, _ = unpack_tensors(data, str(path))
    if hashlib.sha256(data).hexdigest() != recipe.sha256:
        raise UnsafeFile(f"{path} is not the file that the recipe was written with (its checksum differs)")
    model = apply_edits(architecture, [edit_from_record(record) for record in recipe.edits])
    expected = model.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in expected or name not in tensors:
            where = "the file" if name in tensors else "the model"
            raise BadInput(
                f"the recipe does not fit this architecture: only {where} has {name!r}; is it the same task?"
            )
        ours, theirs = expected[name], tensors[name]
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            raise BadInput(
                f"the recipe does not fit this architecture: {name!r} is {tuple(ours.shape)} {ours.dtype} there and "
                f"{tuple(theirs.shape)} {theirs.dtype} in the file"
            )
    model.load_state_dict(tensors)
    if recipe.budget is not None:
        if not isinstance(model, ElasticModule):
            raise BadInput(f"the recipe sets a budget of {recipe.budget:g}, yet its edits make no elastic model")
        model.set_budget(recipe.budget)
    return model.eval()


def apply(path: Path | str, *, task: Task | None = None) -> nn.Module:
    """Return the model that the recipe at ``path`` describes, bit for bit.

    Args:
        path: ``recipe.yaml``, or the folder that holds it.
        task: the task that gives the architecture; needed where the recipe was made from a user's own file, because
            such a file is code, and torchgraft runs only what its user names.

    Raises:
        BadInput: the recipe is damaged or needs ``task``.
    """
    path = _recipe_path(path)
    recipe = read_recipe(path)
    if task is None:
        if recipe.task.endswith(".py") or not recipe.task:
            raise BadInput(
                f"the recipe was made from the task file {recipe.task or '(a Task object)'}, which is code: name it "
                "yourself (--task FILE, or task=...)"
            )
        task = load_task(recipe.task)
    return rebuild(recipe, task.architecture(), path.parent)


def _recipe_path(path: Path | str) -> Path:
    path = Path(path)
    return path / "recipe.yaml" if path.is_dir() else path
