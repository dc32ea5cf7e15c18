"""What every sequence mixer promises: a full pass, a pass from a state, and one token at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from torchgraft.engines.recurrence.packing import lengths_of
from torchgraft.errors import BadInput

__all__ = ["Mixer", "State", "StatefulMixer"]

#: What a mixer remembers of the tokens so far: named tensors, the batch first, of sizes that do not depend on how many
#: tokens there were unless the mixer says so.
State: TypeAlias = "dict[str, Tensor]"


class Mixer(nn.Module, ABC):
    """A module (B, T, D) -> (B, T, D) in which tokens see each other.

    Args:
        d_model: the width D.

    Attributes:
        causal: whether the output at t depends on tokens up to t only.
    """

    causal: bool = True

    def __init__(self, d_model: int) -> None:
        super().__init__()
        if d_model < 1:
            raise BadInput(f"d_model must be at least 1, got {d_model}")
        self.d_model = d_model

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Mix ``x``, (B, T, D) -> (B, T, D)."""

    def checked(self, x: Tensor) -> Tensor:
        """Return ``x`` if it is floating point of shape (B, T, D).

        Raises:
            BadInput: it is not.
        """
        if x.ndim != 3 or x.shape[-1] != self.d_model:
            raise BadInput(f"x must have shape (B, T, {self.d_model}), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise BadInput(f"x must be floating point, got {x.dtype}")
        return x

    def packed(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Mix sequences of different lengths that stand one after another, none of which sees another.

        Args:
            x: the tokens of all sequences.
            cu_seqlens: where each sequence begins, and the end of the last one.

        Shapes:
            x: (1, sum of lengths, D); cu_seqlens: (sequences + 1,) -> (1, sum of lengths, D).

        Raises:
            BadInput: ``cu_seqlens`` does not rise from 0 to the number of tokens.
        """
        self.checked(x)
        lengths = lengths_of(cu_seqlens, x)
        if self.causal:  # what stands after a sequence is not seen by it
            pieces = list(torch.split(x[0], lengths))
            mixed = self.forward(nn.utils.rnn.pad_sequence(pieces, batch_first=True))
            return torch.cat([row[:length] for row, length in zip(mixed, lengths, strict=True)])[None]
        return torch.cat([self.forward(piece) for piece in torch.split(x, lengths, dim=1)], dim=1)


class StatefulMixer(Mixer):
    """A causal mixer that can go on where it stopped, and take one token at a time.

    ``prefill`` is what a method writes. ``forward`` is ``prefill`` without the state, and ``step`` is ``prefill`` of
    one token unless the method has a shorter way.
    """

    causal: ClassVar[bool] = True  # type: ignore[misc]  # fixed here, a choice of the instance elsewhere

    @abstractmethod
    def init_state(self, batch_size: int) -> State:
        """Return the state before the first token, on the device of the parameters."""

    @abstractmethod
    def prefill(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Mix ``x``, (B, T, D), after ``state``; return the output and the state after the last token."""

    def forward(self, x: Tensor) -> Tensor:
        """Mix ``x``, (B, T, D) -> (B, T, D)."""
        return self.prefill(x)[0]

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """Mix one token, (B, D), after ``state``; return its output, (B, D), and the next state."""
        if x_t.ndim != 2 or x_t.shape[-1] != self.d_model:
            raise BadInput(f"x_t must have shape (B, {self.d_model}), got {tuple(x_t.shape)}")
        y, state = self.prefill(x_t[:, None], state)
        return y[:, 0], state
