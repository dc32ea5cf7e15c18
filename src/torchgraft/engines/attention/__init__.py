"""Attention as a pipeline of small functions, blocked so that memory is linear in the number of tokens."""

from __future__ import annotations

from torchgraft.engines.attention.attend import FORMS, Form, attend, attention_weights
from torchgraft.engines.attention.masks import Both, Causal, Given, Mask, Padding, Window
from torchgraft.engines.attention.position import Alibi, Harmonic
from torchgraft.engines.attention.rows import Rows
from torchgraft.engines.attention.stages import (
    L1,
    Chain,
    Dot,
    Gaussian,
    Normalize,
    Reweighted,
    Score,
    Shifted,
    Softmax,
    Stage,
    Tempered,
    Transform,
    Unnormalized,
    dot,
    exp,
    l1,
    relu,
    sigmoid,
    softmax,
    softplus,
    unnormalized,
)

__all__ = [
    "FORMS",
    "L1",
    "Alibi",
    "Both",
    "Causal",
    "Chain",
    "Dot",
    "Form",
    "Gaussian",
    "Given",
    "Harmonic",
    "Mask",
    "Normalize",
    "Padding",
    "Reweighted",
    "Rows",
    "Score",
    "Shifted",
    "Softmax",
    "Stage",
    "Tempered",
    "Transform",
    "Unnormalized",
    "Window",
    "attend",
    "attention_weights",
    "dot",
    "exp",
    "l1",
    "relu",
    "sigmoid",
    "softmax",
    "softplus",
    "unnormalized",
]
