"""Linear attention with ReLU features, few heads, and a depthwise convolution of the values over the image.

Paper: `LiT: Delving into a Simplified Linear Diffusion Transformer for Image Generation
<https://arxiv.org/abs/2501.12976>`_.

Equation: ``o_i = relu(q_i)^T sum_j relu(k_j) v_j^T / (relu(q_i) . sum_j relu(k_j)) + (DWConv_5x5(V))_i``; a student
that takes over every other weight of a diffusion transformer learns by
``L = L_simple + lambda_1 |eps_t - eps_s|^2 + lambda_2 |Sigma_t - Sigma_s|^2``.

Departures: tokens that fill no square are laid out in rows of the next larger square, one leading token more than a
square (a class token) stands outside the image; a causal form, with a causal convolution over the last tokens, is ours;
values of lambda and the number of heads are from the seed's notes, not from the paper's text.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines.linearize.kernel import FeatureKernel, Heads, wide
from torchgraft.engines.linearize.mixer import KernelMixer, StatefulKernelMixer
from torchgraft.engines.recurrence.mixer import State
from torchgraft.engines.surgery.swap import Where, swap
from torchgraft.errors import BadInput

__all__ = ["CARD", "LiTAttention", "LiTKernel", "hybrid_distill", "linearize_dit"]

CARD = Card(
    key="lit-linear-dit",
    title="LiT linear attention",
    seed_id=256,
    authors="Wang, Ning, Yang and others, 2025",
    reference="https://arxiv.org/abs/2501.12976",
    family="parts/mixers",
    kind="part",
    engine=("recurrence", "surgery"),
    equation="o_i = relu(q_i)^T sum_j relu(k_j) v_j^T / (relu(q_i) . sum_j relu(k_j)) + (DWConv_5x5(V))_i",
    entry="LiTAttention",
    capabilities=frozenset({"linear-time", "compilable"}),
    declared={"parameters": "4 * d_model**2 + d_model * (kernel_size**2 + 1)"},
    example={"d_model": 16, "num_heads": 2, "kernel_size": 3},
    shapes=((2, 16, 16),),
    oracles=(
        "products from the right equal products from the left, in float64 to 1e-10",
        "without the convolution, one head and features left as they are give (Q K^T) V over the sums of rows",
        "after linearize_dit every tensor outside attention is bit for bit the teacher's",
        "hybrid_distill is exactly zero, gradients too, where student and teacher say the same",
    ),
    claim=Claim(
        text="A small diffusion transformer on 8x8 digits (four blocks, width 64, 16 patches); a linear student with a "
        "fifth of its steps, with and without taking over its weights; Frechet distance of samples in the features of "
        "a digits classifier.",
        figure="with weights taken over and distillation within 15 % of the teacher's distance, without >= 1.5x worse; "
        "2 heads not worse than 8 at equal steps",
    ),
    choose_when="an image transformer with many tokens, a diffusion transformer above all, must become linear",
    choose_instead="hedgehog where softmax attention is sharp and its weights must be kept",
    confidence="medium",
    bibtex="@inproceedings{wang2025lit, title={LiT: Delving into a Simplified Linear Diffusion Transformer for Image "
    "Generation}, author={Wang, Jiahao and Ning, Ning and others}, booktitle={ICCV}, year={2025}}",
)


def image_grid(tokens: int) -> tuple[int, int]:
    """Return how many leading tokens stand outside the image, and the side of the square that holds the others.

    Example:
        >>> image_grid(16), image_grid(17), image_grid(12)
        ((0, 4), (1, 4), (0, 4))
    """
    side = math.isqrt(tokens)
    if side * side == tokens - 1 and tokens > 2:
        return 1, side
    return 0, side if side * side == tokens else side + 1


class LiTKernel(FeatureKernel):
    """ReLU linear attention, and a depthwise convolution of the values.

    Args:
        num_heads: H of the projections.
        key_size: K.
        value_size: V.
        groups: heads of the linear attention, which divide the channels anew; ``None`` for H.
        kernel_size: taps of the convolution along each axis; odd, or 0 for none.
        act: ``"relu"``, or ``"elu"`` for elu + 1, which is positive everywhere.
        grid: whether tokens lie in an image; otherwise the convolution runs along the tokens, backwards only.
    """

    def __init__(
        self,
        *,
        num_heads: int,
        key_size: int,
        value_size: int,
        groups: int | None = 2,
        kernel_size: int = 5,
        act: Literal["relu", "elu"] = "relu",
        grid: bool = True,
    ) -> None:
        super().__init__(num_heads=num_heads, key_size=key_size, value_size=value_size)
        groups = num_heads if groups is None else groups
        if groups < 1 or num_heads * key_size % groups or num_heads * value_size % groups:
            raise BadInput(f"the number of heads must divide {num_heads * key_size} channels, got {groups}")
        if kernel_size < 0 or (kernel_size and kernel_size % 2 == 0):
            raise BadInput(f"kernel_size must be odd, or 0 for no convolution, got {kernel_size}")
        if act not in ("relu", "elu"):
            raise BadInput(f"act must be 'relu' or 'elu', got {act!r}")
        self.groups, self.kernel_size, self.act, self.grid = groups, kernel_size, act, grid
        if kernel_size:
            wide_ = num_heads * value_size
            shape = (wide_, 1, kernel_size, kernel_size) if grid else (wide_, 1, kernel_size)
            bound = math.prod(shape[2:]) ** -0.5
            self.weight = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
            self.bias = nn.Parameter(torch.zeros(wide_))

    def settle(self) -> None:
        """Begin with a convolution that adds nothing to what was inherited."""
        if self.kernel_size:
            nn.init.zeros_(self.weight)

    @property
    def memory_shape(self) -> tuple[int, int, int]:  # noqa: D102
        keys, values = self.num_heads * self.key_size, self.num_heads * self.value_size
        return self.groups, keys // self.groups, values // self.groups + 1

    def _grouped(self, x: Tensor) -> Tensor:
        return torch.unflatten(x.flatten(2), 2, (self.groups, -1))

    def features(self, heads: Heads) -> tuple[Tensor, Tensor]:  # noqa: D102
        q, k = wide(heads.q), wide(heads.k)
        q, k = (q.relu(), k.relu()) if self.act == "relu" else (F.elu(q) + 1, F.elu(k) + 1)
        return self._grouped(q), self._grouped(k)

    def values(self, heads: Heads) -> Tensor:  # noqa: D102
        return self._grouped(heads.v)

    def _line(self, v: Tensor, past: Tensor) -> Tensor:
        """Convolve along the tokens after ``past``, (B, kernel_size - 1, D); (B, T, D) -> (B, T, D)."""
        line = torch.cat([past.to(v.dtype), v], dim=1).mT
        return F.conv1d(line, self.weight.to(v.dtype), self.bias.to(v.dtype), groups=v.shape[-1]).mT

    def _local(self, heads: Heads) -> Tensor:
        """Return the convolved values of a whole sequence, (B, T, D)."""
        v = heads.v.flatten(2)
        if heads.seen is not None:
            v = v * heads.seen[..., None]
        if not self.grid:
            return self._line(v, v.new_zeros(len(v), self.kernel_size - 1, v.shape[-1]))
        outside, side = image_grid(v.shape[1])
        image = F.pad(v[:, outside:], (0, 0, 0, side * side - (v.shape[1] - outside)))
        image = torch.unflatten(image.mT, 2, (side, side))  # (B, D, side, side)
        weight, bias = self.weight.to(v.dtype), self.bias.to(v.dtype)
        image = F.conv2d(image, weight, bias, padding=self.kernel_size // 2, groups=v.shape[-1])
        local = image.flatten(2).mT[:, : v.shape[1] - outside]
        return F.pad(local, (0, 0, outside, 0))

    def finish(self, o: Tensor, heads: Heads) -> Tensor:  # noqa: D102
        return torch.unflatten(o.flatten(2), 2, (self.num_heads, -1)).to(heads.v.dtype)

    def mix_all(self, heads: Heads) -> Tensor:  # noqa: D102
        o = super().mix_all(heads)
        return o + torch.unflatten(self._local(heads), 2, (self.num_heads, -1)) if self.kernel_size else o

    def init_state(self, batch_size: int, like: Tensor) -> State:  # noqa: D102
        state = super().init_state(batch_size, like)
        if not self.kernel_size:
            return state
        past = like.new_zeros(batch_size, self.kernel_size - 1, self.num_heads * self.value_size)
        return {**state, "past": past.to(state["memory"].dtype)}

    def advance(self, heads: Heads, state: State) -> tuple[Tensor, State]:  # noqa: D102
        if self.grid and self.kernel_size:
            raise BadInput("a convolution over an image is not causal; give grid=False")
        o, after = super().advance(heads, state)
        if not self.kernel_size:
            return o, after
        v = heads.v.flatten(2)
        if heads.seen is not None:
            v = v * heads.seen[..., None]
        past = torch.cat([state["past"], v.to(state["past"].dtype)], dim=1)
        last = past.shape[1] - self.kernel_size + 1
        local = torch.unflatten(self._line(v, state["past"]), 2, (self.num_heads, -1))
        return o + local, {**after, "past": past[:, last:]}


class LiTAttention(KernelMixer):
    """Linear attention with ReLU features and few heads, and a depthwise convolution of the values over the image.

    Args:
        d_model: the width D.
        num_heads: H; the paper finds that few cost nothing in time and are better than many.
        kernel_size: taps of the convolution along each axis; 0 for none.
        act: ``"relu"``, or ``"elu"`` for elu + 1.

    Shapes:
        x: (B, T, D), an image row by row, after one class token perhaps -> (B, T, D)

    Example:
        >>> LiTAttention(16, num_heads=2)(torch.randn(1, 9, 16)).shape
        torch.Size([1, 9, 16])

    Raises:
        BadInput: ``num_heads`` does not divide ``d_model``, or ``kernel_size`` is even.
    """

    causal = False
    tune: ClassVar[str] = "all"
    mimics: ClassVar[bool] = False
    distils: ClassVar[bool] = True

    def __init__(
        self, d_model: int, *, num_heads: int = 2, kernel_size: int = 5, act: Literal["relu", "elu"] = "relu"
    ) -> None:
        options = {"groups": None, "kernel_size": kernel_size, "act": act}
        super().__init__(d_model, num_heads=num_heads, options=options)

    @classmethod
    def build_kernel(  # noqa: D102
        cls, *, num_heads: int, key_size: int, value_size: int, options: Mapping[str, Any], image: bool = True
    ) -> LiTKernel:
        options = {"grid": image, **options}
        return LiTKernel(num_heads=num_heads, key_size=key_size, value_size=value_size, **options)

    @classmethod
    def instead_of_softmax(  # noqa: D102
        cls, d_model: int, *, num_heads: int, rotary: bool, options: Mapping[str, Any]
    ) -> StatefulKernelMixer:
        return CausalLiTAttention(d_model, num_heads=num_heads, rotary=rotary, **options)


class CausalLiTAttention(StatefulKernelMixer):
    """The same along a sequence: causal sums, and a causal convolution over the last tokens.

    Args:
        d_model: the width D.
        num_heads: H of the projections.
        rotary: whether queries and keys are turned by their position.
        groups: heads of the linear attention, which divide the channels anew.
        kernel_size: taps of the convolution; 0 for none.
        act: ``"relu"``, or ``"elu"`` for elu + 1.

    Shapes:
        x: (B, T, D) -> (B, T, D)
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 2,
        rotary: bool = False,
        groups: int | None = 2,
        kernel_size: int = 5,
        act: Literal["relu", "elu"] = "relu",
    ) -> None:
        options = {"groups": groups, "kernel_size": kernel_size, "act": act, "grid": False}
        super().__init__(d_model, num_heads=num_heads, rotary=rotary, options=options)

    @classmethod
    def build_kernel(
        cls, *, num_heads: int, key_size: int, value_size: int, options: Mapping[str, Any], image: bool = False
    ) -> LiTKernel:
        return LiTKernel(num_heads=num_heads, key_size=key_size, value_size=value_size, **options)


