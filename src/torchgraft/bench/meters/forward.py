"""One forward pass under the conditions of a measurement: eval mode, no gradients, and everything put back after."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.bench.task import Inputs, call
from torchgraft.errors import BadInput

__all__ = ["check_forward", "leaf_tensors", "no_garbage_collection", "plain_attention", "resting", "synchronise"]


@contextmanager
def resting(model: nn.Module) -> Iterator[None]:
    """Hold ``model`` in eval mode; on leaving, every module gets back the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def plain_attention() -> Iterator[None]:
    """Switch off the fused encoder layer, whose insides a dispatch mode cannot see; the arithmetic is the same."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect what is young once, then keep the collector off; all of a large program would take longer than a pass."""
    enabled = gc.isenabled()
    gc.collect(1)
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def leaf_tensors(value: Any) -> list[Tensor]:
    """Return the tensors in ``value``: a tensor, or nested sequences, mappings and dataclass-like outputs of them."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [leaf for item in value.values() for leaf in leaf_tensors(item)]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in leaf_tensors(item)]
    fields = getattr(value, "__dataclass_fields__", None)
    if fields is not None:
        return [leaf for name in fields for leaf in leaf_tensors(getattr(value, name))]
    return []


def check_forward(model: nn.Module, example: Inputs) -> Any:
    """Run ``model`` once on ``example`` and return its output; caches that a model fills at first use are filled here.

    Raises:
        BadInput: the model fails on its example, or returns NaN.
    """
    try:
        with torch.no_grad():
            output = call(model, example)
    except BadInput:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise BadInput(f"the model fails on its example inputs: {type(error).__name__}: {reason}") from error
    for leaf in leaf_tensors(output):
        if leaf.is_floating_point() and bool(torch.isnan(leaf).any()):
            raise BadInput("the model returns NaN on its example inputs; nothing is measured on a broken model")
    return output


def cuda_device(model: nn.Module, example: Inputs) -> torch.device | None:
    """Return the CUDA device that the model or its example is on, or ``None``."""
    for tensor in (*model.parameters(), *model.buffers(), *leaf_tensors(example)):
        if tensor.device.type == "cuda":
            return tensor.device
    return None


def synchronise(device: torch.device | None) -> None:
    """Wait until ``device`` has finished; nothing to do on a CPU."""
    if device is not None:
        torch.cuda.synchronize(device)
