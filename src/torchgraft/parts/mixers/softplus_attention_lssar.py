"""Attention by softplus in place of the exponential, sharpened by a power of what lies above a row's mean.

`Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models
<https://arxiv.org/abs/2501.13428>`_ (Gao, Spratling and Gionfrida, 2025), with N_i the number of keys that row i sees:

    A_ij = softplus(c log K log N_i q_i . k_j) / sum_j softplus(c log K log N_i q_i . k_j)
    o_i = sum_j B_ij / (sum_j B_ij + 1e-8) v_j,  B_ij = max(N_i A_ij - 1, 0)^15

Departures: versions of the paper differ in c and both are here: queries and keys of unit length with c = 1
(``qk_norm=True``, the mixer's default), or as they are with c = 1 / sqrt(K) (the function's). The rows that keep their
weights below the mean are those that see three keys or fewer, which in a causal sequence are the first three.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines.attention import L1, Chain, Mask, Normalize, Pair, Reweighted, Rows, Stage, attend, softplus
from torchgraft.engines.attention.mixer import AttentionMixer
from torchgraft.errors import BadInput

__all__ = ["CARD", "LogScaled", "SoftplusAttention", "attention"]

CARD = Card(
    key="softplus-attention-lssar",
    title="Length-scaled softplus attention with re-weighting (LSSAR)",
    seed_id=24,
    authors="Gao, Spratling and Gionfrida, 2025",
    reference="https://arxiv.org/abs/2501.13428",
    family="parts/mixers",
    kind="part",
    engine=("attention",),
    equation="A_ij = softplus(log K log N_i q_i . k_j) / sum_j ...;  A'_ij = max(N_i A_ij - 1, 0)^15 / sum_j ...",
    entry="SoftplusAttention",
    capabilities=frozenset({"causal", "stateful", "attention-interface"}),
    declared={"parameters": "4*d_model**2"},
    example={"d_model": 16, "num_heads": 2},
    shapes=((2, 12, 16),),
    oracles=(
        "the pipeline with exp for softplus and scale 1 / sqrt(K) is softmax attention",
        "equals both formulas written out row by row, in float64, causal, padded, bidirectional and with a cache",
        "rows of A sum to 1 with hidden weights exactly 0; a uniform row of more than three keys becomes zero, not NaN",
        "re-weighting keeps the order of weights and zeroes exactly those below the mean of their row",
        "scores of 1e4 stay finite where exponentials overflow",
    ),
    claim=Claim(
        text="Bytes of the standard library, two layers of width 96 with rotary positions, trained on 64 bytes and "
        "read 64 to 1024 at a time: LSSAR beside softmax, softmax scaled by log N, and LSSA without re-weighting.",
        figure="loss at 1024 at most 0.1 nats above that at 64, softmax's at least 0.5 above its own; at 64 within "
        "0.03 nats of softmax",
    ),
    choose_when="sequences are read that are many times longer than those in training",
    choose_instead="softmax-attention where lengths stay as trained, or fused kernels matter",
    confidence="medium",
    bibtex="""@article{gao2025softplus,
  title={Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models},
  author={Gao, Bo and Spratling, Michael W. and Gionfrida, Letizia},
  journal={arXiv preprint arXiv:2501.13428},
  year={2025}
}""",
)


@dataclass(frozen=True, eq=False)
class LogScaled(Stage):
    """s_ij -> log K log N_i s_ij, which keeps the entropy of a row from growing with the number of its keys.

    Args:
        size: K, at least 2: the logarithm of 1 is 0.
    """

    size: int

    def __call__(self, s: Tensor, rows: Rows) -> Tensor:
        """Return the scaled scores."""
        factor = rows.visible().clamp_min(1).to(s.dtype).log() * math.log(self.size)
        return s.mul_(factor) if rows.overwrite else s * factor

    def of_pair(self, s: Tensor, at: Pair) -> Tensor:
        """Return the scaled score of one pair."""
        return s * at.visible().clamp_min(1).to(s.dtype).log() * math.log(self.size)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    training: bool = False,
    reweight: bool = True,
    power: float = 15.0,
    offset: float = 1.0,
    qk_norm: bool = False,
) -> Tensor:
    """Return what softplus weights mix.

    Args:
        q: queries.
        k: keys.
        v: values.
        mask: who sees whom.
        causal: whether a query sees keys up to its own position only.
        scale: c; by default 1 / sqrt(K), or 1 with ``qk_norm``.
        training: makes no difference.
        reweight: whether weights are sharpened (LSSAR) or left as they are (LSSA).
        power: p; where a model was trained without re-weighting, a smaller one.
        offset: what is taken from N_i A_ij; 1 leaves what is above the mean of the row.
        qk_norm: whether queries and keys are brought to unit length.

    Shapes:
        (B, T, H, K), (B, S, G, K), (B, S, G, V) -> (B, T, H, V), K at least 2

    Example:
        >>> import torch
        >>> q, v = torch.zeros(1, 5, 1, 4), torch.ones(1, 5, 1, 1)
        >>> attention(q, q, v, causal=True).flatten().tolist()  # no key stands out: nothing is mixed from the fourth on
        [1.0, 1.0, 1.0, 0.0, 0.0]

    Raises:
        BadInput: K is 1, or ``power`` or ``offset`` is out of range.
    """
    if q.shape[-1] < 2:
        raise BadInput(f"softplus attention scales by log K and needs K of at least 2, got {q.shape[-1]}")
    if not power > 0 or not 0 <= offset < math.inf:
        raise BadInput(f"power must be positive and offset at least 0, got power={power} and offset={offset}")
    if qk_norm:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        scale = 1.0 if scale is None else scale
    plain = L1(signed=False)
    normalize: Normalize = Reweighted(plain, power=power, offset=offset) if reweight else plain
    transform = Chain((LogScaled(q.shape[-1]), softplus))
    return attend(q, k, v, transform=transform, normalize=normalize, mask=mask, causal=causal, scale=scale)


class SoftplusAttention(AttentionMixer):
    """Multi-head attention with softplus weights, by default re-weighted.

    A row without a weight of note, all of them near 1 / N_i, gives nearly nothing; early in training most rows are so,
    and the learning rate should rise slowly.

    Args:
        d_model: the width D.
        num_heads: H; divides ``d_model`` into heads of two channels or more.
        num_kv_heads: heads of keys and values; by default H.
        rotary: whether queries and keys are turned by their position.
        causal: whether a token sees itself and those before it only.
        reweight: whether weights are sharpened; may be changed after training.
        power: p; may be changed after training.
        offset: what is taken from N_i A_ij before the power.
        qk_norm: whether queries and keys are brought to unit length, or scaled by 1 / sqrt(K).

    Shapes:
        (B, T, D) -> (B, T, D)

    Example:
        >>> import torch
        >>> SoftplusAttention(8, num_heads=2)(torch.randn(1, 3, 8)).shape
        torch.Size([1, 3, 8])

    Raises:
        BadInput: heads do not divide the width or have one channel, or ``power`` or ``offset`` is out of range.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        rotary: bool = True,
        causal: bool = True,
        reweight: bool = True,
        power: float = 15.0,
        offset: float = 1.0,
        qk_norm: bool = True,
    ) -> None:
        super().__init__(d_model, num_heads=num_heads, num_kv_heads=num_kv_heads, rotary=rotary, causal=causal)
        if self.key_size < 2 or not power > 0 or not 0 <= offset < math.inf:
            raise BadInput(
                "softplus attention needs d_model / num_heads >= 2, power > 0 and offset >= 0, got "
                f"{self.key_size}, {power} and {offset}"
            )
        self.reweight, self.power, self.offset, self.qk_norm = reweight, power, offset, qk_norm

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return what softplus weights mix."""
        return attention(
            q,
            k,
            v,
            causal=self.causal,
            reweight=self.reweight,
            power=self.power,
            offset=self.offset,
            qk_norm=self.qk_norm,
        )
