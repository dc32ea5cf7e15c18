"""Two-valued activations whose step is learned, and linear layers on them: the elastic binarisers of transformers.

alpha * sign(x), or alpha * round(clip(x / alpha, 0, 1)) for probabilities; gradients pass straight through where
|x / alpha| <= 1, and alpha's is divided by sqrt(numel), as in learned step sizes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.engines.binary.bits import Identity, sign

__all__ = ["BinaryProjection", "ElasticSign", "ElasticUnit", "elastic_sign", "elastic_unit"]

_LEAST = 1e-5


class _Elastic(torch.autograd.Function):
    """alpha times a level of x / alpha: -1 or +1, or (unsigned) 0 or 1; gradients straight through, and to alpha."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, signed: bool) -> Tensor:
        ctx.save_for_backward(x, alpha)
        ctx.signed = signed
        return alpha * (sign(x) if signed else (x / alpha).clamp(0, 1).round())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (x, alpha), (upstream,) = ctx.saved_tensors, gradients
        ratio = x / alpha
        inside = ratio.abs() <= 1 if ctx.signed else (ratio >= 0) & (ratio <= 1)
        level = sign(x) if ctx.signed else torch.where(inside, ratio.round() - ratio, (ratio > 1).to(x.dtype))
        share = (upstream * level).sum() / math.sqrt(max(x.numel(), 1))
        return upstream * inside, share.reshape(alpha.shape), None


def elastic_sign(x: Tensor, alpha: Tensor) -> Tensor:
    """Return alpha * sign(x).

    Of the upstream gradient g, x gets what lies where |x / alpha| <= 1, and alpha sum(g sign(x)) / sqrt(numel).

    Example:
        >>> elastic_sign(torch.tensor([-3.0, 0.0]), torch.tensor(0.5))
        tensor([-0.5000,  0.5000])
    """
    out: Tensor = _Elastic.apply(x, alpha, True)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return out


def elastic_unit(x: Tensor, alpha: Tensor) -> Tensor:
    """Return alpha * round(clip(x / alpha, 0, 1)), for numbers that are not negative.

    Example:
        >>> elastic_unit(torch.tensor([0.1, 0.4]), torch.tensor(0.5))
        tensor([0.0000, 0.5000])
    """
    out: Tensor = _Elastic.apply(x, alpha, False)  # type: ignore[no-untyped-call]  # as above
    return out


class ElasticSign(nn.Module):
    """Activations in {-alpha, alpha}, alpha learned; it starts at 2 mean |x| of the first batch in training.

    Shapes:
        (B, ...) -> (B, ...)
    """

    signed = True
    started: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(()))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        """Return the two-valued activations."""
        if self.training and x.numel() and not bool(self.started):
            with torch.no_grad():
                self.alpha.copy_(2 * x.abs().mean())
                self.started.fill_(True)
        alpha = self.alpha.clamp(min=_LEAST).to(x.dtype)
        return elastic_sign(x, alpha) if self.signed else elastic_unit(x, alpha)


class ElasticUnit(ElasticSign):
    """Probabilities in {0, alpha}; otherwise :class:`ElasticSign`."""

    signed = False


class BinaryProjection(nn.Module):
    """A linear layer of mean|W| sign(W - mean W) on two-valued inputs; the weight's gradient passes straight through.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        quantise: whether the layer makes its inputs two-valued itself.

    Shapes:
        (B, ..., in_features) -> (B, ..., out_features)
    """

    def __init__(self, in_features: int, out_features: int, *, quantise: bool = True) -> None:
        super().__init__()
        self.inputs = ElasticSign() if quantise else None
        self.weight = nn.Parameter(torch.empty(out_features, in_features).uniform_(-1, 1) * in_features**-0.5)
        self.bias = nn.Parameter(torch.zeros(out_features))

    def binary_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight that is computed with, of two values, in ``dtype``; its own by default."""
        weight = self.weight if dtype is None else self.weight.to(dtype)
        held = weight.detach()
        size, middle = held.abs().mean(), held.mean()
        # Scaled signs with the latent's own gradient: the slope divides out the scale.
        return size * Identity()((weight - middle) / size.clamp(min=_LEAST))

    def forward(self, x: Tensor) -> Tensor:
        """Return the output, computed in the dtype of ``x``."""
        signs = x if self.inputs is None else self.inputs(x)
        return F.linear(signs, self.binary_weight(x.dtype), self.bias.to(x.dtype))
