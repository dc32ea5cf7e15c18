"""Linear attention whose output is normalised instead of divided, after layers of softmax attention inside blocks.

Paper: `The Devil in Linear Transformer <https://arxiv.org/abs/2210.10340>`_.

Equation: ``O = XNorm(phi(Q)(phi(K)^T V))`` with ``phi(x) = 1 + elu(x)`` and ``XNorm(x) = x / sqrt(mean(x^2) + eps)``
over the joined heads: no denominator, so no gradient that grows as ``1 / (4 s)`` while a score s goes to 0. The first
half of the layers attends by softmax inside blocks of w tokens only.

Departures: positions, which the paper leaves to the model, come from turning queries and keys (``rotary=False``
leaves it out); feed-forward layers are the library's SwiGLU, which is the paper's GLU with SiLU; eps is 1e-5, since
it sets the bound of the gradients and a smaller one undoes the benefit in half precision.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines.recurrence.distance import positions, rotary
from torchgraft.engines.recurrence.heads import HeadNorm, head_size, merge_heads, split_heads
from torchgraft.engines.recurrence.linear_mixer import LinearMixer, Tokens
from torchgraft.engines.recurrence.mixer import Mixer, State, StatefulMixer
from torchgraft.errors import BadInput
from torchgraft.parts.blocks.sequence_model import Pool, SequenceModel

__all__ = [
    "CARD",
    "BidirectionalDiagAttention",
    "BidirectionalNormAttention",
    "DiagAttention",
    "NormAttention",
    "TransNormer",
    "feature",
    "grad_bound",
]

CARD = Card(
    key="transnormer",
    title="TransNormer",
    seed_id=249,
    authors="Qin, Han, Sun, Li, Kong, Barnes and Zhong, 2022",
    reference="https://arxiv.org/abs/2210.10340",
    family="parts/mixers",
    kind="part",
    engine=("recurrence", "normalize"),
    equation="O = XNorm(phi(Q)(phi(K)^T V)),  phi = 1 + elu,  XNorm(x) = x / sqrt(mean(x^2) + eps)",
    entry="NormAttention",
    capabilities=frozenset({"causal", "stateful", "linear-time", "compilable"}),
    declared={"parameters": "4 * d_model**2"},
    example={"d_model": 16, "num_heads": 2},
    shapes=((2, 12, 16),),
    oracles=(
        "|d p_ij / d s_ik| <= 1 / (4 |s_ik|) for linear attention, attained at p = 1/2, and c times smaller for c s",
        "the normalised output does not change when all scores are scaled, up to eps, and its gradient stays bounded",
        "right product = masked left product to 1e-10 in float64, causal and not",
        "block attention with a block as long as the sequence is softmax attention, and sees its own block only",
    ),
    claim=Claim(
        text="Byte language model over the standard library, two layers of width 64, equal steps: TransNormer against "
        "1 + elu linear attention with its denominator and against softmax attention, all with rotary positions.",
        figure="loss <= 1.03x softmax and <= linear - 0.05 nats; largest gradient norm over the median >= 5x smaller",
    ),
    choose_when="a linear-time model must train stably without gates, in half precision above all",
    choose_instead="tnl-lightning, its successor with decay; gated-linear-attention where old text must be forgotten",
    bibtex="@inproceedings{qin2022devil, title={The Devil in Linear Transformer}, author={Qin, Zhen and Han, Xiaodong "
    "and Sun, Weixuan and Li, Dongxu and Kong, Lingpeng and Barnes, Nick and Zhong, Yiran}, booktitle={EMNLP}, "
    "year={2022}}",
)


def feature(x: Tensor) -> Tensor:
    """Return ``1 + elu(x)``, which is positive."""
    return 1 + F.elu(x)


def grad_bound(weigh: Callable[[Tensor], Tensor], scores: Tensor) -> Tensor:
    """Return for every score the largest derivative by it that any entry of its row's result has.

    Args:
        weigh: from one row of scores, (S,), to its weights or to an output of any shape, such as
            ``lambda s: s / s.sum()`` or ``lambda s: s.softmax(0)``.
        scores: the rows.

    Shapes:
        (T, S) -> (T, S)

    Example:
        >>> grad_bound(lambda s: s / s.sum(), torch.tensor([[1.0, 1.0]])).tolist()
        [[0.25, 0.25]]

    Raises:
        BadInput: ``scores`` is no matrix.
    """
    if scores.ndim != 2:
        raise BadInput(f"scores must have shape (T, S), got {tuple(scores.shape)}")
    rows: list[Tensor] = [torch.func.jacrev(weigh)(row).flatten(0, -2).abs().amax(0) for row in scores]
    return torch.stack(rows)


class _Heads(nn.Module):
    """Projections to queries, keys and values, turned by their position, and from what was read to the output."""

    def __init__(self, d_model: int, num_heads: int, rotary: bool) -> None:
        super().__init__()
        size = head_size(d_model, num_heads)
        if rotary and size % 2:
            raise BadInput(f"rotary needs an even head size, got d_model / num_heads = {size}")
        self.num_heads, self.size, self.rotary = num_heads, size, rotary
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.key = nn.Linear(d_model, d_model, bias=False)
        self.value = nn.Linear(d_model, d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def read(self, x: Tensor, place: Tensor, phi: Callable[[Tensor], Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v, (B, T, H, K), of ``x``, (B, T, D), at the positions ``place``, (B, T)."""
        q, k, v = (split_heads(project(x), self.num_heads) for project in (self.query, self.key, self.value))
        q, k = (q, k) if phi is None else (phi(q), phi(k))
        if self.rotary:
            q, k = rotary(q, place), rotary(k, place)
        return q, k, v

    def write(self, o: Tensor) -> Tensor:
        """Return the output of (B, T, D) or (B, T, H, V)."""
        y: Tensor = self.out(o if o.ndim == 3 else merge_heads(o))
        return y


