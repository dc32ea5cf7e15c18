"""The Bigram-Backcopy task, a small transformer that learns it, and one that solves it by weights set by hand."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.bench.task import Split
from torchgraft.bench.tasks.stdlib import source_files
from torchgraft.errors import BadInput

__all__ = ["BackcopyTransformer", "BigramBackcopy", "hand_built"]


class BigramBackcopy:
    """Sequences of symbols 0 to V - 1 after a start symbol V: bigrams, but a token after a trigger repeats.

    Args:
        vocab: number of symbols V: the most frequent bytes of the standard library's source.
        triggers: how many of the most frequent symbols are triggers.
        length: tokens a sequence, the start symbol included.

    Attributes:
        law: P, (V, V): the chance of each symbol after each other one.
        start: chances of the first symbol, (V,); none of a trigger.
        triggers: (V,), whether a symbol is a trigger.

    Example:
        >>> task = BigramBackcopy(vocab=16, triggers=2, length=12)
        >>> task.sample(4, seed=0).shape, task.best_loss() < math.log(16)
        (torch.Size([4, 12]), True)

    Raises:
        BadInput: there is no symbol that is no trigger, or no room for a copy.
    """

    def __init__(self, vocab: int = 64, triggers: int = 3, length: int = 256) -> None:
        if not 0 <= triggers < vocab <= 90:
            raise BadInput(f"triggers must be fewer than vocab, and vocab at most 90, got {triggers} and {vocab}")
        if length < 4:
            raise BadInput(f"length must be at least 4, got {length}")
        self.vocab, self.length = vocab, length
        text = b"".join(path.read_bytes()[:20_000] for path in source_files()[:60])
        data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        chosen = torch.bincount(data, minlength=256).argsort(descending=True, stable=True)[:vocab]
        number = torch.full((256,), -1).scatter(0, chosen, torch.arange(vocab))[data]
        number = number[number >= 0]  # the text of the chosen bytes alone
        pairs = torch.bincount(number[:-1] * vocab + number[1:], minlength=vocab**2).view(vocab, vocab).double() + 0.1
        self.law = pairs / pairs.sum(1, keepdim=True)
        self.triggers = torch.arange(vocab) < triggers
        free = pairs.sum(1).masked_fill(self.triggers, 0.0)
        self.start = free / free.sum()

    def sample(self, count: int, *, seed: int) -> Tensor:
        """Return ``count`` sequences, (count, length)."""
        draw = torch.Generator().manual_seed(seed)
        tokens = torch.full((count, self.length), self.vocab)
        tokens[:, 1] = torch.multinomial(self.start, count, replacement=True, generator=draw)
        for t in range(2, self.length):
            last = tokens[:, t - 1]
            drawn = torch.multinomial(self.law[last], 1, generator=draw)[:, 0]
            tokens[:, t] = torch.where(self.triggers[last], tokens[:, t - 2], drawn)
        return tokens

    def split(self, tokens: Tensor) -> Split:
        """Return inputs and next symbols of sequences, (N, length - 1); the first symbol is not asked for."""
        target = tokens[:, 1:].clone()
        target[:, 0] = -100
        return Split(tokens[:, :-1].contiguous(), target)

    def is_trigger(self, tokens: Tensor) -> Tensor:
        """Say of every token whether it is a trigger; the start symbol is none."""
        return torch.cat([self.triggers, torch.tensor([False])])[tokens]

    def best_loss(self) -> float:
        """Return the least possible mean loss: the entropy of P(. | x), over the share of each x; 0 on triggers.

        Shares are those of the chain of (last but one, last) symbols, averaged over the positions of a sequence.
        """
        entropy = torch.special.entr(self.law).sum(1)
        free, waiting, total = self.start, torch.zeros_like(self.start), 0.0
        for _ in range(1, self.length - 1):
            # free: chances that x, no trigger, stands at t; waiting: that a trigger stands there, and x before it
            total += float((free * entropy).sum())
            drawn = (free @ self.law).masked_fill(self.triggers, 0.0)
            free, waiting = drawn + waiting, free * self.law[:, self.triggers].sum(1)
        return total / (self.length - 2)


class _Attention(nn.Module):
    """Causal attention whose softmax may be a ReLU, which can give no weight at all: (B, T, D) -> (B, T, D)."""

    def __init__(self, d_model: int, num_heads: int, relu: bool) -> None:
        super().__init__()
        self.num_heads, self.relu = num_heads, relu
        self.query, self.key, self.value = (nn.Linear(d_model, d_model, bias=False) for _ in range(3))
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = (part(x) for part in (self.query, self.key, self.value))
        q, k, v = (torch.unflatten(part, -1, (self.num_heads, -1)).transpose(1, 2) for part in parts)  # (B, H, T, K)
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        scores = (q @ k.transpose(-1, -2) / math.sqrt(k.shape[-1])).masked_fill(hidden, -math.inf)
        weights = torch.relu(scores) if self.relu else torch.softmax(scores, -1)  # (B, H, T, T)
        mixed: Tensor = self.out((weights @ v).transpose(1, 2).flatten(2))
        return mixed


class _Block(nn.Module):
    def __init__(self, d_model: int, num_heads: int, relu: bool, norm: bool, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(d_model) if norm else nn.Identity() for _ in range(2))
        self.attn = _Attention(d_model, num_heads, relu)
        self.mlp = nn.Sequential(nn.Linear(d_model, hidden), nn.ReLU(), nn.Linear(hidden, d_model))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class BackcopyTransformer(nn.Module):
    """A small causal transformer on which extreme tokens appear, or do not.

    Args:
        vocab: symbols V; the start symbol comes on top.
        length: the longest sequence.
        d_model: width D.
        layers: number of blocks.
        num_heads: heads a block.
        attention: ``"softmax"``, or ``"relu"`` for weights that need not sum to one.
        norm: whether blocks and output normalise.
        hidden: hidden width of the feed-forward parts; default 4 D.

    Shapes:
        (B, T) integers -> (B, T, V)

    Example:
        >>> BackcopyTransformer(16, 12, d_model=8)(torch.zeros(2, 12, dtype=torch.long)).shape
        torch.Size([2, 12, 16])
    """

    def __init__(
        self,
        vocab: int,
        length: int,
        *,
        d_model: int = 64,
        layers: int = 1,
        num_heads: int = 1,
        attention: str = "softmax",
        norm: bool = True,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        if attention not in ("softmax", "relu"):
            raise BadInput(f"attention must be 'softmax' or 'relu', got {attention!r}")
        if num_heads < 1 or d_model < 1 or d_model % num_heads:
            raise BadInput(f"num_heads must divide d_model, got {num_heads} and {d_model}")
        hidden = 4 * d_model if hidden is None else hidden
        self.embed = nn.Embedding(vocab + 1, d_model)
        self.position = nn.Parameter(torch.randn(1, length, d_model))
        self.blocks = nn.ModuleList(
            _Block(d_model, num_heads, attention == "relu", norm, hidden) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(d_model) if norm else nn.Identity()
        self.head = nn.Linear(d_model, vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next symbols."""
        x = self.embed(tokens) + self.position[:, : tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def hand_built(task: BigramBackcopy, *, sharpness: float = 40.0) -> BackcopyTransformer:
    """Return a transformer of one layer that solves ``task``, its weights set by hand.

    The residual stream holds the symbol, the position, what is copied and the logits. A token's query asks for the
    position before its own, and twice as loudly for the start symbol unless it is a trigger; the value of the start
    symbol is zero. The feed-forward part writes log P(. | x), and a copy outweighs it.

    Args:
        task: the task.
        sharpness: scores of the token that is looked for.
    """
    V, T = task.vocab, task.length
    width = (V + 1) + T + V + V  # symbol, position, copy, logits
    symbol, place, copied, said = (
        range(a, b) for a, b in ((0, V + 1), (V + 1, V + 1 + T), (V + T + 1, 2 * V + T + 1), (2 * V + T + 1, width))
    )
    model = BackcopyTransformer(V, T, d_model=width, norm=False, hidden=V).double().eval()
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()
        block: Any = model.blocks[0]
        model.embed.weight[:, symbol] = torch.eye(V + 1).double()
        model.position[0][:, place] = torch.eye(T).double()
        for t in range(1, T):  # the query of position t meets the key of position t - 1
            block.attn.query.weight[place[t - 1], place[t]] = sharpness * math.sqrt(width)
        block.attn.key.weight[list(place), list(place)] = 1.0
        dormant = torch.cat([~task.triggers, torch.tensor([True])]).double()
        block.attn.query.weight[symbol[0], symbol] = 2 * sharpness * math.sqrt(width) * dormant
        block.attn.key.weight[symbol[0], symbol[V]] = 1.0
        block.attn.value.weight[list(copied), list(symbol[:V])] = 1.0
        block.attn.out.weight[list(copied), list(copied)] = 1.0
        block.mlp[0].weight[:, symbol[:V]] = torch.eye(V).double()
        block.mlp[2].weight[said.start :, :] = task.law.log().masked_fill(task.triggers[:, None], 0.0).T
        model.head.weight[:, said] = torch.eye(V).double()
        model.head.weight[:, copied] = sharpness * torch.eye(V).double()
    return model
