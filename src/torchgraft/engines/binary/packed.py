"""Binary layers as they are executed: weights are packed bits, inputs become signs, products are integers.

The output is bit for bit that of the trained layer, which multiplies the same integers as floats. ``"int8"`` is the
faster backend wherever torch has an integer kernel; ``"xnor"`` shows the arithmetic of bit hardware with a table of
counts, and is slower than floats on a CPU.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.engines.binary.bits import BACKENDS, pack_signs, sign, sign_product, unpack_signs
from torchgraft.engines.binary.layers import BinaryConv2d, BinaryLayer, BinaryLinear
from torchgraft.engines.surgery.swap import replace_module
from torchgraft.errors import BadInput, nearest

__all__ = ["PackedConv2d", "PackedLinear", "freeze"]


class _Packed(nn.Module):
    #: Buffers that the meters count as parameters.
    parameter_buffers: tuple[str, ...] = ("weight", "bias")

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: BinaryLayer, backend: str) -> None:
        super().__init__()
        if layer.activation is None:
            raise BadInput("a layer whose inputs are no signs cannot be executed in bits; give it an activation")
        if backend not in BACKENDS:
            raise BadInput(f"unknown backend {backend!r}{nearest(backend, list(BACKENDS))}")
        self.backend = backend
        self.columns = layer.weight[0].numel()
        self.register_buffer("weight", pack_signs(layer.signs().detach().flatten(1)))
        self.register_buffer("scale", layer.row_scale().detach().clone())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())
        self.train(layer.training)

    def multiply(self, rows: Tensor) -> Tensor:
        """Return scale * integers + bias for rows of signs; (M, K) -> (M, N)."""
        integers = sign_product(rows, unpack_signs(self.weight, self.columns), backend=self.backend)
        out = integers.to(self.scale.dtype) * self.scale
        return out if self.bias is None else out + self.bias


class PackedLinear(_Packed):
    """A :class:`BinaryLinear` with an activation, executed on bits; see the module.

    Args:
        layer: the trained layer.
        backend: ``"int8"``, ``"xnor"`` or ``"float"``.

    Shapes:
        (..., in_features) -> (..., out_features)

    Raises:
        BadInput: the layer's inputs are no signs, or the backend is unknown.
    """

    def __init__(self, layer: BinaryLinear, *, backend: str = "int8") -> None:
        super().__init__(layer, backend)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output."""
        if x.shape[-1] != self.columns:
            raise BadInput(f"input must be (..., {self.columns}), got {tuple(x.shape)}")
        out = self.multiply(x.reshape(-1, self.columns))
        return out.reshape(*x.shape[:-1], len(self.scale)).to(x.dtype)


class PackedConv2d(_Packed):
    """A :class:`BinaryConv2d` with an activation and one group, executed on bits; see the module.

    Args:
        layer: the trained layer.
        backend: ``"int8"``, ``"xnor"`` or ``"float"``.

    Shapes:
        (B, channels, h, w) -> (B, out_channels, h', w')

    Raises:
        BadInput: the layer's inputs are no signs, it has several groups, or the backend is unknown.
    """

    def __init__(self, layer: BinaryConv2d, *, backend: str = "int8") -> None:
        if layer.groups != 1:
            raise BadInput(f"a packed convolution has one group, got {layer.groups}")
        super().__init__(layer, backend)
        self.channels = layer.channels
        self.kernel_size = (layer.weight.shape[2], layer.weight.shape[3])
        self.stride, self.padding, self.dilation = layer.stride, layer.padding, layer.dilation

    def patches(self, x: Tensor) -> Tensor:
        """Return the signs that each output position reads, (B, K, positions), the border being +1."""
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise BadInput(f"input must be (B, {self.channels}, h, w), got {tuple(x.shape)}")
        rows, columns = self.padding
        signs = F.pad(sign(x), (columns, columns, rows, rows), value=1.0)
        return F.unfold(signs, self.kernel_size, dilation=self.dilation, stride=self.stride)

    def out_size(self, x: Tensor) -> tuple[int, int]:
        """Return height and width of the output."""
        sizes = [
            (x.shape[2 + axis] + 2 * self.padding[axis] - self.dilation[axis] * (self.kernel_size[axis] - 1) - 1)
            // self.stride[axis]
            + 1
            for axis in (0, 1)
        ]
        return sizes[0], sizes[1]

    def forward(self, x: Tensor) -> Tensor:
        """Return the output."""
        patches = self.patches(x)
        out = self.multiply(patches.transpose(1, 2).reshape(-1, self.columns))  # (B * positions, C)
        out = torch.unflatten(out, 0, (x.shape[0], patches.shape[2])).transpose(1, 2)
        return torch.unflatten(out, 2, self.out_size(x)).to(x.dtype)


def freeze(model: nn.Module, *, backend: str = "int8") -> nn.Module:
    """Return a copy of ``model`` whose layers of binary weights and inputs are executed on bits; others stay.

    Example:
        >>> from torchgraft.engines.binary import Polynomial
        >>> model = nn.Sequential(BinaryLinear(16, activation=Polynomial())).eval()
        >>> x = torch.randn(4, 16)
        >>> torch.equal(freeze(model)(x), model(x))
        True
    """
    frozen = copy.deepcopy(model)
    for name, layer in list(frozen.named_modules()):
        if not isinstance(layer, BinaryLayer) or layer.activation is None:
            continue
        made: nn.Module
        if isinstance(layer, BinaryConv2d):
            if layer.groups != 1:
                continue
            made = PackedConv2d(layer, backend=backend)
        elif isinstance(layer, BinaryLinear):
            made = PackedLinear(layer, backend=backend)
        else:
            continue
        if name == "":
            return made
        replace_module(frozen, name, made)
    return frozen
