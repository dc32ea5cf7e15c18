"""One set of weights that holds smaller networks: each level runs on views of the shared tensors, nothing is copied.

A level is a list of edits (a :class:`Slice` to the first units of every group, a path through a stack of layers). They
are applied once to a skeleton, a copy of the modules alone, whose tensors are then views of the shared ones. Switching
sets an index. Where a level keeps several runs of one dimension (the first heads of a fused projection of queries, keys
and values), no view exists, and the runs are gathered at every call. Statistics of batch norms are a level's own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchgraft.bench.task import Inputs, call
from torchgraft.engines.nesting.elastic import ElasticModule
from torchgraft.engines.surgery.edits import Edit, edit_from_record, edit_to_record
from torchgraft.engines.surgery.slicing import Slice, owner_of, parameter_like, replace_everywhere
from torchgraft.engines.surgery.trace import shell
from torchgraft.errors import BadInput

__all__ = ["Arrange", "Nest", "Nested", "NestedElastic", "recalibrate", "settle"]

Runs = tuple[tuple[int, int], ...]
_Norm = nn.modules.batchnorm._NormBase


class Arrange(Edit):
    """Put the entries of parameters and buffers in a given order, those left out gone, and set sizes of modules.

    Args:
        tensors: parameter or buffer name to {dimension: indices in their new order}.
        attributes: dotted attribute name to its new value.
    """

    op: ClassVar[str] = "arrange"
    tensors: dict[str, dict[int, tuple[int, ...]]]
    attributes: dict[str, int | tuple[int, ...]]

    def rewrite(self, model: nn.Module) -> nn.Module:
        """Arrange ``model`` in place."""
        for name, orders in self.tensors.items():
            module, leaf = owner_of(model, name)
            old: Tensor | None = module._parameters.get(leaf)
            old = module._buffers.get(leaf) if old is None else old
            if old is None:
                raise BadInput(f"the model has no parameter or buffer {name!r}, which an order was made for")
            value = old.detach()
            for dim, order in orders.items():
                if dim >= value.ndim or max(order) >= value.shape[dim]:
                    raise BadInput(f"{name} of shape {tuple(old.shape)} is too small for dimension {dim} of the order")
                value = value.index_select(dim, torch.tensor(order, device=value.device))
            replace_everywhere(model, old, parameter_like(old, value))
        for name, size in self.attributes.items():
            module, leaf = owner_of(model, name)
            setattr(module, leaf, size)
        return model

    def describe(self) -> dict[str, str]:
        """Return which modules were put in order."""
        return {name.rpartition(".")[0]: "units in the order of their importance" for name in self.tensors}


@dataclass(eq=False)
class _Place:
    """Where a level holds a cut of a shared tensor."""

    held: dict[str, Any]
    leaf: str
    source: dict[str, Any]
    source_leaf: str
    cuts: tuple[tuple[int, Runs], ...]

    @property
    def gathers(self) -> bool:
        """Whether no view of the shared tensor is the cut."""
        return any(len(runs) > 1 for _, runs in self.cuts)

    def bind(self) -> None:
        """Hold the cut as the shared tensor stands now."""
        value: Tensor = self.source[self.source_leaf]
        for dim, runs in self.cuts:
            parts = [value.narrow(dim, start, stop - start) for start, stop in runs]
            value = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
        self.held[self.leaf] = value


@dataclass(eq=False)
class _Skeleton:
    """A level's modules, and the places in them that hold cuts."""

    module: nn.Module
    places: list[_Place]
    linked: bool = False

    def bind(self) -> None:
        """Make every cut the shared tensor's: anew where gradients are to flow, else only what no view can follow."""
        grad = torch.is_grad_enabled()
        for place in self.places:
            if grad or not self.linked or place.gathers:
                place.bind()
        self.linked = not grad


