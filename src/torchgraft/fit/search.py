"""The search: trials over combinations and strengths, each one kept as soon as it is finished."""

from __future__ import annotations

import contextlib
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from optuna.trial import TrialState
from torch import nn

from torchgraft.catalogue.card import STAGES
from torchgraft.engines import recipe
from torchgraft.errors import BadInput
from torchgraft.fit import storage
from torchgraft.fit.endings import chosen_ending, chosen_execution
from torchgraft.fit.opening import STARTUP, alone, ascent, descent
from torchgraft.fit.plan import Plan, check_combination
from torchgraft.fit.workshop import FILLERS, Choice, Made, Workshop
from torchgraft.report.records import Trial

__all__ = ["MEASURE_SECONDS", "Effort", "Progress", "search", "trial_records"]

NONE = "none"
#: A trial is stopped early only when at least this many others have come as far.
QUORUM = 4

#: How long models are timed side by side at the end of a run, at most.
MEASURE_SECONDS = 20.0

_logger = logging.getLogger("torchgraft")


@dataclass(frozen=True)
class Effort:
    """How much is spent.

    Args:
        trials: number of trials, or ``None`` for as many as the time allows.
        search_seconds: time for the search, or ``None`` for no limit.
        polish_seconds: time for the final recovery, or ``None`` where its steps are fixed.
        steps: recovery steps a trial.
        polish_steps: recovery steps of a finalist (at most, where time is limited).
        finalists: how many candidates are recovered at length.
        measure_seconds: how long the last timing side by side may take.
    """

    trials: int | None
    search_seconds: float | None
    polish_seconds: float | None
    steps: int
    polish_steps: int
    finalists: int = 3
    measure_seconds: float = MEASURE_SECONDS


@dataclass(frozen=True)
class Progress:
    """What a watcher of a run is told.

    Args:
        phase: ``"prepare"``, ``"search"``, ``"recover"``, ``"measure"`` or ``"done"``.
        message: one line.
        share: how much of the phase is done, from 0 to 1, or ``None`` where it cannot be said.
        trials: every finished trial so far.
    """

    phase: Literal["prepare", "search", "recover", "measure", "done"]
    message: str
    share: float | None = None
    trials: tuple[Trial, ...] = ()


def slot_seed(seed: int, slot: int) -> int:
    """Return the seed of a slot: the same for every process, different for every slot."""
    return int(np.random.SeedSequence([seed, slot]).generate_state(1)[0])


def _sampled(trial: optuna.Trial, plan: Plan, *, budgeted: bool) -> Choice:
    procedures: dict[str, tuple[str, float]] = {}
    for stage, members in plan.stages.items():
        key = trial.suggest_categorical(stage, [NONE, *members])
        strength = trial.suggest_float(f"{stage}.strength", 0.05, 1.0)
        if key != NONE:
            procedures[stage] = (key, strength)
    target = trial.suggest_float("target", 0.7, 1.0) if budgeted else 1.0
    if not procedures:
        stage = next((stage for stage in FILLERS if stage in plan.stages), next(iter(plan.stages)))
        procedures[stage] = (next(iter(plan.stages[stage])), 0.5)
    return Choice(procedures, target)


def _with_exact(choice: Choice, plan: Plan) -> Choice:
    """Return ``choice`` with the procedures that change no output, in stages that it leaves free."""
    exact = {
        stage: (key, 1.0)
        for stage, members in plan.stages.items()
        for key, procedure in members.items()
        if procedure.exact
    }
    return replace(choice, procedures={**exact, **choice.procedures})


def _choose(trial: optuna.Trial, plan: Plan, slot: int, *, budgeted: bool) -> Choice:
    # The opening is sampled too, from a sampler that knows its answers, so that the study learns from it.
    choice = _with_exact(_sampled(trial, plan, budgeted=budgeted), plan)
    keys = [choice.procedures[stage][0] for stage in STAGES if stage in choice.procedures]
    while True:
        try:
            check_combination(keys)
        except BadInput:
            keys.pop()  # the rules refuse the pair: the later stage gives way
            continue
        return replace(choice, procedures={s: kv for s, kv in choice.procedures.items() if kv[0] in keys})


