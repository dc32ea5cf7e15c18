"""Weights in a few bits: the bucketed quantiser, codes packed into bytes, and the edit that stores a model so.

A tensor is flattened and cut into buckets, the last one padded with its last value. In each bucket beta = min,
alpha = max - min and v = alpha p[code] + beta, with p the levels in [0, 1]: (0, 1/s, ..., 1) with s = 2^b - 1, or
learned ones. The codes are stored b bits each; before a layer runs, its weight is put together again as floats, once,
and kept. So the file is small and nothing gets faster.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from torchgraft.engines.assembled import Assembled
from torchgraft.engines.surgery.edits import Edit
from torchgraft.errors import BadInput, nearest

__all__ = [
    "BucketQuant",
    "Codes",
    "PackedTensor",
    "buckets",
    "joined",
    "pack",
    "packed_tensors",
    "quantize",
    "scaled",
    "unpack",
]

#: Most bits of a stored code.
MOST_BITS = 8


@dataclass(frozen=True)
class Codes:
    """A quantised tensor.

    Args:
        codes: which of the 2^b levels each value takes, (buckets, bucket), the padding included.
        scale: alpha of each bucket, (buckets,).
        offset: beta of each bucket, (buckets,).
        bits: b.
        shape: of the tensor.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor
    bits: int
    shape: torch.Size

    def values(self) -> Tensor:
        """Return the tensor that the codes stand for, with evenly spaced levels."""
        unit = self.codes.to(self.scale.dtype) / (2**self.bits - 1)
        return joined(unit, self.scale, self.offset, self.shape)


def buckets(values: Tensor, size: int) -> Tensor:
    """Return ``values`` flattened into rows of ``size``, the last row padded with the last value.

    Example:
        >>> buckets(torch.arange(5.0), 3)
        tensor([[0., 1., 2.],
                [3., 4., 4.]])
    """
    flat = values.reshape(-1)
    missing = -len(flat) % size
    return torch.cat([flat, flat[-1:].expand(missing)]).reshape(-1, size)


