"""What it means that two models, or the world before and after, are the same: bit for bit, and said with numbers."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchgraft.contracts.check import require
from torchgraft.engines.surgery.edits import history

__all__ = ["close", "equal", "fittings", "same_output", "same_state", "surroundings"]


def equal(left: Any, right: Any) -> bool:
    """Say whether two entries of a state dict are equal, shape and dtype included."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.shape == right.shape and left.dtype == right.dtype and bool(torch.equal(left, right))
    return bool(left == right)


def same_state(left: nn.Module, right: nn.Module, what: str) -> None:
    """Require that two models have the same state dict, bit for bit and in the same order."""
    ours, theirs = left.state_dict(), right.state_dict()
    require(list(ours) == list(theirs), f"{what}: names differ in {sorted(ours.keys() ^ theirs.keys())[:4]}")
    moved = [name for name in ours if not equal(ours[name], theirs[name])]
    require(not moved, f"{what}: {len(moved)} of {len(ours)} tensors differ, first {moved[:1]}")


def same_output(left: Tensor, right: Tensor, what: str) -> None:
    """Require that two outputs are the same, bit for bit."""
    require(left.shape == right.shape, f"{what}: shapes {tuple(left.shape)} and {tuple(right.shape)}")
    gap = (left.double() - right.double()).abs().max().item()
    require(bool(torch.equal(left, right)), f"{what}: outputs differ by up to {gap:.3g}")


def close(left: Tensor, right: Tensor, tolerance: float, what: str) -> None:
    """Require that no entry differs by more than ``tolerance`` times the largest entry (or 1, if that is larger)."""
    require(left.shape == right.shape, f"{what}: shapes {tuple(left.shape)} and {tuple(right.shape)}")
    if left.numel() == 0:
        return
    left, right = left.detach().double(), right.detach().double()
    gap = (left - right).abs().max().item() / max(1.0, right.abs().max().item())
    require(gap <= tolerance, f"{what}: differs by {gap:.3g} of its size, {tolerance:.0e} is allowed")


def surroundings() -> dict[str, Any]:
    """Return everything outside a model that a method may not change, by name."""
    return {
        "torch's random state": torch.get_rng_state().tolist(),
        "Python's random state": random.getstate(),
        "numpy's random state": [str(part) for part in np.random.get_state()],
        "the number of threads": torch.get_num_threads(),
        "the default dtype": torch.get_default_dtype(),
        "gradient mode": torch.is_grad_enabled(),
        "deterministic mode": torch.are_deterministic_algorithms_enabled(),
    }


def fittings(model: nn.Module) -> dict[str, Any]:
    """Return what a model carries besides its values, by name: modes, hooks, identities, gradients, history."""
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    return {
        "training modes": [module.training for module in model.modules()],
        "hooks": [len(getattr(module, table)) for module in model.modules() for table in tables],
        "modules": [(name, id(module), type(module)) for name, module in model.named_modules()],
        "parameters": [(name, id(value), value.requires_grad) for name, value in model.named_parameters()],
        "gradients": [value.grad is None for value in model.parameters()],
        "edit history": history(model),
    }
