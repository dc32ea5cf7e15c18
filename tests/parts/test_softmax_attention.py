"""Softmax attention against matrices written out, and what its cache holds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchgraft.engines.recurrence.distance import rotary
from torchgraft.errors import BadInput
from torchgraft.parts.mixers.softmax_attention import SoftmaxAttention


def _made(rotary: bool = True, seed: int = 0) -> SoftmaxAttention:
    torch.manual_seed(seed)
    return SoftmaxAttention(8, num_heads=2, rotary=rotary).double()


def test_equals_the_formula() -> None:
    mixer = _made(rotary=False)
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    weight = mixer.qkv.weight
    heads = []
    for head in range(2):
        q, k, v = (x[0] @ weight[8 * part + 4 * head : 8 * part + 4 * head + 4].T for part in range(3))
        score = q @ k.T / math.sqrt(4)
        rows = []
        for t in range(5):
            share = score[t, : t + 1].exp() / score[t, : t + 1].exp().sum()
            rows.append(share @ v[: t + 1])
        heads.append(torch.stack(rows))
    wanted = torch.cat(heads, dim=1) @ mixer.out.weight.T
    torch.testing.assert_close(mixer(x)[0], wanted, rtol=1e-12, atol=1e-12)


def test_rotation_by_hand() -> None:
    """With K = 2 the only pair turns by one radian a token."""
    x = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(1, 3, 1, 2)
    wanted = torch.tensor([[math.cos(t), math.sin(t)] for t in (5, 6, 7)], dtype=torch.float64)
    torch.testing.assert_close(rotary(x, 5 + torch.arange(x.shape[1])[None])[0, :, 0], wanted, rtol=1e-12, atol=1e-12)


def test_scores_depend_on_distance_only() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 2, 6, dtype=torch.float64), torch.randn(1, 4, 2, 6, dtype=torch.float64)
    scores = [
        torch.einsum(
            "bthk,bshk->bhts",
            rotary(q, first + torch.arange(q.shape[1])[None]),
            rotary(k, first + torch.arange(k.shape[1])[None]),
        )
        for first in (0, 1000)
    ]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-9, atol=1e-9)
    norm = torch.linalg.vector_norm
    torch.testing.assert_close(
        norm(rotary(q, 7 + torch.arange(q.shape[1])[None]), dim=-1), norm(q, dim=-1), rtol=1e-12, atol=1e-12
    )


@given(length=st.integers(1, 40), cut=st.integers(0, 40), rotary=st.booleans())
@settings(max_examples=20, deadline=None)
def test_parts_equal_the_whole(length: int, cut: int, rotary: bool) -> None:
    mixer = _made(rotary)
    x = torch.randn(2, length, 8, dtype=torch.float64)
    cut = min(cut, length)
    state, pieces = mixer.init_state(2), []
    if cut:
        y, state = mixer.prefill(x[:, :cut], state)
        pieces.append(y)
    if cut < length:
        y_t, state = mixer.step(x[:, cut], state)
        pieces.append(y_t[:, None])
    if cut + 1 < length:
        y, state = mixer.prefill(x[:, cut + 1 :], state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, dim=1), mixer(x), rtol=1e-9, atol=1e-9)
    assert sum(value.numel() for value in state.values()) == 2 * 2 * length * 8


def test_without_rotation_the_order_of_the_past_does_not_count() -> None:
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    mixed = x[:, [3, 1, 0, 4, 2, 5]]
    plain, turned = _made(rotary=False), _made()
    torch.testing.assert_close(plain(x)[:, -1], plain(mixed)[:, -1], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(turned(x)[:, -1], turned(mixed)[:, -1])


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(BadInput, match="num_heads must divide d_model = 8, got 3"):
        SoftmaxAttention(8, num_heads=3)
    with pytest.raises(BadInput, match="even head size"):
        SoftmaxAttention(6, num_heads=2)
    with pytest.raises(BadInput, match="shape"):
        _made()(torch.zeros(1, 2, 9, dtype=torch.float64))
