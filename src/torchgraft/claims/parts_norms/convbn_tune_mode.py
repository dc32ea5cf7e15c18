"""A residual net fine-tuned on turned digits with frozen statistics, in eval, tune and deploy form.

Pretraining: AdamW, 200 steps of 64 digits, batch norm training as usual. Fine-tuning: digits turned by 90 degrees, the
running statistics frozen, plain SGD for 30 steps of 64 digits in the same order for every form, in float64, so that
what differs is the method and not the rounding. With gains scaled by 0.1 all three start from the same function too.
Times and memory are those of a bottleneck network, the block of the paper's ResNet-50, 8 images of 32 x 32, in float32.
The number of fine-tuning steps was chosen on seed 100 to fit the time; the learning rates are those of the entry.

The first run, with torch's default initial weights, had |s| > 1 in every layer, against the paper's networks whose |s|
is small; there it is eval and tune that take the longer steps, and both diverged at 1e-1 where deploy did not. So the
convolutions now start ten times larger (Kaiming times ten), which batch norm does not see and which makes |s| 0.1 to
0.5; nothing else was changed, and the thresholds are those of before the first run.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from statistics import fmean, median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchgraft.bench.models import ResidualNet
from torchgraft.bench.task import Split
from torchgraft.bench.tasks.digits import splits
from torchgraft.bench.training import supervised, train
from torchgraft.claims.record import ClaimRecord, judge
from torchgraft.parts.norms.convbn_tune_mode import CARD, deploy, mode_report, tune_mode

__all__ = ["Bottleneck", "run"]

TIMED = True
_STEPS, _BATCH = 30, 64
_RATES = (1e-2, 1e-1)
_LARGER = 10.0


class Bottleneck(nn.Module):
    """relu(x + norm(1x1(relu(norm(3x3(relu(norm(1x1(x))))))))), (B, C, h, w) -> (B, C, h, w).

    Args:
        width: C.
        inner: channels of the 3x3 convolution.
    """

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        sizes = ((width, inner, 1), (inner, inner, 3), (inner, width, 1))
        layers: list[nn.Module] = []
        for inputs, outputs, kernel in sizes:
            conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
            layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
        self.body = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch."""
        return F.relu(x + self.body(x))


def _images(split: Split) -> Tensor:
    if not isinstance(split.inputs, Tensor):
        raise TypeError("digits are one tensor")
    return split.inputs


def _standardised(split: Split, *, turned: bool = False) -> Split:
    """Return digits of mean 0 and variance 1, turned by 90 degrees where that is asked for."""
    images = (_images(split) - 0.305) / 0.376
    return Split(torch.rot90(images, 1, (2, 3)).contiguous() if turned else images, split.target)


def _pretrained(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ResidualNet(widths=(16, 32), depth=1)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                with torch.no_grad():
                    module.weight.mul_(_LARGER)
    train(
        model, _standardised(splits()[0]), supervised(F.cross_entropy), steps=200, batch_size=_BATCH, lr=3e-3, seed=seed
    )
    return model.double().eval()


def _tuning(model: nn.Module, rate: float, seed: int) -> list[float]:
    """Return the loss at every step of SGD on turned digits."""
    split = _standardised(splits()[0], turned=True)
    images, classes = _images(split).double(), split.target
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed)).repeat(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    losses = []
    for step in range(_STEPS):
        rows = order[step * _BATCH : (step + 1) * _BATCH]
        loss = F.cross_entropy(model(images[rows]), classes[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def _forms(model: nn.Module) -> dict[str, nn.Module]:
    """Return the model in its three forms, all of one function."""
    example = torch.zeros(2, 1, 8, 8, dtype=torch.float64)
    tuned = copy.deepcopy(model)
    tune_mode(tuned, example)
    return {"eval": model, "tune": tuned, "deploy": deploy(copy.deepcopy(tuned))}


def _step_ratio() -> tuple[float, float]:
    """Return tune's step time and kept bytes over eval's, on the bottleneck network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), *(Bottleneck(64, 16) for _ in range(4))).eval()
        x = torch.randn(8, 3, 32, 32)
    tuned = copy.deepcopy(plain)
    tune_mode(tuned, x)

    def seconds(model: nn.Module) -> float:
        begun = time.perf_counter()
        model.zero_grad()
        model(x).square().mean().backward()
        return time.perf_counter() - begun

    calls: list[Callable[[], float]] = [lambda: seconds(plain), lambda: seconds(tuned)]
    for call in calls:
        call()
    times = [median(row[1] / row[0] for row in [[call() for call in calls] for _ in range(5)]) for _ in range(3)]
    report = mode_report(plain, x)
    return median(times), report.tune_bytes / report.eval_bytes


def run(seeds: Sequence[int] = (0, 1, 2)) -> ClaimRecord:
    """Run the claim.

    Args:
        seeds: weights and order of the data.
    """
    begun = time.perf_counter()
    metrics: dict[str, list[float]] = {}
    gaps: list[float] = []
    for seed in seeds:
        trained = _pretrained(seed)
        for gain in (1.0, 0.1):
            model = copy.deepcopy(trained)
            with torch.no_grad():
                for module in model.modules():
                    if isinstance(module, nn.BatchNorm2d):
                        module.weight.mul_(gain)
            for rate in _RATES:
                losses = {name: _tuning(form, rate, seed) for name, form in _forms(copy.deepcopy(model)).items()}
                gaps.append(max(abs(a - b) for a, b in zip(losses["eval"], losses["tune"], strict=True)))
                for name, each in losses.items():
                    last = fmean(each[-5:])
                    named = f"{name}: last loss at {rate:g}, gains x {gain:g}"
                    metrics.setdefault(named, []).append(round(last, 4) if math.isfinite(last) else 1e9)
    speed, memory = _step_ratio()
    mean = {name: fmean(values) for name, values in metrics.items()}
    small = "last loss at 0.1, gains x 0.1"
    excess = mean[f"deploy: {small}"] / mean[f"eval: {small}"] - 1.0
    metrics["largest gap of tune's losses to eval's"] = [max(gaps)]
    return judge(
        CARD.key,
        CARD.claim.figure if CARD.claim is not None else "",
        metrics=metrics,
        effects={
            "largest gap of tune's losses to eval's": max(gaps),
            "kept for backward, tune over eval": round(memory, 4),
            "step time, tune over eval": round(speed, 4),
            "loss at 1e-1 with gains x 0.1, deploy above eval": round(excess, 5),
        },
        parts={
            "losses within 1e-3 of eval's": max(gaps) <= 1e-3,
            "at least 25 % less is kept": memory <= 0.75,
            "step time at most eval's": speed <= 1.0,
            "deploy is worse at 1e-1 with small gains": excess > 0.0,
        },
        seeds=seeds,
        seconds=time.perf_counter() - begun,
        inconclusive="tune mode equals eval mode at less memory and time; that deploy mode is worse than both was not "
        f"seen: its loss is {excess:.2%} higher, less than the 1 % that would be a difference"
        if 0.0 < excess < 0.01
        else "",
    )
