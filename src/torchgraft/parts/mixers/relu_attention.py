"""Attention whose weights are the positive parts of scores, over the number of keys; it may attend to nothing.

`Replacing softmax with ReLU in Vision Transformers <https://arxiv.org/abs/2309.08586>`_ (Wortsman et al., 2023):
o_i = (1 / n) sum_j max(q_i . k_j / sqrt(K), 0) v_j, n the number of keys.

Departures: n is the number of keys that the row sees.
"""

from __future__ import annotations

from torch import Tensor

from torchgraft.catalogue import Card
from torchgraft.engines.attention import Mask, Rows, attend, pointwise, relu, unnormalized
from torchgraft.engines.attention.mixer import AttentionMixer

__all__ = ["CARD", "ReluAttention", "attention", "mean_relu"]

CARD = Card(
    key="relu-attention",
    title="ReLU attention",
    authors="Wortsman et al., 2023",
    reference="https://arxiv.org/abs/2309.08586",
    family="parts/mixers",
    kind="part",
    engine=("attention",),
    equation="o_i = (1 / n) sum_j max(q_i . k_j / sqrt(K), 0) v_j",
    entry="ReluAttention",
    capabilities=frozenset({"causal", "stateful", "attention-interface"}),
    declared={"parameters": "4*d_model**2"},
    example={"d_model": 16, "num_heads": 2},
    shapes=((2, 12, 16),),
    oracles=(
        "equals max(QK^T / sqrt(K), 0) V / n written out, outputs and gradients, in float64",
        "negative scores give an output of exactly zero",
    ),
    choose_when="a head must be able to attend to nothing, as the study of sink tokens (active-dormant-heads) proposes",
    choose_instead="sigmoid-attention, whose weights have a gradient everywhere, or softmax-attention",
    bibtex="""@article{wortsman2023replacing,
  title={Replacing softmax with {ReLU} in Vision Transformers},
  author={Wortsman, Mitchell and Lee, Jaehoon and Gilmer, Justin and Kornblith, Simon},
  journal={arXiv preprint arXiv:2309.08586},
  year={2023}
}""",
)


@pointwise
def mean_relu(s: Tensor, rows: Rows) -> Tensor:
    """Return max(s, 0) / n, n the number of keys that the row sees: scores -> unnormalised weights."""
    share = rows.visible().clamp_min(1).to(s.dtype).reciprocal()
    return relu(s.mul_(share) if rows.overwrite else s * share, rows)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    training: bool = False,
) -> Tensor:
    """Return what the positive parts of scores mix.

    Args:
        q: queries.
        k: keys.
        v: values.
        mask: who sees whom.
        causal: whether a query sees keys up to its own position only.
        scale: by default 1 / sqrt(K).
        training: makes no difference.

    Shapes:
        (B, T, H, K), (B, S, G, K), (B, S, G, V) -> (B, T, H, V)
    """
    return attend(q, k, v, transform=mean_relu, normalize=unnormalized, mask=mask, causal=causal, scale=scale)


class ReluAttention(AttentionMixer):
    """Multi-head attention with weights that are positive parts of scores.

    Args:
        d_model: the width D.
        num_heads: H; divides ``d_model``.
        num_kv_heads: heads of keys and values; by default H.
        rotary: whether queries and keys are turned by their position.
        causal: whether a token sees itself and those before it only.

    Shapes:
        (B, T, D) -> (B, T, D)

    Example:
        >>> import torch
        >>> ReluAttention(8, num_heads=2)(torch.randn(1, 3, 8)).shape
        torch.Size([1, 3, 8])
    """

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return what the positive parts of scores mix."""
        return attention(q, k, v, causal=self.causal)
