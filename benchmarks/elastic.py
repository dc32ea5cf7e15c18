"""What elastic models cost and score at each budget: counted, timed side by side, and how long a switch takes.

Every procedure that makes a model of several budgets is built on a built-in task and trained for ``--seconds``, in as
many steps as these allow. At each budget: the multiply-accumulates counted on test samples over those of the
original (they must lie within 10 % of the budget), the latency over the original's in paired rounds, the test score,
the median time of ``set_budget``; and at the full budget the largest difference of the outputs from the original's. A
latency ratio is printed only where the full budget agrees to 1e-6.

Run: ``python benchmarks/elastic.py [--tasks digits-vit digits-cnn] [--seconds 20] [--out results/elastic.json]``
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.console import Console
from rich.table import Table

from torchgraft.bench.files import write_atomic
from torchgraft.bench.meters import compare, macs
from torchgraft.bench.task import Task, call, take
from torchgraft.bench.tasks import builtin
from torchgraft.bench.training import evaluate
from torchgraft.engines.nesting import ElasticModule
from torchgraft.fit.elastic import COUNTED, AtBudget, elastic_plan, paced

TASKS = ("digits-vit", "digits-cnn")
TOLERANCE, AGREES = 0.1, 1e-6
SAMPLES, SWITCHES, ROUNDS = 512, 200, 30


def switch_seconds(elastic: ElasticModule) -> float:
    """Return the median time of one call of ``set_budget``, over all budgets in turn."""
    times = []
    for number in range(SWITCHES):
        begun = time.perf_counter()
        elastic.set_budget(elastic.budgets[number % len(elastic.budgets)])
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def measured(task: Task, elastic: ElasticModule, steps: int) -> dict[str, Any]:
    """Return what was found about one elastic model."""
    original = task.trained()
    inputs = take(task.test.inputs, slice(SAMPLES))
    full = macs(original, inputs)
    with torch.no_grad():
        elastic.set_budget(1.0)
        wanted, found = task.output_logits(call(original, inputs)), task.output_logits(call(elastic, inputs))
        gap = float((wanted - found).abs().max() / wanted.abs().max().clamp(min=1.0))
    rows = []
    for budget in elastic.budgets:
        elastic.set_budget(budget)
        share = macs(elastic, inputs) / full
        row = {
            "budget": budget,
            "counted": share,
            "true": abs(share - budget) <= TOLERANCE * budget,
            "test": float(evaluate(elastic, task, task.test).mean()),
        }
        if gap <= AGREES:
            ratio = compare(original, AtBudget(elastic, budget), task.example, costs=["latency"], rounds=ROUNDS)
            row["latency"] = [ratio["latency"].value, ratio["latency"].low, ratio["latency"].high]
        rows.append(row)
    return {
        "original": float(evaluate(original, task, task.test).mean()),
        "full_gap": gap,
        "steps": steps,
        "switch_microseconds": 1e6 * switch_seconds(elastic),
        "budgets": rows,
    }


def table(found: dict[str, dict[str, Any]]) -> Table:
    """Return the table that is printed."""
    made = Table("task", "method", "budget", "counted", "latency", "test (original)", "switch", title="elastic models")
    for key, cell in found.items():
        name, method = key.split("/")
        for row in cell["budgets"]:
            latency = "not printed: the full budget differs"
            if "latency" in row:
                value, low, high = row["latency"]
                latency = f"{value:.2f}x ({low:.2f} to {high:.2f})"
            made.add_row(
                name,
                method,
                f"{row['budget']:.3f}",
                f"{row['counted']:.3f}" + ("" if row["true"] else " (beyond 10 %)"),
                latency,
                f"{row['test']:.3f} ({cell['original']:.3f})",
                f"{cell['switch_microseconds']:.1f} us",
            )
    return made


def figure(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw the test score against the counted budget, one panel a task, one line a method."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(key.split("/")[0] for key in found))
    methods = sorted({key.split("/")[1] for key in found})
    colours = dict(zip(methods, matplotlib.colormaps["tab10"].colors, strict=False))  # type: ignore[attr-defined]
    drawn, axes = plt.subplots(1, len(names), figsize=(5.0 * len(names), 3.8), squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], names, strict=True):
        for key, cell in found.items():
            if key.split("/")[0] == name:
                rows = cell["budgets"]
                method = key.split("/")[1]
                counted, test = ([row[what] for row in rows] for what in ("counted", "test"))
                axis.plot(counted, test, marker="o", color=colours[method], label=method)
                axis.axhline(cell["original"], color="#9a9a9a", linewidth=0.8, zorder=0)
        axis.set(xlabel="multiply-accumulates, of the original", ylabel="test score", title=name)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8, frameon=False)
    for form in ("png", "svg"):
        drawn.savefig(path.with_suffix(f".{form}"), dpi=150)
    plt.close(drawn)


def main() -> None:
    """Build, train and measure every elastic model; print the table and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/elastic.json"))
    chosen = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    for name in chosen.tasks:
        task = builtin(name, chosen.seed)
        procedures, _ = elastic_plan(task.trained(), task, wanted=None, ignore=())
        for key, procedure in procedures.items():
            elastic = procedure.build(task.trained(), task, seed=chosen.seed)
            deadline = time.monotonic() + chosen.seconds
            planned = paced(procedure, elastic, task, seconds=chosen.seconds, seed=chosen.seed)
            steps = procedure.train(elastic, task, steps=planned, seed=chosen.seed, deadline=deadline)
            if elastic.eval().by_sample:  # as fit does
                elastic.recount(take(task.val.inputs, slice(COUNTED)))
            found[f"{name}/{key}"] = measured(task, elastic, steps)
            print(f"{name}/{key}: {steps} steps", flush=True)
            record = {
                "seconds": chosen.seconds,
                "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
                "torch": torch.__version__,
                "models": found,
            }
            write_atomic(chosen.out, json.dumps(record, indent=1) + "\n")
    figure(found, chosen.out)
    Console().print(table(found))


if __name__ == "__main__":
    main()
