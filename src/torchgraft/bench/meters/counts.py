"""Exact counts: parameters, multiply-accumulates of the operators that a forward pass executes, bytes of the file."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from torchgraft.bench.files import size_of_tensors
from torchgraft.bench.meters.forward import check_forward, plain_attention, resting
from torchgraft.bench.task import Inputs, call
from torchgraft.errors import BadInput

__all__ = ["CountingMode", "macs", "own_parameters", "params", "register_macs", "size"]


def own_parameters(module: nn.Module) -> list[Tensor]:
    """Return the parameters that ``module`` itself holds, without its children.

    A quantised module keeps its weights as integer buffers and names them in its class attribute
    ``parameter_buffers``; they count with their original number of elements, one an integer element.
    """
    held: list[Tensor] = [value for value in module._parameters.values() if value is not None]
    for name in getattr(module, "parameter_buffers", ()):
        value = getattr(module, name)
        if value is not None:
            held.append(value)
    if any(is_lazy(value) for value in held):
        raise BadInput(f"{type(module).__name__} has lazy parameters; run the model once on its example first")
    return held


def params(model: nn.Module) -> int:
    """Return the number of parameters of ``model``; a tensor that several modules share counts once.

    Weights that a quantised module of torchgraft stores as int8 count as the elements that they stand for, so that
    quantising changes the size of a model and not its parameter count.

    Example:
        >>> params(nn.Linear(3, 2))
        8
    """
    unique = {id(value): value for module in model.modules() for value in own_parameters(module)}
    return sum(value.numel() for value in unique.values())


def size(model: nn.Module) -> int:
    """Return the bytes of the safetensors file that the state dict of ``model`` makes, tied tensors stored once."""
    return size_of_tensors(model.state_dict())


def _matrix(args: tuple[Any, ...], out: Any) -> int:
    left, right = args[0], args[1]  # (..., M, K), (..., K, N)
    return int(left.numel()) * int(right.shape[-1])


def _matrix_added(args: tuple[Any, ...], out: Any) -> int:
    return _matrix(args[1:], out)


def _vector(args: tuple[Any, ...], out: Any) -> int:
    return int(args[0].numel())  # (M, K) @ (K,), or a dot product


def _vector_added(args: tuple[Any, ...], out: Any) -> int:
    return int(args[1].numel())


def _convolution(args: tuple[Any, ...], out: Any) -> int:
    x, weight, transposed = args[0], args[1], bool(args[6])
    # Every weight is used once for each output position; in a transposed convolution, once for each input position.
    positions = x.shape if transposed else out.shape
    spatial = weight.ndim - 2
    batch = int(math.prod(positions[: len(positions) - spatial - 1]))
    return batch * int(math.prod(positions[len(positions) - spatial :])) * int(weight.numel())


def _attention(args: tuple[Any, ...], out: Any) -> int:
    q, k, v = args[0], args[1], args[2]  # (B, H, T, K), (B, H_kv, S, K), (B, H_kv, S, V)
    pairs = int(math.prod(q.shape[:-1])) * int(k.shape[-2])
    return pairs * (int(q.shape[-1]) + int(v.shape[-1]))


def _linear(args: tuple[Any, ...], out: Any) -> int:
    return int(args[0].numel()) * int(out.shape[-1])  # (..., K) -> (..., N)


def _recurrent(args: tuple[Any, ...], out: Any) -> int:
    x, input_weight, state_weight = args[0], args[1], args[2]  # (T, B, D), (G, D), (G, D_h)
    return int(math.prod(x.shape[:2])) * (int(input_weight.numel()) + int(state_weight.numel()))


def _trilinear(args: tuple[Any, ...], out: Any) -> int:
    left, weight = args[0], args[1]  # nn.Bilinear: (N, I), (O, I, J); each weight is used once a sample
    return int(left.shape[0]) * int(weight.numel())


_FORMULAS: dict[str, Callable[[tuple[Any, ...], Any], int]] = {
    "aten::mm": _matrix,
    "aten::bmm": _matrix,
    "aten::_int_mm": _matrix,
    "aten::_scaled_mm": _matrix,
    "aten::addmm": _matrix_added,
    "aten::_addmm_activation": _matrix_added,
    "aten::addmm_": _matrix_added,
    "aten::baddbmm": _matrix_added,
    "aten::baddbmm_": _matrix_added,
    "aten::addbmm": _matrix_added,
    "aten::addbmm_": _matrix_added,
    "aten::mv": _vector,
    "aten::dot": _vector,
    "aten::vdot": _vector,
    "aten::addmv": _vector_added,
    "aten::addmv_": _vector_added,
    "aten::convolution": _convolution,
    "aten::_convolution": _convolution,
    "aten::linear": _linear,
    "aten::_weight_int8pack_mm": _linear,
    "aten::_weight_int4pack_mm_for_cpu": _linear,
    "aten::_dyn_quant_matmul_4bit": _linear,
    "aten::mkldnn_rnn_layer": _recurrent,
    "aten::_trilinear": _trilinear,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_flash_attention": _attention,
    "aten::_scaled_dot_product_efficient_attention": _attention,
    "aten::_scaled_dot_product_cudnn_attention": _attention,
    "aten::_scaled_dot_product_fused_attention_overrideable": _attention,
    "quantized::linear_dynamic": _linear,
    "quantized::linear_relu_dynamic": _linear,
    "quantized::linear": _linear,
    "onednn::qlinear_pointwise": _linear,
    "mkldnn::_linear_pointwise": _linear,
}


def register_macs(operator: str, formula: Callable[[tuple[Any, ...], Any], int]) -> None:
    """Say how many multiply-accumulates an operator of one's own takes, which cannot be seen from outside it.

    Args:
        operator: its name, such as ``"torchgraft::linear_recurrence"``.
        formula: its arguments in the order of its schema, and its result -> the number.
    """
    _FORMULAS[operator] = formula


class CountingMode(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Count the multiply-accumulates of every operator that runs while the mode is on.

    Args:
        on_count: called with the number of each operator that counts, as it runs.
    """

    def __init__(self, on_count: Callable[[int], None] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.total = 0
        self._on_count = on_count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``, broken into what it is made of where it has no formula of its own."""
        kwargs = kwargs or {}
        formula = _FORMULAS.get(func._schema.name)
        if formula is None and func is not torch.ops.prim.device.default:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if formula is not None:
            names = [argument.name for argument in func._schema.arguments]
            named = tuple(kwargs[name] for name in names[len(args) :] if name in kwargs)
            count = formula((*args, *named), out)
            self.total += count
            if self._on_count is not None:
                self._on_count(count)
        return out


def macs(model: nn.Module, example: Inputs) -> int:
    """Return the multiply-accumulates of one forward pass on the whole of ``example`` (not divided by its batch).

    Counted on the operators that run: linear layers, matrix products, convolutions (grouped and transposed ones
    too), recurrent layers, attention (a causal mask counts in full) and the integer products of quantised layers.
    Look-ups, element-wise operators, normalisation, pooling and transforms such as the FFT count nothing. A biased
    sum is no multiplication. Half of what ``torch.utils.flop_counter`` calls FLOPs, over more operators.

    Example:
        >>> macs(nn.Linear(3, 2), torch.ones(5, 3))
        30

    Raises:
        BadInput: the model fails on its example or returns NaN.
    """
    with resting(model), plain_attention():
        check_forward(model, example)
        counting = CountingMode()
        with torch.no_grad(), counting:
            call(model, example)
    return counting.total
