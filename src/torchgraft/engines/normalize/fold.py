"""Take out at inference what a norm multiplies and adds, by putting it into the layers that read the norm.

Where every reader of a norm's output is a linear layer, or a convolution that does not pad with zeros, the norm's fixed
part y = a x + c goes into their weights: W' = W diag(a), b' = b + W c. A batch norm in eval mode is nothing else and
becomes an identity; a layer norm or RMS norm keeps its statistics and loses its gain and shift. Who reads what is seen
in a trace; a model that cannot be traced is folded only where norm and reader are neighbours in ``nn.Sequential``.

In a model with ``save_pretrained`` gains become ones (zeros in Gemma, whose gain is 1 + weight) and shifts zeros, and
their parameters stay: ``from_pretrained`` builds the model from its configuration, which can neither say that a norm
has no weights nor that a layer has got a bias. Missing weights would be drawn anew and a new bias would be dropped, so
a shift goes only into layers that have a bias. A trace shows one forward pass: what a model gives on demand only, such
as ``output_hidden_states``, shows a folded final norm without its gain.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from torchgraft.bench.task import Inputs
from torchgraft.engines.normalize.fold_readers import CONVS, Reading, places, read_norms, read_sequences
from torchgraft.engines.normalize.hugging_face import gain_of, is_conv1d, own_example, reset_gain, saved_by_name
from torchgraft.engines.normalize.placement import is_norm, leave_fast_path
from torchgraft.engines.surgery.swap import replace_module
from torchgraft.errors import BadInput, Untraceable

__all__ = [
    "ChannelAffine",
    "Folds",
    "NormFold",
    "channel_affine",
    "fold_affine",
    "fold_forward",
    "following",
    "plan_folds",
]

_logger = logging.getLogger("torchgraft")
_BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_TOKEN = (nn.LayerNorm, nn.RMSNorm)


@runtime_checkable
class ChannelAffine(Protocol):
    """A norm that is, in eval mode, one factor and one summand a channel, the channels last."""

    def channel_affine(self) -> tuple[Tensor, Tensor]:
        """Return a and c, (C,) each, of y = a x + c in eval mode."""
        ...


@runtime_checkable
class Folds(Protocol):
    """A module that knows a plainer one with the same outputs."""

    def folded(self) -> nn.Module:
        """Return it; the module itself where there is none."""
        ...


@dataclass(frozen=True)
class NormFold:
    """What folding does with one norm.

    Args:
        name: the norm, a dotted name.
        readers: the layers that take it up; none where it is left alone.
        reason: why it is left alone; empty where it is not.
    """

    name: str
    readers: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        return (
            f"{self.name}: stays, {self.reason}" if self.reason else f"{self.name}: goes into {', '.join(self.readers)}"
        )


@dataclass(frozen=True)
class _Part:
    """What can be taken out of a norm: y = scale * x + shift, over the last axis or the second, and what is left."""

    scale: Tensor
    shift: Tensor | None
    last: bool | None
    rest: nn.Module | None


def channel_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return a and c of a batch norm in eval mode, y = a x + c, in float64.

    Example:
        >>> a, c = channel_affine(nn.BatchNorm1d(1, eps=0.0).eval())
        >>> a.item(), c.item()
        (1.0, 0.0)

    Raises:
        BadInput: it is no such norm.
    """
    if isinstance(norm, ChannelAffine):
        scale, shift = norm.channel_affine()
        return scale.detach().double(), shift.detach().double()
    if type(norm) not in _BATCH or norm.training or norm.running_mean is None:
        raise BadInput(f"a batch norm with running statistics in eval mode is needed, got {type(norm).__name__}")
    mean, variance = cast(Tensor, norm.running_mean).double(), cast(Tensor, norm.running_var).double()
    gain = 1.0 if norm.weight is None else cast(Tensor, norm.weight).detach().double()
    shift = 0.0 if norm.bias is None else cast(Tensor, norm.bias).detach().double()
    scale = gain / torch.sqrt(variance + cast(float, norm.eps))
    return scale, shift - mean * scale


