"""Softmax attention with a running average of past values added, by analogy with gradient descent with momentum.

`Why Can GPT Learn In-Context? Language Models Implicitly Perform Gradient Descent as Meta-Optimizers
<https://arxiv.org/abs/2212.10559>`_ (Dai et al., 2023): o_t = sum_{s<=t} softmax_s(q_t . k_s / sqrt(K)) v_s + m_t with

    m_t = sum_{s<t} eta^(t-s) v_s = eta (m_{t-1} + v_{t-1})

Departures: rotary positions, which the paper does not speak of.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchgraft.catalogue import Card
from torchgraft.engines.attention import Mask, Rows, Transform, attend, unnormalized
from torchgraft.engines.attention.mixer import AttentionMixer
from torchgraft.engines.recurrence.heads import merge_heads
from torchgraft.engines.recurrence.linear import with_state
from torchgraft.engines.recurrence.mixer import State
from torchgraft.errors import BadInput

__all__ = ["CARD", "MomentumAttention", "attention", "running_momentum"]

CARD = Card(
    key="momentum-attention",
    title="Momentum attention",
    authors="Dai, Sun, Dong, Hao, Ma, Sui and Wei, 2023",
    reference="https://arxiv.org/abs/2212.10559",
    family="parts/mixers",
    kind="part",
    engine=("attention", "recurrence"),
    equation="o_t = sum_{s<=t} softmax_s(q_t . k_s / sqrt(K)) v_s + sum_{s<t} eta^(t-s) v_s",
    entry="MomentumAttention",
    capabilities=frozenset({"causal", "stateful", "compilable", "attention-interface"}),
    declared={"parameters": "4*d_model**2"},
    example={"d_model": 16, "num_heads": 2},
    shapes=((2, 12, 16),),
    oracles=(
        "eta = 0 is softmax-attention",
        "the momentum equals the sum over all pairs of tokens, and the recurrence taken token by token",
    ),
    choose_when="attention as in softmax-attention with a cheap memory of the recent past; icl-meta-optimizer tests it",
    choose_instead="softmax-attention where nothing shows that the momentum helps",
    expected_failures={
        "attention-sees-what-the-mask-says": "momentum counts positions: where hidden keys are taken out instead of "
        "hidden, those before them come nearer",
    },
    bibtex="""@inproceedings{dai2023gpt,
  title={Why Can GPT Learn In-Context? Language Models Implicitly Perform Gradient Descent as Meta-Optimizers},
  author={Dai, Damai and Sun, Yutao and Dong, Li and Hao, Yaru and Ma, Shuming and Sui, Zhifang and Wei, Furu},
  booktitle={Findings of the Association for Computational Linguistics: ACL},
  year={2023}
}""",
)


def running_momentum(v: Tensor, eta: float, before: Tensor) -> tuple[Tensor, Tensor]:
    """Return m_t of every token, and that of the token which follows the last one.

    Args:
        v: values.
        eta: between 0 and 1.
        before: m of the first token, zero where nothing stands before it; float32 at least.

    Shapes:
        v: (B, T, G, V), before: (B, G, V) -> (B, T, G, V), (B, G, V)

    Example:
        >>> m, last = running_momentum(torch.ones(1, 3, 1, 1), 0.5, torch.zeros(1, 1, 1))
        >>> m.flatten().tolist(), last.item()
        ([0.0, 0.5, 0.75], 0.875)
    """
    if eta == 0:
        return torch.zeros_like(v), torch.zeros_like(before)
    one = v.new_ones(*v.shape[:3], 1)
    decay = torch.full((v.shape[2],), math.log(eta), dtype=before.dtype, device=v.device)
    # The recurrence holds S_t = eta S_{t-1} + eta v_t, which is the momentum of the next token.
    following, last = with_state(one, one, eta * v.to(before.dtype), log_decay=decay, state=before[:, :, None])
    return torch.cat([before[:, None], following], dim=1)[:, : v.shape[1]].to(v.dtype), last[:, :, 0]


def _no_score(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return q.new_zeros(*q.shape[:3], k.shape[2])


def _fading(eta: float) -> Transform:
    """Return the transform to eta^(t-s) for keys before the query, and 0 for others."""

    def weigh(s: Tensor, rows: Rows) -> Tensor:
        away = rows.distance()
        fading = (eta ** away.clamp_min(0).to(s.dtype)).masked_fill(away <= 0, 0.0)
        return s + fading

    return weigh


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    training: bool = False,
    eta: float = 0.3,
) -> Tensor:
    """Return what softmax mixes plus the momentum of the values, from keys and values alone, without a running state.

    Args:
        q: queries.
        k: keys.
        v: values.
        mask: who sees whom; hidden values add no momentum.
        causal: whether a query sees keys up to its own position only.
        scale: by default 1 / sqrt(K).
        training: makes no difference.
        eta: between 0 and 1.

    Shapes:
        (B, T, H, K), (B, S, G, K), (B, S, G, V) -> (B, T, H, V)

    Example:
        >>> q, v = torch.zeros(1, 3, 1, 4), torch.ones(1, 3, 1, 1)
        >>> attention(q, q, v, causal=True, eta=0.5).flatten()
        tensor([1.0000, 1.5000, 1.7500])
    """
    softmax = attend(q, k, v, mask=mask, causal=causal, scale=scale)
    return softmax + attend(
        q, k, v, score=_no_score, transform=_fading(eta), normalize=unnormalized, mask=mask, causal=causal
    )


class MomentumAttention(AttentionMixer):
    """Multi-head causal softmax attention to which the momentum of the values is added.

    Args:
        d_model: the width D.
        num_heads: H; divides ``d_model``.
        num_kv_heads: heads of keys and values; by default H.
        rotary: whether queries and keys are turned by their position.
        eta: how much of the momentum a token leaves to the next, from 0 (none) to below 1.

    Shapes:
        (B, T, D) -> (B, T, D)

    Example:
        >>> mixer = MomentumAttention(8, num_heads=2)
        >>> y, state = mixer.prefill(torch.randn(1, 3, 8))
        >>> y.shape, state["momentum"].shape
        (torch.Size([1, 3, 8]), torch.Size([1, 2, 4]))

    Raises:
        BadInput: heads do not divide the width or each other, or ``eta`` is out of range.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        rotary: bool = True,
        eta: float = 0.3,
    ) -> None:
        super().__init__(d_model, num_heads=num_heads, num_kv_heads=num_kv_heads, rotary=rotary)
        if not 0 <= eta < 1:
            raise BadInput(f"eta must lie in [0, 1), got {eta}")
        self.eta = eta

    def init_state(self, batch_size: int) -> State:
        """Return a cache of no tokens and no momentum."""
        weight = self.out.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        none = weight.new_zeros(batch_size, self.num_kv_heads, self.key_size, dtype=wide)
        return {**super().init_state(batch_size), "momentum": none}

    def prefill(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Attend from ``x``, (B, T, D), to what is cached and to itself; return the output, cache and momentum."""
        self.checked(x)
        state = self.init_state(len(x)) if state is None else state
        q, k, v = self.heads(x, state["k"].shape[1])
        momentum, following = running_momentum(v, self.eta, state["momentum"])
        keys, values = torch.cat([state["k"].to(k.dtype), k], dim=1), torch.cat([state["v"].to(v.dtype), v], dim=1)
        mixed = self.mix(q, keys, values) + momentum.repeat_interleave(self.num_heads // self.num_kv_heads, dim=2)
        y: Tensor = self.out(merge_heads(mixed))
        return y, {"k": keys, "v": values, "momentum": following}

    def forward(self, x: Tensor) -> Tensor:
        """Mix ``x``, (B, T, D) -> (B, T, D)."""
        return self.prefill(x)[0]

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return what softmax attention mixes, the momentum not included."""
        return attend(q, k, v, causal=True)
