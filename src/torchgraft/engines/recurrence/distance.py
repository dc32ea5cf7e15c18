"""What a score owes to the distance of two tokens alone: fixed decays, and products of queries and keys with angles.

With an angle that is linear in the position, both products make ``q_t . k_s`` a function of ``t - s``:
``rotate_by`` gives ``sum_c |q_c| |k_c| cos((t - s) theta_c + phase)`` over pairs of channels, ``cosine_features`` gives
``sum_c q_c k_c cos((t - s) theta_c)`` over single ones, with twice as many channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchgraft.errors import BadInput

__all__ = ["cosine_features", "frequencies", "positions", "rotary", "rotate_by", "slopes"]


def slopes(num_heads: int, *, like: Tensor | None = None) -> Tensor:
    """Return the decay rates ``2^(-8h/H)`` of heads h = 1 to H, (H,), in float32 at least.

    Args:
        num_heads: H.
        like: a tensor whose device and precision are taken.

    Example:
        >>> slopes(4).tolist()
        [0.25, 0.0625, 0.015625, 0.00390625]

    Raises:
        BadInput: there is no head.
    """
    if num_heads < 1:
        raise BadInput(f"num_heads must be at least 1, got {num_heads}")
    dtype = torch.float32 if like is None else torch.promote_types(like.dtype, torch.float32)
    head = torch.arange(1, num_heads + 1, dtype=dtype, device=None if like is None else like.device)
    return torch.exp2(-8 * head / num_heads)


def frequencies(count: int, base: float = 10_000.0, *, like: Tensor | None = None) -> Tensor:
    """Return angles a token, ``base^(-c / count)`` for c = 0 to count - 1, (count,), in float32 at least.

    Args:
        count: how many.
        base: 1 over it is about the smallest angle.
        like: a tensor whose device and precision are taken.

    Example:
        >>> frequencies(2, 100.0).tolist()
        [1.0, 0.10000000149011612]
    """
    dtype = torch.float32 if like is None else torch.promote_types(like.dtype, torch.float32)
    return base ** (-torch.arange(count, dtype=dtype, device=None if like is None else like.device) / count)


def positions(before: Tensor, tokens: int) -> Tensor:
    """Return the positions of ``tokens`` tokens after ``before`` others, (B,) integers -> (B, tokens).

    Example:
        >>> positions(torch.tensor([0, 5]), 3).tolist()
        [[0, 1, 2], [5, 6, 7]]
    """
    return before[:, None] + torch.arange(tokens, device=before.device)


def rotate_by(x: Tensor, angle: Tensor) -> Tensor:
    """Turn channel c and channel c + K/2 of every head by an angle.

    Args:
        x: queries or keys.
        angle: of any shape that broadcasts to (B, T, H, K/2), in float32 at least.

    Shapes:
        (B, T, H, K) -> (B, T, H, K), K even

    Example:
        >>> rotate_by(torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([torch.pi / 2])).round().flatten().tolist()
        [-0.0, 1.0]
    """
    wide = x.to(torch.promote_types(x.dtype, angle.dtype))
    left, right = wide.chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(x.dtype)


def rotary(x: Tensor, place: Tensor, base: float = 10_000.0) -> Tensor:
    """Turn each pair of channels by an angle that grows with the position, as rotary embeddings do.

    Args:
        x: queries or keys.
        place: the position of every token.
        base: the slowest pair turns by about 1 / ``base`` a token.

    Shapes:
        x: (B, T, H, K), K even; place: (B, T) or (1, T) -> (B, T, H, K)

    Example:
        >>> x = torch.randn(1, 3, 2, 4)
        >>> bool(torch.equal(rotary(x, torch.arange(3)[None])[:, 0], x[:, 0]))
        True
    """
    return rotate_by(x, place[..., None, None] * frequencies(x.shape[-1] // 2, base, like=x))


def cosine_features(x: Tensor, angle: Tensor) -> Tensor:
    """Return ``x cos(angle)`` and ``x sin(angle)`` side by side.

    Args:
        x: queries or keys.
        angle: of any shape that broadcasts to that of ``x``, in float32 at least.

    Shapes:
        (B, T, H, K) -> (B, T, H, 2K)

    Example:
        >>> cosine_features(torch.ones(1, 1, 1, 1), torch.zeros(1)).flatten().tolist()
        [1.0, 0.0]
    """
    wide = x.to(torch.promote_types(x.dtype, angle.dtype))
    return torch.cat([wide * angle.cos(), wide * angle.sin()], dim=-1).to(x.dtype)
