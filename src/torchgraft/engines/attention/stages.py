"""The stages between queries and weights: a score for each pair, transforms of scores, and how a row becomes weights.

A stage is a frozen dataclass that is called on a block. Its fields that are tensors (a temperature, a slope, the
coefficients of a learned function) are what gradients flow to besides queries, keys and values; fields that are stages
themselves, or tuples of them, are looked into. A plain function will do where there is nothing to learn.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from torchgraft.engines.attention.pair import Pair
from torchgraft.engines.attention.rows import Rows
from torchgraft.engines.native import library, traced

__all__ = [
    "L1",
    "Chain",
    "Divided",
    "Dot",
    "Gaussian",
    "Normalize",
    "Reweighted",
    "Score",
    "Shifted",
    "Softmax",
    "Stage",
    "Tempered",
    "Transform",
    "Unnormalized",
    "dot",
    "exp",
    "heads_alike",
    "is_pointwise",
    "learned",
    "l1",
    "pointwise",
    "ready_for_pairs",
    "rebuilt",
    "relu",
    "sigmoid",
    "softmax",
    "softplus",
    "unnormalized",
]

#: Queries (B, H, t, K), keys (B, H, s, K) and the scale -> scores (B, H, t, s).
Score: TypeAlias = "Callable[[Tensor, Tensor, float], Tensor]"
#: Scores (B, H, t, s) and what is known of the block -> scores or unnormalised weights of the same shape.
Transform: TypeAlias = "Callable[[Tensor, Rows], Tensor]"
#: Transformed scores (B, H, t, s) and what is known of the block -> weights, zero where a key may not be seen.
Normalize: TypeAlias = "Callable[[Tensor, Rows], Tensor]"
_Function = TypeVar("_Function", bound="Transform")
_POINTWISE: set[Any] = set()


def pointwise(function: _Function) -> _Function:
    """Mark a function that turns every score by itself into a weight of 0 or more, so that kernels of pairs can use it.

    Of the rows it may ask ``visible()`` and ``distance()``, and nothing else.

    Example:
        >>> @pointwise
        ... def squares(s, rows):
        ...     return s * s
        >>> is_pointwise(squares)
        True
    """
    _POINTWISE.add(function)
    return function


def is_pointwise(function: object) -> bool:
    """Return whether ``function`` was marked by :func:`pointwise`."""
    return not isinstance(function, Stage) and function in _POINTWISE


def ready_for_pairs(stage: Any, query_place: Tensor, key_place: Tensor, dtype: torch.dtype) -> Any:
    """Return ``stage`` with what it looks up for these positions written out, where it looks up anything."""
    make = getattr(stage, "for_pairs", None)
    return stage if make is None else make(query_place, key_place, dtype)


@dataclass(frozen=True, eq=False)
class Stage:
    """A stage with fields; see the module."""


def learned(stage: object) -> list[Tensor]:
    """Return the tensors in the fields of ``stage``, in order, those of stages within it included.

    Example:
        >>> [t.item() for t in learned(Chain((Tempered(torch.tensor(2.0)), relu)))]
        [2.0]
    """
    if isinstance(stage, Tensor):
        return [stage]
    if isinstance(stage, tuple):
        return [found for each in stage for found in learned(each)]
    if isinstance(stage, Stage):
        return [found for each in dataclasses.fields(stage) for found in learned(getattr(stage, each.name))]
    return []


def rebuilt(stage: Any, tensors: Iterator[Tensor]) -> Any:
    """Return ``stage`` with the next of ``tensors`` in the place of each tensor that :func:`learned` finds."""
    if isinstance(stage, Tensor):
        return next(tensors)
    if isinstance(stage, tuple):
        return tuple(rebuilt(each, tensors) for each in stage)
    if isinstance(stage, Stage):
        fields = {each.name: rebuilt(getattr(stage, each.name), tensors) for each in dataclasses.fields(stage)}
        return dataclasses.replace(stage, **fields)
    return stage


def heads_alike(stage: object) -> bool:
    """Say whether ``stage`` is known to do the same to every head, so that heads may go one after another.

    Example:
        >>> heads_alike(softplus), heads_alike(Tempered(torch.ones(1, 2, 1, 1))), heads_alike(lambda s, rows: s)
        (True, False, False)
    """
    if isinstance(stage, Chain):
        return all(heads_alike(part) for part in stage.parts)
    if isinstance(stage, Reweighted):
        return heads_alike(stage.first)
    plain = type(stage) in (Dot, Gaussian, Softmax, Unnormalized, L1)
    return plain or any(stage is known for known in (None, sigmoid, relu, softplus, exp))


def _rows_of(value: Tensor, rows: Rows) -> Tensor:
    """Return the part of ``value`` that belongs to the rows, where it has one row for each query; else ``value``."""
    return value[..., rows.queries, :] if value.ndim >= 2 and value.shape[-2] != 1 else value


@dataclass(frozen=True, eq=False)
class Dot(Stage):
    """s_ij = scale q_i . k_j."""

    def __call__(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """Return the scores."""
        return (q * scale) @ k.mT


@dataclass(frozen=True, eq=False)
class Gaussian(Stage):
    """s_ij = -scale |q_i - k_j|^2 / 2, whose exponential is a Gaussian kernel: 1 for equal tokens."""

    def __call__(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """Return the scores, none of them above 0."""
        lengths = (q * q).sum(-1, keepdim=True) + (k * k).sum(-1)[..., None, :]  # (B, H, t, s)
        return ((q @ k.mT) * 2 - lengths).clamp(max=0) * (scale / 2)


@dataclass(frozen=True, eq=False)
class Chain(Stage):
    """One transform after another, the first of them first."""

    parts: tuple[Transform, ...]

    def __call__(self, s: Tensor, rows: Rows) -> Tensor:
        """Return the scores after the last transform."""
        for part in self.parts:
            s = part(s, rows)
        return s

    def for_pairs(self, query_place: Tensor, key_place: Tensor, dtype: torch.dtype) -> Chain:
        """Return the chain with each part made ready for single pairs."""
        return Chain(tuple(ready_for_pairs(part, query_place, key_place, dtype) for part in self.parts))


@dataclass(frozen=True, eq=False)
class Tempered(Stage):
    """s_ij -> t_i s_ij, an inverse temperature.

    Args:
        inverse: of a shape that broadcasts to (B, H, T, 1) or (B, H, T, S); only S that are 1 or all keys.
    """

    inverse: Tensor

    def __call__(self, s: Tensor, rows: Rows) -> Tensor:
        """Return the tempered scores."""
        part = _rows_of(self.inverse, rows)
        part = part[..., rows.keys] if part.ndim and part.shape[-1] != 1 else part
        return s.mul_(part) if rows.overwrite else s * part

    def of_pair(self, s: Tensor, at: Pair) -> Tensor:
        """Return the tempered score of one pair."""
        return s * at.of(self.inverse).to(s.dtype)


@dataclass(frozen=True, eq=False)
class Shifted(Stage):
    """s_ij -> s_ij + b, a bias for each head, or for each head and query.

    Args:
        bias: of a shape that broadcasts to (B, H, T, 1).
    """

    bias: Tensor

    def __call__(self, s: Tensor, rows: Rows) -> Tensor:
        """Return the shifted scores."""
        part = _rows_of(self.bias, rows)
        return s.add_(part) if rows.overwrite else s + part

    def of_pair(self, s: Tensor, at: Pair) -> Tensor:
        """Return the shifted score of one pair."""
        return s + at.of(self.bias).to(s.dtype)


@pointwise
def sigmoid(s: Tensor, rows: Rows) -> Tensor:
    """Return 1 / (1 + e^-s)."""
    return s.sigmoid_() if rows.overwrite else s.sigmoid()


@pointwise
def relu(s: Tensor, rows: Rows) -> Tensor:
    """Return max(s, 0)."""
    return s.relu_() if rows.overwrite else s.relu()


@pointwise
def softplus(s: Tensor, rows: Rows) -> Tensor:
    """Return log(1 + e^s), exact for small and for large scores alike."""
    return _fast_softplus(s) if _may_be_fast(s, rows) else F.softplus(s)


def _may_be_fast(s: Tensor, rows: Rows) -> bool:
    plain = s.device.type == "cpu" and s.dtype == torch.float32 and s.numel() > 0
    return rows.overwrite and plain and not traced()


def _compiled_softplus(s: Tensor, sums: Tensor | None = None) -> bool:
    """Write log(1 + e^s) over ``s`` and the sums of its rows into ``sums``, or say that this cannot be done here."""
    made = library(Path(__file__).with_name("kernel.cpp"))
    if made is None or not s.is_contiguous():
        return False
    given = [ctypes.c_void_p(None if value is None else value.data_ptr()) for value in (s, sums)]
    size = s.shape[-1]
    shape = [ctypes.c_int64(s.numel() // size), ctypes.c_int64(size)]
    made.torchgraft_softplus(*given, *shape, torch.get_num_threads())
    return True


def _fast_softplus(s: Tensor) -> Tensor:
    """Write log(1 + e^s) over ``s``, in float32 on the CPU: 1e-6 of the value exact down to e^-87, and lower nothing.

    In one compiled pass where a compiler is at hand, which is exact to 3e-7. Torch's own is slower in any case, and
    much slower where squares of e^s are too small to be normal numbers.
    """
    if _compiled_softplus(s):
        return s
    least, most = (float(end) for end in torch.aminmax(s))
    if least > -28.0 and most < 80.0:
        return s.exp_().log1p_()
    u = s.clamp(-87.0, 87.0).exp_()
    one_more = u + 1
    u.sub_(one_more - 1).div_(one_more)  # what rounding has taken from 1 + u, as a part of the logarithm
    return torch.maximum(s, u.add_(one_more.log_()), out=s)


@pointwise
def exp(s: Tensor, rows: Rows) -> Tensor:
    """Return e^s; for scores that are bounded from above, as those of :class:`Gaussian` are."""
    return s.exp_() if rows.overwrite else s.exp()


@dataclass(frozen=True, eq=False)
class Softmax(Stage):
    """A_ij = e^s_ij / sum_j e^s_ij over the keys that row i sees; a row that sees none is zero."""

    def __call__(self, s: Tensor, rows: Rows) -> Tensor:
        """Return the weights."""
        weights = rows.hide(s, torch.finfo(s.dtype).min).softmax(-1)
        return rows.hide(weights, 0.0)


@dataclass(frozen=True, eq=False)
class Unnormalized(Stage):
    """A_ij = s_ij, as the transform left them: rows need not sum to 1."""

    def __call__(self, s: Tensor, rows: Rows) -> Tensor:
        """Return the weights."""
        return rows.hide(s, 0.0)


@dataclass(frozen=True, eq=False)
class Divided(Stage, ABC):
    """A normaliser that divides every row by one number, which is cheaper done to what the row has mixed."""

    @abstractmethod
    def parts(self, s: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return weights, (B, H, t, s), and what each row is to be divided by, (B, H, t, 1)."""

    def __call__(self, s: Tensor, rows: Rows) -> Tensor:
        """Return the weights."""
        weights, sums = self.parts(s, rows)
        return weights.div_(sums) if rows.overwrite else weights / sums

    def parts_after(self, transform: Transform | None, s: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return :meth:`parts` of transformed scores; a place to do both in one pass."""
        return self.parts(s if transform is None else transform(s, rows), rows)


@dataclass(frozen=True, eq=False)
class L1(Divided):
    """A_ij = s_ij / (sum_j |s_ij| + eps): for weights that a transform has made nonnegative, rows of sum 1.

    Args:
        eps: added to the sum, which may be zero.
        signed: whether some s_ij may be negative; without, taking absolute values is saved.
    """

    eps: float = 1e-12
    signed: bool = False

    def parts(self, s: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return the scores, and their sums."""
        weights = rows.hide(s, 0.0)
        return weights, (weights.abs() if self.signed else weights).sum(-1, keepdim=True) + self.eps

    def parts_after(self, transform: Transform | None, s: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return the transformed scores, and their sums; softplus sums its rows while it makes them."""
        if transform is softplus and _may_be_fast(s, rows):
            s, sums = rows.hide(s, -math.inf), s.new_empty(*s.shape[:-1], 1)  # softplus makes zeros of them
            if _compiled_softplus(s, sums):
                return s, sums.add_(self.eps)
        return super().parts_after(transform, s, rows)


@dataclass(frozen=True, eq=False)
class Reweighted(Divided):
    """A_ij -> max(N_i A_ij - o_i, 0)^p, scaled to rows of sum 1; N_i is the number of keys that row i sees.

    With o_i = 1 every weight below the mean of its row becomes zero.

    Args:
        first: what makes the weights A.
        power: p.
        offset: o_i of a row that sees more than ``free`` keys; of others it is 0.
        free: rows that see so few keys keep all of them.
        eps: added to the sum of a row.
    """

    first: Normalize
    power: float = 15.0
    offset: float = 1.0
    free: int = 3
    eps: float = 1e-8

    def parts(self, s: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return the powers, and their sums."""
        seen = rows.visible()
        weights, offset = self.first(s, rows), torch.where(seen > self.free, self.offset, 0.0)
        if rows.overwrite:
            sharp = weights.mul_(seen).sub_(offset).clamp_min_(0)
        else:
            sharp = (weights * seen - offset).clamp_min(0)
        # Powers of what is relative to the largest of the row neither overflow nor vanish, and their ratios are equal;
        # eps is meant for the sum as the paper writes it, and is scaled alike.
        tiny = torch.finfo(s.dtype).tiny
        top = sharp.detach().amax(-1, keepdim=True).clamp_min(tiny)
        if rows.overwrite:  # what would become too small to be a normal number takes very long, and is worth nothing
            powers = F.threshold(sharp.div_(top), tiny ** (1 / self.power), 0.0, inplace=True).pow_(self.power)
        else:
            powers = (sharp / top) ** self.power
        powers = rows.hide(powers, 0.0)
        return powers, powers.sum(-1, keepdim=True) + self.eps * top**-self.power


dot, softmax, unnormalized, l1 = Dot(), Softmax(), Unnormalized(), L1()
