"""Linear attention whose features are learned so that its weights mimic those of softmax attention.

Paper: `The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry
<https://arxiv.org/abs/2402.04347>`_.

Equation: ``a_ij = phi_q(q_i) . phi_k(k_j) / sum_m phi_q(q_i) . phi_k(k_m)``, ``o_i = sum_j a_ij v_j``, with
``phi(x) = softmax([W x + b, -(W x + b)])``, W = I and b = 0 at first; trained by ``-sum_j p_ij log a_ij``, p the
weights of softmax attention.

Departures: ``window``, of the same group's `LoLCATs <https://arxiv.org/abs/2410.10254>`_, without its learned weight of
the window; with ``act="exp"``, exponents are held within 30, so that float32 neither overflows nor loses a row; a row
whose weights sum to less than 1e-6 is divided by 1e-6.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines.linearize.kernel import FeatureKernel, Heads, wide, window_attention
from torchgraft.engines.linearize.mixer import StatefulKernelMixer
from torchgraft.engines.recurrence.linear import Form, with_state
from torchgraft.engines.recurrence.mixer import State
from torchgraft.errors import BadInput

__all__ = ["CARD", "Hedgehog", "HedgehogFeatureMap", "HedgehogKernel", "monotonicity", "spikiness"]

CARD = Card(
    key="hedgehog",
    title="Hedgehog linear attention",
    seed_id=257,
    authors="Zhang, Bhatia, Kumbong and Ré, 2024",
    reference="https://arxiv.org/abs/2402.04347",
    family="parts/mixers",
    kind="part",
    engine=("recurrence", "surgery"),
    equation="a_ij = phi_q(q_i) . phi_k(k_j) / sum_m phi_q(q_i) . phi_k(k_m),  phi(x) = softmax([W x + b, -(W x + b)])",
    entry="Hedgehog",
    capabilities=frozenset({"causal", "stateful", "linear-time", "compilable"}),
    declared={"parameters": "4 * d_model**2 + 2 * d_model * (d_model // num_heads) + 2 * d_model"},
    example={"d_model": 16, "num_heads": 2},
    shapes=((2, 12, 16),),
    oracles=(
        "the linear form equals the weights written out, causal and not, in float64 to 1e-10",
        "features are positive and the weights of a row sum to 1",
        "with exp and W = I, phi(x) . phi(y) = sum_j 2 cosh(x_j + y_j), which is at least 2 K",
        "the mimicry loss is at least the entropy of p, with equality where a = p",
        "mimicry moves the feature maps only",
    ),
    claim=Claim(
        text="The softmax transformers of digits-vit and recall, converted to "
        "hedgehog, to elu + 1 and to ReLU features, the same short mimicry where there is something to train and the "
        "same fine-tuning: how far the weights are from softmax, and what the converted models score.",
        figure="KL(p || a) <= 1/5 of elu + 1's, entropy gap < 0.3 nats, accuracy >= 99 % of the softmax model's on "
        "digits and >= 90 % on recall, where elu + 1 loses >= 10 points",
    ),
    choose_when="a trained softmax transformer, causal or not, must become linear and its weights matter (retrieval)",
    choose_instead="liger where a causal model may get no new parameters; gated-linear-attention from scratch",
    confidence="high",
    bibtex="@inproceedings{zhang2024hedgehog, title={The Hedgehog \\& the Porcupine: Expressive Linear Attentions with "
    "Softmax Mimicry}, author={Zhang, Michael and Bhatia, Kush and Kumbong, Hermann and R{\\'e}, Christopher}, "
    "booktitle={ICLR}, year={2024}}",
)
#: Exponents are held within this with ``act="exp"``.
_MOST = 30.0


class HedgehogFeatureMap(nn.Module):
    """The learned features of one side, queries or keys: positive, and twice as many as there are channels.

    Args:
        head_dim: K.
        num_heads: H; each has a map of its own.
        act: ``"softmax"`` over the features of a token, or ``"exp"``.

    Shapes:
        (B, T, H, K) -> (B, T, H, 2 K), in float32 at least

    Example:
        >>> features = HedgehogFeatureMap(4, num_heads=2)(torch.randn(1, 3, 2, 4))
        >>> features.shape, bool((features > 0).all())
        (torch.Size([1, 3, 2, 8]), True)

    Raises:
        BadInput: ``act`` is neither.
    """

    def __init__(self, head_dim: int, *, num_heads: int = 1, act: Literal["softmax", "exp"] = "softmax") -> None:
        super().__init__()
        if act not in ("softmax", "exp"):
            raise BadInput(f"act must be 'softmax' or 'exp', got {act!r}")
        self.act = act
        self.weight = nn.Parameter(torch.eye(head_dim).repeat(num_heads, 1, 1))
        self.bias = nn.Parameter(torch.zeros(num_heads, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of ``x``."""
        x = wide(x)
        z = wide(torch.einsum("bthk,hjk->bthj", x, self.weight.to(x.dtype))) + self.bias
        both = torch.cat([z, -z], dim=-1)
        return both.softmax(-1) if self.act == "softmax" else both.clamp(-_MOST, _MOST).exp()


