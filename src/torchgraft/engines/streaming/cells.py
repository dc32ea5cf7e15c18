"""What a stream remembers at one place of a network: windows for convolutions and pools, running means, skipped frames.

A cell takes some frames (a tensor with any number of them along its time axis, or ``None`` for none) and returns those
that can be computed now. Feeding frames one by one, in chunks or all at once gives the same sequence.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.errors import BadInput

__all__ = ["Cell", "LastCell", "MeanCell", "SkipCell", "WindowCell", "window_cell"]

_CONVOLUTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}
_AVERAGES: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.AvgPool1d: F.avg_pool1d,
    nn.AvgPool2d: F.avg_pool2d,
    nn.AvgPool3d: F.avg_pool3d,
}
_MAXIMA: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.MaxPool1d: F.max_pool1d,
    nn.MaxPool2d: F.max_pool2d,
    nn.MaxPool3d: F.max_pool3d,
}


class Cell:
    """A place of a stream: state, and how far its outputs lag behind its inputs.

    Args:
        axis: the time axis of what goes in.
        wait: how many items must have come before the first goes out, less one.
        step: items in for one out.
    """

    def __init__(self, axis: int, *, wait: int = 0, step: int = 1) -> None:
        self.axis, self.wait, self.step = axis, wait, step

    def push(self, x: Tensor | None, last: bool = False) -> Tensor | None:
        """Take frames and return those that can be computed now; ``last`` says that no more will come."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget everything."""


class WindowCell(Cell):
    """An operation on windows of consecutive frames: a convolution or a pool.

    Args:
        operation: maps ``n`` frames, at least ``span``, to ``(n - span) // step + 1``, with no padding in time.
        axis: the time axis.
        span: frames that one output reads, D(K - 1) + 1.
        step: the stride in time.
        padding: frames that stand before the first one and after the last one.
        fill: their value.
    """

    def __init__(
        self,
        operation: Callable[[Tensor], Tensor],
        axis: int,
        *,
        span: int,
        step: int = 1,
        padding: int = 0,
        fill: float = 0.0,
    ) -> None:
        super().__init__(axis, wait=span - 1 - padding, step=step)
        self.operation, self.span, self.padding, self.fill = operation, span, padding, fill
        self.reset()

    def reset(self) -> None:
        """Forget the frames."""
        self.held: Tensor | None = None
        self.skip = 0
        self.begun = False

    def push(self, x: Tensor | None, last: bool = False) -> Tensor | None:
        """Return the outputs whose whole window is known now."""
        if x is not None and not self.begun:
            self.begun = True
            if self.padding:
                self.held = self._edge(x)
        parts = [part for part in (self.held, x) if part is not None]
        if last and self.padding and parts:
            parts.append(self._edge(parts[0]))
        if not parts:
            return None
        frames = torch.cat(parts, self.axis) if len(parts) > 1 else parts[0]
        if self.skip:  # where the stride is longer than the window, frames go by unread
            gone = min(self.skip, frames.shape[self.axis])
            self.skip -= gone
            frames = frames.narrow(self.axis, gone, frames.shape[self.axis] - gone)
        count = frames.shape[self.axis]
        made = (count - self.span) // self.step + 1 if count >= self.span else 0
        used = min(made * self.step, count)
        self.skip += made * self.step - used
        # A copy: a view would keep the whole chunk alive.
        self.held = frames.narrow(self.axis, used, count - used).clone() if used < count else None
        if not made:
            return None
        return self.operation(frames.narrow(self.axis, 0, self.span + (made - 1) * self.step))

    def _edge(self, like: Tensor) -> Tensor:
        shape = list(like.shape)
        shape[self.axis] = self.padding
        return like.new_full(shape, self.fill)


class MeanCell(Cell):
    """The mean of the last ``window`` frames, kept as a running sum that is formed anew every ``window`` frames.

    Example:
        >>> cell = MeanCell(0, window=2)
        >>> cell.push(torch.tensor([1.0, 3.0, 5.0]))
        tensor([2., 4.])
    """

    def __init__(self, axis: int, *, window: int) -> None:
        super().__init__(axis, wait=window - 1)
        self.window = window
        self.reset()

    def reset(self) -> None:
        """Forget the frames."""
        self.held: Tensor | None = None
        self.total: Tensor | None = None
        self.since = 0

    def push(self, x: Tensor | None, last: bool = False) -> Tensor | None:
        """Return one mean for every frame that completes a window."""
        if x is None:
            return None
        made = []
        for frame in torch.split(x, 1, self.axis):
            full = self.held is not None and self.held.shape[self.axis] == self.window
            if full and self.held is not None:
                oldest = self.held.narrow(self.axis, 0, 1)
                rest = self.held.narrow(self.axis, 1, self.window - 1)
                self.held = torch.cat([rest, frame], self.axis)
                self.since += 1
                if self.since >= self.window or self.total is None:  # no error outlives a window
                    self.total, self.since = self.held.sum(self.axis, keepdim=True), 0
                else:
                    self.total = self.total + frame - oldest
            else:
                self.held = frame if self.held is None else torch.cat([self.held, frame], self.axis)
                self.total = self.held.sum(self.axis, keepdim=True)
            if self.held.shape[self.axis] == self.window and self.total is not None:
                made.append(self.total / self.window)
        return torch.cat(made, self.axis) if made else None


