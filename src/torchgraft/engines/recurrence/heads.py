"""The pieces around a linear recurrence that most mixers share: heads, short convolutions, norms of unit scale."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.errors import BadInput

__all__ = ["HeadNorm", "ShortConvolution", "head_size", "merge_heads", "split_heads"]


def head_size(width: int, num_heads: int, what: str = "d_model") -> int:
    """Return ``width // num_heads``.

    Raises:
        BadInput: ``num_heads`` does not divide ``width``.
    """
    if num_heads < 1 or width % num_heads:
        raise BadInput(f"num_heads must divide {what} = {width}, got {num_heads}")
    return width // num_heads


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Return ``x`` with its last dimension split, (B, T, H * K) -> (B, T, H, K)."""
    return torch.unflatten(x, -1, (num_heads, -1))


def merge_heads(x: Tensor) -> Tensor:
    """Return ``x`` with its heads joined, (B, T, H, V) -> (B, T, H * V)."""
    return x.flatten(-2)


class HeadNorm(nn.Module):
    """Root-mean-square norm of each head by itself, (..., V) -> (..., V).

    Args:
        size: V.
        eps: added to the mean square.
        affine: whether a learned scale, shared by the heads, is applied.
    """

    def __init__(self, size: int, *, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__()
        self.size, self.eps = size, eps
        self.weight = nn.Parameter(torch.ones(size)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` divided by its root mean square."""
        return F.rms_norm(x, (self.size,), self.weight, self.eps)


class ShortConvolution(nn.Module):
    """Causal depthwise convolution over few tokens, with the last inputs as its state.

    Args:
        channels: C.
        kernel: number of taps; 1 weighs the current token only.
        activation: whether SiLU follows.

    Shapes:
        x: (B, T, C), state: (B, kernel - 1, C) -> (B, T, C), (B, kernel - 1, C).
    """

    def __init__(self, channels: int, kernel: int = 4, *, activation: bool = True) -> None:
        super().__init__()
        if kernel < 1:
            raise BadInput(f"kernel must be at least 1, got {kernel}")
        self.channels, self.kernel, self.activation = channels, kernel, activation
        self.weight = nn.Parameter(torch.empty(channels, kernel))
        nn.init.uniform_(self.weight, -(kernel**-0.5), kernel**-0.5)

    def init_state(self, batch_size: int) -> Tensor:
        """Return zeros: nothing stands before the first token."""
        return self.weight.new_zeros(batch_size, self.kernel - 1, self.channels)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Convolve ``x`` after ``state``; return the output and the last ``kernel - 1`` inputs."""
        before = x.new_zeros(len(x), self.kernel - 1, self.channels) if state is None else state.to(x.dtype)
        seen = torch.cat([before, x], dim=1)  # (B, kernel - 1 + T, C)
        y = F.conv1d(seen.mT, self.weight[:, None].to(x.dtype), groups=self.channels).mT
        return (F.silu(y) if self.activation else y), seen[:, seen.shape[1] - self.kernel + 1 :]