class HedgehogKernel(FeatureKernel):
    """Linear attention by two :class:`HedgehogFeatureMap`.

    Args:
        num_heads: H.
        key_size: K.
        value_size: V.
        act: as for the feature map.
        window: how many of the last tokens are weighed by softmax itself, where the attention is causal.
    """

    def __init__(
        self,
        *,
        num_heads: int,
        key_size: int,
        value_size: int,
        act: Literal["softmax", "exp"] = "softmax",
        window: int = 0,
    ) -> None:
        super().__init__(num_heads=num_heads, key_size=key_size, value_size=value_size)
        if window < 0:
            raise BadInput(f"window must be at least 0 (none), got {window}")
        self.window = window
        self.map_q = HedgehogFeatureMap(key_size, num_heads=num_heads, act=act)
        self.map_k = HedgehogFeatureMap(key_size, num_heads=num_heads, act=act)

    @property
    def memory_shape(self) -> tuple[int, int, int]:  # noqa: D102
        return self.num_heads, 2 * self.key_size, self.value_size + 1

    def features(self, heads: Heads) -> tuple[Tensor, Tensor]:  # noqa: D102
        return self.map_q(heads.q), self.map_k(heads.k)

    def weights(self, heads: Heads, *, causal: bool) -> Tensor:  # noqa: D102
        if not (causal and self.window):
            return super().weights(heads, causal=causal)
        phi_q, phi_k = self.features(heads)
        place = torch.arange(heads.q.shape[1], device=heads.q.device)
        gap = place[:, None] - place
        seen = torch.ones_like(gap, dtype=torch.bool) if heads.seen is None else heads.seen[:, None, None]
        scores = torch.einsum("bthk,bshk->bhts", wide(heads.q), wide(heads.k)) * heads.scale
        scores = scores.clamp(max=_MOST).exp() * ((gap >= 0) & (gap < self.window) & seen)
        far = torch.einsum("bthf,bshf->bhts", phi_q, phi_k) * ((gap >= self.window) & seen)
        both = scores + far
        return both / both.sum(-1, keepdim=True).clamp_min(1e-6)

    def init_state(self, batch_size: int, like: Tensor) -> State:  # noqa: D102
        state = super().init_state(batch_size, like)
        if not self.window:
            return state
        past, memory = (batch_size, self.window, self.num_heads), state["memory"]
        return {
            **state,
            "keys": memory.new_zeros((*past, self.key_size)),
            "values": memory.new_zeros((*past, self.value_size)),
            "valid": memory.new_zeros((batch_size, self.window)),
        }

    def advance(self, heads: Heads, state: State) -> tuple[Tensor, State]:  # noqa: D102
        if not self.window:
            return super().advance(heads, state)
        T = heads.q.shape[1]
        there = (
            state["valid"].new_ones(heads.q.shape[:2]) if heads.seen is None else heads.seen.to(state["valid"].dtype)
        )
        keys = torch.cat([state["keys"].to(heads.k.dtype), heads.k], dim=1)  # (B, w + T, H, K)
        values = torch.cat([state["values"].to(heads.v.dtype), heads.v], dim=1)
        valid = torch.cat([state["valid"], there], dim=1)
        near, total = window_attention(
            heads.q, keys[:, 1:], values[:, 1:], window=self.window, scale=heads.scale, valid=valid[:, 1:] > 0
        )
        # What leaves the window enters the memory: a token is in exactly one of them.
        phi_q, phi_k = self.map_q(heads.q), self.map_k(keys[:, :T]) * valid[:, :T, None, None]
        old = wide(values[:, :T])
        both = torch.cat([old, torch.ones_like(old[..., :1])], dim=-1)
        far, memory = with_state(phi_q, phi_k, both, state=state["memory"], form=self.form, chunk=self.chunk)
        weight = total.clamp(max=_MOST).exp()[..., None]
        o = (weight * wide(near) + far[..., :-1]) / (weight + far[..., -1:]).clamp_min(1e-6)
        kept = state["keys"].dtype
        after = {"keys": keys[:, T:].to(kept), "values": values[:, T:].to(kept), "valid": valid[:, T:]}
        return o.to(heads.v.dtype), {"memory": memory, **after}


