"""Attention within discs, by groups and by strips, beside a mask of all pairs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchgraft.contracts.mixers import Meter
from torchgraft.engines.attention import attend
from torchgraft.engines.attention.local import (
    attend_in_groups,
    disc_groups,
    disc_offsets,
    local_attention,
    strip_attention,
)
from torchgraft.errors import BadInput


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _pairs(height: int, width: int, radius: float, text: int) -> Tensor:
    """Return who sees whom, written out, (T, T)."""
    y, x = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
    near = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2 < radius**2
    seen = torch.ones(text + height * width, text + height * width, dtype=torch.bool)
    seen[text:, text:] = near
    return seen


def test_discs_hold_the_tokens_less_than_the_radius_away() -> None:
    for radius, count in ((1, 1), (1.5, 9), (2, 9), (4, 45), (8, 193)):
        assert len(disc_offsets(radius)) == count
        found = disc_groups(19, 19, radius, tile=3)
        seen = found.seen.flatten(0, 1)[found.place].sum(-1)  # keys of every token
        assert int(seen[19 * 9 + 9]) == count
        assert torch.equal(seen, _pairs(19, 19, radius, 0).sum(-1))


@settings(max_examples=30, deadline=None)
@given(
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    radius=st.sampled_from([1, 1.5, 2, 3, 4, 11]),
    text=st.integers(0, 3),
    tile=st.sampled_from([None, 1, 2, 3, 5]),
    groups=st.sampled_from([1, 2]),
    parts=st.integers(1, 4),
)
def test_discs_equal_a_mask_of_all_pairs_whatever_the_tiles_and_strips(
    height: int, width: int, radius: float, text: int, tile: int | None, groups: int, parts: int
) -> None:
    tokens = text + height * width
    q = _draw(2, tokens, 2, 4)
    k, v = _draw(2, tokens, groups, 4, seed=1), _draw(2, tokens, groups, 3, seed=2)
    expected = attend(q, k, v, mask=_pairs(height, width, radius, text)[None, None], form="dense")
    found = local_attention(q, k, v, grid=(height, width), radius=radius, text=text, tile=tile)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    split = strip_attention(
        q, k, v, grid=(height, width), radius=radius, text=text, tile=tile, parts=min(parts, height)
    )
    torch.testing.assert_close(split[:, text:], expected[:, text:], rtol=1e-10, atol=1e-12)


def test_a_radius_beyond_the_diagonal_is_full_attention() -> None:
    q, k, v = (_draw(2, 2 + 20, 2, 4, seed=seed) for seed in range(3))
    found = local_attention(q, k, v, grid=(4, 5), radius=5.01, text=2)
    torch.testing.assert_close(found, attend(q, k, v), rtol=1e-10, atol=1e-12)
    less = local_attention(q, k, v, grid=(4, 5), radius=5.0, text=2)  # sqrt(3^2 + 4^2) is not less than 5
    assert not torch.allclose(less, attend(q, k, v))


def test_tokens_outside_the_disc_have_no_derivative() -> None:
    x = _draw(1, 1 + 49, 1, 2)
    found = torch.autograd.functional.jacobian(
        lambda x: local_attention(x, x, x, grid=(7, 7), radius=3, text=1, tile=2).sum((0, 2, 3)), x
    )  # (T, 1, T, 1, K)
    moved = found.abs().amax((1, 3, 4)) > 0
    assert torch.equal(moved, _pairs(7, 7, 3, 1))


def test_coarse_keys_are_seen_by_image_tokens_only() -> None:
    q, k, v = (_draw(1, 1 + 9, 2, 4, seed=seed) for seed in range(3))
    coarse = _draw(1, 2, 2, 4, seed=4), _draw(1, 2, 2, 4, seed=5)
    found = local_attention(q, k, v, grid=(3, 3), radius=2, text=1, coarse=coarse)
    seen = torch.cat([_pairs(3, 3, 2, 1), torch.ones(10, 2, dtype=torch.bool)], dim=1)
    seen[0, 10:] = False
    wide_k, wide_v = torch.cat([k, coarse[0]], 1), torch.cat([v, coarse[1]], 1)
    expected = attend(q, wide_k, wide_v, mask=seen[None, None], form="dense")
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    split = strip_attention(q, k, v, grid=(3, 3), radius=2, text=1, coarse=coarse, parts=3)
    torch.testing.assert_close(split[:, 1:], expected[:, 1:], rtol=1e-10, atol=1e-12)


def test_text_of_one_strip_is_exact_and_of_several_is_their_mean() -> None:
    q, k, v = (_draw(1, 1 + 12, 1, 4, seed=seed) for seed in range(3))
    whole = local_attention(q, k, v, grid=(4, 3), radius=2, text=1)
    one, two = (strip_attention(q, k, v, grid=(4, 3), radius=2, text=1, parts=parts) for parts in (1, 2))
    torch.testing.assert_close(one, whole, rtol=1e-10, atol=1e-12)
    halves = [torch.tensor([0, *range(1 + 6 * part, 7 + 6 * part)]) for part in range(2)]
    expected = sum(attend(q[:, :1], k[:, rows], v[:, rows]) for rows in halves) / 2
    torch.testing.assert_close(two[:, :1], expected, rtol=1e-10, atol=1e-12)


def test_a_strip_reads_nothing_beyond_its_halo() -> None:
    q, k, v = (_draw(1, 36, 1, 4, seed=seed) for seed in range(3))
    other_k, other_v = k.clone(), v.clone()
    other_k[:, 24:], other_v[:, 24:] = 9.0, 9.0  # rows 4 and 5: the halo of radius 3 around rows 0 to 1 ends at row 3
    found, moved = (
        strip_attention(q, keys, values, grid=(6, 6), radius=3, parts=3)
        for keys, values in ((k, v), (other_k, other_v))
    )
    assert torch.equal(found[:, :12], moved[:, :12])
    assert not torch.equal(found[:, 12:24], moved[:, 12:24])


def test_work_is_linear_in_the_tokens() -> None:
    work = []
    for side in (16, 32):
        x = torch.randn(1, side * side, 1, 8)
        disc_groups(side, side, 4, tile=1)  # the indices are made once and kept
        with Meter() as meter:
            local_attention(x, x, x, grid=(side, side), radius=4)
        work.append(meter.work)
    assert work[1] < 4.3 * work[0]


def test_gradients_equal_those_of_the_mask() -> None:
    grads = []
    for local in (True, False):
        q, k, v = (_draw(1, 26, 2, 4, seed=seed).requires_grad_() for seed in range(3))
        if local:
            out = local_attention(q, k, v, grid=(5, 5), radius=2.5, text=1, tile=2)
        else:
            out = attend(q, k, v, mask=_pairs(5, 5, 2.5, 1)[None, None], form="dense")
        grads.append(torch.autograd.grad((out * _draw(*out.shape, seed=7)).sum(), (q, k, v)))
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_groups_may_differ_by_sequence() -> None:
    q, k, v = _draw(2, 3, 2, 2, 4), _draw(2, 6, 1, 4, seed=1), _draw(2, 6, 1, 4, seed=2)
    index = torch.tensor([[[0, 1], [2, 3], [4, 5]], [[5, 4], [1, 0], [3, 3]]])
    found = attend_in_groups(q, k, v, index)
    for row in range(2):
        for group in range(3):
            keys = index[row, group]
            expected = attend(q[row, group][None], k[row : row + 1, keys], v[row : row + 1, keys])
            torch.testing.assert_close(found[row, group][None], expected, rtol=1e-10, atol=1e-12)


def test_what_cannot_be_used_is_refused() -> None:
    x = torch.randn(1, 6, 1, 2)
    with pytest.raises(BadInput, match="2 x 2 image tokens"):
        local_attention(x, x, x, grid=(2, 2), radius=2)
    with pytest.raises(BadInput, match="tile"):
        local_attention(x, x, x, grid=(2, 3), radius=2, tile=0)
    with pytest.raises(BadInput, match="radius"):
        disc_offsets(0)
    with pytest.raises(BadInput, match="parts"):
        strip_attention(x, x, x, grid=(2, 3), radius=2, parts=3)
    with pytest.raises(BadInput, match="index"):
        attend_in_groups(x[:, None], x, x, torch.zeros(1, 2, 3, dtype=torch.long))
    with pytest.raises(BadInput, match="seen"):
        attend_in_groups(x[:, None], x, x, torch.zeros(1, 1, 3, dtype=torch.long), seen=torch.ones(1, 1, 6, 2) > 0)
