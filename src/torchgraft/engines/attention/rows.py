"""A block of rows of the attention matrix: some queries, all keys that any of them may see, and who sees whom."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Rows"]


@dataclass(frozen=True)
class Rows:
    """What a stage of the pipeline knows of the block it works on, besides its numbers, (B, H, t, s).

    Args:
        queries: which of the T queries the t rows are.
        keys: which of the S keys the s columns are; a key outside is seen by no row.
        query_place: position of each query, (t,).
        key_place: position of each key, (s,).
        seen: True where the row may see the column, of a shape that broadcasts to (B, H, t, s - edge); ``None`` where
            everything may be seen.
        edge: so many columns in front are seen by every row, and ``seen`` does not speak of them.
        overwrite: whether a stage may write into the tensor it gets: no gradient is recorded.
    """

    queries: slice
    keys: slice
    query_place: Tensor
    key_place: Tensor
    seen: Tensor | None = None
    edge: int = 0
    overwrite: bool = False

    def hide(self, x: Tensor, value: float) -> Tensor:
        """Return ``x``, (B, H, t, s), with ``value`` wherever the row may not see the column."""
        if self.seen is None:
            return x
        if self.overwrite:
            x[..., self.edge :].masked_fill_(~self.seen, value)
            return x
        if self.edge == 0:
            return x.masked_fill(~self.seen, value)
        free, bound = x[..., : self.edge], x[..., self.edge :]
        return torch.cat([free, bound.masked_fill(~self.seen, value)], dim=-1)

    def visible(self) -> Tensor:
        """Return how many keys each row sees, of a shape that broadcasts to (B, H, t, 1), integers."""
        columns = len(self.key_place)
        if self.seen is None:
            return torch.full((1, 1, 1, 1), columns, device=self.key_place.device)
        if self.seen.shape[-1] == 1 != columns - self.edge:  # one word for every column
            counted = self.seen * (columns - self.edge)
        else:
            counted = self.seen.sum(-1, keepdim=True)
        while counted.ndim < 4:
            counted = counted[None]
        return counted + self.edge

    def distance(self) -> Tensor:
        """Return position of the query minus position of the key, (t, s), integers."""
        return self.query_place[:, None] - self.key_place[None, :]