class SkipCell(Cell):
    """All frames but the first ``count``."""

    def __init__(self, axis: int, *, count: int) -> None:
        super().__init__(axis, wait=count)
        self.reset()

    def reset(self) -> None:
        """Start again."""
        self.left = self.wait

    def push(self, x: Tensor | None, last: bool = False) -> Tensor | None:
        """Return what comes after the skipped frames."""
        if x is None:
            return None
        gone = min(self.left, x.shape[self.axis])
        self.left -= gone
        return x.narrow(self.axis, gone, x.shape[self.axis] - gone) if gone < x.shape[self.axis] else None


class LastCell(SkipCell):
    """The newest frame of each window of ``window`` frames."""

    def __init__(self, axis: int, *, window: int) -> None:
        super().__init__(axis, count=window - 1)


def _along(value: int | tuple[int, ...], place: int) -> int:
    return int(value) if isinstance(value, int) else int(value[place])


def _without(value: int | tuple[int, ...], place: int, count: int) -> tuple[int, ...]:
    """Return the padding of ``count`` axes, 0 along the time axis."""
    return tuple(0 if i == place else _along(value, i) for i in range(count))


def window_cell(module: nn.Module, axis: int, name: str) -> WindowCell | None:
    """Return the cell of a convolution or pool over the time axis, or ``None`` where ``module`` is neither.

    Args:
        module: the layer; its weights are read at every push.
        axis: the time axis of its input, (B, C, ...).
        name: how it is called in errors.

    Raises:
        BadInput: the layer pads in a way that a stream cannot.
    """
    kind = type(module)
    place = axis - 2
    known = {**_CONVOLUTIONS, **_AVERAGES, **_MAXIMA}
    if kind not in known:
        return None
    axes = int(kind.__name__[-2])
    if not 0 <= place < axes:
        raise BadInput(f"{name} ({kind.__name__}) takes the time axis {axis} for a channel; it cannot run as a stream")
    function = known[kind]
    kernel, stride = _along(module.kernel_size, place), _along(module.stride, place)  # type: ignore[arg-type]  # plain sizes
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        if module.padding_mode != "zeros":
            raise BadInput(f"{name} pads by {module.padding_mode!r}; a stream knows zeros only")
        spread = tuple(d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True))
        padding: tuple[int, ...]
        if isinstance(module.padding, str):
            if module.padding == "same" and any(each % 2 for each in spread):
                raise BadInput(f"{name} pads unevenly ('same' with an even kernel); a stream cannot")
            padding = tuple(each // 2 for each in spread) if module.padding == "same" else (0,) * axes
        else:
            padding = tuple(int(each) for each in module.padding)
        span, layer = spread[place] + 1, module

        def convolve(x: Tensor) -> Tensor:
            rest = _without(padding, place, axes)
            return function(x, layer.weight, layer.bias, layer.stride, rest, layer.dilation, layer.groups)

        cell = WindowCell(convolve, axis, span=span, step=stride, padding=padding[place])
    else:
        pool: nn.MaxPool3d | nn.AvgPool3d = module  # type: ignore[assignment]  # one of six alike
        edge = _along(pool.padding, place)
        rest = _without(pool.padding, place, axes)
        if pool.ceil_mode or getattr(pool, "return_indices", False):
            raise BadInput(f"{name} uses ceil_mode or return_indices; a stream cannot")
        if kind in _MAXIMA:
            dilation = pool.dilation
            span = _along(dilation, place) * (kernel - 1) + 1  # type: ignore[arg-type]

            def maximum(x: Tensor) -> Tensor:
                return function(x, pool.kernel_size, pool.stride, rest, dilation)

            cell = WindowCell(maximum, axis, span=span, step=stride, padding=edge, fill=float("-inf"))
        else:
            counts = bool(pool.count_include_pad)
            if edge and not counts:
                raise BadInput(f"{name} pads in time and does not count the padding; a stream cannot")

            def average(x: Tensor) -> Tensor:
                return function(x, pool.kernel_size, pool.stride, rest, False, counts)

            cell = WindowCell(average, axis, span=kernel, step=stride, padding=edge)
    if cell.wait < 0:
        raise BadInput(f"{name} pads more frames in time ({cell.padding}) than its kernel reaches ({cell.span - 1})")
    return cell
