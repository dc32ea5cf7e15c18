"""Harmonic positions and sampled blocks beside attention written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from torchgraft.contracts.mixers import Meter
from torchgraft.engines.attention import attend, attention_weights
from torchgraft.engines.attention.position import Harmonic
from torchgraft.engines.recurrence.distance import slopes
from torchgraft.errors import BadInput
from torchgraft.parts.mixers.genai_optimization_notes import (
    HarmonicAttention,
    attention,
    block_sampled,
    draw_blocks,
)
from torchgraft.parts.mixers.softmax_attention import SoftmaxAttention


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_without_the_bias_it_is_rotary_attention() -> None:
    mixer = HarmonicAttention(16, num_heads=2, factor=0.0).double().eval()
    plain = SoftmaxAttention(16, num_heads=2).double().eval()
    plain.load_state_dict(mixer.state_dict())
    x = _draw(2, 12, 16)
    torch.testing.assert_close(mixer(x), plain(x), rtol=1e-10, atol=1e-12)
    mixer.factor = 1.0
    assert not torch.allclose(mixer(x), plain(x))


def test_the_bias_is_a_harmonic_number_times_the_slope() -> None:
    q, k, v = (_draw(1, 9, 4, 6, seed=seed) for seed in range(3))
    s = torch.einsum("bthk,bshk->bhts", q, k) / math.sqrt(6)
    for head, query, key in ((h, i, j) for h in range(4) for i in range(9) for j in range(i + 1)):
        s[0, head, query, key] -= 0.5 * 2 ** (-2 * (head + 1)) * sum(1 / r for r in range(1, query - key + 1))
    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    expected = torch.einsum("bhts,bshv->bthv", s.masked_fill(~seen, -math.inf).softmax(-1), v)
    torch.testing.assert_close(attention(q, k, v, causal=True, factor=0.5), expected, rtol=1e-10, atol=1e-12)


def test_far_tokens_of_equal_score_fall_as_a_power_of_the_distance() -> None:
    q = torch.zeros(1, 400, 1, 2, dtype=torch.float64)
    weights = attention_weights(q, q, transform=Harmonic(torch.ones(1, dtype=torch.float64)), causal=True)[0, 0, -1]
    # e^(-h_d) tends to e^(-0.5772) / d
    assert float(weights[-201] / weights[-101]) == pytest.approx(0.5, rel=0.01)
    assert float(weights[-2] / weights[-1]) == pytest.approx(math.exp(-1))


@pytest.mark.parametrize("tokens", [1, 4, 11, 16])
@pytest.mark.parametrize("falling", ["all", "harmonic", "linear"])
@pytest.mark.parametrize("biased", [False, True])
def test_chosen_blocks_are_attended_to_exactly(tokens: int, falling: str, biased: bool) -> None:
    torch.manual_seed(1)
    count = -(-tokens // 4)
    chosen = draw_blocks(count, falling)  # type: ignore[arg-type]
    slope = slopes(4).double() if biased else None
    seen = chosen.repeat_interleave(4, 0).repeat_interleave(4, 1)[:tokens, :tokens].tril()
    grads = []
    for ours in (True, False):
        q, k, v = (_draw(2, tokens, heads, 6, seed=heads).requires_grad_() for heads in (4, 2, 2))
        if ours:
            out = block_sampled(q, k, v, chosen, block=4, slope=slope)
        else:
            transform = None if slope is None else Harmonic(slope)
            out = attend(q, k, v, mask=seen[None, None], transform=transform, form="dense")
        grads.append([out, *torch.autograd.grad((out * _draw(*out.shape, seed=5)).sum(), (q, k, v))])
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    if falling == "all":
        exact = attention(q, k, v, causal=True, factor=float(biased))
        torch.testing.assert_close(grads[0][0], exact, rtol=1e-9, atol=1e-11)


def test_rows_stay_normalised_and_causal_whatever_is_drawn() -> None:
    mixer = HarmonicAttention(16, num_heads=2, sample="harmonic", block=3).double().train()
    ones = torch.ones(1, 20, 2, 1, dtype=torch.float64)
    q = _draw(1, 20, 2, 8)
    for seed in range(5):
        torch.manual_seed(seed)
        mixed = attention(q, q, ones, causal=True, training=True, sample="harmonic", block=3)
        torch.testing.assert_close(mixed, ones, rtol=1e-10, atol=1e-12)
        x = _draw(1, 20, 16).requires_grad_()
        grad = torch.autograd.grad(mixer(x)[:, 9].sum(), x)[0]
        assert bool((grad[0, 10:] == 0).all())


def test_blocks_are_drawn_with_the_probability_of_their_distance() -> None:
    torch.manual_seed(0)
    for falling, probability in (("harmonic", lambda d: 1 / (1 + d)), ("linear", lambda d: 1 - d / 6)):
        drawn = torch.stack([draw_blocks(6, falling) for _ in range(4000)]).float().mean(0)  # type: ignore[arg-type]
        for row in range(6):
            for column in range(6):
                expected = probability(row - column) if column <= row else 0.0
                assert float(drawn[row, column]) == pytest.approx(expected, abs=0.04)  # 5 deviations
        assert bool((drawn.diagonal() == 1).all())


def test_sampling_reads_fewer_keys_and_is_for_training_only() -> None:
    q = torch.randn(1, 512, 1, 64)
    torch.manual_seed(0)
    work = []
    for sample in ("all", "harmonic"):
        with Meter() as meter:
            attention(q, q, q, causal=True, training=True, sample=sample, block=16)  # type: ignore[arg-type]
        work.append(meter.work)
    assert work[1] < work[0] / 3
    mixer = HarmonicAttention(16, num_heads=2, sample="harmonic", block=2).double().eval()
    x = _draw(1, 20, 16)
    assert torch.equal(mixer(x), mixer(x))
    mixer.train()
    assert not torch.allclose(mixer(x), mixer(x))


def test_hidden_keys_caches_and_shared_heads_make_no_difference() -> None:
    q, k, v = (_draw(2, 15, heads, 6, seed=heads) for heads in (4, 2, 2))
    seen = torch.ones(2, 15, dtype=torch.bool)
    seen[:, 3:6] = False
    other = [torch.where(seen[..., None, None], x, 7.0) for x in (k, v)]
    torch.testing.assert_close(attention(q, k, v, mask=seen), attention(q, *other, mask=seen), rtol=0, atol=1e-12)
    causal = attention(q, k, v, causal=True)
    torch.testing.assert_close(attention(q[:, -4:], k, v, causal=True), causal[:, -4:], rtol=1e-10, atol=1e-12)
    wide = [x.repeat_interleave(2, dim=2) for x in (k, v)]
    torch.testing.assert_close(attention(q, *wide, causal=True), causal, rtol=1e-10, atol=1e-12)


def test_what_cannot_be_used_is_refused() -> None:
    for options in ({"factor": -1.0}, {"block": 0}, {"sample": "often"}):
        with pytest.raises(BadInput, match=next(iter(options))):
            HarmonicAttention(8, **options)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="falling"):
        draw_blocks(3, "often")  # type: ignore[arg-type]
    q = _draw(1, 8, 1, 2)
    with pytest.raises(BadInput, match="do not fit"):
        block_sampled(q, q, q, draw_blocks(3), block=4)
