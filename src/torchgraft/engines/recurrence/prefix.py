"""Running softmax statistics: the weighted mean of all values so far, under weights exp(score), at every token.

`Attention as an RNN <https://arxiv.org/abs/2405.13956>`_ (Feng et al., 2024) carries (m, u, w): the largest score so
far, the sum of exp(score - m), and the sum of exp(score - m) * value. Two stretches of tokens join by

    (m1, u1, w1) + (m2, u2, w2) = (m, u1 e^(m1-m) + u2 e^(m2-m), w1 e^(m1-m) + w2 e^(m2-m)),  m = max(m1, m2),

which is associative, so any bracketing gives every prefix. Only u e^m and w e^m mean anything: m is a choice of scale.
It is therefore a constant to autograd, and the scores get their gradients through u and w.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from torchgraft.errors import BadInput, nearest

__all__ = ["FORMS", "Statistics", "combine", "cumulative_softmax", "identity", "prefix_sum", "running_softmax"]

#: How all prefixes are bracketed; every form gives the same numbers.
FORMS = ("auto", "step", "chunk", "parallel")


class Statistics(NamedTuple):
    """What softmax needs to know of a stretch of tokens, in float32 at least.

    Args:
        maximum: m, the scale, (..., H).
        weight: u, the sum of exp(score - m), (..., H).
        value: w, the sum of exp(score - m) * value, (..., H, V).
    """

    maximum: Tensor
    weight: Tensor
    value: Tensor


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def identity(value: Tensor) -> Statistics:
    """Return the statistics of no token at all, for values of the shape of ``value``, (..., H, V).

    The maximum is the least finite number: minus infinity less itself would be NaN.
    """
    w = torch.zeros_like(_wide(value))
    return Statistics(w.new_full(w.shape[:-1], torch.finfo(w.dtype).min), w.new_zeros(w.shape[:-1]), w)


def combine(first: Statistics, second: Statistics) -> Statistics:
    """Return the statistics of two stretches of tokens together.

    Example:
        >>> one = Statistics(torch.zeros(1), torch.ones(1), torch.tensor([[2.0]]))
        >>> combine(one, one)
        Statistics(maximum=tensor([0.]), weight=tensor([2.]), value=tensor([[4.]]))
    """
    m = torch.maximum(first.maximum, second.maximum)
    a, b = (first.maximum - m).exp(), (second.maximum - m).exp()
    return Statistics(m, a * first.weight + b * second.weight, a[..., None] * first.value + b[..., None] * second.value)


def _lifted(s: Statistics) -> Statistics:
    """Return the same statistics with the gradient of the maximum moved into weight and value."""
    m = s.maximum.detach()
    if not s.maximum.requires_grad:
        return Statistics(m, s.weight, s.value)
    one = (s.maximum - m).exp()  # 1, with the gradient of the maximum
    return Statistics(m, one * s.weight, one[..., None] * s.value)


def _step(e: Statistics, state: Statistics) -> Statistics:
    """Return all prefixes one token at a time, the reference; (B, T, H) and (B, T, H, V)."""
    seen: list[Statistics] = []
    for token in zip(*(part.unbind(1) for part in e), strict=True):
        state = combine(state, Statistics(*token))
        seen.append(state)
    return Statistics(*(torch.stack(part, 1) for part in zip(*seen, strict=True)))


def _parallel(e: Statistics) -> Statistics:
    """Return all prefixes by Hillis and Steele: log2(T) rounds, each joining what is 1, 2, 4, ... tokens apart."""
    reach = 1
    while reach < e.weight.shape[1]:
        joined = combine(Statistics(*(p[:, :-reach] for p in e)), Statistics(*(p[:, reach:] for p in e)))
        e = Statistics(*(torch.cat([p[:, :reach], j], 1) for p, j in zip(e, joined, strict=True)))
        reach *= 2
    return e


def _dense(e: Statistics) -> Statistics:
    """Return all prefixes along dimension -2 by one matrix of weights; (..., C, H) held as (..., H, C)."""
    top = e.maximum.cummax(-1).values  # (..., H, C)
    apart = e.maximum[..., None, :] - top[..., None]  # score j less the maximum up to i
    weights = apart.exp().tril()
    both = weights @ torch.cat([e.weight[..., None], e.value], -1)  # (..., H, C, 1 + V)
    return Statistics(top, both[..., 0], both[..., 1:])


def _chunked(e: Statistics, chunk: int) -> Statistics:
    """Return all prefixes of (B, H, T) and (B, H, T, V): dense in chunks, the chunks' totals by the same means."""
    tokens = e.weight.shape[2]
    if tokens <= chunk:
        return _dense(e)
    short = -tokens % chunk
    none = identity(e.value[:, :, :1])
    if short:
        e = Statistics(
            F.pad(e.maximum, (0, short), value=float(torch.finfo(e.maximum.dtype).min)),
            F.pad(e.weight, (0, short)),
            F.pad(e.value, (0, 0, 0, short)),
        )
    pieces = (tokens + short) // chunk
    local = _dense(Statistics(*(p.reshape(*p.shape[:2], pieces, chunk, *p.shape[3:]) for p in e)))  # (B, H, N, C[, V])
    totals = _chunked(Statistics(*(p[:, :, :-1, -1] for p in local)), chunk)  # (B, H, N - 1[, V])
    before = Statistics(*(torch.cat([n, p], 2)[:, :, :, None] for n, p in zip(none, totals, strict=True)))
    whole = combine(before, local)
    return Statistics(*(p.flatten(2, 3)[:, :, :tokens] for p in whole))


