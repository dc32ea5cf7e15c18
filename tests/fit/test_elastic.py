"""``fit`` with ``elastic=True``: one model of several budgets, what is written of it, what repeats, what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import torchgraft
from torchgraft.bench.meters import macs
from torchgraft.bench.task import Task, take
from torchgraft.bench.tasks import load_task
from torchgraft.elastic.sortednet import SortedNet
from torchgraft.engines import recipe
from torchgraft.engines.nesting import ElasticModule
from torchgraft.errors import BadInput
from torchgraft.fit import FitResult, Progress
from torchgraft.fit.budget import parse_budget
from torchgraft.fit.elastic import COUNTED, Family, _names, judged_by, paced
from torchgraft.fit.plan import Plan
from torchgraft.fit.workshop import Workshop

COSTS = ["macs", "params"]


def _fit(task_file: Path, out: Path, **options: Any) -> FitResult:
    settings: dict[str, Any] = {"elastic": True, "costs": COSTS, "procedures": ["sortednet"], "max_drop": 0.1}
    return torchgraft.fit(str(task_file), out=out, **{**settings, **options})


@pytest.fixture(scope="module")
def finished(task_file: Path, tmp_path_factory: pytest.TempPathFactory) -> FitResult:
    """A finished run on exact costs."""
    return _fit(task_file, tmp_path_factory.mktemp("elastic") / "run")


def test_every_budget_stands_on_the_front_at_its_counted_cost(finished: FitResult) -> None:
    model = finished.model
    assert isinstance(model, ElasticModule)
    assert [c.name for c in finished.front] == ["original", *(f"sortednet@{b:.2f}" for b in model.budgets)]
    for candidate, budget in zip(finished.front[1:], model.budgets, strict=True):
        assert candidate.costs["macs"].ratio == pytest.approx(budget, rel=0.1)
        assert candidate.procedures[0].key == "sortednet"
        assert candidate.procedures[0].strength == budget
        assert candidate.test is not None
    full = finished.front[-1]
    assert full.costs["macs"].ratio == 1.0
    assert full.drop.value == 0.0


def test_what_depends_on_samples_is_declared_as_counted_on_validation_samples(task_file: Path, tmp_path: Path) -> None:
    found = _fit(task_file, tmp_path / "run", procedures=["adaptive-nanodrone-pose"])
    model, task = found.model, load_task(str(task_file))
    assert isinstance(model, ElasticModule)
    assert model.by_sample
    inputs = take(task.val.inputs, slice(COUNTED))
    whole = macs(task.trained(), inputs)
    for budget in model.budgets:
        assert macs(model.set_budget(budget), inputs) / whole == pytest.approx(budget, abs=1e-7)


def test_without_a_budget_the_cheapest_that_keeps_the_score_is_set(finished: FitResult) -> None:
    assert finished.best is not None
    kept = [c for c in finished.front[1:] if c.drop.value <= 0.1]
    assert finished.best.costs["macs"].ratio == min(c.costs["macs"].ratio for c in kept)
    model = finished.model
    assert isinstance(model, ElasticModule)
    assert finished.best.name == f"sortednet@{model.budget:.2f}"


def test_the_saved_model_comes_back_at_its_budget_and_switches(finished: FitResult, task_file: Path) -> None:
    task = load_task(str(task_file))
    again = recipe.apply(finished.folder, task=task)
    model = finished.model
    assert isinstance(again, ElasticModule)
    assert isinstance(model, ElasticModule)
    assert again.budget == model.budget
    inputs = task.val.inputs
    full = macs(task.trained(), inputs)
    for budget in model.budgets:
        with torch.no_grad():
            assert torch.equal(model.set_budget(budget)(inputs), again.set_budget(budget)(inputs))
        assert macs(again, inputs) / full == pytest.approx(budget, rel=0.1)
    with torch.no_grad():
        torch.testing.assert_close(again.set_budget(1.0)(inputs), task.trained()(inputs), atol=1e-6, rtol=0)


def test_the_outputs_of_a_run_are_written(finished: FitResult) -> None:
    written = {path.name for path in finished.folder.iterdir()}
    assert {"report.html", "front.json", "front.png", "run.json", "recipe.yaml", "model.safetensors"} <= written
    assert any("set_budget" in note for note in finished.record.notes)
    front = json.loads((finished.folder / "front.json").read_text())
    assert front[0]["name"] == "original"
    assert sum(candidate["best"] for candidate in front) == 1


def test_a_budget_chooses_the_best_within_it(task_file: Path, tmp_path: Path) -> None:
    result = _fit(task_file, tmp_path, budget="macs=0.6x")
    assert result.best is not None
    within = [c for c in result.front[1:] if c.costs["macs"].ratio <= 0.6 and c.drop.value <= 0.1]
    assert result.best.validation.value == max(c.validation.value for c in within)


def test_a_budget_that_none_meets_is_infeasible_and_names_the_nearest(task_file: Path, tmp_path: Path) -> None:
    result = _fit(task_file, tmp_path, budget="macs=0.01x", max_drop=None)
    assert not result.feasible
    assert result.best is None
    assert result.nearest.startswith("sortednet@")


def test_a_run_that_was_stopped_goes_on_with_what_was_made(task_file: Path, tmp_path: Path) -> None:
    def stop_when(phase: str) -> Callable[[Progress], None]:
        def watch(progress: Progress) -> None:
            if progress.phase == phase:
                raise KeyboardInterrupt

        return watch

    with pytest.raises(KeyboardInterrupt):
        _fit(task_file, tmp_path / "one", progress=stop_when("measure"))
    kept = tmp_path / "one" / "elastic" / "sortednet" / "model.safetensors"
    stamp = kept.stat().st_mtime_ns
    resumed = _fit(task_file, tmp_path / "one")
    assert kept.stat().st_mtime_ns == stamp
    whole = _fit(task_file, tmp_path / "two")
    names = [(c.name, c.validation.value, c.costs["macs"].ratio) for c in whole.front]
    assert [(c.name, c.validation.value, c.costs["macs"].ratio) for c in resumed.front] == names


class _Close(ElasticModule):
    def select(self, level: int) -> None:
        self.now = level


def test_budgets_that_lie_close_have_names_of_their_own() -> None:
    family = Family("toy", _Close((0.391, 0.394, 1.0)), 0, 0.0, {})
    assert list(_names(family).values()) == ["toy@0.391", "toy@0.394", "toy@1.000"]


class _Clocked(SortedNet):
    """By a clock of its own its training takes 3 s before its steps, ``each`` a step, and 2 s after them."""

    def __init__(self, each: float = 0.5) -> None:
        super().__init__()
        self.now, self.each = 100.0, each
        self.steps = 0

    def train(
        self, elastic: ElasticModule, task: Task, *, steps: int, seed: int = 0, deadline: float | None = None
    ) -> int:
        self.now += 3.0
        taken = 0
        optimizer = torch.optim.SGD(elastic.parameters(), lr=0.0)
        while taken < steps and (deadline is None or self.now < deadline):
            self.now += self.each
            self.steps += 1
            taken += 1
            optimizer.step()
        self.now += 2.0
        return taken


@pytest.mark.parametrize("each", [0.5, 0.01, 30.0])
def test_as_many_steps_are_planned_as_the_time_allows(
    task_file: Path, monkeypatch: pytest.MonkeyPatch, each: float
) -> None:
    """The schedule of the learning rate is one of steps, so a limit that is never reached would leave it in warm-up."""
    task = load_task(str(task_file))
    procedure = _Clocked(each)
    elastic = procedure.build(task.trained(), task)
    monkeypatch.setattr("torchgraft.fit.elastic.time.monotonic", lambda: procedure.now)
    steps = paced(procedure, elastic, task, seconds=100.0)
    assert procedure.now == pytest.approx(103.0 + each * procedure.steps)  # what comes after the steps is cut off
    assert procedure.steps == (2 if each == 30.0 else 10)
    assert procedure.train(elastic, task, steps=steps) == steps
    assert 0.0 <= 200.0 - procedure.now <= 10.0 + each


def test_without_time_one_step_is_planned_and_none_taken(task_file: Path) -> None:
    task = load_task(str(task_file))
    procedure = SortedNet()
    elastic = procedure.build(task.trained(), task)
    before = copy.deepcopy(elastic.state_dict())
    assert paced(procedure, elastic, task, seconds=0.0) == 1
    assert all(torch.equal(value, before[name]) for name, value in elastic.state_dict().items())


TOWERS = """
import torch
from torchgraft import Task
from torchgraft.bench.models import TwoTower
from torchgraft.bench.tasks.stdlib_search import contrast, first_rank

