"""Integer-only networks: rescales, integer layers against torch and against their float form, bounds, and pulses."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torchgraft.bench.files import pack_tensors, unpack_tensors
from torchgraft.errors import BadInput
from torchgraft.shrink.quantize.pulsedl_int import (
    FakeQuantNet,
    IntegerNet,
    PulseRegressor1d,
    constant_fraction,
    fake_quantize,
    fixed_point,
    pulses,
    rescale,
    to_integer,
)


def chain(seed: int = 0, *, norm: bool = False) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = [nn.Conv1d(2, 6, 5, stride=2, padding=2)]
        if norm:
            layers.append(nn.BatchNorm1d(6))
            layers[-1].running_mean.normal_()
            layers[-1].running_var.uniform_(0.5, 2)
        layers += [nn.ReLU(), nn.ConvTranspose1d(6, 4, 4, stride=2, padding=1, output_padding=1), nn.ReLU()]
        layers += [nn.Sequential(nn.Flatten(), nn.Linear(68, 10)), nn.ReLU(), nn.Dropout(), nn.Linear(10, 3)]
        return nn.Sequential(*layers).eval()


def samples(count: int = 32, seed: int = 1) -> Tensor:
    return torch.randn(count, 2, 16, generator=torch.Generator().manual_seed(seed))


# Rescales


@settings(max_examples=100, deadline=None)
@given(st.floats(1e-12, 4.0), st.integers(4, 20))
def test_a_fixed_point_rescale_is_near_its_ratio(ratio: float, bits: int) -> None:
    m, k = fixed_point(ratio, bits)
    assert 2 ** (bits - 1) <= m < 2**bits
    assert abs(Fraction(m, 2**k) - Fraction(ratio)) <= Fraction(ratio) / 2**bits


@settings(max_examples=60, deadline=None)
@given(st.integers(-(2**31), 2**31 - 1), st.integers(1, 2**15 - 1), st.integers(1, 40))
def test_the_shift_rounds_half_up(acc: int, m: int, k: int) -> None:
    found = rescale(torch.tensor([acc]), torch.tensor([m]), torch.tensor([k]))
    assert int(found) == (Fraction(acc * m, 2**k) + Fraction(1, 2)).__floor__()


# Layers


def test_integer_layers_equal_torchs_in_float64() -> None:
    model = chain()
    net = to_integer(model, samples())
    x = net.encode(samples(4, seed=2))
    conv, transposed, first, last = net.layers
    for layer, torchs in ((conv, model[0]), (transposed, model[2]), (first, model[4][1]), (last, model[7])):
        plain = type(torchs).__new__(type(torchs))
        plain.__dict__.update(torchs.__dict__)
        plain._parameters = {"weight": layer.weight.double(), "bias": layer.bias.double()}
        acc = plain(x.flatten(1).double() if layer.shape.flatten else x.double())
        if layer.multiplier is None:
            expected = acc.long()
        else:
            m, k = (v.long().reshape(-1, *[1] * (acc.ndim - 2)) for v in (layer.multiplier, layer.shift))
            expected = rescale(acc.long(), m, k).clamp(0, 255)
        x = layer(x)
        assert x.dtype == torch.int64
        assert torch.equal(x, expected)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(0, 2), st.integers(0, 10**6), st.booleans())
def test_any_layout_of_convolution(stride: int, width: int, padding: int, seed: int, transposed: bool) -> None:
    torch.manual_seed(seed)
    padding = min(padding, width - 1)
    kind = nn.ConvTranspose1d if transposed else nn.Conv1d
    layer = kind(3, 2, width, stride=stride, padding=padding).double()
    x = torch.randn(2, 3, 9, dtype=torch.float64)
    fake = fake_quantize(nn.Sequential(layer), x, bits=14)
    # 14 bits are near enough to tell a wrong layout
    assert torch.allclose(fake(x), layer(x), atol=2e-3)
    assert torch.allclose(to_integer(fake)(x), fake(x), atol=1e-9)


@pytest.mark.parametrize(("bits", "per_channel", "norm"), [(8, False, False), (8, True, True), (5, False, True)])
def test_every_layer_is_its_float_form_within_one(bits: int, per_channel: bool, norm: bool) -> None:
    model, x = chain(norm=norm), samples(64, seed=3)
    fake = fake_quantize(model, samples(), bits=bits, input_bits=10, per_channel=per_channel).double()
    net = to_integer(fake)
    q = net.encode(x.double())
    assert int(q.abs().max()) > 128
    seen = 0
    for index, layer in enumerate(net.layers):
        value = fake.layer(index, q.double() * fake.scales[index])
        q = layer(q)
        if index == len(net.layers) - 1:
            assert torch.allclose(q.double() * net.output_scale, value, atol=1e-9)
        else:
            gap = (q - (value / fake.scales[index + 1]).round().long()).abs()
            assert int(gap.max()) <= 1
            seen += int(gap.sum())
            assert int(q.min()) == 0
            assert int(q.max()) <= 2**bits - 1
    assert seen <= 8  # halves are rounded otherwise, and the multiplier is 15 bits
    first, second = net.integers(net.encode(x.double())), net.integers(net.encode(x.double()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_whole_net_is_near_the_float_one_and_loads_from_a_file() -> None:
    model, x = chain(norm=True), samples(64, seed=3)
    net = to_integer(model, samples(256), per_channel=True)
    with torch.no_grad():
        gap = float((net(x) - model(x)).norm() / model(x).norm())
    assert gap < 0.05
    with torch.no_grad():
        assert float((to_integer(model, samples(256), bits=4)(x) - model(x)).norm() / model(x).norm()) > 2 * gap
    kinds = {name: value.dtype for name, value in net.state_dict().items()}
    assert {str(kind) for name, kind in kinds.items() if "scale" not in name} == {"torch.int8", "torch.int32"}
    other = to_integer(chain(5, norm=True), samples(256, seed=9), per_channel=True)
    tensors, _ = unpack_tensors(pack_tensors(net.state_dict()))
    other.load_state_dict(tensors)
    assert torch.equal(other(x), net(x))
    assert isinstance(model[1], nn.BatchNorm1d)


def test_rounding_stays_within_half_a_scale() -> None:
    x = samples()
    net = to_integer(chain(), x)
    gap = (x - net.encode(x) * net.input_scale).abs()
    assert float(gap.max()) <= float(net.input_scale) * (0.5 + 1e-4)
    assert int(net.encode(100 * x).max()) == 127
    assert int(net.encode(100 * x).min()) == -128


def test_no_sum_can_leave_its_bits() -> None:
    net = to_integer(chain(), samples(), bits=8)
    widths = [2 * 5, 6 * 4, 68, 10]
    for layer, width, most in zip(net.layers, widths, (128, 255, 255, 255), strict=True):
        assert layer.bound(most) <= width * most * 128 + int(layer.bias.long().abs().max()) < 2**31
    # the worst input reaches the bound: -128 where a weight is positive, 127 will not do
    linear = net.layers[-1]
    rows = linear.weight.long()
    worst = -128 * rows.sign() * linear.bias.long().sign()[:, None] * -1
    reached = (worst * rows).sum(1).abs() + linear.bias.long().abs()
    assert int(reached.max()) == linear.bound(128)
    with pytest.raises(BadInput, match="16 bits do not hold"):
        to_integer(chain(), samples(), acc_bits=16)


def test_the_float_form_trains_and_its_gradient_stops_outside_the_range() -> None:
    model, x = chain(), samples()
    fake = fake_quantize(model, x)
    assert isinstance(fake, FakeQuantNet)
    out = fake(x)
    grads = torch.autograd.grad(out.square().sum(), list(fake.parameters()))
    assert all(bool(g.isfinite().all()) and bool(g.any()) for g in grads)
    far = (100 * x).requires_grad_()
    (grad,) = torch.autograd.grad(fake(far).sum(), far)
    beyond = (100 * x / fake.scales[0]).abs() > 129
    assert not grad[beyond].any()
    near = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(fake(near).sum(), near)
    assert bool(grad.any())


# Pulses


def test_pulses_by_hand() -> None:
    x, target = pulses(500, snr_db=300.0, samples=64, tau=6.0, jitter=8.0, seed=3)
    assert x.shape == (500, 1, 64)
    t0, height = target[:, 0], target[:, 1]
    assert bool(((t0 >= 8) & (t0 <= 16) & (height >= 0.5) & (height <= 1)).all())
    assert float(x[0, 0, : int(t0[0])].abs().max()) < 1e-9
    # at t0 + tau the pulse is A
    at = int(t0[1]) + 7
    late = (at - t0[1]) / 6
    assert float(x[1, 0, at]) == pytest.approx(float(height[1] * late * (1 - late).exp()), abs=1e-6)
    noisy, same = pulses(500, snr_db=20.0, samples=64, tau=6.0, jitter=8.0, seed=3)
    assert torch.equal(same, target)
    assert float((noisy - x).std()) == pytest.approx(0.1, rel=0.02)


def test_constant_fraction_by_hand_and_on_clean_pulses() -> None:
    ramp = torch.tensor([[[0.0, 0.0, 1.0, 2.0, 4.0, 3.0, 0.5]]])
    assert constant_fraction(ramp, 0.5).tolist() == [3.0]
    assert constant_fraction(ramp, 0.625).tolist() == [3.25]
    x, target = pulses(200, snr_db=300.0)
    error = constant_fraction(x, 0.4) - target[:, 0]
    assert float(error.std()) < 0.02


def test_the_regressor_is_small_and_runs_on_integers() -> None:
    net = PulseRegressor1d()
    assert sum(value.numel() for value in net.parameters()) < 10_000
    x, _ = pulses(64)
    integer = to_integer(net, x, input_bits=12)
    assert isinstance(integer, IntegerNet)
    assert integer(x).shape == (64, 2)


def test_what_is_not_in_the_subset_is_refused_by_name() -> None:
    x = samples()
    for model, words in (
        (nn.Sequential(nn.Conv1d(2, 2, 3), nn.GELU()), "GELU at 1"),
        (nn.Sequential(nn.Sequential(nn.Conv1d(2, 2, 3, groups=2))), "Conv1d at 0.0"),
        (nn.Sequential(nn.Conv1d(2, 2, 3, padding="same")), "Conv1d at 0"),
        (nn.Sequential(nn.ReLU(), nn.Conv1d(2, 2, 3)), "ReLU at 0"),
        (nn.Sequential(nn.Conv1d(2, 2, 3), nn.Flatten()), "Flatten behind the last"),
        (nn.Bilinear(2, 2, 2), "Bilinear at the top"),
    ):
        with pytest.raises(BadInput, match=words):
            to_integer(model, x)
    for call in (
        lambda: to_integer(chain()),
        lambda: to_integer(chain(), x, bits=17),
        lambda: to_integer(chain(), x, acc_bits=64),
        lambda: fixed_point(0.0),
        lambda: fixed_point(1e-30),
        lambda: pulses(0),
        lambda: PulseRegressor1d((8,) * 9),
    ):
        with pytest.raises(BadInput):
            call()
