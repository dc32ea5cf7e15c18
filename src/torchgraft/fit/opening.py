"""The first choices of a run: what to try before the sampler has seen enough to choose.

What a combination of procedures will do is guessed from what each has done alone (:mod:`torchgraft.fit.experience`), as
if they did not touch each other, and put right by what this run has shown: where a trial does better or worse than
guessed, the procedures in it share the credit or the blame.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from torchgraft.errors import BadInput
from torchgraft.fit.contribution import promise
from torchgraft.fit.endings import LITTLE, USUAL
from torchgraft.fit.experience import SHIPPED, Known, kept, known, price
from torchgraft.fit.plan import Plan, check_combination
from torchgraft.fit.workshop import Choice
from torchgraft.report.records import Trial

__all__ = ["STARTUP", "alone", "ascent", "descent"]

#: Trials of an ascent, and of the sampler's random phase; combinations that are tried first under a budget.
STARTUP, COMBINED = 10, 6
#: How many times the least price a procedure may have and still be tried before the sampler takes over.
DEAR = 12.0
#: The strengths that an ascent steps through.
RUNGS = (0.5, 0.7, 0.85, 0.95)
#: The share of the score that a trial must promise for the next one to leap over a rung.
HELD = 0.95
#: The strength at which procedures are taken to do what is known of them, and the least and most of a first guess.
REFERENCE, LEAST, MOST = 0.5, 0.1, 0.9
#: How many times as many halvings as are known a procedure can reach by its full strength.
FARTHEST = 1.0 / REFERENCE

Keys = tuple[str, ...]


def alone(plan: Plan, *, aims: Sequence[str], trials: Sequence[Trial] = (), original: float = 1.0) -> list[Choice]:
    """Return every procedure alone, by its price, which the trials so far decide too.

    One that costs more than ``DEAR`` times the best of all is left to the sampler, and what is exact goes with all.

    Args:
        plan: what may be done.
        aims: the costs that are to fall.
        trials: finished trials of this run.
        original: the original's validation score.
    """
    prices = {
        (stage, key): price(
            key, procedure.expense, aims=aims, mates=[k for k in members if k != key], trials=trials, original=original
        )
        for stage, members in plan.stages.items()
        for key, procedure in members.items()
        if not procedure.exact
    }
    bound = DEAR * min(prices.values(), default=0.0)
    affordable = [place for place, cost in prices.items() if cost <= bound]
    return [Choice({stage: (key, REFERENCE)}) for stage, key in sorted(affordable, key=prices.__getitem__)]


def _facts(plan: Plan, keys: Keys) -> list[Known]:
    return [known(key, plan.procedures[key].expense) for key in keys]


def _halvings(facts: Sequence[Known], cost: str) -> float:
    """Return the halvings of a cost by procedures together, each as it fares alone."""
    return max(sum(fact.gain([cost]) / max(fact.kept, 1e-9) for fact in facts), LITTLE)


def _combinations(plan: Plan, aims: Sequence[str], *, counts: Mapping[str, int] = MappingProxyType({})) -> list[Keys]:
    """Return every allowed combination of the cheapest procedures of each stage: two, or as ``counts`` says.

    What is exact is in every one of them, unless another procedure of its stage is.
    """
    options: list[list[str | None]] = []
    for stage, members in plan.stages.items():
        best: list[str | None] = [*sorted(members, key=lambda key: price(key, members[key].expense, aims=aims))]
        best = best[: counts.get(stage, 2)]
        free = [key for key in members if members[key].exact]
        options.append([*free, *(key for key in best if key not in free)] if free else [None, *best])
    found = []
    for picked in itertools.product(*options):
        keys = tuple(key for key in picked if key is not None)
        try:
            check_combination(keys)
        except BadInput:
            continue
        if any(not plan.procedures[key].exact for key in keys):
            found.append(keys)
    return found


def _tried(
    plan: Plan, trials: Sequence[Trial], standing: Mapping[str, str | None] | None = None
) -> dict[Keys, list[Trial]]:
    """Return the trials by their procedures, in the order of the plan; what ``standing`` names stands for others."""
    found: dict[Keys, list[Trial]] = {}
    for trial in trials:
        used = {(standing or {}).get(key, key) for key in trial.procedures}
        found.setdefault(tuple(key for key in plan.procedures if key in used), []).append(trial)
    return found


def _credit(shown: Mapping[Keys, float], guessed: Mapping[Keys, float]) -> dict[str, float]:
    """Return the logarithm of what each procedure is better than known: its share of what each trial was above guess.

    What was known counts as ``SHIPPED`` trials without surprise.

    Args:
        shown: what the first trial of a combination has come to.
        guessed: what was expected of it.
    """
    shares: dict[str, list[float]] = {}
    for keys, value in shown.items():
        surprise = math.log(max(value, 1e-3) / max(guessed[keys], 1e-3))
        for key in keys:
            shares.setdefault(key, []).append(surprise / len(keys))
    return {key: sum(own) / (SHIPPED + len(own)) for key, own in shares.items()}


def _put_right(guess: float, keys: Keys, credit: Mapping[str, float]) -> float:
    return guess * math.exp(sum(credit.get(key, 0.0) for key in keys))


def _choice(plan: Plan, keys: Keys, strength: float, precision: float) -> Choice:
    stages = {key: stage for stage, members in plan.stages.items() for key in members}
    full = {key for key in keys if plan.procedures[key].exact or stages[key] == "execution"}
    at = {k: 1.0 if k in full else precision if stages[k] == "precision" else strength for k in keys}
    return Choice({stages[key]: (key, at[key]) for key in keys})


def _seconds(plan: Plan, keys: Keys) -> float:
    """Return the time of a trial of ``keys``: that of the quickest procedure alone, and what each takes beyond it."""
    return 1.0 + sum(max(fact.seconds - 1.0, 0.0) for fact in _facts(plan, keys))


def descent(
    plan: Plan, *, needs: Mapping[str, float], trials: Sequence[Trial] = (), original: float = 1.0
) -> Choice | None:
    """Return the next choice under a budget, or ``None`` once ``COMBINED`` combinations have been tried.

    A combination that halves a cost h times and keeps r of the score is expected to keep r^(x^2) where x h halvings are
    needed: a small step costs little, a large one much. The most for its time is next, each combination once, at
    strengths in proportion to x; one of them is solved for afterwards.

    Args:
        plan: what may be done.
        needs: cost -> the ratio that the budget allows.
        trials: finished trials of this run.
        original: the original's validation score.
    """
    tried = _tried(plan, trials)
    if len(trials) >= COMBINED:
        return None
    asked = {cost: max(-math.log2(max(ratio, 1e-9)), LITTLE) for cost, ratio in needs.items()}
    guessed, stretch = {}, {}
    # What is not exact in how a model runs can only help where its time counts.
    counts = {} if "latency" in needs else {"execution": 0}
    for keys in _combinations(plan, list(needs), counts=counts):
        facts = _facts(plan, keys)
        stretch[keys] = max(halvings / _halvings(facts, cost) for cost, halvings in asked.items())
        guessed[keys] = math.prod(max(fact.kept, 1e-3) for fact in facts) ** (stretch[keys] ** 2)
        guessed[keys] *= min(1.0, FARTHEST / stretch[keys]) ** 4  # hardly within reach, whatever it keeps
    shown = {keys: kept(members[0], original) for keys, members in tried.items() if keys in guessed}
    credit = _credit(shown, guessed)
    rest = [keys for keys in guessed if keys not in tried]
    if not rest:
        return None
    keys = max(rest, key=lambda keys: _put_right(guessed[keys], keys, credit) / _seconds(plan, keys))
    return _choice(plan, keys, min(max(REFERENCE * stretch[keys], LEAST), MOST), 1.0)


def _volume(trial: Trial, original: float, aims: Sequence[str], span: float | None) -> tuple[float, float]:
    """Return the volume that a trial promises to hold once it is recovered, and the share of the score in it."""
    if trial.validation is None or trial.state == "failed":
        return 0.0, 0.0
    share, *halvings = promise(trial.validation, [trial.ratios.get(cost, 1.0) for cost in aims], original, span=span)
    return share * math.prod(max(value, LITTLE) for value in halvings), share


def ascent(
    plan: Plan,
    *,
    aims: Sequence[str],
    trials: Sequence[Trial] = (),
    original: float = 1.0,
    span: float | None = None,
) -> Choice | None:
    """Return the next choice without a budget, or ``None`` once the sampler has enough to go by.

    A combination is worth the volume that a model would hold once it is recovered: the share of the score that is kept
    times the halvings of each cost. One that has been tried is expected to gain by the next of the strengths ``RUNGS``
    in proportion, as long as the last step up has gained; where nothing was lost the next is leapt over, and taken
    afterwards if that was too far. One that has lost everything may come again at half its strength. One that differs
    from a combination that was tried by one procedure begins where that was worth most. The most volume for the time is
    next. One precision procedure stands for all: which of them ends a model, and how far it goes, is chosen when the
    float model under it is there, and so is how that is executed (:mod:`~torchgraft.fit.endings`).

    Args:
        plan: what may be done.
        aims: the costs that are to fall.
        trials: finished trials of this run.
        original: the original's validation score.
        span: the fall of the score at which a model is worth nothing, as for
            :func:`~torchgraft.fit.contribution.gains`.
    """
    if len(trials) >= STARTUP:
        return None
    stages = {key: stage for stage, members in plan.stages.items() for key in members}

    ending = ("precision", "execution")
    dialled = {key for key, p in plan.procedures.items() if stages[key] not in ending and not p.exact}

    def rung(trial: Trial) -> float:
        """The strength of a trial's float procedures, which is the same for all of them in an ascent."""
        return min([strength for key, strength in trial.procedures.items() if key in dialled], default=1.0)

    guessed = {}
    for keys in _combinations(plan, aims, counts={"precision": 1, "execution": 0}):
        facts = _facts(plan, keys)
        guessed[keys] = math.prod(fact.kept for fact in facts) * math.prod(_halvings(facts, cost) for cost in aims)
    endings = {key for keys in guessed for key in keys if stages[key] == "precision"}
    executions = plan.stages.get("execution", {})
    standing: dict[str, str | None] = dict.fromkeys(
        executions, next((k for k, p in executions.items() if p.exact), None)
    )
    standing |= {key: next(iter(endings), key) for key in plan.stages.get("precision", {})}
    tried = _tried(plan, trials, standing)
    credit = _credit({k: _volume(t[0], original, aims, span)[0] for k, t in tried.items() if k in guessed}, guessed)

    def beside(keys: Keys, other: Keys) -> bool:
        """Say whether ``keys`` are ``other`` with one procedure more, or with another of the same stage for one."""
        fresh, gone = set(keys) - set(other), set(other) - set(keys)
        return len(fresh) == 1 and len(gone) <= 1 and {stages[key] for key in gone} <= {stages[key] for key in fresh}

    def first_step(keys: Keys) -> tuple[float, float]:
        """Return what is expected of a combination that has not been tried, and the strength at which to begin."""
        expected = _put_right(guessed[keys], keys, credit)
        best = expected, RUNGS[0]
        for other, members in tried.items():
            if other not in guessed or not beside(keys, other) or not dialled.intersection(other):
                continue
            volume, last = max((_volume(trial, original, aims, span)[0], rung(trial)) for trial in members)
            if volume > 0.0:
                times = expected / max(_put_right(guessed[other], other, credit), 1e-9)
                best = max(best, (volume * times, min(max(last, RUNGS[0]), RUNGS[-1])))
        return best

    def offer(keys: Keys) -> tuple[float, float] | None:
        """Return the volume that is expected of the next trial of a combination, and its strength."""
        members, expected = sorted(tried.get(keys, []), key=rung), _put_right(guessed[keys], keys, credit)
        if not members:
            return first_step(keys)
        volumes = [_volume(trial, original, aims, span)[0] for trial in members]
        lowest, last = rung(members[0]), rung(members[-1])
        if volumes[0] == 0.0 and RUNGS[0] / 4 < lowest < 1.0:
            return expected * (lowest / 2 / RUNGS[0]) ** len(aims), lowest / 2
        if volumes[-1] == 0.0 or volumes[-1] < max(volumes):  # one step too many; half of a leap may do
            further = next((step for step in RUNGS if len(members) > 1 and rung(members[-2]) < step < last), None)
            number = -2
        else:
            ahead = [step for step in RUNGS if step > last + 1e-9]
            held = _volume(members[-1], original, aims, span)[1] >= HELD
            further = None if not ahead else ahead[min(1, len(ahead) - 1)] if held else ahead[0]
            number = -1
        if further is None:
            return None  # as far as it goes
        share = _volume(members[number], original, aims, span)[1]
        times = further / rung(members[number])
        return volumes[number] * times ** len(aims) * min(share, 1.0) ** (times**2 - 1.0), further

    best: tuple[float, Keys, float] | None = None
    for keys in guessed:
        found = offer(keys)
        if found is not None and (best is None or found[0] / _seconds(plan, keys) > best[0]):
            best = (found[0] / _seconds(plan, keys), keys, found[1])
    return None if best is None else replace(_choice(plan, best[1], best[2], USUAL), free_ending=True)
