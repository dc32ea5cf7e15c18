"""Normalisation as one family: which statistics (token, group, instance, batch, running), over which axes, what affine.

    y = (x - mean) / sqrt(var + eps) * weight + bias,   mean and var over the axes of the source

:mod:`~torchgraft.engines.normalize.statistics` owns moments, pooling, groups and running averages, and
:mod:`~torchgraft.engines.normalize.norm` the formula, its fused forms and the base classes of layers.
"""

from __future__ import annotations

from torchgraft.engines.normalize.norm import (
    Norm,
    RunningNorm,
    affine,
    batch_norm,
    group_norm,
    normalize,
    token_norm,
)
from torchgraft.engines.normalize.statistics import (
    instance_moments,
    mean_square,
    merge_groups,
    moments,
    pool,
    split_groups,
    update_running,
    wide,
)

__all__ = [
    "Norm",
    "RunningNorm",
    "affine",
    "batch_norm",
    "group_norm",
    "instance_moments",
    "mean_square",
    "merge_groups",
    "moments",
    "normalize",
    "pool",
    "split_groups",
    "token_norm",
    "update_running",
    "wide",
]
