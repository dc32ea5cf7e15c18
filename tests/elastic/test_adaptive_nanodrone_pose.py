"""Two networks on a stream: extremes, counts, what a decision may know, the best table; and the budgets of a pair."""

from __future__ import annotations

import copy
import itertools
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.meters import macs
from torchgraft.bench.task import Split, Task
from torchgraft.elastic.adaptive_nanodrone_pose import (
    AuxMapPolicy,
    AuxMarginPolicy,
    BigLittle,
    LittleFirst,
    OutputPolicy,
    error_table,
    margin,
)
from torchgraft.engines import recipe
from torchgraft.engines.nesting.little_first import LittleFirstModel
from torchgraft.errors import BadInput

_INF = math.inf


def nets() -> tuple[nn.Module, nn.Module, nn.Module]:
    torch.manual_seed(0)
    small, big = nn.Linear(5, 4), nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 4))
    return small.double(), big.double(), nn.Linear(5, 6).double()


def frames(count: int = 30) -> Tensor:
    return torch.randn(count, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def policy(kind: str, threshold: float, head: nn.Module) -> OutputPolicy | AuxMarginPolicy | AuxMapPolicy:
    if kind == "output":
        return OutputPolicy(threshold, torch.ones(4, dtype=torch.float64))
    if kind == "margin":
        return AuxMarginPolicy(head, threshold)
    return AuxMapPolicy(head, torch.linspace(-1, 1, 6), threshold)


@pytest.mark.parametrize(
    ("kind", "all_small", "all_big"), [("output", _INF, -_INF), ("margin", -_INF, _INF), ("map", _INF, -_INF)]
)
def test_extremes_are_the_networks_alone(kind: str, all_small: float, all_big: float) -> None:
    small, big, head = nets()
    x = frames()
    for net, threshold, cost in ((small, all_small, 20), (big, all_big, 80 + 64)):
        pair = BigLittle(small, big, policy(kind, threshold, head), x[:1])
        steps = list(pair.stream(x))
        assert all(torch.equal(step.output, net(frame[None])[0]) for step, frame in zip(steps, x, strict=True))
        extra = 0 if kind == "output" else 30
        assert steps[-1].macs == 30 * (cost + extra)


@pytest.mark.parametrize("kind", ["margin", "map"])
def test_calls_of_the_big_network_are_monotone_in_the_threshold(kind: str) -> None:
    small, big, head = nets()
    x = frames()
    thresholds = [-_INF, -0.5, 0.0, 0.2, 0.5, _INF]
    pair = BigLittle(small, big, policy(kind, 0.0, head), x[:1])
    points = pair.sweep([(x, torch.zeros(30, 4))], [(t, policy(kind, t, head)) for t in thresholds])
    calls = [point.big for point in points]
    assert sorted(calls, reverse=kind == "map") == calls
    assert len(set(calls)) > 2
    assert [p.macs for p in points] == pytest.approx([30 + 20 + p.big * (144 - 20) for p in points])


def test_the_output_policy_by_hand() -> None:
    """The output is the frame: it moves at the third frame, so the fourth is the big network's."""

    class Same(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.fc = nn.Linear(2, width, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return x + 0 * self.fc(x).sum()

    x = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 4.0], [1.0, 4.0], [1.0, 4.0]])
    pair = BigLittle(Same(1), Same(9), OutputPolicy(2.9, torch.tensor([1.0, 2.0])), x[:1])
    assert [step.big for step in pair.stream(x)] == [False, False, False, True, False]
    pair = BigLittle(Same(1), Same(9), OutputPolicy(3.1, torch.tensor([1.0, 2.0])), x[:1])
    assert not any(step.big for step in pair.stream(x))


