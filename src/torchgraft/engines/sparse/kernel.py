"""The sparse product in C++, compiled when it is first needed (:mod:`torchgraft.engines.native`), absent elsewhere."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from torchgraft.engines import native
from torchgraft.errors import BadInput

__all__ = ["available", "product"]

_SOURCE = Path(__file__).with_name("kernel.cpp")
_Function = Callable[..., int]


@functools.cache
def _function() -> _Function | None:
    """Return the kernel; ``None`` where it cannot be had."""
    library = native.library(_SOURCE)
    if library is None:
        return None
    found = library.torchgraft_sparse_product
    pointer, long, short = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    found.argtypes = [pointer] * 6 + [long] * 4 + [short] * 3
    found.restype = ctypes.c_int
    return found


def available() -> bool:
    """Say whether the kernel can be had here; the first call may compile it."""
    return _function() is not None


def product(
    x: Tensor, values: Tensor, columns: Tensor, pointers: Tensor, bias: Tensor | None, *, rows: int, tokens: bool
) -> Tensor:
    """Return W x for the sparse W, plus ``bias``.

    Args:
        x: float32 on the CPU, contiguous.
        values: of W, by row of blocks, column, row within the block.
        columns: the column of each group of values.
        pointers: where the columns of each row of blocks begin.
        bias: one a row, or ``None``.
        rows: M.
        tokens: whether the columns of ``x`` are contiguous: (N, K) -> (N, M); else (B, K, N) -> (B, M, N).

    Raises:
        BadInput: a tensor is not float32 and contiguous on the CPU, sizes do not fit, or a trace is being recorded.
    """
    function = _function()
    if function is None:
        raise BadInput("the sparse kernel is not to be had on this machine; use another backend")
    if native.traced():
        raise BadInput("the sparse kernel would leave no trace of itself in a program")
    block = rows // (pointers.shape[0] - 1)
    for name, held in (("x", x), ("values", values), ("bias", bias)):
        if held is not None and not (held.dtype == torch.float32 and held.is_cpu and held.is_contiguous()):
            raise BadInput(f"{name} must be float32, contiguous and on the CPU, got {held.dtype} on {held.device}")
    placed = values.shape[0] == columns.shape[0] * block and (bias is None or bias.shape[0] == rows)
    if x.ndim != (2 if tokens else 3) or not placed:
        raise BadInput(f"x must be (N, K) or (B, K, N), with a value a place and a bias a row; got x {tuple(x.shape)}")
    if tokens:
        batch, width, depth = 1, *x.shape
        out = x.new_empty(width, rows)
    else:
        batch, depth, width = x.shape
        out = x.new_empty(batch, rows, width)
    if out.numel():
        failed = function(
            x.data_ptr(),
            out.data_ptr(),
            values.data_ptr(),
            columns.data_ptr(),
            pointers.data_ptr(),
            None if bias is None else bias.data_ptr(),
            rows,
            depth,
            width,
            batch,
            block,
            int(tokens),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError("the sparse kernel found no memory for a tile")
    return out
