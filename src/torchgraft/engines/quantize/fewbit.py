"""Weights in 2 to 8 bits on a symmetric grid that a power bends: codes, modules that run from packed codes, the edit.

With n = 2^(b-1) - 1 and m the largest magnitude of an output channel (or of the tensor), a weight w has the code
Q = round(n sign(w) |w/m|^a) in [-n, n] and stands for m sign(Q) |Q/n|^(1/a); a = 1 is the uniform grid. The codes are
stored b bits each; a stands in the recipe. Scales, and what takes no codes (biases, norms), may be stored in half
precision, 16 bits. Before a layer runs its weight is put together again as floats, once, and kept: the file is small
and nothing gets faster.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from torchgraft.engines.assembled import Assembled
from torchgraft.engines.bucketed import pack, unpack
from torchgraft.engines.int8 import is_linear
from torchgraft.engines.sites import ignored
from torchgraft.engines.surgery.edits import Edit
from torchgraft.errors import BadInput, nearest

__all__ = [
    "HALF",
    "FewBit",
    "Granularity",
    "PowerQuantizer",
    "bend",
    "code_layers",
    "codes_of",
    "exponent_of",
    "grid",
    "holds_as_half",
    "largest_code",
    "magnitudes",
    "power_codes",
    "power_values",
    "set_codes",
    "soft_round",
    "stochastic_round",
    "storable_halves",
    "storable_layers",
    "storable_values",
    "value_axis",
]

#: Which weights share a scale: those of an output channel, or all of a tensor.
Granularity: TypeAlias = Literal["channel", "tensor"]

#: Below this a 2nd-to-smallest level of 8 bits would leave float32.
LEAST_EXPONENT = 0.1
_LEAST, _MOST = 2, 8
#: The bits of a parameter that is stored as half-precision floats.
HALF = 16
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def largest_code(bits: int) -> int:
    """Return n = 2^(bits - 1) - 1.

    Raises:
        BadInput: bits lie outside 2..8.
    """
    if not _LEAST <= bits <= _MOST:
        raise BadInput(f"few-bit codes have {_LEAST} to {_MOST} bits, got {bits}")
    return int(2 ** (bits - 1)) - 1


def stochastic_round(values: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Return ``values`` rounded up or down at random, unbiased: floor(v + u), u uniform in [0, 1).

    Example:
        >>> stochastic_round(torch.tensor([-2.0, 0.0, 3.0]))
        tensor([-2.,  0.,  3.])
    """
    down = values.floor()
    draw = torch.rand(values.shape, generator=generator, dtype=values.dtype, device=values.device)
    # Against the fraction, not floor(v + u): the sum of a whole number and u may round up to the next one.
    return down + (draw < values - down).to(values.dtype)


def soft_round(values: Tensor, sharpness: float) -> Tensor:
    """Return a smooth monotone staircase through the whole numbers: the identity at 0, rounding at infinity.

    Example:
        >>> soft_round(torch.tensor([0.25, 1.0, 1.75]), 50.0).round(decimals=3)
        tensor([0., 1., 2.])
    """
    down = values.floor()
    half = torch.tensor(0.5 * sharpness)
    return down + 0.5 + 0.5 * torch.tanh(sharpness * (values - down - 0.5)) / float(half.tanh())


def bend(unit: Tensor, exponent: Tensor | float, *, least: float = 0.0) -> Tensor:
    """Return sign(x) |x|^exponent for x in [-1, 1], with magnitudes below ``least`` held there for the gradient's log.

    Example:
        >>> bend(torch.tensor([-0.25, 0.0, 1.0]), 0.5)
        tensor([-0.5000,  0.0000,  1.0000])
    """
    size = unit.abs()
    return unit.sign() * (size.clamp(min=least) if least else size) ** exponent


def magnitudes(weight: Tensor, granularity: Granularity = "channel", *, axis: int = 0) -> Tensor:
    """Return m: the largest magnitude of each channel along ``axis``, or of the tensor, in a shape that broadcasts."""
    if granularity not in ("channel", "tensor"):
        raise BadInput(f"granularity must be 'channel' or 'tensor', got {granularity!r}")
    others = [dim for dim in range(weight.ndim) if dim != axis or granularity == "tensor"]
    return weight.detach().abs().amax(others, keepdim=True)


