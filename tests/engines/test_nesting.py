"""Nested networks: levels are exact slices of shared weights, for any traced model, and stay so."""

from __future__ import annotations

import copy
import math
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.meters import macs
from torchgraft.bench.models import ByteTransformer, ResidualNet
from torchgraft.bench.task import Task
from torchgraft.contracts.subjects import case
from torchgraft.engines.nesting import (
    Arrange,
    ElasticModule,
    Nest,
    Nested,
    NestedElastic,
    across,
    calibrate,
    draws,
    evaluate_levels,
    grid,
    importance,
    nest,
    nest_beside,
    ordered,
    recalibrate,
    train_levels,
    uncompounded,
)
from torchgraft.engines.nesting.slices import paths, unit_counts
from torchgraft.engines.surgery.edits import apply_edits
from torchgraft.engines.surgery.slicing import Slice
from torchgraft.engines.width import prepare
from torchgraft.errors import BadInput


def _models() -> dict[str, tuple[nn.Module, Tensor]]:
    torch.manual_seed(0)
    return {
        "cnn": (ResidualNet(widths=(8, 16), depth=2).eval(), torch.randn(3, 1, 8, 8)),
        "fused": (case("transformer").model, torch.randn(3, 6, 8)),
        "text": (ByteTransformer(11, 6, d_model=16, depth=2, num_heads=2).eval(), torch.randint(11, (3, 6))),
        "torch": (
            nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2).eval(),
            torch.randn(3, 5, 16),
        ),
    }


@cache
def _made(name: str) -> Nested:
    model, x = _models()[name]
    return nest(model, x, grid((0.25, 0.5, 1.0), (0.5, 1.0)))


def _nested(name: str) -> tuple[Nested, Tensor]:
    """Return a copy of the nested model, at its least level, and inputs; tracing is done once."""
    return copy.deepcopy(_made(name)).use(0), _models()[name][1]


@pytest.mark.parametrize("name", ["cnn", "fused", "text", "torch"])
def test_a_level_gives_what_a_network_of_copied_slices_gives(name: str) -> None:
    nested, x = _nested(name)
    model = _models()[name][0].double()
    nested.double()
    x = x.double() if x.is_floating_point() else x
    with torch.no_grad():
        for level in range(len(nested.configs)):
            expected = nested.standalone(level)(x)
            assert torch.allclose(nested.use(level)(x), expected, atol=1e-12)
        assert torch.allclose(nested(x), model(x), atol=1e-12)  # the last level is the whole network


@pytest.mark.parametrize("name", ["cnn", "fused", "text"])
def test_parameters_outside_a_level_get_no_gradient(name: str) -> None:
    nested, x = _nested(name)
    nested.train()(x).square().sum().backward()
    cuts = {key: dims for edit in nested.edits[0] if isinstance(edit, Slice) for key, dims in edit.tensors.items()}
    reached = 0
    for key, value in nested.net.named_parameters():
        if value.grad is None:
            continue
        inside = torch.ones_like(value)
        for dim, runs in cuts.get(key, {}).items():
            outside = torch.ones(value.shape[dim], dtype=torch.bool)
            for start, stop in runs:
                outside[start:stop] = False
            inside.index_fill_(dim, outside.nonzero()[:, 0], 0.0)
        assert torch.equal(value.grad * (1 - inside), torch.zeros_like(value))
        reached += bool((value.grad * inside).any())
    assert reached > 2
    if name == "cnn":
        return
    last = {"fused": "layers.2.", "text": "blocks.1."}[name]
    gone = [value.grad for key, value in nested.net.named_parameters() if key.startswith(last)]
    assert gone
    assert all(gradient is None for gradient in gone)  # the layers that the level leaves out


def test_views_follow_the_weights_through_steps_casts_and_loading() -> None:
    nested, x = _nested("text")
    small = nested

    def agrees() -> bool:
        with torch.no_grad():
            return torch.allclose(small(x), nested.standalone(0)(x), atol=1e-5)

    assert agrees()
    optimizer = torch.optim.SGD(nested.parameters(), lr=0.1)
    small(x).square().sum().backward()
    assert bool(nested.net.blocks[0].mlp.fc1.weight.grad.any())  # although the views were last bound without gradients
    optimizer.step()
    assert agrees()
    for assign in (False, True):
        state = {name: value + 0.01 for name, value in copy.deepcopy(nested.state_dict()).items()}
        nested.load_state_dict(state, assign=assign)
        assert agrees()
    twin = copy.deepcopy(nested)
    with torch.no_grad():
        for value in twin.parameters():
            value.zero_()
        assert agrees()
        assert not bool(twin.use(0)(x).any())
    nested.double()
    assert agrees()
    assert nested(x).dtype == torch.float64


def test_no_level_but_a_gathered_one_holds_memory_of_its_own() -> None:
    nested, x = _nested("text")
    with torch.no_grad():
        nested(x)
        shared = {value.untyped_storage().data_ptr() for value in nested.net.parameters()}
        held = [
            value for part in nested.skeleton().modules() for value in part._parameters.values() if value is not None
        ]
    assert held
    assert all(value.untyped_storage().data_ptr() in shared for value in held)


