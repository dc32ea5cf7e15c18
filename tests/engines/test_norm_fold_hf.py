"""Norms of Hugging Face models go into the layers that read them; models are built here from tiny configurations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from torchgraft import fold
from torchgraft.engines.normalize.fold import fold_affine, plan_folds
from torchgraft.engines.normalize.hugging_face import gain_of, own_example, reset_gain
from torchgraft.errors import BadInput

SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24}
IDS: dict[str, Any] = {"vocab_size": 30, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}


def _causal(kind: str, **options: Any) -> Callable[[], nn.Module]:
    sizes = SIZES | IDS | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4} | options
    return lambda: getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes))


def _gpt2(**options: Any) -> nn.Module:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, "attn_pdrop": 0.3, "resid_pdrop": 0.3}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **IDS, **options))


def _vit(kind: Any = transformers.ViTForImageClassification, **options: Any) -> nn.Module:
    sizes = SIZES | {"num_attention_heads": 4, "image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 5}
    return kind(transformers.ViTConfig(**sizes, **options))  # type: ignore[no-any-return]


def _bert() -> nn.Module:
    return transformers.BertModel(
        transformers.BertConfig(**SIZES, vocab_size=30, num_attention_heads=4, max_position_embeddings=32)
    )


def _t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4, "vocab_size": 30}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, tie_word_embeddings=True)
    )


def _blocks(form: str, names: dict[str, str]) -> dict[str, set[str]]:
    """Return norm -> readers of two blocks, the readers as names in the block."""
    return {
        f"{form}.{block}.{norm}": {f"{form}.{block}.{reader}" for reader in readers.split()}
        for block in range(2)
        for norm, readers in names.items()
    }


LLAMA = {
    "input_layernorm": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "post_attention_layernorm": "mlp.gate_proj mlp.up_proj",
}
GEMMA2 = {"input_layernorm": LLAMA["input_layernorm"], "pre_feedforward_layernorm": "mlp.gate_proj mlp.up_proj"}
GPT2 = {"ln_1": "attn.c_attn", "ln_2": "mlp.c_fc"}
VIT = {"layernorm_before": "attention.q_proj attention.k_proj attention.v_proj", "layernorm_after": "mlp.fc1"}
POST = (
    "embeddings",
    *(f"encoder.layer.{block}.{part}" for block in range(2) for part in ("attention.output", "output")),
)
ADD, OUT = "it is read by add in", "the model gives its output"

#: how it is built, which norms go where, a piece of why each other one stays
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, set[str]], dict[str, str]]] = {
    "llama, untied": (
        _causal("Llama", tie_word_embeddings=False),
        _blocks("model.layers", LLAMA) | {"model.norm": {"lm_head"}},
        {},
    ),
    "llama, tied": (
        _causal("Llama", tie_word_embeddings=True),
        _blocks("model.layers", LLAMA),
        {"model.norm": "its reader lm_head is tied to model.embed_tokens.weight"},
    ),
    "gemma": (
        _causal("Gemma", tie_word_embeddings=True),
        _blocks("model.layers", LLAMA),
        {"model.norm": "lm_head is tied to"},
    ),
    "gemma-2, norms before and behind": (
        _causal("Gemma2", tie_word_embeddings=False),
        _blocks("model.layers", GEMMA2) | {"model.norm": {"lm_head"}},
        {
            f"model.layers.{block}.{norm}": "it is read by add"
            for block in range(2)
            for norm in ("post_attention_layernorm", "post_feedforward_layernorm")
        },
    ),
    "qwen3, norms of heads": (
        _causal("Qwen3", tie_word_embeddings=False),
        _blocks("model.layers", LLAMA) | {"model.norm": {"lm_head"}},
        {f"model.layers.{block}.self_attn.{each}_norm": "it is read by" for block in range(2) for each in "qk"},
    ),
    "gpt-2, tied": (
        _gpt2,
        _blocks("transformer.h", GPT2),
        {"transformer.ln_f": "lm_head is tied to transformer.wte.weight"},
    ),
    "gpt-2, untied": (
        lambda: _gpt2(tie_word_embeddings=False),
        _blocks("transformer.h", GPT2),
        {"transformer.ln_f": "its reader lm_head has no bias, and from_pretrained would not make one"},
    ),
    "vit with a classifier": (_vit, _blocks("vit.layers", VIT) | {"vit.layernorm": {"classifier"}}, {}),
    "vit without": (
        lambda: _vit(transformers.ViTModel, add_pooling_layer=False),
        _blocks("layers", VIT),
        {"layernorm": OUT},
    ),
    "vit, no biases": (
        lambda: _vit(qkv_bias=False),
        {name: readers for name, readers in _blocks("vit.layers", VIT).items() if "after" in name}
        | {"vit.layernorm": {"classifier"}},
        {f"vit.layers.{block}.layernorm_before": "q_proj has no bias, and from_pretrained" for block in range(2)},
    ),
    "bert, post-norm": (_bert, {}, {f"{each}.LayerNorm": OUT if each == POST[-1] else ADD for each in POST}),
    "t5": (
        _t5,
        {
            "encoder.block.0.layer.0.layer_norm": {f"encoder.block.0.layer.0.SelfAttention.{each}" for each in "qkv"},
            "encoder.block.0.layer.1.layer_norm": {"encoder.block.0.layer.1.DenseReluDense.wi"},
            "decoder.block.0.layer.0.layer_norm": {f"decoder.block.0.layer.0.SelfAttention.{each}" for each in "qkv"},
            "decoder.block.0.layer.1.layer_norm": {"decoder.block.0.layer.1.EncDecAttention.q"},
            "decoder.block.0.layer.2.layer_norm": {"decoder.block.0.layer.2.DenseReluDense.wi"},
        },
        {"encoder.final_layer_norm": OUT, "decoder.final_layer_norm": "it is read by mul"},
    ),
}


#: Gemma's norms compute in float32 to the end, whatever the dtype of the model
SINGLE = ("gemma", "gemma-2, norms before and behind")


def _settled(model: nn.Module, dtype: torch.dtype = torch.float64) -> Any:
    """Give every norm a gain and a shift that are not the identity, and every branch something to say."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, module in model.named_modules():
            if "Norm" in type(module).__name__:
                for value in module.parameters(recurse=False):
                    value.add_(0.3 * torch.randn(value.shape, generator=draw))
            elif isinstance(module, nn.Linear | Conv1D) and "head" not in name:
                module.weight.copy_(torch.randn(module.weight.shape, generator=draw) / 4)
                if module.bias is not None:
                    module.bias.copy_(torch.randn(module.bias.shape, generator=draw) / 4)
    return model.to(dtype).eval()


