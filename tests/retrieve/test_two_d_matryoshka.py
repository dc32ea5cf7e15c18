"""The loss on a grid of layers and sizes: its parts, its expectation, and the ranking losses by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchgraft.errors import BadInput
from torchgraft.retrieve.two_d_matryoshka import MatryoshkaGrid, angle, cosent, in_batch_contrast


def _views(layers: int = 3, width: int = 8, seed: int = 0) -> dict[int, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        layer: torch.randn(5, width, generator=draw, dtype=torch.float64).requires_grad_(True)
        for layer in range(1, layers + 1)
    }


def test_at_the_full_setting_the_loss_is_a_multiple_of_the_base_loss() -> None:
    a, b = _views(), _views(seed=1)
    grid = MatryoshkaGrid(in_batch_contrast, weight=0.0)
    assert float(grid.at((a, b), 3, 8).detach()) == pytest.approx(
        4 * float(in_batch_contrast(a[3], b[3]).detach()), abs=1e-12
    )
    aligned = MatryoshkaGrid(in_batch_contrast, weight=1.0)
    assert torch.allclose(aligned.at((a, b), 3, 8), grid.at((a, b), 3, 8))  # a layer does not diverge from itself
    assert not torch.allclose(aligned.at((a, b), 1, 8), grid.at((a, b), 1, 8))


@given(shift=st.floats(-5, 5), seed=st.integers(0, 50))
@settings(max_examples=20, deadline=None)
def test_alignment_vanishes_for_constant_differences_alone(shift: float, seed: int) -> None:
    deep = _views(seed=seed)[3].detach()
    none = MatryoshkaGrid(lambda a: a.sum() * 0, weight=1.0)
    assert float(none.at(({1: deep + shift, 3: deep},), 1, 4)) == pytest.approx(0.0, abs=1e-12)
    bent = deep + torch.linspace(0, 1, 8, dtype=torch.float64)
    assert float(none.at(({1: bent, 3: deep},), 1, 4)) > 1e-3


def test_the_sampled_gradient_is_unbiased() -> None:
    a, b = _views(), _views(seed=1)
    values = [*a.values(), *b.values()]

    def gradient(loss: Tensor) -> Tensor:
        found = torch.autograd.grad(loss, values, allow_unused=True, retain_graph=True)
        return torch.cat([torch.zeros(40) if g is None else g.flatten() for g in found])

    sampled = MatryoshkaGrid(in_batch_contrast, sizes=(2, 4, 8), depth_weight="log")
    draws = [([layer], [size]) for layer in (1, 2) for size in (2, 4, 8)]
    mean = torch.stack([gradient(sampled.mean((a, b), *draw)) for draw in draws]).mean(0)
    whole = MatryoshkaGrid(in_batch_contrast, sizes=(2, 4, 8), depth_weight="log", layers="list", dims="list")
    assert torch.allclose(mean, gradient(whole(a, b)), atol=1e-13)
    assert float(mean.abs().max()) > 1e-3
    drawn = [sampled.draw(3, 8) for _ in range(600)]
    counts = [sum(each == draw for each in drawn) / 600 for draw in draws]
    assert counts == pytest.approx([1 / 6] * 6, abs=0.06)


def test_deeper_layers_weigh_less_where_asked() -> None:
    a = _views()
    base = lambda x: x.square().sum()  # noqa: E731
    plain, log = (MatryoshkaGrid(base, align=None, depth_weight=rule) for rule in ("none", "log"))  # type: ignore[arg-type]
    shallow = float((base(a[2]) + base(a[2][:, :4])).detach())
    difference = float((plain.at((a,), 2, 4) - log.at((a,), 2, 4)).detach())
    assert difference == pytest.approx(shallow * (1 - 1 / (1 + math.log(2))), rel=1e-9)


def test_sizes_are_halves_down_to_eight() -> None:
    grid = MatryoshkaGrid(in_batch_contrast)
    assert grid.sizes_of(64) == (8, 16, 32, 64)
    assert grid.sizes_of(12) == (12,)
    assert grid.draw(1, 8)[0] == []  # an encoder of one layer has no shallow one
    assert torch.isfinite(grid({1: torch.randn(3, 8)}, {1: torch.randn(3, 8)}))


def test_ranking_losses_by_hand() -> None:
    left = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    angles = (0.3, 1.1)
    right = torch.tensor([[math.cos(t), math.sin(t)] for t in angles], dtype=torch.float64)
    better_first, better_last = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    gap = math.cos(0.3) - math.cos(1.1)
    assert float(cosent(left, right, better_first, scale=2.0)) == pytest.approx(math.log1p(math.exp(-2 * gap)))
    assert float(cosent(left, right, better_last, scale=2.0)) == pytest.approx(math.log1p(math.exp(2 * gap)))
    # One complex coordinate each: the angle of the quotient is the angle between the vectors.
    assert float(angle(left, right, better_first, scale=2.0)) == pytest.approx(math.log1p(math.exp(-2 * 0.8)))
    assert float(angle(3 * left, right, better_last, scale=2.0)) == pytest.approx(math.log1p(math.exp(2 * 0.8)))
    assert float(cosent(left, right, torch.ones(2))) == 0.0


def test_bad_settings_are_refused() -> None:
    for bad in (
        {"layers": "all"},
        {"align": "mse"},
        {"depth_weight": "linear"},
        {"weight": -1.0},
        {"sizes": ()},
    ):
        with pytest.raises(BadInput):
            MatryoshkaGrid(in_batch_contrast, **bad)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="same layers"):
        MatryoshkaGrid(in_batch_contrast)({1: torch.zeros(2, 8)}, {2: torch.zeros(2, 8)})
    with pytest.raises(BadInput, match="even"):
        angle(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2))
