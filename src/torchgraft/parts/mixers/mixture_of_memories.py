"""Several memories beside each other, of which each token writes and reads a few that a router chooses.

Paper: `MoM: Linear Sequence Modeling with Mixture-of-Memories <https://arxiv.org/abs/2502.13685>`_.

Equation: ``S_t^m = A_t^m S_{t-1}^m + k_t^m (v_t^m)^T`` for the chosen ``m``, else ``S_t^m = S_{t-1}^m``;
``o_t = (S_t^shared + sum_m g_t^m S_t^m)^T q_t`` with ``g_t`` the chosen of ``softmax(W_g x_t)``, of sum 1.

A token that is not for a memory writes nothing (its key, or its share of the delta rule, is 0) and lets nothing decay
(log decay 0), and so leaves it exactly as it was: all memories run as heads of one recurrence over all tokens. That
costs (M + 1) / (k + 1) times the recurrence and the projections of sorting the tokens by memory first (5/3 at M = 4,
k = 2), and needs neither sorting nor padding, has fixed shapes for ``torch.compile``, and one state for single steps.

Departures:
    - The short convolution runs over all tokens before they are routed, not over the tokens of one memory; with
      ``conv=0`` a memory sees its own tokens only.
    - The auxiliary loss is a method to be added to one's own objective, ``coef * mixer.balance_loss(x)``, and not part
      of the forward pass.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines.recurrence.delta import HeadDecay, exact, shares, unit_keys
from torchgraft.engines.recurrence.heads import HeadNorm, ShortConvolution, head_size, merge_heads, split_heads
from torchgraft.engines.recurrence.linear_mixer import LinearMixer, Tokens
from torchgraft.engines.recurrence.mixer import State
from torchgraft.errors import BadInput, nearest

__all__ = ["CARD", "MixtureOfMemories", "balance"]

CARD = Card(
    key="mixture-of-memories",
    title="Mixture of memories",
    seed_id=254,
    authors="Du, Sun, Lan, Hu and Cheng, 2025",
    reference="https://arxiv.org/abs/2502.13685",
    family="parts/mixers",
    kind="part",
    engine=("recurrence",),
    equation="S_t^m = A_t^m S_{t-1}^m + k_t^m (v_t^m)^T for the chosen m,  o_t = (S^shared + sum_m g_t^m S_t^m)^T q_t",
    entry="MixtureOfMemories",
    capabilities=frozenset({"causal", "stateful", "linear-time", "compilable"}),
    declared={
        "parameters": "(int(expand_k * d_model) * (2 + num_memories)"
        " + int(expand_v * d_model) * (1 + num_memories)) * (d_model + conv)"
        " + d_model * num_memories + 2 * (d_model + 1) * num_heads * (1 + num_memories)"
        " + 2 * int(expand_v * d_model) * d_model + int(expand_v * d_model) // num_heads"
    },
    example={"d_model": 16, "num_heads": 2, "num_memories": 4, "expand_k": 1.0, "expand_v": 1.0, "conv": 4},
    shapes=((2, 12, 16),),
    oracles=(
        "one memory, always chosen and not shared, is the mixer of its rule exactly",
        "each memory holds what the rule makes of the tokens routed to it, by themselves (1e-9)",
        "another token for memory a leaves every other memory bit for bit as it was",
        "equals a loop over tokens and memories; weights sum to 1; the balance loss is 1 where routing is uniform",
    ),
    claim=Claim(
        text="Recall of 32 key-value pairs in 96 tokens, two layers of width 64, states of 16 x 16: four memories, "
        "two chosen, and a shared one, against one memory of that size and one of equal total size.",
        figure="accuracy at least 0.10 above one memory and at least that of equal total size less 0.02, means over "
        "seeds; no memory receives less than 5 % of the tokens",
    ),
    choose_when="one memory of constant size is too small for what must be recalled, and a larger one too slow",
    choose_instead="deltanet where one memory is large enough: the same state in one piece costs less",
    bibtex="@article{du2025mom, title={MoM: Linear Sequence Modeling with Mixture-of-Memories}, author={Du, Jusen and "
    "Sun, Weigao and Lan, Disen and Hu, Jiaxi and Cheng, Yu}, journal={arXiv:2502.13685}, year={2025}}",
)

Rule = Literal["linear", "gla", "delta", "gated-delta"]
RULES: tuple[Rule, ...] = ("linear", "gla", "delta", "gated-delta")
_TAU = 16.0  # gated linear attention raises its gates to 1 / 16


def balance(probability: Tensor, chosen: Tensor) -> Tensor:
    """Return ``M sum_m f_m p_m``: 1 where routing is uniform, up to M where one memory gets everything.

    Args:
        probability: of every memory for every token.
        chosen: which memories each token goes to.

    Shapes:
        probability, chosen: (B, T, M) -> scalar
    """
    share = chosen.to(probability.dtype).flatten(0, 1).mean(0)  # f_m, before it is scaled to sum 1
    return len(share) * (share / share.sum() * probability.flatten(0, 1).mean(0)).sum()


class MixtureOfMemories(LinearMixer):
    """A router, M memories with keys and values of their own, and a memory that every token uses.

    Args:
        d_model: the width D.
        num_heads: number of heads H of each memory.
        num_memories: M, without the shared one.
        topk: how many of them a token uses.
        shared: whether there is a memory that every token uses, with weight 1.
        rule: how a memory is written: ``"linear"`` adds, ``"gla"`` decays by channel first, ``"delta"`` corrects,
            ``"gated-delta"`` decays by head and corrects.
        expand_k: width of all keys of a memory together, as a share of D.
        expand_v: width of all values of a memory together, as a share of D.
        conv: taps of the short convolution; 0 leaves it out.

    Shapes:
        x: (B, T, D) -> (B, T, D); memory of the state: (B, memories * H, K, V), the shared one first.

    Example:
        >>> import torch
        >>> mixer = MixtureOfMemories(16, num_heads=2, num_memories=4)
        >>> x = torch.randn(1, 5, 16)
        >>> y, state = mixer.prefill(x[:, :4])
        >>> torch.allclose(mixer.step(x[:, 4], state)[0], mixer(x)[:, 4], atol=1e-5)
        True
        >>> round(float(mixer.load(x).sum()), 5)
        1.0

    Raises:
        BadInput: ``num_heads`` does not divide the widths, ``topk`` is not in [1, M], or the rule is unknown.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 4,
        num_memories: int = 4,
        topk: int = 2,
        shared: bool = True,
        rule: Rule = "gated-delta",
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        conv: int = 4,
    ) -> None:
        if rule not in RULES:
            raise BadInput(f"rule must be one of {RULES}, got {rule!r}{nearest(rule, list(RULES))}")
        if not 1 <= topk <= num_memories:
            raise BadInput(f"topk must be in [1, num_memories = {num_memories}], got {topk}")
        if conv < 0:
            raise BadInput(f"conv must be at least 0 (none), got {conv}")
        keys, values = int(expand_k * d_model), int(expand_v * d_model)
        self.each = num_memories + shared
        super().__init__(
            d_model,
            num_heads=num_heads * self.each,
            key_size=head_size(keys, num_heads, "expand_k * d_model"),
            value_size=head_size(values, num_heads, "expand_v * d_model"),
        )
        self.of_memory, self.num_memories, self.topk, self.shared, self.rule = (
            num_heads,
            num_memories,
            topk,
            shared,
            rule,
        )
        self.widths = [keys, self.each * keys, self.each * values]
        self.router = nn.Linear(d_model, num_memories, bias=False)
        self.query = nn.Linear(d_model, keys, bias=False)
        self.key = nn.Linear(d_model, self.each * keys, bias=False)
        self.value = nn.Linear(d_model, self.each * values, bias=False)
        self.conv = ShortConvolution(sum(self.widths), conv) if conv else None
        self.corrects = rule in ("delta", "gated-delta")
        self.beta = nn.Linear(d_model, self.num_heads, bias=False) if self.corrects else None
        self.decay: nn.Module | None = None
        if rule == "gla":
            self.decay = nn.Linear(d_model, self.each * keys)
        elif rule == "gated-delta":
            self.decay = HeadDecay(d_model, self.num_heads)
        self.swish = nn.Linear(d_model, values, bias=False)
        self.norm = HeadNorm(self.value_size)
        self.out = nn.Linear(values, d_model, bias=False)

    def init_rest(self, batch_size: int) -> State:
        """Return the last inputs of the short convolution: zeros."""
        return {} if self.conv is None else {"conv": self.conv.init_state(batch_size)}

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return probabilities, weights (0 where a memory is not chosen) and choices, (B, T, D) -> (B, T, M) each."""
        # Not by a matrix product, which autocast would round: a choice has no tolerance.
        probability = (exact(x)[..., None, :] * exact(self.router.weight)).sum(dim=-1).softmax(dim=-1)
        best = probability.topk(self.topk, dim=-1).indices  # (B, T, topk)
        chosen = (best[..., None] == torch.arange(self.num_memories, device=x.device)).any(dim=-2)
        weight = probability * chosen
        return probability, weight / weight.sum(dim=-1, keepdim=True), chosen

    def tokens(self, x: Tensor, state: State) -> tuple[Tokens, State]:  # noqa: D102
        chosen = self.route(x)[2]
        active = F.pad(chosen, (1, 0), value=True) if self.shared else chosen  # (B, T, memories)
        parts = torch.cat([self.query(x), self.key(x), self.value(x)], dim=-1)
        rest: State = {}
        if self.conv is not None:
            parts, last = self.conv(parts, state["conv"])
            rest["conv"] = last.to(state["conv"].dtype)
        elif self.corrects:
            parts = F.silu(parts)
        q, k, v = torch.split(parts, self.widths, dim=-1)
        q, k, v = split_heads(q, self.of_memory), split_heads(k, self.num_heads), split_heads(v, self.num_heads)
        if self.corrects:
            q, k = unit_keys(q), unit_keys(k)
        here = active.repeat_interleave(self.of_memory, dim=-1)  # (B, T, memories * H)
        beta: Tensor | None = None
        if self.beta is None:
            k = k * here[..., None]
        else:
            beta = shares(self.beta(x), 1.0) * here
        decay: Tensor | None = None
        if isinstance(self.decay, HeadDecay):
            decay = self.decay(x) * here
        elif self.decay is not None:
            decay = split_heads(F.logsigmoid(exact(self.decay(x))) / _TAU, self.num_heads) * here[..., None]
        tokens = Tokens(
            q.repeat(1, 1, self.each, 1),
            k,
            v,
            log_decay=decay,
            beta=beta,
            scale=1.0 if self.corrects else self.key_size**-0.5,
        )
        return tokens, rest

    def output(self, o: Tensor, x: Tensor) -> Tensor:  # noqa: D102
        weight = self.route(x)[1].to(o.dtype)
        weight = F.pad(weight, (1, 0), value=1.0) if self.shared else weight
        read = (weight[..., None, None] * torch.unflatten(o, 2, (self.each, self.of_memory))).sum(dim=2)  # (B, T, H, V)
        y: Tensor = self.out(F.silu(self.swish(x)) * merge_heads(self.norm(read)))
        return y

    def balance_loss(self, x: Tensor) -> Tensor:
        """Return the load-balancing loss of the router on ``x``, (B, T, D): 1 where routing is uniform."""
        probability, _, chosen = self.route(self.checked(x))
        return balance(probability, chosen)

    @torch.no_grad()
    def load(self, x: Tensor) -> Tensor:
        """Return the share of the choices that each memory received on ``x``, (B, T, D) -> (M,), of sum 1."""
        counts = self.route(self.checked(x))[2].flatten(0, 1).double().sum(0)
        return counts / counts.sum()
