"""Soft against hard tokens for depth and a mask of procedural scenes, and mask augmentation against none.

A scene of 32x32 pixels: a sloping ground and one to three discs and boxes at random distances, nearer ones in front;
the image shows a random albedo dimmed with distance, and noise. Depth is a number a pixel; in training 30 % of its 8x8
squares have no label. The mask is that of the one object that is striped. Tokenizers (4x4 tokens, 64 codes, patches of
4x4 hidden where they are augmented) learn 200 steps of 32 of 2048 label maps, then one decoder of two layers, width 64,
with a convolutional encoder of the image, learns both tasks for 150 steps. Hard tokens: cross-entropy alone, argmax fed
and decoded. Soft tokens: the loss on the decoded map added, mixtures fed and decoded, tau 0.8. Without augmentation
only the depth tokenizer differs, and the decoder is trained again, soft. Test: 256 new scenes, all labels known.

Sizes, steps, rates and scenes were chosen on seed 100: with five small objects and holes of 4x4 pixels, 64 codes say
little of a scene and the holes are too small to matter, so that augmentation changed nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor, nn

from torchgraft.bench.task import Inputs, Split
from torchgraft.bench.training import train
from torchgraft.claims.record import ClaimRecord, judge
from torchgraft.parts.memories.soft_token_codebook import CARD, SoftTokenDecoder, valid_loss
from torchgraft.parts.memories.soft_token_head import UnifiedHead, VQTokenizer, dice_loss, map_tokenizer

__all__ = ["run"]

_PIXELS, _PATCH, _HOLE, _MISSING = 32, 4, 8, 0.3
_TRAIN, _TEST, _BATCH = 2048, 256, 32
_TOKEN_STEPS, _TOKEN_RATE, _WIDTH = 200, 3e-3, 8
_STEPS, _RATE, _WEIGHT = 150, 2e-3, 1.0


def _scenes(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return images (N, 2, 32, 32) of brightness and stripes, depths and masks (N, 1, 32, 32)."""
    draw = torch.Generator().manual_seed(seed)

    def random(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=draw)

    line = torch.arange(_PIXELS) / (_PIXELS - 1)
    y, x = line[None, :, None], line[None, None, :]
    slope = random(2, 1, 1, low=-0.5, high=0.5)
    depth = 3.0 + slope[:, 0] * (x - 0.5) + (slope[:, 1] - 0.5) * (y - 0.5)  # (N, 32, 32)
    albedo = random(1, 1, low=0.4, high=1.0).expand_as(depth)
    owner = torch.full_like(depth, -1.0)
    objects = torch.randint(1, 4, (count, 1, 1), generator=draw)
    for index in range(3):
        centre, size = random(2, 1, 1, low=0.15, high=0.85), random(1, 1, low=0.15, high=0.35)
        across, down = (x - centre[:, 0]).abs(), (y - centre[:, 1]).abs()
        inside = torch.where(random(1, 1) < 0.5, torch.maximum(across, down), (across**2 + down**2).sqrt()) < size
        distance = random(1, 1, low=1.0, high=2.5)
        seen = inside & (distance < depth) & (index < objects)
        depth = torch.where(seen, distance, depth)
        albedo = torch.where(seen, random(1, 1, low=0.4, high=1.0), albedo)
        owner = torch.where(seen, float(index), owner)
    mask = (owner == 0).float()
    stripes = 0.5 + 0.5 * torch.sin(40 * (x + y)).expand_as(depth)
    image = torch.stack([albedo * (1.6 - 0.4 * depth), mask * stripes], 1)
    image = image + 0.05 * torch.randn(image.shape, generator=draw)
    return image, depth[:, None], mask[:, None]


def _labelled(count: int, seed: int) -> Tensor:
    """Return where there is a depth label, (N, 1, 32, 32): whole squares are missing."""
    draw, cells = torch.Generator().manual_seed(seed), _PIXELS // _HOLE
    known = torch.rand(count, 1, cells, cells, generator=draw) >= _MISSING
    return known.repeat_interleave(_HOLE, 2).repeat_interleave(_HOLE, 3)


