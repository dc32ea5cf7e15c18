"""Take out at inference what a norm multiplies and adds, by putting it into the layers that read the norm.

Where every reader of a norm's output is a linear layer, or a convolution that does not pad with zeros, the norm's fixed
part y = a x + c goes into their weights: W' = W diag(a), b' = b + W c. A batch norm in eval mode is nothing else and
becomes an identity; a layer norm or RMS norm keeps its statistics and loses its gain and shift. Who reads what is seen
in a trace; a model that cannot be traced is folded only where norm and reader are neighbours in ``nn.Sequential``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize as native

from torchgraft.bench.task import Inputs
from torchgraft.engines.normalize.placement import leave_fast_path
from torchgraft.engines.surgery.swap import replace_module
from torchgraft.engines.surgery.trace import Traced, trace
from torchgraft.errors import BadInput, Untraceable

__all__ = ["ChannelAffine", "Folds", "channel_affine", "fold_affine", "fold_forward", "following"]

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_TOKEN = (nn.LayerNorm, nn.RMSNorm)
_PASSING = ("dropout", "alias", "clone", "contiguous", "detach")


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
    return None


def _takes(layer: nn.Module, part: _Part, ndim: int | None) -> bool:
    """Say whether ``layer`` can take up ``part`` of an input with ``ndim`` axes."""
    if type(layer) is nn.Linear:
        on_last = part.last or ndim == 2
        return bool(on_last) and layer.in_features == part.scale.numel()
    if type(layer) in _CONVS:
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
        layer: a linear layer, or a convolution that does not pad with zeros.
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
    part = _Part(scale.double(), None if shift is None else shift.double(), type(layer) is nn.Linear or None, None)
    if not _takes(layer, part, None):
        raise BadInput(
            f"a linear layer, or a convolution that does not pad with zeros, of {scale.numel()} input channels is "
            f"needed, got {layer}"
        )
    weight: Tensor = cast(Tensor, layer.weight).double()
    groups = 1 if isinstance(layer, nn.Linear) else cast(int, layer.groups)
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
    layer.weight = nn.Parameter(scaled.to(old.dtype), requires_grad=old.requires_grad)
    return layer


def _single(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that stand at one place, share no tensor, and carry neither hooks nor parametrisations."""
    places: dict[nn.Module, list[str]] = {}
    owners: dict[int, int] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(module, []).append(name)
    for module in places:
        for value in (*module._parameters.values(), *module._buffers.values()):
            owners[id(value)] = owners.get(id(value), 0) + 1
    return {
        names[0]: module
        for module, names in places.items()
        if len(names) == 1
        and names[0]
        and not (module._forward_hooks or module._forward_pre_hooks or native.is_parametrized(module))
        and all(
            value is None or owners[id(value)] == 1
            for value in (*module._parameters.values(), *module._buffers.values())
        )
    }


def _inside(node: fx.Node) -> list[str]:
    """Return the names of the modules that were running when ``node`` was made, as often as they were called."""
    return [str(entry[0]) for entry in (node.meta.get("nn_module_stack") or {}).values()]


def _readers(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yield what reads ``node`` and as what, seen through operations that change no number."""
    for user in node.users:
        name = str(user.target).split(".")[1] if "." in str(user.target) else ""
        idle = name in _PASSING and (name != "dropout" or user.args[2] is False)
        copied = name == "pad" and len(user.args) > 2 and user.args[2] in ("reflect", "replicate", "circular")
        if idle or copied:
            yield from _readers(user)
        else:
            yield user, node


def following(model: nn.Module, example: Inputs) -> dict[str, list[tuple[str, int]]]:
    """Return, for every norm all of whose readers are layers, their names and the axes of what they read.

    Args:
        model: any module.
        example: its inputs.

    Raises:
        Untraceable: the model cannot be traced.
    """
    traced = trace(model, example)
    single = _single(model)
    calls: dict[str, set[str]] = {}
    for node in traced.graph.nodes:
        for name in _inside(node):
            calls.setdefault(name.partition("@")[0], set()).add(name)
    layers = _layers(traced, single)
    found: dict[str, list[tuple[str, int]]] = {}
    for name, module in single.items():
        if _part(module) is None or len(calls.get(name, ())) != 1:
            continue
        within = [node for node in traced.graph.nodes if name in _inside(node)]
        given = [node for node in within if any(name not in _inside(user) for user in node.users)]
        if len(given) != 1 or given[0].meta.get("val") is None:
            continue
        readers = list(_readers(given[0]))
        names = [layers.get(reader) for reader, source in readers if reader.args and reader.args[0] is source]
        if readers and len(names) == len(readers) and all(each is not None for each in names):
            ndim = given[0].meta["val"].ndim
            found[name] = [(cast(str, each), ndim) for each in names]
    return found


def _layers(traced: Traced, single: dict[str, nn.Module]) -> dict[fx.Node, str]:
    """Return the operations that are one call of a linear layer or convolution, with its name."""
    found: dict[fx.Node, str] = {}
    for node in traced.graph.nodes:
        if node.op != "placeholder" or node.name not in traced.tensors or len(node.users) != 1:
            continue
        home, _, leaf = traced.tensors[node.name].rpartition(".")
        (user,) = node.users
        if leaf == "weight" and type(single.get(home)) in (nn.Linear, *_CONVS) and user.args[1] is node:
            found[user] = home
    return found


def _neighbours(model: nn.Module) -> dict[str, list[tuple[str, int]]]:
    """Return norms and the layers behind them in ``nn.Sequential``, where the types alone say that they fit."""

    def ordered(module: nn.Module) -> Iterator[nn.Module]:
        if type(module).forward is nn.Sequential.forward and not (module._forward_hooks or module._forward_pre_hooks):
            for child in module._modules.values():
                if child is not None:
                    yield from ordered(child)
        else:
            yield module

    single = {module: name for name, module in _single(model).items()}
    found: dict[str, list[tuple[str, int]]] = {}
    for norm, layer in itertools.pairwise(ordered(model)):
        if norm in single and layer in single:
            found[single[norm]] = [(single[layer], 0)]  # no number of axes: what depends on it does not fit
    return found


def fold_forward(model: nn.Module, example: Inputs | None = None, *, affine: bool = True) -> nn.Module:
    """Fold what stands before its readers, in place, and return the model; see :func:`torchgraft.fold`.

    Args:
        model: a model in eval mode.
        example: inputs on which it can be traced.
        affine: whether gains and shifts of layer norms and RMS norms are folded too.
    """
    for name, module in list(model.named_modules()):
        if name and isinstance(module, Folds) and name in _single(model):
            replace_module(model, name, module.folded())
    try:
        readers = _neighbours(model) if example is None else following(model, example)
    except Untraceable:
        readers = _neighbours(model)
    for name, layers in readers.items():
        norm = model.get_submodule(name)
        part = _part(norm)
        if part is None or (part.rest is None and not affine):
            continue
        if not all(_takes(model.get_submodule(layer), part, ndim) for layer, ndim in layers):
            continue
        for layer, _ in layers:
            fold_affine(model.get_submodule(layer), part.scale, part.shift)
        if part.rest is not None:
            replace_module(model, name, part.rest)
        else:
            norm.weight = None  # type: ignore[assignment]  # as torch's own norms without an affine part
            if hasattr(norm, "bias"):
                norm.bias = None  # type: ignore[assignment]
            cast(Any, norm).elementwise_affine = False
            leave_fast_path(model.get_submodule(name.rpartition(".")[0]))
    return model
