"""What a dynamic network computes with while it is specialised: tensors of the program, and what stays Python's."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from torchgraft.engines.control_flow.lower import Code, Statement

__all__ = ["ESCAPES", "Escape", "Fields", "Frame", "Value", "Watched", "has_values", "mapped", "tensors_only"]

#: Operations that make Python values, shapes or random numbers out of tensors.
ESCAPES = {
    *("__bool__", "item", "tolist", "__int__", "__float__", "__index__", "__complex__", "__contains__", "numpy"),
    *("equal", "allclose", "is_nonzero", "nonzero", "masked_select", "unique", "unique_consecutive", "__array__"),
    *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "bernoulli", "multinomial", "normal"),
}


class Escape(Exception):
    """An operation whose result is no tensor of known shape."""


class Watched(TorchFunctionMode):
    """Refuse operations by which a tensor's values would become Python's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` unless it is one of them."""
        name = getattr(func, "__name__", "")
        if name in ESCAPES:
            raise Escape(name)
        if name == "__getitem__":
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(each, Tensor) and each.dtype == torch.bool for each in index):
                raise Escape("indexing by a mask")
        return func(*args, **(kwargs or {}))


class Value:
    """A tensor of the program: a number to go on with, and the variable or the operation that holds it.

    ``number`` says that the original holds a Python number here.
    """

    __slots__ = ("node", "number", "storage", "tensor")

    def __init__(self, tensor: Tensor, *, node: fx.Node | None = None, storage: str = "", number: bool = False) -> None:
        self.tensor, self.node, self.storage, self.number = tensor, node, storage, number


class Fields(tuple[Any, ...]):
    """Several results that can be asked for by name."""

    names: tuple[str, ...] = ()


@dataclass
class Frame:
    """One call: its program, its place there, its local names, and what its result is assigned to."""

    code: Code
    place: int
    names: dict[str, Any]
    target: ast.expr | None = None

    @property
    def statement(self) -> Statement:
        """The statement that comes next."""
        return self.code.statements[self.place]


def has_values(value: Any) -> bool:
    """Whether there is a tensor of the program in ``value``."""
    if isinstance(value, Value):
        return True
    if isinstance(value, tuple | list):
        return any(has_values(each) for each in value)
    if isinstance(value, dict):
        return any(has_values(each) for each in value.values())
    return isinstance(value, slice) and any(has_values(each) for each in (value.start, value.stop, value.step))


def mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """Return ``value`` with ``function`` applied to what is not a container."""
    if isinstance(value, torch.Size):
        return tuple(value)
    if isinstance(value, tuple | list):
        parts = [mapped(each, function) for each in value]
        return parts if isinstance(value, list) else tuple(parts)
    if isinstance(value, dict):
        return {name: mapped(each, function) for name, each in value.items()}
    if isinstance(value, slice):
        return slice(*(mapped(each, function) for each in (value.start, value.stop, value.step)))
    return function(value)


def tensors_only(found: Any) -> bool:
    """Whether a result is a tensor, or tensors in containers."""
    if isinstance(found, tuple | list):
        return bool(found) and all(each is None or tensors_only(each) for each in found)
    if isinstance(found, dict):
        return bool(found) and all(isinstance(name, str) and tensors_only(each) for name, each in found.items())
    return isinstance(found, Tensor)
