"""Decays inside a chunk: how much token t still sees of what token s wrote, without overflow at any strength.

The weight is ``exp(b_t - b_s)`` with ``b`` the running sum of the log decays. As a matrix product it is
``(x_t exp(b_t - r)) . (y_s exp(r - b_s))`` with some reference ``r``. Where the whole chunk decays by little, the
reference is its start, and one product does. Otherwise the chunk is halved until the pieces decay by little: between
two halves the reference is their border, so that both factors are at most 1; inside the smallest pieces it is their
first token. Nothing is clipped and nothing is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Gates", "GentleGates", "Operand", "SteepGates", "gates_of"]

#: Largest decay of a piece (as a sum of logs) that is handled as one product: ``exp`` of it, times a sum of products of
#: inputs, is far from overflow.
RANGE = {torch.float32: 40.0, torch.float64: 300.0}
#: Log decays below this are taken as this: its ``exp`` is zero in every dtype.
FLOOR = -1e4


@dataclass
class Operand:
    """One side of the products of a chunk.

    Args:
        raw: the queries or keys, (M, C, K).
        scaled: they, weighed by their decay since the chunk's start or until its end.
        grad: gradient in ``scaled``, summed up during the backward pass.
        grad_raw: gradient in ``raw`` beside that.
    """

    raw: Tensor
    scaled: Tensor
    grad: Tensor | None = None
    grad_raw: Tensor | None = None


class Gates:
    """No decay: all weights are 1. Its subclasses have decays.

    The state after a chunk is ``whole * state + right.scaled^T written``, or ``whole * (state + right.scaled^T
    written)`` where the right side is weighed since the chunk's start too.

    Attributes:
        whole: ``exp(b_C)``, (M, K or 1, 1), or ``None`` for 1.
        from_start: whether it is.
    """

    whole: Tensor | None = None
    from_start: bool = True

    def left(self, x: Tensor) -> Operand:
        """Return the side that reads: ``scaled`` is ``x_t exp(b_t)``."""
        return Operand(x, x)

    def right(self, y: Tensor) -> Operand:
        """Return the side that writes: ``scaled`` is ``y_s exp(-b_s)`` from the start, else ``y_s exp(b_C - b_s)``."""
        return Operand(y, y)

    def gram(self, left: Operand, right: Operand, *, strict: bool = False) -> Tensor:
        """Return ``sum_K x_tK y_sK exp(b_tK - b_sK)`` for s <= t (s < t where ``strict``) and 0 else, (M, C, C)."""
        return torch.bmm(left.scaled, right.scaled.mT).tril_(-1 if strict else 0)

    def gram_backward(self, grad: Tensor, left: Operand, right: Operand) -> None:
        """Add the gradients of :meth:`gram` to both sides; ``grad`` is zero wherever the result is."""
        left.grad = _added(left.grad, grad, right.scaled)
        right.grad = _added(right.grad, grad.mT, left.scaled)

    def left_gradient(self, left: Operand) -> Tensor:
        """Return the gradient in x."""
        return _there(left.grad)

    def right_gradient(self, right: Operand) -> Tensor:
        """Return the gradient in y."""
        return _there(right.grad)


class GentleGates(Gates):
    """Decays that are small over the chunk: one product, and the weights of the state are the products' own.

    Args:
        sums: running sums of the log decays, (M, C, K or 1).
    """

    def __init__(self, sums: Tensor) -> None:
        self._up = sums.exp()
        self._down = self._up.reciprocal()
        self.whole = self._up[:, -1:].mT

    def left(self, x: Tensor) -> Operand:  # noqa: D102
        return Operand(x, x * self._up)

    def right(self, y: Tensor) -> Operand:  # noqa: D102
        return Operand(y, y * self._down)

    def left_gradient(self, left: Operand) -> Tensor:  # noqa: D102
        return _there(left.grad).mul_(self._up)

    def right_gradient(self, right: Operand) -> Tensor:  # noqa: D102
        return _there(right.grad).mul_(self._down)


class SteepGates(Gates):
    """Decays of any strength: halves of halves, each pair with its border as the reference.

    Args:
        logs: log decays, (M, C, K or 1), C a power of two.
        piece: length of the pieces that are handled as one product.
    """

    from_start = False

    def __init__(self, logs: Tensor, piece: int) -> None:
        self._piece = piece
        chunk = logs.shape[1]
        self._start, self._end = logs.cumsum(1).exp(), _sums_to_end(logs, 1).exp()
        self.whole = self._start[:, -1:].mT
        self._halves: list[tuple[int, Tensor, Tensor]] = []
        half = piece
        while half < chunk:
            pieces = torch.unflatten(logs, 1, (chunk // half, half))  # (M, pieces, half, K or 1)
            after, before = pieces[:, 1::2].cumsum(2).exp(), _sums_to_end(pieces[:, 0::2], 2).exp()
            self._halves.append((half, after, before))
            half *= 2
        inside = torch.unflatten(logs, 1, (chunk // piece, piece)).clone()
        inside[:, :, 0] = 0.0  # the first token's own decay plays no part inside its piece
        sums = inside.cumsum(2)
        self._up, self._down = sums.exp(), (-sums).exp()

    def left(self, x: Tensor) -> Operand:  # noqa: D102
        return Operand(x, x * self._start)

    def right(self, y: Tensor) -> Operand:  # noqa: D102
        return Operand(y, y * self._end)

    def gram(self, left: Operand, right: Operand, *, strict: bool = False) -> Tensor:  # noqa: D102
        items, chunk, _ = left.raw.shape
        result = left.raw.new_zeros(items, chunk, chunk)
        x, y = self._pieces(left.raw, self._piece), self._pieces(right.raw, self._piece)
        inner = torch.matmul(x * self._up, (y * self._down).mT)
        _blocks(result, self._piece)[:] = inner.tril_(-1 if strict else 0)
        for half, after, before in self._halves:
            x, y = self._pieces(left.raw, half)[:, 1::2], self._pieces(right.raw, half)[:, 0::2]
            _corners(result, half)[:] = torch.matmul(x * after, (y * before).mT)
        return result

    def gram_backward(self, grad: Tensor, left: Operand, right: Operand) -> None:  # noqa: D102
        dx = torch.zeros_like(left.raw) if left.grad_raw is None else left.grad_raw
        dy = torch.zeros_like(right.raw) if right.grad_raw is None else right.grad_raw
        x, y, piece = self._pieces(left.raw, self._piece), self._pieces(right.raw, self._piece), self._piece
        inner = _blocks(grad, piece)
        self._pieces(dx, piece).add_(torch.matmul(inner, y * self._down) * self._up)
        self._pieces(dy, piece).add_(torch.matmul(inner.mT, x * self._up) * self._down)
        for half, after, before in self._halves:
            corner = _corners(grad, half)
            x, y = self._pieces(left.raw, half)[:, 1::2], self._pieces(right.raw, half)[:, 0::2]
            self._pieces(dx, half)[:, 1::2].add_(torch.matmul(corner, y * before) * after)
            self._pieces(dy, half)[:, 0::2].add_(torch.matmul(corner.mT, x * after) * before)
        left.grad_raw, right.grad_raw = dx, dy

    def left_gradient(self, left: Operand) -> Tensor:  # noqa: D102
        return torch.addcmul(_there(left.grad_raw), _there(left.grad), self._start)

    def right_gradient(self, right: Operand) -> Tensor:  # noqa: D102
        return torch.addcmul(_there(right.grad_raw), _there(right.grad), self._end)

    @staticmethod
    def _pieces(x: Tensor, size: int) -> Tensor:
        return torch.unflatten(x, 1, (x.shape[1] // size, size))


def gates_of(logs: Tensor | None) -> Gates:
    """Return the gates for log decays, (M, C, K or 1), by the cheapest way that their sums allow."""
    if logs is None:
        return Gates()
    limit = -RANGE[logs.dtype]
    sums = logs.cumsum(1)
    if not logs.numel() or float(sums[:, -1].amin()) >= limit:
        return GentleGates(sums)
    logs = logs.clamp(min=FLOOR)
    piece = logs.shape[1] // 2
    while piece > 1 and float(torch.unflatten(logs, 1, (-1, piece))[:, :, 1:].sum(2).amin()) < limit:
        piece //= 2
    return SteepGates(logs, max(piece, 1))


def _added(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a, b) if total is None else total.baddbmm_(a, b)


def _there(gradient: Tensor | None) -> Tensor:
    if gradient is None:
        raise RuntimeError("no gradient was added to this side of the chunk")
    return gradient


def _sums_to_end(logs: Tensor, dim: int) -> Tensor:
    """Return for each place the sum over the places after it, added up from the end: no large sums are subtracted."""
    tail = logs.narrow(dim, 1, logs.shape[dim] - 1).flip(dim).cumsum(dim).flip(dim)
    return torch.cat([tail, torch.zeros_like(logs.narrow(dim, 0, 1))], dim)


def _blocks(matrix: Tensor, size: int) -> Tensor:
    """Return a view of the square blocks on the diagonal of (M, C, C): (M, C / size, size, size)."""
    items, chunk, _ = matrix.shape
    item, row, column = matrix.stride()
    return matrix.as_strided(
        (items, chunk // size, size, size), (item, size * (row + column), row, column), matrix.storage_offset()
    )


def _corners(matrix: Tensor, half: int) -> Tensor:
    """Return a view of the lower left quarters of the blocks of size 2 * half on the diagonal."""
    items, chunk, _ = matrix.shape
    item, row, column = matrix.stride()
    return matrix.as_strided(
        (items, chunk // (2 * half), half, half),
        (item, 2 * half * (row + column), row, column),
        matrix.storage_offset() + half * row,
    )
