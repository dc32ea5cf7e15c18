"""Attentions under names that models of transformers know: ``model.set_attn_implementation("torchgraft:sigmoid")``.

transformers looks implementations up in a table of functions. Nothing is entered there on import: whoever wants the
names calls ``torchgraft.register_attention()``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from torchgraft.engines.attention.masks import Given, Mask
from torchgraft.errors import BadInput

__all__ = ["FixedAttention", "as_implementation", "attach", "register"]

#: Name of the module of its own that :func:`attach` gives to an attention.
_MIX = "torchgraft_mix"


class FixedAttention(Protocol):
    """An attention without parameters of its own."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Mask | Tensor | None = None,
        causal: bool = False,
        scale: float | None = None,
        training: bool = False,
    ) -> Tensor:
        """Return what is mixed: (B, T, H, K), (B, S, G, K), (B, S, G, V) -> (B, T, H, V)."""


def as_implementation(attention: FixedAttention | None) -> Any:
    """Return ``attention``, or that of the module itself, with the arguments and results that transformers expects."""

    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        is_causal: bool | None = None,
        **rest: Any,
    ) -> tuple[Tensor, None]:
        if rest.get("softcap") is not None:
            raise BadInput("this attention has no soft cap; choose another implementation for this model")
        queries = query.shape[2]
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        causal = causal and attention_mask is None and queries > 1
        if causal and key.shape[2] > queries:  # a cache of fixed size, of which only the beginning is filled
            key, value = key[:, :, :queries], value[:, :, :queries]
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        mask = None if attention_mask is None else Given(_pairs(attention_mask, k.shape[1]))
        mix: Any = module.get_submodule(_MIX) if attention is None else attention
        mixed: Tensor = mix(q, k, v, mask=mask, causal=causal, scale=scaling, training=module.training)
        return mixed.contiguous(), None

    return forward


def _pairs(mask: Tensor, keys: int) -> Tensor:
    """Return True where a pair may be seen, from booleans or from numbers that are added to scores."""
    mask = mask[..., :keys]
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def attach(model: nn.Module, build: Callable[[int, int, int], nn.Module]) -> list[str]:
    """Give every self-attention of a Hugging Face model a module that mixes, with parameters of its own.

    The new modules stand inside the attentions, train with the model and are saved with its state dict; projections,
    rotation, cache and masks stay those of transformers.

    Args:
        model: changed in place.
        build: from heads of queries, heads of keys and the size of a head to a module that is called as a
            :class:`FixedAttention` is.

    Returns:
        The names of the attentions.

    Raises:
        BadInput: the model has no attention that takes implementations, or transformers is not installed.
    """
    found = [name for name, module in model.named_modules() if _takes_implementations(module)]
    if not found or not hasattr(model, "set_attn_implementation"):
        raise BadInput(f"{type(model).__name__} has no attention whose implementation transformers lets one choose")
    for name in found:
        module: Any = model.get_submodule(name)
        heads = int(module.config.num_attention_heads)
        groups = int(getattr(module.config, "num_key_value_heads", None) or heads)
        size = int(getattr(module, "head_dim", 0) or module.config.hidden_size // heads)
        anchor = next(module.parameters())
        module.add_module(_MIX, build(heads, groups, size).to(anchor).train(module.training))
    choose: Any = model.set_attn_implementation
    choose(register("attached", None))
    return found


def _takes_implementations(module: nn.Module) -> bool:
    kind = type(module)
    named = kind.__name__.endswith(("Attention", "SelfAttention")) and kind.__module__.startswith("transformers.")
    return named and hasattr(module, "is_causal") and hasattr(module, "config")


def register(name: str, attention: FixedAttention | None) -> str:
    """Enter ``attention`` into the table of transformers as ``torchgraft:name``, and return that.

    With ``None`` each attention mixes by the module that :func:`attach` gave it.

    Raises:
        BadInput: transformers is not installed.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError:
        raise BadInput("attention for Hugging Face models needs: pip install torchgraft[hf]") from None
    full = f"torchgraft:{name}"
    AttentionInterface.register(full, as_implementation(attention))
    AttentionMaskInterface.register(full, sdpa_mask)
    return full
