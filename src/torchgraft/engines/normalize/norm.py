"""The formula of a normalisation, its fused forms, and the base classes from which layers are made.

Channels are the last axis (``layout="last"``, tokens) or the second one (``layout="first"``, images). Where torch has a
fused kernel the functions here call it; :func:`normalize` is the plain formula that the tests hold them against.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.engines.normalize.statistics import mean_square, moments, update_running, wide
from torchgraft.errors import BadInput

__all__ = ["Layout", "Norm", "RunningNorm", "affine", "batch_norm", "group_norm", "normalize", "token_norm"]

Layout: TypeAlias = Literal["first", "last"]


def channelwise(value: Tensor, ndim: int, layout: Layout) -> Tensor:
    """Return (C,) in a shape that broadcasts over an input of ``ndim`` axes."""
    return value if layout == "last" else value.reshape(-1, *[1] * (ndim - 2))


def affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, layout: Layout = "last") -> Tensor:
    """Return x * weight + bias, a number a channel; what is ``None`` is left out.

    Example:
        >>> affine(torch.ones(1, 2), torch.tensor([2.0, 3.0]), None)
        tensor([[2., 3.]])
    """
    y: Tensor = x if weight is None else x * channelwise(weight, x.ndim, layout)
    return y if bias is None else y + channelwise(bias, x.ndim, layout)


def normalize(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor,
    *,
    eps: float = 1e-5,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    layout: Layout = "last",
) -> Tensor:
    """Return (x - mean) / sqrt(var + eps) * weight + bias in the dtype of ``x``, computed in float32 at least.

    Args:
        x: the input.
        mean: broadcasts to ``x``; ``None`` where nothing is subtracted.
        var: variance or mean square.
        eps: added to ``var``.
        weight: one gain a channel.
        bias: one offset a channel.
        layout: where the channels are.

    Example:
        >>> x = torch.tensor([[1.0, 3.0]])
        >>> normalize(x, *moments(x, (1,)), eps=0.0)
        tensor([[-1.,  1.]])
    """
    centred = wide(x) if mean is None else wide(x) - mean
    scaled: Tensor = centred * torch.rsqrt(var + eps)
    return affine(scaled, weight, bias, layout=layout).to(x.dtype)


class _RootMeanSquare(torch.autograd.Function):
    """RMS norm of rows (N, D) in few passes: on CPU torch's is made of pieces and takes seven times a layer norm."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse: Tensor = (torch.linalg.vector_norm(x, dim=1, keepdim=True).square_() / x.shape[1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        ctx.eps = eps
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        (grad,) = grads
        twice = torch.is_grad_enabled()  # a derivative of the derivative sees what x and inverse have to do together
        if twice:
            inverse = torch.rsqrt(x.square().mean(1, keepdim=True) + ctx.eps)
        product = grad * x
        slope = (product @ weight)[:, None] * (-1.0 / x.shape[1]) * inverse**3
        to_weight = inverse[:, 0] @ product
        if twice:
            return grad * weight * inverse + x * slope, to_weight, None
        return torch.mul(grad, weight, out=product).mul_(inverse).addcmul_(x, slope), to_weight, None


def token_norm(
    x: Tensor,
    shape: Sequence[int],
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    centred: bool = True,
) -> Tensor:
    """Return ``x`` normalised over its last axes, of the sizes ``shape``: layer norm, or RMS norm without centring.

    Example:
        >>> token_norm(torch.tensor([[3.0, 4.0]]), (2,), eps=0.0, centred=False) * 12.5 ** 0.5
        tensor([[3., 4.]])
    """
    if centred:
        return F.layer_norm(x, list(shape), weight, bias, eps)
    if torch.compiler.is_compiling() or not x.is_cpu or x.numel() == 0:
        axes = tuple(range(-len(shape), 0))
        return normalize(x, None, mean_square(x, axes), eps=eps, weight=weight, bias=bias)
    flat = wide(x).reshape(-1, math.prod(shape))
    gain = flat.new_ones(flat.shape[1]) if weight is None else weight.to(flat.dtype).flatten()
    y: Tensor = _RootMeanSquare.apply(flat, gain, eps).view(x.shape)  # type: ignore[no-untyped-call]  # torch's
    return affine(y, None, bias).to(x.dtype)


