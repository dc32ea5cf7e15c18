"""Who reads the output of a norm: seen in a trace, or guessed where modules stand in ``nn.Sequential``."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize as native

from torchgraft.bench.task import Inputs
from torchgraft.engines.normalize.hugging_face import is_conv1d
from torchgraft.engines.surgery.trace import Traced, line_of, module_of, trace

__all__ = ["CONVS", "Reading", "places", "read_norms", "read_sequences"]

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PASSING = ("dropout", "alias", "clone", "contiguous", "detach")
_RESHAPING = ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "expand")
_CASTS = ("to", "_to_copy", "type_as")


@dataclass(frozen=True)
class Reading:
    """What was found out about the readers of a norm.

    Args:
        readers: the layers that read its output, and the number of axes of what the norm gives; 0 where not known.
        reason: why they are not all layers, empty where they are.
    """

    readers: tuple[tuple[str, int], ...] = ()
    reason: str = ""


def places(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return the modules that may be changed on their own, and of the others why they may not, by name.

    A module may be changed if it stands at one place, shares no tensor, and carries neither hooks nor parametrisations.
    """
    names: dict[nn.Module, list[str]] = {}
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    for module, known in names.items():
        for key, value in (*module._parameters.items(), *module._buffers.items()):
            if value is not None:
                owners.setdefault(id(value), []).append(f"{known[0]}.{key}".lstrip("."))
    free: dict[str, nn.Module] = {}
    bound: dict[str, str] = {}
    for module, known in names.items():
        held = (*module._parameters.values(), *module._buffers.values())
        shared = next((owners[id(value)] for value in held if value is not None and len(owners[id(value)]) > 1), None)
        reason = ""
        if len(known) > 1:
            reason = f"stands at {len(known)} places"
        elif module._forward_hooks or module._forward_pre_hooks:
            reason = "carries hooks"
        elif native.is_parametrized(module):
            reason = "is parametrised"
        elif shared is not None:
            others = [each for each in shared if each.rpartition(".")[0] != known[0]]
            reason = f"is tied to {', '.join(others) or 'itself'}"
        for name in known:
            if reason:
                bound[name] = reason
            elif name:
                free[name] = module
    return free, bound


def read_norms(model: nn.Module, example: Inputs, norms: Mapping[str, bool]) -> dict[str, Reading]:
    """Return who reads each of ``norms`` when ``model`` runs on ``example``.

    Args:
        model: any module.
        example: its inputs.
        norms: the norms that are asked about, and whether their channels are the last axis.

    Raises:
        Untraceable: the model cannot be traced.
    """
    traced = trace(model, example)
    free, bound = places(model)
    layers = _layers(traced, free)
    nodes = list(traced.graph.nodes)
    inside = {node: {str(entry[0]) for entry in (node.meta.get("nn_module_stack") or {}).values()} for node in nodes}
    calls: dict[str, set[str]] = {}
    for names in inside.values():
        for name in names:
            calls.setdefault(name.partition("@")[0], set()).add(name)
    held: dict[str, list[fx.Node]] = {}
    for node in traced.graph.nodes:
        if node.op == "placeholder" and node.name in traced.tensors:
            held.setdefault(traced.tensors[node.name].rpartition(".")[0], []).append(node)

    fixed = {*traced.tensors, *traced.constants}

    def reading(name: str, last: bool) -> Reading:
        if name in bound:
            return Reading(reason=f"it {bound[name]}")
        if len(calls.get(name, ())) != 1:
            return Reading(reason=f"it runs {len(calls.get(name, ()))} times")
        if any(name not in inside[user] for node in held.get(name, ()) for user in node.users):
            return Reading(reason="its parameters are read by another module")
        within = [node for node in nodes if name in inside[node]]
        given = [node for node in within if any(name not in inside[user] for user in node.users)]
        given = [node for node in given if _origin(node) in within]  # a cast that changes nothing gives its input back
        if len(given) != 1 or not isinstance(given[0].meta.get("val"), Tensor):
            return Reading(reason=f"it gives {len(given)} tensors that are read" if given else "nothing reads it")
        fed = {each for node in within for each in node.all_input_nodes}
        if len({each for each in fed if name not in inside[each] and each.name not in fixed}) > 1:
            return Reading(reason="it takes more than one input")
        found: list[tuple[str, int]] = []
        for reader, source in _readers(given[0], last):
            layer, at = layers.get(reader, ("", 0))
            if not layer or len(reader.args) <= at or reader.args[at] is not source:
                return Reading(reason=_why(reader, bound))
            found.append((layer, given[0].meta["val"].ndim))
        return Reading(tuple(found), "" if found else "nothing reads it")

    return {name: reading(name, last) for name, last in norms.items()}


def _op(node: fx.Node) -> str:
    """Return the name of an ATen operation without its namespace and overload."""
    parts = str(node.target).split(".")
    return parts[1] if len(parts) > 2 else parts[0]