def _inputs(model: nn.Module) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    if getattr(model, "main_input_name", "") == "pixel_values":
        return {"pixel_values": torch.randn(3, 1, 8, 8, generator=draw).to(next(model.parameters()).dtype)}
    ids = torch.randint(2, 30, (3, 9), generator=draw)
    config: Any = model.config
    return {"input_ids": ids, "decoder_input_ids": ids} if config.is_encoder_decoder else {"input_ids": ids}


def _output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(**_inputs(model))[0]
    return y


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_outputs_stay_and_every_norm_goes_where_it_can(case: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    build, goes, stays = CASES[case]
    model = _settled(build(), dtype)
    before, kept = _output(model), copy.deepcopy(model.state_dict())
    plan = plan_folds(model)
    assert {each.name: set(each.readers) for each in plan if each.readers} == goes
    assert {each.name for each in plan if not each.readers} == stays.keys()
    assert all(stays[each.name] in each.reason for each in plan if not each.readers), [str(each) for each in plan]
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items()), "a plan changes nothing"
    fold(model)
    tolerance = 1e-12 if dtype == torch.float64 and case not in SINGLE else 1e-6
    scale = max(1.0, float(before.abs().max()))
    torch.testing.assert_close(_output(model), before, rtol=0, atol=tolerance * scale)
    norms = {name: module for name, module in model.named_modules() if "Norm" in type(module).__name__}
    plain = {
        name
        for name, module in norms.items()
        if torch.equal(module.weight, torch.full_like(module.weight, 1.0 - ("Gemma" in type(module).__name__)))
    }
    assert plain == goes.keys()
    assert all(not module.bias.any() for name, module in norms.items() if name in goes and hasattr(module, "bias"))
    assert model.state_dict().keys() == kept.keys()
    assert {name for name, value in model.state_dict().items() if not torch.equal(value, kept[name])} == {
        f"{name}.{leaf}"
        for norm, readers in goes.items()
        for name in (norm, *readers)
        for leaf in ("weight", "bias")
        if f"{name}.{leaf}" in kept and (leaf == "weight" or f"{norm}.bias" in kept)
    }
    if goes:
        for name in goes:  # the same without the weights of the readers is another model
            reset_gain(model.get_submodule(name))
        model.load_state_dict(
            {name: value for name, value in kept.items() if not any(name.startswith(f"{norm}.") for norm in goes)},
            strict=False,
        )
        assert float((_output(model) - before).abs().max()) > 1e-3 * scale, "the norms must do something"


