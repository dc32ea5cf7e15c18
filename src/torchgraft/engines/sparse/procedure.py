"""Procedures that end in sparse layers: which layers can be sparse, where that pays, and how many weights each keeps.

A pruning method says which weights are worth keeping; :class:`SparseProcedure` is for those that look at the weights
alone, :class:`SparseTraining` for those that train.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn

from torchgraft.bench.task import Task
from torchgraft.engines.masks import make_permanent
from torchgraft.engines.procedure import Procedure, Refusal, Site, check_strength, ignored
from torchgraft.engines.sparse.choose import Crossover
from torchgraft.engines.sparse.gradual import fitting_rows
from torchgraft.engines.sparse.layers import Sparsify, is_pointwise
from torchgraft.engines.sparse.pattern import kept_blocks
from torchgraft.engines.sparse.timing import layer_crossover, reached
from torchgraft.engines.surgery.edits import Edit, apply_edits
from torchgraft.errors import BadInput

__all__ = ["SparseProcedure", "SparseTraining"]

_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: Bytes that the pattern's own entry takes in a file.
_ENTRY = 128
#: A layer that is faster from a lower sparsity on is not mentioned among those left dense.
_WORTH_SAYING = 0.25

_Self = TypeVar("_Self", bound="SparseProcedure")


class SparseProcedure(Procedure):
    """Sparse linear layers and 1x1 convolutions; strength is how few weights stay, as (1 - most) ** strength.

    The first and the last layer stay dense. Layers become sparse where that pays: in time, as measured on this machine
    at the number of tokens or pixels that the task's example brings, or, where latency does not count, in bytes.

    Args:
        block: consecutive output channels that share a pattern: 1, 2 or 4, halved where it does not divide.
        most: the sparsity at strength 1.
        timed: whether only layers that are measured to be faster become sparse.

    Raises:
        BadInput: a setting is out of range.
    """

    def __init__(self, *, block: int, most: float, timed: bool) -> None:
        if block not in (1, 2, 4) or not 0.0 < most < 1.0:
            raise BadInput(f"block must be 1, 2 or 4 and most in (0, 1), got block {block}, most {most}")
        self.block = block
        self.most = most
        self.timed = timed

    def for_costs(self: _Self, costs: Sequence[str]) -> _Self:
        """Return this procedure, without timing where latency does not count; then every layer takes one backend."""
        if "latency" in costs:
            return self
        untimed = copy.copy(self)
        untimed.timed = False
        return untimed

    def _candidates(self, model: nn.Module, task: Task, ignore: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """Return the input shapes of layers between the first and the last that is called; tied ones are left out."""
        weighted = {name: module for name, module in model.named_modules() if isinstance(module, _WEIGHTED)}
        shapes = {name: tuple(x.shape) for name, x in reached(model, task.example, weighted).items()}
        owners = Counter(
            id(value) for module in model.modules() for value in module._parameters.values() if value is not None
        )
        return {
            name: shapes[name]
            for name in list(shapes)[1:-1]
            if is_pointwise(weighted[name])
            and owners[id(weighted[name].weight)] == 1
            and not ignored(name, ignore)
            and not (self.timed and self._foreign(weighted[name]))
        }

    @staticmethod
    def _foreign(layer: nn.Module) -> bool:
        weight = layer.get_parameter("weight")
        return not weight.is_cpu or weight.dtype != torch.float32

    def _crossover(self, layer: nn.Module, shape: tuple[int, ...]) -> Crossover:
        return layer_crossover(layer, shape, (fitting_rows(len(layer.get_parameter("weight")), self.block), 1))

    def applies_to(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Site]:
        """Return the layers that would be faster sparse, at full strength at least; all where nothing is timed."""
        sites = []
        for name, shape in self._candidates(model, task, ignore).items():
            layer = model.get_submodule(name)
            if self.timed and self._crossover(layer, shape).sparsity >= self.most:
                continue
            count = sum(value.numel() for value in layer.parameters())
            kind = "linear" if isinstance(layer, nn.Linear) else "layer"
            sites.append(Site(name, kind, layer.get_parameter("weight").numel(), count))
        return sites

    def refusals(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Refusal]:
        """Return for each layer where its dense product is measured to be the faster one."""
        if not self.timed:
            return []
        found = []
        for name, shape in self._candidates(model, task, ignore).items():
            meeting = self._crossover(model.get_submodule(name), shape)
            if meeting.sparsity >= self.most:
                ratio = meeting.ratio(1.0 - self.most)
                words = f"left dense: {self.most:.0%} sparse it takes {ratio:.2f}x of its dense time on this machine"
            elif meeting.sparsity >= _WORTH_SAYING:
                words = f"left dense up to a sparsity of {meeting.sparsity:.0%}, where dense is faster on this machine"
            else:
                continue
            found.append(Refusal(name, words))
        return found

    def kept(
        self, model: nn.Module, task: Task, strength: float, *, ignore: Sequence[str] = ()
    ) -> dict[str, tuple[int, int, int]]:
        """Return, for each layer for which it pays, the number of blocks to keep, and the rows and columns of one."""
        sparsity = 1.0 - (1.0 - self.most) ** strength
        found: dict[str, tuple[int, int, int]] = {}
        for name, shape in self._candidates(model, task, ignore).items():
            layer = model.get_submodule(name)
            rows, columns = layer.get_parameter("weight").flatten(1).shape
            r = fitting_rows(rows, self.block)
            kept = kept_blocks(rows, columns, (r, 1), sparsity)
            blocks = rows // r * columns
            if self.timed:
                pays = 1.0 - kept / blocks > self._crossover(layer, shape).sparsity
            else:
                pays = 4 * kept * r + kept + blocks // 255 + _ENTRY < 4 * rows * columns
            if pays:
                found[name] = (kept, r, 1)
        return found

    def plan(
        self, model: nn.Module, task: Task, strength: float, *, ignore: Sequence[str] = (), seed: int = 0
    ) -> list[Edit]:
        """Keep the largest blocks of each layer for which that pays."""
        kept = self.kept(model, task, strength, ignore=ignore)
        return [Sparsify(modules=kept, backend="auto" if self.timed else "kernel")] if kept else []


class SparseTraining(SparseProcedure):
    """A procedure that trains to find which weights stay, and carries the weights that it has trained.

    Where no layer pays, nothing is trained and the model stays as it is.
    """

    expense = 3

    @abstractmethod
    def pruned(
        self, model: nn.Module, task: Task, kept: Mapping[str, int], *, ignore: Sequence[str], seed: int
    ) -> nn.Module:
        """Return a trained copy of ``model``, with masks or zeros in the layers that are to be sparse.

        Args:
            model: the model; left as it was.
            task: only ``task.train`` is used.
            kept: layer name -> the blocks that its weight keeps, all others being zero.
            ignore: globs of module names that stay as they are.
            seed: of all that is drawn.
        """

    def apply(
        self, model: nn.Module, task: Task, strength: float, *, ignore: Sequence[str] = (), seed: int = 0
    ) -> nn.Module:
        """Return a copy of ``model``, trained, with sparse layers. See :meth:`Procedure.apply`."""
        if check_strength(strength) == 0.0 or not self.applies_to(model, task, ignore=ignore):
            return super().apply(model, task, strength, ignore=ignore, seed=seed)
        edits = self.plan(model, task, strength, ignore=ignore, seed=seed)
        kept = {name: blocks for e in edits if isinstance(e, Sparsify) for name, (blocks, *_) in e.modules.items()}
        if not kept:
            return apply_edits(model, [])
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            trained = self.pruned(model, task, kept, ignore=ignore, seed=seed)
        return apply_edits(make_permanent(trained), edits)
