"""The handbook's schemes: exact counts at every step, ERK budgets, FLOPs by hand, tags, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torchgraft.bench.models import mlp
from torchgraft.bench.task import Task
from torchgraft.engines.masks import prunable
from torchgraft.errors import BadInput
from torchgraft.shrink.prune.sparseland_handbook import ALLOCATIONS, SCHEMES, sparsity_bench, train_sparse


def _task() -> Task:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, 10, generator=generator)
    y = (x[:, :3].argmax(1)).long()
    torch.manual_seed(0)
    model = mlp(10, 3, widths=(12, 8))
    return Task(
        model,
        (x, y),
        (x, y),
        (x, y),
        nn.functional.cross_entropy,
        lambda out, target: (out.argmax(1) == target).float(),
        batch_size=16,
        learning_rate=1e-2,
    )


@pytest.mark.parametrize("allocation", list(ALLOCATIONS))
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_every_scheme_ends_at_the_budget_and_sparse_ones_hold_it(scheme: str, allocation: str) -> None:
    task = _task()
    model = task.architecture()
    report = train_sparse(model, task, scheme, density=0.3, allocation=allocation, steps=40, every=4)
    budget = round(0.3 * (120 + 96 + 24))
    assert sum(report.kept.values()) == budget
    assert len(report.history) == 40
    assert sum(int((weight != 0).sum()) for weight in prunable(model).values()) <= budget
    if SCHEMES[scheme].trajectory == "sparse-to-sparse":
        assert all(sum(step.kept.values()) == budget for step in report.history)
    else:
        assert sum(report.history[0].kept.values()) in (0, 240)  # dense: no masks, or masks of ones
        assert report.training_share > 0.3
    dense_steps = sum(step.dense_gradient for step in report.history)
    assert (dense_steps > 0) == (scheme == "rigl")
    if scheme != "snip" and allocation == "uniform":
        assert report.kept == {"1.weight": 36, "3.weight": 29, "5.weight": 7}
    # every sample goes once through each layer of this model, so forward FLOPs follow the weights
    assert report.inference_flops == pytest.approx(2 * budget)


def test_training_flops_follow_the_handbooks_formula() -> None:
    task = _task()
    density, every, steps = 0.5, 4, 40
    f_s, f_d = 2 * 120.0, 2 * 240.0
    fixed = train_sparse(task.architecture(), task, "random", density=density, steps=steps)
    assert fixed.training_flops == pytest.approx(3 * f_s * steps)
    whole = train_sparse(task.architecture(), task, "rigl", density=density, steps=steps, every=every, end=1.0)
    assert whole.training_flops / steps == pytest.approx((3 * f_s * every + 2 * f_s + f_d) / (every + 1))
    moving = train_sparse(task.architecture(), task, "set", density=density, steps=steps, every=every)
    assert moving.training_flops == pytest.approx(3 * f_s * steps)
    shot = train_sparse(task.architecture(), task, "one-shot", density=density, steps=steps)
    assert shot.training_flops == pytest.approx(20 * 3 * (f_s + f_d))


@settings(max_examples=40, deadline=None)
@given(
    density=st.floats(0.01, 1.0),
    sides=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=4),
)
def test_erk_is_at_most_whole_and_meets_the_budget(density: float, sides: list[tuple[int, int]]) -> None:
    sizes = {str(number): side for number, side in enumerate(sides)}
    kept = ALLOCATIONS["erk"](sizes, 1.0 - density)
    whole = sum(a * b for a, b in sides)
    assert sum(kept.values()) == round((1.0 - (1.0 - density)) * whole)
    assert all(0 <= kept[name] <= sizes[name][0] * sizes[name][1] for name in sizes)


def test_the_bench_has_its_controls_and_leaves_the_model_alone() -> None:
    task = _task()
    model = task.architecture()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(1)
    small = mlp(10, 3, widths=(4, 4))
    rows = sparsity_bench(model, task, 0.3, small=small, schemes=("random", "set"), steps=8)
    assert [row.scheme for row in rows] == ["dense", "small dense", "random", "set"]
    assert [row.weights for row in rows] == [240, 68, 72, 72]
    assert rows[0].tags is None
    assert rows[3].tags == SCHEMES["set"]
    assert rows[0].training_share == pytest.approx(1.0)
    assert rows[1].training_share == pytest.approx(68 / 240)
    assert rows[2].inference_share == pytest.approx(0.3)
    assert all(0.0 <= row.score <= 1.0 for row in rows)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(BadInput, match="small must have about 72 weights, got 240"):
        sparsity_bench(model, task, 0.3, small=model, steps=2)


def test_the_same_seed_repeats_and_another_does_not() -> None:
    task = _task()
    found = []
    for seed in (0, 0, 1):
        model = task.architecture()
        train_sparse(model, task, "set", density=0.3, steps=10, every=3, seed=seed)
        found.append(torch.cat([weight.detach().flatten() for weight in prunable(model).values()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0] != 0, found[2] != 0)


def test_bad_settings_are_refused() -> None:
    task = _task()
    with pytest.raises(BadInput, match=r"unknown scheme 'rigel'.*rigl"):
        train_sparse(task.architecture(), task, "rigel", density=0.5)
    with pytest.raises(BadInput, match="unknown allocation"):
        train_sparse(task.architecture(), task, "set", density=0.5, allocation="kre")
    for wrong in ({"density": 1.5}, {"density": 0.5, "start": 0.9}):
        with pytest.raises(BadInput, match="must be shares"):
            train_sparse(task.architecture(), task, "gradual", **wrong)
