"""Products of floats made by one addition of mantissas and exponents: emulated exactly, with the law of their error.

    x = (1 + u) 2^i, y = (1 + v) 2^j:  L(x, y) = (1 + s) 2^(i + j), s = u + v + c, c = 2^-l(k)

Two modes differ in what a full mantissa does, s >= 1. ``formula`` is the equation above. ``integer`` is the addition of
the bit fields, whose carry makes 2s of 1 + s (and 4(s - 1) from s = 2 on, which needs k >= 6). In formula mode a matrix
product is three ordinary ones, with P(x) = sign(x) 2^i: L(X, Y) = X P(Y) + P(X) Y + (c - 1) P(X) P(Y).
"""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from torchgraft.errors import BadInput

__all__ = ["Mode", "check_settings", "error_expectation", "l_mul", "l_mul_matmul", "offset", "round_mantissa"]

Mode: TypeAlias = Literal["formula", "integer"]

#: dtype -> (integer view, bits of the mantissa, bias of the exponent)
_FIELDS = {torch.float32: (torch.int32, 23, 127), torch.float64: (torch.int64, 52, 1023)}
#: Elementwise products held at once in integer mode.
_CHUNK = 2**22


def check_settings(mantissa_bits: int | None, mode: str) -> None:
    """Refuse a mode or a number of mantissa bits that there is not."""
    if mode not in ("formula", "integer"):
        raise BadInput(f"mode must be 'formula' or 'integer', got {mode!r}")
    if mantissa_bits is not None and not 1 <= mantissa_bits <= 22:
        raise BadInput(f"mantissa_bits must lie in 1..22 or be None for all, got {mantissa_bits}")


def offset(mantissa_bits: int | None) -> int:
    """Return l(k): the place of the bit that stands for the product of the mantissas.

    Example:
        >>> [offset(k) for k in (1, 3, 4, 5, None)]
        [1, 3, 3, 4, 4]
    """
    check_settings(mantissa_bits, "formula")
    if mantissa_bits is None or mantissa_bits > 4:
        return 4
    return min(mantissa_bits, 3)


def error_expectation(mantissa_bits: int | None = None, *, mode: Mode = "formula", l: int | None = None) -> float:  # noqa: E741
    """Return the mean of (exact - L-Mul) / 2^(i + j) over independent mantissas, uniform among those of k bits.

    Args:
        mantissa_bits: k; ``None`` for continuous mantissas, for which the closed forms hold.
        mode: which of the two.
        l: place of the bit that is added; by default l(k).

    Example:
        >>> error_expectation(l=3), error_expectation(l=4)
        (0.125, 0.1875)
    """
    check_settings(mantissa_bits, mode)
    c = 2.0 ** -(offset(mantissa_bits) if l is None else l)
    if mantissa_bits is None:
        carry = c + (1 - c) ** 3 / 6 + c**3 / 3 if mode == "integer" else 0.0
        return 0.25 - c - carry
    if mantissa_bits > 11:
        return error_expectation(mode=mode, l=round(-math.log2(c)))
    u = torch.arange(2**mantissa_bits, dtype=torch.float64) / 2**mantissa_bits
    s = u[:, None] + u + c
    found = 1 + s if mode == "formula" else _carried(s)
    return float(((1 + u[:, None]) * (1 + u) - found).mean())


def _carried(s: Tensor) -> Tensor:
    """Return what the added fields mean at exponent 0: 1 + s, 2s from s = 1 on, 4(s - 1) from s = 2 on."""
    return torch.maximum(torch.maximum(1 + s, 2 * s), 4 * (s - 1))


def round_mantissa(x: Tensor, mantissa_bits: int | None) -> Tensor:
    """Return ``x`` with its mantissa rounded to k bits, halves to even; ``None`` leaves it.

    Example:
        >>> round_mantissa(torch.tensor([1.3, 1.97, -0.7]), 2)
        tensor([ 1.2500,  2.0000, -0.7500])
    """
    if mantissa_bits is None:
        return x
    part, exponent = torch.frexp(x)
    steps = 2.0 ** (mantissa_bits + 1)
    return torch.where(x.isfinite(), torch.ldexp((part * steps).round() / steps, exponent), x)


def _power(x: Tensor) -> Tensor:
    """Return sign(x) 2^i, 0 at 0."""
    _, exponent = torch.frexp(x)
    return torch.ldexp(x.sign(), exponent - 1)


def _by_formula(x: Tensor, y: Tensor, c: float) -> Tensor:
    p, q = _power(x), _power(y)
    sign = p.sign() * q.sign()
    u, v = x.abs() / p.abs() - 1, y.abs() / q.abs() - 1  # exact: a power of two divides
    return torch.where(sign == 0, torch.zeros_like(u), sign * (1 + u + v + c) * p.abs() * q.abs())


