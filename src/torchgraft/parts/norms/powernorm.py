"""Batch norm for text: no mean, a running quadratic mean already in training, and a backward pass that knows of it.

`PowerNorm: Rethinking Batch Normalization in Transformers <https://arxiv.org/abs/2003.07845>`_ (Shen et al., 2020):
xhat = x / psi, y = g * xhat + b, psi^2 <- a_f psi^2 + (1 - a_f) mean x^2; backward, with G = g * dL/dy:
G~ = G - (1 - a_b) nu * xhat, dL/dx = G~ / psi, nu <- nu + mean(G~ * xhat).

Departures: tokens are worked off in pieces that fit the cache; what stands in padding gives zeros. The released code
divides the gradient by the batch's own quadratic mean instead of the running one: ``reference_backward=True``.
Gradient checkpointing runs the forward pass twice and moves psi twice; ``nu`` moves once a backward pass.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines.normalize import native
from torchgraft.engines.normalize.norm import Norm
from torchgraft.engines.normalize.placement import leave_fast_path
from torchgraft.engines.normalize.statistics import wide
from torchgraft.engines.surgery.swap import swap
from torchgraft.errors import BadInput

__all__ = ["CARD", "PowerNorm", "convert_ln", "padded"]

CARD = Card(
    key="powernorm",
    title="PowerNorm",
    seed_id=158,
    authors="Shen, Yao, Gholami, Mahoney and Keutzer, 2020",
    reference="https://arxiv.org/abs/2003.07845",
    family="parts/norms",
    kind="part",
    engine=("normalize",),
    equation="y = g * x / psi + b,  psi^2 <- a_f psi^2 + (1 - a_f) mean x^2",
    entry="PowerNorm",
    capabilities=frozenset({"padding-mask"}),
    declared={"parameters": "2*d_model", "replaces": "LayerNorm"},
    example={"d_model": 16, "warmup": 4},
    shapes=((3, 5, 16),),
    oracles=(
        "in warm-up the gradient is (G - xhat mean(G xhat)) / psi_B and equals finite differences",
        "one batch and one gradient again and again: the gradient nears that of warm-up by a_b a step, 0.900 +- 0.005",
        "|nu| stays below max |mean G xhat| / ((1 - a_b) min mean xhat^2)",
        "forward, backward and running numbers equal a loop by hand, also with groups and the released backward",
        "what stands in padding changes neither numbers nor gradients",
    ),
    claim=Claim(
        text="A byte transformer of 3 layers and width 96 on the standard library's source, pre-norm, with layer norm, "
        "batch norm (running statistics in evaluation) and PowerNorm, 800 steps.",
        figure="PowerNorm's loss at most layer norm's + 0.03 nats; batch norm's at least 0.05 above PowerNorm's, or "
        "its batch variances at least 5x as far from the running ones as PowerNorm's quadratic means",
    ),
    choose_when="a transformer on long batches of text shall be normalised by fixed numbers in inference, free of cost",
    choose_instead="layer-norm for small or changing batches, and wherever nothing may be seen of other sequences",
    bibtex="@inproceedings{shen2020powernorm, title={{PowerNorm}: Rethinking Batch Normalization in Transformers}, "
    "author={Shen, Sheng and Yao, Zhewei and Gholami, Amir and Mahoney, Michael W. and Keutzer, Kurt}, "
    "booktitle={ICML}, year={2020}}",
)

#: Numbers of a piece of tokens that is worked off at once; a few such pieces fit the second-level cache.
_PIECE = 1 << 16


@dataclass(frozen=True)
class _Settings:
    """How one pass is made: by running numbers or the batch's own, g, eps, a_b, and which backward pass."""

    running: bool
    groups: int
    eps: float
    keep: float
    reference: bool


