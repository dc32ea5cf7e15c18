"""Structured slicing of any traced model: which dimensions can be cut together, and the edit that cuts them.

:func:`structure` traces the model, finds the axes of its parameters (see :mod:`.axes` and :mod:`.rules`), and tries
each cut once: the sliced model must give the outputs of the masked one. What cannot be cut is refused with its reason.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchgraft.bench.task import Inputs, call
from torchgraft.engines.sites import Refusal, ignored
from torchgraft.engines.surgery.axes import Axis, Prod, Term, axes, kept, kept_size, owners, resolve, unify
from torchgraft.engines.surgery.edits import Edit
from torchgraft.engines.surgery.replay import replay
from torchgraft.engines.surgery.rules import Analysis, Use, analyse
from torchgraft.engines.surgery.trace import Traced, evaluated, few, shell, trace, user_line
from torchgraft.errors import BadInput, nearest

__all__ = [
    "Group",
    "Refusal",
    "Slice",
    "Structure",
    "owner_of",
    "parameter_like",
    "replace_everywhere",
    "runs_of",
    "structure",
]

_TOLERANCE = 1e-4  # of the outputs' largest entry, in float32; other sums in another order differ by about 1e-6
_HYPOTHESES = 64
_WINDOW = "it is the size of a convolution's window"


@dataclass(frozen=True)
class Group:
    """One set of coupled dimensions that must be cut together.

    Args:
        name: the first module that produces the dimension, with ``:heads``, ``:features`` ... where it is not plain.
        kind: ``"channels"``, ``"heads"``, ``"features"`` (of each head) or ``"width"`` (of the residual stream).
        size: how many units there are.
        parameters: how many parameter entries go when one unit goes.
        exact: whether the sliced model gives the outputs of the masked one.
    """

    name: str
    kind: str
    size: int
    parameters: int
    exact: bool


def runs_of(mask: Tensor) -> tuple[tuple[int, int], ...]:
    """Return the kept indices of a bool mask as ``(start, stop)`` runs."""
    edges = torch.diff(
        mask.to(torch.int8), prepend=torch.zeros(1, dtype=torch.int8), append=torch.zeros(1, dtype=torch.int8)
    )
    starts, stops = (edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist()
    return tuple(zip(starts, stops, strict=True))


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that holds parameter or buffer ``name``, and the name's last part."""
    path, _, leaf = name.rpartition(".")
    try:
        return model.get_submodule(path), leaf
    except AttributeError:
        raise BadInput(f"the model has no module {path!r}, which a slice was made for") from None


def parameter_like(old: Tensor, value: Tensor) -> Tensor:
    """Return ``value`` as a parameter where ``old`` is one."""
    return nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value


def replace_everywhere(model: nn.Module, old: Tensor, new: Tensor) -> None:
    """Put ``new`` wherever ``model`` holds the parameter or buffer ``old``, so that tied tensors stay tied."""
    for module in model.modules():
        held = module._parameters if isinstance(old, nn.Parameter) else module._buffers
        for leaf, value in held.items():
            if value is old:
                held[leaf] = new  # type: ignore[assignment]  # the table's kind was chosen by the kind of old


class Slice(Edit):
    """Cut parameters and buffers to kept indices and set the sizes that modules keep as attributes.

    Args:
        tensors: parameter or buffer name to {dimension: runs ``(start, stop)`` of kept indices}.
        attributes: dotted attribute name to its new value.
        units: group name to (units kept, units before), for the report.
    """

    op: ClassVar[str] = "slice"
    tensors: dict[str, dict[int, tuple[tuple[int, int], ...]]]
    attributes: dict[str, int | tuple[int, ...]]
    units: dict[str, tuple[int, int]]

    def rewrite(self, model: nn.Module) -> nn.Module:
        """Cut ``model`` in place; no tracing and no data."""
        for name, cuts in self.tensors.items():
            module, leaf = owner_of(model, name)
            old: Tensor | None = module._parameters.get(leaf)
            if old is None:
                old = module._buffers.get(leaf)
            if old is None:
                raise BadInput(f"the model has no parameter or buffer {name!r}, which a slice was made for")
            value = old.detach()
            for dim, runs in cuts.items():
                if dim >= value.ndim or runs[-1][1] > value.shape[dim]:
                    raise BadInput(f"{name} of shape {tuple(old.shape)} is too small for dimension {dim} of the slice")
                index = torch.cat([torch.arange(start, stop, device=value.device) for start, stop in runs])
                value = value.index_select(dim, index)
            replace_everywhere(model, old, parameter_like(old, value))
        for name, size in self.attributes.items():
            module, leaf = owner_of(model, name)
            setattr(module, leaf, size)
        return model

    def describe(self) -> dict[str, str]:
        """Return for each module what is kept of it."""
        words: dict[str, list[str]] = {}
        for name, (left, size) in self.units.items():
            module, _, what = name.partition(":")
            words.setdefault(module, []).append(f"{left} of {size} {what.split(':')[0] or 'channels'} kept")
        return {module: ", ".join(each) for module, each in words.items()}


