"""The linear recurrence in chunks: products of small matrices inside a chunk, one state carried between chunks.

The tokens are worked through in blocks that fit into the processor's cache, each a few chunks long, with all matrices
of a block in one batched product. Inside a chunk with start state S, with ``Q``, ``K_r`` read and ``K_w`` written
through the gates of :mod:`~torchgraft.engines.recurrence.gates`, and ``P``, ``G`` their masked products::

    U  = V                                        without the delta rule
    U  = (I + diag(beta) G)^-1 diag(beta) (V - K_r S)   with it (the UT transform, Yang et al., 2024)
    O  = Q S + P U
    S' = whole * (S + K_w^T U)

The backward pass keeps no more than one state a block: it goes through the blocks from the last to the first, computes
the states inside the block again, and applies the derivative of these four lines. The gradient of a log decay needs no
derivative of the gates: it is the sum, from its token to the end of the chunk, of ``q dq + k dk_r - k dk_w``, and
``S' dS'`` for what lies after the chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from torchgraft.bench.meters.counts import register_macs
from torchgraft.engines.recurrence.gates import Gates, Operand, gates_of

__all__ = ["chunk_form"]

P = ParamSpec("P")
R = TypeVar("R")

#: Bytes of one operand of a block: a handful of them stay in a core's cache.
BLOCK_BYTES = 512 * 1024


@dataclass(frozen=True)
class _Layout:
    """How tokens are cut: B sequences in groups, T tokens in blocks of ``chunks`` chunks of C tokens."""

    batch: int
    tokens: int
    heads: int
    chunk: int
    chunks: int
    rows: int

    @property
    def block(self) -> int:
        return self.chunk * self.chunks

    @property
    def blocks(self) -> int:
        return -(-self.tokens // self.block)


def _layout(q: Tensor, v: Tensor, chunk: int) -> _Layout:
    batch, tokens, heads, size = q.shape
    one = heads * chunk * max(size, v.shape[-1], 1) * 4  # bytes of an operand of one chunk of one sequence
    rows = max(1, min(batch, BLOCK_BYTES // one))
    chunks = max(1, min(BLOCK_BYTES // (one * rows), -(-tokens // chunk)))
    return _Layout(batch, tokens, heads, chunk, chunks, rows)


def _math(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Block:
    """One block of tokens of some sequences: reads operands as (chunks * rows * H, C, K) and writes results back."""

    def __init__(self, layout: _Layout, row: int, block: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.rows = slice(row, min(row + layout.rows, layout.batch))
        start = block * layout.block
        self.tokens = slice(start, min(start + layout.block, layout.tokens))
        self.length = self.tokens.stop - start
        self.chunks = -(-self.length // layout.chunk)
        self.chunk, self.heads = layout.chunk, layout.heads
        self.items = (self.rows.stop - row) * layout.heads

    def read(self, x: Tensor) -> Tensor:
        """Return (B, T, H, K) of this block as (chunks * items, C, K), zeros after the last token."""
        part = x[self.rows, self.tokens]
        size = part.shape[-1]
        result = part.new_empty(self.chunks * self.items, self.chunk, size, dtype=self.dtype)
        view = result.view(self.chunks, part.shape[0], self.heads, self.chunk, size).permute(1, 0, 3, 2, 4)
        full = self.length // self.chunk
        view[:, :full].copy_(torch.unflatten(part[:, : full * self.chunk], 1, (full, self.chunk)))
        if full < self.chunks:
            rest = self.length - full * self.chunk
            view[:, full, :rest].copy_(part[:, full * self.chunk :])
            view[:, full, rest:] = 0.0
        return result

    def write(self, result: Tensor, x: Tensor) -> None:
        """Write (chunks * items, C, K) to this block of x, (B, T, H, K)."""
        part = x[self.rows, self.tokens]
        view = result.view(self.chunks, part.shape[0], self.heads, self.chunk, -1).permute(1, 0, 3, 2, 4)
        full = self.length // self.chunk
        torch.unflatten(part[:, : full * self.chunk], 1, (full, self.chunk)).copy_(view[:, :full])
        if full < self.chunks:
            part[:, full * self.chunk :].copy_(view[:, full, : self.length - full * self.chunk])

    def of_state(self, state: Tensor) -> Tensor:
        """Return the part of (B, H, K, V) that belongs to these sequences, (items, K, V)."""
        of_rows: Tensor = state[self.rows]
        return of_rows.flatten(0, 1)


@dataclass
class _Delta:
    """What the delta rule adds to a chunk: ``U = inverse (beta V) - correction S``."""

    beta: Tensor  # (M, C, 1)
    read: Operand
    gram: Tensor
    inverse: Tensor
    correction: Tensor


def _inverse(system: Tensor) -> Tensor:
    """Return the inverse of I + A for strictly lower A, (M, C, C): the halves by themselves, then what joins them."""
    size = system.shape[-1]
    if size <= 16:
        eye = torch.eye(size, dtype=system.dtype, device=system.device)
        inverse: Tensor = torch.linalg.solve_triangular(system, eye.expand_as(system), upper=False, unitriangular=True)
        return inverse
    half = size // 2
    halves = _inverse(torch.cat([system[:, :half, :half], system[:, half:, half:]]))
    first, second = halves[: len(system)], halves[len(system) :]
    result = torch.zeros_like(system)
    result[:, :half, :half], result[:, half:, half:] = first, second
    result[:, half:, :half] = torch.bmm(torch.bmm(second, system[:, half:, :half]), first).neg_()
    return result


class _Chunks:
    """The matrices of one block that do not depend on the state, and the states at the start of its chunks."""

    def __init__(
        self, block: _Block, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None
    ) -> None:
        self.block = block
        self.gates: Gates = gates_of(None if log_decay is None else block.read(log_decay))
        self.query = self.gates.left(block.read(q))
        self.key = self.gates.right(block.read(k))
        self.value = block.read(v)
        self.scores = self.gates.gram(self.query, self.key)
        self.delta: _Delta | None = None
        if beta is not None:
            weight = block.read(beta[..., None])
            read = self.gates.left(self.key.raw)
            gram = self.gates.gram(read, self.key, strict=True)
            inverse = _inverse(gram * weight)
            self.delta = _Delta(weight, read, gram, inverse, torch.bmm(inverse, read.scaled * weight))
        self.written = self.value

    def _of_chunks(self, x: Tensor) -> Tensor:
        return torch.unflatten(x, 0, (self.block.chunks, self.block.items))

    def run(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Carry ``state``, (items, K, V), through the chunks.

        Returns:
            The states at the start of every chunk, (chunks, items, K, V), and the state after the last.
        """
        whole = None if self.gates.whole is None else self._of_chunks(self.gates.whole)
        states = state.new_empty(self.block.chunks + 1, *state.shape)
        states[0] = state
        keys = self._of_chunks(self.key.scaled)
        if self.delta is None:
            added = self._of_chunks(torch.bmm(self.key.scaled.mT, self.value))
            for index in range(self.block.chunks):
                _advance(states[index], added[index], whole, index, states[index + 1], self.gates)
        else:
            written = torch.bmm(self.delta.inverse, self.value * self.delta.beta)
            pieces, correction = self._of_chunks(written), self._of_chunks(self.delta.correction)
            for index in range(self.block.chunks):
                pieces[index].baddbmm_(correction[index], states[index], alpha=-1)
                added = torch.bmm(keys[index].mT, pieces[index])
                _advance(states[index], added, whole, index, states[index + 1], self.gates)
            self.written = written
        return states[:-1], states[-1]

    def output(self, states: Tensor) -> Tensor:
        """Return the outputs of all tokens of the block, (chunks * items, C, V)."""
        return torch.bmm(self.query.scaled, states.flatten(0, 1)).baddbmm_(self.scores, self.written)

    def backward(self, grad: Tensor, states: Tensor, end: Tensor, grad_end: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of q, k, v, log decay (or empty), beta (or empty), and of the state before the block.

        Args:
            grad: gradient in the outputs.
            states: the states at the start of the chunks, as :meth:`run` returned them.
            end: the state after the block.
            grad_end: gradient in it.
        """
        gates, count = self.gates, self.block.chunks
        whole = None if gates.whole is None else self._of_chunks(gates.whole)
        starts = states.flatten(0, 1)
        # The gradients of what was written and of the states: from the last chunk to the first.
        grad_written = torch.bmm(self.scores.mT, grad)
        from_output = self._of_chunks(torch.bmm(self.query.scaled.mT, grad))
        grad_states = torch.empty_like(states)  # gradient in what each chunk adds to the state
        after = states.new_empty(count, *grad_end.shape)  # gradient in the state after each chunk
        keys, pieces = self._of_chunks(self.key.scaled), self._of_chunks(grad_written)
        correction = None if self.delta is None else self._of_chunks(self.delta.correction)
        current = grad_end
        for index in reversed(range(count)):
            after[index] = current
            carried = current if whole is None or not gates.from_start else current * whole[index]
            grad_states[index] = carried
            before = from_output[index]
            if correction is not None:
                pieces[index].baddbmm_(keys[index], carried)
                before.baddbmm_(correction[index].mT, pieces[index], alpha=-1)
            if whole is None or gates.from_start:
                before.add_(carried)
            else:
                before.addcmul_(current, whole[index])
            current = before
        grad_added = grad_states.flatten(0, 1)
        if self.delta is None:
            grad_written.baddbmm_(self.key.scaled, grad_added)
        # Then everything else at once.
        self.query.grad = torch.bmm(grad, starts.mT)
        self.key.grad = torch.bmm(self.written, grad_added.mT)
        gates.gram_backward(torch.bmm(grad, self.written.mT).tril_(), self.query, self.key)
        grad_value, grad_beta = grad_written, grad.new_empty(0)
        if self.delta is not None:
            grad_value, grad_beta = self._delta_backward(self.delta, grad_written, starts)
        grad_query, grad_key = gates.left_gradient(self.query), gates.right_gradient(self.key)
        grad_decay = grad.new_empty(0)
        if whole is not None:
            moved = (grad_query * self.query.raw).addcmul_(grad_key, self.key.raw, value=-1)
        if self.delta is not None:
            grad_read = gates.left_gradient(self.delta.read)
            if whole is not None:
                moved.addcmul_(grad_read, self.delta.read.raw)
            grad_key = grad_key + grad_read
        if whole is not None:
            ends = torch.cat([states[1:], end[None]]).mul_(after).sum(-1).flatten(0, 1)[:, None]  # (M, 1, K)
            if whole.shape[-2] == 1:
                moved, ends = moved.sum(-1, keepdim=True), ends.sum(-1, keepdim=True)
            grad_decay = moved.sum(1, keepdim=True).add_(ends) + moved - moved.cumsum(1)
        return grad_query, grad_key, grad_value, grad_decay, grad_beta, current

    def _delta_backward(self, delta: _Delta, grad_written: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Go back through ``U = (I + diag(beta) G)^-1 diag(beta) (V - K_r S)``."""
        grad_known = torch.bmm(delta.inverse.mT, grad_written)  # gradient in diag(beta) (V - K_r S)
        grad_system = torch.bmm(grad_known, self.written.mT).tril_(-1).neg_()
        grad_value = grad_known * delta.beta
        through_state = torch.bmm(grad_known, starts.mT)
        grad_beta = (grad_known * self.value).sum(-1, keepdim=True)
        grad_beta -= (through_state * delta.read.scaled).sum(-1, keepdim=True)
        grad_beta += (grad_system * delta.gram).sum(-1, keepdim=True)
        delta.read.grad = through_state.mul_(delta.beta).neg_()
        self.gates.gram_backward(grad_system.mul_(delta.beta), delta.read, self.key)
        return grad_value, grad_beta


def _advance(state: Tensor, added: Tensor, whole: Tensor | None, index: int, out: Tensor, gates: Gates) -> None:
    if whole is None:
        torch.add(state, added, out=out)
    elif gates.from_start:
        torch.add(state, added, out=out).mul_(whole[index])
    else:
        torch.mul(state, whole[index], out=out).add_(added)


def _exactly(function: Callable[P, R]) -> Callable[P, R]:
    """Return ``function`` with autocast off inside it; its first argument is a tensor."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        first = next(arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor))
        with torch.autocast(first.device.type, enabled=False):
            return function(*args, **kwargs)

    return run


@torch.library.custom_op("torchgraft::linear_recurrence", mutates_args=())
@_exactly
def chunk_form(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    state: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the outputs, the last state, and the state before every block of tokens, which the gradient needs.

    Shapes:
        q, k: (B, T, H, K); v: (B, T, H, V); log_decay: (B, T, H, K) or (B, T, H, 1); beta: (B, T, H);
        state: (B, H, K, V) -> (B, T, H, V), (B, H, K, V), (blocks, B, H, K, V).
    """
    layout, dtype = _layout(q, v, chunk), _math(v.dtype)
    output = v.new_empty(v.shape)
    last = state.new_empty(state.shape)
    kept = state.new_empty(layout.blocks, *state.shape)
    for row in range(0, layout.batch, layout.rows):
        current = state[row : row + layout.rows].flatten(0, 1)
        for index in range(layout.blocks):
            block = _Block(layout, row, index, dtype)
            kept[index, block.rows] = current.view_as(kept[index, block.rows])
            chunks = _Chunks(block, q, k, v, log_decay, beta)
            states, current = chunks.run(current)
            result = chunks.output(states)
            block.write(result if scale == 1.0 else result.mul_(scale), output)
        last[row : row + layout.rows] = current.view_as(last[row : row + layout.rows])
    return output, last, kept


@chunk_form.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    state: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    blocks = _layout(q, v, chunk).blocks
    return v.new_empty(v.shape), state.new_empty(state.shape), state.new_empty(blocks, *state.shape)


@torch.library.custom_op("torchgraft::linear_recurrence_backward", mutates_args=())
@_exactly
def _backward(
    grad: Tensor,
    grad_last: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    kept: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    layout, dtype = _layout(q, v, chunk), _math(v.dtype)
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    grad_decay = q.new_empty(0) if log_decay is None else log_decay.new_empty(log_decay.shape)
    grad_beta = q.new_empty(0) if beta is None else beta.new_empty(beta.shape)
    grad_state = grad_last.new_empty(grad_last.shape)
    for row in range(0, layout.batch, layout.rows):
        current = grad_last[row : row + layout.rows].flatten(0, 1)
        for index in reversed(range(layout.blocks)):
            block = _Block(layout, row, index, dtype)
            chunks = _Chunks(block, q, k, v, log_decay, beta)
            states, end = chunks.run(block.of_state(kept[index]))
            given = block.read(grad)
            if scale != 1.0:
                given.mul_(scale)
            *results, of_decay, of_beta, current = chunks.backward(given, states, end, current)
            for result, target in zip(results, grads, strict=True):
                block.write(result, target)
            if log_decay is not None:
                block.write(of_decay, grad_decay)
            if beta is not None:
                block.write(of_beta, grad_beta[..., None])
        grad_state[row : row + layout.rows] = current.view_as(grad_state[row : row + layout.rows])
    return grads[0], grads[1], grads[2], grad_decay, grad_beta, grad_state


@_backward.register_fake
def _(
    grad: Tensor,
    grad_last: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    kept: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        q.new_empty(0) if log_decay is None else log_decay.new_empty(log_decay.shape),
        q.new_empty(0) if beta is None else beta.new_empty(beta.shape),
        grad_last.new_empty(grad_last.shape),
    )


def _remember(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, log_decay, beta, scale, _, chunk = inputs
    ctx.save_for_backward(q, k, v, log_decay, beta, output[2])  # type: ignore[arg-type]
    ctx.scale, ctx.chunk = scale, chunk  # type: ignore[attr-defined]


def _gradients(
    ctx: torch.autograd.function.FunctionCtx, grad: Tensor, grad_last: Tensor, _: Tensor
) -> tuple[Tensor | None, ...]:
    q, k, v, log_decay, beta, kept = ctx.saved_tensors  # type: ignore[attr-defined]
    found = _backward(grad, grad_last, q, k, v, log_decay, beta, ctx.scale, kept, ctx.chunk)  # type: ignore[attr-defined]
    dq, dk, dv, d_decay, d_beta, d_state = found
    return dq, dk, dv, None if log_decay is None else d_decay, None if beta is None else d_beta, None, d_state, None


def _macs(arguments: tuple[Any, ...], _: Any) -> int:  # what a dispatch mode sees
    """Multiply-accumulates of the products of the chunks, the triangles counted as the squares that are computed."""
    q, _, v, _, beta, _, _, chunk = arguments
    batch, tokens, heads, size = q.shape
    value = v.shape[-1]
    each = chunk * (size + value) + 2 * size * value
    if beta is not None:  # the keys' products, the inverse and its two products, the correction in the state
        each += chunk * (2 * size + value) + chunk * chunk // 3 + size * value
    return int(batch * heads * (-(-tokens // chunk) * chunk) * each)


register_macs("torchgraft::linear_recurrence", _macs)
chunk_form.register_autograd(_gradients, setup_context=_remember)