def test_batch_norms_have_statistics_of_their_own() -> None:
    nested, x = _nested("cnn")
    before = copy.deepcopy(nested.own[1].state_dict())
    recalibrate(nested, [x, x + 1])
    assert nested.level == 0
    assert nested.own[0]._buffers["bn/running_mean"].shape == (2,)
    conv = nested.standalone(1).stem
    with torch.no_grad():
        means = torch.stack([conv(each).mean((0, 2, 3)) for each in (x, x + 1)]).mean(0)
    assert torch.allclose(nested.own[1]._buffers["bn/running_mean"], means, atol=1e-6)  # the plain average
    assert not torch.equal(before["bn/running_mean"], nested.own[1]._buffers["bn/running_mean"])
    nested.train().use(0)(x)
    assert torch.allclose(nested.own[1]._buffers["bn/running_mean"], means, atol=1e-6)  # level 0 moves its own alone
    assert torch.equal(nested.net.bn.running_mean, _made("cnn").net.bn.running_mean)


@given(seed=st.integers(0, 1000), share=st.floats(0.05, 1.0))
@settings(max_examples=5, deadline=None)
def test_the_kept_units_are_the_most_important(seed: int, share: float) -> None:
    torch.manual_seed(seed)
    model, x = nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 2)), torch.randn(4, 3)
    found = prepare(model, x)
    scores = {"0": torch.rand(7)}
    nested = nest(model, x, grid((share, 1.0)) if share < 1 else grid((1.0,)), scores=scores)
    count = max(1, round(share * 7))
    best = scores["0"].argsort(descending=True)[:count]
    with torch.no_grad():
        expected = model[2](torch.zeros(4, 7).index_copy_(1, best, torch.tanh(model[0](x))[:, best]))
        assert torch.allclose(nested.use(0)(x), expected, atol=1e-6)
        assert torch.allclose(nested.use(-1)(x), model(x), atol=1e-6)
    assert unit_counts(found, share) == {"0": count}


def test_units_whose_order_matters_stay_where_they_are() -> None:
    class Cumulative(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 5)
            self.c = nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            weights = torch.linspace(0, 1, 6)
            out: Tensor = self.c(F.relu(self.b(self.a(x) * weights)))
            return out

    model, x = Cumulative().eval(), torch.randn(4, 3)
    found = prepare(model, x)
    scores = {name: torch.arange(float(group.size)) for name, group in found.groups.items()}
    order = ordered(found, scores, x)
    assert order["b"] == [4, 3, 2, 1, 0]
    assert order.get("a", list(range(6))) == list(range(6))


def test_beside_the_original_budgets_are_what_is_counted() -> None:
    tiny = case("transformer")
    found = uncompounded(prepare(tiny.model, tiny.inputs))
    assert not [group for group in found.groups.values() if group.kind == "features"]
    scores = importance(found, tiny.task)
    assert all(bool((value >= 0).all()) and bool(value.any()) for value in scores.values())
    edit = nest_beside(found, scores, tiny.inputs, (0.3, 0.6, 0.61))
    elastic = apply_edits(tiny.model, [edit])
    assert isinstance(elastic, NestedElastic)
    assert len(elastic.budgets) == 3  # two that nearly agree are one
    whole = macs(tiny.model, tiny.inputs)
    for budget in elastic.budgets:
        assert macs(elastic.set_budget(budget), tiny.inputs) / whole == pytest.approx(budget, rel=1e-6)
    assert max(elastic.budgets[:-1]) == pytest.approx(0.6, abs=0.06)
    assert not any(value.requires_grad for value in elastic.full.parameters())
    expected = elastic.set_budget(elastic.budgets[0])(tiny.inputs)
    state = {name: value.clone() for name, value in elastic.state_dict().items()}
    with torch.no_grad():
        for value in elastic.nested.parameters():
            value.zero_()
    assert not torch.equal(elastic(tiny.inputs), expected)
    elastic.load_state_dict(state, assign=True)
    assert torch.equal(elastic(tiny.inputs), expected)
    # The shared weights hold no unit that no level uses.
    assert elastic.nested.net.head.weight.numel() < tiny.model.head.weight.numel()
    with pytest.raises(BadInput, match="budget"):
        nest_beside(found, scores, tiny.inputs, (0.999,))


def test_the_original_at_the_first_order_gives_the_gradient_scores_by_hand() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1, bias=False)).double()
    x, y = torch.randn(4, 2).double(), torch.randn(4, 1).double()
    task = Task(net, (x, y), (x, y), (x, y), F.mse_loss, lambda out, t: out[:, 0], batch_size=4)
    found = prepare(net, x)
    loss = F.mse_loss(net(x), y)
    a, b, c = torch.autograd.grad(loss, list(net.parameters()))
    with torch.no_grad():
        by_hand = ((a * net[0].weight).sum(1) + b * net[0].bias + (c * net[1].weight).sum(0)).abs()
    assert torch.allclose(importance(found, task)["0"], by_hand)


