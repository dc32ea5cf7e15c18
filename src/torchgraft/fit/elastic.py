"""``fit`` with ``elastic=True``: one model with several budgets instead of one model a budget.

Every elastic procedure that applies gets the same time, is measured at each of its budgets beside the original, and
the one whose budgets hold most (hypervolume over score and costs) is kept.
"""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from torchgraft.bench.task import Task, take
from torchgraft.bench.training import evaluate
from torchgraft.catalogue import registry
from torchgraft.catalogue.card import Card
from torchgraft.engines import recipe
from torchgraft.engines.nesting import ElasticModule, ElasticProcedure
from torchgraft.engines.surgery.edits import history
from torchgraft.errors import BadInput, Untraceable, nearest
from torchgraft.fit import finals
from torchgraft.fit.budget import Limit
from torchgraft.fit.contribution import gains
from torchgraft.fit.outputs import make_record, note_settings, write_outputs
from torchgraft.fit.pareto import hypervolume
from torchgraft.fit.plan import Plan
from torchgraft.fit.result import FitResult
from torchgraft.fit.search import Progress
from torchgraft.fit.workshop import NOISY, Workshop
from torchgraft.report.records import Applied, Candidate, NotHelped, Refused, Trial

__all__ = ["AtBudget", "Family", "elastic_plan", "make_families", "fit_elastic", "measured_beside", "winner"]

#: Time of a run where none is given and a measured cost is noisy.
ELASTIC_SECONDS = 180.0
#: Training steps where every cost is exact and no time is given.
STEPS = 200
#: Validation samples on which is counted what budgets cost, at most, where that depends on samples.
COUNTED = 512
#: Steps by which it is found out how many a given time allows.
_TRIAL_STEPS = 9
_logger = logging.getLogger("torchgraft")


class AtBudget(nn.Module):
    """An elastic model at one budget, as a model of its own; the weights are those of the elastic model.

    Args:
        elastic: the elastic model.
        budget: which budget.
    """

    def __init__(self, elastic: ElasticModule, budget: float) -> None:
        super().__init__()
        self.elastic, self.at = elastic, budget

    def forward(self, *args: Any, **options: Any) -> Any:
        """Set the budget and run."""
        return self.elastic.set_budget(self.at)(*args, **options)


@dataclass
class Family:
    """One elastic model.

    Args:
        key: the procedure that made it.
        model: the model.
        steps: training steps that it has had.
        seconds: how long it took to make.
        scores: validation scores of every sample, by budget.
    """

    key: str
    model: ElasticModule
    steps: int
    seconds: float
    scores: dict[float, Tensor]


def _cards(wanted: Sequence[str] | None) -> list[Card]:
    cards = {
        card.key: card
        for card in registry.cards().values()
        if card.kind == "procedure" and "elastic" in card.capabilities
    }
    for key in wanted or ():
        if key not in cards:
            registry.lookup(key)
            raise BadInput(f"{key} makes no elastic model{nearest(key, sorted(cards))}")
    return list(cards.values()) if wanted is None else [cards[key] for key in wanted]


def elastic_plan(
    model: nn.Module, task: Task, *, wanted: Sequence[str] | None, ignore: Sequence[str]
) -> tuple[dict[str, ElasticProcedure], list[Refused]]:
    """Return the elastic procedures that apply to ``model``, by key, and where others cannot act.

    Raises:
        BadInput: a wanted key is unknown or makes no elastic model, or none applies.
    """
    found: dict[str, ElasticProcedure] = {}
    refused: list[Refused] = []
    for card in _cards(wanted):
        procedure: ElasticProcedure = registry.entry(card)()
        if wanted is None and not procedure.in_fit:
            continue
        line = None
        try:
            sites = procedure.applies_to(model, task, ignore=ignore)
            reasons = [(r.name, r.reason, r.line) for r in procedure.refusals(model, task, ignore=ignore)]
        except Untraceable as error:
            sites, reasons, line = [], [("the whole model", str(error), error.line)], error.line
        refused += [Refused(procedure=card.key, site=s, reason=why, line=at) for s, why, at in reasons]
        if sites:
            found[card.key] = procedure
        elif not reasons:
            refused.append(
                Refused(procedure=card.key, site="the whole model", reason="it finds nothing to act on", line=line)
            )
    if not found:
        why = "; ".join(f"{row.procedure}: {row.reason}" for row in refused[:3])
        raise BadInput(f"no elastic procedure applies to {type(model).__name__}: {why or 'there is none'}")
    return found, refused