Claim = dict[tuple[str, str], Term]


class Structure:
    """What can be cut in a model, made by :func:`structure`.

    Args:
        analysis: the axes of the model's tensors.
        groups: what can be cut.
        refused: what cannot.
        by_name: the axis of each group.
        attributes: module attributes that are sizes, with their terms.
    """

    def __init__(
        self,
        analysis: Analysis,
        groups: Sequence[Group],
        refused: Sequence[Refusal],
        by_name: Mapping[str, Axis],
        attributes: Mapping[tuple[str, str], Term | tuple[Term, ...]],
    ) -> None:
        self.groups = tuple(groups)
        self.refused = tuple(refused)
        self._analysis = analysis
        self._axes = dict(by_name)
        self._attributes = dict(attributes)

    def __repr__(self) -> str:
        return f"Structure({len(self.groups)} groups, {len(self.refused)} refused)"

    def axis(self, group: str) -> Axis:
        """Return the axis of ``group``.

        Raises:
            BadInput: there is no such group; where it was refused, the reason is given.
        """
        if group in self._axes:
            return self._axes[group]
        for refusal in self.refused:
            if refusal.name == group:
                raise BadInput(f"group {group!r} cannot be cut: {refusal.reason}")
        raise BadInput(f"unknown group {group!r}{nearest(group, list(self._axes))}")

    def masks(self, keep: Mapping[str, Sequence[int]]) -> dict[Axis, Tensor]:
        """Return a mask of kept indices for each axis that ``keep`` names."""
        masks: dict[Axis, Tensor] = {}
        for name, indices in keep.items():
            axis = self.axis(name)
            wanted = [int(index) for index in indices]
            if not wanted or sorted(set(wanted)) != wanted or wanted[0] < 0 or wanted[-1] >= axis.size:
                raise BadInput(
                    f"keep[{name!r}] must be ascending indices below {axis.size}, at least one, got {wanted}"
                )
            mask = torch.zeros(axis.size, dtype=torch.bool)
            mask[wanted] = True
            masks[axis] = mask
        return masks

    def _cuts(self, masks: Mapping[Axis, Tensor]) -> dict[str, dict[int, Tensor]]:
        """Return tensor name -> {dimension: kept mask} for the dimensions that lose entries."""
        found: dict[str, dict[int, Tensor]] = {}
        for name, value in self._analysis.tensors.items():
            for dim, term in enumerate(value.dims):
                if any(axis in masks for axis in axes(term)):
                    mask = kept(term, masks)
                    if not bool(mask.all()):
                        found.setdefault(name, {})[dim] = mask
        return found

    def slice(self, keep: Mapping[str, Sequence[int]]) -> Slice:
        """Return the edit that keeps only the units ``keep[group]`` of each group named.

        Args:
            keep: group name to ascending indices, at least one.

        Raises:
            BadInput: an unknown group, or indices that are empty, unordered or out of range.
        """
        masks = self.masks(keep)
        attributes: dict[str, int | tuple[int, ...]] = {}
        for (module, leaf), term in self._attributes.items():
            name = f"{module}.{leaf}" if module else leaf
            if isinstance(term, tuple):
                if any(axis in masks for part in term for axis in axes(part)):
                    attributes[name] = tuple(kept_size(part, masks) for part in term)
            elif any(axis in masks for axis in axes(term)):
                attributes[name] = kept_size(term, masks)
        return Slice(
            tensors={
                name: {dim: runs_of(mask) for dim, mask in cuts.items()} for name, cuts in self._cuts(masks).items()
            },
            attributes=attributes,
            units={name: (len(keep[name]), self._axes[name].size) for name in keep},
        )

    def mask_(self, model: nn.Module, keep: Mapping[str, Sequence[int]]) -> None:
        """Zero in place every parameter and floating-point buffer entry of ``model`` that the slice would remove."""
        with torch.no_grad():
            for name, cuts in self._cuts(self.masks(keep)).items():
                module, leaf = owner_of(model, name)
                value = getattr(module, leaf)
                if not value.is_floating_point():
                    continue
                for dim, mask in cuts.items():
                    value.index_fill_(dim, (~mask).nonzero()[:, 0].to(value.device), 0)

    def tensors(self, group: str) -> dict[str, tuple[int, ...]]:
        """Return the parameters and buffers that ``group`` cuts, each with the dimensions where it does."""
        axis = self.axis(group)
        found = {
            name: tuple(dim for dim, term in enumerate(value.dims) if any(axis is other for other in axes(term)))
            for name, value in self._analysis.tensors.items()
        }
        return {name: dims for name, dims in found.items() if dims}

    def unit_scores(self, group: str, scores: Mapping[str, Tensor]) -> Tensor:
        """Sum elementwise scores over the entries that each unit of ``group`` owns.

        Args:
            group: name of a group.
            scores: parameter name to a tensor of the parameter's shape; names that are missing count as zero.

        Shapes:
            result ``(size,)``.
        """
        axis = self.axis(group)
        total = torch.zeros(axis.size, dtype=torch.float64)
        for name, dims in self.tensors(group).items():
            if name not in scores:
                continue
            value = self._analysis.tensors[name]
            score = scores[name].detach().double().cpu()
            if tuple(score.shape) != value.shape:
                raise BadInput(f"scores[{name!r}] must have shape {value.shape}, got {tuple(score.shape)}")
            places = [owners(value.dims[dim], axis) for dim in dims]
            total += _owned(score, dims, places, axis.size)
        return total


