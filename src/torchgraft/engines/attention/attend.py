"""Attention as one pipeline of small functions: score, transform, normalise, mask, mix.

    A = normalize(transform(score(Q, K)), mask),  O = A V

Plain softmax is handed to ``scaled_dot_product_attention``; on CUDA softmax with biases to FlexAttention; everything
else runs by blocks of rows.
"""

from __future__ import annotations

import logging
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from torchgraft.engines.attention.blocked import Pipeline, Places, attend_by_blocks, default_scale, weights_of
from torchgraft.engines.attention.flex import attend_by_flex, suits
from torchgraft.engines.attention.masks import Both, Causal, Given, Mask, Padding, as_mask
from torchgraft.engines.attention.rows import Rows
from torchgraft.engines.attention.stages import Normalize, Score, Transform, dot, softmax
from torchgraft.errors import BadInput, nearest

__all__ = ["FORMS", "Form", "attend", "attention_weights"]

Form: TypeAlias = Literal["auto", "sdpa", "flex", "blocks", "dense"]
#: How attention is computed; every form gives the same numbers.
FORMS = ("auto", "sdpa", "flex", "blocks", "dense")
_logger = logging.getLogger("torchgraft")
#: A table of pairs of at most this size is written out for the fused kernel; beyond it, blocks need less memory.
_TABLE = 1 << 22
#: So many weights are kept for the backward pass rather than computed again.
_SMALL = 1 << 17


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    score: Score = dot,
    transform: Transform | None = None,
    normalize: Normalize = softmax,
    mask: Mask | Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    query_place: Tensor | None = None,
    key_place: Tensor | None = None,
    form: Form = "auto",
    rows: int | None = None,
) -> Tensor:
    """Mix values by weights that queries and keys decide.

    Four forms give the same numbers. ``"sdpa"`` is PyTorch's fused kernel, for plain softmax. ``"flex"`` compiles one
    kernel for the pipeline by FlexAttention, see :mod:`torchgraft.engines.attention.flex` for what it takes: softmax
    with biases and temperatures, and on CUDA weights that a marked function makes of each score; on the CPU it has no
    backward pass. ``"blocks"`` takes everything, anywhere, in memory linear in T; ``"dense"`` writes the matrix out.
    ``"auto"`` takes the first of sdpa, flex and blocks that is known to be right: flex on CUDA with Triton only, for
    softmax whose stages want no gradients (on the CPU one asks for it). The CUDA kernels of flex were not run where
    this was written; should one fail to compile, ``"auto"`` logs a warning and runs blocks.

    Args:
        q: queries.
        k: keys; where there are fewer heads of keys than of queries, groups of queries share them.
        v: values.
        score: what each pair scores, by default ``scale q . k``.
        transform: what is done to every score, or nothing.
        normalize: how a row of scores becomes weights, by default softmax.
        mask: who sees whom: a mask, or booleans (B, S) of keys that are no padding, or (B, H, T, S) of pairs.
        causal: whether a query sees keys at its own position and before only.
        scale: by default 1 / sqrt(K).
        dropout: share of the weights that is dropped; for training.
        query_place: position of each query; by default the queries stand at the last T of the S keys.
        key_place: position of each key; by default 0 to S - 1.
        form: ``"sdpa"`` for the fused kernel (plain softmax only), ``"flex"`` for a kernel compiled by FlexAttention,
            ``"blocks"`` for memory linear in T, ``"dense"`` for the matrix written out, which alone has second
            derivatives; ``"auto"`` chooses. Dropout draws anew in each.
        rows: queries a block; by default by the caches.

    Shapes:
        q: (B, T, H, K); k: (B, S, G, K), v: (B, S, G, V), G divides H; query_place: (T,); key_place: (S,) ->
        (B, T, H, V)

    Example:
        >>> q, k, v = (torch.randn(2, 5, 4, 8) for _ in range(3))
        >>> attend(q, k, v, causal=True).shape
        torch.Size([2, 5, 4, 8])
        >>> from torchgraft.engines.attention import relu, unnormalized
        >>> attend(q, k, v, transform=relu, normalize=unnormalized).shape
        torch.Size([2, 5, 4, 8])

    Raises:
        BadInput: shapes disagree, a setting is unknown or out of range, a fused or compiled kernel was asked for what
            it cannot do, or a plain function among the stages holds a tensor that wants a gradient.
    """
    if form not in FORMS:
        raise BadInput(f"form must be one of {', '.join(FORMS)}, got {form!r}{nearest(str(form), list(FORMS))}")
    if not 0.0 <= dropout < 1.0:
        raise BadInput(f"dropout must lie in [0, 1), got {dropout}")
    _check(q, k, v)
    places = _places(q, k, causal, query_place, key_place)
    found = as_mask(mask)
    if found is not None:
        found.check(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    whole = (Causal() if found is None else Both(found, Causal())) if causal else found
    scale = default_scale(q.shape[-1]) if scale is None else scale
    plain = score is dot and transform is None and normalize is softmax
    if plain and form in ("auto", "sdpa"):
        fused = _fused(q, k, v, found, whole, places, causal, scale, dropout)
        if fused is not None:
            return fused
    if form == "sdpa":
        raise BadInput("form 'sdpa' takes plain softmax of dot products with masks that fit in memory; use 'blocks'")
    seed = int(torch.randint(1 << 62, ())) if dropout else 0
    pipeline = Pipeline(score, transform, normalize, scale, whole, dropout, seed)
    small = form == "auto" and torch.is_grad_enabled() and q.shape[:3].numel() * k.shape[1] <= _SMALL
    if form == "flex" or (form == "auto" and not small and suits(pipeline, q, k, v)):
        mixed = _flexed(pipeline, q, k, v, places, asked=form == "flex")
        if mixed is not None:
            return mixed
    queries = _wide(q).transpose(1, 2)  # (B, H, T, K)
    keys, values = (_repeated(_wide(x).transpose(1, 2), q.shape[2]) for x in (k, v))  # (B, H, S, K)
    with torch.autocast("cpu" if q.is_meta else q.device.type, enabled=False):
        if form == "dense" or small:
            mixed = _dense(pipeline, queries, keys, values, places)
        else:
            mixed = attend_by_blocks(
                pipeline, queries, keys, values, places, causal=causal and found is None, rows=rows
            )
    return mixed.transpose(1, 2).to(v.dtype)


def attention_weights(
    q: Tensor,
    k: Tensor,
    *,
    score: Score = dot,
    transform: Transform | None = None,
    normalize: Normalize = softmax,
    mask: Mask | Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    query_place: Tensor | None = None,
    key_place: Tensor | None = None,
) -> Tensor:
    """Return the matrix by which :func:`attend` mixes, written out, in float32 at least.

    Shapes:
        (B, T, H, K), (B, S, G, K) -> (B, H, T, S)

    Example:
        >>> attention_weights(torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4), causal=True)[0, 0].tolist()
        [[1.0, 0.0], [0.5, 0.5]]

    Raises:
        BadInput: shapes disagree.
    """
    _check(q, k, k)
    places = _places(q, k, causal, query_place, key_place)
    found = as_mask(mask)
    if found is not None:
        found.check(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    whole = (Causal() if found is None else Both(found, Causal())) if causal else found
    scale = default_scale(q.shape[-1]) if scale is None else scale
    queries, keys = _wide(q).transpose(1, 2), _repeated(_wide(k).transpose(1, 2), q.shape[2])
    return weights_of(Pipeline(score, transform, normalize, scale, whole), queries, keys, places)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise BadInput(f"q must have shape (B, T, H, K), k (B, S, G, K) and v (B, S, G, V); {shapes}")
    if q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1] or k.shape[:3] != v.shape[:3]:
        raise BadInput(f"q, k and v must agree in B and K, k and v in S and heads too; {shapes}")
    if k.shape[2] < 1 or q.shape[2] % k.shape[2]:
        raise BadInput(f"the heads of k must divide those of q; {shapes}")
    if not (q.is_floating_point() and k.is_floating_point() and v.is_floating_point()):
        raise BadInput(f"q, k and v must be floating point, got {q.dtype}, {k.dtype}, {v.dtype}")


def _places(q: Tensor, k: Tensor, causal: bool, query: Tensor | None, key: Tensor | None) -> Places:
    queries, keys = q.shape[1], k.shape[1]
    if query is None and key is None:
        if causal and queries > keys:
            raise BadInput(f"{queries} queries cannot be the last of {keys} keys; say where they stand by query_place")
        return Places(
            torch.arange(keys - queries, keys, device=q.device), torch.arange(keys, device=q.device), ordered=True
        )
    for name, place, length in (("query_place", query, queries), ("key_place", key, keys)):
        if place is not None and (place.shape != (length,) or place.is_floating_point()):
            raise BadInput(f"{name} must be integers of shape ({length},), got {place.dtype} {tuple(place.shape)}")
    ordered = torch.arange(keys, device=q.device)
    last = torch.arange(keys - queries, keys, device=q.device)
    return Places(last if query is None else query, ordered if key is None else key, ordered=False)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _repeated(x: Tensor, heads: int) -> Tensor:
    """Return ``x`` with each head as often as queries share it, (B, G, S, K) -> (B, H, S, K)."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _flexed(pipeline: Pipeline, q: Tensor, k: Tensor, v: Tensor, places: Places, *, asked: bool) -> Tensor | None:
    """Return what FlexAttention mixes; ``None`` where it failed and nobody ``asked`` for it."""
    with torch.autocast("cpu" if q.is_meta else q.device.type, enabled=False):
        try:
            return attend_by_flex(pipeline, q, k, v, places)
        except BadInput as error:
            if asked:
                raise
            _logger.warning("attend: %s", error)
            return None


def _dense(pipeline: Pipeline, q: Tensor, k: Tensor, v: Tensor, places: Places) -> Tensor:
    weights = weights_of(pipeline, q, k, places)
    if pipeline.dropout:
        weights = F.dropout(weights, pipeline.dropout)
    return weights @ v


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    whole: Mask | None,
    places: Places,
    causal: bool,
    scale: float,
    dropout: float,
) -> Tensor | None:
    """Return what the fused kernel mixes, or ``None`` where it would need a table that is too large."""
    queries, keys = q.shape[1], k.shape[1]
    table: Tensor | None = None
    triangle = False
    if whole is None or (mask is None and places.ordered and queries == 1):
        pass
    elif mask is None and places.ordered and queries == keys:
        triangle = True
    elif isinstance(mask, Padding) and not causal:
        table = mask.valid[:, None, None, :]
    elif isinstance(mask, Given) and not causal:
        table = mask.table
    elif queries * keys <= _TABLE:
        everything = Rows(slice(0, queries), slice(0, keys), places.query, places.key)
        table = whole.seen(everything)
    else:
        return None
    mixed = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=table,
        dropout_p=dropout,
        is_causal=triangle,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return mixed.transpose(1, 2)
