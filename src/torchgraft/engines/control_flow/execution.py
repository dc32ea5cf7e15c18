"""A model whose forward pass runs as compiled programs for the sizes that were asked for, and as Python otherwise.

The model stays the module that it was: its parameters, its names, its training. Only what ``model(...)`` does in eval
mode without gradients, on inputs of these sizes, is done by a program (:mod:`~torchgraft.engines.control_flow.fused`),
or, where the path depends on the data, by a host over several (:class:`CompiledDynamic`). Programs may compute in
bfloat16 (:mod:`~torchgraft.engines.control_flow.narrow`); inputs of other sizes are then answered in bfloat16 too.
"""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import operator
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import model_validator
from torch import Tensor, nn

from torchgraft.bench.meters.forward import leaf_tensors, resting
from torchgraft.bench.task import Inputs
from torchgraft.engines.control_flow.compiled import CompiledDynamic, difference
from torchgraft.engines.control_flow.fused import checked_traits, fused
from torchgraft.engines.control_flow.graphs import optimise
from torchgraft.engines.control_flow.narrow import Narrow, same_form
from torchgraft.engines.control_flow.specialise import specialise
from torchgraft.engines.native import traced
from torchgraft.engines.surgery.edits import Edit
from torchgraft.errors import BadInput

__all__ = ["LEAST_OPERATORS", "Arithmetic", "Execution", "Form", "RunCompiled", "compiled_pass", "form_of"]

#: The numbers that a pass computes in, where they are not those of the model.
Arithmetic = Literal["bfloat16"]
#: Largest accepted difference of a program from Python, relative to the largest output: float32 sums in another order,
#: and bfloat16 rounded in other places.
TOLERANCE, NARROW_TOLERANCE = 1e-4, 2**-5
#: Fewer operators than this leave nothing to join.
LEAST_OPERATORS = 4
_logger = logging.getLogger("torchgraft")

#: What a call is recognised by: names of keyword arguments (none where all are positional), shapes, dtypes.
Form = tuple[tuple[str, ...], tuple[tuple[int, ...], ...], tuple[torch.dtype, ...]]


def form_of(inputs: Inputs) -> Form:
    """Return by what a call on ``inputs`` is recognised."""
    names = tuple(inputs) if isinstance(inputs, Mapping) else ()
    values = leaf_tensors(inputs)
    return names, tuple(tuple(value.shape) for value in values), tuple(value.dtype for value in values)


def _other(value: Tensor) -> Tensor:
    """Return a valid input unlike ``value``: its entries in the opposite order."""
    return value.flip(list(range(value.ndim)))


def _tells(values: Iterable[Tensor]) -> bool:
    """Say whether another input can be made of ``values``; zeros are the same backwards."""
    return not all(torch.equal(value, _other(value)) for value in values)


def compiled_pass(
    model: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor], tolerance: float | None = None
) -> Callable[..., Any]:
    """Return a compiled forward pass of ``model`` for inputs like these, checked against Python on two inputs.

    Args:
        model: a network in eval mode on a CPU; its weights are copied.
        args: positional arguments.
        kwargs: keyword arguments, in place of positional ones.
        tolerance: largest accepted difference, relative to the largest output; default: :data:`TOLERANCE`.

    Raises:
        BadInput: it cannot be compiled, or the program's outputs are not those of the model.
        Untraceable: it decides on its data in a way that cannot be compiled; file and line are named.
    """
    if not _tells((*args, *kwargs.values())):
        raise BadInput("these inputs are the same backwards, so that nothing shows that the program reads them")
    known = checked_traits(model, args, kwargs)
    if known.operators < LEAST_OPERATORS:
        raise BadInput("there are no operators to join")
    run: Callable[..., Any]
    if known.decides:
        if kwargs:
            raise BadInput("it decides on its data, and takes keyword arguments")
        run = CompiledDynamic(model, args, optimise(specialise(model, args)), "fused")
    else:
        run = fused(model, args, kwargs)
    turned = tuple(_other(value) for value in args), {name: _other(value) for name, value in kwargs.items()}
    with resting(model), torch.no_grad():
        for given, named in ((args, kwargs), turned):
            expected, found = model(*given, **named), run(*given, **named)
            if not same_form(expected, found):
                raise BadInput(f"a program cannot return the model's {type(expected).__name__}")
            gap = difference(expected, found)
            if not gap <= (TOLERANCE if tolerance is None else tolerance):
                raise BadInput(f"the program's outputs differ from the model's by {gap:.2g}")
    return run


