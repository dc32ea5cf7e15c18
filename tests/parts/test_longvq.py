"""LongVQ: attention grouped by codes beside dense attention, the quantiser's gradient and averages, exact cost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from torchgraft.engines.recurrence.mixer import State
from torchgraft.errors import BadInput
from torchgraft.parts.mixers.longvq import LongVQ, VectorQuantizer, causal_vq_attention, code_perplexity, vq_attention

S, K, V = 5, 3, 4


def draw(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    kind = {"generator": g, "dtype": torch.float64}
    q, v = torch.randn(2, tokens, K, **kind), torch.randn(2, tokens, V, **kind)
    return q, torch.randint(0, S - 1, (2, tokens), generator=g), v, torch.randn(S, K, **kind)


def empty(near: int) -> State:
    kind = {"dtype": torch.float64}
    return {
        "code_sum": torch.zeros(2, S, V, **kind),
        "code_count": torch.zeros(2, S, **kind),
        "recent_key": torch.zeros(2, near, K, **kind),
        "recent_value": torch.zeros(2, near, V, **kind),
        "recent_code": torch.full((2, near), -1),
    }


def dense(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Return causal softmax attention written out; keys older than the window get no gradient."""
    rows = []
    for t in range(q.shape[1]):
        logits = []
        for j in range(t + 1):
            key = k[:, j] if t - j < len(bias) else k[:, j].detach()
            logit = (q[:, t] * key).sum(-1)
            logits.append(logit + bias[t - j] if t - j < len(bias) else logit)
        rows.append((torch.stack(logits, -1).softmax(-1)[..., None] * v[:, : t + 1]).sum(1))
    return torch.stack(rows, 1)


