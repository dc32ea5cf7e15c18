"""Momentum attention: the running sum against all pairs of tokens, and softmax attention without it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchgraft.engines.attention import attend
from torchgraft.errors import BadInput
from torchgraft.parts.mixers.momentum_attention import MomentumAttention, attention, running_momentum
from torchgraft.parts.mixers.softmax_attention import SoftmaxAttention

DOUBLE = torch.float64


def _made(eta: float, **options: int) -> MomentumAttention:
    torch.manual_seed(0)
    return MomentumAttention(8, num_heads=2, eta=eta, **options).double()


def test_without_momentum_it_is_softmax_attention() -> None:
    mixer, x = _made(0.0), torch.randn(2, 9, 8, dtype=DOUBLE)
    other = SoftmaxAttention(8, num_heads=2).double()
    other.load_state_dict(mixer.state_dict())
    torch.testing.assert_close(mixer(x), other(x), rtol=1e-12, atol=1e-12)
    moved = _made(0.5)
    moved.load_state_dict(mixer.state_dict())
    assert not torch.allclose(moved(x), other(x))
    torch.testing.assert_close(moved(x)[:, 0], other(x)[:, 0])  # the first token has no past


@given(tokens=st.integers(1, 150), eta=st.floats(0.01, 0.99), seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_the_running_sum_is_the_sum_over_pairs(tokens: int, eta: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    v = torch.randn(2, tokens + 1, 3, 2, generator=draw, dtype=DOUBLE)
    apart = torch.arange(tokens + 1)[:, None] - torch.arange(tokens + 1)
    weights = torch.where(apart > 0, eta ** apart.clamp_min(0).double(), 0.0)
    wanted = torch.einsum("ts,bshv->bthv", weights, v)
    none = v.new_zeros(2, 3, 2)
    found, following = running_momentum(v[:, :tokens], eta, none)
    torch.testing.assert_close(found, wanted[:, :tokens], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(following, wanted[:, tokens], rtol=1e-9, atol=1e-9)


def test_the_recurrence_token_by_token() -> None:
    v, m = torch.randn(1, 6, 1, 2, dtype=DOUBLE), torch.zeros(1, 1, 2, dtype=DOUBLE)
    found, _ = running_momentum(v, 0.7, m)
    for t in range(6):
        torch.testing.assert_close(found[:, t], m)
        m = 0.7 * (m + v[:, t])


def test_the_whole_formula() -> None:
    mixer, x = _made(0.4, num_kv_heads=1), torch.randn(1, 7, 8, dtype=DOUBLE)
    q, k, v = mixer.heads(x, 0)
    mixed = attend(q, k, v, causal=True)
    for t in range(7):
        for s in range(t):
            mixed[:, t] += 0.4 ** (t - s) * v[:, s]
    torch.testing.assert_close(mixer(x), mixer.out(mixed.flatten(-2)), rtol=1e-10, atol=1e-10)


def test_the_state_carries_the_momentum() -> None:
    mixer, x = _made(0.6), torch.randn(2, 9, 8, dtype=DOUBLE)
    first, state = mixer.prefill(x[:, :4])
    second, state = mixer.prefill(x[:, 4:8], state)
    third, _ = mixer.step(x[:, 8], state)
    torch.testing.assert_close(torch.cat([first, second, third[:, None]], 1), mixer(x), rtol=1e-10, atol=1e-10)
    without = mixer.step(x[:, 8], {**state, "momentum": torch.zeros_like(state["momentum"])})[0]
    assert not torch.allclose(without, third)


@pytest.mark.parametrize("eta", [-0.1, 1.0, float("nan")])
def test_eta_out_of_range_is_refused(eta: float) -> None:
    with pytest.raises(BadInput, match="eta"):
        MomentumAttention(8, eta=eta)


def test_the_function_of_keys_and_values_is_the_mixer() -> None:
    torch.manual_seed(0)
    mixer = MomentumAttention(8, num_heads=4, num_kv_heads=2, eta=0.4).to(torch.float64)
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    q, k, v = mixer.heads(x, 0)
    mixed = attention(q, k, v, causal=True, eta=0.4)
    assert torch.allclose(mixer.out(mixed.flatten(-2)), mixer(x), atol=1e-12)