def power_codes(weight: Tensor, scale: Tensor, *, bits: int, exponent: float) -> Tensor:
    """Return Q = round(n sign(w) |w / scale|^exponent), integers in [-n, n] as int32.

    Example:
        >>> w = torch.tensor([0.0, 0.25, -1.0])
        >>> power_codes(w, torch.tensor(1.0), bits=4, exponent=0.5)
        tensor([ 0,  4, -7], dtype=torch.int32)
    """
    n = largest_code(bits)
    check_exponent(exponent)
    unit = weight.detach() / torch.where(scale > 0, scale, torch.ones_like(scale))
    return (bend(unit, exponent) * n).round().clamp(-n, n).to(torch.int32)


def check_exponent(exponent: float) -> float:
    """Return ``exponent`` where it lies in [0.1, 1]."""
    if not LEAST_EXPONENT <= exponent <= 1.0:
        raise BadInput(f"exponent must lie in [{LEAST_EXPONENT}, 1], got {exponent}")
    return float(exponent)


def grid(bits: int, exponent: float) -> Tensor:
    """Return what the codes -n..n stand for at scale 1, (2n + 1,) in float64.

    Example:
        >>> grid(3, 0.5)
        tensor([-1.0000, -0.4444, -0.1111,  0.0000,  0.1111,  0.4444,  1.0000],
               dtype=torch.float64)
    """
    n = largest_code(bits)
    return bend(torch.arange(-n, n + 1, dtype=torch.float64) / n, 1.0 / exponent)


def power_values(codes: Tensor, scale: Tensor, *, bits: int, exponent: float) -> Tensor:
    """Return the weights that ``codes`` stand for, in the dtype of ``scale``."""
    levels = grid(bits, exponent).to(scale)
    return levels[codes.long() + largest_code(bits)] * scale


@dataclass(frozen=True)
class PowerQuantizer:
    """The quantiser of one tensor: to codes of the bent grid, and back.

    Args:
        bits: of a code, 2 to 8.
        exponent: a; 1 is uniform, 1/2 needs only squares and roots.
        granularity: a scale an output channel, or one for the tensor.

    Example:
        >>> quantizer = PowerQuantizer(3)
        >>> codes, scale = quantizer.encode(torch.tensor([[0.0, 0.1, -0.9]]))
        >>> codes, quantizer.decode(codes, scale)
        (tensor([[ 0,  1, -3]], dtype=torch.int32), tensor([[ 0.0000,  0.1000, -0.9000]]))
    """

    bits: int = 4
    exponent: float = 0.5
    granularity: Granularity = "channel"

    def __post_init__(self) -> None:
        largest_code(self.bits)
        check_exponent(self.exponent)

    def encode(self, weight: Tensor, *, axis: int = 0) -> tuple[Tensor, Tensor]:
        """Return codes in [-n, n] and the scales m, which broadcast."""
        scale = magnitudes(weight, self.granularity, axis=axis)
        return power_codes(weight, scale, bits=self.bits, exponent=self.exponent), scale

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        """Return m sign(Q) |Q/n|^(1/a)."""
        return power_values(codes, scale, bits=self.bits, exponent=self.exponent)

    def __call__(self, weight: Tensor, *, axis: int = 0) -> Tensor:
        """Return the values nearest to ``weight`` in the bent domain."""
        return self.decode(*self.encode(weight, axis=axis))


# Layers ---------------------------------------------------------------------------------------------------------------


@dataclass
class _Layout:
    """How one parameter is packed; modules that share a parameter share this."""

    bits: int
    shape: torch.Size
    exponent: float
    whole: Assembled = field(default_factory=Assembled)


def _layout(layer: nn.Module) -> _Layout:
    layouts: dict[str, _Layout] = layer.__dict__["_few_bit"]
    return layouts["weight"]