def _tokenizer(labels: Tensor, valid: Tensor, *, ratio: float, seed: int) -> VQTokenizer:
    """Return a tokenizer trained on labels; its codes start by k-means, and idle ones are drawn anew."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = map_tokenizer(1, 8, num_codes=64, width=_WIDTH, dim=16, patch=_PATCH, ratio=ratio)
    given = torch.where(valid, labels, 0)
    with torch.no_grad():
        z = model.encoder(given[:256]).flatten(2).mT.flatten(0, 1)
    model.book.start_(z, steps=3, generator=torch.Generator().manual_seed(seed))

    def objective(module: nn.Module, inputs: Inputs, target: Tensor, rows: Tensor) -> Tensor:
        loss = model.loss(labels[rows], valid[rows])
        with torch.no_grad():
            z = model.encoder(given[rows]).flatten(2).mT.flatten(0, 1)
        model.book.reseed_(z, after=20)
        return loss

    split = Split(labels, torch.zeros(len(labels)))
    train(model, split, objective, steps=_TOKEN_STEPS, batch_size=_BATCH, lr=_TOKEN_RATE, seed=seed)
    return model


class _Scenes(nn.Module):
    """An image encoder in front of the unified head."""

    def __init__(self, tokenizers: dict[str, VQTokenizer], *, soft: bool) -> None:
        super().__init__()
        self.eye = nn.Sequential(
            *(nn.Conv2d(2, 16, 4, stride=2, padding=1), nn.GELU(), nn.Conv2d(16, 32, 4, stride=2, padding=1)),
            *(nn.GELU(), nn.Conv2d(32, 64, 3, padding=1), nn.GELU(), nn.Conv2d(64, 64, 4, stride=2, padding=1)),
        )
        self.place = nn.Parameter(torch.randn(16, 64))
        decoder = SoftTokenDecoder(64, num_codes=64, tasks=2, length=16, layers=2, num_heads=4)
        self.head = UnifiedHead(decoder, tokenizers, size=(4, 4), soft=soft)

    def features(self, image: Tensor) -> Tensor:
        y: Tensor = self.eye(image).flatten(2).mT + self.place
        return y

    def forward(self, image: Tensor, task: str) -> Tensor:
        y: Tensor = self.head(self.features(image), task)
        return y


def _trained(
    tokenizers: dict[str, VQTokenizer],
    image: Tensor,
    depth: Tensor,
    mask: Tensor,
    known: Tensor,
    *,
    soft: bool,
    seed: int,
) -> _Scenes:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _Scenes(tokenizers, soft=soft)
    weight, everywhere = (_WEIGHT if soft else 0.0), torch.ones_like(known)

    def objective(module: nn.Module, inputs: Inputs, target: Tensor, rows: Tensor) -> Tensor:
        read = model.features(image[rows])
        return model.head.loss(
            read, depth[rows], "depth", valid=known[rows], output_weight=weight, output_loss=valid_loss
        ) + model.head.loss(
            read, mask[rows], "mask", valid=everywhere[rows], output_weight=weight, output_loss=dice_loss
        )

    split = Split(image, torch.zeros(len(image)))
    train(model, split, objective, steps=_STEPS, batch_size=_BATCH, lr=_RATE, seed=seed)
    return model


def _errors(model: _Scenes, image: Tensor, depth: Tensor, mask: Tensor) -> dict[str, float]:
    with torch.no_grad():
        gap = model(image, "depth") - depth
        said = model(image, "mask") > 0.5
    both, either = (said & (mask > 0.5)).sum((1, 2, 3)), (said | (mask > 0.5)).sum((1, 2, 3))
    there = mask.sum((1, 2, 3)) > 0
    return {
        "depth RMSE": float(gap.square().mean((1, 2, 3)).sqrt().mean()),
        "mask IoU": float((both[there] / either[there]).mean()),
    }


def _one(seed: int) -> dict[str, float]:
    image, depth, mask = _scenes(_TRAIN, 1000 + seed)
    known, everywhere = _labelled(_TRAIN, 2000 + seed), torch.ones(_TRAIN, 1, _PIXELS, _PIXELS, dtype=torch.bool)
    unseen = _scenes(_TEST, 3000 + seed)
    masks = _tokenizer(mask, everywhere, ratio=0.0, seed=seed)
    found: dict[str, float] = {}
    for name, ratio in (("augmented", 0.5), ("not augmented", 0.0)):
        tokenizers = {"depth": _tokenizer(depth, known, ratio=ratio, seed=seed), "mask": masks}
        with torch.no_grad():
            gap = tokenizers["depth"].eval()(unseen[1]) - unseen[1]
        found[f"{name}: RMSE of the tokenizer"] = float(gap.square().mean((1, 2, 3)).sqrt().mean())
        for soft in (True, False) if ratio else (True,):
            model = _trained(tokenizers, image, depth, mask, known, soft=soft, seed=seed)
            kind = f"{name}, {'soft' if soft else 'hard'}"
            found.update({f"{kind}: {what}": value for what, value in _errors(model, *unseen).items()})
    return found


def run(seeds: Sequence[int] = (0, 1, 2)) -> ClaimRecord:
    """Run the claim.

    Args:
        seeds: scenes, weights and order of the data.
    """
    begun = time.perf_counter()
    metrics: dict[str, list[float]] = {}
    for seed in seeds:
        for name, value in _one(seed).items():
            metrics.setdefault(name, []).append(round(value, 4))
    mean = {name: fmean(values) for name, values in metrics.items()}
    effects = {
        "RMSE cut by soft tokens": 1 - mean["augmented, soft: depth RMSE"] / mean["augmented, hard: depth RMSE"],
        "IoU raised by soft tokens": mean["augmented, soft: mask IoU"] - mean["augmented, hard: mask IoU"],
        "RMSE cut by augmentation": 1 - mean["augmented, soft: depth RMSE"] / mean["not augmented, soft: depth RMSE"],
    }
    return judge(
        CARD.key,
        CARD.claim.figure if CARD.claim is not None else "",
        metrics=metrics,
        effects={name: round(value, 4) for name, value in effects.items()},
        parts={
            "soft tokens cut RMSE by 5 %": effects["RMSE cut by soft tokens"] >= 0.05,
            "soft tokens raise IoU": effects["IoU raised by soft tokens"] > 0,
            "augmentation cuts RMSE by 5 %": effects["RMSE cut by augmentation"] >= 0.05,
        },
        seeds=seeds,
        seconds=time.perf_counter() - begun,
    )