@overload
def running_softmax(
    scores: Tensor,
    values: Tensor,
    *,
    state: Statistics | None = None,
    return_state: Literal[False] = False,
    form: str = "auto",
    chunk: int = 32,
) -> Tensor: ...


@overload
def running_softmax(
    scores: Tensor,
    values: Tensor,
    *,
    state: Statistics | None = None,
    return_state: Literal[True],
    form: str = "auto",
    chunk: int = 32,
) -> tuple[Tensor, Statistics]: ...


def running_softmax(
    scores: Tensor,
    values: Tensor,
    *,
    state: Statistics | None = None,
    return_state: bool = False,
    form: str = "auto",
    chunk: int = 32,
) -> Tensor | tuple[Tensor, Statistics]:
    """Return o_t = sum_{j<=t} exp(s_j) v_j / sum_{j<=t} exp(s_j) at every token.

    Args:
        scores: s, finite.
        values: v.
        state: the statistics of what came before; it counts as a token of its own.
        return_state: whether the statistics after the last token are returned too.
        form: ``"step"`` goes token by token, ``"parallel"`` takes log2(T) rounds over all tokens, ``"chunk"`` works
            inside stretches of tokens and then on their totals, with memory linear in T; ``"auto"`` chooses.
        chunk: the length of a stretch.

    Shapes:
        scores: (B, T, H); values: (B, T, H, V); state: (B, H), (B, H), (B, H, V) -> (B, T, H, V).

    Example:
        >>> running_softmax(torch.zeros(1, 3, 1), torch.tensor([1.0, 2.0, 6.0]).view(1, 3, 1, 1)).flatten()
        tensor([1.0000, 1.5000, 3.0000])

    Raises:
        BadInput: shapes disagree, there is no token, or a setting is unknown.
    """
    found = _prefixes(scores, values, state, form, chunk)
    out = (found.value / found.weight[..., None]).to(values.dtype)
    return (out, Statistics(*(p[:, -1] for p in found))) if return_state else out


