"""Which slices a nested network has: the order of the units, and how many of them each level keeps.

The units of every group of coupled dimensions (``engines.surgery.slicing``) are put in one order, the most important
first; a level keeps the first of each group. So a narrower level lies within every wider one.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchgraft.bench.meters import macs
from torchgraft.bench.task import Inputs, Task, call, take
from torchgraft.engines.depth import LayerPath, Stack, stacks
from torchgraft.engines.nesting.nested import Arrange, Nest, Nested
from torchgraft.engines.surgery.axes import Axis, Sum, Term, resolve
from torchgraft.engines.surgery.edits import Edit
from torchgraft.engines.surgery.slicing import Slice, runs_of
from torchgraft.engines.surgery.trace import shell
from torchgraft.engines.width import Study, calibration, gradient_products, prepare
from torchgraft.errors import BadInput

__all__ = [
    "Plan",
    "arrange",
    "grid",
    "importance",
    "nest",
    "nest_beside",
    "ordered",
    "paths",
    "same",
    "uncompounded",
    "unit_counts",
]

_TOLERANCE = 1e-4  # of the largest output: sums in another order differ by about 1e-6
_ROUNDS = 12


def _lay(term: Term, order: Mapping[Axis, Tensor], counts: Mapping[Axis, int]) -> tuple[Tensor, Tensor]:
    """Return the old indices of ``term`` in their new order, and which of them belong to units below ``counts``."""
    term = resolve(term)
    if isinstance(term, Axis):
        index = order.get(term)
        index = torch.arange(term.size) if index is None else index
        return index, torch.arange(len(index)) < counts.get(term, len(index))
    index, flag = torch.zeros(1, dtype=torch.long), torch.ones(1, dtype=torch.bool)
    if isinstance(term, Sum):
        found, flags, start = [], [], 0
        for part in term.terms:
            inner, inside = _lay(part, order, counts)
            found.append(inner + start)
            flags.append(inside)
            start += part.size
        return torch.cat(found), torch.cat(flags)
    for part in term.terms:
        inner, inside = _lay(part, order, counts)
        index = (index[:, None] * part.size + inner).reshape(-1)
        flag = (flag[:, None] & inside).reshape(-1)
    return index, flag


@dataclass(frozen=True)
class Plan:
    """The edits of a nested network: ``base`` makes the widest one, ``levels`` are cut from it."""

    base: tuple[Edit, ...]
    levels: tuple[tuple[Edit, ...], ...]


def arrange(
    found: Study,
    order: Mapping[str, Sequence[int]],
    counts: Sequence[Mapping[str, int]],
    *,
    whole: bool = False,
) -> Plan:
    """Return the edits by which level ``l`` keeps the first ``counts[l][group]`` units of ``order[group]``.

    Args:
        found: the model's study.
        order: by group, its units, the first to be kept the longest; groups left out stay as they are.
        counts: by level and group, the units kept; groups left out of a level are kept whole.
        whole: keep all units in the shared weights, although no level uses some of them.
    """
    sizes = {name: found.groups[name].size for name in order}
    full = [{name: int(level.get(name, sizes[name])) for name in order} for level in counts]
    widest = sizes if whole else {name: max(level[name] for level in full) for name in order}
    by_axis = {
        found.structure.axis(name): torch.tensor(list(units[: widest[name]]), dtype=torch.long)
        for name, units in order.items()
    }
    dims: dict[str, dict[int, Term]] = {}
    values = found.structure._analysis.tensors
    for name in order:
        for tensor, places in found.structure.tensors(name).items():
            for place in places:
                dims.setdefault(tensor, {})[place] = values[tensor].dims[place]
    tensors: dict[str, dict[int, tuple[int, ...]]] = {}
    for tensor, terms in dims.items():
        for dim, term in terms.items():
            index, _ = _lay(term, by_axis, {})
            if index.tolist() != list(range(term.size)):
                tensors.setdefault(tensor, {})[dim] = tuple(index.tolist())
    prefix = found.structure.slice({name: range(count) for name, count in widest.items()})
    base: list[Edit] = [*found.prelude]
    if tensors:
        base.append(Arrange(tensors=tensors, attributes=prefix.attributes))
    levels: list[tuple[Edit, ...]] = []
    for level in full:
        by_count = {found.structure.axis(name): count for name, count in level.items()}
        cuts: dict[str, dict[int, tuple[tuple[int, int], ...]]] = {}
        for tensor, terms in dims.items():
            for dim, term in terms.items():
                _, flag = _lay(term, by_axis, by_count)
                if not bool(flag.all()):
                    cuts.setdefault(tensor, {})[dim] = runs_of(flag)
        if not cuts:
            levels.append(())
            continue
        sized = found.structure.slice({name: range(count) for name, count in level.items()})
        units = {name: (count, sizes[name]) for name, count in level.items()}
        levels.append((Slice(tensors=cuts, attributes=sized.attributes, units=units),))
    return Plan(tuple(base), tuple(levels))


def importance(found: Study, task: Task, *, samples: int = 256, seed: int = 0) -> dict[str, Tensor]:
    """Return by group the mean over batches of |sum of gradient times weight| over each unit, (size,)."""
    split = calibration(task, samples, seed)
    total = {name: torch.zeros(group.size, dtype=torch.float64) for name, group in found.groups.items()}
    for products in gradient_products(found.model, task, split, task.batch_size):
        for name in total:
            total[name] += found.structure.unit_scores(name, products).abs()
    return total


def ordered(found: Study, scores: Mapping[str, Tensor], example: Inputs) -> dict[str, list[int]]:
    """Return the units of each group, best first; where the model is not the same in that order, as they stand."""
    order = {name: torch.argsort(value, descending=True, stable=True).tolist() for name, value in scores.items()}
    if same(found, order, example):
        return order
    return {
        name: units if same(found, {name: units}, example) else list(range(len(units))) for name, units in order.items()
    }


def same(found: Study, order: Mapping[str, Sequence[int]], example: Inputs) -> bool:
    """Say whether the model gives the same outputs with its units in ``order``."""
    plan = arrange(found, order, [{}], whole=True)
    model = shell(found.model)
    for edit in plan.base[len(found.prelude) :]:
        model = edit.rewrite(model)
    with torch.no_grad():
        pairs = zip(_leaves(call(found.model, example)), _leaves(call(model, example)), strict=True)
        return all(float((a - b).abs().max()) <= _TOLERANCE * max(float(a.abs().max()), 1e-3) for a, b in pairs)


def _leaves(output: object) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel()]


def unit_counts(found: Study, share: float, *, multiple: int = 1) -> dict[str, int]:
    """Return by group ``share`` of its units, rounded: at least one, a ``multiple`` where the group is large."""
    counts = {}
    for name, group in found.groups.items():
        count = max(1, round(share * group.size))
        if count >= multiple and group.size >= 4 * multiple:
            count = round(count / multiple) * multiple
        counts[name] = min(max(count, 1), group.size)
    return counts


def paths(found: Sequence[Stack], share: float) -> tuple[LayerPath, ...]:
    """Return the edits that keep the first ``share`` of the layers of every stack, rounded up."""
    made = []
    for stack in found:
        count = max(math.ceil(share * stack.length - 1e-9), stack.least)
        if count < stack.length:
            made.append(LayerPath(name=stack.name, size=stack.size, path=stack.absolute(range(count))))
    return tuple(made)


def uncompounded(found: Study) -> Study:
    """Return the study without the features of heads where heads can be cut, so that the two do not compound."""
    if not any(group.kind == "heads" for group in found.groups.values()):
        return found
    groups = {name: group for name, group in found.groups.items() if group.kind != "features"}
    return dataclasses.replace(found, groups=groups)


def grid(widths: Sequence[float], depths: Sequence[float] = (1.0,)) -> list[dict[str, float]]:
    """Return every config of shares of width and depth, both rising.

    Example:
        >>> grid((0.5, 1.0))
        [{'width': 0.5, 'depth': 1.0}, {'width': 1.0, 'depth': 1.0}]

    Raises:
        BadInput: a share lies outside (0, 1], or there is none.
    """
    for name, shares in (("width", widths), ("depth", depths)):
        if not shares or any(not 0.0 < share <= 1.0 for share in shares):
            raise BadInput(f"shares of {name} must lie in (0, 1], at least one, got {tuple(shares)}")
    return [{"width": float(w), "depth": float(d)} for d in sorted(set(depths)) for w in sorted(set(widths))]


def nest(
    model: nn.Module,
    example: Inputs,
    configs: Sequence[Mapping[str, float]],
    *,
    ignore: Sequence[str] = (),
    scores: Mapping[str, Tensor] | None = None,
) -> Nested:
    """Return a copy of ``model`` as one nested set of weights in which each of ``configs`` is a level.

    Args:
        model: the model, trained or not; left as it was.
        example: inputs for its trace.
        configs: shares of ``width`` (units of every group) and ``depth`` (layers of every stack); 1 where left out.
        ignore: globs of module names that must stay as they are.
        scores: by group, the importance of its units; without, they stand as they are.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> nested = nest(net, torch.ones(2, 2), grid((0.25, 0.5, 1.0)))
        >>> nested.select({"width": 0.25, "depth": 1.0}).skeleton()[0].weight.shape
        torch.Size([2, 2])

    Raises:
        BadInput: nothing in the model can be nested, or a share is out of range.
        Untraceable: the model cannot be traced.
    """
    for config in configs:
        grid((config.get("width", 1.0),), (config.get("depth", 1.0),))
    found = uncompounded(prepare(model, example, ignore=ignore))
    layers = stacks(found.model, example) if any(config.get("depth", 1.0) < 1 for config in configs) else []
    if not found.groups and not layers:
        raise BadInput(f"nothing in {type(model).__name__} can be nested")
    order = (
        {name: list(range(group.size)) for name, group in found.groups.items()}
        if scores is None
        else ordered(found, scores, example)
    )
    counts = [unit_counts(found, config.get("width", 1.0)) for config in configs]
    plan = arrange(found, order, counts, whole=True)
    net: nn.Module = shell(model)
    for edit in plan.base:
        net = edit.rewrite(net)
    levels = [
        (*level, *paths(layers, config.get("depth", 1.0))) for level, config in zip(plan.levels, configs, strict=True)
    ]
    return Nested(copy.deepcopy(net), levels, configs).train(model.training)


def nest_beside(
    found: Study,
    scores: Mapping[str, Tensor],
    example: Inputs,
    budgets: Sequence[float],
    layers: Sequence[Stack] = (),
    depth: float = 0.0,
) -> Nest:
    """Return the edit that puts nested levels at about ``budgets`` beside the model; it declares what they truly cost.

    Args:
        found: the model's study.
        scores: by group, the importance of its units.
        example: inputs on which multiply-accumulates are counted.
        budgets: shares of the multiply-accumulates that are aimed at.
        layers: stacks that may lose layers.
        depth: a level of share b keeps the first b^depth of the layers, and as many units as are then right.
    """
    few = take(example, slice(0, 2))
    whole = macs(found.model, few)
    order = ordered(found, scores, few)

    def edits(share: float, kept: float) -> tuple[Edit, ...]:
        counts = unit_counts(found, share)
        return (found.structure.slice({name: range(count) for name, count in counts.items()}), *paths(layers, kept))

    def cost(share: float, kept: float) -> float:
        model = shell(found.model)
        for edit in edits(share, kept):
            model = edit.rewrite(model)
        return macs(model, few) / whole

    chosen: dict[float, tuple[float, float]] = {}
    for budget in sorted(budgets):
        kept = budget**depth
        low, high = 0.0, 1.0
        best = (cost(0.0, kept), 0.0)
        for _ in range(_ROUNDS):
            middle = (low + high) / 2
            price = cost(middle, kept)
            if abs(price - budget) < abs(best[0] - budget):
                best = (price, middle)
            low, high = (middle, high) if price < budget else (low, middle)
        if best[0] < 0.98 and all(abs(best[0] - other) > 0.02 for other in chosen):
            chosen[best[0]] = (best[1], kept)
    if not chosen:
        raise BadInput(f"no budget of {tuple(budgets)} can be met by cutting units")
    rising = sorted(chosen)
    plan = arrange(found, order, [unit_counts(found, chosen[price][0]) for price in rising])
    levels = [(*level, *paths(layers, chosen[price][1])) for level, price in zip(plan.levels, rising, strict=True)]
    return Nest.of(plan.base, levels, (*rising, 1.0))
