"""ReSTE: straight-through at o = 1, finite differences of its power function, and the equilibrium of its indicators."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torchgraft.bench.task import Task
from torchgraft.engines.binary import Straight, binary_layers, freeze, sign
from torchgraft.engines.surgery.edits import apply_edits, edit_from_record, edit_to_record, history
from torchgraft.errors import BadInput
from torchgraft.shrink.quantize import reste_estimator as module
from torchgraft.shrink.quantize.reste_estimator import (
    BinaryConv2d,
    BinaryLinear,
    ReSTE,
    ReSTEBinarization,
    ReSTEEdit,
    ReSTESchedule,
    RowReSTE,
    estimator_indicators,
    reste_sign,
    reste_slope,
)


def slope_by_autograd(z: Tensor, o: float, **settings: float) -> Tensor:
    leaf = z.clone().requires_grad_()
    reste_sign(leaf, o, **settings).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def test_at_one_it_is_straight_through_clipped_at_t() -> None:
    z = torch.cat([torch.linspace(-3, 3, 601, dtype=torch.float64), torch.tensor([0.0, 1.5, -1.5, 0.1])])
    leaf = z.clone().requires_grad_()
    Straight(1.5)(leaf).sum().backward()
    assert leaf.grad is not None
    assert torch.equal(slope_by_autograd(z, 1.0), leaf.grad)
    assert torch.equal(reste_sign(z, 1.0), sign(z))


@settings(max_examples=40, deadline=None)
@given(st.floats(1, 12), st.floats(0.11, 1.49), st.sampled_from([-1.0, 1.0]))
def test_the_backward_is_the_finite_difference_of_the_power(o: float, size: float, side: float) -> None:
    z, step = torch.tensor([side * size], dtype=torch.float64), 1e-6
    difference = (ReSTE(o).surrogate(z + step) - ReSTE(o).surrogate(z - step)) / (2 * step)
    assert slope_by_autograd(z, o).item() == pytest.approx(difference.item(), rel=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.floats(1, 12), st.floats(-1.5, 1.5))
def test_the_power_is_odd_and_the_slope_never_negative(o: float, z: float) -> None:
    value = torch.tensor([z], dtype=torch.float64)
    estimator = ReSTE(o)
    assert estimator.surrogate(-value).item() == -estimator.surrogate(value).item()
    assert estimator.slope(value).item() >= 0
    near = estimator.surrogate(value + 1e-12)
    assert abs((near - estimator.surrogate(value)).item()) <= 2 * (1e-12) ** (1 / o) + 1e-9


def test_three_places_by_hand() -> None:
    found = reste_slope(torch.tensor([0.05, 0.5, 1.6], dtype=torch.float64), 3.0)
    assert found.tolist() == pytest.approx([0.1 ** (1 / 3) / 0.1, 0.5 ** (-2 / 3) / 3, 0.0])
    assert bool(reste_slope(torch.zeros(2), 3.0).isfinite().all())


def test_error_falls_and_gradient_energy_rises_with_o() -> None:
    z = torch.linspace(-1, 1, 4001, dtype=torch.float64)
    errors, energies = [], []
    for o in (1.0, 1.5, 2.0, 3.0, 5.0, 10.0):
        layer = BinaryLinear(4001, out_features=1).double()
        layer.weight.data = z[None].clone()
        for estimator in (layer.estimator, layer.activation):
            assert isinstance(estimator, ReSTE)
            estimator.o = o
        errors.append(estimator_indicators(layer)[""].error)
        energies.append(float(reste_slope(z, o).square().mean()))
    assert all(b < a for a, b in itertools.pairwise(errors))
    assert all(b > a for a, b in itertools.pairwise(energies))
    at_one = torch.ones(3)  # and it is a matter of where the weights lie
    assert reste_slope(at_one, 3.0).square().mean() < reste_slope(at_one, 1.0).square().mean()


@pytest.mark.parametrize("o", [1.0, 3.0])
def test_a_latents_gradient_is_upstream_times_scale_times_slope(o: float) -> None:
    layer = BinaryLinear(5, out_features=3).double()
    for estimator in (layer.estimator, layer.activation):
        assert isinstance(estimator, ReSTE)
        estimator.o = o
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(7, 3, dtype=torch.float64)
    (layer(x) * upstream).sum().backward()
    w, a = layer.weight.detach(), x.detach()
    size = w.abs().mean()
    assert layer.weight.grad is not None
    assert x.grad is not None
    assert torch.allclose(layer.weight.grad, (upstream.T @ sign(a)) * size * reste_slope(w, o))
    assert torch.allclose(x.grad, (upstream @ sign(w)) * size * reste_slope(a, o))


def test_the_schedule_runs_from_one_to_its_end_and_slowly_at_first() -> None:
    schedule = ReSTESchedule(3.0, epochs=10)
    values = [schedule.o(epoch) for epoch in range(11)]
    assert values[0] == 1.0
    assert values[10] == 3.0
    assert values[5] == pytest.approx(1 + 2 * (1 - math.cos(math.pi / 4)))
    assert all(b > a for a, b in itertools.pairwise(values))
    model = nn.Sequential(BinaryConv2d(2), nn.ReLU(), BinaryConv2d(2, estimator="ste"))
    assert schedule.step(model, 5) == values[5]
    assert model[0].estimator.o == model[0].activation.o == values[5]
    assert isinstance(model[2].estimator, Straight)
    assert schedule.step(model, 99) == 3.0


def test_indicators_by_hand() -> None:
    layer = BinaryLinear(2, out_features=1, bias=False)
    layer.weight.data = torch.tensor([[0.5, -0.25]])
    before = estimator_indicators(layer)[""]
    assert before.error == pytest.approx(math.hypot(0.5, 0.75))
    assert before.variance is None
    layer.weight.grad = torch.tensor([[1.0, -3.0]])
    assert estimator_indicators(layer)[""].variance == 1.0


def test_on_bits_the_layer_says_the_same() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(BinaryConv2d(3, out_channels=4, stride=2), nn.Flatten(), BinaryLinear(36, out_features=5))
    x = torch.randn(6, 3, 6, 6)
    for backend in ("int8", "xnor"):
        assert torch.equal(freeze(model.eval(), backend=backend)(x), model(x))


def test_wrong_settings_are_refused() -> None:
    for wrong in (
        lambda: reste_slope(torch.zeros(1), 0.5),
        lambda: ReSTE(2.0, t=0.1, m=0.2),
        lambda: BinaryLinear(2, estimator="rest"),
        lambda: ReSTESchedule(0.5, epochs=3),
        lambda: ReSTESchedule(epochs=0),
        lambda: estimator_indicators(nn.Linear(2, 2)),
    ):
        with pytest.raises(BadInput):
            wrong()


def hidden() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3)]
    return nn.Sequential(*layers).double().eval()


def task_of(model: nn.Module) -> Task:
    torch.manual_seed(1)
    x, y = torch.randn(24, 6, dtype=torch.float64), torch.randint(0, 3, (24,))
    score = lambda out, target: (out.argmax(1) == target).float()  # noqa: E731
    return Task(model, (x, y), (x, y), (x, y), nn.functional.cross_entropy, score, batch_size=8, learning_rate=0.01)


def test_untrained_the_lever_has_the_signs_and_scales_of_the_weights() -> None:
    model = hidden()
    made = ReSTEBinarization(steps=0).apply(model, task_of(model), 1.0)
    for place in (2, 4):
        dense, layer = model[place].weight.detach(), made[place]  # type: ignore[index]
        assert torch.equal(layer.signs().detach(), sign(dense))
        assert torch.allclose(layer.row_scale().detach(), dense.abs().mean(1))
        z = layer.weight.detach()
        assert torch.allclose(z, dense / dense.abs().amax(1, keepdim=True))
        assert layer.activation is None
        assert layer.estimator.o == 3.0
        upstream, x = torch.randn(5, len(dense), dtype=torch.float64), torch.randn(5, dense.shape[1]).double()
        (gradient,) = torch.autograd.grad((layer(x) * upstream).sum(), layer.weight)
        assert torch.allclose(gradient, (upstream.T @ x) * layer.row_scale()[:, None] * reste_slope(z, 3.0))
    assert type(made[0]) is type(made[6]) is nn.Linear  # type: ignore[index]
    (edit,) = history(made)
    assert edit_from_record(edit_to_record(edit)) == edit == ReSTEEdit(modules=("2", "4"), o=3.0)


def test_the_exponent_rises_while_the_lever_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hidden()
    seen: list[float] = []

    class Watched(RowReSTE):
        def slope(self, z: Tensor) -> Tensor:
            seen.append(self.o)
            return super().slope(z)

    monkeypatch.setattr(module, "RowReSTE", Watched)
    made = ReSTEBinarization(steps=5, o_end=4.0).apply(model, task_of(model), 0.5)
    schedule = ReSTESchedule(4.0, epochs=5)
    assert seen == [schedule.o(step) for step in range(5)]
    (place,) = binary_layers(made)
    layer = binary_layers(made)[place]
    assert isinstance(layer.estimator, ReSTE)
    assert layer.estimator.o == 4.0
    start = binary_layers(ReSTEBinarization(steps=0).apply(model, task_of(model), 0.5))[place]
    assert not torch.equal(layer.weight, start.weight)
    assert not made.training
    assert not torch.equal(made[0].weight, model[0].weight)  # type: ignore[index]
    ignoring = ReSTEBinarization(steps=2).apply(model.train(), task_of(model), 1.0, ignore=["0", "4"])
    assert torch.equal(ignoring[0].weight, model[0].weight)  # type: ignore[index]
    assert torch.equal(ignoring[4].weight, model[4].weight)  # type: ignore[index]
    assert ignoring[0].weight.requires_grad  # type: ignore[index]
    assert all(each.training for each in ignoring.modules())


def test_the_lever_saves_a_bit_a_weight_and_what_loads_can_be_trained() -> None:
    model = hidden()
    made = ReSTEBinarization(steps=2).apply(model, task_of(model), 1.0)
    assert made.state_dict()["2.weight"].dtype == torch.uint8
    assert made.state_dict()["2.weight"].shape == (10, 1)
    fresh = apply_edits(hidden(), history(made)).eval()
    fresh.load_state_dict(made.state_dict())
    x = torch.randn(4, 6, dtype=torch.float64)
    assert torch.equal(fresh(x), made(x))
    layer = binary_layers(fresh)["2"]
    assert bool((layer.estimator.slope(layer.weight.detach()) > 0.5).all())


def test_wrong_settings_of_the_lever_are_refused() -> None:
    for wrong in ({"o_end": 0.5}, {"steps": -1}, {"samples": 0}, {"m": 2.0}):
        with pytest.raises(BadInput):
            ReSTEBinarization(**wrong)  # type: ignore[arg-type]
