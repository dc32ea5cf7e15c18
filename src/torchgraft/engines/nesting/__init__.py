"""One model that holds smaller ones: budgets that switch at run time, and what every elastic method shares."""

from __future__ import annotations

from torchgraft.engines.nesting.elastic import ElasticModule, ElasticProcedure

__all__ = ["ElasticModule", "ElasticProcedure"]
