"""L-Mul: bit fields against the formula, its error law, matrix products, and models in which products are emulated."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.models import Attention
from torchgraft.errors import BadInput
from torchgraft.shrink.quantize.l_mul import (
    LMulAttention,
    LMulLinear,
    error_expectation,
    l_mul,
    l_mul_attention,
    l_mul_matmul,
    offset,
    replace_multiplications,
    round_mantissa,
)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mantissa in [0, 1) and power of two, by hand."""
    power = 2.0 ** x.abs().log2().floor()
    power = torch.where(x.abs() / power >= 2, power * 2, torch.where(x.abs() / power < 1, power / 2, power))
    return x.abs() / power - 1, power


# One product


def test_products_by_hand() -> None:
    one = lambda *args: float(l_mul(torch.tensor(args[0]), torch.tensor(args[1]), *args[2:]))  # noqa: E731
    # 1.5 * 1.25: u + v + c = 0.5 + 0.25 + 1/8 = 0.875, no carry: 1.875 (exact product 1.875 by chance)
    assert one(1.5, 1.25, 3) == one(1.5, 1.25, 3, "integer") == 1.875
    # 1.75 * 1.5: s = 0.75 + 0.5 + 1/8 = 1.375: 2.375 by the formula, 2.75 by the carry
    assert one(1.75, 1.5, 3) == 2.375
    assert one(1.75, -6.0, 3, "integer") == -11.0
    # k = 1: 1.3 rounds to 1.5, c = 1/2: s = 1.5, 2.5 or 3
    assert one(1.3, 1.4, 1) == 2.5
    assert one(1.3, 1.4, 1, "integer") == 3.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [3, 4, 8, None])
def test_the_addition_of_fields_is_the_formula_until_the_mantissas_carry(bits: int | None, dtype: torch.dtype) -> None:
    x, y = draw(100_000, dtype=dtype) * 50, draw(100_000, seed=1, dtype=dtype) / 30
    formula, fields = l_mul(x, y, bits, "formula"), l_mul(x, y, bits, "integer")
    (u, p), (v, q) = parts(round_mantissa(x, bits)), parts(round_mantissa(y, bits))
    s = u + v + 2.0 ** -offset(bits)
    sign = x.sign() * y.sign()
    assert torch.equal(formula, sign * (1 + s) * (p * q))
    assert torch.equal(fields[s < 1], formula[s < 1])
    once, twice = (s >= 1) & (s <= 2), s > 2
    assert bool(once.any())
    # past a carry, the float sum s may have lost the last bit that the integer keeps
    close = {torch.float32: 2e-7, torch.float64: 4e-16}[dtype]
    assert torch.allclose(fields[once], (sign * 2 * s * p * q)[once], rtol=close, atol=0)
    assert torch.allclose(fields[twice], (sign * 4 * (s - 1) * p * q)[twice], rtol=close, atol=0)
    # only mantissas of more than 5 bits carry twice
    assert bool(twice.any()) == (bits is None or bits > 5)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["formula", "integer"]), st.sampled_from([2, 3, 4, 6, None]))
def test_signs_powers_of_two_and_order(seed: int, mode: Any, bits: int | None) -> None:
    x, y = draw(40, seed=seed), draw(40, seed=seed + 1)
    out = l_mul(x, y, bits, mode)
    assert torch.equal(out, l_mul(y, x, bits, mode))
    assert torch.equal(out.sign(), x.sign() * y.sign())
    assert torch.equal(l_mul(-x, y, bits, mode), -out)
    assert torch.equal(l_mul(8 * x, y / 4, bits, mode), 2 * out)
    # by a power of two nothing is missing, yet the bit is added: x + 2^(i - l); a carry where it fills the mantissa
    kept = round_mantissa(x, bits)
    u, p = parts(kept)
    c = 2.0 ** -offset(bits)
    expected = (kept.abs() + c * p) * 16 * x.sign()
    by_power = l_mul(x, torch.tensor(16.0, dtype=x.dtype), bits, mode)
    plain = (u + c < 1) | torch.tensor(mode == "formula")
    assert torch.equal(by_power[plain], expected[plain])


