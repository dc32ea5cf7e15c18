"""A dynamic network run on all its paths at once: what is known is computed, what is tensors becomes a graph.

A state is a stack of calls, each with its place in the program and its live variables; Python values are part of the
state, tensors are variables of the program. Each state becomes one node of the control-flow graph, so loops over known
lists are unrolled, calls are inlined, and paths that meet in the same state meet in the same node. Both sides of a
decision on a tensor are followed, on the example's own numbers.
"""

from __future__ import annotations

import ast
import operator
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.engines.control_flow.graphs import TEST, Flow, Node
from torchgraft.engines.control_flow.lower import Code, Statement, lower
from torchgraft.engines.control_flow.operations import Operations
from torchgraft.engines.control_flow.values import Escape, Fields, Frame, Value, has_values, mapped

__all__ = ["specialise"]


class _Widen(Exception):
    def __init__(self, names: set[tuple[str, str]]) -> None:
        super().__init__()
        self.names = names


def specialise(model: nn.Module, example: tuple[Tensor, ...], *, limit: int = 64) -> Flow:
    """Return the control-flow graph of ``model``.

    Args:
        model: in eval mode.
        example: its arguments; sizes are taken for fixed.
        limit: how many copies of one statement loops may make; numbers that change more often become tensors.

    Raises:
        Untraceable: something in its source is not supported; file and line are named.
    """
    names: set[tuple[str, str]] = set()
    while True:
        try:
            return _Specialiser(model, limit, names).run(example)
        except _Widen as wider:
            names |= wider.names


