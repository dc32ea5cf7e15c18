"""Attention whose weights are sigmoids of scores, each pair by itself, with no sum over the row.

`Theory, Analysis, and Best Practices for Sigmoid Self-Attention <https://arxiv.org/abs/2409.04431>`_ (Ramapuram et
al., 2025): o_i = sum_j sigmoid(q_i . k_j / sqrt(K) + b) v_j, b = -log n: a row of zeros has the sum n / (n + 1).

Departures: n is by default the number of keys that the row sees, which needs no change where sequences are longer than
in training; the paper's fixed n is ``tokens=n``. LayerScale belongs to the block and is not here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines.attention import Mask, Rows, Transform, attend, pointwise, sigmoid, unnormalized
from torchgraft.engines.attention.mixer import AttentionMixer
from torchgraft.errors import BadInput

__all__ = ["CARD", "SigmoidAttention", "attention", "log_count_sigmoid"]

CARD = Card(
    key="sigmoid-attention",
    title="Sigmoid self-attention",
    seed_id=47,
    authors="Ramapuram et al., 2025",
    reference="https://arxiv.org/abs/2409.04431",
    family="parts/mixers",
    kind="part",
    engine=("attention",),
    equation="o_i = sum_j sigmoid(q_i . k_j / sqrt(K) + b) v_j,  b = -log n",
    entry="SigmoidAttention",
    capabilities=frozenset({"causal", "stateful", "attention-interface"}),
    declared={"parameters": "4*d_model**2"},
    example={"d_model": 16, "num_heads": 2},
    shapes=((2, 12, 16),),
    oracles=(
        "equals sigmoid(QK^T / sqrt(K) + b) V written out, outputs and gradients, in float64",
        "with one bias, the outputs over two stretches of keys add up to the output over both",
        "zero queries give rows of sum n / (n + 1)",
        "the derivative of a weight by its score is P (1 - P), at most 1/4",
        "rows divided by their sum tend to softmax as b tends to minus infinity",
    ),
    claim=Claim(
        text="Bytes of the standard library, two layers of width 96: validation loss of softmax attention and of "
        "sigmoid attention with b = -log n and b = 0; and the size of the attention's first output.",
        figure="b = -log n within 0.02 nats a byte of softmax; b = 0 worse than b = -log n by 0.1 nats, or its first "
        "output at least 10 times as large",
    ),
    choose_when="rows must not be forced to spend a mass of one: no sink tokens, weights independent of other keys",
    choose_instead="softmax-attention where a head must pick one key sharply, or where fused kernels matter most",
    bibtex="""@inproceedings{ramapuram2025theory,
  title={Theory, Analysis, and Best Practices for Sigmoid Self-Attention},
  author={Ramapuram, Jason and Danieli, Federico and Dhekane, Eeshan and Weers, Floris and Busbridge, Dan and
    Ablin, Pierre and Likhomanenko, Tatiana and Digani, Jagrit and Gu, Zijin and Shidani, Amitis and Webb, Russ},
  booktitle={International Conference on Learning Representations},
  year={2025}
}""",
)


@pointwise
def log_count_sigmoid(s: Tensor, rows: Rows) -> Tensor:
    """Return sigmoid(s - log n), n the number of keys that the row sees: scores -> unnormalised weights."""
    bias = rows.visible().clamp_min(1).to(s.dtype).log()
    return sigmoid(s.sub_(bias) if rows.overwrite else s - bias, rows)


def _fixed(bias: float) -> Transform:
    def shifted(s: Tensor, rows: Rows) -> Tensor:
        return sigmoid(s.add_(bias) if rows.overwrite else s + bias, rows)

    return shifted


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    training: bool = False,
    bias: float | None = None,
) -> Tensor:
    """Return what sigmoid weights mix.

    Args:
        q: queries.
        k: keys.
        v: values.
        mask: who sees whom.
        causal: whether a query sees keys up to its own position only.
        scale: by default 1 / sqrt(K).
        training: makes no difference.
        bias: b; by default -log n for the n keys that a row sees.

    Shapes:
        (B, T, H, K), (B, S, G, K), (B, S, G, V) -> (B, T, H, V)

    Example:
        >>> q, v = torch.zeros(1, 3, 1, 4), torch.ones(1, 3, 1, 1)
        >>> attention(q, q, v).flatten()
        tensor([0.7500, 0.7500, 0.7500])
    """
    transform = log_count_sigmoid if bias is None else _fixed(bias)
    return attend(q, k, v, transform=transform, normalize=unnormalized, mask=mask, causal=causal, scale=scale)


class SigmoidAttention(AttentionMixer):
    """Multi-head attention with sigmoid weights.

    Args:
        d_model: the width D.
        num_heads: H; divides ``d_model``.
        num_kv_heads: heads of keys and values; by default H.
        rotary: whether queries and keys are turned by their position.
        causal: whether a token sees itself and those before it only.
        bias: b, or ``None`` for -log n.
        tokens: a fixed n for the bias, such as the context of the training; by default the keys that a row sees.
        qk_norm: whether queries and keys are normalised, each head by its root mean square, before they are compared.

    Shapes:
        (B, T, D) -> (B, T, D)

    Example:
        >>> SigmoidAttention(8, num_heads=2)(torch.randn(1, 3, 8)).shape
        torch.Size([1, 3, 8])

    Raises:
        BadInput: heads do not divide the width, both ``bias`` and ``tokens`` are given, or ``tokens`` is not positive.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        rotary: bool = True,
        causal: bool = True,
        bias: float | None = None,
        tokens: int | None = None,
        qk_norm: bool = False,
    ) -> None:
        super().__init__(d_model, num_heads=num_heads, num_kv_heads=num_kv_heads, rotary=rotary, causal=causal)
        if tokens is not None and (tokens < 1 or bias is not None):
            raise BadInput(f"tokens must be at least 1 and excludes bias, got tokens={tokens} and bias={bias}")
        self.bias = -math.log(tokens) if tokens is not None else bias
        self.scales = nn.Parameter(torch.ones(2, self.key_size)) if qk_norm else None

    def shape(self, q: Tensor, k: Tensor, v: Tensor, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries and keys, normalised where the mixer does so, and values."""
        if self.scales is None:
            return q, k, v
        size = (self.key_size,)
        return F.rms_norm(q, size, self.scales[0]), F.rms_norm(k, size, self.scales[1]), v

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return what sigmoid weights mix."""
        return attention(q, k, v, causal=self.causal, bias=self.bias)
