"""The attention engine: every form gives the same numbers and gradients, and memory is linear in the tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from torchgraft.engines.attention import (
    L1,
    Alibi,
    Causal,
    Chain,
    Dot,
    Gaussian,
    Given,
    Harmonic,
    Mask,
    Padding,
    Reweighted,
    Rows,
    Shifted,
    Stage,
    Tempered,
    Window,
    attend,
    attention_weights,
    exp,
    l1,
    relu,
    sigmoid,
    softmax,
    softplus,
    unnormalized,
)
from torchgraft.engines.attention.blocked import Pipeline, Places, _blocks, _size
from torchgraft.engines.attention.position import harmonic_numbers
from torchgraft.engines.attention.stages import learned, rebuilt
from torchgraft.errors import BadInput

DOUBLE = torch.float64
BATCH, TOKENS, HEADS, GROUPS, KEY, VALUE = 2, 37, 4, 2, 6, 5
PIPELINES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "sigmoid": {"transform": sigmoid, "normalize": unnormalized},
    "relu": {"transform": relu, "normalize": unnormalized},
    "softplus": {"transform": softplus, "normalize": l1},
    "reweighted": {"transform": softplus, "normalize": Reweighted(l1)},
    "gaussian": {"score": Gaussian(), "transform": exp, "normalize": l1},
}


def heads(seed: int = 0, tokens: int = TOKENS, sources: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    sources = tokens if sources is None else sources
    shapes = ((tokens, HEADS, KEY), (sources, GROUPS, KEY), (sources, GROUPS, VALUE))
    q, k, v = (torch.randn(BATCH, *shape, generator=draw, dtype=DOUBLE, requires_grad=True) for shape in shapes)
    return q, k, v


def masks(tokens: int = TOKENS) -> dict[str, Mask | Tensor | None]:
    draw = torch.Generator().manual_seed(7)
    real = torch.rand(BATCH, tokens, generator=draw) > 0.3
    pairs = torch.rand(BATCH, 1, tokens, tokens, generator=draw) > 0.3
    return {
        "none": None,
        "window": Window(7),
        "padding": real,
        "pairs": pairs,
        "window and padding": Window(9) & Padding(real),
    }


def written_out(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, weigh: Any) -> Tensor:
    """Attention by loops over heads and rows."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    share = q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            for i in range(q.shape[1]):
                scores = k[b, :, h // share] @ q[b, i, h] / math.sqrt(q.shape[-1])
                out[b, i, h] = weigh(scores, seen[b, i]) @ v[b, :, h // share]
    return out


@pytest.mark.parametrize(
    ("name", "weigh"),
    [
        ("softmax", lambda s, seen: torch.where(seen, s.exp(), 0) / s.exp()[seen].sum()),
        ("sigmoid", lambda s, seen: torch.where(seen, 1 / (1 + (-s).exp()), 0)),
        ("relu", lambda s, seen: torch.where(seen, s.clamp_min(0), 0)),
        ("softplus", lambda s, seen: torch.where(seen, (1 + s.exp()).log(), 0) / (1 + s.exp()).log()[seen].sum()),
    ],
)
def test_each_pipeline_equals_loops(name: str, weigh: Any) -> None:
    q, k, v = heads()
    seen = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril().expand(BATCH, -1, -1)
    expected = written_out(q, k, v, seen, weigh)
    assert torch.allclose(attend(q, k, v, causal=True, **PIPELINES[name]), expected, atol=1e-12)
    assert torch.allclose(attend(q, k, v, causal=True, form="blocks", rows=8, **PIPELINES[name]), expected, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 8, 64])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", ["none", "window", "padding", "pairs", "window and padding"])
@pytest.mark.parametrize("pipeline", list(PIPELINES))
def test_blocks_equal_the_matrix_and_so_do_all_gradients(pipeline: str, mask: str, causal: bool, rows: int) -> None:
    q, k, v = heads()
    weight = torch.randn(BATCH, TOKENS, HEADS, VALUE, dtype=DOUBLE)
    found = []
    for form in ("dense", "blocks"):
        out = attend(q, k, v, mask=masks()[mask], causal=causal, form=form, rows=rows, **PIPELINES[pipeline])
        found.append([out, *torch.autograd.grad((out * weight).sum(), [q, k, v])])
    with torch.no_grad():
        found.append(
            [attend(q, k, v, mask=masks()[mask], causal=causal, form="blocks", rows=rows, **PIPELINES[pipeline])]
        )
    for other in found[1:]:
        for left, right in zip(found[0], other, strict=False):
            assert torch.allclose(left, right, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("mask", ["none", "window", "padding", "pairs"])
@pytest.mark.parametrize("causal", [False, True])
def test_the_fused_kernel_equals_blocks(mask: str, causal: bool) -> None:
    q, k, v = heads()
    fused = attend(q, k, v, mask=masks()[mask], causal=causal, form="sdpa")
    assert torch.allclose(fused, attend(q, k, v, mask=masks()[mask], causal=causal, form="blocks"), atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_plain_softmax_has_the_bits_of_sdpa(causal: bool) -> None:
    q, k, v = (torch.randn(2, 70, 4, 16) for _ in range(3))
    direct = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal)
    assert torch.equal(attend(q, k, v, causal=causal), direct.transpose(1, 2))


def test_what_stages_have_learned_gets_the_gradient_of_the_matrix() -> None:
    q, k, v = heads()
    inverse = torch.rand(BATCH, HEADS, TOKENS, 1, dtype=DOUBLE, requires_grad=True)
    bias = torch.rand(HEADS, 1, 1, dtype=DOUBLE, requires_grad=True)
    slopes = torch.rand(HEADS, dtype=DOUBLE, requires_grad=True)
    stages = Chain((Tempered(inverse), Shifted(bias), Alibi(slopes), Harmonic(slopes)))
    given = [q, k, v, inverse, bias, slopes]
    found = []
    for form in ("dense", "blocks"):
        out = attend(q, k, v, transform=Chain((stages, sigmoid)), normalize=l1, causal=True, form=form, rows=8)
        found.append([out, *torch.autograd.grad(out.square().sum(), given)])
    for left, right in zip(*found, strict=True):
        assert torch.allclose(left, right, atol=1e-11)
    assert all(float(each.abs().max()) > 1e-6 for each in found[0][1:])


def test_gradients_of_blocks_are_the_derivatives() -> None:
    q, k, v = (torch.randn(1, 5, 2, 3, dtype=DOUBLE, requires_grad=True) for _ in range(3))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, transform=softplus, normalize=Reweighted(l1, power=3.0), form="blocks", rows=2)

    assert torch.autograd.gradcheck(run, (q, k, v))


def test_a_function_that_hides_a_parameter_is_refused() -> None:
    q, k, v = heads()
    slope = torch.ones((), dtype=DOUBLE, requires_grad=True)
    with pytest.raises(BadInput, match="captured a tensor"):
        attend(q, k, v, transform=lambda s, rows: s * slope, form="blocks")
    with torch.no_grad():  # nothing is lost where no gradient is recorded
        attend(q, k, v, transform=lambda s, rows: s * slope, form="blocks")


def test_queries_are_the_last_tokens_unless_said_otherwise() -> None:
    q, k, v = heads()
    whole = attend(q, k, v, causal=True)
    for form in ("auto", "blocks", "dense"):
        assert torch.allclose(attend(q[:, -5:], k, v, causal=True, form=form), whole[:, -5:], atol=1e-12)
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(1))
    mixed = attend(q, k[:, order], v[:, order], causal=True, key_place=order, form="blocks", rows=8)
    assert torch.allclose(mixed, whole, atol=1e-12)
    some = attend(q[:, [3, 9]], k, v, causal=True, query_place=torch.tensor([3, 9]))
    assert torch.allclose(some, whole[:, [3, 9]], atol=1e-12)


