"""Softmax over a window beside a gated recurrence, both from one set of projections, with no parameter of its own.

Paper: `Liger: Linearizing Large Language Models to Gated Recurrent Structures <https://arxiv.org/abs/2503.01496>`_.

Equation: ``o_t = alpha o^W_t + (1 - alpha) o^R_t``, ``o^W`` softmax attention over the last w tokens,
``o^R_t = S_t^T softmax(q_t)``, ``S_t = diag(sigmoid(g_t)^(1/16)) S_{t-1} + softmax(k_t) v_t^T``, ``g_t = k_t``.

Departures: the gates of gated slot attention (GSA) are not built; the recurrence divides by nothing, as in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines.linearize.kernel import Heads, Kernel, wide, window_attention
from torchgraft.engines.linearize.mixer import StatefulKernelMixer
from torchgraft.engines.recurrence.linear import Form, with_state
from torchgraft.engines.recurrence.mixer import State
from torchgraft.errors import BadInput

__all__ = ["CARD", "LigerAttention", "LigerKernel"]

CARD = Card(
    key="liger",
    title="Liger attention",
    seed_id=247,
    authors="Lan, Sun, Hu, Du and Cheng, 2025",
    reference="https://arxiv.org/abs/2503.01496",
    family="parts/mixers",
    kind="part",
    engine=("recurrence", "surgery"),
    equation="o_t = alpha o^W_t + (1 - alpha) S_t^T softmax(q_t),  S_t = diag(sigmoid(k_t)^(1/16)) S_{t-1} + "
    "softmax(k_t) v_t^T",
    entry="LigerAttention",
    capabilities=frozenset({"causal", "stateful", "linear-time", "compilable"}),
    declared={"parameters": "4 * d_model**2"},
    example={"d_model": 16, "num_heads": 2, "window": 8},
    shapes=((2, 12, 16),),
    oracles=(
        "no parameter is added, and the weights of softmax attention load strictly",
        "alpha = 1 and a window as long as the sequence give softmax attention, in float64 to 1e-10",
        "the window equals a masked softmax at any length, split anywhere",
        "alpha = 0 is gated linear attention on softmax features, gates from the keys",
        "the state has the same size after any number of tokens",
    ),
    claim=Claim(
        text="A two-layer softmax byte model (width 96) on the standard library, turned linear by liger, by elu + 1 "
        "and by learned features without a window, each with the same steps of LoRA on q, k and v.",
        figure="liger recovers >= 90 % of the softmax model's gain over a uniform guess, is >= 0.1 bits a byte below "
        "elu + 1, and adds 0 parameters",
    ),
    choose_when="a trained causal transformer must generate in constant memory after a short fine-tune",
    choose_instead="hedgehog for encoders, or where far tokens must be picked out exactly",
    confidence="high",
    bibtex="@article{lan2025liger, title={Liger: Linearizing Large Language Models to Gated Recurrent Structures}, "
    "author={Lan, Disen and Sun, Weigao and Hu, Jiaxi and Du, Jusen and Cheng, Yu}, journal={arXiv:2503.01496}, "
    "year={2025}}",
)


class LigerKernel(Kernel):
    """The window and the recurrence of Liger.

    Args:
        num_heads: H.
        key_size: K.
        value_size: V.
        window: tokens that softmax attention sees.
        alpha: share of the window in the output.
        gate: ``"gla"`` or ``"hgrn2"``.
    """

    sees: ClassVar[frozenset[str]] = frozenset({"causal"})

    def __init__(
        self,
        *,
        num_heads: int,
        key_size: int,
        value_size: int,
        window: int = 64,
        alpha: float = 0.5,
        gate: Literal["gla", "hgrn2"] = "gla",
    ) -> None:
        super().__init__(num_heads=num_heads, key_size=key_size, value_size=value_size)
        if window < 1 or not 0 <= alpha <= 1:
            raise BadInput(f"window must be at least 1 and alpha in [0, 1], got {window} and {alpha}")
        if gate not in ("gla", "hgrn2"):
            raise BadInput(f"gate must be 'gla' or 'hgrn2', got {gate!r}")
        self.window, self.alpha, self.gate = window, alpha, gate

    def init_state(self, batch_size: int, like: Tensor) -> State:  # noqa: D102
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        past = (batch_size, self.window - 1, self.num_heads)
        return {
            "memory": like.new_zeros((batch_size, self.num_heads, self.key_size, self.value_size), dtype=dtype),
            "keys": like.new_zeros((*past, self.key_size), dtype=dtype),
            "values": like.new_zeros((*past, self.value_size), dtype=dtype),
            "valid": like.new_zeros((batch_size, self.window - 1), dtype=dtype),
        }

    def _gated(self, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
        """Return features of queries and keys, and log decays, (B, T, H, K) each."""
        q, g = wide(heads.raw_q), wide(heads.raw_k)
        if self.gate == "gla":
            k, log_decay = g.softmax(-1), F.logsigmoid(g) / 16.0
        else:
            k, log_decay = torch.sigmoid(-g), F.logsigmoid(g)
        if heads.seen is not None:  # padding adds nothing and takes nothing away
            seen = heads.seen[..., None, None]
            k, log_decay = k * seen, log_decay * seen
        return q.softmax(-1), k, log_decay

    def advance(self, heads: Heads, state: State) -> tuple[Tensor, State]:  # noqa: D102
        past = self.window - 1
        keys = torch.cat([state["keys"].to(heads.k.dtype), heads.k], dim=1)
        values = torch.cat([state["values"].to(heads.v.dtype), heads.v], dim=1)
        there = (
            state["valid"].new_ones(heads.q.shape[:2]) if heads.seen is None else heads.seen.to(state["valid"].dtype)
        )
        valid = torch.cat([state["valid"], there], dim=1)  # (B, w - 1 + T)
        near, _ = window_attention(heads.q, keys, values, window=self.window, scale=heads.scale, valid=valid > 0)
        q, k, log_decay = self._gated(heads)
        far, memory = with_state(
            q, k, wide(heads.v), log_decay=log_decay, state=state["memory"], form=self.form, chunk=self.chunk
        )
        o = self.alpha * near + (1 - self.alpha) * far.to(near.dtype)
        last = keys.shape[1] - past
        kept = state["keys"].dtype
        return o, {
            "memory": memory,
            "keys": keys[:, last:].to(kept),
            "values": values[:, last:].to(kept),
            "valid": valid[:, last:],
        }


class LigerAttention(StatefulKernelMixer):
    """Softmax attention over a window, beside a gated recurrence of the same projections.

    Args:
        d_model: the width D.
        num_heads: H; divides ``d_model``.
        rotary: whether queries and keys of the window are turned by their position; those of the recurrence never are.
        window: tokens that softmax attention sees.
        alpha: share of the window in the output.
        gate: ``"gla"`` (decays from the keys, normaliser 16) or ``"hgrn2"`` (keys are what the decays leave).

    Shapes:
        x: (B, T, D) -> (B, T, D); memory of the state: (B, H, K, V), its window: (B, window - 1, H, K).

    Example:
        >>> mixer = LigerAttention(16, num_heads=2, window=4)
        >>> x = torch.randn(1, 9, 16)
        >>> y, state = mixer.prefill(x[:, :8])
        >>> torch.allclose(mixer.step(x[:, 8], state)[0], mixer(x)[:, 8], atol=1e-5)
        True

    Raises:
        BadInput: ``num_heads`` does not divide ``d_model``, or an option is out of range.
    """

    tune: ClassVar[str] = "lora"
    mimics: ClassVar[bool] = False

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 4,
        rotary: bool = True,
        window: int = 64,
        alpha: float = 0.5,
        gate: Literal["gla", "hgrn2"] = "gla",
    ) -> None:
        options = {"window": window, "alpha": alpha, "gate": gate}
        super().__init__(d_model, num_heads=num_heads, rotary=rotary, options=options)

    @classmethod
    def build_kernel(  # noqa: D102
        cls, *, num_heads: int, key_size: int, value_size: int, options: Mapping[str, Any], image: bool = False
    ) -> LigerKernel:
        return LigerKernel(num_heads=num_heads, key_size=key_size, value_size=value_size, **options)

    @property
    def form(self) -> Form:
        """In which form the recurrence runs; the numbers are the same."""
        return self.kernel.form

    @form.setter
    def form(self, value: Form) -> None:
        self.kernel.form = value
