"""A small rectified-flow transformer: joint attention over text and image tokens, its loss and its sampler.

x_t = (1 - t) x + t noise, of which the model says the velocity v = noise - x, conditioned on t and on a class; images
are drawn by Euler steps from t = 1 to 0. It stands for diffusion transformers in claims and tests.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.engines.attention import attend
from torchgraft.engines.recurrence.distance import frequencies, rotate_by
from torchgraft.engines.recurrence.heads import head_size, merge_heads, split_heads
from torchgraft.errors import BadInput

__all__ = ["FlowTransformer", "GridRotary", "JointAttention", "draw_images", "flow_pair"]

Pair: TypeAlias = "tuple[tuple[Tensor, Tensor, Tensor], Tensor]"


class GridRotary(nn.Module):
    """Turns half of the pairs of channels by the row and half by the column of an image token; text is not turned.

    Args:
        grid: rows of the image, and tokens a row.
        key_size: K, a multiple of 4.
        text: tokens in front that are text.
        base: the slowest pair turns by about 1 / ``base`` a token.

    Shapes:
        (B, text + h w, H, K) -> (B, text + h w, H, K)
    """

    angle: Tensor

    def __init__(self, grid: tuple[int, int], key_size: int, *, text: int = 0, base: float = 100.0) -> None:
        super().__init__()
        if key_size % 4:
            raise BadInput(f"key_size must be a multiple of 4 for two axes, got {key_size}")
        rates = frequencies(key_size // 4, base)
        y = torch.arange(grid[0]).repeat_interleave(grid[1])
        x = torch.arange(grid[1]).repeat(grid[0])
        image = torch.cat([y[:, None] * rates, x[:, None] * rates], dim=1)  # (h w, K/2)
        angle = torch.cat([image.new_zeros(text, key_size // 2), image])
        self.register_buffer("angle", angle[:, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Turn queries or keys."""
        return rotate_by(x, self.angle)


class JointAttention(nn.Module):
    """Multi-head softmax attention of all tokens to all: (B, T, D) -> (B, T, D).

    Args:
        d_model: D.
        num_heads: H; divides ``d_model``.
        place: what turns queries and keys by their position, or nothing.
    """

    def __init__(self, d_model: int, num_heads: int, *, place: nn.Module | None = None) -> None:
        super().__init__()
        head_size(d_model, num_heads)
        self.num_heads = num_heads
        self.query, self.key, self.value, self.out = (nn.Linear(d_model, d_model) for _ in range(4))
        self.place = place

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens."""
        q, k, v = (split_heads(part(x), self.num_heads) for part in (self.query, self.key, self.value))
        if self.place is not None:
            q, k = self.place(q), self.place(k)
        y: Tensor = self.out(merge_heads(attend(q, k, v)))
        return y


class _Block(nn.Module):
    """Attention and a feed-forward part, each scaled, shifted and gated by the condition."""

    def __init__(self, d_model: int, num_heads: int, hidden: int, place: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model, elementwise_affine=False)
        self.attn: nn.Module = JointAttention(d_model, num_heads, place=place)
        self.mlp = nn.Sequential(nn.Linear(d_model, hidden), nn.GELU(), nn.Linear(hidden, d_model))
        self.modulate = nn.Linear(d_model, 6 * d_model)
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        a, b, c, d, e, f = self.modulate(condition)[:, None].chunk(6, dim=-1)  # (B, 1, D) each
        x = x + c * self.attn(self.norm(x) * (1 + a) + b)
        out: Tensor = x + f * self.mlp(self.norm(x) * (1 + d) + e)
        return out


class FlowTransformer(nn.Module):
    """Noisy image tokens, times and classes to velocities.

    Args:
        grid: rows of the image, and tokens a row.
        channels: numbers a token, C.
        classes: number of classes.
        text: tokens that say the class.
        d_model: width D.
        depth: blocks.
        num_heads: heads a block.
        hidden: width of the feed-forward parts.

    Shapes:
        (B, h w, C), (B,), (B,) integers -> (B, h w, C)

    Example:
        >>> model = FlowTransformer((4, 4), d_model=16, depth=1)
        >>> model(torch.zeros(2, 16, 1), torch.zeros(2), torch.zeros(2, dtype=torch.long)).shape
        torch.Size([2, 16, 1])
    """

    def __init__(
        self,
        grid: tuple[int, int] = (8, 8),
        *,
        channels: int = 1,
        classes: int = 10,
        text: int = 1,
        d_model: int = 64,
        depth: int = 4,
        num_heads: int = 4,
        hidden: int = 128,
    ) -> None:
        super().__init__()
        self.grid, self.channels, self.text, self.d_model = grid, channels, text, d_model
        self.inputs = nn.Linear(channels, d_model)
        self.place = nn.Parameter(torch.randn(grid[0] * grid[1], d_model) * 0.3)
        self.label = nn.Embedding(classes, (text + 1) * d_model)
        self.time = nn.Sequential(nn.Linear(32, d_model), nn.SiLU(), nn.Linear(d_model, d_model))
        rotary = GridRotary(grid, head_size(d_model, num_heads), text=text)
        self.blocks = nn.ModuleList(_Block(d_model, num_heads, hidden, rotary) for _ in range(depth))
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, channels)

    def forward(self, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        """Return velocities."""
        tokens = self.grid[0] * self.grid[1]
        if x.ndim != 3 or tuple(x.shape[1:]) != (tokens, self.channels):
            raise BadInput(f"x must have shape (B, {tokens}, {self.channels}), got {tuple(x.shape)}")
        angle = time[:, None] * 100.0 * frequencies(16, 1000.0, like=x)
        words = torch.unflatten(self.label(labels), 1, (self.text + 1, self.d_model))  # the last of them modulates
        condition = F.silu(words[:, -1] + self.time(torch.cat([angle.sin(), angle.cos()], dim=1)))
        h = torch.cat([words[:, :-1], self.inputs(x) + self.place], dim=1)
        for block in self.blocks:
            h = block(h, condition)
        out: Tensor = self.head(self.norm(h[:, self.text :]))
        return out


def flow_pair(images: Tensor, labels: Tensor, draw: torch.Generator) -> Pair:
    """Return what the model takes, ``(x_t, t, labels)``, at random times, and the velocity that it should say.

    Args:
        images: clean images, (B, N, C).
        labels: their classes, (B,).
        draw: decides noise and times; times are sigmoids of normal numbers.
    """
    noise = torch.randn(images.shape, generator=draw)
    time = torch.randn(len(images), generator=draw).sigmoid()
    share = time[:, None, None]
    return ((1 - share) * images + share * noise, time, labels), noise - images


@torch.no_grad()
def draw_images(model: FlowTransformer, labels: Tensor, *, steps: int = 20, seed: int = 0) -> Tensor:
    """Return images of the classes ``labels`` by Euler steps from noise, (B, h w, C).

    Args:
        model: the model.
        labels: (B,).
        steps: how many.
        seed: of the noise.
    """
    if steps < 1:
        raise BadInput(f"steps must be at least 1, got {steps}")
    shape = (len(labels), math.prod(model.grid), model.channels)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    for step in range(steps, 0, -1):
        velocity: Tensor = model(x, torch.full((len(labels),), step / steps), labels)
        x = x - velocity / steps
    return x
