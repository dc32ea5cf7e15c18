"""Kolmogorov-Arnold attention against loops, the simplex against SLSQP, and what is shared where it is shared."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from torchgraft.engines.attention import Rows, attend
from torchgraft.errors import BadInput
from torchgraft.parts.blocks.vision_model import VisionModel
from torchgraft.parts.mixers.kolmogorov_arnold_attention import (
    FourierOperator,
    FourierRow,
    KolmogorovArnoldAttention,
    row_operators,
    simplex_projection,
)

DOUBLE = torch.float64


def _rows(tokens: int) -> Rows:
    place = torch.arange(tokens)
    return Rows(slice(0, tokens), slice(0, tokens), place, place)


def _operator(tokens: int, *, heads: int = 2, rank: int = 3, grid: int = 2) -> FourierOperator:
    torch.manual_seed(0)
    return FourierOperator(heads, tokens, rank=rank, grid=grid).double()


def test_operator_equals_four_loops() -> None:
    operator, scores = _operator(5), torch.randn(1, 2, 5, 5, dtype=DOUBLE)
    found = operator()(scores, _rows(5))
    alpha, beta, mix = (part.tolist() for part in (operator.cosine, operator.sine, operator.mix))
    for head in range(2):
        for row in range(5):
            inner = [0.0] * 3
            for p in range(3):
                for q in range(5):
                    a = float(scores[0, head, row, q])
                    for m in (1, 2):
                        inner[p] += alpha[head][p][q][m - 1] * math.cos(m * a)
                        inner[p] += beta[head][p][q][m - 1] * math.sin(m * a)
            wanted = [sum(mix[head][n][p] * inner[p] for p in range(3)) for n in range(5)]
            assert found[0, head, row].tolist() == pytest.approx(wanted, rel=1e-12, abs=1e-12)


def test_mixer_equals_its_formula() -> None:
    torch.manual_seed(0)
    mixer = KolmogorovArnoldAttention(8, num_heads=2, tokens=9).double()
    x = torch.randn(1, 9, 8, dtype=DOUBLE)
    q, k, v = torch.split(mixer.qkv(x[0]), 8, dim=-1)
    scores = torch.stack([q[:, part] @ k[:, part].T / 2 for part in (slice(0, 4), slice(4, 8))])[None]
    weights = mixer.operator()(scores, _rows(9))
    torch.testing.assert_close(mixer.attention(x), weights, rtol=1e-12, atol=1e-12)
    mixed = torch.cat([weights[0, head] @ v[:, 4 * head : 4 * head + 4] for head in range(2)], dim=1)
    torch.testing.assert_close(mixer(x)[0], mixed @ mixer.out.weight.T, rtol=1e-12, atol=1e-12)


def test_fewer_tokens_use_the_first_columns() -> None:
    """Seven tokens of nine give what an operator cut to seven gives."""
    whole, scores = _operator(9), torch.randn(1, 2, 7, 7, dtype=DOUBLE)
    cut = FourierRow(whole.cosine[:, :, :7], whole.sine[:, :, :7], whole.mix[:, :7])
    torch.testing.assert_close(whole()(scores, _rows(7)), cut(scores, _rows(7)), rtol=0, atol=0)


def test_blocks_give_the_gradients_of_the_matrix() -> None:
    operator = _operator(70)
    q, k, v = (torch.randn(2, 70, 2, 4, dtype=DOUBLE) for _ in range(3))
    found = []
    for form in ("blocks", "dense"):
        for project in (False, True):
            mixed = attend(q, k, v, normalize=operator(project=project), form=form, rows=32)
            weight = torch.linspace(-1, 1, mixed.numel(), dtype=DOUBLE).view_as(mixed)
            found.append((mixed.detach(), *torch.autograd.grad((mixed * weight).sum(), list(operator.parameters()))))
    for blocked, dense in zip(found[:2], found[2:], strict=True):
        for ours, theirs in zip(blocked, dense, strict=True):
            assert ours.abs().max() > 0
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_shared_operator_is_one_object() -> None:
    own = row_operators(3, num_heads=2, tokens=17, rank=4)
    shared = row_operators(3, num_heads=2, tokens=17, rank=4, share="universal")
    assert len({id(each) for each in own}) == 3 == len(shared)
    assert len({id(each) for each in shared}) == 1

    def model(operators: list[FourierOperator]) -> VisionModel:
        mixers = [
            (lambda width, each=each: KolmogorovArnoldAttention(width, num_heads=2, operator=each))
            for each in operators
        ]
        return VisionModel(8, 3, mixers)

    def count(operators: list[FourierOperator]) -> int:
        names = [name for name, _ in model(operators).named_parameters() if ".operator." in name]
        return sum(model(operators).get_parameter(name).numel() for name in names)

    assert count(own) == 3 * count(shared) == 3 * 2 * (2 * 17 * 4 * 3 + 17 * 4)
    built = model(shared)
    first, _, third = built.mixers()
    assert isinstance(first, KolmogorovArnoldAttention)
    assert isinstance(third, KolmogorovArnoldAttention)
    assert first.operator.cosine is third.operator.cosine
    torch.manual_seed(0)
    built(torch.rand(2, 1, 8, 8)).square().sum().backward()
    assert bool(first.operator.mix.grad.any())  # type: ignore[union-attr]  # there is one


def test_gradient_of_a_score_goes_through_its_column() -> None:
    operator, scores = _operator(5), torch.randn(1, 2, 5, 5, dtype=DOUBLE, requires_grad=True)
    weight = torch.randn(1, 2, 5, 5, dtype=DOUBLE)
    (whole,) = torch.autograd.grad((operator()(scores, _rows(5)) * weight).sum(), scores)
    with torch.no_grad():
        operator.cosine[:, :, 3] = 0
        operator.sine[:, :, 3] = 0
    (without,) = torch.autograd.grad((operator()(scores, _rows(5)) * weight).sum(), scores)
    assert whole[..., 3].abs().min() > 0 == without[..., 3].abs().max()
    others = [0, 1, 2, 4]
    torch.testing.assert_close(without[..., others], whole[..., others], rtol=1e-12, atol=1e-12)


def test_rank_of_the_weights() -> None:
    torch.manual_seed(0)
    mixer = KolmogorovArnoldAttention(8, num_heads=2, tokens=20, rank=4).double()
    values = torch.linalg.svdvals(mixer.attention(torch.randn(1, 20, 8, dtype=DOUBLE))[0].detach())
    assert (values > 1e-10 * values[:, :1]).sum(-1).tolist() == [4, 4]


@settings(deadline=None, max_examples=40)
@given(size=st.integers(1, 9), spread=st.sampled_from([1e-3, 0.3, 1.0, 20.0]), seed=st.integers(0, 999))
def test_projection_is_on_the_simplex_and_idempotent(size: int, spread: float, seed: int) -> None:
    torch.manual_seed(seed)
    y = torch.randn(3, size, dtype=DOUBLE) * spread
    found = simplex_projection(y)
    assert bool((found >= 0).all())
    torch.testing.assert_close(found.sum(-1), torch.ones(3, dtype=DOUBLE), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(simplex_projection(found), found, rtol=1e-12, atol=1e-12)
    for row in range(3):  # a nearest point of a convex set: no vertex lies on the other side
        toward = torch.eye(size, dtype=DOUBLE) - found[row]
        assert float((toward @ (y[row] - found[row])).max()) <= 1e-9 * max(1.0, spread)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_projection_is_what_slsqp_finds(seed: int) -> None:
    y = np.random.default_rng(seed).normal(size=6)
    solved = minimize(
        lambda p: ((p - y) ** 2).sum(),
        np.full(6, 1 / 6),
        jac=lambda p: 2 * (p - y),
        bounds=[(0, 1)] * 6,
        constraints={"type": "eq", "fun": lambda p: p.sum() - 1, "jac": np.ones_like},
        method="SLSQP",
        options={"ftol": 1e-14},
    )
    np.testing.assert_allclose(simplex_projection(torch.from_numpy(y)).numpy(), solved.x, atol=1e-5)


def test_projected_weights_are_shares() -> None:
    torch.manual_seed(0)
    mixer = KolmogorovArnoldAttention(8, num_heads=2, tokens=12, project=True).double()
    x = torch.randn(2, 12, 8, dtype=DOUBLE)
    found = mixer.attention(x)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 2, 12, dtype=DOUBLE), rtol=1e-12, atol=1e-12)
    mixer.project = False
    assert mixer.attention(x).min() < -0.1


def test_bad_settings_are_refused() -> None:
    with pytest.raises(BadInput, match="at most tokens = 6 tokens, got 7"):
        KolmogorovArnoldAttention(8, tokens=6)(torch.randn(1, 7, 8))
    with pytest.raises(BadInput, match="grid must be at least 1, got 0"):
        KolmogorovArnoldAttention(8, grid=0)
    with pytest.raises(BadInput, match="operator must have num_heads = 4 heads, got 2"):
        KolmogorovArnoldAttention(8, operator=FourierOperator(2, 6))
    with pytest.raises(BadInput, match="share must be 'block' or 'universal', got 'all'"):
        row_operators(2, num_heads=1, tokens=4, share="all")  # type: ignore[arg-type]  # that is the point
    q = torch.randn(1, 6, 2, 4)
    with pytest.raises(BadInput, match="takes no mask"):
        attend(q, q, q, normalize=FourierOperator(2, 6)(), causal=True)