def group_norm(
    x: Tensor, groups: int, *, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Return (B, C, ...) normalised over groups of channels and all positions of a sample.

    One group is a layer norm of the sample; as many groups as channels are an instance norm, on CPU 1.7 times as fast
    as ``F.instance_norm``.

    Example:
        >>> group_norm(torch.tensor([[[1.0], [3.0]]]), 1, eps=0.0).flatten()
        tensor([-1.,  1.])
    """
    if x.numel() == 0:
        return affine(x, weight, bias, layout="first").to(x.dtype)
    if x.shape[1] // groups * math.prod(x.shape[2:]) == 1 and not torch.compiler.is_compiling():
        # torch refuses groups of one value; they are what they are: all zeros before the affine.
        return affine(x * 0.0, weight, bias, layout="first").to(x.dtype)
    return F.group_norm(x, groups, weight, bias, eps)


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    layout: Layout = "last",
) -> Tensor:
    """Return ``x`` normalised a channel over batch and positions, or by the running statistics where not ``training``.

    In training the running statistics move in place. With the channels last, all tokens are the rows of one matrix,
    which on CPU is far faster than ``nn.BatchNorm1d`` on transposed tokens.

    Raises:
        BadInput: in training there is only one value a channel.

    Example:
        >>> batch_norm(torch.tensor([[1.0], [3.0]]), None, None, training=True).flatten()
        tensor([-1.0000,  1.0000])
    """
    if x.numel() == 0:
        return affine(x, weight, bias, layout=layout).to(x.dtype)
    channels = x.shape[-1] if layout == "last" else x.shape[1]
    use_batch = training or running_mean is None
    if use_batch and x.numel() == channels:
        raise BadInput(f"batch statistics need more than one value a channel, got an input of {tuple(x.shape)}")
    flat = x.reshape(-1, channels) if layout == "last" else x
    y = F.batch_norm(flat, running_mean, running_var, weight, bias, use_batch, momentum, eps)
    return y.view(x.shape) if layout == "last" else y


class Norm(nn.Module):
    """A layer that keeps the shape of its input: one gain and offset a channel, and a check of what comes in.

    A member writes ``forward``, which calls :meth:`checked` and one function of this engine.

    Args:
        channels: C, or D for tokens.
        eps: added to variances.
        layout: whether the channels are the last axis or the second.
        affine: whether there is a ``weight``, from one.
        bias: whether there is a ``bias`` too, from zero.
        ndim: how many axes an input may have.

    Raises:
        BadInput: a setting is out of range.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        channels: int,
        *,
        eps: float = 1e-5,
        layout: Layout = "last",
        affine: bool = True,
        bias: bool = True,
        ndim: Sequence[int] = (2, 3, 4, 5),
    ) -> None:
        super().__init__()
        if channels < 1:
            raise BadInput(f"a normalisation needs at least one channel, got {channels}")
        if not eps >= 0:
            raise BadInput(f"eps must be at least 0, got {eps}")
        self.channels, self.eps, self.layout, self.ndim = channels, eps, layout, tuple(ndim)
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine and bias else None

    def checked(self, x: Tensor) -> Tensor:
        """Return ``x``.

        Raises:
            BadInput: it is not floating, or its axes are not those of this layer.
        """
        axis = -1 if self.layout == "last" else 1
        if x.ndim not in self.ndim or x.shape[axis] != self.channels:
            place = "last" if self.layout == "last" else "second"
            axes = " or ".join(str(count) for count in self.ndim)
            raise BadInput(
                f"{type(self).__name__} takes {axes} axes, the {place} of size {self.channels}, got {tuple(x.shape)}"
            )
        if not x.is_floating_point():
            raise BadInput(f"{type(self).__name__} takes floating-point input, got {x.dtype}")
        return x

    def affine(self, x: Tensor) -> Tensor:
        """Return ``x`` times the gain plus the offset of its channel."""
        return affine(x, self.weight, self.bias, layout=self.layout)

    def extra_repr(self) -> str:
        """Return the settings."""
        return f"{self.channels}, eps={self.eps}"


