"""One place of a stream: a node of the traced clip network, its delay, its time axis, and how it is run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx, nn

from torchgraft.engines.streaming.attention import EncoderCell, RecyclingPositionalEncoding
from torchgraft.engines.streaming.cells import Cell
from torchgraft.errors import BadInput

__all__ = ["Place", "Recorder", "Tracer", "called", "execute"]


class Tracer(fx.Tracer):
    """Trace into transformer encoders, whose own forward branches, and not into encodings of positions."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether ``m`` is one node."""
        if isinstance(m, nn.TransformerEncoder):
            return False
        return isinstance(m, RecyclingPositionalEncoding) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Record a call; an encoder is recorded as its layers."""
        if isinstance(m, nn.TransformerEncoder) and len(args) == 1 and not kwargs:
            x = args[0]
            for layer in m.layers:
                x = layer(x)
            return x if m.norm is None else m.norm(x)
        return super().call_module(m, forward, args, kwargs)


class Recorder(fx.Interpreter):
    """Run a graph and keep what every node gives."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node and keep its value."""
        try:
            value = super().run_node(n)
        except Exception as error:
            raise BadInput(
                f"{called(n)} fails on a clip of another length: {str(error).splitlines()[0][:160]}"
            ) from None
        self.values[n.name] = value
        return value


def called(node: fx.Node) -> str:
    """Return how a node is called in errors: its module, or its function."""
    if node.op == "call_module":
        return str(node.target)
    return f"{getattr(node.target, '__name__', node.target)} ({node.name})"


@dataclass
class Place:
    """One node of the graph and how it runs in a stream."""

    node: fx.Node
    kind: Literal["input", "fixed", "number", "frames", "whole"]
    axis: int = 0
    first: int = 0
    step: int = 1
    cell: Cell | None = None
    windows: EncoderCell | None = None
    reduce: bool = False
    newest: bool = False
    queues: dict[str, Any] = field(default_factory=dict)

    def reset(self) -> None:
        """Forget the stream."""
        self.queues = {}
        for each in (self.cell, self.windows):
            if each is not None:
                each.reset()


def execute(
    graph: fx.GraphModule,
    positions: dict[str, int],
    node: fx.Node,
    env: Mapping[str, Any],
    *,
    frames: tuple[int, int] | None = None,
    uncut: int | None = None,
) -> Any:
    """Run one node on the values of others.

    Args:
        graph: holds the modules and tensors that nodes name.
        positions: how many tokens each encoding of positions has seen; counted on.
        node: what to run.
        env: values by node name.
        frames: time axis and number of frames of the result, which a view takes instead of the clip's.
        uncut: the axis along which a subscript is to take everything, since its frames were left out before.
    """
    given: Any = fx.map_arg((node.args, node.kwargs), lambda each: env[each.name])
    args, options = given
    if node.op == "get_attr":
        held: Any = graph
        for part in str(node.target).split("."):
            held = getattr(held, part)
        return held
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        if isinstance(module, RecyclingPositionalEncoding):
            offset = positions.get(node.name, 0)
            positions[node.name] = offset + args[0].shape[1]
            return module(args[0], offset)
        return module(*args, **options)
    name = str(getattr(node.target, "__name__", node.target))
    if name in ("view", "reshape") and frames is not None:
        sizes = list(args[1] if isinstance(args[1], tuple | list | torch.Size) else args[1:])
        sizes[frames[0]] = frames[1]
        return args[0].reshape(sizes)
    if uncut is not None:
        index = list(args[1]) if isinstance(args[1], tuple) else [args[1]]
        index[uncut] = slice(None)
        return args[0][tuple(index)]
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **options)
    function: Any = node.target
    return function(*args, **options)
