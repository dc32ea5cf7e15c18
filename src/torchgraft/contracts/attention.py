"""The contract of attentions that stand in for softmax in models of Hugging Face, and of blocks without a T x T matrix.

For cards that declare ``attention-interface``: their module has a function ``attention`` without parameters of its own.
Generation is compared token for token, greedily, in float64, on tiny models whose weights are large enough for the
tokens to matter.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchgraft.catalogue import Card
from torchgraft.contracts.check import Check, CheckFailure, Subject, require
from torchgraft.contracts.sameness import close
from torchgraft.engines.attention.hugging_face import register

__all__ = ["CHECKS"]

_WORDS, _PROMPT, _NEW = 50, 7, 10
_LENGTH = 1024
_EXACT = 1e-11


class _Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's __init_subclass__
    """Notes the largest tensor that a computation makes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [value.numel() for value in tree_leaves(out) if isinstance(value, Tensor)]
        self.numbers = max([self.numbers, *sizes])
        return out


def _attention(subject: Subject) -> Any:
    found = getattr(subject.module, "attention", None)
    if not callable(found):
        raise CheckFailure(f"{subject.module.__name__} has no function attention")
    return found


def _drawn(tokens: int, *, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = ((1, tokens, 4, 8), (1, tokens, 2, 8), (1, tokens, 2, 8))
    return [torch.randn(shape, generator=draw, dtype=dtype) for shape in shapes]


def check_no_matrix_of_pairs_is_made(subject: Subject) -> None:
    """Forward and backward make no tensor with a number for every pair of tokens and head."""
    attention = _attention(subject)
    found = []
    for tokens in (_LENGTH, 2 * _LENGTH):
        q, k, v = (x.requires_grad_() for x in _drawn(tokens, dtype=torch.float32))
        with _Largest() as meter:
            attention(q, k, v, causal=True, training=False).sum().backward()
        found.append(meter.numbers)
    pairs = 4 * (2 * _LENGTH) ** 2
    require(found[1] < pairs / 3, f"a tensor of {found[1]} numbers at {2 * _LENGTH} tokens, {pairs} are all pairs")
    require(found[1] <= 2.2 * found[0], f"the largest tensor grows from {found[0]} to {found[1]} with twice the tokens")


def check_attention_sees_what_the_mask_says(subject: Subject) -> None:
    """Hidden keys and values make no difference, shared heads equal repeated ones, and the past is all there is."""
    attention = _attention(subject)
    q, k, v = _drawn(19)
    seen = torch.ones(1, 19, dtype=torch.bool)
    seen[:, 4:9] = False
    whole = attention(q, k, v, mask=seen)
    other_k, other_v = k.clone(), v.clone()
    other_k[:, 4:9], other_v[:, 4:9] = 7.0, -3.0
    close(attention(q, other_k, other_v, mask=seen), whole, _EXACT, "with other hidden keys")
    close(attention(q, k[:, seen[0]], v[:, seen[0]]), whole, _EXACT, "without the hidden keys")
    repeated = [x.repeat_interleave(2, dim=2) for x in (k, v)]
    close(attention(q, *repeated), attention(q, k, v), _EXACT, "with repeated heads")
    causal = attention(q, k, v, causal=True)
    close(attention(q[:, :6], k[:, :6], v[:, :6], causal=True), causal[:, :6], _EXACT, "of the first tokens alone")
    close(attention(q[:, -2:], k, v, causal=True), causal[:, -2:], _EXACT, "of the last tokens after the others")


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(40)  # errors only
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


def _models() -> dict[str, Callable[[], nn.Module]]:
    import transformers as hf

    common: dict[str, Any] = {"vocab_size": _WORDS, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2}
    wide: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    image: dict[str, Any] = {"image_size": 8, "patch_size": 2, "num_channels": 1, "initializer_range": 0.3}
    return {
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(num_key_value_heads=2, **wide, **common)),
        "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **common)),
        "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(max_position_embeddings=64, **wide, **common)),
        "vit": lambda: hf.ViTModel(hf.ViTConfig(**wide, **image)),
    }