def _first_choice(workshop: Workshop, trials: Sequence[Trial]) -> Choice | None:
    """Return what the opening tries after ``trials``, or ``None`` where the sampler chooses."""
    score = float(workshop.validation.mean())
    if not workshop.limits:
        return ascent(workshop.plan, aims=workshop.costs, trials=trials, original=score, span=workshop.span)
    needs = {limit.cost: workshop.bound(limit.cost) for limit in workshop.limits}
    combined = descent(workshop.plan, needs=needs, trials=trials, original=score)
    if combined is not None:
        return combined
    procedures = workshop.plan.procedures
    done = {frozenset(k for k in trial.procedures if not procedures[k].exact) for trial in trials}
    singles = alone(workshop.plan, aims=list(needs), trials=trials, original=score)
    return next((c for c in singles if frozenset(key for key, _ in c.procedures.values()) not in done), None)


def _sampler(seed: int, slot: int, first: Choice | None, plan: Plan) -> optuna.samplers.BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler: optuna.samplers.BaseSampler = optuna.samplers.TPESampler(
            seed=slot_seed(seed, slot) % 2**31, n_startup_trials=STARTUP, multivariate=True
        )
        if first is None:
            return sampler
        fixed: dict[str, Any] = {"target": 1.0}
        for stage in plan.stages:
            key, strength = first.procedures.get(stage, (NONE, 0.5))
            fixed |= {stage: key, f"{stage}.strength": strength}
        return optuna.samplers.PartialFixedSampler(fixed, sampler)


def trial_records(study: optuna.Study) -> tuple[Trial, ...]:
    """Return the records of the finished trials, by slot."""
    return tuple(
        Trial.model_validate(trial.user_attrs["record"])
        for trial in storage.finished(study)
        if "record" in trial.user_attrs
    )


def trial_folder(folder: Path, slot: int) -> Path:
    """Return where the model of a slot is kept."""
    return folder / "trials" / f"{slot:04d}"


def keep(workshop: Workshop, made: Made, finished: nn.Module, folder: Path, seed: int, validation: float) -> None:
    """Write the finished model of a trial, and the float model under it where a precision procedure follows."""
    note = {cost: f"{ratio:.3f}x" for cost, ratio in sorted(made.ratios.items())}
    source, strengths = workshop.task.source, made.strengths
    if finished is not made.model:
        recipe.save(made.model, folder / "float", task=source, seed=seed, procedures=strengths)
    recipe.save(finished, folder, task=source, seed=seed, procedures=strengths, costs=note, validation=validation)


def run_trial(
    workshop: Workshop, choice: Choice, effort: Effort, seed: int, rungs: list[float], folder: Path | None
) -> tuple[Trial, float | None]:
    """Make, recover and score one choice; return its record (number 0) and its score after the first rung, if any.

    Args:
        workshop: what the trials share.
        choice: what to try.
        effort: how much to spend.
        seed: the trial's seed.
        rungs: scores of other trials after the first rung.
        folder: where to keep the model, or ``None`` to keep nothing.
    """
    begun = time.perf_counter()
    made = workshop.make(choice, seed)

    def record(state: Literal["complete", "stopped early"], score: float | None, reason: str) -> Trial:
        return Trial(
            number=0,
            state=state,
            procedures=made.strengths,
            validation=score,
            ratios=made.ratios,
            reason=reason,
            seconds=time.perf_counter() - begun,
        )

    if workshop.limits and workshop.load(made.ratios) > 1.0:
        score = workshop.score_of(made, seed)
        return record("stopped early", score, "does not reach the budget even at full strength"), score
    # Without a budget none is stopped: the deepest cuts score least at first, and may be worth most.
    first = max(effort.steps // 4, 1) if effort.steps and workshop.limits else 0
    rung = None
    if first:
        workshop.recover(made.model, steps=first, seed=seed)
        rung = workshop.score_of(made, seed)
        if len(rungs) >= QUORUM and rung < statistics.median(rungs):
            reason = "below the median of the others after a quarter of the recovery"
            return record("stopped early", rung, reason), rung
    workshop.recover(made.model, steps=effort.steps - first, seed=seed + 1)
    if choice.free_ending:
        plain, score = chosen_ending(workshop, made, seed)
        finished, score = chosen_execution(workshop, made, plain, score, seed)
    else:
        score = workshop.score_of(made, seed)
        finished = workshop.finish(made.model, made.strengths, seed)
        if not workshop.limits:
            made.ratios = workshop.quick_ratios(finished)
    if folder is not None:
        keep(workshop, made, finished, folder, seed, score)
    return record("complete", score, ""), rung


@contextlib.contextmanager
def _lost_on_interrupt(trial: optuna.Trial, study: optuna.Study) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):
            trial.set_user_attr(storage.LOST, True)
            study.tell(trial, state=TrialState.FAIL)
        raise


