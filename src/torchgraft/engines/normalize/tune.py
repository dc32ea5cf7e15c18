"""One pass for a layer and a frozen batch norm: w' = s w and c' = s (c - mu) + beta, made anew at every call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.task import Inputs, call
from torchgraft.engines.normalize.attach import attach, attached, detach
from torchgraft.errors import BadInput

__all__ = ["Passed", "Tuned", "kept_bytes", "scale_of", "tune", "tuned_pairs", "tuned_parameters", "untune"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def scale_of(norm: nn.Module) -> Tensor:
    """Return gamma / sqrt(v + eps), in float32 at least, (C,)."""
    scale = _inverse(norm)
    return scale if norm.weight is None else scale * cast(Tensor, norm.weight)


def _inverse(norm: nn.Module) -> Tensor:
    variance = cast(Tensor, norm.running_var)
    wide = variance if variance.dtype == torch.float64 else variance.float()
    return torch.rsqrt(wide + cast(float, norm.eps))


class _Folded(torch.autograd.Function):
    """w' = s w and c' = s (c - mu) + beta as one node: the pieces would cost more than a small convolution."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        bias: Tensor | None,
        gain: Tensor | None,
        shift: Tensor | None,
        inverse: Tensor,
        mean: Tensor,
        groups: int,
    ) -> tuple[Tensor, Tensor]:
        scale = inverse if gain is None else inverse * gain
        centred = -mean if bias is None else bias - mean
        moved = centred * scale if shift is None else torch.addcmul(shift, centred, scale)
        ctx.save_for_backward(weight, bias, gain, inverse, mean)
        ctx.groups = groups
        ctx.set_materialize_grads(True)
        return _scaled(weight, scale, groups).to(weight.dtype), moved.to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, bias, gain, inverse, mean = ctx.saved_tensors
        to_weight, to_bias = grads
        scale = inverse if gain is None else inverse * gain  # of the inputs again, for a derivative of the derivative
        needs = ctx.needs_input_grad
        found: list[Tensor | None] = [None] * 7
        if needs[0]:
            found[0] = _scaled(to_weight, scale, ctx.groups).to(weight.dtype)
        if bias is not None and needs[1]:
            found[1] = (to_bias * scale).to(bias.dtype)
        if gain is not None and needs[2]:
            centred = -mean if bias is None else bias - mean
            to_scale = _over_channels(to_weight * weight, ctx.groups) + to_bias * centred
            found[2] = (to_scale * inverse).to(gain.dtype)
        if needs[3]:
            found[3] = to_bias
        return tuple(found)


def _scaled(weight: Tensor, scale: Tensor, groups: int) -> Tensor:
    """Return the weight times a number an output channel; ``groups`` is 0 where those are its first axis."""
    if groups == 0:
        return weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
    # transposed, (C_in, C_out / G, ...): the rows of group g make its C_out / G outputs
    blocks = torch.unflatten(weight, 0, (groups, -1))
    return (blocks * scale.reshape(groups, 1, -1, *[1] * (weight.ndim - 2))).flatten(0, 1)


def _over_channels(product: Tensor, groups: int) -> Tensor:
    """Return the sum of all entries of each output channel, (C,)."""
    if groups == 0:
        return product.flatten(1).sum(1)
    return torch.unflatten(product, 0, (groups, -1)).transpose(1, 2).flatten(2).sum(2).flatten()


def tuned_parameters(layer: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the weight and bias that stand for ``layer`` followed by ``norm`` in eval mode, as functions of theirs.

    Args:
        layer: a convolution, transposed convolution or linear layer.
        norm: the batch norm over its output channels.
    """
    groups = layer.groups if isinstance(layer, _TRANSPOSED) else 0
    if torch.compiler.is_compiling():  # a compiler makes one kernel of the pieces
        weight, bias = cast(Tensor, layer.weight), cast("Tensor | None", layer.bias)
        scale, mean = scale_of(norm), cast(Tensor, norm.running_mean)
        shift = (-mean if bias is None else bias - mean) * scale
        shift = shift if norm.bias is None else shift + cast(Tensor, norm.bias)
        return _scaled(weight, scale, groups).to(weight.dtype), shift.to(weight.dtype)
    found: tuple[Tensor, Tensor] = _Folded.apply(  # type: ignore[no-untyped-call]  # torch's
        layer.weight, layer.bias, norm.weight, norm.bias, _inverse(norm), norm.running_mean, groups
    )
    return found


def _transposed(layer: Any, x: Tensor, weight: Tensor, bias: Tensor, output_size: list[int] | None) -> Tensor:
    dims = weight.ndim - 2
    apply: Callable[..., Tensor] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
    if layer.padding_mode != "zeros":
        raise BadInput(f"a transposed convolution pads with zeros only, got {layer.padding_mode!r}")
    extra = layer._output_padding(x, output_size, layer.stride, layer.padding, layer.kernel_size, dims, layer.dilation)
    return apply(x, weight, bias, layer.stride, layer.padding, extra, layer.groups, layer.dilation)


class Tuned(nn.Module):
    """On the layer: does the norm's work too, whenever the norm is in eval mode."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Apply the layer with the parameters that stand for both."""
        norm: nn.Module = self.__dict__["_followed_by"]
        more = (output_size,) if isinstance(self, _TRANSPOSED) else ()
        if norm.training:
            return cast(Tensor, super().forward(x, *more))
        weight, bias = tuned_parameters(self, norm)
        if isinstance(self, nn.Linear):
            return F.linear(x, weight, bias)
        if isinstance(self, _TRANSPOSED):
            return _transposed(self, x, weight, bias, output_size)
        y: Tensor = cast(Any, self)._conv_forward(x, weight, bias)
        return y


class Passed(nn.Module):
    """On the norm: nothing is left to do in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise in training mode only."""
        return cast(Tensor, super().forward(x)) if self.training else x

    def train(self, mode: bool = True) -> Self:
        """Set the mode, unless the norm is held in eval mode."""
        return super().train(mode and not self.__dict__.get("_held", False))


def tune(layer: nn.Module, norm: nn.Module, *, hold: bool = False) -> None:
    """Let ``layer`` do the work of ``norm``, the only reader of its output, whenever that is in eval mode.

    Args:
        layer: a convolution, transposed convolution or linear layer.
        norm: a batch norm over its output channels.
        hold: whether the norm stays in eval mode when its model is put into training mode.
    """
    layer.__dict__["_followed_by"] = norm
    if hold:
        norm.__dict__["_held"] = True
    attach(layer, Tuned)
    attach(norm, Passed)


def tuned_pairs(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Return the layers of ``model`` that do the work of a norm, each with its norm."""
    return [(m, m.__dict__["_followed_by"]) for m in model.modules() if attached(m, Tuned)]


def untune(model: nn.Module) -> None:
    """Give every norm of ``model`` its own work back."""
    for layer, norm in tuned_pairs(model):
        del layer.__dict__["_followed_by"]
        norm.__dict__.pop("_held", None)
        detach(layer, Tuned)
        detach(norm, Passed)


def kept_bytes(model: nn.Module, inputs: Inputs) -> int:
    """Return the bytes of all tensors that one forward pass keeps for the backward pass, but parameters and buffers."""
    own = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        out = call(model, inputs)  # alive until all are counted, so that no address is used twice
    del out
    return sum(kept.values())
