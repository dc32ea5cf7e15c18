"""Causal softmax attention with rotary positions and a key-value cache: what every linear-time mixer is held against.

Vaswani et al., 2017, [Attention is all you need](https://arxiv.org/abs/1706.03762), with the rotary positions of
[RoFormer](https://arxiv.org/abs/2104.09864).

    o_t = sum_{s <= t} softmax_s(R_t q_t . R_s k_s / sqrt(K)) v_s

Departures: no dropout and no biases.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.catalogue.card import Card
from torchgraft.engines.recurrence.distance import rotary
from torchgraft.engines.recurrence.heads import head_size, merge_heads, split_heads
from torchgraft.engines.recurrence.mixer import State, StatefulMixer
from torchgraft.errors import BadInput

__all__ = ["CARD", "SoftmaxAttention"]

CARD = Card(
    key="softmax-attention",
    title="Causal softmax attention",
    authors="Vaswani et al., 2017",
    reference="https://arxiv.org/abs/1706.03762",
    family="parts/mixers",
    kind="part",
    engine=("none",),
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


class SoftmaxAttention(StatefulMixer):
    """Multi-head causal attention whose state, the keys and values so far, grows with every token.

    Args:
        d_model: the width D.
        num_heads: H; divides ``d_model``.
        rotary: whether queries and keys are turned by their position; without it the order of the tokens before the
            current one does not count.

    Shapes:
        (B, T, D) -> (B, T, D)

    Example:
        >>> mixer = SoftmaxAttention(8, num_heads=2)
        >>> y, state = mixer.prefill(torch.randn(1, 3, 8))
        >>> y.shape, state["k"].shape
        (torch.Size([1, 3, 8]), torch.Size([1, 3, 2, 4]))

    Raises:
        BadInput: ``num_heads`` does not divide ``d_model``, or heads of odd size shall be rotated.
    """

    def __init__(self, d_model: int, *, num_heads: int = 4, rotary: bool = True) -> None:
        super().__init__(d_model)
        size = head_size(d_model, num_heads)
        if rotary and size % 2:
            raise BadInput(f"rotary needs an even head size, got d_model / num_heads = {size}")
        self.num_heads, self.rotary = num_heads, rotary
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def init_state(self, batch_size: int) -> State:
        """Return a cache of no tokens."""
        empty = self.out.weight.new_zeros(batch_size, 0, self.num_heads, self.d_model // self.num_heads)
        return {"k": empty, "v": empty.clone()}

    def prefill(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Attend from ``x``, (B, T, D), to what is cached and to itself; return the output and the longer cache."""
        self.checked(x)
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))  # (B, T, H, K)
        before = 0 if state is None else state["k"].shape[1]
        if self.rotary:
            place = torch.arange(before, before + x.shape[1], device=x.device)[None]
            q, k = rotary(q, place), rotary(k, place)
        if state is not None:
            k, v = torch.cat([state["k"].to(k.dtype), k], dim=1), torch.cat([state["v"].to(v.dtype), v], dim=1)
        mask = None
        if before and x.shape[1] > 1:
            mask = torch.ones(x.shape[1], k.shape[1], dtype=torch.bool, device=x.device).tril(before)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=not before
        )
        mixed: Tensor = self.out(merge_heads(y.transpose(1, 2)))
        return mixed, {"k": k, "v": v}
