"""Induction: a sign stands once among random letters and again at the end; name the letter that followed it first.

The data is synthetic and fixed, independent of the seed. A sequence has 32 tokens: letters of an alphabet of 16, the
sign at a random place before the last three, and the sign as the last token, where the answer is wanted. A sample
scores 1 when the answer is right, else 0; guessing gives 1/16.
"""

from __future__ import annotations

import torch

from torchgraft.bench.models import ByteTransformer
from torchgraft.bench.task import Split, Task
from torchgraft.bench.tasks.baseline import Settings, cached_weights, seeded
from torchgraft.bench.tasks.recall import IGNORED, answered, recall_loss
from torchgraft.bench.training import supervised

__all__ = ["inductions", "induction"]

_LETTERS, _LENGTH = 16, 32
_SETTINGS = Settings(
    steps=600,
    batch_size=64,
    lr=3e-3,
    model=(("d_model", 64), ("depth", 2), ("num_heads", 4), ("spread", 1.0)),
    data=(("letters", _LETTERS), ("length", _LENGTH)),
)


def inductions(samples: int, seed: int) -> Split:
    """Return tokens (N, 32) and targets (N, 32), which are -100 but at the last place; 16 is the sign.

    Example:
        >>> split = inductions(1, 0)
        >>> tokens = split.inputs[0].tolist()
        >>> tokens[-1], tokens[tokens.index(16) + 1] == int(split.target[0, -1])
        (16, True)
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(_LETTERS, (samples, _LENGTH), generator=generator)
    place = torch.randint(_LENGTH - 3, (samples, 1), generator=generator)
    answer = tokens.gather(1, place + 1)
    tokens = tokens.scatter(1, place, _LETTERS)
    tokens[:, -1] = _LETTERS
    target = torch.full_like(tokens, IGNORED)
    target[:, -1:] = answer
    return Split(tokens, target)


def induction(seed: int = 0) -> Task:
    """Return a causal transformer of two blocks and width 64 on induction."""
    train = inductions(16384, 1)
    architecture = seeded(
        lambda: ByteTransformer(_LETTERS + 1, _LENGTH, d_model=64, depth=2, num_heads=4, spread=1.0), seed
    )
    return Task(
        model=architecture,
        train=train,
        val=inductions(512, 2),
        test=inductions(512, 3),
        loss=recall_loss,
        score=answered,
        name="induction",
        batch_size=_SETTINGS.batch_size,
        learning_rate=_SETTINGS.lr,
        reference=1.0,
        source="induction",
        weights=cached_weights(
            "induction", seed, _SETTINGS, build=architecture, split=train, objective=supervised(recall_loss)
        ),
    )
