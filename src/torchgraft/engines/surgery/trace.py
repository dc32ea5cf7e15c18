"""Trace a model with ``torch.export`` and know, for every node, its module and its line in the user's source."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import linecache
import logging
import os
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, fx, nn

from torchgraft.bench import task
from torchgraft.bench.task import Inputs, take
from torchgraft.errors import Untraceable

__all__ = ["Traced", "evaluated", "few", "line_of", "module_of", "quiet", "shell", "trace", "user_line"]

_OWN = (
    *(os.path.dirname(os.path.abspath(path)) + os.sep for path in (torch.__file__, __file__)),
    os.path.abspath(task.__file__),
)
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


@dataclass(frozen=True)
class Traced:
    """A traced model.

    Args:
        graph: ATen operations in the order in which they ran.
        module: holds the sub-graphs that ``get_attr`` nodes of the graph name.
        tensors: placeholder name to parameter or buffer name; tied tensors have one name.
        constants: placeholder name to a tensor that was made while the forward pass ran.
    """

    graph: fx.Graph
    module: nn.Module
    tensors: Mapping[str, str]
    constants: Mapping[str, Tensor]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what compilers say from the terminal and the log."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def few(example: Inputs) -> Inputs:
    """Return the first two samples of ``example``, or all of it where it is not a batch of samples."""
    leaves = (
        [example]
        if isinstance(example, Tensor)
        else list(example.values() if isinstance(example, Mapping) else example)
    )
    sizes = {len(leaf) if leaf.ndim else 0 for leaf in leaves}
    return take(example, slice(0, 2)) if len(sizes) == 1 and sizes.pop() > 2 else example


def shell(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` whose modules are its own and whose parameters and buffers are those of ``model``."""
    shared = {id(value): value for value in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, dict(shared))


def evaluated(model: nn.Module) -> nn.Module:
    """Return a shell of ``model`` in evaluation mode that keeps no cache of keys and values."""
    model = shell(model).eval()
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if config is not None and getattr(config, "use_cache", False):
            config.use_cache = False
    return model


def _foreign(path: str) -> bool:
    return not path.startswith(_OWN) and not path.startswith("<")


def user_line(trail: TracebackType | None) -> tuple[str | None, str]:
    """Return ``file:line`` and source text of the last frame that belongs neither to torch nor to this library."""
    for frame in reversed(traceback.extract_tb(trail)):
        if _foreign(os.path.abspath(frame.filename)) and os.path.exists(frame.filename):
            return f"{frame.filename}:{frame.lineno}", (frame.line or "").strip()
    return None, ""


def line_of(node: fx.Node) -> str | None:
    """Return ``file:line: source`` of the user's code that made ``node``."""
    for path, number in reversed(_FRAME.findall(node.meta.get("stack_trace") or "")):
        if _foreign(path):
            source = linecache.getline(path, int(number)).strip()
            return f"{path}:{number}: {source}" if source else f"{path}:{number}"
    return None


def module_of(node: fx.Node) -> str:
    """Return the dotted name of the innermost module that was running when ``node`` was made."""
    stack = node.meta.get("nn_module_stack") or {}
    name = str(list(stack.values())[-1][0]) if stack else ""
    return re.sub(r"@\d+$", "", name)


def _why(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if "data-dependent" in text or "GuardOnDataDependent" in type(error).__name__:
        return "its forward pass branches on the values of a tensor"
    return text[:200]


def trace(model: nn.Module, example: Inputs) -> Traced:
    """Trace a copy of ``model`` in evaluation mode on ``example``.

    Args:
        model: any module; left as it is.
        example: what its forward takes; a mapping is passed as keyword arguments.

    Example:
        >>> traced = trace(nn.Linear(3, 2), torch.zeros(4, 3))
        >>> sorted(traced.tensors.values())
        ['bias', 'weight']

    Raises:
        Untraceable: the forward pass raised, or does what cannot be traced; the user's line is named.
    """
    model = evaluated(model)
    positional = (example,) if isinstance(example, Tensor) else () if isinstance(example, Mapping) else tuple(example)
    named: dict[str, Any] = dict(example) if isinstance(example, Mapping) else {}
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(model, positional, named, strict=False)
    except Exception as error:
        line, source = user_line(error.__traceback__)
        what = f"{type(model).__name__} cannot be traced: {_why(error)}"
        raise Untraceable(f"{what}, at `{source}`" if source else what, line) from None
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    held = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    first: dict[int, str] = {}
    for name, value in held.items():
        first.setdefault(id(value), name)
    tensors = {place: first[id(held[name])] if name in held else name for place, name in names.items()}
    made = signature.inputs_to_lifted_tensor_constants
    constants = {place: program.constants[name] for place, name in made.items()}
    return Traced(program.graph, program.graph_module, tensors, constants)
