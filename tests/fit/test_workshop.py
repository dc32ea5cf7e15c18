"""A choice is made to lie just inside the budget, and is measured in every cost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import torchgraft
from torchgraft.bench.tasks import load_task
from torchgraft.contracts.subjects import case
from torchgraft.engines import width
from torchgraft.engines.control_flow import execution
from torchgraft.engines.control_flow.execution import RunCompiled
from torchgraft.engines.control_flow.passes import Passes
from torchgraft.engines.distill import Teacher
from torchgraft.engines.surgery.edits import history
from torchgraft.engines.width import prepare
from torchgraft.fit.budget import Limit
from torchgraft.fit.plan import make_plan
from torchgraft.fit.workshop import LAST, SLACK, Choice, Workshop

COSTS = ("macs", "params", "size")


def _workshop(task_file: Path, bound: float) -> Workshop:
    task = load_task(str(task_file))
    plan = make_plan(task.trained(), task, wanted=["magnitude-pruning", "int8-dynamic"], costs=COSTS)
    return Workshop(task, task.trained(), plan, [Limit("macs", bound, True, f"macs={bound}x")], COSTS)


def _choice(target: float = 1.0, strength: float = 0.5) -> Choice:
    return Choice({"width": ("magnitude-pruning", strength)}, target)


@pytest.mark.parametrize("bound", [0.8, 0.5, 0.35])
@pytest.mark.parametrize("guess", [0.05, 0.5, 1.0])
def test_the_solved_strength_meets_the_budget_and_wastes_little(task_file: Path, bound: float, guess: float) -> None:
    workshop = _workshop(task_file, bound)
    made = workshop.make(_choice(strength=guess), seed=0)
    assert made.met
    assert made.ratios.keys() == set(COSTS)
    # As little as the model's widths allow: eight units of 32 are one step.
    assert SLACK * bound - 0.25 < made.ratios["macs"] <= bound


def test_a_target_is_a_share_of_the_budget(task_file: Path) -> None:
    made = _workshop(task_file, 0.8).make(_choice(target=0.5), seed=0)
    assert made.ratios["macs"] <= 0.4


def test_what_misses_its_target_within_the_budget_is_measured_in_full(task_file: Path) -> None:
    farthest = _workshop(task_file, 1e-6).make(_choice(), seed=0)
    assert not farthest.met
    workshop = _workshop(task_file, farthest.ratios["macs"] * 1.2)
    made = workshop.make(_choice(target=0.7), seed=0)
    assert not made.met
    assert workshop.load(made.ratios) <= 1.0
    assert made.ratios.keys() == set(COSTS)


def test_what_was_only_noted_is_not_trained_before_its_precision() -> None:
    tiny = case("cnn")
    plan = make_plan(tiny.model, tiny.task, wanted=["norm-folding", "magnitude-pruning", "int8-dynamic"])
    shop = Workshop(tiny.task, tiny.model, plan, [], ["size"])
    noted = shop.make(Choice({"norms": ("norm-folding", 1.0), "precision": ("int8-dynamic", 1.0)}), 0).model
    assert noted is not tiny.model
    before = {name: value.clone() for name, value in noted.state_dict().items()}
    assert shop.recover(noted, steps=2, seed=0) == 0
    assert all(torch.equal(value, before[name]) for name, value in noted.state_dict().items())
    cut = shop.make(Choice({"width": ("magnitude-pruning", 0.5), "norms": ("norm-folding", 1.0)}), 0).model
    assert shop.recover(cut, steps=2, seed=0) == 2


def _shop_with_programs(monkeypatch: pytest.MonkeyPatch, *others: str) -> Workshop:
    """Return a workshop whose plan has a compiled pass, whatever the machine's clock says of it."""
    monkeypatch.setattr(Passes, "_why_slow", lambda self, model, task: "")
    tiny = case("cnn")
    costs, wanted = ["latency", "size"], ["magnitude-pruning", "int8-dynamic", "dycl-compile", *others]
    plan = make_plan(tiny.model, tiny.task, wanted=wanted, costs=costs)
    assert list(plan.stages) == ["width", "precision", "execution"]
    return Workshop(tiny.task, tiny.model, plan, [], costs)


def test_execution_comes_last_and_scores_of_trials_do_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    shop = _shop_with_programs(monkeypatch)
    strengths = {"width": ("magnitude-pruning", 0.5), "precision": ("int8-dynamic", 1.0)}
    made = shop.make(Choice({**strengths, "execution": ("dycl-compile", 1.0)}), 0)
    assert "forward" not in made.model.__dict__  # what recovery trains
    assert made.ratios == {}  # without a budget nothing is aimed at, and the trial is measured when it is trained
    finished = shop.finish(made.model, made.strengths, 0)
    assert isinstance(history(finished)[-1], RunCompiled)
    with torch.no_grad():
        finished(shop.task.example)
    assert finished.__dict__["forward"].compiled(shop.task.example)
    without = shop.finish(made.model, made.strengths, 0, stages=LAST[:1])
    assert history(without) == history(finished)[:-1]
    compiled: list[nn.Module] = []
    monkeypatch.setattr(execution, "compiled_pass", lambda model, *given: compiled.append(model))
    assert shop.score_of(made, 0) == float(shop.score(without).mean())
    assert compiled == []
    assert abs(float(shop.score(finished).mean()) - shop.score_of(made, 0)) <= 1 / len(shop.task.val)