def _part(norm: nn.Module) -> _Part | None:
    """Return what can be taken out of ``norm``, or ``None``."""
    if isinstance(norm, ChannelAffine) and not norm.training:
        return _Part(*channel_affine(norm), last=True, rest=nn.Identity())
    if type(norm) in _BATCH and not norm.training and norm.running_mean is not None:
        return _Part(*channel_affine(norm), last=None, rest=nn.Identity())
    if type(norm) in _TOKEN and norm.weight is not None and len(cast("tuple[int, ...]", norm.normalized_shape)) == 1:
        bias = getattr(norm, "bias", None)
        shift = None if bias is None else bias.detach().double()
        return _Part(cast(Tensor, norm.weight).detach().double(), shift, last=True, rest=None)
    gain = None if type(norm) in (*_TOKEN, *_BATCH) else gain_of(norm)
    return None if gain is None else _Part(*gain, last=True, rest=None)


def _takes(layer: nn.Module, part: _Part, ndim: int | None) -> bool:
    """Say whether ``layer`` can take up ``part`` of an input with ``ndim`` axes."""
    if type(layer) is nn.Linear:
        on_last = part.last or ndim == 2
        return bool(on_last) and layer.in_features == part.scale.numel()
    if is_conv1d(layer):
        return bool(part.last or ndim == 2) and cast(Tensor, layer.weight).shape[0] == part.scale.numel()
    if type(layer) in CONVS:
        conv = cast(nn.Conv2d, layer)
        bare = conv.padding_mode != "zeros" or conv.padding == "valid"
        bare = bare or (not isinstance(conv.padding, str) and not any(conv.padding))
        bare = bare or (all(size == 1 for size in conv.kernel_size) and conv.padding == "same")
        # a batch norm of (N, C) has its channels where an unbatched convolution has positions
        batched = ndim is None or ndim == conv.weight.ndim or (ndim == 0 and conv.weight.ndim > 3)
        return part.last is None and bare and batched and conv.in_channels == part.scale.numel()
    return False


@torch.no_grad()
def fold_affine(layer: nn.Module, scale: Tensor, shift: Tensor | None) -> nn.Module:
    """Let ``layer`` do what it did after ``scale * x + shift`` a channel, in place, and return it.

    Args:
        layer: a linear layer, transformers' ``Conv1D``, or a convolution that does not pad with zeros.
        scale: a factor an input channel, (C,).
        shift: a summand an input channel, or ``None``.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> x, a, c = torch.randn(5, 2), torch.tensor([2.0, 3.0]), torch.tensor([1.0, -1.0])
        >>> expected = layer(a * x + c)
        >>> torch.allclose(fold_affine(layer, a, c)(x), expected, atol=1e-6)
        True

    Raises:
        BadInput: the layer is another, or has other input channels.
    """
    linear = type(layer) is nn.Linear or is_conv1d(layer)
    part = _Part(scale.double(), None if shift is None else shift.double(), linear or None, None)
    if not _takes(layer, part, None):
        raise BadInput(
            f"a linear layer, or a convolution that does not pad with zeros, of {scale.numel()} input channels is "
            f"needed, got {layer}"
        )
    turned = is_conv1d(layer)  # its weight is (C_in, C_out)
    weight: Tensor = cast(Tensor, layer.weight).double()
    weight = weight.T if turned else weight
    groups = 1 if linear else cast(int, layer.groups)
    blocks = weight.reshape(groups, -1, *weight.shape[1:])  # (G, C_out / G, C_in / G, ...)
    tail = [1] * (weight.ndim - 2)
    old = cast(nn.Parameter, layer.weight)
    if part.shift is not None and bool(part.shift.any()):
        added = (blocks * part.shift.reshape(groups, 1, -1, *tail)).reshape(len(weight), -1).sum(1)
        bias = cast("Tensor | None", layer.bias)
        total = added if bias is None else bias.double() + added
        trains = old.requires_grad if bias is None else bias.requires_grad
        layer.bias = nn.Parameter(total.to(old.dtype), requires_grad=trains)
    scaled = (blocks * part.scale.reshape(groups, 1, -1, *tail)).reshape(weight.shape)
    scaled = scaled.T.contiguous() if turned else scaled
    layer.weight = nn.Parameter(scaled.to(old.dtype), requires_grad=old.requires_grad)
    return layer


