"""Every attention without parameters of its own, under a name that Hugging Face models know."""

from __future__ import annotations

import importlib

from torchgraft.catalogue import registry
from torchgraft.engines.attention.hugging_face import register

__all__ = ["attention_names", "register_attention"]


def attention_names() -> dict[str, str]:
    """Return short name -> key of the methods that can stand in for the attention of a Hugging Face model.

    Example:
        >>> attention_names()["sigmoid"]
        'sigmoid-attention'
    """
    cards = [card for card in registry.cards().values() if "attention-interface" in card.capabilities]
    return {card.key.replace("-attention", ""): card.key for card in cards}


def register_attention() -> tuple[str, ...]:
    """Make ``model.set_attn_implementation("torchgraft:sigmoid")`` and its like work, and return the names.

    Shapes, masks, caches and generation are those of transformers; weights of the model stay as they are, so a model
    that was trained with softmax needs training after the change.

    Raises:
        BadInput: transformers is not installed.
    """
    names = []
    for short, key in attention_names().items():
        card = registry.lookup(key)
        names.append(register(short, importlib.import_module(card.module_name).attention))
    return tuple(names)
