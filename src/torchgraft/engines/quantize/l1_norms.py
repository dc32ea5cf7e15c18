"""Norms by the mean magnitude in place of the standard deviation: no squares, no roots, and few bits where asked.

    y = gamma (x - mu) / (mean|x - mu| + eps) + beta;   of Gaussian x, mean|x - mu| = sigma sqrt(2 / pi)

With ``bits``, the mean, the mean magnitude and the normalised values are rounded, gradients passing straight through.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.engines.normalize import Norm, RunningNorm, update_running
from torchgraft.engines.quantize.fewbit import largest_code
from torchgraft.errors import BadInput

__all__ = ["L1BatchNorm", "L1LayerNorm", "l1_norm_for", "rounded_statistic", "rounded_values"]


class _Straight(torch.autograd.Function):
    """What a function without a useful gradient makes of x; backwards the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def rounded_statistic(value: Tensor, bits: int | None) -> Tensor:
    """Return magnitudes (deviations or variances) on 2^bits - 1 even levels up to the largest, none of them 0.

    Gradients pass straight through. ``None`` leaves them.

    Example:
        >>> rounded_statistic(torch.tensor([0.01, 1.4, 3.0]), 2)
        tensor([1., 1., 3.])
    """
    if bits is None or value.numel() == 0:
        return value
    levels = 2**bits - 1

    def function(value: Tensor) -> Tensor:
        step = value.amax() / levels
        step = torch.where(step > 0, step, torch.ones_like(step))
        return (value / step).round().clamp(min=1) * step

    made: Tensor = _Straight.apply(value, function)  # type: ignore[no-untyped-call]
    return made


def _checked(bits: int | None) -> int | None:
    if bits is not None:
        largest_code(bits)
    return bits


def rounded_values(x: Tensor, bits: int | None) -> Tensor:
    """Return ``x`` on the even levels -n..n of one scale; gradients pass straight through. ``None`` leaves it."""
    if bits is None or x.numel() == 0:
        return x
    n = largest_code(bits)

    def function(x: Tensor) -> Tensor:
        step = x.abs().amax() / n
        return (x / torch.where(step > 0, step, torch.ones_like(step))).round() * step

    made: Tensor = _Straight.apply(x, function)  # type: ignore[no-untyped-call]
    return made


class L1LayerNorm(Norm):
    """Layer norm by the mean magnitude in place of the standard deviation.

    Args:
        normalized_shape: D.
        eps: added to the mean magnitude.
        affine: whether there are gain and offset.
        bits: of mean, mean magnitude and normalised values, or ``None`` for floats.

    Shapes:
        (B, ..., D) -> (B, ..., D)

    Example:
        >>> L1LayerNorm(2, eps=0.0)(torch.tensor([[1.0, 5.0]]))
        tensor([[-1.,  1.]], grad_fn=<AddBackward0>)
    """

    def __init__(
        self, normalized_shape: int, *, eps: float = 1e-5, affine: bool = True, bits: int | None = None
    ) -> None:
        super().__init__(normalized_shape, eps=eps, affine=affine)
        self.bits = _checked(bits)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised input."""
        centred = self.checked(x) - rounded_values(x.mean(-1, keepdim=True), self.bits)
        deviation = rounded_statistic(centred.abs().mean(-1, keepdim=True), self.bits)
        return self.affine(rounded_values(centred / (deviation + self.eps), self.bits))


class L1BatchNorm(RunningNorm):
    """Batch norm by the mean magnitude in place of the standard deviation.

    Args:
        channels: C, the second axis.
        momentum: share of a new batch in the running statistics.
        eps: added to the mean magnitude.
        affine: whether there are gain and offset.
        bits: of mean, mean magnitude and normalised values, or ``None`` for floats.

    Shapes:
        (B, C, ...) -> (B, C, ...)

    Example:
        >>> L1BatchNorm(1, eps=1e-12)(torch.tensor([[1.0], [5.0]])).flatten().tolist()
        [-1.0, 1.0]
    """

    running_deviation: Tensor

    def __init__(
        self,
        channels: int,
        *,
        momentum: float | None = 0.1,
        eps: float = 1e-5,
        affine: bool = True,
        bits: int | None = None,
    ) -> None:
        super().__init__(channels, momentum=momentum, eps=eps, layout="first", affine=affine, statistics=("mean",))
        self.bits = _checked(bits)
        # mean|x| of a standard normal, so that an untrained layer in eval mode is what batch norm is
        self.register_buffer("running_deviation", torch.full((channels,), math.sqrt(2 / math.pi)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised input; the running statistics move in training."""
        self.checked(x)
        shape = (-1, *[1] * (x.ndim - 2))
        axes = [axis for axis in range(x.ndim) if axis != 1]
        if not self.training or x.numel() == 0:
            mean, deviation = self.running_mean, self.running_deviation
            centred = x - rounded_values(mean, self.bits).reshape(shape)
        else:
            if x.numel() == self.channels:
                raise BadInput(f"batch statistics need more than one value a channel, got {tuple(x.shape)}")
            mean = x.mean(axes)
            centred = x - rounded_values(mean, self.bits).reshape(shape)
            deviation = centred.abs().mean(axes)
            share = self.counted()
            update_running(self.running_mean, mean.detach(), share)
            update_running(self.running_deviation, deviation.detach(), share)
        deviation = rounded_statistic(deviation, self.bits).reshape(shape)
        return self.affine(rounded_values(centred / (deviation + self.eps), self.bits))


def l1_norm_for(old: nn.Module, bits: int | None) -> nn.Module | None:
    """Return the L1 norm that does on Gaussian input what ``old`` does, or ``None`` where there is none."""
    made: L1BatchNorm | L1LayerNorm
    if (
        isinstance(old, nn.BatchNorm1d | nn.BatchNorm2d)
        and old.running_mean is not None
        and old.running_var is not None
    ):
        made = L1BatchNorm(old.num_features, momentum=old.momentum, eps=old.eps, affine=old.affine, bits=bits)
        made.running_mean.copy_(old.running_mean)
        made.running_deviation.copy_(old.running_var.sqrt() * math.sqrt(2 / math.pi))
    elif type(old) is nn.LayerNorm and len(old.normalized_shape) == 1:
        made = L1LayerNorm(old.normalized_shape[0], eps=old.eps, affine=old.elementwise_affine, bits=bits)
    else:
        return None
    with torch.no_grad():
        if made.weight is not None:
            made.weight.copy_(old.weight * math.sqrt(2 / math.pi))
        if made.bias is not None and old.bias is not None:
            made.bias.copy_(old.bias)
    return made.train(old.training)
