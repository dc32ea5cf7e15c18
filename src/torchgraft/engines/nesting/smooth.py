"""Put the units of a network in an order in which neighbours are alike: shortest paths through their weights.

The cities of a group of coupled dimensions (``engines.surgery.slicing``) are its units, each with all the weights that
make it and read it; a path through all of them is sought whose steps are short. The network stays the same function.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from torchgraft.bench.task import Inputs
from torchgraft.engines.nesting.slices import arrange, same
from torchgraft.engines.surgery.axes import owners
from torchgraft.engines.width import Study, prepare

__all__ = ["Smoothed", "permute_smooth", "shortest_path", "unit_weights", "variation"]


@dataclass(frozen=True)
class Smoothed:
    """A network with its units in another order.

    Args:
        model: the network.
        before: by group, the sum of distances between neighbouring units before.
        after: the same afterwards.
    """

    model: nn.Module
    before: dict[str, float]
    after: dict[str, float]


def unit_weights(found: Study, group: str) -> Tensor:
    """Return the weights that belong to each unit of ``group``, (units, weights)."""
    axis = found.structure.axis(group)
    rows = []
    for name, value in found.model.named_parameters():
        for dim in found.structure.tensors(group).get(name, ()):
            owner = owners(found.structure._analysis.tensors[name].dims[dim], axis)
            places = torch.stack([(owner == unit).nonzero()[:, 0] for unit in range(axis.size)])  # (units, each)
            rows.append(value.detach().movedim(dim, 0)[places].reshape(axis.size, -1))
    return torch.cat(rows, 1)


def variation(cities: Tensor) -> float:
    """Return the sum of absolute differences between neighbouring rows."""
    return float((cities[1:] - cities[:-1]).abs().sum())


def shortest_path(distance: Tensor, *, rounds: int = 50) -> list[int]:
    """Return a short path through all cities: the best of greedy starts and the order as it stands, bettered by 2-opt.

    Args:
        distance: symmetric (C, C).
        rounds: most sweeps over all pairs of edges.

    Example:
        >>> places = torch.tensor([0.0, 2.0, 1.0, 3.0])
        >>> path = shortest_path((places[:, None] - places[None, :]).abs())
        >>> min(path, path[::-1])
        [0, 2, 1, 3]
    """
    d = distance.double().numpy()
    count = len(d)

    def length(path: list[int]) -> float:
        return float(d[path[:-1], path[1:]].sum())

    def greedy(start: int) -> list[int]:
        path, left = [start], set(range(count)) - {start}
        while left:
            path.append(min(left, key=lambda city: (d[path[-1], city], city)))
            left.remove(path[-1])
        return path

    best = list(range(count))
    for path in (best, *(greedy(start) for start in range(min(count, 8)))):
        for _ in range(rounds):
            changed = False
            for i in range(count - 1):
                # Turning path[i..j] round replaces the edges before i and after j; the ends of a path are free.
                j = np.arange(i + 1, count)
                after = np.array(path)[np.minimum(j + 1, count - 1)]
                here = np.array(path)[j]
                gain = np.zeros(len(j))
                if i:
                    gain += d[path[i - 1], path[i]] - d[path[i - 1], here]
                gain += np.where(j + 1 < count, d[here, after] - d[path[i], after], 0.0)
                top = int(gain.argmax())
                if gain[top] > 1e-12:
                    end = int(j[top])
                    path = [*path[:i], *path[i : end + 1][::-1], *path[end + 1 :]]
                    changed = True
            if not changed:
                break
        best = min((best, path), key=length)
    return best


def permute_smooth(model: nn.Module, example: Inputs) -> Smoothed:
    """Return a copy of ``model`` whose units are in a smooth order; what it computes stays.

    Args:
        model: the network.
        example: inputs for its trace.

    Raises:
        Untraceable: the model cannot be traced.
    """
    found = prepare(model, example)
    before: dict[str, float] = {}
    after: dict[str, float] = {}
    for name in found.groups:
        cities = unit_weights(found, name)
        before[name] = after[name] = variation(cities)
        path = shortest_path(torch.cdist(cities.double(), cities.double(), p=1))
        if variation(cities[path]) >= before[name] or not same(found, {name: path}, example):
            continue
        plan = arrange(found, {name: path}, [{}], whole=True)
        # Applied one group at a time, so that a group's distances are those of its neighbours' new order.
        for edit in plan.base[len(found.prelude) :]:
            edit.rewrite(found.model)
        after[name] = variation(cities[path])
    return Smoothed(copy.deepcopy(found.model).train(model.training), before, after)
