"""Groups of sparse voxels: the mapping, the descriptor as a convolution, merging, diffusion and the layers on them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.errors import BadInput
from torchgraft.parts.mixers.gated_linear_attention import GatedLinearAttention
from torchgraft.parts.mixers.lion_linear_group_rnn import (
    LinearGroupRNN,
    LionBlock,
    Retention,
    SpatialDescriptor,
    group_mapping,
    neighbours,
    voxel_diffusion,
    voxel_expand,
    voxel_merge,
    window_order,
)

GRID = (9, 7, 4)  # x, y, z


def scene(counts: tuple[int, ...], seed: int = 0, channels: int = 6) -> tuple[Tensor, Tensor]:
    """Return features and coordinates of samples with so many voxels each, in random order, none twice."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for sample, count in enumerate(counts):
        cell = torch.randperm(GRID[0] * GRID[1] * GRID[2], generator=draw)[:count]
        z, y, x = cell // (GRID[0] * GRID[1]), cell // GRID[0] % GRID[1], cell % GRID[0]
        rows.append(torch.stack([torch.full_like(x, sample), z, y, x], 1))
    every = torch.cat(rows)
    every = every[torch.randperm(len(every), generator=draw)]
    return torch.randn(len(every), channels, generator=draw, dtype=torch.float64), every


def _distinct(rows: Tensor) -> int:
    return len(torch.unique(rows, dim=0))


def test_window_order_by_hand() -> None:
    # windows of 2 x 2: along x, the windows (0, 0), (0, 1), (1, 0); within a window x is slowest, then y, then z
    where = torch.tensor([[0, 0, 0, 2], [0, 0, 2, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]])
    assert window_order(where, window=(2, 2, 4)).tolist() == [5, 4, 2, 3, 1, 0]
    assert window_order(where, window=(2, 2, 4), axis="y").tolist() == [5, 4, 3, 2, 0, 1]
    # moved by half a window, x = 0 stands alone and x = 1, 2 together
    assert window_order(where, window=(2, 4, 4), shift=True).tolist() == [5, 4, 2, 1, 3, 0]


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    group_size=st.integers(1, 50),
    shift=st.booleans(),
    axis=st.sampled_from(["x", "y"]),
    seed=st.integers(0, 99),
)
def test_scatter_after_gather_is_the_identity(
    counts: list[int], group_size: int, shift: bool, axis: str, seed: int
) -> None:
    features, where = scene(tuple(counts), seed)
    groups = group_mapping(where, window=(3, 3, 2), group_size=group_size, axis=axis, shift=shift)
    assert groups.gather.shape[1] <= group_size
    assert torch.equal(features[groups.gather].flatten(0, 1)[groups.scatter], features)
    assert _distinct(groups.scatter) == len(features)
    for row in groups.gather:  # a group holds voxels of one sample
        assert _distinct(where[row, 0]) == 1
    # read in the order of the places, the voxels of each sample stand in the sorted order
    order = window_order(where, window=(3, 3, 2), axis=axis, shift=shift)
    assert torch.equal(groups.scatter.argsort(), order)


def test_last_group_is_filled_from_the_one_before() -> None:
    where = torch.tensor([[0, 0, 0, x] for x in range(7)] + [[1, 0, 0, x] for x in range(2)])
    groups = group_mapping(where, window=(13, 13, 32), group_size=3)
    assert groups.gather.tolist() == [[0, 1, 2], [3, 4, 5], [6, 4, 5], [7, 8, 7]]
    assert groups.scatter.tolist() == [0, 1, 2, 3, 4, 5, 6, 9, 10]


@pytest.mark.parametrize("shift", [False, True])
def test_identity_mixer_gives_the_identity(shift: bool) -> None:
    features, where = scene((30, 0, 17))
    layer = LinearGroupRNN(
        6, group_size=8, window=(3, 3, 2), shift=shift, residual=False, mixer=lambda width: nn.Identity()
    )
    assert torch.equal(layer.voxels(features, where), features)