def _owned(score: Tensor, dims: Sequence[int], places: Sequence[Tensor], size: int) -> Tensor:
    """Sum ``score`` over the entries of each unit; an entry that a unit owns through several dimensions counts once."""
    total = torch.zeros(size + 1, dtype=score.dtype)
    for order in range(1, len(dims) + 1):
        for chosen in itertools.combinations(range(len(dims)), order):
            if order == 1:
                dim, place = dims[chosen[0]], places[chosen[0]]
                flat = score.movedim(dim, 0).reshape(score.shape[dim], -1).sum(1)
                total.index_add_(0, place % (size + 1), flat)
                continue
            for unit in range(size):
                part = score
                for each in chosen:
                    part = part.index_select(dims[each], (places[each] == unit).nonzero()[:, 0])
                total[unit] += (-1) ** (order + 1) * part.sum()
    return total[:size]


def _tangled(term: Term, axis: Axis) -> bool:
    """Say whether ``axis`` stands in two factors of one product, so that an entry would have two owners."""
    term = resolve(term)
    if isinstance(term, Axis):
        return False
    holding = [part for part in term.terms if any(axis is other for other in axes(part))]
    if isinstance(term, Prod) and len(holding) > 1:
        return True
    return any(_tangled(part, axis) for part in holding)


def _kind(axis: Axis) -> str:
    for mark, kind in (("heads", "heads"), ("features", "features"), ("values", "features"), ("width", "width")):
        if mark in axis.marks:
            return kind
    return "channels"


def _home(name: str) -> str:
    """Return the module within which the group ``name`` was named."""
    return name.partition(":")[0].rpartition(".")[0]


def _label(axis: Axis) -> str:
    for mark in ("heads", "features", "values", "width"):
        if mark in axis.marks:
            return f":{mark}"
    return ""


