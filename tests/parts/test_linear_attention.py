"""Bidirectional linear attention against the matrix of its weights."""

from __future__ import annotations

import torch

from torchgraft.engines.recurrence.heads import merge_heads, split_heads
from torchgraft.parts.mixers.linear_attention import LinearAttention, feature


def test_equals_the_matrix_of_weights() -> None:
    torch.manual_seed(0)
    mixer, x = LinearAttention(8, num_heads=2).double(), torch.randn(2, 9, 8, dtype=torch.float64)
    q, k, v = (split_heads(project(x), 2) for project in (mixer.query, mixer.key, mixer.value))
    weights = torch.einsum("bthk,bshk->bhts", feature(q), feature(k))
    assert bool((weights > 0).all())
    weights = weights / weights.sum(-1, keepdim=True)
    wanted = mixer.out(merge_heads(torch.einsum("bhts,bshv->bthv", weights, v)))
    torch.testing.assert_close(mixer(x), wanted, rtol=1e-12, atol=1e-12)
