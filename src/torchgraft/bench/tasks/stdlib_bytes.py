"""A byte-level language model over the Python standard library's own top-level source files.

Files are sorted by name; of every ten, one is for validation and one for testing, so that no file is in two splits. A
sample is a window of 128 bytes, and its score is minus the bits a byte that the model needs for it: higher is better,
and 0 would be perfect foresight. The text is that of the Python at hand, so figures differ a little between versions.
"""

from __future__ import annotations

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from torchgraft.bench.models import ByteTransformer
from torchgraft.bench.task import Split, Task
from torchgraft.bench.tasks.baseline import Settings, cached_weights, seeded
from torchgraft.bench.tasks.stdlib import source_files
from torchgraft.bench.training import supervised
from torchgraft.errors import BadInput

__all__ = ["byte_loss", "byte_splits", "minus_bits", "stdlib_bytes", "unigram_bits"]

_CONTEXT = 128
_FILE_BYTES = 24_000
_TRAIN, _HELD_OUT = 8192, 512
_SETTINGS = Settings(
    steps=800, batch_size=8, lr=3e-3, model=(("d_model", 96), ("depth", 4), ("num_heads", 4), ("spread", 0.3))
)


def byte_loss(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats; (B, T, V), (B, T) -> scalar."""
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def minus_bits(output: Tensor, target: Tensor) -> Tensor:
    """Return minus the bits a byte of every sample; (B, T, V), (B, T) -> (B,)."""
    return -F.cross_entropy(output.transpose(1, 2), target, reduction="none").mean(dim=1) / math.log(2)


def unigram_bits(train: Split, test: Split) -> float:
    """Return the bits a byte on ``test`` of the best guess that ignores context: byte frequencies of ``train``."""
    counts = torch.bincount(train.target.flatten(), minlength=256).double() + 1.0
    return float(-(counts / counts.sum()).log2()[test.target.flatten()].mean())


def _windows(files: list[bytes], most: int, context: int) -> Split:
    """Return at most ``most`` windows of the files, evenly spaced: inputs (N, T), next bytes (N, T)."""
    pieces = [data[start : start + context + 1] for data in files for start in range(0, len(data) - context, context)]
    if not pieces:
        raise BadInput("the standard library's sources are too short to learn from; use another built-in task")
    count = min(most, len(pieces))
    chosen = b"".join(pieces[index * len(pieces) // count] for index in range(count))
    text = torch.frombuffer(bytearray(chosen), dtype=torch.uint8).long().view(count, context + 1)
    return Split(text[:, :-1].contiguous(), text[:, 1:].contiguous())


def byte_splits(context: int, train: int, held_out: int) -> tuple[Split, Split, Split]:
    """Return windows of the library's sources for training, validation and test.

    Args:
        context: bytes a window, T.
        train: most windows for training.
        held_out: most windows for validation, and for test.
    """
    parts: tuple[list[bytes], list[bytes], list[bytes]] = ([], [], [])
    for index, path in enumerate(source_files()):
        parts[{3: 1, 7: 2}.get(index % 10, 0)].append(path.read_bytes()[:_FILE_BYTES])
    return (
        _windows(parts[0], train, context),
        _windows(parts[1], held_out, context),
        _windows(parts[2], held_out, context),
    )


def stdlib_bytes(seed: int = 0) -> Task:
    """Return a causal transformer on bytes: width 96, four blocks, a context of 128."""
    train, val, test = byte_splits(_CONTEXT, _TRAIN, _HELD_OUT)
    text = hashlib.sha256(train.target.numpy().tobytes()).hexdigest()[:12]
    settings = Settings(**{**_SETTINGS.__dict__, "data": (("text", text),)})
    architecture = seeded(lambda: ByteTransformer(256, _CONTEXT, d_model=96, depth=4, num_heads=4, spread=0.3), seed)
    return Task(
        model=architecture,
        train=train,
        val=val,
        test=test,
        loss=byte_loss,
        score=minus_bits,
        name="stdlib-bytes",
        batch_size=16,
        learning_rate=settings.lr,
        reference=-2.94,
        source="stdlib-bytes",
        weights=cached_weights(
            "stdlib-bytes", seed, settings, build=architecture, split=train, objective=supervised(byte_loss)
        ),
    )