def search(
    workshop: Workshop,
    study: optuna.Study,
    effort: Effort,
    folder: Path,
    progress: Callable[[Progress], None],
) -> None:
    """Run trials until all slots are finished or the time is up.

    Raises:
        BadInput: the disk is full or the study cannot be reached; finished trials are kept.
    """
    used = sum(record.seconds for record in trial_records(study))
    begun = time.monotonic()

    def share() -> float:
        done = len(storage.finished(study)) / effort.trials if effort.trials else 0.0
        spent = (used + time.monotonic() - begun) / effort.search_seconds if effort.search_seconds else 0.0
        return min(max(done, spent), 1.0)

    while share() < 1.0:
        with storage.mapped_storage_errors("the study"):
            slot = storage.claim_slot(study, effort.trials)
            if slot is None:
                if storage.running_elsewhere(study):
                    progress(Progress("search", "waiting for the other processes", share(), trial_records(study)))
                    time.sleep(0.5)
                    continue
                break
            first = _first_choice(workshop, trial_records(study))
            study.sampler = _sampler(workshop.seed, slot, first, workshop.plan)
            trial = study.ask()
            trial.set_user_attr(storage.WORKER, storage.worker())
            trial.set_user_attr(storage.STARTED, time.time())
            trial.set_user_attr(storage.SLOT, slot)
        with _lost_on_interrupt(trial, study), storage.mapped_storage_errors("the study"):
            choice = _choose(trial, workshop.plan, slot, budgeted=bool(workshop.limits))
            choice = replace(choice, free_ending=first is not None and first.free_ending)
            trial.set_user_attr("choice", json.dumps(asdict(choice)))
            names = " + ".join(key for key, _ in choice.procedures.values())
            progress(Progress("search", f"trial {slot}: {names}", share(), trial_records(study)))
            rungs = [t.user_attrs["rung"] for t in storage.finished(study) if "rung" in t.user_attrs]
            seed = slot_seed(workshop.seed, slot)
            started = time.perf_counter()
            try:
                record, rung = run_trial(workshop, choice, effort, seed, rungs, trial_folder(folder, slot))
            except OSError:
                raise
            except Exception as error:  # whatever a model's own forward raises once its parts are replaced
                if "the disk is full" in str(error):
                    raise
                _logger.warning("trial %d failed: %s", slot, error, exc_info=not isinstance(error, BadInput))
                record = Trial(
                    number=slot,
                    state="failed",
                    procedures=dict(choice.procedures.values()),
                    validation=None,
                    ratios={},
                    reason=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
                    seconds=time.perf_counter() - started,
                )
                trial.set_user_attr("record", record.model_dump(mode="json"))
                study.tell(trial, state=TrialState.FAIL)
                continue
            record = record.model_copy(update={"number": slot})
            if record.state == "complete" and rung is not None:
                trial.set_user_attr("rung", rung)
            trial.set_user_attr("record", record.model_dump(mode="json"))
            study.tell(trial, [record.validation or 0.0, workshop.load(record.ratios)])
    progress(Progress("search", "search done", 1.0, trial_records(study)))