class RunningNorm(Norm):
    """A batch norm, or what is built on one: batch statistics in training, running ones in evaluation.

    The buffers have the names, and the state dict the form, of ``torch.nn.BatchNorm``. :meth:`standardized` is the
    whole batch norm; a member with statistics of its own calls :meth:`track` once a training pass instead.

    Args:
        channels: C, or D for tokens.
        momentum: the share of a new batch in the running statistics, or ``None`` for the plain average of all batches.
        eps, layout, affine, bias, ndim: as in :class:`Norm`.
        statistics: names of the running buffers, a subset of ``("mean", "var")``.
        tracked: how many channels have running statistics; all by default.

    Raises:
        BadInput: a setting is out of range.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        channels: int,
        *,
        momentum: float | None = 0.1,
        eps: float = 1e-5,
        layout: Layout = "last",
        affine: bool = True,
        bias: bool = True,
        ndim: Sequence[int] = (2, 3, 4, 5),
        statistics: Sequence[str] = ("mean", "var"),
        tracked: int | None = None,
    ) -> None:
        super().__init__(channels, eps=eps, layout=layout, affine=affine, bias=bias, ndim=ndim)
        if not eps > 0:
            raise BadInput(f"eps of a batch norm must be positive, got {eps}")
        if momentum is not None and not 0 < momentum <= 1:
            raise BadInput(f"momentum must lie in (0, 1] or be None, got {momentum}")
        self.momentum = momentum
        tracked = channels if tracked is None else tracked
        if "mean" in statistics:
            self.register_buffer("running_mean", torch.zeros(tracked))
        if "var" in statistics:
            self.register_buffer("running_var", torch.ones(tracked))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))

    def counted(self) -> float:
        """Note one more training pass, and return the share of its statistics in the running ones."""
        self.num_batches_tracked.add_(1)
        return self.momentum if self.momentum is not None else 1.0 / int(self.num_batches_tracked)

    def track(self, *, mean: Tensor | None = None, var: Tensor | None = None) -> None:
        """Move the running statistics towards those of this batch; call it once a training pass."""
        share = self.counted()
        for name, value in (("running_mean", mean), ("running_var", var)):
            if value is not None:
                update_running(getattr(self, name), value, share)

    def standardized(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Return the batch norm of ``x``, gain and offset included; running statistics move in training.

        Args:
            x: the input.
            mask: True where ``x`` counts for the statistics, of the shape of ``x`` without its channel axis.
        """
        if x.numel() == 0:
            return self.affine(x).to(x.dtype)
        if mask is not None:
            return self._masked(x, mask)
        return batch_norm(
            x,
            self.running_mean,
            self.running_var,
            weight=self.weight,
            bias=self.bias,
            training=self.training,
            momentum=self.counted() if self.training else 0.0,
            eps=self.eps,
            layout=self.layout,
        )

    def _masked(self, x: Tensor, mask: Tensor) -> Tensor:
        axis = x.ndim - 1 if self.layout == "last" else 1
        if mask.shape != x.shape[:axis] + x.shape[axis + 1 :]:
            raise BadInput(f"mask must have the shape of x without its channels, got {tuple(mask.shape)}")
        mean, var = self.running_mean, self.running_var
        if self.training:
            count = int((mask != 0).sum())
            if count < 2:
                raise BadInput(f"batch statistics need more than one value a channel, the mask leaves {count}")
            kept_mean, kept_var = moments(x, [i for i in range(x.ndim) if i != axis], mask=mask.unsqueeze(axis))
            mean, var = kept_mean.flatten(), kept_var.flatten()
            self.track(mean=mean, var=var * (count / (count - 1)))
        shaped = (channelwise(value, x.ndim, self.layout) for value in (mean, var))
        return normalize(x, *shaped, eps=self.eps, weight=self.weight, bias=self.bias, layout=self.layout)
