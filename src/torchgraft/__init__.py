"""Fit published deep-learning methods onto your own PyTorch model, and measure what each one buys.

Importing this package imports nothing else: each name below loads its module when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchgraft.bench.meters import Cost, measure
    from torchgraft.bench.task import Split, Task
    from torchgraft.bench.tasks import load_task
    from torchgraft.compare import try_
    from torchgraft.engines.linearize import linearize
    from torchgraft.engines.parametrize import Spec, fold, parametrize
    from torchgraft.engines.recipe import apply
    from torchgraft.engines.surgery import SwapReport, swap
    from torchgraft.errors import BadInput
    from torchgraft.fit import FitResult, fit
    from torchgraft.parts.blocks.attention_names import register_attention
    from torchgraft.parts.blocks.sequence_model import SequenceModel

__version__ = "0.1.0"

_HOMES = {
    "BadInput": "torchgraft.errors",
    "Cost": "torchgraft.bench.meters",
    "FitResult": "torchgraft.fit",
    "SequenceModel": "torchgraft.parts.blocks.sequence_model",
    "Spec": "torchgraft.engines.parametrize",
    "Split": "torchgraft.bench.task",
    "SwapReport": "torchgraft.engines.surgery",
    "Task": "torchgraft.bench.task",
    "apply": "torchgraft.engines.recipe",
    "fit": "torchgraft.fit",
    "fold": "torchgraft.engines.parametrize",
    "linearize": "torchgraft.engines.linearize",
    "load_task": "torchgraft.bench.tasks",
    "measure": "torchgraft.bench.meters",
    "parametrize": "torchgraft.engines.parametrize",
    "register_attention": "torchgraft.parts.blocks.attention_names",
    "swap": "torchgraft.engines.surgery",
    "try_": "torchgraft.compare",
}

__all__ = [
    "BadInput",
    "Cost",
    "FitResult",
    "SequenceModel",
    "Spec",
    "Split",
    "SwapReport",
    "Task",
    "apply",
    "fit",
    "fold",
    "linearize",
    "load_task",
    "measure",
    "parametrize",
    "register_attention",
    "swap",
    "try_",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'torchgraft' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
