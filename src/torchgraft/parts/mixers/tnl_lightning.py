"""TransNormerLLM: lightning attention whose decay weakens with depth, gated, normalised without learned scales.

Paper: `Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention
<https://arxiv.org/abs/2405.17381>`_, and `TransNormerLLM <https://arxiv.org/abs/2307.14995>`_ before it.

Equation: ``Y = [SRMS([(Q K^T) (.) M] V) (.) U] W_o`` with ``Q = silu(X W_q)``, ``K = silu(X W_k)``, ``V = X W_v``,
``U = X W_u``, ``M_ts = lambda^(t-s)``, ``lambda_hl = exp(-(8h/H)(1 - l/L))``; in the first layer each channel's product
is weighed by ``cos((t-s) theta)`` too.

Departures: layers count from 1 to L, so that the last one does not decay, as in the authors' code. ``theta`` is learned
for each head and channel from ``10000^(-c/D)``. ``decay="alibi"`` takes the rates of the authors' code,
``2^(-8h/H)(1 - (l-1)/(L-1) + 1e-5)`` with h from 1. Angles are computed in float32 at least.
"""

from __future__ import annotations

from itertools import count
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines.recurrence.distance import cosine_features, frequencies, positions, slopes
from torchgraft.engines.recurrence.heads import HeadNorm, head_size, merge_heads, split_heads
from torchgraft.engines.recurrence.linear_mixer import LinearMixer, Tokens
from torchgraft.engines.recurrence.mixer import State
from torchgraft.errors import BadInput
from torchgraft.parts.blocks.sequence_model import SequenceModel

__all__ = ["CARD", "SGLU", "TNLAttention", "TransNormerLLM", "tnl_decay"]

Schedule = Literal["paper", "alibi"]

CARD = Card(
    key="tnl-lightning",
    title="TransNormerLLM attention",
    seed_id=290,
    authors="Qin, Sun, Li, Shen, Sun and Zhong, 2024",
    reference="https://arxiv.org/abs/2405.17381",
    family="parts/mixers",
    kind="part",
    engine=("recurrence", "normalize"),
    equation="Y = [SRMS([(Q K^T) (.) M] V) (.) U] W_o,  M_ts = lambda_hl^(t-s),  lambda_hl = exp(-(8h/H)(1 - l/L))",
    entry="TNLAttention",
    capabilities=frozenset({"causal", "stateful", "linear-time", "compilable"}),
    declared={"parameters": "5 * d_model**2 + d_model"},
    example={"d_model": 16, "num_heads": 2},
    shapes=((2, 12, 16),),
    oracles=(
        "parallel, block and recurrent inference agree to 1e-10 in float64 for all layers and heads, 10^4 tokens too",
        "SRMS(c x) = SRMS(x) for c > 0, and SRMS(x) has the norm sqrt(D)",
        "decay is 1 at l = L and for head 0, falls with h and rises with l",
        "scores of the first layer depend on s - t only",
    ),
    claim=Claim(
        text="Byte language model over the standard library, two layers of width 64, equal steps: against a softmax "
        "transformer (rotary positions, SwiGLU) and the same model without decay; tokens a second of a training step "
        "of two layers of width 128 at 512 and at 4096 tokens.",
        figure="loss <= 1.03x softmax and <= no decay - 0.05 nats; tokens/s at 4096 within 20% of 512, softmax halved",
    ),
    choose_when="a language model of its own is trained from scratch on long sequences with constant memory a token",
    choose_instead="gated-linear-attention for gates that the input decides; softmax-attention for exact recall",
    bibtex="@inproceedings{qin2024tnl, title={Various Lengths, Constant Speed: Efficient Language Modeling with "
    "Lightning Attention}, author={Qin, Zhen and Sun, Weigao and Li, Dong and Shen, Xuyang and Sun, Weixuan and Zhong, "
    "Yiran}, booktitle={ICML}, year={2024}}",
)


def tnl_decay(
    num_heads: int, layer: int, layers: int, *, schedule: Schedule = "paper", like: Tensor | None = None
) -> Tensor:
    """Return the log decays of the heads of one layer.

    Args:
        num_heads: H.
        layer: l, from 0; the first layer of a model is 1.
        layers: L.
        schedule: ``"paper"``: ``-(8h/H)(1 - l/L)``, h from 0; ``"alibi"``: ``-2^(-8h/H)(1 - (l-1)/(L-1) + 1e-5)``,
            h from 1.
        like: a tensor whose device and precision are taken.

    Shapes:
        (H,)

    Example:
        >>> tnl_decay(4, 1, 2).tolist()
        [-0.0, -1.0, -2.0, -3.0]

    Raises:
        BadInput: ``layer`` is not between 0 and ``layers``, or the schedule is unknown.
    """
    if layers < 1 or not 0 <= layer <= layers:
        raise BadInput(f"layer must be between 0 and layers, got layer {layer} of {layers}")
    rates = slopes(num_heads, like=like)
    if schedule == "alibi":
        return -rates * (1 - max(layer - 1, 0) / max(layers - 1, 1) + 1e-5)
    if schedule != "paper":
        raise BadInput(f"decay must be 'paper' or 'alibi', got {schedule!r}")
    return -torch.arange(num_heads, dtype=rates.dtype, device=rates.device) * (8 / num_heads) * (1 - layer / layers)


