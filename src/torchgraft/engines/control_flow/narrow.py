"""A model's forward pass in bfloat16: a copy with rounded weights, which takes and returns what the model does."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.bench.meters.forward import resting
from torchgraft.engines.control_flow.compiled import difference
from torchgraft.engines.control_flow.fused import checked_traits
from torchgraft.errors import BadInput

__all__ = ["NARROW", "WIDEST_GAP", "Narrow", "narrowed", "same_form"]

NARROW = torch.bfloat16
#: Largest accepted difference of a narrow pass from float32, relative to the largest output. Rounding takes a percent
#: of it in networks of a few blocks; where it takes more than this, something else than rounding has happened.
WIDEST_GAP = 0.1


def same_form(expected: Any, found: Any) -> bool:
    """Say whether two results are of the same types throughout; a trace makes plain dicts of dicts with attributes."""
    if type(expected) is not type(found):
        return False
    if isinstance(expected, Tensor):
        return bool(expected.dtype == found.dtype and expected.shape == found.shape)
    if isinstance(expected, dict):
        return list(expected) == list(found) and all(same_form(expected[key], found[key]) for key in expected)
    if isinstance(expected, tuple | list):
        return len(expected) == len(found) and all(map(same_form, expected, found))
    return True


#: Passes that take bfloat16 with gains, shifts and statistics in float32, which is faster and loses less.
_NORMS = (nn.LayerNorm.forward, nn.GroupNorm.forward, nn.BatchNorm2d.forward)


def narrowed(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` in eval mode whose weights and buffers are rounded to bfloat16.

    A weight that is put together when it is read, from codes or by a parametrisation, is put together in float32 and
    then rounded. torch's layer, group and batch norms keep theirs in float32. What a model makes beside its parameters
    and buffers keeps its dtype, as under ``model.to``.

    Args:
        model: a network; it is left as it was.

    Example:
        >>> narrowed(nn.Linear(2, 2)).weight.dtype
        torch.bfloat16
    """
    values: list[tuple[nn.Module, dict[str, Tensor]]] = []
    with torch.inference_mode(False), torch.no_grad():  # what is made in inference mode serves there alone
        made = copy.deepcopy(model)
        made.__dict__.pop("forward", None)  # an execution, where there is one
        for module in made.eval().modules():
            names = {*getattr(module, "parameter_buffers", ()), *getattr(module, "parametrizations", ())}
            held = [name for name in sorted(names) if isinstance(getattr(type(module), name, None), property)]
            numbers = torch.float32 if _keeps(module) else NARROW
            read = {name: getattr(module, name).detach().to(numbers) for name in held}
            if read:
                values.append((module, read))
        for module in made.modules():
            if not _keeps(module):
                move: Any = module._apply  # what ``module.to`` is made of; torch leaves it untyped
                move(_to_narrow, recurse=False)
    for module, read in values:
        # The class's property would stand before anything that the module holds: a class of its own stands before it.
        kind = type(module)
        module.__class__ = type(kind.__name__, (kind,), {**read, "__module__": kind.__module__})
    return made


def _keeps(module: nn.Module) -> bool:
    return type(module).forward in _NORMS


def _to_narrow(value: Tensor) -> Tensor:
    return value.to(NARROW) if value.is_floating_point() else value


def _cast(value: Any, source: torch.dtype, target: torch.dtype) -> Any:
    """Return ``value`` with its tensors of one dtype in another; containers of a type of their own are left alone."""
    if isinstance(value, Tensor):
        return value.to(target) if value.dtype == source else value
    if type(value) in (tuple, list):
        return type(value)(_cast(each, source, target) for each in value)
    if type(value) is dict:
        return {key: _cast(each, source, target) for key, each in value.items()}
    return value


class Narrow:
    """Calls ``run``, which computes in bfloat16, on float32 inputs, and returns its results in float32.

    Args:
        run: a narrowed model, or a program made of one.
    """

    def __init__(self, run: Any) -> None:
        self.run = run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what ``run`` does, rounded inputs in, wide outputs out."""
        return _cast(self.run(*self.inputs(args), **self.inputs(kwargs)), NARROW, torch.float32)

    @staticmethod
    def inputs(given: Any) -> Any:
        """Return inputs as ``run`` takes them."""
        return _cast(given, torch.float32, NARROW)

    @classmethod
    def of(cls, model: nn.Module, plain: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Narrow:
        """Return the narrow pass of ``model``, believed once it says about what float32 says on these inputs.

        Args:
            model: a float32 network in eval mode on a CPU; its weights are copied.
            plain: its forward pass in float32.
            args: positional arguments.
            kwargs: keyword arguments.

        Raises:
            BadInput: the model is of another dtype, does not run in bfloat16, returns something else there, or no copy
                can do what it does.
        """
        held = (*model.parameters(), *model.buffers())
        if any(value.is_floating_point() and value.dtype != torch.float32 for value in held):
            raise BadInput("it does not hold float32")
        checked_traits(model, args, kwargs)
        with resting(model), torch.no_grad():
            expected = plain(*args, **kwargs)
            try:
                made = cls(narrowed(model))
                found = made(*args, **kwargs)
            except Exception as error:  # whatever a kernel says that knows no bfloat16
                why = (str(error).strip().splitlines() or [""])[0]
                raise BadInput(f"it does not run in bfloat16: {type(error).__name__}: {why}") from error
        if not same_form(expected, found):
            raise BadInput(f"in bfloat16 it does not return the {type(expected).__name__} that it returns in float32")
        gap = difference(expected, found)
        if not gap <= WIDEST_GAP:
            raise BadInput(f"in bfloat16 its outputs differ by {gap:.2g} of the largest")
        return made
