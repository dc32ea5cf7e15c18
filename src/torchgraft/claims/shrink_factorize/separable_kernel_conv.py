"""Separable kernels on waves: the next frame of the 2-D wave equation, factored from the start against dense.

u_tt = c^2 Lap u on 16 x 16 points, zero at the border, by leapfrog (Courant number 0.5, two steps a frame) from one
to three Gaussian bumps at rest; 160 training and 40 test trajectories of 20 frames. A network of four 7 x 7
convolutions of 8 channels with GELUs says frame t + 1 from frames t and t - 1. Both are trained alike: AdamW without
decay, 1500 steps of 16 pairs, cosine, mean squared error; the learning rate of each was chosen among 3e-3 and 1e-2 on
seed 100, with 400 steps, outside the claim. The gap is test minus training error, each relative to the size of the
frames, on as many pairs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.meters import params
from torchgraft.bench.task import Split
from torchgraft.bench.training import supervised, train
from torchgraft.claims.record import ClaimRecord, judge
from torchgraft.shrink.factorize.separable_kernel_conv import CARD, convert

__all__ = ["run"]

GRID, WIDTH, FRAMES, STEPS, BATCH = 16, 8, 20, 1500, 16
RATES = {"dense": 1e-2, "separable": 1e-2}


def waves(count: int, seed: int) -> Tensor:
    """Return trajectories of frames, (count, FRAMES, GRID, GRID), of standard deviation 1 in all."""
    draw = torch.Generator().manual_seed(seed)
    axis = torch.arange(GRID).float()
    u = torch.zeros(count, GRID, GRID)
    bumps = torch.randint(1, 4, (count,), generator=draw)
    for bump in range(3):
        place = 3 + (GRID - 6) * torch.rand(count, 2, 1, generator=draw)
        width = 1.2 + 1.0 * torch.rand(count, 1, 1, generator=draw)
        height = (0.5 + torch.rand(count, 1, 1, generator=draw)) * (bumps > bump).float()[:, None, None]
        rows, columns = (axis - place[:, 0]).square(), (axis - place[:, 1]).square()  # (count, GRID) each
        u += height * torch.exp(-(rows[:, :, None] + columns[:, None, :]) / (2 * width.square()))
    before, frames = u.clone(), []
    for _ in range(FRAMES):
        frames.append(u)
        for _ in range(2):
            padded = F.pad(u, (1, 1, 1, 1))
            laplacian = padded[:, 2:, 1:-1] + padded[:, :-2, 1:-1] + padded[:, 1:-1, 2:] + padded[:, 1:-1, :-2] - 4 * u
            u, before = 2 * u - before + 0.25 * laplacian, u
    found = torch.stack(frames, 1)
    return found / 0.2


def pairs(trajectories: Tensor) -> Split:
    """Return inputs (N, 2, GRID, GRID), two frames each, and the frame after them (N, 1, GRID, GRID)."""
    inputs = torch.stack([trajectories[:, 1:-1], trajectories[:, :-2]], 2)
    return Split(inputs.flatten(0, 1), trajectories[:, 2:].flatten(0, 1).unsqueeze(1))


def network(separable: bool, seed: int) -> nn.Module:
    """Return the untrained network."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in ((2, WIDTH), (WIDTH, WIDTH), (WIDTH, WIDTH)):
        layers += [nn.Conv2d(inputs, outputs, 7, padding=3), nn.GELU()]
    dense = nn.Sequential(*layers, nn.Conv2d(WIDTH, 1, 7, padding=3))
    return convert(dense, 1) if separable else dense


def error(model: nn.Module, split: Split) -> float:
    """Return the norm of all errors over the norm of all frames."""
    with torch.no_grad():
        off = torch.stack([(model(x) - y).square().sum() for x, y in split.batches(90)]).sum()
    return float((off / split.target.square().sum()).sqrt())


def measured(seed: int, rates: dict[str, float]) -> dict[str, float]:
    """Return errors and parameters of both networks."""
    first, test = pairs(waves(160, 1000 + seed)), pairs(waves(40, 2000 + seed))
    found = {}
    for name, rate in rates.items():
        model = network(name == "separable", seed)
        train(model, first, supervised(F.mse_loss), steps=STEPS, batch_size=BATCH, lr=rate, seed=seed, weight_decay=0.0)
        found[f"{name}: error on test"] = error(model, test)
        found[f"{name}: gap"] = found[f"{name}: error on test"] - error(model, first[: len(test)])
        found[f"{name}: parameters"] = float(params(model))
    return found


def run(seeds: Sequence[int] = (0, 1, 2)) -> ClaimRecord:
    """Run the claim; about half a minute a seed."""
    begun = time.perf_counter()
    with torch.random.fork_rng():
        found = [measured(seed, RATES) for seed in seeds]
    metrics = {name: [each[name] for each in found] for name in found[0]}
    mean = {name: fmean(values) for name, values in metrics.items()}
    effects = {
        "error of the dense": mean["separable: error on test"] / mean["dense: error on test"],
        "parameters of the dense": mean["separable: parameters"] / mean["dense: parameters"],
        "gap above the dense": mean["separable: gap"] - mean["dense: gap"],
    }
    return judge(
        CARD.key,
        CARD.claim.figure if CARD.claim else "",
        metrics=metrics,
        effects=effects,
        parts={
            "error <= 1.15 x dense": effects["error of the dense"] <= 1.15,
            "<= 35 % of the parameters": effects["parameters of the dense"] <= 0.35,
            "gap no larger": effects["gap above the dense"] <= 0.0,
        },
        seeds=seeds,
        seconds=time.perf_counter() - begun,
    )
