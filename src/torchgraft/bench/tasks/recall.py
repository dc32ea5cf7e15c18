"""Multi-query associative recall: read eight key-value pairs, then name the value of each key when it is asked for.

The data is synthetic and fixed, independent of the seed. A sequence is ``k1 v1 ... k8 v8 q1 ... q8`` where the
queries are the keys in another order; the answer is wanted at each query. A sample scores the share of its queries
that are answered rightly; guessing among the values that were shown gives about 1/8.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from torchgraft.bench.models import ByteTransformer
from torchgraft.bench.task import Split, Task
from torchgraft.bench.tasks.baseline import Settings, cached_weights, seeded
from torchgraft.bench.training import supervised

__all__ = ["IGNORED", "answered", "recall", "recall_loss", "sequences"]

_PAIRS, _KEYS = 8, 32
#: The target where nothing is asked.
IGNORED = -100
_SETTINGS = Settings(
    steps=600,
    batch_size=64,
    lr=3e-3,
    model=(("d_model", 64), ("depth", 2), ("num_heads", 4), ("spread", 1.0)),
    data=(("pairs", _PAIRS), ("keys", _KEYS)),
)


def sequences(samples: int, seed: int) -> Split:
    """Return tokens (N, 24) and targets (N, 24), which are -100 where nothing is asked; keys < 32 <= values < 64.

    Example:
        >>> split = sequences(2, 0)
        >>> split.inputs.shape, int((split.target >= 32).sum())
        (torch.Size([2, 24]), 16)
    """
    generator = torch.Generator().manual_seed(seed)
    keys = torch.rand(samples, _KEYS, generator=generator).argsort(dim=1)[:, :_PAIRS]
    values = torch.randint(_KEYS, 2 * _KEYS, (samples, _PAIRS), generator=generator)
    asked = torch.rand(samples, _PAIRS, generator=generator).argsort(dim=1)
    shown = torch.stack([keys, values], dim=2).flatten(1)  # (N, 16)
    tokens = torch.cat([shown, keys.gather(1, asked)], dim=1)
    target = torch.cat([torch.full_like(shown, IGNORED), values.gather(1, asked)], dim=1)
    return Split(tokens, target)


def recall_loss(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean cross-entropy over the queries; (B, T, V), (B, T) -> scalar."""
    return F.cross_entropy(output.flatten(0, 1), target.flatten(), ignore_index=IGNORED)


def answered(output: Tensor, target: Tensor) -> Tensor:
    """Return the share of right answers of every sample; (B, T, V), (B, T) -> (B,)."""
    asked = target != IGNORED
    right = (output.argmax(dim=-1) == target) & asked
    return right.sum(dim=1).float() / asked.sum(dim=1).clamp(min=1)


def recall(seed: int = 0) -> Task:
    """Return a causal transformer of two blocks and width 64 on associative recall."""
    train = sequences(16384, 1)
    architecture = seeded(
        lambda: ByteTransformer(2 * _KEYS, 3 * _PAIRS, d_model=64, depth=2, num_heads=4, spread=1.0), seed
    )
    return Task(
        model=architecture,
        train=train,
        val=sequences(512, 2),
        test=sequences(512, 3),
        loss=recall_loss,
        score=answered,
        name="recall",
        batch_size=_SETTINGS.batch_size,
        learning_rate=_SETTINGS.lr,
        reference=1.0,
        source="recall",
        weights=cached_weights(
            "recall", seed, _SETTINGS, build=architecture, split=train, objective=supervised(recall_loss)
        ),
    )
