"""Axial attention: one axis is plain attention, the model sees all of the past and nothing else, and samples agree."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from torchgraft.engines.recurrence.heads import merge_heads, split_heads
from torchgraft.errors import BadInput
from torchgraft.parts.mixers.axial_attention import AxialAttention, AxialTransformer, shift

DOUBLE = torch.float64


@pytest.mark.parametrize("causal", [False, True])
def test_on_one_axis_it_is_softmax_attention(causal: bool) -> None:
    torch.manual_seed(0)
    layer = AxialAttention(8, num_heads=2, axis=1, causal=causal).to(DOUBLE)
    x = torch.randn(3, 5, 8, dtype=DOUBLE)
    q, k, v = (split_heads(part, 2).transpose(1, 2) for part in layer.mixer.qkv(x).chunk(3, dim=-1))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)
    assert torch.allclose(layer(x), layer.mixer.out(merge_heads(mixed)), atol=1e-12)


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_other_axes_are_batch(axis: int) -> None:
    torch.manual_seed(0)
    layer = AxialAttention(8, num_heads=2, axis=axis, causal=True).to(DOUBLE)
    x = torch.randn(2, 3, 4, 5, 8, dtype=DOUBLE)
    found = layer(x)
    for other in {1, 2, 3} - {axis}:
        order = torch.randperm(x.shape[other])
        assert torch.allclose(layer(x.index_select(other, order)), found.index_select(other, order), atol=1e-12)
    order = torch.arange(x.shape[axis] - 1, -1, -1)
    assert not torch.allclose(layer(x.index_select(axis, order)), found.index_select(axis, order))


def model(channels: int = 1) -> AxialTransformer:
    torch.manual_seed(0)
    built = AxialTransformer((3, 4), levels=5, channels=channels, d_model=8, num_heads=2).to(DOUBLE)
    for parameter in built.parameters():  # larger weights make weak dependences plain
        torch.nn.init.normal_(parameter, std=0.4)
    return built


@pytest.mark.parametrize("channels", [1, 2])
def test_a_pixel_sees_all_of_its_past_and_nothing_else(channels: int) -> None:
    built = model(channels)
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(0, 5, (1, channels, 3, 4), generator=draw)
    plain = built(x).detach()
    places = list(itertools.product(range(channels), range(3), range(4)))
    for changed, (c, i, j) in enumerate(places):
        other = x.clone()
        other[0, c, i, j] = (x[0, c, i, j] + 1) % 5
        moved = (built(other).detach() - plain).abs().amax(-1)[0]
        for asked, place in enumerate(places):
            if asked <= changed:
                assert float(moved[place]) == 0.0, (place, (c, i, j))
            else:
                assert float(moved[place]) > 1e-9, (place, (c, i, j))


@pytest.mark.parametrize("channels", [1, 2])
def test_both_ways_of_sampling_draw_the_same_image(channels: int) -> None:
    built = model(channels)
    fast, slow = (
        built.sample(6, semi_parallel=each, generator=torch.Generator().manual_seed(3)) for each in (True, False)
    )
    assert torch.equal(fast, slow)
    assert len({tuple(image.flatten().tolist()) for image in fast}) > 1


def test_probabilities_of_all_images_sum_to_one() -> None:
    torch.manual_seed(0)
    built = AxialTransformer((2, 2), levels=2, d_model=8, num_heads=2).to(DOUBLE)
    images = torch.tensor(list(itertools.product((0, 1), repeat=4))).view(16, 1, 2, 2)
    assert torch.allclose(built.log_prob(images).exp().sum(), torch.ones((), dtype=DOUBLE))


def test_shift_and_bad_input() -> None:
    assert shift(torch.arange(1, 7).view(1, 2, 3), 2).tolist() == [[[0, 1, 2], [0, 4, 5]]]
    assert shift(torch.arange(1, 7).view(1, 2, 3), 1).tolist() == [[[0, 0, 0], [1, 2, 3]]]
    with pytest.raises(BadInput, match="axis"):
        AxialAttention(8, axis=0)
    with pytest.raises(BadInput, match="axes or more"):
        AxialAttention(8, num_heads=2, axis=2)(torch.randn(1, 3, 8))
    with pytest.raises(BadInput, match="values must lie"):
        model()(torch.full((1, 1, 3, 4), 5))
    with pytest.raises(BadInput, match="integers of shape"):
        model()(torch.zeros(1, 1, 4, 4, dtype=torch.long))
    with pytest.raises(BadInput, match="at least 1"):
        AxialTransformer((2, 2), levels=0)
