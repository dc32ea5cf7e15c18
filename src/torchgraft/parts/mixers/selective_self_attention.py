"""Softmax attention in which every query has a temperature and every value a gain, by its token and its position.

`Selective Attention: Enhancing Transformer through Principled Context Control <https://arxiv.org/abs/2411.12892>`_
(Zhang et al., 2024): o_i = sum_j softmax_j(tau_q(q_i) q_i . k_j / sqrt(K)) tau_v(v_j) v_j with, n keys being visible,

    tau_q(q) = tanh(f(q)) + 1 + sigmoid(alpha) log n,  tau_v(v) = 1 + tanh(g(v)),  f and g linear

Departures: how the two parts of tau_q join, as a sum, and that a vector a head reads f from the projected query itself,
are our reading; f, g and alpha begin at 0, so that only the position acts at first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from torchgraft.catalogue import Card, registry
from torchgraft.catalogue.card import Claim
from torchgraft.engines.attention import Mask, Rows, attend, unnormalized
from torchgraft.engines.attention.hugging_face import attach
from torchgraft.engines.attention.mixer import AttentionMixer
from torchgraft.engines.recurrence.distance import rotary as turned
from torchgraft.engines.recurrence.heads import split_heads
from torchgraft.errors import BadInput

__all__ = [
    "CARD",
    "SelectiveSelfAttention",
    "Temperatures",
    "make_selective",
    "position_temperature",
    "token_temperature",
]

CARD = Card(
    key="selective-self-attention",
    title="Selective self-attention",
    seed_id=23,
    authors="Zhang, Chang, Li, Roy-Chowdhury, Chen and Oymak, 2024",
    reference="https://arxiv.org/abs/2411.12892",
    family="parts/mixers",
    kind="part",
    engine=("attention",),
    equation="o_i = sum_j softmax_j(tau_q(q_i) q_i . k_j / sqrt(K)) tau_v(v_j) v_j",
    entry="SelectiveSelfAttention",
    capabilities=frozenset({"causal", "stateful", "compilable"}),
    declared={"parameters": "4*d_model**2 + 2*d_model + num_heads"},
    example={"d_model": 16, "num_heads": 2},
    shapes=((2, 12, 16),),
    oracles=(
        "with f = g = 0 and alpha = -inf it equals nn.MultiheadAttention and softmax-attention of the same weights",
        "equals both temperatures written out with matrices, in float64, causal and both ways",
        "a temperature keeps the order of a row; the derivative of its entropy by tau is -tau Var(scores)",
        "one logit ahead by g: its weight stays above 1/2 for tau = 1 + log(n)/g, and falls as 1/n for tau = 1",
        "temperatures count positions from the beginning of the cache",
    ),
    claim=Claim(
        text="Bytes of the standard library, and a needle to be found among fillers, trained at length 64 and asked at "
        "256, beside the same transformer without temperatures; and means of tokens of which some are noise.",
        figure="at most 0.005 bits a byte above, retrieval at 256 at least 5 points above, lower squared error with "
        "value temperatures",
    ),
    choose_when="contexts are longer than in training, or some tokens should count for less whoever asks",
    choose_instead="softmax-attention where lengths are fixed and short: the temperatures then have little to do",
    confidence="medium",
    bibtex="""@inproceedings{zhang2024selective,
  title={Selective Attention: Enhancing Transformer through Principled Context Control},
  author={Zhang, Xuechen and Chang, Xiangyu and Li, Mingchen and Roy-Chowdhury, Amit and Chen, Jiasi and Oymak, Samet},
  booktitle={Advances in Neural Information Processing Systems},
  year={2024}
}""",
)


def token_temperature(x: Tensor, weight: Tensor) -> Tensor:
    """Return tanh(x . w), in float32 at least, for every head: (B, T, H, K), (H, K) -> (B, T, H).

    Example:
        >>> token_temperature(torch.ones(1, 1, 1, 2), torch.zeros(1, 2)).item()
        0.0
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) * weight.to(wide)).sum(-1).tanh()


def position_temperature(visible: Tensor, alpha: Tensor) -> Tensor:
    """Return 1 + sigmoid(alpha) log n, in float32 at least: n (..., T), alpha (H,) -> (..., T, H).

    Example:
        >>> position_temperature(torch.tensor([1, 8]), torch.zeros(1)).flatten().tolist()
        [1.0, 2.0397207736968994]
    """
    alpha = alpha.to(torch.promote_types(alpha.dtype, torch.float32))
    return 1 + visible.to(alpha.dtype).log()[..., None] * alpha.sigmoid()


