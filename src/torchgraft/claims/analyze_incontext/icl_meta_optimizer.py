"""The update by context beside that by finetuning in a transformer that learns in context, and momentum attention.

Every task is a random direction in 8 dimensions; an input belongs to the class of the side that it lies on. A sequence
shows 16 inputs, each in three tokens, by itself, with the mark that asks and with its class, and ends with a 17th that
asks; the model, two layers of width 32 with softmax attention and no positions, is trained on tasks that are never met
again, to answer wherever it is asked. Then, for each of 24 new tasks, 16 demonstrations are given as context or
finetuned on, and 32 queries asked. The control moves the same weights as far at random.

Bytes: the standard library in windows of 128, two layers of width 96, 150 steps, which is early in training, softmax
attention with and without momentum.
Steps, rates (1e-2 of the training on tasks), the rate of the finetuning and eta were chosen on seed 100.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial
from statistics import fmean

import torch
from torch import Tensor
from torch.nn import functional as F

from torchgraft.analyze.incontext.icl_meta_optimizer import CARD, Comparison, Demonstrations, compare_icl_ft
from torchgraft.bench.task import Split
from torchgraft.bench.tasks.recall import IGNORED, recall_loss
from torchgraft.bench.tasks.stdlib_bytes import byte_loss, byte_splits
from torchgraft.bench.training import supervised, train
from torchgraft.claims.record import ClaimRecord, judge
from torchgraft.parts.blocks.sequence_model import SequenceModel
from torchgraft.parts.mixers.momentum_attention import MomentumAttention
from torchgraft.parts.mixers.softmax_attention import SoftmaxAttention

__all__ = ["run"]

_SIZE, _SHOWN, _QUERIES, _TASKS = 8, 16, 32, 24
_STEPS, _RATE, _ETA = 600, 1.0, 0.5


def _tokens(x: Tensor, y: Tensor) -> Tensor:
    """Return inputs, tokens that ask, and answers: (N, S, 8), (N, S) -> (N, S, 3, 11)."""
    tokens = x.new_zeros(*x.shape[:2], 3, _SIZE + 3)
    tokens[..., :_SIZE] = x[:, :, None]
    tokens[:, :, 1, _SIZE] = 1
    tokens[:, :, 2, _SIZE + 1 :] = F.one_hot(y, 2)
    return tokens


def _drawn(tasks: int, samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return inputs, (N, S, 8), and classes, (N, S), of ``tasks`` tasks."""
    draw = torch.Generator().manual_seed(seed)
    direction = torch.randn(tasks, _SIZE, 1, generator=draw)
    x = torch.randn(tasks, samples, _SIZE, generator=draw)
    return x, (x @ direction > 0)[..., 0].long()


def _meta_trained(seed: int) -> SequenceModel:
    x, y = _drawn(16384, _SHOWN + 1, 1)
    tokens = _tokens(x, y).flatten(1, 2)[:, :-1]
    target = torch.full(tokens.shape[:2], IGNORED)
    target[:, 1::3] = y
    torch.manual_seed(seed)
    model = SequenceModel(32, 2, partial(SoftmaxAttention, rotary=False), in_features=_SIZE + 3, outputs=2)
    train(model, Split(tokens, target), supervised(recall_loss), steps=_STEPS, batch_size=32, lr=1e-2, seed=seed)
    return model


def _compared(model: SequenceModel, lr: float, seed: int) -> list[Comparison]:
    x, y = _drawn(_TASKS, _SHOWN + _QUERIES, 2)
    found = []
    for inputs, labels in zip(_tokens(x, y), y, strict=True):
        demos = Demonstrations(inputs[:_SHOWN, :2], inputs[:_SHOWN, 2:], labels[:_SHOWN])
        found.append(compare_icl_ft(model, demos, inputs[_SHOWN:, :2], labels[_SHOWN:], lr=lr, seed=seed))
    return found


def _bits(eta: float, seed: int) -> float:
    """Return bits a byte on the test files."""
    learn, _, test = byte_splits(128, 8192, 256)
    torch.manual_seed(seed)
    model = SequenceModel(96, 2, partial(MomentumAttention, eta=eta))
    train(model, learn, supervised(byte_loss), steps=150, batch_size=8, lr=3e-3, seed=seed)
    with torch.no_grad():
        outputs = torch.cat([model(x) for x, _ in test.batches(64)])
    return float(byte_loss(outputs, test.target)) / math.log(2)


def run(seeds: Sequence[int] = (0, 1, 2)) -> ClaimRecord:
    """Run the claim.

    Args:
        seeds: weights, order of the data and random updates.
    """
    begun = time.perf_counter()
    metrics: dict[str, list[float]] = {}

    def note(name: str, values: Sequence[float]) -> None:
        known = [value for value in values if not math.isnan(value)]
        metrics.setdefault(name, []).append(round(fmean(known), 4) if known else 0.0)

    for seed in seeds:
        with torch.random.fork_rng(devices=[]):
            found = _compared(_meta_trained(seed), _RATE, seed)
            for name in found[0].accuracy:
                note(f"accuracy, {name}", [each.accuracy[name] for each in found])
            note("Rec2FTP", [each.rec2ftp for each in found])
            for layer, name in enumerate(found[0].sim_aou):
                note(f"SimAOU, layer {layer}", [each.sim_aou[name] for each in found])
                note(f"SimAOU of random updates, layer {layer}", [each.sim_aou_random[name] for each in found])
                note(f"SimAM, layer {layer}", [each.sim_am[name] for each in found])
                note(f"SimAM before finetuning, layer {layer}", [each.sim_am_before[name] for each in found])
                note(f"Kendall, layer {layer}", [each.kendall[name] for each in found])
                note(f"Kendall of random numbers, layer {layer}", [each.kendall_random[name] for each in found])
            note("bits a byte, momentum", [_bits(_ETA, seed)])
            note("bits a byte, softmax", [_bits(0.0, seed)])
    mean = {name: fmean(values) for name, values in metrics.items()}
    own, chance = (
        fmean([mean[f"{name}, layer {layer}"] for layer in (0, 1)]) for name in ("SimAOU", "SimAOU of random updates")
    )
    effects = {
        "mean SimAOU above random updates": own - chance,
        "bits a byte saved by momentum": mean["bits a byte, softmax"] - mean["bits a byte, momentum"],
    }
    return judge(
        CARD.key,
        CARD.claim.figure if CARD.claim is not None else "",
        metrics=metrics,
        effects={name: round(value, 4) for name, value in effects.items()},
        parts={
            "SimAOU at least 0.1 above random updates": effects["mean SimAOU above random updates"] >= 0.1,
            "momentum saves at least 0.005 bits a byte": effects["bits a byte saved by momentum"] >= 0.005,
        },
        seeds=seeds,
        seconds=time.perf_counter() - begun,
    )
