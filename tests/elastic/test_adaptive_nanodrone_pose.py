"""Two networks on a stream: extremes, counts, what a decision may know, and the best table by brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torchgraft.elastic.adaptive_nanodrone_pose import (
    AuxMapPolicy,
    AuxMarginPolicy,
    BigLittle,
    OutputPolicy,
    error_table,
    margin,
)
from torchgraft.errors import BadInput

_INF = math.inf


def nets() -> tuple[nn.Module, nn.Module, nn.Module]:
    torch.manual_seed(0)
    small, big = nn.Linear(5, 4), nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 4))
    return small.double(), big.double(), nn.Linear(5, 6).double()


def frames(count: int = 30) -> Tensor:
    return torch.randn(count, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def policy(kind: str, threshold: float, head: nn.Module) -> OutputPolicy | AuxMarginPolicy | AuxMapPolicy:
    if kind == "output":
        return OutputPolicy(threshold, torch.ones(4, dtype=torch.float64))
    if kind == "margin":
        return AuxMarginPolicy(head, threshold)
    return AuxMapPolicy(head, torch.linspace(-1, 1, 6), threshold)


@pytest.mark.parametrize(
    ("kind", "all_small", "all_big"), [("output", _INF, -_INF), ("margin", -_INF, _INF), ("map", _INF, -_INF)]
)
def test_extremes_are_the_networks_alone(kind: str, all_small: float, all_big: float) -> None:
    small, big, head = nets()
    x = frames()
    for net, threshold, cost in ((small, all_small, 20), (big, all_big, 80 + 64)):
        pair = BigLittle(small, big, policy(kind, threshold, head), x[:1])
        steps = list(pair.stream(x))
        assert all(torch.equal(step.output, net(frame[None])[0]) for step, frame in zip(steps, x, strict=True))
        extra = 0 if kind == "output" else 30
        assert steps[-1].macs == 30 * (cost + extra)


@pytest.mark.parametrize("kind", ["margin", "map"])
def test_calls_of_the_big_network_are_monotone_in_the_threshold(kind: str) -> None:
    small, big, head = nets()
    x = frames()
    thresholds = [-_INF, -0.5, 0.0, 0.2, 0.5, _INF]
    pair = BigLittle(small, big, policy(kind, 0.0, head), x[:1])
    points = pair.sweep([(x, torch.zeros(30, 4))], [(t, policy(kind, t, head)) for t in thresholds])
    calls = [point.big for point in points]
    assert sorted(calls, reverse=kind == "map") == calls
    assert len(set(calls)) > 2
    assert [p.macs for p in points] == pytest.approx([30 + 20 + p.big * (144 - 20) for p in points])


def test_the_output_policy_by_hand() -> None:
    """The output is the frame: it moves at the third frame, so the fourth is the big network's."""

    class Same(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.fc = nn.Linear(2, width, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return x + 0 * self.fc(x).sum()

    x = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 4.0], [1.0, 4.0], [1.0, 4.0]])
    pair = BigLittle(Same(1), Same(9), OutputPolicy(2.9, torch.tensor([1.0, 2.0])), x[:1])
    assert [step.big for step in pair.stream(x)] == [False, False, False, True, False]
    pair = BigLittle(Same(1), Same(9), OutputPolicy(3.1, torch.tensor([1.0, 2.0])), x[:1])
    assert not any(step.big for step in pair.stream(x))


def test_the_output_policy_knows_nothing_of_the_frame_that_it_decides_on() -> None:
    small, big, head = nets()
    x = frames()
    pair = BigLittle(small, big, policy("output", 2.0, head), x[:1])
    first = [step.big for step in pair.stream(x)]
    changed = x.clone()
    changed[12:] += 50.0
    second = [step.big for step in pair.stream(changed)]
    assert first[:13] == second[:13]
    assert first != second
    assert 0 < sum(first) < 30


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(2, 7))
def test_tables_are_the_best_choice_of_as_many_cells(seed: int, size: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    cells = torch.arange(4 * size) % size  # as many samples in each cell
    small, big = torch.rand(4 * size, generator=draw), torch.rand(4 * size, generator=draw)
    table = error_table(cells, small, big, size=size)
    for count in range(size + 1):
        threshold = float(table.sort(descending=True).values[count - 1]) if count else _INF
        chosen = set(torch.nonzero(table >= threshold)[:, 0].tolist())

        def error(cells_of_big: set[int]) -> float:
            use = torch.tensor([int(cell) in cells_of_big for cell in cells])
            return float(torch.where(use, big, small).double().mean())

        best = min(error(set(each)) for each in itertools.combinations(range(size), count))
        assert len(chosen) == count
        assert error(chosen) == pytest.approx(best, abs=1e-9)


def test_the_margin_by_hand() -> None:
    assert margin(torch.tensor([[0.7, 0.2, 0.1]]).log()) == pytest.approx(0.5, abs=1e-6)


def test_a_big_network_that_costs_less_is_refused() -> None:
    small, big, head = nets()
    with pytest.raises(BadInput, match="big must cost more"):
        BigLittle(big, small, policy("output", 0.0, head), frames(1))
