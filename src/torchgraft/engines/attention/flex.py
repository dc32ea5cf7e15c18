"""The pipeline on ``torch.nn.attention.flex_attention``: one compiled kernel, memory linear in the number of tokens.

FlexAttention computes ``softmax(score_mod(scale q . k)) v`` over the pairs that a mask leaves, and the logarithm of the
sum under each softmax. What of the pipeline it can be had for:

- score: :class:`Dot` only; a score must be a function of q . k, the position and the head.
- transform: what speaks of one pair: stages with ``of_pair`` (:class:`Tempered`, :class:`Shifted`, :class:`Alibi`,
  :class:`Harmonic`, chains of them) and functions marked by :func:`pointwise`. What stages have learned is captured.
- normalise: softmax. A weight w of 0 or more that a marked function makes of each score is exp(log w), so that kernels
  of softmax mix it too: ``sum_j w_j v_j = e^L softmax(log w) v`` with L the returned logarithm of ``sum_j w_j``. That
  gives point-wise weights (:class:`Unnormalized`: sigmoid, ReLU, softplus) and :class:`L1` exactly, where the kernel
  returns L: on CUDA, and uncompiled; Inductor's kernel for the CPU does not. Weights that may be negative have no
  logarithm, and normalisers that look at a row again (:class:`Reweighted`) no such form: they are refused.
- mask: each mask with ``of_pair``; others are written out where their table is small. Blocks of 128 x 128 pairs that a
  mask hides are never touched.

On the CPU the kernel (torch 2.13) has no backward pass, no float64 and no L: all three are refused with a word, never
replaced unseen. Every form is tested uncompiled, forward and backward, in float64 against the matrix written out, and
the CPU's kernel compiled; the CUDA kernels were not run where this was written, for want of a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from torchgraft.engines.attention.blocked import Pipeline, Places
from torchgraft.engines.attention.masks import Both, Either, Given, Joined, Mask
from torchgraft.engines.attention.pair import Pair
from torchgraft.engines.attention.rows import Rows
from torchgraft.engines.attention.stages import (
    L1,
    Chain,
    Dot,
    Softmax,
    Stage,
    Unnormalized,
    is_pointwise,
    ready_for_pairs,
)
from torchgraft.errors import BadInput

__all__ = ["Backend", "attend_by_flex", "obstacle", "suits"]

#: ``"inductor"`` compiles a kernel; ``"eager"`` runs the same operators one by one, which writes the matrix out.
Backend: TypeAlias = Literal["inductor", "eager"]
#: Side of the blocks that are left out where a mask hides them, as the kernels want it.
_SIDE = 128
#: A mask that cannot speak of single pairs is written out up to so many of them.
_TABLE = 1 << 22
#: Kernels of CUDA multiply matrices of at least so many channels.
_LEAST_SIZE = 16
#: What could not be compiled is not tried again.
_FAILED: dict[object, str] = {}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Blocks(NamedTuple):
    """Which blocks of keys each block of queries needs a look at, and which it sees whole; and N_i of every query."""

    partial_count: Tensor  # (B, H, P)
    partial: Tensor  # (B, H, P, R)
    whole_count: Tensor
    whole: Tensor
    counts: Tensor  # (B, H, T, 1)


def _parts(transform: Any) -> tuple[Any, ...]:
    """Return the transforms that ``transform`` consists of, in order."""
    if transform is None:
        return ()
    return (
        tuple(part for each in transform.parts for part in _parts(each)) if type(transform) is Chain else (transform,)
    )


def obstacle(pipeline: Pipeline) -> str | None:
    """Return why flex_attention cannot compute ``pipeline`` on any device, or ``None`` where it can."""
    if type(pipeline.score) is not Dot:
        return f"its scores are functions of q . k, position and head, and {_name(pipeline.score)} is not"
    if pipeline.dropout:
        return "it has no dropout of weights"
    parts = _parts(pipeline.transform)
    for part in parts:
        if not (is_pointwise(part) or hasattr(part, "of_pair") or hasattr(part, "for_pairs")):
            return f"the transform {_name(part)} does not speak of single pairs (of_pair, or the mark pointwise)"
    kind = type(pipeline.normalize)
    if kind is Softmax:
        return None
    if kind not in (L1, Unnormalized):
        return f"its weights are softmax's, and {_name(pipeline.normalize)} is no function of their sum alone"
    signed = isinstance(pipeline.normalize, L1) and pipeline.normalize.signed
    if signed or not parts or not is_pointwise(parts[-1]):
        return "it mixes by exponentials, and weights that are not known to be 0 or more have no logarithm"
    return None


def _name(stage: object) -> str:
    return str(getattr(stage, "__name__", type(stage).__name__))


def suits(pipeline: Pipeline, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether ``form="auto"`` of attend takes flex_attention: on CUDA with Triton, for softmax and its biases.

    It stays away where a mistake could pass unseen: from stages whose tensors want gradients, from point-wise weights
    (both are tested uncompiled only), from double precision, and from whole models that are being compiled.
    """
    if not (q.is_cuda and k.device == q.device == v.device) or torch.compiler.is_compiling() or not _triton():
        return False
    if q.dtype not in _DTYPES or not (q.dtype == k.dtype == v.dtype) or min(q.shape[-1], v.shape[-1]) < _LEAST_SIZE:
        return False
    if type(pipeline.normalize) is not Softmax or obstacle(pipeline) is not None:
        return False
    if torch.is_grad_enabled() and any(each.requires_grad for each in pipeline.tensors()):
        return False
    return _speaks_of_pairs(pipeline.mask) and 0 not in (*q.shape, *k.shape)