def test_grouped_form_equals_dense_attention() -> None:
    q, numbers, v, codebook = draw(17)
    expected = (q @ codebook[numbers].mT).softmax(-1) @ v
    torch.testing.assert_close(vq_attention(q, numbers, codebook, v), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("block", [1, 2, 5, 8, 100])
@pytest.mark.parametrize("window", [1, 2, 6])
@pytest.mark.parametrize("tokens", [1, 5, 23])
def test_causal_blocks_equal_dense_attention(block: int, window: int, tokens: int) -> None:
    q, numbers, v, codebook = draw(tokens)
    k, bias = codebook[numbers], torch.randn(window, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (q, k, v, bias)]
    others = [t.clone().requires_grad_() for t in (q, k, v, bias)]
    found, _ = causal_vq_attention(
        leaves[0], leaves[1], numbers, leaves[2], codebook, leaves[3], state=empty(window - 1), block=block
    )
    expected = dense(*others)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weight = torch.randn(found.shape, dtype=torch.float64)
    ours = torch.autograd.grad((found * weight).sum(), leaves)
    theirs = torch.autograd.grad((expected * weight).sum(), others)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_state_holds_every_token_once() -> None:
    q, numbers, v, codebook = draw(23)
    bias = torch.zeros(4, dtype=torch.float64)
    state = causal_vq_attention(q, codebook[numbers], numbers, v, codebook, bias, state=empty(3), block=7)[1]
    by_hand = torch.zeros(2, S, V, dtype=torch.float64)
    for row in range(2):
        for t in range(20):
            by_hand[row, numbers[row, t]] += v[row, t]
    torch.testing.assert_close(state["code_sum"], by_hand, rtol=0, atol=1e-12)
    assert torch.equal(state["recent_code"], numbers[:, 20:])


def test_a_codebook_of_all_keys_gives_full_attention() -> None:
    g = torch.Generator().manual_seed(3)
    keys, q, v = (torch.randn(1, 12, K, generator=g, dtype=torch.float64) for _ in range(3))
    quantizer = VectorQuantizer(K, codes=12).double().eval()
    quantizer.codebook.copy_(keys[0, torch.randperm(12, generator=g)])
    found, numbers = quantizer(keys)
    torch.testing.assert_close(found, keys, rtol=0, atol=0)
    torch.testing.assert_close(
        vq_attention(q, numbers, quantizer.codebook, v), (q @ keys.mT).softmax(-1) @ v, rtol=0, atol=1e-12
    )


def test_keys_get_the_codes_gradient_and_that_of_the_commitment() -> None:
    quantizer = VectorQuantizer(K, codes=S, commit=0.25).double()
    keys = torch.randn(2, 6, K, dtype=torch.float64, requires_grad=True)
    before = quantizer.codebook.clone()
    found, numbers = quantizer(keys)
    assert torch.equal(found, before[numbers])
    upstream = torch.randn(2, 6, K, dtype=torch.float64)
    (grad,) = torch.autograd.grad((found * upstream).sum(), keys)
    torch.testing.assert_close(grad, upstream + 2 * 0.25 * (keys - before[numbers]), rtol=0, atol=1e-12)
    found, _ = quantizer.eval()(keys)
    (grad,) = torch.autograd.grad((found * upstream).sum(), keys)
    assert torch.equal(grad, upstream)


def test_nearest_code_is_found() -> None:
    quantizer = VectorQuantizer(K, codes=S).double().eval()
    keys = torch.randn(40, K, dtype=torch.float64)
    expected = torch.cdist(keys, quantizer.codebook).argmin(-1)
    assert torch.equal(quantizer(keys)[1], expected)


def test_codebook_settles_at_the_means_of_the_clusters() -> None:
    centres = torch.tensor([[4.0, 0.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 4.0]], dtype=torch.float64)
    keys = (centres[:, None] + 0.3 * torch.randn(3, 20, 3, dtype=torch.float64)).flatten(0, 1)
    quantizer = VectorQuantizer(3, codes=3, ema=0.5).double()
    quantizer.codebook.copy_(centres)
    quantizer.sums.copy_(centres)
    for _ in range(60):
        quantizer(keys)
    torch.testing.assert_close(quantizer.codebook, keys.view(3, 20, 3).mean(1), rtol=0, atol=1e-9)
    kept = quantizer.codebook.clone()
    quantizer.eval()(keys * 3)
    assert torch.equal(quantizer.codebook, kept)


def test_dead_codes_are_put_on_keys() -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(3, codes=4, ema=0.5).double()
    quantizer.codebook[1:] += 100.0
    keys = torch.randn(64, 3, dtype=torch.float64)
    for _ in range(20):
        _, numbers = quantizer(keys)
    assert code_perplexity(numbers, 4) > 2.0


def test_twice_the_tokens_are_exactly_twice_the_multiplications() -> None:
    mixer = LongVQ(8, key_size=4, value_size=8, codes=16, window=4, block=16).eval()

    def work(tokens: int) -> int:
        q, k = torch.randn(2, 1, tokens, 4).unbind(0)
        v, codebook = torch.randn(1, tokens, 8), mixer.quantizer.codebook
        numbers = torch.randint(0, 16, (1, tokens))
        state = mixer.init_state(1)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            causal_vq_attention(q, k, numbers, v, codebook, mixer.bias, state=state, block=16)
        return counter.get_total_flops()

    assert work(128) == 2 * work(64) > 0


def test_the_block_is_wired_as_written() -> None:
    torch.manual_seed(1)
    mixer = LongVQ(6, key_size=3, value_size=4, codes=5, window=2, block=3, order=2).double().eval()
    with torch.no_grad():
        mixer.bias.copy_(torch.tensor([0.5, -1.0]))
        mixer.shifts.normal_()
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    smooth, _ = mixer.average(x)
    inner = smooth @ mixer.inner.weight.T + mixer.inner.bias
    z, gate, update, carried = inner[..., :3], inner[..., 3:7], inner[..., 7:13], inner[..., 13:]

    def normed(row: int) -> Tensor:
        y = F.silu(z) * mixer.scales[row] + mixer.shifts[row]
        return y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    keys = mixer.quantizer.codebook[torch.cdist(normed(1), mixer.quantizer.codebook).argmin(-1)]
    v = F.silu(x @ mixer.value.weight.T + mixer.value.bias)
    o = dense(normed(0) / 3**0.5, keys, v, mixer.bias)
    fresh = F.silu(update + (F.silu(gate) * o) @ mixer.recall.weight.T)
    f = carried.sigmoid()
    torch.testing.assert_close(mixer(x), f * fresh + (1 - f) * x, rtol=0, atol=1e-11)


def test_codebook_is_saved_and_still_in_eval() -> None:
    mixer = LongVQ(8, codes=6, window=2)
    assert {"quantizer.codebook", "quantizer.counts", "quantizer.sums"} <= mixer.state_dict().keys()
    before = mixer.quantizer.codebook.clone()
    mixer.eval()(torch.randn(2, 10, 8))
    assert torch.equal(mixer.quantizer.codebook, before)
    mixer.train()(torch.randn(2, 10, 8))
    assert not torch.equal(mixer.quantizer.codebook, before)


@pytest.mark.parametrize("wrong", [{"window": 0}, {"block": 0}, {"codes": 0}, {"ema": 1.0}, {"commit": -1.0}])
def test_bad_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(BadInput, match=next(iter(wrong))):
        LongVQ(8, **wrong)  # type: ignore[arg-type]


def test_training_attends_with_the_codebook_before_it_moves() -> None:
    torch.manual_seed(2)
    mixer = LongVQ(8, codes=6, window=2, ema=0.5).double()
    x = torch.randn(2, 30, 8, dtype=torch.float64)
    expected = mixer.eval()(x)
    first, second = mixer.train()(x), mixer(x)
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-12)
    (first.sum() + second.sum()).backward()  # the codebook moved between them, and both graphs still stand


def test_batch_of_none() -> None:
    y, state = LongVQ(8, codes=6, window=2).train().prefill(torch.randn(0, 10, 8))
    assert y.shape == (0, 10, 8)
    assert state["code_sum"].shape == (0, 6, 16)
