"""Sigmoid and ReLU attention: sums over stretches of keys, the size of rows, and the limit of softmax."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from torchgraft.engines.attention import L1, Transform, attend, attention_weights, softmax, unnormalized
from torchgraft.errors import BadInput
from torchgraft.parts.blocks.attention_names import attention_names, register_attention
from torchgraft.parts.mixers import relu_attention, sigmoid_attention
from torchgraft.parts.mixers.relu_attention import ReluAttention
from torchgraft.parts.mixers.sigmoid_attention import SigmoidAttention, log_count_sigmoid

DOUBLE = torch.float64


def heads(tokens: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, tokens, 3, 4, generator=draw, dtype=DOUBLE, requires_grad=True) for _ in range(3))
    return q, k, v


@pytest.mark.parametrize("causal", [False, True])
def test_both_equal_the_written_out_matrices(causal: bool) -> None:
    q, k, v = heads()
    scores = torch.einsum("bthk,bshk->bhts", q, k) / 2.0
    seen = torch.ones(9, 9, dtype=torch.bool).tril() if causal else torch.ones(9, 9, dtype=torch.bool)
    count = seen.sum(-1, keepdim=True).double()
    for module, weights in (
        (sigmoid_attention, 1 / (1 + count * (-scores).exp())),
        (relu_attention, scores.clamp_min(0) / count),
    ):
        expected = torch.einsum("bhts,bshv->bthv", weights * seen, v)
        found = module.attention(q, k, v, causal=causal)
        assert torch.allclose(found, expected, atol=1e-13)
        for left, right in zip(
            torch.autograd.grad(found.square().sum(), [q, k, v], retain_graph=True),
            torch.autograd.grad(expected.square().sum(), [q, k, v], retain_graph=True),
            strict=True,
        ):
            assert torch.allclose(left, right, atol=1e-12)


@pytest.mark.parametrize("transform", [log_count_sigmoid, relu_attention.mean_relu])
def test_blocks_count_the_keys_that_a_row_sees(transform: Transform) -> None:
    q, k, v = heads()
    found = []
    for form in ("dense", "blocks"):
        out = attend(q, k, v, transform=transform, normalize=unnormalized, causal=True, form=form, rows=4)
        found.append([out, *torch.autograd.grad(out.square().sum(), [q, k, v])])
    with torch.no_grad():
        options = {"transform": transform, "normalize": unnormalized, "causal": True, "form": "blocks", "rows": 4}
        found.append([attend(q, k, v, **options)])
    for other in found[1:]:
        for left, right in zip(found[0], other, strict=False):
            assert torch.allclose(left, right, atol=1e-12)


def test_outputs_over_two_stretches_of_keys_add_up() -> None:
    q, k, v = heads()
    whole = sigmoid_attention.attention(q, k, v, bias=-2.0)
    parts = [sigmoid_attention.attention(q, k[:, s], v[:, s], bias=-2.0) for s in (slice(0, 4), slice(4, 9))]
    assert torch.allclose(whole, parts[0] + parts[1], atol=1e-14)
    assert not torch.allclose(  # which softmax does not do, nor a bias that counts the keys
        sigmoid_attention.attention(q, k, v),
        sum((sigmoid_attention.attention(q, k[:, s], v[:, s]) for s in (slice(0, 4), slice(4, 9))), torch.tensor(0.0)),
    )


def test_rows_of_zero_scores_have_the_stated_sum() -> None:
    _, k, _ = heads()
    weights = attention_weights(
        torch.zeros_like(k), k, transform=log_count_sigmoid, normalize=unnormalized, causal=True
    )
    n = torch.arange(1, 10, dtype=DOUBLE)
    assert torch.allclose(weights.sum(-1), (n / (n + 1)).expand(2, 3, 9))


def test_derivative_of_a_weight_is_p_times_one_minus_p() -> None:
    q, k, _ = (x.detach() for x in heads())
    temperature = torch.ones((), dtype=DOUBLE, requires_grad=True)

    def weights(scale: Tensor) -> Tensor:
        return attention_weights(q * scale, k, transform=log_count_sigmoid, normalize=unnormalized)

    p = weights(temperature)
    scores = torch.einsum("bthk,bshk->bhts", q, k) / 2.0
    found = torch.autograd.grad(p.sum(), temperature)[0]
    slope = (p * (1 - p)).detach()
    assert torch.allclose(found, (slope * scores).sum())
    assert float(slope.max()) <= 0.25


def test_normalised_rows_tend_to_softmax() -> None:
    q, k, _ = (x.detach() for x in heads())
    expected = attention_weights(q, k, normalize=softmax)
    gaps = []
    for bias in (-2.0, -8.0, -25.0):
        found = attention_weights(q, k, transform=sigmoid_attention._fixed(bias), normalize=L1(eps=0.0))
        gaps.append(float((found - expected).abs().max()))
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-7


def test_negative_scores_give_relu_attention_nothing() -> None:
    same = torch.ones(1, 3, 1, 4, dtype=DOUBLE)
    assert torch.equal(relu_attention.attention(same, -same, same), torch.zeros(1, 3, 1, 4, dtype=DOUBLE))
    assert torch.equal(relu_attention.attention(same, same, same), 2 * same)  # 4 / sqrt(4), means of ones


def test_settings() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 5, 8)
    fixed = SigmoidAttention(8, num_heads=2, tokens=5)
    assert fixed.bias == -math.log(5)
    free = SigmoidAttention(8, num_heads=2)
    free.load_state_dict(fixed.state_dict())
    assert torch.allclose(fixed(x)[:, -1], free(x)[:, -1])  # the last row sees five keys
    assert not torch.allclose(fixed(x)[:, 0], free(x)[:, 0])
    normed = SigmoidAttention(8, num_heads=2, qk_norm=True, rotary=False)
    normed.qkv.weight.data[:16] *= 7.0
    scaled = normed(x)
    normed.qkv.weight.data[:16] /= 7.0
    assert torch.allclose(scaled, normed(x), atol=1e-3)
    grouped = SigmoidAttention(8, num_heads=4, num_kv_heads=2)
    assert grouped.qkv.out_features == 16
    both = SigmoidAttention(8, num_heads=2, causal=False)
    assert not torch.allclose(both(x)[:, 0], both(x[:, :2])[:, 0])
    for options in ({"tokens": 0}, {"tokens": 4, "bias": 1.0}, {"num_heads": 3}, {"num_kv_heads": 3}):
        with pytest.raises(BadInput):
            SigmoidAttention(8, **options)
    with pytest.raises(BadInput, match="keeps no state"):
        ReluAttention(8, causal=False).prefill(x)


def test_names_that_hugging_face_models_know() -> None:
    pytest.importorskip("transformers")
    from transformers import AttentionInterface

    names = register_attention()
    assert {"torchgraft:sigmoid", "torchgraft:relu"} <= set(names)
    assert len(names) == len(attention_names())
    assert all(name in AttentionInterface().valid_keys() for name in names)
