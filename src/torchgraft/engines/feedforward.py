"""Feed-forward layers of a model, found by what they compute: down(act(up(x))), or down(act(gate(x)) * up(x)).

A module counts when two or three ``nn.Linear`` hold all its parameters and one of these formulas gives its outputs,
token by token, on an example. Its class and the names inside play no part.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.meters.forward import resting
from torchgraft.bench.task import Inputs, call
from torchgraft.engines.taps import record

__all__ = ["ACTIVATIONS", "FeedForwardLayer", "feedforwards"]

#: Activations that are recognised, by name.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu-tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "squared-relu": lambda x: F.relu(x).square(),
}


@dataclass(frozen=True)
class FeedForwardLayer:
    """Where a feed-forward layer stands and what it computes.

    Args:
        name: dotted name of the module in the model.
        up, down: dotted names of the linear layers within the module.
        gate: that of the gating one, or ``None`` where there is none.
        activation: name in :data:`ACTIVATIONS`.
        d_model, hidden: widths.
    """

    name: str
    up: str
    down: str
    gate: str | None
    activation: str
    d_model: int
    hidden: int

    def linears(self, module: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Linear | None]:
        """Return (up, down, gate) of the module that stands at ``name``."""
        up, down = module.get_submodule(self.up), module.get_submodule(self.down)
        gate = None if self.gate is None else module.get_submodule(self.gate)
        return up, down, gate  # type: ignore[return-value]  # feedforwards saw that they are linear


def _held(module: nn.Module) -> dict[str, nn.Linear] | None:
    """Return the linear layers that hold all parameters of ``module``, if two or three do."""
    found: dict[str, nn.Linear] = {}
    for name, child in module.named_modules():
        if type(child) is nn.Linear and name:
            found[name] = child
        elif child._parameters:
            return None
    inside = {id(value) for child in found.values() for value in child.parameters()}
    whole = {id(value) for value in module.parameters()}
    return found if len(found) in (2, 3) and inside == whole else None


def _formula(name: str, module: nn.Module, linears: dict[str, nn.Linear], x: Tensor) -> FeedForwardLayer | None:
    with torch.no_grad():
        wanted = module(x)
    if not isinstance(wanted, Tensor) or wanted.shape[:-1] != x.shape[:-1]:
        return None
    rows = x.reshape(-1, x.shape[-1])
    scale = max(float(wanted.abs().max()), 1e-6)
    for order in itertools.permutations(linears):
        up, down = linears[order[0]], linears[order[-1]]
        gate = linears[order[1]] if len(order) == 3 else None
        firsts = [up] if gate is None else [up, gate]
        if any(each.in_features != x.shape[-1] or each.out_features != down.in_features for each in firsts):
            continue
        if down.out_features != wanted.shape[-1]:
            continue
        for activation, act in ACTIVATIONS.items():
            with torch.no_grad():
                made = down(act(up(rows)) if gate is None else act(gate(rows)) * up(rows)).reshape(wanted.shape)
            if float((made - wanted).abs().max()) <= 1e-4 * scale:
                inner = order[1] if gate is not None else None
                return FeedForwardLayer(name, order[0], order[-1], inner, activation, up.in_features, up.out_features)
    return None


def feedforwards(model: nn.Module, example: Inputs) -> list[FeedForwardLayer]:
    """Return the feed-forward layers of ``model``, outermost only, in the order in which they stand in it.

    Args:
        model: any module; it is left as it was.
        example: inputs for it.

    Example:
        >>> from torchgraft.bench.models import VisionTransformer
        >>> model = VisionTransformer(d_model=8, depth=2, num_heads=2)
        >>> found = feedforwards(model, torch.randn(2, 1, 8, 8))
        >>> [(layer.name, layer.up, layer.down, layer.activation, layer.hidden) for layer in found]
        [('blocks.0.mlp', 'fc1', 'fc2', 'gelu', 32), ('blocks.1.mlp', 'fc1', 'fc2', 'gelu', 32)]
    """
    candidates = {
        name: (module, linears) for name, module in model.named_modules() if name and (linears := _held(module))
    }
    if not candidates:
        return []
    found: list[FeedForwardLayer] = []
    with resting(model), record(model, list(candidates), "input") as seen, torch.no_grad():
        call(model, example)
    with resting(model):
        for name, (module, linears) in candidates.items():
            calls = seen.calls(name)
            if len(calls) != 1 or not isinstance(calls[0], Tensor) or calls[0].ndim < 2:
                continue
            if any(name.startswith(f"{layer.name}.") for layer in found):
                continue
            layer = _formula(name, module, linears, calls[0])
            if layer is not None:
                found.append(layer)
    return found
