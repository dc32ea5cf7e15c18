"""The search around the front: once a run without a budget knows where it is good, look beside that.

A sampler that knows nothing of fronts draws from everything that may be tried, and the more methods there are, the less
it sees of each. Here a trial that holds volume is drawn by how much it holds, and changed a little: every strength by
itself, for an ascent moves all of them together, and now and then one method.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from torchgraft.errors import BadInput
from torchgraft.fit.contribution import promise
from torchgraft.fit.pareto import hypervolume
from torchgraft.fit.plan import Plan, check_combination
from torchgraft.fit.workshop import Choice
from torchgraft.report.records import Trial

__all__ = ["nearby"]

#: The standard deviation of a step in a strength, the least and most strength, and how often a method changes.
STEP, LEAST, MOST, OFTEN = 0.1, 0.1, 1.0, 0.3
#: Changes that are drawn before the search is left to the sampler.
TRIES = 20


def nearby(
    plan: Plan,
    *,
    aims: Sequence[str],
    trials: Sequence[Trial],
    original: float,
    seed: int,
    span: float | None = None,
) -> Choice | None:
    """Return a choice beside one that holds volume, or ``None`` where no trial holds any.

    Args:
        plan: what may be done.
        aims: the costs that are to fall.
        trials: finished trials of this run.
        original: the original's validation score.
        seed: of all that is drawn; the same trials and seed give the same choice.
        span: the fall of the score at which a model is worth nothing, as for
            :func:`~torchgraft.fit.contribution.gains`.
    """
    draw = np.random.default_rng(seed)
    done = [trial for trial in trials if trial.state == "complete" and trial.validation is not None]
    points = [
        promise(trial.validation or 0.0, [trial.ratios.get(cost, 1.0) for cost in aims], original, span=span)
        for trial in done
    ]
    held = np.array([hypervolume([point]) for point in points])
    # What a better trial of all aims holds too is no place to look: a trial counts by what is lost without it.
    whole = hypervolume(points)
    own = np.array([whole - hypervolume([*points[:i], *points[i + 1 :]]) for i in range(len(points))])
    worth = np.where(own > 1e-9, held, 0.0)
    if not worth.sum():
        return None
    known = {tuple(sorted((key, round(s, 2)) for key, s in trial.procedures.items())) for trial in trials}
    for _ in range(TRIES):
        parent = done[int(draw.choice(len(done), p=worth / worth.sum()))]
        choice = _changed(plan, parent, draw)
        if choice is None:
            continue
        if tuple(sorted((key, round(s, 2)) for key, s in choice.procedures.values())) not in known:
            return choice
    return None


def _changed(plan: Plan, parent: Trial, draw: np.random.Generator) -> Choice | None:
    """Return the choice of ``parent`` with every strength moved, or ``None`` where the rules refuse what came out."""
    stages = {key: stage for stage, members in plan.stages.items() for key in members}
    chosen = {stages[key]: (key, strength) for key, strength in parent.procedures.items() if key in stages}
    if draw.random() < OFTEN:
        stage = str(draw.choice(list(plan.stages)))
        options = [None, *(key for key in plan.stages[stage] if chosen.get(stage, ("",))[0] != key)]
        key = options[int(draw.integers(len(options)))]
        strength = float(np.median([s for _, s in chosen.values()])) if chosen else 0.5
        if key is None:
            chosen.pop(stage, None)
        else:
            chosen[stage] = (key, strength)
    if not any(not plan.procedures[key].exact for key, _ in chosen.values()):
        return None
    moved = {
        stage: (
            key,
            strength if plan.procedures[key].exact else float(np.clip(strength + draw.normal(0, STEP), LEAST, MOST)),
        )
        for stage, (key, strength) in chosen.items()
    }
    try:
        check_combination([key for key, _ in moved.values()])
    except BadInput:
        return None
    return Choice({stage: moved[stage] for stage in plan.stages if stage in moved})
