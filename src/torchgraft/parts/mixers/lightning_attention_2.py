"""Linear attention with one fixed decay a head, in tiles: the same number of tokens a second at any length.

Paper: `Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models
<https://arxiv.org/abs/2401.04658>`_.

Equation: ``O = [(Q K^T) (.) M] V`` with ``M_ts = lambda^(t-s)`` for s <= t and 0 else; over blocks of C tokens,
``O_i = [(Q_i K_i^T) (.) M] V_i + Lambda Q_i KV_{i-1}`` and
``KV_i = lambda^C KV_{i-1} + (lambda^C Lambda^-1 K_i)^T V_i``.

Departures: the tiles and the backward pass over them are those of the recurrence engine, so the block is a power of two
(a ragged last block is padded inside). The rates ``2^(-8h/H)`` are used for every H, where the authors interpolate if H
is no power of two. The mixer around the operator (SiLU on queries and keys, a norm on the output) is that of their
language models, without the gate.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines.recurrence.distance import slopes
from torchgraft.engines.recurrence.heads import HeadNorm, head_size, merge_heads, split_heads
from torchgraft.engines.recurrence.linear import linear_recurrence
from torchgraft.engines.recurrence.linear_mixer import LinearMixer, Tokens
from torchgraft.engines.recurrence.mixer import State

__all__ = ["CARD", "LightningAttention", "lightning_attention", "slopes"]

CARD = Card(
    key="lightning-attention-2",
    title="Lightning Attention-2",
    seed_id=261,
    authors="Qin, Sun, Li, Shen, Sun and Zhong, 2024",
    reference="https://arxiv.org/abs/2401.04658",
    family="parts/mixers",
    kind="part",
    engine=("recurrence",),
    equation="O = [(Q K^T) (.) M] V,  M_ts = lambda^(t-s) for s <= t",
    entry="LightningAttention",
    capabilities=frozenset({"causal", "stateful", "linear-time", "compilable"}),
    declared={"parameters": "4 * d_model**2"},
    example={"d_model": 16, "num_heads": 2},
    shapes=((2, 12, 16),),
    oracles=(
        "every block size, ragged tails included, equals the masked quadratic form to 1e-10 in float64, decay 1 too",
        "the backward pass over blocks passes gradcheck and equals autograd of the quadratic form",
        "two halves with the state carried over equal one run, bit for bit where the cut is at a block",
        "rates are 2^(-8h/H), h = 1 to H",
    ),
    claim=Claim(
        text="The operator's forward pass on the CPU, four heads of 64, 512 to 8192 tokens: tokens a second beside "
        "softmax attention, the token-by-token loop and, up to 2048 tokens, the quadratic form.",
        figure="tokens/s vary < 25% from 1k to 8k tokens, >= 3x softmax and >= 5x the token loop at 8k",
    ),
    choose_when="long sequences, a fixed forgetting rate is enough, and training speed must not fall with length",
    choose_instead="gated-linear-attention where what to forget depends on the input; tnl-lightning for whole models",
    bibtex="@article{qin2024lightning2, title={Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence "
    "Lengths in Large Language Models}, author={Qin, Zhen and Sun, Weigao and Li, Dong and Shen, Xuyang and Sun, "
    "Weixuan and Zhong, Yiran}, journal={arXiv:2401.04658}, year={2024}}",
)


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    block: int = 64,
    *,
    state: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return causal linear attention with a fixed decay a head, by blocks, without denominator or scale.

    Args:
        q: queries.
        k: keys.
        v: values.
        log_decay: logarithm of each head's decay, at most 0; by default no decay.
        block: tokens a block, a power of two.
        state: what the blocks before left, by default nothing.
        return_state: whether to return the state after the last token too.

    Shapes:
        q, k: (B, T, H, K); v: (B, T, H, V); log_decay: (H,); state: (B, H, K, V) -> (B, T, H, V), and (B, H, K, V).

    Example:
        >>> import torch
        >>> q = k = v = torch.ones(1, 4, 1, 1)
        >>> lightning_attention(q, k, v, torch.tensor([0.5]).log(), block=2).flatten().tolist()
        [1.0, 1.5, 1.75, 1.875]

    Raises:
        BadInput: a shape is wrong or ``block`` is no power of two.
    """
    return linear_recurrence(
        q, k, v, log_decay=log_decay, state=state, return_state=return_state, form="chunk", chunk=block
    )


class LightningAttention(LinearMixer):
    """Multi-head lightning attention with fixed decays.

    Args:
        d_model: the width D.
        num_heads: number of heads H.
        block: tokens a block, a power of two.

    Shapes:
        x: (B, T, D) -> (B, T, D); memory of the state: (B, H, K, V).

    Example:
        >>> import torch
        >>> LightningAttention(8, num_heads=2)(torch.randn(1, 5, 8)).shape
        torch.Size([1, 5, 8])

    Raises:
        BadInput: ``num_heads`` does not divide ``d_model``.
    """

    def __init__(self, d_model: int, *, num_heads: int = 4, block: int = 64) -> None:
        size = head_size(d_model, num_heads)
        super().__init__(d_model, num_heads=num_heads, key_size=size, value_size=size)
        self.chunk = block
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.key = nn.Linear(d_model, d_model, bias=False)
        self.value = nn.Linear(d_model, d_model, bias=False)
        self.norm = HeadNorm(d_model, affine=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def tokens(self, x: Tensor, state: State) -> tuple[Tokens, State]:  # noqa: D102
        q, k, v = (split_heads(project(x), self.num_heads) for project in (self.query, self.key, self.value))
        return Tokens(F.silu(q), F.silu(k), v, log_decay=-slopes(self.num_heads, like=x)), {}

    def output(self, o: Tensor, x: Tensor) -> Tensor:  # noqa: D102
        y: Tensor = self.out(self.norm(merge_heads(o)))
        return y
