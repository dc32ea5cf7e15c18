"""The end of a run: recover the best trials at length, measure everything side by side, choose, and say what failed."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import optuna
import torch
from torch import nn

from torchgraft.bench import meters
from torchgraft.bench.meters.latency import interleaved
from torchgraft.bench.meters.spread import Ratio, interval
from torchgraft.bench.training import evaluate, evaluate_loss, paired_drop, score_interval
from torchgraft.catalogue import registry
from torchgraft.engines import recipe
from torchgraft.engines.surgery.edits import history
from torchgraft.fit import storage
from torchgraft.fit.finalists import (
    ENDING_SHARE,
    Finalist,
    Recovered,
    other_endings,
    promising,
    worth_recovering,
)
from torchgraft.fit.pareto import front
from torchgraft.fit.search import MEASURE_SECONDS, Effort, Progress, run_trial, slot_seed, trial_folder
from torchgraft.fit.workshop import LAST, NOISY, Choice, Workshop
from torchgraft.report.records import Applied, Candidate, CostRecord, Interval, NotHelped, Trial

__all__ = ["Finalist", "decide", "not_helped"]

#: Models that are timed side by side at the end, at most.
WIDEST = 10
#: Timing rounds at a time, and the width of a ratio's interval that is narrow enough to stop adding them.
ROUNDS, PRECISE = 10, 0.04
_logger = logging.getLogger("torchgraft")


def _load(workshop: Workshop, folder: Path) -> nn.Module:
    return recipe.rebuild(recipe.read_recipe(folder), workshop.task.architecture(), folder)


def _written(trial: optuna.trial.FrozenTrial) -> Choice:
    """Return what a trial was to try, as the study keeps it."""
    written = json.loads(trial.user_attrs["choice"])
    procedures = {stage: (key, value) for stage, (key, value) in written.pop("procedures").items()}
    return Choice(procedures, **written)


def _kept_model(workshop: Workshop, trial: optuna.trial.FrozenTrial, effort: Effort, folder: Path) -> Path:
    """Return the folder of a finished trial, made again by its seed where another machine ran it."""
    slot = int(trial.user_attrs[storage.SLOT])
    kept = trial_folder(folder, slot)
    if not (kept / "recipe.yaml").exists():
        choice = _written(trial)
        _logger.info("trial %d was run elsewhere; it is made again here", slot)
        run_trial(workshop, choice, effort, slot_seed(workshop.seed, slot), [], kept)
    return kept


def _ranked(workshop: Workshop, study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Return the complete trials that met the budget when quickly measured, best validation score first."""
    complete = [t for t in storage.finished(study) if t.user_attrs.get("record", {}).get("state") == "complete"]
    if workshop.limits:
        complete = [t for t in complete if workshop.load(t.user_attrs["record"]["ratios"]) <= 1.0]
    return sorted(complete, key=lambda t: (-t.user_attrs["record"]["validation"], t.user_attrs[storage.SLOT]))


def _is_cut(workshop: Workshop, trial: optuna.trial.FrozenTrial) -> bool:
    """Say whether a trial has changed its float model, so that recovery has something to mend."""
    last = {key for stage in LAST for key in workshop.plan.stages.get(stage, {})}
    keys = trial.user_attrs["record"]["procedures"]
    return any(key not in last and not workshop.plan.procedures[key].exact for key in keys)


def _polish(
    workshop: Workshop,
    count: int,
    following: Callable[[Sequence[Recovered]], optuna.trial.FrozenTrial | None],
    effort: Effort,
    folder: Path,
    progress: Callable[[Progress], None],
    trials: tuple[Trial, ...],
) -> list[Finalist]:
    """Recover up to ``count`` trials at length, each chosen by ``following`` when those before it are recovered."""
    finalists: list[Finalist] = []
    recovered: list[Recovered] = []
    begun = time.monotonic()
    while len(recovered) < count and (trial := following(recovered)) is not None:
        slot = int(trial.user_attrs[storage.SLOT])
        strengths: dict[str, float] = trial.user_attrs["record"]["procedures"]
        progress(Progress("recover", f"recovering trial {slot} at length", len(recovered) / count, trials))
        kept = _kept_model(workshop, trial, effort, folder)
        model = _load(workshop, kept / "float" if (kept / "float").exists() else kept)
        deadline, planned = None, effort.polish_steps
        if effort.polish_seconds is not None:
            left = effort.polish_seconds - (time.monotonic() - begun)
            share = max(left, 0.0) / (count - len(recovered))
            deadline = time.monotonic() + share
            # The rate of recovery falls to zero over its steps, so they are as many as this model has time for.
            planned = max(int(0.9 * share / workshop.step_seconds(model)), 1)
        seed = slot_seed(workshop.seed, slot)
        steps = workshop.recover(model, steps=planned, seed=seed + 2, deadline=deadline)
        finished = workshop.finish(model, strengths, seed)
        scores = workshop.score(finished)
        before, after = trial.user_attrs["record"]["validation"], float(scores.mean())
        # Other endings may keep more than this one, and what the float model has is what recovery has mended.
        reached = after if finished is model else float(workshop.score(model).mean())
        recovered.append(Recovered(trial, max(before, after, reached)))
        if after < before:  # recovery at length is not kept where it harms
            _logger.info("trial %d: recovery at length did not help (%.4f < %.4f)", slot, after, before)
            continue
        times = {cost: ratio for cost, ratio in trial.user_attrs["record"]["ratios"].items() if cost in NOISY}
        name = f"trial-{slot}-recovered"
        finalists.append(Finalist(name, finished, strengths, effort.steps + steps, scores, True, model, reached, times))
    return finalists


