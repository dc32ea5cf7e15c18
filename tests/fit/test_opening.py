"""The first trials without a budget: what is expected by hand, steps up while they gain, and another combination then."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import cast

import pytest

from torchgraft.engines.procedure import Procedure
from torchgraft.fit.experience import known
from torchgraft.fit.opening import LITTLE, PRECISION, RUNGS, STARTUP, ascent
from torchgraft.fit.plan import Plan
from torchgraft.report.records import Trial

COSTS = ("latency", "size")


def plan_of(**stages: Sequence[str]) -> Plan:
    """A plan of real keys, whose procedures are never run."""
    member = cast(Procedure, SimpleNamespace(expense=1))
    return Plan({stage: dict.fromkeys(keys, member) for stage, keys in stages.items()})


def trial(number: int, procedures: dict[str, float], score: float, latency: float, size: float) -> Trial:
    return Trial(
        number=number,
        state="complete",
        procedures=procedures,
        validation=score,
        ratios={"latency": latency, "size": size},
        reason="",
        seconds=1.0,
    )


PLAN = plan_of(width=["taylor-pruning"], precision=["int8-dynamic"])


def test_the_first_choice_has_the_most_expected_volume_for_its_time() -> None:
    width, precision = known("taylor-pruning", 1), known("int8-dynamic", 1)

    def worth(*facts: object) -> float:
        rows = [width if fact is width else precision for fact in facts]
        halvings = [max(sum(max(row.halvings[cost], 0.0) for row in rows), LITTLE) for cost in COSTS]
        return math.prod(row.kept for row in rows) * math.prod(halvings) / (1 + sum(row.seconds for row in rows))

    assert worth(width, precision) > max(worth(width), worth(precision))
    chosen = ascent(PLAN, aims=COSTS)
    assert chosen is not None
    assert chosen.procedures == {"width": ("taylor-pruning", RUNGS[0]), "precision": ("int8-dynamic", PRECISION)}


def test_what_holds_its_score_is_taken_further_and_what_does_not_is_left() -> None:
    both = {"taylor-pruning": RUNGS[0], "int8-dynamic": PRECISION}
    held = trial(0, both, 1.0, 0.5, 0.2)
    further = ascent(PLAN, aims=COSTS, trials=[held])
    assert further is not None
    assert further.procedures["width"] == ("taylor-pruning", RUNGS[1])
    # By hand: 1 bit x 2.32 bits are held; a fall of 0.06 leaves exp(-2) of 1.5 x 3, less than before.
    lost = trial(1, both | {"taylor-pruning": RUNGS[1]}, 0.94, 2**-1.5, 2**-3.0)
    other = ascent(PLAN, aims=COSTS, trials=[held, lost])
    assert other is not None
    assert len(other.procedures) == 1
    # A step that gained is followed by the next one.
    gained = trial(1, both | {"taylor-pruning": RUNGS[1]}, 0.99, 2**-1.5, 2**-3.0)
    top = ascent(PLAN, aims=COSTS, trials=[held, gained])
    assert top is not None
    assert top.procedures["width"] == ("taylor-pruning", RUNGS[2])


def test_a_combination_that_breaks_the_model_is_not_taken_further() -> None:
    both = {"taylor-pruning": RUNGS[0], "int8-dynamic": PRECISION}
    broken = trial(0, both, 0.1, 0.5, 0.2)
    chosen = ascent(PLAN, aims=COSTS, trials=[broken])
    assert chosen is not None
    assert set(chosen.procedures) != {"width", "precision"}


def test_it_ends_with_the_rungs_or_when_the_sampler_has_enough() -> None:
    alone = plan_of(precision=["int8-dynamic"])
    first = ascent(alone, aims=COSTS)
    assert first is not None
    assert first.procedures == {"precision": ("int8-dynamic", PRECISION)}
    done = trial(0, {"int8-dynamic": PRECISION}, 1.0, 1.0, 0.3)
    assert ascent(alone, aims=COSTS, trials=[done]) is None
    many = [trial(number, {"taylor-pruning": 0.5}, 1.0, 0.9, 0.9) for number in range(STARTUP)]
    assert ascent(PLAN, aims=COSTS, trials=many) is None


@pytest.mark.parametrize("pair", [("stitchable-nets", "int8-dynamic")])
def test_what_has_no_place_is_not_combined(pair: tuple[str, str]) -> None:
    # An elastic procedure has no stage; with it nothing is allowed and nothing chosen.
    assert ascent(plan_of(width=[pair[0]]), aims=COSTS) is None
