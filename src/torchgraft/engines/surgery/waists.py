"""Waists of a model: modules whose output is all that the rest of the forward pass reads, and passes that pause there.

A waist is found on a trace: behind it no other tensor that depends on the input is still wanted. The pass itself stays
the model's own forward. It is looked into by hooks that stand for that one pass, and goes on with what is put in the
place of the waist's output, such as some of the samples alone; or it ends there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from torchgraft.bench.meters.counts import CountingMode
from torchgraft.bench.meters.forward import resting
from torchgraft.engines.sites import ignored
from torchgraft.engines.surgery.trace import Traced, trace
from torchgraft.errors import BadInput

__all__ = ["Waist", "narrows", "pausing", "waists"]


@dataclass(frozen=True)
class Waist:
    """A module whose output, one image-shaped tensor (B, C, h, w), is all that the rest of the pass reads.

    Args:
        name: dotted name of the module.
        channels: C.
        size: h and w.
        cost: share of the pass's multiply-accumulates that lie before the end of the module.
    """

    name: str
    channels: int
    size: tuple[int, int]
    cost: float


class _Over(Exception):  # it reports no error: the pass ends where it was to end
    pass


def pausing(model: nn.Module, names: Sequence[str], visit: Callable[[int, Tensor], Tensor | None], x: Tensor) -> Any:
    """Run ``model`` on ``x`` and call ``visit`` at the end of some of its modules; return what the model returns.

    Passes of other threads through the same model go on as if nobody looked.

    Args:
        model: the model.
        names: dotted names of modules that each run once a pass, and return a tensor.
        visit: takes the place in ``names`` and the module's output and returns what stands for it, or ``None`` to end
            the pass, which then returns ``None`` itself.
        x: what the model takes.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> pausing(net, ["1"], lambda place, seen: seen[:2], torch.zeros(5, 2)).shape
        torch.Size([2, 1])

    Raises:
        BadInput: a module runs again within the pass, or returns no tensor.
    """
    seen: set[int] = set()
    thread = threading.get_ident()

    def look(place: int, output: Any) -> Any:
        if threading.get_ident() != thread:
            return output
        if place in seen or not isinstance(output, Tensor):
            what = "ran twice in one pass" if place in seen else f"returned {type(output).__name__}, not a tensor"
            raise BadInput(f"module {names[place]!r} {what}, so nothing can be read there")
        seen.add(place)
        found = visit(place, output)
        if found is None:
            raise _Over
        return found

    handles = [
        model.get_submodule(name).register_forward_hook(lambda module, args, output, at=place: look(at, output))
        for place, name in enumerate(names)
    ]
    try:
        return model(x)
    except _Over:
        return None
    finally:
        for handle in handles:
            handle.remove()


def waists(model: nn.Module, example: Tensor, *, ignore: Sequence[str] = ()) -> list[Waist]:
    """Return the waists of ``model`` in the order in which they are passed; of several at one cost, the last.

    Args:
        model: any module that takes one tensor; left as it was.
        example: two samples for it, or more.
        ignore: globs of module names that are none.

    Example:
        >>> conv = lambda c, d: nn.Sequential(nn.Conv2d(c, d, 3, padding=1), nn.ReLU())
        >>> net = nn.Sequential(conv(1, 4), conv(4, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> [(found.name, found.channels, round(found.cost, 2)) for found in waists(net, torch.zeros(2, 1, 6, 6))]
        [('0', 4, 0.2), ('1', 4, 1.0)]

    Raises:
        Untraceable: the forward pass cannot be traced.
    """
    ends = _ends(trace(model, example[:2]))
    observed: dict[str, list[tuple[Any, int]]] = {name: [] for name in ends if not ignored(name, ignore)}
    counting = CountingMode()
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, at=name: observed[at].append((output, counting.total))
        )
        for name in observed
    ]
    try:
        with resting(model), torch.no_grad(), counting:
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    by_cost: dict[int, Waist] = {}
    # Outer modules end after those in them, so that of all that end with one tensor the outermost is kept.
    for name, calls in sorted(observed.items(), key=lambda item: (ends[item[0]], -item[0].count("."))):
        if len(calls) == 1 and calls[0][1] > 0:
            made, cost = calls[0]
            if _is_image(made, len(example)):
                by_cost[cost] = Waist(name, made.shape[1], (made.shape[2], made.shape[3]), cost / counting.total)
    return list(by_cost.values())


def _is_image(value: Any, samples: int) -> bool:
    if not isinstance(value, Tensor) or value.ndim != 4 or not value.is_floating_point():
        return False
    return len(value) == samples and value.shape[2] * value.shape[3] > 1


def _ends(traced: Traced) -> dict[str, int]:
    """Return the modules at whose end one tensor that depends on an input is left to read, and where that is."""
    nodes = list(traced.graph.nodes)
    last: dict[fx.Node, int] = {}
    depends: set[fx.Node] = set()
    inside: dict[str, int] = {}
    for number, node in enumerate(nodes):
        last.update(dict.fromkeys(node.all_input_nodes, number))
        given = node.op == "placeholder" and node.name not in traced.tensors and node.name not in traced.constants
        if given or any(each in depends for each in node.all_input_nodes):
            depends.add(node)
        stack = node.meta.get("nn_module_stack") or {}
        inside.update({str(name).partition("@")[0]: number for name, _ in stack.values()})
    found: dict[str, int] = {}
    live: set[fx.Node] = set()
    for number, node in enumerate(nodes):
        live = {each for each in (*live, node) if each in depends and last.get(each, -1) > number}
        if live == {node}:
            found.update((name, number) for name, end in inside.items() if name and end == number)
    return found


def narrows(model: nn.Module, name: str, example: Tensor) -> bool:
    """Say whether a pass that goes on behind module ``name`` with some samples says of them what the whole one says.

    Args:
        model: the model; left as it was.
        name: dotted name of the module.
        example: at least one sample.
    """
    rows = torch.arange(6) % len(example)
    kept = torch.tensor([4, 0, 3, 1])
    with resting(model), torch.no_grad():
        whole = model(example[rows])
        try:
            part = pausing(model, [name], lambda place, seen: seen[kept], example[rows])
        except Exception:  # whatever the model's own code raises means the same: the rest wants all samples
            return False
    scale = float(whole.abs().max())
    return part.shape == whole[kept].shape and torch.allclose(
        part, whole[kept], rtol=1e-3, atol=1e-3 * max(scale, 1e-6)
    )
