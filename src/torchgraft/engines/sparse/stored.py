"""Recurrent layers that hold matrices as their kept values and a pattern, and run as torch's own layers do.

The parameter is the vector of kept values, so that what was pruned stays away whatever the optimiser does. The dense
matrix is filled in when the layer runs: anew where gradients are asked for, else once, and kept until the values
change. So the file is small and nothing gets faster. The pattern is written as gaps between the kept places, a byte
each, or as a bit for each place, whichever is shorter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import _get_current_dispatch_mode

from torchgraft.engines.assembled import Assembled
from torchgraft.engines.bucketed import pack, unpack
from torchgraft.engines.native import traced
from torchgraft.engines.sites import ignored
from torchgraft.engines.sparse.pattern import best_blocks, decode, encode
from torchgraft.engines.surgery.edits import Edit
from torchgraft.errors import BadInput, nearest

__all__ = [
    "HoldSparse",
    "SparseGRU",
    "SparseLSTM",
    "SparseRNN",
    "SparseRecurrent",
    "matrix_obstacles",
    "pattern_bytes",
    "read_places",
    "recurrent_matrices",
    "write_places",
]

#: A gap of this size or more is written as several bytes.
_STEP = 255


# Places as bytes.


def pattern_bytes(kept: int, total: int) -> int:
    """Return how many bytes the pattern of ``kept`` of ``total`` places takes.

    Example:
        >>> pattern_bytes(10, 1000), pattern_bytes(500, 1000)
        (13, 125)
    """
    return min(kept + total // _STEP, -(-total // 8))


def write_places(places: Tensor, total: int) -> Tensor:
    """Return rising places in [0, total) as bytes: gaps or bits, whichever is shorter for so many.

    Shapes:
        places: (N,) int64; result: (``pattern_bytes(N, total)``,) uint8.

    Example:
        >>> write_places(torch.tensor([0, 3, 9]), 16), write_places(torch.tensor([1]), 16)
        (tensor([9, 2], dtype=torch.uint8), tensor([2], dtype=torch.uint8))
    """
    if _by_gaps(len(places), total):
        return encode(places, total)
    mask = torch.zeros(total, dtype=torch.int64, device=places.device)
    mask[places] = 1
    return pack(mask, 1)


def read_places(data: Tensor, kept: int, total: int) -> Tensor | None:
    """Return the places that :func:`write_places` wrote, or ``None`` where ``data`` is no pattern of ``kept``.

    Example:
        >>> read_places(torch.tensor([9, 2], dtype=torch.uint8), 3, 16)
        tensor([0, 3, 9])
    """
    if data.dtype != torch.uint8 or data.shape != (pattern_bytes(kept, total),):
        return None
    places = decode(data) if _by_gaps(kept, total) else unpack(data, 1, total).nonzero().flatten()
    sound = len(places) == kept and (not kept or int(places[-1]) < total) and bool((torch.diff(places) > 0).all())
    return places if sound else None


def _by_gaps(kept: int, total: int) -> bool:
    return kept + total // _STEP < -(-total // 8)


# The layers.


class _Held:
    """How one matrix is held, and the dense matrix that was last made of it."""

    def __init__(self, shape: torch.Size, kept: int) -> None:
        self.shape, self.kept = shape, kept
        self.whole = Assembled()

    def filled(self, values: Tensor, places: Tensor) -> Tensor:
        """Return the dense matrix; gradients reach ``values``."""
        whole = values.new_zeros(self.shape)
        whole.view(-1).scatter_(0, places.to(torch.int64), values)
        return whole


class SparseRecurrent(nn.RNNBase):
    """What the three kinds share: matrices that are filled in when they are read.

    A layer becomes one by :class:`HoldSparse`. It stays an ``nn.RNN``, ``nn.LSTM`` or ``nn.GRU`` and is called as
    before; of a matrix ``weight_hh_l0`` it holds the parameter ``weight_hh_l0_values`` and the buffer
    ``weight_hh_l0_pattern``, and ``weight_hh_l0`` itself can be read.
    """

    _held: dict[str, _Held]

    def hold(self, kept: Mapping[str, int]) -> None:
        """Hold matrices by as many of their largest values, the earlier of equal ones, in place.

        Args:
            kept: the parameter's name in this layer -> how many.
        """
        for name, count in kept.items():
            weight = cast(nn.Parameter, self._parameters[name])
            places = best_blocks(weight, count, (1, 1))
            del self._parameters[name]
            self.__dict__["_held"] = {**self.__dict__.get("_held", {}), name: _Held(weight.shape, count)}
            values = nn.Parameter(weight.detach().flatten()[places], requires_grad=weight.requires_grad)
            self.register_parameter(f"{name}_values", values)
            self.register_buffer(f"{name}_pattern", write_places(places, weight.numel()))
            self.register_buffer(f"{name}_places", places.to(torch.int32), persistent=False)
        self._init_flat_weights()

    @property
    def sparsity(self) -> float:
        """The share of the held matrices' weights that is not kept."""
        total = sum(held.shape.numel() for held in self._held.values())
        return 1.0 - sum(held.kept for held in self._held.values()) / total

    def __getattr__(self, name: str) -> Any:
        held = self.__dict__.get("_held", {})
        return self._filled(name, self._anew()) if name in held else super().__getattr__(name)

    def _anew(self) -> bool:
        """Say whether a tracer or a meter must see that matrices are made, or weights may change unnoticed."""
        return self.training or torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None

    def _filled(self, name: str, anew: bool) -> Tensor:
        """Return a held matrix, dense; what was made before where it is not wanted ``anew`` and no gradient is."""
        held = self._held[name]
        values, places = self._parameters[f"{name}_values"], self._buffers[f"{name}_places"]
        if values is None or places is None:
            raise AttributeError(f"{type(self).__name__} lost the values of {name!r}")
        wants = values.requires_grad
        if anew or (wants and torch.is_grad_enabled()):
            whole = held.filled(values, places)
        else:
            whole = held.whole.value((values, places), lambda: held.filled(values, places))
        # torch multiplies by another kernel where a matrix could get a gradient, even while none is asked for; a traced
        # program takes it as a constant, which may not.
        flag = wants and not traced()
        return whole.requires_grad_(flag) if whole.requires_grad != flag and whole.is_leaf else whole

    # torch's layers keep a list of their weights and compare it with what they hold; here it is made at each call.

    def _update_flat_weights(self) -> None:
        if "_held" not in self.__dict__:
            super()._update_flat_weights()
            return
        held, plain, anew = self._held, self._parameters, self._anew()
        self._flat_weights[:] = [
            self._filled(name, anew) if name in held else plain[name] if name in plain else getattr(self, name)
            for name in self._flat_weights_names
        ]

    def _init_flat_weights(self) -> None:
        if "_held" not in self.__dict__:
            super()._init_flat_weights()
            return
        self._flat_weights = [None] * len(self._flat_weights_names)
        self._flat_weight_refs = []
        self._forget()

    def flatten_parameters(self) -> None:
        """Do nothing: the weights have no place of their own that could be arranged for cuDNN."""

    def _forget(self) -> None:
        for held in self.__dict__.get("_held", {}).values():
            held.whole = Assembled()

    def train(self, mode: bool = True) -> SparseRecurrent:
        """Set the mode; what was filled in in the other one is forgotten."""
        if mode != self.training:
            self._forget()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        # What was filled in may be part of a graph, which cannot be copied.
        state = {key: value for key, value in self.__dict__.items() if key != "_flat_weight_refs"}
        return {**state, "_flat_weights": [None] * len(self._flat_weights_names)}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        found: dict[str, Tensor] = {}
        for name, held in self.__dict__.get("_held", {}).items():
            given = state_dict.get(f"{prefix}{name}_pattern")
            if given is None:
                continue
            places = read_places(given, held.kept, held.shape.numel()) if isinstance(given, Tensor) else None
            if places is None:
                rest[-1].append(f"{prefix}{name}_pattern is no pattern of {held.kept} of {held.shape.numel()} places")
                return
            found[name] = places
        super()._load_from_state_dict(state_dict, prefix, *rest)
        for name, places in found.items():
            here = self.get_buffer(f"{name}_places").device
            self.register_buffer(f"{name}_places", places.to(here, torch.int32), persistent=False)
        self._forget()

    def extra_repr(self) -> str:
        """Return what the module's line in a printed model says."""
        words = super().extra_repr()
        return f"{words}, sparsity={self.sparsity:.3f}" if "_held" in self.__dict__ else words


