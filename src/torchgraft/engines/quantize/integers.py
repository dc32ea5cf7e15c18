"""Chains of layers on integers alone: products, sums and shifts, with every rescale declared, and their float form.

    acc = sum q_x q_w + q_b, q_b = round(b / (s_x s_w));  q_y = clip((acc m + 2^(k-1)) >> k), m 2^-k ~ s_x s_w / s_y

Behind a ReLU the b bits are unsigned, [0, 2^b - 1], else signed; weights are signed and symmetric.

A :class:`FakeQuantNet` rounds floats to the same grids and can be trained; :func:`to_integer` makes of it, or of a
float chain and calibration samples, an :class:`IntegerNet` that holds and moves nothing but integers between the
rounding of its input and the scale of its output. Integers are executed as torch's 64-bit integers: the numbers are
those of hardware, the speed is not.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.engines.parametrize import fold
from torchgraft.errors import BadInput

__all__ = ["FakeQuantNet", "IntegerLayer", "IntegerNet", "fake_quantize", "fixed_point", "rescale", "to_integer"]

_Kind: TypeAlias = Literal["linear", "conv", "transposed"]
_KINDS: dict[type[nn.Module], _Kind] = {nn.Linear: "linear", nn.Conv1d: "conv", nn.ConvTranspose1d: "transposed"}
_NOTHING = (nn.Identity, nn.Dropout)


def fixed_point(ratio: float, bits: int = 15) -> tuple[int, int]:
    """Return (m, k) with m of ``bits`` bits and m 2^-k nearest to ``ratio``.

    Example:
        >>> fixed_point(0.75, bits=4)
        (12, 4)

    Raises:
        BadInput: the ratio is not positive, or needs a shift outside 1..62.
    """
    if not ratio > 0 or not math.isfinite(ratio):
        raise BadInput(f"a rescale must be positive and finite, got {ratio}")
    part, exponent = math.frexp(ratio)
    m, k = round(part * 2**bits), bits - exponent
    if m == 2**bits:
        m, k = m // 2, k - 1
    if not 1 <= k <= 62:
        raise BadInput(f"a rescale by {ratio:.3g} needs a shift by {k}, outside 1..62")
    return m, k


def rescale(acc: Tensor, multiplier: Tensor, shift: Tensor) -> Tensor:
    """Return (acc m + 2^(k-1)) >> k: the product with m 2^-k, rounded half up.

    Example:
        >>> rescale(torch.tensor([-2, 1, 2, 3]), torch.tensor(1), torch.tensor(1))
        tensor([-1,  1,  1,  2])
    """
    return (acc * multiplier + (torch.ones_like(shift) << (shift - 1))) >> shift


def _unfold(x: Tensor, width: int, stride: int) -> Tensor:
    """Return the windows of (B, C, L) as rows, (B, L', C width)."""
    return x.unfold(-1, width, stride).transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class _Shape:
    """What a layer does besides its numbers."""

    kind: _Kind
    flatten: bool
    relu: bool
    stride: int = 1
    padding: int = 0
    output_padding: int = 0


def _product(x: Tensor, weight: Tensor, shape: _Shape) -> Tensor:
    """Return the sums of products of a layer in whatever dtype they come, outputs on axis 1."""
    if shape.kind == "linear":
        return x @ weight.T
    width = weight.shape[-1]
    if shape.kind == "conv":
        x = F.pad(x, (shape.padding, shape.padding))
        rows, flat, stride = x, weight.flatten(1), shape.stride
    else:  # a convolution of the input with zeros between, by the reversed kernel
        spread = x.new_zeros(*x.shape[:2], (x.shape[-1] - 1) * shape.stride + 1)
        spread[..., :: shape.stride] = x
        edge = width - 1 - shape.padding
        rows = F.pad(spread, (edge, edge + shape.output_padding))
        flat, stride = weight.flip(-1).transpose(0, 1).flatten(1), 1
    return (_unfold(rows, width, stride) @ flat.T).transpose(1, 2)


def _per_output(value: Tensor, out: Tensor) -> Tensor:
    return value.reshape(-1, *[1] * (out.ndim - 2))


class IntegerLayer(nn.Module):
    """One layer on integers: (B, C, L) or (B, K) of int64 in, the same or sums out.

    Args:
        shape: kind and layout.
        weight: q_w.
        bias: q_b.
        multiplier: m of each output, or ``None`` for the last layer, which returns its sums.
        shift: k of each output.
        bits: of the result.
    """

    weight: Tensor
    bias: Tensor
    multiplier: Tensor | None
    shift: Tensor | None

    def __init__(
        self, shape: _Shape, weight: Tensor, bias: Tensor, multiplier: Tensor | None, shift: Tensor | None, *, bits: int
    ) -> None:
        super().__init__()
        self.shape, self.bits = shape, bits
        self.register_buffer("weight", weight.to(torch.int16 if bits > 8 else torch.int8))
        self.register_buffer("bias", bias.to(torch.int32))
        self.register_buffer("multiplier", None if multiplier is None else multiplier.to(torch.int32))
        self.register_buffer("shift", None if shift is None else shift.to(torch.int32))

    def bound(self, largest: int) -> int:
        """Return the largest magnitude that a sum can reach on inputs up to ``largest``."""
        axis = 1 if self.shape.kind == "transposed" else 0
        rows = self.weight.long().abs().transpose(0, axis).flatten(1).sum(1)
        return int((rows * largest + self.bias.long().abs()).max())

    def forward(self, x: Tensor) -> Tensor:
        """Return the next integers; nothing here is a float."""
        if self.shape.flatten:
            x = x.flatten(1)
        acc = _product(x, self.weight.long(), self.shape)
        acc = acc + _per_output(self.bias.long(), acc)
        if self.multiplier is None or self.shift is None:
            return acc.clamp(min=0) if self.shape.relu else acc
        q = rescale(acc, _per_output(self.multiplier.long(), acc), _per_output(self.shift.long(), acc))
        return q.clamp(*_range(self.bits, positive=self.shape.relu))


class IntegerNet(nn.Module):
    """A chain of integer layers between one rounding of the input and one scale of the output.

    Args:
        layers: the layers.
        input_scale: s of the input.
        output_scale: of each output's sums.
        input_bits: of the input.

    Shapes:
        (B, C, L) or (B, K) -> (B, N) or (B, C', L')
    """

    input_scale: Tensor
    output_scale: Tensor

    def __init__(
        self, layers: list[IntegerLayer], input_scale: Tensor, output_scale: Tensor, *, input_bits: int
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.input_bits = input_bits
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("output_scale", output_scale)

    def encode(self, x: Tensor) -> Tensor:
        """Return the integers that the converter gives."""
        return _codes(x, self.input_scale, self.input_bits).long()

    def integers(self, q: Tensor) -> list[Tensor]:
        """Return what every layer gives on integers ``q``, the last one's sums at the end."""
        found = []
        for layer in self.layers:
            q = layer(q)
            found.append(q)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Return the output in numbers."""
        acc = self.integers(self.encode(x))[-1]
        return acc.to(x.dtype) * _per_output(self.output_scale.to(x.dtype), acc)


def _range(bits: int, *, positive: bool = False) -> tuple[int, int]:
    """Return the least and the largest code."""
    return (0, 2**bits - 1) if positive else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _codes(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    return (x / scale).round().clamp(*_range(bits))


class _Rounded(torch.autograd.Function):
    """Codes of x in whole numbers; backwards 1 / s inside the range, 0 outside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
        q = (x / scale).round()
        ctx.save_for_backward((q >= low) & (q <= high), scale)
        return q.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        inside, scale = ctx.saved_tensors
        return grads[0] * inside / scale, None, None, None


def _fake(x: Tensor, scale: Tensor, bits: int, *, positive: bool = False) -> Tensor:
    q: Tensor = _Rounded.apply(x, scale, *_range(bits, positive=positive))  # type: ignore[no-untyped-call]
    return q * scale


class FakeQuantNet(nn.Module):
    """The float form of an :class:`IntegerNet`, which can be trained: every number is rounded, gradients pass through.

    Made by :func:`fake_quantize`.

    Args:
        layers: linear layers and convolutions, with their shapes.
        scales: of the input and of every layer's output but the last.
        bits: of weights and activations.
        input_bits: of the input.
        per_channel: whether each output channel has a weight scale of its own.
    """

    scales: Tensor

    def __init__(
        self,
        layers: list[tuple[nn.Module, _Shape]],
        scales: Tensor,
        *,
        bits: int,
        input_bits: int,
        per_channel: bool,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList([layer for layer, _ in layers])
        self.shapes = [shape for _, shape in layers]
        self.bits, self.input_bits, self.per_channel = bits, input_bits, per_channel
        self.register_buffer("scales", scales)

    def weight_scale(self, index: int) -> Tensor:
        """Return s_w of layer ``index``: a number an output channel, all equal without ``per_channel``."""
        weight = self.layers[index].get_parameter("weight").detach()
        rows = weight.transpose(0, 1 if self.shapes[index].kind == "transposed" else 0).flatten(1).abs().amax(1)
        most = rows if self.per_channel else rows.amax().expand(len(rows))
        scale: Tensor = torch.where(most > 0, most, torch.ones_like(most)) / (2 ** (self.bits - 1) - 1)
        return scale

    def layer(self, index: int, x: Tensor) -> Tensor:
        """Return what layer ``index`` makes of rounded numbers ``x``: rounded ones, or the last layer's sums."""
        module, shape = self.layers[index], self.shapes[index]
        x = x.flatten(1) if shape.flatten else x
        weight, own = module.get_parameter("weight"), self.weight_scale(index)
        axis = 1 if shape.kind == "transposed" else 0
        spread = own.reshape(*[-1 if dim == axis else 1 for dim in range(weight.ndim)])
        y: Tensor = _product(x, _fake(weight, spread, self.bits), shape)
        bias = module._parameters.get("bias")
        if bias is not None:
            y = y + _per_output(_fake(bias, self.scales[index] * own, 32), y)
        y = torch.relu(y) if shape.relu else y
        if index == len(self.layers) - 1:
            return y
        return _fake(y, self.scales[index + 1], self.bits, positive=shape.relu)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output, every number rounded on the way."""
        x = _fake(x, self.scales[0], self.input_bits)
        for index in range(len(self.layers)):
            x = self.layer(index, x)
        return x


def _chain(model: nn.Module) -> list[tuple[nn.Module, _Shape]]:
    """Return the layers of a folded model with what stands around them.

    Raises:
        BadInput: the model is no chain of the layers that there are.
    """
    flat: list[tuple[str, nn.Module]] = []

    def walk(name: str, module: nn.Module) -> None:
        if type(module).forward is nn.Sequential.forward:
            for child, inner in module._modules.items():
                walk(f"{name}.{child}" if name else child, inner)  # type: ignore[arg-type]  # Sequential holds modules
        else:
            flat.append((name, module))

    walk("", model)
    found: list[tuple[nn.Module, _Shape]] = []
    flatten = False
    for name, module in flat:
        place = f"{type(module).__name__} at {name or 'the top'}"
        if isinstance(module, _NOTHING):
            continue
        if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
            flatten = True
        elif isinstance(module, nn.ReLU) and found and not flatten and not found[-1][1].relu:
            layer, shape = found[-1]
            found[-1] = (layer, _Shape(**{**shape.__dict__, "relu": True}))
        elif type(module) in _KINDS:
            found.append((module, _shape(module, flatten, place)))
            flatten = False
        else:
            raise BadInput(
                "to_integer takes an nn.Sequential of Linear, Conv1d, ConvTranspose1d, each with a ReLU behind it or "
                "not, "
                f"Flatten and BatchNorm1d behind a convolution; not {place}"
            )
    if not found or flatten:
        raise BadInput("to_integer finds no layer, or a Flatten behind the last one")
    return found


def _shape(module: nn.Module, flatten: bool, place: str) -> _Shape:
    kind = _KINDS[type(module)]
    if not isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
        return _Shape(kind, flatten, False)
    if (
        module.groups != 1
        or module.dilation != (1,)
        or module.padding_mode != "zeros"
        or isinstance(module.padding, str)
    ):
        raise BadInput(
            f"to_integer takes convolutions without groups and dilation, padded by a number of zeros; not {place}"
        )
    extra = module.output_padding[0] if kind == "transposed" else 0
    if kind == "transposed" and module.padding[0] > module.kernel_size[0] - 1:
        raise BadInput(f"to_integer takes transposed convolutions with padding below the kernel's size; not {place}")
    return _Shape(kind, flatten, False, module.stride[0], module.padding[0], extra)


def fake_quantize(
    model: nn.Module, calib: Tensor, *, bits: int = 8, input_bits: int | None = None, per_channel: bool = False
) -> FakeQuantNet:
    """Return the trainable form of the integer net: weights, biases and activations rounded, norms folded.

    Args:
        model: an ``nn.Sequential`` (nested or not) of the layers that there are; left as it was.
        calib: inputs from which the scales of activations are taken.
        bits: of weights and activations.
        input_bits: of the input; by default the same.
        per_channel: a weight scale an output channel, in place of one a layer.

    Raises:
        BadInput: a layer is not among those, or a setting is out of range.
    """
    input_bits = bits if input_bits is None else input_bits
    for name, value in (("bits", bits), ("input_bits", input_bits)):
        if not 2 <= value <= 16:
            raise BadInput(f"{name} must lie in 2..16, got {value}")
    layers = _chain(fold(copy.deepcopy(model).eval()))
    ranges = [calib.detach().abs().amax()]
    x = calib.detach()
    with torch.no_grad():
        for module, shape in layers:
            x = module(x.flatten(1) if shape.flatten else x)
            x = x.relu() if shape.relu else x
            ranges.append(x.abs().amax())
    most = torch.stack([torch.where(value > 0, value, torch.ones_like(value)) for value in ranges[:-1]])
    tops = [_range(bits, positive=shape.relu)[1] for _, shape in layers[:-1]]
    full = torch.tensor([_range(input_bits)[1], *tops]).to(most)
    return FakeQuantNet(layers, most / full, bits=bits, input_bits=input_bits, per_channel=per_channel)


def to_integer(
    model: nn.Module,
    calib: Tensor | None = None,
    *,
    bits: int = 8,
    acc_bits: int = 32,
    input_bits: int | None = None,
    per_channel: bool = False,
    multiplier_bits: int = 15,
) -> IntegerNet:
    """Return the net that does on integers what ``model`` does.

    Args:
        model: a float model as for :func:`fake_quantize`, or what that function made, trained or not.
        calib: inputs from which the scales of activations are taken; not needed for a :class:`FakeQuantNet`.
        bits: of weights and activations.
        acc_bits: of sums, which no input can overflow.
        input_bits: of the input; by default as ``bits``.
        per_channel: a weight scale an output channel, in place of one a layer.
        multiplier_bits: of m.

    Example:
        >>> net = to_integer(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(16, 3))
        >>> net(torch.zeros(5, 3)).shape, net.layers[0].weight.dtype
        (torch.Size([5, 2]), torch.int8)

    Raises:
        BadInput: a layer is not among those there are, sums could overflow, or a setting is out of range.
    """
    if isinstance(model, FakeQuantNet):
        fake = model
    elif calib is None:
        raise BadInput("to_integer needs calib, inputs from which the scales of activations are taken")
    else:
        fake = fake_quantize(model, calib, bits=bits, input_bits=input_bits, per_channel=per_channel)
    if not 2 <= multiplier_bits <= 30 or not 8 <= acc_bits <= 32:
        raise BadInput(f"multiplier_bits must lie in 2..30 and acc_bits in 8..32, got {multiplier_bits} and {acc_bits}")
    layers: list[IntegerLayer] = []
    incoming = 2 ** (fake.input_bits - 1)
    scale = fake.scales[:1]
    with torch.no_grad():
        for index, (module, shape) in enumerate(zip(fake.layers, fake.shapes, strict=True)):
            weight, own = module.get_parameter("weight"), fake.weight_scale(index)
            axis = 1 if shape.kind == "transposed" else 0
            spread = own.reshape(*[-1 if dim == axis else 1 for dim in range(weight.ndim)])
            scale = fake.scales[index] * own
            bias = module._parameters.get("bias")
            q_b = torch.zeros_like(own) if bias is None else _codes(bias, scale, 32)
            m: Tensor | None = None
            k: Tensor | None = None
            if index < len(fake.layers) - 1:
                pairs = [fixed_point(float(ratio), multiplier_bits) for ratio in scale / fake.scales[index + 1]]
                m, k = torch.tensor([pair[0] for pair in pairs]), torch.tensor([pair[1] for pair in pairs])
            layer = IntegerLayer(shape, _codes(weight, spread, fake.bits), q_b, m, k, bits=fake.bits)
            if layer.bound(incoming) >= 2 ** (acc_bits - 1):
                raise BadInput(
                    f"layer {index} can reach sums of {layer.bound(incoming)}, which {acc_bits} bits do not hold; "
                    "use fewer bits"
                )
            layers.append(layer)
            incoming = max(abs(end) for end in _range(fake.bits, positive=shape.relu))
    return IntegerNet(layers, fake.scales[0].clone(), scale.clone(), input_bits=fake.input_bits)