@pytest.mark.parametrize("mode", ["formula", "integer"])
def test_zeros_infinities_and_the_ends_of_the_range(mode: Any) -> None:
    x = torch.tensor([0.0, 0.0, math.inf, -math.inf, math.nan, 1e30, 1e-30])
    y = torch.tensor([3.0, 0.0, 2.0, 2.0, 1.0, 1e30, 1e-30])
    out = l_mul(x, y, 4, mode)
    assert out[:4].tolist() == [0.0, 0.0, math.inf, -math.inf]
    assert bool(out[4].isnan())
    assert float(out[5]) == math.inf
    assert float(out[6]) == 0.0
    assert float(l_mul(torch.tensor(0.0), torch.tensor(math.inf), 4, mode).isnan())


# The law of the error


@pytest.mark.parametrize("mode", ["formula", "integer"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, None])
def test_the_mean_error_follows_its_law(bits: int | None, mode: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    if bits is None:
        u, v = torch.rand(2, 200_000, generator=generator, dtype=torch.float64)
    else:
        u, v = torch.randint(2**bits, (2, 200_000), generator=generator).double() / 2**bits
    error = (1 + u) * (1 + v) - l_mul(1 + u, 1 + v, bits, mode)
    standard = float(error.std()) / 200_000**0.5
    assert float(error.mean()) == pytest.approx(error_expectation(bits, mode=mode), abs=4 * standard)


def test_the_closed_forms_are_those_of_the_entry_and_the_limits_of_many_bits() -> None:
    for place, expected in ((1, -0.25), (3, 0.125), (4, 0.1875)):
        assert error_expectation(l=place) == expected
        for mode in ("formula", "integer"):
            many = error_expectation(11, mode=mode, l=place)  # type: ignore[arg-type]
            assert many == pytest.approx(error_expectation(l=place, mode=mode), abs=2e-3)  # type: ignore[arg-type]
    assert error_expectation(mode="integer", l=3) < -0.1  # the carry overshoots where the missing term is small


# Matrix products


@pytest.mark.parametrize("mode", ["formula", "integer"])
@pytest.mark.parametrize("bits", [3, 4, None])
def test_a_matrix_product_is_the_sum_of_its_products(mode: Any, bits: int | None) -> None:
    x, y = draw(2, 3, 5), draw(5, 4, seed=1)
    x[0, 0, 0] = y[1, 1] = 0.0
    x[1, 1], y[:, 2] = 1.999, 3.998  # mantissas that carry twice
    expected = l_mul(x[..., None], y, bits, mode).sum(-2)
    assert torch.allclose(l_mul_matmul(x, y, bits, mode), expected, atol=1e-13)
    assert not torch.allclose(expected, x @ y, atol=1e-3)


def test_gradients_are_those_of_the_exact_product() -> None:
    x, y = draw(2, 3, 5).requires_grad_(), draw(5, 4, seed=1).requires_grad_()
    weight = draw(2, 3, 4, seed=2)
    for made, exact in ((l_mul_matmul(x, y), x @ y), (l_mul(x[..., None], y).sum(-2), x @ y)):
        found = torch.autograd.grad((made * weight).sum(), (x, y), retain_graph=True)
        expected = torch.autograd.grad((exact * weight).sum(), (x, y), retain_graph=True)
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, expected, strict=True))