def _pieces(x: Tensor) -> list[tuple[slice, slice]]:
    """Return slices of the tokens, and the same for buffers of the size of the first."""
    rows = max(_PIECE // max(x.shape[1], 1), 1)
    starts = range(0, x.shape[0], rows)
    return [(slice(start, start + rows), slice(0, min(rows, x.shape[0] - start))) for start in starts]


def _buffer(x: Tensor) -> Tensor:
    return x.new_empty(min(max(_PIECE // max(x.shape[1], 1), 1), x.shape[0]), x.shape[1])


def _grouped(x: Tensor, groups: int) -> Tensor:
    """Return (N, D) as (N g, D / g)."""
    return x.view(x.shape[0] * groups, -1)


def _rescaled(x: Tensor, scale: Tensor | None, rows: slice, out: Tensor) -> Tensor:
    """Return some tokens over the root mean square of their groups."""
    if scale is None:
        return x[rows]
    groups = scale.shape[1]
    torch.mul(_grouped(x[rows], groups), scale[rows].reshape(-1, 1), out=_grouped(out, groups))
    return out


class _Power(torch.autograd.Function):
    """y and the quadratic mean of the batch; ``nu`` moves in place in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gain: Tensor,
        shift: Tensor,
        square: Tensor,
        nu: Tensor,
        valid: Tensor | None,
        settings: _Settings,
    ) -> tuple[Tensor, Tensor]:
        groups = settings.groups
        weight = x.new_ones(x.shape[0]) if valid is None else valid
        count = weight.sum()
        factor = gain * torch.rsqrt(square + settings.eps)
        if settings.running and native.usable(x, factor, shift, valid):
            out, scale, total = native.power_forward(x, valid, factor, shift, groups=groups, eps=settings.eps)
            return _Power.kept(ctx, out, x, gain, square, total / count, scale, weight, count, nu, valid, settings)
        total, out, buffer = x.new_zeros(x.shape[1]), torch.empty_like(x), _buffer(x)
        scale = x.new_empty(x.shape[0], groups) if groups else None
        for rows, few in _pieces(x):
            if scale is not None:
                length = torch.linalg.vector_norm(_grouped(x[rows], groups), dim=1)
                scale[rows] = torch.rsqrt(length.square_().mul_(groups / x.shape[1]).add_(settings.eps)).view(
                    -1, groups
                )
            piece = _rescaled(x, scale, rows, out[rows])
            total += weight[rows] @ torch.mul(piece, piece, out=buffer[few])
            if settings.running:
                torch.addcmul(shift, piece, factor, out=out[rows])
        batch = total / count
        if not settings.running:
            square = batch
            factor = gain * torch.rsqrt(batch + settings.eps)
            for rows, few in _pieces(x):
                torch.addcmul(shift, _rescaled(x, scale, rows, buffer[few]), factor, out=out[rows])
        return _Power.kept(ctx, out, x, gain, square, batch, scale, weight, count, nu, valid, settings)

    @staticmethod
    def kept(
        ctx: Any,
        out: Tensor,
        x: Tensor,
        gain: Tensor,
        square: Tensor,
        batch: Tensor,
        scale: Tensor | None,
        weight: Tensor,
        count: Tensor,
        nu: Tensor,
        valid: Tensor | None,
        settings: _Settings,
    ) -> tuple[Tensor, Tensor]:
        """Keep what the backward pass needs, and return the output and the batch's quadratic mean."""
        if valid is not None:
            out.mul_(valid[:, None])
        ctx.save_for_backward(x, gain, square.clone(), batch, scale, weight, count)
        ctx.nu, ctx.settings, ctx.padded = nu, settings, valid is not None
        ctx.mark_non_differentiable(batch)
        return out, batch

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, square, batch, scale, weight, count = ctx.saved_tensors
        settings: _Settings = ctx.settings
        grad = grads[0] * weight[:, None] if ctx.padded else grads[0]
        inverse = torch.rsqrt(square + settings.eps)
        along, to_shift = torch.zeros_like(inverse), torch.zeros_like(inverse)
        if settings.running:
            down = torch.rsqrt(batch + settings.eps) if settings.reference else inverse
            pull = (1 - settings.keep) * ctx.nu * inverse * down
        else:
            down, buffer = inverse, _buffer(x)
            for rows, few in _pieces(x):
                along += weight[rows] @ (grad[rows] * _rescaled(x, scale, rows, buffer[few]))
            pull = gain * along / count * inverse**3
            along.zero_()
        if native.usable(grad.detach(), x, gain, pull):
            dx, along, to_shift = native.power_backward(grad.contiguous(), x, scale, gain * down, pull)
        else:
            dx = _pulled(grad, x, scale, weight, gain * down, pull, along, to_shift)
        if ctx.padded:
            dx.mul_(weight[:, None])
        to_gain = along * inverse
        if settings.running:
            ctx.nu.add_(gain * to_gain / count - (1 - settings.keep) * ctx.nu * batch * inverse**2)
        return dx, to_gain, to_shift, None, None, None, None


def _pulled(
    grad: Tensor,
    x: Tensor,
    scale: Tensor | None,
    weight: Tensor,
    push: Tensor,
    pull: Tensor,
    along: Tensor,
    to_shift: Tensor,
) -> Tensor:
    """Return grad * push - x * pull, through the layer scaling, and add both sums over the tokens to the last two."""
    dx, first, second = torch.empty_like(x), _buffer(x), _buffer(x)
    for rows, few in _pieces(x):
        above, other = grad[rows], second[few]
        piece = _rescaled(x, scale, rows, first[few])
        along += weight[rows] @ torch.mul(above, piece, out=other)
        to_shift += weight[rows] @ above
        into = torch.mul(above, push, out=dx[rows]).addcmul_(piece, pull, value=-1.0)
        if scale is not None:
            groups = scale.shape[1]
            mean = _grouped(torch.mul(into, piece, out=other), groups).mean(1, keepdim=True)
            grouped = _grouped(into, groups).addcmul_(_grouped(piece, groups), mean, value=-1.0)
            grouped.mul_(scale[rows].reshape(-1, 1))
    return dx


class PowerNorm(Norm):
    """Divide every channel by its running quadratic mean, in training too.

    Args:
        d_model: the width D.
        alpha_fwd: share of the old quadratic mean that is kept a step.
        alpha_bwd: the same for ``nu``, the running projection of the gradient.
        warmup: steps in which the batch's own quadratic mean is used while the running one is averaged.
        group_scale: each token is first divided by its root mean square over this many channel groups; 0 for none.
        eps: added to quadratic means.
        reference_backward: whether the gradient is divided by the batch's quadratic mean, as in the released code.

    Attributes:
        mask: padding mask for calls without one, see :func:`padded`.

    Shapes:
        x: (B, T, D), mask: (B, T), True where a token counts -> (B, T, D)

    Example:
        >>> norm = PowerNorm(8)
        >>> y = norm(torch.randn(2, 5, 8), mask=torch.tensor([[True] * 5, [True] * 3 + [False] * 2]))
        >>> y.shape, int(norm.steps)
        (torch.Size([2, 5, 8]), 1)

    Raises:
        BadInput: a setting is out of range.
    """

    mask: Tensor | None

    def __init__(
        self,
        d_model: int,
        *,
        alpha_fwd: float = 0.9,
        alpha_bwd: float = 0.9,
        warmup: int = 0,
        group_scale: int = 1,
        eps: float = 1e-5,
        reference_backward: bool = False,
    ) -> None:
        super().__init__(d_model, eps=eps, ndim=(3,))
        for name, value in (("alpha_fwd", alpha_fwd), ("alpha_bwd", alpha_bwd)):
            if not 0.0 <= value < 1.0:
                raise BadInput(f"{name} must lie in [0, 1), got {value}")
        if warmup < 0:
            raise BadInput(f"warmup must be at least 0 steps, got {warmup}")
        if group_scale < 0 or (group_scale and d_model % group_scale):
            raise BadInput(f"group_scale must be 0 or divide d_model = {d_model}, got {group_scale}")
        self.d_model, self.alpha_fwd, self.alpha_bwd = d_model, alpha_fwd, alpha_bwd
        self.warmup, self.group_scale, self.reference_backward = warmup, group_scale, reference_backward
        self.register_buffer("running_square", torch.ones(d_model))
        self.register_buffer("nu", torch.zeros(d_model))
        self.register_buffer("steps", torch.tensor(0, dtype=torch.long))
        self.register_buffer("mask", None, persistent=False)

    running_square: Tensor
    nu: Tensor
    steps: Tensor

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise; in training, psi moves now and ``nu`` in the backward pass."""
        self.checked(x)
        mask = self.mask if mask is None and x.ndim == 3 else mask
        if mask is not None and (mask.shape != x.shape[:2] or mask.dtype != torch.bool):
            raise BadInput(f"mask must be bool of shape {tuple(x.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}")
        flat = wide(x).reshape(-1, self.d_model)
        if not self.training or x.numel() == 0 or (mask is not None and not bool(mask.any())):
            return self._fixed(flat, mask).view(x.shape).to(x.dtype)
        gain, shift = cast(Tensor, self.weight).to(flat.dtype), cast(Tensor, self.bias).to(flat.dtype)
        running = int(self.steps) >= self.warmup
        settings = _Settings(running, self.group_scale, self.eps, self.alpha_bwd, self.reference_backward)
        valid = None if mask is None else mask.reshape(-1).to(flat.dtype)
        square = self.running_square.to(flat.dtype)
        y, batch = _Power.apply(flat, gain, shift, square, self.nu, valid, settings)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            self.steps.add_(1)
            keep = self.alpha_fwd if running else 1.0 - 1.0 / int(self.steps)
            self.running_square.mul_(keep).add_(batch.to(self.running_square.dtype), alpha=1.0 - keep)
        found: Tensor = y.view(x.shape).to(x.dtype)
        return found

    def _fixed(self, flat: Tensor, mask: Tensor | None) -> Tensor:
        scaled = flat
        if self.group_scale:
            split = torch.unflatten(flat, 1, (self.group_scale, -1))
            scaled = (split * torch.rsqrt(split.square().mean(2, keepdim=True) + self.eps)).flatten(1)
        y = self.affine(scaled * torch.rsqrt(self.running_square.to(flat.dtype) + self.eps))
        return y if mask is None else y * mask.reshape(-1, 1)

    def extra_repr(self) -> str:
        """Return the settings."""
        return f"{self.d_model}, alpha_fwd={self.alpha_fwd}, alpha_bwd={self.alpha_bwd}, warmup={self.warmup}"


def convert_ln(
    model: nn.Module, *, alpha_fwd: float = 0.9, alpha_bwd: float = 0.9, warmup: int = 0, group_scale: int = 1
) -> nn.Module:
    """Replace every layer norm over one axis by a PowerNorm with its gain and shift, in place; return the model.

    Args:
        model: holds layer norms on (B, T, D).
        alpha_fwd, alpha_bwd, warmup, group_scale: as for :class:`PowerNorm`.

    Example:
        >>> convert_ln(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)))[1]
        PowerNorm(8, alpha_fwd=0.9, alpha_bwd=0.9, warmup=0)

    Raises:
        BadInput: there is none.
    """

    def build(old: nn.Module, _: str) -> nn.Module:
        if not isinstance(old, nn.LayerNorm):
            raise BadInput(f"a layer norm is expected, got {type(old).__name__}")
        new = PowerNorm(
            math.prod(old.normalized_shape),
            alpha_fwd=alpha_fwd,
            alpha_bwd=alpha_bwd,
            warmup=warmup,
            group_scale=group_scale,
            eps=old.eps,
        ).train(old.training)
        for name, value in old.named_parameters(recurse=False):
            new.get_parameter(name).data = value.detach().clone()
            new.get_parameter(name).requires_grad_(value.requires_grad)
        new.ndim = (2, 3)  # a model's last norm is often on one token a sample
        anchor = next(old.parameters(), None)
        return new if anchor is None else new.to(anchor.device, anchor.dtype)

    for block in model.modules():
        leave_fast_path(block)
    swap(model, lambda _, old: isinstance(old, nn.LayerNorm) and len(old.normalized_shape) == 1, build)
    return model


@contextlib.contextmanager
def padded(model: nn.Module, mask: Tensor) -> Iterator[None]:
    """Let every PowerNorm of ``model`` leave padding out in the calls within.

    Args:
        model: holds PowerNorms, for example by :func:`convert_ln`.
        mask: (B, T), True where a token counts.
    """
    norms = [module for module in model.modules() if isinstance(module, PowerNorm)]
    before = [norm.mask for norm in norms]
    try:
        for norm in norms:
            norm.mask = mask
        yield
    finally:
        for norm, old in zip(norms, before, strict=True):
            norm.mask = old