def test_the_original_answers_by_the_fastest_way_where_it_is_asked_more_than_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = _shop_with_programs(monkeypatch, "bfloat16-passes")
    assert kept._guide.keeps
    assert kept._guide.model is kept.original  # no program would pay for one answer each
    monkeypatch.setattr("torchgraft.fit.workshop.KEPT_BATCHES", 0)
    for others, numbers in (((), None), (("bfloat16-passes",), "bfloat16")):
        shop = _shop_with_programs(monkeypatch, *others)
        guide = shop._guide
        assert not guide.keeps
        assert history(guide.model)[-1] == RunCompiled.on(shop.task.example, numbers)
        assert "forward" not in shop.original.__dict__
    without = make_plan(shop.original, shop.task, wanted=["magnitude-pruning"], costs=["size"])
    assert Workshop(shop.task, shop.original, without, [], ["size"])._guide.model is shop.original


def test_answers_that_depend_on_the_batch_come_by_the_fastest_way(monkeypatch: pytest.MonkeyPatch) -> None:
    shop = _shop_with_programs(monkeypatch)
    monkeypatch.setattr(Teacher, "_separable", lambda self: False)
    assert not shop._guide.keeps
    assert isinstance(history(shop._guide.model)[-1], RunCompiled)


def test_what_rounds_is_scored_as_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    shop = _shop_with_programs(monkeypatch, "bfloat16-passes")
    width = {"width": ("magnitude-pruning", 0.5)}
    for key, edits in (("dycl-compile", 1), ("bfloat16-passes", 2)):
        made = shop.make(Choice({**width, "execution": (key, 1.0)}), 0)
        scored = shop.as_scored(made.model, made.strengths, 0)
        assert len(history(scored)) == edits
        assert shop.score_of(made, 0) == float(shop.score(scored).mean())


def test_several_models_are_timed_in_turns_each_over_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    shop = _shop_with_programs(monkeypatch)
    first, second = (shop.make(Choice({"width": ("magnitude-pruning", s)}), 0).model for s in (0.3, 0.9))

    def told(models: list[nn.Module], example: object, *, rounds: int) -> np.ndarray:
        assert models == [shop.original, first, second]
        seconds = np.tile([2.0, 1.0, 0.5], (rounds, 1))
        seconds[0] *= 7.0  # a slow round is slow for all of them
        return seconds

    monkeypatch.setattr("torchgraft.fit.workshop.interleaved", told)
    found = shop.quick_ratios_of([first, second])
    assert [ratios["latency"] for ratios in found] == [0.5, 0.25]
    assert found[0]["size"] > found[1]["size"] > 0.0
    assert shop.quick_ratios(first, ["size"]) == {"size": found[0]["size"]}


def test_under_a_budget_what_runs_a_model_alone_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shop = _shop_with_programs(monkeypatch, "bfloat16-passes")
    shop.limits = (Limit("latency", 1000.0, True, "latency=1000x"),)
    measured: list[nn.Module] = []
    quick = shop.quick_ratios_of
    monkeypatch.setattr(shop, "quick_ratios_of", lambda models, costs: measured.extend(models) or quick(models, costs))
    made = shop.make(Choice({"execution": ("bfloat16-passes", 0.5)}), 0)
    assert made.met
    assert made.model is shop.original  # there is nothing to recover
    assert set(made.ratios) == {"latency", "size"}
    assert len(measured) == 2  # for the cost of the budget, and for the others


def test_a_run_of_nothing_but_what_is_exact_ends_well(tmp_path: Path) -> None:
    tiny = case("cnn")
    result = torchgraft.fit(tiny.task, costs=["size"], trials=2, procedures=["norm-folding"], out=tmp_path)
    assert {tuple(trial.procedures) for trial in result.record.trials} == {("norm-folding",)}
    assert result.front[0].name == "original"


def test_what_can_be_cut_in_a_shortened_model_is_found_once_and_training_does_not_reach_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny = case("transformer")
    plan = make_plan(tiny.model, tiny.task, wanted=["chain-of-layers", "magnitude-pruning"], costs=["size"])
    shop = Workshop(tiny.task, tiny.model, plan, [], ["size"])
    traced: list[nn.Module] = []
    monkeypatch.setattr(
        width, "prepare", lambda model, *given, **named: (traced.append(model), prepare(model, *given, **named))[1]
    )
    depth = {"depth": ("chain-of-layers", 0.5)}
    choices = [Choice({**depth, "width": ("magnitude-pruning", strength)}) for strength in (0.4, 0.9)]
    models = [shop.make(choice, seed).model for seed, choice in enumerate(choices)]
    assert len(traced) == 1
    assert sum(p.numel() for p in models[0].parameters()) > sum(p.numel() for p in models[1].parameters())
    # A model that only lost layers is its trial's own.
    first, second = (shop.make(Choice(depth), seed).model for seed in (0, 1))
    before = {name: value.clone() for name, value in second.state_dict().items()}
    assert shop.recover(first, steps=2, seed=0) == 2
    third = shop.make(Choice(depth), 2).model
    for model in (second, third):
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not all(torch.equal(value, before[name]) for name, value in first.state_dict().items())
