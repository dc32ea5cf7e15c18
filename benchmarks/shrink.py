"""What the work since the first release buys: the hypervolume of ``fit``'s front, with and without it.

For every task and seed ``fit`` runs for the same wall-clock time in three arms, whose order alternates: ``release``,
the code of the first release as it was (a checkout, given by ``--release``; left out without one); ``first``, today's
``fit`` with the first release's procedures alone; ``all``, today's ``fit`` with everything. No budget is given, so
each run seeks a whole front over score, latency and size. The volume is that of
:func:`torchgraft.fit.contribution.gains`: score kept (1 where it is the original's, 0 where a tenth of it is lost)
times the halvings of latency times those of size. Validation scores of the models on the front count, on all sides.

``--learn`` measures instead the gain and the time of every procedure alone, at two strengths on a seed of its own,
and writes ``src/torchgraft/fit/experience.json``, by which ``fit`` orders what it tries.

Finished cells stand in the output file and are not run again.

Run: ``git worktree add ../release 11ac4ae``, then
``python benchmarks/shrink.py --release ../release [--tasks digits-vit] [--seeds 0 1] [--seconds 40] [--learn]``
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.console import Console
from rich.table import Table

import torchgraft
from torchgraft.bench.files import write_atomic
from torchgraft.bench.tasks import builtin
from torchgraft.fit import fit
from torchgraft.fit.plan import make_plan
from torchgraft.fit.search import Effort, run_trial
from torchgraft.fit.workshop import Choice, Workshop

TASKS = ("digits-vit", "digits-cnn", "stdlib-bytes", "stdlib-search")
#: What is learnt from; with the texts among them, which lose their scores much sooner, the mean suited neither.
LEARNING_TASKS = ("digits-vit", "digits-cnn")
SEEDS = (0, 1, 2, 3, 4)
#: What issue 2, the first release, could do.
FIRST = (
    "magnitude-pruning",
    "taylor-pruning",
    "optin-pruning",
    "rd-layer-adaptive-pruning",
    "svd-truncation",
    "maestro-lod",
    "chain-of-layers",
    "int8-dynamic",
    "quantized-distillation",
)
ARMS = ("release", "first", "all")
COSTS = ("latency", "size")
LEARNING_SEED, LEARNING_STEPS, STRENGTHS = 100, 20, (0.4, 0.8)
#: The costs that are learnt about.
LEARNT = ("latency", "size", "params", "macs")
EXPERIENCE = Path(__file__).parents[1] / "src" / "torchgraft" / "fit" / "experience.json"


def run_arm(name: str, seed: int, seconds: float, procedures: Sequence[str] | None) -> dict[str, Any]:
    """Run one fit and return its front, and what each procedure on it contributed where that is known."""
    task = builtin(name, seed)
    task.trained()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = fit(
            task, costs=COSTS, time=f"{seconds:g}s", seed=seed, max_drop=None, out=folder, procedures=procedures
        )
    if result.front[0].name != "original":
        raise RuntimeError(f"{name}, seed {seed}: the front does not start with the original")
    return {
        "seconds": time.monotonic() - begun,
        "trials": len(result.record.trials),
        "front": [
            {
                "name": c.name,
                "procedures": {applied.key: round(applied.strength, 3) for applied in c.procedures},
                "score": c.validation.value,
                "drop": c.drop.value,
                "verdict": c.verdict,
                **{cost: c.costs[cost].ratio for cost in COSTS},
            }
            for c in result.front
        ],
        "contributions": {row.key: row.lost_without for row in getattr(result.record, "contributions", ())},
    }


def run_release(release: Path, name: str, seed: int, seconds: float) -> dict[str, Any]:
    """Run one fit by the code in ``release``, in a process of its own, by this file's :func:`run_arm`."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "cell.json"
        arguments = ["--arm", name, str(seed), str(seconds), str(out)]
        environment = {**os.environ, "PYTHONPATH": str(release / "src")}
        subprocess.run([sys.executable, __file__, *arguments], check=True, env=environment)
        cell: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    if not Path(cell.pop("code")).resolve().is_relative_to(release.resolve()):
        raise RuntimeError(f"the arm 'release' was not run by the code in {release}")
    return cell


def volume(front: list[dict[str, Any]]) -> float:
    """Return the hypervolume of a front whose first row is the original."""
    # Imported here, since this file is also run by the first release, which has neither.
    from torchgraft.fit.contribution import gains
    from torchgraft.fit.pareto import hypervolume

    base = front[0]["score"]
    return hypervolume([gains(row["score"], [row[cost] for cost in COSTS], base) for row in front])


