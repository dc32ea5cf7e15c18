"""The parallel layout beside the sequential one on digits, trained from scratch from equal weights.

A 3x3 convolution to 16 filters, h residual layers x + relu(conv(x)), a linear head on all 1024 features; no norms, no
augmentation. Adam for 40 epochs of six batches of 128; the learning rate, 3e-3 (of 3e-4, 1e-3 and 3e-3), was chosen by
the accuracy of the sequential layout at h = 4 on seed 100, which is none of the claim's. The sum of branches is not
scaled, as in the paper.
Losses and accuracies are those of the validation split after the last epoch. A step is forward, backward and
Adam on one batch; the layouts take turns, and the ratio is the median over the turns.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import fmean, median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.tasks.digits import splits
from torchgraft.claims.record import ClaimRecord, judge
from torchgraft.parts.blocks.shallow_parallel_residual import CARD, WideBranches

__all__ = ["TIMED", "run"]

TIMED = True
_DEPTHS = (2, 4, 8)
_FILTERS, _EPOCHS, _BATCH, _SAMPLES, _RATE = 16, 40, 128, 768, 3e-3
_LAYOUTS = ("sequential", "parallel")


class _Net(nn.Module):
    """A stem, h branches in one of two layouts, a linear head: (B, 1, 8, 8) -> (B, 10)."""

    def __init__(self, h: int, layout: str, *, skip: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, _FILTERS, 3, padding=1)
        layers = [nn.Conv2d(_FILTERS, _FILTERS, 3, padding=1) for _ in range(h)]
        self.head = nn.Linear(_FILTERS * 64, 10)
        parallel = layout == "parallel"
        self.layers = nn.ModuleList([WideBranches.of(layers)] if parallel else layers)
        self.parallel, self.skip = parallel, skip

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.stem(image))
        for layer in self.layers:
            y = layer(x) if self.parallel else torch.relu(layer(x))
            x = x + y if self.skip else y
        logits: Tensor = self.head(x.flatten(1))
        return logits


def _built(h: int, layout: str, seed: int, *, skip: bool = True) -> tuple[nn.Module, torch.optim.Optimizer]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _Net(h, layout, skip=skip)
    return model, torch.optim.Adam(model.parameters(), lr=_RATE, fused=True)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def _trained(h: int, layout: str, seed: int, *, skip: bool = True) -> tuple[float, float]:
    """Return loss and accuracy on the validation split."""
    model, optimizer = _built(h, layout, seed, skip=skip)
    train, val, _ = splits()
    order = torch.Generator().manual_seed(seed)
    for _ in range(_EPOCHS):
        for x, y in train[:_SAMPLES].batches(_BATCH, generator=order):
            if isinstance(x, Tensor):
                _step(model, optimizer, x, y)
    with torch.no_grad():
        logits: Tensor = model(val.inputs)
    return float(F.cross_entropy(logits, val.target)), float((logits.argmax(-1) == val.target).float().mean())


def _step_ratio(h: int, rounds: int = 25) -> float:
    """Return the time of a training step of the parallel layout over that of the sequential one."""
    train = splits()[0][:_BATCH]
    x, y = train.inputs, train.target
    pairs = {layout: _built(h, layout, 0) for layout in _LAYOUTS}
    seconds: dict[str, list[float]] = {layout: [] for layout in _LAYOUTS}
    for turn in range(rounds + 3):
        for layout in _LAYOUTS if turn % 2 else _LAYOUTS[::-1]:
            begun = time.perf_counter()
            if isinstance(x, Tensor):
                _step(*pairs[layout], x, y)
            seconds[layout].append(time.perf_counter() - begun)
    first, second = (seconds[layout][3:] for layout in _LAYOUTS)
    ratio: float = median(b / a for a, b in zip(first, second, strict=True))
    return ratio


def run(seeds: Sequence[int] = (0, 1, 2)) -> ClaimRecord:
    """Run the claim.

    Args:
        seeds: weights and order of the data.
    """
    begun = time.perf_counter()
    metrics: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        metrics.setdefault(name, []).append(round(value, 4))

    for seed in seeds:
        for h in _DEPTHS:
            loss, right = zip(*(_trained(h, layout, seed) for layout in _LAYOUTS), strict=True)
            for index, layout in enumerate(_LAYOUTS):
                note(f"h = {h}, {layout}: validation loss", loss[index])
                note(f"h = {h}, {layout}: accuracy", right[index])
            note(f"h = {h}: |validation loss difference|", abs(loss[1] - loss[0]))
            note(f"h = {h}: step time, parallel over sequential", _step_ratio(h))
        for layout in _LAYOUTS:
            loss_, right_ = _trained(4, layout, seed, skip=False)
            note(f"h = 4 without skips, {layout}: validation loss", loss_)
            note(f"h = 4 without skips, {layout}: accuracy", right_)
    mean = {name: fmean(values) for name, values in metrics.items()}
    gaps = {h: abs(mean[f"h = {h}, parallel: accuracy"] - mean[f"h = {h}, sequential: accuracy"]) for h in _DEPTHS}
    losses = {h: mean[f"h = {h}: |validation loss difference|"] for h in _DEPTHS}
    ratios = {h: mean[f"h = {h}: step time, parallel over sequential"] for h in _DEPTHS}
    bare = [mean[f"h = 4 without skips, {layout}: validation loss"] for layout in _LAYOUTS]
    effects = {
        **{f"h = {h}: accuracy gap": value for h, value in gaps.items()},
        **{f"h = {h}: |validation loss difference|": value for h, value in losses.items()},
        **{f"h = {h}: step time, parallel over sequential": value for h, value in ratios.items()},
        "h = 4 without skips: |validation loss difference|": abs(bare[1] - bare[0]),
    }
    return judge(
        CARD.key,
        CARD.claim.figure if CARD.claim is not None else "",
        metrics=metrics,
        effects={name: round(value, 4) for name, value in effects.items()},
        parts={
            "loss difference below 0.05 at every h": max(losses.values()) < 0.05,
            "accuracy gap at most 1.5 points at every h": max(gaps.values()) <= 0.015,
            "parallel faster per step at every h": max(ratios.values()) < 1.0,
        },
        seeds=seeds,
        seconds=time.perf_counter() - begun,
    )
