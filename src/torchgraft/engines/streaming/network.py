"""A clip network as a network of streams: each place knows its time axis, its delay and what it must remember.

The model is traced with ``torch.fx`` and run on clips of two lengths; the axis whose size differs is time. Item ``j``
of a stream is emitted at step ``first + j * step``: a window of span D(K - 1) + 1, stride s and padding p turns
(first, step) into (first + step (D(K - 1) - p), step s), and where streams meet the later one waits for none and the
others wait for it. What is emitted is compared, place by place, with what the clip network computes; the first place
that differs is refused by name.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from torchgraft.engines.streaming.attention import EncoderCell, finish
from torchgraft.engines.streaming.cells import SkipCell, WindowCell
from torchgraft.engines.streaming.places import Place, Recorder, Tracer, called, execute
from torchgraft.engines.streaming.plan import Plan
from torchgraft.errors import BadInput

__all__ = ["ContinualNetwork"]


class ContinualNetwork(nn.Module):
    """A clip network and its stream, on one set of weights.

    ``forward(clip)`` is the clip network. ``forward_step(frame)`` gives what the clip network would give for the window
    that ends with this frame, or ``None`` where it gives nothing yet; ``forward_steps(chunk)`` takes several frames.

    Args:
        model: the clip network, in eval mode, shared and not copied.
        example: a clip (B, ..., T, ...), whose length is the window of what reads a whole clip (a global pool).
        time: the time axis of the clip.
        edges: what stands for the zeros by which a layer pads its clip in time, where a whole clip is read later:
            ``"clip"`` refuses, ``"stream"`` takes the frames that are really there.
    """

    graph: fx.GraphModule

    def __init__(
        self, model: nn.Module, example: Tensor, *, time: int = 2, edges: Literal["clip", "stream"] = "clip"
    ) -> None:
        super().__init__()
        if edges not in ("clip", "stream"):
            raise BadInput(f"edges must be 'clip' or 'stream', got {edges!r}")
        if not isinstance(example, Tensor) or not 1 <= time < example.ndim or example.shape[time] < 2:
            raise BadInput(
                "example must be a clip of at least 2 frames along the axis 'time', which comes after the batch"
            )
        if not example.is_floating_point():
            raise BadInput(f"example must hold floating-point numbers, got {example.dtype}")
        if model.training:
            raise BadInput("model must be in eval mode: a stream has no batch statistics and no dropout")
        self.model, self.time, self.edges, self.window = model, time, edges, int(example.shape[time])
        tracer = Tracer()
        try:
            graph = tracer.trace(model)
        except Exception as error:
            raise BadInput(
                f"{type(model).__name__} cannot be traced by torch.fx: {str(error).splitlines()[0]}"
            ) from None
        self.training = False
        # Kept out of the module tree: it holds the very modules of `model`.
        self.__dict__["graph"] = fx.GraphModule(model, graph)
        self._like = (tuple(example.shape), example.dtype)
        draw = torch.Generator(device=example.device).manual_seed(0)
        shape = list(example.shape)
        shape[time] *= 2
        clip = torch.randn(shape, generator=draw, device=example.device, dtype=example.dtype)
        with torch.no_grad():
            short = self._record(clip.narrow(time, 0, self.window))
            long = self._record(clip)
            plan = Plan(self.graph, short, long, time)
            self.places, self._by, self.output = plan.places, plan.by, plan.output
            self._compare(clip, short, long)

    def _record(self, clip: Tensor) -> dict[str, Any]:
        recorder = Recorder(self.graph)
        try:
            recorder.run(clip)
        except BadInput as error:  # the interpreter adds a page of its own
            raise BadInput(str(error).splitlines()[0]) from None
        return recorder.values

    def _compare(self, clip: Tensor, short: Mapping[str, Any], long: Mapping[str, Any]) -> None:
        """Run the stream on a clip and refuse the first place where it computes anything else than the clip network."""
        if self.edges == "clip" and any(place.kind == "whole" for place in self.places):
            for place in self.places:
                if isinstance(place.cell, WindowCell) and place.cell.padding:
                    raise BadInput(
                        f"{called(place.node)} pads each clip by {place.cell.padding} frames of zeros in time, and a "
                        "whole clip is read later; a stream has no such zeros: take the padding out (train "
                        "without it), or give edges='stream' to use the frames that are there"
                    )
        seen: dict[str, list[Any]] = {place.node.name: [] for place in self.places}
        self.reset()
        length, start = clip.shape[self.time], 0
        while start < length:
            count = min(length - start, 1 if start < self.window // 2 + 2 else 3)
            made = self._run(clip.narrow(self.time, start, count), False)
            for name, value in made.items():
                if name in seen and value is not None:
                    seen[name].append(value)
            start += count
        self.reset()
        for place in self.places:
            parts = seen[place.node.name]
            if place.kind == "whole" and self.edges != "stream":
                items = [item for part in parts for item in part]
                found = items[0] if items else None
                expected = short[place.node.name]
                if place.newest:  # one token instead of all
                    expected = expected[:, -1:]
            elif place.kind == "frames" and parts:
                found = torch.cat(parts, place.axis)
                whole = long[place.node.name]
                found = found.narrow(place.axis, 0, min(found.shape[place.axis], whole.shape[place.axis]))
                expected = whole.narrow(place.axis, 0, found.shape[place.axis])
            else:
                continue
            scale = float(expected.abs().max().clamp_min(1.0))
            if (
                found is None
                or found.shape != expected.shape
                or not bool(((found - expected).abs() <= 1e-4 * scale).all() or torch.equal(found, expected))
            ):
                raise BadInput(f"{called(place.node)} mixes frames in a way that a stream does not know")

    def __deepcopy__(self, memo: dict[int, Any]) -> ContinualNetwork:
        # What runs in a stream is bound to modules, so a copy is built anew, at the beginning of its stream.
        model = copy.deepcopy(self.model, memo)
        device = next((value.device for value in model.parameters()), torch.device("cpu"))
        example = torch.zeros(self._like[0], dtype=self._like[1], device=device)
        return ContinualNetwork(model.eval(), example, time=self.time, edges=self.edges)

    # -- running ----------------------------------------------------------------------------------------------------

    @property
    def delay(self) -> int:
        """Frames that come before the one with the first output: the first output is at this step, counted from 0."""
        return self.output.first

    @property
    def stride(self) -> int:
        """Frames from one output to the next."""
        return self.output.step

    def delays(self) -> dict[str, int]:
        """Return the delay of every layer of the stream by name."""
        return {called(place.node): place.first for place in self.places if place.kind in ("frames", "whole")}

    def reset(self) -> None:
        """Forget the stream; the next frame is its first."""
        for place in self.places:
            place.reset()
        self._numbers: dict[str, Any] = {}
        self._positions: dict[str, int] = {}
        self._shape: tuple[int, ...] | None = None

    def forward(self, clip: Tensor) -> Tensor:
        """Run the clip network on a whole clip."""
        out: Tensor = self.model(clip)
        return out

    def forward_steps(self, chunk: Tensor, *, last: bool = False) -> Tensor | None:
        """Take several frames and return the outputs that they complete, or ``None``.

        Args:
            chunk: frames, shaped like a clip of any length of at least 1.
            last: whether the stream ends here, so that layers which pad in time may pad their ends.

        Shapes:
            outputs lie along the time axis of the clip network's output, or, where that has none, along dimension 1.
        """
        found = self._advance(chunk, last)
        if isinstance(found, list):
            return torch.stack(found, 1) if found else None
        out: Tensor | None = found
        return out

    def forward_step(self, frame: Tensor, *, last: bool = False) -> Tensor | None:
        """Take one frame, without the time axis, and return its output, or ``None`` where there is none."""
        found = self._advance(frame.unsqueeze(self.time), last)
        newest: Tensor | None
        if isinstance(found, list) or found is None or last:
            newest = (found[-1] if found else None) if isinstance(found, list) else found
            return newest
        newest = found.select(self.output.axis, found.shape[self.output.axis] - 1)
        return newest

    def per_frame(self) -> nn.Module:
        """Return a module whose forward is :meth:`forward_step` of this stream, for meters; feed a window first."""
        return _PerFrame(self)

    def _advance(self, chunk: Tensor, last: bool) -> Any:
        if self.training or self.model.training:
            raise BadInput("a stream runs in eval mode; call eval() first")
        shape = tuple(size for axis, size in enumerate(chunk.shape) if axis != self.time)
        if self._shape is not None and shape != self._shape:
            raise BadInput(f"frames have sizes {shape}, this stream began with {self._shape}; call reset() first")
        if chunk.shape[self.time] < 1:
            raise BadInput("a chunk must have at least one frame")
        self._shape = shape
        return self._run(chunk, last)[self.output.node.name]

    def _run(self, chunk: Tensor, last: bool) -> dict[str, Any]:
        env: dict[str, Any] = {}
        for place in self.places:
            node = place.node
            if place.kind == "input":
                env[node.name] = chunk
            elif place.kind == "fixed":
                env[node.name] = execute(self.graph, self._positions, node, env)
            elif place.kind == "number":
                inputs = [env[each.name] for each in node.all_input_nodes]
                # A size of a stream that gives nothing now: the last one known serves the sizes other than time.
                if all(value is not None and not isinstance(value, list) for value in inputs):
                    self._numbers[node.name] = execute(self.graph, self._positions, node, env)
                elif inputs and any(isinstance(value, list) and value for value in inputs):
                    heads = {each.name: _head(env[each.name]) for each in node.all_input_nodes}
                    self._numbers[node.name] = execute(self.graph, self._positions, node, {**env, **heads})
                env[node.name] = self._numbers.get(node.name)
            else:
                env[node.name] = self._flow(place, env, last)
        return env

    def _flow(self, place: Place, env: dict[str, Any], last: bool) -> Any:
        node = place.node
        streams = [
            each.name for each in node.all_input_nodes if self._by[each.name].kind in ("input", "frames", "whole")
        ]
        current = dict(env)
        if len(streams) > 1 and not self._meet(place, streams, current):
            return [] if place.kind == "whole" else None
        source, given = self._by[streams[0]], current[streams[0]]
        if source.kind == "whole":
            if place.windows is not None:
                layer = place.windows
                return [_newest(layer, item) for item in given]
            made = []
            for row in range(len(given)):
                items = {name: current[name][row] for name in streams}
                made.append(execute(self.graph, self._positions, node, {**current, **items}))
            return made
        if place.windows is not None:
            return place.windows.push_windows(given)
        if place.cell is not None and not place.reduce:
            moved = place.cell.push(given, last)
            if isinstance(place.cell, SkipCell):
                if moved is None:
                    return None
                return execute(self.graph, self._positions, node, {**current, streams[0]: moved}, uncut=source.axis)
            return moved
        if place.cell is not None:
            if isinstance(place.cell, WindowCell):
                made = []
                for frame in [] if given is None else torch.split(given, 1, source.axis):
                    window = place.cell.push(frame)
                    if window is not None:
                        made.append(execute(self.graph, self._positions, node, {**current, streams[0]: window}))
                return made
            moved = place.cell.push(given, last)
            parts = [] if moved is None else torch.split(moved, 1, source.axis)
            return [execute(self.graph, self._positions, node, {**current, streams[0]: part}) for part in parts]
        if given is None:
            return None
        return execute(self.graph, self._positions, node, current, frames=(place.axis, given.shape[source.axis]))

    def _meet(self, place: Place, streams: list[str], current: dict[str, Any]) -> bool:
        """Let streams wait for each other: put what all of them have, oldest first, into ``current``."""
        for name in streams:
            come, held = current[name], place.queues.get(name)
            if self._by[name].kind == "whole":
                place.queues[name] = (held or []) + come
            elif come is not None:
                place.queues[name] = come if held is None else torch.cat([held, come], self._by[name].axis)
        counts = []
        for name in streams:
            held, kind = place.queues.get(name), self._by[name].kind
            counts.append(0 if held is None else len(held) if kind == "whole" else held.shape[self._by[name].axis])
        ready = min(counts)
        for name, count in zip(streams, counts, strict=True):
            held, axis = place.queues[name] if count else None, self._by[name].axis
            if held is None:
                continue
            if self._by[name].kind == "whole":
                current[name], place.queues[name] = held[:ready], held[ready:]
            elif ready:
                current[name] = held.narrow(axis, 0, ready)
                place.queues[name] = held.narrow(axis, ready, count - ready).clone() if ready < count else None
        return ready > 0


class _PerFrame(nn.Module):
    def __init__(self, network: ContinualNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, frame: Tensor) -> Tensor | None:
        """Take one frame."""
        return self.network.forward_step(frame)


def _head(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value


def _newest(cell: EncoderCell, window: Tensor) -> Tensor:
    """Return the output of an encoder layer for the newest token of a window (B, n, D), (B, 1, D)."""
    layer = cell.layer
    normed = layer.norm1(window) if layer.norm_first else window
    return finish(layer, window[:, -1:], cell.attention(normed)[:, None])
