"""Softplus attention against both formulas written row by row, and what re-weighting keeps and drops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from torchgraft.engines.attention import L1, Chain, Reweighted, attend, attention_weights, exp, softplus
from torchgraft.errors import BadInput
from torchgraft.parts.mixers.softplus_attention_lssar import LogScaled, SoftplusAttention, attention

DOUBLE = torch.float64


def _heads(tokens: int = 9, seed: int = 0, dtype: torch.dtype = DOUBLE) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (2 * torch.randn(2, tokens, 2, 4, generator=draw, dtype=dtype) for _ in range(3))
    return q, k, v


def _by_hand(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, *, reweight: bool, qk_norm: bool) -> Tensor:
    """Return the formula for each batch, head and row by itself; seen: (B, T, S)."""
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            for i in range(q.shape[1]):
                keys, values = k[b, seen[b, i], h], v[b, seen[b, i], h]
                count = len(keys)
                query, c = q[b, i, h], 0.5
                if qk_norm:
                    query, keys, c = query / query.norm(), keys / keys.norm(dim=-1, keepdim=True), 1.0
                scores = c * math.log(4) * math.log(count) * (keys @ query)
                weights = torch.log(1 + scores.exp())
                weights = weights / weights.sum()
                if reweight:
                    sharp = (count * weights - (1.0 if count > 3 else 0.0)).clamp_min(0) ** 15
                    weights = sharp / (sharp.sum() + 1e-8)
                out[b, i, h] = weights @ values
    return out


@pytest.mark.parametrize("reweight", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("where", ["causal", "both ways", "padded"])
def test_equals_the_formula(reweight: bool, qk_norm: bool, where: str) -> None:
    q, k, v = _heads()
    seen = torch.ones(2, 9, 9, dtype=torch.bool)
    mask = None
    if where != "both ways":
        seen = seen.tril()
    if where == "padded":  # on the left: the numbers of visible keys differ between the sequences
        mask = torch.ones(2, 9, dtype=torch.bool)
        mask[0, :4] = False
        seen = seen & mask[:, None]
    found = attention(q, k, v, mask=mask, causal=where != "both ways", reweight=reweight, qk_norm=qk_norm)
    wanted = _by_hand(q, k, v, seen.clone(), reweight=reweight, qk_norm=qk_norm) if where != "padded" else None
    if wanted is None:
        alone = attention(q[:1, 4:], k[:1, 4:], v[:1, 4:], causal=True, reweight=reweight, qk_norm=qk_norm)
        torch.testing.assert_close(found[:1, 4:], alone, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found[0, :4], torch.zeros_like(found[0, :4]))
        wanted = _by_hand(q[1:], k[1:], v[1:], seen[1:], reweight=reweight, qk_norm=qk_norm)
        found = found[1:]
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_with_exp_and_no_log_it_is_softmax() -> None:
    q, k, v = _heads()
    found = attend(q, k, v, transform=exp, normalize=L1(signed=False), causal=True)
    torch.testing.assert_close(found, attend(q, k, v, causal=True), rtol=1e-9, atol=1e-9)  # 1e-12 is in the sum
    assert not torch.allclose(found, attention(q, k, v, causal=True, reweight=False))


def test_rows_sum_to_one_and_hidden_weights_are_zero() -> None:
    q, k, _ = _heads()
    stages = Chain((LogScaled(4), softplus))
    plain = attention_weights(q, k, transform=stages, normalize=L1(signed=False), causal=True)
    torch.testing.assert_close(plain.sum(-1), torch.ones_like(plain[..., 0]))
    hidden = ~torch.ones(9, 9, dtype=torch.bool).tril()
    assert (plain >= 0).all()
    assert (plain[..., hidden] == 0).all()
    assert (plain[..., ~hidden] > 0).all()


def test_a_uniform_row_beyond_the_third_is_dropped() -> None:
    q, k, v = _heads()
    out = attention(torch.zeros_like(q), k, v, causal=True)
    torch.testing.assert_close(out[:, :3], (v.cumsum(1) / torch.arange(1, 10)[None, :, None, None])[:, :3])
    assert (out[:, 3:] == 0).all()
    q = torch.zeros_like(q).requires_grad_()
    attention(q, k, v, causal=True).square().sum().backward()
    assert q.grad is not None
    assert q.grad.isfinite().all()


@given(seed=st.integers(0, 10_000), power=st.floats(1.0, 20.0))
@settings(max_examples=20, deadline=None)
def test_reweighting_keeps_the_order_and_zeroes_what_is_below_the_mean(seed: int, power: float) -> None:
    q, k, _ = _heads(seed=seed)
    stages, first = Chain((LogScaled(4), softplus)), L1(signed=False)
    plain = attention_weights(q, k, transform=stages, normalize=first)
    sharp = attention_weights(q, k, transform=stages, normalize=Reweighted(first, power=power))
    below = plain * 9 < 1 - 1e-9
    assert (sharp[below] == 0).all()
    assert (sharp[plain * 9 > 1.5] > 0).all()
    order = plain.argsort(dim=-1)
    assert (sharp.gather(-1, order).diff(dim=-1) >= 0).all()
    assert (sharp.sum(-1) <= 1 + 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_large_scores_stay_finite(dtype: torch.dtype) -> None:
    q, k, v = _heads(dtype=torch.float32)
    q, k, v = (100 * q).to(dtype).requires_grad_(), (100 * k).to(dtype), v.to(dtype)
    out = attention(q, k, v, causal=True)
    out.float().square().sum().backward()
    assert out.isfinite().all()
    assert q.grad is not None
    assert q.grad.isfinite().all()
    scores = torch.einsum("bthk,bshk->bhts", q.float(), k.float())
    assert scores.abs().max() > 1e4
    assert scores.exp().isinf().any()  # where the exponential as it stands would not do


def test_a_cache_changes_nothing() -> None:
    torch.manual_seed(0)
    mixer = SoftplusAttention(8, num_heads=2).double()
    x = torch.randn(2, 11, 8, dtype=DOUBLE)
    y, state = mixer.prefill(x[:, :5])
    pieces = [y]
    for t in range(5, 11):
        y_t, state = mixer.step(x[:, t], state)
        pieces.append(y_t[:, None])
    torch.testing.assert_close(torch.cat(pieces, 1), mixer(x), rtol=1e-10, atol=1e-10)


def test_the_mixer_is_its_function() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 7, 8, dtype=DOUBLE)
    for reweight, qk_norm, causal in ((True, True, False), (False, True, True), (True, False, True)):
        mixer = SoftplusAttention(8, num_heads=2, reweight=reweight, qk_norm=qk_norm, causal=causal, rotary=False)
        mixer = mixer.double()
        q, k, v = (part.unflatten(-1, (2, 4)) for part in F.linear(x, mixer.qkv.weight).chunk(3, -1))
        mixed = attention(q, k, v, causal=causal, reweight=reweight, qk_norm=qk_norm)
        torch.testing.assert_close(mixer(x), mixed.flatten(-2) @ mixer.out.weight.T, rtol=1e-10, atol=1e-10)


def test_sharpening_may_be_turned_on_after_training() -> None:
    torch.manual_seed(0)
    mixer = SoftplusAttention(8, num_heads=2, reweight=False)
    x = torch.randn(1, 7, 8)
    plain = mixer(x)
    mixer.reweight, mixer.power = True, 2.0
    twin = SoftplusAttention(8, num_heads=2, power=2.0)
    twin.load_state_dict(mixer.state_dict())
    torch.testing.assert_close(mixer(x), twin(x))
    assert not torch.allclose(mixer(x), plain)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(BadInput, match="d_model / num_heads >= 2"):
        SoftplusAttention(4, num_heads=4, rotary=False)
    with pytest.raises(BadInput, match="power"):
        SoftplusAttention(8, power=0.0)
    one = torch.zeros(1, 2, 1, 1)
    with pytest.raises(BadInput, match="log K"):
        attention(one, one, one)
    with pytest.raises(BadInput, match="offset"):
        attention(*_heads(), offset=-1.0)
