"""Kinds of sparse training on a digits MLP at 10% density, all for the same number of steps.

Widths are small, so that a tenth of the weights is few. AdamW on a cosine, no weight decay; RigL and SET move 30% of
the weights of each layer every 100 steps until three quarters of the training; gradual pruning runs from a tenth to
three quarters. Accuracy is that of the validation and test samples together (720), which nothing was chosen on. Widths,
steps and learning rate were set on seed 100.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from statistics import fmean

import torch
from torch.nn import functional as F

from torchgraft.bench.models import mlp
from torchgraft.bench.task import Split, Task
from torchgraft.bench.tasks.digits import correct, splits
from torchgraft.bench.training import evaluate
from torchgraft.claims.record import ClaimRecord, judge
from torchgraft.shrink.prune.sparseland_handbook import CARD, train_sparse

__all__ = ["run"]

WIDTHS = (64, 32)
SMALL = 8  # widths of the small dense model, of about as many weights as are kept
DENSITY = 0.1
STEPS = 2000
LR = 5e-3


def _measured(seed: int) -> dict[str, float]:
    first, val, test = splits()
    held = Split(torch.cat([val.inputs, test.inputs]), torch.cat([val.target, test.target]))  # type: ignore[list-item]
    torch.manual_seed(seed)
    model = mlp(64, 10, widths=WIDTHS)
    small = mlp(64, 10, widths=(SMALL,) * len(WIDTHS))
    task = Task(model, first, held, held, F.cross_entropy, correct, batch_size=64, learning_rate=LR)
    plan = {
        "dense": ("dense", "erk"),
        "small dense": ("dense", "erk"),
        "random, ERK": ("random", "erk"),
        "random, uniform": ("random", "uniform"),
        "SET": ("set", "erk"),
        "RigL": ("rigl", "erk"),
        "gradual": ("gradual", "erk"),
    }
    results: dict[str, float] = {}
    for name, (scheme, allocation) in plan.items():
        trained = copy.deepcopy(small if name == "small dense" else model)
        report = train_sparse(
            trained, task, scheme, density=DENSITY, allocation=allocation, steps=STEPS, lr=LR, seed=seed
        )
        results[name] = 100 * float(evaluate(trained, task, "test").mean())
        results[f"training FLOPs of {name}"] = report.training_flops
        results[f"weights of {name}"] = float(sum(report.kept.values()))
    return results


def run(seeds: Sequence[int] = (0, 1, 2)) -> ClaimRecord:
    """Run the claim; about a quarter of a minute a seed."""
    begun = time.perf_counter()
    with torch.random.fork_rng():
        found = [_measured(seed) for seed in seeds]
    metrics = {name: [each[name] for each in found] for name in found[0]}
    mean = {name: fmean(values) for name, values in metrics.items()}
    effects = {
        "points of RigL above static random masks": mean["RigL"] - mean["random, ERK"],
        "points of RigL above gradual pruning": mean["RigL"] - mean["gradual"],
        "training FLOPs of RigL over those of gradual pruning": mean["training FLOPs of RigL"]
        / mean["training FLOPs of gradual"],
        "points of static random masks above the small dense model": mean["random, ERK"] - mean["small dense"],
        "points of RigL above the small dense model": mean["RigL"] - mean["small dense"],
        "points of gradual pruning above the small dense model": mean["gradual"] - mean["small dense"],
        "points of static ERK above static uniform": mean["random, ERK"] - mean["random, uniform"],
    }
    values = list(effects.values())
    return judge(
        CARD.key,
        CARD.claim.figure if CARD.claim else "",
        metrics=metrics,
        effects=effects,
        parts={
            "RigL >= static random + 0.5 points": values[0] >= 0.5,
            "RigL >= gradual - 1 point": values[1] >= -1.0,
            "at <= 0.35x its training FLOPs": values[2] <= 0.35,
            "small dense below static random, RigL and gradual": min(values[3:6]) > 0.0,
            "static ERK >= static uniform": values[6] >= 0.0,
        },
        seeds=seeds,
        seconds=time.perf_counter() - begun,
    )
