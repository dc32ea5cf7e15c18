"""Where a model's vectors can be read after fewer layers and in fewer coordinates, and reading them there.

A model takes part where each of its stacks of layers (``engines.depth``) ends in one vector a sample: a module around
the stack returns it (a tower of a model of pairs), or the last linear layer takes it (a classifier), whose first
columns then read its first coordinates. What follows a stack, such as a norm and a pooling, is the same after any
number of layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.meters.forward import leaf_tensors, resting
from torchgraft.bench.task import Inputs, call
from torchgraft.engines.depth import LayerPath, Stack, stacks
from torchgraft.engines.nesting.embed import Stored, cut
from torchgraft.engines.nesting.stitch import blocks_of, standing
from torchgraft.engines.sites import ignored
from torchgraft.engines.surgery.edits import Edit
from torchgraft.engines.surgery.trace import shell
from torchgraft.errors import BadInput

__all__ = ["Exits", "Narrow", "Place", "Reading", "exits", "level_edits", "read"]


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


def level_edits(found: Exits, layers: int, dim: int) -> list[Edit]:
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
    for edit in level_edits(found, layers, dim):
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
