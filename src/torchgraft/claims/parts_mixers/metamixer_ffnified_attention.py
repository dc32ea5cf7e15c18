"""FFNified attention on digits at 16 x 16, beside self-attention and a ConvNeXt-style block; and itself without GELU.

Networks of one stage of 8 x 8 positions, three blocks of 32 channels with the same channel mixers and layer scales of
0.1, 150 steps of the settings in ``claims/images.py``. Latency is that of one image, batch norms folded, in turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import fmean, median

import torch
from torch import Tensor, nn

from torchgraft.claims.images import accuracy, digits, train_images
from torchgraft.claims.record import ClaimRecord, judge
from torchgraft.parts.blocks.vision_model import SelfAttention
from torchgraft.parts.mixers.metamixer_ffnified_attention import CARD, FFNet, FFNifiedAttention, folded

__all__ = ["run"]

TIMED = True
_WIDTH, _BLOCKS, _SIZE = 32, 3, 16


class _Tokens(nn.Module):
    """Self-attention over all positions, after a batch norm as the others have."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mixer = nn.BatchNorm2d(width), SelfAttention(width, num_heads=4)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.mixer(self.norm(x).flatten(2).mT).mT
        return mixed.reshape(x.shape)


def _same(x: Tensor) -> Tensor:
    return x


def _convnext(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(width, width, 7, padding=3, groups=width), nn.BatchNorm2d(width))


_MIXERS: dict[str, Callable[[int], nn.Module]] = {
    "ffnified": FFNifiedAttention,
    "self-attention": _Tokens,
    "convnext": _convnext,
    "without gelu": lambda width: FFNifiedAttention(width, act=_same),
}


def _slower(models: Sequence[nn.Module], image: Tensor) -> float:
    """Return the latency of the first model over that of the second."""
    ratios = []
    with torch.inference_mode():
        for _ in range(40):
            seconds = []
            for model in models:
                begun = time.perf_counter()
                model(image)
                seconds.append(time.perf_counter() - begun)
            ratios.append(seconds[0] / seconds[1])
    return median(ratios[5:])


def run(seeds: Sequence[int] = (0, 1, 2), steps: int = 150) -> ClaimRecord:
    """Run the claim.

    Args:
        seeds: weights and order of the data.
        steps: optimiser steps of every network.
    """
    begun = time.perf_counter()
    training, _, test = digits(size=_SIZE)
    metrics: dict[str, list[float]] = {}
    for seed in seeds:
        plain: dict[str, nn.Module] = {}
        for name, mixer in _MIXERS.items():

            def build(mixer: Callable[[int], nn.Module] = mixer) -> FFNet:
                return FFNet((_WIDTH,), (_BLOCKS,), scale=0.1, mixer=mixer)

            model = train_images(build, training, steps=steps, seed=seed)
            plain[name] = folded(model)
            metrics.setdefault(f"accuracy, {name}", []).append(round(accuracy(model, test), 4))
        slower = _slower([plain["self-attention"], plain["ffnified"]], torch.randn(1, 1, _SIZE, _SIZE))
        metrics.setdefault("latency of self-attention over ffnified", []).append(round(slower, 3))
    mean = {name: fmean(values) for name, values in metrics.items()}
    over = {name: mean["accuracy, ffnified"] - mean[f"accuracy, {name}"] for name in _MIXERS}
    slower = mean["latency of self-attention over ffnified"]
    return judge(
        CARD.key,
        CARD.claim.figure if CARD.claim is not None else "",
        metrics=metrics,
        effects={
            **{f"accuracy over {name}": round(value, 4) for name, value in over.items() if name != "ffnified"},
            "latency of self-attention over its own": round(slower, 3),
        },
        parts={
            "accuracy >= self-attention - 0.002": over["self-attention"] >= -0.002,
            "latency of self-attention >= 1.5x": slower >= 1.5,
            "accuracy >= convnext": over["convnext"] >= 0.0,
            "without gelu 0.5 points lower": over["without gelu"] >= 0.005,
        },
        seeds=seeds,
        seconds=time.perf_counter() - begun,
    )