def test_one_group_is_one_pass_in_sorted_order() -> None:
    features, where = scene((40,))
    torch.manual_seed(0)
    layer = LinearGroupRNN(6, num_heads=2, window=(3, 3, 2), axes=("y",), residual=False).double()
    order = window_order(where, window=(3, 3, 2), axis="y")
    expected = torch.empty_like(features)
    expected[order] = layer.mixers[0](features[order][None])[0]
    torch.testing.assert_close(layer.voxels(features, where), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("mixer", [None, lambda width: GatedLinearAttention(width, num_heads=1)])
def test_order_of_the_voxels_does_not_matter(mixer: object) -> None:
    features, where = scene((40, 25))
    torch.manual_seed(0)
    block = LionBlock(6, grid=GRID, num_heads=2, window=(3, 3, 2), group_size=8, mixer=mixer).double()  # type: ignore[arg-type]
    order = torch.randperm(65, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = block(features, where)[order]
        torch.testing.assert_close(block(features[order], where[order]), expected, atol=1e-12, rtol=1e-12)


def test_samples_do_not_see_each_other_and_repeats_do_not_leak() -> None:
    features, where = scene((40, 25))
    torch.manual_seed(0)
    layer = LinearGroupRNN(6, num_heads=2, window=(3, 3, 2), group_size=7).double()
    alone = where[:, 0] == 0
    with torch.no_grad():
        torch.testing.assert_close(
            layer.voxels(features[alone], where[alone]), layer.voxels(features, where)[alone], atol=1e-12, rtol=1e-12
        )


def test_tokens_are_the_cells_of_a_volume() -> None:
    torch.manual_seed(0)
    layer = LinearGroupRNN(6, num_heads=2, group_size=5, window=(2, 2, 2), columns=3, rows=2).double()
    x = torch.randn(2, 12, 6, dtype=torch.float64)
    cells = [[b, z, y, c] for b in range(2) for z in range(2) for y in range(2) for c in range(3)]
    expected = layer.voxels(x.flatten(0, 1), torch.tensor(cells))
    torch.testing.assert_close(layer(x).flatten(0, 1), expected, atol=0, rtol=0)


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_descriptor_is_a_dense_convolution_read_at_the_voxels(kernel: int) -> None:
    features, where = scene((60, 90))
    torch.manual_seed(0)
    descriptor = SpatialDescriptor(6, kernel=kernel).double()
    dense = torch.zeros(2, 6, GRID[2], GRID[1], GRID[0], dtype=torch.float64)
    b, z, y, x = where.T
    dense[b, :, z, y, x] = features
    weight = descriptor.weight.detach().mT.reshape(kernel, kernel, kernel, 6, 6).permute(3, 4, 0, 1, 2)
    expected = F.conv3d(dense, weight, padding=kernel // 2)[b, :, z, y, x]
    found = descriptor.convolve(features, where)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(descriptor(features, where), F.gelu(F.layer_norm(expected, (6,))), atol=1e-5, rtol=1e-5)


def test_neighbours_do_not_run_over_the_edge() -> None:
    where = torch.tensor([[0, 0, 0, 8], [0, 0, 1, 0], [1, 0, 0, 0], [0, 3, 6, 8]])
    found = neighbours(where)
    assert found[:, 13].tolist() == [0, 1, 2, 3]  # each sees itself
    assert int((found < 4).sum()) == 4  # and nobody else


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    stride=st.tuples(*[st.integers(1, 4)] * 3),
    seed=st.integers(0, 99),
)
def test_merge_conserves_the_sum(counts: list[int], stride: tuple[int, int, int], seed: int) -> None:
    features, where = scene(tuple(counts), seed)
    merged = voxel_merge(features, where, stride=stride)
    torch.testing.assert_close(merged.features.sum(0), features.sum(0), atol=1e-12, rtol=1e-12)
    assert _distinct(merged.coordinates) == len(merged.coordinates) <= len(where)
    back = voxel_expand(merged.coordinates, merged.inverse)
    assert torch.equal(back, where // torch.tensor([1, *reversed(stride)]))
    for cell, row in enumerate(merged.features):
        torch.testing.assert_close(row, features[merged.inverse == cell].sum(0), atol=1e-12, rtol=1e-12)


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=3), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_diffusion_adds_few_and_drops_none(counts: list[int], share: float, seed: int) -> None:
    features, where = scene(tuple(counts), seed)
    new = voxel_diffusion(features, where, grid=GRID[:2], share=share)
    assert torch.equal(new.coordinates[new.places], where)
    assert torch.equal(new.features[new.places], features)
    assert len(where) <= len(new.coordinates) <= len(where) * (1 + 4 * share) + 1e-9
    torch.testing.assert_close(new.features.sum(0), features.sum(0), atol=1e-12, rtol=1e-12)
    assert _distinct(new.coordinates) == len(new.coordinates)
    if len(where):
        assert bool((new.coordinates[:, 1:] >= 0).all())
        assert bool((new.coordinates[:, 1:] < torch.tensor([GRID[2], GRID[1], GRID[0]])).all())


def test_diffusion_takes_the_strongest_of_each_sample() -> None:
    where = torch.tensor([[0, 0, 3, 1], [0, 0, 3, 6], [1, 2, 0, 0], [1, 2, 5, 5]])
    strength = torch.tensor([[5.0, 5.0], [1.0, 1.0], [-3.0, -3.0], [-1.0, -1.0]])
    new = voxel_diffusion(strength, where, grid=(9, 7), share=0.5)
    added = {tuple(cell) for cell in new.coordinates.tolist()} - {tuple(cell) for cell in where.tolist()}
    assert added == {
        *((0, 0, 3, 0), (0, 0, 3, 2), (0, 0, 2, 1), (0, 0, 4, 1)),
        *((1, 2, 5, 4), (1, 2, 5, 6), (1, 2, 4, 5), (1, 2, 6, 5)),
    }


def test_the_next_recurrence_fills_what_is_new() -> None:
    features, where = scene((20,))
    new = voxel_diffusion(features, where, grid=GRID[:2])
    torch.manual_seed(0)
    block = LionBlock(6, grid=GRID, num_heads=2).double()
    empty = torch.ones(len(new.features), dtype=torch.bool)
    empty[new.places] = False
    assert bool(empty.any())
    assert not bool(new.features[empty].any())
    with torch.no_grad():
        moved = block(new.features + 0.1 * (~empty[:, None]), new.coordinates) - block(new.features, new.coordinates)
    assert float(moved[empty].abs().amax(1).min()) > 1e-6  # what was there reaches every voxel that is new


def test_block_trains_every_parameter_and_takes_an_empty_scene() -> None:
    features, where = scene((30, 12))
    torch.manual_seed(0)
    block = LionBlock(6, grid=GRID, num_heads=2).double()
    (block(features, where) * torch.randn(42, 6, dtype=torch.float64)).sum().backward()
    assert [name for name, value in block.named_parameters() if value.grad is None or not value.grad.any()] == []
    assert block(features[:0], where[:0]).shape == (0, 6)


def test_retention_is_its_sum() -> None:
    torch.manual_seed(0)
    mixer = Retention(4, num_heads=2).double()
    x = torch.randn(1, 6, 4, dtype=torch.float64)
    q, k, v = mixer.qkv(x)[0].view(6, 3, 2, 2).unbind(1)  # (T, H, K) each
    rows = []
    for t in range(6):
        o = [
            sum((1 - 2.0 ** (-5 - h)) ** (t - s) * (q[t, h] @ k[s, h]) * v[s, h] for s in range(t + 1)) / 2**0.5
            for h in range(2)
        ]
        rows.append(torch.cat([part / (part.square().mean() + 1e-5).sqrt() for part in o]))
    torch.testing.assert_close(mixer(x)[0], mixer.out(torch.stack(rows)), atol=1e-9, rtol=1e-9)


def test_errors() -> None:
    where = torch.zeros(2, 4, dtype=torch.int64)
    layer = LinearGroupRNN(6, num_heads=2)
    for call, words in (
        (lambda: layer.voxels(torch.ones(2, 5), where), r"\(N, 6\)"),
        (lambda: layer.voxels(torch.ones(3, 6), where), r"\(2, C\)"),
        (lambda: layer.voxels(torch.ones(2, 6), where.float()), "integers"),
        (lambda: layer.voxels(torch.ones(2, 6), where - 1), "at least 0"),
        (lambda: neighbours(where), "twice"),
        (lambda: neighbours(where[:1], kernel=2), "odd"),
        (lambda: window_order(where, window=(0, 1, 1)), "window"),
        (lambda: window_order(where, window=(1, 1, 1), axis="z"), "axis"),
        (lambda: group_mapping(where, window=(1, 1, 1), group_size=0), "group_size"),
        (lambda: voxel_merge(torch.ones(2, 6), where, stride=(1, 0, 1)), "stride"),
        (lambda: voxel_diffusion(torch.ones(2, 6), where, grid=(3, 3), share=1.5), "share"),
        (lambda: voxel_diffusion(torch.ones(2, 6), where, grid=(0, 3)), "grid"),
        (lambda: LinearGroupRNN(6, num_heads=2, axes=("z",)), "axes"),
        (lambda: LinearGroupRNN(6, num_heads=2, columns=0), "columns"),
    ):
        with pytest.raises(BadInput, match=words):
            call()