def test_attention_is_made_of_two_emulated_products() -> None:
    q, k, v = (draw(2, 3, 6, 4, seed=i) for i in range(3))
    for causal in (False, True):
        logits = l_mul_matmul(q, k.mT, 4, "integer") / 2
        if causal:
            logits = logits.masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), -math.inf)
        expected = l_mul_matmul(logits.softmax(-1), v, 4, "integer")
        assert torch.equal(l_mul_attention(q, k, v, is_causal=causal, mode="integer"), expected)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    masked = l_mul_attention(q, k, v, mask)
    assert torch.equal(masked, l_mul_attention(q, k, v, is_causal=True))
    added = torch.where(mask, 0.0, -math.inf).double()
    assert torch.equal(masked, l_mul_attention(q, k, v, added))


# Models


class Eager(nn.Module):
    """Attention written out, beside a product with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 6).double()
        self.mix = nn.Parameter(draw(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x) @ self.mix
        return torch.bmm((y @ y.transpose(1, 2)).softmax(-1), y)


def test_the_products_of_a_model_are_replaced_as_asked() -> None:
    model, x = Eager(), draw(2, 4, 6)
    y = model.proj(x) @ model.mix
    attention = l_mul_matmul(l_mul_matmul(y, y.mT, 3, "integer").softmax(-1), y, 3, "integer")
    assert torch.equal(replace_multiplications(model, "attention", 3)(x), attention)
    lin = l_mul_matmul(l_mul_matmul(x.reshape(-1, 6), model.proj.weight.T, 3, "integer").reshape(2, 4, 6)
                       + model.proj.bias, model.mix, 3, "integer")  # fmt: skip
    everything = l_mul_matmul(l_mul_matmul(lin, lin.mT, 3, "integer").softmax(-1), lin, 3, "integer")
    assert torch.allclose(replace_multiplications(model, "all", 3)(x), everything, atol=1e-12)
    assert torch.equal(model(x), torch.bmm((y @ y.mT).softmax(-1), y))  # the mode is gone, the original untouched
    fused = Attention(8, 2, causal=True).double()
    tokens = draw(2, 5, 8)
    by_hand = LMulAttention(8, num_heads=2, causal=True, mode="integer").double()
    with torch.no_grad():
        by_hand.qkv.weight.copy_(torch.cat([fused.query.weight, fused.key.weight, fused.value.weight]))
        by_hand.qkv.bias.copy_(torch.cat([fused.query.bias, fused.key.bias, fused.value.bias]))
        by_hand.out.load_state_dict(fused.out.state_dict())
    assert torch.allclose(replace_multiplications(fused)(tokens), by_hand(tokens), atol=1e-12)


def test_a_linear_layer_keeps_its_parameters_and_is_near() -> None:
    linear = nn.Linear(64, 8)
    made = LMulLinear.from_linear(linear, mantissa_bits=None, mode="integer")
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    assert made.weight is linear.weight
    with torch.no_grad():
        gap = (made(x) - linear(x)).norm() / linear(x).norm()
    assert 1e-3 < float(gap) < 0.15
    assert LMulLinear(64, out_features=8).state_dict().keys() == linear.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(made(x)[:0], made(x[:0]))


def test_bad_input_is_refused() -> None:
    ones = torch.ones(2, 2)
    for call in (
        lambda: l_mul(ones, ones, 0),
        lambda: l_mul(ones, ones, 4, "exact"),  # type: ignore[arg-type]
        lambda: l_mul(ones.int(), ones.int()),
        lambda: l_mul_matmul(ones, torch.ones(3, 2)),
        lambda: LMulLinear(0),
        lambda: LMulLinear(3)(ones),
        lambda: LMulAttention(6, num_heads=4),
        lambda: replace_multiplications(nn.Linear(2, 2), "none"),  # type: ignore[arg-type]
        lambda: replace_multiplications(nn.TransformerEncoderLayer(8, 2)),
    ):
        with pytest.raises(BadInput):
            call()
    grouped = replace_multiplications(Grouped())
    with pytest.raises(BadInput, match="enable_gqa"):
        grouped(torch.ones(1, 2, 3, 4))


class Grouped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x[:, :1], x[:, :1], enable_gqa=True)
