"""Binary weights as a procedure: the edit that makes layers binary, and which layers go first.

A method says what its gradients are; :class:`BinaryProcedure` takes a share of the hidden layers, in the order of how
little of the logits each alone changes.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import nn

from torchgraft.bench.task import Task, call, take
from torchgraft.engines.binary.layers import hidden_layers, rebuild
from torchgraft.engines.procedure import Procedure, Site
from torchgraft.engines.surgery.edits import Edit, apply_edits
from torchgraft.errors import BadInput

__all__ = ["BinaryEdit", "BinaryProcedure"]


class BinaryEdit(Edit):
    """Make the layers ``modules`` binary; a method says how by :meth:`build`.

    Args:
        modules: dotted names of plain linear layers and 2-d convolutions.
        activations: whether their inputs become signs too.
    """

    modules: tuple[str, ...]
    activations: bool = False

    @abstractmethod
    def build(self, old: nn.Module) -> nn.Module:
        """Return the binary layer in place of ``old``, with the signs of its weights."""

    def rewrite(self, model: nn.Module) -> nn.Module:
        """Replace the layers; signs and scales are those of their weights."""
        return rebuild(model, self.modules, self.build)

    def describe(self) -> dict[str, str]:
        """Say how each layer is held and executed."""
        words = "binary weights and inputs" if self.activations else "binary weights"
        return dict.fromkeys(self.modules, f"{words}, stored in bits, executed in floating point")


class BinaryProcedure(Procedure):
    """Binary weights for a share of the hidden layers; strength is the share.

    Layers join in the order of how little of the logits each alone changes.

    Args:
        activations: whether inputs of these layers become signs too.
        samples: training samples on which the order of the layers is judged.

    Raises:
        BadInput: a setting is out of range.
    """

    expense = 2

    def __init__(self, *, activations: bool, samples: int) -> None:
        if samples < 1:
            raise BadInput(f"samples must be at least 1, got {samples}")
        self.activations = activations
        self.samples = samples

    @abstractmethod
    def edit(self, names: tuple[str, ...]) -> Edit:
        """Return the edit that makes the layers ``names`` binary."""

    def applies_to(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Site]:
        """Return the plain linear layers and convolutions between the first and the last."""
        return [
            Site(name, "layer", 1, sum(value.numel() for value in module.parameters()))
            for name, module in hidden_layers(model, ignore=ignore).items()
        ]

    def plan(
        self, model: nn.Module, task: Task, strength: float, *, ignore: Sequence[str] = (), seed: int = 0
    ) -> list[Edit]:
        """Take the layers that change the logits least first."""
        names = list(hidden_layers(model, ignore=ignore))
        inputs = take(task.train.inputs, slice(self.samples))
        with torch.no_grad():
            still = apply_edits(model, []).eval()
            wanted = task.output_logits(call(still, inputs))
            changes = {}
            for name in names:
                changed = self.edit((name,)).rewrite(apply_edits(still, [])).eval()
                changes[name] = float((task.output_logits(call(changed, inputs)) - wanted).square().mean())
        order = sorted(names, key=lambda name: changes[name])  # ties keep the order of the model
        taken = set(order[: math.ceil(strength * len(order))])
        return [self.edit(tuple(name for name in names if name in taken))]
