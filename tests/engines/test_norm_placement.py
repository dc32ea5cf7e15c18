"""Blocks are found in everybody's transformers, and a moved norm gives what the block written out by hand gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.models import ByteTransformer, ResidualNet, VisionTransformer
from torchgraft.engines.normalize.attach import NormedOutput, attach, attached, detach, first_of
from torchgraft.engines.normalize.depth import residual_stream
from torchgraft.engines.normalize.placement import (
    find_blocks,
    fresh_norm,
    gain_offset,
    is_norm,
    place_norms,
)
from torchgraft.errors import BadInput
from torchgraft.parts.blocks.sequence_model import SequenceModel
from torchgraft.parts.mixers.gated_linear_attention import GatedLinearAttention

D = 16


def _moved(model: nn.Module) -> nn.Module:
    """Give every norm an affine part that is not the identity."""
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module in model.modules():
            if is_norm(module):
                for value in module.parameters(recurse=False):
                    value.add_(0.3 * torch.randn(value.shape, generator=draw))
    return model.double().eval()


def _hf(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        sizes = {"hidden_size": D, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
        if name == "GPT2":
            sizes = {"n_embd": D, "n_layer": 3, "n_head": 2, "n_positions": 32}
        config = getattr(transformers, f"{name}Config")(**sizes, **options)
        config._attn_implementation = "eager"
        model: nn.Module = getattr(transformers, f"{name}Model")(config)
        return model

    return build


def _encoder(*, norm_first: bool = True) -> nn.Module:
    layer = nn.TransformerEncoderLayer(D, 2, 32, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


TEXT = {"vocab_size": 50}
HEADS = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
#: name -> (constructor, placement, blocks, sublayers a block, inputs)
MODELS: dict[str, tuple[Callable[[], nn.Module], str, int, int, str]] = {
    "torch": (_encoder, "pre", 3, 2, "vectors"),
    "torch post": (lambda: _encoder(norm_first=False), "post", 3, 2, "vectors"),
    "vit": (lambda: VisionTransformer(d_model=D, depth=3, num_heads=2), "pre", 3, 2, "images"),
    "bytes": (lambda: ByteTransformer(50, 16, d_model=D, depth=3, num_heads=2), "pre", 3, 2, "tokens"),
    "sequence": (lambda: SequenceModel(D, 3, lambda d: GatedLinearAttention(d, num_heads=2)), "pre", 3, 2, "tokens"),
    "gpt2": (_hf("GPT2", **TEXT), "pre", 3, 2, "tokens"),
    "llama": (_hf("Llama", **HEADS), "pre", 3, 2, "tokens"),
    "hf vit": (_hf("ViT", image_size=8, patch_size=4, num_channels=1), "pre", 3, 2, "images"),
    "bert": (_hf("Bert", **TEXT), "post", 3, 2, "tokens"),
    "gemma2": (_hf("Gemma2", **HEADS), "peri", 3, 2, "tokens"),
    "olmo2": (_hf("Olmo2", **HEADS), "output", 3, 2, "tokens"),
}


def _inputs(kind: str) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    if kind == "tokens":
        return torch.randint(50, (2, 7), generator=draw)
    shape = (2, 7, D) if kind == "vectors" else (2, 1, 8, 8)
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def _run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(x)
    found: Tensor = out if isinstance(out, Tensor) else out.last_hidden_state
    return found


def _build(name: str) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _moved(MODELS[name][0]()), _inputs(MODELS[name][4])


@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_found_with_depth_and_placement(name: str) -> None:
    model, x = _build(name)
    blocks = find_blocks(model)
    _, placement, count, sublayers, _ = MODELS[name]
    assert [block.index for block in blocks] == list(range(1, count + 1))
    assert {block.placement for block in blocks} == {placement}
    assert {len(block.sublayers) for block in blocks} == {sublayers}
    with residual_stream(model) as stream:
        _run(model, x)
    assert len(stream) == count + 1
    assert {value.shape[-1] for value in stream} == {D}


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("olmo2", "gemma2")])
@pytest.mark.parametrize("target", ["pre", "post", "peri"])
def test_there_and_back_gives_the_model_back(name: str, target: Any) -> None:
    model, x = _build(name)
    before, kept = _run(model, x), {key: value.clone() for key, value in model.state_dict().items()}
    place_norms(model, target)
    assert {block.placement for block in find_blocks(model)} == {target}
    moved = _run(model, x)
    assert moved.isfinite().all()
    assert torch.equal(moved, before) == (target == MODELS[name][1])
    torch.testing.assert_close(_run(copy.deepcopy(model), x), moved, rtol=0, atol=0)
    place_norms(model, MODELS[name][1])  # type: ignore[arg-type]
    assert model.state_dict().keys() == kept.keys()
    torch.testing.assert_close(_run(model, x), before, rtol=0, atol=0)


def _out_norm(module: nn.Module, draw: torch.Generator) -> nn.Module:
    norm = module.get_submodule("output_norm")
    with torch.no_grad():
        for value in norm.parameters():
            value.add_(0.2 * torch.randn(value.shape, generator=draw, dtype=value.dtype))
    return norm


Branch = Callable[[Any, Tensor], Tensor]
#: for each model, the two norms and branches of a block by hand
BY_HAND: dict[str, tuple[tuple[str, Branch, str], tuple[str, Branch, str]]] = {
    "torch": (
        ("norm1", lambda b, h: b.self_attn(h, h, h, need_weights=False)[0], "self_attn"),
        ("norm2", lambda b, h: b.linear2(F.relu(b.linear1(h))), "linear2"),
    ),
    "vit": (("norm1", lambda b, h: b.attn(h), "attn"), ("norm2", lambda b, h: b.mlp(h), "mlp")),
    "gpt2": (("ln_1", lambda b, h: b.attn(h)[0], "attn"), ("ln_2", lambda b, h: b.mlp(h), "mlp")),
    "hf vit": (
        ("layernorm_before", lambda b, h: b.attention(h, None)[0], "attention"),
        ("layernorm_after", lambda b, h: b.mlp(h), "mlp"),
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_block_equals_the_formula_by_hand(name: str) -> None:
    model, _ = _build(name)
    plain: Any = copy.deepcopy(model).get_submodule(find_blocks(model)[1].name)
    place = find_blocks(model)[1].name
    x = torch.randn(2, 5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    first, second = BY_HAND[name]

    def value(out: Any) -> Tensor:
        found: Tensor = out[0] if isinstance(out, tuple) else out
        return found

    with torch.no_grad():
        pre = x
        for norm, branch, _ in (first, second):
            pre = pre + branch(plain, plain.get_submodule(norm)(pre))
        torch.testing.assert_close(value(model.get_submodule(place)(x)), pre, rtol=0, atol=1e-12)
        place_norms(model, "peri")
        draw = torch.Generator().manual_seed(5)
        peri = x
        for norm, branch, last in (first, second):
            output_norm = _out_norm(model.get_submodule(place).get_submodule(last), draw)
            peri = peri + output_norm(branch(plain, plain.get_submodule(norm)(peri)))
        torch.testing.assert_close(value(model.get_submodule(place)(x)), peri, rtol=0, atol=1e-12)
        place_norms(model, "post")
        post = x
        for norm, branch, _ in (first, second):
            post = plain.get_submodule(norm)(post + branch(plain, post))
        torch.testing.assert_close(value(model.get_submodule(place)(x)), post, rtol=0, atol=1e-12)
        assert not torch.allclose(post, pre, atol=1e-2)
        assert not torch.allclose(peri, pre, atol=1e-2)


def test_bert_by_hand() -> None:
    model, _ = _build("bert")
    block: Any = model.get_submodule("encoder.layer.1")
    plain: Any = copy.deepcopy(block)
    x = torch.randn(2, 5, D, dtype=torch.float64)
    place_norms(model, "peri")
    first, second = plain.attention.output, plain.output
    with torch.no_grad():
        y = x + F.layer_norm(first.dense(plain.attention.self(first.LayerNorm(x))[0]), (D,), eps=1e-12)
        y = y + F.layer_norm(second.dense(plain.intermediate(second.LayerNorm(y))), (D,), eps=1e-12)
        torch.testing.assert_close(block(x), y, rtol=0, atol=1e-10)


def test_a_sequence_model_steps_as_it_runs() -> None:
    model, tokens = _build("sequence")
    for target in ("peri", "post"):
        place_norms(model, target)
        whole = _run(model, tokens)
        state: Any = model.init_state(2)  # type: ignore[operator]
        with torch.no_grad():
            head, state = model.prefill(tokens[:, :3], state)  # type: ignore[operator]
            tail, _ = model.prefill(tokens[:, 3:], state)  # type: ignore[operator]
        torch.testing.assert_close(torch.cat([head, tail], 1), whole, rtol=0, atol=1e-10)


def test_gemmas_output_norms_come_and_go() -> None:
    model, x = _build("gemma2")
    block: Any = model.get_submodule("layers.0")
    place_norms(model, "pre")
    assert isinstance(block.post_attention_layernorm, nn.Identity)
    assert {each.placement for each in find_blocks(model)} == {"pre"}
    assert _run(model, x).isfinite().all()
    place_norms(model, "peri")
    h = torch.randn(3, D, dtype=torch.float64)
    rms = h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(block.post_attention_layernorm(h), rms, rtol=0, atol=1e-6)


def test_torchs_fused_inference_kernel_does_not_pass_over_an_added_norm() -> None:
    model, x = _build("torch")
    place_norms(model, "peri")
    with torch.enable_grad():
        slow = model(x).detach()
    torch.testing.assert_close(_run(model, x), slow, rtol=0, atol=1e-12)


def test_a_decoder_has_three_branches() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(D, 2, 32, batch_first=True, norm_first=True)
    model = nn.TransformerDecoder(layer, 2).double().eval()
    x, memory = torch.randn(2, 5, D).double(), torch.randn(2, 4, D).double()
    assert [len(block.sublayers) for block in find_blocks(model)] == [3, 3]
    before = model(x, memory)
    place_norms(model, "peri")
    assert not torch.allclose(model(x, memory), before, atol=1e-2)
    place_norms(model, "pre")
    torch.testing.assert_close(model(x, memory), before, rtol=0, atol=0)


def test_fresh_norms_have_unit_gain_also_gemmas() -> None:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

    x = torch.randn(5, D)
    for norm, offset in ((nn.LayerNorm(D), 0.0), (nn.RMSNorm(D), 0.0), (Gemma2RMSNorm(D), 1.0)):
        nn.init.normal_(norm.weight)
        assert gain_offset(norm) == offset
        torch.testing.assert_close(fresh_norm(norm)(x).square().mean(-1), torch.ones(5), rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        ("olmo2", "peri", "normalises outputs only"),
        ("vit", "sandwich", "'pre', 'post' or 'peri', got 'sandwich'"),
    ],
)
def test_what_cannot_be_placed_is_refused_and_left_alone(name: str, target: Any, message: str) -> None:
    model, x = _build(name)
    before = _run(model, x)
    with pytest.raises(BadInput, match=message):
        place_norms(model, target)
    assert torch.equal(_run(model, x), before)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(BadInput, match="ResidualNet has no transformer block"):
        find_blocks(ResidualNet(widths=(4,)))
    with pytest.raises(BadInput, match="without a tensor"):
        first_of((1,), {"x": None})


def test_attached_classes_come_off_in_any_order() -> None:
    class Plus(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = super().forward(x) + 1.0
            return y

    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = 2.0 * super().forward(x)
            return y

    layer, x = nn.ReLU(), torch.tensor([3.0])
    attach(attach(layer, Plus), Twice)
    assert layer(x).item() == 8.0
    assert attached(layer, Plus)
    detach(layer, Plus)
    assert layer(x).item() == 6.0
    with pytest.raises(BadInput, match="Plus is not on this ReLU"):
        detach(layer, Plus)
    with pytest.raises(BadInput, match="Twice is on this ReLU already"):
        attach(layer, Twice)
    assert type(detach(layer, Twice)) is nn.ReLU
    assert not attached(layer, NormedOutput)
