"""Attention by blocks of rows: memory linear in the number of tokens, forward and backward, for any pipeline.

A block holds some queries and every key that one of them may see, so that whatever a stage does to a whole row is
possible; rows that no mask lets see beyond a window never touch the rest. The backward pass computes each block again
and differentiates it by itself. Nothing of size T x S is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from torchgraft.engines.attention.masks import Mask
from torchgraft.engines.attention.rows import Rows
from torchgraft.engines.attention.stages import Divided, Normalize, Score, Transform, heads_alike, learned, rebuilt
from torchgraft.errors import BadInput

__all__ = ["Pipeline", "Places", "attend_by_blocks", "default_scale", "weights_of"]

#: Numbers of one block: few enough to stay in the caches, enough to make matrix products worth their call.
_AREA, _LEAST_ROWS, _MOST_ROWS = 1 << 20, 32, 256


@dataclass(frozen=True)
class Places:
    """Where queries and keys stand.

    Args:
        query: position of each query, (T,), integers.
        key: position of each key, (S,), integers.
        ordered: whether keys stand at 0, 1, ... S - 1 and queries rise, so that a window is a stretch of keys.
    """

    query: Tensor
    key: Tensor
    ordered: bool


@dataclass(frozen=True)
class Pipeline:
    """Everything between queries, keys and values and the output.

    Args:
        score: what a pair of query and key scores.
        transform: what is done to scores, or ``None``.
        normalize: how a row of scores becomes weights.
        scale: what the score is scaled by.
        mask: who sees whom, or ``None`` where all see all.
        dropout: share of the weights that is set to zero.
        seed: of the dropout.
    """

    score: Score
    transform: Transform | None
    normalize: Normalize
    scale: float
    mask: Mask | None = None
    dropout: float = 0.0
    seed: int = 0

    def tensors(self) -> list[Tensor]:
        """Return what the stages have learned."""
        return learned((self.score, self.transform, self.normalize))

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> Pipeline:
        """Return the same pipeline with other tensors in its stages."""
        score, transform, normalize = rebuilt((self.score, self.transform, self.normalize), iter(tensors))
        return replace(self, score=score, transform=transform, normalize=normalize)

    def weights(self, q: Tensor, k: Tensor, rows: Rows) -> Tensor:
        """Return the weights of a block: (B, H, t, K), (B, H, s, K) -> (B, H, t, s)."""
        return self.normalize(self.transformed(q, k, rows), rows)

    def transformed(self, q: Tensor, k: Tensor, rows: Rows) -> Tensor:
        """Return the scores of a block after the transform, (B, H, t, s)."""
        s = self.score(q, k, self.scale)
        return s if self.transform is None else self.transform(s, rows)

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
        """Return the output of a block: ... and (B, H, s, V) -> (B, H, t, V)."""
        sums: Tensor | None = None
        if isinstance(self.normalize, Divided):
            weights, sums = self.normalize.parts_after(self.transform, self.score(q, k, self.scale), rows)
        else:
            weights = self.weights(q, k, rows)
        if self.dropout > 0.0:
            draw = torch.Generator(q.device).manual_seed(self.seed + rows.queries.start)
            kept = torch.rand(weights.shape, generator=draw, device=q.device) >= self.dropout
            weights = weights * kept / (1.0 - self.dropout)
        return weights @ v if sums is None else (weights @ v) / sums


def _stretch(first: int, last: int, mask: Mask | None, places: Places) -> tuple[int, int]:
    """Return the stretch of keys that queries at positions from ``first`` to ``last`` may see."""
    keys = len(places.key)
    if mask is None or not places.ordered:
        return 0, keys
    begin = 0 if mask.behind is None else min(max(first - mask.behind, 0), keys)
    end = keys if mask.ahead is None else min(max(last + mask.ahead + 1, begin), keys)
    return begin, end


def _blocks(pipeline: Pipeline, places: Places, size: int, *, causal: bool, overwrite: bool) -> Iterator[Rows]:
    """Yield the blocks of ``size`` rows, the last first; ``causal`` says that the mask is the triangle alone.

    In a causal mask the last block is the largest: what it has allocated serves all others, where blocks that grow
    would have new memory from the operating system each, page by page.
    """
    mask, queries = pipeline.mask, len(places.query)
    ends = places.query.tolist() if places.ordered else []
    for start in reversed(range(0, queries, size)):
        stop = min(start + size, queries)
        begin, end = _stretch(ends[start], ends[stop - 1], mask, places) if ends else (0, len(places.key))
        rows = Rows(
            slice(start, stop),
            slice(begin, end),
            places.query[start:stop],
            places.key[begin:end],
            overwrite=overwrite,
        )
        if mask is None:
            yield rows
        elif causal and ends:  # every row sees what the first one sees
            edge = min(ends[start] + 1, end)
            bound = rows.query_place[:, None] >= places.key[None, edge:end]
            yield replace(rows, seen=bound if end > edge else None, edge=edge if end > edge else 0)
        else:
            yield replace(rows, seen=mask.seen(rows))


def _size(q: Tensor, k: Tensor, mask: Mask | None) -> int:
    """Return how many rows a block has."""
    span = k.shape[2]
    if mask is not None and mask.behind is not None and mask.ahead is not None:
        window = mask.behind + mask.ahead + 1
        if window < span:  # a block sees its own rows and a window; as many rows as the window waste the least
            return max(_LEAST_ROWS, min(_MOST_ROWS, 1 << max(window.bit_length() - 1, 0)))
    area = max(q.shape[0] * q.shape[1] * span, 1)
    wanted = max(_AREA // area, 1)
    return max(_LEAST_ROWS, min(_MOST_ROWS, 1 << (wanted.bit_length() - 1)))


def _one_by_one(pipeline: Pipeline, q: Tensor, k: Tensor) -> bool:
    """Say whether heads go one after another: where all of them at once leave a block few rows, on the CPU.

    The scores of one head and many rows stay in the cache, and are better matrix products than those of few rows.
    """
    stages = (pipeline.score, pipeline.transform, pipeline.normalize)
    alike = q.device.type == "cpu" and pipeline.dropout == 0.0 and all(heads_alike(stage) for stage in stages)
    return alike and _size(q[:, :1], k, pipeline.mask) > _size(q, k, pipeline.mask)


def _refuse_hidden(pipeline: Pipeline, q: Tensor, k: Tensor, places: Places) -> None:
    """Refuse stages that hold tensors which want a gradient where :func:`learned` does not see them.

    Raises:
        BadInput: a plain function has captured such a tensor.
    """
    if not (q.shape[0] and q.shape[2] and k.shape[2]):
        return
    seen = next(_blocks(replace(pipeline, dropout=0.0), places, 1, causal=False, overwrite=False))
    kept = pipeline.with_tensors(tuple(each.detach() for each in pipeline.tensors()))
    with torch.enable_grad():
        weights = kept.weights(q[:1, :, :1].detach(), k[:1, :, seen.keys].detach(), _first(seen))
    if weights.requires_grad:
        raise BadInput(
            "a stage of attend has captured a tensor that wants a gradient; make the stage a frozen dataclass that "
            "derives from torchgraft.engines.attention.Stage, with the tensor as a field"
        )


def _first(rows: Rows) -> Rows:
    """Return ``rows`` for the first sequence of the batch alone."""
    seen = rows.seen
    return rows if seen is None or seen.ndim < 4 else replace(rows, seen=seen[:1])


class _Blocked(torch.autograd.Function):
    """Attention whose backward pass computes each block again."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        pipeline, places, size, causal, q, k, v, *tensors = given
        ctx.plan = pipeline, places, size, causal
        ctx.save_for_backward(q, k, v, *tensors)
        return _forward(pipeline, places, size, causal, q, k, v)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        pipeline, places, size, causal = ctx.plan
        q, k, v, *tensors = ctx.saved_tensors
        sums: list[Tensor | None] = [
            torch.zeros_like(each) if wanted else None
            for each, wanted in zip((q, k, v, *tensors), ctx.needs_input_grad[4:], strict=True)
        ]
        for rows in _blocks(pipeline, places, size, causal=causal, overwrite=False):
            parts = (q[:, :, rows.queries], k[:, :, rows.keys], v[:, :, rows.keys], *tensors)
            with torch.enable_grad():
                leaves = [
                    part.detach().requires_grad_(total is not None) for part, total in zip(parts, sums, strict=True)
                ]
                mixed = pipeline.with_tensors(tuple(leaves[3:])).mixed(*leaves[:3], rows)
            if not mixed.requires_grad:
                continue
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            found = iter(torch.autograd.grad(mixed, wanted, grad[:, :, rows.queries], allow_unused=True))
            where = (rows.queries, rows.keys, rows.keys, *(None for _ in tensors))
            for total, place in zip(sums, where, strict=True):
                if total is None:
                    continue
                part = next(found)
                if part is not None:
                    (total if place is None else total[:, :, place]).add_(part)
        return None, None, None, None, *sums


