"""Sequences of different lengths in one tensor, given by where each begins (``cu_seqlens``)."""

from __future__ import annotations

import itertools

from torch import Tensor

from torchgraft.errors import BadInput

__all__ = ["lengths_of"]


def lengths_of(cu_seqlens: Tensor, x: Tensor) -> list[int]:
    """Return the length of every sequence in ``x``, (1, T, ...).

    Args:
        cu_seqlens: (sequences + 1,), integers that rise from 0 to T.
        x: what is packed.

    Raises:
        BadInput: the batch is not 1, or ``cu_seqlens`` does not rise strictly from 0 to T.
    """
    if x.shape[0] != 1:
        raise BadInput(f"packed input must have a batch of 1, got {x.shape[0]}")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.is_floating_point():
        raise BadInput(f"cu_seqlens must be a list of integers of length sequences + 1, got {cu_seqlens!r}")
    places = [int(place) for place in cu_seqlens.tolist()]
    lengths = [after - before for before, after in itertools.pairwise(places)]
    if places[0] != 0 or places[-1] != x.shape[1] or min(lengths) < 1:
        raise BadInput(f"cu_seqlens must rise from 0 to {x.shape[1]}, got {places}")
    return lengths
