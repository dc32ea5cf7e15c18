"""Causal softmax attention with rotary positions and a key-value cache: what every linear-time mixer is held against.

Vaswani et al., 2017, [Attention is all you need](https://arxiv.org/abs/1706.03762), with the rotary positions of
[RoFormer](https://arxiv.org/abs/2104.09864).

    o_t = sum_{s <= t} softmax_s(R_t q_t . R_s k_s / sqrt(K)) v_s

Departures: no dropout and no biases.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from torchgraft.catalogue.card import Card
from torchgraft.engines.attention import attend
from torchgraft.engines.attention.mixer import AttentionMixer

__all__ = ["CARD", "SoftmaxAttention"]

CARD = Card(
    key="softmax-attention",
    title="Causal softmax attention",
    authors="Vaswani et al., 2017",
    reference="https://arxiv.org/abs/1706.03762",
    family="parts/mixers",
    kind="part",
    engine=("attention",),
    equation="o_t = sum_{s <= t} softmax_s(R_t q_t . R_s k_s / sqrt(K)) v_s",
    entry="SoftmaxAttention",
    capabilities=frozenset({"causal", "stateful", "compilable"}),
    declared={"parameters": "4*d_model**2"},
    example={"d_model": 16, "num_heads": 2},
    shapes=((2, 12, 16),),
    oracles=(
        "equals softmax(QK^T / sqrt(K) + mask) V written out with matrices, in float64",
        "with rotary positions the scores depend on t - s only",
        "the state holds the key and the value of every token, so that its size is 2 T d_model",
    ),
    choose_when="Exact recall over the whole context matters more than the cost of long sequences.",
    choose_instead="A linear-time mixer where sequences are long or generation must run in constant memory.",
    bibtex="""@inproceedings{vaswani2017attention,
  title={Attention is all you need},
  author={Vaswani, Ashish and Shazeer, Noam and Parmar, Niki and Uszkoreit, Jakob and Jones, Llion and Gomez, Aidan N.
    and Kaiser, Lukasz and Polosukhin, Illia},
  booktitle={Advances in Neural Information Processing Systems},
  year={2017}
}""",
)


class SoftmaxAttention(AttentionMixer):
    """Multi-head attention whose state, the keys and values so far, grows with every token.

    Args:
        d_model: the width D.
        num_heads: H; divides ``d_model``.
        num_kv_heads: heads of keys and values, each shared by as many heads of queries; by default H.
        rotary: whether queries and keys are turned by their position; without it the order of the tokens before the
            current one does not count.
        causal: whether a token sees itself and those before it only; otherwise all see all, and there is no state.

    Shapes:
        (B, T, D) -> (B, T, D)

    Example:
        >>> import torch
        >>> mixer = SoftmaxAttention(8, num_heads=2)
        >>> y, state = mixer.prefill(torch.randn(1, 3, 8))
        >>> y.shape, state["k"].shape
        (torch.Size([1, 3, 8]), torch.Size([1, 3, 2, 4]))

    Raises:
        BadInput: ``num_heads`` does not divide ``d_model``, or heads of odd size shall be rotated.
    """

    softmax: ClassVar[bool] = True

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return what softmax weights mix."""
        return attend(q, k, v, causal=self.causal)