@pytest.mark.parametrize("case", [name for name in CASES if name.split(",")[0] in ("llama", "gpt-2", "qwen3", "gemma")])
def test_generation_with_a_cache_is_the_same_token_for_token(case: str) -> None:
    torch.manual_seed(0)
    model = _settled(CASES[case][0]())
    model.generation_config.eos_token_id = None
    prompt: Any = {"input_ids": _inputs(model)["input_ids"], "attention_mask": torch.ones(3, 9, dtype=torch.long)}
    options: Any = {"max_new_tokens": 12, "use_cache": True, "output_logits": True, "return_dict_in_generate": True}
    found = []
    for folded in (False, True):
        if folded:
            fold(model)
        for sample in (False, True):
            torch.manual_seed(5)
            found.append(model.generate(**prompt, **options, do_sample=sample))
    for before, after in zip(found[:2], found[2:], strict=True):
        assert before.sequences.shape == (3, 21)
        assert torch.equal(before.sequences, after.sequences)
        torch.testing.assert_close(
            torch.stack(after.logits), torch.stack(before.logits), rtol=0, atol=1e-6 if case in SINGLE else 1e-11
        )
    assert len(set(found[1].sequences[:, 9:].flatten().tolist())) > 5, "one token over and over would show little"


@pytest.mark.parametrize("case", [name for name in CASES if name != "bert, post-norm"])
def test_a_folded_model_is_saved_and_loaded_as_any_other(case: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = fold(_settled(CASES[case][0]()))
    expected = _output(model)
    model.save_pretrained(tmp_path)
    again, told = type(model).from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float64)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert torch.equal(_output(again.eval()), expected)
    fresh = CASES[case][0]().double().eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(_output(fresh), expected)
    twice = copy.deepcopy(model)
    assert all(torch.equal(value, twice.state_dict()[name]) for name, value in fold(model).state_dict().items())


def test_an_example_may_be_given_and_a_part_of_a_model_has_no_configuration() -> None:
    torch.manual_seed(0)
    model = _settled(_causal("Llama", tie_word_embeddings=False)())
    ids = _inputs(model)["input_ids"]
    assert plan_folds(model, ids) == plan_folds(model) == plan_folds(model, {"input_ids": ids[:1]})
    assert own_example(model.model.layers) is None
    fold(model.train())
    assert not torch.equal(model.model.norm.weight, torch.ones_like(model.model.norm.weight)), "not in training"


def test_folding_into_a_conv1d_by_definition() -> None:
    torch.manual_seed(0)
    layer, x, a, c = (
        Conv1D(5, 4).double(),
        torch.randn(2, 3, 4).double(),
        torch.randn(4).double(),
        torch.randn(4).double(),
    )
    expected = layer(a * x + c)
    torch.testing.assert_close(fold_affine(layer, a, c)(x), expected, rtol=0, atol=1e-13)
    assert layer.weight.shape == (4, 5)
    assert layer.weight.is_contiguous()
    with pytest.raises(BadInput, match="of 5 input channels is needed"):
        fold_affine(layer, torch.ones(5), None)


class _TwiceNorm(nn.Module):
    """Not linear in its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(4)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight * self.weight


class _GatedNorm(nn.Module):
    """Its second input is added, which a trace shows and a trial with one input does not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(4)), 1e-6

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight
        return x if gate is None else x + gate


class _Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = _GatedNorm(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.norm(x, x.tanh()))
        return y


def test_gains_of_norms_of_anybodys_make() -> None:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    torch.manual_seed(0)
    for kind, offset in ((LlamaRMSNorm, 0.0), (GemmaRMSNorm, 1.0)):
        norm = kind(4).double()
        norm.weight.data.uniform_()
        weight, x = norm.weight.detach().clone(), torch.randn(3, 4).double()
        found = gain_of(norm)
        assert found is not None
        torch.testing.assert_close(found[0], weight + offset)
        assert found[1] is None
        assert torch.equal(norm.weight.detach(), weight), "it is tried out on a copy"
        y = norm(x)
        reset_gain(norm)
        torch.testing.assert_close(norm(x) * found[0], y, rtol=1e-6, atol=1e-6)
    assert gain_of(nn.Linear(4, 4)) is None
    assert gain_of(nn.GroupNorm(2, 4)) is None
    assert gain_of(nn.GroupNorm(3, 3)) is None
    assert gain_of(nn.BatchNorm1d(3).eval()) is None
    assert gain_of(_TwiceNorm()) is None
    assert gain_of(_GatedNorm()) is not None
    model, x = _Gated().double().eval(), torch.randn(2, 4).double()
    before = model(x).detach()
    assert [each.reason for each in plan_folds(model, x)] == ["it takes more than one input"]
    torch.testing.assert_close(fold(model, x)(x).detach(), before, rtol=0, atol=0)
    with pytest.raises(BadInput, match="a norm with a weight is needed"):
        reset_gain(nn.LayerNorm(4, elementwise_affine=False))
