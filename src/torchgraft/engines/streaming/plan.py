"""From a traced clip network to the places of its stream: which axis is time, what each waits for and remembers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn

from torchgraft.engines.streaming.attention import EncoderCell, RecyclingPositionalEncoding
from torchgraft.engines.streaming.cells import Cell, LastCell, MeanCell, SkipCell, WindowCell, window_cell
from torchgraft.engines.streaming.places import Place, called
from torchgraft.errors import BadInput

__all__ = ["Plan"]

_TOKENWISE = (nn.LayerNorm, nn.Linear, nn.Dropout, nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Identity)
_REDUCERS = {"mean", "amax", "amin", "sum", "max", "min"}
_POOLERS = ("AdaptiveAvgPool", "AdaptiveMaxPool")


def _different(a: Any, b: Any) -> list[int]:
    if a.ndim != b.ndim:
        return [-1]
    return [axis for axis in range(a.ndim) if a.shape[axis] != b.shape[axis]]


class Plan:
    """The places of a stream, in the order in which they run.

    Args:
        graph: the traced clip network.
        short: the value of every node on a clip.
        long: the same on a longer clip.
        time: the time axis of the clip.

    Raises:
        BadInput: something cannot run as a stream; it is named.
    """

    def __init__(self, graph: fx.GraphModule, short: Mapping[str, Any], long: Mapping[str, Any], time: int) -> None:
        self.graph, self.time = graph, time
        self.places: list[Place] = []
        self.by: dict[str, Place] = {}
        for node in graph.graph.nodes:
            if node.op != "output":
                self._add(node, short, long)
        self.output = self._last_place()

    def _last_place(self) -> Place:
        (node,) = (node for node in self.graph.graph.nodes if node.op == "output")
        given = node.args[0]
        if not isinstance(given, fx.Node) or self.by[given.name].kind not in ("frames", "whole", "input"):
            raise BadInput("the model must return one tensor that depends on its clip")
        return self.by[given.name]

    def _add(self, node: fx.Node, short: Mapping[str, Any], long: Mapping[str, Any]) -> None:
        place = self._place(node, short, long)
        self.places.append(place)
        self.by[node.name] = place

    def _place(self, node: fx.Node, short: Mapping[str, Any], long: Mapping[str, Any]) -> Place:
        name, value = called(node), short[node.name]
        if node.op == "placeholder":
            if any(place.kind == "input" for place in self.places):
                raise BadInput("the model must take one clip and nothing else")
            return Place(node, "input", self.time)
        sources = [self.by[each.name] for each in node.all_input_nodes]
        streams = [each for each in sources if each.kind in ("input", "frames", "whole")]
        if not isinstance(value, Tensor):
            if isinstance(value, tuple | list) and any(isinstance(each, Tensor) for each in value):
                raise BadInput(f"{name} gives several tensors; a stream knows one")
            moving = bool(streams) or any(each.kind == "number" for each in sources)
            return Place(node, "number" if moving else "fixed")
        if not streams:
            if any(each.kind == "number" for each in sources):
                raise BadInput(f"{name} makes a tensor out of the length of the clip; a stream has none")
            return Place(node, "fixed")
        if len({each.kind == "whole" for each in streams}) > 1:
            raise BadInput(f"{name} puts frames together with what was read off a whole clip")
        first = max(each.first for each in streams)
        if len({each.step for each in streams}) > 1:
            raise BadInput(f"{name} puts streams of different strides together: {[each.step for each in streams]}")
        step, source = streams[0].step, streams[0]
        module = self.graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if source.kind == "whole":
            single = isinstance(module, nn.TransformerEncoderLayer) and self._newest_only(node, 1, short)
            place = Place(node, "whole", first=first, step=step)
            if single:
                place.windows = EncoderCell(self._encoder(module, name), value.shape[1], single=True)
            place.newest = single or (source.newest and isinstance(module, _TOKENWISE))
            return place
        given = short[source.node.name]
        count, longer = given.shape[source.axis], long[source.node.name].shape[source.axis]
        if isinstance(module, nn.TransformerEncoderLayer):
            layer = self._encoder(module, name)
            if source.axis != 1:
                raise BadInput(f"{name} needs the time axis at 1 (batch_first), it stands at {source.axis}")
            single = self._newest_only(node, 1, short)
            windows, wait = EncoderCell(layer, count, single=single), step * (count - 1)
            return Place(node, "whole", first=first + wait, step=step, windows=windows, newest=single)
        cell: Cell | None = window_cell(module, source.axis, name) if module is not None else None
        if isinstance(module, RecyclingPositionalEncoding):
            return Place(node, "frames", source.axis, first, step)
        axes = _different(value, long[node.name])
        if not axes:
            return self._whole(node, source, count, first, step)
        if len(axes) > 1 or axes[0] < 0:
            raise BadInput(f"{name} has the length of the clip in several sizes; frames cannot be told apart")
        axis = axes[0]
        if cell is None and value.shape[axis] != count:
            cut = self._cut(node, source.axis)
            if cut is None or count - value.shape[axis] != longer - long[node.name].shape[axis]:
                raise BadInput(f"{name} changes the number of frames in a way that a stream does not know")
            cell = SkipCell(source.axis, count=cut)
        if cell is None and (cut := self._cut(node, source.axis)):
            cell = SkipCell(source.axis, count=cut)
        if cell is not None:
            first, step = first + step * cell.wait, step * cell.step
        return Place(node, "frames", axis, first, step, cell)

    def _encoder(self, module: nn.Module | None, name: str) -> nn.TransformerEncoderLayer:
        if not isinstance(module, nn.TransformerEncoderLayer) or not module.self_attn.batch_first:
            raise BadInput(f"{name} must have batch_first=True")
        return module

    def _whole(self, node: fx.Node, source: Place, count: int, first: int, step: int) -> Place:
        """Return the place of an operation that reads all ``count`` frames of a clip."""
        name = called(node)
        module = self.graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        word = type(module).__name__ if module is not None else str(getattr(node.target, "__name__", node.target))
        cell: Cell
        if word == "mean" or word.startswith("AdaptiveAvgPool"):
            cell = MeanCell(source.axis, window=count)
        elif word in _REDUCERS or word.startswith(_POOLERS):
            cell = WindowCell(lambda x: x, source.axis, span=count)
        elif word == "getitem" and self._index(node, source.axis) == -1:
            cell = LastCell(source.axis, window=count)
        else:
            raise BadInput(f"{name} ({word}) reads the whole clip in a way that a stream does not know")
        return Place(node, "whole", source.axis, first + step * (count - 1), step, cell, reduce=True)

    @staticmethod
    def _index(node: fx.Node, axis: int) -> Any:
        """Return what a subscript says about the axis ``axis``; ``None`` where that is not known."""
        if getattr(node.target, "__name__", "") != "getitem":
            return None
        index: Any = node.args[1]
        parts = index if isinstance(index, tuple) else (index,)
        if any(part is Ellipsis or part is None or isinstance(part, fx.Node) for part in parts) or axis >= len(parts):
            return None
        return None if any(isinstance(part, int) for part in parts[:axis]) else parts[axis]

    def _cut(self, node: fx.Node, axis: int) -> int | None:
        """Return how many first frames a slice leaves out."""
        index = self._index(node, axis)
        if not isinstance(index, slice) or index.step not in (None, 1):
            return None
        start = index.start or 0
        ends_well = index.stop is None or (isinstance(index.stop, int) and index.stop < 0)
        return start if isinstance(start, int) and start >= 0 and ends_well else None

    def _newest_only(self, node: fx.Node, axis: int, short: Mapping[str, Any]) -> bool:
        """Whether nothing but the newest token of ``node`` is ever read."""
        for user in node.users:
            if user.op == "call_module":
                module = self.graph.get_submodule(str(user.target))
                if isinstance(module, _TOKENWISE) and self._newest_only(user, axis, short):
                    continue
                return False
            if self._index(user, axis) != -1:
                return False
        return bool(node.users)