def test_the_output_policy_knows_nothing_of_the_frame_that_it_decides_on() -> None:
    small, big, head = nets()
    x = frames()
    pair = BigLittle(small, big, policy("output", 2.0, head), x[:1])
    first = [step.big for step in pair.stream(x)]
    changed = x.clone()
    changed[12:] += 50.0
    second = [step.big for step in pair.stream(changed)]
    assert first[:13] == second[:13]
    assert first != second
    assert 0 < sum(first) < 30


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(2, 7))
def test_tables_are_the_best_choice_of_as_many_cells(seed: int, size: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    cells = torch.arange(4 * size) % size  # as many samples in each cell
    small, big = torch.rand(4 * size, generator=draw), torch.rand(4 * size, generator=draw)
    table = error_table(cells, small, big, size=size)
    for count in range(size + 1):
        threshold = float(table.sort(descending=True).values[count - 1]) if count else _INF
        chosen = set(torch.nonzero(table >= threshold)[:, 0].tolist())

        def error(cells_of_big: set[int]) -> float:
            use = torch.tensor([int(cell) in cells_of_big for cell in cells])
            return float(torch.where(use, big, small).double().mean())

        best = min(error(set(each)) for each in itertools.combinations(range(size), count))
        assert len(chosen) == count
        assert error(chosen) == pytest.approx(best, abs=1e-9)


def test_the_margin_by_hand() -> None:
    assert margin(torch.tensor([[0.7, 0.2, 0.1]]).log()) == pytest.approx(0.5, abs=1e-6)


def test_a_big_network_that_costs_less_is_refused() -> None:
    small, big, head = nets()
    with pytest.raises(BadInput, match="big must cost more"):
        BigLittle(big, small, policy("output", 0.0, head), frames(1))


def task_of(model: nn.Module, x: Tensor, **options: Any) -> Task:
    data = Split(x, torch.arange(len(x)) % 3)
    hit = lambda out, target: (out.argmax(-1) == target).double()  # noqa: E731
    settings: dict[str, Any] = {"loss": F.cross_entropy, "score": hit, "batch_size": 16, **options}
    return Task(model, data, data, data, **settings)


def toy() -> tuple[nn.Module, Task, LittleFirstModel, Tensor]:
    torch.manual_seed(0)
    big = nn.Sequential(nn.Linear(5, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3)).double().eval()
    x = 2 * frames(60)
    task = task_of(big, x)
    model = LittleFirst(samples=60).build(big, task)
    assert isinstance(model, LittleFirstModel)
    return big, task, model, x


def test_the_ends_of_the_thresholds_are_the_networks_alone() -> None:
    big, _, model, x = toy()
    assert torch.equal(model(x), big(x))
    model.set_budget(model.budgets[0])
    assert torch.equal(model(x), model.small(x))
    assert not torch.equal(model(x), big(x))
    model.set_budget(model.budgets[1])
    for threshold, net in ((0.0, model.small), (1.0 + 1e-9, big)):
        model.thresholds.fill_(threshold)
        assert torch.equal(model(x), net(x))


def test_networks_run_only_where_a_budget_wants_them() -> None:
    _, _, model, x = toy()
    seen: dict[str, list[int]] = {"small": [], "big": []}
    for name, net in (("small", model.small), ("big", model.big)):
        net.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(len(args[0])))
    model(x)
    assert seen == {"small": [], "big": [60]}
    model.set_budget(model.budgets[0])(x)
    assert seen == {"small": [60], "big": [60]}
    model.set_budget(model.budgets[1])
    model.thresholds.fill_(0.0)
    model(x)
    assert seen == {"small": [60, 60], "big": [60]}  # none was unsure, so the big one did not run
    for budget in model.budgets:
        assert model.set_budget(budget)(x[:0]).shape == (0, 3)


def test_a_threshold_sends_the_unsure_by_brute_force() -> None:
    big, _, model, x = toy()
    sent = []
    for level, share in enumerate(model.calls, 1):
        model.set_budget(model.budgets[level])
        out = model(x)
        unsure = [margin(model.small(one[None])) < float(model.thresholds[level - 1]) for one in x]
        for one, said, goes in zip(x, out, unsure, strict=True):
            torch.testing.assert_close(said, (big if goes else model.small)(one[None])[0])
        assert model.asked == sum(unsure) == math.ceil(60 * share)
        sent.append({place for place, goes in enumerate(unsure) if goes})
    assert all(less < more for less, more in itertools.pairwise(sent))


def counted(model: LittleFirstModel, big: nn.Module, x: Tensor) -> list[float]:
    return [macs(model.set_budget(budget), x) / macs(big, x) for budget in model.budgets]


def test_budgets_are_declared_as_they_are_counted_before_and_after_training() -> None:
    big, task, model, x = toy()
    assert counted(model, big, x) == pytest.approx(model.budgets, rel=1e-9)
    before, moved = model.thresholds.clone(), model.small[0].weight.clone()  # type: ignore[index, union-attr]
    assert LittleFirst(samples=60).train(model, task, steps=12) == 12
    assert not torch.equal(moved, model.small[0].weight)  # type: ignore[index, union-attr]
    assert not torch.equal(before, model.thresholds)
    assert counted(model, big, x) == pytest.approx(model.budgets, rel=1e-9)
    assert torch.equal(model.set_budget(1.0)(x), big(x))


def test_thresholds_are_found_on_samples_that_the_small_network_never_learns_from() -> None:
    big, _, _, _ = toy()
    x = frames(400)
    task, procedure = task_of(big, x), LittleFirst(samples=100)
    model = procedure.build(big, task, seed=3)
    assert isinstance(model, LittleFirstModel)
    learned: list[Tensor] = []
    model.small.register_forward_pre_hook(lambda net, args: learned.append(args[0]) if net.training else None)
    procedure.train(model, task, steps=60, seed=3)
    places = {tuple(row) for row in torch.cat(learned).tolist()}
    held = torch.stack([row for row in x if tuple(row.tolist()) not in places])
    assert len(held) == 80
    assert len(places) == 320
    assert counted(model, big, held) == pytest.approx(model.budgets, rel=1e-9)
    assert torch.equal(task.train.inputs, x)  # type: ignore[arg-type]


