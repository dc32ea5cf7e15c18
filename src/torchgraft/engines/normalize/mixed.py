"""Norms that mix statistics of several sources, in few passes over the input: each is a map of instance moments.

    y = kernel(x; rows),   rows = recipe(mean, var, parameters),   mean, var (B, C) of every sample and channel

The moments of a batch, a group or any mixture of sources follow from those of the instances
(:func:`~torchgraft.engines.normalize.statistics.pool`), so a member writes only how its numbers a row, such as scale
and shift, follow from (B, C) moments: batch norm then group norm, or instance norm on half of the channels, cost about
what one batch norm does. What is done with x and these numbers is a :class:`Kernel`; it runs on blocks of rows that
stay in the cache, forward and backward.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from torchgraft.engines.normalize import native
from torchgraft.engines.normalize.statistics import BLOCK, instance_moments, row_moments, wide

__all__ = ["AFFINE", "Kernel", "Recipe", "by_moments"]

#: (mean, var, *parameters) -> the numbers of each row, all (B, C) or broadcasting to it.
Recipe: TypeAlias = Callable[..., tuple[Tensor, ...]]


class Kernel(ABC):
    """What is done with the entries of a row and its few numbers, and the derivative by hand.

    Rows are the (B C, S) entries of the samples' channels, numbers are (B C, 1). On CPU, ``addcmul`` with such numbers
    and comparisons to booleans are several times slower than products and sums.
    """

    #: Its name among the compiled kernels (``native.py``), or ``None`` where it is not among them.
    compiled: ClassVar[native.Kind | None] = None

    @abstractmethod
    def forward(self, x: Tensor, *numbers: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the output, made of differentiable operations that broadcast ``numbers`` over ``x``."""

    @abstractmethod
    def backward(self, x: Tensor, grad: Tensor, *numbers: Tensor, out: Tensor) -> Sequence[Tensor]:
        """Write the gradient of ``x``, the numbers held, into ``out``, and return that of each number, (N,)."""


class Affine(Kernel):
    """y = scale * x + shift."""

    compiled = "affine"

    def forward(self, x: Tensor, *numbers: Tensor, out: Tensor | None = None) -> Tensor:
        """Return scale * x + shift."""
        scale, shift = numbers
        return torch.mul(x, scale, out=out).add_(shift)

    def backward(self, x: Tensor, grad: Tensor, *numbers: Tensor, out: Tensor) -> Sequence[Tensor]:
        """Return the gradients of scale and shift."""
        sums = torch.mul(grad, x, out=out).sum(1), grad.sum(1)
        torch.mul(grad, numbers[0], out=out)
        return sums


