"""The passes of normalisation layers in C++ (``kernel.cpp``), for float32 on the CPU where a compiler is at hand.

Every function here has a twin made of torch's operators, which stands in for it elsewhere and against which it is
tested. They make fewer passes over memory than a chain of operators, which is what such layers spend their time on.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchgraft.engines.native import library

__all__ = [
    "KINDS",
    "blend_backward",
    "blend_forward",
    "power_backward",
    "power_forward",
    "row_moments",
    "rows_backward",
    "rows_forward",
    "rows_sums",
    "usable",
]

KINDS = {"affine": 0, "larger": 1, "gated": 2, "silu": 3}
Kind = Literal["affine", "larger", "gated", "silu"]
_PLACES = {
    "row_moments": "ppp ll i",
    "rows_forward": "i ppp ll i",
    "rows_sums": "i pppp ll i",
    "rows_backward": "i pppppp ll i",
    "power_forward": "ppppppp lll f i",
    "power_backward": "pppppppp lll i",
    "blend_forward": "pppppppp ll ff i",
    "blend_sums": "ppppppppppp ll i",
    "blend_backward": "ppppppppppp ll f i",
}
_TYPES = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "i": ctypes.c_int32, "f": ctypes.c_float}


@functools.cache
def _functions() -> dict[str, Any] | None:
    found = library(Path(__file__).with_name("kernel.cpp"))
    if found is None:
        return None
    functions = {}
    for name, places in _PLACES.items():
        function = getattr(found, f"torchgraft_{name}")
        function.argtypes = [_TYPES[place] for place in places.replace(" ", "")]
        function.restype = None
        functions[name] = function
    return functions


def usable(*tensors: Tensor | None) -> bool:
    """Say whether the kernels can take ``tensors``: float32 on the CPU, and a compiler (or its work) is there."""
    if torch.compiler.is_compiling():
        return False
    given = [value for value in tensors if value is not None]
    plain = all(
        v.dtype == torch.float32 and v.is_cpu and v.numel() > 0 and type(v) in (Tensor, nn.Parameter) for v in given
    )
    return plain and _functions() is not None


def _call(name: str, *values: Tensor | float | None) -> None:
    """Call a kernel; every tensor is contiguous float32 on the CPU."""
    functions = _functions()
    if functions is None:
        raise RuntimeError("the kernels of normalisation cannot be had here; ask usable() first")
    given = [value.data_ptr() if isinstance(value, Tensor) else value for value in values]
    functions[name](*given, torch.get_num_threads())


def row_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of the rows of (N, S)."""
    mean, var = x.new_empty(len(x)), x.new_empty(len(x))
    _call("row_moments", x, mean, var, *x.shape)
    return mean, var


def _stacked(numbers: Sequence[Tensor]) -> Tensor:
    return torch.stack([value.flatten() for value in numbers])  # (numbers, N)


def rows_forward(kind: Kind, x: Tensor, numbers: Sequence[Tensor]) -> Tensor:
    """Return the kernel of the rows of (N, S) with the numbers (N,) of each."""
    y = torch.empty_like(x)
    _call("rows_forward", KINDS[kind], x, _stacked(numbers), y, *x.shape)
    return y


def rows_sums(kind: Kind, x: Tensor, grad: Tensor, numbers: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the gradient of each number, (N,) each."""
    stacked = _stacked(numbers)
    sums = torch.empty_like(stacked)
    _call("rows_sums", KINDS[kind], x, grad, stacked, sums, *x.shape)
    return sums.unbind(0)


def rows_backward(
    kind: Kind, x: Tensor, grad: Tensor, numbers: Sequence[Tensor], slope: Tensor, offset: Tensor
) -> Tensor:
    """Return the gradient of ``x`` with the numbers held, plus slope x + offset, a number of each a row."""
    dx = torch.empty_like(x)
    _call(
        "rows_backward", KINDS[kind], x, grad, _stacked(numbers), slope.contiguous(), offset.contiguous(), dx, *x.shape
    )
    return dx


def power_forward(
    x: Tensor, weight: Tensor | None, factor: Tensor, shift: Tensor, *, groups: int, eps: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return y = x scale factor + shift, the scale of each token and group, and the columns' sums of (x scale)^2.

    Args:
        x: (N, D).
        weight: what each token counts in the sums, (N,), or ``None``.
        factor, shift: (D,).
        groups: of columns, each divided by its root mean square in a token; 0 for none, and no scale.
        eps: added to mean squares.
    """
    y, total = torch.empty_like(x), x.new_empty(x.shape[1])
    scale = x.new_empty(len(x), groups) if groups else None
    _call("power_forward", x, weight, factor.contiguous(), shift.contiguous(), scale, total, y, *x.shape, groups, eps)
    return y, scale, total


def power_backward(
    grad: Tensor, x: Tensor, scale: Tensor | None, push: Tensor, pull: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return grad push - x scale pull through the scale, and the columns' sums of grad x scale and of grad."""
    dx, along, upward = torch.empty_like(x), x.new_empty(x.shape[1]), x.new_empty(x.shape[1])
    groups = 0 if scale is None else scale.shape[1]
    _call("power_backward", grad, x, scale, push.contiguous(), pull.contiguous(), dx, along, upward, *x.shape, groups)
    return dx, along, upward


def blend_forward(
    x: Tensor, weight: Tensor, bias: Tensor, factor: Tensor, shift: Tensor, *, lam: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return lam layer_norm(x) + (1 - lam)(x factor + shift) of tokens (N, D), and each token's mean and 1 / deviation.

    Args:
        x: (N, D).
        weight, bias: of the layer norm, (D,).
        factor, shift: (D,).
        lam: the share of the layer norm.
        eps: of the layer norm.
    """
    y, mean, inverse = torch.empty_like(x), x.new_empty(len(x)), x.new_empty(len(x))
    held = (value.contiguous() for value in (weight, bias, factor, shift))
    _call("blend_forward", x, *held, mean, inverse, y, *x.shape, lam, eps)
    return y, mean, inverse


def blend_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    inverse: Tensor,
    centre: Tensor,
    through: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
    *,
    lam: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradient of ``x``, and the columns' sums of grad, grad (x - centre) and grad (x - mean) inverse.

    Args:
        grad, x: (N, D).
        weight: of the layer norm, (D,).
        mean, inverse: of each token, from :func:`blend_forward`.
        centre: of each column, (D,).
        through: takes the sums of grad and of grad (x - centre), and returns ``(push, pull, add)``, (D,)
            each: what the column part adds to the gradient of ``x`` is grad push + x pull + add.
        lam: the share of the layer norm.
    """
    columns = [x.new_empty(x.shape[1]) for _ in range(3)]
    first, second, dx = torch.empty_like(mean), torch.empty_like(mean), torch.empty_like(x)
    _call("blend_sums", grad, x, weight, mean, inverse, centre.contiguous(), *columns, first, second, *x.shape)
    push, pull, add = (value.contiguous() for value in through(columns[0], columns[1]))
    _call("blend_backward", grad, x, weight, mean, inverse, first, second, push, pull, add, dx, *x.shape, lam)
    return dx, columns[0], columns[1], columns[2]
