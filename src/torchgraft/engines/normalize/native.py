"""The passes of normalisation layers in C++ (``kernel.cpp``), for float32 on the CPU where a compiler is at hand.

Every function here has a twin made of torch's operators, which stands in for it elsewhere and against which it is
tested. They make fewer passes over memory than a chain of operators, which is what such layers spend their time on.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchgraft.engines.native import library, traced

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
    "blend_forward": "ppppppppppp ll fff i",
    "blend_backward": "ppppppppppppppp ll ff i",
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
    if traced():
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
    x: Tensor,
    token: tuple[Tensor, Tensor] | None,
    channel: tuple[Tensor, Tensor, Tensor],
    *,
    lam: float,
    eps: tuple[float, float],
) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return lam LN(x) + (1 - lam)(BN(x) + eta x), mean and 1 / deviation of tokens, and mean and variance of columns.

    Args:
        x: (N, D).
        token: weight and bias of the layer norm, (D,); ``None`` where there is none, and lam is 0.
        channel: gain and offset of the batch norm, (D,), and eta, ().
        lam: the share of the layer norm.
        eps: of both.
    """
    weight, bias = (None, None) if token is None else (value.contiguous() for value in token)
    rows, width = x.shape
    y, columns = torch.empty_like(x), (x.new_empty(width), x.new_empty(width))
    tokens = x.new_empty(rows), x.new_empty(rows)
    held = (value.contiguous() for value in channel)
    _call("blend_forward", x, weight, bias, *held, *tokens, *columns, y, rows, width, lam, *eps)
    return y, tokens, columns


def blend_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    gain: Tensor,
    eta: Tensor,
    tokens: tuple[Tensor, Tensor],
    columns: tuple[Tensor, Tensor],
    *,
    lam: float,
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight, bias, gain, offset and eta of :func:`blend_forward`.

    Args:
        grad, x: (N, D).
        weight: of the layer norm, (D,), or ``None`` where there is none.
        gain, eta: of the batch norm, (D,), and ().
        tokens, columns: what :func:`blend_forward` has returned.
        lam: the share of the layer norm.
        eps: of the batch norm.
    """
    weight = None if weight is None else weight.contiguous()
    dx, to_gain, to_offset, to_eta = (
        torch.empty_like(x),
        torch.empty_like(gain),
        torch.empty_like(gain),
        torch.empty_like(eta),
    )
    to_weight, to_bias = (None, None) if weight is None else (torch.empty_like(weight), torch.empty_like(weight))
    given = (grad, x, weight, gain.contiguous(), eta, *tokens, *columns)
    _call("blend_backward", *given, dx, to_weight, to_bias, to_gain, to_offset, to_eta, *x.shape, lam, eps)
    return dx, to_weight, to_bias, to_gain, to_offset, to_eta