def _folder(folder: Path, key: str) -> Path:
    return folder / "elastic" / key


def _resumed(workshop: Workshop, key: str, folder: Path) -> tuple[ElasticModule, int] | None:
    kept = _folder(folder, key)
    if not (kept / "recipe.yaml").exists():
        return None
    written = recipe.read_recipe(kept)
    model = recipe.rebuild(written, workshop.task.architecture(), kept)
    return (model, written.recovery_steps) if isinstance(model, ElasticModule) else None


class _Enough(Exception):  # it reports no error: a trial ends where it was to end
    pass


def paced(procedure: ElasticProcedure, elastic: ElasticModule, task: Task, *, seconds: float, seed: int = 0) -> int:
    """Return how many training steps ``seconds`` allow, at least one, so that the learning rate falls within them.

    The first steps of a copy are timed by its optimiser; what training does after its steps is not waited for.

    Args:
        procedure: what made ``elastic``.
        elastic: the model; left as it was.
        task: its task.
        seconds: time for training, a tenth of which is left for what it does beside its steps.
        seed: makes every random choice.
    """
    if seconds <= 0:
        return 1
    begun = time.monotonic()
    ends: list[float] = []

    def note(*_: Any) -> None:
        ends.append(time.monotonic())
        if len(ends) > _TRIAL_STEPS or (len(ends) > 1 and ends[-1] > begun + seconds / 10):
            raise _Enough

    handle = register_optimizer_step_post_hook(note)
    try:
        procedure.train(copy.deepcopy(elastic), task, steps=4 * _TRIAL_STEPS, seed=seed, deadline=begun + seconds)
    except _Enough:
        pass
    finally:
        handle.remove()
    if len(ends) < 2:
        return STEPS if not ends else 1
    each = statistics.median(end - start for start, end in itertools.pairwise(ends))
    return max(int(0.9 * (begun + seconds - time.monotonic()) / max(each, 1e-6)), 1)


def make_families(
    workshop: Workshop,
    procedures: Mapping[str, ElasticProcedure],
    folder: Path,
    *,
    seconds: float | None,
    tell: Callable[[Progress], None],
    training: bool = True,
) -> tuple[list[Family], list[Trial]]:
    """Build and train an elastic model by each procedure; finished ones in ``folder`` are taken from there.

    Args:
        workshop: task, original and costs.
        procedures: by key.
        folder: the run's folder.
        seconds: time for all of them, or ``None`` for a fixed number of steps.
        tell: told of every step.
        training: whether models may be trained.
    """
    families: list[Family] = []
    trials: list[Trial] = []
    begun = time.monotonic()
    for place, (key, procedure) in enumerate(procedures.items()):
        tell(Progress("search", f"making {key} elastic", place / len(procedures), tuple(trials)))
        started = time.monotonic()
        try:
            kept = _resumed(workshop, key, folder)
            if kept is None:
                elastic = procedure.build(workshop.original, workshop.task, ignore=workshop.ignore, seed=workshop.seed)
                steps, deadline = STEPS, None
                if seconds is not None and training:
                    share = max(seconds - (time.monotonic() - begun), 0.0) / (len(procedures) - place)
                    deadline = time.monotonic() + share
                    steps = paced(procedure, elastic, workshop.task, seconds=share, seed=workshop.seed)
                taken = (
                    procedure.train(elastic, workshop.task, steps=steps, seed=workshop.seed, deadline=deadline)
                    if training
                    else 0
                )
                elastic.eval().set_budget(1.0)
                if elastic.by_sample:  # what it costs on samples that no training has seen; no label is looked at
                    elastic.recount(take(workshop.task.val.inputs, slice(COUNTED)))
                recipe.save(
                    elastic,
                    _folder(folder, key),
                    task=workshop.task.source,
                    seed=workshop.seed,
                    procedures={key: 1.0},
                    recovery_steps=taken,
                )
            else:
                elastic, taken = kept
            scores = {}
            for budget in elastic.budgets:
                elastic.set_budget(budget)
                scores[budget] = evaluate(elastic, workshop.task, workshop.task.val)
                if not bool(torch.isfinite(scores[budget]).all()):
                    raise BadInput(f"the score at budget {budget:.3g} is NaN or infinite")
            elastic.set_budget(1.0)
        except OSError:
            raise
        except Exception as error:  # whatever a model's own forward raises once its parts are replaced
            if "the disk is full" in str(error):
                raise
            _logger.warning("%s failed: %s", key, error, exc_info=not isinstance(error, BadInput))
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            trials.append(_trial(len(trials), key, "failed", None, reason, time.monotonic() - started))
            continue
        family = Family(key, elastic, taken, time.monotonic() - started, scores)
        families.append(family)
        least = float(scores[elastic.budgets[0]].mean())
        trials.append(_trial(len(trials), key, "complete", least, "", family.seconds))
    if not families:
        raise BadInput(f"no elastic model could be made: {'; '.join(f'{t.procedures}: {t.reason}' for t in trials)}")
    return families, trials