def _why(reader: fx.Node, bound: Mapping[str, str]) -> str:
    if reader.op == "output":
        return "the model gives its output"
    home, line = module_of(reader), line_of(reader)
    if home in bound:
        return f"its reader {home} {bound[home]}"
    return f"it is read by {_op(reader)}{f' in {home}' if home else ''}{f' ({line})' if line else ''}"


def _readers(node: fx.Node, last: bool) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yield what reads ``node`` and as what, seen through operations after which a channel is still a channel."""
    for user in node.users:
        if _op(user) == "_assert_tensor_metadata":
            continue
        if _idle(user, node) or (_keeps_last(user, node) if last else _copies(user)):
            yield from _readers(user, last)
        else:
            yield user, node


def _idle(user: fx.Node, source: fx.Node) -> bool:
    name = _op(user)
    if name == "dropout":
        return len(user.args) > 2 and user.args[2] is False
    if name in _CASTS:
        same = isinstance(user.meta.get("val"), Tensor) and user.meta["val"].dtype == source.meta["val"].dtype
        return bool(same) and user.args[0] is source
    return name in _PASSING


def _origin(node: fx.Node) -> fx.Node:
    """Return the node whose numbers ``node`` gives as they are."""
    while node.args and isinstance(node.args[0], fx.Node) and _idle(node, node.args[0]):
        node = node.args[0]
    return node


def _copies(user: fx.Node) -> bool:
    return _op(user) == "pad" and len(user.args) > 2 and user.args[2] in ("reflect", "replicate", "circular")


def _keeps_last(user: fx.Node, source: fx.Node) -> bool:
    """Say whether ``user`` rearranges, picks or averages tokens of (..., C) and leaves the channels where they are."""
    before, after = source.meta.get("val"), user.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor) or before.dtype != after.dtype:
        return False
    if not user.args or user.args[0] is not source or before.shape[-1] < 2 or not after.ndim:
        return False
    name, rest, end = _op(user), user.args[1:], before.ndim - 1
    if after.shape[-1] != before.shape[-1]:
        return False
    if name in _RESHAPING:
        return True  # in row-major order, equal last axes are the same axis
    if name in ("slice", "select", "index_select"):
        along = rest[0] if rest else 0
        return isinstance(along, int) and along % before.ndim != end
    if name == "transpose":
        return all(isinstance(each, int) and each % before.ndim != end for each in rest)
    if name in ("permute", "mean") and rest and isinstance(rest[0], list | tuple):
        axes = [each % before.ndim for each in rest[0] if isinstance(each, int)]
        return axes[-1:] == [end] if name == "permute" else bool(axes) and end not in axes
    if name == "index" and rest and isinstance(rest[0], list | tuple):
        picks = [*rest[0]]
        masked = any(isinstance(each, fx.Node) and each.meta["val"].dtype == torch.bool for each in picks)
        return not masked and (len(picks) <= end or picks[end] is None)
    return False


def _layers(traced: Traced, free: Mapping[str, nn.Module]) -> dict[fx.Node, tuple[str, int]]:
    """Return the operations that are the one call of a linear layer or convolution: its name, its input's place."""
    found: dict[fx.Node, tuple[str, int]] = {}
    biases = {
        traced.tensors[node.name].rpartition(".")[0]: len(node.users)
        for node in traced.graph.nodes
        if node.op == "placeholder" and traced.tensors.get(node.name, "").endswith(".bias")
    }
    for node in traced.graph.nodes:
        if node.op != "placeholder" or node.name not in traced.tensors or len(node.users) != 1:
            continue
        home, _, leaf = traced.tensors[node.name].rpartition(".")
        layer = free.get(home)
        (user,) = node.users
        if leaf != "weight" or layer is None or module_of(user) != home or biases.get(home, 1) != 1:
            continue
        at = 2 if is_conv1d(layer) else 1
        known = is_conv1d(layer) or type(layer) in (nn.Linear, *CONVS)
        call = re.fullmatch(r"addmm" if is_conv1d(layer) else r"linear|conv[123]d", _op(user))
        if known and call and len(user.args) > at and user.args[at] is node:
            found[user] = (home, at - 1)
    return found


def read_sequences(model: nn.Module) -> dict[str, Reading]:
    """Return norms and the layers behind them in ``nn.Sequential``, where the types alone say that they fit."""

    def ordered(module: nn.Module) -> Iterator[nn.Module]:
        if type(module).forward is nn.Sequential.forward and not (module._forward_hooks or module._forward_pre_hooks):
            for child in module._modules.values():
                if child is not None:
                    yield from ordered(child)
        else:
            yield module

    free = {module: name for name, module in places(model)[0].items()}
    found: dict[str, Reading] = {}
    for norm, layer in itertools.pairwise(ordered(model)):
        if norm in free and layer in free:
            found[free[norm]] = Reading(((free[layer], 0),))  # no number of axes: what depends on it does not fit
    return found
