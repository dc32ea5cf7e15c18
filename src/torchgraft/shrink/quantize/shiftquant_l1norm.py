"""Train in few-bit integers: gradients in groups of channels whose scales differ by shifts, norms without squares.

`Towards Accurate and Efficient Sub-8-Bit Integer Training <https://arxiv.org/abs/2411.10948>`_

    k(c) = min(floor(log2(M / max|x_c|)), K - 1), s_k = 2^-k M / n, q_c = SR(x_c / s_k(c)), n = 2^(b-1) - 1
    sum_c x_c w_c ~ 2^-(K-1) s_0 s_w sum_c (q_c << (K - 1 - k(c))) w_c;   y = gamma (x - mu) / (mean|x - mu| + eps) +
    beta

c runs along the axis that the product sums over, so no channel is moved and no group is rescaled in float; SR rounds at
random, unbiased. :func:`shift_matmul` is that product in integers; training emulates it in floats and is slower than
plain training. It is no lever of ``fit``: what it would make cheaper is training, on hardware with such integers.

Departures: the paper's group boundaries could not be read, here they are powers of two of the largest range. Weights
are rounded to the nearest code of one scale a tensor. Master weights, bias and the optimiser stay float32.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import grad as nn_grad

from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines.quantize.fewbit import largest_code, stochastic_round
from torchgraft.engines.quantize.l1_norms import L1BatchNorm, L1LayerNorm, l1_norm_for, rounded_statistic
from torchgraft.engines.sites import ignored
from torchgraft.engines.surgery.swap import replace_module
from torchgraft.errors import BadInput

__all__ = [
    "CARD",
    "IntegerConv2d",
    "IntegerLinear",
    "L1BatchNorm",
    "L1LayerNorm",
    "ShiftCodes",
    "ShiftQuant",
    "integer_train",
    "rounded_statistic",
    "shift_matmul",
]

CARD = Card(
    key="shiftquant-l1norm",
    title="ShiftQuant and L1 normalisation: sub-8-bit integer training",
    seed_id=89,
    authors="Guo et al., 2024",
    reference="https://arxiv.org/abs/2411.10948",
    family="shrink/quantize",
    kind="tool",
    engine=("parametrize", "normalize"),
    equation="k(c) = min(floor(log2(M / m_c)), K - 1); q_c = SR(x_c n 2^k / M); sum_c x_c w_c = s sum_c (q_c << "
    "(K-1-k)) w_c",
    entry="integer_train",
    oracles=(
        "codes are unbiased: the mean of 10^4 draws lies within 4 standard errors, the variance of each is at most "
        "s^2 / 4",
        "the product in integers with shifts equals the product of the decoded tensors exactly",
        "one group is quantisation a tensor; the bound on the variance never rises with the groups and ends within 4 "
        "times that of a scale a channel",
        "L1 norms have mean 0 and mean magnitude 1, their gradient is the closed form, and they equal torch's norms on "
        "Gaussian input up to sqrt(2 / pi)",
        "with 8 bits each gradient points where the float one does (cosine > 0.999); the mean over draws is the "
        "gradient at the rounded weights and inputs",
    ),
    claim=Claim(
        text="digits, residual CNN with batch norm, 3 seeds, weights, activations and gradients in 4 bits: ShiftQuant "
        "with 4 groups against one scale a tensor, a scale a channel (which no shift executes) and float32; L1 "
        "against L2 batch norm with statistics and outputs in 4 bits.",
        figure="ShiftQuant within 1.5 points of fp32; of the cosine with the float gradient it recovers >= 70 % of "
        "the gap between a scale a tensor and a scale a channel; 4-bit L1 norm >= 4-bit L2 norm in accuracy",
    ),
    choose_when="You ask whether a model can be trained in few-bit integers, gradients included, before hardware for "
    "it.",
    choose_instead="quantized-distillation or nupes-power-quant where only the result must be small: this is an "
    "emulation, slower than float training, and leaves float weights.",
    confidence="medium",
    bibtex="@article{guo2024towards, title={Towards Accurate and Efficient Sub-8-Bit Integer Training}, author={Guo, "
    "Wenjin and Liu, Donglai and Xie, Weiying and Li, Yunsong and Ning, Xuefei and Meng, Zihan and Zeng, Shulin and "
    "Lei, Jie and Fang, Zhenman and Wang, Yu}, journal={arXiv preprint arXiv:2411.10948}, year={2024}}",
)


@dataclass(frozen=True)
class ShiftCodes:
    """A tensor as integers.

    Args:
        codes: q in [-n, n], of the tensor's shape and dtype.
        shifts: k of each channel, in a shape that broadcasts; ``None`` where each channel has a scale of its own.
        scale: s_0, or the scale of each channel where there are no shifts.
    """

    codes: Tensor
    shifts: Tensor | None
    scale: Tensor

    def values(self) -> Tensor:
        """Return the tensor that the codes stand for."""
        if self.shifts is None:
            return self.codes * self.scale
        return torch.ldexp(self.codes, -self.shifts) * self.scale


@dataclass(frozen=True)
class ShiftQuant:
    """A quantiser whose scales, one a group of channels, are s_0 2^-k.

    Args:
        bits: b, from 2 to 8.
        groups: K; 1 is one scale a tensor, ``None`` a scale a channel (the bound, which shifts cannot execute).
        stochastic: round at random, unbiased; otherwise to the nearest.

    Example:
        >>> x = torch.tensor([[7.0, 1.0], [-3.0, 1.6]])
        >>> made = ShiftQuant(4, groups=4, stochastic=False).encode(x, axis=1)
        >>> made.codes, made.shifts
        (tensor([[ 7.,  4.],
                [-3.,  6.]]), tensor([[0, 2]], dtype=torch.int32))

    Raises:
        BadInput: bits or groups is out of range.
    """

    bits: int = 4
    groups: int | None = 4
    stochastic: bool = True

    def __post_init__(self) -> None:
        largest_code(self.bits)
        if self.groups is not None and not 1 <= self.groups <= 16:
            raise BadInput(f"groups must lie in 1..16 or be None, got {self.groups}")

    def encode(self, x: Tensor, *, axis: int = -1, generator: torch.Generator | None = None) -> ShiftCodes:
        """Return the codes of ``x``, its channels along ``axis``.

        Args:
            x: any floating-point tensor.
            axis: over which the product sums.
            generator: draws for the rounding; default: torch's own.
        """
        n = largest_code(self.bits)
        others = [dim for dim in range(x.ndim) if dim != axis % x.ndim]
        size = x.detach().abs()
        ranges = size.amax(others, keepdim=True) if others and x.numel() else size
        most = ranges.amax() if x.numel() else ranges.new_zeros(())
        shifts: Tensor | None = None
        if self.groups is None:
            scale = steps = torch.where(ranges > 0, ranges / n, torch.ones_like(ranges))
        else:
            ratio = torch.where(ranges > 0, most / ranges, torch.full_like(ranges, torch.inf))
            # frexp gives the floor of the logarithm exactly: ratio = m 2^e, m in [1/2, 1)
            place = torch.frexp(ratio)[1] - 1
            shifts = torch.where(ratio.isfinite(), place, self.groups).clamp(0, self.groups - 1).to(torch.int32)
            scale = torch.where(most > 0, most / n, torch.ones_like(most))
            steps = torch.ldexp(scale.expand(shifts.shape), -shifts)
        ratio = x.detach() / steps
        codes = stochastic_round(ratio, generator=generator) if self.stochastic else ratio.round()
        return ShiftCodes(codes.clamp(-n, n), shifts, scale)

    def __call__(self, x: Tensor, *, axis: int = -1) -> Tensor:
        """Return the values that the codes of ``x`` stand for."""
        return self.encode(x, axis=axis).values()


def shift_matmul(left: ShiftCodes, right: Tensor, *, groups: int) -> Tensor:
    """Return sum_c (q_c << (K - 1 - k(c))) w_c in 64-bit integers: the product over s_0 2^-(K-1) s_w.

    Shapes:
        left.codes (M, C) with shifts (1, C), right (C, N) of integers -> (M, N) of int64

    Raises:
        BadInput: the codes have no shifts.
    """
    if left.shifts is None:
        raise BadInput("shift_matmul needs codes with shifts; a scale a channel cannot be executed by shifts")
    return (left.codes.long() << (groups - 1 - left.shifts.long())) @ right.long()


@dataclass(frozen=True)
class _Precision:
    weights: ShiftQuant
    activations: ShiftQuant
    gradients: ShiftQuant


class _Linear(torch.autograd.Function):
    """Q(X) Q(W)^T; backwards Q(dY) Q(W) and Q(dY)^T Q(X), dY in groups along the axis that is summed over."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, precision: _Precision) -> Tensor:
        x_q, w_q = precision.activations(x, axis=1), precision.weights(weight)
        ctx.save_for_backward(x_q, w_q)
        ctx.precision = precision
        return x_q @ w_q.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x_q, w_q = ctx.saved_tensors
        quantise = ctx.precision.gradients
        return quantise(grads[0], axis=1) @ w_q, quantise(grads[0], axis=0).T @ x_q, None