def _dense(module: Any, name: str) -> Tensor:
    layout: _Layout = module.__dict__["_few_bit"][name]
    held, kind = module._buffers, module._buffers.get(f"{name}_kind")
    if layout.bits == HALF:
        halves = held[f"{name}_half"]
        return layout.whole.value((halves, kind), lambda: _from_half(halves, kind))
    codes, stored = held[f"{name}_codes"], held[f"{name}_scale"]

    def make() -> Tensor:
        scale = stored if kind is None else _from_half(stored, kind)
        n = largest_code(layout.bits)
        whole = unpack(codes, layout.bits, layout.shape.numel()).long().clamp(max=2 * n)
        value: Tensor = grid(layout.bits, layout.exponent).to(scale)[whole].reshape(layout.shape) * scale
        return value

    return layout.whole.value((codes, stored) if kind is None else (codes, stored, kind), make)


def holds_as_half(value: Tensor, *, relative: bool = False) -> bool:
    """Say whether no entry of ``value`` leaves half precision; ``relative``: nor loses more than 1/2000 of itself.

    Example:
        >>> small = torch.tensor([1e-6, 1.0])
        >>> holds_as_half(small), holds_as_half(small, relative=True), holds_as_half(1e5 * small)
        (True, False, False)
    """
    about = torch.finfo(torch.float16)
    size = value.detach().abs()
    low = (size == 0) | (size >= about.tiny) if relative else torch.ones_like(size, dtype=torch.bool)
    return bool((low & (size <= about.max)).all())


def _to_half(value: Tensor) -> Tensor:
    """Return the bits of ``value`` in half precision, as integers, which conversions of a model leave alone."""
    return value.detach().to(torch.float16).view(torch.int16)


def _from_half(bits: Tensor, kind: Tensor) -> Tensor:
    """Return what ``bits`` stand for, in the dtype of ``kind``."""
    return bits.view(torch.float16).to(kind.dtype)


