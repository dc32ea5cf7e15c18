"""Linear attention that forgets channel by channel, by gates that the input decides.

Paper: `Gated Linear Attention Transformers with Hardware-Efficient Training <https://arxiv.org/abs/2312.06635>`_.

Equation: ``S_t = diag(alpha_t) S_{t-1} + k_t v_t^T``, ``o_t = S_t^T q_t``, with
``alpha_t = sigmoid(W_2 W_1 x_t + b)^(1/16)``.

Departures: none.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines.recurrence.heads import HeadNorm, head_size, merge_heads, split_heads
from torchgraft.engines.recurrence.linear_mixer import LinearMixer, Tokens
from torchgraft.engines.recurrence.mixer import State

__all__ = ["CARD", "GatedLinearAttention"]

CARD = Card(
    key="gated-linear-attention",
    title="Gated linear attention",
    seed_id=27,
    authors="Yang, Wang, Shen, Panda and Kim, 2024",
    reference="https://arxiv.org/abs/2312.06635",
    family="parts/mixers",
    kind="part",
    engine=("recurrence",),
    equation="S_t = diag(alpha_t) S_{t-1} + k_t v_t^T,  o_t = S_t^T q_t,  alpha_t = sigmoid(W_2 W_1 x_t + b)^(1/16)",
    entry="GatedLinearAttention",
    capabilities=frozenset({"causal", "stateful", "linear-time", "compilable"}),
    declared={
        "parameters": "2 * d_model * int(expand_k * d_model) + 3 * d_model * int(expand_v * d_model)"
        " + gate_rank * (d_model + int(expand_k * d_model)) + int(expand_k * d_model)"
        " + int(expand_v * d_model) // num_heads"
    },
    example={"d_model": 16, "num_heads": 2, "expand_k": 0.5, "expand_v": 1.0, "gate_rank": 4},
    shapes=((2, 12, 16),),
    oracles=(
        "step, chunk and parallel form agree in float64 to 1e-9, gradients included, from any state",
        "gates of 1 make it linear attention, one constant gate a head makes it retention",
        "gates of 1e-4 over 1024 tokens give no inf or nan in the chunk form",
        "the state has the same size after any number of tokens",
    ),
    claim=Claim(
        text="Byte language model over the standard library, two layers of width 64, equal steps: against the same "
        "mixer without gates, with a fixed decay a head, and against softmax attention.",
        figure="bits a byte at least 0.02 below ungated and below fixed decay, and at most 0.05 above softmax",
    ),
    choose_when="a causal model must run in constant memory a token and the text has local structure",
    choose_instead="deltanet where facts must be overwritten or recalled exactly; softmax-attention for short contexts",
    bibtex="@inproceedings{yang2024gla, title={Gated Linear Attention Transformers with Hardware-Efficient Training}, "
    "author={Yang, Songlin and Wang, Bailin and Shen, Yikang and Panda, Rameswar and Kim, Yoon}, booktitle={ICML}, "
    "year={2024}}",
)


def gate(logits: Tensor, tau: float) -> Tensor:
    """Return the log decays ``log sigmoid(logits) / tau``, in float32 at least, near 0 for a large ``tau``."""
    return F.logsigmoid(logits.double() if logits.dtype.itemsize == 8 else logits.float()) / tau


class GatedLinearAttention(LinearMixer):
    """Gated linear attention.

    Args:
        d_model: the width D.
        num_heads: number of heads H.
        expand_k: width of all keys together, as a share of D.
        expand_v: width of all values together, as a share of D.
        gate_rank: rank of the gates' projection.
        tau: the gates are raised to 1 / tau, so a larger one forgets more slowly.

    Shapes:
        x: (B, T, D) -> (B, T, D); memory of the state: (B, H, K, V).

    Example:
        >>> import torch
        >>> mixer = GatedLinearAttention(16, num_heads=2)
        >>> x = torch.randn(1, 5, 16)
        >>> y, state = mixer.prefill(x[:, :4])
        >>> torch.allclose(mixer.step(x[:, 4], state)[0], mixer(x)[:, 4], atol=1e-5)
        True

    Raises:
        BadInput: ``num_heads`` does not divide the widths of keys and values.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 4,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate_rank: int = 16,
        tau: float = 16.0,
    ) -> None:
        keys, values = int(expand_k * d_model), int(expand_v * d_model)
        super().__init__(
            d_model,
            num_heads=num_heads,
            key_size=head_size(keys, num_heads, "expand_k * d_model"),
            value_size=head_size(values, num_heads, "expand_v * d_model"),
        )
        self.tau = tau
        self.query = nn.Linear(d_model, keys, bias=False)
        self.key = nn.Linear(d_model, keys, bias=False)
        self.value = nn.Linear(d_model, values, bias=False)
        self.decay = nn.Sequential(nn.Linear(d_model, gate_rank, bias=False), nn.Linear(gate_rank, keys))
        self.swish = nn.Linear(d_model, values, bias=False)
        self.norm = HeadNorm(self.value_size)
        self.out = nn.Linear(values, d_model, bias=False)

    def tokens(self, x: Tensor, state: State) -> tuple[Tokens, State]:  # noqa: D102
        q, k, v = (split_heads(project(x), self.num_heads) for project in (self.query, self.key, self.value))
        log_decay = split_heads(gate(self.decay(x), self.tau), self.num_heads)  # (B, T, H, K)
        return Tokens(q, k, v, log_decay=log_decay, scale=self.key_size**-0.5), {}

    def output(self, o: Tensor, x: Tensor) -> Tensor:  # noqa: D102
        y: Tensor = self.out(F.silu(self.swish(x)) * merge_heads(self.norm(o)))
        return y
