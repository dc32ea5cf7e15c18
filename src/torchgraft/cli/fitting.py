"""Commands that take a model: fit, apply, measure."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torchgraft.cli.console import on_terminal, print_json, print_table, remark
from torchgraft.cli.methods import known_keys
from torchgraft.errors import BadInput

if TYPE_CHECKING:
    from torch import nn

    from torchgraft.bench.task import Task
    from torchgraft.fit import FitResult, Progress

__all__ = ["register"]

INFEASIBLE, STOPPED = 3, 130

_TASK = "A built-in task, a file with a task() function, or hf:DIR."
_DATA = "The data file, for hf:DIR."


def _split(values: Sequence[str] | None) -> list[str]:
    """Return what was given by repeating an option, by commas, or both, as one list."""
    return [part.strip() for value in values or [] for part in value.split(",") if part.strip()]


@contextlib.contextmanager
def _watching() -> Iterator[Callable[[Progress], None]]:
    """Yield what shows the progress of a run: a live table on a terminal, a plain line a step elsewhere."""
    if on_terminal():
        from torchgraft.report.tables import live

        with live() as show:
            yield show
        return
    last = ""

    def say(progress: Progress) -> None:
        nonlocal last
        line = f"{progress.phase}: {progress.message}"
        if line != last:
            print(line, flush=True)
        last = line

    yield say


def _print_front(result: FitResult) -> None:
    from torchgraft.report.tables import front_rows

    columns, rows = front_rows(result.front)
    print_table(columns, rows)


def fit(
    task: Annotated[str, typer.Argument(help=_TASK)],
    data: Annotated[Path | None, typer.Option(help=_DATA)] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option("--budget", "-b", help="COST=LIMIT, such as latency=0.5x or params=300k; repeat it for several."),
    ] = None,
    max_drop: Annotated[float, typer.Option(help="Largest fall of the validation score, in its own units.")] = 0.01,
    time: Annotated[str | None, typer.Option(help="How long to search and recover, such as 90s or 5m.")] = None,
    seed: Annotated[int, typer.Option(help="Makes every random choice.")] = 0,
    trials: Annotated[int | None, typer.Option(help="Number of trials, instead of as many as the time allows.")] = None,
    no_training: Annotated[bool, typer.Option("--no-training", help="Do not train any model.")] = False,
    ignore: Annotated[list[str] | None, typer.Option(help="Glob of modules that stay as they are; repeatable.")] = None,
    study: Annotated[str | None, typer.Option(help="Where several processes share trials: a file or database.")] = None,
    cost: Annotated[list[str] | None, typer.Option(help="Costs to measure besides those of the budget.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the outputs; by default runs/TASK.")] = None,
    export: Annotated[str | None, typer.Option(help="Also write the best model as onnx or torch.")] = None,
    elastic: Annotated[
        bool, typer.Option("--elastic", help="One model with several budgets, which set_budget switches.")
    ] = False,
    procedures: Annotated[
        list[str] | None, typer.Option(help="Keys of the only procedures to try.", autocompletion=known_keys)
    ] = None,
) -> None:
    """Bring a model to a measured budget; exit code 3 where nothing meets it.

    The same command after an interruption goes on where it was.

    Example: torchgraft fit digits-vit --budget latency=0.5x --budget size=1MB --time 5m
    """
    import torchgraft

    try:
        with _watching() as show:
            result = torchgraft.fit(
                task,
                data=data,
                budget=_split(budget),
                max_drop=max_drop,
                time=time,
                trials=trials,
                seed=seed,
                training=not no_training,
                ignore=_split(ignore),
                study=study,
                out=out,
                costs=_split(cost) or None,
                procedures=_split(procedures) or None,
                export=export,
                elastic=elastic,
                progress=show,
            )
    except KeyboardInterrupt:
        remark(f"stopped; finished trials are kept, and the same command goes on: {shlex.join(_typed())}")
        raise typer.Exit(STOPPED) from None
    _print_front(result)
    if result.record.contributions:
        rows = [(row.key, str(row.models), f"{row.lost_without:.1%}") for row in result.record.contributions]
        print_table(("method", "models on the front", "lost without it"), rows)
    for note in result.record.notes:
        print(note)
    print(f"report: {result.folder / 'report.html'}")
    if not result.feasible:
        print(f"infeasible; the nearest is {result.nearest}")
        raise typer.Exit(INFEASIBLE)
    print(
        f"best: {result.best.name if result.best else ''}; rebuild it: torchgraft apply {result.folder / 'recipe.yaml'}"
    )


def _typed() -> list[str]:
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def _is_recipe(source: str) -> bool:
    path = Path(source)
    return path.suffix in (".yaml", ".yml") or (path / "recipe.yaml").is_file()


def _rebuilt(recipe: Path, task: str | None, data: Path | None) -> tuple[Task, nn.Module]:
    """Return the task of ``recipe`` and its model; the file of a user's task must be named by the user."""
    from torchgraft.bench.tasks import load_task
    from torchgraft.engines.recipe import apply, read_recipe

    source = task or read_recipe(recipe).task
    if task is None and (source.endswith(".py") or not source):
        raise BadInput(f"{recipe} was made from the task file {source or '(a Task object)'}: name it with --task FILE")
    made = load_task(source, data=data)
    return made, apply(recipe, task=made)


def _score(model: nn.Module, task: Task, split: str) -> dict[str, float]:
    from torchgraft.bench.training import evaluate, score_interval

    value, low, high = score_interval(evaluate(model, task, split))
    return {"value": value, "low": low, "high": high}


