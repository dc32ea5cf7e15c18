"""BiPer: the gradient of the sine, the closed form of its error, and what is stored and executed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torchgraft.bench.files import size_of_tensors
from torchgraft.contracts.subjects import case
from torchgraft.engines.binary import freeze, sign
from torchgraft.engines.parametrize import fold, parametrize
from torchgraft.engines.surgery.edits import apply_edits, edit_from_record, edit_to_record, history
from torchgraft.errors import BadInput
from torchgraft.shrink.quantize.biper_binarization import (
    BiPer,
    BiPerEdit,
    BiPerEstimator,
    BiPerWeight,
    NormalisedSign,
    binarize,
    laplace_error,
    omega_for,
    quantization_error,
    set_stage,
)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1)
    return nn.Sequential(nn.Conv2d(1, 4, 3), conv, nn.Flatten(), nn.Linear(54, 8), nn.Linear(8, 3)).eval()


@pytest.mark.parametrize("stage", [1, 2])
def test_the_gradient_is_that_of_the_sine(stage: int) -> None:
    w = torch.randn(300, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    upstream = torch.randn(300, dtype=torch.float64)
    layer = parametrize(nn.Linear(300, 1, bias=False).double(), BiPerWeight(20.0, stage=stage))
    (latent,) = layer.parametrizations.weight.parameters()
    latent.data = w.detach()[None].clone()
    (layer.weight[0] * upstream).sum().backward()
    expected = upstream * (20 * torch.cos(20 * w.detach()))
    assert latent.grad is not None
    assert torch.equal(latent.grad[0], expected)
    wave = torch.sin(20 * w.detach())
    assert torch.equal(layer.weight[0].detach(), wave if stage == 1 else sign(wave))
    held = layer.weight.detach().clone()
    assert torch.equal(fold(layer).weight, held)


def test_the_sign_where_the_sine_is_zero_is_plus_one() -> None:
    assert BiPerEstimator(20.0)(torch.zeros(3)).tolist() == [1.0, 1.0, 1.0]


@settings(max_examples=50, deadline=None)
@given(st.floats(0.5, 50), st.floats(-2, 2), st.integers(-3, 3))
def test_one_period_further_lies_the_same_bit(omega: float, w: float, turns: int) -> None:
    value = torch.tensor([w], dtype=torch.float64)
    if abs(math.sin(omega * w)) < 1e-6:
        return
    estimator = BiPerEstimator(omega)
    assert torch.equal(estimator(value), estimator(value + turns * 2 * math.pi / omega))


@pytest.mark.parametrize(("t", "expected"), [(0.3, 0.0566), (0.5, 0.0888), (1.0, 0.1028), (10.0, 0.0949)])
def test_the_closed_form_is_that_of_laplace_samples(t: float, expected: float) -> None:
    draw = torch.Generator().manual_seed(1)
    u = torch.rand(400_000, dtype=torch.float64, generator=draw) - 0.5
    wave = torch.sin(-t * u.sign() * torch.log1p(-2 * u.abs()))
    assert laplace_error(t) == pytest.approx(expected, abs=5e-5)
    found = wave.square().mean() - wave.abs().mean() ** 2
    # the delta method: the error is a mean of (|v| - m)^2
    deviation = (wave.abs() - wave.abs().mean()).square().std() / len(u) ** 0.5
    assert abs(found - laplace_error(t)) <= 3 * deviation


def test_the_error_of_a_model_is_the_least_over_scales() -> None:
    made = binarize(net(), activations=False)
    with torch.no_grad():
        made[1].weight.mul_(3.0)
    waves = [torch.sin(20 * made[index].weight.detach().double()) for index in (1, 3)]
    grid = torch.linspace(0, 1, 20001, dtype=torch.float64)
    least = [
        min(float((wave - g * sign(wave)).square().mean()) for g in grid[(grid - wave.abs().mean()).abs() < 1e-3])
        for wave in waves
    ]
    assert quantization_error(made) == pytest.approx(sum(least) / 2, abs=1e-6)
    shares = [error / float(wave.square().mean()) for error, wave in zip(least, waves, strict=True)]
    assert quantization_error(made, relative=True) == pytest.approx(sum(shares) / 2, abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.001, 0.1025), st.floats(0.01, 10))
def test_omega_is_found_for_an_error(target: float, scale: float) -> None:
    assert laplace_error(omega_for(target, scale) * scale) == pytest.approx(target, rel=1e-6)


def test_binarised_layers_have_the_signs_and_nearest_scales_of_their_weights() -> None:
    model = net()
    made = binarize(model, activations=False)
    assert type(made[0]) is nn.Conv2d
    assert type(made[4]) is nn.Linear
    for index in (1, 3):
        dense, new = model[index].weight.detach(), made[index]
        assert torch.equal(new.signs().detach(), sign(dense))
        assert torch.allclose(new.row_scale().detach(), dense.abs().flatten(1).mean(1))
        assert new.weight.abs().max() <= math.pi / 40 + 1e-6
        assert bool((new.estimator.slope(new.weight.detach()) >= -1e-5).all())


def test_a_saved_layer_takes_a_bit_a_weight_and_loads_bit_for_bit() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(3))).eval()
    made = binarize(model, activations=False)
    before, after = (each.state_dict()["1.weight"].nbytes for each in (model, made))
    assert after * 32 == before
    assert size_of_tensors(made.state_dict()) < 0.72 * size_of_tensors(model.state_dict())
    x = torch.randn(5, 64)
    fresh = apply_edits(nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(3))), history(made)).eval()
    fresh.load_state_dict(made.state_dict())
    assert torch.equal(fresh(x), made(x))
    # what was loaded can be trained on: no latent lies where the slope is zero
    assert bool((fresh[1].estimator.slope(fresh[1].weight.detach()) > 10).all())


def test_stage_two_keeps_the_signs_of_stage_one() -> None:
    made = binarize(net(), stage=1, activations=True)
    assert made.state_dict()["1.weight"].dtype == torch.float32
    waves = made[1].signs().detach()
    assert len(waves.unique()) > 2
    set_stage(made, 2)
    assert torch.equal(made[1].signs().detach(), sign(waves))
    assert made.state_dict()["1.weight"].dtype == torch.uint8


@pytest.mark.parametrize("shape", [(50,), (6, 20), (3, 4, 5, 2)])
def test_activations_are_signs_with_the_polynomial_gradient_of_unit_spread(shape: tuple[int, ...]) -> None:
    scale = 3.0 * torch.arange(1, shape[0] + 1).reshape(-1, *[1] * (len(shape) - 1)) if len(shape) > 1 else 3.0
    a = (scale * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    upstream = torch.randn(shape, dtype=torch.float64)
    out = NormalisedSign()(a)
    assert torch.equal(out, sign(a))
    (out * upstream).sum().backward()
    b = a.detach().clone().requires_grad_()
    samples = [b] if len(shape) == 1 else list(b)
    u = torch.stack([each / (each.var() + 1e-5).sqrt() for each in samples]).reshape(shape)
    expected = torch.autograd.grad(u, b, upstream * (2 - 2 * u.detach().abs()).clamp(min=0))[0]
    assert a.grad is not None
    assert torch.allclose(a.grad, expected)


def test_a_samples_gradient_does_not_depend_on_its_batch() -> None:
    for shape in ((2, 12), (2, 3, 4, 5)):
        first = torch.randn(shape, dtype=torch.float64)
        other = torch.cat([first[:1], 100 * first[1:]])
        found = []
        for batch in (first, other):
            leaf = batch.clone().requires_grad_()
            NormalisedSign()(leaf)[0].sum().backward()
            assert leaf.grad is not None
            found.append(leaf.grad[0])
        assert torch.equal(*found)
        assert bool(found[0].any())
    single = torch.tensor([[0.25], [-0.75]], dtype=torch.float64).requires_grad_()
    NormalisedSign()(single).sum().backward()
    assert single.grad is not None
    assert single.grad.flatten().tolist() == [1.5, 0.5]


def test_with_binary_inputs_the_bits_say_the_same() -> None:
    model = binarize(net())
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(freeze(model)(x), model(x))


def test_the_least_harmful_layers_come_first() -> None:
    tiny = case("mlp")
    model = tiny.model
    made = BiPer(samples=32).apply(model, tiny.task, 0.3)
    (edit,) = history(made)
    assert isinstance(edit, BiPerEdit)
    assert edit_from_record(edit_to_record(edit)) == edit
    x = tiny.task.train.inputs
    assert isinstance(x, Tensor)

    def change(name: str) -> float:
        alone = apply_edits(model, [BiPerEdit(modules=(name,), omega=20.0)])
        return float((alone(x) - model(x)).square().mean().detach())

    names = [f"hidden.{index}.0" for index in range(3)]
    assert edit.modules == (min(names, key=change),)


def test_wrong_settings_are_refused() -> None:
    for wrong in (
        lambda: BiPer(omega=0.0),
        lambda: BiPer(samples=0),
        lambda: BiPerEstimator(1.0, stage=3),
        lambda: omega_for(0.2, 1.0),
        lambda: omega_for(0.05, 0.0),
        lambda: quantization_error(nn.Linear(2, 2)),
        lambda: binarize(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))),
        lambda: apply_edits(net(), [BiPerEdit(modules=("7",), omega=1.0)]),
    ):
        with pytest.raises(BadInput):
            wrong()
