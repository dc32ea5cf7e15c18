"""Hypervolumes by hand, leave-one-out, and the price by which procedures are tried."""

from __future__ import annotations

import itertools
import math
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchgraft.fit.contribution import contributions, gains
from torchgraft.fit.experience import gain, known, price
from torchgraft.fit.pareto import hypervolume
from torchgraft.report.records import Applied, Candidate, CostRecord, Interval, Trial


def test_hypervolume_by_hand() -> None:
    assert hypervolume([]) == 0.0
    assert hypervolume([(3.0,), (2.0,)]) == 3.0
    assert hypervolume([(2.0, 1.0), (1.0, 2.0)]) == 3.0
    # Two boxes 2x2x1 and 1x1x3 that share 1x1x1.
    assert hypervolume([(2.0, 2.0, 1.0), (1.0, 1.0, 3.0)]) == 6.0
    assert hypervolume([(2.0, -1.0), (0.0, 5.0)]) == 0.0


POINT = st.tuples(*(st.integers(0, 4) for _ in range(3)))


@given(st.lists(POINT, max_size=6))
def test_hypervolume_counts_the_unit_cubes_below_the_points(points: list[tuple[int, int, int]]) -> None:
    cubes = sum(
        any(all(corner < value for corner, value in zip(cube, point, strict=True)) for point in points)
        for cube in itertools.product(range(4), repeat=3)
    )
    assert hypervolume([tuple(map(float, point)) for point in points]) == pytest.approx(cubes)


def test_gains_have_their_origin_where_a_model_is_worth_nothing() -> None:
    assert gains(0.72, [1.0, 0.5], 0.8) == pytest.approx((0.0, 0.0, 1.0))
    assert gains(-2.0, [0.25], -2.0) == (1.0, 2.0)
    assert gains(0.0, [2.0], 0.8)[0] == 0.0
    assert gains(0.8, [2.0], 0.8)[1] == -1.0


def _cost(ratio: float) -> CostRecord:
    return CostRecord(value=ratio, low=ratio, high=ratio, unit="", ratio=ratio, ratio_low=ratio, ratio_high=ratio)


def _candidate(name: str, keys: list[str], score: float, ratio: float) -> Candidate:
    exact = Interval(value=score, low=score, high=score)
    return Candidate(
        name=name,
        procedures=[Applied(key=key, title=key, strength=0.5, sites=[], changes={}) for key in keys],
        validation=exact,
        drop=Interval(value=1 - score, low=1 - score, high=1 - score),
        test=None,
        costs={"macs": _cost(ratio)},
        feasible=True,
        chosen=False,
        best=False,
        verdict="helped",
        why="",
        recovery_steps=0,
    )


def _trial(
    keys: list[str], score: float, ratio: float, state: Literal["complete", "failed"] = "complete", number: int = 0
) -> Trial:
    return Trial(
        number=number,
        state=state,
        procedures=dict.fromkeys(keys, 0.5),
        validation=score,
        ratios={"macs": ratio},
        reason="",
        seconds=1.0,
    )


def test_what_is_lost_without_a_procedure_by_hand() -> None:
    front = [
        _candidate("original", [], 1.0, 1.0),
        _candidate("a", ["svd-truncation"], 1.0, 0.5),  # holds 1 x 1
        _candidate("b", ["svd-truncation", "int8-dynamic"], 0.95, 0.25),  # holds 1/2 x 2; together 1.5
    ]
    found = {row.key: row for row in contributions(front, [], ["macs"])}
    assert found["svd-truncation"].lost_without == pytest.approx(1.0)
    assert found["svd-truncation"].models == 2
    assert found["int8-dynamic"].lost_without == pytest.approx(0.5 / 1.5)
    # A trial without int8 that comes as far takes its place; a failed one does not.
    filled = contributions(front, [_trial(["magnitude-pruning"], 0.95, 0.25)], ["macs"])
    assert {row.key: row.lost_without for row in filled}["int8-dynamic"] == pytest.approx(0.0)
    failed = contributions(front, [_trial(["magnitude-pruning"], 0.95, 0.25, "failed")], ["macs"])
    assert {row.key: row.lost_without for row in failed}["int8-dynamic"] == pytest.approx(0.5 / 1.5)
    assert next(row.key for row in filled) == "svd-truncation"


def test_a_front_of_the_original_alone_has_no_contributions() -> None:
    assert contributions([_candidate("original", [], 1.0, 1.0)], [], ["macs"]) == []


def test_a_gain_is_halvings_times_what_is_kept_of_the_score() -> None:
    both = _trial(["a"], 0.8, 0.25).model_copy(update={"ratios": {"macs": 0.25, "size": 1.0}})
    assert gain(both, 0.8) == pytest.approx(1.0)
    assert gain(both, 0.8 / 0.97) == pytest.approx(math.exp(-1.0))
    assert gain(_trial(["a"], 0.8, 2.0), 0.8) == 0.0
    assert gain(_trial(["a"], 0.8, 0.25, "failed"), 0.8) == 0.0


def test_the_price_follows_what_a_run_has_measured() -> None:
    before = known("no-such-procedure", 1)
    start = price("no-such-procedure", 1)
    assert start == pytest.approx(before.seconds / before.gain)
    good, bad = _trial(["no-such-procedure"], 1.0, 0.25), _trial(["no-such-procedure"], 0.5, 0.25)
    assert price("no-such-procedure", 1, trials=[good]) < start < price("no-such-procedure", 1, trials=[bad])
    assert price("no-such-procedure", 1, trials=[good]) == pytest.approx(before.seconds / ((2 * before.gain + 2.0) / 3))
    # What another procedure of the stage gained counts, too.
    mate = _trial(["mate"], 0.5, 0.25)
    assert price("no-such-procedure", 1, mates=["mate"], trials=[mate]) > start
    assert price("no-such-procedure", 1, mates=["other"], trials=[mate]) == start
    assert price("no-such-procedure", 3) > price("no-such-procedure", 0)
    assert math.isfinite(price("no-such-procedure", 0, trials=[_trial(["no-such-procedure"], -1e9, 0.5)] * 50))
