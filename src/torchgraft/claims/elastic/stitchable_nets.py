"""Stitchable networks on digits: three residual MLPs of widths 24, 48 and 96, trained apart, then stitched.

Protocol: each anchor takes 30 epochs of AdamW; stitches are fitted on 256 training samples, or drawn as linear layers
are; then 30 epochs of joint training, one random config a step, in which half of the loss is distillation from the
largest anchor as it was (the paper follows a strong teacher too). A stitch is held against the straight line, over
multiply-accumulates, between the anchors that it joins, as they stand after the joint training, and counts as within
1 point where it is above the line less 1 point. The joint training's batch and rate were chosen on seed 100, on the
validation samples: batches of 16 among {16, 32, 64} and 1e-3 among {3e-4, 1e-3, 2e-3}; the anchors' 3e-3 as well.

A first run took 8 epochs and no teacher and was "not reproduced" (73 % within 1 point): 28 steps a config, where the
paper's 50 epochs are some 900, so that stitches were undertrained. On the validation samples of seeds 100 to 105 the
share was 0.83 so, 0.86 after 30 epochs, 0.95 after 30 and 0.96 after 50 epochs with the teacher.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from statistics import fmean

import torch
from torch import nn
from torch.nn import functional as F

from torchgraft.bench.task import Task, take
from torchgraft.bench.tasks.digits import correct, splits
from torchgraft.bench.training import evaluate, supervised, train
from torchgraft.claims.elastic.sortednet import ResidualMlp
from torchgraft.claims.record import ClaimRecord, judge
from torchgraft.elastic.stitchable_nets import CARD, SNNet

__all__ = ["measured", "run"]

WIDTHS, EPOCHS, JOINT = (24, 48, 96), 30, 30
BATCH, LR, JOINT_BATCH, JOINT_LR = 64, 3e-3, 16, 1e-3


def _anchors(task: Task, seed: int) -> list[nn.Module]:
    found: list[nn.Module] = []
    for width in WIDTHS:
        torch.manual_seed(seed)
        model = ResidualMlp(width, 4)
        steps = EPOCHS * (len(task.train) // BATCH)
        train(model, task.train, supervised(task.loss), steps=steps, batch_size=BATCH, lr=LR, seed=seed)
        found.append(model)
    return found


def measured(
    seed: int, *, joint_lr: float = JOINT_LR, joint_batch: int = JOINT_BATCH, split: str = "test"
) -> dict[str, float]:
    """Return the accuracies of one seed."""
    first, val, test = splits()
    task = Task(ResidualMlp, first, val, test, F.cross_entropy, correct, batch_size=BATCH, learning_rate=LR)
    anchors = _anchors(task, seed)
    torch.manual_seed(seed)
    family = SNNet(anchors, take(task.train.inputs, slice(0, 2)))
    count = len(anchors)

    def scores() -> list[float]:
        return [float(evaluate(family.use(config), task, split).mean()) for config in range(len(family))]

    rough = scores()
    family.init_stitches(take(task.train.inputs, slice(0, 256)))
    fitted = scores()
    task.batch_size = joint_batch
    teacher = copy.deepcopy(anchors[-1]).eval()
    family.fit(task, steps=JOINT * (len(task.train) // joint_batch), teacher=teacher, lr=joint_lr, seed=seed)
    points = family.pareto(task, split)
    below = []
    for route, (cost, score) in zip(family.routes, points[count:], strict=True):
        (low, worse), (high, better) = points[route.front], points[route.end]
        line = worse + (better - worse) * min(max((cost - low) / (high - low), 0.0), 1.0)
        below.append(line - score)
    return {
        "anchors before": fmean(fitted[:count]),
        "anchors after": fmean(score for _, score in points[:count]),
        "largest drop of an anchor": max(a - b for a, (_, b) in zip(fitted[:count], points[:count], strict=True)),
        "random stitches before": fmean(rough[count:]),
        "fitted stitches before": fmean(fitted[count:]),
        "stitches after": fmean(score for _, score in points[count:]),
        "share of stitches within 1 point": fmean(float(gap <= 0.01) for gap in below),
    }


def run(seeds: Sequence[int] = (0, 1, 2)) -> ClaimRecord:
    """Run the claim; about ten seconds a seed."""
    begun = time.perf_counter()
    with torch.random.fork_rng():
        found = [measured(seed) for seed in seeds]
    metrics = {name: [each[name] for each in found] for name in found[0]}
    mean = {name: fmean(values) for name, values in metrics.items()}
    effects = {
        "points of fitted above random stitches": 100
        * (mean["fitted stitches before"] - mean["random stitches before"]),
        "share of stitches within 1 point": mean["share of stitches within 1 point"],
        "largest drop of an anchor": 100 * mean["largest drop of an anchor"],
    }
    return judge(
        CARD.key,
        CARD.claim.figure if CARD.claim else "",
        metrics=metrics,
        effects=effects,
        parts={
            "at least 15 points above random": effects["points of fitted above random stitches"] >= 15.0,
            "at least 80 % within 1 point": effects["share of stitches within 1 point"] >= 0.8,
            "no anchor down by more than 1 point": effects["largest drop of an anchor"] <= 1.0,
        },
        seeds=seeds,
        seconds=time.perf_counter() - begun,
    )
