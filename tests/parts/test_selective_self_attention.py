"""Selective self-attention against its formula, and what a temperature does and does not do to a row."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torchgraft.errors import BadInput
from torchgraft.parts.mixers.selective_self_attention import (
    SelectiveSelfAttention,
    position_temperature,
    token_temperature,
)
from torchgraft.parts.mixers.sigmoid_attention import SigmoidAttention
from torchgraft.parts.mixers.softmax_attention import SoftmaxAttention

DOUBLE = torch.float64


def _made(*, seed: int = 0, causal: bool = True, rotary: bool = False, share: bool = True) -> SelectiveSelfAttention:
    torch.manual_seed(seed)
    mixer = SelectiveSelfAttention(
        8, num_heads=2, causal=causal, rotary=rotary, key_temp=True, share_weights=share
    ).double()
    with torch.no_grad():
        for value in mixer.parameters():
            value.normal_()
    return mixer


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("share", [True, False])
def test_equals_the_formula(causal: bool, share: bool) -> None:
    mixer, x = _made(causal=causal, share=share), torch.randn(1, 5, 8, dtype=DOUBLE)
    weight, heads = mixer.qkv.weight, []
    for h in range(2):
        q, k, v = (x[0] @ weight[8 * part + 4 * h : 8 * part + 4 * h + 4].T for part in range(3))
        rows = []
        gain = [
            1 + torch.tanh((y if share else x[0]) @ learned[h])
            for y, learned in ((k, mixer.key_weight), (v, mixer.value_weight))
            if learned is not None
        ]
        for i in range(5):
            n = i + 1 if causal else 5
            assert mixer.query_weight is not None
            assert mixer.alpha is not None
            token = torch.tanh((q if share else x[0])[i] @ mixer.query_weight[h])
            tau = token + 1 + torch.sigmoid(mixer.alpha[h]) * math.log(n)
            score = tau * (q[i] @ (k * gain[0][:, None])[:n].T) / 2
            rows.append(score.softmax(-1) @ (v * gain[1][:, None])[:n])
        heads.append(torch.stack(rows))
    wanted = torch.cat(heads, -1) @ mixer.out.weight.T
    torch.testing.assert_close(mixer(x)[0], wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_conversion_keeps_the_function_of_torchs_own(bias: bool, causal: bool) -> None:
    torch.manual_seed(0)
    other = nn.MultiheadAttention(12, 3, bias=bias, batch_first=True).double().eval()
    with torch.no_grad():
        for value in other.parameters():
            value.normal_()
    x = torch.randn(2, 7, 12, dtype=DOUBLE)
    mask = torch.ones(7, 7, dtype=torch.bool).triu(1) if causal else None
    wanted = other(x, x, x, attn_mask=mask, need_weights=False)[0]
    for mixer in (
        SelectiveSelfAttention.from_attention(other, causal=causal),
        SelectiveSelfAttention.from_attention(other, causal=causal, position=True, alpha=-math.inf, key_temp=True),
    ):
        torch.testing.assert_close(mixer(x), wanted, rtol=1e-10, atol=1e-10)
        assert mixer.qkv.weight.data_ptr() != other.in_proj_weight.data_ptr()
    near = SelectiveSelfAttention.from_attention(other, causal=causal, position=True)
    gap = (near(x) - wanted).abs().max()
    assert 1e-6 < gap < 0.1


@pytest.mark.parametrize("rotary", [True, False])
def test_conversion_keeps_the_function_of_our_own(rotary: bool) -> None:
    torch.manual_seed(0)
    other = SoftmaxAttention(8, num_heads=2, rotary=rotary).double()
    mixer = SelectiveSelfAttention.from_attention(other)
    x = torch.randn(2, 7, 8, dtype=DOUBLE)
    torch.testing.assert_close(mixer(x), other(x), rtol=1e-10, atol=1e-10)
    mixer(x).square().sum().backward()
    assert mixer.query_weight is not None
    assert mixer.query_weight.grad is not None
    assert mixer.query_weight.grad.abs().max() > 0  # what begins at the identity can be trained away from it


@given(seed=st.integers(0, 10_000), tau=st.floats(0.1, 3.0))
@settings(max_examples=25, deadline=None)
def test_a_temperature_keeps_the_order_and_lowers_the_entropy(seed: int, tau: float) -> None:
    scores = 2 * torch.randn(9, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)

    def entropy(t: Tensor) -> Tensor:
        return -((t * scores).softmax(-1) * (t * scores).log_softmax(-1)).sum()

    at = torch.tensor(tau, dtype=DOUBLE, requires_grad=True)
    (slope,) = torch.autograd.grad(entropy(at), at)
    weights = (tau * scores).softmax(-1)
    variance = (weights * scores.square()).sum() - (weights * scores).sum() ** 2
    torch.testing.assert_close(slope, -tau * variance, rtol=1e-8, atol=1e-10)
    assert slope < 0
    assert torch.equal(weights.argsort(), scores.argsort())


def test_a_gap_is_not_diluted() -> None:
    gap = 2.0
    alpha = torch.tensor([math.log(0.5 / 0.5)], dtype=DOUBLE)  # sigmoid(0) = 1/2 = 1/gap
    masses = []
    for n in (10, 100, 10_000):
        logits = torch.zeros(n, dtype=DOUBLE)
        logits[0] = gap
        tau = position_temperature(torch.tensor([n]), alpha)[0, 0]
        masses.append((float((tau * logits).softmax(-1)[0]), float(logits.softmax(-1)[0])))
    assert min(kept for kept, _ in masses) > 0.5
    assert masses[2][1] * 10_000 == pytest.approx(math.exp(gap), rel=1e-2)
    assert masses[1][1] > 50 * masses[2][1]


def test_temperatures_by_hand() -> None:
    assert position_temperature(torch.tensor([1]), torch.tensor([3.0])).item() == 1.0
    found = token_temperature(torch.tensor([[[[1.0, 2.0]]]], dtype=torch.bfloat16), torch.tensor([[0.25, 0.125]]))
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(math.tanh(0.5))
    extreme = token_temperature(torch.full((1, 1, 1, 2), 1e6), torch.ones(1, 2))
    assert extreme.item() == 1.0


def test_a_cache_counts_what_stands_before() -> None:
    mixer, x = _made(rotary=True), torch.randn(1, 9, 8, dtype=DOUBLE)
    first, state = mixer.prefill(x[:, :4])
    second, _ = mixer.prefill(x[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), mixer(x), rtol=1e-10, atol=1e-10)
    alone = mixer.prefill(x[:, 4:])[0]
    assert not torch.allclose(alone, second)


def test_scores_with_temperatures_depend_on_distance_and_count_only() -> None:
    """Rotation comes after the temperatures were read: a token has the same one wherever it stands."""
    mixer = _made(rotary=True, causal=False)
    x = torch.randn(1, 1, 8, dtype=DOUBLE).expand(1, 6, 8)
    q, _, v = mixer.heads(x, 0)
    torch.testing.assert_close(q.norm(dim=-1), q[:, :1].norm(dim=-1).expand(1, 6, 2), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(v, v[:, :1].expand_as(v), rtol=1e-10, atol=1e-10)


def test_groups_of_queries_have_their_own_temperatures() -> None:
    torch.manual_seed(0)
    mixer = SelectiveSelfAttention(16, num_heads=4, num_kv_heads=2, key_temp=True)
    shapes = {name: tuple(value.shape) for name, value in mixer.named_parameters()}
    assert shapes["query_weight"] == (4, 4)
    assert shapes["value_weight"] == shapes["key_weight"] == (2, 4)
    assert mixer(torch.randn(2, 5, 16)).shape == (2, 5, 16)
    added = sum(v.numel() for n, v in SelectiveSelfAttention(768, num_heads=12).named_parameters() if v.ndim < 2)
    shared = sum(v.numel() for n, v in SelectiveSelfAttention(768, num_heads=12).named_parameters() if "_weight" in n)
    assert (added + shared) / (4 * 768**2) < 0.005


def test_what_cannot_be_converted_is_refused() -> None:
    with pytest.raises(BadInput, match="SigmoidAttention"):
        SelectiveSelfAttention.from_attention(SigmoidAttention(8))
    with pytest.raises(BadInput, match="one width"):
        SelectiveSelfAttention.from_attention(nn.MultiheadAttention(8, 2, kdim=4, vdim=4))
    with pytest.raises(BadInput, match="one width"):
        SelectiveSelfAttention.from_attention(nn.MultiheadAttention(8, 2, add_zero_attn=True))
    with pytest.raises(BadInput, match="alpha"):
        SelectiveSelfAttention(8, alpha=math.nan)
