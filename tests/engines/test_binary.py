"""Binary layers: bits that pack and multiply exactly, gradients as declared, states that keep latents or bits."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torchgraft.bench.files import pack_tensors, unpack_tensors
from torchgraft.engines.binary import (
    BACKENDS,
    BinaryConv2d,
    BinaryLinear,
    Estimator,
    Identity,
    PackedConv2d,
    PackedLinear,
    Polynomial,
    Straight,
    binary_layers,
    freeze,
    hidden_layers,
    pack_signs,
    rebuild,
    scaled_rows,
    sign,
    sign_product,
    to_binary,
    unpack_signs,
)
from torchgraft.engines.binary.elastic import BinaryProjection, ElasticSign, ElasticUnit, elastic_sign, elastic_unit
from torchgraft.errors import BadInput


def signs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).float() * 2 - 1


def gradient(estimator: Estimator, z: Tensor, upstream: Tensor) -> Tensor:
    leaf = z.clone().requires_grad_()
    (estimator(leaf) * upstream).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


# Signs and bits -------------------------------------------------------------------------------------------------------


def test_the_sign_of_zero_is_plus_one_in_every_dtype() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        found = sign(torch.tensor([-1e-30, 0.0, -0.0, 2.0], dtype=dtype))
        assert found.tolist() == [-1.0, 1.0, 1.0, 1.0]
        assert found.dtype == dtype


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 40))
def test_packed_signs_come_back(seed: int, rows: int, n: int) -> None:
    x = signs(rows, n, seed=seed)
    packed = pack_signs(x)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, -(-n // 8))
    assert torch.equal(unpack_signs(packed, n), x)


def test_the_first_sign_is_the_lowest_bit() -> None:
    assert pack_signs(torch.tensor([1.0, -1, -1, -1, -1, -1, -1, 1, 1])).tolist() == [129, 1]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 6), st.integers(1, 70))
def test_every_backend_gives_the_same_integers(seed: int, m: int, n: int, k: int) -> None:
    x, w = signs(m, k, seed=seed), signs(n, k, seed=seed + 1)
    expected = (x.long() @ w.long().T).int()
    for backend in BACKENDS:
        found = sign_product(x, w, backend=backend)
        assert found.dtype == torch.int32
        assert torch.equal(found, expected), backend


def test_rows_of_one_sign_multiply_too() -> None:
    x, w = signs(5, 1), signs(3, 1, seed=1)
    for backend in BACKENDS:
        assert torch.equal(sign_product(x, w, backend=backend), (x @ w.T).int()), backend


def test_large_xnor_products_are_made_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchgraft.engines.binary.bits._CHUNK", 12)
    x, w = signs(7, 19), signs(4, 19, seed=1)
    assert torch.equal(sign_product(x, w, backend="xnor"), (x @ w.T).int())


def test_products_of_nothing_are_empty() -> None:
    for backend in BACKENDS:
        assert sign_product(torch.ones(0, 3), torch.ones(2, 3), backend=backend).shape == (0, 2)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: sign_product(torch.ones(1, 3), torch.ones(1, 4)),
        lambda: sign_product(torch.ones(1, 3), torch.ones(1, 3), backend="int4"),
        lambda: unpack_signs(torch.zeros(1, 2, dtype=torch.uint8), 3),
        lambda: unpack_signs(torch.zeros(1, 1), 3),
        lambda: BinaryLinear(0),
        lambda: BinaryLinear(2, scale="mean", packs=True),
        lambda: BinaryLinear(2, scale="median"),
        lambda: BinaryConv2d(3, groups=2),
        lambda: to_binary(nn.BatchNorm1d(3)),
        lambda: rebuild(nn.Sequential(nn.Linear(2, 2)), ["1"], to_binary),
        lambda: PackedLinear(BinaryLinear(2)),
        lambda: PackedLinear(BinaryLinear(2, activation=Straight()), backend="bits"),
        lambda: PackedConv2d(BinaryConv2d(2, groups=2, activation=Straight())),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(wrong: object) -> None:
    with pytest.raises(BadInput) as refusal:
        wrong()  # type: ignore[operator]
    assert "\n" not in str(refusal.value)


# Gradients ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimator", "formula"),
    [
        (Straight(), lambda z: 1.0 if abs(z) <= 1 else 0.0),
        (Straight(1.5), lambda z: 1.0 if abs(z) <= 1.5 else 0.0),
        (Polynomial(), lambda z: max(0.0, 2 - 2 * abs(z))),
        (Identity(), lambda z: 1.0),
    ],
)
def test_the_gradient_is_the_upstream_one_times_the_slope(estimator: Estimator, formula: object) -> None:
    z = torch.linspace(-2, 2, 41, dtype=torch.float64)
    upstream = torch.randn(41, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.tensor([formula(float(each)) for each in z], dtype=torch.float64)  # type: ignore[operator]
    assert torch.allclose(gradient(estimator, z, upstream), upstream * expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("estimator", [Straight(2.0), Polynomial(), Identity()])
def test_the_slope_is_the_derivative_of_the_surrogate(estimator: Estimator) -> None:
    z = torch.linspace(-0.95, 0.95, 20, dtype=torch.float64).requires_grad_()
    (derivative,) = torch.autograd.grad(estimator.surrogate(z).sum(), z)
    assert torch.allclose(estimator.slope(z.detach()), derivative, atol=1e-12)


def test_latents_and_scale_of_a_layer_get_their_gradients() -> None:
    layer = BinaryLinear(3, out_features=2, bias=False).double()
    x, upstream = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    (layer(x) * upstream).sum().backward()
    b, outer = sign(layer.weight.detach()), upstream.T @ x
    assert layer.scale is not None
    assert layer.weight.grad is not None
    assert layer.scale.grad is not None
    slope = (layer.weight.detach().abs() <= 1).double()
    assert torch.allclose(layer.weight.grad, outer * layer.scale.detach()[:, None] * slope)
    assert torch.allclose(layer.scale.grad, (outer * b).sum(1))


def test_elastic_gradients_by_hand() -> None:
    x = torch.tensor([-2.0, -0.3, 0.2, 0.8], dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    upstream = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    elastic_sign(x, alpha).backward(upstream)
    assert x.grad is not None
    assert alpha.grad is not None
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 0.0]
    assert alpha.grad.item() == pytest.approx((-1 - 2 + 3 + 4) / 2)
    x.grad = alpha.grad = None
    out = elastic_unit(x, alpha)
    assert out.tolist() == [0.0, 0.0, 0.0, 0.5]
    out.backward(upstream)
    assert x.grad is not None
    assert alpha.grad is not None
    assert x.grad.tolist() == [0.0, 0.0, 3.0, 0.0]
    assert alpha.grad.item() == pytest.approx((3 * (0 - 0.4) + 4 * 1) / 2)


def test_the_elastic_step_starts_at_the_first_training_batch() -> None:
    for made in (ElasticSign(), ElasticUnit()):
        x = torch.rand(4, 6)
        made.eval()(x)
        assert made.alpha.item() == 1.0
        made.train()(x)
        assert made.alpha.item() == pytest.approx(2 * x.abs().mean().item())
        made(10 * x)
        assert made.alpha.item() == pytest.approx(2 * x.abs().mean().item())


def test_a_projection_has_two_values_and_a_straight_gradient() -> None:
    layer = BinaryProjection(6, 5, quantise=False).double()
    weight = layer.binary_weight()
    size = layer.weight.detach().abs().mean()
    assert torch.allclose(weight.detach().unique(), torch.stack([-size, size]))
    assert torch.equal(weight.detach() > 0, layer.weight.detach() >= layer.weight.detach().mean())
    upstream = torch.randn(5, 6, dtype=torch.float64)
    (weight * upstream).sum().backward()
    assert layer.weight.grad is not None
    assert torch.allclose(layer.weight.grad, upstream)


# Layers and their states ----------------------------------------------------------------------------------------------


def test_a_layer_made_of_another_is_its_nearest_scale_times_signs() -> None:
    for old in (nn.Linear(7, 4), nn.Conv2d(6, 4, 3, stride=2, padding=1, dilation=2, groups=2)):
        new = to_binary(old)
        rows, b = old.weight.detach().flatten(1), sign(old.weight.detach()).flatten(1)
        best = (rows * b).sum(1) / rows.shape[1]  # least squares: <w, b> / <b, b>
        assert torch.allclose(new.effective().flatten(1), best[:, None] * b, atol=1e-6)
        shape = (3, 7) if isinstance(old, nn.Linear) else (3, 6, 9, 9)
        x = torch.randn(shape)
        plain = copy.deepcopy(old)
        plain.weight.data = new.effective().detach()
        assert torch.allclose(new(x), plain(x), atol=1e-6)


def test_frozen_and_training_modes_are_inherited() -> None:
    old = nn.Linear(3, 3).eval()
    old.weight.requires_grad_(False)
    new = to_binary(old)
    assert not new.training
    assert not new.weight.requires_grad
    assert new.scale is not None
    assert not new.scale.requires_grad
    assert new.bias is not None
    assert new.bias.requires_grad


def test_a_state_holds_bits_in_eval_mode_and_latents_in_training() -> None:
    layer = to_binary(nn.Linear(20, 6), packs=True)
    x = torch.randn(4, 20)
    kept = layer.train().state_dict()
    assert kept["weight"].dtype == torch.float32
    packed, _ = unpack_tensors(pack_tensors(layer.eval().state_dict()))
    assert packed["weight"].dtype == torch.uint8
    assert packed["weight"].numel() == 6 * 3
    for state in (kept, packed):
        other = to_binary(nn.Linear(20, 6), packs=True).eval()
        other.load_state_dict(state)
        assert torch.equal(other(x), layer(x))
        assert torch.equal(other.state_dict()["weight"], packed["weight"])
    resumed = to_binary(nn.Linear(20, 6), packs=True)
    resumed.load_state_dict(kept)
    assert torch.equal(resumed.weight, layer.weight)
    assert kept["weight"].dtype == torch.float32  # loading leaves the dictionary as it was


def test_bits_of_another_size_do_not_load() -> None:
    layer = to_binary(nn.Linear(20, 6), packs=True).eval()
    for other in (nn.Linear(40, 6), nn.Linear(20, 5)):
        with pytest.raises(RuntimeError, match="signs"):
            layer.load_state_dict(to_binary(other, packs=True).eval().state_dict())


def test_what_is_kept_for_eval_follows_the_latents() -> None:
    layer = to_binary(nn.Linear(5, 5)).eval()
    x = torch.randn(2, 5)
    with torch.no_grad():
        first = layer(x)
        assert layer(x).equal(first)
        layer.weight.neg_()
        assert torch.allclose(layer(x) - layer.bias, -(first - layer.bias), atol=1e-6)
        assert layer.scale is not None
        layer.scale.mul_(2)
        assert torch.allclose(layer(x) - layer.bias, -2 * (first - layer.bias), atol=1e-6)
        before = layer(x)
        layer.weight.data.neg_()  # behind autograd's back, as some optimisers do
        assert torch.allclose(layer.train().eval()(x) - layer.bias, -(before - layer.bias), atol=1e-6)
    with torch.inference_mode():
        layer.train().eval()(x)
    layer(x).sum().backward()  # nothing of inference mode is left in the way
    copy.deepcopy(layer)
    torch.save(layer, io.BytesIO())
    assert layer.double()(x.double()).dtype == torch.float64


def test_first_last_shared_and_ignored_layers_stay() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)), nn.Conv2d(1, 1, 1, padding="same"), nn.Linear(4, 4))
    assert list(hidden_layers(model)) == ["1", "2", "3", "4"]
    assert list(hidden_layers(model, ignore=["2"])) == ["1", "3", "4"]
    model[3].weight = model[1].weight
    assert list(hidden_layers(model)) == ["2", "4"]


def test_the_fused_encoder_layer_does_not_bypass_the_signs() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    changed = rebuild(copy.deepcopy(layer), ["linear1", "linear2"], to_binary).eval()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        fast = changed(x)
    assert torch.allclose(fast, changed(x), atol=1e-5)
    assert (fast - layer(x)).abs().max() > 1e-2
    assert set(binary_layers(changed)) == {"linear1", "linear2"}


# Execution ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", ["learned", "mean", "one"])
def test_packed_layers_give_what_was_trained(backend: str, scale: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        BinaryConv2d(3, out_channels=5, stride=2, activation=Polynomial(), scale=scale),  # type: ignore[arg-type]
        BinaryConv2d(5, kernel_size=(1, 3), padding=(0, 2), dilation=2, activation=Straight(), bias=False),
        nn.Flatten(),
        BinaryLinear(125, out_features=7, activation=Straight(), scale=scale),  # type: ignore[arg-type]
        BinaryLinear(7, out_features=3),
    ).eval()
    x = torch.randn(4, 3, 9, 9)
    frozen = freeze(model, backend=backend)
    assert [type(layer).__name__ for layer in frozen][0::3] == ["PackedConv2d", "PackedLinear"]
    assert isinstance(frozen[4], BinaryLinear)  # its inputs are numbers
    assert torch.equal(frozen(x), model(x))
    assert frozen(x[:0]).shape == (0, 3)
    assert frozen.state_dict()["0.weight"].dtype == torch.uint8


def test_layers_export_to_a_graph() -> None:
    model = nn.Sequential(BinaryLinear(6, activation=Polynomial()), BinaryLinear(6)).eval()
    x = torch.randn(3, 6)
    program = torch.export.export(model, (x,), strict=False)
    assert torch.equal(program.module()(x), model(x))


def test_integers_are_exact_in_packed_convolutions() -> None:
    layer = BinaryConv2d(4, out_channels=6, activation=Straight(), scale="one", bias=False).eval()
    x = torch.randn(2, 4, 5, 6)
    for backend in BACKENDS:
        assert torch.equal(freeze(layer, backend=backend)(x), layer(x))
    corner = layer(x)[:, :, 0, 0]  # four of nine places lie inside, the others are a border of ones
    patch = torch.ones(2, 4, 3, 3)
    patch[:, :, 1:, 1:] = sign(x[:, :, :2, :2])
    assert torch.equal(corner, patch.flatten(1) @ layer.signs().flatten(1).T)


def test_wrong_inputs_are_refused() -> None:
    for layer, x in (
        (BinaryLinear(3), torch.ones(2, 4)),
        (BinaryLinear(3), torch.ones(2, 3, dtype=torch.long)),
        (BinaryConv2d(3), torch.ones(3, 4, 4)),
        (freeze(BinaryLinear(3, activation=Straight())), torch.ones(2, 4)),
        (freeze(BinaryConv2d(3, activation=Straight())), torch.ones(2, 4, 3, 3)),
    ):
        with pytest.raises(BadInput):
            layer(x)


def test_rows_are_scaled_to_their_largest() -> None:
    weight = torch.tensor([[[1.0, -4.0], [2.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    assert scaled_rows(weight, 0.5).tolist() == [[[0.125, -0.5], [0.25, 0.0]], [[0.0, 0.0], [0.0, 0.0]]]
    random = torch.randn(3, 5, dtype=torch.float64)
    assert torch.allclose(scaled_rows(random, 2.0).abs().amax(1), torch.full((3,), 2.0, dtype=torch.float64))
    assert torch.equal(scaled_rows(random, 2.0).sign(), random.sign())