def test_samplers() -> None:
    assert draws("all", 3, 1, 0)() == [0, 1, 2]
    sandwich = draws("sandwich", 9, 3, 0)()
    assert sandwich[:2] == [8, 0]
    assert len(sandwich) == 3
    uniform = draws("uniform", 4, 2, 0)
    drawn = torch.tensor([uniform() for _ in range(2000)]).flatten()
    assert torch.allclose(torch.bincount(drawn) / 4000, torch.full((4,), 0.25), atol=0.03)
    assert draws("uniform", 4, 2, 5)() == draws("uniform", 4, 2, 5)()
    for arguments in (("other", 3, 1), ("uniform", 0, 1), ("uniform", 3, 0), ("sandwich", 3, 1)):
        with pytest.raises(BadInput):
            draws(*arguments, 0)  # type: ignore[arg-type]


def test_training_moves_all_levels_and_reports_them() -> None:
    tiny = case("cnn")
    nested = nest(tiny.model, tiny.inputs, grid((0.5, 1.0)))  # type: ignore[arg-type]
    before = copy.deepcopy(nested.state_dict())
    assert train_levels(nested, tiny.task, steps=0) == 0
    assert train_levels(nested.use(0), tiny.task, steps=2, teacher=tiny.model, sampler="all") == 2
    assert nested.level == 0
    assert not nested.training
    assert any(not torch.equal(before[name], value) for name, value in nested.state_dict().items())
    scores = evaluate_levels(nested, tiny.task)
    assert len(scores) == 2
    assert nested.level == 0
    kept = nested.own[0].state_dict()
    calibrate(nested, tiny.task)
    assert kept.keys() == nested.own[0].state_dict().keys()
    with pytest.raises(BadInput, match="steps"):
        train_levels(nested, tiny.task, steps=-1)
    with pytest.raises(BadInput, match="Nested"):
        across(lambda *_: torch.zeros(()), lambda: [0])(nn.Linear(1, 1), torch.ones(1), torch.ones(1), torch.ones(1))


def test_what_cannot_be_nested_is_refused() -> None:
    net = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1))
    x = torch.ones(2, 2)
    with pytest.raises(BadInput, match="width"):
        nest(net, x, [{"width": 0.0}])
    with pytest.raises(BadInput, match="depth"):
        grid((1.0,), (1.5,))
    nested = nest(net, x, grid((0.5, 1.0)))
    with pytest.raises(BadInput, match="config"):
        nested.select({"width": 0.3, "depth": 1.0})
    with pytest.raises(BadInput, match="level"):
        nested.use(2)
    with pytest.raises(BadInput, match="levels"):
        Nested(net, [])
    with pytest.raises(BadInput, match="nested"):
        nest(nn.Linear(2, 2), x, grid((0.5,)))
    cut = Slice(tensors={"0.bias": {0: ((0, 1),)}}, attributes={}, units={})
    with pytest.raises(BadInput, match="once"):
        Nested(net, [[cut, cut]])
    with pytest.raises(BadInput, match="too small"):
        Arrange(tensors={"0.bias": {0: (9,)}}, attributes={}).rewrite(copy.deepcopy(net))
    with pytest.raises(BadInput, match="no parameter"):
        Arrange(tensors={"0.other": {0: (0,)}}, attributes={}).rewrite(copy.deepcopy(net))
    with pytest.raises(BadInput, match="budgets"):
        NestedElastic(net, nested, (1.0,))
    assert "budgets 0.5" in Nest.of((), ((),), (0.5, 1.0)).describe()[""]
    assert paths([], 0.5) == ()


class Halves(ElasticModule):
    """A linear layer over the samples whose first number is below a level's threshold, zeros for the others."""

    by_sample = True

    def __init__(self, thresholds: tuple[float, ...]) -> None:
        super().__init__((*(0.1 * (place + 1) for place in range(len(thresholds))), 1.0))
        self.layer, self.thresholds, self.limit = nn.Linear(3, 2).double(), (*thresholds, math.inf), math.inf

    def select(self, level: int) -> None:
        self.limit = self.thresholds[level]

    def forward(self, x: Tensor) -> Tensor:
        out, rows = x.new_zeros(len(x), 2), x[:, 0] < self.limit
        out[rows] = self.layer(x[rows])
        return out


def test_what_budgets_cost_is_counted_anew_on_other_samples() -> None:
    model = Halves((-0.5, 0.0, 0.1))
    x = torch.tensor([[-1.0], [-0.2], [0.3], [0.4], [-0.7], [0.9], [2.0], [-3.0]], dtype=torch.float64).expand(8, 3)
    assert model.recount(x) is model
    # By hand: -1, -0.7 and -3 lie below -0.5, -0.2 as well below 0, and nothing lies between 0 and 0.1.
    assert model.budgets == pytest.approx((3 / 8, 4 / 8, 4 / 8, 1.0), abs=1e-8)
    assert model.budgets[1] < model.budgets[2]
    assert (model.budget, model.limit) == (1.0, math.inf)
    model.declare((0.0, 1.2, 1.1))
    assert model.budgets == pytest.approx((0.0, 1.0, 1.0, 1.0), abs=1e-8)
    assert sorted(set(model.budgets)) == list(model.budgets)
