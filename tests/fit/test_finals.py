"""The end of a run: which of several candidates is the best, and how long the last recovery is."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import torchgraft
from torchgraft.bench.tasks import load_task
from torchgraft.bench.training import evaluate_loss
from torchgraft.fit import finals
from torchgraft.fit.plan import make_plan
from torchgraft.fit.workshop import Workshop


def candidate(name: str, validation: float, ratio: float) -> Any:
    return SimpleNamespace(
        name=name, validation=SimpleNamespace(value=validation), costs={"macs": SimpleNamespace(ratio=ratio)}
    )


@pytest.mark.parametrize(
    ("losses", "ratios", "best"),
    [
        ({"a": 0.1, "b": 0.3}, {"a": 0.6, "b": 0.4}, "a"),  # of equal scores the lower loss
        ({"a": 0.2, "b": 0.2}, {"a": 0.6, "b": 0.4}, "b"),  # of equal losses the lower cost
    ],
)
def test_ties_of_the_score_are_broken_by_loss_then_cost(
    losses: dict[str, float], ratios: dict[str, float], best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {name: nn.Identity() for name in (*losses, "worse")}
    names = {id(model): name for name, model in models.items()}
    monkeypatch.setattr(finals, "evaluate_loss", lambda model, *_: losses[names[id(model)]])
    workshop: Any = SimpleNamespace(task=SimpleNamespace(val=None), primary="macs")
    feasible = [*(candidate(name, 0.9, ratios[name]) for name in losses), candidate("worse", 0.8, 0.1)]
    assert finals._best(workshop, feasible, models) == best


def test_the_loss_of_a_split_is_the_mean_over_its_samples(task_file: Path) -> None:
    task = load_task(str(task_file))
    model = task.architecture()
    model.train()
    wanted = nn.functional.cross_entropy(model(task.val.inputs), task.val.target)
    assert len(task.val) % task.batch_size  # the last batch is a smaller one
    assert evaluate_loss(model, task, "val") == pytest.approx(float(wanted.detach()), rel=1e-6)
    assert model.training


def test_a_step_is_timed_on_a_copy(task_file: Path) -> None:
    task = load_task(str(task_file))
    workshop = Workshop(task, task.trained(), make_plan(task.trained(), task), [], ["macs"])
    model = task.architecture()
    before = [parameter.clone() for parameter in model.parameters()]
    assert workshop.step_seconds(model) > 0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_what_surrounds_the_steps_is_not_counted(task_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, now = load_task(str(task_file)), [0.0]
    workshop = Workshop(task, task.trained(), make_plan(task.trained(), task), [], ["macs"])

    def recover(model: nn.Module, *, steps: int, seed: int) -> int:
        now[0] += 5.0 + 0.25 * steps  # as if the teacher took five seconds each time
        return steps

    monkeypatch.setattr(workshop, "recover", recover)
    monkeypatch.setattr("torchgraft.fit.workshop.time.perf_counter", lambda: now[0])
    assert workshop.step_seconds(task.architecture()) == pytest.approx(0.25)


def test_the_original_is_asked_once_where_its_answers_are_few(task_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_task(str(task_file))
    original = task.trained()

    def moved(batches: int) -> tuple[dict[str, torch.Tensor], int]:
        monkeypatch.setattr("torchgraft.fit.workshop.KEPT_BATCHES", batches)
        workshop = Workshop(task, original, make_plan(original, task), [], ["macs"])
        student, calls = copy.deepcopy(original), [0]
        for parameter in student.parameters():
            parameter.data.mul_(0.5)
        handle = original.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
        for seed in range(3):
            workshop.recover(student, steps=2, seed=seed)
        handle.remove()
        return student.state_dict(), calls[0]

    (kept, few), (asked, many) = moved(64), moved(0)
    batches = -(-len(task.train) // task.batch_size)
    assert few == 2 + batches  # two looks at whether a sample's answer is its own, and each batch once
    assert many == 6
    assert all(torch.allclose(kept[name], asked[name], atol=1e-5) for name in kept)


def test_each_procedure_is_told_what_it_did_where_several_act_on_one_layer() -> None:
    from torchgraft.contracts.subjects import case
    from torchgraft.engines.surgery.edits import apply_edits
    from torchgraft.shrink.prune.magnitude_pruning import MagnitudePruning
    from torchgraft.shrink.prune.norm_folding import NormFolding

    tiny = case("cnn")
    folding = NormFolding()
    model = folding.apply(MagnitudePruning().apply(tiny.model, tiny.task, 0.5), tiny.task, 1.0)
    model = apply_edits(model, folding.ending(model, tiny.task))
    strengths = {"magnitude-pruning": 0.5, "norm-folding": 1.0}
    finalist = finals.Finalist("trial-0", model, strengths, 0, torch.ones(4))
    width, norms = finals._applied(SimpleNamespace(), finalist)  # type: ignore[arg-type]
    assert (width.key, norms.key) == tuple(strengths)
    assert width.changes
    assert all("kept" in words and "norm" not in words for words in width.changes.values())
    assert norms.changes["norm"] == "batch norm to be folded; norm folded into stem"
    assert norms.changes["stem"] == "norm folded in"
    assert all("kept" not in words for words in norms.changes.values())
    assert set(width.changes) & set(norms.changes)  # the same layers, told twice


def test_sparse_weights_are_not_said_to_be_pruned_widths() -> None:
    from torchgraft.contracts.subjects import case
    from torchgraft.shrink.prune.fast_sparse_conv import FastSparseConv
    from torchgraft.shrink.prune.magnitude_pruning import MagnitudePruning

    tiny = case("transformer")
    cut = MagnitudePruning().apply(tiny.model, tiny.task, 0.5)
    model = FastSparseConv(timed=False).apply(cut, tiny.task, 0.9)
    finalist = finals.Finalist("trial-0", model, {"magnitude-pruning": 0.5, "fast-sparse-conv": 0.9}, 0, torch.ones(4))
    width, weights = finals._applied(SimpleNamespace(), finalist)  # type: ignore[arg-type]
    assert width.changes
    assert not any("sparse" in words for words in width.changes.values())
    assert weights.changes
    assert all("executed sparse" in words for words in weights.changes.values())


def test_under_a_budget_what_was_not_cut_leaves_its_recovery_to_the_others(task_file: Path, tmp_path: Path) -> None:
    result = torchgraft.fit(
        str(task_file),
        budget="size=0.9x",
        costs=["size"],
        trials=3,
        procedures=["int8-dynamic", "magnitude-pruning"],
        max_drop=1.0,
        out=tmp_path,
    )
    tried = [set(trial.procedures) for trial in result.record.trials]
    assert {"int8-dynamic"} in tried
    assert sum("magnitude-pruning" in keys for keys in tried) == 2
    recovered = [[each.key for each in c.procedures] for c in result.front if c.name.endswith("-recovered")]
    assert recovered
    assert all("magnitude-pruning" in keys for keys in recovered)