class _Specialiser(Operations):
    def __init__(self, model: nn.Module, limit: int, widened: set[tuple[str, str]]) -> None:
        super().__init__()
        self.model, self.limit, self.widened = model, limit, widened
        self.codes: dict[Any, Code] = {}
        self.nodes: list[Node] = []
        self.memo: dict[Any, int] = {}
        self.copies: dict[Any, list[dict[str, Any]]] = {}
        self.code = lower(type(model).forward)

    def run(self, example: tuple[Tensor, ...]) -> Flow:
        values = [Value(each.detach().clone(), storage=f"arg{place}") for place, each in enumerate(example)]
        start = Frame(self.code, 0, {})
        self.node = Node(line=f"{self.code.file}:{self.code.statements[0].line}")
        given = self.bind(self.code, [self.model, *values], {})
        start.names = {name: self.settle(value, f"0.{name}", (self.code.name, name)) for name, value in given.items()}
        self.nodes.append(self.node)
        waiting: list[tuple[int, list[Frame]]] = []
        self.goto(0, [start], waiting)
        while waiting:
            place, frames = waiting.pop()
            self.node = self.nodes[place]
            statement = frames[-1].statement
            self.line = statement.line
            self.node.line = f"{frames[-1].code.file}:{statement.line}"
            for following in self.step(frames):
                self.goto(place, following, waiting)
        return Flow(self.nodes, 0, tuple(f"arg{place}" for place in range(len(example))))

    def goto(self, place: int, frames: list[Frame], waiting: list[tuple[int, list[Frame]]]) -> None:
        """Lead an edge from node ``place`` to the node of the state ``frames``, made if it is not there."""
        for frame in frames:
            live = frame.code.live[frame.place] if frame.place < len(frame.code.live) else frozenset()
            frame.names = {name: value for name, value in frame.names.items() if name in live}
        key = tuple(
            (id(frame.code), frame.place, ast.dump(frame.target) if frame.target else "", self.key(frame.names))
            for frame in frames
        )
        if key not in self.memo:
            spot = tuple((id(frame.code), frame.place) for frame in frames)
            copies = self.copies.setdefault(spot, [])
            copies.append(frames[-1].names)
            if len(copies) > self.limit:
                self.widen(frames[-1], copies)
            self.memo[key] = len(self.nodes)
            self.nodes.append(Node())
            waiting.append((self.memo[key], frames))
        self.nodes[place].following.append(self.memo[key])

    def widen(self, frame: Frame, copies: list[dict[str, Any]]) -> None:
        """Start again with the number of most values among the copies as a tensor."""
        found: dict[str, int] = {}
        for name in frame.names:
            seen = [copy[name] for copy in copies if name in copy]
            own = "%" not in name and "#" not in name and (frame.code.name, name) not in self.widened
            if own and all(type(each) in (int, float) for each in seen):
                found[name] = len(set(seen))
        name = max(found, key=lambda each: found[each], default="")
        if not name or found[name] < 3:
            raise self.refuse(frame, f"makes more than {self.limit} copies of this statement; bound its loops")
        raise _Widen({(frame.code.name, name)})

    def key(self, value: Any) -> Any:
        if isinstance(value, Value):
            return ("tensor", value.storage, tuple(value.tensor.shape), value.tensor.dtype)
        if isinstance(value, tuple | list):
            return (type(value).__name__, *(self.key(each) for each in value))
        if isinstance(value, dict):
            return ("dict", *((name, self.key(each)) for name, each in sorted(value.items())))
        if isinstance(value, int | float | str | bytes | bool | type(None) | torch.dtype | torch.device | range):
            return (type(value).__name__, value)
        if isinstance(value, types.MethodType):
            return ("method", id(value.__self__), id(value.__func__))
        self.keep.append(value)
        return ("object", id(value))

    # -- one statement ----------------------------------------------------------------------------------------------

    def step(self, frames: list[Frame]) -> list[list[Frame]]:
        """Run one statement of the state, into ``self.node``; return the states that may follow."""
        frames = [Frame(frame.code, frame.place, dict(frame.names), frame.target) for frame in frames]
        frame = frames[-1]
        statement = frame.statement
        depth = len(frames) - 1
        if statement.kind == "raise":
            raise self.refuse(frame, "can reach this raise or failed assertion, which a static program cannot")
        if statement.kind == "branch":
            value = self.evaluate(statement.value, frame)
            if not isinstance(value, Value):
                frame.place = statement.then if self.truth(value, frame) else statement.other
                return [frames]
            if value.tensor.numel() != 1:
                shape = tuple(value.tensor.shape)
                raise self.refuse(frame, f"decides by a tensor of shape {shape}; a decision needs one number")
            number = value.number
            if value.tensor.dtype != torch.bool:
                value = self.call(operator.ne, (value, 0), {}, frame)
            self.node.outputs[TEST] = self.place_of(value)
            self.node.test, self.node.number = True, number
            other = [Frame(each.code, each.place, dict(each.names), each.target) for each in frames]
            frame.place, other[-1].place = statement.then, statement.other
            return [frames, other]
        if statement.kind == "return":
            value = self.evaluate(statement.value, frame)
            if depth == 0:
                settled = self.settle(self.dynamic(value), "result")
                self.node.result = self.structure(settled, frame)
                return []
            target = frame.target
            frames = frames[:-1]
            if target is not None:
                self.assign(target, value, frames[-1], depth - 1)
            return [frames]
        if statement.kind == "iter" and isinstance(statement.target, ast.Name):
            items = self.items(self.evaluate(statement.value, frame), frame)
            self.assign(statement.target, items, frame, depth)
            frame.names[statement.target.id + "#"] = 0
        elif statement.kind == "next" and isinstance(statement.value, ast.Name):
            name = statement.value.id
            at = frame.names[name + "#"]
            if at >= len(frame.names[name]):
                frame.place = statement.other
                return [frames]
            frame.names[name + "#"] = at + 1
            self.assign(statement.target, frame.names[name][at], frame, depth)
        elif statement.kind == "append" and isinstance(statement.target, ast.Name):
            held = self.name(statement.target.id, frame)
            if not isinstance(held, list):
                raise self.refuse(frame, f"appends to {statement.target.id}, which is no list made here")
            self.assign(statement.target, [*held, self.evaluate(statement.value, frame)], frame, depth)
        elif isinstance(statement.value, ast.Call):
            return self.invoke(statement, frames)
        else:
            self.assign(statement.target, self.evaluate(statement.value, frame), frame, depth)
        frame.place = statement.then
        return [frames]

    def invoke(self, statement: Statement, frames: list[Frame]) -> list[list[Frame]]:
        """Call a function: as one operation where it can be, else by going into it."""
        frame, depth = frames[-1], len(frames) - 1
        node = statement.value
        if not isinstance(node, ast.Call):
            raise TypeError("a call is invoked")
        args: list[Any] = []
        for each in node.args:
            if isinstance(each, ast.Starred):
                args += self.items(self.evaluate(each.value, frame), frame)
            else:
                args.append(self.evaluate(each, frame))
        options = {str(each.arg): self.evaluate(each.value, frame) for each in node.keywords}
        inner: tuple[Any, list[Any]] | None = None
        value: Any = None
        if isinstance(node.func, ast.Attribute):
            holder = self.evaluate(node.func.value, frame)
            if isinstance(holder, Value):
                value = self.method(holder, node.func.attr, args, options, frame)
                self.assign(statement.target, value, frame, depth)
                frame.place = statement.then
                return [frames]
            function = self.attribute(holder, node.func.attr, frame)
        else:
            function = self.evaluate(node.func, frame)
        if isinstance(function, Value):
            raise self.refuse(frame, "calls a tensor")
        if (
            isinstance(function, types.MethodType)
            and isinstance(function.__self__, nn.Module)
            and has_values((args, options))
        ):
            inner = (function.__func__, [function.__self__, *args])
        else:
            try:
                value = self.function(function, args, options, frame)
            except Escape as escape:
                if isinstance(function, nn.Module):
                    inner = (type(function).forward, [function, *args])
                elif isinstance(function, types.FunctionType):
                    inner = (function, args)
                else:
                    name = getattr(function, "__name__", type(function).__name__)
                    raise self.refuse(
                        frame, f"turns the values of a tensor into Python's by {name} ({escape})"
                    ) from None
        frame.place = statement.then
        if inner is None:
            self.assign(statement.target, value, frame, depth)
            return [frames]
        function, given = inner
        if function not in self.codes:
            self.codes[function] = lower(function)
        code = self.codes[function]
        if len(frames) > 50:
            raise self.refuse(frame, "calls itself without end")
        bound = self.bind(code, given, options)
        depth += 1
        names = {name: self.settle(each, f"{depth}.{name}", (code.name, name)) for name, each in bound.items()}
        return [[*frames, Frame(code, 0, names, statement.target)]]

    def bind(self, code: Code, args: list[Any], options: Mapping[str, Any]) -> dict[str, Any]:
        try:
            bound = code.signature.bind(*args, **options)
        except TypeError as error:
            raise code.refuse(code.statements[0].line, f"is called wrongly: {error}") from None
        bound.apply_defaults()
        return dict(bound.arguments)

    # -- assignments ------------------------------------------------------------------------------------------------

    def assign(self, target: ast.expr | None, value: Any, frame: Frame, depth: int) -> None:
        if isinstance(target, ast.Name):
            frame.names[target.id] = self.settle(value, f"{depth}.{target.id}", (frame.code.name, target.id))
        elif isinstance(target, ast.Tuple):
            parts = self.items(value, frame) if target.elts or value != () else ()
            if len(parts) != len(target.elts):
                raise self.refuse(frame, f"unpacks {len(parts)} values into {len(target.elts)} names")
            for each, part in zip(target.elts, parts, strict=True):
                self.assign(each, part, frame, depth)

    def settle(self, value: Any, path: str, name: tuple[str, str] | None = None) -> Any:
        """Give every tensor in ``value`` a variable of the program."""
        if isinstance(value, Value):
            if value.node is None and value.storage == path:
                return value
            self.node.outputs[path] = self.place_of(value)
            return Value(value.tensor, storage=path, number=value.number)
        if isinstance(value, tuple | list) and has_values(value):
            parts = [self.settle(each, f"{path}.{place}") for place, each in enumerate(value)]
            if isinstance(value, Fields):
                made = Fields(parts)
                made.names = value.names
                return made
            return parts if isinstance(value, list) else tuple(parts)
        if isinstance(value, list):
            return list(value)
        if isinstance(value, dict):
            return {key: self.settle(each, f"{path}.{key}") for key, each in value.items()}
        if name is not None and name in self.widened and type(value) in (int, float):
            return self.settle(self.constant(value), path)
        return value

    def constant(self, number: float) -> Value:
        tensor = torch.tensor(number, dtype=torch.float64 if isinstance(number, float) else torch.int64)
        return Value(tensor, node=self.tensor_node(tensor), number=True)

    def dynamic(self, value: Any) -> Any:
        """Return a result with its parameters and buffers as tensors of the program."""
        return mapped(
            value, lambda each: Value(each, node=self.tensor_node(each)) if isinstance(each, Tensor) else each
        )

    def structure(self, value: Any, frame: Frame) -> Any:
        """Return a result as plain data that names variables."""
        if isinstance(value, Value):
            return {"var": value.storage}
        if isinstance(value, list):
            return {"list": [self.structure(each, frame) for each in value]}
        if isinstance(value, tuple):
            return {"tuple": [self.structure(each, frame) for each in value]}
        if isinstance(value, dict) and all(isinstance(name, str) for name in value):
            return {"dict": {name: self.structure(each, frame) for name, each in value.items()}}
        if value is None or isinstance(value, bool | int | float | str):
            return {"const": value}
        raise self.refuse(frame, f"returns a {type(value).__name__}")