def _readings(model: nn.Module, task: Task, costs: Sequence[str]) -> dict[str, dict[str, Any]]:
    from torchgraft.bench.meters import measure as measured

    found = measured(model, task.example, costs=costs)
    return {name: dict(vars(reading)) for name, reading in found.readings.items()}


def _costs(costs: Sequence[str] | None) -> list[str]:
    from torchgraft.bench.meters import COSTS
    from torchgraft.errors import nearest

    wanted = _split(costs) or list(COSTS)
    for name in wanted:
        if name not in COSTS:
            raise BadInput(f"unknown cost {name!r}{nearest(name, list(COSTS))}")
    return wanted


def _print_costs(readings: dict[str, dict[str, Any]]) -> None:
    from torchgraft.report.numbers import cost_text

    rows = []
    for name, found in readings.items():
        spread = (
            "exact"
            if found["low"] == found["high"]
            else " to ".join(cost_text(found[end], found["unit"]) for end in ("low", "high"))
        )
        rows.append((name, cost_text(found["value"], found["unit"]), spread))
    print_table(("cost", "value", "95 % interval"), rows)


def apply(
    recipe: Annotated[Path, typer.Argument(help="A recipe.yaml, or the folder that holds it.")],
    task: Annotated[str | None, typer.Option(help="The task file, where the recipe was made from one.")] = None,
    data: Annotated[Path | None, typer.Option(help=_DATA)] = None,
    out: Annotated[Path | None, typer.Option(help="Write the model and its recipe to this folder too.")] = None,
    cost: Annotated[list[str] | None, typer.Option(help="Costs to measure; default: all.")] = None,
) -> None:
    """Rebuild a refitted model bit for bit, verify its weights, and print its costs and validation score.

    Example: torchgraft apply runs/digits-vit/recipe.yaml
    """
    from torchgraft.engines.recipe import read_recipe, save

    wanted = _costs(cost)
    made, model = _rebuilt(recipe, task, data)
    kept = read_recipe(recipe)
    print(f"rebuilt {kept.task or 'the model'} by {', '.join(kept.procedures) or 'no procedure'}; weights verified")
    _print_costs(_readings(model, made, wanted))
    score = _score(model, made, "val")
    noted = "" if kept.validation is None else f"; the recipe says {kept.validation:.4f}"
    print(f"validation score {score['value']:.4f} ({score['low']:.4f} to {score['high']:.4f}){noted}")
    if out is not None:
        path = save(
            model,
            out,
            task=kept.task,
            seed=kept.seed,
            procedures=kept.procedures,
            costs=kept.costs,
            validation=kept.validation,
        )
        print(f"written: {path}")


def measure(
    source: Annotated[str, typer.Argument(metavar="TASK|RECIPE", help=f"{_TASK} Or a recipe.yaml.")],
    against: Annotated[
        Path | None, typer.Option(help="A recipe: measure its model side by side with the first.")
    ] = None,
    cost: Annotated[list[str] | None, typer.Option("--cost", "--costs", help="Costs to measure; default: all.")] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Timing rounds.")] = 20,
    task: Annotated[str | None, typer.Option(help="The task file, where a recipe was made from one.")] = None,
    data: Annotated[Path | None, typer.Option(help=_DATA)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Measure what a model costs, or how a refitted one compares with it in paired rounds, test scores included.

    A ratio is the model of --against over the first one; below 1 is cheaper.

    Example: torchgraft measure digits-vit --against runs/demo/recipe.yaml --json
    """
    wanted = _costs(cost)
    if _is_recipe(source):
        made, model = _rebuilt(Path(source), task, data)
    else:
        from torchgraft.bench.tasks import load_task

        made = load_task(source, data=data)
        model = made.trained()
    record: dict[str, Any] = {"task": made.name, "model": source, "costs": _readings(model, made, wanted)}
    if against is None:
        record["validation"] = _score(model, made, "val")
        if as_json:
            print_json(record)
            return
        _print_costs(record["costs"])
        found = record["validation"]
        print(f"validation score {found['value']:.4f} ({found['low']:.4f} to {found['high']:.4f})")
        return
    record.update(_compared(model, against, made, wanted, rounds))
    if as_json:
        print_json(record)
        return
    rows = [
        (name, f"{ratio['value']:.3f}x", f"{ratio['low']:.3f} to {ratio['high']:.3f}", ratio["verdict"])
        for name, ratio in record["ratios"].items()
    ]
    print_table(("cost", "ratio", "95 % interval", "verdict"), rows)
    for name in ("original", "changed", "drop"):
        found = record["test"][name]
        print(f"test score, {name}: {found['value']:.4f} ({found['low']:.4f} to {found['high']:.4f})")


def _compared(model: nn.Module, against: Path, task: Task, costs: Sequence[str], rounds: int) -> dict[str, Any]:
    from torchgraft.bench.meters import Ratio, compare, verdict
    from torchgraft.bench.training import evaluate, paired_drop, score_interval
    from torchgraft.engines.recipe import apply as rebuild

    changed = rebuild(against, task=task)
    before, after = evaluate(model, task, "test"), evaluate(changed, task, "test")
    drop = Ratio(*paired_drop(before, after))
    ratios = compare(model, changed, task.example, costs=costs, rounds=rounds)
    scores = {"original": Ratio(*score_interval(before)), "changed": Ratio(*score_interval(after)), "drop": drop}
    return {
        "against": str(against),
        "ratios": {name: {**vars(ratio), "verdict": verdict(ratio, drop)} for name, ratio in ratios.items()},
        "test": {name: dict(vars(score)) for name, score in scores.items()},
    }


def register(app: typer.Typer) -> None:
    """Add the commands of this module to ``app``."""
    app.command()(fit)
    app.command()(apply)
    app.command()(measure)
