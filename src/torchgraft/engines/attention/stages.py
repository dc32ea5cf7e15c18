"""The stages between queries and weights: a score for each pair, transforms of scores, and how a row becomes weights.

A stage is a frozen dataclass that is called on a block. Its fields that are tensors (a temperature, a slope, the
coefficients of a learned function) are what gradients flow to besides queries, keys and values; fields that are stages
themselves, or tuples of them, are looked into. A plain function will do where there is nothing to learn.
"""

from __future__ import annotations

import ctypes
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from torchgraft.engines.attention.rows import Rows
from torchgraft.engines.native import library

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
    "learned",
    "l1",
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


def sigmoid(s: Tensor, rows: Rows) -> Tensor:
    """Return 1 / (1 + e^-s)."""
    return s.sigmoid_() if rows.overwrite else s.sigmoid()


def relu(s: Tensor, rows: Rows) -> Tensor:
    """Return max(s, 0)."""
    return s.relu_() if rows.overwrite else s.relu()


def softplus(s: Tensor, rows: Rows) -> Tensor:
    """Return log(1 + e^s), exact for small and for large scores alike."""
    fast = rows.overwrite and s.device.type == "cpu" and s.dtype == torch.float32 and s.numel() > 0
    return _fast_softplus(s) if fast and not torch.compiler.is_compiling() else F.softplus(s)


def _fast_softplus(s: Tensor) -> Tensor:
    """Write log(1 + e^s) over ``s``, in float32 on the CPU: 1e-6 of the value exact down to e^-87, and lower nothing.

    In one compiled pass where a compiler is at hand, which is exact to 2e-7. Torch's own is slower in any case, and
    much slower where squares of e^s are too small to be normal numbers.
    """
    made = library(Path(__file__).with_name("kernel.cpp"))
    if made is not None and s.is_contiguous():
        made.torchgraft_softplus(ctypes.c_void_p(s.data_ptr()), ctypes.c_int64(s.numel()), torch.get_num_threads())
        return s
    least, most = (float(end) for end in torch.aminmax(s))
    if least > -28.0 and most < 80.0:
        return s.exp_().log1p_()
    u = s.clamp(-87.0, 87.0).exp_()
    one_more = u + 1
    u.sub_(one_more - 1).div_(one_more)  # what rounding has taken from 1 + u, as a part of the logarithm
    return torch.maximum(s, u.add_(one_more.log_()), out=s)


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
