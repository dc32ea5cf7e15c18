"""The first choices of a run: what to try before the sampler has seen enough to choose."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torchgraft.errors import BadInput
from torchgraft.fit.experience import kept, known, price
from torchgraft.fit.plan import Plan, check_combination
from torchgraft.fit.workshop import Choice
from torchgraft.report.records import Trial

__all__ = ["STARTUP", "ascent", "opening"]

#: Trials of the ascent, and of the sampler's random phase.
STARTUP = 10
#: How many times the least price a procedure may have and still be tried before the sampler takes over.
DEAR = 12.0
#: The strengths that an ascent steps through, and that of the precision stage, which is varied at the end of a run.
RUNGS, PRECISION = (0.5, 0.7, 0.85, 0.95), 0.8
#: Halvings that count for a cost that does not fall, so that gains in the others still tell.
LITTLE = 0.05


def opening(plan: Plan, *, aims: Sequence[str], trials: Sequence[Trial] = (), original: float = 1.0) -> list[Choice]:
    """Return the first choices under a budget: one procedure a stage alone, natural pairs, then the other procedures.

    Stages come in their order, which is also that of cost: a cut in depth needs no trace and no scores. The other
    procedures come in the order of their price (:mod:`torchgraft.fit.experience`), which what the first choices have
    shown decides too. A stage, or a procedure, that costs more than ``DEAR`` times the best of all is left to the
    sampler.

    Args:
        plan: what may be done.
        aims: the costs that are to fall.
        trials: finished trials of this run.
        original: the original's validation score.
    """
    first = {stage: next(iter(keys)) for stage, keys in plan.stages.items()}
    before = {key: price(key, p.expense, aims=aims) for key, p in plan.procedures.items()}
    cheap = DEAR * min(before.values())
    begun = [Choice({stage: (key, 0.5)}) for stage, key in first.items() if before[key] <= cheap]
    for others in (
        ("depth", "width"),
        ("width", "precision"),
        ("depth", "width", "precision"),
        ("width", "weights"),
        ("width", "rank"),
    ):
        if all(stage in first for stage in others):
            strengths = {"depth": 0.3, "width": 0.5, "rank": 0.3, "weights": 0.5, "precision": 1.0}
            begun.append(Choice({stage: (first[stage], strengths[stage]) for stage in others}))
    shown = [trial for trial in trials if trial.number < len(begun)]
    prices = {
        (stage, key): price(
            key, procedure.expense, aims=aims, mates=[k for k in members if k != key], trials=shown, original=original
        )
        for stage, members in plan.stages.items()
        for key, procedure in members.items()
    }
    bound = DEAR * min(prices.values())
    affordable = [place for place, cost in prices.items() if first[place[0]] != place[1] and cost <= bound]
    rest = sorted(affordable, key=prices.__getitem__)
    return begun + [Choice({stage: (key, 0.5)}) for stage, key in rest]


def _volume(trial: Trial, original: float, aims: Sequence[str]) -> float:
    """Return the volume that a finished trial holds: the score that is kept times the halvings of each cost."""
    halvings = (max(-math.log2(max(trial.ratios.get(cost, 1.0), 1e-9)), LITTLE) for cost in aims)
    return kept(trial, original) * math.prod(halvings)


def _combinations(plan: Plan, aims: Sequence[str]) -> dict[tuple[str, ...], tuple[float, float]]:
    """Return every allowed combination of the two cheapest procedures of each stage: its expected volume and time."""
    options = []
    for members in plan.stages.values():
        best = sorted(members, key=lambda key: price(key, members[key].expense, aims=aims))[:2]
        options.append([None, *best])
    found = {}
    for picked in itertools.product(*options):
        keys = tuple(key for key in picked if key is not None)
        try:
            check_combination(keys)
        except BadInput:
            continue
        facts = [known(key, plan.procedures[key].expense) for key in keys]
        volume = math.prod(fact.kept for fact in facts)
        gained = (sum(fact.gain([cost]) / max(fact.kept, 1e-9) for fact in facts) for cost in aims)
        volume *= math.prod(max(halvings, LITTLE) for halvings in gained)
        if keys:
            found[keys] = (volume, 1.0 + sum(fact.seconds for fact in facts))
    return found


def ascent(plan: Plan, *, aims: Sequence[str], trials: Sequence[Trial] = (), original: float = 1.0) -> Choice | None:
    """Return the next choice without a budget, or ``None`` once the sampler has enough to go by.

    What is expected of a combination is the volume that a model would hold, the score that is kept times the halvings
    of each cost, if procedures did together what each has done alone (:mod:`torchgraft.fit.experience`), put right by
    the mean error of that guess in this run. A combination that has been tried is expected to gain by the next of the
    strengths ``RUNGS`` in proportion, as long as the last step up has gained. The most volume for the time is next.

    Args:
        plan: what may be done.
        aims: the costs that are to fall.
        trials: finished trials of this run.
        original: the original's validation score.
    """
    if len(trials) >= STARTUP:
        return None
    stage_of = {key: stage for stage, members in plan.stages.items() for key in members}
    guessed = _combinations(plan, aims)
    tried: dict[tuple[str, ...], list[Trial]] = {}
    for trial in trials:
        tried.setdefault(tuple(key for key in plan.procedures if key in trial.procedures), []).append(trial)

    def rung(trial: Trial) -> float:
        """The strength of a trial's float procedures, which is the same for all of them in an ascent."""
        return min([s for key, s in trial.procedures.items() if stage_of.get(key) != "precision"], default=1.0)

    errors = [
        math.log(max(_volume(members[0], original, aims), 1e-3) / max(guessed[keys][0], 1e-3))
        for keys, members in tried.items()
        if keys in guessed
    ]
    error = math.exp(sum(errors) / len(errors)) if errors else 1.0
    best: tuple[float, tuple[str, ...], float] | None = None
    for keys, (volume, seconds) in guessed.items():
        members = sorted(tried.get(keys, []), key=rung)
        strength, expected = RUNGS[0], volume * error
        if members:
            volumes = [_volume(trial, original, aims) for trial in members]
            steps = [step for step in RUNGS if step > rung(members[-1]) + 1e-9]
            if not steps or volumes[-1] < max(volumes):
                continue  # as far as it goes, or the last step up was one too many
            strength, further = steps[0], steps[0] / rung(members[-1])
            expected = volumes[-1] * further ** len(aims) * kept(members[-1], original) ** (further**2 - 1.0)
        if best is None or expected / seconds > best[0]:
            best = (expected / seconds, keys, strength)
    if best is None:
        return None
    _, keys, strength = best
    return Choice({stage_of[k]: (k, PRECISION if stage_of[k] == "precision" else strength) for k in keys})
