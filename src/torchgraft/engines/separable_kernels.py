"""Convolutions whose spatial kernels are sums of products of one-way filters, and the edit that puts them in.

W[o, i] = sum_{r=1..R} u1_{oir} (x) u2_{oir} (x) u3_{oir}; only the filters are parameters. A layer runs in one of two
ways:

- ``compose``: the kernel is multiplied out at every call (C_out C_in R prod_n k_n products a call, whatever the batch),
  then one dense convolution: its MACs are those of the dense layer, and its time too, but for the products;
- ``chain``: one-way convolutions, one axis after the other, through C_out C_in R channels in between. With padding and
  stride 1 the MACs are R sum_n k_n / prod_n k_n of the dense ones; strides before the last step give some of that back.
  The channels in between cost memory, and grouped convolutions are slow: expect fewer MACs and more time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, TypeAlias, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.engines.surgery.edits import Edit
from torchgraft.errors import BadInput, nearest

__all__ = [
    "Execution",
    "SeparableKernelConv1d",
    "SeparableKernelConv2d",
    "SeparableKernelConv3d",
    "SeparateKernels",
    "compose",
    "cp_factors",
    "from_dense",
    "full_rank",
    "plain_convolutions",
    "put",
    "separable_like",
]

Execution: TypeAlias = Literal["compose", "chain"]
_SWEEPS = 50  # of alternating least squares, where there are three axes


def compose(factors: Sequence[Tensor]) -> Tensor:
    """Return the kernels that one-way filters make: (..., R, k_1), ..., (..., R, k_d) -> (..., k_1, ..., k_d).

    Example:
        >>> compose([torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])])
        tensor([[3., 4.],
                [6., 8.]])
    """
    whole = factors[0]
    for place, each in enumerate(factors[1:], start=1):
        for _ in range(place):
            each = each.unsqueeze(-2)
        whole = whole.unsqueeze(-1) * each  # (..., R, k_1, ..., k_n)
    return whole.sum(-len(factors) - 1)


def cp_factors(kernels: Tensor, rank: int) -> list[Tensor]:
    """Return one-way filters (N, R, k_n) whose sum of products is nearest to each of ``kernels``, in float64.

    With two axes that is the singular value decomposition, each filter holding sqrt(sigma). With three it is
    alternating least squares from the leading singular vectors, the best that 50 sweeps find.

    Shapes:
        kernels (N, k_1, ..., k_d), d in 1 to 3 -> d tensors (N, R, k_n)

    Example:
        >>> [each.shape for each in cp_factors(torch.randn(8, 3, 5), 2)]
        [torch.Size([8, 2, 3]), torch.Size([8, 2, 5])]
    """
    sizes = kernels.shape[1:]
    if not 1 <= rank <= full_rank(sizes):
        raise BadInput(f"rank of a kernel of {tuple(sizes)} must lie in [1, {full_rank(sizes)}], got {rank}")
    wide = kernels.detach().double()
    if len(sizes) == 1:
        return [wide.unsqueeze(1)]
    if len(sizes) == 2:
        A, sigma, Bt = torch.linalg.svd(wide, full_matrices=False)
        root = sigma[:, :rank, None].sqrt()  # (N, R, 1)
        return [A.mT[:, :rank] * root, Bt[:, :rank] * root]
    found = [_leading(wide.movedim(axis, 1).flatten(2), rank) for axis in (1, 2, 3)]
    eye = torch.eye(rank, dtype=torch.float64)
    for _ in range(_SWEEPS):
        for axis in range(3):
            first, second = (found[other] for other in range(3) if other != axis)
            grid = (first.unsqueeze(-1) * second.unsqueeze(-2)).flatten(2)  # (N, R, k k')
            gram = grid @ grid.mT
            ridge = 1e-10 * gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] + 1e-300
            found[axis] = torch.linalg.solve(gram + ridge * eye, grid @ wide.movedim(axis + 1, 1).flatten(2).mT)
    norms = [each.norm(dim=2, keepdim=True).clamp_min(1e-300) for each in found]
    size = math.prod(norms).pow(1 / 3)
    return [each / norm * size for each, norm in zip(found, norms, strict=True)]


def _leading(unfolded: Tensor, rank: int) -> Tensor:
    """Return R directions of each unfolding (N, k, rest), (N, R, k); past the k-th, mixtures of them."""
    directions = torch.linalg.svd(unfolded, full_matrices=False)[0].mT  # (N, min(k, rest), k)
    k = directions.shape[1]
    rows = [directions[:, r % k] + (r // k) * directions[:, (r + 1) % k] for r in range(rank)]
    return torch.stack(rows, 1)


def full_rank(sizes: Sequence[int]) -> int:
    """Return how many terms any kernel of ``sizes`` can be written with: the product of all sizes but the largest.

    Example:
        >>> full_rank((3, 5)), full_rank((3, 3, 3)), full_rank((7,))
        (3, 9, 1)
    """
    return math.prod(sizes) // max(sizes)


class _SeparableKernels(nn.Module):
    """A convolution whose spatial kernels are sums of R products of one-way filters; see the module for the two ways.

    Args:
        in_channels: C_in.
        out_channels: C_out.
        kernel_size: k_1, ..., k_d, or one number for all.
        rank: R, at most prod_n k_n / max_n k_n.
        stride, padding, dilation, bias, padding_mode: as in ``nn.Conv2d``; there are no groups.
        execution: ``"compose"`` or ``"chain"``.
        device, dtype: of the filters.

    Shapes:
        x (B, C_in, ...) -> (B, C_out, ...)
    """

    dims: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        *,
        rank: int = 1,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        execution: Execution = "compose",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if execution not in ("compose", "chain"):
            raise BadInput(
                f"execution must be 'compose' or 'chain', got {execution!r}{nearest(execution, ['compose', 'chain'])}"
            )
        if padding_mode not in _MODES:
            raise BadInput(f"padding_mode must be one of {sorted(_MODES)}, got {padding_mode!r}")
        self.in_channels, self.out_channels, self.rank, self.execution = in_channels, out_channels, rank, execution
        self.kernel_size, self.stride, self.dilation = (
            self._each(name, value)
            for name, value in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation))
        )
        if not 1 <= rank <= full_rank(self.kernel_size):
            raise BadInput(
                f"rank of a kernel of {self.kernel_size} must lie in [1, {full_rank(self.kernel_size)}], got {rank}"
            )
        self.padding_mode, self.padding = padding_mode, padding
        self._sides = self._both_sides(padding)
        wanted = {"device": device, "dtype": dtype}
        self.factors = nn.ParameterList(
            torch.empty(out_channels, in_channels, rank, k, **wanted)  # type: ignore[arg-type]
            for k in self.kernel_size
        )
        self.bias = nn.Parameter(torch.zeros(out_channels, **wanted)) if bias else None  # type: ignore[arg-type]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the filters so that the composed kernel has the variance 2 / (C_in prod_n k_n); the bias is zero."""
        variance = 2.0 / (self.in_channels * math.prod(self.kernel_size))
        for each in self.factors:
            nn.init.normal_(each, std=(variance / self.rank) ** (0.5 / self.dims))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def weight(self) -> Tensor:
        """The composed kernel, (C_out, C_in, k_1, ..., k_d)."""
        return compose(list(self.factors))

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of x, (B, C_in, ...) or (C_in, ...)."""
        if x.ndim not in (self.dims + 1, self.dims + 2) or x.shape[-self.dims - 1] != self.in_channels:
            raise BadInput(f"x must be (B, {self.in_channels}, {self.dims} sizes), got {tuple(x.shape)}")
        batched = x if x.ndim == self.dims + 2 else x.unsqueeze(0)
        if self.execution == "compose" or self.dims == 1:
            y = self._step(batched, self.weight, range(self.dims), 1, self.bias)
        else:
            y = self._chain(batched)
        return y if x.ndim == self.dims + 2 else y.squeeze(0)

    def _chain(self, x: Tensor) -> Tensor:
        pairs = self.in_channels * self.out_channels * self.rank
        for axis in range(self.dims - 1, 0, -1):  # channels in between stand in the order (i, o, r)
            filters = torch.flatten(self.factors[axis].transpose(0, 1), 0, 2)  # (C_in C_out R, k)
            groups = self.in_channels if axis == self.dims - 1 else pairs
            x = self._step(x, self._along(filters.unsqueeze(1), axis), (axis,), groups, None)
        y = torch.unflatten(x, 1, (self.in_channels, self.out_channels, self.rank)).transpose(1, 2)
        last = torch.flatten(self.factors[0], 1, 2)  # (C_out, C_in R, k)
        return self._step(torch.flatten(y, 1, 3), self._along(last, 0), (0,), self.out_channels, self.bias)

    def _along(self, filters: Tensor, axis: int) -> Tensor:
        """Return filters (O, I, k) as kernels that reach along ``axis`` alone."""
        return filters.reshape(*filters.shape[:2], *(filters.shape[2] if n == axis else 1 for n in range(self.dims)))

    def _step(self, x: Tensor, weight: Tensor, axes: Sequence[int], groups: int, bias: Tensor | None) -> Tensor:
        """Convolve along ``axes``, with their stride, dilation and padding and none along the others."""
        if any(side for axis in axes for side in self._sides[axis]):
            sides = [self._sides[axis] if axis in axes else (0, 0) for axis in reversed(range(self.dims))]
            pads = [side for both in sides for side in both]
            x = F.pad(x, pads, mode=_MODES[self.padding_mode])
        stride, dilation = (
            tuple(value[axis] if axis in axes else 1 for axis in range(self.dims))
            for value in (self.stride, self.dilation)
        )
        run: Any = _CONVS[self.dims]
        y: Tensor = run(x, weight, bias, stride, 0, dilation, groups)
        return y

    def _each(self, name: str, value: int | tuple[int, ...]) -> tuple[int, ...]:
        found = (value,) * self.dims if isinstance(value, int) else tuple(value)
        if len(found) != self.dims or min(found) < (0 if name == "padding" else 1):
            raise BadInput(f"{name} must be {self.dims} positive numbers, got {value}")
        return found

    def _both_sides(self, padding: int | tuple[int, ...] | str) -> list[tuple[int, int]]:
        if not isinstance(padding, str):
            return [(side, side) for side in self._each("padding", padding)]
        if padding not in ("same", "valid") or (padding == "same" and max(self.stride) > 1):
            raise BadInput(f"padding must be a number, 'valid', or 'same' with stride 1, got {padding!r}")
        reach = [d * (k - 1) if padding == "same" else 0 for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in reach]

    def extra_repr(self) -> str:
        """Return the sizes that ``print(model)`` shows."""
        return f"{self.in_channels}, {self.out_channels}, {self.kernel_size}, rank={self.rank}, {self.execution}"


class SeparableKernelConv1d(_SeparableKernels):
    """One axis: a plain convolution whose filters are summed; nothing is saved."""

    dims = 1


class SeparableKernelConv2d(_SeparableKernels):
    """Two axes; settings as in ``nn.Conv2d`` without groups, with ``rank`` and ``execution``.

    Example:
        >>> SeparableKernelConv2d(3, 8, 7, padding=3)(torch.zeros(2, 3, 9, 9)).shape
        torch.Size([2, 8, 9, 9])
    """

    dims = 2


class SeparableKernelConv3d(_SeparableKernels):
    """Three axes; settings as in ``nn.Conv3d`` without groups, with ``rank`` and ``execution``."""

    dims = 3


_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}
_CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_MAKERS: dict[type[nn.Module], type[_SeparableKernels]] = {
    nn.Conv1d: SeparableKernelConv1d,
    nn.Conv2d: SeparableKernelConv2d,
    nn.Conv3d: SeparableKernelConv3d,
}


def separable_like(conv: nn.Module, rank: int, execution: Execution) -> _SeparableKernels:
    """Return a layer of the sizes of ``conv`` with fresh filters."""
    layer = cast(Any, conv)
    if type(conv) not in _MAKERS or layer.groups != 1:
        raise BadInput(f"only Conv1d, Conv2d and Conv3d with one group have separable kernels, got {conv}")
    return _MAKERS[type(conv)](
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        rank=rank,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        bias=layer.bias is not None,
        padding_mode=layer.padding_mode,
        execution=execution,
        device=layer.weight.device,
        dtype=layer.weight.dtype,
    ).train(conv.training)


def from_dense(conv: nn.Module, rank: int = 1, *, execution: Execution = "compose") -> _SeparableKernels:
    """Return the layer of ``rank`` whose kernels are nearest to those of ``conv``, which is left as it is.

    Example:
        >>> from_dense(nn.Conv2d(3, 8, 5, padding=2), 2)
        SeparableKernelConv2d(
          3, 8, (5, 5), rank=2, compose
          (factors): ParameterList(
              (0): Parameter containing: [torch.float32 of size 8x3x2x5]
              (1): Parameter containing: [torch.float32 of size 8x3x2x5]
          )
        )
    """
    with torch.random.fork_rng(devices=[]):  # the filters are drawn, only to be replaced
        made = separable_like(conv, rank, execution)
    weight = cast(Tensor, conv.weight)
    with torch.no_grad():
        for mine, found in zip(made.factors, cp_factors(weight.flatten(0, 1), rank), strict=True):
            mine.copy_(found.reshape(mine.shape))
        if made.bias is not None:
            made.bias.copy_(cast(Tensor, conv.bias))
    return made


def plain_convolutions(model: nn.Module) -> dict[str, nn.Module]:
    """Return the plain convolutions of one group that own their weight, by their first name."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for value in module.parameters(recurse=False):
            owners[id(value)] = owners.get(id(value), 0) + 1
    return {
        name: module
        for name, module in model.named_modules()
        if name and type(module) in _MAKERS and cast(Any, module).groups == 1 and owners.get(id(module.weight)) == 1
    }


def put(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` wherever the module ``name`` stands."""
    old = model.get_submodule(name)
    for other, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            parent, _, child = other.rpartition(".")
            setattr(model.get_submodule(parent), child, new)


class SeparateKernels(Edit):
    """Replace convolutions by separable ones, each the nearest of its rank to the weights that it finds.

    Args:
        ranks: module name -> R.
        execution: how they run.
    """

    op: ClassVar[str] = "separate-kernels"
    ranks: dict[str, int] = Field(min_length=1)
    execution: Execution = "compose"

    def rewrite(self, model: nn.Module) -> nn.Module:
        """Replace every layer named."""
        for name, rank in self.ranks.items():
            try:
                new = from_dense(model.get_submodule(name), rank, execution=self.execution)
            except (AttributeError, BadInput) as error:
                raise BadInput(f"separate-kernels: module {name!r}: {error}") from None
            put(model, name, new)
        return model

    def describe(self) -> dict[str, str]:
        """Return the rank of each layer in words."""
        return {name: f"kernels separable at rank {rank} ({self.execution})" for name, rank in self.ranks.items()}