class _Finder:
    """Finds the groups of a model, and for each the module attributes that must change with it."""

    def __init__(self, model: nn.Module, example: Inputs, traced: Traced, ignore: Sequence[str]) -> None:
        self.model = model
        self.example = example
        self.traced = traced
        self.analysis = analyse(traced)
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.ignore = tuple(ignore)
        self.groups: dict[str, Group] = {}
        self.axes: dict[str, Axis] = {}
        self.refused: list[Refusal] = []
        self.known = self._known()
        self.claims: Claim = {}
        self.liked: list[frozenset[str]] = []
        self.failed: dict[str, Axis] = {}
        #: Classes of modules whose key and value features had to be cut together.
        self.joint: set[type] = set()
        self.uses: dict[str, list[Use]] = {}
        self.places: dict[str, int] = {}

    # -- groups -------------------------------------------------------------------------------------------------------
    def _known(self) -> dict[tuple[str, str], Term | tuple[Term, ...]]:
        """Attributes of known classes: what the operations told, and the sizes of Linear and Embedding."""
        found: dict[tuple[str, str], Term | tuple[Term, ...]] = {}
        for (module, leaf), term in self.analysis.attributes.items():
            old = getattr(self.modules.get(module), leaf, None)
            sizes = tuple(part.size for part in term) if isinstance(term, tuple) else term.size
            if (tuple(old) if isinstance(old, list | tuple) else old) == sizes:
                found[module, leaf] = term
        for name, module in self.modules.items():
            held = self.analysis.tensors.get(self._canonical(name, module))
            if held is None:
                continue
            if isinstance(module, nn.Linear):
                found[name, "out_features"], found[name, "in_features"] = held.dims
            elif isinstance(module, nn.Embedding):
                found[name, "num_embeddings"], found[name, "embedding_dim"] = held.dims
        return found

    def _canonical(self, name: str, module: nn.Module) -> str:
        weight = module._parameters.get("weight")
        if weight is None:
            return ""
        direct = f"{name}.weight" if name else "weight"
        if direct in self.analysis.tensors:
            return direct
        for other, value in self.model.named_parameters():
            if value is weight:
                return other
        return direct

    def collect(self) -> None:
        """Fill in groups and refusals from the analysis alone."""

        holders: dict[Axis, list[str]] = {}
        order = [*self.analysis.order, *(name for name in self.analysis.tensors if name not in self.analysis.order)]
        for name in order:
            for term in self.analysis.tensors[name].dims:
                for axis in axes(term):
                    names = holders.setdefault(axis, [])
                    if name not in names:
                        names.append(name)
        made: dict[Axis, str] = {}  # axis -> the weight that first produces it
        for name, term in self.analysis.producers:
            for axis in axes(term):
                made.setdefault(axis, name)
        parameters = dict(self.model.named_parameters())
        taken: set[str] = set()
        stopped: list[tuple[str, Refusal]] = []
        for axis, names in holders.items():
            source = made.get(axis, names[0])
            base = source.rpartition(".")[0] if made.get(axis) else source
            reason = axis.reason
            if reason is not None:
                if reason.text != _WINDOW:
                    stopped.append((base, Refusal(base, reason.text, reason.line)))
                continue
            name = base + _label(axis)
            if name in taken and "heads" in axis.marks:
                name = f"{base}:queries"
            count = 2
            while name in taken:
                name, count = f"{base}{_label(axis)}:{count}", count + 1
            taken.add(name)
            if any(_tangled(t, axis) for n in names for t in self.analysis.tensors[n].dims):
                self.refused.append(Refusal(name, "its entries belong to two units at once", None))
            elif stuck := [each for each in names if ignored(each, self.ignore)]:
                self.refused.append(Refusal(name, f"{stuck[0]} is ignored", None))
            elif owner := self._attention(names):
                text = f"{owner} is a nn.MultiheadAttention, whose sizes are fixed; convert the model first"
                self.refused.append(Refusal(name, text, None))
            elif any(each in parameters for each in names):
                self.offer(name, axis)
        # A frozen factor of a dimension that can be cut by another factor (the 3 of a packed q, k, v) is no news.
        bases = {name.partition(":")[0] for name in taken}
        for base, refusal in stopped:
            if base not in bases and refusal not in self.refused:
                self.refused.append(refusal)

    def offer(self, name: str, axis: Axis) -> Group:
        """Add the group ``name`` for ``axis``."""
        group = Group(name, _kind(axis), axis.size, self._weight(axis), self._exact(axis))
        self.axes[name], self.groups[name] = axis, group
        self.places.setdefault(name, len(self.places))
        return group

    def _exact(self, axis: Axis) -> bool:
        return not any(each.root() is axis for each in self.analysis.inexact)

    def _attention(self, names: Iterable[str]) -> str | None:
        for name in names:
            path = name.rpartition(".")[0]
            for owner in (path, path.rpartition(".")[0]):
                if isinstance(self.modules.get(owner), nn.MultiheadAttention):
                    return owner
        return None

    def _weight(self, axis: Axis) -> int:
        """Number of parameter entries that one unit owns."""
        parameters = dict(self.model.named_parameters())
        total = 0
        for name, value in self.analysis.tensors.items():
            if name in parameters and any(axis is other for term in value.dims for other in axes(term)):
                whole, rest = 1, 1
                for term in value.dims:
                    whole *= term.size
                    rest *= term.size - int((owners(term, axis) == 0).sum())
                total += whole - rest
        return total

    # -- attributes ---------------------------------------------------------------------------------------------------
    def candidates(self, axis: Axis) -> list[tuple[tuple[str, str], Term]]:
        """Whole-number attributes of modules that saw ``axis`` and equal the size of a term that holds it."""
        seen: dict[str, list[Term]] = {}
        for use in self.analysis.uses:
            if any(axis is other for other in axes(use.term)):
                for place in sorted({use.module, use.module.rpartition(".")[0]}):
                    terms = seen.setdefault(place, [])
                    terms.extend(term for term in (resolve(use.term), axis) if term not in terms)
        found: list[tuple[tuple[str, str], Term]] = []
        for name, terms in seen.items():
            module = self.modules.get(name)
            if module is None or type(module).__module__.startswith("torch.nn."):
                continue
            for leaf, value in vars(module).items():
                if isinstance(value, int) and not isinstance(value, bool) and not leaf.startswith("_"):
                    if (name, leaf) in self.known:
                        continue
                    found.extend(((name, leaf), term) for term in terms if term.size == value)
        return found

    def hypotheses(self, group: Group) -> list[Claim]:
        """Which of the candidate attributes are sizes of the group's dimensions: guesses, the likeliest first."""
        axis = self.axes[group.name]
        found = [
            (place, term)
            for place, term in self.candidates(axis)
            if place not in self.claims or resolve(self.claims[place]) == term
        ]
        likely = [(place, term) for place, term in found if _plausible(place[1], term)]
        guesses: list[Claim] = []

        def guess(pairs: Iterable[tuple[tuple[str, str], Term]]) -> None:
            claim: Claim = {}
            for place, term in pairs:
                claim.setdefault(place, term)
            if claim not in guesses:
                guesses.append(claim)

        guess([(place, term) for place, term in found if self.certain(place[0], term)])
        guess(likely)
        guess([])
        for names in self.liked:
            guess([(place, term) for place, term in found if place[1] in names])
        for count in range(1, len(found) + 1):
            for chosen in itertools.combinations(found, count):
                if len(guesses) >= _HYPOTHESES:
                    break
                guess(chosen)
        return guesses

    def certain(self, module: str, term: Term) -> bool:
        """Say whether ``term`` is the only one of its size that ``module`` saw."""
        seen = {resolve(use.term) for use in self.near(module) if use.term.size == term.size}
        return len(seen) == 1

    def near(self, module: str) -> list[Use]:
        """Return the uses of ``module`` and of the modules directly within it."""
        if not self.uses:
            for use in self.analysis.uses:
                for place in {use.module, use.module.rpartition(".")[0]}:
                    self.uses.setdefault(place, []).append(use)
        return self.uses.get(module, [])

    def structure(self, claims: Claim) -> Structure:
        """Return a structure of all groups under ``claims``."""
        groups = sorted(self.groups.values(), key=lambda group: self.places[group.name])
        return Structure(self.analysis, groups, self.refused, self.axes, {**self.known, **claims})

    # -- trying -------------------------------------------------------------------------------------------------------
    def verify(self) -> None:
        """Try the cuts, all at once first; refuse the groups whose cut fails."""
        if not self.groups:
            return
        trial = _Trial(self.model, self.example, self.traced, self.analysis)
        everything = list(self.groups.values())
        claims: Claim = {}
        clear = True
        for group in everything:
            for place, term in self.hypotheses(group)[0].items():
                clear = clear and resolve(claims.setdefault(place, term)) == term
        if clear and trial.all_fail(self.structure(claims), everything) is None:
            self.claims = claims
            return
        ranks = {"heads": 0, "features": 1, "channels": 2, "width": 3}
        for group in sorted(everything, key=lambda each: ranks[each.kind]):
            if group.name not in self.groups:
                continue  # joined to an earlier one
            owner = type(self.modules.get(_home(group.name)))
            if owner in self.joint and self._couple(trial, group.name, self.axes) is not None:
                continue
            self.settle(trial, group)
            if group.name in self.failed and self._couple(trial, group.name, self.failed):
                self.joint.add(owner)
        self._together(trial)

    def settle(self, trial: _Trial, group: Group) -> None:
        """Find the attributes under which the cut of ``group`` works, or refuse it."""
        first: Refusal | None = None
        for claim in self.hypotheses(group):
            failure = trial.failure(self.structure({**self.claims, **claim}), [group])
            if failure is None:
                self.claims.update(claim)
                names = frozenset(leaf for _, leaf in claim)
                if names not in self.liked:
                    self.liked.append(names)
                return
            first = first or failure
        # Without one unit only, few sizes fit by chance, so the line that stops is the line to blame.
        self.refuse(group, trial.failure(self.structure(self.claims), [group], 0) or first)

    def _couple(self, trial: _Trial, name: str, among: Mapping[str, Axis]) -> bool | None:
        """Cut key and value features together, since one attribute may size both.

        Args:
            trial: tries cuts.
            name: a group that fails alone, or of a class of modules in which such groups do.
            among: groups, by name, that its partner is looked for among.

        Returns:
            Whether that works, or ``None`` where there is no partner.
        """
        axis = among[name]
        for other, partner in among.items():
            if axis.size != partner.size or axis.root() is partner.root() or _home(name) != _home(other):
                continue
            keys, values = (name, other) if "features" in axis.marks else (other, name)
            if "features" not in among[keys].marks or among[values].marks & {"features", "values"} != {"values"}:
                continue
            first, second = among[keys], among[values]
            for held in (self.groups, self.axes, self.failed):
                for each in (keys, values):
                    held.pop(each, None)
            self.refused = [each for each in self.refused if each.name not in {keys, values}]
            unify(first, second)
            self.settle(trial, self.offer(keys, first.root()))
            return keys in self.groups
        return None

    def _together(self, trial: _Trial) -> None:
        """Refuse groups that pass alone and fail with the others."""
        left = list(self.groups.values())
        if not left or trial.all_fail(self.structure(self.claims), left) is None:
            return
        fine: list[Group] = []
        for group in left:
            failure = trial.all_fail(self.structure(self.claims), [*fine, group])
            if failure is None:
                fine.append(group)
            else:
                self.refuse(group, failure)

    def refuse(self, group: Group, failure: Refusal | None) -> None:
        """Move ``group`` to the refusals."""
        axis = self.failed[group.name] = self.axes.pop(group.name)
        del self.groups[group.name]
        line = failure.line if failure else None
        if line is None:
            lines = [use.line for use in self.analysis.uses if any(axis is a for a in axes(use.term)) and use.line]
            line = lines[-1] if lines else None
        self.refused.append(Refusal(group.name, failure.reason if failure else "its cut fails", line))