class _Statistics(nn.Module):
    """A level's own buffers, by the name of the shared ones."""

    def __init__(self, buffers: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, value in buffers.items():
            self.register_buffer(name.replace(".", "/"), value)

    def take(self, name: str) -> Tensor:
        """Return the buffer ``name``."""
        found: Tensor = self._buffers[name.replace(".", "/")]  # type: ignore[assignment]  # none is None
        return found


class Nested(nn.Module):
    """A network of several levels on one set of weights.

    Args:
        net: the network whose parameters all levels share; taken over, not copied.
        levels: for each level the edits that make its network out of ``net``: slices first, then paths. No edit at all
            is the whole network.
        configs: what each level is called, say ``{"width": 0.5, "depth": 1.0}``.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> half = Slice(tensors={"0.weight": {0: ((0, 2),)}, "0.bias": {0: ((0, 2),)}, "2.weight": {1: ((0, 2),)}},
        ...              attributes={}, units={})
        >>> nested = Nested(net, [[half], []])
        >>> nested.use(0)(torch.ones(3, 2)).shape, sum(p.numel() for p in nested.parameters())
        (torch.Size([3, 1]), 17)
    """

    #: Index of the level that is set.
    level: int
    _skeletons: list[_Skeleton] | None

    def __init__(
        self,
        net: nn.Module,
        levels: Sequence[Sequence[Edit]],
        configs: Sequence[Mapping[str, float]] = (),
    ) -> None:
        super().__init__()
        if not levels or (configs and len(configs) != len(levels)):
            raise BadInput(f"levels and configs must be as many, at least one; got {len(levels)} and {len(configs)}")
        self.net = net
        self.edits = tuple(tuple(edits) for edits in levels)
        self.configs = tuple(dict(config) for config in configs)
        self.level = len(self.edits) - 1
        self.own = nn.ModuleList([_Statistics(self._start(edits)) for edits in self.edits])
        self._skeletons = None
        self.register_load_state_dict_post_hook(_forget)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.skeleton()

    # -- levels -------------------------------------------------------------------------------------------------------
    def use(self, level: int) -> Nested:
        """Run at ``level`` from the next call on, and return the network."""
        if not -len(self.edits) <= level < len(self.edits):
            raise BadInput(f"level must lie below {len(self.edits)}, got {level}")
        self.level = level % len(self.edits)
        return self

    def select(self, config: Mapping[str, float]) -> Nested:
        """Run at the level called ``config`` from the next call on, and return the network."""
        for level, known in enumerate(self.configs):
            if known == dict(config):
                return self.use(level)
        raise BadInput(f"config must be one of {list(self.configs)}, got {dict(config)}")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network of the level that is set."""
        skeleton = self.skeleton()
        if skeleton.training != self.training:
            skeleton.train(self.training)
        return skeleton(*args, **kwargs)

    def skeleton(self) -> nn.Module:
        """Return the network of the level that is set, its tensors views of the shared ones."""
        if self._skeletons is None:
            self._skeletons = [self._make(level) for level in range(len(self.edits))]
        made = self._skeletons[self.level]
        made.bind()
        return made.module

    def standalone(self, level: int) -> nn.Module:
        """Return the network of ``level`` with weights of its own."""
        net = copy.deepcopy(self.net)
        for edit in self.edits[level]:
            if isinstance(edit, Slice):
                net = edit.rewrite(net)
        held = dict(net.named_buffers())
        with torch.no_grad():
            for name in self._norm_buffers(self.net):
                held[name].copy_(self._own(level).take(name))
        for edit in self.edits[level]:
            if not isinstance(edit, Slice):
                net = edit.rewrite(net)
        return net.train(self.training)

    # -- making -------------------------------------------------------------------------------------------------------
    def _own(self, level: int) -> _Statistics:
        found = self.own[level]
        if not isinstance(found, _Statistics):
            raise TypeError(f"level {level} has no statistics")
        return found

    @staticmethod
    def _norm_buffers(net: nn.Module) -> list[str]:
        return [
            f"{name}.{leaf}" if name else leaf
            for name, module in net.named_modules()
            if isinstance(module, _Norm)
            for leaf, value in module._buffers.items()
            if value is not None
        ]

    def _start(self, edits: Sequence[Edit]) -> dict[str, Tensor]:
        """Return the level's share of the network's statistics."""
        cuts = _cuts(edits)
        buffers = dict(self.net.named_buffers())
        found: dict[str, Tensor] = {}
        for name in self._norm_buffers(self.net):
            value = buffers[name]
            for dim, runs in cuts.get(name, ()):
                value = torch.cat([value.narrow(dim, start, stop - start) for start, stop in runs], dim)
            found[name] = value.clone()
        return found

    def _make(self, level: int) -> _Skeleton:
        module = shell(self.net)
        canonical: dict[int, str] = {}
        homes: dict[str, tuple[Any, str]] = {}
        for held, parameters in ((True, self.net.named_parameters), (False, self.net.named_buffers)):
            for name, value in parameters():
                canonical.setdefault(id(value), name)
                owner, leaf = owner_of(self.net, name)
                homes.setdefault(name, (owner._parameters if held else owner._buffers, leaf))
        tables: list[Any] = [table for part in module.modules() for table in (part._parameters, part._buffers)]
        named = [
            (table, leaf, canonical[id(value)])
            for table in tables
            for leaf, value in table.items()
            if value is not None
        ]
        with torch.no_grad():
            for edit in self.edits[level]:
                module = edit.rewrite(module)
        cuts, own = _cuts(self.edits[level]), set(self._norm_buffers(self.net))
        places: list[_Place] = []
        for table, leaf, name in named:
            if name in own:
                table[leaf] = self._own(level).take(name)
            elif name in cuts:
                places.append(_Place(table, leaf, *homes[name], cuts[name]))
        return _Skeleton(module.train(self.training), places)

    # -- keeping the skeletons true to the weights --------------------------------------------------------------------
    def _apply(self, fn: Any, recurse: bool = True) -> Nested:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._skeletons = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_skeletons": None}


def _forget(module: nn.Module, keys: Any) -> None:
    """Have the levels made anew, since loading may have put other tensors in the place of the shared ones."""
    del keys
    if isinstance(module, Nested):
        module._skeletons = None


def _cuts(edits: Sequence[Edit]) -> dict[str, tuple[tuple[int, Runs], ...]]:
    """Return tensor name -> the runs kept of each dimension that is cut."""
    found: dict[str, tuple[tuple[int, Runs], ...]] = {}
    for edit in edits:
        if isinstance(edit, Slice):
            if set(found) & set(edit.tensors):
                raise BadInput("a level may cut a tensor once only")
            found |= {name: tuple(sorted(dims.items())) for name, dims in edit.tensors.items()}
    return found


@contextmanager
def _measuring(module: nn.Module) -> Iterator[None]:
    """Let the batch norms of ``module``, and nothing else, be in training mode, averaging from nothing."""
    norms = [each for each in module.modules() if isinstance(each, _Norm) and each.running_mean is not None]
    kept = [each.momentum for each in norms]
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        for each in norms:
            each.reset_running_stats()
            each.momentum = None  # torch reads None as the plain average
            each.train()
        yield
    finally:
        for each, momentum in zip(norms, kept, strict=True):
            each.momentum = momentum
        for part, training in modes:
            part.training = training


def settle(model: nn.Module, batches: Sequence[Inputs]) -> None:
    """Set the statistics of the batch norms of ``model`` to the averages over ``batches`` of inputs, in place."""
    if any(isinstance(module, _Norm) for module in model.modules()):
        with torch.no_grad(), _measuring(model):
            for inputs in batches:
                call(model, inputs)


def recalibrate(nested: Nested, batches: Sequence[Inputs]) -> None:
    """Set the statistics of every level's batch norms to the averages over ``batches`` of inputs, in place."""
    kept = nested.level
    for level in range(len(nested.edits)):
        with torch.no_grad():
            skeleton = nested.use(level).skeleton()
        settle(skeleton, batches)
    nested.use(kept)


class NestedElastic(ElasticModule):
    """The frozen original beside one nested set of weights for all smaller budgets.

    Args:
        full: the original, which the full budget runs; its parameters are frozen.
        nested: a level for each smaller budget.
        budgets: see :class:`ElasticModule`.
    """

    def __init__(self, full: nn.Module, nested: Nested, budgets: Sequence[float]) -> None:
        super().__init__(budgets)
        if len(budgets) != len(nested.edits) + 1:
            raise BadInput(f"{len(nested.edits)} levels make {len(nested.edits) + 1} budgets, got {len(budgets)}")
        self.full = full.requires_grad_(False)
        self.nested = nested

    def select(self, level: int) -> None:
        """Run the nested level, or the original at the last one."""
        if level < len(self.nested.edits):
            self.nested.use(level)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network of the budget that is set."""
        if self.level == len(self.nested.edits):
            return self.full(*args, **kwargs)
        return self.nested(*args, **kwargs)


class Nest(Edit):
    """Put a nested copy of the model, its units arranged, beside the model.

    Args:
        base: records of the edits that make the widest nested network out of a copy of the model.
        levels: for each level, from the least budget up, the records of its edits.
        budgets: shares of the full model's multiply-accumulates, the last one 1.
    """

    op: ClassVar[str] = "nest"
    base: tuple[dict[str, Any], ...]
    levels: tuple[tuple[dict[str, Any], ...], ...]
    budgets: tuple[float, ...]

    @classmethod
    def of(cls, base: Sequence[Edit], levels: Sequence[Sequence[Edit]], budgets: Sequence[float]) -> Nest:
        """Return the edit for edits instead of records."""
        return cls(
            base=tuple(edit_to_record(edit) for edit in base),
            levels=tuple(tuple(edit_to_record(edit) for edit in level) for level in levels),
            budgets=tuple(budgets),
        )

    def rewrite(self, model: nn.Module) -> nn.Module:
        """Return the elastic model."""
        net = copy.deepcopy(model)
        for record in self.base:
            net = edit_from_record(record).rewrite(net)
        levels = [[edit_from_record(record) for record in level] for level in self.levels]
        return NestedElastic(model, Nested(net.requires_grad_(True), levels), self.budgets).train(model.training)

    def describe(self) -> dict[str, str]:
        """Return the budgets."""
        return {"": "one nested set of weights for budgets " + ", ".join(f"{b:.3g}" for b in self.budgets[:-1])}
