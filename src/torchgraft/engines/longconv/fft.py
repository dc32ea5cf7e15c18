"""Depthwise convolutions as long as the sequence, by the FFT in O(T log T): causal (zeros before) or circular."""

from __future__ import annotations

import torch
from torch import Tensor

from torchgraft.errors import BadInput

__all__ = ["direct_conv", "fast_length", "fft_conv", "fft_filter"]


def fast_length(at_least: int) -> int:
    """Return the smallest 2^a 3^b 5^c (a >= 0, b and c at most 2) that is not below ``at_least``: FFTs of it are fast.

    Example:
        >>> fast_length(1), fast_length(97), fast_length(1023)
        (1, 100, 1024)
    """
    best = 1 << max(at_least - 1, 0).bit_length()
    for odd in (3, 5, 9, 15, 25, 45, 75, 225):
        rest = -(-at_least // odd)
        best = min(best, odd << max(rest - 1, 0).bit_length())
    return best


def _wide(x: Tensor) -> Tensor:
    """Return ``x`` in float32, or in float64 where it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def half_spectrum(x: Tensor, points: int) -> Tensor:
    """Return the transform of real ``x`` along its tokens, (..., T, C) -> (..., points // 2 + 1, C), complex.

    It is taken with the tokens last in memory, which is twice as fast as across them.
    """
    spectrum: Tensor = torch.fft.rfft(_wide(x).mT.contiguous(), points)
    return spectrum.mT


def _checked(x: Tensor, kernel: Tensor, causal: bool) -> None:
    if x.ndim != 3 or kernel.ndim not in (2, 3) or kernel.shape[-1] != x.shape[-1]:
        raise BadInput(
            f"x must be (B, T, C) and kernel (L, C) or (B, L, C), got {tuple(x.shape)} and {tuple(kernel.shape)}"
        )
    if x.shape[1] < 1 or kernel.shape[-2] < 1:
        raise BadInput(f"x and kernel need at least one tap, got T = {x.shape[1]} and L = {kernel.shape[-2]}")
    if kernel.ndim == 3 and len(kernel) not in (1, len(x)):
        raise BadInput(f"kernel must have a batch of 1 or {len(x)}, got {len(kernel)}")
    if not causal and kernel.shape[-2] > x.shape[1]:
        raise BadInput(f"a circular kernel has at most T = {x.shape[1]} taps, got {kernel.shape[-2]}")


def fft_filter(x: Tensor, spectrum: Tensor, *, length: int | None = None) -> Tensor:
    """Multiply the spectrum of ``x`` along its tokens: a circular convolution given by the transform of its kernel.

    Args:
        x: the signal.
        spectrum: the half spectrum of a real kernel, as ``torch.fft.rfft`` returns it.
        length: number of points n of the transform; default T. ``x`` is filled with zeros up to it.

    Shapes:
        x: (B, T, C); spectrum: (n // 2 + 1, C) or (B, n // 2 + 1, C) -> (B, T, C), float32 at least.
    """
    tokens = x.shape[1]
    points = tokens if length is None else length
    if x.numel() == 0:  # the FFT refuses an empty batch; the product keeps the gradient's path
        return _wide(x) * spectrum.real.sum()
    product = half_spectrum(x, points).mT * spectrum.mT
    y: Tensor = torch.fft.irfft(product, points)
    return y[..., :tokens].mT


def fft_conv(x: Tensor, kernel: Tensor, *, causal: bool = True) -> Tensor:
    """Convolve each channel of ``x`` with its kernel, y_t = sum_l kernel_l x_{t-l}.

    Args:
        x: the signal.
        kernel: the taps, lag 0 first; one for all samples or one a sample.
        causal: whether zeros stand before the first token; otherwise the last tokens do (t - l is taken modulo T).

    Shapes:
        x: (B, T, C); kernel: (L, C) or (B, L, C) -> (B, T, C) in the dtype of ``x``, computed in float32 at least.
        Causal kernels may be longer than T, the rest is not met; circular ones have L <= T.

    Example:
        >>> x, kernel = torch.tensor([[[1.0], [2.0], [3.0]]]), torch.tensor([[1.0], [10.0]])
        >>> fft_conv(x, kernel).flatten().round().tolist()
        [1.0, 12.0, 23.0]
        >>> fft_conv(x, kernel, causal=False).flatten().round().tolist()
        [31.0, 12.0, 23.0]

    Raises:
        BadInput: shapes do not fit.
    """
    _checked(x, kernel, causal)
    tokens = x.shape[1]
    kernel = kernel[..., :tokens, :]
    points = fast_length(tokens + kernel.shape[-2] - 1) if causal else tokens
    if x.numel() == 0:
        return x * kernel.sum().to(x.dtype)
    return fft_filter(x, half_spectrum(kernel, points), length=points).to(x.dtype)


def direct_conv(x: Tensor, kernel: Tensor, *, causal: bool = True) -> Tensor:
    """Return what :func:`fft_conv` returns by its defining sum, lag by lag in O(T L): the reference.

    Example:
        >>> direct_conv(torch.tensor([[[1.0], [2.0], [3.0]]]), torch.tensor([[1.0], [10.0]])).flatten().tolist()
        [1.0, 12.0, 23.0]
    """
    _checked(x, kernel, causal)
    wide, taps = _wide(x), _wide(kernel)
    y = torch.zeros_like(wide)
    for lag in range(min(kernel.shape[-2], x.shape[1])):
        shifted = wide.roll(lag, dims=1)
        if causal:
            shifted = torch.cat([torch.zeros_like(wide[:, :lag]), wide[:, : x.shape[1] - lag]], dim=1)
        y = y + shifted * taps[..., lag : lag + 1, :]
    return y.to(x.dtype)
