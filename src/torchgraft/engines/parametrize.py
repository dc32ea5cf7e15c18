"""Weights as functions of parameters, and folding: weights made of parts, or beside a norm, become plain again.

A :class:`Spec` says which parts a weight is made of and how; :func:`parametrize` puts it on a layer by
``torch.nn.utils.parametrize``. :func:`fold` takes it off again, and multiplies batch norms in eval mode into the
convolution or linear layer before them, or behind them (:mod:`torchgraft.engines.normalize.fold`). Folded and unfolded
models compute the same function.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize as native

from torchgraft.bench.task import Inputs
from torchgraft.engines.surgery.edits import Edit
from torchgraft.errors import BadInput, Untraceable, nearest

__all__ = ["FoldNorms", "LowRankProduct", "Masked", "Spec", "fold", "norm_pairs", "parametrize", "spec_of"]

_Module = TypeVar("_Module", bound=nn.Module)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Spec(ABC):
    """How one tensor of a layer is made of parameters: weight = f(parts; constants).

    A subclass is a frozen dataclass that implements :meth:`start` and :meth:`weight`, and :meth:`constants` where it
    needs tensors that are kept but not trained.

    Args:
        tensor: the parameter of the layer that is made.
    """

    tensor: str = field(default="weight", kw_only=True)

    @abstractmethod
    def start(self, dense: Tensor) -> tuple[Tensor, ...]:
        """Return the trainable parts with which the layer starts, from its dense tensor."""

    @abstractmethod
    def weight(self, parts: tuple[Tensor, ...], constants: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
        """Return the tensor of ``shape`` that the parts and constants stand for."""

    def constants(self, dense: Tensor) -> dict[str, Tensor]:
        """Return the tensors that are kept with the layer, and saved, but not trained."""
        return {}


@dataclass(frozen=True)
class LowRankProduct(Spec):
    """weight = U V^T, the tensor seen as a matrix (first dimension) x (all others); starts at the nearest of its rank.

    Args:
        rank: number of columns of U and V.

    Example:
        >>> layer = parametrize(nn.Linear(6, 4), LowRankProduct(2))
        >>> [tuple(p.shape) for p in layer.parametrizations.weight.parameters()]
        [(4, 2), (6, 2)]
        >>> int(torch.linalg.matrix_rank(layer.weight))
        2
    """

    rank: int = 1

    def start(self, dense: Tensor) -> tuple[Tensor, ...]:
        """Return U S^(1/2) (M, R) and V S^(1/2) (N, R) of the singular value decomposition."""
        matrix = dense.detach().flatten(1).double()
        if not 1 <= self.rank <= min(matrix.shape):
            raise BadInput(f"rank must lie in [1, {min(matrix.shape)}], got {self.rank}")
        U, S, Vt = torch.linalg.svd(matrix, full_matrices=False)
        root = S[: self.rank].sqrt()
        return (U[:, : self.rank] * root).to(dense.dtype), (Vt[: self.rank].T * root).to(dense.dtype)

    def weight(self, parts: tuple[Tensor, ...], constants: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
        """Return U V^T in the shape of the tensor."""
        U, V = parts
        return (U @ V.T).reshape(shape)


@dataclass(frozen=True, eq=False)
class Masked(Spec):
    """weight = dense * mask; the dense tensor is trained, the mask is kept.

    Args:
        mask: the mask, in the shape of the tensor; nonzero entries are kept.

    Example:
        >>> layer = parametrize(nn.Linear(2, 1), Masked(torch.tensor([[True, False]])))
        >>> layer.weight[0, 1].item()
        0.0
    """

    mask: Tensor = field(default_factory=lambda: torch.ones(()))

    def start(self, dense: Tensor) -> tuple[Tensor, ...]:
        """Return the dense tensor."""
        if self.mask.shape != dense.shape:
            raise BadInput(f"mask must have the shape {tuple(dense.shape)}, got {tuple(self.mask.shape)}")
        return (dense.detach(),)

    def constants(self, dense: Tensor) -> dict[str, Tensor]:
        """Return the mask, as booleans where the tensor lives."""
        return {"mask": (self.mask != 0).to(dense.device)}

    def weight(self, parts: tuple[Tensor, ...], constants: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
        """Return the masked tensor; entries under the mask are exactly zero, whatever the dense tensor holds there."""
        return torch.where(constants["mask"], parts[0], 0.0)


class _Made(nn.Module):
    """The bridge from a :class:`Spec` to ``torch.nn.utils.parametrize``."""

    def __init__(self, spec: Spec, dense: Tensor) -> None:
        super().__init__()
        self.spec = spec
        self.shape = dense.shape
        self.names: tuple[str, ...] = ()
        for name, value in spec.constants(dense).items():
            self.register_buffer(name, value)
            self.names += (name,)

    def forward(self, *parts: Tensor) -> Tensor:
        return self.spec.weight(parts, {name: self.get_buffer(name) for name in self.names}, self.shape)

    def right_inverse(self, dense: Tensor) -> Tensor | tuple[Tensor, ...]:
        parts = self.spec.start(dense)
        return parts[0] if len(parts) == 1 else parts

    def extra_repr(self) -> str:
        return type(self.spec).__name__


def parametrize(layer: _Module, spec: Spec) -> _Module:
    """Make a tensor of ``layer`` by ``spec``, in place, and return the layer.

    A second spec on the same tensor acts on what the first one makes; it may not have parts of its own.

    Args:
        layer: any module that holds the tensor as a parameter.
        spec: what the tensor is made of.

    Raises:
        BadInput: the layer has no such parameter, or a second spec has parts of its own.

    Example:
        >>> layer = parametrize(nn.Linear(3, 3), LowRankProduct(3))
        >>> fold(layer).weight.shape
        torch.Size([3, 3])
    """
    name = spec.tensor
    stacked = native.is_parametrized(layer, name)
    known = [key for key, _ in layer.named_parameters(recurse=False)]
    if not stacked and name not in known:
        raise BadInput(f"{type(layer).__name__} has no parameter {name!r}{nearest(name, known)}")
    dense = getattr(layer, name)
    if stacked and len(spec.start(dense)) != 1:
        raise BadInput(f"{type(spec).__name__} has parts of its own and must come first on {name!r}")
    trains = any(part.requires_grad for part in _stack(layer, name).parameters()) if stacked else dense.requires_grad
    native.register_parametrization(layer, name, _Made(spec, dense))
    for part in _stack(layer, name).parameters():
        part.requires_grad_(trains)
    return layer


def _stack(layer: nn.Module, name: str) -> nn.Module:
    return cast(nn.ModuleDict, layer.parametrizations)[name]


def spec_of(layer: nn.Module, tensor: str = "weight") -> tuple[Spec, ...]:
    """Return the specs that make ``tensor`` of ``layer``, first applied first; none where it is plain."""
    if not native.is_parametrized(layer, tensor):
        return ()
    made = cast(Iterable[nn.Module], _stack(layer, tensor))
    return tuple(one.spec for one in made if isinstance(one, _Made))


def fold(layer_or_model: _Module, example: Inputs | None = None, *, affine: bool = True) -> _Module:
    """Make every tensor that torchgraft parametrised plain, and multiply norms into the layers before or behind them.

    It works in place, takes off what it folds (a folded norm becomes ``nn.Identity``), and leaves the function that the
    model computes in eval mode as it was. Parametrisations of other origin stay. Norms are folded only in a model that
    is in eval mode, and only where that is exact: a batch norm into the convolution or linear layer before it where
    :func:`norm_pairs` finds it safe, else into the linear layers and unpadded convolutions behind it where they are its
    only readers. A layer norm or RMS norm whose readers are all linear layers stays, without gain and shift; in a model
    with ``save_pretrained`` its gain becomes one and its shift zero, so that ``from_pretrained`` still fits. What
    happens to every norm, and why, is told by :func:`torchgraft.engines.normalize.fold.plan_folds` beforehand, and to
    the logger ``torchgraft``, at level INFO, as it is done.

    Args:
        layer_or_model: the module.
        example: inputs on which the model can be traced, to find the norms that are not in an ``nn.Sequential``; a
            Hugging Face model of token ids or pixels needs none.
        affine: whether gains and shifts of layer norms and RMS norms are folded.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2)).eval()
        >>> fold(model)
        Sequential(
          (0): Conv2d(1, 2, kernel_size=(3, 3), stride=(1, 1))
          (1): Identity()
        )
    """
    for module in layer_or_model.modules():
        if not native.is_parametrized(module):
            continue
        made = cast(Mapping[str, Iterable[nn.Module]], module.parametrizations)
        for name in [name for name, stack in made.items() if all(isinstance(one, _Made) for one in stack)]:
            _make_plain(module, name)
    if not layer_or_model.training:
        for before, norm in norm_pairs(layer_or_model, example):
            _fold_norm(layer_or_model, before, norm)
        from torchgraft.engines.normalize.fold import fold_forward  # norms may be made of specs, so not at import

        fold_forward(layer_or_model, example, affine=affine)
    return layer_or_model


def _make_plain(module: nn.Module, name: str) -> None:
    trains = any(part.requires_grad for part in _stack(module, name).parameters())
    value = getattr(module, name).detach().clone()
    # torch deletes the property from the class that it generated, which a copy of the module shares: take a class of
    # our own first, so that the other one keeps its parametrisation.
    kind = type(module)
    own = {key: entry for key, entry in vars(kind).items() if key not in ("__dict__", "__weakref__")}
    module.__class__ = type(kind.__name__, kind.__bases__, own)
    native.remove_parametrizations(module, name, leave_parametrized=True)
    setattr(module, name, nn.Parameter(value, requires_grad=trains))


def norm_pairs(model: nn.Module, example: Inputs | None = None) -> list[tuple[str, str]]:
    """Return the (layer, batch norm) pairs of ``model`` that can be folded exactly, by name.

    The norm must use running statistics, and must be the only reader of the layer's output. With ``example`` that is
    read off the graph that ``torch.export`` records. Without it, or where the model cannot be exported, only neighbours
    in an ``nn.Sequential`` count, where that is the model itself or stands in it through ``nn.Sequential`` alone, since
    elsewhere a forward may use an output twice; and only convolutions, since a linear layer's output may have a token
    axis, which the norm would take for its channels. Modules that stand at several places, share weights or carry hooks
    are left alone.

    Args:
        model: a model in eval mode.
        example: inputs of the model.
    """
    candidates = _Candidates(model)
    if not any(isinstance(module, _NORMS) for module in candidates.names):
        return []
    traced = None if example is None else _read_off_graph(model, example, candidates)
    if traced is not None:
        return traced
    flat = list(_in_order(model))
    return [
        (candidates.names[before], candidates.names[norm])
        for before, norm in itertools.pairwise(flat)
        if isinstance(before, _CONVS) and candidates.fit(before, norm)
    ]


def _in_order(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that run one after the other, each fed by the one before, as far as the types tell."""
    if type(module).forward is nn.Sequential.forward and not (module._forward_hooks or module._forward_pre_hooks):
        for child in module._modules.values():  # children() would leave out what stands twice
            if child is not None:
                yield from _in_order(child)
    else:
        yield module


