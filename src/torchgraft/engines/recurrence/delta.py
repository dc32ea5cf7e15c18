"""Mixers whose memory is corrected by the delta rule, by one step a token or by several, and their decays a head.

``S_t = (I - beta k k^T) exp(-a) S_{t-1} + beta k v^T`` where keys have norm 1: ``beta = 1`` replaces what the memory
holds for the key, ``beta = 2`` reflects the memory along it. The share ``beta`` lies between 0 and ``beta_max``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.engines.recurrence.heads import HeadNorm, ShortConvolution, head_size, merge_heads, split_heads
from torchgraft.engines.recurrence.linear import householder_recurrence
from torchgraft.engines.recurrence.linear_mixer import LinearMixer, Tokens
from torchgraft.engines.recurrence.mixer import State
from torchgraft.errors import BadInput

__all__ = ["DeltaMixer", "HeadDecay", "exact", "shares", "unit_keys"]


def exact(x: Tensor) -> Tensor:
    """Return ``x`` in float64 where it is float64, else in float32."""
    return x.double() if x.dtype == torch.float64 else x.float()


def unit_keys(x: Tensor) -> Tensor:
    """Return ``x`` at norm 1 along its last dimension, in float32 at least: the norm decides whether memory grows."""
    return F.normalize(exact(x), dim=-1, eps=1e-12)


def shares(logits: Tensor, beta_max: float) -> Tensor:
    """Return ``beta_max * sigmoid(logits)`` in float32 at least."""
    return beta_max * torch.sigmoid(exact(logits))


class HeadDecay(nn.Module):
    """Log decays a head that the input decides, ``-exp(rate) softplus(W x + offset)``, (B, T, D) -> (B, T, heads).

    The first values of ``rate`` and ``offset`` spread the decays a token from about 0.2 to 0.999.

    Args:
        d_model: D.
        heads: how many decays.
    """

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.project = nn.Linear(d_model, heads, bias=False)
        self.rate = nn.Parameter(torch.empty(heads).uniform_(1.0, 16.0).log())
        step = torch.empty(heads).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.offset = nn.Parameter(step + (-torch.expm1(-step)).log())  # softplus(offset) = step

    def forward(self, x: Tensor) -> Tensor:
        """Return log decays, at most 0."""
        step = F.softplus(exact(self.project(x)) + exact(self.offset))
        return -exact(self.rate).exp() * step


class DeltaMixer(LinearMixer):
    """Queries, keys and values by linear maps, a short convolution and SiLU; unit keys; then the delta rule.

    Args:
        d_model: the width D.
        num_heads: H.
        expand_k: width of all keys together, as a share of D.
        expand_v: width of all values together, as a share of D.
        conv: taps of the short convolution; 0 leaves it out.
        householders: delta steps N a token, each with its own key, value and share.
        beta_max: the largest share, 1 or 2.
        gated: whether the memory decays too, a head at a rate that the input decides, and the output has a SiLU gate.

    Raises:
        BadInput: ``num_heads`` does not divide the widths, or an argument is out of range.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        expand_k: float,
        expand_v: float,
        conv: int,
        householders: int,
        beta_max: float,
        gated: bool,
    ) -> None:
        keys, values = int(expand_k * d_model), int(expand_v * d_model)
        if householders < 1:
            raise BadInput(f"householders must be at least 1, got {householders}")
        if conv < 0:
            raise BadInput(f"conv must be at least 0 (none), got {conv}")
        super().__init__(
            d_model,
            num_heads=num_heads,
            key_size=head_size(keys, num_heads, "expand_k * d_model"),
            value_size=head_size(values, num_heads, "expand_v * d_model"),
        )
        self.householders, self.beta_max = householders, beta_max
        self.widths = [keys, householders * keys, householders * values]
        self.query = nn.Linear(d_model, keys, bias=False)
        self.key = nn.Linear(d_model, householders * keys, bias=False)
        self.value = nn.Linear(d_model, householders * values, bias=False)
        self.conv = ShortConvolution(sum(self.widths), conv) if conv else None
        self.beta = nn.Linear(d_model, householders * num_heads, bias=False)
        self.decay = HeadDecay(d_model, num_heads) if gated else None
        self.swish = nn.Linear(d_model, values, bias=False) if gated else None
        self.norm = HeadNorm(self.value_size)
        self.out = nn.Linear(values, d_model, bias=False)

    def init_rest(self, batch_size: int) -> State:
        """Return the last inputs of the short convolution: zeros."""
        return {} if self.conv is None else {"conv": self.conv.init_state(batch_size)}

    def tokens(self, x: Tensor, state: State) -> tuple[Tokens, State]:  # noqa: D102
        parts = torch.cat([self.query(x), self.key(x), self.value(x)], dim=-1)
        rest: State = {}
        if self.conv is None:
            parts = F.silu(parts)
        else:
            parts, last = self.conv(parts, state["conv"])
            rest["conv"] = last.to(state["conv"].dtype)
        q, k, v = torch.split(parts, self.widths, dim=-1)
        heads = self.householders * self.num_heads  # the steps of a token stand beside each other as heads
        tokens = Tokens(
            unit_keys(split_heads(q, self.num_heads)),
            unit_keys(split_heads(k, heads)),
            split_heads(v, heads),
            log_decay=None if self.decay is None else self.decay(x),
            beta=shares(self.beta(x), self.beta_max),
        )
        return tokens, rest

    def prefill(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Mix ``x``, (B, T, D), after ``state``; return the output and the state after the last token."""
        if self.householders == 1:
            return super().prefill(x, state)
        self.checked(x)
        state = self.init_state(len(x)) if state is None else state
        tokens, rest = self.tokens(x, state)
        steps = (self.householders, self.num_heads)
        o, memory = householder_recurrence(
            tokens.q,
            torch.unflatten(tokens.k, 2, steps),
            torch.unflatten(tokens.v, 2, steps),
            torch.unflatten(tokens.beta, 2, steps) if tokens.beta is not None else tokens.k.new_zeros(0),
            log_decay=tokens.log_decay,
            state=state["memory"],
            form=self.form,
            chunk=self.chunk,
        )
        return self.output(o.to(x.dtype), x), {"memory": memory, **rest}

    def output(self, o: Tensor, x: Tensor) -> Tensor:  # noqa: D102
        read = merge_heads(self.norm(o))
        y: Tensor = self.out(read if self.swish is None else F.silu(self.swish(x)) * read)
        return y
