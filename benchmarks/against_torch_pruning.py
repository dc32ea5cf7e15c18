"""torchgraft against Torch-Pruning at equal measured latency, on digits-vit and digits-cnn.

For every task, seed and budget (a share of the original's latency, measured here): Torch-Pruning cuts by group
magnitude or by group Taylor importance, its ratio found by bisection until the measured latency meets the budget, and
is recovered by torchgraft's own distillation for ``--seconds``. Of its local and global cuts the one with the better
validation score before recovery is kept. ``torchgraft.fit`` gets six times the seconds for everything, of which its
chosen model is trained for about one: the same recovery time. The rest is its search, for which the peer has nothing.
Each side's model is then timed against the original in paired rounds, and scored once on the test split.

Finished cells stand in the output file and are not run again.

Run: ``python benchmarks/against_torch_pruning.py [--tasks digits-vit] [--budgets 0.5] [--seeds 0] [--seconds 30]``
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import platform
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch_pruning as tp
from rich.console import Console
from rich.table import Table
from torch import nn

from torchgraft.bench.files import write_atomic
from torchgraft.bench.meters import compare
from torchgraft.bench.task import Task, call, take
from torchgraft.bench.tasks import builtin
from torchgraft.bench.training import evaluate
from torchgraft.engines.distill import Teacher, distill

TASKS = ("digits-vit", "digits-cnn")
BUDGETS = (0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
SEEDS = (0, 1, 2, 3, 4)
CRITERIA = ("magnitude", "taylor")
ROUNDS = 15


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Torch-Pruning's prints and warnings off the terminal."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def tp_cut(model: nn.Module, task: Task, ratio: float, criterion: str, *, spread: str) -> nn.Module:
    """Return a copy of ``model`` cut by Torch-Pruning at ``ratio``, set up as its documentation says for its kind."""
    cut = copy.deepcopy(model)
    example = take(task.train.inputs, slice(4))
    heads = {}
    for module in cut.modules():
        if hasattr(module, "num_heads"):
            heads.update(dict.fromkeys((module.query, module.key, module.value), module.num_heads))
    with torch.no_grad():
        width = call(cut, example).shape[-1]
    outputs = [module for module in cut.modules() if isinstance(module, nn.Linear) and module.out_features == width]
    free = [(getattr(cut, name), 2) for name in ("cls", "position") if hasattr(cut, name)]
    importance = (
        tp.importance.GroupTaylorImportance() if criterion == "taylor" else tp.importance.GroupMagnitudeImportance()
    )
    pruner = tp.pruner.MetaPruner(
        cut,
        example,
        importance=importance,
        pruning_ratio=ratio,
        global_pruning=spread == "global",
        isomorphic=spread == "global",
        max_pruning_ratio=0.9,
        ignored_layers=outputs,
        num_heads=heads,
        prune_head_dims=True,
        unwrapped_parameters=free or None,
    )
    if criterion == "taylor":
        samples = task.train[torch.randperm(len(task.train), generator=torch.Generator().manual_seed(0))[:256]]
        cut.zero_grad()
        task.loss(call(cut, samples.inputs), samples.target).backward()
    pruner.step()
    cut.zero_grad(set_to_none=True)
    for module in cut.modules():
        if hasattr(module, "num_heads"):
            module.num_heads = pruner.num_heads[module.query]
            module.head_dim = module.query.out_features // module.num_heads
    return cut.eval()


def tp_to_latency(model: nn.Module, task: Task, budget: float, criterion: str, *, spread: str) -> nn.Module | None:
    """Return the least cut copy whose measured latency is at most ``budget`` of the model's, or None."""
    low, high, best = 0.0, 0.95, None
    for _ in range(7):
        ratio = (low + high) / 2
        try:
            with quiet():
                cut = tp_cut(model, task, ratio, criterion, spread=spread)
            measured = compare(model, cut, task.example, rounds=ROUNDS)["latency"].value
        except Exception:  # whatever a cut too deep raises: try a lesser one
            high = ratio
            continue
        if measured <= budget:
            high, best = ratio, cut
        else:
            low = ratio
    return best


def recover(student: nn.Module, teacher: Teacher, task: Task, seconds: float, seed: int) -> int:
    """Distil for ``seconds``; return the number of steps, which a trial run on a copy decides beforehand."""
    trial = copy.deepcopy(student)
    begun = time.monotonic()
    distill(trial, teacher, task, steps=10, seed=seed)
    steps = max(1, int(10 * seconds / (time.monotonic() - begun)))
    return distill(student, teacher, task, steps=steps, seed=seed, deadline=time.monotonic() + seconds).steps