def _triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _speaks_of_pairs(mask: Mask | None) -> bool:
    if isinstance(mask, Joined):
        return all(_speaks_of_pairs(part) for part in mask.parts)
    return mask is None or hasattr(mask, "of_pair")


def _rows(places: Places, queries: slice) -> Rows:
    return Rows(queries, slice(0, len(places.key)), places.query[queries], places.key)


def _spoken(mask: Mask | None, places: Places, pairs: int) -> Mask | None:
    """Return ``mask`` with each part that cannot speak of single pairs written out.

    Raises:
        BadInput: its table would be too large.
    """
    if mask is None or _speaks_of_pairs(mask):
        return mask
    if isinstance(mask, Joined):
        first, second = (_spoken(part, places, pairs) for part in mask.parts)
        return mask if first is None or second is None else type(mask)(first, second)
    if pairs > _TABLE:
        raise BadInput(
            f"form 'flex' would have to write {type(mask).__name__} out for {pairs} pairs, more than {_TABLE}; give it "
            "of_pair, or use form 'blocks'"
        )
    table = mask.seen(_rows(places, slice(0, len(places.query))))
    return Given(table.reshape((1,) * (4 - table.ndim) + tuple(table.shape)))


def _sees(mask: Mask, at: Pair) -> Tensor:
    """Return whether the query of a pair sees its key."""
    if isinstance(mask, Both):
        return _sees(mask.parts[0], at) & _sees(mask.parts[1], at)
    if isinstance(mask, Either):
        return _sees(mask.parts[0], at) | _sees(mask.parts[1], at)
    found: Tensor = mask.of_pair(at)  # type: ignore[attr-defined]  # every other mask was written out
    return found


