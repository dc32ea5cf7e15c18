"""ACM: the three stages, the labels of the gates, and the prices of the budgets."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.meters import macs
from torchgraft.bench.task import Split, Task
from torchgraft.elastic.adaptive_computation_module import (
    AcmModel,
    AdaptiveComputationModules,
    acmize,
    budget_shares,
    calibrate_acm,
    distill_acm,
    finetune_acm,
    gate_labels,
    mean_cost,
    spread_losses,
    train_gates,
)
from torchgraft.engines.learners import start_from_layers, watch
from torchgraft.errors import BadInput


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix, self.mlp = nn.LayerNorm(16), nn.Linear(16, 16), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm(x)).cumsum(1)
        out: Tensor = x + self.mlp(x)
        return out


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.relu(self.up(x)))
        return out


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.Sequential(Block(), Block()), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(x).mean(1))
        return out


def made(wanted: tuple[float, ...] = (0.3, 0.6)) -> tuple[Task, AcmModel, Tensor]:
    torch.manual_seed(0)
    model = Net().eval()
    x, y = torch.randn(20, 5, 16), torch.randint(3, (20,))
    data = Split(x, y)
    task = Task(model, data, data, data, F.cross_entropy, lambda out, t: (out.argmax(-1) == t).float(), batch_size=10)
    elastic = acmize(model, x[:2], wanted=wanted)
    return task, elastic, x


def changed(elastic: AcmModel, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in elastic.state_dict().items() if not torch.equal(value, before[name])}


def kept(elastic: AcmModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in elastic.state_dict().items()}


def test_labels_are_the_first_learner_that_adds_little_and_the_last_where_all_add_much() -> None:
    errors = torch.tensor([[8.0, 4.0, 2.0, 1.0], [8.0, 7.9, 1.0, 0.5], [8.0, 4.0, 3.5, 1.0], [1.0, 2.0, 1.0, 0.1]])
    assert gate_labels(errors).tolist() == [3, 1, 2, 1]
    assert gate_labels(errors, tau=10.0).tolist() == [1, 1, 1, 1]


def test_distillation_lowers_the_error_of_every_number_of_learners_and_moves_learners_only() -> None:
    task, elastic, x = made()
    start_from_layers(elastic, x)

    def errors() -> float:
        found = watch(elastic, x)
        return sum(
            float((elastic.acms[n].partial_sums(a)[1:] - f).square().mean().detach()) for n, (a, f) in found.items()
        )

    before, first = kept(elastic), errors()
    assert distill_acm(elastic, task, steps=15, lr=1e-2) == 15
    assert errors() < 0.9 * first
    moved = changed(elastic, before)
    assert moved
    assert all(".acm." in name and ".gate." not in name for name in moved)


def test_distilling_one_layer_does_not_depend_on_the_others() -> None:
    task, elastic, _x = made()
    _, other, _ = made()
    with torch.no_grad():
        other.acms["blocks.0.mlp"].up.weight.add_(1.0)
    for each in (elastic, other):
        distill_acm(each, task, steps=1)
    name = "blocks.1.mlp"
    for left, right in zip(elastic.acms[name].parameters(), other.acms[name].parameters(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("tau", [None, 1.2])
def test_the_second_stage_moves_gates_only(tau: float | None) -> None:
    task, elastic, _ = made()
    before = kept(elastic)
    assert train_gates(elastic, task, steps=2, tau=tau) == 2
    moved = changed(elastic, before)
    assert moved
    assert all(".gate." in name for name in moved)


def test_gates_learn_to_tell_tokens_that_need_learners() -> None:
    """A layer that does nothing to half of the tokens: those should get none, the others all."""
    torch.manual_seed(0)

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = Mlp()
            with torch.no_grad():
                self.mlp.up.weight[:, 0] = 20.0
                self.mlp.up.bias.zero_()
                self.mlp.down.bias.zero_()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + self.mlp(x)
            return out[..., :3].mean(1)

    x = torch.randn(40, 6, 16) * 0.1
    x[..., 0] = torch.where(torch.arange(6) % 2 == 0, -3.0, 3.0)
    data = Split(x, torch.zeros(40, dtype=torch.long))
    task = Task(Half().eval(), data, data, data, F.cross_entropy, lambda out, t: t.float(), batch_size=40)
    elastic = AdaptiveComputationModules(wanted=(0.5,)).build(task.trained(), task)
    assert isinstance(elastic, AcmModel)
    assert list(elastic.acms) == ["mlp"]
    train_gates(elastic, task, steps=150, tau=None, lr=2e-2)
    calibrate_acm(elastic, x)
    elastic.select(0)
    acm = elastic.acms["mlp"]
    elastic(x)
    choice = acm.scores(x).argmax(-1)
    assert float(choice[:, 1::2].float().mean()) > 3.0 > 1.0 > float(choice[:, 0::2].float().mean())


def test_the_third_stage_leaves_the_original_alone() -> None:
    task, elastic, x = made()
    start_from_layers(elastic, x)
    calibrate_acm(elastic, x)
    before, expected = kept(elastic), elastic(x)
    assert finetune_acm(elastic, task, steps=3) == 3
    moved = changed(elastic, before)
    assert moved
    assert all(".acm." in name for name in moved)
    assert torch.equal(elastic(x), expected)


def test_budgets_are_what_is_counted_and_near_what_was_wanted() -> None:
    task, elastic, x = made()
    start_from_layers(elastic, x)
    train_gates(elastic, task, steps=20, tau=None)
    calibrate_acm(elastic, x)
    full = macs(elastic.set_budget(1.0), x)
    tokens = x.shape[0] * x.shape[1]
    rest = tokens * sum(acm.gate_macs for acm in elastic.acms.values()) + 20 * 16 * 3
    most = tokens * sum(acm.learners * acm.learner_macs for acm in elastic.acms.values())
    least = tokens * sum(acm.least * acm.learner_macs for acm in elastic.acms.values())
    most = min(most, full - rest)
    for budget, wanted in zip(elastic.budgets[:-1], elastic.wanted, strict=True):
        counted = macs(elastic.set_budget(budget), x)
        assert counted == pytest.approx(budget * full, rel=1e-6)
        assert counted == rest + sum(acm.spent for acm in elastic.acms.values())
        assert (counted - rest - least) / (most - least) == pytest.approx(wanted, abs=0.05)


def test_the_cost_of_the_third_stage_is_weighted_by_what_a_layer_multiplies() -> None:
    shares = torch.tensor([[[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], [[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]])
    # Loads of 0.5 and 1 in the first layer, of 0 and 0.25 in the second.
    assert float(mean_cost(shares, torch.tensor([1.0, 3.0]))) == pytest.approx(0.25 * 0.75 + 0.75 * 0.125)


def test_the_third_stage_wants_choices_that_differ_by_token_and_by_sample() -> None:
    shares = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]], [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]], dtype=torch.float64)
    entropy, apart = spread_losses(shares)
    # One of the four choices is split in two; the samples' loads are (0 + 1) / 2 / 2 and (1.5 + 2) / 2 / 2.
    assert float(entropy) == pytest.approx(-math.log(2) / math.log(3) / 4, abs=1e-7)
    assert float(apart) == pytest.approx(-2 * (0.875 - 0.25) * 2 / 4)
    even = torch.full((1, 2, 3), 1 / 3)
    assert [round(float(part), 6) for part in spread_losses(even)] == [-1.0, 0.0]


def test_the_third_stage_and_the_prices_mean_the_same_by_a_budget() -> None:
    task, elastic, x = made(wanted=(0.1, 0.5))
    start_from_layers(elastic, x)
    train_gates(elastic, task, steps=20, tau=None)
    calibrate_acm(elastic, x)
    prices = [place.prices.clone() for place in elastic.places.values()]
    targets = budget_shares(elastic, x)
    assert all(torch.equal(a, place.prices) for a, place in zip(prices, elastic.places.values(), strict=True))
    everything = 100 * sum(acm.learners * acm.learner_macs for acm in elastic.acms.values())
    for level, target in enumerate(targets):
        elastic.select(level)
        elastic(x)
        assert sum(acm.spent for acm in elastic.acms.values()) / everything == pytest.approx(target, abs=0.04)
    # Linear layers keep a learner, so a tenth of what can be saved costs more than a tenth of everything.
    assert targets[0] > 0.1 + 0.03
    elastic.set_budget(1.0)
    finetune_acm(elastic, task, steps=40, level=0, lr=1e-2, cost_weight=20.0, entropy_weight=0.0, diversity_weight=0.0)
    elastic.select(0)
    torch.manual_seed(0)
    for acm in elastic.acms.values():
        acm.training = True
    elastic(x)
    samples = [acm.sample for acm in elastic.acms.values() if acm.sample is not None]
    shares = [sample.unflatten(0, (20, -1)).mean(1) for sample in samples]
    weight = torch.tensor([5.0 * acm.learner_macs for acm in elastic.acms.values()])
    assert float(mean_cost(torch.stack(shares), weight).detach()) == pytest.approx(targets[0], abs=0.015)


@pytest.mark.parametrize("bad", [{"learners": 0}, {"wanted": (0.5, 0.2)}, {"wanted": (1.0,)}, {"samples": 0}])
def test_bad_settings_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(BadInput):
        AdaptiveComputationModules(**bad)  # type: ignore[arg-type]
