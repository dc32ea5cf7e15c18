"""Hypervolumes by hand, leave-one-out, and the price by which procedures are tried."""

from __future__ import annotations

import itertools
import math
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchgraft.fit.contribution import contributions, gains, promise
from torchgraft.fit.experience import Known, gain, known, price
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


def test_a_trial_promises_what_recovery_will_mend() -> None:
    # A fall of 0.1 leaves 0.035, of a tenth that may be lost: 0.65 are kept.
    assert promise(0.9, [0.25], 1.0) == pytest.approx((0.65, 2.0))
    assert promise(1.1, [0.5], 1.0) == gains(1.1, [0.5], 1.0)  # what has gained keeps its gain
    assert promise(-2.2, [0.5], -2.0) == pytest.approx((0.65, 1.0))
    assert promise(0.96, [0.5], 1.0, span=0.02) == pytest.approx((0.3, 1.0))


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


def test_a_gain_is_halvings_of_what_is_aimed_at_times_what_is_kept_of_the_score() -> None:
    both = _trial(["a"], 0.8, 0.25).model_copy(update={"ratios": {"macs": 0.25, "size": 1.0}})
    assert gain(both, 0.8, ["macs"]) == pytest.approx(2.0)
    assert gain(both, 0.8, ["macs", "size"]) == pytest.approx(1.0)
    assert gain(both, 0.8, ["size"]) == 0.0
    assert gain(both, 0.8 / 0.97, ["macs"]) == pytest.approx(2.0 * math.exp(-1.0))
    assert gain(_trial(["a"], 0.8, 2.0), 0.8, ["macs"]) == 0.0
    assert gain(_trial(["a"], 0.8, 0.25, "failed"), 0.8, ["macs"]) == 0.0


def test_what_is_known_depends_on_the_aim() -> None:
    before = Known(0.5, {"latency": 0.0, "size": 3.0}, 1.0)
    assert before.gain(["size"]) == 1.5
    assert before.gain(["latency"]) == 0.0
    assert before.gain(["latency", "size"]) == 0.75
    assert before.gain(["memory"]) == 0.75  # not measured: the mean of all


def test_the_price_follows_what_a_run_has_measured() -> None:
    key, aims = "no-such-procedure", ["macs"]
    before = known(key, 1)
    start = price(key, 1, aims=aims)
    assert start == pytest.approx(before.seconds / before.gain(aims))
    good, bad = _trial([key], 1.0, 0.25), _trial([key], 0.5, 0.25)
    assert price(key, 1, aims=aims, trials=[good]) < start < price(key, 1, aims=aims, trials=[bad])
    expected = before.seconds / ((2 * before.gain(aims) + 2.0) / 3)
    assert price(key, 1, aims=aims, trials=[good]) == pytest.approx(expected)
    # What another procedure of the stage gained counts, too.
    mate = _trial(["mate"], 0.5, 0.25)
    assert price(key, 1, aims=aims, mates=["mate"], trials=[mate]) > start
    assert price(key, 1, aims=aims, mates=["other"], trials=[mate]) == start
    assert price(key, 3, aims=aims) > price(key, 0, aims=aims)
    assert math.isfinite(price(key, 0, aims=aims, trials=[_trial([key], -1e9, 0.5)] * 50))


def test_what_is_shipped_puts_int8_first_for_latency_and_fewer_bits_for_size() -> None:
    """Codes of few bits are executed as floats, so they can only be first where the file is what counts."""
    latency, size = (
        {key: price(key, 1, aims=[cost]) for key in ("int8-dynamic", "nupes-power-quant")}
        for cost in ("latency", "size")
    )
    assert latency["int8-dynamic"] < latency["nupes-power-quant"]
    assert known("nupes-power-quant", 1).gain(["size"]) > known("int8-dynamic", 1).gain(["size"])
    assert size["nupes-power-quant"] < latency["nupes-power-quant"]
