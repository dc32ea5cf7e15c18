"""The attentions, besides softmax and linear, of which the aspect ratio is studied: all are additive over heads.

- `Local <https://arxiv.org/abs/1802.05751>`_: softmax over a window.
- `Longformer <https://arxiv.org/abs/2004.05150>`_: a window, and a few leading tokens that see all and that all see.
- `BigBird <https://arxiv.org/abs/2007.14062>`_: that, and a few random keys for each query.
- `Sparse Transformer <https://arxiv.org/abs/1904.10509>`_: a window, and every so-many-th token.
- `Linformer <https://arxiv.org/abs/2006.04768>`_: ``softmax(q (E k)^T / sqrt(K)) F v``, E and F of R rows.
- `Performer <https://arxiv.org/abs/2009.14794>`_: ``phi(q) . phi(k)``, whose mean over random features is the
  exponential of softmax.
- `Sinkhorn <https://arxiv.org/abs/2002.11296>`_: each block of tokens attends to itself and to the block that a doubly
  stochastic matrix, made of the means of the blocks, sorts to its side.
- `Synthesizer <https://arxiv.org/abs/2005.00743>`_ (dense): scores of a token over positions, from its query alone.

Departures: what is global in Longformer and BigBird has no projections of its own, random keys are single ones and the
same for all heads and layers, the heads of Sparse Transformer see both of its patterns, features of Performer are drawn
once, and what Linformer, Sinkhorn and Synthesizer learn besides projections is a head's own and has no bias, so that a
family keeps its number of parameters. Sizes are for some hundred tokens.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.models import Attention
from torchgraft.engines.attention import Given, Mask, Padding, Pair, Rows, Window, attend
from torchgraft.errors import BadInput

__all__ = [
    "AspectAttention",
    "BigBirdAttention",
    "Leading",
    "LinformerAttention",
    "LocalAttention",
    "LongformerAttention",
    "PerformerAttention",
    "SinkhornAttention",
    "SparseAttention",
    "Strided",
    "SynthesizerAttention",
    "doubly_stochastic",
    "log_features",
    "mixed_by_features",
]


class Leading(Mask):
    """The first tokens see all and are seen by all.

    Args:
        size: how many.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def seen(self, rows: Rows) -> Tensor:
        """Return True where one of the two is a leading token."""
        return (rows.query_place < self.size)[:, None] | (rows.key_place < self.size)

    def of_pair(self, at: Pair) -> Tensor:
        """Return whether one of the two is a leading token."""
        return (at.query_place < self.size) | (at.key_place < self.size)


class Strided(Mask):
    """A query sees the keys at multiples of ``stride`` from itself.

    Args:
        stride: from one key that is seen to the next.
    """

    def __init__(self, stride: int) -> None:
        self.stride = stride

    def seen(self, rows: Rows) -> Tensor:
        """Return True where the stride divides the distance."""
        return rows.distance() % self.stride == 0

    def of_pair(self, at: Pair) -> Tensor:
        """Return whether the stride divides the distance."""
        return at.distance() % self.stride == 0


def log_features(x: Tensor, directions: Tensor) -> Tensor:
    """Return log phi(x), with E phi(x) . phi(y) = e^(x . y / sqrt(K)) over directions from a normal distribution.

    Shapes:
        x: (B, H, T, K); directions: (m, K) -> (B, H, T, m)
    """
    x = x * x.shape[-1] ** -0.25
    return x @ directions.mT - x.square().sum(-1, keepdim=True) / 2 - math.log(len(directions)) / 2


