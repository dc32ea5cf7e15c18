"""The procedure contract: what may be done to a model, where, and how strongly.

A procedure decides and returns edits; copying, strength 0, the record of what was done and the rules of order are here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn

from torchgraft.bench.task import Task
from torchgraft.catalogue import Card
from torchgraft.engines.sites import Refusal, Site, ignored
from torchgraft.engines.surgery.edits import Edit, apply_edits
from torchgraft.errors import BadInput

__all__ = ["Procedure", "Refusal", "Site", "check_strength", "ignored"]


def check_strength(strength: float) -> float:
    """Return ``strength`` where it lies in [0, 1].

    Raises:
        BadInput: it does not.
    """
    if not 0.0 <= strength <= 1.0:
        raise BadInput(f"strength must lie in [0, 1], got {strength}")
    return float(strength)


class Procedure(ABC):
    """A change to a whole model with one dial.

    A subclass sets ``card`` and implements :meth:`applies_to` and :meth:`plan`; its constructor takes keyword-only
    settings with the paper's defaults, and works without arguments.
    """

    card: ClassVar[Card]
    #: Whether ``fit`` tries it unasked; a mere baseline says ``False``.
    in_fit: ClassVar[bool] = True
    #: What a decision takes: 0 the weights alone, 1 a few passes over calibration samples, 2 many (a pass for each
    #: unit or level), 3 training. ``fit`` tries the cheaper ones of a stage first.
    expense: ClassVar[int] = 1
    #: Whether the result computes what the model did, up to rounding; ``fit`` adds it to whatever else it tries.
    exact: ClassVar[bool] = False
    #: Whether what it does depends on times that it measures on this machine.
    timed: bool = False

    def for_costs(self, costs: Sequence[str]) -> Procedure:
        """Return this procedure set up for a run in which only ``costs`` are measured; by default as it is.

        A procedure that times something to decide must not do so where latency does not count, so that runs on exact
        costs repeat themselves.
        """
        return self

    @abstractmethod
    def applies_to(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Site]:
        """Return the sites of ``model`` that this procedure can act on; none means that it does not apply.

        Args:
            model: the model, never changed.
            task: where calibration samples and example inputs come from.
            ignore: globs of module names that must stay as they are.
        """

    def refusals(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Refusal]:
        """Return the places in ``model`` where this procedure cannot act, and why; called after :meth:`applies_to`."""
        return []

    @abstractmethod
    def plan(
        self, model: nn.Module, task: Task, strength: float, *, ignore: Sequence[str] = (), seed: int = 0
    ) -> list[Edit]:
        """Decide what to do at ``strength`` in (0, 1]; ``model`` may not be changed. See :meth:`apply`."""

    def apply(
        self, model: nn.Module, task: Task, strength: float, *, ignore: Sequence[str] = (), seed: int = 0
    ) -> nn.Module:
        """Return a changed copy of ``model``.

        Args:
            model: the model; left as it was.
            task: where calibration samples come from (only ``task.train`` is used).
            strength: from 0 (unchanged) to 1 (as far as the procedure goes); cost never rises with strength.
            ignore: globs of module names that must stay as they are.
            seed: makes every random choice; the same seed gives the same model.

        Raises:
            BadInput: strength lies outside [0, 1], or nothing in the model is a site of this procedure.
            Untraceable: the procedure needs a trace and the model cannot be traced.
        """
        if check_strength(strength) == 0.0:
            return apply_edits(model, [])
        if not self.applies_to(model, task, ignore=ignore):
            raise BadInput(f"{self.card.key} finds nothing to act on in {type(model).__name__}")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return apply_edits(model, self.plan(model, task, strength, ignore=ignore, seed=seed))

    def ending(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Edit]:
        """Return what is left to do to a model of this procedure once it is trained; by default nothing.

        It must not change what the model computes in eval mode.

        Args:
            model: a model that this procedure was applied to, in eval mode; it may not be changed.
            task: where example inputs come from.
            ignore: globs of module names that must stay as they are.
        """
        return []
