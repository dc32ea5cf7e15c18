"""Edits: what was done to a model's structure, as data that replays without the calibration set.

A procedure decides (with data, scores, training) and says its decision as edits; an edit is executed here and
nowhere else. Replaying the edits of a model on a fresh copy of the architecture gives modules of the same shapes,
into which the saved weights load bit for bit.
"""

from __future__ import annotations

import copy
import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from torchgraft.errors import BadInput

__all__ = ["Edit", "apply_edits", "edit_from_record", "edit_to_record", "history"]

_HISTORY = "_torchgraft_edits"
_EDITS: dict[str, type[Edit]] = {}
_EditT = TypeVar("_EditT", bound="Edit")


class Edit(BaseModel, ABC):
    """One structural change, pure data.

    A subclass sets ``op`` (unique), declares its fields, and implements :meth:`rewrite`, which must be deterministic
    and need no data. The module that defines it is noted in a recipe and imported when the recipe is loaded.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    op: ClassVar[str]
    #: Whether it only notes something and leaves the model as it is.
    idle: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        op = cls.__dict__.get("op")
        if op is None:
            return
        known = _EDITS.get(op)
        if known is not None and known.__module__ != cls.__module__:
            raise TypeError(f"two edits share the op {op!r}: {known.__module__} and {cls.__module__}")
        _EDITS[op] = cls

    @abstractmethod
    def rewrite(self, model: nn.Module) -> nn.Module:
        """Change ``model`` (which may be changed in place) and return it, its weights carried over where they can be.

        Raises:
            BadInput: the model has no such module or the shapes do not fit.
        """

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """Return what was done to which module, ``module name -> words``, for the report."""


def apply_edits(model: nn.Module, edits: Iterable[Edit]) -> nn.Module:
    """Return ``model`` after ``edits``, in order, each noted in its history; ``model`` itself is left as it was."""
    edited = copy.deepcopy(model)
    for edit in edits:
        before = history(edited)
        edited = edit.rewrite(edited)
        edited.__dict__[_HISTORY] = (*before, edit)
    return edited


def history(model: nn.Module) -> tuple[Edit, ...]:
    """Return the edits that made ``model`` out of its original, oldest first."""
    found: tuple[Edit, ...] = model.__dict__.get(_HISTORY, ())
    return found


def edit_to_record(edit: Edit) -> dict[str, Any]:
    """Return ``edit`` as plain data."""
    return {"op": edit.op, "home": type(edit).__module__, **edit.model_dump(mode="json")}


def edit_from_record(record: dict[str, Any]) -> Edit:
    """Return the edit that ``record`` describes.

    Raises:
        BadInput: the operation is unknown, or its fields are not what it declares.
    """
    fields = dict(record)
    op, home = fields.pop("op", None), fields.pop("home", None)
    if not isinstance(op, str) or not isinstance(home, str) or not home.startswith("torchgraft."):
        raise BadInput(f"an edit needs 'op' and a 'home' within torchgraft, got op {op!r}, home {home!r}")
    if op not in _EDITS:
        try:
            importlib.import_module(home)
        except ImportError:
            raise BadInput(f"edit {op!r}: this torchgraft has no module {home}; a newer version may") from None
    if op not in _EDITS:
        raise BadInput(f"unknown edit {op!r}; known: {', '.join(sorted(_EDITS))}")
    try:
        return _EDITS[op].model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise BadInput(f"edit {op!r}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
