"""Temperatures inside Hugging Face models: they begin as nothing, and then need no cache and see no padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchgraft.engines.attention import Padding, attend
from torchgraft.engines.attention.hugging_face import attach
from torchgraft.errors import BadInput
from torchgraft.parts.mixers.selective_self_attention import Temperatures, make_selective

hf = pytest.importorskip("transformers")
COMMON: dict[str, Any] = {"vocab_size": 50, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2}
WIDE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(num_key_value_heads=2, **WIDE, **COMMON)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **COMMON)),
}


def model(kind: str) -> Any:
    torch.manual_seed(0)
    return MODELS[kind]().double().eval()


def words() -> Tensor:
    return torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", list(MODELS))
def test_it_begins_as_the_model_was(kind: str) -> None:
    plain, selective = model(kind), model(kind)
    assert len(make_selective(selective)) == 2
    assert torch.allclose(selective(words()).logits, plain(words()).logits, atol=1e-10)


@pytest.mark.parametrize("kind", list(MODELS))
def test_with_temperatures_neither_cache_nor_padding_matter(kind: str) -> None:
    plain, selective = model(kind), model(kind)
    names = make_selective(selective, position=True, alpha=1.0)
    for name in names:
        for parameter in selective.get_submodule(name).torchgraft_mix.parameters():
            nn.init.normal_(parameter, std=0.7)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    told = selective.generate(words(), **options)
    assert not torch.equal(told, plain.generate(words(), **options))
    assert torch.equal(told, selective.generate(words(), use_cache=False, **options))
    padding = torch.zeros(2, 3, dtype=torch.long)
    seen = torch.cat([padding, torch.ones_like(words())], dim=1)
    padded = selective.generate(torch.cat([padding, words()], dim=1), attention_mask=seen, **options)
    assert torch.equal(told, padded[:, 3:])
    selective.train()
    selective(words(), labels=words()).loss.backward()
    assert all(p.grad is not None for p in selective.parameters())


def test_positions_count_the_keys_that_are_seen() -> None:
    torch.manual_seed(0)
    layer = Temperatures(2, 2, 4, position=True, alpha=0.0).double()
    q, k, v = (torch.randn(1, 5, 2, 4, dtype=torch.float64) for _ in range(3))
    valid = torch.tensor([[True, False, True, True, False]])
    expected = attend(q * (1 + 0.5 * torch.tensor(3.0).double().log()), k, v, mask=valid)
    assert torch.allclose(layer(q, k, v, mask=Padding(valid)), expected, atol=1e-12)


def test_a_model_without_such_an_attention_is_refused() -> None:
    with pytest.raises(BadInput, match="no attention"):
        attach(nn.Linear(2, 2), lambda heads, groups, size: Temperatures(heads, groups, size))