def judged(original: nn.Module, changed: nn.Module, task: Task) -> dict[str, float]:
    """Return the paired latency ratio with its interval, and the scores."""
    ratio = compare(original, changed, task.example, rounds=3 * ROUNDS)["latency"]
    return {
        "latency": ratio.value,
        "low": ratio.low,
        "high": ratio.high,
        "val": float(evaluate(changed, task, task.val).mean()),
        "test": float(evaluate(changed, task, task.test).mean()),
    }


def run_peer(name: str, seed: int, budget: float, criterion: str, seconds: float) -> dict[str, Any]:
    """Run one cell of Torch-Pruning."""
    task = builtin(name, seed)
    original = task.trained()
    found = {spread: tp_to_latency(original, task, budget, criterion, spread=spread) for spread in ("local", "global")}
    cuts = {spread: cut for spread, cut in found.items() if cut is not None}
    if not cuts:
        return {"feasible": False}
    spread = max(cuts, key=lambda each: float(evaluate(cuts[each], task, task.val).mean()))
    steps = recover(cuts[spread], Teacher(original, task), task, seconds, seed)
    return {"feasible": True, "spread": spread, "steps": steps, **judged(original, cuts[spread], task)}


def run_ours(name: str, seed: int, budget: float, seconds: float) -> dict[str, Any]:
    """Run one cell of torchgraft."""
    from torchgraft.fit import fit

    task = builtin(name, seed)
    with tempfile.TemporaryDirectory() as folder:
        result = fit(
            task, budget=[f"latency={budget}x"], time=f"{6 * seconds:g}s", seed=seed, max_drop=None, out=folder
        )
        if result.model is None or result.best is None:
            return {"feasible": False}
        return {"feasible": True, "name": result.best.name, **judged(task.trained(), result.model, task)}


def tables(cells: dict[str, dict[str, Any]]) -> list[Table]:
    """Return one table a task: mean test score by budget and side, over the seeds that every side finished."""
    made = []
    for name in dict.fromkeys(key.split("/")[0] for key in cells):
        table = Table("budget", "torchgraft", *(f"Torch-Pruning, {each}" for each in CRITERIA), "seeds", title=name)
        for budget in sorted({key.split("/")[2] for key in cells if key.startswith(f"{name}/")}, reverse=True):
            sides = ("torchgraft", *CRITERIA)
            seeds = [
                seed
                for seed in {key.split("/")[1] for key in cells if key.startswith(f"{name}/")}
                if all(f"{name}/{seed}/{budget}/{side}" in cells for side in sides)
            ]
            shown = []
            for side in sides:
                rows = [cells[f"{name}/{seed}/{budget}/{side}"] for seed in seeds]
                met = [row for row in rows if row["feasible"]]
                text = f"{fmean(r['test'] for r in met):.4f} at {fmean(r['latency'] for r in met):.2f}x" if met else "-"
                shown.append(text if len(met) == len(rows) else f"{text} ({len(met)} of {len(rows)})")
            table.add_row(f"{budget}x", *shown, str(len(seeds)))
        made.append(table)
    return made


def main() -> None:
    """Fill the cells that are missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--budgets", nargs="+", type=float, default=BUDGETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--sides", nargs="+", default=("torchgraft", *CRITERIA), choices=("torchgraft", *CRITERIA))
    parser.add_argument("--out", type=Path, default=Path("results/torch_pruning.json"))
    chosen = parser.parse_args()
    cells: dict[str, dict[str, Any]] = {}
    if chosen.out.exists():
        record = json.loads(chosen.out.read_text(encoding="utf-8"))
        cells = record["cells"] if record["seconds"] == chosen.seconds else {}
    for name in chosen.tasks:
        for seed in chosen.seeds:
            for budget in chosen.budgets:
                for side in chosen.sides:
                    key = f"{name}/{seed}/{budget}/{side}"
                    if key in cells:
                        continue
                    if side == "torchgraft":
                        cells[key] = run_ours(name, seed, budget, chosen.seconds)
                    else:
                        cells[key] = run_peer(name, seed, budget, side, chosen.seconds)
                    print(key, cells[key], flush=True)
                    record = {
                        "seconds": chosen.seconds,
                        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
                        "torch": torch.__version__,
                        "torch_pruning": tp.__version__,
                        "cells": cells,
                    }
                    write_atomic(chosen.out, json.dumps(record, indent=1) + "\n")
    for table in tables(cells):
        Console().print(table)


if __name__ == "__main__":
    main()
