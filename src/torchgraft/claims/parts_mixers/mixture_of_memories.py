"""Recall of more pairs than one small memory holds: several memories against one, and against one as large as all.

All three are the same mixer: with one memory, always chosen, it is the rule by itself. The balance loss of every layer
is added with factor 0.01. Training goes from 2 pairs to 32, by the learning rates that were found for DeltaNet's claim.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor, nn

from torchgraft.bench.task import Inputs, Split, call
from torchgraft.bench.tasks.recall import IGNORED, recall_loss
from torchgraft.bench.training import train
from torchgraft.claims.record import ClaimRecord, judge
from torchgraft.parts.blocks.sequence_model import SequenceModel
from torchgraft.parts.mixers.mixture_of_memories import CARD, MixtureOfMemories

__all__ = ["run"]

_PAIRS, _SYMBOLS, _WIDTH, _BALANCE = 32, 32, 64, 0.01
#: Pairs, steps, learning rate.
_STAGES = ((2, 150, 1e-2), (4, 70, 1e-2), (8, 70, 1e-2), (16, 50, 5e-3), (_PAIRS, 60, 5e-3))
#: Memories, chosen, shared, size K = V of each. Five states of 16 x 16 hold 1280 numbers, one of 36 x 36 holds 1296.
_MODELS: Mapping[str, tuple[int, int, bool, int]] = {
    "mixture": (4, 2, True, 16),
    "one memory": (1, 1, False, 16),
    "one large memory": (1, 1, False, 36),
}


def _pairs(samples: int, seed: int, pairs: int = _PAIRS) -> Split:
    """Return pairs of distinct keys, then twice as many queries, but at most 32: tokens and targets, (N, T) each."""
    queries = min(2 * pairs, 32)
    draw = torch.Generator().manual_seed(seed)
    keys = torch.rand(samples, _SYMBOLS, generator=draw).argsort(1)[:, :pairs]
    values = torch.randint(_SYMBOLS, 2 * _SYMBOLS, (samples, pairs), generator=draw)
    which = torch.randint(pairs, (samples, queries), generator=draw)
    shown = torch.stack([keys, values], 2).flatten(1)
    target = torch.cat([torch.full_like(shown, IGNORED), values.gather(1, which)], 1)
    return Split(torch.cat([shown, keys.gather(1, which)], 1), target)


def _trained(name: str, seed: int, share: float) -> tuple[float, float]:
    """Return the accuracy after training and the least share of the tokens that a memory receives."""
    memories, topk, shared, size = _MODELS[name]

    def build(width: int) -> MixtureOfMemories:
        mixer = MixtureOfMemories(
            width,
            num_heads=1,
            num_memories=memories,
            topk=topk,
            shared=shared,
            rule="delta",
            expand_k=size / width,
            expand_v=size / width,
        )
        mixer.chunk = 16  # sequences this short are read faster so; the numbers are the same
        return mixer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SequenceModel(_WIDTH, 2, build, vocab_size=2 * _SYMBOLS, hidden=0)
    seen: list[tuple[MixtureOfMemories, Tensor]] = []

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if isinstance(module, MixtureOfMemories):
            seen.append((module, args[0]))

    for mixer in model.mixers():
        mixer.register_forward_pre_hook(note)

    def objective(net: nn.Module, inputs: Inputs, target: Tensor, rows: Tensor) -> Tensor:
        seen.clear()
        loss = recall_loss(call(net, inputs), target)
        return loss + _BALANCE * torch.stack([mixer.balance_loss(x) for mixer, x in seen]).sum()

    for index, (pairs, steps, lr) in enumerate(_STAGES):
        train(
            model,
            _pairs(8192, 1 + index, pairs),
            objective,
            steps=max(1, round(share * steps)),
            batch_size=32,
            lr=lr,
            seed=10 * seed + index,
        )
    test = _pairs(512, 99)
    seen.clear()
    with torch.no_grad():
        right = (model(test.inputs).argmax(-1) == test.target)[test.target != IGNORED]
    return float(right.float().mean()), min(float(mixer.load(x).min()) for mixer, x in seen)


def run(seeds: Sequence[int] = (0, 1, 2), *, share: float = 1.0) -> ClaimRecord:
    """Run the claim.

    Args:
        seeds: weights and order of the data.
        share: of the optimiser steps, for a shorter run.
    """
    begun = time.perf_counter()
    metrics: dict[str, list[float]] = {}
    for seed in seeds:
        for name in _MODELS:
            score, least = _trained(name, seed, share)
            metrics.setdefault(f"accuracy, {name}", []).append(round(score, 4))
            if name == "mixture":
                metrics.setdefault("least share of the tokens of a memory", []).append(round(least, 4))
    mean = {name: fmean(values) for name, values in metrics.items()}
    over_one = mean["accuracy, mixture"] - mean["accuracy, one memory"]
    over_large = mean["accuracy, mixture"] - mean["accuracy, one large memory"]
    least = min(metrics["least share of the tokens of a memory"])
    effects = {"above one memory": over_one, "above one large memory": over_large, "least load": least}
    return judge(
        CARD.key,
        CARD.claim.figure if CARD.claim is not None else "",
        metrics=metrics,
        effects={name: round(value, 4) for name, value in effects.items()},
        parts={
            "at least 0.10 above one memory": over_one >= 0.10,
            "at least one large memory less 0.02": over_large >= -0.02,
            "no memory below 5 % of the tokens": least >= 0.05,
        },
        seeds=seeds,
        seconds=time.perf_counter() - begun,
    )
