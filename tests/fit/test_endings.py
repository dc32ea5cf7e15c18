"""In which precision a trial ends, and how it runs: by hand on tables of scores and costs, and on real models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchgraft.contracts.subjects import case
from torchgraft.engines.control_flow.execution import RunCompiled
from torchgraft.engines.control_flow.passes import Passes
from torchgraft.engines.surgery.edits import history
from torchgraft.errors import BadInput
from torchgraft.fit.endings import FEWER, MORE, USUAL, chosen_ending, chosen_execution
from torchgraft.fit.plan import make_plan
from torchgraft.fit.search import Effort, run_trial
from torchgraft.fit.workshop import Choice, Made, Workshop

CODES, POWERS, INT8 = "quantized-distillation", "nupes-power-quant", "int8-dynamic"
Ending = tuple[str, float]


@dataclass
class _Shop:
    """A workshop whose models are their strengths; scores and sizes stand in a table, a score of -1 is refused."""

    table: Mapping[Ending, tuple[float, float]]
    plain: float
    asked: list[Ending] = field(default_factory=list)
    costs: tuple[str, ...] = ("latency", "size")
    span: float | None = None
    validation: Tensor = field(default_factory=lambda: torch.tensor([1.0]))
    timed: tuple[str, ...] = (INT8,)

    @property
    def plan(self) -> Any:
        members = {key: SimpleNamespace(timed=key in self.timed) for key in (CODES, POWERS, INT8)}
        return SimpleNamespace(stages={"width": {"taylor-pruning": None}, "precision": members})

    def _ending(self, model: Mapping[str, float]) -> Ending | None:
        return next(((k, s) for k, s in model.items() if k in self.plan.stages["precision"]), None)

    def finish(
        self, model: object, strengths: Mapping[str, float], seed: int, *, stages: Sequence[str]
    ) -> dict[str, float]:
        assert "execution" not in stages
        return dict(strengths) | {"precise": float("precision" in stages)}

    def score(self, model: Mapping[str, float]) -> Tensor:
        ending = self._ending(model)
        if ending is None:
            return torch.tensor([self.plain])
        self.asked.append(ending)
        if self.table[ending][0] < 0:
            raise BadInput("NaN")
        return torch.tensor([self.table[ending][0]])

    def quick_ratios(self, model: Mapping[str, float], costs: Sequence[str]) -> dict[str, float]:
        assert list(costs) == ["size"]  # no time decides
        ending = self._ending(model)
        assert ending is not None
        return {"size": self.table[ending][1]}


def _made() -> Made:
    return Made(nn.Identity(), {"taylor-pruning": 0.7, CODES: USUAL, "dycl-compile": 1.0})


def _chosen(shop: Any) -> tuple[dict[str, float], float]:
    made = _made()
    model, score = chosen_ending(shop, made, 0)
    assert dict(model) == made.strengths | {"precise": 1.0}  # the model is the one that was scored
    return made.strengths, score


def test_the_ending_that_holds_most_is_taken_by_hand() -> None:
    table = {
        (CODES, USUAL): (0.85, 0.0625),
        (POWERS, USUAL): (0.94, 0.125),
        (POWERS, FEWER): (0.92, 0.0625),
        (POWERS, MORE): (0.95, 0.177),
    }
    shop: Any = _Shop(table, plain=0.95)
    strengths, score = _chosen(shop)
    # Of the float model's fall of 0.05 recovery mends 0.0325, and a tenth lost is nothing kept: codes would keep
    # nothing, powers (0.4 + 0.325) x 3 = 2.175, with fewer bits (0.2 + 0.325) x 4 = 2.1, with more 0.825 x 2.5 = 2.06.
    assert strengths == {"taylor-pruning": 0.7, POWERS: USUAL, "dycl-compile": 1.0}
    assert list(strengths) == ["taylor-pruning", POWERS, "dycl-compile"]  # the order in which they are applied
    assert score == pytest.approx(0.94)
    assert shop.asked == [(CODES, USUAL), (POWERS, USUAL), (POWERS, FEWER), (POWERS, MORE)]
    # Where the float model has lost more, more is mended, 0.065, and fewer bits hold more: 1.05 x 3, 0.85 x 4.
    deeper: Any = _Shop(table, plain=0.9)
    assert _chosen(deeper)[0][POWERS] == FEWER
    assert (POWERS, MORE) not in deeper.asked  # fewer bits did better, so that more are not asked for


def test_what_a_deep_cut_has_lost_does_not_hide_which_ending_suits_it() -> None:
    # No ending keeps anything yet; with 0.195 mended, codes would hold 0 x 4 and powers 0.45 x 3.
    table = {
        (CODES, USUAL): (0.65, 0.0625),
        (POWERS, USUAL): (0.75, 0.125),
        (POWERS, FEWER): (0.6, 0.0625),
        (POWERS, MORE): (0.7, 0.177),
    }
    shop: Any = _Shop(table, plain=0.7)
    strengths, score = _chosen(shop)
    assert (strengths[POWERS], score) == (USUAL, pytest.approx(0.75))


def test_more_bits_end_what_few_bits_break() -> None:
    table = {
        (CODES, USUAL): (0.5, 0.05),
        (POWERS, USUAL): (-1.0, 0.05),
        (CODES, FEWER): (0.4, 0.04),
        (CODES, MORE): (0.99, 0.2),
    }
    shop: Any = _Shop(table, plain=1.0)
    strengths, score = _chosen(shop)
    assert (strengths[CODES], score) == (MORE, pytest.approx(0.99))


def test_what_measures_times_waits_for_the_end_of_the_run() -> None:
    shop: Any = _Shop({(CODES, USUAL): (1.0, 0.2)}, plain=1.0, timed=(CODES, POWERS, INT8))
    made = _made()
    before = dict(made.strengths)
    model, score = chosen_ending(shop, made, 0)
    assert (model["precise"], score) == (1.0, 1.0)  # as it stands in its strengths
    assert made.strengths == before


def test_where_every_ending_is_refused_the_trial_says_so() -> None:
    broken = (-1.0, 0.1)
    shop: Any = _Shop({(CODES, s): broken for s in (USUAL, FEWER, MORE)} | {(POWERS, USUAL): broken}, plain=1.0)
    with pytest.raises(BadInput, match="no precision procedure"):
        chosen_ending(shop, _made(), 0)


def test_a_trial_ends_as_chosen_and_is_measured_so() -> None:
    tiny = case("cnn")
    plan = make_plan(tiny.model, tiny.task, wanted=["magnitude-pruning", CODES, POWERS], costs=["size"])
    shop = Workshop(tiny.task, tiny.model, plan, [], ["size"])
    choice = Choice({"width": ("magnitude-pruning", 0.5), "precision": (CODES, USUAL)}, free_ending=True)
    effort = Effort(1, None, None, 2, 0)
    found, rung = run_trial(shop, choice, effort, 0, [], None)
    assert rung is None  # none is stopped early without a budget
    made = shop.make(choice, 0)
    shop.recover(made.model, steps=2, seed=1)
    model, score = chosen_ending(shop, made, 0)
    assert found.procedures == made.strengths
    assert found.validation == score
    assert found.ratios == shop.quick_ratios(model)
    # One that is not free ends as it says.
    fixed, _ = run_trial(shop, Choice(choice.procedures), effort, 0, [], None)
    assert fixed.procedures == {"magnitude-pruning": 0.5, CODES: USUAL}


EXACT, ROUNDED = "dycl-compile", "bfloat16-passes"
Way = str | None


@dataclass
class _Runner:
    """A workshop whose models are their strengths; each way to run has a score and a latency, a score of -1 is NaN."""

    table: Mapping[Way, tuple[float, float]]
    members: tuple[str, ...] = (EXACT, ROUNDED)
    scored: list[Way] = field(default_factory=list)
    unhurried: dict[str, int] = field(default_factory=dict)
    costs: tuple[str, ...] = ("latency", "size")
    span: float | None = None
    validation: Tensor = field(default_factory=lambda: torch.tensor([1.0]))

    @property
    def plan(self) -> Any:
        return SimpleNamespace(stages={"execution": {k: SimpleNamespace(exact=k == EXACT) for k in self.members}})

    def finish(self, model: Any, strengths: Mapping[str, float], seed: int, *, stages: Sequence[str]) -> Any:
        assert model == "plain"  # precision is applied once for all ways
        assert stages == ("execution",)
        return next(iter(strengths), None)

    def score(self, model: Way) -> Tensor:
        self.scored.append(model)
        if self.table[model][0] < 0:
            raise BadInput("NaN")
        return torch.tensor([self.table[model][0]])

    def quick_ratios_of(self, models: Sequence[Way]) -> list[dict[str, float]]:
        return [{"latency": self.table[model][1], "size": 0.25} for model in models]


def _run(shop: _Runner, strengths: dict[str, float], score: float = 0.9, width: int = 2) -> tuple[Any, Made, float]:
    made = Made(nn.Linear(3, width), strengths)
    model, found = chosen_execution(shop, made, "plain", score, 0)  # type: ignore[arg-type]
    return model, made, found


def test_a_pass_that_rounds_is_taken_where_it_holds_more_by_hand() -> None:
    strengths = {"taylor-pruning": 0.5, POWERS: USUAL, EXACT: 1.0}
    # Of the falls recovery leaves 0.35, and a tenth lost is nothing kept: (1 - 0.35) x 1 x 2 = 1.3 at half of the
    # time, (1 - 0.49) x 2 x 2 = 2.04 at a quarter with a fall of 0.14.
    shop = _Runner({EXACT: (0.9, 0.5), ROUNDED: (0.86, 0.25)})
    model, made, score = _run(shop, strengths)
    assert (model, score) == (ROUNDED, pytest.approx(0.86))
    assert made.strengths == {"taylor-pruning": 0.5, POWERS: USUAL, ROUNDED: 1.0}
    assert made.ratios == {"latency": 0.25, "size": 0.25}
    # With a fall of 0.24 it holds (1 - 0.84) x 2 x 2 = 0.64, less than 1.3.
    shop = _Runner({EXACT: (0.9, 0.5), ROUNDED: (0.76, 0.25)})
    model, made, score = _run(shop, strengths)
    assert (model, score, made.strengths, made.ratios["latency"]) == (EXACT, 0.9, strengths, 0.5)


def test_what_is_no_faster_is_not_even_scored_and_what_returns_nan_is_not_taken() -> None:
    strengths = {"taylor-pruning": 0.5, EXACT: 1.0}
    slow = _Runner({EXACT: (0.9, 0.5), ROUNDED: (0.9, 0.48)})  # 0.96 of its time may be chance
    assert _run(slow, strengths)[0] == EXACT
    assert slow.scored == []
    # Nor is it made of a model that is as small or smaller; of a larger one it is.
    slow.table = {EXACT: (0.9, 0.5), ROUNDED: (0.9, 0.1)}
    assert slow.unhurried == {ROUNDED: 8}
    assert [_run(slow, strengths, width=width)[0] for width in (1, 2, 3)] == [EXACT, EXACT, ROUNDED]
    broken = _Runner({EXACT: (0.9, 0.5), ROUNDED: (-1.0, 0.1)})
    assert _run(broken, strengths)[0] == EXACT


def test_where_nothing_exact_runs_it_python_is_beside_it_and_what_is_refused_is_not_tried() -> None:
    shop = _Runner({None: (0.9, 0.5), ROUNDED: (0.9, 0.25)}, members=(ROUNDED,))
    model, made, _ = _run(shop, {"taylor-pruning": 0.5})
    assert (model, made.strengths) == (ROUNDED, {"taylor-pruning": 0.5, ROUNDED: 1.0})
    model, made, _ = _run(shop, {INT8: 0.8})  # whose products are integers
    assert (model, made.strengths) == (None, {INT8: 0.8})


def test_a_free_trial_runs_as_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Passes, "_why_slow", lambda self, model, task: "")
    tiny = case("cnn")
    costs = ["latency", "size"]
    plan = make_plan(tiny.model, tiny.task, wanted=["magnitude-pruning", POWERS, EXACT, ROUNDED], costs=costs)
    shop = Workshop(tiny.task, tiny.model, plan, [], costs, max_drop=10.0)
    asked: list[int] = []

    def told(models: Sequence[nn.Module], costs: Sequence[str] | None = None) -> list[dict[str, float]]:
        if costs is not None:
            return [{"size": 0.2} for _ in models]
        asked.append(len(models))
        kinds = [edit.arithmetic for model in models for edit in history(model) if isinstance(edit, RunCompiled)]
        assert kinds == [None, "bfloat16"]
        return [{"latency": 0.5, "size": 0.2}, {"latency": 0.1, "size": 0.2}]

    monkeypatch.setattr(shop, "quick_ratios_of", told)
    width, precision = ("magnitude-pruning", 0.2), (POWERS, USUAL)
    choice = Choice({"width": width, "precision": precision, "execution": (EXACT, 1.0)}, free_ending=True)
    found, _ = run_trial(shop, choice, Effort(1, None, None, 2, 0), 0, [], None)
    assert asked == [2]
    assert list(found.procedures)[::2] == ["magnitude-pruning", ROUNDED]
    assert found.ratios == {"latency": 0.1, "size": 0.2}
