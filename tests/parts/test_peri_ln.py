"""Peri-LN: the size of every branch is the output norm's, whatever its weights; and what the profile reads."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torchgraft.bench.models import ByteTransformer, VisionTransformer
from torchgraft.engines.normalize.depth import residual_stream
from torchgraft.engines.normalize.placement import is_norm
from torchgraft.errors import BadInput
from torchgraft.parts.norms.peri_ln import PeriLNBlock, set_norm_placement, variance_profile


def _mlp(width: int, *, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width, bias=bias))


@settings(max_examples=20, deadline=None)
@given(gain=st.floats(0.2, 3.0), scale=st.floats(0.1, 100.0), seed=st.integers(0, 99))
def test_the_branch_has_the_mean_square_of_its_gain(gain: float, scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    block: Any = PeriLNBlock(12, sublayer=_mlp(12)).double()
    with torch.no_grad():
        block.output_norm.weight.copy_(gain * (0.1 + torch.rand(12)))
        block.sublayer[2].weight.mul_(scale)
    x = torch.randn(2, 400, 12, dtype=torch.float64)
    g: Any = block.output_norm.weight
    with torch.no_grad():
        branch = block(x) - x
        g = g.detach()
    ratio = branch / g  # every token of unit mean square before the gain
    torch.testing.assert_close(ratio.square().mean(-1), torch.ones(2, 400).double(), rtol=1e-2, atol=1e-4)


def test_equal_gains_give_every_token_exactly_that_mean_square() -> None:
    torch.manual_seed(0)
    block: Any = PeriLNBlock(16, sublayer=_mlp(16)).double()
    for norm in (block.input_norm, block.output_norm):
        norm.eps = 1e-12
    block.output_norm.weight.data.fill_(0.7)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    torch.testing.assert_close((block(x) - x).square().mean(-1), torch.full((2, 9), 0.49).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [0.01, 7.0])
def test_the_last_weights_size_is_not_seen_and_divides_its_gradient(scale: float) -> None:
    torch.manual_seed(0)
    block: Any = PeriLNBlock(8, sublayer=_mlp(8, bias=False)).double()
    block.output_norm.eps = 1e-24
    x, weight = torch.randn(2, 5, 8).double(), torch.randn(2, 5, 8).double()
    found = []
    for factor in (1.0, scale):
        twin = copy.deepcopy(block)
        last: Any = twin.sublayer[2]
        last.weight.data.mul_(factor)
        out = twin(x)
        (grad,) = torch.autograd.grad((out * weight).sum(), last.weight)
        found.append((out.detach(), grad))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=1e-9)
    torch.testing.assert_close(found[1][1] * scale, found[0][1], rtol=1e-6, atol=1e-9)


def test_variance_grows_by_one_a_branch_at_the_start() -> None:
    torch.manual_seed(0)
    width, depth = 256, 12
    stack: Any = nn.Sequential(*(PeriLNBlock(width, sublayer=_mlp(width)) for _ in range(2 * depth)))
    x = torch.randn(8, 16, width)
    with torch.no_grad():
        for branches in (8, 24):
            grown = float(stack[:branches](x).var())
            assert abs(grown / (float(x.var()) + branches) - 1) < 0.15
            bare: Any = nn.Sequential(*(copy.deepcopy(block) for block in stack[:branches]))
            for block in bare:
                block.output_norm = nn.Identity()
            assert float(bare(x).var()) < 0.5 * grown, "without output norms the growth is another"


def test_without_its_output_norm_it_is_pre_norm() -> None:
    torch.manual_seed(0)
    block: Any = PeriLNBlock(8, sublayer=_mlp(8), norm="layer").double()
    block.output_norm = nn.Identity()
    x = torch.randn(2, 3, 8).double()
    torch.testing.assert_close(block(x), x + block.sublayer(nn.functional.layer_norm(x, (8,))))


def test_embedding_and_final_norms_come_with_peri_and_go() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    stack: Any = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    plain, x = copy.deepcopy(stack), 3 * torch.randn(2, 5, 8) + 1
    set_norm_placement(stack, "peri")
    out = stack(x)
    torch.testing.assert_close(out.mean(-1), torch.zeros(2, 5), rtol=0, atol=1e-5)  # the final norm
    with residual_stream(stack) as stream:
        stack(x)
    torch.testing.assert_close(stack(7 * x), out, rtol=0, atol=1e-4)  # the norm of x_0
    assert torch.equal(stream[0], x)
    set_norm_placement(stack, "pre", final_norm=False)
    assert torch.equal(stack(x), plain(x))
    set_norm_placement(stack, "peri", embed_norm=False, final_norm=False)
    assert not torch.allclose(stack(7 * x), stack(x), atol=1e-2)
    assert len([m for m in stack.modules() if is_norm(m)]) == 8


def test_a_models_own_final_and_embedding_norms_are_enough() -> None:
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

    sizes: Any = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    llama: Any = LlamaModel(LlamaConfig(**sizes, vocab_size=50))
    llama.eval()
    set_norm_placement(llama, "peri")
    assert sum(is_norm(m) for m in llama.modules()) == 2 * 4 + 1 + 1  # the final one was there, the embedding's is new
    tokens = torch.randint(50, (2, 6))
    before = llama(tokens).last_hidden_state
    first: Any = llama.layers[0]
    assert first.input_norm.weight.shape == (16,)
    first.input_norm.weight.data.mul_(2.0)
    assert not torch.allclose(llama(tokens).last_hidden_state, before, atol=1e-4)
    bert: Any = BertModel(BertConfig(**sizes, vocab_size=50))
    bert.eval()
    set_norm_placement(bert, "peri")
    assert sum(is_norm(m) for m in bert.modules()) == 2 * 4 + 1 + 1  # the embedding's was there, the final one is new
    assert bert(tokens).last_hidden_state.isfinite().all()


def test_a_moved_model_trains_saves_and_loads() -> None:
    torch.manual_seed(0)
    model = set_norm_placement(ByteTransformer(20, 8, d_model=8, depth=2, num_heads=2), "peri")
    tokens = torch.randint(20, (2, 8))
    model(tokens).square().mean().backward()
    assert all(value.grad is not None for value in model.parameters())
    other = set_norm_placement(ByteTransformer(20, 8, d_model=8, depth=2, num_heads=2), "peri")
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(tokens), model(tokens))


def test_the_profile_by_hand() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(d_model=8, depth=2, num_heads=2).double()
    x = torch.randn(3, 1, 8, 8).double()
    profile = variance_profile(model, x, loss=lambda out: out.sum())
    with residual_stream(model) as stream:
        out = model(x)
    grads = torch.autograd.grad(out.sum(), stream)
    for row, value, grad in zip(profile, (each.detach() for each in stream), grads, strict=True):
        assert row.variance == pytest.approx(float(value.var(unbiased=False)))
        assert row.largest == pytest.approx(float(value.abs().max()))
        assert row.gradient == pytest.approx(float(grad.norm()))
    assert [row.depth for row in profile] == [0, 1, 2]
    assert all(value.grad is None for value in model.parameters())


def test_the_profile_takes_hugging_faces_outputs() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=3, n_head=2, n_positions=16, vocab_size=30))
    tokens = torch.randint(30, (2, 6))
    for batch in ({"input_ids": tokens}, {"input_ids": tokens, "labels": tokens}):
        profile = variance_profile(model, batch)
        assert len(profile) == 4
        assert all(row.gradient > 0 for row in profile)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"d_model": 0}, "at least 1, got 0"), ({"d_model": 4, "norm": "batch"}, "rms, layer, got 'batch'")],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        PeriLNBlock(**options)


def test_bad_inputs() -> None:
    with pytest.raises(BadInput, match=r"\(B, T, 4\), got \(2, 4\)"):
        PeriLNBlock(4)(torch.randn(2, 4))
    with pytest.raises(BadInput, match="no transformer block"):
        variance_profile(nn.Linear(2, 2), torch.randn(1, 2))