def test_batch_norms_of_the_small_network_hold_its_own_averages() -> None:
    torch.manual_seed(0)
    big = nn.Sequential(nn.Linear(5, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, 3)).double().eval()
    x = frames(60)
    task, procedure = task_of(big, x, batch_size=20), LittleFirst()
    model = procedure.build(big, task)
    assert isinstance(model, LittleFirstModel)
    for _ in range(2):
        seen = model.small[0](x).mean(0)  # type: ignore[operator, index]
        torch.testing.assert_close(model.small[1].running_mean, seen.detach())  # type: ignore[union-attr, index]
        procedure.train(model, task, steps=5)
        assert not any(module.training for module in model.modules())


def test_training_brings_the_small_network_nearer_to_the_big_one() -> None:
    big, task, model, x = toy()

    def gap() -> float:
        return float(F.kl_div(model.small(x).log_softmax(1), big(x).softmax(1), reduction="batchmean").detach())

    before = gap()
    LittleFirst().train(model, task, steps=150)
    assert gap() < 0.5 * before


def test_no_step_begins_after_the_deadline_and_nothing_is_declared_anew() -> None:
    _, task, model, _ = toy()
    before = copy.deepcopy(model.state_dict())
    assert LittleFirst().train(model, task, steps=1000, deadline=time.monotonic()) == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_original_stays_in_eval_mode_and_frozen_while_the_small_network_trains() -> None:
    _, _, model, _ = toy()
    assert model.train().small.training
    assert not model.big.training
    assert not any(value.requires_grad for value in model.big.parameters())
    assert all(value.requires_grad for value in model.small.parameters())


def test_calls_that_would_cost_more_than_the_big_network_make_no_budget() -> None:
    big, task, _, _ = toy()
    model = LittleFirst(small=0.5, calls=(0.2, 0.6)).build(big, task)
    assert isinstance(model, LittleFirstModel)
    assert model.calls == (0.2,)
    assert len(model.budgets) == 3


def test_equal_margins_still_make_rising_budgets() -> None:
    _, _, model, x = toy()
    with torch.no_grad():
        for value in model.small.parameters():
            value.zero_()
    model.set_thresholds(x, batch_size=16)
    assert model.thresholds.tolist() == [0.0] * len(model.calls)
    assert model.budgets[-2] - model.budgets[0] == pytest.approx(0.0, abs=1e-6)
    assert all(low < high for low, high in itertools.pairwise(model.budgets))


class _Pair(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.one, self.two = kind, nn.Linear(5, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Any:
        out = self.two(self.one(x).relu())
        return {"tuple": (out, out), "tokens": out[:, None], "single": out[:, :1], "batch": out - out.mean(0)}[
            self.kind
        ]


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("batch", {"distill": "values"}, "values"),
        ("tuple", {"logits": lambda out: out[0]}, "tuple"),
        ("tokens", {}, "shape"),
        ("single", {}, "shape"),
        ("batch", {}, "others of its batch"),
    ],
)
def test_what_has_no_margin_a_sample_is_refused_with_the_reason(
    kind: str, options: dict[str, Any], reason: str
) -> None:
    model = _Pair(kind).double()
    task = task_of(model, frames(), **options)
    procedure = LittleFirst()
    assert procedure.applies_to(model, task) == []
    [refusal] = procedure.refusals(model, task)
    assert reason in refusal.reason
    with pytest.raises(BadInput, match="finds nothing"):
        procedure.build(model, task)


def test_several_inputs_and_other_logits_are_refused() -> None:
    big, _, _, x = toy()
    data = Split((x, x), torch.arange(60) % 3)
    task = Task(big, data, data, data, F.cross_entropy, lambda out, t: out[:, 0])
    [refusal] = LittleFirst().refusals(big, task)
    assert "one tensor" in refusal.reason
    [refusal] = LittleFirst().refusals(big, task_of(big, x, logits=lambda out: out[:, :2]))
    assert "logits" in refusal.reason


@pytest.mark.parametrize("setting", [{"small": 1.0}, {"calls": ()}, {"calls": (0.4, 0.2)}, {"samples": 0}])
def test_bad_settings_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        LittleFirst(**setting)


def test_a_recipe_rebuilds_it(tmp_path: Path) -> None:
    _, task, model, x = toy()
    LittleFirst(samples=60).train(model, task, steps=3)
    recipe.save(model.set_budget(model.budgets[2]), tmp_path, task="", budget=model.budget)
    again = recipe.apply(tmp_path, task=task)
    assert isinstance(again, LittleFirstModel)
    assert again.budget == model.budget
    for budget in model.budgets:
        assert torch.equal(model.set_budget(budget)(x), again.set_budget(budget)(x))
