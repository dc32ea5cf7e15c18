"""Unstructured and block sparsity that is executed: patterns, a kernel of its own, layers, and the choice by timing."""

from torchgraft.engines.sparse.choose import Crossover, crossover, fastest
from torchgraft.engines.sparse.layers import (
    SparseLinear,
    SparsePointwiseConv,
    Sparsify,
    is_pointwise,
    matrix,
    to_sparse_layer,
)
from torchgraft.engines.sparse.pattern import Pattern, best_blocks, block_scores, decode, encode, kept_blocks
from torchgraft.engines.sparse.product import BACKENDS, backends_for, sparse_product

__all__ = [
    "BACKENDS",
    "Crossover",
    "Pattern",
    "SparseLinear",
    "SparsePointwiseConv",
    "Sparsify",
    "backends_for",
    "best_blocks",
    "block_scores",
    "crossover",
    "decode",
    "encode",
    "fastest",
    "is_pointwise",
    "kept_blocks",
    "matrix",
    "sparse_product",
    "to_sparse_layer",
]