def task():
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(1, 64, (128, 5), generator=generator)
    code = torch.cat([words[:, torch.randperm(5, generator=generator)], words[:, :2]], 1)
    torch.manual_seed(0)
    model = TwoTower(64, 5, 7, d_model=16, depth=3, num_heads=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(20):
        optimizer.zero_grad()
        contrast(model(words[:64], code[:64]), None).backward()
        optimizer.step()
    splits = [((words[a:b], code[a:b]), torch.arange(b - a)) for a, b in ((0, 64), (64, 96), (96, 128))]
    return Task(model, *splits, loss=contrast, score=first_rank, batch_size=32)
"""


def test_towers_of_a_search_become_elastic(tmp_path: Path) -> None:
    path = tmp_path / "towers.py"
    path.write_text(TOWERS)
    keys = ["two-d-matryoshka", "starbucks"]
    result = _fit(path, tmp_path / "run", procedures=keys, max_drop=None)
    assert {trial.state for trial in result.record.trials} == {"complete"}
    assert [next(iter(trial.procedures)) for trial in result.record.trials] == keys
    task = load_task(str(path))
    again = recipe.apply(result.folder, task=task)
    assert isinstance(again, ElasticModule)
    assert isinstance(result.model, ElasticModule)
    with torch.no_grad():
        for budget in again.budgets:
            wanted = result.model.set_budget(budget)(*task.val.inputs)
            assert torch.equal(again.set_budget(budget)(*task.val.inputs), wanted)
        torch.testing.assert_close(wanted, task.trained()(*task.val.inputs), atol=1e-6, rtol=0)


def test_a_model_that_multiplies_less_and_takes_longer_is_not_kept(task_file: Path) -> None:
    """Where time is measured it judges, whatever cost was named first."""
    task = load_task(str(task_file))

    def judged(costs: tuple[str, ...], *budget: str) -> str:
        return judged_by(Workshop(task, task.trained(), Plan(), parse_budget(budget), costs))

    assert judged(("macs", "latency")) == "latency"
    assert judged(("params", "macs")) == "macs"
    assert judged(("macs", "latency"), "macs=0.5x") == "macs"


def test_other_settings_in_the_same_folder_are_refused(finished: FitResult, task_file: Path) -> None:
    with pytest.raises(BadInput, match="other settings"):
        _fit(task_file, finished.folder, seed=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"procedures": ["svd-truncation"]}, "makes no elastic model"),
        ({"procedures": ["sortdnet"]}, "sortednet"),
        ({"trials": 3}, "no trials"),
        ({"study": "journal"}, "no trials"),
        ({"ignore": ["*"]}, "no elastic procedure applies"),
    ],
)
def test_what_cannot_be_is_refused(task_file: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        _fit(task_file, tmp_path, **options)
