"""Training with masks: which kind of sparsity, masks that hold and change, rounds of pruning, and what it all costs."""

from __future__ import annotations

from torchgraft.engines.sparse_training.report import SparsityReport, Step, forward_flops, kept_counts
from torchgraft.engines.sparse_training.rewinding import Prune, Rewound, Round, TrainFn, prune_and_rewind, trainer
from torchgraft.engines.sparse_training.tags import SparsityTags
from torchgraft.engines.sparse_training.training import (
    DropGrow,
    Gradual,
    MaskedTraining,
    cosine_fraction,
    drop_and_grow,
    remove_lowest,
    train_masked,
)

__all__ = [
    "DropGrow",
    "Gradual",
    "MaskedTraining",
    "Prune",
    "Rewound",
    "Round",
    "SparsityReport",
    "SparsityTags",
    "Step",
    "TrainFn",
    "cosine_fraction",
    "drop_and_grow",
    "forward_flops",
    "kept_counts",
    "prune_and_rewind",
    "remove_lowest",
    "train_masked",
    "trainer",
]
