"""LiT on 8x8 digits: a linear diffusion transformer that takes over the weights of a softmax one, or does not.

Four blocks of width 64 over 16 patches of 2x2 pixels, conditioned on class and time, predict the noise of 100 steps of
diffusion; the variance is fixed, so the distillation has its noise term alone. A student has a fifth of the teacher's
steps. Samples are drawn in 25 deterministic steps; their distance to the test images is Frechet's, in the last hidden
layer of a classifier trained on real digits. The learning rate is the teacher's for all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.models import Attention, mlp
from torchgraft.bench.task import Split
from torchgraft.bench.tasks.digits import splits
from torchgraft.bench.training import supervised, train
from torchgraft.claims.record import ClaimRecord, judge
from torchgraft.parts.mixers.lit_linear_dit import CARD, hybrid_distill, linearize_dit

__all__ = ["run"]

_WIDTH, _BLOCKS, _TIMES = 64, 4, 100
_STEPS, _BATCH, _RATE = 250, 32, 2e-3
_SAMPLES, _JUMPS = 200, 25


class _Block(nn.Module):
    """Attention and a feed-forward part, each scaled, shifted and gated by the condition."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(_WIDTH, elementwise_affine=False)
        self.attn: nn.Module = Attention(_WIDTH, 8)
        self.mlp = nn.Sequential(nn.Linear(_WIDTH, 2 * _WIDTH), nn.GELU(), nn.Linear(2 * _WIDTH, _WIDTH))
        self.modulate = nn.Linear(_WIDTH, 6 * _WIDTH)
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        a, b, c, d, e, f = self.modulate(F.silu(condition))[:, None].chunk(6, dim=-1)  # (B, 1, D) each
        x = x + c * self.attn(self.norm(x) * (1 + a) + b)
        out: Tensor = x + f * self.mlp(self.norm(x) * (1 + d) + e)
        return out


class _Dit(nn.Module):
    """Noisy images (B, 64), times (B,) and classes (B,) to the noise (B, 64)."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(4, _WIDTH)
        self.place = nn.Parameter(torch.randn(16, _WIDTH) * 0.3)
        self.label = nn.Embedding(10, _WIDTH)
        self.time = nn.Sequential(nn.Linear(32, _WIDTH), nn.SiLU(), nn.Linear(_WIDTH, _WIDTH))
        self.blocks = nn.ModuleList(_Block() for _ in range(_BLOCKS))
        self.norm = nn.LayerNorm(_WIDTH)
        self.head = nn.Linear(_WIDTH, 4)

    def forward(self, x: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        rate = torch.exp(-torch.arange(16) / 16 * math.log(1000.0))
        angle = times[:, None] * rate
        condition = self.label(labels) + self.time(torch.cat([angle.sin(), angle.cos()], dim=1))
        patches = x.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        h = self.patch(patches) + self.place
        for block in self.blocks:
            h = block(h, condition)
        out: Tensor = self.head(self.norm(h))  # (B, 16, 4)
        return out.view(-1, 4, 4, 2, 2).transpose(2, 3).reshape(-1, 64)


def _kept() -> Tensor:
    """Return how much of the image is left after each time, the squared cosine of a growing angle, (times,)."""
    return torch.cos((torch.arange(_TIMES) + 1) / (_TIMES + 1) * math.pi / 2) ** 2


def _fit(model: nn.Module, teacher: nn.Module | None, images: Tensor, labels: Tensor, steps: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.0)
    kept = _kept()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = _RATE * min(1.0, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        rows = torch.randint(len(images), (_BATCH,), generator=draw)
        times = torch.randint(_TIMES, (_BATCH,), generator=draw)
        noise = torch.randn(_BATCH, 64, generator=draw)
        share = kept[times][:, None]
        x = share.sqrt() * images[rows] + (1 - share).sqrt() * noise
        found = model(x, times, labels[rows])
        loss = F.mse_loss(found, noise)
        if teacher is not None:
            with torch.no_grad():
                wanted = teacher(x, times, labels[rows])
            loss = loss + hybrid_distill((found, None), (wanted, None))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def _drawn(model: nn.Module, samples: int, seed: int) -> Tensor:
    """Return images drawn from noise, (samples, 64), classes in turn."""
    x: Tensor = torch.randn(samples, 64, generator=torch.Generator().manual_seed(seed))
    labels, kept = torch.arange(samples) % 10, _kept()
    places = torch.linspace(_TIMES - 1, 0, _JUMPS).long().tolist()
    for index, place in enumerate(places):
        noise: Tensor = model(x, torch.full((samples,), place), labels)
        clean: Tensor = ((x - (1 - kept[place]).sqrt() * noise) / kept[place].sqrt()).clamp(-1, 1)
        if index + 1 == len(places):
            return clean
        after = kept[places[index + 1]]
        noise = (x - kept[place].sqrt() * clean) / (1 - kept[place]).sqrt()
        x = after.sqrt() * clean + (1 - after).sqrt() * noise
    return x


def _distance(one: Tensor, other: Tensor) -> float:
    """Return Frechet's distance of two sets of features, (N, F) and (M, F)."""
    one, other = one.double(), other.double()
    first, second = torch.cov(one.T), torch.cov(other.T)
    root = torch.linalg.eigvals(first @ second).real.clamp_min(0).sqrt().sum()
    gap = (one.mean(0) - other.mean(0)).square().sum()
    return float(gap + first.trace() + second.trace() - 2 * root)


