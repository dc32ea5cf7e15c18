"""N2N on digits: blocks removed and widths shrunk by two policies, against random actions with the same budget.

The teacher has a first convolution (3 x 3, stride 2, which stays) and five residual blocks of one 3 x 3 convolution, 32
channels everywhere, and is trained on the labels for 300 steps of 64 samples. The stages take 40 and 20 epochs of 5
actions, and every new student is distilled for 2 epochs of the training samples and scored on validation; the second
stage starts from the best student of the first, and its rewards are measured against the first teacher. Random: the
same with actions drawn uniformly. The best student of each is then distilled for 300 steps more, and so is a network
of uniform width and full depth of at most as many parameters. Sizes and batches were chosen on seed 100, the policies'
learning rate among 0.015 and 0.03 on seeds 100 and 101 with students that are counted and not trained, all outside the
claim. Accuracy is on test; a policy's last reward is the mean over its last 8 epochs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import fmean
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.meters import params
from torchgraft.bench.task import Task
from torchgraft.bench.tasks.digits import correct, splits
from torchgraft.bench.training import supervised, train
from torchgraft.claims.images import accuracy
from torchgraft.claims.record import ClaimRecord, judge
from torchgraft.engines.distill import Teacher
from torchgraft.shrink.distill.n2n_learning import CARD, N2NCompressor, Trial, distilled_score

__all__ = ["run"]

BLOCKS, WIDTH, RATE, STEPS, BATCH = 5, 32, 3e-3, 300, 64
EPOCHS, ROLLOUTS, SHORT, LAST = {"remove": 40, "shrink": 20}, 5, 34, 8
POLICY_RATE = 0.015


class Block(nn.Module):
    """x + convolution, normalised, then ReLU; or without the x, where the shape changes."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.plain = inputs != width
        self.conv = nn.Conv2d(inputs, width, 3, stride=2 if self.plain else 1, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, width, H, W), or half of H and W."""
        y = self.norm(self.conv(x))
        return F.relu(y if self.plain else x + y)


class Net(nn.Module):
    """A first convolution of stride 2 and residual blocks of one width."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(1, width), *(Block(width, width) for _ in range(BLOCKS)))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 1, 8, 8) to (B, 10)."""
        y: Tensor = self.head(self.blocks(x).mean((2, 3)))
        return y


def searched(task: Task, teacher: nn.Module, *, seed: int, rate: float) -> tuple[nn.Module, list[list[Trial]]]:
    """Return the best student of both stages and all trials of each; at rate 0 actions are uniformly random."""
    score = distilled_score(task, Teacher(teacher, task), steps=SHORT, seed=seed)
    student, trials = teacher, []
    whole = float(task.score(teacher(task.val.inputs), task.val.target).mean())
    stages: tuple[Literal["remove", "shrink"], ...] = ("remove", "shrink")
    for stage in stages:
        search = N2NCompressor(
            student,
            score,
            example=task.train[:2].inputs,
            stage=stage,
            rollouts=ROLLOUTS,
            epochs=EPOCHS[stage],
            teacher_accuracy=whole,
            teacher_parameters=params(teacher),
            lr=rate,
            seed=seed,
        )
        if rate == 0.0:
            nn.init.zeros_(search.policy.head.weight)
            nn.init.zeros_(search.policy.head.bias)
        student, history = search.fit()
        trials.append(history)
    return student, trials


def measured(seed: int, rate: float = POLICY_RATE) -> dict[str, float]:
    """Return rewards, sizes and accuracies."""
    first, val, test = splits()
    torch.manual_seed(seed)
    teacher = Net()
    train(teacher, first, supervised(F.cross_entropy), steps=STEPS, batch_size=BATCH, lr=RATE, seed=seed)
    task = Task(teacher, first, val, test, F.cross_entropy, correct, batch_size=BATCH, learning_rate=RATE)
    finish = distilled_score(task, teacher, steps=STEPS, seed=seed)
    results = {"teacher": accuracy(teacher, test)}
    sizes = {}
    for name, each in (("policy", rate), ("random", 0.0)):
        student, trials = searched(task, teacher, seed=seed, rate=each)
        for stage, history in zip(("removing", "shrinking"), trials, strict=True):
            late = history if name == "random" else history[-LAST * ROLLOUTS :]
            results[f"{name}: reward {stage}"] = fmean(trial.reward for trial in late)
        finish(student)
        sizes[name] = params(student)
        results[name] = accuracy(student, test)
        results[f"{name}: times fewer parameters"] = params(teacher) / sizes[name]
    torch.manual_seed(seed)
    uniform = next(net for net in (Net(width) for width in range(WIDTH, 1, -1)) if params(net) <= sizes["policy"])
    finish(uniform)
    return {**results, "uniform": accuracy(uniform, test), "uniform: times fewer": params(teacher) / params(uniform)}


def run(seeds: Sequence[int] = (0, 1, 2)) -> ClaimRecord:
    """Run the claim; about half a minute a seed."""
    begun = time.perf_counter()
    with torch.random.fork_rng():
        found = [measured(seed) for seed in seeds]
    metrics = {name: [each[name] for each in found] for name in found[0]}
    mean = {name: fmean(values) for name, values in metrics.items()}
    gains = [mean[f"policy: reward {stage}"] - mean[f"random: reward {stage}"] for stage in ("removing", "shrinking")]
    effects = {
        "times fewer parameters": mean["policy: times fewer parameters"],
        "points below the teacher": 100 * (mean["teacher"] - mean["policy"]),
        "reward above random": fmean(gains),
        "reward above random, removing": gains[0],
        "reward above random, shrinking": gains[1],
        "points above uniform": 100 * (mean["policy"] - mean["uniform"]),
    }
    return judge(
        CARD.key,
        CARD.claim.figure if CARD.claim else "",
        metrics=metrics,
        effects=effects,
        parts={
            ">= 8x fewer parameters": effects["times fewer parameters"] >= 8.0,
            "within 1.5 points": effects["points below the teacher"] <= 1.5,
            "reward >= random + 0.05": effects["reward above random"] >= 0.05,
        },
        seeds=seeds,
        seconds=time.perf_counter() - begun,
    )
