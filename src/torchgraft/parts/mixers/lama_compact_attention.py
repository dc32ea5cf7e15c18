"""Attention pooling by many heads of rank one: each compares all tokens with one context vector.

`Low Rank Factorization for Compact Multi-Head Self-Attention <https://arxiv.org/abs/1912.00835>`_ (Mehta et al., 2019):
A = softmax_t(l2(tanh((P^T c 1^T) * (Q^T X^T)))), S = A X, with P, Q in R^{D x H} and the context c, a mean of tokens.

Departures: the norm over heads has 1e-12 added to it; the mean of the tokens leaves padding out.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.errors import BadInput

__all__ = ["CARD", "Lama", "LamaEncoder", "compact_scores"]

CARD = Card(
    key="lama-compact-attention",
    title="Low-rank factorised compact multi-head attention (LAMA)",
    seed_id=40,
    authors="Mehta et al., 2019",
    reference="https://arxiv.org/abs/1912.00835",
    family="parts/mixers",
    kind="part",
    engine=("none",),
    equation="A = softmax_t(l2_h(tanh((p_h . c)(q_h . x_t)))),  S = A X",
    entry="Lama",
    capabilities=frozenset({"pooling"}),
    declared={"parameters": "2*d_model*num_heads"},
    example={"d_model": 16, "num_heads": 3},
    shapes=((2, 12, 16),),
    oracles=(
        "equals the loop over heads and tokens of c^T p_h q_h^T x_t, in float64",
        "weights of a head sum to 1, padding weighs exactly 0 and changes nothing",
        "the order of the tokens does not matter to what is pooled",
        "2 D H parameters, and D more with a learned context",
        "a head whose p is orthogonal to the context weighs all tokens alike, without the norm over heads",
    ),
    claim=Claim(
        text="Part of the standard library that a docstring stands in (6 classes), a bidirectional GRU of width 64 "
        "before each pooling: LAMA, the mean, structured self-attention (Lin et al.), and a transformer encoder layer.",
        figure="accuracy at most 0.5 points below the best baseline, with at most a fifth of the transformer layer's "
        "attention parameters",
    ),
    choose_when="a text or a set is to be one vector (or a few), in linear time and with few parameters",
    choose_instead="modern-hopfield's pooling, whose query is learned; softmax-attention where tokens stay tokens",
    bibtex="""@article{mehta2019low,
  title={Low Rank Factorization for Compact Multi-Head Self-Attention},
  author={Mehta, Sneha and Rangwala, Huzefa and Ramakrishnan, Naren},
  journal={arXiv preprint arXiv:1912.00835},
  year={2019}
}""",
)


def compact_scores(x: Tensor, context: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """Return (p_h . c)(q_h . x_t) for every head and token; (B, T, D), (B, D), (D, H) twice -> (B, H, T)."""
    return (context @ p)[:, :, None] * (x @ q).mT


class Lama(nn.Module):
    """Pools a sequence to H vectors.

    Args:
        d_model: the width D.
        num_heads: H, the number of vectors.
        context: ``"mean"`` compares tokens with their mean, ``"learned"`` with a parameter.
        activation: whether scores pass through tanh.
        l2: whether the scores of a token are divided by their norm over heads.

    Shapes:
        x: (B, T, D); valid: (B, T); context: (B, D) -> (B, H, D)

    Example:
        >>> Lama(8, num_heads=2)(torch.randn(3, 5, 8)).shape
        torch.Size([3, 2, 8])

    Raises:
        BadInput: there is no width or no head, or the context is unknown.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 8,
        context: Literal["mean", "learned"] = "mean",
        activation: bool = True,
        l2: bool = True,
    ) -> None:
        super().__init__()
        if d_model < 1 or num_heads < 1:
            raise BadInput(f"d_model and num_heads must be at least 1, got {d_model} and {num_heads}")
        if context not in ("mean", "learned"):
            raise BadInput(f"context must be 'mean' or 'learned', got {context!r}")
        self.d_model, self.num_heads, self.activation, self.l2 = d_model, num_heads, activation, l2
        self.p = nn.Parameter(torch.randn(d_model, num_heads) * d_model**-0.5)
        self.q = nn.Parameter(torch.randn(d_model, num_heads) * d_model**-0.5)
        self.context = nn.Parameter(torch.randn(d_model)) if context == "learned" else None

    def weights(self, x: Tensor, valid: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """Return how much each head takes of each token, in float32 at least; (B, T, D) -> (B, H, T)."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        p, q = self.p.to(x.dtype), self.q.to(x.dtype)
        if context is None:
            context = _mean(x, valid) if self.context is None else self.context.expand(len(x), -1)
        scores = compact_scores(x, context.to(x.dtype), p, q)
        scores = scores.tanh() if self.activation else scores
        if self.l2:
            scores = scores / (scores.square().sum(1, keepdim=True) + 1e-24).sqrt()
        if valid is not None:
            scores = scores.masked_fill(~valid[:, None], torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1)
        return weights if valid is None else weights.masked_fill(~valid[:, None], 0.0)

    def forward(self, x: Tensor, valid: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """Pool ``x``.

        Args:
            x: tokens.
            valid: True where a token is no padding.
            context: what tokens are compared with, instead of the mean or the parameter.

        Raises:
            BadInput: the shapes are others.
        """
        if x.ndim != 3 or x.shape[-1] != self.d_model or not x.is_floating_point():
            raise BadInput(f"x must be floating point of shape (B, T, {self.d_model}), got {x.dtype} {tuple(x.shape)}")
        if valid is not None and (valid.shape != x.shape[:2] or valid.dtype != torch.bool):
            raise BadInput(
                f"valid must be boolean of shape {tuple(x.shape[:2])}, got {valid.dtype} {tuple(valid.shape)}"
            )
        weights = self.weights(x, valid, context)
        pooled: Tensor = (weights @ x.to(weights.dtype)).to(x.dtype)
        return pooled


def _mean(x: Tensor, valid: Tensor | None) -> Tensor:
    """Return the mean of the tokens that are no padding, (B, T, D) -> (B, D)."""
    if valid is None:
        return x.mean(1)
    kept = valid[..., None].to(x.dtype)
    return (x * kept).sum(1) / kept.sum(1).clamp_min(1.0)


class LamaEncoder(nn.Module):
    """A text classifier: embeddings, a bidirectional GRU, :class:`Lama`, and a linear layer on all pooled vectors.

    Args:
        vocabulary: number of token identities; 0 is padding.
        classes: number of classes.
        d_model: width of the embeddings and of the GRU's output, even.
        num_heads: vectors that the text is pooled to.
        pool: another pooling (B, T, D), (B, T) -> (B, H, D) in the place of LAMA, for comparisons.

    Shapes:
        (B, T) integers -> (B, classes)

    Example:
        >>> LamaEncoder(50, 3, d_model=8, num_heads=2)(torch.tensor([[4, 7, 0]])).shape
        torch.Size([1, 3])
    """

    def __init__(
        self, vocabulary: int, classes: int, *, d_model: int = 64, num_heads: int = 8, pool: nn.Module | None = None
    ) -> None:
        super().__init__()
        if d_model % 2:
            raise BadInput(f"d_model must be even, half for each direction, got {d_model}")
        self.embed = nn.Embedding(vocabulary, d_model, padding_idx=0)
        self.encoder = nn.GRU(d_model, d_model // 2, batch_first=True, bidirectional=True)
        self.pool = Lama(d_model, num_heads=num_heads) if pool is None else pool
        self.head = nn.Linear(d_model * num_heads, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the classes."""
        valid = tokens != 0
        lengths = valid.sum(1).clamp_min(1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(self.embed(tokens), lengths, batch_first=True, enforce_sorted=False)
        states, _ = nn.utils.rnn.pad_packed_sequence(
            self.encoder(packed)[0], batch_first=True, total_length=tokens.shape[1]
        )
        logits: Tensor = self.head(F.dropout(self.pool(states, valid).flatten(1), 0.2, self.training))
        return logits
