"""Neural metamorphosis on digits: weights for any hidden width from functions of place.

Protocol: three convolutions on digits, the hidden width (out of the second, into the third) from 16 to 32 in steps of
4, 20 and 28 left out, and 12 beyond the range. The teacher has width 32. Functions of 96 units and six frequencies (the
last is the grid's), 1200 steps of AdamW at 2e-3, with a smooth order and coordinate noise or with neither; sampled
weights are the mean of 20 draws where there was noise. Networks trained alone take 400 steps at 3e-3, as the teacher
does. The sliced teacher keeps the units of largest weights. On seed 100, with pooled features, the
networks were undertrained (0.90 for the teacher, 0.78 at width 12), so the head now sees all features.
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
from torchgraft.elastic.neural_metamorphosis import CARD, NeuMeta, permute_smooth
from torchgraft.engines.width import prepare

__all__ = ["Net", "measured", "run"]

WIDTH, UNSEEN = 32, (12, 20, 28)
STEPS, META_STEPS, META_LR = 400, 1200, 2e-3
HIDDEN, FREQUENCIES, DRAWS = 96, 6, 20


class Net(nn.Module):
    """Three convolutions and a head; ``width`` channels between the second and the third; (B, 1, 8, 8) -> (B, 10)."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, width, 3, padding=1, stride=2)
        self.conv3 = nn.Conv2d(width, 16, 3, padding=1)
        self.head = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return class logits."""
        x = F.relu(self.conv3(F.relu(self.conv2(F.relu(self.conv1(x))))))
        out: Tensor = self.head(x.flatten(1))
        return out


def task() -> Task:
    """Return digits for the networks."""
    first, val, test = splits()
    return Task(Net, first, val, test, F.cross_entropy, correct, batch_size=64, learning_rate=3e-3)


def alone(where: Task, width: int, seed: int) -> nn.Module:
    """Return a network of ``width`` trained alone."""
    torch.manual_seed(seed)
    model = Net(width)
    train(model, where.train, supervised(where.loss), steps=STEPS, batch_size=64, lr=3e-3, seed=seed)
    return model


def sliced(where: Task, teacher: nn.Module, width: int) -> nn.Module:
    """Return the teacher with the ``width`` hidden units of largest weights."""
    found = prepare(teacher, take(where.train.inputs, slice(0, 2)))
    weights = {name: value.detach().abs() for name, value in found.model.named_parameters()}
    best = found.structure.unit_scores("conv2", weights).argsort(descending=True)[:width].sort().values
    return found.structure.slice({"conv2": best.tolist()}).rewrite(found.model).eval()


def meta(
    where: Task, teacher: nn.Module, seed: int, *, smooth: bool, steps: int = META_STEPS, lr: float = META_LR
) -> NeuMeta:
    """Return the trained functions, with smooth order and noise or with neither."""
    if smooth:
        teacher = permute_smooth(teacher, take(where.train.inputs, slice(0, 2))).model
    torch.manual_seed(seed)
    made = NeuMeta(
        Net, (16, WIDTH), teacher, WIDTH, steps_of=4, leave_out=UNSEEN, noise=1.0 if smooth else 0.0,
        hidden=HIDDEN, frequencies=FREQUENCIES,
    )  # fmt: skip
    made.fit(where, steps=steps, lr=lr, seed=seed)
    return made


def measured(seed: int) -> dict[str, float]:
    """Return the accuracies of one seed."""
    where = task()

    def score(model: nn.Module) -> float:
        return float(evaluate(model, where, "test").mean())

    teacher = alone(where, WIDTH, seed)
    found = {"teacher": score(teacher), "sliced at 16": score(sliced(where, teacher, 16))}
    for width in UNSEEN:
        found[f"alone at {width}"] = score(alone(where, width, seed))
    for name, smooth in (("smooth", True), ("plain", False)):
        made = meta(where, teacher, seed, smooth=smooth)
        for width in (*UNSEEN, 16, WIDTH):
            found[f"{name} at {width}"] = score(made.sample(width, draws=DRAWS if smooth else 1))
    return found


def run(seeds: Sequence[int] = (0, 1, 2)) -> ClaimRecord:
    """Run the claim; about thirty seconds a seed."""
    begun = time.perf_counter()
    with torch.random.fork_rng():
        found = [measured(seed) for seed in seeds]
    metrics = {name: [each[name] for each in found] for name in found[0]}
    mean = {name: 100 * fmean(values) for name, values in metrics.items()}
    smooth, plain, each = (
        fmean(mean[f"{name} at {width}"] for width in UNSEEN) for name in ("smooth", "plain", "alone")
    )
    effects = {
        "points below networks trained alone, unseen widths": each - smooth,
        "points above the sliced teacher at 16": mean["smooth at 16"] - mean["sliced at 16"],
        "points above neither smoothing nor noise, unseen widths": smooth - plain,
    }
    return judge(
        CARD.key,
        CARD.claim.figure if CARD.claim else "",
        metrics=metrics,
        effects=effects,
        parts={
            "unseen widths within 2 points": effects["points below networks trained alone, unseen widths"] <= 2.0,
            "at least 10 points above slicing": effects["points above the sliced teacher at 16"] >= 10.0,
            "better than neither": effects["points above neither smoothing nor noise, unseen widths"] > 0.0,
        },
        seeds=seeds,
        seconds=time.perf_counter() - begun,
    )