def mixed_by_features(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """Return ``sum_j (q_i . k_j) v_j / sum_j q_i . k_j`` for features of 0 or more.

    Shapes:
        (B, H, T, m), (B, H, T, m), (B, H, T, V) -> (B, H, T, V)
    """
    if causal:
        scores = (q @ k.transpose(-1, -2)).tril()  # (B, H, T, T)
        return scores @ v / scores.sum(-1, keepdim=True)
    return q @ (k.transpose(-1, -2) @ v) / (q @ k.sum(-2).unsqueeze(-1))


def doubly_stochastic(logits: Tensor, iterations: int) -> Tensor:
    """Return the matrices to which e^logits tends when its rows and columns are scaled to sums of 1 in turn.

    Example:
        >>> doubly_stochastic(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), 1)
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]])
    """
    for _ in range(iterations):
        logits = logits - logits.logsumexp(-1, keepdim=True)
        logits = logits - logits.logsumexp(-2, keepdim=True)
    return logits.exp()


class AspectAttention(Attention):
    """Multi-head self-attention of which a type says how heads are mixed: :meth:`mix`."""

    #: Names of parameters besides the projections, each of them (H, ...).
    per_head: ClassVar[tuple[str, ...]] = ()
    #: Why there is no causal form, where there is none.
    two_ways: ClassVar[str] = ""

    def prepare(self, context: int) -> None:
        """Make what the type has besides projections, once these have their sizes; for at most ``context`` tokens."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        """Return what is mixed: (B, T, H, K) each, and which tokens are no padding, (B, T) -> (B, T, H, K)."""
        raise NotImplementedError

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix tokens; ``mask`` (B, 1, 1, T) is True where a key may be seen.

        Raises:
            BadInput: the type has no causal form.
        """
        if self.causal and self.two_ways:
            raise BadInput(f"{type(self).__name__} has no causal form: {self.two_ways}; causal must be False")
        q, k, v = (torch.unflatten(part(x), -1, (self.num_heads, -1)) for part in (self.query, self.key, self.value))
        mixed: Tensor = self.out(self.mix(q, k, v, None if mask is None else mask[:, 0, 0]).flatten(2))
        return mixed


class LocalAttention(AspectAttention):
    """Softmax attention to the pairs of a :meth:`pattern`: here those less than ``window`` apart."""

    window = 16

    def pattern(self, tokens: int) -> Mask:
        """Return who sees whom among so many tokens."""
        return Window(self.window)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        """Mix what the pattern and the padding leave."""
        pattern = self.pattern(q.shape[1])
        return attend(q, k, v, mask=pattern if valid is None else pattern & Padding(valid), causal=self.causal)


class LongformerAttention(LocalAttention):
    """A window, and ``leading`` tokens that see all and that all see."""

    leading = 4

    def pattern(self, tokens: int) -> Mask:
        """Return who sees whom."""
        return Window(self.window) | Leading(self.leading)


class BigBirdAttention(LongformerAttention):
    """A window, leading tokens, and ``random`` keys for each query, the same in all heads and layers."""

    random = 4
    drawn: Tensor

    def prepare(self, context: int) -> None:
        """Draw the keys of each query."""
        drawn = torch.rand(context, context, generator=torch.Generator().manual_seed(0))
        kept = drawn.topk(min(self.random, context), dim=-1).indices
        table = torch.zeros(context, context, dtype=torch.bool).scatter_(1, kept, True)
        self.register_buffer("drawn", table, persistent=False)

    def pattern(self, tokens: int) -> Mask:
        """Return who sees whom."""
        return super().pattern(tokens) | Given(self.drawn[None, None, :tokens, :tokens])


class SparseAttention(LocalAttention):
    """A window, and the tokens at multiples of the window."""

    def pattern(self, tokens: int) -> Mask:
        """Return who sees whom."""
        return Window(self.window) | Strided(self.window)


class LinformerAttention(AspectAttention):
    """Softmax attention to ``rank`` mixtures of all tokens."""

    per_head = ("keys", "values")
    two_ways = "each of its keys mixes all tokens"
    rank = 32

    def prepare(self, context: int) -> None:
        """Make E and F, (H, R, context)."""
        shape = self.num_heads, self.rank, context
        self.keys, self.values = (nn.Parameter(torch.randn(shape) * self.rank**-0.5) for _ in range(2))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        """Mix mixtures, in which padding counts for nothing."""
        if valid is not None:
            k, v = (x * valid[..., None, None] for x in (k, v))
        few = (torch.einsum("hrt,bthk->brhk", m[..., : k.shape[1]], x) for m, x in ((self.keys, k), (self.values, v)))
        return attend(q, *few)


class PerformerAttention(AspectAttention):
    """Softmax by its random features, ``features`` of them, orthogonal by blocks: linear in the number of tokens."""

    features = 64
    directions: Tensor

    def prepare(self, context: int) -> None:
        """Draw the directions, (m, K), the same for all heads and layers."""
        draw, size = torch.Generator().manual_seed(0), self.head_dim
        blocks = [torch.linalg.qr(torch.randn(size, size, generator=draw))[0] for _ in range(-(-self.features // size))]
        lengths = torch.randn(self.features, size, generator=draw).norm(dim=1, keepdim=True)
        self.register_buffer("directions", torch.cat(blocks)[: self.features] * lengths, persistent=True)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        """Mix by products of features, each row's scaled to be at most 1, which its sum takes back."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        q, k = log_features(q, self.directions), log_features(k, self.directions)  # (B, H, T, m)
        if valid is not None:
            k = k.masked_fill(~valid[:, None, :, None], torch.finfo(k.dtype).min)
        q, k = ((x - x.detach().amax(over, keepdim=True)).exp() for x, over in ((q, -1), (k, (-2, -1))))
        return mixed_by_features(q, k, v, causal=self.causal).transpose(1, 2)


class SinkhornAttention(AspectAttention):
    """Attention of blocks of ``block`` tokens to themselves and to one that a soft permutation brings to their side."""

    per_head = ("sort",)
    two_ways = "its permutation weighs all blocks"
    block, iterations = 16, 8

    def prepare(self, context: int) -> None:
        """Make what turns the mean query of a block into logits over blocks, (H, K, N)."""
        shape = self.num_heads, self.head_dim, -(-context // self.block)
        self.sort = nn.Parameter(torch.randn(shape) * self.head_dim**-0.5)

    def permutation(self, q: Tensor, real: Tensor) -> Tensor:
        """Return the soft permutation of the blocks; blocks of padding alone stay where they are.

        Shapes:
            (B, N, c, H, K), True where a token is real (B, N, c) -> (B, H, N, N)
        """
        counts = real.sum(-1).clamp_min(1)[..., None, None]
        mean = (q * real[..., None, None]).sum(2) / counts  # (B, N, H, K)
        logits = torch.einsum("bnhk,hkm->bhnm", mean, self.sort[..., : q.shape[1]])
        empty = ~real.any(-1)  # (B, N)
        fixed = (empty[:, :, None] | empty[:, None])[:, None]
        apart = torch.full_like(logits[0, 0], -math.inf).fill_diagonal_(0.0)
        return doubly_stochastic(torch.where(fixed, apart, logits), self.iterations)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        """Mix what a block and the one sorted to it hold."""
        batch, tokens = q.shape[:2]
        size = self.block
        real = q.new_ones(batch, tokens, dtype=torch.bool) if valid is None else valid.expand(batch, -1)
        real = torch.unflatten(F.pad(real, (0, -tokens % size)), 1, (-1, size))  # (B, N, c)
        q, k, v = (torch.unflatten(F.pad(x, (0, 0, 0, 0, 0, -tokens % size)), 1, (-1, size)) for x in (q, k, v))
        sort = self.permutation(q, real)
        near = (torch.einsum("bhnm,bmjhk->bnjhk", sort, x * real[..., None, None]) for x in (k, v))
        keys, values = (torch.cat([own, other], dim=2).flatten(0, 1) for own, other in zip((k, v), near, strict=True))
        seen = torch.cat([real, real.any(1, keepdim=True).expand_as(real)], dim=-1).flatten(0, 1)  # (B N, 2 c)
        mixed = attend(q.flatten(0, 1), keys, values, mask=seen)
        return torch.unflatten(mixed, 0, (batch, -1)).flatten(1, 2)[:, :tokens]


class SynthesizerAttention(AspectAttention):
    """Softmax of scores that a token gives to positions, whoever stands there: there is no projection of keys."""

    per_head = ("scores",)

    def prepare(self, context: int) -> None:
        """Make what turns a query into scores of positions, (H, K, context), in the place of keys."""
        del self.key
        self.scores = nn.Parameter(torch.randn(self.num_heads, self.head_dim, context) * self.head_dim**-0.5)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix tokens; ``mask`` (B, 1, 1, T) is True where a key may be seen."""
        q, v = (torch.unflatten(part(x), -1, (self.num_heads, -1)) for part in (self.query, self.value))
        keys = self.scores[..., : x.shape[1]].permute(2, 0, 1).expand(len(x), -1, -1, -1)  # (B, T, H, K)
        valid = None if mask is None else mask[:, 0, 0]
        mixed: Tensor = self.out(attend(F.relu(q), keys, v, mask=valid, causal=self.causal, scale=1.0).flatten(2))
        return mixed
