"""Change what one module of a model does with its input and output, without moving or renaming its parameters.

A module gets a class that is a mixin in front of its own class, under its old name. Its children, parameters, hooks and
place in the model stay, so optimisers, state dicts and code that reads its attributes go on as before, and a deep copy
behaves as the original.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor, nn

from torchgraft.errors import BadInput

__all__ = [
    "NormedInput",
    "NormedOutput",
    "add_norm",
    "attach",
    "attached",
    "detach",
    "first_of",
    "on_first",
    "take_norm",
]


@cache
def _joined(mixin: Any, kind: Any) -> type[nn.Module]:
    made = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (mixin, kind), {**made, "_attached": mixin, "_plain": kind})


def _made(mixin: Any, kind: Any) -> type[nn.Module]:
    return _joined(mixin, kind)  # one class for the same two, so that equal modules have equal types


def attached(module: nn.Module, mixin: type[nn.Module]) -> bool:
    """Say whether ``mixin`` stands in front of the class of ``module``."""
    return isinstance(module, mixin)


def attach(module: nn.Module, mixin: type[nn.Module]) -> nn.Module:
    """Put ``mixin`` in front of the class of ``module``, in place, and return the module.

    Args:
        module: any module.
        mixin: a subclass of ``nn.Module`` whose ``forward`` calls that of ``super()``; it may not have an ``__init__``.

    Example:
        >>> class Twice(nn.Module):
        ...     def forward(self, x):
        ...         return 2 * super().forward(x)
        >>> layer = attach(nn.ReLU(), Twice)
        >>> float(layer(Tensor([3.0]))), type(layer).__name__, float(detach(layer, Twice)(Tensor([3.0])))
        (6.0, 'ReLU', 3.0)

    Raises:
        BadInput: it is there already.
    """
    if attached(module, mixin):
        raise BadInput(f"{mixin.__name__.lstrip('_')} is on this {type(module).__name__} already")
    module.__class__ = _made(mixin, type(module))
    return module


def detach(module: nn.Module, mixin: type[nn.Module]) -> nn.Module:
    """Take ``mixin`` off again; what was attached after it stays.

    Raises:
        BadInput: it is not there.
    """
    later: list[type[nn.Module]] = []
    kind: Any = type(module)
    while kind.__dict__.get("_attached") not in (None, mixin):
        later.append(kind._attached)
        kind = kind._plain
    if kind.__dict__.get("_attached") is None:
        raise BadInput(f"{mixin.__name__.lstrip('_')} is not on this {type(module).__name__}")
    plain: type[nn.Module] = kind._plain
    for other in reversed(later):
        plain = _made(other, plain)
    module.__class__ = plain
    return module


def first_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the first tensor that a module was called with."""
    found = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    if found is None:
        raise BadInput("the module was called without a tensor")
    return found


def on_first(result: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return ``result`` with its first tensor changed: of a tuple the first member, else the tensor itself."""
    return (change(result[0]), *result[1:]) if isinstance(result, tuple) else change(result)


class NormedInput(nn.Module):
    """On a module: normalises the first tensor that it is called with."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Normalise, then call the module."""
        x = first_of(args, kwargs)
        y = self.input_norm(x)  # type: ignore[operator]  # a module
        args = tuple(y if value is x else value for value in args)
        return super().forward(*args, **{name: y if value is x else value for name, value in kwargs.items()})


class NormedOutput(nn.Module):
    """On a module: normalises its first output."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module, then normalise."""
        return on_first(super().forward(*args, **kwargs), self.output_norm)  # type: ignore[arg-type]  # a module


def add_norm(module: nn.Module, mixin: type[nn.Module], name: str, norm: nn.Module) -> None:
    """Attach ``mixin`` to ``module``, with ``norm`` as the child ``name`` that it uses.

    Raises:
        BadInput: the module has a part of that name.
    """
    if hasattr(module, name):
        raise BadInput(f"{type(module).__name__} has a part {name!r} already")
    module.add_module(name, norm)
    attach(module, mixin)


def take_norm(module: nn.Module, mixin: type[nn.Module], name: str) -> nn.Module:
    """Detach ``mixin`` from ``module`` and return the norm that it used."""
    norm = module.get_submodule(name)
    delattr(module, name)
    detach(module, mixin)
    return norm
