"""Which pairs of query and key may be seen: windows, padding, given tables, and what several of them leave."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from torchgraft.engines.attention.pair import Pair, picked
from torchgraft.engines.attention.rows import Rows
from torchgraft.errors import BadInput

__all__ = ["Both", "Causal", "Either", "Given", "Joined", "Mask", "Padding", "Window", "as_mask"]


class Mask(ABC):
    """Says for a block of rows who sees whom.

    Two masks joined by ``&`` leave the pairs that both leave, joined by ``|`` those that one of them leaves. A mask
    that also defines ``of_pair``, the same for a single pair, can be used by kernels of pairs without a table.
    """

    #: How far before and after its own position a query sees at most; ``None`` where there is no limit.
    behind: int | None = None
    ahead: int | None = None

    @abstractmethod
    def seen(self, rows: Rows) -> Tensor:
        """Return True where the row may see the column, of a shape that broadcasts to (B, H, t, s)."""

    def check(self, batch: int, heads: int, queries: int, keys: int) -> None:
        """Refuse to be used on another shape than the mask was made for.

        Raises:
            BadInput: the mask was made for another shape.
        """
        return  # most fit all

    def __and__(self, other: Mask) -> Mask:
        return Both(self, other)

    def __or__(self, other: Mask) -> Mask:
        return Either(self, other)


def _nearer(left: int | None, right: int | None) -> int | None:
    known = [each for each in (left, right) if each is not None]
    return min(known) if known else None


def _farther(left: int | None, right: int | None) -> int | None:
    return None if left is None or right is None else max(left, right)


class Joined(Mask):
    """Two masks that together make one.

    Args:
        first: one of them.
        second: the other.
    """

    def __init__(self, first: Mask, second: Mask) -> None:
        self.parts = (first, second)

    def check(self, batch: int, heads: int, queries: int, keys: int) -> None:
        """Refuse what one of them refuses."""
        for part in self.parts:
            part.check(batch, heads, queries, keys)


class Both(Joined):
    """What two masks leave; see :class:`Joined`."""

    def __init__(self, first: Mask, second: Mask) -> None:
        super().__init__(first, second)
        self.behind = _nearer(first.behind, second.behind)
        self.ahead = _nearer(first.ahead, second.ahead)

    def seen(self, rows: Rows) -> Tensor:
        """Return True where both may see."""
        first, second = self.parts
        return first.seen(rows) & second.seen(rows)


class Either(Joined):
    """What at least one of two masks leaves; see :class:`Joined`."""

    def __init__(self, first: Mask, second: Mask) -> None:
        super().__init__(first, second)
        self.behind = _farther(first.behind, second.behind)
        self.ahead = _farther(first.ahead, second.ahead)

    def seen(self, rows: Rows) -> Tensor:
        """Return True where one of them may see."""
        first, second = self.parts
        return first.seen(rows) | second.seen(rows)


class Causal(Mask):
    """A query sees keys at its own position and before it."""

    ahead = 0

    def seen(self, rows: Rows) -> Tensor:
        """Return True where the key stands no later than the query."""
        return rows.distance() >= 0

    def of_pair(self, at: Pair) -> Tensor:
        """Return whether the key stands no later."""
        return at.distance() >= 0


class Window(Mask):
    """A query sees keys less than ``size`` positions away, on either side.

    Args:
        size: the number of positions, one's own among them.

    Raises:
        BadInput: the window is empty.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise BadInput(f"size of a window must be at least 1, got {size}")
        self.behind = self.ahead = size - 1

    def seen(self, rows: Rows) -> Tensor:
        """Return True where the key is near enough."""
        return rows.distance().abs() <= (self.behind or 0)

    def of_pair(self, at: Pair) -> Tensor:
        """Return whether the key is near enough."""
        return at.distance().abs() <= (self.behind or 0)


@dataclass(frozen=True)
class Padding(Mask):
    """Keys that are no padding are seen by all.

    Args:
        valid: True where a token is real, (B, S).
    """

    valid: Tensor

    def seen(self, rows: Rows) -> Tensor:
        """Return True where the key is real."""
        return self.valid[:, None, None, rows.keys]

    def of_pair(self, at: Pair) -> Tensor:
        """Return whether the key is real."""
        return picked(self.valid, at.batch, at.key)

    def check(self, batch: int, heads: int, queries: int, keys: int) -> None:
        """Refuse another batch or number of keys."""
        if self.valid.dtype != torch.bool or self.valid.shape not in ((batch, keys), (1, keys)):
            raise BadInput(f"a mask of padding must be boolean of shape ({batch}, {keys}), got {_what(self.valid)}")


@dataclass(frozen=True)
class Given(Mask):
    """A table of pairs.

    Args:
        table: True where the query may see the key, of a shape that broadcasts to (B, H, T, S).
    """

    table: Tensor

    def seen(self, rows: Rows) -> Tensor:
        """Return the rows of the table."""
        part = self.table if self.table.shape[-2] == 1 else self.table[..., rows.queries, :]
        return part if part.shape[-1] == 1 else part[..., rows.keys]

    def of_pair(self, at: Pair) -> Tensor:
        """Return what the table says."""
        return at.of(self.table)

    def check(self, batch: int, heads: int, queries: int, keys: int) -> None:
        """Refuse a table that does not broadcast."""
        whole = (batch, heads, queries, keys)
        fits = self.table.ndim == 4 and all(
            have in (1, want) for have, want in zip(self.table.shape, whole, strict=True)
        )
        if self.table.dtype != torch.bool or not fits:
            raise BadInput(f"mask must be boolean and broadcast to {whole}, got {_what(self.table)}")


def _what(table: Tensor) -> str:
    return f"{table.dtype} of shape {tuple(table.shape)}"


def as_mask(mask: Mask | Tensor | None) -> Mask | None:
    """Return the mask that a person gave: a boolean tensor (B, S) is of padding, one of four dimensions is of pairs.

    Raises:
        BadInput: it is neither.
    """
    if mask is None or isinstance(mask, Mask):
        return mask
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim not in (2, 4):
        found = _what(mask) if isinstance(mask, Tensor) else type(mask).__name__
        raise BadInput(f"mask must be a Mask, or boolean of shape (B, S) or (B, H, T, S), True where seen; got {found}")
    return Padding(mask) if mask.ndim == 2 else Given(mask)
