"""Cutting widths: what every criterion of structured pruning shares, so that a criterion is only its score of a unit.

A unit is one index of a group of coupled dimensions (``engines.surgery.slicing``): a channel with everything that
feeds and reads it, an attention head, a coordinate of the residual stream. A criterion scores units; here the model
is traced, each unit is priced, the budget is spent (``engines.allocation``) and the cut becomes one edit.

Strength: let r(s) be the share of the removable cost that is removed, the removable cost being what goes when every
group stands at its floor. The first step of the criterion's path with r >= s is taken. Steps are nested: what a lower
strength removes, a higher one removes too.
"""

from __future__ import annotations

import copy
import weakref
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchgraft.bench.task import Inputs, Split, Task, call, take
from torchgraft.engines.allocation import Counts, first_step, ladder, mean_normalised, strongest, uniform_path
from torchgraft.engines.allocation import threshold_path as global_path
from torchgraft.engines.procedure import Procedure, Refusal, Site, check_strength, ignored
from torchgraft.engines.surgery.convert import Convert, convertible
from torchgraft.engines.surgery.edits import Edit, apply_edits
from torchgraft.engines.surgery.slicing import Group, Structure, structure
from torchgraft.engines.taps import record
from torchgraft.errors import BadInput

__all__ = [
    "Study",
    "WidthProcedure",
    "calibration",
    "gradient_products",
    "hidden_states",
    "prepare",
    "squared_change",
    "study",
    "trajectory",
    "uses_per_entry",
]