def _forward(pipeline: Pipeline, places: Places, size: int, causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out, heads = q.new_empty(*q.shape[:3], v.shape[-1]), [slice(0, q.shape[1])]
    if _one_by_one(pipeline, q, k):
        size = max(size, _size(q[:, :1], k, pipeline.mask))
        heads = [slice(head, head + 1) for head in range(q.shape[1])]
    for rows in _blocks(pipeline, places, size, causal=causal, overwrite=True):
        for some in heads:
            part = rows
            if len(heads) > 1 and rows.seen is not None and rows.seen.ndim > 2 and rows.seen.shape[-3] > 1:
                part = replace(rows, seen=rows.seen[..., some, :, :])
            given = (q[:, some, rows.queries], k[:, some, rows.keys], v[:, some, rows.keys])
            out[:, some, rows.queries] = pipeline.mixed(*given, part)
    return out


def attend_by_blocks(
    pipeline: Pipeline,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    places: Places,
    *,
    causal: bool = False,
    rows: int | None = None,
) -> Tensor:
    """Return the output of ``pipeline``, block by block.

    Args:
        pipeline: what happens between queries and output.
        q: queries, (B, H, T, K).
        k: keys, (B, H, S, K).
        v: values, (B, H, S, V).
        places: where they stand.
        causal: that the pipeline's mask is the triangle and nothing else, which saves work.
        rows: queries a block; by default by the caches.

    Raises:
        BadInput: a plain function among the stages holds a tensor that wants a gradient.
    """
    size = _size(q, k, pipeline.mask) if rows is None else rows
    if size < 1:
        raise BadInput(f"rows must be at least 1, got {rows}")
    tensors = pipeline.tensors()
    if not torch.is_grad_enabled():
        return _forward(pipeline, places, size, causal, q, k, v)
    if torch.compiler.is_compiling():
        return _checkpointed(pipeline, places, size, causal, q, k, v)
    _refuse_hidden(pipeline, q, k, places)
    out: Tensor = _Blocked.apply(pipeline, places, size, causal, q, k, v, *tensors)  # type: ignore[no-untyped-call]
    return out


def _checkpointed(
    pipeline: Pipeline, places: Places, size: int, causal: bool, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """Return the output by means that torch.compile can follow, a checkpoint around every block."""
    mixed = []
    for rows in _blocks(pipeline, places, size, causal=causal, overwrite=False):
        parts = (q[:, :, rows.queries], k[:, :, rows.keys], v[:, :, rows.keys])
        mixed.append(checkpoint(pipeline.mixed, *parts, rows, use_reentrant=False))
    return torch.cat(mixed[::-1], dim=2) if mixed else q.new_empty(*q.shape[:3], v.shape[-1])


def weights_of(pipeline: Pipeline, q: Tensor, k: Tensor, places: Places) -> Tensor:
    """Return the whole matrix of weights, (B, H, T, S), differentiable; rows are queries."""
    everything = Places(places.query, places.key, ordered=False)
    found = list(_blocks(pipeline, everything, max(len(places.query), 1), causal=False, overwrite=False))
    if not found:
        return q.new_zeros(*q.shape[:3], k.shape[2])
    return pipeline.weights(q, k, found[0])


def default_scale(size: int) -> float:
    """Return 1 / sqrt(K)."""
    return 1.0 / math.sqrt(size) if size else 1.0