def _side_by_side(
    workshop: Workshop, models: Sequence[nn.Module], most_seconds: float
) -> tuple[np.ndarray, list[Ratio]]:
    """Time ``models`` in turns, in more rounds where the ratios to the first are still uncertain.

    Returns:
        Seconds a call, (rounds, models), and each model's ratio to the first.
    """
    seconds = np.zeros((0, len(models)))
    begun = time.monotonic()
    while True:
        more = interleaved(models, workshop.task.example, rounds=ROUNDS, seed=workshop.seed + len(seconds))
        seconds = np.concatenate([seconds, more])
        ratios = [interval((seconds[:, column] / seconds[:, 0]).tolist()) for column in range(len(models))]
        widest = max((ratio.high - ratio.low) / ratio.value for ratio in ratios)
        if widest <= PRECISE or time.monotonic() - begun > most_seconds:
            return seconds, ratios


def costs_of(
    workshop: Workshop, finalists: Sequence[Finalist], *, most_seconds: float = MEASURE_SECONDS
) -> list[dict[str, CostRecord]]:
    """Return the costs of every finalist, times side by side with the first, which is the original.

    Args:
        workshop: what the run shares.
        finalists: the models, the original first.
        most_seconds: when to stop adding timing rounds though the ratios are still uncertain.
    """
    example = workshop.task.example
    records: list[dict[str, CostRecord]] = [{} for _ in finalists]
    exact = [cost for cost in workshop.costs if cost not in NOISY]
    for record, finalist in zip(records, finalists, strict=True):
        for cost, reading in meters.measure(finalist.model, example, costs=exact).readings.items():
            before = workshop.baseline.readings[cost].value
            ratio = reading.value / before if before else 1.0
            record[cost] = CostRecord(
                value=reading.value,
                low=reading.low,
                high=reading.high,
                unit=reading.unit,
                ratio=ratio,
                ratio_low=ratio,
                ratio_high=ratio,
            )
    if "latency" in workshop.costs:
        seconds, ratio_of = _side_by_side(workshop, [finalist.model for finalist in finalists], most_seconds)
        for column, record in enumerate(records):
            spread = interval((seconds[:, column] * 1e3).tolist())
            ratios = ratio_of[column]
            record["latency"] = CostRecord(
                value=spread.value,
                low=spread.low,
                high=spread.high,
                unit="ms",
                ratio=ratios.value,
                ratio_low=ratios.low,
                ratio_high=ratios.high,
            )
    return [{cost: record[cost] for cost in workshop.costs} for record in records]


def _applied(workshop: Workshop, finalist: Finalist) -> list[Applied]:
    changes: dict[str, dict[str, str]] = {}
    for edit in history(finalist.model):
        for module, words in edit.describe().items():
            previous = changes.setdefault(type(edit).__module__, {})
            previous[module] = f"{previous[module]}; {words}" if module in previous else words
    homes = dict(changes)
    applied = []
    for key, strength in finalist.strengths.items():
        card = registry.lookup(key)
        own = homes.pop(card.module_name, {})
        applied.append((card, strength, own))
    if applied and homes:  # edits whose home is an engine belong to the procedures that have none of their own
        shared = [entry for own in homes.values() for entry in own.items()]
        # The words of folded norms name layers, and those of sparse weights say how many are kept: they come first.
        by_stage = (
            ("execution", "program"),
            ("weights", "sparse"),
            ("weights", "stored in bits"),
            ("norms", "norm"),
            ("mixer", "linear attention"),
            ("depth", "layer"),
            ("width", "kept"),
            ("rank", "rank"),
        )
        for stage, word in by_stage:
            for own in (own for card, _, own in applied if card.stage == stage):
                own.update((m, w) for m, w in shared if word in w)
                shared = [(m, w) for m, w in shared if word not in w]
        applied[0][2].update(shared)
    return [
        Applied(key=card.key, title=card.title, strength=strength, sites=sorted(own), changes=own)
        for card, strength, own in applied
    ]


