"""Linear attention whose state is a running softmax average, so that one scan serves data of any number of axes.

Paper: `You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet
<https://arxiv.org/abs/2405.21022>`_.

Equation: ``s_t = s_{t-1} + exp(k_t)``, ``S_t = diag(s_{t-1} / s_t) S_{t-1} + diag(exp(k_t) / s_t) v_t^T``,
``o_t = S_t^T q_t``, that is ``S_t = sum_{j<=t} softmax_j(k)_j v_j^T``; without an order of tokens,
``O = Q (softmax_tokens(K)^T V)``.

Departures: sums are held as logarithms. The causal mixer has no angles; its positions come from :class:`MDTPE` or from
the model. :class:`MDLRPE` acts after the softmax over tokens, since only then do scores depend on the difference of
positions. An image's class token is left out.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines.recurrence.distance import cosine_features, frequencies, rotate_by
from torchgraft.engines.recurrence.heads import HeadNorm, head_size, merge_heads, split_heads
from torchgraft.engines.recurrence.linear import Form, additive_recurrence, with_state
from torchgraft.engines.recurrence.mixer import Mixer, State, StatefulMixer
from torchgraft.errors import BadInput

__all__ = ["CARD", "MDLRPE", "MDTPE", "BidirectionalLightNet", "LightNetMixer"]

#: In the place of log 0, so that no difference of two of them is NaN.
_LOG_NOTHING = -1e30

CARD = Card(
    key="lightnet",
    title="LightNet",
    seed_id=259,
    authors="Qin, Mao, Shen, Li, Zhang, Dai and Zhong, 2024",
    reference="https://arxiv.org/abs/2405.21022",
    family="parts/mixers",
    kind="part",
    engine=("recurrence",),
    equation="S_t = diag(s_{t-1}/s_t) S_{t-1} + diag(exp(k_t)/s_t) v_t^T,  s_t = s_{t-1} + exp(k_t),  o_t = S_t^T q_t",
    entry="LightNetMixer",
    capabilities=frozenset({"causal", "stateful", "linear-time", "compilable"}),
    declared={"parameters": "4 * d_model**2 + 2 * d_model * (d_model // num_heads) + d_model"},
    example={"d_model": 16, "num_heads": 2},
    shapes=((2, 12, 16),),
    oracles=(
        "the recurrence equals the cumulative-softmax closed form and gated linear attention with its gates, to 1e-12",
        "adding a constant to a channel of all keys changes nothing",
        "without an order the mixer is permutation equivariant, and its last output is the causal one's",
        "MD-LRPE scores depend on differences of positions only, along every axis",
        "MD-TPE before its norm is linear and a Toeplitz filter along each axis",
    ),
    claim=Claim(
        text="Digits as a grid of 8 x 8 pixels, two blocks of width 32, equal steps: LightNet against linear "
        "attention with fixed decays in one scan, and in four.",
        figure="accuracy >= 1 scan + 1 point and >= 4 scans - 1 point, at <= 40% of the time of a step with 4 scans",
    ),
    choose_when="tokens lie on a grid of two or more axes, or a running average over all of the past is wanted",
    choose_instead="gated-linear-attention for text, where the recent past counts for more",
    bibtex="@article{qin2024lightnet, title={You Only Scan Once: Efficient Multi-dimension Sequential Modeling with "
    "LightNet}, author={Qin, Zhen and Mao, Yuxin and Shen, Xuyang and Li, Dong and Zhang, Jing and Dai, Yuchao and "
    "Zhong, Yiran}, journal={arXiv:2405.21022}, year={2024}}",
)


class _Heads(nn.Module):
    """Projections to queries, logits of keys and values, and from what was read to the output, with a gate."""

    def __init__(self, d_model: int, num_heads: int, expand_k: float) -> None:
        super().__init__()
        keys = int(expand_k * d_model)
        rank = head_size(d_model, num_heads)
        self.num_heads, self.key_size, self.value_size = (
            num_heads,
            head_size(keys, num_heads, "expand_k * d_model"),
            rank,
        )
        self.query = nn.Linear(d_model, keys, bias=False)
        self.key = nn.Linear(d_model, keys, bias=False)
        self.value = nn.Linear(d_model, d_model, bias=False)
        self.gate = nn.Sequential(nn.Linear(d_model, rank, bias=False), nn.Linear(rank, d_model, bias=False))
        self.norm = HeadNorm(d_model)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def read(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q and the logits, (B, T, H, K), and v, (B, T, H, V)."""
        q, k, v = (split_heads(project(x), self.num_heads) for project in (self.query, self.key, self.value))
        return F.silu(q), k, v

    def write(self, o: Tensor, x: Tensor) -> Tensor:
        """Return the output for what was read, (B, T, H, V)."""
        y: Tensor = self.out(self.norm(merge_heads(o.to(x.dtype))) * torch.sigmoid(self.gate(x)))
        return y


