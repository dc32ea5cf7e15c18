"""The elastic contract: a model with several budgets, switched by one call, and the procedures that make one.

A budget is a share of the multiply-accumulates of the full model. Switching selects among weights that are all there;
nothing is copied, and the full budget is the original model.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from torchgraft.bench.meters import macs
from torchgraft.bench.task import Inputs, Task
from torchgraft.catalogue import Card
from torchgraft.engines.sites import Refusal, Site
from torchgraft.engines.surgery.edits import Edit, apply_edits
from torchgraft.errors import BadInput

__all__ = ["ElasticModule", "ElasticProcedure"]


class ElasticModule(nn.Module, ABC):
    """A model that runs at several budgets.

    A subclass calls ``super().__init__(budgets)``, holds the networks, and implements :meth:`select`. A network whose
    cost depends on the sample declares what it costs on average over the samples that it was calibrated on.

    Args:
        budgets: shares of the full model's multiply-accumulates, rising, the last one 1.

    Raises:
        BadInput: the budgets are empty, do not rise, do not end at 1, or lie outside (0, 1].

    Example:
        >>> class Two(ElasticModule):
        ...     def select(self, level):
        ...         self.scale = (1, 2)[level]
        >>> model = Two((0.5, 1.0))
        >>> model.set_budget(0.7).budget, model.scale
        (0.5, 1)
    """

    #: Whether what a budget costs depends on the samples.
    by_sample: ClassVar[bool] = False
    #: Index of the budget that is set.
    level: int

    def __init__(self, budgets: Sequence[float]) -> None:
        super().__init__()
        self.shares: Tensor
        self.register_buffer("shares", torch.tensor(self._checked(budgets), dtype=torch.float64))
        self.level = len(self.shares) - 1

    @staticmethod
    def _checked(budgets: Sequence[float]) -> list[float]:
        found = [float(budget) for budget in budgets]
        rising = all(low < high for low, high in itertools.pairwise(found))
        if not found or not rising or found[0] <= 0.0 or not math.isclose(found[-1], 1.0, abs_tol=1e-9):
            raise BadInput(f"budgets must rise from above 0 to 1, got {tuple(found)}")
        return found

    def calibrate(self, budgets: Sequence[float]) -> None:
        """Say anew what each level costs, such as after training; as many budgets as before.

        Raises:
            BadInput: the budgets are not as many, or not as the constructor wants them.
        """
        if len(budgets) != len(self.shares):
            raise BadInput(f"there are {len(self.shares)} budgets, got {len(budgets)}")
        self.shares.copy_(torch.tensor(self._checked(budgets), dtype=torch.float64))

    def declare(self, counted: Sequence[float]) -> None:
        """Say what each smaller level was counted to cost; where counts do not rise, 1e-9 apart.

        Budgets rise to 1, so that one which was counted to cost more than the full one stands just below it.

        Args:
            counted: of each level but the full one, over the count of the full one.
        """
        rising: list[float] = []
        for share in counted:
            rising.append(max(share, rising[-1] + 1e-9) if rising else max(share, 1e-9))
        top = 1.0 - 1e-9 * len(rising)
        self.calibrate((*(min(share, top + 1e-9 * place) for place, share in enumerate(rising)), 1.0))

    @torch.no_grad()
    def recount(self, inputs: Inputs) -> ElasticModule:
        """Declare what each budget costs on ``inputs``, such as samples that no training has seen; return the model.

        Args:
            inputs: samples; the model is left at its full budget.

        Raises:
            BadInput: the model fails on them.
        """
        whole = macs(self.set_budget(1.0), inputs)
        counted = []
        for level in range(len(self.shares) - 1):
            self.select(level)
            counted.append(macs(self, inputs) / whole)
        self.declare(counted)
        return self.set_budget(1.0)

    @property
    def budgets(self) -> tuple[float, ...]:
        """Shares of the full model's multiply-accumulates, rising, the last one 1; saved with the weights."""
        return tuple(self.shares.tolist())

    @property
    def budget(self) -> float:
        """The budget that is set."""
        return self.budgets[self.level]

    def set_budget(self, budget: float) -> ElasticModule:
        """Run at the largest of :attr:`budgets` that is at most ``budget``, from the next call on; return the model.

        Raises:
            BadInput: the budget lies outside (0, 1] or below the least that the model has.
        """
        if not 0.0 < budget <= 1.0:
            raise BadInput(f"budget must lie in (0, 1], got {budget}")
        level = bisect_right(self.budgets, budget + 1e-9) - 1
        if level < 0:
            raise BadInput(f"budget {budget} is below the least of this model, {self.budgets[0]:.4g}")
        self.select(level)
        self.level = level
        return self

    @abstractmethod
    def select(self, level: int) -> None:
        """Make the next call run at ``budgets[level]``; no tensor may be copied."""


class ElasticProcedure(ABC):
    """What makes one model of several budgets out of a trained one.

    A subclass sets ``card`` (kind ``procedure``, capability ``elastic``, no stage) and implements :meth:`applies_to`,
    :meth:`plan` and :meth:`train`; its constructor takes keyword-only settings and works without arguments.
    """

    card: ClassVar[Card]
    #: Whether ``fit --elastic`` tries it unasked.
    in_fit: ClassVar[bool] = True

    @abstractmethod
    def applies_to(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Site]:
        """Return the sites that this procedure can make elastic; none means that it does not apply."""

    def refusals(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Refusal]:
        """Return the places where this procedure cannot act, and why; called after :meth:`applies_to`."""
        return []

    @abstractmethod
    def plan(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = (), seed: int = 0) -> list[Edit]:
        """Return edits, the last of which makes an :class:`ElasticModule`, budgets included; ``model`` stays."""

    def initialise(self, elastic: ElasticModule, task: Task, *, seed: int = 0) -> None:
        """Set from training samples what ``elastic`` needs before it is trained, in place; by default nothing."""
        del elastic, task, seed

    def build(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = (), seed: int = 0) -> ElasticModule:
        """Return an elastic copy of ``model`` at its full budget, where it says what ``model`` says to 1e-6.

        Args:
            model: the trained model; left as it was.
            task: its task; only training samples are used.
            ignore: globs of module names that must stay as they are.
            seed: makes every random choice.

        Raises:
            BadInput: nothing in the model can be made elastic.
        """
        if not self.applies_to(model, task, ignore=ignore):
            raise BadInput(f"{self.card.key} finds nothing to make elastic in {type(model).__name__}")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            elastic = apply_edits(model, self.plan(model, task, ignore=ignore, seed=seed))
            if not isinstance(elastic, ElasticModule):
                raise TypeError(f"{self.card.key} planned no ElasticModule but {type(elastic).__name__}")
            self.initialise(elastic, task, seed=seed)
        return elastic.eval()

    @abstractmethod
    def train(
        self, elastic: ElasticModule, task: Task, *, steps: int, seed: int = 0, deadline: float | None = None
    ) -> int:
        """Train the smaller budgets in place and return the steps taken; the full budget keeps its outputs.

        Args:
            elastic: what :meth:`build` returned.
            task: only its training samples are used.
            steps: optimiser steps, 0 for none.
            seed: makes every random choice.
            deadline: a :func:`time.monotonic` moment after which no step is begun.

        Raises:
            BadInput: ``steps`` is negative.
        """
