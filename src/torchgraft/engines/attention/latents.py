"""Latent tokens that read the features of a convolutional network: the layers of a branch of classification."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["CrossAttention", "LatentBlock", "Onward", "Shared", "equal_windows", "pooled_tokens"]


class CrossAttention(nn.Module):
    """One head that lets tokens read others: (B, T, D), (B, S, E) -> (B, T, D).

    Args:
        d_query: D.
        d_source: E.
        inner: width of query, key and value.
    """

    def __init__(self, d_query: int, d_source: int, inner: int) -> None:
        super().__init__()
        self.norm_query, self.norm_source = nn.LayerNorm(d_query), nn.LayerNorm(d_source)
        self.query = nn.Linear(d_query, inner, bias=False)
        self.key = nn.Linear(d_source, inner, bias=False)
        self.value = nn.Linear(d_source, inner, bias=False)
        self.out = nn.Linear(inner, d_query)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        """Return what ``x`` reads from ``source``."""
        source = self.norm_source(source)
        read = F.scaled_dot_product_attention(self.query(self.norm_query(x)), self.key(source), self.value(source))
        y: Tensor = self.out(read)
        return y


class LatentBlock(nn.Module):
    """A pre-norm block of self-attention and a feed-forward part of twice the width: (B, T, D) -> (B, T, D).

    Args:
        d_model: D; divisible by ``heads``.
        heads: of the self-attention.
    """

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model)
        self.fc1, self.fc2 = nn.Linear(d_model, 2 * d_model), nn.Linear(2 * d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Let tokens read each other, then think."""
        q, k, v = torch.unflatten(self.qkv(self.norm1(x)), -1, (3, self.heads, -1)).permute(
            2, 0, 3, 1, 4
        )  # (B, H, T, K)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return y


class Onward(nn.Module):
    """Half as many tokens, twice as wide: (B, K, D) -> (B, K / 2, 2 D).

    Args:
        tokens: K, even.
        width: D.
    """

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm_tokens, self.norm_width = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.expand = nn.Linear(tokens, tokens // 2), nn.Linear(width, 2 * width)

    def forward(self, z: Tensor) -> Tensor:
        """Mix tokens, then widen them."""
        z = self.mix(self.norm_tokens(z).transpose(1, 2)).transpose(1, 2)
        y: Tensor = self.expand(self.norm_width(z))
        return y


class Shared(nn.Module):
    """What an exit tells a later one: (B, classes) -> (B, classes).

    Args:
        classes: number of classes.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(classes, classes), nn.LayerNorm(classes)

    def forward(self, y: Tensor) -> Tensor:
        """Return what the later exit reads of logits ``y``."""
        return F.relu(self.norm(self.fc(y)))


def pooled_tokens(x: Tensor, look: nn.Module, pooled: int) -> Tensor:
    """Return the tokens that features have for latent ones, (B, C, h, w) -> (B, S, C): pool(x + DW(x)).

    Args:
        x: the features.
        look: DW, a convolution that keeps their shape.
        pooled: the most rows and columns of tokens.

    Example:
        >>> pooled_tokens(torch.ones(2, 3, 8, 6), nn.Identity(), 4).shape
        torch.Size([2, 16, 3])
    """
    seen: Tensor = x + look(x)
    h, w = min(pooled, x.shape[2]), min(pooled, x.shape[3])
    if x.shape[2] % h == 0 and x.shape[3] % w == 0:  # equal windows take a third less time
        seen = seen if seen.shape[2:] == (h, w) else F.avg_pool2d(seen, (x.shape[2] // h, x.shape[3] // w))
    else:
        seen = F.adaptive_avg_pool2d(seen, (h, w))
    return seen.flatten(2).transpose(1, 2)


def equal_windows(size: tuple[int, int], most: int) -> int:
    """Return the rows and columns of tokens that equal windows make, where these are not much fewer than ``most``.

    Args:
        size: height and width of the features.
        most: the most rows and columns.

    Example:
        >>> [equal_windows((size, size), 7) for size in (56, 14, 8, 13, 2)]
        [7, 7, 4, 7, 2]
    """
    least = min(most, *size)
    equal = next(each for each in range(least, 0, -1) if size[0] % each == size[1] % each == 0)
    return equal if 2 * equal >= least else least