def spikiness(weights: Tensor) -> Tensor:
    """Return the mean entropy of the rows of attention weights in nats; the lower, the spikier.

    Shapes:
        (B, H, T, S) -> (H,)

    Example:
        >>> spikiness(torch.full((1, 1, 4, 4), 0.25))
        tensor([1.3863])
    """
    entropy: Tensor = torch.special.entr(weights).sum(-1)
    return entropy.mean((0, 2))


def monotonicity(scores: Tensor, weights: Tensor) -> Tensor:
    """Return the share of pairs of keys that attention ranks as their products with the query do; 1 for softmax.

    Args:
        scores: products of queries and keys.
        weights: attention weights; pairs of which one weighs nothing (masked) do not count.

    Shapes:
        (B, H, T, S), (B, H, T, S) -> (H,)

    Example:
        >>> scores = torch.randn(1, 2, 5, 5)
        >>> monotonicity(scores, scores.softmax(-1)).tolist()
        [1.0, 1.0]
    """
    higher = scores[..., :, None] > scores[..., None, :]
    counted = higher & (weights[..., :, None] > 0) & (weights[..., None, :] > 0)
    agree = counted & (weights[..., :, None] > weights[..., None, :])
    return agree.sum((0, 2, 3, 4)) / counted.sum((0, 2, 3, 4)).clamp_min(1)


class Hedgehog(StatefulKernelMixer):
    """Multi-head linear attention with learned features.

    Args:
        d_model: the width D.
        num_heads: H; divides ``d_model``.
        rotary: whether queries and keys are turned by their position before the features.
        causal: whether a token sees itself and those before it, or all; there is a state only where it is causal.
        act: ``"softmax"`` over the features of a token, or ``"exp"``.
        window: how many of the last tokens are weighed by softmax itself, where causal; the paper has none.

    Shapes:
        x: (B, T, D) -> (B, T, D); memory of the state: (B, H, 2 K, V + 1).

    Example:
        >>> mixer = Hedgehog(16, num_heads=2)
        >>> x = torch.randn(1, 5, 16)
        >>> y, state = mixer.prefill(x[:, :4])
        >>> torch.allclose(mixer.step(x[:, 4], state)[0], mixer(x)[:, 4], atol=1e-5)
        True

    Raises:
        BadInput: ``num_heads`` does not divide ``d_model``, or an option is none.
    """

    mimics: ClassVar[bool] = True

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 4,
        rotary: bool = True,
        causal: bool = True,
        act: Literal["softmax", "exp"] = "softmax",
        window: int = 0,
    ) -> None:
        super().__init__(d_model, num_heads=num_heads, rotary=rotary, options={"act": act, "window": window})
        self.causal = causal  # type: ignore[misc]  # fixed for stateful mixers, a choice here

    @classmethod
    def build_kernel(  # noqa: D102
        cls, *, num_heads: int, key_size: int, value_size: int, options: Mapping[str, Any], image: bool = False
    ) -> HedgehogKernel:
        return HedgehogKernel(num_heads=num_heads, key_size=key_size, value_size=value_size, **options)

    @property
    def form(self) -> Form:
        """In which form the recurrence runs; the numbers are the same."""
        return self.kernel.form

    @form.setter
    def form(self, value: Form) -> None:
        self.kernel.form = value
