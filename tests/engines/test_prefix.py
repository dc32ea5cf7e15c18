"""Running softmax statistics: every form against dense masked softmax, the operator's algebra, extremes, gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchgraft.engines.recurrence.prefix import (
    FORMS,
    Statistics,
    combine,
    cumulative_softmax,
    identity,
    prefix_sum,
    running_softmax,
)
from torchgraft.errors import BadInput


def dense(scores: Tensor, values: Tensor) -> Tensor:
    """Return masked softmax attention with one query for all positions, written out: (B, T, H), (B, T, H, V)."""
    tokens = scores.shape[1]
    logits = scores.permute(0, 2, 1)[:, :, None].expand(-1, -1, tokens, -1)
    later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    return torch.einsum("bhij,bjhv->bihv", logits.masked_fill(later, -torch.inf).softmax(-1), values)


def draw(tokens: int, seed: int = 0, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, tokens, 3, generator=g, dtype=torch.float64) * spread
    return scores, torch.randn(2, tokens, 3, 4, generator=g, dtype=torch.float64)


def elements(seed: int) -> list[Statistics]:
    g = torch.Generator().manual_seed(seed)
    kind = {"generator": g, "dtype": torch.float64}
    return [Statistics(torch.randn(5, **kind) * 20, torch.rand(5, **kind), torch.randn(5, 3, **kind)) for _ in range(3)]


def value(e: Statistics) -> Tensor:
    return torch.cat([e.maximum[:, None], e.weight[:, None], e.value], -1)


def test_operator_is_associative() -> None:
    a, b, c = elements(0)
    torch.testing.assert_close(
        value(combine(combine(a, b), c)), value(combine(a, combine(b, c))), rtol=1e-12, atol=1e-12
    )


def test_identity_changes_nothing_from_either_side() -> None:
    a = elements(1)[0]
    none = identity(a.value)
    for found in (combine(a, none), combine(none, a)):
        torch.testing.assert_close(value(found), value(a), rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [1, 2, 31, 32, 33, 65, 130])
def test_every_form_equals_dense_attention(form: str, tokens: int) -> None:
    scores, values = draw(tokens, tokens)
    found = running_softmax(scores, values, form=form, chunk=8)
    torch.testing.assert_close(found, dense(scores, values), rtol=0, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(2, 300), share=st.floats(0, 1), seed=st.integers(0, 1000), chunk=st.integers(2, 40))
def test_split_anywhere_with_state_carried(tokens: int, share: float, seed: int, chunk: int) -> None:
    scores, values = draw(tokens, seed)
    cut = min(tokens - 1, max(1, round(share * tokens)))
    whole, end = running_softmax(scores, values, return_state=True, chunk=chunk)
    first, state = running_softmax(scores[:, :cut], values[:, :cut], return_state=True, chunk=chunk)
    second, last = running_softmax(scores[:, cut:], values[:, cut:], state=state, return_state=True, chunk=chunk)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=0, atol=1e-11)
    for one, other in zip(last, end, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("form", FORMS)
def test_uniform_scores_give_the_running_mean(form: str) -> None:
    values = draw(50)[1]
    found = running_softmax(torch.full((2, 50, 3), 7.0, dtype=torch.float64), values, form=form, chunk=7)
    mean = values.cumsum(1) / torch.arange(1, 51, dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(found, mean, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_ten_thousand_are_finite(form: str, dtype: torch.dtype) -> None:
    values = torch.randn(1, 200, 2, 3, dtype=dtype, requires_grad=True)
    scores = torch.randint(0, 2, (1, 200, 2)) * 2e4 - 1e4
    scores[:, 0] = -1e4  # the first token is all there is at first, however low its score
    scores = scores.to(dtype).requires_grad_()
    found, state = running_softmax(scores, values, form=form, return_state=True)
    found.float().square().sum().backward()
    assert found.dtype == dtype
    for tensor in (found, *state, scores.grad, values.grad):
        assert tensor is not None
        assert bool(torch.isfinite(tensor).all())
    torch.testing.assert_close(found[0, 0], values[0, 0], rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_through_scores_values_and_state(form: str) -> None:
    scores, values = (t[:1, :7, :2].clone().requires_grad_() for t in draw(7))
    before = running_softmax(*draw(3, 5), return_state=True)[1]
    m, u, w = (t[:1, :2].clone().requires_grad_() for t in before)

    def run(s: Tensor, v: Tensor, m: Tensor, u: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        out, end = running_softmax(s, v, state=Statistics(m, u, w), return_state=True, form=form, chunk=3)
        return out, end.value / end.weight[..., None]

    assert torch.autograd.gradcheck(run, (scores, values, m, u, w))


def test_autograd_keeps_memory_linear_in_tokens() -> None:
    def kept(tokens: int, form: str) -> int:
        storages: dict[int, int] = {}

        def note(t: Tensor) -> Tensor:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        scores, values = (t.float().requires_grad_() for t in draw(tokens))
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            out = running_softmax(scores, values, form=form)
        del out
        return sum(storages.values())

    assert kept(4096, "chunk") / kept(1024, "chunk") < 4.2


def test_long_bf16_runs_on_float32_statistics() -> None:
    scores = torch.zeros(1, 4096, 1, dtype=torch.bfloat16)
    found, state = running_softmax(scores, torch.ones(1, 4096, 1, 1, dtype=torch.bfloat16), return_state=True)
    assert state.weight.dtype == torch.float32
    assert float(state.weight) == 4096.0  # bfloat16 would stop counting at 256
    assert float(found[0, -1]) == 1.0


def test_prefix_sum_counts_in_float32_and_goes_on() -> None:
    x = torch.ones(1, 1000, 2, dtype=torch.bfloat16)
    found = prefix_sum(x)
    assert found.dtype == torch.float32
    assert float(found[0, -1, 0]) == 1000.0
    torch.testing.assert_close(prefix_sum(x[:, 400:], before=found[:, 399]), found[:, 400:])
    assert prefix_sum(x.double()).dtype == torch.float64


def test_cumulative_softmax_is_the_last_weight_of_every_prefix() -> None:
    scores = draw(40)[0]
    by_hand = torch.stack([scores[:, : t + 1].softmax(1)[:, -1] for t in range(40)], 1)
    found = cumulative_softmax(scores)
    torch.testing.assert_close(found, by_hand, rtol=0, atol=1e-12)
    first, middle = cumulative_softmax(scores[:, :13], return_state=True)
    second, end = cumulative_softmax(scores[:, 13:], state=middle, return_state=True)
    torch.testing.assert_close(torch.cat([first, second], 1), by_hand, rtol=0, atol=1e-12)
    torch.testing.assert_close(end.weight * end.maximum.exp(), scores.exp().sum(1))
    assert bool(torch.isfinite(cumulative_softmax(scores.float() * 1e4)).all())


def test_empty_batch() -> None:
    out, state = running_softmax(torch.zeros(0, 5, 2), torch.zeros(0, 5, 2, 3), return_state=True)
    assert out.shape == (0, 5, 2, 3)
    assert state.value.shape == (0, 2, 3)


@pytest.mark.parametrize(
    ("keywords", "told"),
    [({"form": "quick"}, "form"), ({"chunk": 0}, "chunk")],
)
def test_bad_settings_are_named(keywords: dict[str, object], told: str) -> None:
    with pytest.raises(BadInput, match=told):
        running_softmax(torch.zeros(1, 5, 2), torch.zeros(1, 5, 2, 3), **keywords)  # type: ignore[call-overload]


def test_bad_shapes_are_named() -> None:
    with pytest.raises(BadInput, match="values"):
        running_softmax(torch.zeros(1, 5, 2), torch.zeros(1, 4, 2, 3))
    with pytest.raises(BadInput, match="state"):
        running_softmax(torch.zeros(1, 5, 2), torch.zeros(1, 5, 2, 3), state=identity(torch.zeros(2, 2, 3)))
    with pytest.raises(BadInput, match="at least one token"):
        running_softmax(torch.zeros(1, 0, 2), torch.zeros(1, 0, 2, 3))
