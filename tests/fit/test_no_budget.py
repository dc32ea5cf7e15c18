"""``fit`` without a budget: a whole front over every cost, precision procedures alone, and other endings of a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import torchgraft
from torchgraft.contracts.subjects import case
from torchgraft.fit.contribution import LEFT
from torchgraft.fit.endings import FEWER
from torchgraft.fit.finalists import Finalist, Recovered, left_over, other_endings, promising, worth_recovering
from torchgraft.fit.plan import make_plan
from torchgraft.fit.workshop import Choice, Workshop


def test_a_front_of_combinations_and_of_other_endings_of_recovered_models(task_file: Path, tmp_path: Path) -> None:
    result = torchgraft.fit(
        str(task_file),
        costs=["macs", "size"],
        trials=3,
        procedures=["magnitude-pruning", "int8-dynamic", "nupes-power-quant"],
        max_drop=0.2,
        out=tmp_path,
    )
    assert "failed" not in {trial.state for trial in result.record.trials}
    # Strengths are those that were chosen, since there is nothing to aim at.
    first = result.record.trials[0]
    assert first.procedures["magnitude-pruning"] == 0.5
    # In what it ends is chosen when the model is there, here in fewer bits than it was to begin with.
    assert first.procedures["nupes-power-quant"] == FEWER
    small = [c for c in result.front[1:] if c.costs["size"].ratio < 0.5]
    assert small
    assert {row.key for row in result.record.contributions} <= {
        "magnitude-pruning",
        "int8-dynamic",
        "nupes-power-quant",
    }
    assert all(0.0 <= row.lost_without <= 1.0 for row in result.record.contributions)


def test_the_same_recovered_float_model_ends_in_other_precisions() -> None:
    tiny = case("cnn")
    keys = ["magnitude-pruning", "int8-dynamic", "nupes-power-quant"]
    plan = make_plan(tiny.model, tiny.task, wanted=keys, costs=["latency", "size"])
    shop = Workshop(tiny.task, tiny.model, plan, [], ["size"])
    choice = Choice({"width": ("magnitude-pruning", 0.5), "precision": ("nupes-power-quant", 1.0)})
    made = shop.make(choice, 0)
    finished = shop.finish(made.model, made.strengths, 0)
    times = {"latency": 0.6}
    own, scores = "trial-3-recovered", shop.score(finished)
    kept = float(scores.mean())
    recovered = Finalist(own, finished, made.strengths, 7, scores, True, made.model, kept, times)
    found = other_endings(shop, [recovered], math.inf)
    others = [f"int8-dynamic-{strength}" for strength in ("0.8", "1", "0.5")]
    # Rounding has lost nothing, so that more bits come last.
    ways = [*others, "nupes-power-quant-0.8", "nupes-power-quant-0.5"]
    assert [each.name for each in found] == [f"{own}-{way}" for way in ways]
    assert found[3].strengths == {"magnitude-pruning": 0.5, "nupes-power-quant": 0.8}
    sizes = {shop.quick_ratios(each.model, ["size"])["size"] for each in (recovered, *found)}
    assert len(sizes) == 6
    # Where it has lost more than a tenth of the span that counts, which is a tenth of the score, they come first.
    told = 0.01 * float(shop.validation.mean())
    for fall, first in ((0.9 * told, others[0]), (1.1 * told, ways[3])):
        recovered.float_score = kept + fall
        assert other_endings(shop, [recovered], math.inf)[0].name == f"{own}-{first}"
    for each in found:
        assert torch.equal(each.scores, shop.score(each.model))
        assert each.steps == 7
        assert not each.polished
        # Weights that are stored otherwise take the same time; int8 is executed otherwise.
        assert each.times == (times if "nupes-power-quant" in each.strengths else {})
    assert other_endings(shop, [recovered], 0.0) == []  # no time is left


def test_precision_alone_is_a_trial_like_any_other(task_file: Path, tmp_path: Path) -> None:
    result = torchgraft.fit(
        str(task_file), costs=["macs", "size"], trials=1, procedures=["int8-dynamic"], max_drop=0.2, out=tmp_path
    )
    assert [(list(t.procedures), t.state) for t in result.record.trials] == [(["int8-dynamic"], "complete")]
    assert result.front[-1].costs["size"].ratio < 0.6


class _Shop:
    """As much of a workshop as choosing finalists needs."""

    costs = ("macs",)
    span = None
    validation = torch.tensor([1.0])

    def quick_ratios(self, model: float, costs: Sequence[str]) -> dict[str, float]:
        return dict.fromkeys(costs, model)


class _Trial:
    def __init__(self, score: float, ratio: float) -> None:
        self.user_attrs = {"record": {"validation": score, "ratios": {"macs": ratio}}}


def test_deep_cuts_that_recovery_can_mend_are_recovered_too() -> None:
    shop: Any = _Shop()
    mild, twin, deep = _Trial(1.0, 0.5), _Trial(0.99, 0.5), _Trial(0.9, 0.25)
    every: Any = [mild, twin, deep]
    # By hand, 0.35 of a fall is left and a tenth lost is nothing kept: mild, which has lost nothing, holds 1 x 1 as it
    # is, twin would hold 0.965 x 1 within that, and deep, worth nothing yet, 0.65 x 2 halvings.
    assert worth_recovering(shop, every, []) is deep
    # Once it is recovered nothing is promised beyond what is held; the largest goes on.
    found: Any = Recovered(deep, 0.97)  # type: ignore[arg-type]
    assert worth_recovering(shop, every, [found]) is mild
    assert worth_recovering(shop, every[2:], [found]) is None


def test_what_is_held_already_need_not_be_recovered() -> None:
    shop: Any = _Shop()
    better, cut = _Trial(1.05, 0.5), _Trial(0.97, 0.4)  # one that is better than the original holds 1.5 x 1
    every: Any = [better, cut]
    # cut: 0.7 x 1.32 as it is, 0.895 x 1.32 hoped, 0.895 x 0.32 of it beyond better's.
    assert worth_recovering(shop, every, []) is cut


def test_what_the_first_recovery_mends_decides_what_is_next() -> None:
    shop: Any = _Shop()
    first, mild, deep = _Trial(0.95, 0.25), _Trial(0.99, 0.5), _Trial(0.8, 0.125)
    every: Any = [mild, first, deep]
    assert left_over(shop, []) == LEFT == 0.35
    # Held: mild 0.9 x 1 and first 0.5 x 2 of it 0.5 beyond. Hoped: first 0.825 x 2, deep 0.3 x 3 (0.3 beyond first's).
    assert worth_recovering(shop, every, []) is first
    mended, stuck = Recovered(first, 1.0), Recovered(first, 0.95)  # type: ignore[arg-type]
    # By hand: (0.5 x 0.35 + 0) / 1.5, so that deep is hoped to lose 0.0233, 0.767 x 3 halvings, 0.767 beyond first's.
    assert left_over(shop, [mended]) == pytest.approx(0.175 / 1.5)
    assert worth_recovering(shop, every, [mended]) is deep
    # A recovery that mends nothing: (0.175 + 1) / 1.5 is left, and deep is worth nothing; mild adds 0.02 x 1.
    assert left_over(shop, [stuck]) == pytest.approx(1.175 / 1.5)
    assert worth_recovering(shop, every, [stuck]) is mild
    # One that had hardly fallen says nothing.
    assert left_over(shop, [Recovered(_Trial(0.995, 0.5), 1.0)]) == LEFT  # type: ignore[arg-type]


def test_endings_that_add_nothing_are_not_measured() -> None:
    shop: Workshop = _Shop()  # type: ignore[assignment]

    def one(name: str, score: float, ratio: float) -> Finalist:
        return Finalist(name, ratio, {}, 0, torch.tensor([score]))  # type: ignore[arg-type]

    good, worse, small = one("good", 1.0, 0.5), one("worse", 0.95, 0.6), one("small", 0.95, 0.25)
    assert promising(shop, [good, worse, small], 2) == [good, small]
    # What is known is not measured: known to be larger, "small" adds nothing.
    small.times = {"macs": 0.7}
    assert promising(shop, [good, worse, small], 2) == [good]
    assert promising(shop, [good, worse], 5) == [good, worse]