def test_a_window_touches_no_key_beyond_it() -> None:
    place = torch.arange(4096)
    q = torch.empty(1, 1, 4096, 1)
    causal = Window(64) & Causal()
    size = _size(q, q, causal)
    pipeline = Pipeline(Dot(), None, softmax, 1.0, causal)
    blocks = _blocks(pipeline, Places(place, place, ordered=True), size, causal=False, overwrite=False)
    numbers = sum((rows.keys.stop - rows.keys.start) * (rows.queries.stop - rows.queries.start) for rows in blocks)
    assert numbers <= 4096 * (64 + size)


def test_a_row_that_sees_nothing_is_zero_and_finite_gradients_flow() -> None:
    q, k, v = heads()
    nothing = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    nothing[0] = False
    for stages in PIPELINES.values():
        out = attend(q, k, v, mask=nothing, form="blocks", **stages)
        assert torch.equal(out[0], torch.zeros_like(out[0]))
        for grad in torch.autograd.grad(out.square().sum(), [q, k, v]):
            assert bool(grad.isfinite().all())
            assert torch.equal(grad[0], torch.zeros_like(grad[0]))


def test_weights_mix_to_the_output() -> None:
    q, k, v = heads()
    for stages in PIPELINES.values():
        weights = attention_weights(q, k, causal=True, **stages)
        mixed = torch.einsum("bhts,bshv->bthv", weights, v.repeat_interleave(2, dim=2))
        assert torch.allclose(mixed, attend(q, k, v, causal=True, **stages), atol=1e-12)
        assert torch.equal(weights.triu(1), torch.zeros_like(weights))


