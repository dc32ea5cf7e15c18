"""SortedNet on digits: one training run for 21 sub-networks of a residual MLP, against training each alone.

Protocol: widths {16, 24, 32, 40, 48, 56, 64} x depths {2, 3, 4}; 60 epochs of AdamW. One nested run draws two configs
uniformly a step; the sandwich rule does the same with the least and the greatest. Sub-networks trained alone take as
many epochs each; of the 21 the four corners and the middle are trained, and compared. Slices are cut from the 64 x 4
network trained alone. No weight decay. The learning rate was chosen on seed 100 among 1e-3 and 3e-3 for the networks
trained alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.task import Task, take
from torchgraft.bench.tasks.digits import correct, splits
from torchgraft.bench.training import evaluate, supervised, train
from torchgraft.claims.record import ClaimRecord, judge
from torchgraft.elastic.sortednet import CARD, sort
from torchgraft.engines.nesting import Nested, Sampler, evaluate_levels, train_levels

__all__ = ["ResidualMlp", "run"]

WIDTHS, DEPTHS = tuple(w / 64 for w in (16, 24, 32, 40, 48, 56, 64)), (0.5, 0.75, 1.0)
ALONE = ((16, 2), (64, 2), (40, 3), (16, 4), (64, 4))
EPOCHS, BATCH, LR = 60, 64, 3e-3


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.fc2(F.relu(self.fc1(self.norm(x))))
        return out


class ResidualMlp(nn.Module):
    """Pixels to a stream of ``width``, ``depth`` residual blocks, a norm and a head; (B, ...) -> (B, 10)."""

    def __init__(self, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.stem = nn.Linear(64, width)
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return class logits."""
        out: Tensor = self.head(self.norm(self.blocks(self.stem(x.flatten(1)))))
        return out


def _task() -> Task:
    first, val, test = splits()
    return Task(ResidualMlp, first, val, test, F.cross_entropy, correct, batch_size=BATCH, learning_rate=LR)


def _steps(task: Task) -> int:
    return EPOCHS * (len(task.train) // BATCH)


def _alone(task: Task, width: int, depth: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = ResidualMlp(width, depth)
    train(
        model,
        task.train,
        supervised(task.loss),
        steps=_steps(task),
        batch_size=BATCH,
        lr=LR,
        seed=seed,
        weight_decay=0.0,
    )
    return model


def _nested(task: Task, sampler: Sampler, seed: int) -> Nested:
    torch.manual_seed(seed)
    nested = sort(ResidualMlp(), take(task.train.inputs, slice(0, 2)), width=WIDTHS, depth=DEPTHS)
    train_levels(nested, task, steps=_steps(task), sampler=sampler, count=2, seed=seed)
    return nested


def measured(seed: int) -> dict[str, float]:
    """Return the accuracies of one seed."""
    task = _task()
    models = [_alone(task, width, depth, seed) for width, depth in ALONE]
    alone = [float(evaluate(model, task, "test").mean()) for model in models]
    cut = sort(models[-1], take(task.train.inputs, slice(0, 2)), width=WIDTHS, depth=DEPTHS)
    chosen = [cut.configs.index({"width": width / 64, "depth": depth / 4}) for width, depth in ALONE]
    found: dict[str, float] = {}
    for name, nested in (
        ("sorted", _nested(task, "uniform", seed)),
        ("sandwich", _nested(task, "sandwich", seed)),
        ("slices", cut),
    ):
        scores = evaluate_levels(nested, task, "test")
        slices = [scores[level] for level in chosen]
        found |= {f"{name}: all 21": fmean(scores), f"{name}: those trained alone": fmean(slices)}
        found[f"{name}: worst gap to alone"] = max(a - b for a, b in zip(alone, slices, strict=True))
    return {"alone": fmean(alone), **found}


def run(seeds: Sequence[int] = (0, 1, 2)) -> ClaimRecord:
    """Run the claim; about half a minute a seed."""
    begun = time.perf_counter()
    with torch.random.fork_rng():
        found = [measured(seed) for seed in seeds]
    metrics = {name: [each[name] for each in found] for name in found[0]}
    mean = {name: fmean(values) for name, values in metrics.items()}
    effects = {
        "share of the accuracy of those trained alone": mean["sorted: those trained alone"] / mean["alone"],
        "points above slices": 100 * (mean["sorted: all 21"] - mean["slices: all 21"]),
        "points above the sandwich rule": 100 * (mean["sorted: all 21"] - mean["sandwich: all 21"]),
        "share of the training passes": 2 / (len(WIDTHS) * len(DEPTHS)),
    }
    return judge(
        CARD.key,
        CARD.claim.figure if CARD.claim else "",
        metrics=metrics,
        effects=effects,
        parts={
            "at least 96 % of those trained alone": effects["share of the accuracy of those trained alone"] >= 0.96,
            "at least 20 points above slices": effects["points above slices"] >= 20.0,
            "at most 1/10 of the training": effects["share of the training passes"] <= 0.1,
        },
        seeds=seeds,
        seconds=time.perf_counter() - begun,
    )