def _model(subject: Subject, kind: str, *, converted: bool = True) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = _models()[kind]().double().eval()
    if converted:
        model.set_attn_implementation(register(f"check-{subject.card.key}", _attention(subject)))
    return model


def _words() -> Tensor:
    return torch.randint(3, _WORDS, (2, _PROMPT), generator=torch.Generator().manual_seed(1))


def _told(model: Any, words: Tensor, **options: Any) -> Tensor:
    told: Tensor = model.generate(
        words, max_new_tokens=_NEW, do_sample=False, pad_token_id=0, eos_token_id=None, **options
    )
    return told


def check_generation_needs_no_cache(subject: Subject) -> None:
    """A Llama and a GPT-2 tell the same with and without a cache, greedily, token for token."""
    with _quiet():
        for kind in ("llama", "gpt2"):
            model, words = _model(subject, kind), _words()
            with_cache, without = (_told(model, words, use_cache=kept) for kept in (True, False))
            require(torch.equal(with_cache, without), f"{kind}: {with_cache[0].tolist()} and {without[0].tolist()}")


def check_left_padding_does_not_matter(subject: Subject) -> None:
    """A Llama and a GPT-2 tell the same after a prompt with padding before it."""
    with _quiet():
        for kind in ("llama", "gpt2"):
            model, words = _model(subject, kind), _words()
            padding = torch.zeros(2, 3, dtype=torch.long)
            seen = torch.cat([padding, torch.ones_like(words)], dim=1)
            plain = _told(model, words)
            padded = _told(model, torch.cat([padding, words], dim=1), attention_mask=seen)[:, 3:]
            require(torch.equal(plain, padded), f"{kind}: {plain[0].tolist()} and padded {padded[0].tolist()}")


def check_encoders_take_it(subject: Subject) -> None:
    """A BERT and a ViT run with it, padding does not matter to the BERT, and it is not softmax that ran."""
    with _quiet(), torch.no_grad():
        words = _words()
        more = torch.cat([words, torch.zeros(2, 3, dtype=torch.long)], dim=1)
        seen = torch.cat([torch.ones_like(words), torch.zeros(2, 3, dtype=torch.long)], dim=1)
        model = _model(subject, "bert")
        plain = model(words).logits
        close(model(more, attention_mask=seen).logits[:, :_PROMPT], plain, 1e-9, "with padding behind")
        image = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        found = _model(subject, "vit")(image).last_hidden_state
        require(bool(found.isfinite().all()), "the ViT's output is not finite")
        if "equals softmax in eval mode" not in subject.card.oracles:
            same = _model(subject, "bert", converted=False)(words).logits
            require(not torch.allclose(same, plain), "the model computes softmax attention still")


def check_a_model_learns_through_it(subject: Subject) -> None:
    """In training every parameter of a Llama gets a finite gradient."""
    with _quiet():
        model = _model(subject, "llama").train()
        model(_words(), labels=_words()).loss.backward()
        for name, value in model.named_parameters():
            require(value.grad is not None, f"{name} gets no gradient")
            require(bool(value.grad.isfinite().all()), f"the gradient of {name} is not finite")


def _applies(card: Card) -> bool:
    return "attention-interface" in card.capabilities


def _in_models(card: Card) -> bool:
    return _applies(card) and importlib.util.find_spec("transformers") is not None


CHECKS: tuple[Check, ...] = (
    Check(check_no_matrix_of_pairs_is_made, _applies),
    Check(check_attention_sees_what_the_mask_says, _applies),
    Check(check_generation_needs_no_cache, _in_models),
    Check(check_left_padding_does_not_matter, _in_models),
    Check(check_encoders_take_it, _in_models),
    Check(check_a_model_learns_through_it, _in_models),
)
