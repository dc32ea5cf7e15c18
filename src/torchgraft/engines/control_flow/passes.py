"""Procedures that say how a finished model is run: its passes on inputs like the task's, as compiled programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from torchgraft.bench.meters.forward import leaf_tensors, resting
from torchgraft.bench.meters.latency import interleaved
from torchgraft.bench.task import Task, call
from torchgraft.engines.control_flow.execution import LEAST_OPERATORS, Arithmetic, Execution, Form, RunCompiled, form_of
from torchgraft.engines.control_flow.fused import traits
from torchgraft.engines.control_flow.specialise import specialise
from torchgraft.engines.procedure import Procedure, Refusal, Site, ignored
from torchgraft.engines.surgery.edits import Edit, apply_edits, history
from torchgraft.errors import Untraceable

__all__ = ["WHOLE", "Passes"]

#: How the whole model is called as a site.
WHOLE = "(model)"
_NO_LATENCY = "weights and operators stay; only latency falls, and it is not measured"
#: The share of the time of what changes nothing that a pass which rounds may take and still be worth its rounding.
_WORTH = 0.85
_Self = TypeVar("_Self", bound="Passes")

#: How a model runs: by Python, by a program (``None``), or by a program in other numbers.
Way = Literal["python"] | Arithmetic | None
#: Seconds of a model's ways to run, side by side: measured for one procedure, and found by the next.
_TIMES: WeakKeyDictionary[nn.Module, dict[tuple[Form, int], dict[Way, float]]] = WeakKeyDictionary()


class Passes(Procedure):
    """Run the model's passes on inputs like the task's example as compiled programs, at any strength above 0.

    Args:
        timed: whether to act only where the program is faster on the task's example than what there is without this
            procedure, measured once on the first model that is asked about; ``fit`` asks for it.
        latency: whether latency counts at all; where it does not, nothing is a site.
    """

    expense = 0
    #: The numbers that programs compute in; by default those of the model.
    arithmetic: ClassVar[Arithmetic | None] = None

    def __init__(self, *, timed: bool = False, latency: bool = True) -> None:
        self.timed, self.latency = timed, latency
        self._slow: str | None = None
        self._refusals: list[Refusal] = []

    def for_costs(self: _Self, costs: Sequence[str]) -> _Self:
        """Return this procedure, timing where latency counts and doing nothing where it does not."""
        return type(self)(timed="latency" in costs, latency="latency" in costs)

    def applies_to(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Site]:
        """Return the whole model, or nothing. See :class:`Procedure`."""
        self._refusals = []
        if ignored(WHOLE, ignore):
            return []
        found = self._refusal(model, task)
        if isinstance(found, Refusal):
            self._refusals = [found]
            return []
        if found < LEAST_OPERATORS or _runs_compiled(model, task):
            return []
        if self.timed:
            if self._slow is None:
                self._slow = self._why_slow(model, task)
            if self._slow:
                self._refusals = [Refusal(WHOLE, self._slow)]
                return []
        return [Site(WHOLE, "operators", found, sum(value.numel() for value in model.parameters()))]

    def refusals(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Refusal]:
        """Return why the model cannot be compiled. See :class:`Procedure`."""
        return list(self._refusals)

    def plan(
        self, model: nn.Module, task: Task, strength: float, *, ignore: Sequence[str] = (), seed: int = 0
    ) -> list[Edit]:
        """Return one edit. See :class:`Procedure`."""
        return [RunCompiled.on(task.example, self.arithmetic)]

    def _refusal(self, model: nn.Module, task: Task) -> Refusal | int:
        """Return why ``model`` cannot be compiled, or how many operators a pass of it has."""
        if not self.latency:
            return Refusal(WHOLE, _NO_LATENCY)
        held = [*model.parameters(), *model.buffers(), *leaf_tensors(task.example)]
        if any(value.device.type != "cpu" for value in held):
            return Refusal(WHOLE, "operators are joined on a CPU; torch.compile does so elsewhere")
        named = dict(task.example) if isinstance(task.example, Mapping) else {}
        args = () if named else tuple(leaf_tensors(task.example))
        found = traits(model, args, named)
        if found.obstacle is not None:
            return Refusal(WHOLE, found.obstacle)
        if found.decides:
            if named:
                return Refusal(WHOLE, "it decides on its data, and takes keyword arguments")
            try:
                with resting(model):
                    specialise(model, args)
            except Untraceable as error:
                return Refusal(WHOLE, str(error), error.line)
        return found.operators

    def _why_slow(self, model: nn.Module, task: Task) -> str:
        """Return why no program is to be used on the task's example; nothing where it is faster."""
        known = _TIMES.setdefault(model, {}).setdefault((form_of(task.example), torch.get_num_threads()), {})
        if self.arithmetic not in known:
            made: dict[Way, nn.Module] = {"python": model}
            for way in dict.fromkeys((None, self.arithmetic)):
                each = apply_edits(model, [RunCompiled.on(task.example, way)])
                with resting(each), torch.inference_mode():
                    call(each, task.example)
                execution = each.__dict__["forward"]
                if isinstance(execution, Execution) and execution.compiled(task.example):
                    made[way] = each
            if self.arithmetic not in made:
                return "it cannot be compiled; the log says why"
            seconds = interleaved(list(made.values()), task.example, rounds=2)
            known.update({way: float(seconds[:, column].mean()) for column, way in enumerate(made)})
        beside = known["python"] if self.arithmetic is None else known.get(None, known["python"])
        ratio = known[self.arithmetic] / beside
        if self.arithmetic is None:
            return "" if ratio < 1.0 else f"compiled it takes {ratio:.2f} of the time here"
        words = f"in {self.arithmetic} it takes {ratio:.2f} of the time of a pass that rounds nothing"
        return "" if ratio < _WORTH else f"{words}, where less than {_WORTH} is worth the rounding"


def _runs_compiled(model: nn.Module, task: Task) -> bool:
    """Say whether an edit has ``model`` run compiled on the task's example already, in whatever numbers."""
    form = form_of(task.example)
    edits = [edit for edit in history(model) if isinstance(edit, RunCompiled)]
    return any(edit.form == form for edit in edits)
