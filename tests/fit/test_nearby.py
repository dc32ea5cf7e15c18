"""The search around the front: who is looked beside, how far, and what the rules refuse."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import cast

import pytest

from torchgraft.engines.procedure import Procedure
from torchgraft.errors import BadInput
from torchgraft.fit.nearby import LEAST, MOST, OFTEN, STEP, nearby
from torchgraft.fit.plan import Plan, check_combination
from torchgraft.report.records import Trial

COSTS = ("latency", "size")
PLAN = Plan(
    {
        stage: {key: cast(Procedure, SimpleNamespace(expense=1, exact=key == "norm-folding")) for key in keys}
        for stage, keys in {
            "width": ["taylor-pruning", "magnitude-pruning"],
            "norms": ["norm-folding"],
            "weights": ["biper-binarization"],
            "precision": ["int8-dynamic", "quantized-distillation"],
        }.items()
    }
)


def trial(number: int, score: float, latency: float, size: float, **procedures: float) -> Trial:
    return Trial(
        number=number,
        state="complete",
        procedures={key.replace("_", "-"): strength for key, strength in procedures.items()},
        validation=score,
        ratios={"latency": latency, "size": size},
        reason="",
        seconds=1.0,
    )


BEST = trial(0, 1.0, 0.25, 0.25, taylor_pruning=0.6, norm_folding=1.0, int8_dynamic=0.8)
BEATEN = trial(1, 1.0, 0.5, 0.5, magnitude_pruning=0.3)
LOST = trial(2, 0.0, 0.1, 0.1, taylor_pruning=0.95)


def test_only_what_the_front_needs_is_looked_beside_and_most_things_stay() -> None:
    made = [nearby(PLAN, aims=COSTS, trials=[BEST, BEATEN, LOST], original=1.0, seed=seed) for seed in range(300)]
    found = [choice for choice in made if choice is not None]
    assert len(found) == 300
    same = [c for c in found if {key for key, _ in c.procedures.values()} == set(BEST.procedures)]
    assert 1 - OFTEN <= len(same) / 300 < 1.0  # a change of a method may find no other one
    steps = [choice.procedures["width"][1] - 0.6 for choice in same]
    assert abs(sum(steps) / len(steps)) < 0.02
    assert sum(step**2 for step in steps) / len(steps) == pytest.approx(STEP**2, rel=0.3)
    moved = [choice.procedures["precision"][1] - 0.8 for choice in same]
    assert any(abs(a - b) > 0.01 for a, b in zip(steps, moved, strict=True))  # each strength by itself
    assert {choice.procedures["norms"] for choice in same} == {("norm-folding", 1.0)}
    others = Counter(key for choice in found for key, _ in choice.procedures.values() if key not in BEST.procedures)
    assert {"magnitude-pruning", "biper-binarization", "quantized-distillation"} <= set(others)


def test_strengths_stay_within_bounds_and_combinations_within_the_rules() -> None:
    edge = trial(0, 1.0, 0.25, 0.25, taylor_pruning=0.99, biper_binarization=0.11)
    for seed in range(200):
        choice = nearby(PLAN, aims=COSTS, trials=[edge], original=1.0, seed=seed)
        assert choice is not None
        assert all(LEAST <= strength <= MOST for _, strength in choice.procedures.values())
        assert list(choice.procedures) == [stage for stage in PLAN.stages if stage in choice.procedures]
        check_combination([key for key, _ in choice.procedures.values()])
    with pytest.raises(BadInput):
        check_combination(["biper-binarization", "quantized-distillation"])


def test_the_same_seed_gives_the_same_choice() -> None:
    one, other, third = (nearby(PLAN, aims=COSTS, trials=[BEST], original=1.0, seed=seed) for seed in (7, 7, 8))
    assert one == other != third


def test_where_nothing_holds_volume_the_sampler_is_left_to_choose() -> None:
    assert nearby(PLAN, aims=COSTS, trials=[LOST], original=1.0, seed=0) is None
    failed = BEST.model_copy(update={"state": "failed"})
    assert nearby(PLAN, aims=COSTS, trials=[failed], original=1.0, seed=0) is None
    assert nearby(PLAN, aims=COSTS, trials=[], original=1.0, seed=0) is None
    # A fall of 0.05 is worth something where a tenth may be lost, nothing where it may be 0.001.
    fallen = trial(0, 0.95, 0.25, 0.25, taylor_pruning=0.6)
    assert nearby(PLAN, aims=COSTS, trials=[fallen], original=1.0, seed=0) is not None
    assert nearby(PLAN, aims=COSTS, trials=[fallen], original=1.0, seed=0, span=0.001) is None


def test_what_is_exact_is_never_left_alone() -> None:
    one = trial(0, 1.0, 0.5, 0.5, taylor_pruning=0.6, norm_folding=1.0)
    for seed in range(200):
        choice = nearby(PLAN, aims=COSTS, trials=[one], original=1.0, seed=seed)
        assert choice is not None
        assert {key for key, _ in choice.procedures.values()} != {"norm-folding"}
