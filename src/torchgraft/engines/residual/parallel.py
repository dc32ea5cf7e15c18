"""Spans of a residual stack as one parallel layer, y = x + scale * sum_i (block_i(x) - x), and back again.

Terms of a higher order, which take a branch of a branch, may be kept too.

The blocks stay as they are, so that their tensors only change their names: ``blocks.3.fc.weight`` of a span that begins
at 2 becomes ``blocks.2.branches.1.fc.weight``, and :class:`Unflatten` brings every name back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from torchgraft.bench.meters.forward import resting
from torchgraft.bench.task import Inputs, call
from torchgraft.engines.depth import Stack, stacks
from torchgraft.engines.surgery.edits import Edit, apply_edits
from torchgraft.errors import BadInput

__all__ = [
    "Flatten",
    "Parallel",
    "Unflatten",
    "branch",
    "calls",
    "container_of",
    "expansion",
    "first_tensor",
    "flatten",
    "no_nested_tensors",
    "set_children",
    "skips",
    "unflatten",
]

#: A block's call: its positional and its keyword arguments.
_Given = tuple[tuple[Any, ...], dict[str, Any]]


def first_tensor(value: Any) -> Tensor:
    """Return the tensor that a block passes on: its output, or the first entry of a tuple or mapping of outputs.

    Raises:
        BadInput: there is none.
    """
    first = value
    if isinstance(value, Mapping):
        first = next(iter(value.values()), None)
    elif isinstance(value, list | tuple) and value:
        first = value[0]
    if not isinstance(first, Tensor):
        raise BadInput(f"a block must pass on a tensor, got {type(value).__name__}")
    return first


def _with_first(value: Any, hidden: Tensor) -> Any:
    """Return ``value`` with ``hidden`` as the tensor that is passed on."""
    if isinstance(value, Tensor):
        return hidden
    if isinstance(value, Mapping):
        copied: Any = copy.copy(value)
        copied[next(iter(value))] = hidden
        return copied
    if hasattr(value, "_fields"):
        return type(value)(hidden, *value[1:])
    return type(value)((hidden, *value[1:]))


def branch(block: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return F with ``block(x) = x + F(x)``.

    Example:
        >>> branch(nn.ReLU())(torch.tensor([-2.0, 3.0]))
        tensor([2., 0.])
    """
    return lambda x: block(x) - x


def expansion(branches: Sequence[Callable[[Tensor], Tensor]], x: Tensor, order: int) -> Tensor:
    """Return z_h^(m) with z_j^(m) = z_{j-1}^(m) + F_j(z_{j-1}^(m-1)) and z^(0) = z_0 = x.

    For linear branches it is the sum over all compositions of at most ``order`` branches in increasing layer order; for
    any branches ``order=1`` is the parallel layer and ``order=h`` the sequential stack. O(h order) calls of branches.

    Args:
        branches: F_1, ..., F_h.
        x: the input.
        order: m, from 0.

    Example:
        >>> double = lambda x: 2 * x
        >>> [expansion([double, double], torch.tensor(1.0), m).item() for m in (0, 1, 2)]
        [1.0, 5.0, 9.0]

    Raises:
        BadInput: ``order`` is negative.
    """
    if order < 0:
        raise BadInput(f"order must be at least 0, got {order}")
    levels = [x] * (min(order, len(branches)) + 1)  # z_j^(m), m = 0, 1, ...
    for function in branches:
        levels = [x, *(upper + function(lower) for lower, upper in pairwise(levels))]
    return levels[-1]


