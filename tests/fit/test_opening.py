"""The first trials of a run: what is expected by hand, steps up while they gain, blame and credit, each alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import cast

import pytest

from torchgraft.engines.procedure import Procedure
from torchgraft.fit import opening as first_choices
from torchgraft.fit.endings import LITTLE, USUAL
from torchgraft.fit.experience import Known, known
from torchgraft.fit.opening import COMBINED, LEAST, RUNGS, STARTUP, alone, ascent, descent
from torchgraft.fit.plan import Plan
from torchgraft.report.records import Trial

COSTS = ("latency", "size")


def plan_of(**stages: Sequence[str]) -> Plan:
    """A plan of real keys, whose procedures are never run."""

    def member(key: str) -> Procedure:
        return cast(Procedure, SimpleNamespace(expense=1, exact=key in ("norm-folding", "dycl-compile")))

    return Plan({stage: {key: member(key) for key in keys} for stage, keys in stages.items()})


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
        return math.prod(row.kept for row in rows) * math.prod(halvings) / (1 + sum(row.seconds - 1 for row in rows))

    assert worth(width, precision) > max(worth(width), worth(precision))
    chosen = ascent(PLAN, aims=COSTS)
    assert chosen is not None
    assert chosen.procedures == {"width": ("taylor-pruning", RUNGS[0]), "precision": ("int8-dynamic", USUAL)}


def test_what_holds_its_score_is_taken_further_and_what_does_not_is_left() -> None:
    both = {"taylor-pruning": RUNGS[0], "int8-dynamic": USUAL}
    # Of a fall of 0.02 recovery leaves 0.007, of a tenth that may be lost: less than is held where a rung is leapt.
    some = trial(0, both, 0.98, 0.5, 0.2)
    further = ascent(PLAN, aims=COSTS, trials=[some])
    assert further is not None
    assert further.procedures["width"] == ("taylor-pruning", RUNGS[1])
    # By hand: 0.93 x 2.32 halvings are held; of a fall of 0.5 recovery leaves 0.175, more than may be lost.
    lost = trial(1, both | {"taylor-pruning": RUNGS[1]}, 0.5, 2**-1.5, 2**-3.0)
    other = ascent(PLAN, aims=COSTS, trials=[some, lost])
    assert other is not None
    assert len(other.procedures) == 1
    # A step that gained is followed by the next one.
    gained = trial(1, both | {"taylor-pruning": RUNGS[1]}, 0.98, 2**-1.5, 2**-3.0)
    top = ascent(PLAN, aims=COSTS, trials=[some, gained])
    assert top is not None
    assert top.procedures["width"] == ("taylor-pruning", RUNGS[2])


def test_where_nothing_is_lost_a_rung_is_leapt_and_taken_later_if_that_was_too_far() -> None:
    both = {"taylor-pruning": RUNGS[0], "int8-dynamic": USUAL}
    held = trial(0, both, 1.0, 0.5, 0.2)
    leap = ascent(PLAN, aims=COSTS, trials=[held])
    assert leap is not None
    assert leap.procedures["width"] == ("taylor-pruning", RUNGS[2])
    far = trial(1, both | {"taylor-pruning": RUNGS[2]}, 0.5, 2**-2.0, 2**-3.5)
    back = ascent(PLAN, aims=COSTS, trials=[held, far])
    assert back is not None
    assert back.procedures["width"] == ("taylor-pruning", RUNGS[1])
    between = trial(2, both | {"taylor-pruning": RUNGS[1]}, 1.0, 2**-1.5, 2**-3.0)
    other = ascent(PLAN, aims=COSTS, trials=[held, far, between])
    assert other is None or len(other.procedures) == 1
    # A leap that holds too goes on from where it is, and the last rung is not leapt over.
    fine = trial(1, both | {"taylor-pruning": RUNGS[2]}, 1.0, 2**-2.0, 2**-3.5)
    last = ascent(PLAN, aims=COSTS, trials=[held, fine])
    assert last is not None
    assert last.procedures["width"] == ("taylor-pruning", RUNGS[3])


def test_one_precision_stands_for_whichever_ended_a_trial() -> None:
    plan = plan_of(width=["taylor-pruning"], precision=["int8-dynamic", "nupes-power-quant"])
    first = ascent(plan, aims=COSTS)
    assert first is not None
    assert first.free_ending
    (standing,) = (key for stage, (key, _) in first.procedures.items() if stage == "precision")
    (other,) = set(plan.stages["precision"]) - {standing}
    seen = [trial(0, {"taylor-pruning": RUNGS[0], other: 1.0}, 0.98, 0.5, 0.2)]
    further = ascent(plan, aims=COSTS, trials=seen)
    assert further is not None
    assert further.procedures == {"width": ("taylor-pruning", RUNGS[1]), "precision": (standing, USUAL)}
    # Under a budget each is tried as it is.
    under = descent(plan, needs={"size": 0.2})
    assert under is not None
    assert not under.free_ending
    assert not any(choice.free_ending for choice in alone(plan, aims=COSTS))


def test_how_a_model_runs_is_chosen_at_its_end_without_a_budget() -> None:
    ways = ["bfloat16-passes", "dycl-compile"]
    plan = plan_of(width=["taylor-pruning"], execution=ways)
    first = ascent(plan, aims=COSTS)
    assert first is not None
    assert first.procedures["execution"] == ("dycl-compile", 1.0)
    # Whichever it was, the next trial is the same combination, deeper.
    for way in ways:
        seen = [trial(0, {"taylor-pruning": RUNGS[0], way: 1.0}, 0.98, 0.5, 0.5)]
        further = ascent(plan, aims=COSTS, trials=seen)
        assert further is not None
        assert further.procedures == {"width": ("taylor-pruning", RUNGS[1]), "execution": ("dycl-compile", 1.0)}
    # Where nothing exact runs it, Python does, until its end.
    rounds = plan_of(width=["taylor-pruning"], execution=ways[:1])
    begun = ascent(rounds, aims=COSTS)
    assert begun is not None
    assert set(begun.procedures) == {"width"}
    seen = [trial(0, {"taylor-pruning": RUNGS[0], ways[0]: 1.0}, 0.98, 0.5, 0.5)]
    further = ascent(rounds, aims=COSTS, trials=seen)
    assert further is not None
    assert further.procedures == {"width": ("taylor-pruning", RUNGS[1])}
    assert ascent(plan_of(execution=ways[:1]), aims=COSTS) is None  # the sampler's


def test_under_a_budget_on_latency_what_rounds_is_a_way_like_any_other() -> None:
    plan = plan_of(width=["taylor-pruning"], execution=["bfloat16-passes", "dycl-compile"])
    first = descent(plan, needs={"latency": 0.7})
    assert first is not None
    assert first.procedures == {"execution": ("bfloat16-passes", 1.0)}  # it has lost nothing where it was measured
    tried: list[Trial] = []
    while (choice := descent(plan, needs={"size": 0.5}, trials=tried)) is not None:
        assert choice.procedures["execution"] == ("dycl-compile", 1.0)
        tried.append(trial(len(tried), dict(choice.procedures.values()), 0.9, 0.5, 0.5))
    assert len(tried) == 1  # of a budget on size it meets nothing


def test_a_combination_that_breaks_the_model_is_not_taken_further() -> None:
    both = {"taylor-pruning": RUNGS[0], "int8-dynamic": USUAL}
    broken = trial(0, both, 0.1, 0.5, 0.2)
    chosen = ascent(PLAN, aims=COSTS, trials=[broken])
    assert chosen is not None
    assert set(chosen.procedures) != {"width", "precision"}


def test_what_has_lost_all_that_may_be_lost_comes_again_at_half_its_strength() -> None:
    alone_ = plan_of(width=["taylor-pruning"])
    lost = trial(0, {"taylor-pruning": 0.5}, 0.8, 0.5, 0.5)
    # Of a fall of 0.2 recovery leaves 0.03: worth something where a tenth may be lost, nothing where 0.02 may.
    assert ascent(alone_, aims=COSTS, trials=[lost]) is not None
    again = ascent(alone_, aims=COSTS, trials=[lost], span=0.02)
    assert again is not None
    assert again.procedures == {"width": ("taylor-pruning", 0.25)}
    least = trial(1, {"taylor-pruning": 0.25}, 0.8, 0.8, 0.8)
    last = ascent(alone_, aims=COSTS, trials=[lost, least], span=0.02)
    assert last is not None
    assert last.procedures == {"width": ("taylor-pruning", 0.125)}
    nothing = trial(2, {"taylor-pruning": 0.125}, 0.8, 0.9, 0.9)
    assert ascent(alone_, aims=COSTS, trials=[lost, least, nothing], span=0.02) is None


def test_it_ends_with_the_rungs_or_when_the_sampler_has_enough() -> None:
    alone = plan_of(precision=["int8-dynamic"])
    first = ascent(alone, aims=COSTS)
    assert first is not None
    assert first.procedures == {"precision": ("int8-dynamic", USUAL)}
    done = trial(0, {"int8-dynamic": USUAL}, 1.0, 1.0, 0.3)
    assert ascent(alone, aims=COSTS, trials=[done]) is None
    many = [trial(number, {"taylor-pruning": 0.5}, 1.0, 0.9, 0.9) for number in range(STARTUP)]
    assert ascent(PLAN, aims=COSTS, trials=many) is None


@pytest.mark.parametrize("pair", [("stitchable-nets", "int8-dynamic")])
def test_what_has_no_place_is_not_combined(pair: tuple[str, str]) -> None:
    # An elastic procedure has no stage; with it nothing is allowed and nothing chosen.
    assert ascent(plan_of(width=[pair[0]]), aims=COSTS) is None


BUDGETED = plan_of(depth=["chain-of-layers"], width=["taylor-pruning"], precision=["int8-dynamic"])


def test_under_a_budget_the_combination_that_is_expected_to_keep_most_comes_first() -> None:
    depth, width = known("chain-of-layers", 1), known("taylor-pruning", 1)
    h = {"depth": depth.halvings["latency"], "width": width.halvings["latency"]}
    both = h["depth"] + h["width"]
    # One halving is needed. By hand: together they are stretched least, and each stretch counts by its square.
    kept_by = {
        "depth": depth.kept ** (1 / h["depth"]) ** 2,
        "width": width.kept ** (1 / h["width"]) ** 2,
        "both": (depth.kept * width.kept) ** (1 / both) ** 2,
    }
    times = {"depth": depth.seconds, "width": width.seconds, "both": depth.seconds + width.seconds - 1}
    worth = {key: value / times[key] for key, value in kept_by.items()}
    plan = plan_of(depth=["chain-of-layers"], width=["taylor-pruning"])
    chosen = descent(plan, needs={"latency": 0.5})
    assert chosen is not None
    names = {"depth": {"depth"}, "width": {"width"}, "both": {"depth", "width"}}
    best = max(worth, key=worth.__getitem__)
    assert set(chosen.procedures) == names[best]
    stretch = 1 / (both if best == "both" else h[best])
    assert all(strength == pytest.approx(0.5 * stretch) for _, strength in chosen.procedures.values())
    # A mild budget asks for little of each.
    mild = descent(BUDGETED, needs={"latency": 0.97})
    assert mild is not None
    assert {s for stage, (_, s) in mild.procedures.items() if stage != "precision"} <= {LEAST}


def test_what_disappoints_is_blamed_and_each_combination_is_tried_once() -> None:
    first = descent(BUDGETED, needs={"latency": 0.5})
    assert first is not None
    trials: list[Trial] = []
    seen = []
    for number in range(COMBINED):
        choice = descent(BUDGETED, needs={"latency": 0.5}, trials=trials)
        assert choice is not None
        keys = {key for key, _ in choice.procedures.values()}
        assert keys not in seen
        seen.append(keys)
        # Cuts in depth destroy this model; all else keeps its score.
        score = 0.2 if "chain-of-layers" in keys else 1.0
        trials.append(trial(number, dict(choice.procedures.values()), score, 0.5, 0.5))
    assert descent(BUDGETED, needs={"latency": 0.5}, trials=trials) is None
    # After the first, both combinations that can reach the budget without it come before those with it.
    assert ["chain-of-layers" in keys for keys in seen[:4]] == [True, False, False, True]
    # int8 alone keeps everything, and is far from halving the time.
    assert {"int8-dynamic"} not in seen


def test_each_alone_follows_by_price() -> None:
    choices = alone(BUDGETED, aims=["latency"])
    keys = [next(iter(choice.procedures.values()))[0] for choice in choices]
    prices = [known(key, 1).seconds / max(known(key, 1).gain(["latency"]), 0.01) for key in keys]
    assert prices == sorted(prices)
    assert keys[0] == "chain-of-layers"


def test_a_large_step_costs_more_than_in_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {
        "chain-of-layers": Known(kept=0.5, halvings={"latency": 2.0}, seconds=3.0),
        "taylor-pruning": Known(kept=0.8, halvings={"latency": 1.0}, seconds=3.0),
    }
    monkeypatch.setattr(first_choices, "known", lambda key, expense: facts[key])
    chosen = descent(plan_of(depth=["chain-of-layers"], width=["taylor-pruning"]), needs={"latency": 0.25})
    assert chosen is not None
    # By hand, two halvings: 0.5 in one step against 0.8^4 = 0.41; in proportion it would be 0.8^2 = 0.64.
    assert set(chosen.procedures) == {"depth"}


def test_what_is_exact_is_in_every_combination_at_full_strength_and_never_alone() -> None:
    plan = plan_of(width=["taylor-pruning"], norms=["norm-folding"], precision=["int8-dynamic"])
    seen: list[Trial] = []
    while (choice := ascent(plan, aims=COSTS, trials=seen)) is not None:
        assert choice.procedures["norms"] == ("norm-folding", 1.0)
        assert len(choice.procedures) > 1
        seen.append(trial(len(seen), dict(choice.procedures.values()), 1.0, 0.5, 0.5))
    widths = [t.procedures["taylor-pruning"] for t in seen if "taylor-pruning" in t.procedures]
    # Its own strength of 1 does not hide that of the others; where nothing is lost the second rung is leapt over.
    assert sorted(set(widths)) == [RUNGS[0], *RUNGS[2:]]
    under = descent(plan, needs={"latency": 0.5})
    assert under is not None
    assert under.procedures["norms"] == ("norm-folding", 1.0)
    assert [set(choice.procedures) for choice in alone(plan, aims=COSTS)] in (
        [{"width"}, {"precision"}],
        [{"precision"}, {"width"}],
    )
    assert ascent(plan_of(norms=["norm-folding"]), aims=COSTS) is None
    assert alone(plan_of(norms=["norm-folding"]), aims=COSTS) == []


def test_the_other_procedures_of_its_stage_may_take_the_place_of_what_is_exact() -> None:
    plan = plan_of(norms=["norm-folding", "norm-removal"], width=["taylor-pruning"])
    first = ascent(plan, aims=COSTS)
    assert first is not None
    tried = [trial(0, dict(first.procedures.values()), 1.0, 0.5, 0.5)]
    seen = {frozenset(first.procedures.values())}
    while (choice := ascent(plan, aims=COSTS, trials=tried)) is not None:
        seen.add(frozenset(choice.procedures.values()))
        tried.append(trial(len(tried), dict(choice.procedures.values()), 1.0, 0.5, 0.5))
    keys = [{key for key, _ in each} for each in seen]
    assert any("norm-removal" in each for each in keys)
    assert not any({"norm-removal", "norm-folding"} <= each for each in keys)


def test_what_adds_a_procedure_begins_where_the_combination_was_worth_most() -> None:
    plan = plan_of(depth=["chain-of-layers"], rank=["svd-truncation"])
    # It gains up to the third rung and loses all at the fourth.
    seen = [
        trial(number, {"chain-of-layers": rung}, score, 2 ** (-8 * rung), 2 ** (-8 * rung))
        for number, (rung, score) in enumerate(zip(RUNGS, (1.0, 1.0, 1.0, 0.0), strict=True))
    ]
    added = ascent(plan, aims=COSTS, trials=seen)
    assert added is not None
    assert added.procedures == {"depth": ("chain-of-layers", RUNGS[2]), "rank": ("svd-truncation", RUNGS[2])}
    # Where nothing was gained it begins from the bottom.
    lost = [trial(0, {"chain-of-layers": RUNGS[0]}, 0.0, 0.5, 0.5), trial(1, {"chain-of-layers": 0.25}, 0.0, 0.5, 0.5)]
    lost.append(trial(2, {"chain-of-layers": 0.125}, 0.0, 0.9, 0.9))
    lost.append(trial(3, {"svd-truncation": RUNGS[0]}, 0.0, 0.5, 0.5))
    lost += [trial(4, {"svd-truncation": 0.25}, 0.0, 0.5, 0.5), trial(5, {"svd-truncation": 0.125}, 0.0, 0.9, 0.9)]
    fresh = ascent(plan, aims=COSTS, trials=lost)
    assert fresh is not None
    assert fresh.procedures == {"depth": ("chain-of-layers", RUNGS[0]), "rank": ("svd-truncation", RUNGS[0])}


def test_what_adds_a_procedure_to_a_precision_alone_begins_at_the_first_rung() -> None:
    plan = plan_of(width=["taylor-pruning"], precision=["int8-dynamic"])
    done = trial(0, {"int8-dynamic": USUAL}, 1.0, 1.0, 0.3)
    chosen = ascent(plan, aims=COSTS, trials=[done])
    assert chosen is not None
    assert chosen.procedures["width"] == ("taylor-pruning", RUNGS[0])


def test_another_procedure_of_the_stage_begins_where_the_first_was_worth_most() -> None:
    plan = plan_of(width=["taylor-pruning", "magnitude-pruning"])
    first = ascent(plan, aims=COSTS)
    assert first is not None
    ((key, _),) = first.procedures.values()
    other = {"taylor-pruning": "magnitude-pruning", "magnitude-pruning": "taylor-pruning"}[key]
    seen = [
        trial(number, {key: rung}, score, 2 ** (-8 * rung), 2 ** (-8 * rung))
        for number, (rung, score) in enumerate(zip(RUNGS, (1.0, 1.0, 0.0, 0.0), strict=True))
    ]
    chosen = ascent(plan, aims=COSTS, trials=seen)
    assert chosen is not None
    assert chosen.procedures == {"width": (other, RUNGS[1])}
    # Two stages away it is another matter, of which nothing is known.
    plan = plan_of(width=["taylor-pruning"], rank=["svd-truncation"])
    seen = [
        trial(number, {"taylor-pruning": rung}, score, 2 ** (-8 * rung), 2 ** (-8 * rung))
        for number, (rung, score) in enumerate(zip(RUNGS, (1.0, 1.0, 0.0, 0.0), strict=True))
    ]
    seen.append(trial(4, {"taylor-pruning": RUNGS[1], "svd-truncation": RUNGS[1]}, 0.0, 0.5, 0.5))
    chosen = ascent(plan, aims=COSTS, trials=seen)
    assert chosen is None or chosen.procedures != {"rank": ("svd-truncation", RUNGS[1])}
