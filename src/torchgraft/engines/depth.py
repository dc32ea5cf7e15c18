"""Stacks of layers: finding the blocks that can be skipped or repeated, and running or rewriting a model along a path.

A stack is a run of blocks inside one ``nn.ModuleList`` or ``nn.Sequential`` in which each block returns a tensor of
the shape that it takes and hands it, untouched, to the next; one block is enough where a block that changes the shape
leads it. That is observed on one forward pass, not read from code,
and then tried: a path that leaves a block out must call exactly the blocks that are left.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from torchgraft.bench.meters.forward import resting
from torchgraft.bench.task import Inputs, call, take
from torchgraft.engines.surgery.edits import Edit
from torchgraft.errors import BadInput

__all__ = ["LayerPath", "Pieces", "Stack", "container_of", "rewired", "set_children", "stacks"]


@dataclass(frozen=True)
class Stack:
    """Blocks that follow each other and keep the shape of what they pass on.

    Args:
        name: dotted name of the container.
        first: place of the first block among the container's children.
        length: number of blocks.
        size: number of the container's children.
        parameters: parameters of each block.
        loops: whether the model also runs with more blocks than it has (a loop over a fixed list of another length
            does not).
        least: how many layers a path must have: 0 where a block that changes the shape leads the stack, as at the
            head of a stage of a residual network, else 1.
    """

    name: str
    first: int
    length: int
    size: int
    parameters: tuple[int, ...]
    loops: bool
    least: int = 1

    @property
    def blocks(self) -> tuple[str, ...]:
        """Dotted names of the blocks."""
        prefix = f"{self.name}." if self.name else ""
        return tuple(f"{prefix}{self.first + i}" for i in range(self.length))

    def absolute(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Return ``layers``, counted from 0 within the stack, as places among all children of the container."""
        before = range(self.first)
        after = range(self.first + self.length, self.size)
        return (*before, *(self.first + layer for layer in layers), *after)

    def check(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Return ``layers`` where the model can run along them.

        Raises:
            BadInput: there are none, one does not exist, or the model cannot run more blocks than it has.
        """
        if len(layers) < self.least:
            raise BadInput(f"a path through {self.name or 'the model'!r} needs at least one layer")
        wrong = [layer for layer in layers if not 0 <= layer < self.length]
        if wrong:
            raise BadInput(f"{self.name or 'the model'!r} has layers 0 to {self.length - 1}, got {wrong[0]}")
        if len(layers) > self.length and not self.loops:
            raise BadInput(
                f"{self.name or 'the model'!r} cannot run {len(layers)} layers, its code allows {self.length}"
            )
        return tuple(layers)


class LayerPath(Edit):
    """Run the children of a container along a path: layers left out are removed, repeated ones share their weights.

    Args:
        name: dotted name of the ``nn.ModuleList`` or ``nn.Sequential``.
        size: how many children it had.
        path: which child stands at each place, counted from 0 over all children.
    """

    op: ClassVar[str] = "layer-path"
    name: str
    size: int = Field(ge=1)
    path: tuple[int, ...] = Field(min_length=1)

    def rewrite(self, model: nn.Module) -> nn.Module:
        """Put the children of the container in the order of the path."""
        container = container_of(model, self.name)
        if len(container) != self.size:
            raise BadInput(f"{self.name!r} should have {self.size} layers, it has {len(container)}")
        wrong = [place for place in self.path if not 0 <= place < self.size]
        if wrong:
            raise BadInput(f"{self.name!r} has layers 0 to {self.size - 1}, the path names {wrong[0]}")
        blocks = _line_up(list(container), self.path)
        set_children(container, blocks)
        config = _config(model, self.name, self.size)
        if config is not None:
            for field, value in _config_fields(config, self.path).items():
                setattr(config, field, value)
        return model

    def describe(self) -> dict[str, str]:
        """Return which layers are left out and which are repeated."""
        skipped = [str(i) for i in range(self.size) if i not in self.path]
        repeated = sorted({i for i in self.path if self.path.count(i) > 1})
        words = [f"layers {', '.join(skipped)} skipped"] if skipped else []
        words += [f"layer {i} run {self.path.count(i)} times" for i in repeated]
        if not words:
            words = ["layers reordered"] if self.path != tuple(range(self.size)) else ["unchanged"]
        return {self.name: f"{'; '.join(words)} ({len(self.path)} of {self.size} run)"}


def container_of(model: nn.Module, name: str) -> nn.ModuleList | nn.Sequential:
    """Return the container ``name`` of ``model``; :class:`BadInput` where there is none."""
    try:
        found = model.get_submodule(name)
    except AttributeError:
        raise BadInput(f"the model has no module {name!r}") from None
    if not isinstance(found, nn.ModuleList | nn.Sequential):
        raise BadInput(f"{name!r} is a {type(found).__name__}; a path needs an nn.ModuleList or nn.Sequential")
    return found


def set_children(container: nn.ModuleList | nn.Sequential, blocks: Sequence[nn.Module]) -> None:
    """Let ``blocks`` be the children of ``container``, in place."""
    container._modules.clear()
    for index, block in enumerate(blocks):
        container._modules[str(index)] = block


def _numbered(block: nn.Module) -> list[nn.Module]:
    """Return the modules in ``block`` that know their place in the stack: the key of their cache."""
    return [module for module in block.modules() if isinstance(getattr(module, "layer_idx", None), int)]


def _number(module: nn.Module) -> int:
    number: Any = module.layer_idx
    return int(number)


def _shell(block: nn.Module) -> nn.Module:
    """Return a copy of ``block`` that holds the very same parameters and buffers."""
    tensors = [*block.parameters(), *block.buffers()]
    return copy.deepcopy(block, {id(value): value for value in tensors})


def _line_up(children: Sequence[nn.Module], path: Sequence[int]) -> list[nn.Module]:
    """Return the children along ``path``, renumbered where they carry numbers.

    A repeated block is the same object twice, unless it carries the number of its cache: then the second one is a
    copy with a number of its own and the same tensors, so that the two do not write to one cache.
    """
    blocks: list[nn.Module] = []
    used: set[int] = set()
    for place in path:
        block = children[place]
        blocks.append(_shell(block) if place in used and _numbered(block) else block)
        used.add(place)
    offset = min((_number(module) for child in children for module in _numbered(child)), default=0)
    for index, block in enumerate(blocks):
        for module in _numbered(block):
            module.layer_idx = offset + index  # type: ignore[assignment]  # a plain attribute, not a module
    return blocks


def _config(model: nn.Module, name: str, size: int) -> Any:
    """Return the configuration object that says how many layers the container has: the nearest above it."""
    parts = name.split(".") if name else []
    for depth in range(len(parts), -1, -1):
        config = getattr(model.get_submodule(".".join(parts[:depth])), "config", None)
        if config is not None:
            return config if getattr(config, "num_hidden_layers", None) == size else None
    return None


def _config_fields(config: Any, path: Sequence[int]) -> dict[str, Any]:
    fields: dict[str, Any] = {"num_hidden_layers": len(path)}
    kinds = getattr(config, "layer_types", None)
    if isinstance(kinds, list) and len(kinds) > max(path):
        fields["layer_types"] = [kinds[place] for place in path]
    return fields


@contextmanager
def rewired(model: nn.Module, stack: Stack, blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Let ``model`` run ``blocks`` in place of those of ``stack``, in eval mode and without caches; then undo that."""
    container = container_of(model, stack.name)
    children = list(container)
    config = _config(model, stack.name, stack.size)
    placed = [*children[: stack.first], *blocks, *children[stack.first + stack.length :]]
    wanted: dict[str, Any] = {}
    if config is not None:
        last = stack.first + stack.length - 1  # the place of a block that is none of the model's own
        places = [children.index(block) if block in children else last for block in placed]
        wanted = {**_config_fields(config, places), "use_cache": False}
    changed = {field: getattr(config, field) for field in wanted if hasattr(config, field)}
    try:
        for field in changed:
            setattr(config, field, wanted[field])
        set_children(container, placed)
        with resting(model):
            yield
    finally:
        set_children(container, children)
        for field, value in changed.items():
            setattr(config, field, value)


@dataclass
class _Call:
    """One call of a block: what went in and what came out."""

    order: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None


def _first_tensor(value: Any) -> Tensor | None:
    """Return the tensor that a block passes on: its output, or the first entry of a tuple or mapping of outputs."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, list | tuple) and value and isinstance(value[0], Tensor):
        return value[0]
    return None


def _input_of(seen: _Call) -> Tensor | None:
    if seen.args:
        return seen.args[0] if isinstance(seen.args[0], Tensor) else None
    first = next(iter(seen.kwargs.values()), None)
    return first if isinstance(first, Tensor) else None


def _observe(
    model: nn.Module, blocks: Sequence[nn.Module], run: Callable[[], Any]
) -> tuple[Any, dict[nn.Module, list[_Call]]]:
    """Run ``run`` and return its result and the calls of every one of ``blocks``."""
    calls: dict[nn.Module, list[_Call]] = {block: [] for block in blocks}
    counter = [0]

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[module].append(_Call(counter[0], args, dict(kwargs)))
        counter[0] += 1

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls[module][-1].output = output

    handles = []
    for block in calls:
        handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(block.register_forward_hook(after, with_kwargs=True))
    try:
        with torch.no_grad():
            return run(), calls
    finally:
        for handle in handles:
            handle.remove()


def _is_block(module: nn.Module) -> bool:
    """A block holds parameters and is made of parts; a lone linear layer or activation is none."""
    own = type(module).__module__.startswith("torch.nn.modules.")
    has_parts = any(True for _ in module.children())
    return any(True for _ in module.parameters()) and (has_parts or not own)


def _same_tensor(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return False
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride())


def _keeps_shape(seen: _Call) -> bool:
    given, made = _input_of(seen), _first_tensor(seen.output)
    return given is not None and made is not None and given.shape == made.shape and given.dtype == made.dtype


def stacks(model: nn.Module, example: Inputs) -> list[Stack]:
    """Return the stacks of ``model``, outermost only, in the order in which they stand in the model.

    Args:
        model: any module; nothing is traced, and the model is left as it was.
        example: inputs for it.

    Example:
        >>> class Residual(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.fc = nn.Linear(4, 4)
        ...     def forward(self, x):
        ...         return x + self.fc(x)
        >>> net = nn.Sequential(nn.Linear(3, 4), Residual(), Residual(), Residual(), nn.Linear(4, 2))
        >>> [(found.blocks, found.loops) for found in stacks(net, torch.ones(2, 3))]
        [(('1', '2', '3'), True)]
    """
    containers = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList | nn.Sequential)
    }
    blocks = list(dict.fromkeys(child for container in containers.values() for child in container))
    with resting(model):
        _, calls = _observe(model, blocks, lambda: call(model, example))
    found: list[Stack] = []
    for name, container in containers.items():
        if any(block == name or name.startswith(f"{block}.") for stack in found for block in stack.blocks):
            continue
        for first, length, least in _runs(list(container), calls):
            parameters = tuple(
                sum(p.numel() for p in block.parameters()) for block in list(container)[first : first + length]
            )
            stack = Stack(name, first, length, len(container), parameters, True, least)
            if _runs_along(model, stack, range(1, length), example):
                loops = _runs_along(model, stack, (0, *range(length)), example)
                found.append(dataclasses.replace(stack, loops=loops))
    return found


def _runs(children: Sequence[nn.Module], calls: Mapping[nn.Module, list[_Call]]) -> Iterator[tuple[int, int, int]]:
    """Yield (first, length, least) of every longest run of chained blocks: two, or one that another block leads."""
    first = 0
    while first < len(children):
        length = 0
        for child in children[first:]:
            if not _once(child, children, calls) or not _keeps_shape(calls[child][0]):
                break
            if length and not _linked(children[first + length - 1], child, calls):
                break
            length += 1
        led = (
            length > 0
            and first > 0
            and _once(children[first - 1], children, calls)
            and _linked(children[first - 1], children[first], calls)
        )
        if length >= (1 if led else 2):
            yield first, length, 0 if led else 1
        first += max(length, 1)


def _once(child: nn.Module, children: Sequence[nn.Module], calls: Mapping[nn.Module, list[_Call]]) -> bool:
    """Whether ``child`` is a block that stands in one place and was called once."""
    return _is_block(child) and children.count(child) == 1 and len(calls[child]) == 1


def _linked(before: nn.Module, after: nn.Module, calls: Mapping[nn.Module, list[_Call]]) -> bool:
    """Whether ``after`` ran later, on the very tensor that ``before`` returned."""
    first, second = calls[before][0], calls[after][0]
    return first.order < second.order and _same_tensor(_first_tensor(first.output), _input_of(second))


def _runs_along(model: nn.Module, stack: Stack, layers: Sequence[int], example: Inputs) -> bool:
    """Whether the model runs exactly ``layers``, and does so whatever numbers the blocks carry."""
    children = list(container_of(model, stack.name))
    own = children[stack.first : stack.first + stack.length]
    blocks = [own[layer] for layer in layers]
    try:
        with rewired(model, stack, blocks):
            output, calls = _observe(model, own, lambda: call(model, example))
    except Exception:  # whatever the model's own code raises means the same: it does not run so
        return False
    order = sorted((seen.order, own.index(block)) for block, made in calls.items() for seen in made)
    if [layer for _, layer in order] != list(layers):
        return False
    numbered = [module for block in own for module in _numbered(block)]
    if not numbered:
        return True
    # Blocks that compute with their number would compute something else after renumbering.
    kept = [module.layer_idx for module in numbered]
    try:
        for module in numbered:
            module.layer_idx = 0  # type: ignore[assignment]  # a plain attribute, not a module
        with rewired(model, stack, blocks), torch.no_grad():
            again = call(model, example)
    except Exception:
        return False
    finally:
        for module, number in zip(numbered, kept, strict=True):
            module.layer_idx = number
    first, second = _first_tensor(output), _first_tensor(again)
    return first is None or second is None or torch.equal(first, second)


class _Stub(nn.Module):
    """A block that returns a given hidden state in the form in which the last block returns its own."""

    def __init__(self, like: Any) -> None:
        super().__init__()
        self.like = like
        self.hidden = torch.empty(0)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.like, Tensor):
            return self.hidden
        if isinstance(self.like, Mapping):
            first = next(iter(self.like))
            copied: Any = copy.copy(self.like)
            copied[first] = self.hidden
            return copied
        return (self.hidden, *self.like[1:])


@dataclass(frozen=True)
class _Extras:
    """What a block takes beside the hidden state; ``name`` is the keyword of that, where it came by keyword."""

    name: str | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _extras(seen: _Call) -> _Extras:
    if seen.args:
        return _Extras(None, seen.args[1:], seen.kwargs)
    name = next(iter(seen.kwargs))
    return _Extras(name, (), {key: value for key, value in seen.kwargs.items() if key != name})


def _rows_of(value: Any, other: Any, rows: Tensor) -> Any:
    """Return ``value`` for some samples: tensors whose length differs in ``other`` have the samples in dimension 0."""
    if isinstance(value, Tensor):
        by_sample = value.ndim > 0 and isinstance(other, Tensor) and other.ndim > 0 and len(value) != len(other)
        return value[rows] if by_sample else value
    if isinstance(value, tuple | list):
        return type(value)(_rows_of(a, b, rows) for a, b in zip(value, other, strict=True))
    if isinstance(value, dict):
        return {key: _rows_of(item, other[key], rows) for key, item in value.items()}
    return value


class Pieces:
    """A frozen model in three pieces, to run many paths without running what they share twice.

    ``head(step(l_m, ... step(l_1, start)))`` is the model along the path (l_1, ..., l_m), each on any choice of rows.

    Args:
        model: the model; it may not change while the pieces are in use.
        stack: the stack whose layers are stepped through.
        inputs: the samples, at least one.

    Raises:
        BadInput: the blocks do not take the samples along dimension 0.
    """

    def __init__(self, model: nn.Module, stack: Stack, inputs: Inputs) -> None:
        self.model, self.stack, self.inputs = model, stack, inputs
        children = list(container_of(model, stack.name))
        self.layers = children[stack.first : stack.first + stack.length]
        seen = self._capture(inputs)
        start = _input_of(seen[0])
        if start is None or start.ndim == 0:
            raise BadInput(f"the blocks of {stack.name!r} take no tensor of samples")
        self.start: Tensor = start
        self._stub = _Stub(seen[-1].output)
        # Which of the other arguments belong to the samples shows in a batch with one sample more.
        other = self._capture(take(inputs, torch.tensor([*range(len(start)), 0])))
        self._own = [_extras(made) for made in seen]
        self._other = [_extras(made) for made in other]

    def _capture(self, inputs: Inputs) -> list[_Call]:
        with rewired(self.model, self.stack, self.layers):
            _, calls = _observe(self.model, self.layers, lambda: call(self.model, inputs))
        return [calls[layer][0] for layer in self.layers]

    @torch.no_grad()
    def step(self, layer: int, hidden: Tensor, rows: Tensor) -> Tensor:
        """Return ``hidden`` (K, ...), which belongs to the samples ``rows`` (K,), after one layer."""
        own, other = self._own[layer], self._other[layer]
        args = _rows_of(own.args, other.args, rows)
        kwargs = _rows_of(own.kwargs, other.kwargs, rows)
        block = self.layers[layer]
        output = block(hidden, *args, **kwargs) if own.name is None else block(**{own.name: hidden}, **kwargs)
        made = _first_tensor(output)
        if made is None:
            raise BadInput(f"layer {layer} of {self.stack.name!r} returns no tensor")
        return made

    @torch.no_grad()
    def head(self, hidden: Tensor, rows: Tensor) -> Any:
        """Return the model's output for hidden states (K, ...) of the samples ``rows`` (K,)."""
        self._stub.hidden = hidden
        with rewired(self.model, self.stack, [self._stub]):
            return call(self.model, take(self.inputs, rows))