def scaled(values: Tensor, bucket: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``values`` in [0, 1] by bucket (buckets, bucket), with the scales and offsets (buckets,)."""
    rows = buckets(values.detach(), bucket)
    offset = rows.amin(1)
    scale = rows.amax(1) - offset
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
    return ((rows - offset[:, None]) / divisor[:, None]).clamp_(0, 1), scale, offset


def joined(unit: Tensor, scale: Tensor, offset: Tensor, shape: torch.Size) -> Tensor:
    """Return the tensor of ``shape`` whose values in [0, 1] by bucket, scales and offsets are given."""
    rows = unit * scale[:, None] + offset[:, None]
    return rows.reshape(-1)[: shape.numel()].reshape(shape)


def quantize(
    values: Tensor,
    *,
    bits: int,
    bucket: int = 256,
    stochastic: bool = False,
    generator: torch.Generator | None = None,
) -> Codes:
    """Quantise to evenly spaced levels by bucket: the nearest one, or one of the two neighbours, unbiased.

    Args:
        values: any floating-point tensor.
        bits: b, from 1 to 16; there are 2^b levels.
        bucket: values a bucket.
        stochastic: round up with the probability of the fraction.
        generator: draws for that; default: torch's own.

    Example:
        >>> quantize(torch.tensor([0.0, 0.4, 0.9, 1.0]), bits=1).values()
        tensor([0., 0., 1., 1.])

    Raises:
        BadInput: bits or bucket is out of range, or the tensor is empty.
    """
    if not 1 <= bits <= 16 or bucket < 1 or values.numel() == 0:
        raise BadInput(f"quantize needs bits in 1..16, bucket >= 1 and values, got {bits}, {bucket}, {values.numel()}")
    unit, scale, offset = scaled(values, bucket)
    steps = unit * (2**bits - 1)
    whole = steps.floor()
    fraction = steps - whole
    if stochastic:
        draw = torch.rand(fraction.shape, generator=generator, dtype=fraction.dtype, device=fraction.device)
        up = draw < fraction
    else:
        up = fraction > 0.5
    return Codes((whole + up).to(torch.int32), scale, offset, bits, values.shape)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return integer ``codes`` below 2^bits as bytes, one stream of bits, lowest bit first.

    Example:
        >>> pack(torch.tensor([1, 2, 3, 0]), 2)
        tensor([57], dtype=torch.uint8)
    """
    places = torch.arange(bits, device=codes.device)
    stream = ((codes.reshape(-1, 1).to(torch.int64) >> places) & 1).reshape(-1)
    stream = torch.cat([stream, stream.new_zeros(-len(stream) % 8)]).reshape(-1, 8)
    return (stream << torch.arange(8, device=codes.device)).sum(1).to(torch.uint8)


def unpack(data: Tensor, bits: int, count: int) -> Tensor:
    """Return the first ``count`` codes that :func:`pack` put into ``data``, (count,) of int32.

    Example:
        >>> unpack(torch.tensor([57], dtype=torch.uint8), 2, 4)
        tensor([1, 2, 3, 0], dtype=torch.int32)
    """
    # Division and remainder in place of shifts, which exporters to ONNX do not know for integers of every size.
    places = 2 ** torch.arange(8, device=data.device, dtype=torch.int32)
    stream = torch.div(data.to(torch.int32)[:, None], places, rounding_mode="floor") % 2
    stream = stream.reshape(-1)[: count * bits].reshape(count, bits)
    return (stream * places[:bits]).sum(1, dtype=torch.int32)


class PackedTensor:
    """How one packed tensor is laid out, and the floats that it was last put together as.

    Args:
        bits: bits a code.
        bucket: codes a bucket.
        shape: of the tensor.
    """

    def __init__(self, bits: int, bucket: int, shape: torch.Size) -> None:
        self.bits, self.bucket, self.shape = bits, bucket, shape
        self._whole = Assembled()

    def codes(self, data: Tensor) -> Tensor:
        """Return the codes of the tensor's values, (values,)."""
        return unpack(data, self.bits, self.shape.numel())

    def dense(self, data: Tensor, scale: Tensor, offset: Tensor, levels: Tensor | None) -> Tensor:
        """Return the tensor as floats; put together again only when what it is made of has changed."""
        parts = (data, scale, offset) if levels is None else (data, scale, offset, levels)

        def make() -> Tensor:
            codes = unpack(data, self.bits, len(scale) * self.bucket).reshape(-1, self.bucket)
            unit = codes.to(scale.dtype) / (2**self.bits - 1) if levels is None else levels[codes.long()]
            return joined(unit, scale, offset, self.shape)

        return self._whole.value(parts, make)


def _dense(module: Any, name: str) -> Tensor:
    store: PackedTensor = module.__dict__["_packed"][name]
    held = module._buffers
    return store.dense(held[f"{name}_codes"], held[f"{name}_scale"], held[f"{name}_offset"], held.get(f"{name}_levels"))


@functools.cache
def _packed_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """Return a subclass of ``base`` whose weights ``names`` are put together from codes whenever they are read."""
    body: dict[str, Any] = {name: property(functools.partial(_dense, name=name)) for name in names}
    # Said to the meters: these stand for parameters and count as such.
    body["parameter_buffers"] = names
    body["packed_from"] = base
    body["__module__"] = __name__
    return type(f"Packed{base.__name__}", (base,), body)


def packed_tensors(model: nn.Module) -> dict[str, tuple[PackedTensor, Tensor]]:
    """Return every packed tensor of ``model`` by its parameter name, with its bytes; tied ones once."""
    found: dict[str, tuple[PackedTensor, Tensor]] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, store in module.__dict__.get("_packed", {}).items():
            if id(store) not in seen:
                seen.add(id(store))
                found[f"{prefix}.{name}" if prefix else name] = (store, module._buffers[f"{name}_codes"])
    return found


class BucketQuant(Edit):
    """Store weights as packed codes; they are executed as floats.

    Args:
        bits: parameter name -> bits a code, 1 to 8.
        bucket: values that share a scale and an offset.
        learned: whether the levels are stored too, as they are where they were trained.
    """

    op: ClassVar[str] = "bucket-quant"
    bits: dict[str, int] = Field(min_length=1)
    bucket: int = Field(default=256, ge=1)
    learned: bool = False

    def rewrite(self, model: nn.Module) -> nn.Module:
        """Replace the named parameters by codes of their nearest levels; every module that shares one is changed."""
        holders: dict[int, list[tuple[nn.Module, str]]] = {}
        named: dict[str, nn.Parameter] = {}
        for prefix, module in model.named_modules():
            for name, value in module._parameters.items():
                if value is not None:
                    holders.setdefault(id(value), []).append((module, name))
                    named[f"{prefix}.{name}" if prefix else name] = value
        for name, bits in self.bits.items():
            if name not in named:
                raise BadInput(f"the model has no parameter {name!r}{nearest(name, list(named))}")
            if not 1 <= bits <= MOST_BITS:
                raise BadInput(f"codes have 1 to {MOST_BITS} bits, got {bits} for {name!r}")
            if not named[name].is_floating_point():
                raise BadInput(f"{name!r} holds {named[name].dtype}, not floats")
            self._replace(named[name], bits, holders[id(named[name])])
        return model

    def _replace(self, value: nn.Parameter, bits: int, holders: list[tuple[nn.Module, str]]) -> None:
        made = quantize(value.detach(), bits=bits, bucket=self.bucket)
        store = PackedTensor(bits, self.bucket, value.shape)
        parts = {"codes": pack(made.codes, bits), "scale": made.scale, "offset": made.offset}
        if self.learned:
            parts["levels"] = torch.linspace(0, 1, 2**bits, dtype=value.dtype, device=value.device)
        for module, name in holders:
            if isinstance(module, nn.RNNBase):
                raise BadInput(f"{type(module).__name__} keeps references to its weights and cannot be packed")
            if name not in module._parameters:
                continue
            del module._parameters[name]
            base: type[nn.Module] = getattr(type(module), "packed_from", type(module))
            names = (*getattr(module, "parameter_buffers", ()), name)
            module.__class__ = _packed_class(base, names)  # type: ignore[arg-type]  # modules do hash, by identity
            module.__dict__["_packed"] = {**module.__dict__.get("_packed", {}), name: store}
            for part, tensor in parts.items():
                module.register_buffer(f"{name}_{part}", tensor)

    def describe(self) -> dict[str, str]:
        """Return how many bits each weight is stored in."""
        levels = "learned levels" if self.learned else "even levels"
        return {name: f"stored in {bits} bits ({levels}), executed as floats" for name, bits in self.bits.items()}
