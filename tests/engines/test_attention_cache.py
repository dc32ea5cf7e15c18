"""The staircase cache: packing, the bound of each band's error, bytes by formula, use in mixers and models."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchgraft.engines.attention.cache import (
    StaircaseKVCache,
    hugging_face_cache,
    pack,
    prefill_from,
    quantize,
    unpack,
)
from torchgraft.errors import BadInput
from torchgraft.parts.mixers.sigmoid_attention import SigmoidAttention


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 40), st.integers(1, 3), st.integers(0, 999))
def test_packed_codes_come_back_and_fill_their_bytes(bits: int, count: int, batch: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (batch, count), generator=draw, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (batch, -(-count * bits // 8))
    assert torch.equal(unpack(packed, bits, count), codes)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, -1]), st.floats(-300, 300), st.floats(1e-3, 100))
def test_the_error_is_at_most_half_a_step(bits: int, dim: int, centre: float, spread: float) -> None:
    x = centre + spread * _draw(2, 8, 3, 5)
    found = quantize(x, bits, dim=dim)
    error = (found.restored() - x).abs()
    assert bool((error <= found.scale.float() / 2 * (1 + 1e-4) + 1e-5 * x.abs()).all())  # and float32's rounding
    exact = (x.amax(dim, keepdim=True) - x.amin(dim, keepdim=True)) / (2**bits - 1)
    widened = (2 * x.abs().amax(dim, keepdim=True) / (2**bits - 1)) * 2**-9 + exact * 2**-8 + 2**-22
    assert bool((found.scale.float() - exact <= widened).all())
    assert found.scale.shape == found.zero.shape == tuple(1 if at == dim % 4 else n for at, n in enumerate(x.shape))


def test_equal_numbers_stay_and_too_large_ones_are_refused() -> None:
    same = torch.full((1, 4, 1, 2), 3.0)
    torch.testing.assert_close(quantize(same, 2, dim=1).restored(), same, rtol=1e-3, atol=1e-6)
    assert quantize(0 * same, 2, dim=1).restored().abs().max() < 1e-6
    for wrong in (1e5, float("nan"), float("inf")):
        with pytest.raises(BadInput, match="must lie within"):
            quantize(wrong * same, 4, dim=1)


def test_every_band_keeps_the_tokens_of_its_age_within_its_error() -> None:
    cache = StaircaseKVCache(bits=(16, 8, 4, 2), windows=(8, 8, 12), group=4)
    k, v = _draw(2, 50, 2, 6), _draw(2, 50, 2, 6, seed=1)
    for begin in range(0, 50, 3):
        cache.update(k[:, begin : begin + 3], v[:, begin : begin + 3])
    assert cache.bands() == ((16, 10), (8, 8), (4, 12), (2, 20))
    keys, values = cache.read(k, v)
    end = len(cache)
    for bits, count in cache.bands():
        band = slice(end - count, end)
        end -= count
        if bits == 16:
            assert torch.equal(keys[:, band], k[:, band].half().float())
            assert torch.equal(values[:, band], v[:, band].half().float())
            continue
        # Each step of the stairs adds at most half its own step to the error, s = range / (2^b - 1), a little widened.
        steps = [each for each in (8, 4, 2) if each >= bits]
        for found, given_, dim in ((keys, k, 1), (values, v, -1)):
            for part in torch.arange(50)[band].split(4):
                x = given_[:, part]
                spread = x.amax(dim, keepdim=True) - x.amin(dim, keepdim=True) + 0.02 * x.abs().amax()
                bound = sum(1.3 * spread / (2**each - 1) / 2 for each in steps)
                assert bool(((found[:, part] - x).abs() <= bound + 2e-3).all())
        worst = (keys[:, band] - k[:, band]).abs().max()
        assert worst > 0.2 / (2**bits - 1)  # it is not kept any better than its bits


@pytest.mark.parametrize("tokens", [0, 3, 4, 7, 8, 31, 50])
@pytest.mark.parametrize("first", [16, 8])
def test_bytes_follow_the_staircase_formula(tokens: int, first: int) -> None:
    bits, windows = ((16, 8, 4, 2), (8, 8, 12)) if first == 16 else ((8, 4, 2), (8, 12))
    cache = StaircaseKVCache(bits=bits, windows=windows, group=4)
    heads, size, batch = 2, 6, 3
    cache.update(_draw(batch, tokens, heads, size), _draw(batch, tokens, heads, size))
    held = 8 if first == 16 else 0
    recent = tokens if tokens < held else held + (tokens - held) % 4
    blocks, total = (tokens - recent) // 4, batch * recent * heads * 2 * size * 2
    for number in range(blocks):  # from the newest
        width = 8 if number < 2 else 4 if number < 5 else 2
        codes = 4 * heads * size * width // 8  # of keys, and of values
        total += batch * (2 * codes + 2 * 2 * heads * size + 2 * 2 * 4 * heads)
    assert cache.nbytes == total
    assert len(cache) == tokens == sum(count for _, count in cache.bands())


def test_sixteen_bits_alone_are_a_plain_cache_and_old_tokens_fade_in_steps() -> None:
    k, v = _draw(1, 90, 1, 8), _draw(1, 90, 1, 8, seed=1)
    plain = StaircaseKVCache(bits=(16,), windows=())
    plain.update(k, v)
    found = plain.read(k, v)
    assert torch.equal(found[0], k.half().float())
    errors = []
    cache = StaircaseKVCache(bits=(8, 4, 2), windows=(32, 32), group=8)
    for place in range(90):
        cache.update(k[:, place : place + 1], v[:, place : place + 1])
        errors.append(float((cache.read(k, v)[0][:, 0] - k[:, 0]).abs().max()))
    assert 0 < errors[8] < 0.02 < errors[45] < 0.2 < errors[80]


def test_new_tokens_are_used_exactly_and_types_stay() -> None:
    cache = StaircaseKVCache(bits=(4, 2), windows=(4,), group=4)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        cache.reset()
        k = _draw(1, 9, 1, 4).to(dtype)
        for _ in range(2):
            keys, values = cache.update(k, k)
            assert keys.dtype == values.dtype == dtype
            assert torch.equal(keys[:, -9:], k)
    assert keys.shape[1] == 18


def test_sequences_can_be_chosen_and_reordered() -> None:
    cache = StaircaseKVCache(bits=(16, 4), windows=(4,), group=4)
    k, v = _draw(3, 14, 2, 4), _draw(3, 14, 2, 4, seed=1)
    cache.update(k, v)
    before = cache.read(k, v)
    rows = torch.tensor([2, 0, 0])
    cache.select(rows)
    for found, expected in zip(cache.read(k, v), before, strict=True):
        assert torch.equal(found, expected[rows])


def test_a_mixer_goes_on_from_it_as_from_its_own_state() -> None:
    mixer = SigmoidAttention(16, num_heads=4, num_kv_heads=1).eval()
    x = _draw(2, 20, 16)
    with torch.no_grad():
        expected = mixer(x)
        for bits, windows, tolerance in (((16,), (), 2e-3), ((8,), (), 2e-2), ((2,), (), 2.0)):
            cache = StaircaseKVCache(bits=bits, windows=windows, group=4)
            pieces = [prefill_from(mixer, piece, cache) for piece in x.split([9, 1, 1, 9], dim=1)]
            gap = float((torch.cat(pieces, 1) - expected).norm() / expected.norm())
            assert gap < tolerance
        assert gap > 1e-2
    with pytest.raises(BadInput, match="causal"):
        prefill_from(SigmoidAttention(16, causal=False), x, StaircaseKVCache())


def _model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def test_a_hugging_face_model_generates_from_it() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, words = _model(), torch.randint(1, 40, (2, 7), generator=torch.Generator().manual_seed(0))
        plain = model.generate(words, max_new_tokens=20, do_sample=False)
        exact = hugging_face_cache(bits=(16,), windows=())
        assert torch.equal(model.generate(words, max_new_tokens=20, do_sample=False, past_key_values=exact), plain)
        eight = hugging_face_cache(bits=(8,), windows=(), group=4)
        close = model.generate(words, max_new_tokens=20, do_sample=False, past_key_values=eight)
        assert eight.get_seq_length() == 26
        assert eight.layers[1].stairs.bands() == ((16, 2), (8, 24))
        assert float((close == plain).float().mean()) > 0.7
        beams = hugging_face_cache(bits=(16, 8), windows=(4,), group=4)
        found = model.generate(words, max_new_tokens=5, num_beams=3, do_sample=False, past_key_values=beams)
        expected = model.generate(words, max_new_tokens=5, num_beams=3, do_sample=False)
        assert found.shape == expected.shape


def test_what_cannot_be_used_is_refused() -> None:
    for bits, windows in (((2, 4), (32,)), ((3,), ()), ((), ()), ((8, 16), (32,)), ((8, 4), ()), ((8, 4), (33,))):
        with pytest.raises(BadInput, match=r"bits|windows"):
            StaircaseKVCache(bits=bits, windows=windows)
    cache = StaircaseKVCache(group=4)
    cache.update(_draw(2, 3, 1, 4), _draw(2, 3, 1, 4))
    with pytest.raises(BadInput, match="k must fit"):
        cache.update(_draw(1, 3, 1, 4), _draw(1, 3, 1, 4))
    with pytest.raises(BadInput, match="v must fit"):
        cache.update(_draw(2, 3, 1, 4), _draw(2, 3, 1, 5))
    with pytest.raises(BadInput, match="shapes"):
        cache.update(_draw(2, 3, 4), _draw(2, 3, 4))
    with pytest.raises(BadInput, match="lie within"):
        cache.update(1e6 * _draw(2, 3, 1, 4), _draw(2, 3, 1, 4))
    assert len(cache) == 3
