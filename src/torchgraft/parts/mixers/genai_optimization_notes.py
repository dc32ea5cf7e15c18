"""Attention with rotary positions and a bias that grows as the harmonic numbers, in training on sampled blocks.

`The Nature of Mathematical Modeling and Probabilistic Optimization Engineering in Generative AI
<https://arxiv.org/abs/2410.18441>`_ (Fulu Li, 2024), of whose five proposals this is two:
s_ij = R_i q_i . R_j k_j / sqrt(K) - f m_h sum_{r=1}^{i-j} 1/r with slopes m_h = 2^(-8h/H), and blocks of tokens (I, J)
that take part in a round with probability p(I - J), p(0) = 1. The others: ``torchgraft.engines.attention.cache`` (the
cache of keys and values whose bits fall with age), ``torchgraft.engines.subword`` (merges by likelihood) and
``torchgraft.engines.cross_entropy_search``.

Departures: only the abstract was at hand; every formula is our construction of the idea that it names, and this is no
reproduction. Blocks are drawn independently, so that rows have unequal numbers of them, and rows with fewer are padded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines.attention import Harmonic, Mask, Rows, Stage, attend
from torchgraft.engines.attention.local import attend_in_groups
from torchgraft.engines.attention.mixer import AttentionMixer
from torchgraft.engines.attention.position import harmonic_numbers
from torchgraft.engines.recurrence.distance import slopes
from torchgraft.errors import BadInput

__all__ = ["CARD", "HarmonicAttention", "attention", "block_sampled", "draw_blocks"]

#: How the probability of a block falls with its distance: 1 / (1 + d), 1 - d / blocks, or not at all.
Falling: TypeAlias = Literal["harmonic", "linear", "all"]

CARD = Card(
    key="genai-optimization-notes",
    title="Harmonic positions, sampled blocks and a staircase cache",
    seed_id=44,
    authors="Fulu Li, 2024",
    reference="https://arxiv.org/abs/2410.18441",
    family="parts/mixers",
    kind="part",
    engine=("attention",),
    equation="s_ij = R_i q_i . R_j k_j / sqrt(K) - f m_h sum_{r=1}^{i-j} 1/r,  m_h = 2^(-8h/H)",
    entry="HarmonicAttention",
    capabilities=frozenset({"causal", "stateful", "attention-interface"}),
    declared={"parameters": "4*d_model**2"},
    example={"d_model": 16, "num_heads": 2},
    shapes=((2, 12, 16),),
    oracles=(
        "factor = 0 equals softmax attention with rotary positions",
        "the bias of a score is the harmonic number of the distance times the slope, written out",
        "with every block taking part, sampling equals exact causal attention, outputs and gradients",
        "whatever blocks are drawn, the output is exact attention over their tokens: rows of sum 1, and causal",
        "blocks at distance d are drawn with frequency 1 / (1 + d)",
        "in the cache the error of a number is at most half a step of its band, and bytes follow the formula",
        "each merge of sub-words raises the exact likelihood most, and Viterbi equals all segmentations",
    ),
    claim=Claim(
        text="Byte models of two layers on the standard library: the cache with 8, 4 and 2 bits by age beside 4 bits "
        "for all, at equal bits; loss at length 256 after training at 64, beside rotary positions alone; sub-words by "
        "likelihood beside byte-pair encoding, tokens a kilobyte.",
        figure="the cache raises perplexity less by >= 20 %, and the loss at 256 is lower by >= 0.2 nats; sub-words "
        "are reported only",
    ),
    choose_when="a causal model must be used at lengths beyond those of its training, or its cache must be small",
    choose_instead="plain rotary attention within the lengths of training; a published, tested method where one fits",
    expected_failures={
        "attention-sees-what-the-mask-says": "the bias counts positions: where hidden keys are taken out instead of "
        "hidden, those before them come nearer",
    },
    confidence="low",
    bibtex="""@article{li2024nature,
  title={The Nature of Mathematical Modeling and Probabilistic Optimization Engineering in Generative AI},
  author={Li, Fulu},
  journal={arXiv:2410.18441},
  year={2024}
}""",
)


@dataclass(frozen=True, eq=False)
class _Biased(Stage):
    """s -> s - m_h b, with b given for every pair of the groups."""

    slopes: Tensor  # (H,)
    numbers: Tensor  # (B P, 1, c, m)

    def __call__(self, s: Tensor, rows: Rows) -> Tensor:
        part = self.numbers[..., rows.queries, rows.keys].to(s.dtype)
        return s - self.slopes.to(s.dtype)[:, None, None] * part


def draw_blocks(count: int, falling: Falling = "harmonic", *, device: torch.device | None = None) -> Tensor:
    """Return which block of keys J takes part for each block of queries I, (count, count), lower triangular.

    Args:
        count: number of blocks.
        falling: p of the distance d: ``"harmonic"`` 1 / (1 + d), ``"linear"`` 1 - d / count, ``"all"`` 1.
        device: where the draw is made.

    Example:
        >>> draw_blocks(3, "all").int().tolist()
        [[1, 0, 0], [1, 1, 0], [1, 1, 1]]

    Raises:
        BadInput: ``falling`` is unknown.
    """
    place = torch.arange(count, device=device)
    away = (place[:, None] - place).clamp_min(0)
    if falling == "harmonic":
        probability = 1 / (1 + away)
    elif falling == "linear":
        probability = 1 - away / max(count, 1)
    elif falling == "all":
        probability = torch.ones(count, count, device=device)
    else:
        raise BadInput(f"falling must be 'harmonic', 'linear' or 'all', got {falling!r}")
    return (torch.rand(count, count, device=device) < probability).tril()


def block_sampled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    *,
    block: int,
    slope: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attend causally to the tokens of chosen blocks, of which only as many are read as the fullest row has.

    Args:
        q: queries.
        k: keys of the same tokens.
        v: values.
        chosen: which blocks take part, as :func:`draw_blocks` gives it.
        block: tokens a block; the last may be shorter.
        slope: m of every head, (H,), or none for no bias.
        scale: by default 1 / sqrt(K).

    Shapes:
        (B, T, H, K), (B, T, G, K), (B, T, G, V), chosen (T / block, T / block) -> (B, T, H, V)

    Raises:
        BadInput: the blocks do not fit the tokens.
    """
    batch, tokens = q.shape[:2]
    count = -(-tokens // block)
    if k.shape[1] != tokens or chosen.shape != (count, count):
        raise BadInput(f"{tokens} queries of {count} blocks do not fit {k.shape[1]} keys and blocks {chosen.shape}")
    slots = int(chosen.sum(1).max()) if count else 0
    order = chosen.long().argsort(dim=1, descending=True, stable=True)[:, :slots]  # (P, slots), chosen blocks first
    filled = chosen.gather(1, order).repeat_interleave(block, dim=1)  # (P, m)
    within = torch.arange(block, device=q.device)
    index = (order[:, :, None] * block + within).flatten(1)  # (P, m)
    place = torch.arange(count * block, device=q.device).view(count, block)
    away = place[:, :, None] - index[:, None]  # (P, c, m)
    seen = (away >= 0) & filled[:, None]
    rest = count * block - tokens
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, rest)) for x in (q, k, v))
    transform = None
    if slope is not None:
        numbers = harmonic_numbers(count * block, like=slope)[away.clamp_min(0)]
        transform = _Biased(slope, numbers.expand(batch, -1, -1, -1).flatten(0, 1)[:, None])
    mixed = attend_in_groups(
        torch.unflatten(q, 1, (count, block)), k, v, index[None], seen=seen[None], transform=transform, scale=scale
    )
    return mixed.flatten(1, 2)[:, :tokens]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    training: bool = False,
    factor: float = 1.0,
    sample: Falling | None = None,
    block: int = 16,
) -> Tensor:
    """Return what softmax with the harmonic bias mixes.

    Args:
        q: queries, the last T of S tokens.
        k: keys.
        v: values.
        mask: who sees whom.
        causal: whether a query sees keys up to its own position only.
        scale: by default 1 / sqrt(K).
        training: whether blocks may be sampled.
        factor: f, the weight of the bias; 0 leaves it out.
        sample: how the probability of a block falls with its distance; blocks are sampled in training, where attention
            is causal, without a mask and over as many keys as queries.
        block: tokens a block.

    Shapes:
        (B, T, H, K), (B, S, G, K), (B, S, G, V) -> (B, T, H, V)

    Example:
        >>> q, v = torch.zeros(1, 2, 1, 4), torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
        >>> attention(q, q, v, causal=True, factor=256.0).flatten()[1] < 0.3  # a slope of 1, a distance of 1
        tensor(True)
    """
    slope = factor * slopes(q.shape[2], like=q) if factor else None
    if training and sample is not None and causal and mask is None and q.shape[1] == k.shape[1]:
        chosen = draw_blocks(-(-q.shape[1] // block), sample, device=q.device)
        return block_sampled(q, k, v, chosen, block=block, slope=slope, scale=scale)
    transform = None if slope is None else Harmonic(slope)
    return attend(q, k, v, transform=transform, mask=mask, causal=causal, scale=scale)


class HarmonicAttention(AttentionMixer):
    """Multi-head softmax attention, rotary, with a bias that grows as the logarithm of the distance.

    Args:
        d_model: the width D.
        num_heads: H; divides ``d_model``.
        num_kv_heads: heads of keys and values; by default H, 1 for multi-query attention.
        rotary: whether queries and keys are turned by their position.
        causal: whether a token sees itself and those before it only.
        factor: f, the weight of the bias; 0 leaves it out.
        sample: how the probability of a block falls with its distance in training; by default all take part.
        block: tokens a block.

    Shapes:
        (B, T, D) -> (B, T, D)

    Example:
        >>> HarmonicAttention(8, num_heads=2, sample="harmonic", block=4)(torch.randn(1, 10, 8)).shape
        torch.Size([1, 10, 8])

    Raises:
        BadInput: heads do not divide the width, or a setting is out of range.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        rotary: bool = True,
        causal: bool = True,
        factor: float = 1.0,
        sample: Falling | None = None,
        block: int = 16,
    ) -> None:
        super().__init__(d_model, num_heads=num_heads, num_kv_heads=num_kv_heads, rotary=rotary, causal=causal)
        if not factor >= 0.0:
            raise BadInput(f"factor must be at least 0, got {factor}")
        if block < 1:
            raise BadInput(f"block must be at least 1, got {block}")
        if sample not in (None, "harmonic", "linear", "all"):
            raise BadInput(f"sample must be None, 'harmonic', 'linear' or 'all', got {sample!r}")
        self.factor, self.sample, self.block = factor, sample, block

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return what softmax with the bias mixes."""
        return attention(
            q,
            k,
            v,
            causal=self.causal,
            training=self.training,
            factor=self.factor,
            sample=self.sample,
            block=self.block,
        )
