"""One model that holds smaller ones: budgets that switch at run time, and what every elastic method shares."""

from __future__ import annotations

from torchgraft.engines.nesting.elastic import ElasticModule, ElasticProcedure
from torchgraft.engines.nesting.nested import Arrange, Nest, Nested, NestedElastic, recalibrate, settle
from torchgraft.engines.nesting.slices import grid, importance, nest, nest_beside, ordered, uncompounded
from torchgraft.engines.nesting.train import Sampler, across, batches, calibrate, draws, evaluate_levels, train_levels

__all__ = [
    "Arrange",
    "ElasticModule",
    "ElasticProcedure",
    "Nest",
    "Nested",
    "NestedElastic",
    "Sampler",
    "across",
    "batches",
    "calibrate",
    "draws",
    "evaluate_levels",
    "grid",
    "importance",
    "nest",
    "nest_beside",
    "ordered",
    "recalibrate",
    "settle",
    "train_levels",
    "uncompounded",
]