def run_cell(arm: str, name: str, seed: int, seconds: float, release: Path | None) -> dict[str, Any]:
    """Run one cell of the benchmark."""
    if arm == "release":
        if release is None:
            raise ValueError("the arm 'release' needs a checkout of the first release")
        cell = run_release(release, name, seed, seconds)
    else:
        cell = run_arm(name, seed, seconds, FIRST if arm == "first" else None)
    return {"volume": volume(cell["front"]), **cell}


def ratios(cells: dict[str, Any], name: str, arm: str) -> list[float]:
    """Return the ratio of the volumes, all procedures over ``arm``, for every seed that has both."""
    pairs = [[cells.get(f"{name}/{seed}/{each}") for each in ("all", arm)] for seed in SEEDS]
    return [
        whole["volume"] / part["volume"]
        for whole, part in pairs
        if whole is not None and part is not None and part["volume"] > 0
    ]


def table(cells: dict[str, Any]) -> Table:
    """Return the volumes by task and arm, and the ratios with their range over the seeds."""
    made = Table("task", *ARMS, "all / release", "all / first", "seeds", title="hypervolume of the front")
    for name in TASKS:
        means = []
        for arm in ARMS:
            found = [cell["volume"] for seed in SEEDS if (cell := cells.get(f"{name}/{seed}/{arm}")) is not None]
            means.append(f"{statistics.fmean(found):.2f}" if found else "-")
        if means[2] == "-":
            continue
        spreads = []
        for arm in ("release", "first"):
            found = ratios(cells, name, arm)
            spread = f"{statistics.fmean(found):.2f} ({min(found):.2f} to {max(found):.2f})" if found else "-"
            spreads.append(spread)
        made.add_row(name, *means, *spreads, str(sum(f"{name}/{seed}/all" in cells for seed in SEEDS)))
    return made


