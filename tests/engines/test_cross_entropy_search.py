"""The cross-entropy method: a round by hand, convergence on known minima, repeatability."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from torchgraft.engines.cross_entropy_search import Choice, Number, cross_entropy_search
from torchgraft.errors import BadInput


def test_one_round_moves_the_distribution_to_the_elite_by_the_smoothing() -> None:
    seen: list[dict[str, Any]] = []

    def objective(settings: dict[str, Any]) -> float:
        seen.append(settings)
        return abs(settings["x"] - 3) + (settings["kind"] == "b")

    space = {"x": Number(0, 4), "kind": Choice(["a", "b"])}
    found = cross_entropy_search(objective, space, samples=20, elite=0.25, smoothing=0.6, rounds=1, seed=3)
    values = [abs(each["x"] - 3) + (each["kind"] == "b") for each in seen]
    elite = [seen[row] for row in np.argsort(values, kind="stable")[:5]]
    x = np.array([each["x"] for each in elite])
    share = sum(each["kind"] == "a" for each in elite) / 5
    assert found.distribution["x"] == pytest.approx((0.6 * x.mean() + 0.4 * 2, 0.6 * x.std() + 0.4 * 2))
    assert found.distribution["kind"] == pytest.approx((0.6 * share + 0.2, 0.6 * (1 - share) + 0.2))
    assert found.value == min(values)
    assert found.means == pytest.approx((np.sort(values)[:5].mean(),))
    assert (found.rounds, found.tried) == (1, 20)


def test_known_minima_are_found_and_the_search_ends_when_settled() -> None:
    space = {"rate": Number(1e-5, 1, log=True), "size": Number(1, 100, whole=True), "kind": Choice("abcd")}

    def objective(settings: dict[str, Any]) -> float:
        return (math.log10(settings["rate"]) + 2) ** 2 + ((settings["size"] - 30) / 20) ** 2 + (settings["kind"] != "c")

    for seed in range(3):
        found = cross_entropy_search(objective, space, samples=100, rounds=60, seed=seed)
        assert found.rounds < 60
        assert found.best["kind"] == "c"
        assert abs(math.log10(found.best["rate"]) + 2) < 0.1
        assert abs(found.best["size"] - 30) <= 3
        assert isinstance(found.best["size"], int)
        assert found.means[-1] < found.means[0]


def test_draws_stay_within_bounds_and_repeat_with_the_seed() -> None:
    drawn: list[float] = []

    def objective(settings: dict[str, Any]) -> float:
        drawn.append(settings["x"])
        return -float(settings["x"])

    first = cross_entropy_search(objective, {"x": Number(-1, 2)}, seed=1)
    count = len(drawn)
    assert all(-1 <= x <= 2 for x in drawn)
    assert first.best["x"] == 2
    assert cross_entropy_search(objective, {"x": Number(-1, 2)}, seed=1) == first
    assert drawn[:count] == drawn[count:]
    assert cross_entropy_search(objective, {"x": Number(-1, 2)}, seed=2).means != first.means


def test_what_fails_counts_as_infinitely_bad() -> None:
    found = cross_entropy_search(lambda s: math.nan if s["x"] < 0 else s["x"], {"x": Number(-1, 1)}, seed=0)
    assert 0 <= found.best["x"] < 0.05
    with pytest.raises(BadInput, match="no finite value"):
        cross_entropy_search(lambda s: math.inf, {"x": Number(-1, 1)})


def test_what_cannot_be_used_is_refused() -> None:
    for bad in ({"samples": 1}, {"elite": 0.0}, {"smoothing": 1.5}, {"rounds": 0}):
        with pytest.raises(BadInput):
            cross_entropy_search(lambda s: 0.0, {"x": Number(0, 1)}, **bad)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="space"):
        cross_entropy_search(lambda s: 0.0, {})
    with pytest.raises(BadInput, match="Choice"):
        Choice([])
    with pytest.raises(BadInput, match="Number"):
        Number(0, 1, log=True)
    with pytest.raises(BadInput, match="Number"):
        Number(2, 1)