def test_reweighting_keeps_order_and_zeroes_what_is_below_the_mean() -> None:
    q, k, _ = heads()
    first = attention_weights(q, k, transform=softplus, normalize=l1)
    again = attention_weights(q, k, transform=softplus, normalize=Reweighted(l1, power=3.0))
    below = first < 1 / TOKENS
    assert torch.equal(again[below], torch.zeros_like(again[below]))
    assert bool((again[~below] > 0).all())
    order = first.argsort(-1)
    assert bool((again.gather(-1, order).diff(dim=-1) >= 0).all())
    by_hand = (TOKENS * first - 1).clamp_min(0) ** 3
    assert torch.allclose(again, by_hand / (by_hand.sum(-1, keepdim=True) + 1e-8), atol=1e-12)


def test_an_even_row_is_reweighted_to_zero_and_a_short_one_is_kept() -> None:
    q, k = torch.zeros(1, 6, 1, 2, dtype=DOUBLE), torch.randn(1, 6, 1, 2, dtype=DOUBLE)
    weights = attention_weights(q, k, transform=softplus, normalize=Reweighted(l1), causal=True)[0, 0]
    assert torch.equal(weights[3:], torch.zeros(3, 6, dtype=DOUBLE))
    assert torch.allclose(weights[:3].sum(-1), torch.ones(3, dtype=DOUBLE))


def test_sharp_powers_do_not_overflow() -> None:
    q, k, v = (100 * torch.randn(1, 300, 1, 8) for _ in range(3))
    q.requires_grad_()
    out = attend(q, k, v, transform=softplus, normalize=Reweighted(l1), causal=True, form="blocks")
    out.sum().backward()
    assert bool(out.isfinite().all())
    assert q.grad is not None
    assert bool(q.grad.isfinite().all())


def test_harmonic_numbers_by_hand() -> None:
    table = harmonic_numbers(5, like=torch.zeros((), dtype=DOUBLE))
    assert torch.allclose(table, torch.tensor([0, 1, 1.5, 11 / 6, 25 / 12], dtype=DOUBLE))
    q, k = (x.detach() for x in heads(tokens=9)[:2])
    slopes = torch.rand(HEADS, dtype=DOUBLE)
    biased = attention_weights(q, k, transform=Harmonic(slopes), normalize=unnormalized, causal=True)
    plain = attention_weights(q, k, normalize=unnormalized, causal=True)
    assert math.isclose(float(plain[0, 2, 7, 4] - biased[0, 2, 7, 4]), float(slopes[2]) * 11 / 6, rel_tol=1e-12)


def test_gaussian_scores_are_distances() -> None:
    q, k, _ = heads(tokens=4)
    found = attention_weights(q, k, score=Gaussian(), normalize=unnormalized, scale=0.5)
    expected = -0.25 * torch.cdist(q.transpose(1, 2), k.repeat_interleave(2, 2).transpose(1, 2)) ** 2
    assert torch.allclose(found, expected, atol=1e-12)


def test_dropout_keeps_the_mean_and_repeats_in_the_backward_pass() -> None:
    q, k, v = heads()
    torch.manual_seed(0)
    out = attend(q, k, v, transform=sigmoid, normalize=unnormalized, dropout=0.5, form="blocks", rows=8)
    # The output is linear in v for the weights that were kept: <dO/dv . v> must give it back.
    grad = torch.autograd.grad(out.sum(), v)[0]
    assert torch.allclose((grad * v).sum(), out.sum())
    draws = torch.stack(
        [
            attend(q, k, v, transform=sigmoid, normalize=unnormalized, dropout=0.5, form="blocks").detach()
            for _ in range(400)
        ]
    )
    sure = attend(q, k, v, transform=sigmoid, normalize=unnormalized).detach()
    assert float((draws.mean(0) - sure).abs().mean()) < 0.15 * float(draws.std(0).mean())


def test_stages_give_up_their_tensors_and_take_others() -> None:
    chain = Chain((Tempered(torch.tensor(2.0)), relu, Shifted(torch.tensor(3.0))))
    assert [each.item() for each in learned(chain)] == [2.0, 3.0]
    other = rebuilt(chain, iter([torch.tensor(5.0), torch.tensor(7.0)]))
    assert [each.item() for each in learned(other)] == [5.0, 7.0]
    assert other.parts[1] is relu


