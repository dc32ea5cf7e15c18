"""Hedgehog, Liger and LiT against their definitions, written out by hand in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from torchgraft.engines.linearize import attention_cross_entropy
from torchgraft.engines.linearize.kernel import Heads, softmax_weights, window_attention
from torchgraft.errors import BadInput
from torchgraft.parts.mixers.hedgehog import Hedgehog, HedgehogFeatureMap, HedgehogKernel, monotonicity, spikiness
from torchgraft.parts.mixers.liger import LigerAttention
from torchgraft.parts.mixers.lit_linear_dit import LiTAttention, LiTKernel, hybrid_distill, image_grid, linearize_dit
from torchgraft.parts.mixers.softmax_attention import SoftmaxAttention


def _heads(tokens: int, *, heads: int = 2, size: int = 4, seed: int = 0) -> Heads:
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, tokens, heads, size, generator=draw, dtype=torch.float64) for _ in range(3))
    return Heads(q, k, v, q, k, size**-0.5)


def _by_hand(weights: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Normalise rows of (B, H, T, T) and mix, token by token."""
    out = torch.zeros_like(v)
    for b in range(v.shape[0]):
        for h in range(v.shape[2]):
            for t in range(v.shape[1]):
                last = t + 1 if causal else v.shape[1]
                row = weights[b, h, t, :last]
                out[b, t, h] = (row[:, None] * v[b, :last, h]).sum(0) / row.sum()
    return out


@pytest.mark.parametrize("act", ["softmax", "exp"])
@pytest.mark.parametrize("causal", [True, False])
def test_hedgehog_equals_its_weights_written_out(act: str, causal: bool) -> None:
    torch.manual_seed(0)
    heads = _heads(9)
    kernel = HedgehogKernel(num_heads=2, key_size=4, value_size=4, act=act).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for value in kernel.parameters():
            value.add_(0.3 * torch.randn_like(value))
    products = torch.zeros(2, 2, 9, 9, dtype=torch.float64)
    for h in range(2):
        z_q = heads.q[:, :, h] @ kernel.map_q.weight[h].T + kernel.map_q.bias[h]
        z_k = heads.k[:, :, h] @ kernel.map_k.weight[h].T + kernel.map_k.bias[h]
        f_q, f_k = torch.cat([z_q, -z_q], -1).exp(), torch.cat([z_k, -z_k], -1).exp()
        if act == "softmax":
            f_q, f_k = f_q / f_q.sum(-1, keepdim=True), f_k / f_k.sum(-1, keepdim=True)
        products[:, h] = f_q @ f_k.mT
    with torch.no_grad():
        expected = _by_hand(products, heads.v, causal)
        assert torch.allclose(kernel.mix(heads, causal=causal), expected, atol=1e-10)
        weights = kernel.weights(heads, causal=causal)
    assert torch.allclose(weights.sum(-1), torch.ones((), dtype=torch.float64))
    assert torch.allclose(torch.einsum("bhts,bshv->bthv", weights, heads.v), expected, atol=1e-10)


@pytest.mark.parametrize("tokens", [1, 3, 4, 13])
def test_hedgehog_with_a_window_equals_its_weights_written_out(tokens: int) -> None:
    heads = _heads(tokens)
    kernel = HedgehogKernel(num_heads=2, key_size=4, value_size=4, act="exp", window=3).double()
    weights = torch.zeros(2, 2, tokens, tokens, dtype=torch.float64)
    for t in range(tokens):
        for s in range(t + 1):
            q, k = heads.q[:, t], heads.k[:, s]
            near = ((q * k).sum(-1) * heads.scale).exp()
            weights[:, :, t, s] = near if t - s < 3 else (2 * torch.cosh(q + k)).sum(-1)
    expected = _by_hand(weights, heads.v, causal=True)
    with torch.no_grad():
        assert torch.allclose(kernel.mix(heads, causal=True), expected, atol=1e-10)
        found = torch.einsum("bhts,bshv->bthv", kernel.weights(heads, causal=True), heads.v)
        assert torch.allclose(found, expected, atol=1e-10)
        state, outs = kernel.init_state(2, heads.q), []
        for t in range(tokens):
            one = [x[:, t : t + 1] for x in (heads.q, heads.k, heads.v)]
            o, state = kernel.advance(Heads(one[0], one[1], one[2], one[0], one[1], heads.scale), state)
            outs.append(o)
    assert torch.allclose(torch.cat(outs, 1), expected, atol=1e-10)