def _plain(x: Tensor, kernel: Kernel, recipe: Recipe, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    mean, var = instance_moments(x)
    numbers = (value.expand(x.shape[:2]) for value in recipe(mean, var, *parameters))
    return kernel.forward(x, *(value.reshape(*x.shape[:2], *[1] * (x.ndim - 2)) for value in numbers)), mean, var


def _blocks(rows: int, size: int) -> list[slice]:
    step = max(1, BLOCK // size)
    return [slice(start, start + step) for start in range(0, rows, step)]


class _ByMoments(torch.autograd.Function):
    """The plain form, block by block and with no temporary of the size of the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Kernel, recipe: Recipe, *parameters: Tensor) -> tuple[Tensor, ...]:
        flat = x.flatten(2).flatten(0, 1)
        fast = kernel.compiled if native.usable(flat.detach()) else None
        moments = native.row_moments if fast else row_moments
        mean, var = (value.view(x.shape[:2]) for value in moments(flat))
        numbers = [value.expand(x.shape[:2]).reshape(-1, 1) for value in recipe(mean, var, *parameters)]
        if fast and all(value.dtype == flat.dtype for value in numbers):
            y = native.rows_forward(fast, flat, numbers)
        else:
            y = torch.empty_like(flat)
            for rows in _blocks(*flat.shape):
                kernel.forward(flat[rows], *(value[rows] for value in numbers), out=y[rows])
        ctx.kernel, ctx.recipe = kernel, recipe
        ctx.save_for_backward(x, mean, var, *parameters)
        ctx.mark_non_differentiable(mean, var)
        return y.view(x.shape), mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, var, *parameters = ctx.saved_tensors
        if torch.is_grad_enabled():  # a derivative of the derivative is wanted: autograd makes both
            given = (x, *parameters)
            leaves = [value for value in given if value.requires_grad]
            y = _plain(x, ctx.kernel, ctx.recipe, parameters)[0]
            made = iter(torch.autograd.grad(y, leaves, grads[0], create_graph=True, allow_unused=True))
            to_x, *to_parameters = (next(made) if value.requires_grad else None for value in given)
            return to_x, None, None, *to_parameters
        flat, grad = (value.contiguous().flatten(2).flatten(0, 1) for value in (x, grads[0]))
        with torch.enable_grad():
            leaves = [value.detach().requires_grad_() for value in (mean, var, *parameters)]
            recipe = [value.expand(x.shape[:2]) for value in ctx.recipe(*leaves)]
        numbers = [value.detach().reshape(-1, 1) for value in recipe]
        fast = ctx.kernel.compiled if native.usable(flat.detach(), grad.detach(), *numbers) else None
        if fast:
            sums = [value[:, None] for value in native.rows_sums(fast, flat, grad, numbers)]
            slope, offset, rest = _through_moments(recipe, sums, leaves, mean, flat.shape[1])
            dx = native.rows_backward(fast, flat, grad, numbers, slope.reshape(-1), offset.reshape(-1))
            return dx.view(x.shape), None, None, *rest
        product, sums = torch.empty_like(flat), [torch.empty_like(value) for value in numbers]
        blocks = _blocks(*flat.shape)
        for rows in blocks:
            found = ctx.kernel.backward(flat[rows], grad[rows], *(value[rows] for value in numbers), out=product[rows])
            for total, value in zip(sums, found, strict=True):
                total[rows, 0] = value
        slope, offset, rest = _through_moments(recipe, sums, leaves, mean, flat.shape[1])
        slope, offset = slope.reshape(-1, 1), offset.reshape(-1, 1)
        for rows in blocks:
            product[rows].add_(flat[rows] * slope[rows]).add_(offset[rows])
        return product.view(x.shape), None, None, *rest


def _through_moments(
    recipe: Sequence[Tensor], sums: Sequence[Tensor], leaves: Sequence[Tensor], mean: Tensor, size: int
) -> tuple[Tensor, Tensor, Sequence[Tensor | None]]:
    """Return slope and offset, (B, C), of what the moments add to the gradient of x, and the parameters' gradients."""
    pairs = [(one, total) for one, total in zip(recipe, sums, strict=True) if one.requires_grad]
    small: Sequence[Tensor | None] = [None] * len(leaves)
    if pairs:
        wanted = [total.view(mean.shape) for _, total in pairs]
        small = torch.autograd.grad([one for one, _ in pairs], leaves, wanted, allow_unused=True)
    to_mean, to_var, *rest = small
    slope = torch.zeros_like(mean) if to_var is None else to_var * (2.0 / size)
    offset = -slope * mean if to_mean is None else to_mean / size - slope * mean
    return slope, offset, rest


AFFINE = Affine()


def by_moments(
    x: Tensor, recipe: Recipe, *parameters: Tensor, kernel: Kernel = AFFINE
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the kernel of ``x`` in its dtype, and the instance moments from which its numbers were made.

    Args:
        x: the input.
        recipe: differentiable, takes mean, variance and ``parameters``, and returns the numbers of the kernel: scale
            and shift, unless another is given. It is called again in the backward pass and must have no side effects.
        parameters: every tensor that is to get a gradient.
        kernel: what is done with x and the numbers.

    Shapes:
        (B, C, ...) with at least one position -> (B, C, ...), (B, C), (B, C)

    Example:
        >>> def instance_norm(mean, var):
        ...     scale = (var + 1e-5).rsqrt()
        ...     return scale, -mean * scale
        >>> y, mean, var = by_moments(torch.tensor([[[1.0, 3.0]]]), instance_norm)
        >>> y, mean
        (tensor([[[-1.0000,  1.0000]]]), tensor([[2.]]))
    """
    flat = wide(x)
    if torch.compiler.is_compiling() or not x.is_cpu or x.numel() == 0:
        y, mean, var = _plain(flat, kernel, recipe, parameters)
    else:
        made = _ByMoments.apply(flat.contiguous(), kernel, recipe, *parameters)  # type: ignore[no-untyped-call]
        y, mean, var = made
    return y.to(x.dtype), mean.detach(), var.detach()
