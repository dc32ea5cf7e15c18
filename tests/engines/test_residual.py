"""Residual stacks: parallel layers keep every tensor, wider blocks compute exactly the sums that they stand for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.models import ByteTransformer, ResidualNet, TransformerBlock, VisionTransformer
from torchgraft.contracts.subjects import case
from torchgraft.engines.depth import stacks
from torchgraft.engines.residual import (
    Flatten,
    Parallel,
    Unflatten,
    Widen,
    branch,
    expansion,
    flatten,
    obstacle,
    skips,
    unflatten,
    widened,
)
from torchgraft.engines.residual.parallel import calls, container_of, first_tensor
from torchgraft.engines.surgery.edits import apply_edits, edit_from_record, edit_to_record
from torchgraft.errors import BadInput


def encoder(first: bool = True) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=first, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()


def moved(model: nn.Module) -> nn.Module:
    """Give every parameter a value of its own, gains and offsets of norms too."""
    torch.manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.3 * torch.randn_like(value))
    return model.double().eval()


MODELS: dict[str, tuple[Any, Tensor]] = {
    "vit": (lambda: VisionTransformer(d_model=8, depth=4, num_heads=2), torch.randn(2, 1, 8, 8).double()),
    "bytes": (lambda: ByteTransformer(16, 8, d_model=8, depth=4, num_heads=2), torch.arange(10).view(2, 5)),
    "convolutional": (lambda: ResidualNet(widths=(4,), depth=4), torch.randn(2, 1, 8, 8).double()),
    "encoder": (encoder, torch.randn(2, 5, 8).double()),
    "fused": (lambda: case("transformer").model, torch.randn(2, 6, 8).double()),
}


@pytest.mark.parametrize("name", MODELS)
def test_flatten_then_unflatten_keeps_the_state_dict_bit_for_bit(name: str) -> None:
    build, x = MODELS[name]
    model = moved(build())
    before = copy.deepcopy(model.state_dict())
    flat = flatten(model, (0, 3), example=x)
    assert sum(p.numel() for p in flat.parameters()) == sum(p.numel() for p in model.parameters())
    assert any(".branches.1." in key for key in flat.state_dict())
    back = unflatten(flat)
    after = back.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    with torch.no_grad():
        assert torch.equal(back(x), model(x))
        assert not torch.allclose(flat(x), model(x))  # else nothing was flattened


@pytest.mark.parametrize("name", ["vit", "convolutional"])
def test_a_parallel_layer_adds_what_each_block_adds(name: str) -> None:
    build, x = MODELS[name]
    model = moved(build())
    flat = flatten(model, (1, 3), example=x, scale=0.5)
    hidden = calls(model, ["blocks.1"], x)["blocks.1"][0][0][0]
    with torch.no_grad():
        expected = hidden + 0.5 * sum(model.blocks[i](hidden) - hidden for i in (1, 2, 3))  # type: ignore[index]
        found = flat.blocks[1](hidden)  # type: ignore[index]
    assert torch.allclose(found, expected, atol=1e-12, rtol=0)


def test_a_parallel_layer_answers_in_the_form_of_its_blocks() -> None:
    class Pair(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, x: Tensor) -> tuple[Tensor, str]:
            return self.factor * x, f"times {self.factor}"

    layer = Parallel([Pair(2.0), Pair(3.0)])
    found, words = layer(x=torch.tensor([1.0]))
    assert (found.item(), words, layer.factor) == (4.0, "times 3.0", 2.0)
    assert first_tensor({"a": found, "b": 1}) is found
    with pytest.raises(AttributeError, match="nothing"):
        _ = layer.nothing
    with pytest.raises(BadInput, match="keeps the shape"):
        Parallel([nn.Linear(2, 3)])(torch.zeros(1, 2))
    with pytest.raises(BadInput, match="first argument"):
        Parallel([nn.Identity()])("x")
    with pytest.raises(BadInput, match="pass on a tensor"):
        first_tensor("x")
    with pytest.raises(BadInput, match="at least one"):
        Parallel([])
    with pytest.raises(BadInput, match="order must be at least 1, got 0"):
        Parallel([nn.Identity()], order=0)


def test_an_expansion_of_full_order_is_the_model_itself() -> None:
    build, x = MODELS["encoder"]
    model = moved(build())
    with torch.no_grad():
        assert torch.allclose(flatten(model, example=x, order=3)(x), model(x), atol=1e-12)
        gaps = [float((flatten(model, example=x, order=m)(x) - model(x)).abs().max()) for m in (1, 2)]
    assert min(gaps) > 1e-3


def test_zero_weights_tell_residual_blocks_from_others() -> None:
    for name, wanted in {"vit": True, "bytes": True, "convolutional": True, "encoder": True, "fused": True}.items():
        build, x = MODELS[name]
        model = moved(build())
        assert skips(model, stacks(model, x)[0], x) == [wanted] * stacks(model, x)[0].length, name
    plain = case("mlp")
    assert skips(plain.model, stacks(plain.model, plain.inputs)[0], plain.inputs) == [False] * 3
    post = moved(encoder(first=False))
    assert skips(post, stacks(post, MODELS["encoder"][1])[0], MODELS["encoder"][1]) == [False] * 3


@given(st.integers(1, 5), st.integers(0, 6), st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_expansion_of_linear_branches_is_the_sum_over_increasing_chains(h: int, order: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    matrices = [torch.randn(3, 3, generator=draw, dtype=torch.float64) for _ in range(h)]
    x = torch.randn(3, generator=draw, dtype=torch.float64)
    expected = torch.zeros(3, dtype=torch.float64)
    for chosen in range(2**h):
        places = [i for i in range(h) if chosen >> i & 1]
        if len(places) <= order:
            term = x
            for i in places:
                term = matrices[i] @ term
            expected = expected + term
    found = expansion([lambda v, m=m: m @ v for m in matrices], x, order)  # type: ignore[misc]
    assert torch.allclose(found, expected, atol=1e-10 * float(1 + expected.abs().max()), rtol=0)


def test_expansion_at_full_order_is_the_sequential_stack_of_any_branches() -> None:
    blocks = [moved(TransformerBlock(8, 2)) for _ in range(3)]
    x = torch.randn(2, 4, 8).double()
    with torch.no_grad():
        found = expansion([branch(block) for block in blocks], x, 3)
        parallel = expansion([branch(block) for block in blocks], x, 1)
        assert torch.allclose(found, blocks[2](blocks[1](blocks[0](x))), atol=1e-12)
        assert torch.allclose(parallel, Parallel(blocks)(x), atol=1e-12)
    with pytest.raises(BadInput, match="-1"):
        expansion([], x, -1)


@pytest.mark.parametrize("causal", [False, True])
def test_a_wide_block_is_the_sum_of_its_attentions_then_of_its_feed_forward_parts(causal: bool) -> None:
    blocks = [
        moved(TransformerBlock(8, heads, ratio=ratio, causal=causal)) for heads, ratio in ((2, 4), (2, 3), (2, 1))
    ]
    wide = widened(blocks)
    x = torch.randn(2, 5, 8).double()
    with torch.no_grad():
        u = x + sum(b.attn(b.norm1(x)) for b in blocks)  # type: ignore[operator]
        y = u + sum(b.mlp(b.norm2(u)) for b in blocks)  # type: ignore[operator]
        assert torch.allclose(wide(x), y, atol=1e-12)
    assert wide.attn.num_heads == 6  # type: ignore[union-attr]
    assert wide.mlp.fc1.out_features == 64  # type: ignore[union-attr]
    # One gain and one offset of each norm have gone into the projections, and the biases of sums became one.
    merged, apart = (sum(p.numel() for p in module.parameters()) for module in (wide, nn.ModuleList(blocks)))
    assert apart - merged == 3 * 4 * 8 + 2 * 2 * 8


def test_fused_projections_and_torch_encoder_layers_are_merged_alike() -> None:
    blocks = list(moved(case("transformer").model).layers)  # type: ignore[arg-type]
    x = torch.randn(2, 6, 32).double()
    with torch.no_grad():
        u = x + sum(b.attn(b.norm1(x)) for b in blocks)
        y = u + sum(b.fc2(F.gelu(b.fc1(b.norm2(u)))) for b in blocks)
        assert torch.allclose(widened(blocks)(x), y, atol=1e-12)
    blocks = list(moved(encoder()).layers)
    x = torch.randn(2, 5, 8).double()
    mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
    with torch.no_grad():
        u = x + sum(b._sa_block(b.norm1(x), mask, None) for b in blocks)
        y = u + sum(b._ff_block(b.norm2(u)) for b in blocks)
        assert torch.allclose(widened(blocks)(x, src_mask=mask), y, atol=1e-12)


def test_what_cannot_be_merged_is_said() -> None:
    x = torch.randn(1, 5, 8)
    assert obstacle(TransformerBlock(8, 2), (x,), {}) is None
    assert "no pre-norm" in str(obstacle(nn.Sequential(nn.Linear(8, 8)), (x,), {}))
    post = encoder(first=False).layers[0]
    assert "does not compute the sum" in str(obstacle(post, (x,), {}))

    class Baked(TransformerBlock):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return super().forward(x, mask) * (self.attn.out.in_features / 8)

    class Fixed(TransformerBlock):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            self.attn(self.norm1(x)).view(1, 5, 8)
            return x + self.attn.out(self.attn.value(self.norm1(x)).view(1, 5, 8))

    class Scaled(TransformerBlock):
        def __init__(self) -> None:
            super().__init__(8, 2)
            self.gamma = nn.Parameter(torch.ones(8))

    assert "does not compute the sum" in str(obstacle(Baked(8, 2), (x,), {}))
    assert "does not run with other widths" in str(obstacle(Fixed(8, 2), (x,), {}))
    assert "gamma" in str(obstacle(Scaled(), (x,), {}))
    with pytest.raises(BadInput, match=r"attn\.causal"):
        widened([TransformerBlock(8, 2), TransformerBlock(8, 2, causal=True)])
    with pytest.raises(BadInput, match="sizes"):
        widened([TransformerBlock(8, 2), TransformerBlock(8, 4)])


def test_edits_pass_through_json_and_refuse_what_does_not_fit() -> None:
    build, x = MODELS["vit"]
    model = moved(build())
    for edit in (
        Flatten(name="blocks", size=4, spans=((0, 2), (2, 2)), scale=0.5),
        Widen(name="blocks", size=4, spans=((0, 2), (2, 2))),
    ):
        again = edit_from_record(edit_to_record(edit))
        assert again == edit
        with torch.no_grad():
            assert torch.equal(apply_edits(model, [again])(x), apply_edits(model, [edit])(x))
        assert "blocks 0 to 1" in edit.describe()["blocks"]
    assert Unflatten(name="blocks").describe()
    for spans in (((0, 1),), ((0, 2), (1, 2)), ((3, 2),)):
        for kind in (Flatten, Widen):
            with pytest.raises(BadInput, match="spans"):
                apply_edits(model, [kind(name="blocks", size=4, spans=spans)])
    with pytest.raises(BadInput, match="5 blocks"):
        apply_edits(model, [Widen(name="blocks", size=5, spans=((0, 2),))])
    with pytest.raises(BadInput, match="5 blocks"):
        apply_edits(model, [Flatten(name="blocks", size=5, spans=((0, 2),))])
    with pytest.raises(BadInput, match="no stack"):
        flatten(model, example=x, name="nowhere")
    with pytest.raises(BadInput, match="no parallel layer"):
        unflatten(model)
    with pytest.raises(BadInput, match="no module"):
        container_of(model, "nowhere")
    with pytest.raises(BadInput, match="Linear"):
        container_of(model, "head")


@pytest.mark.parametrize("family", ["gpt2", "llama", "vit"])
def test_models_of_transformers(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if family == "vit":
        sizes = {"image_size": 8, "patch_size": 4, "num_channels": 1, "intermediate_size": 32}
        config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=4, num_attention_heads=4, **sizes)
        model, name = transformers.ViTModel(config).eval(), "layers"
        example = {"pixel_values": torch.randn(2, 1, 8, 8)}
    elif family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=32, n_positions=32, n_embd=16, n_layer=4, n_head=2, bos_token_id=None, eos_token_id=None
        )
        model, name = transformers.GPT2LMHeadModel(config).eval(), "transformer.h"
        example = {"input_ids": torch.randint(0, 32, (2, 6))}
    else:
        sizes = {"vocab_size": 32, "intermediate_size": 32, "num_key_value_heads": 2, "eos_token_id": None}
        config = transformers.LlamaConfig(hidden_size=16, num_hidden_layers=4, num_attention_heads=4, **sizes)
        model, name = transformers.LlamaForCausalLM(config).eval(), "model.layers"
        example = {"input_ids": torch.randint(0, 32, (2, 6))}
    stack = stacks(model, example)[0]
    assert stack.name == name
    assert skips(model, stack, example) == [True] * 4
    given = calls(model, stack.blocks, example)
    assert obstacle(model.get_submodule(stack.blocks[0]), *given[stack.blocks[0]][0]) is None
    wide = apply_edits(model, [Widen(name=name, size=4, spans=((1, 3),))])
    flat = flatten(model, (1, 3), example=example)
    back = unflatten(flat).state_dict()
    assert all(torch.equal(back[key], value) for key, value in model.state_dict().items())
    assert wide.config.num_hidden_layers == 2
    if family != "vit":  # the caches of keys follow
        for edited in (wide, flat):
            tokens = [
                edited.generate(example["input_ids"], max_new_tokens=5, do_sample=False, use_cache=cache)
                for cache in (True, False)
            ]
            assert torch.equal(*tokens)