def _prefixes(scores: Tensor, values: Tensor, state: Statistics | None, form: str, chunk: int) -> Statistics:
    if form not in FORMS:
        raise BadInput(f"form must be one of {', '.join(FORMS)}, got {form!r}{nearest(form, list(FORMS))}")
    if chunk < 2:
        raise BadInput(f"chunk must be at least 2, got {chunk}")
    if scores.ndim != 3 or values.shape[:-1] != scores.shape:
        raise BadInput(
            "values must have the shape of scores, (B, T, H), and one more dimension; "
            f"got scores {tuple(scores.shape)} and values {tuple(values.shape)}"
        )
    if scores.shape[1] == 0:
        raise BadInput("a running softmax needs at least one token, got none")
    if state is not None and state.value.shape != values[:, 0].shape:
        raise BadInput(f"state.value must have shape {tuple(values[:, 0].shape)}, got {tuple(state.value.shape)}")
    dtype = torch.promote_types(torch.promote_types(scores.dtype, values.dtype), torch.float32)
    scores, values = scores.to(dtype), values.to(dtype)
    tokens = _lifted(Statistics(scores, torch.ones_like(scores), values))
    start = identity(values[:, 0]) if state is None else _lifted(Statistics(*(p.to(dtype) for p in state)))
    if scores.is_meta:  # which knows no autocast
        return _bracketed(tokens, start, state is None, form, chunk)
    with torch.autocast(scores.device.type, enabled=False):
        return _bracketed(tokens, start, state is None, form, chunk)


def _bracketed(tokens: Statistics, start: Statistics, fresh: bool, form: str, chunk: int) -> Statistics:
    if form == "step" or (form == "auto" and tokens.weight.shape[1] == 1):
        return _step(tokens, start)
    if form == "parallel":
        prefixes = _parallel(tokens)
    else:
        inner = _chunked(
            Statistics(tokens.maximum.mT, tokens.weight.mT, tokens.value.transpose(1, 2)), chunk
        )  # (B, H, T[, V])
        prefixes = Statistics(inner.maximum.mT, inner.weight.mT, inner.value.transpose(1, 2))
    return prefixes if fresh else combine(Statistics(*(p[:, None] for p in start)), prefixes)


@overload
def cumulative_softmax(
    scores: Tensor, *, state: Statistics | None = None, return_state: Literal[False] = False
) -> Tensor: ...


@overload
def cumulative_softmax(
    scores: Tensor, *, state: Statistics | None = None, return_state: Literal[True]
) -> tuple[Tensor, Statistics]: ...


def cumulative_softmax(
    scores: Tensor, *, state: Statistics | None = None, return_state: bool = False
) -> Tensor | tuple[Tensor, Statistics]:
    """Return exp(s_t) / sum_{j<=t} exp(s_j), the weight of every token among those so far, in float32 at least.

    Args:
        scores: s, finite.
        state: the statistics of what came before; its value is empty, (B, H, 0).
        return_state: whether the statistics after the last token are returned too.

    Shapes:
        scores: (B, T, H) -> (B, T, H).

    Example:
        >>> cumulative_softmax(torch.zeros(1, 4, 1)).flatten()
        tensor([1.0000, 0.5000, 0.3333, 0.2500])
    """
    found = _prefixes(scores, scores[..., None][..., :0], state, "auto", 32)
    weights = (_wide(scores) - found.maximum).exp() / found.weight
    return (weights, Statistics(*(p[:, -1] for p in found))) if return_state else weights


def prefix_sum(x: Tensor, *, before: Tensor | None = None) -> Tensor:
    """Return the sums of ``x`` over all tokens so far, in float32 at least.

    Args:
        x: what is summed, along dimension 1.
        before: the sum of what came before.

    Shapes:
        x: (B, T, ...); before: (B, ...) -> (B, T, ...).

    Example:
        >>> prefix_sum(torch.ones(1, 300, dtype=torch.bfloat16))[0, -1]
        tensor(300.)
    """
    sums = _wide(x).cumsum(1)
    return sums if before is None else sums + before[:, None]
