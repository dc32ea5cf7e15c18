"""Expressions and calls of a dynamic network: what is known is computed, what is tensors is noted in a graph."""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import operator
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from torchgraft.engines.control_flow.graphs import Node
from torchgraft.engines.control_flow.values import (
    ESCAPES,
    Escape,
    Fields,
    Frame,
    Value,
    Watched,
    has_values,
    mapped,
    tensors_only,
)
from torchgraft.errors import Untraceable

__all__ = ["Operations"]

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.MatMult: operator.matmul,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Invert: operator.invert,
}
_SHAPES = {"shape", "ndim", "dtype", "device", "is_cuda", "itemsize", "requires_grad", "is_sparse"}
_SHAPE_METHODS = {"size", "dim", "numel", "nelement", "ndimension", "is_floating_point", "is_complex", "stride"}
_VIEWS = {"T", "mT", "H", "mH", "data", "real", "imag"}


class Operations:
    """Evaluates expressions of one statement into ``node``."""

    def __init__(self) -> None:
        self.node = Node()
        self.line = 0
        self.keep: list[Any] = []  # what is named by its address may not go away
        self.names: dict[int, str] = {}

    def refuse(self, frame: Frame, what: str) -> Untraceable:
        """Return the error that names the place."""
        return frame.code.refuse(self.line, what)

    # -- expressions ------------------------------------------------------------------------------------------------

    def truth(self, value: Any, frame: Frame) -> bool:
        """Return the truth of a value that is known."""
        if isinstance(value, tuple | list | dict):
            return bool(len(value))
        return bool(value)

    def name(self, name: str, frame: Frame) -> Any:
        """Return what a name stands for: a local one, or one that the function finds outside."""
        if name in frame.names:
            return frame.names[name]
        if name in frame.code.outer:
            return frame.code.outer[name]
        raise self.refuse(frame, f"reads {name}, which has no value on some path")

    def evaluate(self, node: ast.expr | None, frame: Frame) -> Any:
        """Return the value of an expression without calls."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return self.name(node.id, frame)
        if isinstance(node, ast.Tuple | ast.List):
            parts: list[Any] = []
            for each in node.elts:
                if isinstance(each, ast.Starred):
                    parts += self.items(self.evaluate(each.value, frame), frame)
                else:
                    parts.append(self.evaluate(each, frame))
            return parts if isinstance(node, ast.List) else tuple(parts)
        if isinstance(node, ast.Dict):
            keys = [self.evaluate(each, frame) for each in node.keys]
            return dict(zip(keys, (self.evaluate(each, frame) for each in node.values), strict=True))
        if isinstance(node, ast.Attribute):
            return self.attribute(self.evaluate(node.value, frame), node.attr, frame)
        if isinstance(node, ast.Slice):
            return slice(
                *(None if part is None else self.evaluate(part, frame) for part in (node.lower, node.upper, node.step))
            )
        if isinstance(node, ast.Subscript):
            held, index = self.evaluate(node.value, frame), self.evaluate(node.slice, frame)
            if not isinstance(held, Value | Tensor) and has_values(index):
                raise self.refuse(frame, f"picks from a {type(held).__name__} by the value of a tensor")
            return self.plain(operator.getitem, (held, index), frame)
        if isinstance(node, ast.BinOp):
            pair = self.evaluate(node.left, frame), self.evaluate(node.right, frame)
            return self.plain(_BINARY[type(node.op)], pair, frame)
        if isinstance(node, ast.UnaryOp):
            value = self.evaluate(node.operand, frame)
            if isinstance(node.op, ast.Not):
                return self.plain(torch.logical_not, (value,), frame) if isinstance(value, Value) else not value
            return self.plain(_UNARY[type(node.op)], (value,), frame)
        if isinstance(node, ast.Compare):
            return self.compare(node, frame)
        raise self.refuse(frame, f"uses a {type(node).__name__}, which is not supported")

    def compare(self, node: ast.Compare, frame: Frame) -> Any:
        """Return the result of a comparison."""
        values = [self.evaluate(each, frame) for each in (node.left, *node.comparators)]
        if not has_values(values):
            pairs = zip(values, values[1:], node.ops, strict=False)
            return all(_COMPARE[type(op)](left, right) for left, right, op in pairs)
        if len(node.ops) > 1:
            raise self.refuse(frame, "chains comparisons of a tensor")
        kind = type(node.ops[0])
        if kind in (ast.Is, ast.IsNot):
            return (values[0] is values[1]) == (kind is ast.Is)
        if kind in (ast.In, ast.NotIn):
            raise self.refuse(frame, "looks for a tensor in something")
        return self.plain(_COMPARE[kind], (values[0], values[1]), frame)

    def plain(self, function: Callable[..., Any], args: tuple[Any, ...], frame: Frame) -> Any:
        """Apply an operator: to tensors as an operation, to anything else now."""
        if any(isinstance(each, Value) for each in args) or (isinstance(args[0], Tensor) and has_values(args)):
            try:
                return self.call(function, args, {}, frame)
            except Escape as escape:
                raise self.refuse(frame, f"has a result whose shape depends on values ({escape})") from None
        try:
            value = function(*args)
        except Exception as error:
            raise self.refuse(frame, f"fails: {error}") from None
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            return Value(value, node=self.tensor_node(value))
        return value

    def attribute(self, held: Any, name: str, frame: Frame) -> Any:
        """Return an attribute: of a tensor its form, of anything else what Python says."""
        if isinstance(held, Value):
            if name in _SHAPES:
                return getattr(held.tensor, name)
            if name in _VIEWS:
                return self.call(getattr, (held, name), {}, frame)
            raise self.refuse(frame, f"reads the attribute {name} of a tensor")
        if isinstance(held, Fields) and name in held.names:
            return held[held.names.index(name)]
        try:
            return getattr(held, name)
        except AttributeError as error:
            raise self.refuse(frame, f"fails: {error}") from None

    def items(self, value: Any, frame: Frame) -> tuple[Any, ...]:
        """Return the parts of what is gone through or unpacked."""
        if isinstance(value, Value):
            if value.tensor.ndim == 0:
                raise self.refuse(frame, "goes through a tensor of no dimensions")
            return tuple(self.call(torch.unbind, (value,), {}, frame))
        try:
            return tuple(value)
        except TypeError:
            raise self.refuse(frame, f"goes through a {type(value).__name__}") from None

    # -- operations -------------------------------------------------------------------------------------------------

    def tensor_node(self, tensor: Tensor) -> fx.Node:
        """Return the operation that names a parameter, buffer or constant."""
        name = self.named(tensor, "t")
        self.node.root[name] = tensor if isinstance(tensor, nn.Parameter) else tensor.detach()
        return self.node.graph.create_node("get_attr", name)

    def named(self, held: Any, letter: str) -> str:
        """Return the name by which graphs call a module or tensor."""
        if id(held) not in self.names:
            self.keep.append(held)
            self.names[id(held)] = f"{letter}{len(self.names)}"
        return self.names[id(held)]

    def place_of(self, value: Value) -> fx.Node:
        """Return the operation or placeholder that holds a value here."""
        if value.node is not None:
            return value.node
        return self.node.read(value.storage, value.tensor)

    def argument(self, value: Any) -> Any:
        """Return a value as the argument of an operation."""
        if isinstance(value, Value):
            return self.place_of(value)
        return self.tensor_node(value) if isinstance(value, Tensor) else value

    def call(self, function: Any, args: Any, options: Any, frame: Frame, *, kind: str = "call_function") -> Any:
        """Run an operation on the example's numbers and note it in the graph."""
        numbers = mapped((tuple(args), dict(options)), lambda each: each.tensor if isinstance(each, Value) else each)
        runs = getattr(type(numbers[0][0]), function) if kind == "call_method" else function
        try:
            with torch.no_grad(), Watched():
                found = runs(*numbers[0], **numbers[1])
        except Escape:
            raise
        except Exception as error:
            name = function if isinstance(function, str) else getattr(function, "__name__", type(function).__name__)
            raise self.refuse(frame, f"fails in {name}: {str(error).splitlines()[0][:160]}") from None
        target: Any = function
        if kind == "call_module":
            target = self.named(function, "m")
        places = mapped((tuple(args), dict(options)), self.argument)
        if not tensors_only(found):
            raise Escape(f"a result of type {type(found).__name__}")
        if kind == "call_module":
            self.node.root[target] = function
        made = self.wrapped(found, self.node.graph.create_node(kind, target, *places))
        if isinstance(made, Value):
            given = [each for each in (*args, *options.values()) if isinstance(each, Value | Tensor)]
            made.number = bool(given) and all(isinstance(each, Value) and each.number for each in given)
        return made

    def wrapped(self, found: Any, node: fx.Node) -> Any:
        """Return a result with its tensors as values of the program."""
        if isinstance(found, Tensor):
            return Value(found, node=node)
        if isinstance(found, dict):
            pick = self.node.graph.call_function
            return {name: self.wrapped(each, pick(operator.getitem, (node, name))) for name, each in found.items()}
        if isinstance(found, tuple | list):
            pick = self.node.graph.call_function
            parts = [
                None if each is None else self.wrapped(each, pick(operator.getitem, (node, place)))
                for place, each in enumerate(found)
            ]
            if type(found).__module__ in ("torch.return_types", "torch"):
                made = Fields(parts)
                made.names = tuple(
                    name for name in ("values", "indices", "Q", "R", "U", "S", "Vh", "L", "V") if hasattr(found, name)
                )
                return made
            return parts if isinstance(found, list) else tuple(parts)
        return found

    def method(self, held: Value, name: str, args: list[Any], options: Mapping[str, Any], frame: Frame) -> Any:
        """Call a method of a tensor."""
        if name in _SHAPE_METHODS:
            return getattr(held.tensor, name)(*args, **options)
        if name == "item":
            return self.number(held, frame)
        if name.endswith("_") and not name.endswith("__"):
            raise self.refuse(frame, f"changes a tensor in place by {name}")
        if not hasattr(held.tensor, name):
            raise self.refuse(frame, f"calls {name}, which a tensor does not have")
        try:
            return self.call(name, (held, *args), options, frame, kind="call_method")
        except Escape as escape:
            raise self.refuse(
                frame, f"turns the values of a tensor into Python's or into a shape by {escape}"
            ) from None

    def number(self, held: Value, frame: Frame, kind: type | None = None) -> Any:
        """Return what stands for a Python number made out of a tensor: a tensor of its precision."""
        if held.tensor.numel() != 1:
            raise self.refuse(frame, f"makes a number of a tensor of shape {tuple(held.tensor.shape)}")
        if held.tensor.ndim:
            held = self.call("reshape", (held, ()), {}, frame, kind="call_method")
        python = kind is not bool
        kind = kind or (float if held.tensor.is_floating_point() else int if held.tensor.dtype != torch.bool else bool)
        wanted = {float: torch.float64, int: torch.int64, bool: torch.bool}[kind]
        if held.tensor.dtype != wanted:
            held = self.call("to", (held, wanted), {}, frame, kind="call_method")
        return Value(held.tensor, node=self.place_of(held), number=python)

    def function(self, function: Any, args: list[Any], options: dict[str, Any], frame: Frame) -> Any:
        """Call anything that is no method of a tensor."""
        if not has_values((args, options)):
            return self.known(function, args, options, frame)
        if isinstance(function, nn.Module):
            return self.call(function, args, options, frame, kind="call_module")
        if inspect.isclass(function) or getattr(builtins, getattr(function, "__name__", ""), None) is function:
            return self.builtin(function, args, options, frame)
        home = str(getattr(function, "__module__", "") or "")
        if home.split(".")[0] in ("torch", "_operator", "operator") or isinstance(function, types.FunctionType):
            if getattr(function, "__name__", "") in ESCAPES:
                raise Escape(function.__name__)
            return self.call(function, args, options, frame)
        if type(function).__module__.startswith("torch"):  # overloads
            return self.call(function, args, options, frame)
        name = getattr(function, "__qualname__", type(function).__name__)
        raise self.refuse(frame, f"hands a tensor to {home}.{name}, which is not supported")

    def known(self, function: Any, args: list[Any], options: Mapping[str, Any], frame: Frame) -> Any:
        """Call something on what is known now."""
        if isinstance(function, nn.Module):
            return self.call(function, args, options, frame, kind="call_module")
        try:
            with torch.no_grad(), Watched():
                value = function(*args, **options)
        except Escape as escape:
            raise self.refuse(frame, f"uses {escape}, whose result is not fixed") from None
        except Exception as error:
            raise self.refuse(frame, f"fails: {error}") from None
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            return Value(value, node=self.tensor_node(value))
        return value

    def builtin(self, function: Any, args: list[Any], options: dict[str, Any], frame: Frame) -> Any:
        """Call a builtin on values among which there are tensors."""
        first = args[0] if args else None
        if function in (bool, int, float) and isinstance(first, Value):
            return self.number(first, frame, function)
        if function is len:
            return first.tensor.shape[0] if isinstance(first, Value) else len(first)
        if function is isinstance and isinstance(first, Value):
            return isinstance(first.tensor, args[1])
        if function is abs and isinstance(first, Value):
            return self.call(torch.abs, (first,), {}, frame)
        if function is sum:
            return functools.reduce(
                lambda a, b: self.plain(operator.add, (a, b), frame), self.items(first, frame), *args[1:] or [0]
            )
        if function in (list, tuple, enumerate, zip, reversed, dict):
            given = [self.items(each, frame) if isinstance(each, Value) else each for each in args]
            made = function(*given, **options)
            return made if function in (list, tuple, dict) else tuple(made)
        name = getattr(function, "__name__", type(function).__name__)
        raise self.refuse(frame, f"hands a tensor to {name}, which is not supported")