def _places(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1], device=x.device)[None]


class NormAttention(LinearMixer):
    """Causal linear attention without a denominator, normalised over the joined heads.

    Args:
        d_model: the width D.
        num_heads: number of heads H.
        eps: added to the mean square; gradients are bounded by a constant over its root.
        rotary: whether features are turned by their position.

    Shapes:
        x: (B, T, D) -> (B, T, D); memory of the state: (B, H, K, V).

    Example:
        >>> mixer = NormAttention(8, num_heads=2)
        >>> y, state = mixer.prefill(torch.randn(1, 3, 8))
        >>> y.shape, state["memory"].shape
        (torch.Size([1, 3, 8]), torch.Size([1, 2, 4, 4]))

    Raises:
        BadInput: ``num_heads`` does not divide ``d_model``, or heads of odd size shall be turned.
    """

    def __init__(self, d_model: int, *, num_heads: int = 4, eps: float = 1e-5, rotary: bool = True) -> None:
        size = head_size(d_model, num_heads)
        super().__init__(d_model, num_heads=num_heads, key_size=size, value_size=size)
        self.heads = _Heads(d_model, num_heads, rotary)
        self.norm = HeadNorm(d_model, eps=eps, affine=False)

    def init_rest(self, batch_size: int) -> State:  # noqa: D102
        return {"place": torch.zeros(batch_size, dtype=torch.int64, device=self.heads.out.weight.device)}

    def tokens(self, x: Tensor, state: State) -> tuple[Tokens, State]:  # noqa: D102
        q, k, v = self.heads.read(x, positions(state["place"], x.shape[1]), feature)
        return Tokens(q, k, v), {"place": state["place"] + x.shape[1]}

    def output(self, o: Tensor, x: Tensor) -> Tensor:  # noqa: D102
        return self.heads.write(self.norm(merge_heads(o)))


