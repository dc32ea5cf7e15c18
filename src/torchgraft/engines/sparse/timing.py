"""Sparse layers of a model beside their dense twins, timed on what reaches them, and the sparsity where they meet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.bench.meters import Ratio, interleaved, interval
from torchgraft.bench.meters.forward import resting
from torchgraft.bench.task import Inputs, call
from torchgraft.engines.sparse.choose import Crossover, crossover
from torchgraft.engines.sparse.layers import SparseLinear, SparsePointwiseConv
from torchgraft.errors import BadInput

__all__ = ["Timing", "benchmark", "layer_crossover", "reached"]


@dataclass(frozen=True)
class Timing:
    """A sparse layer beside the dense layer with the same weights, on this machine.

    Args:
        name: the layer; the whole model is ``""``.
        sparsity: of the layer.
        columns: pixels or tokens of a call.
        ratio: its time over that of the dense layer.
        crossover: the sparsity above which it is faster.
    """

    name: str
    sparsity: float
    columns: int
    ratio: Ratio
    crossover: float

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.sparsity:.1%} sparse over {self.columns} columns takes {self.ratio.value:.2f}x "
            f"[{self.ratio.low:.2f}, {self.ratio.high:.2f}] of its dense time; faster from {self.crossover:.1%} on"
        )


def benchmark(model: nn.Module, x: Inputs, *, rounds: int = 15) -> list[Timing]:
    """Return, for each sparse layer of ``model``, its time and break-even sparsity on what reaches it of ``x``.

    Args:
        model: a model with sparse layers.
        x: inputs of the model.
        rounds: timing rounds.

    Raises:
        BadInput: no layer is sparse.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, SparseLinear | SparsePointwiseConv)}
    if not layers:
        raise BadInput("benchmark needs a model with sparse layers; make one first")
    found = []
    for name, example in reached(model, x, layers).items():
        layer = layers[name]
        twin = _twin(layer)
        seconds = interleaved([twin, layer], example, rounds=rounds)
        ratio = interval((seconds[:, 1] / seconds[:, 0]).tolist())
        meeting = layer_crossover(layer, tuple(example.shape), layer.pattern.block)
        columns = example.numel() // layer.pattern.columns
        found.append(Timing(name, layer.sparsity, columns, ratio, meeting.sparsity))
    return found


def _twin(layer: SparseLinear | SparsePointwiseConv) -> nn.Module:
    """Return the dense layer with the same function."""
    M, K = layer.pattern.rows, layer.pattern.columns
    twin: nn.Linear | nn.Conv1d | nn.Conv2d
    if isinstance(layer, SparseLinear):
        twin = nn.Linear(K, M, device="meta")
    elif len(layer.stride) == 1:
        twin = nn.Conv1d(K, M, 1, stride=layer.stride[0], device="meta")
    else:
        twin = nn.Conv2d(K, M, 1, stride=(layer.stride[0], layer.stride[1]), device="meta")
    twin.weight = nn.Parameter(layer.weight.detach())
    twin.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach())
    return twin.eval()


def reached(model: nn.Module, inputs: Inputs, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return the largest input that reaches each of ``layers`` in one forward pass, in the order of first calls."""
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor) and (name not in found or args[0].numel() > found[name].numel()):
                found[name] = args[0].detach()

        return hook

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in layers.items()]
    try:
        with resting(model), torch.no_grad():
            call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def layer_crossover(layer: nn.Module, shape: tuple[int, ...], block: tuple[int, int]) -> Crossover:
    """Return where a layer meets its dense form on inputs of ``shape``."""
    weight: Any = layer.weight
    rows, columns = weight.shape[:2]
    if isinstance(layer, nn.Linear | SparseLinear):
        return crossover(rows, columns, block, shape, tokens=True)
    steps: Any = layer.stride
    space = [-(-size // step) for size, step in zip(shape[-len(steps) :], steps, strict=True)]
    batch = shape[0] if len(shape) == len(steps) + 2 else 1
    return crossover(rows, columns, block, (batch, columns, *space), tokens=False)
