"""Elastic encoders: a model whose vectors are read after fewer layers and in fewer coordinates, original beside it.

A model takes part where each of its stacks of layers (``engines.depth``) ends in one vector a sample: a module around
the stack returns it (a tower of a model of pairs), or the last linear layer takes it (a classifier), whose first
columns then read its first coordinates. What follows a stack, such as a norm and a pooling, is the same after any
number of layers. All smaller budgets share one copy of the model, on which training runs with all its layers; the
full budget runs the frozen original.
"""

from __future__ import annotations

import copy
import itertools
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.meters import macs
from torchgraft.bench.meters.forward import leaf_tensors, resting
from torchgraft.bench.task import Inputs, Task, call, take
from torchgraft.bench.training import Objective, train
from torchgraft.engines.depth import LayerPath, Stack, stacks
from torchgraft.engines.nesting.elastic import ElasticModule, ElasticProcedure
from torchgraft.engines.nesting.embed import Stored, cut
from torchgraft.engines.nesting.nested import Nested
from torchgraft.engines.nesting.stitch import blocks_of, standing
from torchgraft.engines.nesting.train import calibrate
from torchgraft.engines.sites import Refusal, Site, ignored
from torchgraft.engines.surgery.edits import Edit
from torchgraft.engines.surgery.trace import shell
from torchgraft.errors import BadInput

__all__ = [
    "Exit",
    "ExitElastic",
    "ExitProcedure",
    "Exits",
    "Menu",
    "Narrow",
    "Place",
    "Reading",
    "exits",
    "read",
    "shared_copy",
]

#: For each smaller budget: layers that run, and the numbers of coordinates it may give, the one it starts with last.
Menu = tuple[tuple[int, tuple[int, ...]], ...]
_APART = 0.02


@dataclass(frozen=True)
class Place:
    """Where a vector a sample, (B, D), stands in a model.

    Args:
        name: dotted name of a module.
        side: whether the vector is that module's ``"output"``, or the ``"input"`` of that linear layer.
    """

    name: str
    side: Literal["output", "input"]


@dataclass(frozen=True)
class Exits:
    """Where a model may be left early.

    Args:
        stacks: equally long stacks of layers.
        places: for each stack, where its vector stands.
        width: coordinates of the vectors.
    """

    stacks: tuple[Stack, ...]
    places: tuple[Place, ...]
    width: int

    @property
    def layers(self) -> int:
        """Layers of every stack."""
        return self.stacks[0].length


class _Cut(nn.Module):
    """A module whose output loses all but its first coordinates."""

    def __init__(self, inner: nn.Module, dim: int) -> None:
        super().__init__()
        self.inner, self.dim = inner, dim

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return cut(self.inner(*args, **kwargs), self.dim)


class _FirstColumns(nn.Module):
    """A linear layer that reads the first coordinates of its input by the first columns of its weight."""

    def __init__(self, inner: nn.Linear, dim: int) -> None:
        super().__init__()
        self.inner, self.dim = inner, dim

    def forward(self, x: Tensor) -> Tensor:
        return _first_columns(self.inner, cut(x, self.dim))


def _first_columns(linear: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, linear.weight[:, : x.shape[-1]], linear.bias)


class Narrow(Edit):
    """Keep the first coordinates of the vectors that stand at some places.

    Args:
        places: (module, ``"output"`` or ``"input"``) of each.
        dim: coordinates kept.
    """

    op: ClassVar[str] = "narrow"
    places: tuple[tuple[str, Literal["output", "input"]], ...]
    dim: int

    def rewrite(self, model: nn.Module) -> nn.Module:
        """Wrap the modules in place."""
        for name, side in self.places:
            try:
                inner = model.get_submodule(name)
            except AttributeError:
                raise BadInput(f"the model has no module {name!r}, whose vectors were to be cut") from None
            if side == "output":
                model.set_submodule(name, _Cut(inner, self.dim))
            elif isinstance(inner, nn.Linear):
                model.set_submodule(name, _FirstColumns(inner, self.dim))
            else:
                raise BadInput(f"{name!r} should be a linear layer, it is a {type(inner).__name__}")
        return model

    def describe(self) -> dict[str, str]:
        """Return how many coordinates are kept where."""
        return {name: f"the first {self.dim} coordinates" for name, _ in self.places}


