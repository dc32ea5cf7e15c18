"""Turning softmax attention into linear attention: kernels, where they go, and how what was lost is recovered."""

from torchgraft.engines.linearize.convert import Linearize, attentions, linear_attentions
from torchgraft.engines.linearize.recover import attention_cross_entropy, linearize, mimic

__all__ = ["Linearize", "attention_cross_entropy", "attentions", "linear_attentions", "linearize", "mimic"]
