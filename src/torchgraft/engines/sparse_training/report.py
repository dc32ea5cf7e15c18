"""How sparse a model is and was, layer by layer and step by step, and what that costs in FLOPs.

f_d is the forward cost of all prunable layers dense and f_s at their densities. A training step costs 3 f_s (forward,
gradient of the inputs, gradient of the weights), and one that asks for the gradient of all weights 2 f_s + f_d.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from torchgraft.bench.task import Inputs, call
from torchgraft.engines.masks import prunable
from torchgraft.engines.parametrize import Masked, spec_of
from torchgraft.errors import BadInput

__all__ = ["SparsityReport", "Step", "forward_flops", "kept_counts"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Step:
    """One step of training.

    Args:
        kept: weights that each masked layer had in it; a layer that is not named was dense.
        dense_gradient: whether the gradient of all weights was computed, and none of them moved.
    """

    kept: Mapping[str, int]
    dense_gradient: bool = False


def forward_flops(model: nn.Module, example: Inputs) -> dict[str, int]:
    """Return the FLOPs of one forward pass of one sample through each prunable layer, dense: two a multiplication.

    Args:
        model: the model.
        example: inputs of at least one sample; the first dimension counts the samples.

    Example:
        >>> forward_flops(nn.Linear(3, 2), torch.zeros(5, 3))
        {'weight': 12}
    """
    first = example if isinstance(example, Tensor) else next(iter(_leaves(example)))
    samples = len(first)
    uses: dict[str, int] = {}

    def watch(name: str, layer: nn.Module) -> Any:
        channels_last = not isinstance(layer, nn.Linear) and type(layer).__name__ != "Conv1D"

        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            place = args[0] if isinstance(module, _TRANSPOSED) else out
            axis = (1 if place.ndim == cast(Tensor, module.weight).ndim else 0) if channels_last else -1
            uses[name] = uses.get(name, 0) + place.numel() // place.shape[axis]

        return hook

    weights = prunable(model)
    layers = {name: model.get_submodule(name.rpartition(".")[0]) for name in weights}
    handles = [layer.register_forward_hook(watch(name, layer)) for name, layer in layers.items()]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            call(model, example)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    return {name: 2 * weight.numel() * uses.get(name, 0) // samples for name, weight in weights.items()}


def _leaves(inputs: Any) -> list[Tensor]:
    return list(inputs.values()) if isinstance(inputs, Mapping) else list(inputs)


def kept_counts(model: nn.Module) -> dict[str, int]:
    """Return how many weights each prunable layer has: those that its mask keeps, or its nonzeros where it has none.

    A weight that a mask keeps and that is zero for the moment, as a new one is, counts.

    Example:
        >>> kept_counts(nn.Linear(3, 2))
        {'weight': 6}
    """
    counts: dict[str, int] = {}
    for name, weight in prunable(model).items():
        layer = model.get_submodule(name.rpartition(".")[0])
        places = [number for number, spec in enumerate(spec_of(layer)) if isinstance(spec, Masked)]
        if places:
            shown = torch.ones_like(weight, dtype=torch.bool)
            for place in places:
                shown &= cast(Any, layer).parametrizations.weight[place].get_buffer("mask")
        else:
            shown = weight.detach() != 0
        counts[name] = int(shown.sum())
    return counts


class SparsityReport:
    """The density of each layer now and at every step, and FLOPs a sample in inference and in the whole training.

    Args:
        model: the model after training.
        history: its steps (``MaskedTraining.history``), or nothing.
        example: inputs of the model, from which the cost of each layer is taken.

    Raises:
        BadInput: the model has no prunable weight, or the history names one that it does not have.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> report = SparsityReport(model, [Step({"0.weight": 6})] * 10, example=torch.zeros(1, 4))
        >>> report.dense_flops, report.training_flops, report.training_share
        (36, 720.0, 0.6666666666666666)
    """

    def __init__(self, model: nn.Module, history: Sequence[Step] = (), *, example: Inputs) -> None:
        self.sizes = {name: weight.numel() for name, weight in prunable(model).items()}
        if not self.sizes:
            raise BadInput(f"{type(model).__name__} has no prunable weight")
        unknown = {name for step in history for name in step.kept} - set(self.sizes)
        if unknown:
            raise BadInput(f"the history names {sorted(unknown)}, no prunable weights of the model")
        self.kept = kept_counts(model)
        self.history = tuple(history)
        self.layer_flops = forward_flops(model, example)

    @property
    def density(self) -> float:
        """The share of all prunable weights that is there."""
        return sum(self.kept.values()) / sum(self.sizes.values())

    @property
    def layers(self) -> dict[str, float]:
        """The density of every layer."""
        return {name: self.kept[name] / size for name, size in self.sizes.items()}

    def at(self, step: int) -> dict[str, float]:
        """Return the density of every layer during ``step`` of the history."""
        kept = self.history[step].kept
        return {name: kept.get(name, size) / size for name, size in self.sizes.items()}

    def _forward(self, kept: Mapping[str, int]) -> float:
        return math.fsum(flops * kept.get(name, self.sizes[name]) / self.sizes[name] for name, flops in self._costs())

    def _costs(self) -> list[tuple[str, int]]:
        return list(self.layer_flops.items())

    @property
    def dense_flops(self) -> int:
        """FLOPs of one forward pass of one sample, were every layer dense (f_d)."""
        return sum(self.layer_flops.values())

    @property
    def inference_flops(self) -> float:
        """FLOPs of one forward pass of one sample at the densities that the layers have now (f_s)."""
        return self._forward(self.kept)

    @property
    def training_flops(self) -> float:
        """FLOPs of the whole history, for one sample a step."""
        known: dict[int, float] = {}  # steps in a row share their counts
        total = []
        for step in self.history:
            key = id(step.kept)
            if key not in known:
                known[key] = self._forward(step.kept)
            total.append(2 * known[key] + self.dense_flops if step.dense_gradient else 3 * known[key])
        return math.fsum(total)

    @property
    def training_share(self) -> float:
        """The training FLOPs as a share of those of as many dense steps."""
        return self.training_flops / (3 * self.dense_flops * len(self.history)) if self.history else 1.0

    def __str__(self) -> str:
        lines = [f"{'layer':<32} {'kept':>9} {'of':>9} {'density':>8}"]
        lines += [f"{n:<32} {self.kept[n]:>9} {size:>9} {self.layers[n]:>8.4f}" for n, size in self.sizes.items()]
        lines.append(
            f"{'all':<32} {sum(self.kept.values()):>9} {sum(self.sizes.values()):>9} {self.density:>8.4f}"
            f"   inference {self.inference_flops / self.dense_flops:.3f}x, training {self.training_share:.3f}x"
        )
        return "\n".join(lines)
