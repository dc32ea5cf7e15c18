"""EchoAtt on a byte language model: eight layers of width 64, six inner ones that share in blocks of two.

The teacher is trained on windows of 64 bytes of the standard library's source; the students are adjusted by stage 1 on
the same windows (a third of the teacher's steps), once shared in consecutive blocks, and without training once with the
most and once with the least similar inner neighbours joined. Perplexity is on held-out windows. Times are of a forward
pass over 256 tokens, in rounds that take turns; an architecture of longer context serves for them, since times do not
depend on the weights.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from statistics import fmean

import torch
from torch import nn

from torchgraft.bench.meters import compare
from torchgraft.bench.models import ByteTransformer
from torchgraft.bench.task import Split, Task, take
from torchgraft.bench.tasks.stdlib_bytes import byte_loss, byte_splits, minus_bits
from torchgraft.bench.training import evaluate, supervised, train
from torchgraft.claims.record import ClaimRecord, judge
from torchgraft.shrink.distill.echoatt import CARD, attention_similarity, distill, share_attention

__all__ = ["TIMED", "run"]

TIMED = True
_CONTEXT, _LONG, _DEPTH, _WIDTH = 64, 256, 8, 64
_STEPS, _ADJUST, _BATCH, _LR = 300, 100, 16, 3e-3


def _built(context: int, seed: int) -> ByteTransformer:
    torch.manual_seed(seed)
    return ByteTransformer(256, context, d_model=_WIDTH, depth=_DEPTH, num_heads=4)


def _perplexity(model: nn.Module, task: Task) -> float:
    return math.exp(-float(evaluate(model, task, task.test).mean()) * math.log(2))


def _task(model: nn.Module, splits: tuple[Split, Split, Split]) -> Task:
    return Task(model, *splits, byte_loss, minus_bits, batch_size=_BATCH, learning_rate=_LR)


def run(seeds: Sequence[int] = (0, 1, 2)) -> ClaimRecord:
    """Run the claim.

    Args:
        seeds: weights and order of the data.
    """
    begun = time.perf_counter()
    metrics: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        metrics.setdefault(name, []).append(round(value, 4))

    splits = byte_splits(_CONTEXT, 4096, 128)
    for seed in seeds:
        teacher = _built(_CONTEXT, seed)
        task = _task(teacher, splits)
        train(teacher, task.train, supervised(byte_loss), steps=_STEPS, batch_size=_BATCH, lr=_LR, seed=seed)
        note("perplexity, teacher", _perplexity(teacher, task))
        student = share_attention(teacher, k=2)
        note("perplexity, shared only", _perplexity(student, task))
        distill(student, teacher, task, stage1=_ADJUST, stage2=0, lr=_LR / 3, seed=seed)
        note("perplexity, distilled", _perplexity(student, task))
        similar = attention_similarity(teacher, take(task.train.inputs, slice(32)))
        inner = sorted(itertools.pairwise(range(1, _DEPTH - 1)), key=lambda pair: -float(similar[pair]))
        for name, pair in (("most", inner[0]), ("least", inner[-1])):
            joined = share_attention(teacher, groups=[[f"blocks.{place}.attn" for place in pair]])
            note(f"similarity, {name} similar pair", float(similar[pair]))
            note(f"perplexity, {name} similar pair joined", _perplexity(joined, task))
        long = _built(_LONG, seed).eval()
        ratio = compare(long, share_attention(long, k=2), torch.zeros(8, _LONG, dtype=torch.long), rounds=11)["latency"]
        note("time of shared over whole at 256 tokens", ratio.value)
    mean = {name: fmean(values) for name, values in metrics.items()}
    worse = mean["perplexity, distilled"] / mean["perplexity, teacher"]
    saved = 1.0 - mean["time of shared over whole at 256 tokens"]
    gap = mean["perplexity, least similar pair joined"] - mean["perplexity, most similar pair joined"]
    return judge(
        CARD.key,
        CARD.claim.figure if CARD.claim else "",
        metrics=metrics,
        effects={"perplexity, distilled over teacher": worse, "time saved": saved, "least minus most similar": gap},
        parts={
            "within 2 % of the teacher": worse <= 1.02,
            "10 % less time a token": saved >= 0.10,
            "the most similar pair costs less": gap > 0.0,
        },
        seeds=seeds,
        seconds=time.perf_counter() - begun,
    )
