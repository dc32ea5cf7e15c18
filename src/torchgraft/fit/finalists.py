"""Who is recovered at the end of a run without a budget, and how else what was recovered may end."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import optuna
from torch import Tensor, nn

from torchgraft.errors import BadInput
from torchgraft.fit.contribution import gains, promise
from torchgraft.fit.pareto import hypervolume
from torchgraft.fit.plan import check_combination
from torchgraft.fit.workshop import Workshop

__all__ = ["ENDING_SHARE", "Finalist", "other_endings", "promising", "worth_recovering"]

#: The strengths of precision procedures by which recovered models end otherwise, and the share of the recovery's time
#: that this may take.
ENDINGS, ENDING_SHARE = (0.8, 1.0), 0.15


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
    """

    name: str
    model: nn.Module
    strengths: dict[str, float]
    steps: int
    scores: Tensor
    polished: bool = False
    float_model: nn.Module | None = None


def worth_recovering(
    workshop: Workshop, ranked: Sequence[optuna.trial.FrozenTrial], count: int
) -> list[optuna.trial.FrozenTrial]:
    """Return the trials that together promise the most volume, one after the other, once they are recovered.

    A deep cut may be worth more than its score after a few steps says.
    """
    base = float(workshop.validation.mean())
    records = [trial.user_attrs["record"] for trial in ranked]
    hoped = [
        promise(r["validation"], [r["ratios"][cost] for cost in workshop.costs], base, span=workshop.span)
        for r in records
    ]
    chosen: list[int] = []
    while len(chosen) < min(count, len(ranked)):
        held = [hoped[index] for index in chosen]
        rest = [index for index in range(len(ranked)) if index not in chosen]
        chosen.append(max(rest, key=lambda index: (hypervolume([*held, hoped[index]]), -index)))
    return [ranked[index] for index in chosen]


def other_endings(workshop: Workshop, polished: Sequence[Finalist], until: float) -> list[Finalist]:
    """Return the recovered models with other precision procedures at their end than they were searched with.

    The float model under a precision procedure is trained without it, so another ending costs no training.

    Args:
        workshop: what the run shares.
        polished: recovered models.
        until: time (monotonic) after which no more are made.
    """
    stage = workshop.plan.stages.get("precision", {})
    found = []
    for strength, key, finalist in itertools.product(ENDINGS, stage, polished):
        own = {k: s for k, s in finalist.strengths.items() if k not in stage}
        strengths = {**own, key: strength}
        if strengths == finalist.strengths or not own or time.monotonic() > until:
            continue
        try:
            check_combination(list(strengths))
            model = workshop.finish(finalist.float_model or finalist.model, strengths, workshop.seed)
            scores = workshop.score(model)
        except BadInput:
            continue  # refused beside what stands there
        name = f"{finalist.name}-{key}-{strength:g}"
        found.append(Finalist(name, model, strengths, finalist.steps, scores))
    return found


def promising(workshop: Workshop, finalists: Sequence[Finalist], count: int) -> list[Finalist]:
    """Return at most ``count`` of ``finalists`` that no other beats when quickly measured, in their order."""
    if len(finalists) <= count:
        return list(finalists)
    quick = [workshop.quick_ratios(finalist.model) for finalist in finalists]
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
