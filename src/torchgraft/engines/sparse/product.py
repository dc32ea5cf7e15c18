"""The product of a sparse matrix and a dense one, by any of four backends, as one operator that meters can count."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode

from torchgraft.bench.meters.counts import register_macs
from torchgraft.engines.sparse import kernel
from torchgraft.engines.sparse.pattern import Pattern
from torchgraft.errors import BadInput, nearest

__all__ = ["BACKENDS", "backends_for", "dense", "sparse_product"]

#: Every way to execute a sparse layer, in words.
BACKENDS = {
    "kernel": "torchgraft's C++ kernel",
    "csr": "torch's CSR product",
    "bsr": "torch's product of square blocks",
    "dense": "a dense product, the weight filled in at each call",
}


def dense(values: Tensor, columns: Tensor, pointers: Tensor, pattern: Pattern) -> Tensor:
    """Return the matrix with zeros where nothing is kept; gradients reach ``values``."""
    empty = values.new_zeros(pattern.rows * pattern.columns)
    return empty.scatter(0, pattern.places(columns, pointers), values).view(pattern.rows, pattern.columns)


def _dense(
    x: Tensor, values: Tensor, bias: Tensor | None, columns: Tensor, pointers: Tensor, pattern: Pattern, tokens: bool
) -> Tensor:
    weight = dense(values, columns, pointers, pattern)
    return F.linear(x, weight, bias) if tokens else F.conv1d(x, weight[:, :, None], bias)


def _kernel(
    x: Tensor, values: Tensor, bias: Tensor | None, columns: Tensor, pointers: Tensor, pattern: Pattern, tokens: bool
) -> Tensor:
    return kernel.product(
        x.contiguous(), values.contiguous(), columns, pointers, bias, rows=pattern.rows, tokens=tokens
    )


def _by_matrix(weight: Tensor, x: Tensor, bias: Tensor | None, rows: int, tokens: bool) -> Tensor:
    flat = x.t() if tokens else x.transpose(0, 1).flatten(1)  # (K, columns)
    out = weight @ flat  # (M, columns)
    if bias is not None:
        out = out.add_(bias[:, None])
    if tokens:
        return out.t().contiguous()
    return torch.unflatten(out, 1, (x.shape[0], x.shape[2])).transpose(0, 1).contiguous()


def _csr(
    x: Tensor, values: Tensor, bias: Tensor | None, columns: Tensor, pointers: Tensor, pattern: Pattern, tokens: bool
) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls CSR a beta feature at its first use
        weight = torch.sparse_csr_tensor(pointers, columns, values.detach(), (pattern.rows, pattern.columns))
        return _by_matrix(weight, x, bias, pattern.rows, tokens)


def _bsr(
    x: Tensor, values: Tensor, bias: Tensor | None, columns: Tensor, pointers: Tensor, pattern: Pattern, tokens: bool
) -> Tensor:
    r, c = pattern.block
    squares = values.detach().view(-1, c, r).transpose(1, 2).contiguous()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as above
        weight = torch.sparse_bsr_tensor(
            torch.div(pointers, c, rounding_mode="floor"),
            torch.div(columns[::c], c, rounding_mode="floor"),
            squares,
            (pattern.rows, pattern.columns),
        )
        return _by_matrix(weight, x, bias, pattern.rows, tokens)


_RUN: dict[str, Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor, Pattern, bool], Tensor]] = {
    "kernel": _kernel,
    "csr": _csr,
    "bsr": _bsr,
    "dense": _dense,
}


@functools.cache
def _works(backend: str, block: tuple[int, int]) -> bool:
    """Say whether ``backend`` gives the right numbers for this block here, tried on a small matrix."""
    if backend == "kernel" and not kernel.available():
        return False
    r, c = block
    pattern = Pattern(4 * r, 5 * c, block)
    columns, pointers = pattern.streams(torch.arange(0, pattern.blocks, 3))
    values = torch.linspace(-1, 1, len(columns) * r)
    try:
        for tokens in (True, False):
            x = torch.linspace(-2, 1, 5 * c * 36).view((36, 5 * c) if tokens else (2, 5 * c, 18))
            found = _RUN[backend](x, values, None, columns, pointers, pattern, tokens)
            expected = _dense(x, values, None, columns, pointers, pattern, tokens)
            if not torch.allclose(found, expected, rtol=1e-5, atol=1e-5):
                return False
    except (RuntimeError, AttributeError, NotImplementedError, TypeError):
        return False
    return True


def backends_for(block: tuple[int, int]) -> tuple[str, ...]:
    """Return the backends that can execute blocks of this size on this machine, rightly.

    Example:
        >>> backends_for((1, 1))[-1]
        'dense'
    """
    names = ["kernel", *(["csr"] if block == (1, 1) else []), *(["bsr"] if block[0] == block[1] > 1 else [])]
    return (*(name for name in names if _works(name, block)), "dense")


# The operator: a dispatch mode sees one product, whatever runs inside it. It has no gradient; layers that train fill
# their weight in and use torch's dense operators. -------------------------------------------------------------------

_library = torch.library.Library("torchgraft", "FRAGMENT")  # type: ignore[no-untyped-call]  # torch leaves it untyped
_library.define(  # type: ignore[no-untyped-call]  # as above
    "sparse_product(Tensor x, Tensor values, Tensor? bias, Tensor columns, Tensor pointers, int[] form, bool tokens, "
    "str backend) -> Tensor"
)


def _execute(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    columns: Tensor,
    pointers: Tensor,
    form: list[int],
    tokens: bool,
    backend: str,
) -> Tensor:
    rows, depth, r, c = form
    return _RUN[backend](x, values, bias, columns, pointers, Pattern(rows, depth, (r, c)), tokens)


def _shape(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    columns: Tensor,
    pointers: Tensor,
    form: list[int],
    tokens: bool,
    backend: str,
) -> Tensor:
    return x.new_empty((x.shape[0], form[0]) if tokens else (x.shape[0], form[0], x.shape[2]))


_library.impl("sparse_product", _execute, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]  # as above
torch.library.register_fake("torchgraft::sparse_product", _shape, lib=_library)
register_macs("torchgraft::sparse_product", lambda args, out: int(args[1].numel()) * (int(out.numel()) // args[5][0]))


def sparse_product(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    columns: Tensor,
    pointers: Tensor,
    pattern: Pattern,
    *,
    tokens: bool,
    backend: str,
) -> Tensor:
    """Return W x + bias for the sparse W, without a gradient.

    Args:
        x: the dense matrix.
        values: of W, in the order of the pattern.
        bias: one a row, or ``None``.
        columns, pointers: what :meth:`Pattern.streams` says.
        pattern: the shape of W and of its blocks.
        tokens: whether ``x`` is (N, K), a token after the other, and not (B, K, N).
        backend: a name in :data:`BACKENDS`. Other than float32 on a CPU is always executed dense.

    Shapes:
        (N, K) -> (N, M), or (B, K, N) -> (B, M, N).

    Raises:
        BadInput: the backend is unknown, or the shape does not fit.
    """
    if backend not in BACKENDS:
        raise BadInput(f"unknown sparse backend {backend!r}{nearest(backend, list(BACKENDS))}")
    if x.ndim != (2 if tokens else 3) or x.shape[1] != pattern.columns:
        raise BadInput(f"x must be (N, K) or (B, K, N) with K = {pattern.columns}, got {tuple(x.shape)}")
    plain = x.is_cpu and x.dtype == values.dtype == torch.float32 and (bias is None or bias.dtype == torch.float32)
    if not plain or not x.numel():
        backend = "dense"
    if type(x) is Tensor and _get_current_dispatch_mode() is None:  # nobody watches: spare the dispatcher's detour
        return _RUN[backend](x, values, bias, columns, pointers, pattern, tokens)
    form = [pattern.rows, pattern.columns, *pattern.block]
    out: Tensor = torch.ops.torchgraft.sparse_product(x, values, bias, columns, pointers, form, tokens, backend)
    return out
