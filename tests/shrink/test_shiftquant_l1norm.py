"""ShiftQuant: codes, shifts and variance; products in integers; layers that train by them; norms by mean magnitude."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.errors import BadInput
from torchgraft.shrink.quantize.shiftquant_l1norm import (
    IntegerConv2d,
    IntegerLinear,
    L1BatchNorm,
    L1LayerNorm,
    ShiftQuant,
    integer_train,
    rounded_statistic,
    shift_matmul,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uneven(rows: int, channels: int, seed: int = 0) -> Tensor:
    """Channels whose ranges span several powers of two."""
    return draw(rows, channels, seed=seed) * 2.0 ** -torch.arange(channels, dtype=torch.float64).remainder(6)


# The quantiser


def test_groups_by_hand() -> None:
    # ranges 8, 3, 1, 0.1: 8/3 -> k 1, 8 -> k 3, 80 -> k 6, held at 3
    x = torch.tensor([[8.0, 3.0, 1.0, 0.1]], dtype=torch.float64)
    made = ShiftQuant(4, groups=4, stochastic=False).encode(x, axis=1)
    assert made.shifts.tolist() == [[0, 1, 3, 3]]
    assert float(made.scale) == 8 / 7
    # 3 / (4/7) = 5.25, 1 / (1/7) = 7, 0.1 / (1/7) = 0.7
    assert made.codes.tolist() == [[7.0, 5.0, 7.0, 1.0]]
    assert torch.allclose(made.values(), torch.tensor([[8.0, 20 / 7, 1.0, 1 / 7]], dtype=torch.float64))
    # a power of two as the ratio is exactly at the edge of its group, and channels of zeros do no harm
    edge = torch.tensor([[4.0, 2.0, 0.0]], dtype=torch.float64)
    assert ShiftQuant(4, groups=3).encode(edge, axis=1).shifts.tolist() == [[0, 1, 2]]
    assert not ShiftQuant(4).encode(torch.zeros(2, 3)).values().any()


def test_one_group_is_quantisation_by_tensor_and_none_by_channel() -> None:
    x = uneven(5, 8)
    one = ShiftQuant(4, groups=1, stochastic=False)(x, axis=1)
    step = x.abs().max() / 7
    assert torch.allclose(one, (x / step).round() * step)
    each = ShiftQuant(4, groups=None, stochastic=False)(x, axis=1)
    steps = x.abs().amax(0) / 7
    assert torch.allclose(each, (x / steps).round() * steps)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.integers(1, 8), st.integers(0, 10**6), st.floats(-20, 20))
def test_no_code_is_clipped(bits: int, groups: int, seed: int, power: float) -> None:
    x = (uneven(6, 9, seed=seed) * 10**power).float()
    made = ShiftQuant(bits, groups=groups).encode(x, axis=1)
    steps = made.scale * 2.0**-made.shifts
    assert int(made.codes.abs().max()) <= 2 ** (bits - 1) - 1
    assert bool(((made.values() - x).abs() <= steps * (1 + 1e-4)).all())


def test_codes_are_unbiased_and_their_variance_is_bounded() -> None:
    x = uneven(4, 6)
    draws = torch.stack([ShiftQuant(4)(x, axis=1) for _ in range(4_000)])
    made = ShiftQuant(4).encode(x, axis=1)
    step = made.scale * 2.0 ** -made.shifts.double()
    spread = draws.var(0)
    assert bool((spread <= step**2 / 4 * 1.05).all())
    assert bool(((draws.mean(0) - x).abs() <= 4 * (spread / 4_000).sqrt() + 1e-12).all())
    # rounding to the nearest is not unbiased
    nearest = ShiftQuant(4, stochastic=False)(x, axis=1)
    assert bool(((nearest - x).abs() > 4 * (spread / 4_000).sqrt()).any())


def test_the_bound_on_the_variance_falls_with_the_groups() -> None:
    x = uneven(50, 24)
    bounds = []
    for groups in (1, 2, 3, 4, 8):
        made = ShiftQuant(4, groups=groups).encode(x, axis=1)
        bounds.append(float(((made.scale * 2.0 ** -made.shifts.double()) ** 2 / 4).sum()))
    own = float(((x.abs().amax(0) / 7) ** 2 / 4).sum())
    assert all(b <= a for a, b in itertools.pairwise(bounds))
    assert bounds[0] > 4 * own >= bounds[-1] >= own


# Products


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 8), st.integers(1, 8), st.integers(0, 10**6))
def test_the_product_by_shifts_is_the_product_of_the_decoded(bits: int, groups: int, seed: int) -> None:
    x, w = uneven(5, 12, seed=seed), draw(12, 4, seed=seed + 1)
    left = ShiftQuant(bits, groups=groups).encode(x, axis=1)
    right = ShiftQuant(bits, groups=1, stochastic=False).encode(w)
    sums = shift_matmul(left, right.codes, groups=groups)
    assert sums.dtype == torch.int64
    # with scales that are powers of two nothing is rounded in float64 either
    unit = torch.ldexp(left.codes, -left.shifts) @ right.codes
    assert torch.equal(sums.double() * 2.0 ** -(groups - 1), unit)
    value = left.values() @ right.values()
    assert torch.allclose(
        sums.double() * 2.0 ** -(groups - 1) * left.scale * right.scale, value, rtol=1e-12, atol=1e-12
    )


def test_layers_multiply_what_was_rounded_forwards_and_backwards() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(6, 4).double()
    layer = integer_train(plain, g_bits=8)
    x, g = uneven(7, 6).requires_grad_(), draw(7, 4, seed=2)
    x_q = ShiftQuant(4, stochastic=False)(x, axis=1)
    w_q = ShiftQuant(4, groups=1, stochastic=False)(plain.weight)
    y = layer(x)
    assert torch.allclose(y, x_q @ w_q.T + plain.bias, atol=1e-12)
    # over many draws the gradients are those at the rounded tensors
    found = [torch.autograd.grad(y, (x, layer.weight), g, retain_graph=True) for _ in range(400)]
    for index, expected in enumerate((g @ w_q, g.T @ x_q)):
        draws = torch.stack([pair[index] for pair in found])
        error = (draws.mean(0) - expected).abs()
        assert bool((error <= 5 * draws.std(0) / 20 + 1e-9).all())
        assert bool((draws.std(0) > 0).any())
    assert torch.equal(torch.autograd.grad(layer(x), layer.bias, g)[0], g.sum(0))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_gradients_groups_lie_along_the_axis_that_its_product_sums_over(kind: str) -> None:
    # Small entries are whole steps at an eighth of the range and fall between steps at the whole of it: where they
    # have a scale of their own, nothing is rounded.
    whole = torch.tensor([7.0, -7.0, 7.0]).double() / 7
    small = torch.tensor([1.0, 3.0, -7.0]).double() / 56
    torch.manual_seed(0)
    made: nn.Module
    if kind == "linear":
        made = integer_train(nn.Linear(3, 2, bias=False).double())
        x = draw(3, 3)
    else:
        made = integer_train(nn.Conv2d(3, 2, 1, bias=False).double())
        x = draw(3, 3, 1, 1)
    weight = made.get_parameter("weight")
    x_q, w_q = ShiftQuant(4, stochastic=False)(x, axis=1), ShiftQuant(4, groups=1, stochastic=False)(weight.detach())

    def gradients(g: Tensor) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        out = made(leaf)
        return torch.autograd.grad(out, (leaf, weight), g.reshape(out.shape))

    by_sample = torch.stack([whole[:2], small[:2], small[1:]])  # (3 samples, 2 outputs)
    by_output = torch.stack([whole, small], 1)  # the same by outputs
    for _ in range(5):
        _, to_weight = gradients(by_sample)
        assert torch.allclose(to_weight.flatten(1), by_sample.T @ x_q.flatten(1), atol=1e-12)
        to_x, _ = gradients(by_output)
        assert torch.allclose(to_x.flatten(1), by_output @ w_q.flatten(1), atol=1e-12)
    wrong = [
        not torch.allclose(gradients(by_sample)[0].flatten(1), by_sample @ w_q.flatten(1), atol=1e-12)
        for _ in range(20)
    ]
    assert any(wrong)  # the other product sums over outputs, where the small entries share the large ones' scale


def test_gradients_of_8_bits_point_where_the_float_ones_do() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(6, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, 3)
    )
    x, target = torch.randn(32, 2, 8, 8), torch.randint(0, 3, (32,))
    made = integer_train(model, w_bits=8, a_bits=8, g_bits=8)
    assert [type(module) for module in made][::2] == [IntegerConv2d, IntegerConv2d, IntegerLinear]

    def gradient(each: nn.Module) -> Tensor:
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(F.cross_entropy(each(x), target), [*each.parameters()])]
        )

    exact = gradient(model)
    angles = []
    for bits in (8, 6, 4):
        few = integer_train(model, w_bits=bits, a_bits=bits, g_bits=bits)
        angles.append(1 - float(F.cosine_similarity(exact, gradient(few), dim=0)))
    # two bits are a quarter of the step, and a sixteenth of 1 - cosine
    assert angles[0] < 0.001
    assert angles[1] > 6 * angles[0]
    assert angles[2] > 6 * angles[1]
    model.load_state_dict(made.state_dict())
    tokens = integer_train(nn.Linear(6, 4))(torch.randn(2, 3, 6))
    assert tokens.shape == (2, 3, 4)


def test_ignored_layers_stay_and_the_rest_trains() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2))
    made = integer_train(model, norms="l1", ignore=["3"])
    assert [type(module).__name__ for module in made] == ["IntegerLinear", "L1LayerNorm", "ReLU", "Linear"]
    assert type(model[0]) is nn.Linear
    with torch.no_grad():
        made[0].weight.zero_()
    assert bool(model[0].weight.any())


# Norms


def test_l1_norms_have_mean_0_and_mean_magnitude_1() -> None:
    x = draw(40, 6) * 3 + 1
    rows = L1LayerNorm(6, eps=0.0).double()(x)
    assert torch.allclose(rows.mean(-1), torch.zeros(40).double(), atol=1e-12)
    assert torch.allclose(rows.abs().mean(-1), torch.ones(40).double(), atol=1e-12)
    norm = L1BatchNorm(6, eps=1e-15).double()
    columns = norm(x)
    assert torch.allclose(columns.mean(0), torch.zeros(6).double(), atol=1e-12)
    assert torch.allclose(columns.abs().mean(0), torch.ones(6).double(), atol=1e-12)
    assert torch.allclose(norm.running_mean, 0.1 * x.mean(0), atol=1e-7)
    deviation = (x - x.mean(0)).abs().mean(0)
    assert torch.allclose(norm.running_deviation, 0.9 * math.sqrt(2 / math.pi) + 0.1 * deviation, atol=1e-6)
    norm.eval()
    assert torch.allclose(norm(x), (x - norm.running_mean) / norm.running_deviation, atol=1e-9)
    images = L1BatchNorm(6).double()(x.reshape(5, 8, 6).mT.reshape(5, 6, 2, 4))
    assert torch.allclose(images.abs().mean((0, 2, 3)), torch.ones(6).double(), atol=1e-4)


def test_their_gradient_is_the_closed_form() -> None:
    x, g, gamma = draw(9, 5).requires_grad_(), draw(9, 5, seed=1), draw(5, seed=2)
    norm = L1BatchNorm(5, eps=1e-3).double()
    with torch.no_grad():
        norm.weight.copy_(gamma)
    (found,) = torch.autograd.grad(norm(x), x, g)
    with torch.no_grad():
        centred = x - x.mean(0)
        m = centred.abs().mean(0) + 1e-3
        hat, sign = centred / m, centred.sign()
        expected = gamma / m * (g - g.mean(0) - (sign - sign.mean(0)) * (g * hat).mean(0))
    assert torch.allclose(found, expected, atol=1e-12)


def test_they_take_the_place_of_torchs_norms_on_gaussian_input() -> None:
    torch.manual_seed(0)
    x = torch.randn(4000, 8) * 2 + 1
    batch = nn.BatchNorm1d(8)
    with torch.no_grad():
        batch.weight.uniform_(0.5, 2)
        batch.bias.uniform_(-1, 1)
    batch(x)
    made = integer_train(nn.Sequential(nn.Linear(8, 8), batch), norms="l1")[1]
    assert isinstance(made, L1BatchNorm)
    for mode in (False, True):
        with torch.no_grad():
            assert float((made.train(mode)(x) - batch.train(mode)(x)).abs().max()) < 0.35
    layer = nn.LayerNorm(4000)
    own = integer_train(nn.Sequential(nn.Linear(8, 8), layer), norms="l1")[1]
    wide = torch.randn(3, 4000)
    with torch.no_grad():
        assert float((own(wide) - layer(wide)).abs().max()) < 0.15


def test_few_bits_inside_a_norm() -> None:
    assert rounded_statistic(torch.tensor([0.0, 1.0, 1.6, 3.0]), 2).tolist() == [1.0, 1.0, 2.0, 3.0]
    value = torch.tensor([0.5, 2.0], requires_grad=True)
    rounded_statistic(value, 2).sum().backward()
    assert value.grad.tolist() == [1.0, 1.0]
    norm = L1BatchNorm(4, bits=4, affine=False).double()
    out = norm(draw(100, 4) * torch.tensor([1.0, 2.0, 3.0, 0.01]).double())
    assert bool(out.isfinite().all())
    assert len(out.unique()) <= 15
    assert L1LayerNorm(4, bits=4)(torch.zeros(2, 4)).tolist() == [[0.0] * 4] * 2


def test_bad_settings_are_refused() -> None:
    linear = nn.Linear(2, 2)
    for call in (
        lambda: ShiftQuant(1),
        lambda: ShiftQuant(4, groups=0),
        lambda: integer_train(nn.ReLU()),
        lambda: integer_train(linear, norms="l2"),  # type: ignore[arg-type]
        lambda: integer_train(linear, norm_bits=1),
        lambda: L1BatchNorm(2, bits=9),
        lambda: L1BatchNorm(2)(torch.ones(1, 2)),
        lambda: L1LayerNorm(2)(torch.ones(1, 3)),
        lambda: shift_matmul(ShiftQuant(4, groups=None).encode(torch.ones(2, 2)), torch.ones(2, 2), groups=4),
    ):
        with pytest.raises(BadInput):
            call()
