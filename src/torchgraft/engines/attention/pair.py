"""One pair of query and key, as the stages of a pipeline see it where a kernel works on pairs instead of blocks."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

from torch import Tensor

__all__ = ["Pair", "picked"]


def picked(x: Tensor, *places: Tensor) -> Tensor:
    """Return the number of ``x`` at ``places``, one for each dimension; a dimension of size 1 holds for every place."""
    chosen = tuple(place * 0 if size == 1 else place for place, size in zip(places, x.shape, strict=True))
    return x[chosen]


class _Pair(NamedTuple):
    batch: Tensor
    head: Tensor
    query: Tensor
    key: Tensor
    query_place: Tensor
    key_place: Tensor
    counts: Tensor


class Pair(_Pair):
    """What is known of a pair: scalars that say which batch, head, query and key, and where these two stand.

    It answers what a transform that works on every score by itself asks of :class:`Rows`.
    """

    __slots__ = ()
    overwrite: ClassVar[bool] = False

    def distance(self) -> Tensor:
        """Return position of the query minus position of the key, an integer."""
        return self.query_place - self.key_place

    def visible(self) -> Tensor:
        """Return how many keys the query sees, an integer."""
        return picked(self.counts, self.batch, self.head, self.query, self.key)

    def of(self, x: Tensor) -> Tensor:
        """Return the number of ``x``, of a shape that broadcasts to (B, H, T, S), for this pair."""
        places = (self.batch, self.head, self.query, self.key)
        return picked(x, *places[4 - x.ndim :])
