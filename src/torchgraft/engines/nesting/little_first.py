"""A small network before a classifier: it answers first, and the classifier where the small one is not sure."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from torchgraft.bench.meters import macs
from torchgraft.bench.meters.forward import resting
from torchgraft.engines.nesting.elastic import ElasticModule
from torchgraft.engines.routing import share_threshold
from torchgraft.engines.surgery.edits import Edit, edit_from_record

__all__ = ["AddLittle", "LittleFirstModel", "margins"]


def margins(logits: Tensor) -> Tensor:
    """Return the largest probability less the second largest of each row, in float64.

    Shapes:
        (..., C) -> (...)
    """
    likeliest = logits.double().softmax(-1).topk(2, -1).values
    return likeliest[..., 0] - likeliest[..., 1]


class LittleFirstModel(ElasticModule):
    """A small network that answers first, and the original, which answers where the small one's margin is too small.

    Args:
        small: (B, ...) -> logits (B, C).
        big: the original, which the full budget runs; its parameters are frozen.
        calls: rising shares of the samples that the original answers, one budget each between the two ends.
        cost: multiply-accumulates of ``small`` beside those of ``big``.

    Shapes:
        (B, ...) -> (B, C)
    """

    by_sample: ClassVar[bool] = True

    def __init__(self, small: nn.Module, big: nn.Module, calls: Sequence[float], cost: float) -> None:
        super().__init__((cost, *(cost + share for share in calls), 1.0))
        self.small, self.big, self.calls = small, big.requires_grad_(False), tuple(calls)
        self.thresholds: Tensor
        self.register_buffer("thresholds", torch.zeros(len(self.calls), dtype=torch.float64))
        self.running = self.level
        #: How many samples of the latest call the original answered.
        self.asked = 0

    def select(self, level: int) -> None:
        """Run the small network alone at level 0, the original alone at the last, both at the others."""
        self.running = level

    def train(self, mode: bool = True) -> LittleFirstModel:
        """Set the mode of the small network; the original stays in eval mode."""
        super().train(mode)
        self.big.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Answer at the budget that is set; the original sees no sample that it need not answer."""
        out: Tensor
        if self.running > len(self.calls):
            self.asked, out = len(x), self.big(x)
            return out
        self.asked, out = 0, self.small(x)
        if self.running == 0:
            return out
        unsure = (margins(out.detach()) < self.thresholds[self.running - 1]).nonzero()[:, 0]
        self.asked = len(unsure)
        if 0 < self.asked < len(x):
            out = out.index_copy(0, unsure, self.big(x[unsure]).to(out.dtype))
        elif self.asked:
            out = self.big(x)
        return out

    @torch.no_grad()
    def set_thresholds(self, x: Tensor, *, batch_size: int) -> None:
        """Find the threshold of each budget on samples ``x``, and declare the multiply-accumulates that are then spent.

        Args:
            x: the samples, (N, ...).
            batch_size: how many run at once.
        """
        with resting(self):
            found = torch.cat([margins(self.small(part)) for part in torch.split(x, batch_size)])
        few = x[:batch_size]
        cost = macs(self.small, few) / macs(self.big, few)
        shares = [cost]
        for place, share in enumerate(self.calls):
            self.thresholds[place] = share_threshold(found, 1.0 - share)
            shares.append(cost + float((found < self.thresholds[place]).double().mean()))
        self.declare(shares)


class AddLittle(Edit):
    """Put a small network, cut from a copy of the model, before the model.

    Args:
        small: records of the edits that cut it.
        calls: as for :class:`LittleFirstModel`.
        cost: as for :class:`LittleFirstModel`.
    """

    op: ClassVar[str] = "add-little"
    small: tuple[dict[str, Any], ...] = Field(min_length=1)
    calls: tuple[float, ...] = Field(min_length=1)
    cost: float = Field(gt=0, lt=1)

    def rewrite(self, model: nn.Module) -> nn.Module:
        """Return the elastic model."""
        small = copy.deepcopy(model)
        for record in self.small:
            small = edit_from_record(record).rewrite(small)
        return LittleFirstModel(small.requires_grad_(True), model, self.calls, self.cost).train(model.training)

    def describe(self) -> dict[str, str]:
        """Return what the small network costs."""
        return {"": f"runs where a network of {self.cost:.3g} of its multiplications, cut from it, is not sure"}