class Parallel(nn.Module):
    """Residual blocks side by side on one input: y = x + scale * sum_i (block_i(x) - x).

    Called with what a block is called with, it answers in the form of a block; whatever a block returns besides its
    hidden state is the last block's. Attributes that it lacks are those of its first block.

    Args:
        blocks: the blocks, which keep their parameters.
        scale: what the sum of the branches is multiplied with.
        order: up to how many branches are composed, see :func:`expansion`. Above 1 a block is called several times, so
            that it must keep no cache.

    Example:
        >>> Parallel([nn.Identity(), nn.ReLU()])(torch.tensor([-2.0, 3.0]))
        tensor([0., 3.])

    Raises:
        BadInput: there are no blocks, or ``order`` is below 1.
    """

    def __init__(self, blocks: Sequence[nn.Module], *, scale: float = 1.0, order: int = 1) -> None:
        super().__init__()
        if not blocks:
            raise BadInput("a parallel layer needs at least one block")
        if order < 1:
            raise BadInput(f"order must be at least 1, got {order}")
        self.branches = nn.ModuleList(blocks)
        self.scale, self.order = scale, order
        self.train(blocks[0].training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Add what every block adds to the same input."""
        x = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(x, Tensor):
            raise BadInput(f"the first argument of a parallel layer must be a tensor, got {type(x).__name__}")
        answers: list[Any] = []

        def function(block: nn.Module) -> Callable[[Tensor], Tensor]:
            def added(value: Tensor) -> Tensor:
                answer = block(value, *args[1:], **kwargs) if args else block(**{**kwargs, next(iter(kwargs)): value})
                answers.append(answer)
                hidden = first_tensor(answer)
                if hidden.shape != value.shape:
                    raise BadInput(
                        f"a block made {tuple(hidden.shape)} of {tuple(value.shape)}; a residual block keeps the shape"
                    )
                return hidden - value

            return added

        made = expansion([function(block) for block in self.branches], x, self.order)
        return _with_first(answers[-1], made if self.scale == 1.0 else x + self.scale * (made - x))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            branches = self.__dict__.get("_modules", {}).get("branches")
            if branches is None or name.startswith("_"):
                raise
            return getattr(branches[0], name)


def container_of(model: nn.Module, name: str) -> nn.ModuleList | nn.Sequential:
    """Return the container ``name`` of ``model``.

    Raises:
        BadInput: there is no such module, or it holds no list of blocks.
    """
    try:
        found = model.get_submodule(name)
    except AttributeError:
        raise BadInput(f"the model has no module {name!r}") from None
    if not isinstance(found, nn.ModuleList | nn.Sequential):
        raise BadInput(f"{name!r} is a {type(found).__name__}; a stack is an nn.ModuleList or nn.Sequential")
    return found


def set_children(container: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Let ``container`` hold ``blocks``, numbered from 0."""
    container._modules.clear()
    container._modules.update({str(index): block for index, block in enumerate(blocks)})


def no_nested_tensors(model: nn.Module) -> None:
    """Keep ``nn.TransformerEncoder`` from its fused path, which reads the packed weights of its first layer."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.enable_nested_tensor = False
            module.use_nested_tensor = False


def checked_spans(spans: Sequence[tuple[int, int]], size: int, name: str) -> None:
    """Raise :class:`BadInput` unless the spans (first, length) follow each other within ``size`` blocks."""
    end = 0
    for first, length in spans:
        if length < 2 or first < end or first + length > size:
            raise BadInput(f"spans of {name!r} must follow each other in its {size} blocks, got {tuple(spans)}")
        end = first + length


class Flatten(Edit):
    """Turn spans of a sequential residual stack into one parallel layer each, with the same parameter tensors.

    Args:
        name: dotted name of the ``nn.ModuleList`` or ``nn.Sequential``.
        size: how many children it has.
        spans: (first, length) of each span, in order, at least two blocks long.
        scale: what the sum of a span's branches is multiplied with.
        order: up to how many branches are composed; 1 is the parallel layer.
    """

    op: ClassVar[str] = "flatten-residual"
    name: str
    size: int = Field(ge=1)
    spans: tuple[tuple[int, int], ...] = Field(min_length=1)
    scale: float = 1.0
    order: int = Field(default=1, ge=1)

    def rewrite(self, model: nn.Module) -> nn.Module:
        """Put a :class:`Parallel` in the place of every span."""
        container = container_of(model, self.name)
        children = list(container)
        if len(children) != self.size:
            raise BadInput(f"{self.name!r} should have {self.size} blocks, it has {len(children)}")
        checked_spans(self.spans, self.size, self.name)
        for first, length in reversed(self.spans):
            blocks = children[first : first + length]
            children[first : first + length] = [Parallel(blocks, scale=self.scale, order=self.order)]
        set_children(container, children)
        no_nested_tensors(model)
        return model

    def describe(self) -> dict[str, str]:
        """Return which blocks stand side by side."""
        return {self.name: "; ".join(f"blocks {a} to {a + n - 1} side by side" for a, n in self.spans)}


class Unflatten(Edit):
    """Put the blocks of every parallel layer of the container ``name`` in a row again: undoes :class:`Flatten`."""

    op: ClassVar[str] = "unflatten-residual"
    name: str

    def rewrite(self, model: nn.Module) -> nn.Module:
        """Put the branches back in order."""
        container = container_of(model, self.name)
        blocks = [
            block for child in container for block in (list(child.branches) if isinstance(child, Parallel) else [child])
        ]
        set_children(container, blocks)
        return model

    def describe(self) -> dict[str, str]:
        """Return that the blocks follow each other again."""
        return {self.name: "blocks in a row"}


@contextmanager
def _without_caches(model: nn.Module) -> Iterator[None]:
    """Keep models of transformers from making a cache of keys, which a second call of a block would fill again."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    asked = [config for config in configs.values() if getattr(config, "use_cache", False)]
    try:
        for config in asked:
            config.use_cache = False
        yield
    finally:
        for config in asked:
            config.use_cache = True


def calls(model: nn.Module, names: Sequence[str], example: Inputs) -> dict[str, list[_Given]]:
    """Return what each module of ``names`` is called with in one pass on ``example``, in eval mode."""
    seen: dict[str, list[_Given]] = {name: [] for name in names}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[name].append((args, dict(kwargs)))

        return hook

    with ExitStack() as held, resting(model), _without_caches(model), torch.no_grad():
        for name in names:
            handle = model.get_submodule(name).register_forward_pre_hook(watch(name), with_kwargs=True)
            held.callback(handle.remove)
        call(model, example)
    return seen


def skips(model: nn.Module, stack: Stack, example: Inputs) -> list[bool]:
    """Say of every block of ``stack`` whether it has a skip connection: with all its weights zero it is the identity.

    That holds for pre-norm blocks and for convolutional ones with a ReLU after the sum, and not where the sum is
    normalised (BERT) or where there is none.

    Example:
        >>> layer = lambda first: nn.TransformerEncoderLayer(8, 2, 16, norm_first=first, batch_first=True)
        >>> model = nn.Sequential(layer(True), layer(True), layer(False))
        >>> skips(model, stacks(model, torch.randn(1, 3, 8))[0], torch.randn(1, 3, 8))
        [True, True, False]
    """
    given = calls(model, stack.blocks, example)
    found = []
    with resting(model), torch.no_grad():
        for name in stack.blocks:
            block = model.get_submodule(name)
            args, kwargs = given[name][0]
            x = args[0] if args else next(iter(kwargs.values()))
            zeros = {key: torch.zeros_like(value) for key, value in block.named_parameters()}
            made = first_tensor(torch.func.functional_call(block, zeros, args, kwargs))
            found.append(made.shape == x.shape and bool(torch.allclose(made, x, rtol=1e-5, atol=1e-6)))
    return found


def _stack_at(model: nn.Module, example: Inputs, name: str | None) -> Stack:
    found = [stack for stack in stacks(model, example) if name is None or stack.name == name]
    if not found:
        raise BadInput(f"{type(model).__name__} has no stack of blocks {'' if name is None else f'named {name!r}'}")
    return max(found, key=lambda stack: stack.length)


def flatten(
    model: nn.Module,
    span: tuple[int, int] | None = None,
    *,
    example: Inputs,
    name: str | None = None,
    scale: float = 1.0,
    order: int = 1,
) -> nn.Module:
    """Return a copy of ``model`` with a span of its residual stack as one parallel layer.

    Args:
        model: the model.
        span: (first, length) counted within the stack; default the whole stack.
        example: inputs for the model.
        name: which container; default that of the longest stack.
        scale: what the sum of the branches is multiplied with.
        order: up to how many branches are composed; 1 is the parallel layer.

    Raises:
        BadInput: the model has no such stack, the span is no part of it, or ``order`` is below 1.
    """
    stack = _stack_at(model, example, name)
    first, length = (0, stack.length) if span is None else span
    checked_spans([(first, length)], stack.length, stack.name)
    if order < 1:
        raise BadInput(f"order must be at least 1, got {order}")
    spans = ((stack.first + first, length),)
    edit = Flatten(name=stack.name, size=stack.size, spans=spans, scale=scale, order=order)
    return apply_edits(model, [edit])


def unflatten(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` in which the blocks of every parallel layer follow each other again.

    Raises:
        BadInput: the model has no parallel layer.
    """
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and any(isinstance(child, Parallel) for child in module)
    ]
    if not names:
        raise BadInput(f"{type(model).__name__} has no parallel layer")
    inner_first = sorted(names, key=lambda name: -name.count("."))
    return apply_edits(model, [Unflatten(name=name) for name in inner_first])