class _Candidates:
    """Which modules of a model stand at one place only and may be folded, and their names."""

    def __init__(self, model: nn.Module) -> None:
        places: dict[nn.Module, list[str]] = {}
        owners: dict[int, int] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            places.setdefault(module, []).append(name)
        for module in places:
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                owners[id(tensor)] = owners.get(id(tensor), 0) + 1
        self.names = {
            module: names[0]
            for module, names in places.items()
            if len(names) == 1
            and names[0]
            and not (module._forward_hooks or module._forward_pre_hooks or native.is_parametrized(module))
            and all(owners[id(t)] == 1 for t in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
        }

    def fit(self, before: nn.Module, norm: nn.Module) -> bool:
        if before not in self.names or norm not in self.names or type(norm) not in _NORMS:
            return False
        if type(before) not in (*_CONVS, nn.Linear):
            return False
        batch_norm = cast(nn.BatchNorm1d, norm)
        out = before.out_features if isinstance(before, nn.Linear) else before.out_channels
        return batch_norm.running_mean is not None and not batch_norm.training and batch_norm.num_features == out


def _read_off_graph(model: nn.Module, example: Inputs, candidates: _Candidates) -> list[tuple[str, str]] | None:
    from torchgraft.engines.surgery.trace import trace  # surgery knows parametrised layers, so not at import

    try:
        traced = trace(model, example)
    except Untraceable:
        return None  # the caller then looks at nn.Sequential alone
    owner: dict[str, nn.Module] = {}
    for module in candidates.names:
        for key in (*module._parameters, *module._buffers):
            owner[f"{candidates.names[module]}.{key}"] = module
    readers: dict[nn.Module, set[Any]] = {}
    for node in traced.graph.nodes:
        home = owner.get(traced.tensors.get(node.name, "")) if node.op == "placeholder" else None
        if home is not None:
            readers.setdefault(home, set()).update(node.users)
    pairs: list[tuple[str, str]] = []
    for norm, nodes in readers.items():
        if not isinstance(norm, _NORMS) or len(nodes) != 1:
            continue
        (node,) = nodes
        if "batch_norm" not in str(node.target):
            continue
        source = node.args[0]
        if len(source.users) != 1:
            continue
        before = next((m for m, used in readers.items() if used == {source} and not isinstance(m, _NORMS)), None)
        if before is None or not candidates.fit(before, norm):
            continue
        value = source.meta.get("val")
        if isinstance(before, nn.Linear) and (value is None or value.ndim != 2):
            continue
        pairs.append((candidates.names[before], candidates.names[norm]))
    return pairs


def _fold_norm(model: nn.Module, before_name: str, norm_name: str) -> None:
    before = model.get_submodule(before_name)
    norm = model.get_submodule(norm_name)
    if not isinstance(before, (*_CONVS, nn.Linear)) or not isinstance(norm, _NORMS) or norm.running_mean is None:
        kinds = f"{type(before).__name__} and {type(norm).__name__}"
        raise BadInput(
            f"fold-norms: {before_name!r} and {norm_name!r} are {kinds}, no layer with a batch norm after it"
        )
    mean, variance = norm.running_mean.double(), cast(Tensor, norm.running_var).double()
    gain = torch.ones_like(mean) if norm.weight is None else norm.weight.detach().double()
    shift = torch.zeros_like(mean) if norm.bias is None else norm.bias.detach().double()
    scale = gain / torch.sqrt(variance + norm.eps)  # (C,)
    weight = before.weight.detach()
    if scale.shape[0] != (before.out_features if isinstance(before, nn.Linear) else before.out_channels):
        raise BadInput(f"fold-norms: {norm_name!r} has {len(scale)} channels, which {before_name!r} does not put out")
    if isinstance(before, _TRANSPOSED):
        groups = before.groups  # weight (C_in, C_out / groups, ...): the channels of group g are rows g of the output
        blocks = weight.double().reshape(groups, -1, *weight.shape[1:])  # (G, C_in / G, C_out / G, ...)
        by_group = scale.reshape(groups, 1, -1, *[1] * (weight.ndim - 2))
        scaled = (blocks * by_group).flatten(0, 1)
    else:
        scaled = weight.double() * scale.reshape(-1, *[1] * (weight.ndim - 1))
    bias = torch.zeros_like(mean) if before.bias is None else before.bias.detach().double()
    trains = before.weight.requires_grad
    before.weight = nn.Parameter(scaled.to(weight.dtype), requires_grad=trains)
    before.bias = nn.Parameter(((bias - mean) * scale + shift).to(weight.dtype), requires_grad=trains)
    parent, _, child = norm_name.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Identity().train(norm.training))


class FoldNorms(Edit):
    """Multiply batch norms into the layers before them.

    Args:
        pairs: (layer, batch norm) by name, as :func:`norm_pairs` finds them.
    """

    op: ClassVar[str] = "fold-norms"
    pairs: tuple[tuple[str, str], ...]

    def rewrite(self, model: nn.Module) -> nn.Module:
        """Fold every pair of ``model``, in place."""
        names = [name for name, _ in model.named_modules()]
        for pair in self.pairs:
            for name in pair:
                if name not in names:
                    raise BadInput(f"fold-norms: the model has no module {name!r}{nearest(name, names[1:])}")
            _fold_norm(model, *pair)
        return model

    def describe(self) -> dict[str, str]:
        """Return the norm that each layer took up, in words."""
        return {before: f"took up the batch norm {norm}" for before, norm in self.pairs}
