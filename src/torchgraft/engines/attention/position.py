"""Biases of a score by the distance of query and key: linear (ALiBi) and harmonic."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchgraft.engines.attention.pair import Pair
from torchgraft.engines.attention.rows import Rows
from torchgraft.engines.attention.stages import Stage

__all__ = ["Alibi", "Harmonic", "harmonic_numbers"]


def harmonic_numbers(count: int, *, like: Tensor) -> Tensor:
    """Return h_n = sum_{r=1}^n 1/r for n = 0 to count - 1, (count,), in the dtype of ``like``.

    Example:
        >>> harmonic_numbers(4, like=torch.zeros(())).tolist()
        [0.0, 1.0, 1.5, 1.8333333730697632]
    """
    terms = 1 / torch.arange(1, max(count, 1), dtype=torch.float64, device=like.device)
    return torch.cat([terms.new_zeros(1), terms.cumsum(0)]).to(like.dtype)


@dataclass(frozen=True, eq=False)
class Alibi(Stage):
    """s_ij -> s_ij - m_h |i - j|, `ALiBi <https://arxiv.org/abs/2108.12409>`_ (Press et al., 2022).

    Args:
        slopes: m, (H,).
    """

    slopes: Tensor

    def __call__(self, s: Tensor, rows: Rows) -> Tensor:
        """Return the biased scores."""
        away = rows.distance().abs().to(s.dtype)
        return s - self.slopes.to(s.dtype)[:, None, None] * away

    def of_pair(self, s: Tensor, at: Pair) -> Tensor:
        """Return the biased score of one pair."""
        return s - self.slopes[at.head].to(s.dtype) * at.distance().abs().to(s.dtype)


@dataclass(frozen=True, eq=False)
class Harmonic(Stage):
    """s_ij -> s_ij - m_h sum_{r=1}^{|i-j|} 1/r, which grows like the logarithm of the distance.

    Args:
        slopes: m, (H,).
    """

    slopes: Tensor

    def __call__(self, s: Tensor, rows: Rows) -> Tensor:
        """Return the biased scores."""
        away = rows.distance().abs()
        table = harmonic_numbers(int(away.max()) + 1 if away.numel() else 1, like=s)
        return s - self.slopes.to(s.dtype)[:, None, None] * table[away]

    def for_pairs(self, query_place: Tensor, key_place: Tensor, dtype: torch.dtype) -> Stage:
        """Return the same bias with its numbers written out, in ``dtype``, for the distances that occur."""
        most = 0
        if query_place.numel() and key_place.numel():
            ends = [int(end) for place in (query_place, key_place) for end in torch.aminmax(place)]
            most = max(ends[1] - ends[2], ends[3] - ends[0], 0)
        return _HarmonicPairs(self.slopes, harmonic_numbers(most + 1, like=self.slopes.detach().to(dtype)))


@dataclass(frozen=True, eq=False)
class _HarmonicPairs(Stage):
    """:class:`Harmonic` for single pairs."""

    slopes: Tensor  # (H,)
    numbers: Tensor  # (most + 1,)

    def of_pair(self, s: Tensor, at: Pair) -> Tensor:
        """Return the biased score of one pair."""
        return s - self.slopes[at.head].to(s.dtype) * self.numbers[at.distance().abs()].to(s.dtype)
