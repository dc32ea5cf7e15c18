"""A mixer that is one linear recurrence: a method says what the queries, keys, values and gates of its tokens are."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from torchgraft.engines.recurrence.linear import Form, with_state
from torchgraft.engines.recurrence.mixer import State, StatefulMixer

__all__ = ["LinearMixer", "Tokens"]


@dataclass(frozen=True)
class Tokens:
    """What the recurrence reads and writes at each token.

    Args:
        q: queries, (B, T, H, K).
        k: keys, (B, T, H, K).
        v: values, (B, T, H, V).
        log_decay: (H,), (B, T, H) or (B, T, H, K), or ``None``.
        beta: (B, T, H), or ``None``.
        scale: factor on the output.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None = None
    beta: Tensor | None = None
    scale: float = 1.0


class LinearMixer(StatefulMixer):
    """A mixer whose memory is one matrix a head.

    A method defines :meth:`tokens` and :meth:`output`, and, where it remembers more than the memory (the last inputs of
    a short convolution, say), :meth:`init_rest`.

    Args:
        d_model: the width D.
        num_heads: H.
        key_size: K of a head.
        value_size: V of a head.

    Attributes:
        form: in which form the recurrence runs; the numbers are the same.
        chunk: tokens a chunk.
    """

    form: Form = "auto"
    chunk: int = 64

    def __init__(self, d_model: int, *, num_heads: int, key_size: int, value_size: int) -> None:
        super().__init__(d_model)
        self.num_heads, self.key_size, self.value_size = num_heads, key_size, value_size

    @abstractmethod
    def tokens(self, x: Tensor, state: State) -> tuple[Tokens, State]:
        """Return what ``x``, (B, T, D), reads and writes, and the next state of everything but the memory."""

    @abstractmethod
    def output(self, o: Tensor, x: Tensor) -> Tensor:
        """Return the mixer's output, (B, T, D), from what was read, ``o``, (B, T, H, V), and the input ``x``."""

    def init_rest(self, batch_size: int) -> State:
        """Return the first state of everything but the memory."""
        return {}

    def init_state(self, batch_size: int) -> State:
        """Return an empty memory, (B, H, K, V), in float32 (float64 where the parameters are), and the rest."""
        anchor = next(self.parameters())
        dtype = torch.float64 if anchor.dtype == torch.float64 else torch.float32
        shape = (batch_size, self.num_heads, self.key_size, self.value_size)
        return {"memory": anchor.new_zeros(shape, dtype=dtype), **self.init_rest(batch_size)}

    def prefill(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Mix ``x``, (B, T, D), after ``state``; return the output and the state after the last token."""
        self.checked(x)
        state = self.init_state(len(x)) if state is None else state
        tokens, rest = self.tokens(x, state)
        o, memory = with_state(
            tokens.q,
            tokens.k,
            tokens.v,
            log_decay=tokens.log_decay,
            beta=tokens.beta,
            scale=tokens.scale,
            state=state["memory"],
            form=self.form,
            chunk=self.chunk,
        )
        return self.output(o.to(x.dtype), x), {"memory": memory, **rest}