class SparseRNN(SparseRecurrent, nn.RNN):
    """An ``nn.RNN`` that holds matrices sparse."""


class SparseLSTM(SparseRecurrent, nn.LSTM):
    """An ``nn.LSTM`` that holds matrices sparse."""


class SparseGRU(SparseRecurrent, nn.GRU):
    """An ``nn.GRU`` that holds matrices sparse."""


_KINDS: dict[type[nn.Module], type[SparseRecurrent]] = {nn.RNN: SparseRNN, nn.LSTM: SparseLSTM, nn.GRU: SparseGRU}


# Where this can be done, and doing it.


def _matrices(layer: nn.RNNBase) -> list[str]:
    return [name for name in layer._flat_weights_names if name.startswith(("weight_ih", "weight_hh"))]


def _places_in(model: nn.Module) -> dict[str, tuple[list[str], nn.RNNBase, str, str | None]]:
    """Return each input and state matrix by its first name: all its names, layer, leaf, and what stands in the way."""
    modules: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        modules.setdefault(module, []).append(name)
    owners = Counter(id(value) for module in modules for value in module._parameters.values() if value is not None)
    found: dict[str, tuple[list[str], nn.RNNBase, str, str | None]] = {}
    for module, places in modules.items():
        if not isinstance(module, nn.RNNBase):
            continue
        for leaf in _matrices(module):
            names = [f"{place}.{leaf}" if place else leaf for place in places]
            found[names[0]] = (names, module, leaf, _obstacle(module, leaf, owners))
    return found


