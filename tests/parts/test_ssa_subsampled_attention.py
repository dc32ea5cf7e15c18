"""Subsampled attention beside dense attention with the other sources hidden, and its counts beside all subsets."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchgraft.contracts.mixers import Meter
from torchgraft.engines.attention import Window, attend, exp, unnormalized
from torchgraft.engines.attention.local import attend_in_groups
from torchgraft.engines.attention.sampled import draw_sources
from torchgraft.errors import BadInput
from torchgraft.parts.mixers.ssa_subsampled_attention import (
    SubsampledAttention,
    attention,
    self_ensemble,
    subsampled_training,
)


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _qkv(batch: int = 2, tokens: int = 12, groups: int = 2, queries: int | None = None) -> list[Tensor]:
    q = _draw(batch, tokens if queries is None else queries, 4, 6)
    return [q, _draw(batch, tokens, groups, 6, seed=1), _draw(batch, tokens, groups, 5, seed=2)]


def _table(sources: Tensor, tokens: int, *, causal: bool) -> Tensor:
    """Return which query sees which source, written out, (rows, T, T)."""
    size = -(-tokens // sources.shape[1])
    seen = torch.zeros(len(sources), tokens, tokens, dtype=torch.bool)
    for row, query in itertools.product(range(len(sources)), range(tokens)):
        seen[row, query, sources[row, query // size]] = True
    if causal:
        seen |= torch.eye(tokens, dtype=torch.bool)
        seen = seen.tril()
    return seen


@pytest.mark.parametrize("causal", [True, False])
def test_everything_kept_is_dense_attention(causal: bool) -> None:
    q, k, v = _qkv()
    dense = attend(q, k, v, causal=causal)
    assert torch.equal(attention(q, k, v, causal=causal, training=True, keep=1.0), dense)
    assert torch.equal(attention(q, k, v, causal=causal, keep=0.25), dense)
    found = attention(q, k, v, causal=causal, training=True, sources=torch.arange(12).view(1, 1, 12))
    torch.testing.assert_close(found, dense, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bias", ["uniform", "local"])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("tokens", [5, 12, 19])
def test_a_subset_is_dense_attention_with_the_rest_hidden(
    causal: bool, bias: str, rows: int, padded: bool, tokens: int
) -> None:
    torch.manual_seed(tokens)
    sources = draw_sources(tokens, keep=0.4, bias=bias, rows=rows, causal=causal)  # type: ignore[arg-type]
    seen = _table(sources, tokens, causal=causal)[:, None]
    mask = None
    if padded:
        mask = torch.ones(2, tokens, dtype=torch.bool)
        mask[1, :2] = False
        seen = seen & mask[:, None, None]
        if causal:  # a query sees itself whatever it is
            seen = seen | torch.eye(tokens, dtype=torch.bool)
    grads = []
    for ours in (True, False):
        q, k, v = (x.requires_grad_() for x in _qkv(tokens=tokens))
        if ours:
            out = attention(q, k, v, causal=causal, training=True, sources=sources, mask=mask)
        else:
            out = attend(q, k, v, mask=seen, form="dense")
        grads.append([out, *torch.autograd.grad((out * _draw(*out.shape, seed=5)).sum(), (q, k, v))])
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_long_inputs_go_by_blocks_to_the_same_numbers() -> None:
    q, k, v = (x.requires_grad_() for x in _qkv(batch=1, tokens=700))
    sources = draw_sources(700, keep=0.25)
    out = attention(q, k, v, causal=True, training=True, sources=sources)
    expected = attend(q, k, v, mask=_table(sources, 700, causal=True)[:, None], form="dense")
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-11)
    ours, theirs = (torch.autograd.grad((x * _draw(*x.shape, seed=5)).sum(), (q, k, v)) for x in (out, expected))
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


def test_the_last_queries_after_a_cache_get_their_rows() -> None:
    sources = draw_sources(12, keep=0.4, bias="local", causal=True)
    q, k, v = _qkv()
    whole = attention(q, k, v, causal=True, training=True, sources=sources)
    last = attention(q[:, 7:], k, v, causal=True, training=True, sources=sources)
    torch.testing.assert_close(last, whole[:, 7:], rtol=1e-10, atol=1e-12)
    table = torch.rand(2, 1, 12, 12) < 0.7
    whole = attention(q, k, v, training=True, sources=sources, mask=table)
    last = attention(q[:, 7:], k, v, training=True, sources=sources, mask=table[:, :, 7:])
    torch.testing.assert_close(last, whole[:, 7:], rtol=1e-10, atol=1e-12)


def test_sums_before_normalising_are_unbiased_over_all_subsets() -> None:
    q, k, v = _draw(1, 6, 1, 3), _draw(1, 6, 1, 3, seed=1), _draw(1, 6, 1, 2, seed=2)
    v = torch.cat([v, torch.ones(1, 6, 1, 1, dtype=v.dtype)], -1)  # the last column is the normaliser
    subsets = list(itertools.combinations(range(6), 3))
    total = torch.zeros(1, 6, 1, 3, dtype=v.dtype)
    for subset in subsets:
        index = torch.tensor(subset).view(1, 1, 3)
        found = attend_in_groups(q[:, None], k, v, index, transform=exp, normalize=unnormalized)
        total += 6 / 3 * found[:, 0]
    expected = (q[:, :, 0] @ k[:, :, 0].mT / math.sqrt(3)).exp() @ v[:, :, 0]
    torch.testing.assert_close(total[:, :, 0] / len(subsets), expected, rtol=1e-10, atol=1e-12)


def test_uniform_draws_are_uniform_and_local_ones_are_near() -> None:
    torch.manual_seed(0)
    counts = torch.zeros(16)
    for _ in range(2000):
        drawn = draw_sources(16, keep=0.25)
        assert drawn.shape == (1, 1, 4)
        assert len(set(drawn.flatten().tolist())) == 4
        counts[drawn.flatten()] += 1
    assert (counts / 2000 - 0.25).abs().max() < 0.05  # 5 deviations
    near, far = (draw_sources(64, keep=0.25, bias="local", sigma=sigma, rows=50) for sigma in (2.0, 1e4))
    centre = (torch.arange(near.shape[1]) * 8 + 4).view(1, -1, 1)
    assert (near - centre).abs().float().mean() < 7 < 18 < (far - centre).abs().float().mean()


def test_without_noise_the_local_form_is_a_sliding_window() -> None:
    q, k, v = _qkv(tokens=16)
    found = attention(q, k, v, training=True, keep=0.5, bias="local", sigma=0.0)
    seen = torch.zeros(16, 16, dtype=torch.bool)
    for block, (begin, end) in enumerate([(0, 8), (2, 10), (6, 14), (8, 16)]):  # four around four each, within bounds
        seen[4 * block : 4 * block + 4, begin:end] = True
    torch.testing.assert_close(found, attend(q, k, v, mask=seen[None, None]), rtol=1e-10, atol=1e-12)
    causal = attention(q, k, v, training=True, causal=True, keep=0.5, bias="local", sigma=0.0)
    window = attend(q, k, v, mask=Window(5), causal=True)  # all within 5 tokens lie in the window of 8
    assert not torch.allclose(causal, window)
    for query in range(16):
        begin = max(4 * (query // 4) - 4, 0)
        alone = attend(q[:, query : query + 1], k[:, begin : query + 1], v[:, begin : query + 1])
        torch.testing.assert_close(causal[:, query : query + 1], alone, rtol=1e-10, atol=1e-12)


def test_each_sequence_or_head_gets_its_own_subset_where_asked() -> None:
    q, k, v = (x[:1, :, :1].expand(2, 12, 2, -1) for x in _qkv())  # equal sequences and heads
    same: dict[str, tuple[bool, bool]] = {}
    for per in ("layer", "sample", "head"):
        torch.manual_seed(0)
        out = attention(q, k, v, training=True, per=per)  # type: ignore[arg-type]
        same[per] = torch.allclose(out[0], out[1]), torch.allclose(out[:, :, 0], out[:, :, 1])
    assert same == {"layer": (True, True), "sample": (False, True), "head": (False, False)}


def test_heads_with_masks_of_their_own() -> None:
    q, k, v = _qkv(groups=4)
    table = torch.rand(2, 4, 12, 12, generator=torch.Generator().manual_seed(0)) < 0.7
    torch.manual_seed(1)
    found = attention(q, k, v, training=True, keep=0.99, per="head", mask=table)  # all twelve are kept
    torch.testing.assert_close(found, attend(q, k, v, mask=table), rtol=1e-10, atol=1e-12)
    with pytest.raises(BadInput, match="differs by head"):
        attention(q, k, v, training=True, mask=table)


def test_scores_are_fewer_by_the_share_that_is_kept() -> None:
    q = torch.randn(1, 512, 1, 64)
    work = []
    for training in (False, True):
        with sdpa_kernel(SDPBackend.MATH), Meter() as meter:
            attention(q, q, q, training=training, keep=0.125)
        work.append(meter.work)
    assert 7 < work[0] / work[1] < 8.01


def test_training_is_random_and_use_is_not() -> None:
    mixer, x = SubsampledAttention(16, num_heads=2).double(), _draw(2, 12, 16)
    assert not torch.allclose(mixer(x), mixer(x))
    mixer.eval()
    assert torch.equal(mixer(x), mixer(x))
    before = torch.get_rng_state()
    mixer(x)
    assert torch.equal(before, torch.get_rng_state())


def test_causal_training_sees_no_later_token() -> None:
    for bias in ("uniform", "local"):
        mixer = SubsampledAttention(16, num_heads=2, keep=0.5, bias=bias).double()  # type: ignore[arg-type]
        x = _draw(1, 12, 16).requires_grad_()
        grad = torch.autograd.grad(mixer(x)[:, 6].sum(), x)[0]
        assert bool((grad[0, 7:] == 0).all())
        assert bool((grad[0, 6] != 0).any())


def test_the_schedule_ends_with_all_sources() -> None:
    model = nn.Sequential(SubsampledAttention(8), SubsampledAttention(8, keep=0.9))
    done = subsampled_training(model, 20, keep=0.125, finetune_frac=0.1)
    kept = []
    for step in range(1, 21):
        kept.append([layer.keep for layer in model])
        done(step, 0.0)
    assert kept == [[0.125, 0.125]] * 18 + [[1.0, 1.0]] * 2
    subsampled_training(model, 20, finetune_frac=1.0)
    assert model[0].keep == 1.0


def test_the_ensemble_is_the_mean_of_its_passes() -> None:
    model = nn.Sequential(SubsampledAttention(8, keep=0.3), nn.Dropout(0.5)).double().eval()
    x = _draw(2, 12, 8)
    found = self_ensemble(model, x, n=3, seed=4)
    assert not any(module.training for module in model.modules())
    torch.manual_seed(4)
    model[0].train()
    expected = sum(model(x).softmax(-1) for _ in range(3)) / 3
    torch.testing.assert_close(found, expected.detach())
    model.eval()
    torch.testing.assert_close(self_ensemble(model, x, n=2, keep=1.0), model(x).softmax(-1))
    assert model[0].keep == 0.3
    before = torch.get_rng_state()
    self_ensemble(model, x)
    assert torch.equal(before, torch.get_rng_state())


def test_what_cannot_be_used_is_refused() -> None:
    for options in ({"keep": 0.0}, {"keep": 1.5}, {"bias": "far"}, {"sigma": -1.0}, {"per": "token"}):
        with pytest.raises(BadInput, match=next(iter(options))):
            SubsampledAttention(8, **options)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="SubsampledAttention"):
        self_ensemble(nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(BadInput, match="finetune_frac"):
        subsampled_training(SubsampledAttention(8), 10, finetune_frac=2.0)
    with pytest.raises(BadInput, match="n must"):
        self_ensemble(SubsampledAttention(8), torch.zeros(1, 2, 8), n=0)