def figure(cells: dict[str, Any], path: Path) -> None:
    """Draw latency against size of every front, the two arms in two colours, one panel a task."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    shown = [name for name in TASKS if ratios(cells, name, "first")]
    if not shown:
        return
    drawn, axes = plt.subplots(1, len(shown), figsize=(4.2 * len(shown), 4.0), squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], shown, strict=True):
        for arm, colour, label in (
            ("release", "#c9a227", "first release"),
            ("first", "#9a9a9a", "today, its procedures alone"),
            ("all", "#0b6e99", "today, all"),
        ):
            rows = [
                row
                for seed in SEEDS
                if (cell := cells.get(f"{name}/{seed}/{arm}")) is not None
                for row in cell["front"]
            ]
            size = [90.0 if row["drop"] <= 0.01 else 18.0 for row in rows]
            axis.scatter(
                [row["latency"] for row in rows],
                [row["size"] for row in rows],
                s=size,
                color=colour,
                alpha=0.6,
                label=label,
                linewidths=0,
            )
        axis.set(xscale="log", yscale="log", xlabel="latency, of the original", ylabel="size, of the original")
        for line, ticks in (
            (axis.xaxis, (0.1, 0.15, 0.2, 0.3, 0.5, 1.0)),
            (axis.yaxis, (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)),
        ):
            line.set_major_locator(FixedLocator(ticks))
            line.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            line.set_minor_locator(NullLocator())
        found = [ratios(cells, name, arm) for arm in ("release", "first")]
        words = [f"{statistics.fmean(each):.3g}x" if each else "-" for each in found]
        axis.set_title(f"{name}: volume {words[0]} the release's,\n{words[1]} that of its procedures today", fontsize=9)
        axis.grid(alpha=0.25, which="both")
    axes[0][0].legend(title="large: falls by at most 0.01", fontsize=8, title_fontsize=8, frameon=False)
    for form in ("png", "svg"):
        drawn.savefig(path.with_suffix(f".{form}"), dpi=150)
    plt.close(drawn)


def learn(names: tuple[str, ...], raw: Path) -> dict[str, Any]:
    """Return the gain and the relative time of every procedure alone; what stands in ``raw`` is not measured again.

    Procedures that train for themselves are measured on the first task only: a trial of theirs takes minutes.
    """
    from torchgraft.catalogue.registry import entry, lookup
    from torchgraft.fit.experience import kept

    cells: dict[str, dict[str, Any]] = json.loads(raw.read_text(encoding="utf-8")) if raw.exists() else {}
    effort = Effort(None, None, None, LEARNING_STEPS, 0)
    for name in names:
        task = builtin(name, LEARNING_SEED)
        original = task.trained()
        plan = make_plan(original, task, costs=LEARNT)
        workshop = Workshop(task, original, plan, (), LEARNT, seed=LEARNING_SEED)
        base = float(workshop.validation.mean())
        for stage, members in plan.stages.items():
            for key, procedure in members.items():
                if f"{name}/{key}" in cells or (procedure.expense > 2 and name != names[0]):
                    continue
                found: list[tuple[float, dict[str, Any]]] = []
                for strength in STRENGTHS:
                    begun = time.monotonic()
                    row: dict[str, Any] = {"kept": 0.0, "halvings": dict.fromkeys(LEARNT, 0.0)}
                    try:
                        spent = replace(effort, steps=0) if procedure.exact else effort  # nothing to recover from
                        trial, _ = run_trial(workshop, Choice({stage: (key, strength)}), spent, 0, [], None)
                        halvings = {cost: -math.log2(max(trial.ratios[cost], 1e-9)) for cost in LEARNT}
                        row = {"kept": kept(trial, base), "halvings": halvings}
                    except Exception as error:  # a trial that fails gains nothing, in fit as well
                        print(f"{name}: {key} at {strength}: {type(error).__name__}: {error}", flush=True)
                    row["seconds"] = time.monotonic() - begun
                    found.append((row["kept"] * sum(max(v, 0.0) for v in row["halvings"].values()), row))
                best = max(found, key=lambda pair: pair[0])[1]
                cells[f"{name}/{key}"] = {**best, "seconds": statistics.fmean(row["seconds"] for _, row in found)}
                print(f"{name}: {key}: {cells[f'{name}/{key}']}", flush=True)
                write_atomic(raw, json.dumps(cells, indent=1) + "\n")
    dialled = {place: row for place, row in cells.items() if not entry(lookup(place.partition("/")[2])).exact}
    quickest = {
        name: min(row["seconds"] for place, row in dialled.items() if place.startswith(f"{name}/")) for name in names
    }
    rows: dict[str, list[dict[str, Any]]] = {}
    for place, row in cells.items():
        name, key = place.split("/")
        if name in quickest:
            rows.setdefault(key, []).append({**row, "seconds": row["seconds"] / quickest[name]})

    def mean(values: list[dict[str, Any]], pick: Callable[[dict[str, Any]], float]) -> float:
        return round(statistics.fmean(map(pick, values)), 3)

    return {
        "tasks": list(names),
        "torch": torch.__version__,
        "procedures": {
            key: {
                "kept": mean(values, lambda row: row["kept"]),
                "halvings": {cost: mean(values, lambda row, cost=cost: row["halvings"][cost]) for cost in LEARNT},
                "seconds": mean(values, lambda row: row["seconds"]),
            }
            for key, values in sorted(rows.items())
        },
    }


def main() -> None:
    """Fill the cells that are missing, print the table and draw the figure; or learn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--learn", action="store_true")
    parser.add_argument("--release", type=Path, help="a checkout of the first release")
    parser.add_argument("--arm", nargs=4, metavar=("TASK", "SEED", "SECONDS", "FILE"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("results/shrink.json"))
    chosen = parser.parse_args()
    if chosen.arm:
        name, seed, seconds, out = chosen.arm
        cell = {**run_arm(name, int(seed), float(seconds), FIRST), "code": torchgraft.__file__}
        Path(out).write_text(json.dumps(cell), encoding="utf-8")
        return
    if chosen.learn:
        learnt = learn(tuple(chosen.tasks or LEARNING_TASKS), Path("results/experience.json"))
        write_atomic(EXPERIENCE, json.dumps(learnt, indent=1) + "\n")
        return
    cells: dict[str, Any] = {}
    if chosen.out.exists():
        record = json.loads(chosen.out.read_text(encoding="utf-8"))
        cells = record["cells"] if record["seconds"] == chosen.seconds else {}
    for seed in chosen.seeds:
        for name in chosen.tasks or TASKS:
            for arm in ARMS if seed % 2 == 0 else ARMS[::-1]:
                key = f"{name}/{seed}/{arm}"
                if key in cells or (arm == "release" and chosen.release is None):
                    continue
                cells[key] = run_cell(arm, name, seed, chosen.seconds, chosen.release)
                print(f"{key}: {cells[key]['volume']:.3f} in {cells[key]['seconds']:.0f} s", flush=True)
                record = {
                    "seconds": chosen.seconds,
                    "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
                    "torch": torch.__version__,
                    "first": list(FIRST),
                    "cells": cells,
                }
                write_atomic(chosen.out, json.dumps(record, indent=1) + "\n")
    figure(cells, chosen.out)
    Console().print(table(cells))


if __name__ == "__main__":
    main()
