"""Which weights of a matrix are kept: blocks chosen by magnitude, their places, and one byte a block to store them.

A pattern cuts a matrix (M, K) into blocks of r rows and c columns and keeps some of them. Kept blocks are numbered row
of blocks by row of blocks; within a block the values stand column by column, so that the r rows that share a column lie
next to each other, which is how the kernel reads them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchgraft.errors import BadInput

__all__ = ["Pattern", "best_blocks", "block_scores", "decode", "encode", "kept_blocks"]

#: A gap of this size or more is written as several bytes.
_STEP = 255


def encode(blocks: Tensor, total: int) -> Tensor:
    """Return rising block numbers as bytes: each the distance from the one before, 255 meaning "go on by 255".

    However the blocks lie, N + total // 255 bytes are enough, and so many are always written.

    Args:
        blocks: the numbers.
        total: how many blocks there are.

    Shapes:
        blocks: (N,) int64; result: (N + total // 255,) uint8.

    Example:
        >>> encode(torch.tensor([0, 3, 600]), 800).tolist()
        [1, 3, 255, 255, 87, 255]
    """
    gaps = torch.diff(blocks, prepend=blocks.new_tensor([-1]))
    steps = gaps.div(_STEP, rounding_mode="floor")
    ends = (steps + 1).cumsum(0) - 1
    written = torch.full((len(blocks) + total // _STEP,), _STEP, dtype=torch.uint8, device=blocks.device)
    written[ends] = (gaps - _STEP * steps).to(torch.uint8)
    return written


def decode(gaps: Tensor) -> Tensor:
    """Return the block numbers that :func:`encode` wrote.

    Example:
        >>> decode(encode(torch.tensor([0, 3, 600]), 800)).tolist()
        [0, 3, 600]
    """
    steps = gaps.to(torch.int64)
    return (steps.cumsum(0) - 1)[steps < _STEP]


@dataclass(frozen=True)
class Pattern:
    """The kept blocks of a matrix.

    Args:
        rows: M.
        columns: K.
        block: rows and columns of a block; the rows are 1, 2 or 4.

    Example:
        >>> Pattern(4, 6, (2, 1)).blocks
        12

    Raises:
        BadInput: blocks of this size do not tile the matrix.
    """

    rows: int
    columns: int
    block: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        r, c = self.block
        if r not in (1, 2, 4) or c < 1 or self.rows < 1 or self.columns < 1 or self.rows % r or self.columns % c:
            raise BadInput(
                f"block must be (1 | 2 | 4, any) and divide the matrix, got {r}x{c} for {self.rows}x{self.columns}"
            )

    @property
    def blocks(self) -> int:
        """How many blocks the matrix has."""
        return self.rows * self.columns // (self.block[0] * self.block[1])

    def streams(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the kernel walks along: the matrix column of each group of r values, and where rows begin.

        Shapes:
            blocks: (N,); result: (N c,) int32 and (M / r + 1,) int32.
        """
        r, c = self.block
        across = self.columns // c
        column = blocks.remainder(across) * c
        columns = (column[:, None] + torch.arange(c, device=blocks.device)).flatten()
        counts = torch.bincount(blocks.div(across, rounding_mode="floor"), minlength=self.rows // r) * c
        pointers = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return columns.to(torch.int32), pointers.to(torch.int32)

    def places(self, columns: Tensor, pointers: Tensor) -> Tensor:
        """Return where each kept value stands in the flattened matrix, from what :meth:`streams` returned.

        Shapes:
            columns: (N c,), pointers: (M / r + 1,); result: (N c r,) int64.

        Example:
            >>> tall = Pattern(2, 3, (2, 1))
            >>> tall.places(*tall.streams(torch.tensor([0, 2]))).tolist()
            [0, 3, 2, 5]
        """
        r, count = self.block[0], len(columns)
        # How many rows of blocks have ended before each group; by operators that every exporter knows.
        ends = columns.new_zeros(count + 1, dtype=torch.int64)
        ends = ends.scatter_add(0, pointers[1:].to(torch.int64), torch.ones_like(pointers[1:], dtype=torch.int64))
        row = ends.cumsum(0)[:count, None] * r  # (N c, 1)
        inner = torch.arange(r, device=columns.device)
        return ((row + inner) * self.columns + columns[:, None]).flatten()

    def sound(self, blocks: Tensor) -> bool:
        """Say whether ``blocks`` are rising numbers of blocks of this matrix."""
        if not len(blocks):
            return True
        within = int(blocks[0]) >= 0 and int(blocks[-1]) < self.blocks
        return within and bool((torch.diff(blocks) > 0).all())


def block_scores(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """Return the summed magnitude of each block.

    Shapes:
        weight: (M, K); result: (M / r, K / c).

    Example:
        >>> block_scores(torch.tensor([[1.0, -2.0], [3.0, 0.0]]), (2, 1)).tolist()
        [[4.0, 2.0]]
    """
    r, c = block
    return torch.unflatten(torch.unflatten(weight.detach().abs(), 1, (-1, c)), 0, (-1, r)).sum((1, 3))


def best_blocks(weight: Tensor, kept: int, block: tuple[int, int]) -> Tensor:
    """Return the numbers of the ``kept`` blocks of largest summed magnitude, rising; the earlier of equal ones.

    Example:
        >>> best_blocks(torch.tensor([[1.0, -2.0], [3.0, 0.0]]), 2, (1, 1)).tolist()
        [1, 2]

    Raises:
        BadInput: there are fewer blocks.
    """
    scores = block_scores(weight, block).flatten()
    if not 0 <= kept <= len(scores):
        raise BadInput(f"kept must lie in [0, {len(scores)}] blocks, got {kept}")
    return scores.argsort(descending=True, stable=True)[:kept].sort().values


def kept_blocks(rows: int, columns: int, block: tuple[int, int], sparsity: float) -> int:
    """Return how many blocks stay at ``sparsity``, to the nearest block and at least one.

    Example:
        >>> kept_blocks(8, 10, (4, 1), 0.9)
        2

    Raises:
        BadInput: ``sparsity`` lies outside [0, 1), or the blocks do not tile the matrix.
    """
    if not 0.0 <= sparsity < 1.0:
        raise BadInput(f"sparsity must lie in [0, 1), got {sparsity}")
    return max(1, round((1.0 - sparsity) * Pattern(rows, columns, block).blocks))