def _obstacle(layer: nn.RNNBase, leaf: str, owners: Mapping[int, int]) -> str | None:
    """Return why the matrix ``leaf`` of ``layer`` cannot be held sparse, or nothing."""
    if leaf in layer.__dict__.get("_held", {}):
        return "it is held sparse already"
    if is_parametrized(layer):
        return "its layer is parametrised: other parameters make its weights; fold them first"
    if type(layer) not in _KINDS and not isinstance(layer, SparseRecurrent):
        return f"{type(layer).__name__} is a class of its own, which may read its weights in a way of its own"
    weight = layer._parameters.get(leaf)
    if weight is None:
        return "it is made of other parameters whenever the layer runs"
    if owners[id(weight)] > 1:
        return "it is shared with another module or parameter, which would no longer follow it"
    if not weight.is_floating_point():
        return f"it holds {weight.dtype}, not floats"
    return None


def recurrent_matrices(model: nn.Module, *, ignore: Sequence[str] = ()) -> dict[str, nn.Parameter]:
    """Return the input-to-hidden and hidden-to-hidden matrices that can be held sparse, by parameter name.

    Args:
        model: any module.
        ignore: globs of modules or parameters that stay as they are.

    Example:
        >>> list(recurrent_matrices(nn.GRU(2, 3)))
        ['weight_ih_l0', 'weight_hh_l0']
    """
    return {
        name: cast(nn.Parameter, layer._parameters[leaf])
        for name, (names, layer, leaf, obstacle) in _places_in(model).items()
        if obstacle is None and not any(ignored(each, ignore) for each in names)
    }


def matrix_obstacles(model: nn.Module, *, ignore: Sequence[str] = ()) -> dict[str, str]:
    """Return why recurrent matrices cannot be held sparse, by parameter name.

    Args:
        model: any module.
        ignore: globs of modules or parameters of which nothing is said.

    Example:
        >>> tied = nn.ModuleList([nn.GRU(3, 3), nn.GRU(3, 3)])
        >>> tied[1].weight_hh_l0 = tied[0].weight_hh_l0
        >>> list(matrix_obstacles(tied))
        ['0.weight_hh_l0', '1.weight_hh_l0']
    """
    return {
        name: obstacle
        for name, (names, _, _, obstacle) in _places_in(model).items()
        if obstacle is not None and not any(ignored(each, ignore) for each in names)
    }


class HoldSparse(Edit):
    """Recurrent layers that hold matrices by their values of largest magnitude.

    Args:
        parameters: parameter name -> how many of its weights are kept.
    """

    op: ClassVar[str] = "hold-sparse"
    parameters: dict[str, int] = Field(min_length=1)

    def rewrite(self, model: nn.Module) -> nn.Module:
        """Make the layers sparse, in place.

        Raises:
            BadInput: a name is that of no matrix that can be held so, or fewer than 1 or more than all would be kept.
        """
        places = _places_in(model)
        by_layer: dict[nn.RNNBase, dict[str, int]] = {}
        for name, kept in self.parameters.items():
            if name not in places:
                raise BadInput(f"hold-sparse: the model has no recurrent matrix {name!r}{nearest(name, list(places))}")
            _, layer, leaf, obstacle = places[name]
            if obstacle is not None:
                raise BadInput(f"hold-sparse: {name!r} stays dense: {obstacle}")
            total = layer.get_parameter(leaf).numel()
            if not 1 <= kept <= total:
                raise BadInput(f"hold-sparse: of {name!r} 1 to {total} weights can be kept, got {kept}")
            by_layer.setdefault(layer, {})[leaf] = kept
        for layer, counts in by_layer.items():
            if not isinstance(layer, SparseRecurrent):
                layer.__class__ = _KINDS[type(layer)]
            cast(SparseRecurrent, layer).hold(counts)
        return model

    def describe(self) -> dict[str, str]:
        """Say how many weights each matrix keeps."""
        return {name: f"{kept:,} weights kept, stored sparse, executed dense" for name, kept in self.parameters.items()}