def _blocks(mask: Mask, places: Places) -> _Blocks:
    """Return which blocks ``mask`` leaves, strip by strip of queries: nothing of size T x S is made."""
    queries, keys = len(places.query), len(places.key)
    missing = -keys % _SIDE
    some, every, counts = [], [], []
    for start in range(0, queries, _SIDE):
        rows = _rows(places, slice(start, min(start + _SIDE, queries)))
        seen = mask.seen(rows)
        seen = seen.reshape((1,) * (4 - seen.ndim) + tuple(seen.shape)).expand(-1, -1, len(rows.query_place), keys)
        counts.append(seen.sum(-1, keepdim=True))
        tiles = torch.unflatten(torch.nn.functional.pad(seen, (0, missing)), -1, (-1, _SIDE))  # (B, H, t, R, side)
        some.append(tiles.any(-1).any(-2))
        every.append(tiles.all(-1).all(-2) & (seen.shape[2] == _SIDE))
    whole = torch.stack(every, dim=2)  # (B, H, P, R)
    partial = torch.stack(some, dim=2) & ~whole
    return _Blocks(*_listed(partial), *_listed(whole), torch.cat(counts, dim=2))


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many blocks are True, and the places of these in front, as the kernels want them."""
    order = torch.argsort(blocks.to(torch.int32), dim=-1, descending=True, stable=True)
    return blocks.sum(-1).to(torch.int32), order.to(torch.int32).contiguous()


def _run(
    pipeline: Pipeline, blocks: _Blocks | None, counts: Tensor, places: tuple[Tensor, Tensor], *heads: Tensor
) -> Tensor:
    """Return what is mixed, (B, H, T, V); this is what gets compiled.

    Args:
        pipeline: whose stages and mask all speak of single pairs.
        blocks: what the mask leaves.
        counts: N_i.
        places: positions of queries and keys.
        heads: queries (B, H, T, K), keys (B, G, S, K) and values (B, G, S, V).
    """
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

    q, k, v = heads
    query_place, key_place = places
    mask, parts, normalize = pipeline.mask, _parts(pipeline.transform), pipeline.normalize
    plain = type(normalize) is Softmax

    def pair(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Pair:
        return Pair(b, h, i, j, query_place[i], key_place[j], counts)

    def scored(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        at = pair(b, h, i, j)
        for part in parts:
            s = part.of_pair(s, at) if hasattr(part, "of_pair") else part(s, at)
        if plain:
            return s
        return torch.where(s > 0, torch.where(s > 0, s, 1.0).log(), -math.inf)

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return _sees(mask, pair(b, h, i, j))  # type: ignore[arg-type]  # asked only where there is one

    block_mask = None
    if blocks is not None:
        block_mask = BlockMask.from_kv_blocks(
            *blocks[:4], BLOCK_SIZE=_SIDE, mask_mod=seen, seq_lengths=(q.shape[2], k.shape[2])
        )
    options: dict[str, Any] = {
        "score_mod": scored if parts or not plain else None,
        "block_mask": block_mask,
        "scale": pipeline.scale,
        "enable_gqa": q.shape[1] != k.shape[1],
    }
    if plain:
        plainly: Tensor = flex_attention(q, k, v, **options)
        return plainly
    mixed: Tensor
    mixed, found = flex_attention(q, k, v, **options, return_aux=AuxRequest(lse=True))
    total: Tensor = found.lse[..., None]  # L, (B, H, T, 1)
    if not isinstance(normalize, L1):
        return mixed * total.exp()
    return mixed * torch.sigmoid(total - math.log(normalize.eps)) if normalize.eps else mixed


def _kind(stage: Any, static: bool) -> Any:
    """Return what of a stage or mask decides which kernel it needs: its class, and of tensors no more than their form.

    ``static`` says that kernels are made for one size of everything.
    """
    if isinstance(stage, Tensor):
        return "tensor", tuple(stage.shape) if static else stage.ndim, stage.dtype
    if isinstance(stage, tuple):
        return tuple(_kind(each, static) for each in stage)
    if isinstance(stage, Stage | Mask):
        return type(stage), tuple((name, _kind(value, static)) for name, value in sorted(vars(stage).items()))
    return stage


@functools.lru_cache(maxsize=256)
def _compiled(kind: object, backend: Backend, static: bool) -> Callable[..., Tensor]:
    """Return :func:`_run` compiled for pipelines of one kind, which share no limit of recompilations with others.

    On CUDA a second number of tokens makes a kernel for all. On the CPU that kernel is wrong C++ (torch 2.13), and
    each number of tokens gets one of its own.
    """
    code = _run.__code__
    twin = types.FunctionType(code.replace(co_name=code.co_name), _run.__globals__, code.co_name, _run.__defaults__)
    made: Callable[..., Tensor] = torch.compile(
        twin, fullgraph=True, backend=backend, dynamic=False if static else None
    )
    return made


def _refuse(pipeline: Pipeline, q: Tensor, v: Tensor, grads: bool) -> None:
    """Refuse what the compiled kernel of the device cannot do.

    Raises:
        BadInput: with the reason.
    """
    device = q.device.type
    if device not in ("cpu", "cuda"):
        raise BadInput(f"form 'flex' runs on cpu and cuda, got {device}; use 'blocks'")
    if q.dtype not in _DTYPES:
        raise BadInput(f"form 'flex' takes float32, bfloat16 and float16, got {q.dtype}; use 'blocks'")
    if device == "cuda":
        if min(q.shape[-1], v.shape[-1]) < _LEAST_SIZE:
            sizes = f"K={q.shape[-1]} and V={v.shape[-1]}"
            raise BadInput(f"form 'flex' needs heads of at least {_LEAST_SIZE} on cuda, got {sizes}; use 'blocks'")
        return
    if grads:
        raise BadInput("form 'flex' has no backward pass on the CPU; use 'blocks' to train, or torch.no_grad()")
    if type(pipeline.normalize) is not Softmax:
        raise BadInput(
            f"form 'flex' needs the sum under each softmax for {_name(pipeline.normalize)}, which torch's kernel for "
            "the CPU does not return; use 'blocks'"
        )


def attend_by_flex(
    pipeline: Pipeline, q: Tensor, k: Tensor, v: Tensor, places: Places, *, backend: Backend = "inductor"
) -> Tensor:
    """Return the output of ``pipeline`` by flex_attention.

    Args:
        pipeline: what happens between queries and output.
        q: queries, (B, T, H, K).
        k: keys, (B, S, G, K).
        v: values, (B, S, G, V).
        places: where they stand.
        backend: ``"eager"`` runs uncompiled, which is slow, writes the matrix out and takes float64.

    Shapes:
        -> (B, T, H, V)

    Example:
        >>> from torchgraft.engines.attention import Alibi, dot, softmax
        >>> x, place = torch.zeros(1, 3, 2, 4), torch.arange(3)
        >>> pipeline = Pipeline(dot, Alibi(torch.ones(2)), softmax, 0.5)
        >>> attend_by_flex(pipeline, x, x, x, Places(place, place, ordered=True), backend="eager").shape
        torch.Size([1, 3, 2, 4])

    Raises:
        BadInput: flex_attention cannot compute the pipeline, the device has no kernel for it, or none could be made.
    """
    why = obstacle(pipeline)
    if why is not None:
        raise BadInput(f"flex_attention cannot compute this attention: {why}; use form 'blocks'")
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    heads = [x.to(dtype).transpose(1, 2) for x in (q, k, v)]
    tensors = pipeline.tensors()
    grads = torch.is_grad_enabled() and any(each.requires_grad for each in (*heads, *tensors))
    if backend == "inductor":
        _refuse(pipeline, heads[0], heads[2], grads)
    if not grads:
        heads, tensors = [each.detach() for each in heads], [each.detach() for each in tensors]
    if 0 in (*q.shape[:3], k.shape[1], v.shape[-1]):
        return v.new_zeros(*q.shape[:3], v.shape[-1])
    # A tensor that two stages hold becomes two: flex_attention differentiates one look-up of each.
    tensors = [each.clone() if any(each is other for other in tensors[:n]) else each for n, each in enumerate(tensors)]
    mask = _spoken(pipeline.mask, places, q.shape[:3].numel() * k.shape[1])
    wide = torch.promote_types(dtype, torch.float32)
    ready = pipeline.with_tensors(tuple(tensors))
    ready = replace(ready, mask=mask, transform=ready_for_pairs(ready.transform, places.query, places.key, wide))
    blocks = None if mask is None else _blocks(mask, places)
    counts = torch.full((1, 1, 1, 1), k.shape[1], device=q.device) if blocks is None else blocks.counts
    if torch.compiler.is_compiling():
        mixed = _run(ready, blocks, counts, (places.query, places.key), *heads)
    else:
        stages = (ready.score, ready.transform, ready.normalize, ready.mask)
        static = q.device.type == "cpu"
        first = 0 if static else 2
        sizes = (dtype, q.device, grads, q.shape[first:], k.shape[first:], v.shape[first:])
        kind = (_kind(stages, static), sizes, ready.scale)
        failed = _FAILED.get((kind, backend))
        if failed is not None:
            raise BadInput(failed)
        try:
            mixed = _compiled(kind, backend, static)(ready, blocks, counts, (places.query, places.key), *heads)
        except torch._dynamo.exc.TorchDynamoException as error:
            words = str(error).strip().splitlines() or [type(error).__name__]
            failed = f"form 'flex' could not be compiled here ({words[0]}); use 'blocks'"
            _FAILED[kind, backend] = failed
            raise BadInput(failed) from error
    return mixed.transpose(1, 2).to(v.dtype)
