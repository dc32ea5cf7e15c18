"""Linear layers with int8 weights: stored as plain integers, executed by whichever integer kernel is fastest here.

A layer's file holds three tensors: ``weight`` (int8), ``scale`` (one a row, float32) and ``bias``. What a kernel needs
beside them is packed from these when it first runs, and never saved. The name of a backend says which arithmetic it
does, so that a recipe means the same numbers wherever it is opened; how fast they come is a matter of the machine.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.meters import MARGIN, Ratio, interleaved, interval
from torchgraft.engines.surgery.edits import Edit
from torchgraft.engines.surgery.swap import replace_module
from torchgraft.errors import BadInput, nearest

__all__ = [
    "BACKENDS",
    "Backend",
    "Choice",
    "Int8",
    "Int8Linear",
    "choose",
    "dequantise",
    "exact_here",
    "is_linear",
    "is_storable",
    "portable",
    "quantise_affine",
    "quantise_rows",
    "quantise_weight",
    "store",
]


@dataclass(frozen=True)
class Backend:
    """One way to execute an int8 linear layer.

    Args:
        name: how edits and reports call it.
        kernel: which kernel: ``"aten"``, ``"onednn"``, ``"int-mm"``, ``"weight-only"`` or ``"float"``.
        levels: the largest activation integer; 127 leaves a bit free for kernels whose 16-bit sums saturate at 255.
        words: what happens, for the report.
    """

    name: str
    kernel: str
    levels: int
    words: str


#: Every backend by name, the more exact of two equals first.
BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("aten-u8", "aten", 255, "int8, 8-bit activations a tensor, ATen's dynamic linear kernel"),
        Backend("aten-u7", "aten", 127, "int8, 7-bit activations a tensor, ATen's dynamic linear kernel"),
        Backend("onednn-u8", "onednn", 255, "int8, 8-bit activations a tensor, oneDNN"),
        Backend("onednn-u7", "onednn", 127, "int8, 7-bit activations a tensor, oneDNN"),
        Backend("int-mm", "int-mm", 127, "int8, 8-bit activations a token, integer matrix product"),
        Backend("weight-only", "weight-only", 0, "int8 weights, floating-point activations"),
        Backend("float", "float", 0, "stored int8, executed fp32"),
    )
}


def backend_named(name: str) -> Backend:
    """Return the backend called ``name``.

    Raises:
        BadInput: there is none.
    """
    if name not in BACKENDS:
        raise BadInput(f"unknown int8 backend {name!r}{nearest(name, list(BACKENDS))}")
    return BACKENDS[name]


# The arithmetic -------------------------------------------------------------------------------------------------------


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 weights in [-127, 127] and the scale of each output row: |scale * q - w| <= scale / 2.

    Shapes:
        weight: (N, ...); result: (N, ...) and (N,).

    Example:
        >>> quantise_weight(torch.tensor([[1.0, -0.5]]))
        (tensor([[127, -64]], dtype=torch.int8), tensor([0.0079]))
    """
    rows = weight.detach().to(torch.float32).flatten(1)  # (N, K)
    largest = rows.abs().amax(dim=1)
    scale = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
    integers = (rows / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    return integers.reshape(weight.shape), scale


def dequantise(integers: Tensor, scale: Tensor) -> Tensor:
    """Return ``scale * integers``, one scale a row, in float32."""
    return integers.to(torch.float32) * scale.reshape(-1, *[1] * (integers.ndim - 1))


def quantise_affine(x: Tensor, levels: int) -> tuple[Tensor, float, int]:
    """Return ``x`` as integers in [0, levels] with one scale and zero point: |scale * (q - zero) - x| <= scale / 2.

    The range of ``x``, widened to hold 0, takes levels - 1 steps, so that rounding the zero point cannot push an
    integer out of range and nothing needs to be clamped.

    Example:
        >>> quantise_affine(torch.tensor([-1.0, 0.0, 1.0]), 255)
        (tensor([  0, 127, 254], dtype=torch.uint8), 0.007874015748031496, 127)
    """
    least, most = torch.aminmax(x)
    low, high = min(float(least), 0.0), max(float(most), 0.0)
    scale = max((high - low) / (levels - 1), 1e-12)
    zero = round(-low / scale)
    # Adding a half and cutting off rounds numbers that are not negative, in one pass less than rounding first.
    return torch.add(torch.tensor(zero + 0.5), x, alpha=1.0 / scale).to(torch.uint8), scale, zero


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``x`` as integers in [-127, 127] with one scale a token: |scale * q - x| <= scale / 2.

    Shapes:
        x: (M, K); result: (M, K) and (M, 1).
    """
    scale = x.abs().amax(dim=1, keepdim=True).div_(127).clamp_(min=1e-12)
    return (x / scale).round_().to(torch.int8), scale


def portable(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, backend: Backend) -> Tensor:
    """Return what ``backend`` computes, by operators that every machine and every exporter has.

    The integers are those of the kernels except where a value falls between two of them to within a rounding error of
    float32, and the sums are those of float32.

    Shapes:
        x: (..., K); weight: (N, K) int8; scale, bias: (N,); result: (..., N).
    """
    if x.numel() == 0:
        return x.new_zeros(*x.shape[:-1], len(scale))
    if backend.kernel in ("weight-only", "float"):
        return F.linear(x, dequantise(weight, scale), bias)
    if backend.kernel == "int-mm":
        step = x.abs().amax(dim=-1, keepdim=True).div(127).clamp(min=1e-12)
        centred = (x / step).round()
    else:
        low, high = x.amin().clamp(max=0.0), x.amax().clamp(min=0.0)
        step = ((high - low) / (backend.levels - (backend.kernel == "onednn"))).clamp(min=1e-12)
        zero = (-low / step).round()
        centred = (x / step + zero).round().clamp(0, backend.levels) - zero
    out = F.linear(centred, weight.to(torch.float32)) * step * scale
    return out if bias is None else out + bias


# The kernels ----------------------------------------------------------------------------------------------------------

_Run: TypeAlias = "Callable[[Tensor], Tensor]"


def _pack_aten(weight: Tensor, scale: Tensor, bias: Tensor | None, backend: Backend) -> _Run:
    # The operator is a kernel like any other, but its weights must come as a quantised tensor, whose dtypes PyTorch
    # means to remove (pytorch/pytorch#184982; docs/decisions/010): made here, held nowhere, and missed gracefully.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zeros = torch.zeros(len(scale), dtype=torch.long)
        quantised = torch._make_per_channel_quantized_tensor(weight, scale.double(), zeros, 0)
        packed = torch.ops.quantized.linear_prepack(quantised, bias)
    operator = torch.ops.quantized.linear_dynamic.default
    reduce_range = backend.levels == 127

    def run(x: Tensor) -> Tensor:
        return operator(x, packed, reduce_range)  # type: ignore[no-any-return]  # torch.ops is untyped

    return run


def _pack_onednn(weight: Tensor, scale: Tensor, bias: Tensor | None, backend: Backend) -> _Run:
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    zeros = torch.zeros(len(scale), dtype=torch.int32)
    operator = torch.ops.onednn.qlinear_pointwise.default
    levels = backend.levels

    def run(x: Tensor) -> Tensor:
        q, step, zero = quantise_affine(x, levels)
        out: Tensor = operator(q, step, zero, packed, scale, zeros, bias, 1.0, 0, torch.float32, "none", [], "")
        return out

    return run


def _pack_int_mm(weight: Tensor, scale: Tensor, bias: Tensor | None, backend: Backend) -> _Run:
    columns = weight.t().contiguous()  # (K, N)

    def run(x: Tensor) -> Tensor:
        q, step = quantise_rows(x.reshape(-1, x.shape[-1]))
        # With one input feature the CPU kernel leaves its output unwritten; the product is then an outer one.
        product = torch._int_mm(q, columns) if len(columns) > 1 else q.to(torch.int32) * columns.to(torch.int32)
        out = product.to(torch.float32).mul_(step)
        out = out.mul_(scale) if bias is None else torch.addcmul(bias, out, scale)
        return out.reshape(*x.shape[:-1], -1)

    return run


def _pack_weight_only(weight: Tensor, scale: Tensor, bias: Tensor | None, backend: Backend) -> _Run:
    def run(x: Tensor) -> Tensor:
        out = torch._weight_int8pack_mm(x.reshape(-1, x.shape[-1]), weight, scale)
        return (out if bias is None else out.add_(bias)).reshape(*x.shape[:-1], -1)

    return run


_PACK: dict[str, Callable[[Tensor, Tensor, Tensor | None, Backend], _Run]] = {
    "aten": _pack_aten,
    "onednn": _pack_onednn,
    "int-mm": _pack_int_mm,
    "weight-only": _pack_weight_only,
}


def _portable_run(weight: Tensor, scale: Tensor, bias: Tensor | None, backend: Backend) -> _Run:
    return lambda x: portable(x, weight, scale, bias, backend)


@functools.cache
def exact_here(name: str, rows: int = 32, d_in: int = 256, d_out: int = 64) -> bool:
    """Say whether this torch on this machine has the kernel of backend ``name`` and its integer sums are right.

    The kernel is run on the largest integers that can meet. On x86 without VNNI, products of 8-bit activations are
    added in pairs in 16 bits and saturate silently; such a kernel fails here and is used with 7-bit activations.
    """
    backend = backend_named(name)
    if backend.kernel == "float":
        return True
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(0, 2, (d_out, d_in), generator=generator).mul_(254).sub_(127).to(torch.int8)
    weight[0] = 127
    x = torch.ones(rows, d_in)
    if rows * d_in > 1:
        x[0, 0] = 0.0
    scale = torch.full((d_out,), 2.0**-7)
    try:
        with torch.inference_mode():
            found = _PACK[backend.kernel](weight, scale, None, backend)(x)
    except (RuntimeError, AttributeError, NotImplementedError, TypeError, ValueError):
        return False
    expected = (x.double() @ weight.double().t()) * 2.0**-7
    return bool(torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5 * d_in * 0.01))


# The modules ----------------------------------------------------------------------------------------------------------


class _StraightThrough(torch.autograd.Function):
    """The integer kernel forward; backward as if the layer were its dequantised weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Int8Linear) -> Tensor:
        ctx.layer = layer
        return layer.execute(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        layer: Int8Linear = ctx.layer
        return gradients[0] @ dequantise(layer.weight, layer.scale).to(gradients[0].dtype), None


class Int8Linear(nn.Module):
    """A linear layer with int8 weights, executed by an integer kernel.

    Weights and bias are buffers and do not train; gradients pass through to the input as if nothing were rounded.
    Where the kernel of ``backend`` is missing or wrong on a machine, the same arithmetic is done by
    :func:`portable`, slower. Activations of the ``u8`` and ``u7`` backends share one scale a call, so that a sample's
    output depends a little on the batch that it comes in.

    Args:
        weight: int8.
        scale: one a row, float32.
        bias: or ``None``.
        backend: a name in :data:`BACKENDS`, not ``"float"`` (see :func:`store`).

    Shapes:
        weight: (N, K); scale, bias: (N,); input: (..., K); output: (..., N).

    Example:
        >>> layer = Int8Linear.from_linear(nn.Linear(8, 4), backend="int-mm")
        >>> layer(torch.ones(2, 3, 8)).shape
        torch.Size([2, 3, 4])

    Raises:
        BadInput: the backend is unknown, or shapes or dtypes do not fit.
    """

    #: Buffers that the meters count as parameters.
    parameter_buffers = ("weight", "bias")

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None, *, backend: str) -> None:
        super().__init__()
        chosen = backend_named(backend)
        if chosen.kernel == "float":
            raise BadInput("backend 'float' executes nothing in int8; use store() for a layer that is only stored so")
        if weight.ndim != 2 or weight.dtype != torch.int8 or scale.shape != weight.shape[:1]:
            raise BadInput(
                f"weight must be int8 (N, K) and scale (N,), got {weight.dtype} {tuple(weight.shape)}"
                f" and {tuple(scale.shape)}"
            )
        self.backend = chosen
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self._run: _Run | None = None

    @classmethod
    def from_linear(cls, linear: nn.Module, *, backend: str) -> Int8Linear:
        """Return ``linear`` (an ``nn.Linear``, or transformers' ``Conv1D``) with its weights rounded to int8."""
        if not is_linear(linear):
            raise BadInput(f"an Int8Linear is made from an nn.Linear, got {type(linear).__name__}")
        held = linear.get_parameter("weight")
        weight, scale = quantise_weight(held if isinstance(linear, nn.Linear) else held.t())
        bias = getattr(linear, "bias", None)
        made = cls(weight, scale, None if bias is None else bias.detach().to(torch.float32).clone(), backend=backend)
        return made.train(linear.training)

    @property
    def packed_bytes(self) -> int:
        """Bytes that a kernel holds beside the buffers."""
        return self.weight.numel() if self._run is not None and self.backend.kernel != "weight-only" else 0

    def execute(self, x: Tensor) -> Tensor:
        """Return the output without a gradient."""
        if x.shape[-1:] != (self.in_features,):
            raise BadInput(f"input must be (..., {self.in_features}), got {tuple(x.shape)}")
        if torch.compiler.is_compiling() or not x.is_cpu or x.numel() == 0:
            out = portable(x.to(torch.float32), self.weight, self.scale, self.bias, self.backend)
            return out.to(x.dtype)
        if x.ndim == 1:
            return self.execute(x[None])[0]
        run = self._run or self._prepare()
        if x.dtype != torch.float32:
            return run(x.to(torch.float32).contiguous()).to(x.dtype)
        return run(x.contiguous())

    def _prepare(self) -> _Run:
        pack = _PACK[self.backend.kernel] if exact_here(self.backend.name) else _portable_run
        self._run = pack(self.weight, self.scale, self.bias, self.backend)
        return self._run

    def forward(self, x: Tensor) -> Tensor:
        """Return the output; see the class."""
        if x.requires_grad and torch.is_grad_enabled():
            out: Tensor = _StraightThrough.apply(x, self)  # type: ignore[no-untyped-call]  # torch leaves it untyped
            return out
        return self.execute(x)

    def extra_repr(self) -> str:
        """Return what the module's line in a printed model says."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, backend={self.backend.name!r}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_run": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        scale, bias = self.scale, self.bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        # Kernels take float32, whatever dtype the model is moved to.
        self.scale = scale.to(self.scale.device)
        self.bias = None if bias is None else bias.to(self.scale.device)
        self._run = None
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        given = state_dict.get(f"{prefix}weight")
        if given is not None and given.dtype != torch.int8:
            rest[-1].append(f"{prefix}weight must be int8, got {given.dtype}")
            return
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._run = None


class _Stored(nn.Module):
    """Mixed into a torch layer: its float weights lie on an int8 grid, and its state dict holds the integers."""

    weight: Tensor
    scale: Tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Stored:
        scale = self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # as above
        self.scale = scale.to(self.scale.device)  # the grid stays, whatever dtype the model is moved to
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        rows = self.weight.detach().to(torch.float32).flatten(1)
        integers = (rows / self.scale.to(torch.float32)[:, None]).round().clamp(-127, 127).to(torch.int8)
        destination[f"{prefix}weight"] = integers.reshape(self.weight.shape)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        given, scale = state_dict.get(f"{prefix}weight"), state_dict.get(f"{prefix}scale")
        if given is not None and scale is not None and given.dtype == torch.int8:
            state_dict[f"{prefix}weight"] = dequantise(given, scale)
        elif given is not None:
            rest[-1].append(f"{prefix}weight must be int8 beside its scale, got {given.dtype}")
            return
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if given is not None:
            state_dict[f"{prefix}weight"] = given


class StoredLinear(_Stored, nn.Linear):
    """A linear layer that is stored int8 and executed fp32."""


class StoredConv1d(_Stored, nn.Conv1d):
    """A convolution that is stored int8 and executed fp32."""


class StoredConv2d(_Stored, nn.Conv2d):
    """A convolution that is stored int8 and executed fp32."""


_STORED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: StoredLinear,
    nn.Conv1d: StoredConv1d,
    nn.Conv2d: StoredConv2d,
}


def is_linear(module: nn.Module) -> bool:
    """Say whether ``module`` is a plain linear layer: ``nn.Linear`` itself (no subclass), or transformers' Conv1D."""
    kind = type(module)
    return kind is nn.Linear or (kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers."))


def is_storable(module: nn.Module) -> bool:
    """Say whether :func:`store` takes ``module``."""
    return type(module) in _STORED or is_linear(module)


def _as_linear(layer: nn.Module) -> nn.Linear:
    """Return transformers' Conv1D, whose weight is (K, N), as the linear layer that it is."""
    weight = layer.get_parameter("weight").detach().t().contiguous()
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight = nn.Parameter(weight)
    linear.bias = nn.Parameter(layer.get_parameter("bias").detach().clone())
    return linear.train(layer.training)


def store(layer: nn.Module) -> nn.Module:
    """Return a copy of ``layer`` with weights rounded to int8, one byte each in its file and fp32 when it runs.

    Nothing gets faster or smaller in memory. The weights no longer train, since they would leave their grid.

    Example:
        >>> stored = store(nn.Linear(4, 2))
        >>> stored.state_dict()["weight"].dtype
        torch.int8

    Raises:
        BadInput: the layer is no plain ``nn.Linear``, ``nn.Conv1d`` or ``nn.Conv2d``.
    """
    if not is_storable(layer):
        raise BadInput(f"only plain Linear, Conv1d and Conv2d layers can be stored int8, got {type(layer).__name__}")
    stored = copy.deepcopy(layer) if type(layer) in _STORED else _as_linear(layer)
    kind = _STORED[type(stored)]
    stored.__class__ = kind
    weight = stored.get_parameter("weight")
    integers, scale = quantise_weight(weight)
    stored.weight = nn.Parameter(dequantise(integers, scale).to(weight.dtype), requires_grad=False)
    stored.register_buffer("scale", scale)
    return stored


# The choice -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """Which backend a shape gets on this machine.

    Args:
        backend: the name of the fastest, ``"float"`` where fp32 is.
        ratios: time over fp32 of every backend that was timed, with its interval.
    """

    backend: str
    ratios: Mapping[str, Ratio] = field(default_factory=dict)


def _timed(names: list[str], rows: int, d_in: int, d_out: int, *, rounds: int, seconds: float) -> dict[str, Ratio]:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(d_in, d_out, device="meta").to_empty(device="cpu")  # draws nothing from the global generator
    with torch.no_grad():
        linear.weight.normal_(0, d_in**-0.5, generator=generator)
        linear.bias.zero_()
    models = [linear, *(Int8Linear.from_linear(linear, backend=name) for name in names)]
    x = torch.randn(rows, d_in, generator=generator)
    times = interleaved(models, x, rounds=rounds, round_seconds=seconds)
    return {name: interval((times[:, i] / times[:, 0]).tolist()) for i, name in enumerate(names, start=1)}


@functools.cache
def _candidates(rows: int, threads: int) -> tuple[str, ...]:
    """Return the backends that are right here and not hopelessly slow, one a kernel."""
    sound: dict[str, str] = {}
    for name, backend in BACKENDS.items():
        if backend.kernel != "float" and backend.kernel not in sound and exact_here(name):
            sound[backend.kernel] = name
    names = list(sound.values())
    if not names:
        return ()
    small = _timed(names, rows, 256, 256, rounds=3, seconds=0.002)
    return tuple(name for name in names if small[name].value < 10)


def choose(rows: int, d_in: int, d_out: int, *, rounds: int = 9) -> Choice:
    """Return the fastest sound backend for ``rows`` tokens through a (d_out, d_in) layer, by timing it here.

    Each shape is timed once in a process, in rounds that alternate with fp32; a backend is taken only where its whole
    interval lies below 1 by more than the margin of the meters.

    Args:
        rows: tokens that one call carries.
        d_in: width of the input.
        d_out: width of the output.
        rounds: timing rounds.
    """
    return _choose(max(rows, 1), d_in, d_out, rounds, torch.get_num_threads())


@functools.cache
def _choose(rows: int, d_in: int, d_out: int, rounds: int, threads: int) -> Choice:
    names = [name for name in _candidates(min(rows, 64), threads) if exact_here(name, min(rows, 256), d_in)]
    if not names:
        return Choice("float")
    ratios = _timed(names, rows, d_in, d_out, rounds=rounds, seconds=0.005)
    faster = {name: ratio for name, ratio in ratios.items() if ratio.high < 1 - MARGIN}
    best = min(faster, key=lambda name: faster[name].value) if faster else "float"
    return Choice(best, ratios)


class Int8(Edit):
    """Linear layers with int8 weights, each with the backend that its numbers come from.

    Args:
        modules: dotted module name -> name in :data:`BACKENDS`; ``"float"`` stores int8 and executes fp32.
    """

    op = "int8"
    modules: dict[str, str]

    def rewrite(self, model: nn.Module) -> nn.Module:
        """Replace the layers, their weights rounded."""
        named = dict(model.named_modules(remove_duplicate=False))
        for name, backend in self.modules.items():
            backend_named(backend)
            old = named.get(name)
            if old is None or not (is_linear(old) if backend != "float" else is_storable(old)):
                raise BadInput(f"int8 finds no layer that it can take at {name!r}{nearest(name, list(named))}")
            new = store(old) if backend == "float" else Int8Linear.from_linear(old, backend=backend)
            if name == "":
                return new
            replace_module(model, name, new)
        for module in model.modules():
            # torch's fused encoder layer reads the weights of its linear layers and would bypass their kernels.
            if isinstance(module, nn.TransformerEncoderLayer) and any(
                isinstance(child, Int8Linear) for child in module.children()
            ):
                module.activation_relu_or_gelu = 0
        return model

    def describe(self) -> dict[str, str]:
        """Say how each layer is held and executed."""
        return {name: BACKENDS[backend].words for name, backend in self.modules.items()}