def exits(model: nn.Module, example: Inputs, *, ignore: Sequence[str] = ()) -> Exits:
    """Return where ``model`` may be left early; it is run, not traced, and left as it was.

    Args:
        model: the model.
        example: inputs for it, two samples at least.
        ignore: globs of module names that must stay as they are.

    Example:
        >>> from torchgraft.bench.models import VisionTransformer
        >>> found = exits(VisionTransformer(d_model=8, depth=3, num_heads=2), torch.ones(2, 1, 8, 8))
        >>> found.layers, found.width, found.places
        (3, 8, (Place(name='head', side='input'),))

    Raises:
        BadInput: it cannot, with the reason.
    """
    found = [stack for stack in stacks(model, example) if not any(ignored(block, ignore) for block in stack.blocks)]
    if not found:
        raise BadInput("it has no stack of layers that it could stop in")
    lengths = {stack.length for stack in found}
    if len(lengths) > 1 or lengths == {1}:
        raise BadInput(f"its stacks have {', '.join(map(str, sorted(lengths)))} layers; they must be equal and above 1")
    seen, shapes = _vectors(model, found, example)
    for choice in itertools.product(*(_candidates(stack, found, seen, ignore) for stack in found)):
        width = seen[choice[0]]
        alike = len(set(choice)) == len(found) and all(seen[place] == width for place in choice)
        made = Exits(tuple(found), choice, width)
        if alike and width > 1 and _shapes_when_cut(model, made, example) == shapes and _decide(model, made, example):
            return made
    raise BadInput("its stacks do not end in one vector a sample each that could be cut and decides what it says")


def _vectors(model: nn.Module, found: Sequence[Stack], example: Inputs) -> tuple[dict[Place, int], list[torch.Size]]:
    """Return the widths of the vectors a sample that one pass shows, in order, and the shapes of its outputs."""
    inside = tuple(f"{block}." for stack in found for block in stack.blocks)
    seen: dict[Place, list[int]] = {}
    passed: list[bool] = []

    def look(name: str, side: Literal["output", "input"], value: Any = None) -> None:
        vector = passed and isinstance(value, Tensor) and value.ndim == 2 and value.is_floating_point()
        seen.setdefault(Place(name, side), []).append(value.shape[1] if vector else 0)

    handles: list[Any] = [
        model.get_submodule(stack.blocks[-1]).register_forward_hook(lambda m, args, out: passed.append(True))
        for stack in found
    ]
    for name, module in model.named_modules():
        if not name or f"{name}.".startswith(inside):
            continue
        if any(f"{stack.name}.".startswith(f"{name}.") for stack in found):
            handles.append(module.register_forward_hook(lambda m, args, out, at=name: look(at, "output", out)))
        if type(module) is nn.Linear:
            handles.append(module.register_forward_pre_hook(lambda m, args, at=name: look(at, "input", *args[:1])))
    try:
        with resting(model), torch.no_grad():
            output = call(model, example)
    finally:
        for handle in handles:
            handle.remove()
    kept = {place: widths[0] for place, widths in seen.items() if len(widths) == 1 and widths[0]}
    return kept, [leaf.shape for leaf in leaf_tensors(output)]


def _candidates(stack: Stack, found: Sequence[Stack], seen: Mapping[Place, int], ignore: Sequence[str]) -> list[Place]:
    """Return where the vector of ``stack`` may stand: modules around it, then the last linear layer."""
    around = [p for p in seen if p.side == "output" and f"{stack.name}.".startswith(f"{p.name}.")]
    around.sort(key=lambda place: -len(place.name))
    heads = [place for place in seen if place.side == "input"][-1:] if len(found) == 1 else []
    return [place for place in (*around, *heads) if not ignored(place.name, ignore)]


def _level(found: Exits, layers: int, dim: int) -> list[Edit]:
    """Return the edits that leave a model after ``layers`` layers and with ``dim`` coordinates."""
    made: list[Edit] = [
        LayerPath(name=stack.name, size=stack.size, path=stack.absolute(range(layers)))
        for stack in found.stacks
        if layers < found.layers
    ]
    places = tuple((place.name, place.side) for place in found.places)
    return made if dim == found.width else [*made, Narrow(places=places, dim=dim)]


def _said(model: nn.Module, found: Exits, layers: int, dim: int, example: Inputs) -> list[Tensor]:
    twin = shell(model).eval()
    for edit in _level(found, layers, dim):
        twin = edit.rewrite(twin)
    with torch.no_grad():
        return leaf_tensors(call(twin, example))