@functools.cache
def _class_of(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """Return a subclass of ``base`` whose parameters ``names`` are put together from codes whenever they are read."""
    body: dict[str, Any] = {name: property(functools.partial(_dense, name=name)) for name in names}
    # Said to the meters: these stand for parameters and count as such, beside what stands for some already.
    held = (*getattr(base, "parameter_buffers", ()), *names)
    body |= {"parameter_buffers": held, "few_bit_from": base, "__module__": __name__}
    return type(f"FewBit{base.__name__}", (base,), body)


def channel_axis(layer: nn.Module) -> int:
    """Return the axis of the weight of ``layer`` along which its outputs lie (1 for transformers' Conv1D)."""
    return 1 if is_linear(layer) and not isinstance(layer, nn.Linear) else 0


def _takes_codes(module: nn.Module) -> bool:
    if type(module) is nn.Embedding:
        return module.max_norm is None  # else a call writes into the weight
    return is_linear(module) or type(module) in _CONVS


def _holders(model: nn.Module) -> dict[int, list[tuple[str, nn.Module, str]]]:
    """Return who holds each parameter, by its identity: (module name, module, parameter name)."""
    found: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for prefix, module in model.named_modules():
        for name, value in module._parameters.items():
            if value is not None:
                found.setdefault(id(value), []).append((prefix, module, name))
    return found


def storable_layers(model: nn.Module, *, ignore: Sequence[str] = ()) -> list[str]:
    """Return the plain linear layers, convolutions and embeddings that can run from codes, by name.

    A weight that several of them share is named once, by the first; one that anything else holds too is left out, and
    so is one of which a holder is ignored. ``""`` is the model.

    Args:
        model: any module.
        ignore: globs of modules that stay as they are.

    Example:
        >>> storable_layers(nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2), nn.ReLU()))
        ['0', '1']
    """
    found = []
    for holders in _holders(model).values():
        name, first, _ = holders[0]
        weight = first._parameters.get("weight")
        if weight is None or not weight.is_floating_point():
            continue
        alike = len({channel_axis(module) for _, module, _ in holders}) == 1
        if alike and all(
            part == "weight" and _takes_codes(module) and not ignored(prefix, ignore)
            for prefix, module, part in holders
        ):
            found.append(name)
    order = [name for name, _ in model.named_modules()]
    return sorted(found, key=order.index)


def value_axis(value: Tensor) -> int:
    """Return the axis along which the channels of a parameter of no layer lie: the first that is longer than 1."""
    return next((axis for axis, length in enumerate(value.shape) if length > 1), 0)


def storable_values(model: nn.Module, *, ignore: Sequence[str] = (), least: int = 256) -> list[str]:
    """Return the other parameters of two axes or more that can be read from codes, by name, such as positions.

    What :func:`storable_layers` names is not among them, nor the weights of a recurrent layer, which keeps references
    to them. One that several modules share is named once.

    Args:
        model: any module.
        ignore: globs of modules or parameters that stay as they are.
        least: smaller ones would not shrink, for what scales and names add.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> model.position = nn.Parameter(torch.zeros(1, 8, 32))
        >>> storable_values(model)
        ['position']
    """
    layers = {id(model.get_submodule(name)._parameters["weight"]) for name in storable_layers(model)}
    return _others(model, layers, ignore, lambda value: value.is_floating_point() and value.ndim > 1, least)


def storable_halves(model: nn.Module, *, ignore: Sequence[str] = (), least: int = 16) -> list[str]:
    """Return the parameters that take no codes and can be stored in half precision, by name: biases, norms, tokens.

    Args:
        model: any module.
        ignore: globs of modules or parameters that stay as they are.
        least: smaller ones would not shrink, for what a name adds.

    Example:
        >>> storable_halves(nn.Sequential(nn.Linear(2, 32), nn.LayerNorm(32)))
        ['0.bias', '1.weight', '1.bias']
    """
    coded = {id(model.get_submodule(name)._parameters["weight"]) for name in storable_layers(model)}
    coded |= {id(model.get_parameter(name)) for name in storable_values(model)}
    return _others(model, coded, ignore, lambda value: value.dtype in (torch.float32, torch.float64), least)


def _others(
    model: nn.Module, taken: set[int], ignore: Sequence[str], fits: Callable[[Tensor], bool], least: int
) -> list[str]:
    """Return the parameters beside ``taken`` that may be read from something else, by name, each once."""
    found = []
    for key, holders in _holders(model).items():
        names = [f"{prefix}.{part}" if prefix else part for prefix, _, part in holders]
        value = cast(nn.Parameter, holders[0][1]._parameters[holders[0][2]])
        if key in taken or any(_needs_its_own(module) for _, module, _ in holders):
            continue
        if is_lazy(value) or not fits(value) or value.numel() < least:
            continue
        if not any(ignored(name, ignore) for name in names):
            found.append(names[0])
    order = [name for name, _ in model.named_parameters()]
    return sorted(found, key=order.index)


def _needs_its_own(module: nn.Module) -> bool:
    """Say whether ``module`` keeps references to its parameters, writes into them, lists them, or packs them itself."""
    if isinstance(module, nn.Embedding):
        return module.max_norm is not None
    packs = type(module)._save_to_state_dict is not nn.Module._save_to_state_dict
    return packs or isinstance(module, nn.RNNBase | nn.ParameterList | nn.ParameterDict | ParametrizationList)


def code_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of ``model`` whose weight is read from packed codes, by name."""
    found = {}
    for name, module in model.named_modules():
        layout: _Layout | None = module.__dict__.get("_few_bit", {}).get("weight")
        if layout is not None and layout.bits != HALF:
            found[name] = module
    return found


def codes_of(layer: nn.Module) -> Tensor:
    """Return the codes of ``layer`` in [-n, n], in the shape of its weight."""
    layout = _layout(layer)
    data = unpack(layer.get_buffer("weight_codes"), layout.bits, layout.shape.numel())
    return data.reshape(layout.shape) - largest_code(layout.bits)


def exponent_of(layer: nn.Module) -> float:
    """Return the exponent of the grid of ``layer``."""
    return _layout(layer).exponent


def set_codes(layer: nn.Module, codes: Tensor, exponent: float | None = None) -> None:
    """Write ``codes`` in [-n, n] into ``layer``, in place.

    Args:
        layer: a layer that runs from codes.
        codes: in the shape of its weight.
        exponent: of this object's grid from now on; what is to be saved must name it in its edit too.

    Raises:
        BadInput: shape or range is wrong.
    """
    layout = _layout(layer)
    n = largest_code(layout.bits)
    if codes.shape != layout.shape or int(codes.abs().max()) > n:
        raise BadInput(f"codes must be {tuple(layout.shape)} in [-{n}, {n}], got {tuple(codes.shape)}")
    with torch.no_grad():
        layer.get_buffer("weight_codes").copy_(pack(codes + n, layout.bits))
    if exponent is not None:
        layout.exponent, layout.whole = check_exponent(exponent), Assembled()


class FewBit(Edit):
    """Store weights as packed codes of a bent grid; they are executed as floats.

    Args:
        bits: name of a layer, whose weight is meant, or of another parameter -> bits a code, 2 to 8; 16 for half
            precision.
        exponents: the same names -> a; 1 (the uniform grid) where none is given.
        granularity: which weights share a scale.
        scales: how scales are stored. Half precision moves a weight by 1/2000 at most; codes are of what is stored.
    """

    op: ClassVar[str] = "few-bit"
    bits: dict[str, int] = Field(min_length=1)
    exponents: dict[str, float] = Field(default_factory=dict)
    granularity: Granularity = "channel"
    scales: Literal["float32", "float16"] = "float32"

    def rewrite(self, model: nn.Module) -> nn.Module:
        """Replace each weight by the codes of its nearest levels, in place.

        Raises:
            BadInput: a name is that of nothing that can be stored so, or its values lie beyond half precision.
        """
        layers, values = storable_layers(model), storable_values(model, least=1)
        halves = storable_halves(model, least=1) if HALF in self.bits.values() else []
        named, shared = dict(model.named_modules()), _holders(model)
        for name, bits in self.bits.items():
            if bits == HALF and name in halves:
                value, axis = cast(Tensor, model.get_parameter(name)), 0
            elif bits == HALF:
                raise BadInput(f"few-bit finds nothing to store in half precision at {name!r}{nearest(name, halves)}")
            elif name in layers:
                value = cast(Tensor, named[name]._parameters["weight"])
                axis = channel_axis(named[name])
            elif name in values:
                value = model.get_parameter(name)
                axis = value_axis(value)
            else:
                known = [*layers, *values] or [""]
                raise BadInput(f"few-bit finds no weight that it can take at {name!r}{nearest(name, known)}")
            self._replace(value, axis, [(module, part) for _, module, part in shared[id(value)]], name, bits)
        return model

    def _replace(
        self, value: Tensor, axis: int, holders: Sequence[tuple[nn.Module, str]], name: str, bits: int
    ) -> None:
        weight, exponent = value.detach(), check_exponent(self.exponents.get(name, 1.0))
        layout, kind = _Layout(bits, weight.shape, exponent), weight.new_empty(0)
        if bits == HALF:
            if not holds_as_half(weight):
                raise BadInput(f"few-bit: {name!r} holds values beyond half precision")
            stored = {"half": _to_half(weight)}
        else:
            scale = magnitudes(weight, self.granularity, axis=axis)
            stored = {"scale": scale}
            if self.scales == "float16":
                if not holds_as_half(scale):
                    raise BadInput(f"few-bit: the scales of {name!r} lie beyond half precision")
                stored["scale"] = _to_half(scale)
                scale = _from_half(stored["scale"], kind)
            codes = power_codes(weight, scale, bits=bits, exponent=exponent)
            stored = {"codes": pack(codes + largest_code(bits), bits), **stored}
        for module, part in holders:
            del module._parameters[part]
            base: type[nn.Module] = getattr(type(module), "few_bit_from", type(module))
            held = {**module.__dict__.get("_few_bit", {}), part: layout}
            module.__class__ = _class_of(base, tuple(held))  # type: ignore[arg-type]  # classes do hash
            module.__dict__["_few_bit"] = held
            for what, data in stored.items():
                module.register_buffer(f"{part}_{what}", data)
            if bits == HALF or self.scales == "float16":
                # Follows conversions of the model, which leave bits alone.
                module.register_buffer(f"{part}_kind", kind, persistent=False)

    def describe(self) -> dict[str, str]:
        """Say in how many bits each weight is stored."""
        words = {name: f"exponent {self.exponents.get(name, 1.0):.3g}" for name in self.bits}
        return {
            name: "stored in half precision"
            if bits == HALF
            else f"weights stored in {bits} bits ({words[name]}, a scale a {self.granularity}), executed as floats"
            for name, bits in self.bits.items()
        }
