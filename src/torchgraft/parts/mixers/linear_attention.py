"""Linear attention in which every token sees every other, without an order: the baseline of its family.

Paper: `Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention
<https://arxiv.org/abs/2006.16236>`_.

Equation: ``o_i = phi(q_i)^T sum_j phi(k_j) v_j^T / (phi(q_i) . sum_j phi(k_j))`` with ``phi(x) = elu(x) + 1``.

Departures: the causal form of the paper is left to the gated mixers, which contain it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.catalogue import Card
from torchgraft.engines.linearize.kernel import normalized_linear, wide
from torchgraft.engines.recurrence.heads import head_size, merge_heads, split_heads
from torchgraft.engines.recurrence.mixer import Mixer

__all__ = ["CARD", "LinearAttention"]

CARD = Card(
    key="linear-attention",
    title="Linear attention",
    authors="Katharopoulos, Vyas, Pappas and Fleuret, 2020",
    reference="https://arxiv.org/abs/2006.16236",
    family="parts/mixers",
    kind="part",
    engine=("recurrence",),
    equation="o_i = phi(q_i)^T sum_j phi(k_j) v_j^T / (phi(q_i) . sum_j phi(k_j)),  phi(x) = elu(x) + 1",
    entry="LinearAttention",
    capabilities=frozenset({"linear-time", "permutation-equivariant"}),
    declared={"parameters": "4*d_model**2"},
    example={"d_model": 16, "num_heads": 2},
    shapes=((2, 12, 16),),
    oracles=(
        "equals the explicit matrix of weights, whose rows are positive and sum to 1, in float64",
        "a permutation of the tokens permutes the outputs",
    ),
    choose_when="tokens are a set, or positions are given otherwise, and there are too many for softmax attention",
    choose_instead="gated-linear-attention where tokens have an order; inline-attention for images",
    bibtex="@inproceedings{katharopoulos2020linear, title={Transformers are {RNN}s: Fast Autoregressive Transformers "
    "with Linear Attention}, author={Katharopoulos, Angelos and Vyas, Apoorv and Pappas, Nikolaos and Fleuret, "
    "Fran{\\c c}ois}, booktitle={ICML}, year={2020}}",
)


def feature(x: Tensor) -> Tensor:
    """Return ``elu(x) + 1``, positive, in float32 at least."""
    return F.elu(wide(x)) + 1


class LinearAttention(Mixer):
    """Multi-head linear attention of every token to every token.

    Args:
        d_model: the width D.
        num_heads: number of heads H.

    Shapes:
        x: (B, T, D) -> (B, T, D)

    Example:
        >>> LinearAttention(8, num_heads=2)(torch.randn(1, 5, 8)).shape
        torch.Size([1, 5, 8])

    Raises:
        BadInput: ``num_heads`` does not divide ``d_model``.
    """

    causal = False

    def __init__(self, d_model: int, *, num_heads: int = 4) -> None:
        super().__init__(d_model)
        head_size(d_model, num_heads)
        self.num_heads = num_heads
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.key = nn.Linear(d_model, d_model, bias=False)
        self.value = nn.Linear(d_model, d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mix ``x``, (B, T, D) -> (B, T, D)."""
        self.checked(x)
        q, k, v = (split_heads(project(x), self.num_heads) for project in (self.query, self.key, self.value))
        with torch.autocast(x.device.type if torch.amp.is_autocast_available(x.device.type) else "cpu", enabled=False):
            mixed, _ = normalized_linear(feature(q), feature(k), v, causal=False)
        y: Tensor = self.out(merge_heads(mixed.to(x.dtype)))
        return y
