"""Smooth orders of units: the function stays, the variation falls, and short paths are shortest on few cities."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torchgraft.bench.models import ResidualNet
from torchgraft.engines.nesting.smooth import permute_smooth, shortest_path, unit_weights, variation
from torchgraft.engines.width import prepare


@given(count=st.integers(2, 6), seed=st.integers(0, 200))
@settings(max_examples=25, deadline=None)
def test_few_cities_have_their_shortest_path(count: int, seed: int) -> None:
    places = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    distance = torch.cdist(places, places, p=1)

    def length(path: tuple[int, ...] | list[int]) -> float:
        return float(sum(distance[a, b] for a, b in itertools.pairwise(path)))

    path = shortest_path(distance)
    assert sorted(path) == list(range(count))
    best = min(length(each) for each in itertools.permutations(range(count)))
    # 2-opt is a heuristic: on so few cities it is nearly always exact, and never worse than the order as it stands.
    assert length(path) <= min(length(range(count)), 1.1 * best) + 1e-12


def test_a_line_is_found() -> None:
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    distance = (order[:, None] - order[None, :]).abs()
    path = shortest_path(distance)
    assert [int(order[city]) for city in path] in (list(range(30)), list(range(29, -1, -1)))


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_the_function_stays_and_the_variation_falls(kind: str) -> None:
    torch.manual_seed(0)
    if kind == "mlp":
        model: nn.Module = nn.Sequential(
            nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 2)
        ).eval()
        x = torch.randn(7, 5)
    else:
        model, x = ResidualNet(widths=(6,), depth=1).eval(), torch.randn(3, 1, 8, 8)
    found = permute_smooth(model, x)
    with torch.no_grad():
        assert torch.allclose(found.model(x), model(x), atol=1e-5)
    assert all(found.after[name] <= found.before[name] for name in found.before)
    assert sum(found.after.values()) < 0.97 * sum(found.before.values())
    # What is reported is what the permuted network has.
    study = prepare(found.model, x)
    for name, value in found.after.items():
        assert variation(unit_weights(study, name)) == pytest.approx(value, rel=1e-5)
    again = permute_smooth(found.model, x)
    assert all(again.after[name] <= found.after[name] * (1 + 1e-6) for name in found.after)


def test_the_weights_of_a_unit_by_hand() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    rows = unit_weights(prepare(net, torch.ones(2, 2)), "0")
    by_hand = torch.cat([net[0].weight, net[0].bias[:, None], net[2].weight.T], 1).detach()
    assert torch.equal(rows.sort(1).values, by_hand.sort(1).values)