def _bounds(ratio: Ratio) -> Interval:
    return Interval(value=ratio.value, low=ratio.low, high=ratio.high)


def _within(workshop: Workshop, costs: dict[str, CostRecord]) -> bool:
    return all(costs[limit.cost].ratio_high <= workshop.bound(limit.cost) * (1 + 1e-9) for limit in workshop.limits)


def candidate_of(
    workshop: Workshop, finalist: Finalist, costs: dict[str, CostRecord], max_drop: float | None
) -> Candidate:
    """Return ``finalist`` as it stands on the front: scores, costs, verdict and the reason for it."""
    original = finalist.name == "original"
    drop = Ratio(*paired_drop(workshop.validation, finalist.scores))
    tolerance = 0.01 if max_drop is None else max_drop
    primary = costs[workshop.primary]
    judged = meters.verdict(Ratio(primary.ratio, primary.ratio_low, primary.ratio_high), drop, tolerance)
    met = _within(workshop, costs)
    kept = max_drop is None or drop.value <= max_drop + 1e-9
    why = f"{workshop.primary} {primary.ratio:.2f}x [{primary.ratio_low:.2f}, {primary.ratio_high:.2f}]"
    why += f", validation score {0.0 - drop.value:+.4f}"
    if not original and workshop.limits and not met:
        over = [lim for lim in workshop.limits if costs[lim.cost].ratio_high > workshop.bound(lim.cost) * (1 + 1e-9)]
        why += "; over the budget in " + ", ".join(
            f"{lim.cost} ({costs[lim.cost].ratio_high:.2f}x, allowed {workshop.bound(lim.cost):.2f}x)" for lim in over
        )
    if not kept:
        why += f"; the score falls by more than {max_drop:g}"
    return Candidate(
        name=finalist.name,
        procedures=_applied(workshop, finalist),
        validation=_bounds(Ratio(*score_interval(finalist.scores))),
        drop=_bounds(drop),
        test=None,
        costs=costs,
        feasible=met and kept,
        chosen=False,
        best=False,
        verdict="original" if original else judged,
        why="the model as it was given" if original else why,
        recovery_steps=finalist.steps,
    )


def distance(workshop: Workshop, candidate: Candidate, max_drop: float | None) -> float:
    """Return by how much ``candidate`` misses the budget: the sum of relative excesses, zero where it is met."""
    excess = sum(
        max(candidate.costs[limit.cost].ratio_high / workshop.bound(limit.cost) - 1.0, 0.0) for limit in workshop.limits
    )
    if max_drop is not None:
        excess += max(candidate.drop.value - max_drop, 0.0) / max(abs(float(workshop.validation.mean())), 1e-9)
    return excess


def decide(
    workshop: Workshop,
    study: optuna.Study,
    effort: Effort,
    folder: Path,
    max_drop: float | None,
    progress: Callable[[Progress], None],
    trials: tuple[Trial, ...],
) -> tuple[list[Candidate], dict[str, Finalist], str | None, str | None]:
    """Return the front (original first), the finalists by name, the best one's name, and the nearest one's.

    The nearest is named only where no candidate meets the budget and the largest allowed drop.
    """
    original = Finalist("original", workshop.original, {}, 0, workshop.validation)
    ranked = _ranked(workshop, study)
    # Under a budget the best is often the original itself, stored or run otherwise: the others have its time.
    cut = [trial for trial in ranked if _is_cut(workshop, trial)]
    count = min(effort.finalists, len(cut if workshop.limits else ranked))

    def following(recovered: Sequence[Recovered]) -> optuna.trial.FrozenTrial | None:
        return cut[len(recovered)] if workshop.limits else worth_recovering(workshop, ranked, recovered)

    finalists = [original, *_polish(workshop, count, following, effort, folder, progress, trials)]
    if not workshop.limits:
        progress(Progress("measure", "ending the recovered models otherwise", None, trials))
        until = time.monotonic() + ENDING_SHARE * (effort.polish_seconds or math.inf)
        others = other_endings(workshop, finalists[1:], until)
        finalists += promising(workshop, others, WIDEST - 2 - len(finalists))
    progress(Progress("measure", "measuring side by side", None, trials))
    points = [
        (t.user_attrs["record"]["validation"], [t.user_attrs["record"]["ratios"][c] for c in workshop.costs])
        for t in ranked
    ]
    for index in front(points)[: max(WIDEST - len(finalists), 2)]:
        trial = ranked[index]
        slot = int(trial.user_attrs[storage.SLOT])
        model = _load(workshop, _kept_model(workshop, trial, effort, folder))
        strengths = trial.user_attrs["record"]["procedures"]
        finalists.append(Finalist(f"trial-{slot}", model, strengths, effort.steps, workshop.score(model)))
    if not ranked:
        finalists += _misses(workshop, study, effort)
    costs = costs_of(workshop, finalists, most_seconds=effort.measure_seconds)
    candidates = [candidate_of(workshop, f, c, max_drop) for f, c in zip(finalists, costs, strict=True)]
    # The original always stands on the front; among the others only those that nothing beats, and the recovered ones.
    beaten = front([(c.validation.value, [c.costs[k].ratio for k in workshop.costs]) for c in candidates])
    shown = [c for i, c in enumerate(candidates) if i == 0 or i in beaten or finalists[i].polished]
    feasible = [c for c in shown[1:] if c.feasible] if workshop.limits else [c for c in shown if c.feasible]
    best = nearest = None
    if feasible:
        best = _best(workshop, feasible, {f.name: f.model for f in finalists})
    elif len(shown) > 1:
        nearest = min(shown[1:], key=lambda c: (distance(workshop, c, max_drop), -c.validation.value)).name
    return shown, {f.name: f for f in finalists}, best, nearest