def test_exponential_features_of_the_identity_are_a_sum_of_cosh() -> None:
    x, y = (torch.randn(50, 1, 1, 6, dtype=torch.float64) for _ in range(2))
    feature = HedgehogFeatureMap(6, act="exp").double()
    products = (feature(x) * feature(y)).sum(-1)
    assert torch.allclose(products, (2 * torch.cosh(x + y)).sum(-1), rtol=1e-12)
    assert bool((products >= 12).all())


def test_padding_is_as_if_it_were_not_there() -> None:
    heads = _heads(7)
    seen = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    kernel = HedgehogKernel(num_heads=2, key_size=4, value_size=4).double()
    padded = Heads(heads.q, heads.k, heads.v, heads.q, heads.k, heads.scale, seen)
    q, k, v = (x[1:, :4] for x in (heads.q, heads.k, heads.v))
    short = Heads(q, k, v, q, k, heads.scale)
    with torch.no_grad():
        for causal in (True, False):
            found = kernel.mix(padded, causal=causal)[1:, :4]
            assert torch.allclose(found, kernel.mix(short, causal=causal), atol=1e-12)


def test_mimicry_loss_is_bounded_by_the_entropy_and_leaves_the_target_alone() -> None:
    heads = _heads(6)
    q = heads.q.clone().requires_grad_()
    p = softmax_weights(Heads(q, heads.k, heads.v, q, heads.k, heads.scale), causal=True)
    kernel = HedgehogKernel(num_heads=2, key_size=4, value_size=4).double()
    entropy = spikiness(p).mean()
    assert attention_cross_entropy(p, p).item() == pytest.approx(entropy.item(), rel=1e-9)
    loss = attention_cross_entropy(p, kernel.weights(heads, causal=True))
    assert loss.item() > entropy.item()
    torch.autograd.backward(loss)
    assert q.grad is None
    assert all(value.grad is not None for value in kernel.parameters())


def test_diagnostics_on_known_weights() -> None:
    assert spikiness(torch.eye(5)[None, None]).item() == 0.0
    scores = torch.tensor([[[[1.0, 2.0, 3.0]]]])
    assert monotonicity(scores, torch.tensor([[[[0.5, 0.3, 0.2]]]])).item() == 0.0
    assert monotonicity(scores, torch.tensor([[[[0.2, 0.5, 0.3]]]])).item() == pytest.approx(2 / 3)


def test_hedgehog_without_causality_sees_all_and_keeps_no_state() -> None:
    mixer = Hedgehog(8, num_heads=2, rotary=False, causal=False).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    order = torch.randperm(5)
    assert torch.allclose(mixer(x[:, order]), mixer(x)[:, order], atol=1e-12)
    with pytest.raises(BadInput, match="keeps no state"):
        mixer.prefill(x)


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 11, 16, 30])
def test_the_window_equals_a_masked_softmax(tokens: int) -> None:
    heads, window = _heads(tokens), 4
    place = torch.arange(tokens)
    gap = place[:, None] - place
    scores = torch.einsum("bthk,bshk->bhts", heads.q, heads.k) * heads.scale
    weights = scores.masked_fill((gap < 0) | (gap >= window), -math.inf).softmax(-1)
    expected = torch.einsum("bhts,bshv->bthv", weights, heads.v)
    past = torch.full((2, window - 1, 2, 4), 7.0, dtype=torch.float64)
    valid = torch.cat([torch.zeros(2, window - 1), torch.ones(2, tokens)], dim=1) > 0
    k, v = torch.cat([past, heads.k], 1), torch.cat([past, heads.v], 1)
    found, _ = window_attention(heads.q, k, v, window=window, scale=heads.scale, valid=valid)
    assert torch.allclose(found, expected, atol=1e-10)


def test_liger_with_a_whole_window_is_the_softmax_attention_whose_weights_it_loads() -> None:
    torch.manual_seed(0)
    softmax = SoftmaxAttention(16, num_heads=2).double()
    liger = LigerAttention(16, num_heads=2, window=64, alpha=1.0).double()
    liger.load_state_dict(softmax.state_dict(), strict=True)
    assert sum(p.numel() for p in liger.parameters()) == sum(p.numel() for p in softmax.parameters())
    x = torch.randn(2, 33, 16, dtype=torch.float64)
    assert torch.allclose(liger(x), softmax(x), atol=1e-10)


