"""``torchgraft.linearize``: what is found, what is inherited, what is trained, and that a recipe replays."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.models import ByteTransformer, VisionTransformer
from torchgraft.bench.task import Split, Task
from torchgraft.contracts.subjects import case
from torchgraft.engines.linearize import linear_attentions, linearize, mimic
from torchgraft.engines.linearize.kernel import FeatureKernel, Heads, Kernel, softmax_attention
from torchgraft.engines.surgery.edits import apply_edits, edit_from_record, edit_to_record, history
from torchgraft.errors import BadInput
from torchgraft.parts.blocks.sequence_model import SequenceModel

_SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_LABELS: dict[str, Any] = {"num_labels": 3}
_IDS = torch.randint(0, 32, (3, 10), generator=torch.Generator().manual_seed(0))
_THERE = torch.tensor([[1] * 10, [1] * 6 + [0] * 4, [1] * 10])
_TOKENS = {"input_ids": _IDS, "attention_mask": _THERE}


def _bert() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.BertConfig(vocab_size=32, **_SIZES, **_LABELS)
    return transformers.BertForSequenceClassification(config), _TOKENS


def _gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.GPT2Config(
        vocab_size=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None
    )
    return transformers.GPT2LMHeadModel(config), _TOKENS


def _llama() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.LlamaConfig(vocab_size=32, num_key_value_heads=2, **_SIZES)
    return transformers.LlamaForCausalLM(config), _TOKENS


def _vit() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.ViTConfig(image_size=8, patch_size=2, num_channels=1, **_SIZES, **_LABELS)
    return transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(3, 1, 8, 8)}


def _digits() -> tuple[nn.Module, dict[str, Tensor]]:
    return VisionTransformer(8, 2, 1, 10, d_model=32, depth=2), {"image": torch.randn(3, 1, 8, 8)}


def _bytes() -> tuple[nn.Module, dict[str, Tensor]]:
    return ByteTransformer(32, 16, d_model=32, depth=2), {"tokens": _IDS}


def _sequence() -> tuple[nn.Module, dict[str, Tensor]]:
    return SequenceModel(32, 2, "softmax-attention", vocab_size=32), {"tokens": _IDS}


def _encoder() -> tuple[nn.Module, dict[str, Tensor]]:
    layer = nn.TransformerEncoderLayer(32, 4, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return model, {"src": torch.randn(3, 10, 32), "src_key_padding_mask": _THERE == 0}


def _fused() -> tuple[nn.Module, dict[str, Tensor]]:
    return case("transformer").model, {"x": torch.randn(3, 6, 8)}


_CAUSAL = {"gpt2": _gpt2, "llama": _llama, "bytes": _bytes, "sequence": _sequence}
_ALL = {**_CAUSAL, "bert": _bert, "vit": _vit, "digits": _digits, "encoder": _encoder, "fused": _fused}


def _made(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model, inputs = _ALL[kind]()
    with torch.no_grad():  # small models of transformers begin with weights too small to tell attentions apart
        for name, value in model.named_parameters():
            if value.ndim > 1 and "embed" not in name:
                value.mul_(3.0)
    return model.eval(), inputs


def _answer(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output = model(**inputs)
    found: Tensor = getattr(output, "logits", output)
    if found.ndim == 3 and ("attention_mask" in inputs or "src_key_padding_mask" in inputs):
        found = found[_THERE.bool()]
    return found


def _as_softmax(kernel: Kernel, heads: Heads, causal: bool) -> Tensor:
    return softmax_attention(heads, causal=causal)


@pytest.mark.parametrize("to", ["hedgehog", "liger", "lit"])
@pytest.mark.parametrize("kind", _ALL)
def test_projections_are_read_rightly_and_only_the_kernel_is_new(kind: str, to: str) -> None:
    model, inputs = _made(kind)
    if to == "liger" and kind not in _CAUSAL:
        if kind == "encoder":  # which way it looks is decided when it is called
            with pytest.raises(BadInput, match="causal"):
                _answer(linearize(model, to), inputs)
        else:
            with pytest.raises(BadInput, match="liger mixes causal"):
                linearize(model, to)
        return
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = _answer(model, inputs)
    linear = linearize(model, to)
    places = linear_attentions(linear)
    assert len(places) == {"fused": 3}.get(kind, 2)
    found = _answer(linear, inputs)
    assert bool(found.isfinite().all())
    assert (found - expected).abs().max() > 1e-4
    for place in places.values():
        place.watch = _as_softmax
    assert torch.allclose(_answer(linear, inputs), expected, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    if kind != "encoder":  # whose fused projection is parted
        kept = {name: value for name, value in linear.state_dict().items() if ".kernel." not in name}
        assert kept.keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in kept.items())
    if to == "liger":
        assert linear.state_dict().keys() == before.keys()


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "encoder"])
def test_padding_changes_nothing(kind: str) -> None:
    model, inputs = _made(kind)
    linear = linearize(model, "hedgehog")
    with torch.no_grad():
        whole = linear(**inputs)
        short = linear(**{name: value[1:2, :6] for name, value in inputs.items()})
    whole, short = getattr(whole, "logits", whole), getattr(short, "logits", short)
    if kind == "bert":
        assert torch.allclose(whole[1], short[0], atol=1e-5)
    else:
        assert torch.allclose(whole[1, :6], short[0], atol=1e-5)


@pytest.mark.parametrize("kind", _ALL)
def test_edits_rebuild_the_model(kind: str) -> None:
    model, inputs = _made(kind)
    linear = linearize(model, "hedgehog")
    records = json.loads(json.dumps([edit_to_record(edit) for edit in history(linear)]))
    again = apply_edits(model, [edit_from_record(record) for record in records])
    assert again.state_dict().keys() == linear.state_dict().keys()
    assert torch.equal(_answer(again, inputs), _answer(linear, inputs))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_transformers_generate_without_a_cache(kind: str) -> None:
    model, _ = _made(kind)
    linear: Any = linearize(model, "liger")
    there = torch.ones(1, 4, dtype=torch.long)
    made = linear.generate(
        _IDS[:1, :4], attention_mask=there, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    with torch.no_grad():
        assert torch.equal(made[0, 4], linear(input_ids=_IDS[:1, :4]).logits[0, -1].argmax())
    with pytest.raises(BadInput, match="use_cache=False"):
        linear(input_ids=_IDS[:1, :4], use_cache=True)


@pytest.mark.parametrize("to", ["hedgehog", "liger", "lit"])
def test_generation_of_our_own_model_is_constant_size(to: str) -> None:
    model, _ = _made("sequence")
    linear: Any = linearize(model, to)
    tokens = torch.randint(0, 32, (2, 90))
    with torch.no_grad():
        whole = linear(tokens)
        logits, state = linear.prefill(tokens[:, :80])
        sizes = [{name: value.shape for name, value in each.items()} for each in state]
        for place in range(80, 90):
            logits, state = linear.step(tokens[:, place], state)
            assert torch.allclose(logits, whole[:, place], atol=1e-4)
    assert [{name: value.shape for name, value in each.items()} for each in state] == sizes
    assert linear.generate(tokens[:, :5], max_new_tokens=4, temperature=0).shape == (2, 9)


def test_a_sequence_model_knows_its_new_mixer(tmp_path: Any) -> None:
    model, inputs = _made("sequence")
    linear: Any = linearize(model, "liger", options={"window": 4})
    linear.save_pretrained(tmp_path)
    again = SequenceModel.from_pretrained(tmp_path)
    assert torch.equal(_answer(again, inputs), _answer(linear, inputs))


def _task(model: nn.Module) -> Task:
    draw = torch.Generator().manual_seed(1)
    x = torch.randint(0, 32, (64, 12), generator=draw).sort(dim=1).values
    data = Split(x, x.roll(-1, 1))
    loss = lambda out, target: F.cross_entropy(out.flatten(0, 1), target.flatten())  # noqa: E731
    return Task(model, data, data, data, loss, lambda out, target: -out[:, 0, 0], batch_size=16)


def test_mimicry_moves_the_maps_only_and_brings_the_weights_nearer() -> None:
    model, _ = _made("bytes")
    task = _task(model)
    linear = linearize(model, "hedgehog")
    before = {name: value.clone() for name, value in linear.state_dict().items()}
    losses = mimic(linear, task, steps=30)
    moved = {name for name, value in linear.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if ".kernel." in name}
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert all(value.requires_grad for value in linear.parameters())
    assert all(place.watch is None for place in linear_attentions(linear).values())
    with pytest.raises(BadInput, match="features to learn"):
        mimic(linearize(model, "liger"), task, steps=1)


def test_low_rank_recovery_moves_queries_keys_and_values_only() -> None:
    for kind in ("bytes", "sequence", "llama"):
        model, _ = _made(kind)
        task = _task(model)
        if kind == "llama":
            loss = lambda out, target: F.cross_entropy(out.logits.flatten(0, 1), target.flatten())  # noqa: E731
            task.loss = loss
        before = model.state_dict()
        linear = linearize(model, "liger", task=task, steps=3, rank=2)
        after = linear.state_dict()
        assert after.keys() == before.keys()
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved
        for name in moved:
            assert any(part in name for part in ("query", "key", "value", "qkv", "q_proj", "k_proj", "v_proj"))
            gap = (after[name] - before[name]).double()
            assert int(torch.linalg.matrix_rank(gap, rtol=1e-4)) <= (6 if "qkv" in name else 2)
        assert all(value.requires_grad for value in linear.parameters())


def test_the_same_seed_gives_the_same_model() -> None:
    model, _ = _made("bytes")
    task = _task(model)
    for to in ("hedgehog", "lit"):
        one, two = (linearize(model, to, task=task, mimic_steps=2, steps=2) for _ in range(2))
        other = linearize(model, to, task=task, mimic_steps=2, steps=2, seed=1)
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
        assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_what_cannot_be_done_is_refused() -> None:
    model, inputs = _made("encoder")
    linear: Any = linearize(model, "hedgehog")
    assert isinstance(next(iter(linear_attentions(linear).values())).kernel, FeatureKernel)
    odd = torch.zeros(10, 10)
    odd[0, 3] = float("-inf")
    with pytest.raises(BadInput, match="attn_mask"):
        linear(inputs["src"], mask=odd)
    with pytest.raises(BadInput, match="no softmax attention"):
        linearize(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(BadInput, match="no softmax attention"):
        linearize(model, ignore=["*"])
    with pytest.raises(BadInput, match="choose hedgehog, liger or lit"):
        linearize(model, "gated-linear-attention")
    with pytest.raises(BadInput, match="options"):
        linearize(model, options={"windows": 3})
    with pytest.raises(BadInput, match="tune"):
        linearize(model, tune="half")
