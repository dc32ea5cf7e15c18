"""The language model of ``stdlib-bytes`` over longer stretches of the same text: windows of 512 bytes.

The files, their splits and the score, minus the bits a byte, are those of ``stdlib-bytes``.
"""

from __future__ import annotations

import hashlib

from torchgraft.bench.models import RecurrentNet
from torchgraft.bench.task import Task
from torchgraft.bench.tasks.baseline import Settings, cached_weights, seeded
from torchgraft.bench.tasks.stdlib_bytes import byte_loss, byte_splits, minus_bits
from torchgraft.bench.training import supervised

__all__ = ["long_bytes"]

_CONTEXT = 512
_TRAIN, _HELD_OUT = 2048, 128
_SETTINGS = Settings(steps=300, batch_size=8, lr=1e-2, weight_decay=0.01, model=(("d_model", 128), ("depth", 1)))


def long_bytes(seed: int = 0) -> Task:
    """Return an LSTM of width 128 on bytes, in windows of 512."""
    train, val, test = byte_splits(_CONTEXT, _TRAIN, _HELD_OUT)
    text = hashlib.sha256(train.target.numpy().tobytes()).hexdigest()[:12]
    settings = Settings(**{**_SETTINGS.__dict__, "data": (("text", text),)})
    architecture = seeded(lambda: RecurrentNet(256, 256, d_model=128), seed)
    return Task(
        model=architecture,
        train=train,
        val=val,
        test=test,
        loss=byte_loss,
        score=minus_bits,
        name="long-bytes",
        batch_size=settings.batch_size,
        learning_rate=settings.lr,
        reference=-2.82,
        source="long-bytes",
        weights=cached_weights(
            "long-bytes", seed, settings, build=architecture, split=train, objective=supervised(byte_loss)
        ),
    )