def _trial(number: int, key: str, state: Any, score: float | None, reason: str, seconds: float) -> Trial:
    return Trial(
        number=number,
        state=state,
        procedures={key: 1.0},
        validation=score,
        ratios={},
        reason=reason,
        seconds=seconds,
    )


def _names(family: Family) -> dict[float, str]:
    """Return a name for every budget, in as many digits as tell them apart, two at least."""
    budgets = family.model.budgets
    digits = next(d for d in range(2, 18) if len({f"{budget:.{d}f}" for budget in budgets}) == len(budgets))
    return {budget: f"{family.key}@{budget:.{digits}f}" for budget in budgets}


def judged_by(workshop: Workshop) -> str:
    """Return the cost by which elastic models are judged: the first of the budget, else time where it is measured.

    Weights are shared by all budgets, so neither parameters nor size tell them apart; and a model that multiplies less
    and takes longer is no gain.
    """
    if workshop.limits:
        return workshop.limits[0].cost
    return next((cost for cost in ("latency", "macs", "memory") if cost in workshop.costs), workshop.primary)


def measured_beside(
    workshop: Workshop, families: Sequence[Family], max_drop: float | None
) -> tuple[list[Candidate], dict[str, tuple[Family, float]]]:
    """Return the original and every budget of every family, measured side by side, and what each name stands for."""
    places = {name: (family, budget) for family in families for budget, name in _names(family).items()}
    finalists = [finals.Finalist("original", workshop.original, {}, 0, workshop.validation)]
    finalists += [
        finals.Finalist(name, AtBudget(family.model, budget), {}, family.steps, family.scores[budget])
        for name, (family, budget) in places.items()
    ]
    costs = finals.costs_of(workshop, finalists)
    candidates = []
    for finalist, cost in zip(finalists, costs, strict=True):
        candidate = finals.candidate_of(workshop, finalist, cost, max_drop)
        if finalist.name in places:
            family, budget = places[finalist.name]
            changes = {module: words for edit in history(family.model) for module, words in edit.describe().items()}
            title = registry.lookup(family.key).title
            done = Applied(key=family.key, title=title, strength=budget, sites=sorted(changes), changes=changes)
            candidate = candidate.model_copy(update={"procedures": [done]})
        candidates.append(candidate)
    return candidates, places


def volume(workshop: Workshop, candidates: Sequence[Candidate], costs: Sequence[str]) -> float:
    """Return the hypervolume that ``candidates`` hold over the score and ``costs``."""
    base = float(workshop.validation.mean())
    return hypervolume([gains(c.validation.value, [c.costs[cost].ratio for cost in costs], base) for c in candidates])


def winner(
    workshop: Workshop, candidates: Sequence[Candidate], places: Mapping[str, tuple[Family, float]]
) -> tuple[str, list[NotHelped]]:
    """Return the key of the family that holds most, and what is to be said of the others.

    The volume is taken over the score and the cost by which they are judged, see :func:`judged_by`.
    """
    keys = list(dict.fromkeys(family.key for family, _ in places.values()))
    own = {key: [c for c in candidates if c.name in places and places[c.name][0].key == key] for key in keys}
    cost = judged_by(workshop)
    volumes = {key: volume(workshop, members, [cost]) for key, members in own.items()}
    best = max(keys, key=lambda key: volumes[key])
    notes = [
        NotHelped(
            what=registry.lookup(key).title,
            why=f"its budgets hold less than those of {registry.lookup(best).title}",
            evidence=f"hypervolume over score and {cost}: {volumes[key]:.3f} against {volumes[best]:.3f}",
        )
        for key in keys
        if key != best
    ]
    return best, notes