def _plausible(leaf: str, term: Term) -> bool:
    """Say whether an attribute called ``leaf`` may be the size of ``term``, going by its name."""
    word = leaf.lower()
    measure = any(part in word for part in ("dim", "size", "width", "features", "channels", "embed", "hidden", "d_"))
    count = not measure and ("head" in word or "group" in word or word in {"h", "nh", "n", "num"})
    if all("heads" in axis.marks for axis in axes(term)):
        return count
    return not count


class _Trial:
    """Cuts a unit of each group given from a copy of the model, and compares the outputs with the masked copy's."""

    def __init__(self, model: nn.Module, example: Inputs, traced: Traced, analysis: Analysis) -> None:
        self.example = example
        self.traced, self.analysis = traced, analysis
        plain = evaluated(model)
        self.base = copy.deepcopy(plain)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            # Parameters that are zero or small would hide what they multiply: attention that hardly depends on its
            # scores gives the same outputs however its heads are divided.
            for value in self.base.parameters():
                if value.is_floating_point():
                    noise = torch.randn(value.shape, generator=generator).to(value)
                    value.add_(noise * (max(value[:1].numel(), 1) ** -0.5 if value.ndim > 1 else 0.3))
        if not all(bool(torch.isfinite(leaf).all()) for leaf in self.outputs(self.base)):
            self.base = plain
        self.held = [*self.base.parameters(), *self.base.buffers()]
        self.replayable = self.differs(self.outputs(self.base), self.base, {}) is None

    def outputs(self, model: nn.Module) -> list[Tensor]:
        """Return the floating-point tensors that ``model`` gives."""
        with torch.no_grad():
            leaves = pytree.tree_leaves(call(model, self.example))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]

    def all_fail(self, found: Structure, groups: Sequence[Group]) -> Refusal | None:
        """Return what goes wrong when all of ``groups`` are cut, or the exact ones alone (whose outputs count)."""
        exact = [group for group in groups if group.exact]
        for first in (1, 2) if len(groups) > 1 else (2,):
            failure = self.failure(found, exact, first) if exact else None
            failure = failure or (self.failure(found, groups, first) if len(exact) < len(groups) else None)
            if failure is not None:
                return failure
        return None

    def failure(self, found: Structure, groups: Sequence[Group], first: int = 2) -> Refusal | None:
        """Return what goes wrong when some units of each of ``groups`` are cut, or ``None``.

        Neighbouring groups lose different numbers of units, so that none passes because another shrank as much.
        """
        keep: dict[str, list[int]] = {}
        for place, group in enumerate(groups):
            gone = min(1 + (first + place) % 3, group.size - 1)
            start = (group.size - gone) // 3
            keep[group.name] = [index for index in range(group.size) if not start <= index < start + gone]
        try:
            sliced = found.slice(keep).rewrite(shell(self.base))
            after = self.outputs(sliced)
        except Exception as error:  # whatever the user's forward raises when its sizes change
            line, source = user_line(error.__traceback__)
            text = (str(error).splitlines() or [""])[0][:160]
            return Refusal("", f"the sliced model fails: {text}", f"{line}: {source}" if line else None)
        if self.replayable and (refusal := self.differs(after, sliced, found.masks(keep))) is not None:
            return refusal
        masked = shell(self.base)
        for group in groups:
            for name in found.tensors(group.name):
                module, leaf = owner_of(masked, name)
                old = getattr(module, leaf)
                if any(old is value for value in self.held):
                    replace_everywhere(masked, old, parameter_like(old, old.detach().clone()))
        found.mask_(masked, keep)
        before = self.outputs(masked)
        if [leaf.shape for leaf in before] != [leaf.shape for leaf in after]:
            return Refusal("", "the sliced model gives outputs of other shapes", None)
        if not all(bool(torch.isfinite(leaf).all()) for leaf in after):
            return Refusal("", "the sliced model gives infinite outputs", None)
        if all(group.exact for group in groups) and not _close(before, after):
            return Refusal("", "the sliced model gives other outputs than the masked one", None)
        return None

    def differs(self, after: list[Tensor], sliced: nn.Module, masks: Mapping[Axis, Tensor]) -> Refusal | None:
        """Return a refusal where ``sliced`` gave other outputs than the trace does at its sizes."""
        held: dict[str, Tensor] = dict(sliced.named_parameters(remove_duplicate=False))
        held.update(sliced.named_buffers(remove_duplicate=False))
        inputs = [leaf for leaf in pytree.tree_leaves(self.example) if isinstance(leaf, Tensor)]
        try:
            with torch.no_grad():
                expected = replay(self.traced, self.analysis, masks, held, inputs)
        except Exception as error:  # the graph cannot run at these sizes
            text = (str(error).splitlines() or [""])[0][:160]
            return Refusal("", f"the sliced model fails: its trace does not run at the new sizes: {text}", None)
        if [leaf.shape for leaf in expected] != [leaf.shape for leaf in after] or not _close(expected, after):
            return Refusal("", "the sliced model does not compute at the new sizes what it did at the old ones", None)
        return None


def _close(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    for a, b in zip(left, right, strict=True):
        if a.numel() and float((a - b).abs().max()) > _TOLERANCE * max(float(a.abs().max()), 1e-3):
            return False
    return True


def structure(model: nn.Module, example: Inputs, *, ignore: Sequence[str] = ()) -> Structure:
    """Find what can be cut in ``model``.

    Args:
        model: any module that ``torch.export`` can trace; left as it is. It is examined in evaluation mode.
        example: what its forward takes; of a batch, the first two samples are used.
        ignore: globs of module names that must stay as they are.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> found = structure(model, torch.randn(4, 3))
        >>> [(group.name, group.size, group.parameters) for group in found.groups]
        [('0', 8, 6)]
        >>> found.slice({"0": [1, 5, 6]}).rewrite(model)[0]
        Linear(in_features=3, out_features=3, bias=True)

    Raises:
        Untraceable: the forward pass cannot be traced; the user's line is named.
    """
    small = few(example)
    finder = _Finder(model, small, trace(model, small), ignore)
    finder.collect()
    finder.verify()
    return finder.structure(finder.claims)
