"""NUPES: the power quantiser, the exponent that is found without data, refinement, and the procedure."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.task import Task
from torchgraft.engines.quantize.fewbit import FewBit, bend, code_layers, codes_of, exponent_of, largest_code
from torchgraft.engines.surgery.edits import apply_edits, history
from torchgraft.errors import BadInput
from torchgraft.shrink.quantize.nupes_power_quant import (
    Nupes,
    PowerQuantizer,
    nupes_refine,
    search_exponent,
    soft_round,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 3)).double().eval()
        for layer in (model[0], model[2]):
            nn.init.normal_(layer.weight, std=0.3)  # bell-shaped, as trained weights are
        return model


# The quantiser


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.integers(0, 10**6))
def test_exponent_one_is_symmetric_uniform_quantisation(bits: int, seed: int) -> None:
    w, n = draw(4, 7, seed=seed), 2 ** (bits - 1) - 1
    codes, scale = PowerQuantizer(bits, 1.0).encode(w)
    most = w.abs().amax(1, keepdim=True)
    assert torch.equal(codes, (w / most * n).round().int())
    assert torch.allclose(PowerQuantizer(bits, 1.0).decode(codes, scale), codes * most / n, rtol=1e-14)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.floats(0.1, 1.0))
def test_codes_are_odd_and_monotone(bits: int, exponent: float) -> None:
    w = torch.linspace(-1, 1, 401, dtype=torch.float64)[None]
    codes, scale = PowerQuantizer(bits, exponent).encode(w)
    assert torch.equal(PowerQuantizer(bits, exponent).encode(-w)[0], -codes)
    assert bool((codes.diff() >= 0).all())
    assert bool((PowerQuantizer(bits, exponent).decode(codes, scale).diff() >= 0).all())


@settings(max_examples=40, deadline=None)
@given(st.floats(0.1, 1.0))
def test_decoding_keeps_products(exponent: float) -> None:
    n = largest_code(4)
    i, j = torch.arange(-n, n + 1)[:, None], torch.arange(-n, n + 1)[None]
    decode = lambda q, m: m * bend(q.double() / n, 1 / exponent)  # noqa: E731
    quantizer = PowerQuantizer(4, exponent)
    left, right = quantizer.decode(i, torch.tensor(2.0).double()), quantizer.decode(j, torch.tensor(3.0).double())
    # the product of the codes over n decodes, with the scales multiplied, to the product of the values
    assert torch.allclose(decode(i.double() * j / n, 6.0), left * right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "low", "high", "gain"), [("normal", 0.6, 0.72, 0.2), ("laplace", 0.44, 0.56, 0.5), ("even", 0.95, 1.0, 0)]
)
def test_the_searched_exponent_fits_the_distribution(kind: str, low: float, high: float, gain: float) -> None:
    u = torch.rand(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
    w = {"normal": draw(20000), "laplace": -u.sign() * torch.log1p(-2 * u.abs()), "even": u}[kind][None]
    a = search_exponent([w], 4)
    assert low <= a <= high
    error = {e: float((w - PowerQuantizer(4, e)(w)).square().mean()) for e in (a, 1.0)}
    assert error[a] <= (1 - gain) * error[1.0]
    # no exponent of a fine grid does better by more than a hair
    best = min(float((w - PowerQuantizer(4, e / 100)(w)).norm()) for e in range(30, 101))
    assert float((w - PowerQuantizer(4, a)(w)).norm()) <= 1.01 * best


def test_the_gradient_of_the_smooth_map_in_the_exponent() -> None:
    x = torch.tensor([-1.0, -0.3, 1e-5, 0.0, 0.7], dtype=torch.float64)
    a = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    weight = draw(5)
    (bend(x, a, least=1e-6) * weight).sum().backward()
    step = 1e-6
    slope = ((bend(x, 0.6 + step) - bend(x, 0.6 - step)) * weight).sum() / (2 * step)
    assert float(a.grad) == pytest.approx(float(slope), rel=1e-6)
    assert bool(a.grad.isfinite())


def test_the_soft_staircase_goes_from_the_identity_to_rounding() -> None:
    x = torch.linspace(-3, 3, 601, dtype=torch.float64)
    assert torch.allclose(soft_round(x, 1e-3), x, atol=1e-6)
    inside = ((x - x.floor()) - 0.5).abs() > 0.05
    assert torch.allclose(soft_round(x, 400.0)[inside], x.round()[inside], atol=1e-6)
    assert bool((soft_round(x, 8.0).diff() > -1e-12).all())


# Refinement


def _error(model: nn.Module, made: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((model(x) - made(x)).square().mean())


def test_refinement_gains_on_its_samples_and_honours_its_span() -> None:
    model, x = net(), draw(64, 10, seed=3)
    rounded = apply_edits(model, [FewBit(bits={"0": 3, "2": 3})])
    nearby = nupes_refine(model, x, bits=3, exponent=1.0, learn_exponent=False, whole_grid=False, steps=60)
    free = nupes_refine(model, x, bits=3, exponent=0.7, steps=60)
    # an AdaRound-style result stands within one code of the weight, and never off the two neighbours
    for name, layer in code_layers(nearby).items():
        weight = model.get_submodule(name).weight.detach()
        real = weight / weight.abs().amax(1, keepdim=True) * largest_code(3)
        assert bool(((codes_of(layer) - real).abs() <= 1 + 1e-9).all())
        assert exponent_of(layer) == 1.0
    assert _error(model, nearby, x) < _error(model, rounded, x)
    assert _error(model, free, x) < _error(model, rounded, x)
    assert {exponent_of(layer) for layer in code_layers(free).values()} != {0.7}
    assert not code_layers(model)


def test_a_code_may_leave_its_neighbours_where_that_pays() -> None:
    # at 3 bits with one scale the first layer's 0.25 becomes 1/3, so that the second layer's 3 should become 2.25: 2
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.25]]))
        model[1].weight.copy_(torch.tensor([[0.3, 1.0]]))
    x = draw(64, 2)
    made = {
        whole: nupes_refine(
            model,
            x,
            bits=3,
            exponent=1.0,
            learn_exponent=False,
            whole_grid=whole,
            steps=150,
            batch_size=64,
            granularity="tensor",
        )
        for whole in (True, False)
    }
    assert [codes_of(made[whole][1]).tolist() for whole in (True, False)] == [[[1, 2]], [[1, 3]]]
    assert _error(model, made[True], x) < 0.5 * _error(model, made[False], x)


def test_a_layer_that_gains_nothing_keeps_its_rounded_codes() -> None:
    # two outputs already on the grid: the error of rounding is zero, and nothing can be below it
    model = nn.Sequential(nn.Linear(2, 2, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[7.0, 3.0], [-7.0, 1.0]]))
    for lr in (0.03, 30.0):  # the second throws the codes about
        made = nupes_refine(model, draw(16, 2), bits=4, exponent=1.0, steps=10, lr=lr)
        assert torch.equal(made[0].weight, model[0].weight)
        assert exponent_of(made[0]) == 1.0


def test_the_procedure_falls_from_8_bits_and_searches_or_refines() -> None:
    model = net().float()
    x = draw(64, 10).float()
    data = (x, x[:, :3].argmax(-1))
    task = Task(model, data, data, data, F.cross_entropy, lambda o, t: (o.argmax(-1) == t).float())
    bits = [next(iter(Nupes().plan(model, task, s)[0].bits.values())) for s in (0.01, 0.4, 1.0)]
    assert bits == [8, 6, 3]
    made = Nupes().apply(model, task, 1.0)
    assert 0.1 <= history(made)[0].exponents["0"] < 1.0
    refined = Nupes(steps=20, samples=32).apply(model, task, 1.0)
    assert _error(model, refined, x[:32]) < _error(model, made, x[:32])
    again = Nupes(steps=20, samples=32).apply(model, task, 1.0)
    assert all(
        torch.equal(a, b) for a, b in zip(refined.state_dict().values(), again.state_dict().values(), strict=True)
    )


def test_bad_settings_are_refused() -> None:
    for call in (
        lambda: Nupes(steps=-1),
        lambda: Nupes(least_bits=1),
        lambda: Nupes(exponent=0.0),
        lambda: Nupes(granularity="row"),  # type: ignore[arg-type]
        lambda: PowerQuantizer(1),
        lambda: search_exponent(nn.ReLU(), 4),
        lambda: nupes_refine(nn.ReLU(), torch.ones(1)),
        lambda: nupes_refine(net(), draw(4, 10), steps=-1),
    ):
        with pytest.raises(BadInput):
            call()