class LightNetMixer(StatefulMixer):
    """Causal linear attention over a running softmax average.

    Args:
        d_model: the width D.
        num_heads: number of heads H; the gate has the rank D / H.
        expand_k: width of all keys together, as a share of D.
        initial_sum: s_0; the paper's is 0, a later code of its authors takes 1, which draws the first averages to 0.

    Shapes:
        x: (B, T, D) -> (B, T, D); memory of the state: (B, H, K, V), log_sum: (B, H, K).

    Example:
        >>> mixer = LightNetMixer(16, num_heads=2)
        >>> x = torch.randn(1, 5, 16)
        >>> y, state = mixer.prefill(x[:, :4])
        >>> torch.allclose(mixer.step(x[:, 4], state)[0], mixer(x)[:, 4], atol=1e-5)
        True

    Raises:
        BadInput: ``num_heads`` does not divide the widths, or ``initial_sum`` is negative.
    """

    form: Form = "auto"
    chunk: int = 64

    def __init__(self, d_model: int, *, num_heads: int = 4, expand_k: float = 1.0, initial_sum: float = 0.0) -> None:
        super().__init__(d_model)
        if not 0 <= initial_sum < math.inf:
            raise BadInput(f"initial_sum must be at least 0 and finite, got {initial_sum}")
        self.initial_sum = initial_sum
        self.heads = _Heads(d_model, num_heads, expand_k)

    def init_state(self, batch_size: int) -> State:
        """Return an empty memory and the logarithm of s_0, in float32 (float64 where the parameters are)."""
        heads, weight = self.heads, self.heads.out.weight
        shape = (batch_size, heads.num_heads, heads.key_size, heads.value_size)
        memory = weight.new_zeros(shape, dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32)
        start = math.log(self.initial_sum) if self.initial_sum else _LOG_NOTHING
        return {"memory": memory, "log_sum": torch.full_like(memory[..., 0], start)}

    def prefill(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Mix ``x``, (B, T, D), after ``state``; return the output and the state after the last token."""
        q, k, v = self.heads.read(self.checked(x))
        state = self.init_state(len(x)) if state is None else state
        o, memory, log_sum = additive_recurrence(
            q, k, v, state=state["memory"], log_sum=state["log_sum"], form=self.form, chunk=self.chunk
        )
        return self.heads.write(o, x), {"memory": memory, "log_sum": log_sum}


class BidirectionalLightNet(Mixer):
    """LightNet without an order of tokens: each sees one softmax average of all.

    Args:
        d_model: the width D.
        num_heads: number of heads H.
        expand_k: width of all keys together, as a share of D.
        shape: sizes of the axes of the grid that the tokens come from, row by row; where given, scores depend on the
            difference of positions by :class:`MDLRPE`, else on no position at all.

    Shapes:
        x: (B, T, D) -> (B, T, D), with T the product of ``shape`` where given

    Example:
        >>> BidirectionalLightNet(16, num_heads=2, shape=(2, 3))(torch.randn(1, 6, 16)).shape
        torch.Size([1, 6, 16])

    Raises:
        BadInput: ``num_heads`` does not divide the widths, or the heads are too small for the axes.
    """

    causal = False

    def __init__(
        self, d_model: int, *, num_heads: int = 4, expand_k: float = 1.0, shape: tuple[int, ...] | None = None
    ) -> None:
        super().__init__(d_model)
        self.heads = _Heads(d_model, num_heads, expand_k)
        self.place = None if shape is None else MDLRPE(shape)
        if self.place is not None and self.heads.key_size < len(self.place.shape):
            raise BadInput(f"heads need a channel for each of the axes {shape}, got {self.heads.key_size} channels")

    def forward(self, x: Tensor) -> Tensor:
        """Mix ``x``, (B, T, D) -> (B, T, D)."""
        q, k, v = self.heads.read(self.checked(x))
        with torch.autocast(x.device.type, enabled=False):
            exact = torch.promote_types(v.dtype, torch.float32)
            q, k, v = q.to(exact), k.to(exact).softmax(1), v.to(exact)
            if self.place is not None:
                q, k = self.place(q), self.place(k)
            memory = torch.einsum("bthk,bthv->bhkv", k, v)
            o = torch.einsum("bthk,bhkv->bthv", q, memory)
        return self.heads.write(o, x)


def _grid(shape: tuple[int, ...]) -> tuple[int, ...]:
    if not shape or min(shape) < 1:
        raise BadInput(f"shape must name the size of at least one axis, each at least 1, got {shape}")
    return tuple(shape)


def _along(x: Tensor, shape: tuple[int, ...]) -> int:
    if x.shape[1] != math.prod(shape):
        raise BadInput(f"a grid of {shape} has {math.prod(shape)} tokens, got {x.shape[1]}")
    return x.shape[1]


class MDLRPE(nn.Module):
    """Positions on a grid for linear attention: a block of channels for each axis, weighed by cosines of its position.

    Args:
        shape: sizes of the axes; tokens are row by row, the last axis fastest.
        kind: ``"cosine"`` makes two channels of each; ``"rotation"`` turns pairs and needs blocks of even size.
        base: 1 over it is about the smallest angle a step along an axis.

    Shapes:
        q or k: (B, T, H, K) -> (B, T, H, 2K), or (B, T, H, K) for a rotation

    Example:
        >>> MDLRPE((2, 2))(torch.ones(1, 4, 1, 2)).shape
        torch.Size([1, 4, 1, 4])

    Raises:
        BadInput: an axis is empty, the number of tokens is another, or the channels cannot be shared out.
    """

    def __init__(
        self, shape: tuple[int, ...], *, kind: Literal["cosine", "rotation"] = "cosine", base: float = 10_000.0
    ) -> None:
        super().__init__()
        if kind not in ("cosine", "rotation"):
            raise BadInput(f"kind must be 'cosine' or 'rotation', got {kind!r}")
        self.shape, self.kind, self.base = _grid(shape), kind, base

    def forward(self, x: Tensor) -> Tensor:
        """Weigh queries or keys by their places."""
        place = torch.arange(_along(x, self.shape), device=x.device)
        size, axes = x.shape[-1], len(self.shape)
        share = 2 if self.kind == "rotation" else 1
        if size < axes * share or (share == 2 and size % (2 * axes)):
            raise BadInput(f"{self.kind} on {axes} axes cannot share out heads of {size} channels")
        done, step = [], math.prod(self.shape)
        for part, length in zip(x.tensor_split(axes, dim=-1), self.shape, strict=True):
            step //= length
            along = (place // step) % length  # (T,)
            angle = along[:, None, None] * frequencies(part.shape[-1] // share, self.base, like=x)
            done.append(rotate_by(part, angle) if share == 2 else cosine_features(part, angle))
        return torch.cat(done, dim=-1)


class MDTPE(nn.Module):
    """Positions for a model's input: along every axis a filter with a learned exponential decay a head, summed.

    Along an axis the filter is lightning attention with learned queries and keys that are the same for all tokens, so
    a token gets ``(q . k) lambda^d`` of the one d places before it. What it returns is to be added to the input.

    Args:
        d_model: the width D.
        shape: sizes of the axes.
        num_heads: H, each with a decay of its own.

    Shapes:
        x: (B, T, D) -> (B, T, D)

    Example:
        >>> MDTPE(8, (2, 3), num_heads=2)(torch.randn(1, 6, 8)).shape
        torch.Size([1, 6, 8])

    Raises:
        BadInput: ``num_heads`` does not divide ``d_model``, an axis is empty, or the number of tokens is another.
    """

    def __init__(self, d_model: int, shape: tuple[int, ...], *, num_heads: int = 4) -> None:
        super().__init__()
        self.shape, self.num_heads, axes = _grid(shape), num_heads, len(shape)
        size = head_size(d_model, num_heads)
        self.query = nn.Parameter(torch.randn(axes, num_heads, size) * size**-0.5)
        self.key = nn.Parameter(torch.randn(axes, num_heads, size) * size**-0.5)
        self.decay = nn.Parameter(torch.linspace(-2.0, 2.0, num_heads).repeat(axes, 1))
        self.norm = HeadNorm(d_model)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def filtered(self, x: Tensor, axis: int) -> Tensor:
        """Return ``x`` filtered along one axis, before the norm: linear in ``x``."""
        tokens = _along(x, self.shape)
        length = self.shape[axis]
        inner = math.prod(self.shape[axis + 1 :])
        lines = x.view(len(x), tokens // (length * inner), length, inner, x.shape[-1]).transpose(2, 3)
        v = split_heads(lines.reshape(-1, length, x.shape[-1]), self.num_heads)  # (lines, length, H, V)
        q, k = (part[axis].to(x.dtype).expand(len(v), length, -1, -1) for part in (self.query, self.key))
        exact = torch.promote_types(self.decay.dtype, torch.float32)
        o, _ = with_state(q, k, v, log_decay=F.logsigmoid(self.decay[axis].to(exact)))
        o = merge_heads(o.to(x.dtype)).view(lines.shape)
        return o.transpose(2, 3).reshape(x.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum over the axes."""
        y: Tensor = self.out(torch.stack([self.norm(self.filtered(x, axis)) for axis in range(len(self.shape))]).sum(0))
        return y
