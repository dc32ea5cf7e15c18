"""Attention maps of any model while it runs: what each head gives each token, what it mixes, and heads switched off.

Calls of ``scaled_dot_product_attention`` and products of a softmax (or ReLU) of four dimensions with values are seen
through a function mode, so that models of this library, of torch and of transformers (eager or fused) need not help.
Layers are numbered by the order of their calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torchgraft.bench.meters.forward import plain_attention
from torchgraft.engines.surgery.convert import convertible
from torchgraft.errors import BadInput

__all__ = ["HeadCall", "attention_maps", "without_heads"]

_MAKES = frozenset(("softmax", "relu"))
_KEEPS = frozenset(("to", "type", "float", "type_as", "dropout", "div", "__truediv__", "mul", "__mul__", "masked_fill"))
_MIXES = frozenset(("matmul", "__matmul__"))


@dataclass(frozen=True)
class HeadCall:
    """What the heads of one layer did in one call.

    Args:
        weights: A, (B, H, T, S).
        values: v, (B, H, S, V); those of shared groups repeated.
    """

    weights: Tensor
    values: Tensor


class _Watch(TorchFunctionMode):
    """Call ``meet`` with the number, weights, values and output of every attention; what it returns is the output."""

    def __init__(self, meet: Callable[[int, Callable[[], HeadCall], Tensor], Tensor]) -> None:
        super().__init__()
        self.meet, self.count = meet, 0
        self.maps: dict[int, Tensor] = {}  # results that are attention weights, kept so that no number is used twice

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` and look at what it is."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        out = func(*args, **kwargs)
        if name == "scaled_dot_product_attention":
            return self._met(lambda: _fused(*args, **kwargs), out)
        first = args[0] if args else kwargs.get("input")
        known = id(first) in self.maps
        if known and name in _MIXES and len(args) > 1:
            weights, values = self.maps[id(first)], args[1]
            return self._met(lambda: HeadCall(weights, values), out)
        if isinstance(out, Tensor) and out.ndim == 4 and (name in _MAKES or (known and name in _KEEPS)):
            self.maps[id(out)] = out
        return out

    def _met(self, seen: Callable[[], HeadCall], out: Tensor) -> Tensor:
        self.maps.clear()
        self.count += 1
        return self.meet(self.count - 1, seen, out)


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> HeadCall:
    """Return the weights and values of a fused call, by the definition of ``scaled_dot_product_attention``."""
    repeat = query.shape[-3] // key.shape[-3] if enable_gqa else 1
    key, value = (x.repeat_interleave(repeat, -3) if repeat > 1 else x for x in (key, value))
    scores = query @ key.transpose(-1, -2) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
    if attn_mask is not None:
        boolean = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -math.inf) if boolean else scores + attn_mask
    return HeadCall(scores.softmax(-1), value)


@contextmanager
def _watched(model: nn.Module, watch: _Watch) -> Iterator[None]:
    names = convertible(model)
    if names:
        raise BadInput(f"{names[0]!r} keeps its heads to itself; pass torchgraft.engines.surgery.convert(model)")
    with plain_attention(), watch:
        yield


@contextmanager
def attention_maps(model: nn.Module) -> Iterator[list[HeadCall]]:
    """Keep the attention of every layer while the block runs, in the order of the calls.

    Args:
        model: the model that runs in the block.

    Example:
        >>> from torchgraft.bench.models import Attention
        >>> layer = Attention(8, 2, causal=True)
        >>> with attention_maps(layer) as seen:
        ...     _ = layer(torch.randn(1, 3, 8))
        >>> seen[0].weights.shape, seen[0].weights[0, 0, 0].tolist()
        (torch.Size([1, 2, 3, 3]), [1.0, 0.0, 0.0])

    Raises:
        BadInput: the model holds an ``nn.MultiheadAttention``, whose insides cannot be seen.
    """
    kept: list[HeadCall] = []

    def meet(number: int, seen: Callable[[], HeadCall], out: Tensor) -> Tensor:
        call = seen()
        kept.append(HeadCall(call.weights.detach(), call.values.detach()))
        return out

    with _watched(model, _Watch(meet)):
        yield kept


@contextmanager
def without_heads(model: nn.Module, heads: Mapping[int, Iterable[int]]) -> Iterator[None]:
    """Let some heads add nothing while the block runs, in each pass over the model.

    Args:
        model: the model that runs, once, in the block.
        heads: layer (by order of calls) -> heads that are switched off.

    Raises:
        BadInput: a layer has no such head.
    """
    off = {layer: sorted(set(numbers)) for layer, numbers in heads.items()}

    def meet(number: int, seen: Callable[[], HeadCall], out: Tensor) -> Tensor:
        gone = off.get(number, [])
        if not gone:
            return out
        if gone[0] < 0 or gone[-1] >= out.shape[1]:
            raise BadInput(f"layer {number} has heads 0 to {out.shape[1] - 1}, got {gone}")
        keep = torch.ones(out.shape[1], dtype=torch.bool, device=out.device)
        keep[gone] = False
        return out.where(keep[:, None, None], out.new_zeros(()))

    with _watched(model, _Watch(meet)):
        yield
