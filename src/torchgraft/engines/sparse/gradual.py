"""Block masks that grow while a model trains, along the cubic schedule, and are chosen on what lies under them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchgraft.engines.masks import apply_masks, cubic
from torchgraft.engines.sparse.pattern import best_blocks, kept_blocks

__all__ = ["GradualSparsity", "Schedule", "fitting_rows"]


@dataclass(frozen=True)
class Schedule:
    """When how much is pruned: cubic from ``initial`` at step ``start`` to the final sparsity at step ``end``.

    Args:
        start: step of the first pruning.
        end: step from which the masks are frozen.
        every: steps between two prunings.
        initial: sparsity at ``start``.
    """

    start: int
    end: int
    every: int = 1
    initial: float = 0.0

    def at(self, step: int, final: float) -> float:
        """Return the sparsity to have at ``step``.

        Example:
            >>> Schedule(0, 2).at(1, 0.8)
            0.7000000000000001
        """
        return cubic(step, start=self.start, end=self.end, final=final, initial=self.initial)

    def due(self, step: int) -> bool:
        """Say whether masks are chosen anew at ``step``."""
        return self.start <= step <= self.end and ((step - self.start) % self.every == 0 or step == self.end)


def _dense(model: nn.Module, name: str) -> Tensor:
    """Return the weight of a layer as it is trained, under its mask if it has one."""
    layer = model.get_submodule(name)
    made = dict(layer.named_parameters())
    weight = made["weight"] if "weight" in made else made["parametrizations.weight.original"]
    return weight.detach()


def fitting_rows(rows: int, block: int) -> int:
    """Return the largest of ``block`` and its halves that divides ``rows``.

    Example:
        >>> fitting_rows(6, 4)
        2
    """
    while rows % block:
        block //= 2
    return block


class GradualSparsity:
    """Masks on pointwise layers that grow with training; chosen anew along a schedule.

    Args:
        model: the model, masked in place.
        names: its layers.
        sparsity: what is reached at the end.
        block: output channels that share a pattern.
        schedule: when; ``None`` prunes at once.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], *, sparsity: float, block: int, schedule: Schedule | None
    ) -> None:
        self.model, self.names, self.final = model, tuple(names), sparsity
        self.block, self.schedule = block, schedule
        self.sparsity = 0.0
        if schedule is None:
            self._mask(sparsity)

    def update(self, step: int, loss: float = 0.0) -> None:
        """Choose the masks anew where the schedule says so; fits ``train(..., on_step=pruning.update)``.

        Args:
            step: steps that have been done.
            loss: not used.
        """
        if self.schedule is not None and self.schedule.due(step):
            self._mask(self.schedule.at(step, self.final))

    def _mask(self, sparsity: float) -> None:
        masks = {}
        for name in self.names:
            weight = _dense(self.model, name)
            rows, columns = weight.flatten(1).shape
            r = fitting_rows(rows, self.block)
            best = best_blocks(weight.flatten(1), kept_blocks(rows, columns, (r, 1), sparsity), (r, 1))
            kept = torch.zeros(rows // r * columns, dtype=torch.bool, device=weight.device)
            kept[best] = True
            mask = kept.view(rows // r, columns).repeat_interleave(r, 0)
            masks[f"{name}.weight" if name else "weight"] = mask.view(weight.shape)
        apply_masks(self.model, masks)
        self.sparsity = sparsity