def test_lower_precision_is_computed_in_float32() -> None:
    q, k, v = (torch.randn(1, 50, 2, 8) for _ in range(3))
    half = attend(*(x.bfloat16() for x in (q, k, v)), transform=sigmoid, normalize=unnormalized)
    exact = attend(*(x.bfloat16().float() for x in (q, k, v)), transform=sigmoid, normalize=unnormalized)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, exact.bfloat16())


@pytest.mark.parametrize("pipeline", ["sigmoid", "softplus", "reweighted"])
def test_nothing_of_the_size_of_the_matrix_is_kept_for_the_backward_pass(pipeline: str) -> None:
    kept = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal kept
        kept += x.untyped_storage().nbytes()
        return x

    q, k, v = (torch.randn(1, 1024, 2, 8, requires_grad=True) for _ in range(3))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        attend(q, k, v, causal=True, **PIPELINES[pipeline])
    assert kept < 1024 * 1024 * 4


def test_wrong_input_is_refused_in_words() -> None:
    q, k, v = heads()
    cases: list[tuple[str, dict[str, Any]]] = [
        ("form must be one of", {"form": "flash"}),
        ("dropout must lie", {"dropout": 1.0}),
        ("mask must be a Mask", {"mask": torch.ones(TOKENS)}),
        ("must be boolean of shape", {"mask": torch.ones(BATCH, TOKENS + 1, dtype=torch.bool)}),
        ("must be boolean and broadcast", {"mask": torch.ones(BATCH, 3, 1, 1, dtype=torch.bool)}),
        ("query_place must be integers", {"query_place": torch.ones(TOKENS)}),
        ("rows must be at least 1", {"rows": 0, "form": "blocks"}),
        ("plain softmax", {"form": "sdpa", "transform": relu}),
    ]
    for words, options in cases:
        with pytest.raises(BadInput, match=words):
            attend(q, k, v, **options)
    for wrong in ((q[0], k, v), (q, k[:, :-1], v), (q[:, :, :3], k, v), (q, k, v.long())):
        with pytest.raises(BadInput):
            attend(*wrong)
    with pytest.raises(BadInput, match="say where they stand"):
        attend(q, k[:, :4], v[:, :4], causal=True)
    with pytest.raises(BadInput, match="size of a window"):
        Window(0)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 20),
    more=st.integers(0, 10),
    window=st.integers(1, 12) | st.none(),
    causal=st.booleans(),
    rows=st.integers(1, 9),
    name=st.sampled_from(list(PIPELINES)),
    seed=st.integers(0, 99),
)
def test_any_shape_and_mask_agrees(
    tokens: int, more: int, window: int | None, causal: bool, rows: int, name: str, seed: int
) -> None:
    q, k, v = heads(seed, tokens, tokens + more)
    mask = None if window is None else Window(window)
    dense = attend(q, k, v, mask=mask, causal=causal, form="dense", **PIPELINES[name])
    blocks = attend(q, k, v, mask=mask, causal=causal, form="blocks", rows=rows, **PIPELINES[name])
    assert torch.allclose(dense, blocks, atol=1e-11)
    assert all(
        torch.allclose(left, right, atol=1e-9)
        for left, right in zip(
            torch.autograd.grad(dense.sum(), [q, k, v]), torch.autograd.grad(blocks.sum(), [q, k, v]), strict=True
        )
    )


@dataclass(frozen=True, eq=False)
class _Learned(Stage):
    """A row operator with a table of coefficients, as learned normalisers have."""

    table: Tensor

    def __call__(self, s: Tensor, rows: Rows) -> Tensor:
        return rows.hide(s @ self.table[rows.keys, rows.keys], 0.0)


def test_a_stage_may_do_anything_to_a_whole_row() -> None:
    q, k, v = heads()
    table = torch.randn(TOKENS, TOKENS, dtype=DOUBLE, requires_grad=True)
    found = []
    for form in ("dense", "blocks"):
        out = attend(q, k, v, normalize=_Learned(table), form=form, rows=8)
        found.append([out, *torch.autograd.grad(out.square().sum(), [q, k, v, table])])
    for left, right in zip(*found, strict=True):
        assert torch.allclose(left, right, atol=1e-10)


def test_l1_rows_sum_to_one_and_given_masks_join() -> None:
    q, k, _ = heads()
    table = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool).tril()
    weights = attention_weights(q, k, transform=exp, normalize=L1(), mask=Given(table) & Window(4))
    assert torch.allclose(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert int((weights[0, 0] > 0).sum(-1).max()) == 4