def run(seeds: Sequence[int] = (0, 1, 2), *, steps: int = _STEPS) -> ClaimRecord:
    """Run the claim.

    Args:
        seeds: of weights, noise and order of the samples.
        steps: of the teacher.
    """
    begun = time.perf_counter()
    metrics: dict[str, list[float]] = {}
    flat = [Split(part.inputs.flatten(1) * 2 - 1, part.target) for part in splits()]  # type: ignore[union-attr]  # images
    images, labels = torch.as_tensor(flat[0].inputs), flat[0].target
    for seed in seeds:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            judge_net = mlp(64, 10, widths=(64, 32))
            train(judge_net, flat[0], supervised(F.cross_entropy), steps=400, batch_size=64, lr=3e-3, seed=seed)
            eyes = judge_net[:-1]
            teacher, fresh = _Dit(), _Dit()
        real = eyes(torch.as_tensor(flat[2].inputs)).detach()
        _fit(teacher, None, images, labels, steps, seed)
        teacher.eval()
        share = max(1, steps // 5)
        models: dict[str, nn.Module] = {"teacher": teacher}
        for name, base, heads, guide in (
            ("taken over and distilled", teacher, 2, teacher),
            ("from scratch", fresh, 2, None),
            ("taken over and distilled, 8 heads", teacher, 8, teacher),
        ):
            student = linearize_dit(base, Attention, d_model=_WIDTH, num_heads=heads, seed=seed)
            _fit(student, guide, images, labels, share, seed + 1)
            models[name] = student.eval()
        for name, model in models.items():
            with torch.no_grad():
                drawn = eyes(_drawn(model, _SAMPLES, seed))
            metrics.setdefault(name, []).append(_distance(drawn, real))
    mean = {name: fmean(values) for name, values in metrics.items()}
    effects = {
        "distilled / teacher": mean["taken over and distilled"] / mean["teacher"],
        "from scratch / distilled": mean["from scratch"] / mean["taken over and distilled"],
        "2 heads / 8 heads": mean["taken over and distilled"] / mean["taken over and distilled, 8 heads"],
    }
    return judge(
        CARD.key,
        CARD.claim.figure if CARD.claim is not None else "",
        metrics={name: [round(value, 4) for value in values] for name, values in metrics.items()},
        effects={name: round(value, 4) for name, value in effects.items()},
        parts={
            "within 15 % of the teacher's distance": effects["distilled / teacher"] <= 1.15,
            "from scratch at least 1.5 times worse": effects["from scratch / distilled"] >= 1.5,
            "2 heads not worse than 8": effects["2 heads / 8 heads"] <= 1.0,
        },
        seeds=seeds,
        seconds=time.perf_counter() - begun,
    )