def _by_fields(x: Tensor, y: Tensor, place: int) -> Tensor:
    """Add the fields of exponent and mantissa as integers; what leaves the range of exponents becomes 0 or infinity."""
    kind, width, bias = _FIELDS[x.dtype]
    top = torch.iinfo(kind).max  # all bits but the sign
    a, b = x.view(kind), y.view(kind)
    # With the bias off each, the sum of two fields stays within the integer (but for the very largest, held there).
    most = (bias + 1) << width
    p, q = ((field & top) - (bias << width) for field in (a, b))
    place_bit = 1 << (width - place)
    total = p.clamp(max=most - place_bit) + q.clamp(max=most - place_bit) + place_bit
    least = (1 - bias) << width
    sign = torch.where((a ^ b) < 0, -1.0, 1.0).to(x.dtype)
    value = (total.clamp(least, most - 1) + (bias << width)).view(x.dtype)
    value = torch.where(total >= most, torch.full_like(value, math.inf), value)
    tiny = torch.finfo(x.dtype).tiny
    nothing = (total < least) | (x.abs() < tiny) | (y.abs() < tiny)
    return sign * torch.where(nothing, torch.zeros_like(value), value)


class _Product(torch.autograd.Function):
    """The emulated elementwise product; gradients of the exact one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, mantissa_bits: int | None, mode: str) -> Tensor:
        ctx.save_for_backward(x, y)
        a, b = round_mantissa(x, mantissa_bits), round_mantissa(y, mantissa_bits)
        place = offset(mantissa_bits)
        out = _by_formula(a, b, 2.0**-place) if mode == "formula" else _by_fields(a.contiguous(), b.contiguous(), place)
        return torch.where(x.isfinite() & y.isfinite(), out, x * y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, y = ctx.saved_tensors
        return grads[0] * y, grads[0] * x, None, None


def _wide(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        raise BadInput(f"L-Mul takes floating-point numbers, got {x.dtype}")
    return x if x.dtype in _FIELDS else x.float()


def l_mul(x: Tensor, y: Tensor, mantissa_bits: int | None = 4, mode: Mode = "formula") -> Tensor:
    """Return the emulated product of every pair, broadcast; zeros give 0, infinities and NaN what they always give.

    Args:
        x, y: the factors; 16-bit ones are widened first.
        mantissa_bits: k, to which both mantissas are rounded first, or ``None``.
        mode: ``"formula"`` or ``"integer"``; see the module. The latter takes subnormal numbers for 0.

    Example:
        >>> l_mul(torch.tensor(1.5), torch.tensor(1.5), 3), l_mul(torch.tensor(1.5), torch.tensor(1.5), 3, "integer")
        (tensor(2.1250), tensor(2.2500))

    Raises:
        BadInput: a setting is out of range, or the factors are no floats.
    """
    check_settings(mantissa_bits, mode)
    dtype = torch.promote_types(x.dtype, y.dtype)
    a, b = torch.broadcast_tensors(_wide(x), _wide(y))  # type: ignore[no-untyped-call]  # torch leaves it untyped
    kind = torch.promote_types(a.dtype, b.dtype)
    out: Tensor = _Product.apply(a.to(kind), b.to(kind), mantissa_bits, mode)  # type: ignore[no-untyped-call]
    return out.to(dtype)


class _Matmul(torch.autograd.Function):
    """The emulated matrix product of equal batches; gradients of the exact one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, mantissa_bits: int | None, mode: str) -> Tensor:
        ctx.save_for_backward(x, y)
        a, b, c = round_mantissa(x, mantissa_bits), round_mantissa(y, mantissa_bits), 2.0 ** -offset(mantissa_bits)
        p, q = _power(a), _power(b)
        if mode == "formula":
            return a @ q + p @ (b + (c - 1) * q)
        u = torch.where(p == 0, p, a / p - 1)  # (..., M, K)
        v = torch.where(q == 0, q, b / q - 1)  # (..., K, N)
        rows = max(1, _CHUNK // max(1, b.numel()))
        pieces = [
            (_carried(m[..., None] + v[..., None, :, :] + c) * (e[..., None] * q[..., None, :, :])).sum(-2)
            for m, e in zip(torch.split(u, rows, -2), torch.split(p, rows, -2), strict=True)
        ]
        return torch.cat(pieces, -2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, y = ctx.saved_tensors
        return grads[0] @ y.mT, x.mT @ grads[0], None, None


def l_mul_matmul(x: Tensor, y: Tensor, mantissa_bits: int | None = 4, mode: Mode = "formula") -> Tensor:
    """Return the matrix product whose single products are emulated and whose sums are exact.

    Shapes:
        (..., M, K), (..., K, N) -> (..., M, N), leading axes broadcast

    Raises:
        BadInput: as :func:`l_mul`, or the shapes do not fit.
    """
    check_settings(mantissa_bits, mode)
    if x.ndim < 2 or y.ndim < 2 or x.shape[-1] != y.shape[-2]:
        raise BadInput(f"a matrix product needs (..., M, K) and (..., K, N), got {tuple(x.shape)} and {tuple(y.shape)}")
    dtype = torch.promote_types(x.dtype, y.dtype)
    kind = torch.promote_types(_wide(x).dtype, _wide(y).dtype)
    lead = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])  # type: ignore[no-untyped-call]  # as above
    a, b = x.to(kind).expand(*lead, *x.shape[-2:]), y.to(kind).expand(*lead, *y.shape[-2:])
    with torch.autocast(a.device.type, enabled=False):  # the three products of the formula are one emulated product
        out: Tensor = _Matmul.apply(a, b, mantissa_bits, mode)  # type: ignore[no-untyped-call]
    return out.to(dtype)