class SelectiveSelfAttention(AttentionMixer):
    """Multi-head softmax attention with temperatures.

    Args:
        d_model: the width D.
        num_heads: H; divides ``d_model``.
        num_kv_heads: heads of keys and values; by default H.
        rotary: whether queries and keys are turned by their position.
        causal: whether a token sees itself and those before it only.
        query_temp: whether queries have a temperature by their token.
        value_temp: whether values have a gain.
        key_temp: whether keys have a gain too.
        position: whether queries have a temperature by the number of keys that they see.
        share_weights: whether temperatures are read from the projected query, key or value of their head, or from the
            token by weights of their own.
        alpha: where the parameters alpha begin; -inf shuts the position's part off for good.
        bias: whether the projections have one.

    Shapes:
        (B, T, D) -> (B, T, D)

    Example:
        >>> SelectiveSelfAttention(8, num_heads=2)(torch.randn(1, 3, 8)).shape
        torch.Size([1, 3, 8])

    Raises:
        BadInput: heads do not divide the width or each other.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        rotary: bool = True,
        causal: bool = True,
        query_temp: bool = True,
        value_temp: bool = True,
        key_temp: bool = False,
        position: bool = True,
        share_weights: bool = True,
        alpha: float = 0.0,
        bias: bool = False,
    ) -> None:
        super().__init__(d_model, num_heads=num_heads, num_kv_heads=num_kv_heads, rotary=rotary, causal=causal)
        if math.isnan(alpha):
            raise BadInput(f"alpha must be a number, got {alpha}")
        if bias:
            self.qkv = nn.Linear(d_model, self.qkv.out_features)
            self.out = nn.Linear(d_model, d_model)
        self.share_weights = share_weights
        width = self.key_size if share_weights else d_model
        self.alpha = nn.Parameter(torch.full((num_heads,), alpha)) if position else None
        self.query_weight = nn.Parameter(torch.zeros(num_heads, width)) if query_temp else None
        self.key_weight = nn.Parameter(torch.zeros(self.num_kv_heads, width)) if key_temp else None
        self.value_weight = nn.Parameter(torch.zeros(self.num_kv_heads, width)) if value_temp else None

    @classmethod
    def from_attention(
        cls,
        attention: nn.Module,
        *,
        causal: bool = False,
        query_temp: bool = True,
        value_temp: bool = True,
        key_temp: bool = False,
        position: bool = False,
        alpha: float = -6.0,
    ) -> SelectiveSelfAttention:
        """Return a mixer with the weights of another attention, and temperatures to be trained.

        With ``position=False`` it computes what the other does. A position's temperature that could be trained would
        change that a little: with ``alpha`` it begins at 1 + sigmoid(alpha) log n, by default 1 + 0.0025 log n.

        Args:
            attention: an ``nn.MultiheadAttention`` of one width, or the catalogue's ``softmax-attention``.
            causal: whether the other is called with a causal mask, which torch's module does not know of itself.
            query_temp: as for the class.
            value_temp: as for the class.
            key_temp: as for the class.
            position: as for the class.
            alpha: as for the class.

        Example:
            >>> other = nn.MultiheadAttention(8, 2, batch_first=True).eval()
            >>> x = torch.randn(1, 5, 8)
            >>> mixer = SelectiveSelfAttention.from_attention(other)
            >>> torch.allclose(mixer(x), other(x, x, x)[0], atol=1e-6)
            True

        Raises:
            BadInput: ``attention`` is none of these.
        """
        softmax = registry.entry(registry.lookup("softmax-attention"))
        weights: list[tuple[Tensor | None, Tensor | None]]
        if isinstance(attention, nn.MultiheadAttention):
            if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
                raise BadInput("attention must have one width for queries, keys and values, and no extra keys")
            out = attention.out_proj
            weights = [(attention.in_proj_weight, attention.in_proj_bias), (out.weight, out.bias)]
            heads, rotary = attention.num_heads, False
        elif isinstance(softmax, type) and isinstance(attention, softmax):
            layers = [attention.get_submodule(name) for name in ("qkv", "out")]
            weights = [(layer.get_parameter("weight"), None) for layer in layers]
            heads, rotary, causal = int(attention.num_heads), bool(attention.rotary), bool(attention.causal)  # type: ignore[arg-type]
        else:
            known = "nn.MultiheadAttention or SoftmaxAttention"
            raise BadInput(f"attention must be {known}, got {type(attention).__name__}")
        first = weights[1][0]
        if first is None:
            raise BadInput("attention has no output projection")
        mixer = cls(
            len(first),
            num_heads=heads,
            rotary=rotary,
            causal=causal,
            query_temp=query_temp,
            value_temp=value_temp,
            key_temp=key_temp,
            position=position,
            alpha=alpha,
            bias=weights[0][1] is not None,
        ).to(first)
        with torch.no_grad():
            for layer, pair in zip((mixer.qkv, mixer.out), weights, strict=True):
                for name, value in zip(("weight", "bias"), pair, strict=True):
                    if value is not None:
                        layer.get_parameter(name).copy_(value)
        return mixer

    def temperatures(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, ...]:
        """Return the factors of queries, (B, T, H), keys and values, (B, T, G).

        Args:
            x: tokens, (B, T, D).
            q: their queries, (B, T, H, K), as projected.
            k: their keys, (B, T, G, K), as projected.
            v: their values, (B, T, G, K).
            visible: how many keys each token sees, (T,).
        """
        found = []
        for y, weight in ((q, self.query_weight), (k, self.key_weight), (v, self.value_weight)):
            if weight is None:
                found.append(y.new_ones(1, 1, 1))
            else:
                found.append(1 + token_temperature(y if self.share_weights else x[:, :, None], weight))
        if self.alpha is not None:
            found[0] = found[0] + (position_temperature(visible, self.alpha) - 1)
        return tuple(found)

    def heads(self, x: Tensor, before: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return tempered queries, keys and values of ``x``, (B, T, D), that stands after ``before`` other tokens."""
        counts = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        parts = torch.split(self.qkv(x), [count * self.key_size for count in counts], dim=-1)
        q, k, v = (split_heads(part, count) for part, count in zip(parts, counts, strict=True))
        place = torch.arange(before, before + x.shape[1], device=x.device)
        visible = place + 1 if self.causal else torch.full_like(place, x.shape[1])
        factors = self.temperatures(x, q, k, v, visible)
        if self.rotary:  # a factor and a turn may change places; temperatures are read from what is not turned
            q, k = turned(q, place[None]), turned(k, place[None])
        q, k, v = (y * factor[..., None].to(y.dtype) for y, factor in zip((q, k, v), factors, strict=True))
        return q, k, v

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return what plain softmax mixes of what was tempered."""
        return attend(q, k, v, causal=self.causal)


class Temperatures(nn.Module):
    """The temperatures of one attention, around plain softmax: what :func:`make_selective` puts into other models.

    Queries, keys and values come as the model compares them, so a rotated query's temperature is read from it rotated.

    Args:
        num_heads: H.
        num_kv_heads: G.
        size: K of a head.
        position: whether queries have a temperature by the number of keys that they see too.
        alpha: where alpha begins.

    Shapes:
        (B, T, H, K), (B, S, G, K), (B, S, G, V) -> (B, T, H, V)

    Example:
        >>> q, k, v = torch.randn(1, 3, 4, 2), torch.randn(1, 3, 2, 2), torch.randn(1, 3, 2, 2)
        >>> torch.allclose(Temperatures(4, 2, 2)(q, k, v, causal=True), attend(q, k, v, causal=True), atol=1e-6)
        True
    """

    def __init__(
        self, num_heads: int, num_kv_heads: int, size: int, *, position: bool = False, alpha: float = -6.0
    ) -> None:
        super().__init__()
        self.query_weight = nn.Parameter(torch.zeros(num_heads, size))
        self.value_weight = nn.Parameter(torch.zeros(num_kv_heads, size))
        self.alpha = nn.Parameter(torch.full((num_heads,), alpha)) if position else None

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Mask | Tensor | None = None,
        causal: bool = False,
        scale: float | None = None,
        training: bool = False,
    ) -> Tensor:
        """Return what softmax mixes of tempered queries and values."""
        query = 1 + token_temperature(q, self.query_weight)  # (B, T, H)
        if self.alpha is not None:
            query = query + (position_temperature(_counts(q, k, mask, causal), self.alpha) - 1)
        value = 1 + token_temperature(v, self.value_weight)
        q, v = q * query[..., None].to(q.dtype), v * value[..., None].to(v.dtype)
        return attend(q, k, v, mask=mask, causal=causal, scale=scale)


def _counts(q: Tensor, k: Tensor, mask: Mask | Tensor | None, causal: bool) -> Tensor:
    """Return how many keys each query sees, at least 1, (B, T)."""
    found = attend(
        q.new_zeros(*q.shape[:2], 1, 1),
        k.new_zeros(*k.shape[:2], 1, 1),
        k.new_ones(*k.shape[:2], 1, 1),
        transform=_ones,
        normalize=unnormalized,
        mask=mask,
        causal=causal,
    )
    return found[..., 0, 0].clamp_min(1)


def _ones(s: Tensor, rows: Rows) -> Tensor:
    return torch.ones_like(s)


def make_selective(model: nn.Module, *, position: bool = False, alpha: float = -6.0) -> list[str]:
    """Give every attention of a Hugging Face model temperatures that begin at 1, in place; return their names.

    With ``position=False`` the model computes what it did before, until the temperatures are trained.

    Args:
        model: of a kind whose attention implementation can be chosen: BERT, GPT-2, Llama, ViT and their like.
        position: as for :class:`Temperatures`.
        alpha: as for :class:`Temperatures`.

    Raises:
        BadInput: the model has no such attention.
    """
    return attach(model, lambda heads, groups, size: Temperatures(heads, groups, size, position=position, alpha=alpha))
