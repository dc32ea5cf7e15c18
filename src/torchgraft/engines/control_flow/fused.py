"""A straight-line network as one program: traced, its weights made constants, its operators joined by oneDNN.

TorchScript is no longer developed, and this is the only place that uses it for speed. It stays while nothing else that
torch ships joins operators on a CPU without seconds of compiling (decision 019); where it is gone or fails,
:class:`~torchgraft.errors.BadInput` is raised, and callers go on with Python.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchgraft.bench.meters.forward import resting
from torchgraft.engines.surgery.trace import quiet
from torchgraft.errors import BadInput

__all__ = ["Traits", "checked_traits", "fused", "traits"]

#: Calls after which the program is as it stays: profiled, then optimised.
_WARM = 3
#: oneDNN's fusion is switched on for the whole process while a program is made.
_LOCK = threading.Lock()


@dataclass(frozen=True)
class Traits:
    """What a trace must know of a network.

    Args:
        operators: how many of torch's operators one call runs.
        decides: whether it asks a tensor for its value, so that its path may depend on its inputs.
        draws: whether it draws random numbers.
        writes: whether it changes its own parameters or buffers.
    """

    operators: int
    decides: bool
    draws: bool
    writes: bool

    @property
    def obstacle(self) -> str | None:
        """Why no program can do what it does, or ``None``."""
        if self.draws:
            return "it draws random numbers"
        return "it changes its own buffers in eval mode" if self.writes else None


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Count operators, and note whether the answer, or the shape, of one depends on values."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators, self.decides = 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        tags = func.tags
        self.decides |= torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags
        return func(*args, **(kwargs or {}))


def _versions(module: nn.Module) -> list[int]:
    held = (*module.parameters(), *module.buffers())
    return [value._version for value in held if not value.is_inference()]


def traits(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Traits:
    """Run ``module`` once in eval mode and return what a trace of it must know.

    Example:
        >>> traits(nn.Linear(2, 2), (torch.ones(1, 2),))
        Traits(operators=2, decides=False, draws=False, writes=False)
    """
    before = _versions(module)
    with resting(module), torch.no_grad(), torch.random.fork_rng(devices=[]):
        state = torch.random.get_rng_state()
        with _Watch() as watch:
            module(*args, **(kwargs or {}))
        draws = not torch.equal(state, torch.random.get_rng_state())
    return Traits(watch.operators, watch.decides, draws, _versions(module) != before)


def checked_traits(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Traits:
    """Return the traits of a network of which a copy can do what it does.

    Raises:
        BadInput: no copy can: it draws random numbers, writes to its own buffers, or is switched at run time.
    """
    if any(hasattr(each, "set_budget") for each in module.modules()):
        raise BadInput("it has budgets that are switched at run time")
    found = traits(module, args, kwargs)
    if found.obstacle is not None:
        raise BadInput(found.obstacle)
    return found


def fused(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Tensor] | None = None) -> Callable[..., Any]:
    """Return ``module`` as one program for inputs of these sizes, without gradients; its weights are copied.

    It follows the path that these inputs take: see :func:`traits`.

    Args:
        module: a network in eval mode on a CPU, which takes and returns tensors, or tuples, lists or dicts of them.
        args: its positional arguments.
        kwargs: its keyword arguments, in place of positional ones.

    Raises:
        BadInput: it cannot be traced.
    """
    if args and kwargs:
        raise BadInput("a program takes positional or keyword arguments, not both")
    try:
        with _LOCK, quiet(), torch.no_grad():
            jit: Any = torch.jit
            given = {"example_kwarg_inputs": dict(kwargs)} if kwargs else {"example_inputs": args}
            program = jit.freeze(jit.trace(module, **given, check_trace=False, strict=False).eval())
            before = jit.onednn_fusion_enabled()
            jit.enable_onednn_fusion(True)
            try:
                for _ in range(_WARM):
                    program(*args, **(kwargs or {}))
            finally:
                jit.enable_onednn_fusion(before)
    except Exception as error:
        why = (str(error).strip().splitlines() or [""])[0]
        raise BadInput(f"{type(module).__name__} cannot be traced: {type(error).__name__}: {why}") from error
    made: Callable[..., Any] = program
    return made
