"""Selective self-attention beside softmax attention: bytes, a needle among fillers, and means of noisy tokens.

Bytes of the standard library in windows of 128, two layers of width 96. The needle: every token has a mark and a value;
fillers have marks up to 0.9, the needle has 1, and its value is asked for at the end; trained on 64 tokens, asked among
64 and 256, two layers of width 32 without positions. Noise: half of 32 tokens are a vector and a little noise, the
others, with a flag, are noise alone; the vector is to be told, in one layer of width 32 with value temperatures alone
and with none.
Numbers of steps, rates and the mixer's alpha = 0 were chosen on seed 100, outside the claim, one choice for both sides.
In a first run fillers had marks up to 0.8: both sides found every needle at either length on all three seeds, so that
nothing could be told, and 0.9 was chosen on seed 100. The other two measurements are as they were in the first run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.task import Split
from torchgraft.bench.tasks.stdlib_bytes import byte_loss, byte_splits
from torchgraft.bench.training import supervised, train
from torchgraft.claims.record import ClaimRecord, judge
from torchgraft.parts.blocks.sequence_model import Build, SequenceModel
from torchgraft.parts.mixers.selective_self_attention import CARD, SelectiveSelfAttention
from torchgraft.parts.mixers.softmax_attention import SoftmaxAttention

__all__ = ["run"]

_VALUES, _SIZE = 10, 8


def _needles(samples: int, tokens: int, seed: int) -> Split:
    """Return marks and one-hot values, (N, T, 11), and the value of the token whose mark is 1."""
    draw = torch.Generator().manual_seed(seed)
    every = torch.arange(samples)
    marks = 0.9 * torch.rand(samples, tokens, 1, generator=draw)
    values = torch.randint(_VALUES, (samples, tokens), generator=draw)
    place = torch.randint(tokens - 1, (samples,), generator=draw)
    marks[every, place] = 1.0
    x = torch.cat([marks, F.one_hot(values, _VALUES)], -1)
    x[:, -1] = 0
    return Split(x, values[every, place])


def _noisy(samples: int, seed: int) -> Split:
    """Return tokens and a flag, (N, 32, 9), and the vector that half of them show."""
    draw = torch.Generator().manual_seed(seed)
    vector = torch.randn(samples, 1, _SIZE, generator=draw)
    noise = torch.randn(samples, 32, _SIZE, generator=draw)
    flag = (torch.rand(samples, 32, 1, generator=draw) < 0.5).float()
    flag[:, -1] = 0
    return Split(torch.cat([flag * noise + (1 - flag) * (vector + 0.3 * noise), flag], -1), vector[:, 0])


def _trained(model: SequenceModel, split: Split, loss: nn.Module, *, steps: int, rate: float, seed: int) -> nn.Module:
    train(model, split, supervised(loss), steps=steps, batch_size=32, lr=rate, seed=seed)
    return model


def _outputs(model: nn.Module, split: Split) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(x) for x, _ in split.batches(128)])


def _bits(build: Build, seed: int) -> float:
    """Return bits a byte on the test files."""
    learn, _, test = byte_splits(128, 8192, 256)
    torch.manual_seed(seed)
    model = SequenceModel(96, 2, build)
    train(model, learn, supervised(byte_loss), steps=150, batch_size=8, lr=3e-3, seed=seed)
    return float(byte_loss(_outputs(model, test), test.target)) / math.log(2)


def _found(build: Build, seed: int) -> tuple[float, float]:
    """Return the accuracy among 64 and 256 tokens."""
    torch.manual_seed(seed)
    model = SequenceModel(32, 2, build, in_features=1 + _VALUES, outputs=_VALUES, pool="last")
    _trained(model, _needles(4096, 64, 1), nn.CrossEntropyLoss(), steps=300, rate=1e-2, seed=seed)
    near, far = _needles(512, 64, 2), _needles(512, 256, 2)
    first, second = (float((_outputs(model, s).argmax(-1) == s.target).float().mean()) for s in (near, far))
    return first, second


def _denoised(value_temp: bool, seed: int) -> float:
    """Return the squared error on the test samples."""
    build = partial(
        SelectiveSelfAttention, rotary=False, query_temp=False, position=False, value_temp=value_temp, causal=True
    )
    torch.manual_seed(seed)
    model = SequenceModel(32, 1, build, in_features=1 + _SIZE, outputs=_SIZE, pool="last")
    _trained(model, _noisy(4096, 1), nn.MSELoss(), steps=200, rate=5e-3, seed=seed)
    test = _noisy(1024, 2)
    return float(F.mse_loss(_outputs(model, test), test.target))


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
        with torch.random.fork_rng(devices=[]):
            for name, mixer in (("selective", SelectiveSelfAttention), ("softmax", SoftmaxAttention)):
                note(f"{name}: bits a byte", _bits(mixer, seed))
                near, far = _found(partial(mixer, rotary=False), seed)
                note(f"{name}: accuracy among 64", near)
                note(f"{name}: accuracy among 256", far)
            note("value temperatures: squared error", _denoised(True, seed))
            note("none: squared error", _denoised(False, seed))
    mean = {name: fmean(values) for name, values in metrics.items()}
    effects = {
        "bits a byte above softmax": mean["selective: bits a byte"] - mean["softmax: bits a byte"],
        "accuracy among 256 above softmax": mean["selective: accuracy among 256"] - mean["softmax: accuracy among 256"],
        "squared error over that without": mean["value temperatures: squared error"] / mean["none: squared error"],
    }
    return judge(
        CARD.key,
        CARD.claim.figure if CARD.claim is not None else "",
        metrics=metrics,
        effects={name: round(value, 4) for name, value in effects.items()},
        parts={
            "at most 0.005 bits a byte above": effects["bits a byte above softmax"] <= 0.005,
            "retrieval at 4x the length at least 5 points above": effects["accuracy among 256 above softmax"] >= 0.05,
            "lower squared error with value temperatures": effects["squared error over that without"] < 1,
        },
        seeds=seeds,
        seconds=time.perf_counter() - begun,
    )