class _Conv2d(torch.autograd.Function):
    """The same for convolutions; dX sums over output channels, dW over samples."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, precision: _Precision, layout: tuple[Any, ...]) -> Tensor:
        x_q, w_q = precision.activations(x, axis=1), precision.weights(weight)
        ctx.save_for_backward(x_q, w_q)
        ctx.precision, ctx.layout = precision, layout
        return F.conv2d(x_q, w_q, None, *layout)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_q, w_q = ctx.saved_tensors
        quantise, layout = ctx.precision.gradients, ctx.layout
        by_output, by_sample = quantise(grads[0], axis=1), quantise(grads[0], axis=0)
        to_x = nn_grad.conv2d_input(x_q.shape, w_q, by_output, *layout)  # type: ignore[no-untyped-call]
        to_weight = nn_grad.conv2d_weight(x_q, w_q.shape, by_sample, *layout)  # type: ignore[no-untyped-call]
        return to_x, to_weight, None, None


class IntegerLinear(nn.Linear):
    """A linear layer whose three products, forwards and backwards, are of few-bit integers (emulated)."""

    precision: _Precision

    def forward(self, x: Tensor) -> Tensor:
        """Return the output; (..., K) -> (..., N)."""
        flat = x.reshape(-1, x.shape[-1])
        out: Tensor = _Linear.apply(flat, self.weight, self.precision)  # type: ignore[no-untyped-call]
        out = out.reshape(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias


class IntegerConv2d(nn.Conv2d):
    """A convolution whose three products, forwards and backwards, are of few-bit integers (emulated)."""

    precision: _Precision

    def forward(self, x: Tensor) -> Tensor:
        """Return the output; (B, C, H, W) -> (B, C', H', W')."""
        layout = (self.stride, self.padding, self.dilation, self.groups)
        out: Tensor = _Conv2d.apply(x, self.weight, self.precision, layout)  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias[:, None, None]


def integer_train(
    model: nn.Module,
    *,
    w_bits: int = 4,
    a_bits: int = 4,
    g_bits: int = 4,
    groups: int | None = 4,
    norms: Literal["keep", "l1"] = "keep",
    norm_bits: int | None = None,
    ignore: Sequence[str] = (),
) -> nn.Module:
    """Return a copy of ``model`` that runs and trains by products of few-bit integers; train it as any other.

    Plain linear layers and 2-D convolutions are replaced. Their names and parameters stay, so that without new norms
    the state dict loads back into the float model.

    Args:
        model: the model, left as it was.
        w_bits: bits of weights (nearest, one scale a tensor).
        a_bits: bits of activations (nearest, in groups of input channels).
        g_bits: bits of gradients (at random, in groups along the axis that each product sums over).
        groups: K; 1 for a scale a tensor, ``None`` for a scale a channel.
        norms: ``"l1"`` replaces batch and layer norms.
        norm_bits: bits inside those norms, or ``None``.
        ignore: globs of modules that stay as they are.

    Example:
        >>> layer = integer_train(nn.Sequential(nn.Linear(8, 4), nn.ReLU()))[0]
        >>> type(layer).__name__, layer(torch.ones(2, 8)).shape
        ('IntegerLinear', torch.Size([2, 4]))

    Raises:
        BadInput: a setting is out of range, or the model has no such layer.
    """
    if norms not in ("keep", "l1"):
        raise BadInput(f"norms must be 'keep' or 'l1', got {norms!r}")
    if norm_bits is not None:
        largest_code(norm_bits)
    precision = _Precision(
        ShiftQuant(w_bits, groups=1, stochastic=False),
        ShiftQuant(a_bits, groups=groups, stochastic=False),
        ShiftQuant(g_bits, groups=groups),
    )
    made = copy.deepcopy(model)
    found = False
    kinds: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: IntegerLinear, nn.Conv2d: IntegerConv2d}
    for name, module in list(made.named_modules()):
        if ignored(name, ignore):
            continue
        kind = kinds.get(type(module))
        if kind is not None and getattr(module, "padding_mode", "zeros") == "zeros":
            module.__class__ = kind
            module.__dict__["precision"] = precision
            found = True
        elif norms == "l1" and name and (new := l1_norm_for(module, norm_bits)) is not None:
            replace_module(made, name, new)
    if not found:
        raise BadInput(f"integer_train finds no linear layer or convolution in {type(model).__name__}")
    return made
