"""Routers and exits: samples against softmax, thresholds against counts, gathered rows against a loop."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchgraft.engines.routing import (
    choose_exits,
    exit_thresholds,
    expected_cost,
    geometric_shares,
    ratio_for_cost,
    refine,
    run_rows,
    share_threshold,
    solve_falling,
    straight_through,
)
from torchgraft.errors import BadInput


def test_samples_are_one_hot_and_as_frequent_as_softmax_says() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0]).expand(20_000, 3)
    drawn = straight_through(logits, tau=0.8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn.detach().round().sum(1), torch.ones(20_000))
    assert torch.allclose(drawn.mean(0), logits[0].softmax(0), atol=0.01)


def test_the_gradient_is_that_of_the_relaxation() -> None:
    logits = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    (straight_through(logits, tau=0.5, generator=torch.Generator().manual_seed(1)) * weight).sum().backward()
    noise = -torch.empty(3, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(1)).log()
    other = logits.detach().clone().requires_grad_()
    (torch.softmax((other + noise) / 0.5, 0) * weight).sum().backward()
    assert logits.grad is not None
    assert other.grad is not None
    assert torch.allclose(logits.grad, other.grad, atol=1e-12)
    assert bool(logits.grad.any())


@given(st.lists(st.integers(-1000, 1000), min_size=1, max_size=40, unique=True), st.floats(0, 1))
def test_a_share_of_distinct_values_reaches_its_threshold(values: list[int], share: float) -> None:
    numbers = torch.tensor(values, dtype=torch.float64)
    reached = int((numbers >= share_threshold(numbers, share)).sum())
    assert reached == math.floor(len(values) * share + 1e-9)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.floats(0.05, 20), st.integers(0, 1000))
def test_exits_are_taken_by_as_many_as_planned(samples: int, exits: int, ratio: float, seed: int) -> None:
    confidence = torch.rand(samples, exits, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    shares = geometric_shares(ratio, exits)
    choice = choose_exits(confidence, exit_thresholds(confidence, shares))
    counts = torch.bincount(choice, minlength=exits)
    assert counts.tolist()[:-1] == [math.floor(samples * share + 1e-9) for share in shares.tolist()[:-1]]
    costs = torch.arange(1.0, exits + 1)
    assert expected_cost(choice, costs) == pytest.approx(float((counts * costs).sum()) / samples)


def test_all_mass_on_one_exit_sends_everyone_there() -> None:
    confidence = torch.rand(20, 3, generator=torch.Generator().manual_seed(0))
    for exit_ in range(3):
        shares = torch.eye(3, dtype=torch.float64)[exit_]
        assert choose_exits(confidence, exit_thresholds(confidence, shares)).tolist() == [exit_] * 20


@given(st.floats(1.01, 9.9))
def test_the_ratio_meets_the_budget(budget: float) -> None:
    costs = [1.0, 2.0, 10.0]
    spent = float(geometric_shares(ratio_for_cost(costs, budget), 3) @ torch.tensor(costs, dtype=torch.float64))
    assert spent == pytest.approx(budget, rel=1e-6)


def test_rows_that_are_not_chosen_are_not_computed() -> None:
    seen: list[int] = []

    def double(x: Tensor) -> Tensor:
        seen.append(len(x))
        return 2 * x

    x = torch.arange(4.0)[:, None]
    assert run_rows(x, torch.tensor([True, False, False, True]), double).flatten().tolist() == [0, 1, 2, 6]
    assert run_rows(x, torch.zeros(4, dtype=torch.bool), double) is x
    assert run_rows(x[:0], torch.zeros(0, dtype=torch.bool), double).shape == (0, 1)
    assert seen == [2]


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=0, max_size=12), st.integers(0, 100))
def test_learners_add_up_row_by_row_and_see_only_their_rows(choices: list[int], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(len(choices), 3, dtype=torch.float64, generator=draw)
    maps = torch.randn(3, 3, 2, dtype=torch.float64, generator=draw)
    start = torch.randn(2, dtype=torch.float64, generator=draw)
    seen = [0, 0, 0]

    def learner(n: int) -> object:
        def run(rows: Tensor) -> Tensor:
            seen[n] += len(rows)
            return rows @ maps[n]

        return run

    found = refine(x, torch.tensor(choices, dtype=torch.long), start, [learner(n) for n in range(3)])  # type: ignore[misc]
    wanted = torch.stack([start + sum((row @ maps[n] for n in range(k)), torch.zeros(2)) for row, k in zip(x, choices, strict=True)]) if choices else x.new_zeros(0, 2)  # fmt: skip  # noqa: E501
    assert torch.allclose(found, wanted, atol=1e-12)
    assert seen == [sum(choice > n for choice in choices) for n in range(3)]


def test_gradients_reach_chosen_learners_and_the_start() -> None:
    weight = torch.ones(2, 2, requires_grad=True)
    start = torch.zeros(2, requires_grad=True)
    refine(torch.ones(3, 2), torch.tensor([0, 1, 1]), start, [lambda rows: rows @ weight]).sum().backward()
    assert weight.grad is not None
    assert start.grad is not None
    assert weight.grad.tolist() == [[2.0, 2.0], [2.0, 2.0]]
    assert start.grad.tolist() == [3.0, 3.0]


def test_a_falling_function_is_solved() -> None:
    assert solve_falling(lambda x: 1 - x**2, 0.75, low=0, high=1, steps=30) == pytest.approx(0.5, abs=1e-6)
    asked: list[float] = []

    def line(x: float) -> float:
        asked.append(x)
        return 1 - x

    # 0.5, 0.25 and 0.125 give 0.5, 0.75 and 0.875: the third lies within a tenth of 0.9.
    assert solve_falling(line, 0.9, low=0, high=1, steps=30, near=0.1) == 0.125
    assert asked == [0.5, 0.25, 0.125]


@pytest.mark.parametrize(
    "call",
    [
        lambda: straight_through(torch.zeros(2), tau=0.0),
        lambda: share_threshold(torch.zeros(0), 0.5),
        lambda: share_threshold(torch.zeros(2), 1.5),
        lambda: geometric_shares(-1.0, 2),
        lambda: exit_thresholds(torch.zeros(3, 2), torch.tensor([0.5, 0.1])),
        lambda: exit_thresholds(torch.zeros(3, 2), torch.tensor([1.0])),
        lambda: ratio_for_cost([1.0, 2.0], 3.0),
        lambda: ratio_for_cost([2.0, 1.0], 1.5),
    ],
)
def test_bad_input_is_refused(call: object) -> None:
    with pytest.raises(BadInput):
        call()  # type: ignore[operator]
