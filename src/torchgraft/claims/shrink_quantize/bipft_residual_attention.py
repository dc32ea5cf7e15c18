"""BiPFT on the sources of the standard library: a binary encoder pre-trained by masked bytes, then told packages apart.

Windows of 32 bytes of six packages, one file in five held out. Four binary encoders (D = 32, two heads, two blocks):
with estimators of rank 1 and without, each pre-trained by masked language modelling (15 % hidden, the same batches and
masks for both) and then taught to name the package of a window from 600 labelled ones, or taught that from random
weights with the same steps. The masked-LM loss is taken on held-out windows under fixed masks, before any label.

Width, steps and rates were chosen on seed 100, outside the claim, without looking at the estimators, as what learns
most in the time of a claim. Where the plain binary encoder ends within 5 % of the loss of guessing by frequency alone,
it has not learned to use context, and nothing can be concluded.
"""

from __future__ import annotations

import sysconfig
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.task import Inputs, Split
from torchgraft.bench.tasks.digits import correct
from torchgraft.bench.tasks.stdlib import source_files
from torchgraft.bench.training import supervised, train
from torchgraft.claims.record import ClaimRecord, judge
from torchgraft.shrink.quantize.bipft_residual_attention import (
    CARD,
    BinaryTransformer,
    bit_operations,
    mask_tokens,
    masked_lm_loss,
)

__all__ = ["frequencies", "pretrained", "run", "taught", "windows"]

PACKAGES = ("asyncio", "email", "importlib", "multiprocessing", "unittest", "xml")
CONTEXT = 32
WIDTH = 32
MASK = 97
SYMBOLS = 98
STEPS, BATCH, RATE = 300, 48, 3e-3
STEPS_TAUGHT, BATCH_TAUGHT, RATE_TAUGHT = 60, 32, 2e-3
LABELLED = 100


def _symbols(data: bytes) -> Tensor:
    """Return printable bytes as 1 to 95, the newline as 96, and all others as 0."""
    values = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
    printable = (values >= 32) & (values < 127)
    return torch.where(values == 10, torch.full_like(values, 96), torch.where(printable, values - 31, 0))


