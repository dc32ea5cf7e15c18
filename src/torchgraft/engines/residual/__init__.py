"""Stacks of residual blocks: found, turned into one broad parallel layer and back, and merged into wider blocks."""

from __future__ import annotations

from torchgraft.engines.residual.parallel import (
    Flatten,
    Parallel,
    Unflatten,
    branch,
    expansion,
    flatten,
    skips,
    unflatten,
)
from torchgraft.engines.residual.widen import Widen, obstacle, widened

__all__ = [
    "Flatten",
    "Parallel",
    "Unflatten",
    "Widen",
    "branch",
    "expansion",
    "flatten",
    "obstacle",
    "skips",
    "unflatten",
    "widened",
]
