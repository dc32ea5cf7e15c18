"""Who is recovered at the end of a run without a budget, and how else what was recovered may end."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import optuna
from torch import Tensor, nn

from torchgraft.errors import BadInput
from torchgraft.fit.contribution import LEFT, SPAN, gains, promise
from torchgraft.fit.pareto import hypervolume
from torchgraft.fit.plan import check_combination
from torchgraft.fit.workshop import Workshop

__all__ = ["ENDING_SHARE", "Finalist", "Recovered", "left_over", "other_endings", "promising", "worth_recovering"]

#: The strengths of precision procedures by which recovered models end otherwise, and the share of the recovery's time
#: that this may take.
ENDINGS, ENDING_SHARE = (0.8, 1.0, 0.5), 0.15
#: What a recovery of this run weighs against what is known beforehand is 1 to this; a fall below this share of the span
#: that counts tells nothing.
BEFOREHAND, TELLING = 0.5, 0.1


@dataclass
class Finalist:
    """One model at the end of a run.

    Args:
        name: ``"original"``, ``"trial-3"``, or ``"trial-3-recovered"``.
        model: the finished model.
        strengths: procedure key -> strength.
        steps: recovery steps that it has had.
        scores: validation score of every sample.
        polished: whether it was recovered at length.
        float_model: the model before its precision procedure, where it was recovered.
        float_score: mean validation score of that.
        times: quickly measured ratios of noisy costs, where they are known.
    """

    name: str
    model: nn.Module
    strengths: dict[str, float]
    steps: int
    scores: Tensor
    polished: bool = False
    float_model: nn.Module | None = None
    float_score: float | None = None
    times: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Recovered:
    """What recovery at length has made of a trial.

    Args:
        trial: the trial.
        score: mean validation score after it, of the finished or the float model, whichever is better; that of the
            trial where it did not help.
    """

    trial: optuna.trial.FrozenTrial
    score: float


def left_over(workshop: Workshop, recovered: Sequence[Recovered]) -> float:
    """Return what share of a fall recovery at length leaves: what is known beforehand, and what it left in this run.

    Args:
        workshop: what the run shares.
        recovered: the trials that were recovered; those that had hardly lost anything tell nothing.
    """
    base = float(workshop.validation.mean())
    wide = workshop.span or SPAN * max(abs(base), 1e-9)
    falls = [(base - float(each.trial.user_attrs["record"]["validation"]), base - each.score) for each in recovered]
    shares = [min(max(after / before, 0.0), 1.0) for before, after in falls if before > TELLING * wide]
    return (BEFOREHAND * LEFT + sum(shares)) / (BEFOREHAND + len(shares))


def worth_recovering(
    workshop: Workshop, ranked: Sequence[optuna.trial.FrozenTrial], recovered: Sequence[Recovered]
) -> optuna.trial.FrozenTrial | None:
    """Return the trial whose recovery promises the most volume beyond what is held already; ``None`` if all are done.

    Held are the recovered ones and the trials as they are, which may stand on the front too: one that has lost nothing
    need not be recovered. A deep cut may be worth more than its score after a few steps says; how much more, the first
    recoveries show.

    Args:
        workshop: what the run shares.
        ranked: the trials, best score first.
        recovered: those among them that were recovered, in their order.
    """
    base, left = float(workshop.validation.mean()), left_over(workshop, recovered)

    def gained(trial: optuna.trial.FrozenTrial, score: float | None) -> tuple[float, ...]:
        record = trial.user_attrs["record"]
        ratios = [record["ratios"][cost] for cost in workshop.costs]
        if score is None:
            return promise(record["validation"], ratios, base, span=workshop.span, left=left)
        return gains(score, ratios, base, span=workshop.span)

    held = [gained(each.trial, each.score) for each in recovered]
    held += [gained(trial, trial.user_attrs["record"]["validation"]) for trial in ranked]
    done = {id(each.trial) for each in recovered}
    rest = [trial for trial in ranked if id(trial) not in done]
    hoped = [gained(trial, None) for trial in rest]
    # Where nothing is promised beyond what is held, the largest is trained on.
    volumes = [(hypervolume([*held, point]), hypervolume([point])) for point in hoped]
    return rest[max(range(len(rest)), key=lambda place: (volumes[place], -place))] if rest else None


def other_endings(workshop: Workshop, polished: Sequence[Finalist], until: float) -> list[Finalist]:
    """Return the recovered models with other precision procedures at their end than they were searched with.

    The float model under a precision procedure is trained without it, so another ending costs no training. First comes
    what suited the model when it was tried, with more bits where rounding has lost much of what recovery has brought,
    else with fewer; then the other procedures.

    Args:
        workshop: what the run shares.
        polished: recovered models.
        until: time (monotonic) after which no more are made.
    """
    stage = workshop.plan.stages.get("precision", {})
    telling = TELLING * (workshop.span or SPAN * max(abs(float(workshop.validation.mean())), 1e-9))
    found = []

    def turn(way: tuple[str, float, Finalist]) -> tuple[int, float]:
        key, strength, finalist = way
        own = finalist.strengths.get(key)
        if own is None:
            return 1, ENDINGS.index(strength)
        lost = 0.0 if finalist.float_score is None else finalist.float_score - float(finalist.scores.mean())
        return 0 if (strength < own) == (lost > telling) else 2, abs(strength - own)

    for key, strength, finalist in sorted(itertools.product(stage, ENDINGS, polished), key=turn):
        own = {k: s for k, s in finalist.strengths.items() if k not in stage}
        strengths = {**own, key: strength}
        if strengths == finalist.strengths or not own or time.monotonic() > until:
            continue
        float_model = finalist.float_model or finalist.model
        try:
            check_combination(list(strengths))
            scores = workshop.score(workshop.as_scored(float_model, strengths, workshop.seed))
            model = workshop.finish(float_model, strengths, workshop.seed)
        except BadInput:
            continue  # refused beside what stands there
        # Weights that are only stored otherwise are used as fast as before.
        alike = not any(stage[each].timed for each in (key, *finalist.strengths) if each in stage)
        times = finalist.times if alike else {}
        name = f"{finalist.name}-{key}-{strength:g}"
        found.append(Finalist(name, model, strengths, finalist.steps, scores, times=times))
    return found


def promising(workshop: Workshop, finalists: Sequence[Finalist], count: int) -> list[Finalist]:
    """Return at most ``count`` of ``finalists`` that no other beats when quickly measured, in their order."""
    if len(finalists) <= count:
        return list(finalists)
    quick = [
        {**each.times, **workshop.quick_ratios(each.model, [cost for cost in workshop.costs if cost not in each.times])}
        for each in finalists
    ]
    base = float(workshop.validation.mean())
    means = [float(finalist.scores.mean()) for finalist in finalists]
    points = [
        gains(mean, [q[cost] for cost in workshop.costs], base, span=workshop.span)
        for mean, q in zip(means, quick, strict=True)
    ]
    chosen: list[int] = []
    while len(chosen) < count:
        held = [points[index] for index in chosen]
        rest = [index for index in range(len(points)) if index not in chosen]
        best = max(rest, key=lambda index: (hypervolume([*held, points[index]]), -index))
        if hypervolume([*held, points[best]]) <= hypervolume(held) and chosen:
            break
        chosen.append(best)
    return [finalists[index] for index in sorted(chosen)]