@cache
def windows() -> tuple[Split, Split]:
    """Return training and held-out windows, (N, 32) symbols, and the number of their package; both balanced."""
    root = Path(sysconfig.get_path("stdlib"))
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for package in PACKAGES:
        files = [path for path in source_files(packages=True) if path.relative_to(root).parts[0] == package]
        for held in (0, 1):
            texts = [path.read_bytes() for index, path in enumerate(files) if (index % 5 == 2) == bool(held)]
            whole = [_symbols(text[: len(text) // CONTEXT * CONTEXT]) for text in texts if len(text) >= CONTEXT]
            found[held].append(torch.cat(whole).view(-1, CONTEXT))
    return _balanced(found[0], 1200), _balanced(found[1], 80)


def _balanced(parts: list[Tensor], most: int) -> Split:
    """Return equally many rows of each part, evenly spread over it, and the part's number."""
    count = min(most, *(len(part) for part in parts))
    rows = [part[torch.arange(count) * len(part) // count] for part in parts]
    return Split(torch.cat(rows), torch.arange(len(parts)).repeat_interleave(count))


def _tokens(split: Split) -> Tensor:
    return split.inputs  # type: ignore[return-value]  # windows are one tensor


def frequencies() -> float:
    """Return the loss on held-out windows of the best guess that ignores context."""
    first, second = windows()
    counts = torch.bincount(_tokens(first).flatten(), minlength=SYMBOLS).double() + 1
    return float(-(counts / counts.sum()).log()[_tokens(second).flatten()].mean())


def pretrained(rank: int, seed: int, *, rate: float = RATE, steps: int = STEPS) -> tuple[BinaryTransformer, float]:
    """Return an encoder pre-trained by masked language modelling, and its loss on held-out windows."""
    first, second = windows()
    torch.manual_seed(seed)
    model = BinaryTransformer(SYMBOLS, CONTEXT, d_model=WIDTH, depth=2, num_heads=2, rank=rank)
    draw = torch.Generator().manual_seed(seed)

    def loss(encoder: nn.Module, inputs: Inputs, target: Tensor, rows: Tensor) -> Tensor:
        tokens: Any = inputs
        seen, hidden = mask_tokens(tokens, MASK, generator=draw)
        return masked_lm_loss(encoder, tokens, hidden, seen)

    train(model, first, loss, steps=steps, batch_size=BATCH, lr=rate, seed=seed)
    tokens = _tokens(second)
    seen, hidden = mask_tokens(tokens, MASK, generator=torch.Generator().manual_seed(12345))
    with torch.no_grad():
        return model, float(masked_lm_loss(model.eval(), tokens, hidden, seen))


def taught(model: BinaryTransformer, seed: int, *, rate: float = RATE_TAUGHT) -> float:
    """Return the held-out accuracy of ``model`` with a new head, taught on labelled windows."""
    first, second = windows()
    each = len(first) // len(PACKAGES)
    draw = torch.Generator().manual_seed(seed)
    rows = torch.cat([torch.randperm(each, generator=draw)[:LABELLED] + each * k for k in range(len(PACKAGES))])
    torch.manual_seed(seed)
    made = model.classifier(len(PACKAGES))
    loss = supervised(F.cross_entropy)
    train(made, first[rows], loss, steps=STEPS_TAUGHT, batch_size=BATCH_TAUGHT, lr=rate, seed=seed)
    with torch.no_grad():
        return float(correct(made.eval()(_tokens(second)), second.target).mean())


def run(seeds: Sequence[int] = (0, 1, 2)) -> ClaimRecord:
    """Run the claim; about forty seconds a seed."""
    begun = time.perf_counter()
    metrics: dict[str, list[float]] = {}
    with torch.random.fork_rng():
        for seed in seeds:
            for name, rank in (("binary", 0), ("with estimators", 1)):
                model, loss = pretrained(rank, seed)
                torch.manual_seed(seed)
                fresh = BinaryTransformer(SYMBOLS, CONTEXT, d_model=WIDTH, depth=2, num_heads=2, rank=rank)
                values = {
                    f"{name}: masked-LM loss": loss,
                    f"{name}: accuracy, pre-trained": taught(model, seed),
                    f"{name}: accuracy, from scratch": taught(fresh, seed),
                }
                for what, value in values.items():
                    metrics.setdefault(what, []).append(round(value, 6))
    mean = {name: fmean(values) for name, values in metrics.items()}
    plain, helped = mean["binary: masked-LM loss"], mean["with estimators: masked-LM loss"]
    effects = {
        "masked-LM loss lower by": 1 - helped / plain,
        "pre-training lifts binary by, points": 100
        * (mean["binary: accuracy, pre-trained"] - mean["binary: accuracy, from scratch"]),
        "pre-training lifts binary with estimators by, points": 100
        * (mean["with estimators: accuracy, pre-trained"] - mean["with estimators: accuracy, from scratch"]),
        "operations saved, counted": bit_operations(WIDTH, CONTEXT, num_heads=2).saving,
    }
    numbers = list(effects.values())
    metrics["loss of guessing by frequency"] = [round(frequencies(), 6)]
    return judge(
        CARD.key,
        CARD.claim.figure if CARD.claim else "",
        metrics=metrics,
        effects={name: round(value, 4) for name, value in effects.items()},
        parts={
            "estimators lower the masked-LM loss by >= 2 %": numbers[0] >= 0.02,
            "pre-training lifts the binary model by >= 5 points": numbers[1] >= 5.0,
        },
        seeds=seeds,
        seconds=time.perf_counter() - begun,
        inconclusive="the binary encoder has not learned to use context in the steps that it has"
        if plain > 0.95 * frequencies()
        else "",
    )