def uses_per_entry(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Return, for every parameter by name, how many multiply-accumulates a pass over ``inputs`` makes with each entry.

    Counted are the weights of linear and convolution layers (Hugging Face's ``Conv1D`` too); other parameters get 0.
    Each value is a tensor of one element.

    Example:
        >>> uses = uses_per_entry(torch.nn.Conv2d(1, 2, 3), torch.zeros(1, 1, 5, 5))
        >>> {name: int(value) for name, value in uses.items()}
        {'weight': 9, 'bias': 0}
    """
    counted: dict[int, float] = {}

    def count(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        weight = module.weight
        if not isinstance(weight, Tensor) or not isinstance(output, Tensor):
            return
        if isinstance(module, nn.modules.conv._ConvTransposeNd):
            positions = args[0].numel() / module.in_channels
        elif isinstance(module, nn.modules.conv._ConvNd):
            positions = output.numel() / module.out_channels
        else:
            positions = output.numel() / output.shape[-1]
        counted[id(weight)] = counted.get(id(weight), 0.0) + positions

    handles = [
        module.register_forward_hook(count)
        for module in model.modules()
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) or type(module).__name__ == "Conv1D"
    ]
    try:
        with torch.no_grad():
            call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.tensor(counted.get(id(value), 0.0)) for name, value in model.named_parameters()}


@dataclass
class Study:
    """One model made ready for cutting: traced, its units priced. Made once, used at every strength.

    Args:
        model: a private copy, after ``prelude``, in eval mode; :meth:`cut` masks it for a while.
        prelude: edits that make the model's dimensions cuttable, and come before the cut.
        structure: its groups of coupled dimensions.
        groups: those that may be cut, by name.
        uses: by parameter name, the price of one of its entries.
    """

    model: nn.Module
    prelude: tuple[Edit, ...]
    structure: Structure
    groups: dict[str, Group]
    uses: dict[str, Tensor]
    _scores: dict[Any, dict[str, Tensor]] = field(default_factory=dict)
    _paths: dict[Any, list[Counts]] = field(default_factory=dict)
    _ledger: nn.Module | None = None

    def unit_costs(self) -> dict[str, Tensor]:
        """Return the price of each unit by group, (size,), as if it were cut alone."""
        entries = {
            name: self.uses[name].to(torch.float64).expand(value.shape) for name, value in self.model.named_parameters()
        }
        return {name: self.structure.unit_scores(name, entries) for name in self.groups}

    def cost(self, keep: Mapping[str, Sequence[int]]) -> float:
        """Return the price of every entry that is left when only the units ``keep`` are kept."""
        if self._ledger is None:
            self._ledger = copy.deepcopy(self.model).requires_grad_(False)
        for name, value in self._ledger.named_parameters():
            value.copy_(self.uses[name].to(value.dtype).expand(value.shape))
        self.structure.mask_(self._ledger, keep)
        return float(sum(value.sum(dtype=torch.float64) for value in self._ledger.parameters()))

    @contextmanager
    def cut(self, keep: Mapping[str, Sequence[int]]) -> Iterator[nn.Module]:
        """Yield the model with all units of the groups in ``keep`` but those listed masked; whole again afterwards."""
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        touched = {place for name in keep for place in self.structure.tensors(name) if place in tensors}
        backup = {place: tensors[place].detach().clone() for place in touched}
        try:
            self.structure.mask_(self.model, keep)
            yield self.model
        finally:
            with torch.no_grad():
                for place, value in backup.items():
                    tensors[place].copy_(value)

    def without(self, group: str, units: Sequence[int]) -> dict[str, list[int]]:
        """Return the units to keep so that exactly ``units`` of ``group`` are gone."""
        gone = set(units)
        return {group: [unit for unit in range(self.groups[group].size) if unit not in gone]}


def prepare(
    model: nn.Module,
    example: Inputs,
    *,
    ignore: Sequence[str] = (),
    exact_only: bool = False,
    cost: Literal["macs", "parameters"] = "macs",
) -> Study:
    """Return a new :class:`Study` of ``model``, traced on ``example``; see :func:`study`."""
    fixed = tuple(name for name in convertible(model) if not ignored(name, ignore))
    prelude = (Convert(names=fixed),) if fixed else ()
    ready = apply_edits(model, prelude).eval()
    return _priced(ready, prelude, structure(ready, example, ignore=ignore), example, exact_only=exact_only, cost=cost)


def _priced(
    ready: nn.Module,
    prelude: tuple[Edit, ...],
    found: Structure,
    example: Inputs,
    *,
    exact_only: bool,
    cost: Literal["macs", "parameters"],
) -> Study:
    groups = {group.name: group for group in found.groups if group.size > 1 and (group.exact or not exact_only)}
    if cost == "macs":
        uses = uses_per_entry(ready, example)
    else:
        uses = {name: torch.ones(()) for name, _ in ready.named_parameters()}
    return Study(ready, prelude, found, groups, uses)


def study(
    model: nn.Module,
    task: Task,
    *,
    ignore: Sequence[str] = (),
    exact_only: bool = False,
    cost: Literal["macs", "parameters"] = "macs",
) -> Study:
    """Return the :class:`Study` of ``model``; asked again about the same unchanged model, return the same one.

    Args:
        model: the model, left as it was.
        task: gives example inputs.
        ignore: globs of module names that must stay as they are.
        exact_only: leave out groups whose cut changes what masking would give (a LayerNorm averages over them).
        cost: price of an entry: its multiply-accumulates a pass, or 1.

    Raises:
        Untraceable: the model cannot be traced.
    """
    print_of_model = (
        *((name, value.data_ptr(), value._version, value.shape) for name, value in model.named_parameters()),
        *((name, value.data_ptr(), value._version, value.shape) for name, value in model.named_buffers()),
    )
    built = (print_of_model, tuple(ignore))
    key = (*built, exact_only, cost)
    like: Study | None = None  # the same model's with other settings: what is coupled there is coupled here
    for entry in list(_STUDIES):
        known_model, known_task, known_key, known = entry
        if known_model() is None or known_task() is None:
            _STUDIES.remove(entry)
        elif known_model() is model and known_task() is task and known_key[:2] == built:
            if known_key == key:
                return known
            like = known
    example = take(task.train.inputs, slice(min(len(task.train), 4)))
    if like is None:
        made = prepare(model, example, ignore=ignore, exact_only=exact_only, cost=cost)
    else:
        made = _priced(like.model, like.prelude, like.structure, example, exact_only=exact_only, cost=cost)
    _STUDIES.append((weakref.ref(model), weakref.ref(task), key, made))
    del _STUDIES[:-_KEPT]
    return made


_KEPT = 8
_STUDIES: list[tuple[weakref.ref[nn.Module], weakref.ref[Task], Any, Study]] = []


def calibration(task: Task, samples: int, seed: int) -> Split:
    """Return ``samples`` training samples (or all, where there are fewer), drawn with ``seed``."""
    order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(seed))
    return task.train[order[:samples].sort().values]


def gradient_products(model: nn.Module, task: Task, split: Split, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Yield, for each batch of ``split``, gradient times value of the task's loss at every parameter, by name."""
    named = {name: value for name, value in model.named_parameters() if value.is_floating_point()}
    wanted = {name: value.requires_grad for name, value in named.items()}
    try:
        for value in named.values():
            value.requires_grad_(True)
        for inputs, target in split.batches(batch_size):
            loss = task.loss(call(model, inputs), target)
            found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            yield {
                name: torch.zeros_like(value) if gradient is None else (gradient * value).detach()
                for (name, value), gradient in zip(named.items(), found, strict=True)
            }
    finally:
        for name, value in named.items():
            value.requires_grad_(wanted[name])


def trajectory(model: nn.Module) -> list[str]:
    """Return the names of the modules whose outputs are the model's trajectory, in order of registration.

    These are the members of lists of alike blocks; where there are none, all linear and convolution layers.

    Example:
        >>> block = lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> trajectory(nn.Sequential(nn.Linear(2, 2), nn.ModuleList([block(), block()])))
        ['1.0', '1.1']
    """
    found: list[str] = []
    for name, module in model.named_modules():
        children = list(module.children())
        alike = len(children) > 1 and len({type(child) for child in children}) == 1
        composed = all(next(child.children(), None) is not None for child in children)
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and alike and composed:
            places = [f"{name}.{place}" if name else place for place, _ in module.named_children()]
            found = [place for place in found if place != name] + places
    if found:
        order = {name: position for position, (name, _) in enumerate(model.named_modules())}
        return sorted(found, key=order.__getitem__)
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def hidden_states(model: nn.Module, names: Sequence[str], inputs: Inputs) -> tuple[dict[str, Tensor], Any]:
    """Return the outputs of the modules ``names`` (the first tensor of a tuple) and of the model on ``inputs``."""
    with record(model, names) as seen:
        output = call(model, inputs)
    states = {}
    for name in names:
        for value in seen.calls(name)[-1:]:
            first = value[0] if isinstance(value, (tuple, list)) else value
            if isinstance(first, Tensor):
                states[name] = first
    return states, output


def squared_change(before: Tensor, after: Tensor) -> Tensor:
    """Return the squared distance between two outputs of each sample, (N,)."""
    return (after - before).flatten(1).square().sum(1)


class WidthProcedure(Procedure):
    """A procedure that cuts units; a subclass says how a unit is scored.

    Args:
        exact_only: cut only groups whose cut equals masking (this leaves the residual stream of a transformer alone).
        cost: what the strength is a share of: ``"macs"`` or ``"parameters"``.
        floor: smallest share of a group's units that is kept at strength 1 (one unit always is).
        multiple: kept counts of groups of 32 units and more, and head sizes from twice this on, are multiples of this,
            since kernels like them.
        spread: ``"global"``: one threshold on the scores, each divided by its group's mean; ``"uniform"``: every
            group loses the same share of its units.
        samples: how many training samples a criterion that needs data looks at.
    """

    def __init__(
        self,
        *,
        exact_only: bool = False,
        cost: Literal["macs", "parameters"] = "macs",
        floor: float = 0.1,
        multiple: int = 8,
        spread: Literal["global", "uniform"] = "global",
        samples: int = 256,
    ) -> None:
        if spread not in ("global", "uniform") or cost not in ("macs", "parameters"):
            raise BadInput(f"spread is 'global' or 'uniform', cost 'macs' or 'parameters'; got {spread!r}, {cost!r}")
        if samples < 1 or multiple < 1 or not 0.0 <= floor < 1.0:
            raise BadInput(
                "samples and multiple must be at least 1 and floor in [0, 1);"
                f" got samples {samples}, multiple {multiple}, floor {floor}"
            )
        self.exact_only = exact_only
        self.cost = cost
        self.floor = floor
        self.multiple = multiple
        self.spread = spread
        self.samples = samples

    @abstractmethod
    def scores(self, study: Study, task: Task, *, seed: int) -> dict[str, Tensor]:
        """Return the importance of every unit of every group of ``study``, (size,) each; higher is kept longer."""

    def path(self, study: Study, scores: Mapping[str, Tensor], task: Task, *, seed: int) -> list[Counts]:
        """Return nested kept counts from nothing removed to every floor; by default as ``spread`` says."""
        ladders = self.ladders(study)
        return uniform_path(ladders) if self.spread == "uniform" else global_path(mean_normalised(scores), ladders)

    def ladders(self, study: Study) -> dict[str, tuple[int, ...]]:
        """Return the counts that each group may keep."""
        found = {}
        for name, group in study.groups.items():
            # Attention kernels are slow at odd head sizes, so those are rounded even though they are small.
            start = 2 * self.multiple if group.kind == "features" else 32
            found[name] = ladder(group.size, floor=self.floor, multiple=self.multiple, multiple_from=start)
        return found

    def applies_to(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Site]:
        """Return the groups that can be cut; see :meth:`Procedure.applies_to`."""
        found = self._study(model, task, ignore)
        return [
            Site(group.name, group.kind, group.size, group.size * group.parameters) for group in found.groups.values()
        ]

    def refusals(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Refusal]:
        """Return the dimensions that cannot be cut, and the source lines that stand in the way."""
        return list(self._study(model, task, ignore).structure.refused)

    def keep(
        self, model: nn.Module, task: Task, strength: float, *, ignore: Sequence[str] = (), seed: int = 0
    ) -> dict[str, list[int]]:
        """Return the units that are kept at ``strength``, by group; see :meth:`Procedure.apply`."""
        found = self._study(model, task, ignore)
        scores, path = self._decide(found, task, seed)
        whole = found.cost({})
        removed = {"": 0.0}

        def removed_by(counts: Counts) -> float:
            text = repr(counts)
            if text not in removed:
                removed[text] = whole - found.cost(strongest(scores, counts))
            return removed[text]

        target = check_strength(strength) * removed_by(path[-1])
        counts = first_step(path, removed_by, target)
        kept = strongest(scores, counts)
        return {name: units for name, units in kept.items() if len(units) < found.groups[name].size}

    def plan(
        self, model: nn.Module, task: Task, strength: float, *, ignore: Sequence[str] = (), seed: int = 0
    ) -> list[Edit]:
        """Return the cut as edits; see :meth:`Procedure.plan`."""
        kept = self.keep(model, task, strength, ignore=ignore, seed=seed)
        if not kept:
            return []
        found = self._study(model, task, ignore)
        return [*found.prelude, found.structure.slice(kept)]

    def _study(self, model: nn.Module, task: Task, ignore: Sequence[str]) -> Study:
        return study(model, task, ignore=ignore, exact_only=self.exact_only, cost=self.cost)

    def _decide(self, found: Study, task: Task, seed: int) -> tuple[dict[str, Tensor], list[Counts]]:
        key = (type(self), tuple(sorted(vars(self).items())), seed)
        if key not in found._scores:
            found._scores[key] = self.scores(found, task, seed=seed)
            found._paths[key] = self.path(found, found._scores[key], task, seed=seed)
        return found._scores[key], found._paths[key]
