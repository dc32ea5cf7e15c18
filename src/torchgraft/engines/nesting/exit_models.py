"""Elastic encoders: a model that is left after fewer layers and in fewer coordinates, the original beside it.

All smaller budgets share one copy of the model, on which training runs with all its layers; the full budget runs the
frozen original. Where a model can be left, and how its vectors are read there, stands in ``exits``.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from torch import nn

from torchgraft.bench.meters import macs
from torchgraft.bench.task import Task, take
from torchgraft.bench.training import Objective, train
from torchgraft.engines.depth import Stack
from torchgraft.engines.nesting.elastic import ElasticModule, ElasticProcedure
from torchgraft.engines.nesting.exits import Exits, Place, exits, level_edits
from torchgraft.engines.nesting.nested import Nested
from torchgraft.engines.nesting.train import calibrate
from torchgraft.engines.sites import Refusal, Site
from torchgraft.engines.surgery.edits import Edit
from torchgraft.errors import BadInput

__all__ = ["Exit", "ExitElastic", "ExitProcedure", "Menu", "shared_copy"]

#: For each smaller budget: layers that run, and the numbers of coordinates it may give, the one it starts with last.
Menu = tuple[tuple[int, tuple[int, ...]], ...]
#: How far apart two budgets are at least.
_APART = 0.02


class ExitElastic(ElasticModule):
    """The frozen original beside one copy of it that all smaller budgets leave early.

    Args:
        full: the original, which the full budget runs; its parameters are frozen.
        nested: a level for every pair of layers and coordinates of ``menu``, in its order.
        found: where the copy is left.
        menu: see :data:`Menu`.
        budgets: see :class:`ElasticModule`; each is counted with the coordinates that it starts with.
    """

    def __init__(self, full: nn.Module, nested: Nested, found: Exits, menu: Menu, budgets: Sequence[float]) -> None:
        super().__init__(budgets)
        if len(budgets) != len(menu) + 1 or len(nested.edits) != sum(len(dims) for _, dims in menu):
            raise BadInput(f"a menu of {len(menu)} rows and {len(nested.edits)} levels do not make {budgets}")
        self.full = full.requires_grad_(False)
        self.nested, self.found, self.menu = nested, found, menu
        self.dim: int | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Layers that run and coordinates that are given at the budget that is set."""
        if self.level == len(self.menu):
            return self.found.layers, self.found.width
        layers, dims = self.menu[self.level]
        return layers, dims[-1] if self.dim is None else self.dim

    def keep(self, dim: int | None) -> ExitElastic:
        """Give the first ``dim`` coordinates at all smaller budgets from the next call on; ``None``: as they start.

        Raises:
            BadInput: one of them cannot.
        """
        poor = [dims for _, dims in self.menu if dim is not None and dim not in dims]
        if poor:
            raise BadInput(f"dim must be one of {list(poor[0])}, got {dim}")
        self.dim = dim
        self.select(self.level)
        return self

    def select(self, level: int) -> None:
        """Leave the copy where ``menu[level]`` says, or run the original at the last level."""
        if level < len(self.menu):
            before, dims = sum(len(each) for _, each in self.menu[:level]), self.menu[level][1]
            self.nested.use(before + (len(dims) - 1 if self.dim is None else dims.index(self.dim)))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network of the budget that is set."""
        return (self.full if self.level == len(self.menu) else self.nested)(*args, **kwargs)


class Exit(Edit):
    """Put a copy of the model that can be left early beside the model.

    Args:
        stacks: name, first block, number of blocks and number of children of each stack.
        places: (module, side) of each stack's vector.
        width: coordinates of the vectors.
        menu: see :data:`Menu`.
        budgets: shares of the full model's multiply-accumulates, the last one 1.
    """

    op: ClassVar[str] = "exit"
    stacks: tuple[tuple[str, int, int, int], ...]
    places: tuple[tuple[str, Literal["output", "input"]], ...]
    width: int
    menu: Menu
    budgets: tuple[float, ...]

    @classmethod
    def of(cls, found: Exits, menu: Menu, budgets: Sequence[float] = ()) -> Exit:
        """Return the edit for exits instead of records."""
        return cls(
            stacks=tuple((each.name, each.first, each.length, each.size) for each in found.stacks),
            places=tuple((place.name, place.side) for place in found.places),
            width=found.width,
            menu=menu,
            budgets=tuple(budgets),
        )

    def rewrite(self, model: nn.Module) -> nn.Module:
        """Return the elastic model."""
        elastic = ExitElastic(model, self.nested(model), self.found, self.menu, self.budgets)
        return elastic.train(model.training)

    @property
    def found(self) -> Exits:
        """The exits."""
        made = [Stack(*each, parameters=(), loops=False) for each in self.stacks]
        return Exits(tuple(made), tuple(Place(*place) for place in self.places), self.width)

    def nested(self, model: nn.Module) -> Nested:
        """Return the copy with a level for every pair of the menu."""
        pairs = [(layers, dim) for layers, dims in self.menu for dim in dims]
        net = copy.deepcopy(model).requires_grad_(True)
        return Nested(net, [level_edits(self.found, layers, dim) for layers, dim in pairs]).train(model.training)

    def describe(self) -> dict[str, str]:
        """Return after how many layers, and with how many coordinates, each stack may be left."""
        rows = [f"{layers} layers with {' or '.join(map(str, dims))} coordinates" for layers, dims in self.menu]
        return {name: f"may be left after {'; '.join(rows)}" for name, *_ in self.stacks}


class ExitProcedure(ElasticProcedure):
    """An elastic procedure that leaves a model early; a subclass says the menu and the loss.

    Args:
        lr: highest learning rate; default: the task's.
    """

    def __init__(self, *, lr: float | None = None) -> None:
        if lr is not None and not lr > 0:
            raise BadInput(f"lr must be positive, got {lr}")
        self.lr = lr

    @abstractmethod
    def menu(self, layers: int, width: int) -> Menu:
        """Return the smaller budgets of encoders of that many layers and coordinates, rising in layers."""

    @abstractmethod
    def objective(self, found: Exits, task: Task, *, seed: int) -> Objective:
        """Return the loss of a step, as a function of the copy with all its layers."""

    def applies_to(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Site]:
        """Return the layers of the stacks that can be left early."""
        try:
            found = _exits(model, task, ignore)
            self._checked(found)
        except BadInput:
            return []
        sizes = [zip(stack.blocks, stack.parameters, strict=True) for stack in found.stacks]
        return [Site(name, "layer", 1, parameters) for stack in sizes for name, parameters in stack]

    def refusals(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Refusal]:
        """Return why the model cannot be left early."""
        try:
            self._checked(_exits(model, task, ignore))
        except BadInput as error:
            return [Refusal(type(model).__name__, str(error))]
        return []

    def _checked(self, found: Exits) -> Menu:
        rows = self.menu(found.layers, found.width)
        if not rows:
            raise BadInput(f"{found.layers} layers and {found.width} coordinates leave no smaller size")
        wrong = [
            row for row in rows if not 1 <= row[0] <= found.layers or not 1 <= min(row[1]) <= max(row[1]) <= found.width
        ]
        if wrong:
            raise BadInput(f"it has {found.layers} layers and {found.width} coordinates, a size asks for {wrong[0]}")
        return rows

    def plan(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = (), seed: int = 0) -> list[Edit]:
        """Return the edit that puts the copy beside the model; it declares what each size costs."""
        found = _exits(model, task, ignore)
        example = take(task.train.inputs, slice(0, task.batch_size))
        whole, menu = macs(model, example), self._checked(found)
        starts = Exit.of(found, tuple((layers, dims[-1:]) for layers, dims in menu)).nested(model)
        budgets: list[float] = []
        rows: list[tuple[int, tuple[int, ...]]] = []
        for level, row in enumerate(menu):
            share = macs(starts.use(level), example) / whole
            if (budgets[-1] if budgets else 0.0) + _APART < share < 1.0 - _APART:
                budgets.append(share)
                rows.append(row)
        if not rows:
            raise BadInput("leaving early saves nothing here: the layers are a small part of the model")
        return [Exit.of(found, tuple(rows), (*budgets, 1.0))]

    def initialise(self, elastic: ElasticModule, task: Task, *, seed: int = 0) -> None:
        """Measure the statistics of the batch norms at every size."""
        calibrate(self._own(elastic).nested, task, seed=seed)

    def train(
        self, elastic: ElasticModule, task: Task, *, steps: int, seed: int = 0, deadline: float | None = None
    ) -> int:
        """Train the copy, all its layers, by the method's loss; the original stays."""
        own = self._own(elastic)
        if steps < 0:
            raise BadInput(f"steps must not be negative, got {steps}")
        if steps == 0:
            return 0
        level = own.nested.level
        record = train(
            own.nested,
            task.train,
            self.objective(own.found, task, seed=seed),
            steps=steps,
            batch_size=task.batch_size,
            lr=task.learning_rate if self.lr is None else self.lr,
            seed=seed,
            deadline=deadline,
        )
        calibrate(own.nested, task, seed=seed)
        own.nested.use(level)
        own.eval()
        return record.steps

    def _own(self, elastic: ElasticModule) -> ExitElastic:
        if not isinstance(elastic, ExitElastic):
            raise BadInput(f"{self.card.key} trains what it built, got {type(elastic).__name__}")
        return elastic


def _exits(model: nn.Module, task: Task, ignore: Sequence[str]) -> Exits:
    return exits(model, take(task.train.inputs, slice(0, 2)), ignore=ignore)


def shared_copy(model: nn.Module) -> nn.Module:
    """Return the copy with all its layers, where ``model`` is what :class:`ExitProcedure` trains."""
    if not isinstance(model, Nested):
        raise BadInput(f"exits are those of a Nested, got {type(model).__name__}")
    return model.net