def _best(workshop: Workshop, feasible: Sequence[Candidate], models: dict[str, nn.Module]) -> str:
    """Return the name of the best candidate: by score, then by loss, since scores tie on small splits, then by cost."""
    top = max(candidate.validation.value for candidate in feasible)
    tied = [candidate for candidate in feasible if candidate.validation.value == top]
    if len(tied) == 1:
        return tied[0].name
    loss = {each.name: evaluate_loss(models[each.name], workshop.task, workshop.task.val) for each in tied}
    return min(tied, key=lambda each: (loss[each.name], each.costs[workshop.primary].ratio)).name


def _misses(workshop: Workshop, study: optuna.Study, effort: Effort) -> list[Finalist]:
    """Make again the trial that came nearest to a budget that none met."""
    stopped = [t for t in storage.finished(study) if t.user_attrs.get("record", {}).get("ratios")]
    if not stopped:
        return []
    trial = min(stopped, key=lambda t: (workshop.load(t.user_attrs["record"]["ratios"]), t.user_attrs[storage.SLOT]))
    slot = int(trial.user_attrs[storage.SLOT])
    choice = _written(trial)
    made = workshop.make(choice, slot_seed(workshop.seed, slot))
    steps = workshop.recover(made.model, steps=effort.steps, seed=slot_seed(workshop.seed, slot))
    model = workshop.finish(made.model, made.strengths, slot_seed(workshop.seed, slot))
    return [Finalist(f"trial-{slot}", model, made.strengths, steps, workshop.score(model))]


def score_on_test(
    workshop: Workshop, candidates: Sequence[Candidate], finalists: dict[str, Finalist], names: Sequence[str]
) -> list[Candidate]:
    """Return ``candidates`` with the test scores of ``names``: the only place where the test split is read."""
    scored = []
    for candidate in candidates:
        if candidate.name not in names:
            scored.append(candidate)
            continue
        with torch.random.fork_rng():
            scores = evaluate(finalists[candidate.name].model, workshop.task, workshop.task.test)
        scored.append(candidate.model_copy(update={"test": _bounds(Ratio(*score_interval(scores))), "chosen": True}))
    return scored


def not_helped(workshop: Workshop, trials: Sequence[Trial], max_drop: float | None) -> list[NotHelped]:
    """Return what was tried and did not help, each with its number."""
    found: list[NotHelped] = []
    base = float(workshop.validation.mean())
    tolerance = 0.01 if max_drop is None else max_drop
    for key in workshop.plan.procedures:
        alone = [t for t in trials if list(t.procedures) == [key] and t.validation is not None and t.ratios]
        title = registry.lookup(key).title
        for trial in alone[:1]:
            score = trial.validation if trial.validation is not None else base
            ratios = ", ".join(f"{cost} {ratio:.2f}x" for cost, ratio in trial.ratios.items())
            evidence = f"alone, trial {trial.number}: {ratios}; validation score {score - base:+.4f}"
            if trial.state == "stopped early" and "budget" in trial.reason:
                found.append(NotHelped(what=title, why="alone it does not reach the budget", evidence=evidence))
            elif trial.ratios.get("latency", 0.0) > 1.0 and min(trial.ratios.values()) < 0.95:
                found.append(NotHelped(what=title, why="smaller, yet slower on this machine", evidence=evidence))
            elif base - score > tolerance:
                found.append(
                    NotHelped(
                        what=title, why="it loses more score than allowed before long recovery", evidence=evidence
                    )
                )
    failed = [t for t in trials if t.state == "failed"]
    found += [
        NotHelped(what=" + ".join(t.procedures) or f"trial {t.number}", why="the trial failed", evidence=t.reason)
        for t in failed
    ]
    return found
