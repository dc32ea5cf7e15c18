"""The Triton kernels of flash-linear-attention as a backend of the linear recurrence, on CUDA."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from torchgraft.errors import BadInput, MissingExtra

__all__ = ["chosen", "installed", "run"]

#: Largest key size that its chunked delta-rule kernels take.
LARGEST_DELTA_KEY = 256


@functools.cache
def installed() -> bool:
    """Return whether the package is there; it is not imported for the answer."""
    return importlib.util.find_spec("fla") is not None


def _supported(q: Tensor, log_decay: Tensor | None, beta: Tensor | None) -> str | None:
    """Return why the kernels cannot take these inputs, or ``None`` where they can."""
    if q.device.type != "cuda":
        return f"the tensors are on {q.device.type}, the kernels need CUDA"
    if q.dtype == torch.float64:
        return "the kernels do not compute in float64"
    if beta is not None and log_decay is not None and log_decay.ndim == 4:
        return "it has no kernel here for the delta rule with a decay a channel"
    if beta is not None and q.shape[-1] > LARGEST_DELTA_KEY:
        return f"its delta-rule kernels take keys of at most {LARGEST_DELTA_KEY} channels, got {q.shape[-1]}"
    return None


def chosen(backend: str, q: Tensor, log_decay: Tensor | None, beta: Tensor | None, form: str) -> bool:
    """Return whether the kernels are to be used.

    Raises:
        MissingExtra: they are asked for and the package is not installed.
        BadInput: they are asked for and cannot take the inputs.
    """
    if backend == "torch" or form not in ("auto", "chunk"):
        if backend == "fla":
            raise BadInput(f"backend 'fla' has the forms 'auto' and 'chunk', got form={form!r}")
        return False
    problem = _supported(q, log_decay, beta)
    if backend == "fla":
        if not installed():
            raise MissingExtra("flash-linear-attention", "gpu")
        if problem is not None:
            raise BadInput(f"backend 'fla': {problem}")
        return True
    return problem is None and installed() and bool(q.numel())


def _operation(path: str, name: str) -> Any:  # the package has no types
    return getattr(importlib.import_module(path), name)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the outputs and the last state by the kernel that has this transition.

    Shapes: those of :func:`torchgraft.engines.recurrence.linear.linear_recurrence`.
    """
    options: dict[str, Any] = {"scale": scale, "initial_state": state, "output_final_state": True}
    if beta is not None:
        options["beta"] = beta
        if log_decay is None:
            kernel = _operation("fla.ops.delta_rule", "chunk_delta_rule")
        else:
            kernel = _operation("fla.ops.gated_delta_rule", "chunk_gated_delta_rule")
            options["g"] = (log_decay.expand(q.shape[:3]) if log_decay.ndim == 1 else log_decay).contiguous()
    elif log_decay is not None and log_decay.ndim == 4:
        kernel = _operation("fla.ops.gla", "chunk_gla")
        options["g"] = log_decay
    else:
        kernel = _operation("fla.ops.simple_gla", "chunk_simple_gla")
        if log_decay is None:
            options["g"] = None
        else:
            options["g"] = (log_decay.expand(q.shape[:3]) if log_decay.ndim == 1 else log_decay).contiguous()
    output, last = kernel(q.contiguous(), k.contiguous(), v.contiguous(), **options)
    return output, last
