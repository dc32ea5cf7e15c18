"""Sorted training: the gradient of random micro-steps is that of all configs, and checkpoints hold every level."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchgraft.bench.files import pack_tensors, unpack_tensors
from torchgraft.contracts.subjects import case
from torchgraft.elastic.sortednet import SortedNet, SortedTrainer, sort, sum_over_depths
from torchgraft.engines.nesting import ElasticModule, Nested, NestedElastic
from torchgraft.errors import BadInput


def _grid() -> tuple[Nested, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(3, 6), *(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2)), nn.Linear(6, 2)
    ).double()
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)
    return sort(net, x[:2], width=(1 / 3, 2 / 3, 1.0), depth=(0.5, 1.0)), x, y


def _gradient(nested: Nested) -> torch.Tensor:
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in nested.parameters()]
    ).clone()


def test_micro_steps_averaged_over_all_draws_are_the_mean_over_configs() -> None:
    nested, x, y = _grid()
    assert len(nested.configs) == 6
    optimizer = torch.optim.SGD(nested.parameters(), lr=0.0)
    trainer = SortedTrainer(nested, optimizer, F.mse_loss, grad_accum=2)
    total = 0.0
    for pair in itertools.product(range(6), repeat=2):
        trainer.draw = lambda pair=pair: list(pair)  # type: ignore[misc]
        losses = trainer.step((x, y))
        assert len(losses) == 2
        total = total + _gradient(nested) / 36
    expected = 0.0
    for level in range(6):
        optimizer.zero_grad()
        F.mse_loss(nested.use(level)(x), y).backward()
        expected = expected + _gradient(nested) / 6
    assert torch.allclose(total, expected, atol=1e-14)
    assert float(torch.as_tensor(expected).abs().max()) > 1e-3


def test_smaller_levels_are_the_beginning_of_larger_ones_by_hand() -> None:
    nested, x, _ = _grid()
    net = nested.net
    with torch.no_grad():
        first = net[0].weight[:2], net[0].bias[:2], net[1][0].weight[:2, :2], net[1][0].bias[:2], net[3].weight[:, :2]
        hidden = torch.tanh((x @ first[0].T + first[1]) @ first[2].T + first[3])
        by_hand = hidden @ first[4].T + net[3].bias
        assert torch.allclose(nested.select({"width": 1 / 3, "depth": 0.5})(x), by_hand, atol=1e-12)


def test_a_step_updates_from_all_its_micro_steps() -> None:
    nested, x, y = _grid()
    before = nested.net[0].weight.detach().clone()
    trainer = SortedTrainer(nested, torch.optim.SGD(nested.parameters(), lr=0.1), F.mse_loss, sampler="all")
    twin = copy.deepcopy(nested)
    assert len(trainer.step((x, y), (x + 1, y))) == 6
    for level in range(6):
        (F.mse_loss(twin.use(level)(x + level % 2), y) / 6).backward()
    expected = before - 0.1 * twin.net[0].weight.grad
    assert torch.allclose(nested.net[0].weight, expected, atol=1e-14)
    with pytest.raises(BadInput, match="batch"):
        trainer.step()


def test_a_checkpoint_reproduces_every_level_bit_for_bit() -> None:
    nested, x, y = _grid()
    SortedTrainer(nested, torch.optim.SGD(nested.parameters(), lr=0.1), F.mse_loss, grad_accum=3).step((x, y))
    tensors, _ = unpack_tensors(pack_tensors(nested.state_dict()))
    fresh = _grid()[0]
    fresh.load_state_dict(tensors)
    with torch.no_grad():
        for level in range(6):
            assert torch.equal(fresh.use(level)(x), nested.use(level)(x))


def test_every_config_is_evaluated_and_batch_norms_are_measured_first() -> None:
    tiny = case("cnn")
    nested = sort(tiny.model, tiny.inputs, width=(0.5, 1.0))  # type: ignore[arg-type]
    trainer = SortedTrainer(nested, torch.optim.SGD(nested.parameters(), lr=0.1), F.cross_entropy)
    before = copy.deepcopy(nested.own.state_dict())
    scores = trainer.evaluate_all(tiny.task)
    assert list(scores) == [(("width", 0.5), ("depth", 1.0)), (("width", 1.0), ("depth", 1.0))]
    assert all(0.0 <= score <= 1.0 for score in scores.values())
    assert any(not torch.equal(value, before[name]) for name, value in nested.own.state_dict().items())


def test_losses_of_depths_add_up_through_one_head() -> None:
    torch.manual_seed(0)
    hidden = {depth: torch.randn(4, 5, dtype=torch.float64) for depth in (2, 1, 3)}
    head, target = nn.Linear(5, 3).double(), torch.tensor([0, 1, 2, 0])
    total = sum_over_depths(hidden, head, target, F.cross_entropy)
    with torch.no_grad():
        one_by_one = sum(float(F.cross_entropy(head(state), target)) for state in hidden.values())
    assert float(total.detach()) == pytest.approx(one_by_one, abs=1e-12)
    with pytest.raises(BadInput, match="depth"):
        sum_over_depths({}, head, target, F.cross_entropy)


def test_budgets_in_depth_leave_layers_out() -> None:
    tiny = case("mlp")
    elastic = SortedNet(budgets=(0.3,), depth=0.5).build(tiny.model, tiny.task)
    assert isinstance(elastic, NestedElastic)
    elastic.set_budget(elastic.budgets[0])
    assert len(elastic.nested.skeleton().hidden) == 2  # ceil(3 * 0.3^0.5)
    assert len(elastic.full.hidden) == 3


def test_bad_settings_are_refused() -> None:
    tiny = case("mlp")
    for bad in ({"budgets": ()}, {"budgets": (1.0,)}, {"depth": 2.0}, {"samples": 0}, {"grad_accum": 0}):
        with pytest.raises(BadInput):
            SortedNet(**bad)  # type: ignore[arg-type]

    class Other(ElasticModule):
        def select(self, level: int) -> None:
            del level

    with pytest.raises(BadInput, match="Other"):
        SortedNet().train(Other((1.0,)), tiny.task, steps=1)
