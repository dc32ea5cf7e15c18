"""One run of ``fit`` from the task to the report."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from time import monotonic

from torchgraft.bench import meters
from torchgraft.bench.task import Task
from torchgraft.bench.tasks import load_task
from torchgraft.engines import recipe
from torchgraft.errors import BadInput, nearest
from torchgraft.fit import finals, storage
from torchgraft.fit.budget import Limit, parse_budget, parse_duration
from torchgraft.fit.contribution import contributions
from torchgraft.fit.elastic import fit_elastic
from torchgraft.fit.outputs import make_record, note_settings, write_outputs
from torchgraft.fit.plan import make_plan
from torchgraft.fit.result import FitResult
from torchgraft.fit.search import MEASURE_SECONDS, Effort, Progress, search, trial_records
from torchgraft.fit.workshop import NOISY, Workshop

__all__ = ["fit"]

#: Without a time limit (deterministic costs), this many trials, and these recovery steps.
TRIALS, STEPS, POLISH_STEPS = 16, 100, 400
#: From this many seconds on there is time for procedures that train for minutes by themselves.
PATIENT = 600.0
_logger = logging.getLogger("torchgraft")


def _silent(_: Progress) -> None:
    return None


def _chosen_costs(costs: Sequence[str] | None, limits: Sequence[Limit]) -> tuple[str, ...]:
    limited = [limit.cost for limit in limits]
    if costs is None:
        return (*limited, *(cost for cost in meters.COSTS if cost not in limited))
    for cost in costs:
        if cost not in meters.COSTS:
            raise BadInput(f"unknown cost {cost!r}{nearest(cost, list(meters.COSTS))}")
    return tuple(dict.fromkeys([*limited, *costs]))


def _effort(
    workshop: Workshop,
    *,
    seconds: float | None,
    spent: float,
    trials: int | None,
    training: bool,
    deterministic: bool,
) -> Effort:
    if trials is not None and trials < 1:
        raise BadInput(f"trials must be at least 1, got {trials}")
    if deterministic and seconds is None:
        steps, polish = (STEPS, POLISH_STEPS) if training else (0, 0)
        return Effort(trials or TRIALS, None, None, steps, polish, finalists=2)
    # What getting ready has taken is not there for the rest, of which half at least is left.
    seconds = 300.0 if seconds is None else seconds
    seconds = max(seconds - spent, 0.5 * seconds)
    if not training:
        return Effort(trials, seconds * 0.8, None, 0, 0)
    step = workshop.step_seconds()
    # What is recovered is cut, and several times as fast as the original: about a quarter of the time of ten trials.
    steps = int(min(max(0.5 * seconds / 10 / step * 2.0, 10), 400))
    # The rate of recovery falls to zero over these steps, so they are as many as the time is likely to allow.
    polish = max(int(0.3 * seconds / 2 / step), steps)
    # A budget is met by the upper end of an interval, which must not be wider than it can be made.
    measure = MEASURE_SECONDS if workshop.limits else min(0.12 * seconds, MEASURE_SECONDS)
    return Effort(trials, 0.5 * seconds, 0.3 * seconds, steps, polish, finalists=2, measure_seconds=measure)


def fit(
    task: Task | str,
    *,
    budget: Mapping[str, str | float] | Sequence[str] | str = (),
    max_drop: float | None = 0.01,
    time: str | float | None = None,
    trials: int | None = None,
    seed: int = 0,
    training: bool = True,
    ignore: Sequence[str] = (),
    study: str | None = None,
    out: str | Path | None = None,
    costs: Sequence[str] | None = None,
    procedures: Sequence[str] | None = None,
    export: str | None = None,
    data: str | Path | None = None,
    elastic: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> FitResult:
    """Bring a model to a measured budget.

    Args:
        task: a :class:`~torchgraft.Task`, a built-in name, a file with ``task()``, or ``hf:DIR``.
        budget: limits such as ``{"latency": "0.5x", "size": "1MB"}``; hard, and met together or not at all.
        max_drop: the largest fall of the validation score, in its own units; ``None`` for any.
        time: how long the run may take once the original is trained, such as ``"5m"``; a trial that has begun is
            finished, and with a budget the last timing takes as long as it needs, at most 20 seconds. Default: 5
            minutes where a measured cost is noisy; a fixed number of trials where every cost is exact, so that runs
            repeat themselves.
        trials: how many trials, where not as many as the time allows.
        seed: makes every choice.
        training: whether models may be trained (recovered) at all.
        ignore: globs of module names that must stay as they are.
        study: where trials are shared between processes or machines: the path of a journal file or a database address.
            Default: a journal in ``out``.
        out: folder of the outputs, by default ``runs/<task>``.
        costs: which costs to measure besides those of the budget; default: all.
        procedures: the only procedures to try, by key.
        export: also write the best model as ``"onnx"`` or ``"torch"`` (``torch.export``).
        data: data file, for ``hf:DIR``.
        elastic: make one model with several budgets (:class:`~torchgraft.engines.nesting.ElasticModule`), which
            ``set_budget`` switches at run time, instead of one model; ``procedures`` are then elastic ones. A budget
            chooses at which of its budgets the saved model stands.
        progress: called with every step of the run.

    Returns:
        The result; ``feasible`` says whether the budget is met. The same call after an interruption goes on where it
        was.

    Raises:
        BadInput: anything about the arguments, the task or the disk that a person can mend.

    Example:
        >>> import torchgraft
        >>> result = torchgraft.fit("digits-mlp", budget={"latency": "0.5x"})  # doctest: +SKIP
    """
    begun = monotonic()
    tell = progress or _silent
    limits = parse_budget(budget)
    seconds = None if time is None else parse_duration(time)
    if max_drop is not None and not max_drop >= 0:
        raise BadInput(f"max_drop must be at least 0, got {max_drop}")
    if export not in (None, "onnx", "torch"):
        raise BadInput(f"export must be 'onnx' or 'torch', got {export!r}")
    measured = _chosen_costs(costs, limits)
    deterministic = not any(cost in NOISY for cost in measured)
    if isinstance(task, str):
        tell(Progress("prepare", f"loading {task}"))
        task = load_task(task, data=Path(data) if data is not None else None)
    folder = Path(out) if out is not None else Path("runs") / task.name
    tell(Progress("prepare", "training the baseline where it is not kept yet, and measuring it"))
    original = task.trained()
    ready = monotonic()
    if elastic:
        if trials is not None or study is not None:
            raise BadInput("an elastic fit has no trials to count or share; leave out trials and study")
        result = fit_elastic(
            task,
            original,
            limits,
            measured,
            folder,
            tell,
            seconds=seconds,
            max_drop=max_drop,
            seed=seed,
            training=training,
            ignore=ignore,
            wanted=procedures,
            export=export,
            begun=begun,
        )
        tell(Progress("done", "done", 1.0, tuple(result.record.trials)))
        return result
    aims = [limit.cost for limit in limits]
    plan = make_plan(
        original,
        task,
        wanted=procedures,
        ignore=ignore,
        training=training,
        costs=measured,
        aims=aims,
        patient=seconds is not None and seconds >= PATIENT,
    )
    workshop = Workshop(task, original, plan, limits, measured, ignore=ignore, seed=seed, max_drop=max_drop)
    settings: dict[str, object] = {
        "budget": [limit.text for limit in limits],
        "costs": list(measured),
        "seed": seed,
        "trials": trials,
        "training": training,
        "ignore": list(ignore),
        "procedures": list(plan.procedures),
        "torchgraft": version("torchgraft"),
    }
    fingerprint = note_settings(folder, workshop, settings)
    spent = monotonic() - ready
    effort = _effort(
        workshop, seconds=seconds, spent=spent, trials=trials, training=training, deterministic=deterministic
    )
    shared = storage.open_study(study, folder, f"{task.name}-{fingerprint}")
    search(workshop, shared, effort, folder, tell)
    finished = trial_records(shared)
    front, finalists, best, near = finals.decide(workshop, shared, effort, folder, max_drop, tell, finished)
    chosen = ["original", *(c.name for c in front if finalists[c.name].polished), *([best] if best else [])]
    front = finals.score_on_test(workshop, front, finalists, chosen)
    front = [c.model_copy(update={"best": c.name == best}) for c in front]
    model = finalists[best].model if best is not None else None
    record = make_record(
        workshop,
        max_drop,
        begun,
        trials=list(finished),
        refused=plan.refused,
        not_helped=finals.not_helped(workshop, finished, max_drop),
        contributions=contributions(front, finished, aims or measured),
        nearest=near,
        best=best,
        model=model,
    )
    kept = None
    if model is not None and best is not None:
        winner = next(candidate for candidate in front if candidate.best)
        kept = functools.partial(
            recipe.save,
            model,
            folder,
            task=task.source,
            seed=seed,
            procedures=finalists[best].strengths,
            costs={cost: f"{found.ratio:.3f}x" for cost, found in winner.costs.items()},
            validation=winner.validation.value,
            recovery_steps=finalists[best].steps,
        )
    write_outputs(folder, front, record, kept, model, task, export)
    tell(Progress("done", "done", 1.0, finished))
    return FitResult(front, record, folder, model)