def fit_elastic(
    task: Task,
    original: torch.nn.Module,
    limits: Sequence[Limit],
    measured: Sequence[str],
    folder: Path,
    tell: Callable[[Progress], None],
    *,
    seconds: float | None,
    max_drop: float | None,
    seed: int,
    training: bool,
    ignore: Sequence[str],
    wanted: Sequence[str] | None,
    export: str | None,
    begun: float,
) -> FitResult:
    """Make one model of several budgets; see :mod:`torchgraft.fit.elastic`."""
    procedures, refused = elastic_plan(original, task, wanted=wanted, ignore=ignore)
    workshop = Workshop(task, original, Plan(), limits, measured, ignore=ignore, seed=seed)
    settings: dict[str, object] = {
        "elastic": True,
        "budget": [limit.text for limit in limits],
        "costs": list(measured),
        "seed": seed,
        "training": training,
        "ignore": list(ignore),
        "procedures": list(procedures),
        "torchgraft": version("torchgraft"),
    }
    note_settings(folder, workshop, settings)
    if seconds is None and any(cost in NOISY for cost in measured):
        seconds = ELASTIC_SECONDS
    families, trials = make_families(
        workshop,
        procedures,
        folder,
        seconds=None if seconds is None else 0.85 * seconds,
        tell=tell,
        training=training,
    )
    tell(Progress("measure", "measuring side by side", None, tuple(trials)))
    candidates, places = measured_beside(workshop, families, max_drop)
    key, lost = winner(workshop, candidates, places)
    shown = [
        candidate for candidate in candidates if candidate.name not in places or places[candidate.name][0].key == key
    ]
    family = next(family for family in families if family.key == key)
    feasible = [c for c in shown[1:] if c.feasible]
    best = nearest_name = None
    if feasible:  # with a budget the best score within it; without one the cheapest that keeps the score
        best = (
            max(feasible, key=lambda c: (c.validation.value, -c.costs[judged_by(workshop)].ratio)).name
            if limits
            else min(feasible, key=lambda c: c.costs[judged_by(workshop)].ratio).name
        )
    else:
        nearest_name = min(shown[1:], key=lambda c: (finals.distance(workshop, c, max_drop), -c.validation.value)).name
    levels = {
        c.name: finals.Finalist(
            c.name, AtBudget(family.model, places[c.name][1]), {}, family.steps, family.scores[places[c.name][1]]
        )
        for c in shown[1:]
    }
    levels["original"] = finals.Finalist("original", original, {}, 0, workshop.validation)
    shown = finals.score_on_test(workshop, shown, levels, list(levels))
    shown = [c.model_copy(update={"best": c.name == best}) for c in shown]
    model = levels[best].model if best is not None else None
    record = make_record(
        workshop,
        max_drop,
        begun,
        trials=trials,
        refused=refused,
        not_helped=lost,
        contributions=[],
        nearest=nearest_name,
        best=best,
        model=model,
    )
    texts = ", ".join(f"{budget:.2f}" for budget in family.model.budgets)
    record.notes.append(f"one model with the budgets {texts} of its multiplications; model.set_budget(b) switches")
    family.model.set_budget(1.0 if best is None else places[best][1])
    save = functools.partial(
        recipe.save,
        family.model,
        folder,
        task=task.source,
        seed=seed,
        procedures={key: family.model.budget},
        costs={c.name: f"{c.costs[workshop.primary].ratio:.3f}x {workshop.primary}" for c in shown[1:]},
        validation=next(c for c in shown if c.name == (best or nearest_name)).validation.value,
        recovery_steps=family.steps,
        budget=family.model.budget,
    )
    write_outputs(folder, shown, record, save, model, task, export)
    return FitResult(shown, record, folder, family.model)