def _shapes_when_cut(model: nn.Module, found: Exits, example: Inputs) -> list[torch.Size] | None:
    try:
        return [leaf.shape for leaf in _said(model, found, found.layers, found.width // 2, example)]
    except (RuntimeError, ValueError, TypeError):  # what follows wants all coordinates
        return None


def _decide(model: nn.Module, found: Exits, example: Inputs) -> bool:
    """Say whether the vectors after one layer make the model say what it says after one layer."""
    with resting(model), torch.no_grad():
        seen = read(model, found, example, [1])
        made = leaf_tensors(seen.finish(*(view[1] for view in seen.views)))
    wanted = _said(model, found, 1, found.width, example)
    return all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(made, wanted, strict=True))


@dataclass(frozen=True)
class Reading:
    """The vectors of a model on a batch after some of its layers, their gradients with them.

    Args:
        model: the model.
        found: its exits.
        inputs: the batch.
        views: for each place, by number of layers, the vectors (B, D).
        hidden: what the last layer of each stack returned.
    """

    model: nn.Module
    found: Exits
    inputs: Inputs
    views: tuple[dict[int, Tensor], ...]
    hidden: tuple[Any, ...]

    def finish(self, *vectors: Tensor) -> Any:
        """Return what the model says where ``vectors`` (B, d), d <= D, stand at its places; no layer runs again."""

        def give(place: Place, vector: Tensor) -> Any:
            module = self.model.get_submodule(place.name)
            if place.side == "input" and isinstance(module, nn.Linear):
                return module.register_forward_hook(lambda m, args, out: _first_columns(m, vector))
            return module.register_forward_hook(lambda m, args, out: vector)

        handles = [give(place, vector) for place, vector in zip(self.found.places, vectors, strict=True)]
        try:
            with _resumed(self.model, self.found, self.hidden):
                return call(self.model, self.inputs)
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def _resumed(model: nn.Module, found: Exits, hidden: Sequence[Any]) -> Iterator[None]:
    """Let what was kept stand for all layers of every stack."""
    with ExitStack() as held:
        for stack, state in zip(found.stacks, hidden, strict=True):
            held.enter_context(standing(model, stack, [Stored(state)], rest=True))
        yield


@contextmanager
def _caught(model: nn.Module, found: Exits) -> Iterator[dict[int, Tensor]]:
    """Yield what will hold the vectors of the next pass, by number of the place."""
    kept: dict[int, Tensor] = {}
    handles: list[Any] = []
    for number, place in enumerate(found.places):
        module = model.get_submodule(place.name)
        if place.side == "output":
            handles.append(module.register_forward_hook(lambda m, args, out, at=number: kept.update({at: out})))
        else:
            handles.append(module.register_forward_pre_hook(lambda m, args, at=number: kept.update({at: args[0]})))
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def read(model: nn.Module, found: Exits, inputs: Inputs, layers: Sequence[int]) -> Reading:
    """Return the vectors after ``layers`` and after all layers; every layer runs once.

    Args:
        model: the model.
        found: its exits.
        inputs: a batch.
        layers: numbers of layers.
    """
    wanted = sorted({*layers, found.layers})
    if wanted[0] < 1 or wanted[-1] > found.layers:
        raise BadInput(f"layers must lie in [1, {found.layers}], got {wanted}")
    hidden: dict[tuple[int, int], Any] = {}

    def keep(layer: int, number: int) -> Any:
        return lambda module, args, output: hidden.update({(layer, number): output})

    handles = [
        blocks_of(model, stack)[layer - 1].register_forward_hook(keep(layer, number))
        for number, stack in enumerate(found.stacks)
        for layer in wanted
    ]
    views: tuple[dict[int, Tensor], ...] = tuple({} for _ in found.places)
    try:
        with _caught(model, found) as whole:
            call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    for layer in wanted:
        states = [hidden[layer, number] for number in range(len(found.stacks))]
        kept = whole
        if layer < found.layers:
            with _resumed(model, found, states), _caught(model, found) as kept:
                call(model, inputs)
        for number, view in enumerate(views):
            view[layer] = kept[number]
    last = tuple(hidden[found.layers, number] for number in range(len(found.stacks)))
    return Reading(model, found, inputs, views, last)


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
        return Nested(net, [_level(self.found, layers, dim) for layers, dim in pairs]).train(model.training)

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
