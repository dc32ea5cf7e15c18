"""Find, replace and cut whole modules of a model, keeping shared modules shared."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import nn

from torchgraft.errors import BadInput, nearest

__all__ = ["SwapReport", "Where", "cut", "find", "replace_module", "swap"]

#: Which modules: a class, a glob of dotted names, or a predicate on the name and the module.
Where: TypeAlias = "type[nn.Module] | str | Callable[[str, nn.Module], bool]"


@dataclass(frozen=True)
class SwapReport:
    """What :func:`swap` did.

    Args:
        names: dotted names of the places replaced, every name of a shared module among them.
        modules: how many distinct modules were replaced.
        parameters_before: parameters of the whole model before.
        parameters_after: parameters of the whole model after.
    """

    names: tuple[str, ...]
    modules: int
    parameters_before: int
    parameters_after: int

    def __str__(self) -> str:
        return f"{self.modules} modules swapped, parameters {self.parameters_before:,} -> {self.parameters_after:,}"


def _count(model: nn.Module) -> int:
    return sum(value.numel() for value in model.parameters())


def find(model: nn.Module, where: Where) -> dict[str, nn.Module]:
    """Return the modules of ``model`` that ``where`` selects, by dotted name; the model itself is not among them.

    Args:
        model: any module.
        where: a class, a glob of dotted names, or a predicate on (name, module).

    Example:
        >>> list(find(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.ReLU))
        ['1']

    Raises:
        BadInput: ``where`` is something else.
    """
    named = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    if isinstance(where, str):
        return {name: module for name, module in named.items() if fnmatch.fnmatchcase(name, where)}
    if isinstance(where, type):
        kind: type[nn.Module] = where
        return {name: module for name, module in named.items() if isinstance(module, kind)}
    if callable(where):
        return {name: module for name, module in named.items() if where(name, module)}
    raise BadInput(f"where must be a module class, a glob of module names or a predicate, got {where!r}")


def _set(model: nn.Module, name: str, new: nn.Module) -> None:
    path, _, leaf = name.rpartition(".")
    model.get_submodule(path)._modules[leaf] = new


def replace_module(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Put ``new`` in place of module ``name`` of ``model``, everywhere where that module is shared.

    A module without children takes the mode, training or eval, of what it replaces; others keep their own.

    Example:
        >>> replace_module(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "1", nn.GELU())[1]
        GELU(approximate='none')

    Raises:
        BadInput: there is no such module, or ``name`` is the model itself.
    """
    named = dict(model.named_modules(remove_duplicate=False))
    if name == "" or name not in named:
        choices = [each for each in named if each]
        raise BadInput(f"the model has no module {name!r}{nearest(name, choices) if choices else ''}")
    if not isinstance(new, nn.Module):
        raise BadInput(f"the replacement of {name!r} must be a module, got {type(new).__name__}")
    old = named[name]
    if not new._modules:
        new.training = old.training
    for module in list(model.modules()):
        for leaf, child in module._modules.items():
            if child is old:
                module._modules[leaf] = new
    return model


def swap(model: nn.Module, where: Where, build: Callable[[nn.Module, str], nn.Module]) -> SwapReport:
    """Replace in place every module that ``where`` selects by what ``build`` makes of it.

    A shared module is built once and stays shared. Where one selected module holds another, the outer one is replaced.

    Args:
        model: any module; changed in place.
        where: a class, a glob of dotted names, or a predicate on (name, module).
        build: takes the old module and its first name, and returns the new module.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        >>> swap(model, nn.ReLU, lambda old, name: nn.SiLU()).names
        ('1',)

    Raises:
        BadInput: nothing is selected, or ``build`` returns no module.
    """
    found = find(model, where)
    outer = {
        name: module
        for name, module in found.items()
        if not any(name.startswith(f"{other}.") and module is not found[other] for other in found)
    }
    if not outer:
        raise BadInput(f"no module of {type(model).__name__} matches {where!r}")
    before = _count(model)
    made: dict[int, nn.Module] = {}
    for name, old in outer.items():
        if id(old) not in made:
            new = build(old, name)
            if not isinstance(new, nn.Module):
                raise BadInput(f"build must return a module for {name!r}, got {type(new).__name__}")
            made[id(old)] = new
    for name, old in outer.items():
        _set(model, name, made[id(old)])
    return SwapReport(tuple(outer), len(made), before, _count(model))


def cut(model: nn.Module, name: str) -> nn.Module:
    """Put an identity in place of module ``name``, which must be called with one argument and give what it takes.

    Example:
        >>> cut(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "1")[1]
        Identity()

    Raises:
        BadInput: there is no such module, or it is a container that an identity cannot stand for.
    """
    module = dict(model.named_modules(remove_duplicate=False)).get(name)
    if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict):
        raise BadInput(
            f"{name!r} is a {type(module).__name__}, which is indexed and not called; cut one of its members"
        )
    if isinstance(module, nn.Linear) and module.in_features != module.out_features:
        raise BadInput(f"{name!r} maps {module.in_features} features to {module.out_features}; an identity cannot")
    return replace_module(model, name, nn.Identity())