@pytest.mark.parametrize("gate", ["gla", "hgrn2"])
def test_the_recurrence_of_liger_token_by_token(gate: str) -> None:
    torch.manual_seed(0)
    liger = LigerAttention(8, num_heads=2, alpha=0.0, gate=gate).double()  # type: ignore[arg-type]
    x = torch.randn(1, 10, 8, dtype=torch.float64)
    q, k, v = (part.unflatten(-1, (2, 4)) for part in liger.qkv(x).chunk(3, -1))
    outs, S = [], torch.zeros(2, 4, 4, dtype=torch.float64)
    for t in range(10):
        decay = torch.sigmoid(k[0, t]) ** (1 / 16 if gate == "gla" else 1)
        key = k[0, t].softmax(-1) if gate == "gla" else 1 - torch.sigmoid(k[0, t])
        S = decay[:, :, None] * S + key[:, :, None] * v[0, t][:, None]
        outs.append(torch.einsum("hk,hkv->hv", q[0, t].softmax(-1), S).flatten())
    assert torch.allclose(liger(x)[0], liger.out(torch.stack(outs)), atol=1e-10)


@pytest.mark.parametrize("causal", [True, False])
def test_lit_equals_products_from_the_left(causal: bool) -> None:
    heads = _heads(9)
    kernel = LiTKernel(num_heads=2, key_size=4, value_size=4, groups=1, kernel_size=0).double()
    q, k, v = (x.flatten(2) for x in (heads.q, heads.k, heads.v))
    products = q.relu() @ k.relu().mT
    expected = _by_hand(products[:, None], v[:, :, None], causal)[:, :, 0]
    expected = expected.nan_to_num(0.0)  # a row without any weight mixes nothing
    assert torch.allclose(kernel.mix(heads, causal=causal).flatten(2), expected, atol=1e-10)


@pytest.mark.parametrize("tokens", [9, 10, 7])
def test_the_convolution_of_lit_runs_over_the_image(tokens: int) -> None:
    heads = _heads(tokens)
    kernel = LiTKernel(num_heads=2, key_size=4, value_size=4, kernel_size=3).double()
    without = LiTKernel(num_heads=2, key_size=4, value_size=4, kernel_size=0).double()
    found = (kernel.mix(heads, causal=False) - without.mix(heads, causal=False)).flatten(2)
    outside, side = image_grid(tokens)
    v = heads.v.flatten(2)
    expected = torch.zeros_like(v)
    for place in range(tokens - outside):
        row, column = divmod(place, side)
        total = kernel.bias.clone()
        for i in range(3):
            for j in range(3):
                r, c = row + i - 1, column + j - 1
                other = r * side + c
                if 0 <= r < side and 0 <= c < side and other < tokens - outside:
                    total = total + kernel.weight[:, 0, i, j] * v[:, outside + other]
        expected[:, outside + place] = total
    assert torch.allclose(found, expected, atol=1e-10)


def test_linearize_dit_takes_over_everything_else() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Hedgehog(8, num_heads=2, causal=False)
            self.mlp = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attn(x)
            out: Tensor = x + self.mlp(x)
            return out

    teacher = nn.Sequential(Block(), Block())
    student = linearize_dit(teacher, Hedgehog, d_model=8, num_heads=2, kernel_size=3)
    kept = {name: value for name, value in teacher.state_dict().items() if ".attn." not in name}
    assert kept
    assert all(torch.equal(student.state_dict()[name], value) for name, value in kept.items())
    assert all(isinstance(block.attn, LiTAttention) for block in student.children())
    assert student(torch.randn(2, 9, 8)).shape == (2, 9, 8)


def test_hybrid_distillation_by_hand() -> None:
    eps, var = torch.randn(2, 3), torch.randn(2, 3)
    student = eps.clone().requires_grad_()
    loss = hybrid_distill((student, var), (eps, var))
    torch.autograd.backward(loss)
    assert loss.item() == 0.0
    assert student.grad is not None
    assert bool((student.grad == 0).all())
    found = hybrid_distill((eps + 1, var - 2), (eps, var))
    assert found.item() == pytest.approx(0.5 * 1 + 0.05 * 4, rel=1e-5)
    with pytest.raises(BadInput, match="variance"):
        hybrid_distill((eps, None), (eps, var))


def test_bad_options_are_refused() -> None:
    with pytest.raises(BadInput, match="act must be"):
        HedgehogFeatureMap(4, act="tanh")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="window must be"):
        LigerAttention(8, num_heads=2, window=0)
    with pytest.raises(BadInput, match="gate must be"):
        LigerAttention(8, num_heads=2, gate="gsa")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="odd"):
        LiTAttention(8, num_heads=2, kernel_size=4)