class BidirectionalNormAttention(Mixer):
    """:class:`NormAttention` in which every token sees every other: one product of keys and values for all.

    Args are those of :class:`NormAttention`; so are the names of the parameters.

    Shapes:
        x: (B, T, D) -> (B, T, D)

    Example:
        >>> BidirectionalNormAttention(8, num_heads=2)(torch.randn(1, 3, 8)).shape
        torch.Size([1, 3, 8])
    """

    causal = False

    def __init__(self, d_model: int, *, num_heads: int = 4, eps: float = 1e-5, rotary: bool = True) -> None:
        super().__init__(d_model)
        self.heads = _Heads(d_model, num_heads, rotary)
        self.norm = HeadNorm(d_model, eps=eps, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mix ``x``, (B, T, D) -> (B, T, D)."""
        q, k, v = self.heads.read(self.checked(x), _places(x), feature)
        with torch.autocast(x.device.type, enabled=False):
            exact = torch.promote_types(v.dtype, torch.float32)
            memory = torch.einsum("bthk,bthv->bhkv", k.to(exact), v.to(exact))
            o = torch.einsum("bthk,bhkv->bthv", q.to(exact), memory)
        return self.heads.write(self.norm(merge_heads(o.to(x.dtype))))


class DiagAttention(StatefulMixer):
    """Causal softmax attention inside blocks that do not overlap; the state is the current block.

    Args:
        d_model: the width D.
        num_heads: number of heads H.
        block: tokens a block, w.
        rotary: whether queries and keys are turned by their position.

    Shapes:
        x: (B, T, D) -> (B, T, D); k and v of the state: (B, w, H, K).

    Example:
        >>> mixer = DiagAttention(8, num_heads=2, block=2)
        >>> x = torch.randn(1, 4, 8)
        >>> torch.allclose(mixer(x)[:, 2:], mixer(torch.cat([-x[:, :2], x[:, 2:]], 1))[:, 2:], atol=1e-6)
        True

    Raises:
        BadInput: ``num_heads`` does not divide ``d_model``, a size is below 1, or heads of odd size shall be turned.
    """

    def __init__(self, d_model: int, *, num_heads: int = 4, block: int = 64, rotary: bool = True) -> None:
        super().__init__(d_model)
        if block < 1:
            raise BadInput(f"block must be at least 1, got {block}")
        self.block = block
        self.heads = _Heads(d_model, num_heads, rotary)

    def init_state(self, batch_size: int) -> State:
        """Return an empty block: no token of it is in place."""
        weight = self.heads.out.weight
        empty = weight.new_zeros(batch_size, self.block, self.heads.num_heads, self.heads.size)
        place = torch.zeros(batch_size, dtype=torch.int64, device=weight.device)
        return {"k": empty, "v": empty.clone(), "place": place}

    def prefill(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Attend from ``x``, (B, T, D), to itself and to what is left of the state's block.

        Queries go in pieces of w, each of which is shown the w tokens before it too; the mask leaves its own block.
        """
        self.checked(x)
        state = self.init_state(len(x)) if state is None else state
        w, tokens, place = self.block, x.shape[1], state["place"]  # place: tokens of the current block, (B,)
        q, k, v = self.heads.read(x, positions(place, tokens) % w, None)
        k, v = torch.cat([state["k"].to(k.dtype), k], 1), torch.cat([state["v"].to(v.dtype), v], 1)  # (B, w + T, H, K)
        kept = {"k": k[:, tokens:].to(state["k"].dtype), "v": v[:, tokens:].to(state["v"].dtype)}
        piece = min(w, tokens)
        q, k, v = (F.pad(part, (0, 0, 0, 0, 0, -tokens % piece)) for part in (q, k, v))
        q = torch.unflatten(q, 1, (-1, piece)).flatten(0, 1).transpose(1, 2)  # (B N, H, piece, K)
        k, v = (part.unfold(1, w + piece, piece).flatten(0, 1).mT for part in (k, v))  # (B N, H, w + piece, K)
        asks = torch.unflatten(positions(place, tokens + -tokens % piece), 1, (-1, piece))  # (B, N, piece)
        holds = positions(place - w, w + tokens + -tokens % piece).unfold(1, w + piece, piece)  # (B, N, w + piece)
        asks, holds = asks.flatten(0, 1)[:, None, :, None], holds.flatten(0, 1)[:, None, None]
        seen = (asks // w == holds // w) & (holds <= asks)  # places before the first block are negative
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)
        o = torch.unflatten(y, 0, (len(x), (tokens - 1) // piece + 1)).flatten(1, 2)[:, :tokens]
        return self.heads.write(o), {**kept, "place": (place + tokens) % w}


class BidirectionalDiagAttention(Mixer):
    """:class:`DiagAttention` in which every token of a block sees the whole block; padding enters no softmax.

    Args are those of :class:`DiagAttention`; so are the names of the parameters.

    Shapes:
        x: (B, T, D) -> (B, T, D)

    Example:
        >>> BidirectionalDiagAttention(8, num_heads=2, block=2)(torch.randn(1, 3, 8)).shape
        torch.Size([1, 3, 8])
    """

    causal = False

    def __init__(self, d_model: int, *, num_heads: int = 4, block: int = 64, rotary: bool = True) -> None:
        super().__init__(d_model)
        if block < 1:
            raise BadInput(f"block must be at least 1, got {block}")
        self.block = block
        self.heads = _Heads(d_model, num_heads, rotary)

    def forward(self, x: Tensor) -> Tensor:
        """Mix ``x``, (B, T, D) -> (B, T, D)."""
        tokens = self.checked(x).shape[1]
        short = -tokens % self.block
        q, k, v = (
            torch.unflatten(F.pad(part, (0, 0, 0, 0, 0, short)), 1, (-1, self.block)).transpose(2, 3)
            for part in self.heads.read(x, _places(x) % self.block, None)
        )  # (B, N, H, w, K)
        real = (torch.arange(tokens + short, device=x.device) < tokens).view(-1, 1, 1, self.block)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=real)
        return self.heads.write(y.transpose(2, 3).flatten(1, 2)[:, :tokens])


class TransNormer(SequenceModel):
    """A sequence model of block attention in its first layers and normalised linear attention in the others.

    Args:
        d_model: width D.
        layers: L.
        num_heads: H.
        block: tokens a block of the first layers.
        diag_fraction: share of the layers that attend inside blocks, rounded down.
        causal: whether tokens see earlier ones only; only then can it go token by token.
        vocab_size: number of symbols; 256 are bytes.
        outputs: number of output symbols or classes; default ``vocab_size``.
        pool: ``None`` for an answer at every position, ``"last"`` or ``"mean"`` for one answer a sequence.

    Shapes:
        (B, T) integers -> (B, T, outputs), or (B, outputs) where pooled

    Example:
        >>> model = TransNormer(16, 2, num_heads=2)
        >>> [type(mixer).__name__ for mixer in model.mixers()]
        ['DiagAttention', 'NormAttention']

    Raises:
        BadInput: ``diag_fraction`` is not between 0 and 1, or a size is below 1.
    """

    def __init__(
        self,
        d_model: int,
        layers: int,
        *,
        num_heads: int = 4,
        block: int = 64,
        diag_fraction: float = 0.5,
        causal: bool = True,
        vocab_size: int = 256,
        outputs: int | None = None,
        pool: Pool | None = None,
    ) -> None:
        if not 0 <= diag_fraction <= 1:
            raise BadInput(f"diag_fraction must be between 0 and 1, got {diag_fraction}")
        layer = count(1)
        early, late = (
            (DiagAttention, NormAttention) if causal else (BidirectionalDiagAttention, BidirectionalNormAttention)
        )

        def build(width: int) -> Mixer:
            if next(layer) <= int(layers * diag_fraction):
                return early(width, num_heads=num_heads, block=block)
            return late(width, num_heads=num_heads)

        super().__init__(d_model, layers, build, vocab_size=vocab_size, outputs=outputs, pool=pool)
