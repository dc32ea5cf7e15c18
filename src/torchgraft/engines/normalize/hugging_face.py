"""What is special to Hugging Face models when norms are folded: their RMS norms, their ``Conv1D``, what they save.

Nothing of transformers is imported; modules are known by what they hold and do.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.engines.normalize.placement import gain_offset
from torchgraft.errors import BadInput

__all__ = ["gain_of", "is_conv1d", "own_example", "reset_gain", "saved_by_name"]


def is_conv1d(layer: nn.Module) -> bool:
    """Say whether ``layer`` is transformers' ``Conv1D``: a linear layer whose weight is (D_in, D_out), as in GPT-2."""
    return type(layer).__name__ == "Conv1D" and type(layer).__module__ == "transformers.pytorch_utils"


def gain_of(norm: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Return a and c of a token norm of another's make, y = a n(x) + c a channel, in float64; ``None`` for others.

    Such a norm has "Norm" in the name of its class (``LlamaRMSNorm``, ``GemmaRMSNorm``, ``T5LayerNorm``), a ``weight``
    of one axis, perhaps a ``bias``, an ``eps`` or ``variance_epsilon``, and nothing else that it could depend on. What
    its weight does is tried out on a copy, in which Gemma's 1 + weight shows too.
    """
    held = dict(norm.named_parameters())
    weight, bias = held.get("weight"), held.get("bias")
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    plain = set(held) <= {"weight", "bias"} and not list(norm.buffers()) and not list(norm.children())
    if "Norm" not in type(norm).__name__ or not plain or weight is None or weight.ndim != 1 or epsilon is None:
        return None
    if weight.is_meta or len(weight) < 2 or (bias is not None and bias.shape != weight.shape):
        return None
    twin: Any = copy.deepcopy(norm).float().eval()
    draw = torch.Generator().manual_seed(0)
    x, (gain, shift) = torch.randn(2, 3, len(weight), generator=draw), torch.randn(2, len(weight), generator=draw)
    x, gain, shift = (value.to(weight.device) for value in (x, gain, shift))
    try:
        with torch.no_grad():
            offset = gain_offset(norm)
            twin.weight.fill_(1.0 - offset)
            if bias is not None:
                twin.bias.zero_()
            bare = twin(x)
            twin.weight.copy_(gain)
            if bias is not None:
                twin.bias.copy_(shift)
            given = twin(x)
    except Exception:  # a norm that takes other inputs may raise anything
        return None
    expected = (gain + offset) * bare + (shift if bias is not None else 0.0)
    if not isinstance(given, Tensor) or given.shape != x.shape:
        return None
    if not torch.allclose(given, expected, rtol=1e-4, atol=1e-5):
        return None
    return weight.detach().double() + offset, None if bias is None else bias.detach().double()


@torch.no_grad()
def reset_gain(norm: nn.Module) -> None:
    """Set the gain of ``norm`` to one and its shift to zero, in place; its parameters and their names stay."""
    weight, bias = norm.weight, getattr(norm, "bias", None)
    if not isinstance(weight, Tensor):
        raise BadInput(f"a norm with a weight is needed, got {norm}")
    offset = gain_offset(norm)
    weight.fill_(1.0 - offset)
    if isinstance(bias, Tensor):
        bias.zero_()


def saved_by_name(model: nn.Module, name: str) -> bool:
    """Say whether module ``name`` belongs to a model that ``from_pretrained`` builds anew from its configuration."""
    parts = name.split(".")
    owners = (model.get_submodule(".".join(parts[:count])) for count in range(len(parts)))
    return any(callable(getattr(owner, "save_pretrained", None)) for owner in owners)


def own_example(model: nn.Module) -> dict[str, Tensor] | None:
    """Return inputs on which a Hugging Face model can be traced, made from its configuration; ``None`` for others."""
    config = getattr(model, "config", None)
    if config is None or not callable(getattr(model, "save_pretrained", None)):
        return None
    name = getattr(model, "main_input_name", None)
    device = next((value.device for value in model.parameters()), torch.device("cpu"))
    if name == "input_ids" and isinstance(getattr(config, "vocab_size", None), int):
        ids = {"input_ids": torch.arange(8, device=device).remainder(config.vocab_size).view(2, 4)}
        if getattr(config, "is_encoder_decoder", False):
            ids["decoder_input_ids"] = ids["input_ids"].clone()
        return ids
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    if name == "pixel_values" and isinstance(size, int | list | tuple) and isinstance(channels, int):
        sides = (size, size) if isinstance(size, int) else tuple(size)
        dtype = next(value.dtype for value in model.parameters())
        return {"pixel_values": torch.zeros(2, channels, *sides, device=device, dtype=dtype)}
    return None
