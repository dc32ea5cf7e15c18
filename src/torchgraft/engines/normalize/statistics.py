"""Statistics of a normalisation: moments over named axes, with padding left out, pooled, grouped and kept running.

Everything is computed in float32 at least, and in float64 where the input is. Variances are biased (over n, not n - 1),
as in every normalisation layer; what is kept running is the unbiased one, as in ``torch.nn.BatchNorm``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchgraft.errors import BadInput

__all__ = [
    "instance_moments",
    "mean_square",
    "merge_groups",
    "moments",
    "pool",
    "split_groups",
    "update_running",
    "wide",
]


def wide(x: Tensor) -> Tensor:
    """Return ``x`` in the dtype of its statistics: float32 for the half precisions, otherwise its own.

    Example:
        >>> wide(torch.ones(1, dtype=torch.bfloat16)).dtype, wide(torch.ones(1, dtype=torch.float64)).dtype
        (torch.float32, torch.float64)
    """
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def moments(x: Tensor, axes: Sequence[int], *, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance over ``axes``, which stay as axes of size 1.

    Args:
        x: the input.
        axes: what is averaged over.
        mask: True (or 1) where ``x`` counts; of a shape that broadcasts to that of ``x``. Without any entry that
            counts, both moments are 0.

    Example:
        >>> mean, var = moments(torch.tensor([[1.0, 3.0, 99.0]]), (1,), mask=torch.tensor([[True, True, False]]))
        >>> mean.item(), var.item()
        (2.0, 1.0)
    """
    x = wide(x)
    if mask is None:
        if x.numel() == 0:
            return _nothing(x, axes), _nothing(x, axes)
        var, mean = torch.var_mean(x, tuple(axes), correction=0, keepdim=True)
        return mean, var
    mean = _masked_mean(x, axes, mask)
    return mean, _masked_mean((x - mean).square(), axes, mask)


def mean_square(x: Tensor, axes: Sequence[int], *, mask: Tensor | None = None) -> Tensor:
    """Return the mean of squares over ``axes``, which stay as axes of size 1: a variance without centring.

    Example:
        >>> mean_square(torch.tensor([3.0, 4.0]), (0,))
        tensor([12.5000])
    """
    x = wide(x)
    if mask is not None:
        return _masked_mean(x.square(), axes, mask)
    if x.numel() == 0:
        return _nothing(x, axes)
    return x.square().mean(tuple(axes), keepdim=True)


def _nothing(x: Tensor, axes: Sequence[int]) -> Tensor:
    return x.sum(tuple(axes), keepdim=True)  # zeros, and differentiable


def _masked_mean(x: Tensor, axes: Sequence[int], mask: Tensor) -> Tensor:
    counts = (mask != 0).expand_as(x)
    total = torch.where(counts, x, 0.0).sum(tuple(axes), keepdim=True)
    return total / counts.sum(tuple(axes), keepdim=True).clamp(min=1).to(x.dtype)


def pool(mean: Tensor, var: Tensor, axes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the moments of the union of equally large sets, from the moments of each (law of total variance).

    The moments of a batch or of a group follow from those of its instances, so one pass over the input serves all.

    Example:
        >>> pool(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.0]), (0,))
        (tensor([1.]), tensor([2.]))
    """
    whole = mean.mean(tuple(axes), keepdim=True)
    return whole, (var + (mean - whole).square()).mean(tuple(axes), keepdim=True)


#: Entries of a block of rows that stays in the cache while it is worked on.
BLOCK = 65_536


def row_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of the rows of (N, S), by torch's group norm: ``var_mean`` takes eight times as long."""
    rows, size = x.shape
    mean, rstd = x.new_empty(rows), x.new_empty(rows)
    step = max(1, BLOCK // size)
    for start in range(0, rows, step):
        part = x[start : start + step]
        _, one, other = torch.native_group_norm(part[:, None], None, None, len(part), 1, size, 1, 0.0)
        mean[start : start + step], rstd[start : start + step] = one[:, 0], other[:, 0]
    return mean, rstd**-2


class _InstanceMoments(torch.autograd.Function):
    """Mean and variance of the rows of (N, S)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = row_moments(x)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        to_mean, to_var = grads
        slope = (2.0 / x.shape[1]) * to_var
        offset = to_mean / x.shape[1] - slope * mean
        return torch.addcmul(offset[:, None], x, slope[:, None])


def instance_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of every sample and channel.

    Shapes:
        (B, C, ...) -> (B, C), (B, C)

    Example:
        >>> mean, var = instance_moments(torch.tensor([[[1.0, 3.0]]]))
        >>> mean.item(), var.item()
        (2.0, 1.0)
    """
    flat = wide(x).flatten(2)
    if torch.compiler.is_compiling() or not flat.is_cpu or flat.numel() == 0:
        mean, var = moments(flat, (2,))
        return mean[..., 0], var[..., 0]
    mean, var = _InstanceMoments.apply(flat.flatten(0, 1).contiguous())  # type: ignore[no-untyped-call]  # torch's
    return mean.view(x.shape[:2]), var.view(x.shape[:2])


def split_groups(x: Tensor, groups: int) -> Tensor:
    """Return ``x`` with its channels in ``groups``; (B, C, ...) -> (B, G, C / G, ...).

    Raises:
        BadInput: ``groups`` does not divide the channels.

    Example:
        >>> split_groups(torch.zeros(2, 6, 4), 3).shape
        torch.Size([2, 3, 2, 4])
    """
    if groups < 1 or x.shape[1] % groups:
        raise BadInput(f"groups must divide the {x.shape[1]} channels, got {groups}")
    return torch.unflatten(x, 1, (groups, x.shape[1] // groups))


def merge_groups(x: Tensor) -> Tensor:
    """Undo :func:`split_groups`; (B, G, C / G, ...) -> (B, C, ...)."""
    return x.flatten(1, 2)


def update_running(running: Tensor, value: Tensor, share: float) -> None:
    """Move a running statistic towards ``value``, in place: running += share * (value - running).

    Args:
        running: the buffer.
        value: what was measured on this batch; no gradient flows into the buffer.
        share: the momentum, or 1 / n for the plain average of n values.

    Example:
        >>> running = torch.zeros(1)
        >>> update_running(running, torch.ones(1), 0.1)
        >>> running
        tensor([0.1000])
    """
    with torch.no_grad():
        kept = wide(running)
        running.copy_(kept + share * (value.detach().reshape(running.shape).to(kept.dtype) - kept))
