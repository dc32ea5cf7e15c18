"""Which backend runs a sparse layer fastest here, and from which sparsity on that beats the dense layer: by timing."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from torchgraft.bench.meters import MARGIN, Ratio, interval
from torchgraft.engines.sparse import product
from torchgraft.engines.sparse.pattern import Pattern

__all__ = ["Crossover", "crossover", "fastest"]

#: The densities at which a layer is timed to find where it meets the dense one.
DENSITIES = (0.05, 0.25)
_ROUNDS, _BLOCK_SECONDS = 9, 0.003


def _drawn(pattern: Pattern, kept: int, seed: int = 0) -> Tensor:
    """Return ``kept`` random blocks, rising."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(pattern.blocks, generator=generator)[:kept].sort().values


def _bucket(number: int) -> int:
    """Return the power of two nearest to ``number``, so that shapes that are alike are timed once."""
    return 1 << round(math.log2(max(number, 1)))


def fastest(pattern: Pattern, kept: int, columns: int, *, tokens: bool) -> str:
    """Return the backend that is fastest for a layer that keeps ``kept`` blocks and meets ``columns`` columns.

    Timed once in a process for shapes that are alike (columns and kept blocks to the nearest power of two).

    Args:
        pattern: the layer's matrix and blocks.
        kept: blocks that are kept.
        columns: tokens or pixels of a call.
        tokens: whether they come as (N, K).
    """
    return _fastest(pattern, min(_bucket(kept), pattern.blocks), _bucket(columns), tokens, torch.get_num_threads())


@functools.cache
def _fastest(pattern: Pattern, kept: int, columns: int, tokens: bool, threads: int) -> str:
    names = product.backends_for(pattern.block)
    if len(names) == 1:
        return names[0]
    with _disable_current_modes(), torch.inference_mode():
        streams = pattern.streams(_drawn(pattern, kept))
        values = torch.ones(kept * pattern.block[0] * pattern.block[1])
        shape = (columns, pattern.columns) if tokens else (1, pattern.columns, columns)
        x = torch.ones(shape)

        clock = _clock()

        def run(name: str) -> float:
            begun = clock()
            product.sparse_product(x, values, None, *streams, pattern, tokens=tokens, backend=name)
            return clock() - begun

        best = {name: run(name) for name in names}
        best = {name: run(name) for name in names}
        # What is hopeless after two calls is not called again.
        near = [name for name in names if best[name] <= 3 * min(best.values())]
        for _ in range(3):
            for name in near:
                best[name] = min(best[name], run(name))
    return min(near, key=lambda name: best[name])


@dataclass(frozen=True)
class Crossover:
    """Where a sparse layer overtakes the dense one, as measured here.

    Args:
        ratios: density -> time over that of the dense layer.
    """

    ratios: tuple[tuple[float, Ratio], ...]

    def ratio(self, density: float) -> float:
        """Return the expected time over that of the dense layer, on the line through what was measured."""
        (low, first), (high, second) = self.ratios
        slope = (second.high - first.high) / (high - low)
        return first.high + max(slope, 0.0) * (density - low)

    @property
    def sparsity(self) -> float:
        """The sparsity above which the sparse layer is faster by more than the margin of the meters; 1 if none is."""
        (low, first), (high, second) = self.ratios
        slope = max((second.high - first.high) / (high - low), 1e-9)
        return min(max(1.0 - (low + (1.0 - MARGIN - first.high) / slope), 0.0), 1.0)


def _clock() -> Callable[[], float]:
    """Return the clock: on one thread the processor's own time, which a busy machine distorts less."""
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def _rounds(calls: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> list[list[float]]:
    """Return seconds of each call, (rounds, calls), in turns that alternate their order."""
    clock = _clock()
    counts = []
    for call in calls:
        call(x)
        begun = clock()
        call(x)
        counts.append(max(1, min(200, math.ceil(_BLOCK_SECONDS / max(clock() - begun, 1e-7)))))
    found = []
    for turn in range(_ROUNDS):
        row = [0.0] * len(calls)
        for place in range(len(calls)) if turn % 2 else reversed(range(len(calls))):
            begun = clock()
            for _ in range(counts[place]):
                calls[place](x)
            row[place] = (clock() - begun) / counts[place]
        found.append(row)
    return found


def crossover(rows: int, columns: int, block: tuple[int, int], shape: tuple[int, ...], *, tokens: bool) -> Crossover:
    """Return where a sparse (rows, columns) layer overtakes the dense one on inputs of ``shape``, by timing both here.

    Args:
        rows: M.
        columns: K.
        block: rows and columns of a block.
        shape: of the layer's input; (..., K) for tokens, else (B, K, *space).
        tokens: whether the layer is linear, and not a 1x1 convolution.
    """
    return _crossover(Pattern(rows, columns, block), shape, tokens, torch.get_num_threads())


@functools.cache
def _crossover(pattern: Pattern, shape: tuple[int, ...], tokens: bool, threads: int) -> Crossover:
    with torch.inference_mode():
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(shape, generator=generator)
        weight = torch.randn(pattern.rows, pattern.columns, generator=generator)
        convolve = F.conv1d if x.ndim == 3 else F.conv2d

        def dense(x: Tensor) -> Tensor:
            if tokens:
                return F.linear(x, weight)
            return convolve(x, weight.view(*weight.shape, *(1 for _ in shape[2:])))

        def sparse(density: float) -> Callable[[Tensor], Tensor]:
            kept = max(1, round(density * pattern.blocks))
            streams = pattern.streams(_drawn(pattern, kept))
            values = torch.randn(kept * pattern.block[0] * pattern.block[1], generator=generator)
            count = x.numel() // pattern.columns
            backend = fastest(pattern, kept, count, tokens=tokens)

            def run(x: Tensor) -> Tensor:
                flat = x.reshape(-1, pattern.columns) if tokens else x.flatten(2)
                return product.sparse_product(flat, values, None, *streams, pattern, tokens=tokens, backend=backend)

            return run

        rows = _rounds([dense, *(sparse(density) for density in DENSITIES)], x)

    found = [interval([row[place] / row[0] for row in rows]) for place in (1, 2)]
    return Crossover(tuple(zip(DENSITIES, found, strict=True)))