class TNLAttention(LinearMixer):
    """Gated lightning attention of one layer of TransNormerLLM.

    Args:
        d_model: the width D.
        num_heads: number of heads H.
        layer: which layer of the model it is, from 1.
        layers: layers of the model.
        decay: ``"paper"`` or ``"alibi"``, as for :func:`tnl_decay`.
        lrpe: whether products of queries and keys are weighed by learned cosines of the distance (LRPE-d); by default
            in the first layer only.

    Shapes:
        x: (B, T, D) -> (B, T, D); memory of the state: (B, H, K, V), with K twice the head size under LRPE-d.

    Example:
        >>> mixer = TNLAttention(16, num_heads=2, layer=1, layers=4)
        >>> x = torch.randn(1, 5, 16)
        >>> y, state = mixer.prefill(x[:, :4])
        >>> torch.allclose(mixer.step(x[:, 4], state)[0], mixer(x)[:, 4], atol=1e-5)
        True

    Raises:
        BadInput: ``num_heads`` does not divide ``d_model``, there is no such layer, or the schedule is unknown.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 4,
        layer: int = 1,
        layers: int = 2,
        decay: Schedule = "paper",
        lrpe: bool | None = None,
    ) -> None:
        tnl_decay(num_heads, layer, layers, schedule=decay)  # refuses what cannot be used
        size = head_size(d_model, num_heads)
        self.lrpe = layer == 1 if lrpe is None else lrpe
        super().__init__(d_model, num_heads=num_heads, key_size=2 * size if self.lrpe else size, value_size=size)
        self.layer, self.layers, self.decay = layer, layers, decay
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.key = nn.Linear(d_model, d_model, bias=False)
        self.value = nn.Linear(d_model, d_model, bias=False)
        self.gate = nn.Linear(d_model, d_model, bias=False)
        self.theta = nn.Parameter(frequencies(d_model).view(num_heads, size)) if self.lrpe else None
        self.norm = HeadNorm(d_model, affine=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def init_rest(self, batch_size: int) -> State:  # noqa: D102
        place = torch.zeros(batch_size, dtype=torch.int64, device=self.out.weight.device)
        return {"place": place} if self.lrpe else {}

    def tokens(self, x: Tensor, state: State) -> tuple[Tokens, State]:  # noqa: D102
        q, k, v = (split_heads(project(x), self.num_heads) for project in (self.query, self.key, self.value))
        q, k, rest = F.silu(q), F.silu(k), {}
        if self.theta is not None:
            theta = self.theta.to(torch.promote_types(self.theta.dtype, torch.float32))
            angle = positions(state["place"], x.shape[1])[..., None, None] * theta  # (B, T, H, size)
            q, k, rest = cosine_features(q, angle), cosine_features(k, angle), {"place": state["place"] + x.shape[1]}
        decay = tnl_decay(self.num_heads, self.layer, self.layers, schedule=self.decay, like=x)
        return Tokens(q, k, v, log_decay=decay), rest

    def output(self, o: Tensor, x: Tensor) -> Tensor:  # noqa: D102
        y: Tensor = self.out(self.norm(merge_heads(o)) * self.gate(x))
        return y


class SGLU(nn.Module):
    """Simple gated linear unit, ``[(X W_v) (.) (X W_u)] W_o``: (..., D) -> (..., D), without an activation.

    Args:
        d_model: D.
        hidden: width between.
    """

    def __init__(self, d_model: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, hidden, bias=False)
        self.up = nn.Linear(d_model, hidden, bias=False)
        self.down = nn.Linear(hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform every token by itself."""
        y: Tensor = self.down(self.gate(x) * self.up(x))
        return y


class TransNormerLLM(SequenceModel):
    """The language model: ``x + TNLAttention(SRMS(x))``, then ``x + SGLU(SRMS(x))``; prefill, step and generate too.

    Args:
        d_model: width D.
        layers: L; layer l of it decays as :func:`tnl_decay` says, and the first one has LRPE-d.
        num_heads: H.
        vocab_size: number of symbols; 256 are bytes.
        hidden: width of the SGLU; default 8/3 ``d_model``, rounded up to a multiple of 8.
        decay: ``"paper"`` or ``"alibi"``.
        tied: whether the head is the embedding.

    Shapes:
        (B, T) integers -> (B, T, vocab_size)

    Example:
        >>> TransNormerLLM(16, 2, num_heads=2)(torch.zeros(1, 5, dtype=torch.long)).shape
        torch.Size([1, 5, 256])
    """

    def __init__(
        self,
        d_model: int,
        layers: int,
        *,
        num_heads: int = 4,
        vocab_size: int = 256,
        hidden: int | None = None,
        decay: Schedule = "paper",
        tied: bool = False,
    ) -> None:
        layer = count(1)
        super().__init__(
            d_model,
            layers,
            lambda width: TNLAttention(width, num_heads=num_heads, layer=next(layer), layers=layers, decay=decay),
            vocab_size=vocab_size,
            hidden=0,
            tied=tied,
        )
        self.hidden = -(-d_model // 3) * 8 if hidden is None else hidden
        for block in self.blocks:
            block.norm, block.channel_norm = HeadNorm(d_model, affine=False), HeadNorm(d_model, affine=False)
            block.channels = SGLU(d_model, self.hidden)
        self.norm = nn.RMSNorm(d_model, eps=1e-5, elementwise_affine=False)
