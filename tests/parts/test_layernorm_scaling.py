"""LayerNorm Scaling: the growth law, the index of each block in everybody's models, folding, and the depth report."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchgraft.bench.models import ByteTransformer, VisionTransformer
from torchgraft.engines.normalize.attach import attach
from torchgraft.engines.normalize.depth import residual_stream
from torchgraft.engines.normalize.placement import is_norm, place_norms
from torchgraft.errors import BadInput
from torchgraft.parts.norms.layernorm_scaling import (
    DepthScaledNorm,
    apply_layernorm_scaling,
    depth_report,
    fold_layernorm_scaling,
    harmonic,
)


@pytest.mark.parametrize("scaled", [True, False])
def test_the_squared_norm_grows_as_the_law_says(scaled: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    d, s, layers = 512, 0.7, 32
    x = torch.randn(64, 1, d, generator=draw)
    start = float(x.square().sum(-1).mean())
    with torch.no_grad():
        for layer in range(1, layers + 1):
            norm = DepthScaledNorm(d, layer_index=layer if scaled else 1)
            weight = torch.randn(d, d, generator=draw) * s / d**0.5
            x = x + norm(x) @ weight.T
    law = start + d * s**2 * (harmonic(layers) if scaled else layers)
    assert abs(float(x.square().sum(-1).mean()) / law - 1) < 0.05


def test_a_layer_is_the_norm_over_the_root_of_its_index_bias_included() -> None:
    norm = nn.LayerNorm(6).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    assert torch.equal(DepthScaledNorm(6, norm=norm)(x), norm(x))
    torch.testing.assert_close(
        DepthScaledNorm(6, layer_index=5, norm=norm)(x) * 5**0.5, norm(x), rtol=1e-12, atol=1e-14
    )


def _hf(name: str) -> nn.Module:
    import transformers

    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 40,
    }
    if name == "GPT2":
        sizes = {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32, "vocab_size": 40}
    if name == "ViT":
        sizes = {**sizes, "image_size": 8, "patch_size": 4, "num_channels": 1}
        del sizes["vocab_size"]
    model: nn.Module = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**sizes))
    return model


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[str, str], str]] = {
    "ours": (lambda: ByteTransformer(40, 8, d_model=16, depth=3, num_heads=2), ("norm1", "norm2"), "tokens"),
    "torch": (_encoder, ("norm1", "norm2"), "vectors"),
    "gpt2": (lambda: _hf("GPT2"), ("ln_1", "ln_2"), "tokens"),
    "llama": (lambda: _hf("Llama"), ("input_layernorm", "post_attention_layernorm"), "tokens"),
    "vit": (lambda: _hf("ViT"), ("layernorm_before", "layernorm_after"), "images"),
}


def _case(name: str) -> tuple[nn.Module, Tensor, tuple[str, str]]:
    build, names, kind = MODELS[name]
    torch.manual_seed(0)
    model = build().double()
    model.eval()
    with torch.no_grad():
        for module in model.modules():
            if is_norm(module):
                for value in module.parameters(recurse=False):
                    value.add_(0.3 * torch.randn_like(value))
    shapes = {"images": (2, 1, 8, 8), "vectors": (2, 7, 16)}
    x = torch.randint(40, (2, 7)) if kind == "tokens" else torch.randn(shapes[kind], dtype=torch.float64)
    return model, x, names


def _run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(x)
    found: Tensor = out if isinstance(out, Tensor) else out.last_hidden_state
    return found


@pytest.mark.parametrize("name", MODELS)
def test_every_pre_norm_is_scaled_by_its_depth_and_folds_exactly(name: str) -> None:
    model, x, names = _case(name)
    plain = copy.deepcopy(model)
    before = sum(value.numel() for value in model.parameters())
    apply_layernorm_scaling(model)
    found = {key: module.layer_index for key, module in model.named_modules() if isinstance(module, DepthScaledNorm)}
    assert len(found) == 6
    assert all(key.endswith(names) and f".{index - 1}." in key for key, index in found.items())
    assert sum(value.numel() for value in model.parameters()) == before
    scaled = _run(model, x)
    assert not torch.allclose(scaled, _run(plain, x), atol=1e-3)
    with torch.enable_grad():
        slow = model(x)
    slow = slow if isinstance(slow, Tensor) else slow.last_hidden_state
    torch.testing.assert_close(scaled, slow.detach(), rtol=0, atol=1e-12)  # torch's fused path does not pass it over
    with residual_stream(model) as ours, residual_stream(plain) as theirs:
        _run(model, x), _run(plain, x)
    assert torch.equal(ours[1], theirs[1]), "block 1 is unchanged"
    fold_layernorm_scaling(model)
    assert not [module for module in model.modules() if isinstance(module, DepthScaledNorm)]
    assert model.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(_run(model, x), scaled, rtol=0, atol=1e-12)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(_run(plain, x), scaled, rtol=0, atol=1e-12)


def test_gemmas_weight_offset_is_folded_too() -> None:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

    norm = Gemma2RMSNorm(8)
    nn.init.normal_(norm.weight, std=0.3)
    x = torch.randn(2, 3, 8)
    scaled = DepthScaledNorm(8, layer_index=7, norm=norm)
    expected = scaled(x).detach()
    torch.testing.assert_close(scaled.folded()(x).detach(), expected, rtol=1e-5, atol=1e-6)


def test_a_norm_without_weight_stays_scaled() -> None:
    scaled = DepthScaledNorm(8, layer_index=4, norm=nn.LayerNorm(8, elementwise_affine=False))
    assert scaled.folded() is scaled


def test_the_report_by_hand() -> None:
    class Doubles(nn.Module):
        """On a block: gives twice its input."""

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return 2 * x

    torch.manual_seed(0)
    model: Any = VisionTransformer(d_model=8, depth=3, num_heads=2).double().train()
    attach(model.blocks[1], Doubles)
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)

    def loss(out: Tensor) -> Tensor:
        return out.square().mean()

    rows = depth_report(model, x, loss=loss)
    assert model.training
    assert rows[1].jacobian_distance == pytest.approx(1.0)  # J = 2 I
    assert rows[1].angle == pytest.approx(0.0, abs=1e-7)
    assert rows[0].angle > 1e-3
    with torch.no_grad():
        whole = float(loss(model(x)))
        model.blocks[1].forward = lambda x, mask=None: x
        assert rows[1].drop_loss == pytest.approx(float(loss(model(x))) - whole)
    with residual_stream(model) as stream, torch.no_grad():
        model(x)
    assert rows[0].variance == pytest.approx(float(stream[0].var(unbiased=False)))
    assert all(value.grad is None for value in model.parameters())


def test_the_report_reads_hugging_face() -> None:
    model, x, _ = _case("llama")
    rows = depth_report(model, x, loss=lambda out: out.last_hidden_state.square().mean())
    assert [row.block for row in rows] == ["layers.0", "layers.1", "layers.2"]
    assert all(0 < row.jacobian_distance < 10 and 0 < row.angle < 1 for row in rows)


def test_scaling_slows_the_growth_of_a_transformer() -> None:
    torch.manual_seed(0)
    model = ByteTransformer(40, 8, d_model=16, depth=8, num_heads=2).eval()
    scaled = apply_layernorm_scaling(copy.deepcopy(model))
    x = torch.randint(40, (4, 8))
    with residual_stream(model) as plain, residual_stream(scaled) as ours, torch.no_grad():
        model(x), scaled(x)
    assert float(ours[-1].var()) < float(plain[-1].var())


def test_what_cannot_be_scaled_is_refused() -> None:
    model = VisionTransformer(d_model=8, depth=2, num_heads=2)
    apply_layernorm_scaling(model)
    with pytest.raises(BadInput, match=r"'blocks\.0\.norm1' is scaled already"):
        apply_layernorm_scaling(model)
    peri = VisionTransformer(d_model=8, depth=2, num_heads=2)
    place_norms(peri, "peri")
    with pytest.raises(BadInput, match="peri-norm; the scaling is for pre-norm"):
        apply_layernorm_scaling(peri)
    with pytest.raises(BadInput, match="no transformer block"):
        apply_layernorm_scaling(nn.Linear(2, 2))
    for width, index in ((4, 0), (0, 1)):
        with pytest.raises(BadInput, match="at least 1, got 0"):
            DepthScaledNorm(width, layer_index=index)
