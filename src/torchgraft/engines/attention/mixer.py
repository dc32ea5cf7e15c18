"""A mixer around an attention: projections, rotary positions, groups of queries, and a cache of keys and values."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from torchgraft.engines.recurrence.distance import rotary
from torchgraft.engines.recurrence.heads import head_size, merge_heads, split_heads
from torchgraft.engines.recurrence.mixer import State, StatefulMixer
from torchgraft.errors import BadInput

__all__ = ["AttentionMixer"]


class AttentionMixer(StatefulMixer):
    """Multi-head attention of which a method says how queries, keys and values are mixed: :meth:`mix`.

    A method with parameters of its own for queries, keys or values defines :meth:`shape` too.

    Args:
        d_model: the width D.
        num_heads: H; divides ``d_model``.
        num_kv_heads: G, heads of keys and values, each shared by H / G heads of queries; by default H.
        rotary: whether queries and keys are turned by their position.
        causal: whether a token sees itself and those before it only; otherwise all see all, and there is no state.

    Raises:
        BadInput: heads do not divide the width or each other, or heads of odd size shall be rotated.
    """

    #: Whether the weights are plain softmax of scaled products, which a linear attention can stand in for.
    softmax: ClassVar[bool] = False

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        rotary: bool = True,
        causal: bool = True,
    ) -> None:
        super().__init__(d_model)
        size = head_size(d_model, num_heads)
        groups = num_heads if num_kv_heads is None else num_kv_heads
        head_size(num_heads, groups, "num_heads")
        if rotary and size % 2:
            raise BadInput(f"rotary needs an even head size, got d_model / num_heads = {size}")
        self.num_heads, self.num_kv_heads, self.key_size, self.rotary = num_heads, groups, size, rotary
        self.causal = causal  # type: ignore[misc]  # a choice of the instance here
        self.qkv = nn.Linear(d_model, (num_heads + 2 * groups) * size, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    @abstractmethod
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return what the queries, the last T of S tokens, mix: (B, T, H, K), (B, S, G, K) twice -> (B, T, H, K)."""

    def shape(self, q: Tensor, k: Tensor, v: Tensor, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values as they are mixed, and cached; by default as they are projected.

        Args:
            q: queries, (B, T, H, K), rotated.
            k: keys, (B, T, G, K), rotated.
            v: values, (B, T, G, K).
            place: position of each token, (T,).
        """
        return q, k, v

    def heads(self, x: Tensor, before: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of ``x``, (B, T, D), that stands after ``before`` other tokens."""
        sizes = [count * self.key_size for count in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]
        parts = torch.split(self.qkv(x), sizes, dim=-1)
        q, k, v = (
            split_heads(part, heads)
            for part, heads in zip(parts, (self.num_heads, self.num_kv_heads, self.num_kv_heads), strict=True)
        )
        place = torch.arange(before, before + x.shape[1], device=x.device)
        if self.rotary:
            q, k = rotary(q, place[None]), rotary(k, place[None])
        return self.shape(q, k, v, place)

    def init_state(self, batch_size: int) -> State:
        """Return a cache of no tokens."""
        empty = self.out.weight.new_zeros(batch_size, 0, self.num_kv_heads, self.key_size)
        return {"k": empty, "v": empty.clone()}

    def prefill(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Attend from ``x``, (B, T, D), to what is cached and to itself; return the output and the longer cache.

        Raises:
            BadInput: the mixer is not causal.
        """
        self.checked(x)
        if not self.causal:
            raise BadInput(f"{type(self).__name__} with causal=False keeps no state; use the forward pass")
        q, k, v = self.heads(x, 0 if state is None else state["k"].shape[1])
        if state is not None:
            k, v = torch.cat([state["k"].to(k.dtype), k], dim=1), torch.cat([state["v"].to(v.dtype), v], dim=1)
        y: Tensor = self.out(merge_heads(self.mix(q, k, v)))
        return y, {"k": k, "v": v}

    def forward(self, x: Tensor) -> Tensor:
        """Mix ``x``, (B, T, D) -> (B, T, D)."""
        y: Tensor = self.out(merge_heads(self.mix(*self.heads(self.checked(x), 0))))
        return y