def linearize_dit(
    dit: nn.Module, where: Where, *, d_model: int, num_heads: int = 2, kernel_size: int = 5, seed: int = 0
) -> nn.Module:
    """Return a copy of a diffusion transformer with fresh linear attention and every other weight taken over.

    Args:
        dit: the trained model; left as it is.
        where: which modules are its attentions, (B, T, D) -> (B, T, D): a class, a glob of names, or a predicate.
        d_model: the width D.
        num_heads: heads of the linear attention.
        kernel_size: taps of its convolution along each axis.
        seed: of the fresh weights.

    Example:
        >>> student = linearize_dit(nn.Sequential(nn.Linear(8, 8), nn.Identity()), nn.Identity, d_model=8)
        >>> type(student[1]).__name__
        'LiTAttention'

    Raises:
        BadInput: nothing is selected.
    """
    student = copy.deepcopy(dit)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        swap(student, where, lambda old, name: LiTAttention(d_model, num_heads=num_heads, kernel_size=kernel_size))
    return student


def hybrid_distill(
    student: tuple[Tensor, Tensor | None],
    teacher: tuple[Tensor, Tensor | None],
    *,
    l_noise: float = 0.5,
    l_var: float = 0.05,
) -> Tensor:
    """Return ``l_noise |eps_t - eps_s|^2 + l_var |Sigma_t - Sigma_s|^2``, means over all entries.

    Args:
        student: predicted noise, and predicted variance or ``None`` where it is fixed.
        teacher: the same of the teacher; no gradient flows there.
        l_noise: weight of the noise.
        l_var: weight of the variance.

    Example:
        >>> eps = torch.ones(2, 3)
        >>> float(hybrid_distill((eps, None), (eps * 0, None)))
        0.5

    Raises:
        BadInput: one predicts a variance and the other does not, or the shapes differ.
    """
    if (student[1] is None) != (teacher[1] is None) or student[0].shape != teacher[0].shape:
        raise BadInput("student and teacher must both predict a variance or neither, and noise of one shape")
    loss = l_noise * (teacher[0].detach() - student[0]).square().mean()
    if student[1] is not None and teacher[1] is not None:
        loss = loss + l_var * (teacher[1].detach() - student[1]).square().mean()
    return loss
