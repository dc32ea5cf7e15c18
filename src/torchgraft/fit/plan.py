"""The plan: which procedures apply to a model, where, in which order, and which combinations are refused."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from torchgraft.bench.task import Task
from torchgraft.catalogue import registry
from torchgraft.catalogue.card import STAGES, Card
from torchgraft.engines.procedure import Procedure, Site
from torchgraft.errors import BadInput, Untraceable, nearest
from torchgraft.fit.experience import known, price
from torchgraft.report.records import Refused

__all__ = ["Plan", "check_combination", "make_plan"]

#: How many times as long as the quickest a trial may take where time is short.
SLOW = 8.0
_logger = logging.getLogger("torchgraft")


@dataclass
class Plan:
    """What may be done to a model.

    Args:
        stages: stage -> the procedures that apply, in the order of :data:`STAGES`.
        sites: procedure key -> where it applies.
        refused: where procedures cannot act, and why.
    """

    stages: dict[str, dict[str, Procedure]] = field(default_factory=dict)
    sites: dict[str, list[Site]] = field(default_factory=dict)
    refused: list[Refused] = field(default_factory=list)

    @property
    def procedures(self) -> dict[str, Procedure]:
        """Every procedure of the plan by key, in order of stage."""
        return {key: procedure for stage in self.stages.values() for key, procedure in stage.items()}


def check_combination(keys: Sequence[str]) -> list[str]:
    """Return ``keys`` in the order in which they are applied.

    The rules: a procedure needs a stage, at most one stands in each stage, and none may conflict with another.

    Raises:
        BadInput: the combination is not allowed; the reason is given.

    Example:
        >>> check_combination(["int8-dynamic", "magnitude-pruning"])
        ['magnitude-pruning', 'int8-dynamic']
    """
    chosen: dict[str, Card] = {}
    for key in keys:
        card = registry.lookup(key)
        if card.stage is None:
            raise BadInput(f"{key} has no place in a pipeline of fit (its kind is {card.kind})")
        if card.stage in chosen:
            raise BadInput(f"{key} and {chosen[card.stage].key} are both of stage {card.stage}; one model takes one")
        chosen[card.stage] = card
    cards = list(chosen.values())
    for one in cards:
        for other in cards:
            if other.key in one.conflicts:
                raise BadInput(f"{one.key} and {other.key} cannot be combined: {one.conflicts[other.key]}")
    return [chosen[stage].key for stage in STAGES if stage in chosen]


def _candidates(wanted: Sequence[str] | None, *, training: bool) -> list[Card]:
    cards = [card for card in registry.cards().values() if card.kind == "procedure" and card.stage is not None]
    if wanted is None:
        return [card for card in cards if training or "needs-training" not in card.capabilities]
    known = {card.key: card for card in cards}
    for key in wanted:
        if key not in known:
            registry.lookup(key)
            raise BadInput(f"{key} has no place in fit{nearest(key, sorted(known))}")
        if not training and "needs-training" in known[key].capabilities:
            raise BadInput(f"{key} trains, which --no-training forbids")
    return [known[key] for key in wanted]


def make_plan(
    model: nn.Module,
    task: Task,
    *,
    wanted: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    training: bool = True,
    costs: Sequence[str] = ("latency",),
    aims: Sequence[str] = (),
    patient: bool = True,
) -> Plan:
    """Return the plan for ``model``.

    Args:
        model: the original model.
        task: its task.
        wanted: keys of the only procedures to consider; ``None`` for all that ``fit`` tries by itself.
        ignore: globs of module names that must stay as they are.
        training: whether procedures that train may be used.
        costs: the costs that are measured; a procedure may act otherwise where latency is not among them.
        aims: the costs that are to fall, by default all of ``costs``; what is best at them is tried first.
        patient: whether procedures of which one trial takes ``SLOW`` times as long as the quickest are tried unasked.

    Raises:
        BadInput: a wanted key is unknown or cannot be used, or no procedure applies at all.
    """
    plan = Plan()
    untraceable: Untraceable | None = None
    for card in _candidates(wanted, training=training):
        procedure: Procedure = registry.entry(card)().for_costs(costs)
        if wanted is None and not procedure.in_fit:
            continue
        if wanted is None and not patient and known(card.key, procedure.expense).seconds > SLOW:
            reason = "a trial of it takes too long for this run; give 10 minutes or more, or name it by --procedures"
            plan.refused.append(Refused(procedure=card.key, site="the whole model", reason=reason, line=None))
            continue
        if untraceable is not None and "needs-trace" in card.capabilities:
            plan.refused.append(
                Refused(procedure=card.key, site="the whole model", reason=str(untraceable), line=untraceable.line)
            )
            continue
        try:
            sites = procedure.applies_to(model, task, ignore=ignore)
        except Untraceable as error:
            untraceable = error
            plan.refused.append(Refused(procedure=card.key, site="the whole model", reason=str(error), line=error.line))
            _logger.warning("%s is not used: %s", card.key, error)
            continue
        plan.refused += [
            Refused(procedure=card.key, site=refusal.name, reason=refusal.reason, line=refusal.line)
            for refusal in procedure.refusals(model, task, ignore=ignore)
        ]
        if not sites:
            plan.refused.append(
                Refused(procedure=card.key, site="the whole model", reason="it finds nothing to act on", line=None)
            )
            continue
        plan.stages.setdefault(card.stage or "", {})[card.key] = procedure
        plan.sites[card.key] = sites
    plan.stages = {
        stage: dict(
            sorted(plan.stages[stage].items(), key=lambda item: price(item[0], item[1].expense, aims=aims or costs))
        )
        for stage in STAGES
        if stage in plan.stages
    }
    if not plan.stages:
        reasons = "; ".join(f"{refused.procedure}: {refused.reason}" for refused in plan.refused[:3])
        raise BadInput(f"no procedure applies to {type(model).__name__}: {reasons or 'there is none'}")
    return plan