def _watched() -> bool:
    """Say whether something looks at, or changes, what operators do: a mode, a trace, a transform, autocast."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or traced()
        or torch._C._functorch.maybe_current_level() is not None
        or torch.is_autocast_enabled("cpu")
    )


class Execution:
    """What stands for a model's ``forward``.

    A program is made at the first call that it can serve, and anew once weights, modules, or their plain attributes
    (numbers, strings) have changed; writing through ``.data`` and into lists is not seen. It holds the weights again.
    Python runs instead in training mode, with gradients, on other sizes, dtypes and devices, under hooks, modes,
    transforms and traces, and where compiling fails, which goes to the log once.

    Where ``arithmetic`` names numbers of fewer bits, a rounded copy of the model answers calls of every size, and
    programs are made of that copy. In all the other cases above the answer is float32's.

    Args:
        model: the model.
        forms: the calls that programs are made for.
        arithmetic: the numbers to compute in; default: those of the model.
    """

    def __init__(self, model: nn.Module, forms: frozenset[Form], arithmetic: Arithmetic | None = None) -> None:
        self.model, self.forms, self.arithmetic = model, forms, arithmetic
        self._plain: Callable[..., Any] = types.MethodType(type(model).forward, model)
        functools.update_wrapper(self, self._plain)
        self.__code__ = type(model).forward.__code__  # torch.export names arguments by it
        self._programs: dict[Form, Callable[..., Any] | None] = {}
        self._made_of: _MadeOf | None = None
        self._narrow: Narrow | None = None
        self._narrows, self._waits = arithmetic is not None, False

    def __deepcopy__(self, memo: dict[int, Any]) -> Execution:
        return Execution(copy.deepcopy(self.model, memo), self.forms, self.arithmetic)

    def __reduce__(self) -> tuple[Any, ...]:
        return Execution, (self.model, self.forms, self.arithmetic)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model does, by a program where there is one."""
        program = None
        if not torch.is_grad_enabled() and not _watched():
            program = self._program(args, kwargs)
        return self._plain(*args, **kwargs) if program is None else program(*args, **kwargs)

    def in_own_numbers(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model does in Python, in the numbers that it holds."""
        return self._plain(*args, **kwargs)

    def compiled(self, inputs: Inputs) -> bool:
        """Say whether a program exists for ``inputs``; one is made by a call in eval mode without gradients."""
        return self._programs.get(form_of(inputs)) is not None

    def _program(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any] | None:
        values = (*args, *kwargs.values()) if kwargs else args
        if (args and kwargs) or not all(type(value) is Tensor and value.is_cpu for value in values):
            return None
        form = tuple(kwargs), tuple(value.shape for value in values), tuple(value.dtype for value in values)
        listed = form in self.forms
        if not listed and self.arithmetic is None:
            return None
        known = self._made_of
        changed = known is not None and not known.still()
        if known is None or changed:
            self._programs.clear()
            # What was refused is tried again where weights have come to stay, not at every change.
            self._waits = self.arithmetic is not None and not self._narrows
            self._narrow, self._made_of = None, _MadeOf(self.model)
        elif self._waits:
            self._waits, self._narrows = False, True
        if self._made_of is None or self._made_of.busy():
            return None
        if listed and form not in self._programs and not changed and _tells(values):
            # What keeps changing is not compiled at every call, and inputs that tell nothing wait for others that do.
            self._programs[form] = None  # while it is being made, Python runs
            self._programs[form] = self._compiled(args, kwargs)
        program = self._programs.get(form)
        if program is None and self._rounded(args, kwargs) is not None:
            return self._in_python
        return program

    def _rounded(self, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> Narrow | None:
        """Return the rounded copy of the model, made at the first call that needs it; ``None`` where it has none."""
        if self._narrows and self._narrow is None:
            try:
                self._narrow = Narrow.of(self.model, self._plain, args, kwargs)
            except BadInput as error:
                self._narrows = False
                self._told(error, "float32")
        return self._narrow

    def _in_python(self, *args: Tensor, **kwargs: Tensor) -> Any:
        try:
            return cast(Narrow, self._narrow)(*args, **kwargs)
        except Exception:
            # This size takes a path that knows no such numbers, or is wrong, which the model itself will say.
            return self._plain(*args, **kwargs)

    def _compiled(self, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> Callable[..., Any] | None:
        narrow = self._rounded(args, kwargs)
        if narrow is None and self.arithmetic is not None:
            return None
        try:
            if narrow is None:
                return compiled_pass(self.model, args, kwargs)
            given, named = narrow.inputs(args), narrow.inputs(kwargs)
            return Narrow(compiled_pass(narrow.run, given, named, NARROW_TOLERANCE))
        except Exception as error:  # whatever a compiler trips over; what is wrong with the inputs, Python will say
            self._told(error, "Python")
            return None

    def _told(self, error: Exception, instead: str) -> None:
        why = str(error) if isinstance(error, BadInput) else f"{type(error).__name__}: {error}"
        _logger.info("%s runs as %s: %s", type(self.model).__name__, instead, why)


class _MadeOf:
    """What a model was made of, and the state of its weights; asked at every call, so that it touches little memory."""

    __slots__ = ("_held", "_hooks", "_modules", "_parts", "_plain", "_reads", "_tensors", "_threads", "_versions")

    def __init__(self, model: nn.Module) -> None:
        self._modules = modules = list(model.modules())
        parts = ((m._modules, m._parameters, m._buffers) for m in self._modules)
        self._held: list[dict[str, Any]] = [cast(dict[str, Any], held) for three in parts for held in three]
        self._parts = [part for held in self._held for part in held.values()]
        self._tensors = [part for part in self._parts if isinstance(part, Tensor) and not part.is_inference()]
        self._versions = list(map(_version, self._tensors))
        self._hooks = [hooks for m in self._modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._threads = torch.get_num_threads()
        # Plain attributes of each module, which its forward pass may depend on, and what reads them.
        named = [(m, [k for k, v in m.__dict__.items() if isinstance(v, _PLAIN) and k != "training"]) for m in modules]
        self._reads = [(m.__dict__, operator.itemgetter(*names)) for m, names in named if names]
        self._plain = [read(held) for held, read in self._reads]

    def still(self) -> bool:
        """Say whether the model is made of the same modules and tensors, in the state that they were in."""
        parts = list(itertools.chain.from_iterable(map(_values, self._held)))
        return (
            len(parts) == len(self._parts)
            and all(map(operator.is_, parts, self._parts))
            and list(map(_version, self._tensors)) == self._versions
            and self._threads == torch.get_num_threads()
            and self._same_attributes()
        )

    def _same_attributes(self) -> bool:
        try:
            return [read(held) for held, read in self._reads] == self._plain
        except KeyError:
            return False  # one was deleted

    def busy(self) -> bool:
        """Say whether a module trains or has hooks."""
        return any(self._hooks) or any(map(_training, self._modules))


_PLAIN = (bool, int, float, str, tuple, torch.Size, type(None))
_version, _training, _values = operator.attrgetter("_version"), operator.attrgetter("training"), dict.values


class RunCompiled(Edit):
    """Run a model's forward pass as a compiled program on inputs of given sizes; weights and names stay.

    Args:
        names: names of the keyword arguments; none where all are positional.
        sizes: shape of each argument.
        kinds: dtype of each argument, such as ``"float32"``.
        arithmetic: the numbers to compute in; default: those of the model.
    """

    op: ClassVar[str] = "run-compiled"
    names: tuple[str, ...] = ()
    sizes: tuple[tuple[int, ...], ...]
    kinds: tuple[str, ...]
    arithmetic: Arithmetic | None = None

    @model_validator(mode="after")
    def _fits(self) -> RunCompiled:
        if not len(self.sizes) == len(self.kinds) or (self.names and len(self.names) != len(self.sizes)):
            raise ValueError("names, sizes and kinds must be one an argument")
        for kind in self.kinds:
            if not isinstance(getattr(torch, kind, None), torch.dtype):
                raise ValueError(f"{kind!r} is no dtype")
        return self

    @classmethod
    def on(cls, inputs: Inputs, arithmetic: Arithmetic | None = None) -> RunCompiled:
        """Return the edit for inputs like these."""
        names, sizes, dtypes = form_of(inputs)
        kinds = tuple(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return cls(names=names, sizes=sizes, kinds=kinds, arithmetic=arithmetic)

    @property
    def form(self) -> Form:
        """What the calls that the program serves are recognised by."""
        return self.names, self.sizes, tuple(getattr(torch, kind) for kind in self.kinds)

    def rewrite(self, model: nn.Module) -> nn.Module:
        """Put an :class:`Execution` in the place of the model's forward."""
        standing = model.__dict__.get("forward")
        if standing is not None and not isinstance(standing, Execution):
            raise BadInput("run-compiled: something else stands for the model's forward")
        if standing is not None and standing.arithmetic != self.arithmetic:
            raise BadInput(f"run-compiled: its programs compute in {standing.arithmetic or 'its own numbers'} already")
        forms = standing.forms if standing is not None else frozenset()
        model.__dict__["forward"] = Execution(model, forms | {self.form}, self.arithmetic)
        return model

    def describe(self) -> dict[str, str]:
        """Say for which inputs."""
        sizes = ", ".join("x".join(map(str, size)) for size in self.sizes)
        numbers = f" in {self.arithmetic}" if self.arithmetic else ""
        return {"(model)": f"one compiled program{numbers} for inputs of {sizes}"}