def following(model: nn.Module, example: Inputs) -> dict[str, list[tuple[str, int]]]:
    """Return, for every norm all of whose readers are layers, their names and the axes of what they read.

    Args:
        model: any module.
        example: its inputs.

    Raises:
        Untraceable: the model cannot be traced.
    """
    parts = {name: part for name, module in places(model)[0].items() if (part := _part(module)) is not None}
    found = read_norms(model, example, {name: bool(part.last) for name, part in parts.items()})
    return {name: list(reading.readers) for name, reading in found.items() if not reading.reason}


def plan_folds(model: nn.Module, example: Inputs | None = None, *, affine: bool = True) -> list[NormFold]:
    """Return for every norm of ``model`` into which layers it can be folded, or why it is left alone.

    Args:
        model: a model in eval mode; left as it is.
        example: inputs on which it can be traced; by default those that a Hugging Face model's configuration describes.
        affine: whether gains and shifts of layer norms and RMS norms are folded too.

    Example:
        >>> model = nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2), nn.LayerNorm(2)).eval()
        >>> for each in plan_folds(model, torch.zeros(1, 2)):
        ...     print(each)
        0: goes into 1
        2: stays, the model gives its output
    """
    example = own_example(model) if example is None else example
    norms = {
        name: module
        for name, module in model.named_modules()
        if name and (is_norm(module) or isinstance(module, nn.modules.batchnorm._BatchNorm | ChannelAffine))
    }
    parts = {name: part for name, module in norms.items() if (part := _part(module)) is not None}
    traced, why = None, "without an example only neighbours in nn.Sequential are known to be readers"
    if example is not None:
        try:
            traced = read_norms(model, example, {name: bool(part.last) for name, part in parts.items()})
        except Untraceable as error:
            why = str(error)
    readings = read_sequences(model) if traced is None else traced

    def plan(name: str, module: nn.Module) -> NormFold:
        part = parts.get(name)
        if part is None:
            return NormFold(name, (), f"nothing of a {type(module).__name__} can be taken out")
        if part.rest is None and not affine:
            return NormFold(name, (), "gains and shifts were not asked for")
        reading = readings.get(name, Reading(reason=why))
        if reading.reason:
            return NormFold(name, (), reading.reason)
        saved = part.rest is None and saved_by_name(model, name)
        for reader, ndim in reading.readers:
            layer = model.get_submodule(reader)
            if not _takes(layer, part, ndim):
                return NormFold(name, (), f"its reader {reader}, a {type(layer).__name__}, cannot take it up exactly")
            if saved and getattr(layer, "bias", None) is None and part.shift is not None and bool(part.shift.any()):
                return NormFold(name, (), f"its reader {reader} has no bias, and from_pretrained would not make one")
        return NormFold(name, tuple(reader for reader, _ in reading.readers), "")

    return [plan(name, module) for name, module in norms.items()]


def fold_forward(model: nn.Module, example: Inputs | None = None, *, affine: bool = True) -> nn.Module:
    """Fold what stands before its readers, in place, and return the model; see :func:`torchgraft.fold`.

    Args:
        model: a model in eval mode.
        example: inputs on which it can be traced.
        affine: whether gains and shifts of layer norms and RMS norms are folded too.
    """
    for name, module in list(model.named_modules()):
        if name and isinstance(module, Folds) and name in places(model)[0]:
            replace_module(model, name, module.folded())
    for fold in plan_folds(model, example, affine=affine):
        _logger.info("%s", fold)
        norm = model.get_submodule(fold.name)
        part = _part(norm) if fold.readers else None
        if part is None:
            continue
        for layer in fold.readers:
            fold_affine(model.get_submodule(layer), part.scale, part.shift)
        if part.rest is not None:
            replace_module(model, fold.name, part.rest)
            continue
        if type(norm) in _TOKEN and not saved_by_name(model, fold.name):
            norm.weight = None  # type: ignore[assignment]  # as torch's own norms without an affine part
            if hasattr(norm, "bias"):
                norm.bias = None  # type: ignore[assignment]
            cast(Any, norm).elementwise_affine = False
        else:
            reset_gain(norm)
        leave_fast_path(model.get_submodule(fold.name.rpartition(".")[0]))
    return model
