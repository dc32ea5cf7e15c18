"""Linear state spaces x' = A x + B u, y = C x: memories to start from, discretisation, and one kernel for many tokens.

After discretisation x_t = Abar x_{t-1} + Bbar u_t and y_t = C x_t, which is also the causal convolution of u with
(C Bbar, C Abar Bbar, C Abar^2 Bbar, ...). Everything here works on matrices with any leading dimensions, and what
needs Abar^0 ... Abar^{L-1} squares Abar O(log L) times and holds O(sqrt(L)) vectors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchgraft.errors import BadInput

__all__ = ["discretise", "hippo", "krylov_kernel", "state_output", "state_scan", "state_update"]

_MEASURES = ("legs", "legt", "random")
_METHODS = ("gbt", "zoh")


def hippo(measure: str, size: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return A and B of a memory of the past, in float64.

    Args:
        measure: ``"legs"`` keeps coefficients of the past in Legendre polynomials of exp(-age): recent inputs sharply,
            all of them somehow. ``"legt"`` keeps those of the last unit of time. ``"random"`` is a Gaussian matrix,
            shifted so that every eigenvalue has a real part of -1 at most; a control without memory by design.
        size: N.
        seed: of the random matrix.

    Shapes:
        (N, N), (N,).

    Example:
        >>> A, B = hippo("legs", 2)
        >>> [[round(a, 3) for a in row] for row in A.tolist()], [round(b, 3) for b in B.tolist()]
        ([[-1.0, -0.0], [-1.732, -2.0]], [1.0, 1.732])

    Raises:
        BadInput: the measure is unknown or the size is below 1.
    """
    if measure not in _MEASURES:
        raise BadInput(f"measure must be one of {_MEASURES}, got {measure!r}")
    if size < 1:
        raise BadInput(f"the size of a state must be at least 1, got {size}")
    n = torch.arange(size, dtype=torch.float64, device="cpu")
    root = (2 * n + 1).sqrt()
    if measure == "random":
        draw = torch.Generator().manual_seed(seed)
        both = torch.randn(size + 1, size, generator=draw, dtype=torch.float64, device="cpu")
        A = both[:-1] / size**0.5
        shift = torch.linalg.eigvals(A).real.amax() + 1
        return A - torch.diag(shift.expand(size)), both[-1]
    if measure == "legs":
        return -(torch.outer(root, root).tril(-1) + torch.diag(n + 1)), root
    signs = 1 - 2 * ((n[:, None] - n) % 2)  # (-1)^(n - k)
    return -torch.outer(root, root) * torch.where(n[:, None] < n, signs, 1.0), root


def _checked(A: Tensor, B: Tensor, method: str, alpha: float) -> None:
    if A.ndim < 2 or A.shape[-1] != A.shape[-2] or B.shape[-1] != A.shape[-1]:
        raise BadInput(f"A must be (..., N, N) and B (..., N), got {tuple(A.shape)} and {tuple(B.shape)}")
    if method not in _METHODS:
        raise BadInput(f"method must be one of {_METHODS}, got {method!r}")
    if not 0.0 <= alpha <= 1.0:
        raise BadInput(f"alpha must be in [0, 1], got {alpha}")


def discretise(A: Tensor, B: Tensor, dt: Tensor, *, method: str = "gbt", alpha: float = 0.5) -> tuple[Tensor, Tensor]:
    """Return Abar and Bbar such that x_t = Abar x_{t-1} + Bbar u_t follows x' = A x + B u over steps of ``dt``.

    Args:
        A, B: the continuous system.
        dt: the steps, above 0.
        method: ``"gbt"``, the generalised bilinear rule, or ``"zoh"``, exact where the input is constant within a step.
        alpha: of ``"gbt"``: 0 is Euler's rule, 1/2 the bilinear one, 1 backward Euler.

    Shapes:
        A: (N, N); B: (N,); dt: (...) -> (..., N, N), (..., N).

    Example:
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> Abar, Bbar = discretise(-one[:, None], one, torch.tensor(0.5).double(), alpha=1.0)
        >>> round(Abar.item(), 4), round(Bbar.item(), 4)
        (0.6667, 0.3333)

    Raises:
        BadInput: shapes, method or alpha do not fit.
    """
    _checked(A, B, method, alpha)
    size = A.shape[-1]
    eye = torch.eye(size, dtype=A.dtype, device=A.device)
    step = dt[..., None, None] * A  # (..., N, N)
    into = (dt[..., None] * B)[..., None]  # (..., N, 1)
    if method == "gbt":
        right = torch.cat([eye + (1 - alpha) * step, into], dim=-1)
        both = torch.linalg.solve(eye - alpha * step, right)
    else:  # exp of [[A, B], [0, 0]] dt holds both
        below = torch.zeros_like(step[..., :1, :])
        square = torch.cat([torch.cat([step, into], -1), torch.cat([below, below[..., :1]], -1)], dim=-2)
        both = torch.linalg.matrix_exp(square)[..., :size, :]
    return both[..., :size], both[..., size]


def state_update(
    A: Tensor, B: Tensor, dt: Tensor, x: Tensor, u: Tensor, *, method: str = "gbt", alpha: float = 0.5
) -> Tensor:
    """Return the state one step of ``dt`` after ``x`` under the input ``u``; ``"gbt"`` solves for it and forms no Abar.

    Shapes:
        A: (N, N); B: (N,); dt: (D,); x: (batch, D, N); u: (batch, D) -> (batch, D, N).
    """
    if method == "zoh":
        Abar, Bbar = discretise(A, B, dt, method=method)
        return torch.einsum("dnm,bdm->bdn", Abar, x) + Bbar * u[..., None]
    _checked(A, B, method, alpha)
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    right = x + (1 - alpha) * dt[:, None] * (x @ A.mT) + dt[:, None] * B * u[..., None]
    moved: Tensor = torch.linalg.solve(eye - alpha * dt[:, None, None] * A, right.permute(1, 2, 0))  # (D, N, batch)
    return moved.permute(2, 0, 1)


def _powers(A: Tensor, count: int) -> list[Tensor]:
    """Return A, A^2, A^4, ..., ``count`` of them."""
    found = [A]
    while len(found) < count:
        found.append(found[-1] @ found[-1])
    return found


def _halves(length: int) -> tuple[int, int]:
    """Return a and b with 2^a 2^b >= length and a, b as equal as can be."""
    bits = max(length - 1, 0).bit_length()
    return bits // 2, bits - bits // 2


def _rows(C: Tensor, powers: list[Tensor]) -> Tensor:
    """Return C A^0, C A^1, ... for 2^len(powers) of them, (..., M, N) -> (..., 2^a, M, N)."""
    rows = C[..., None, :, :]
    for power in powers:
        rows = torch.cat([rows, rows @ power[..., None, :, :]], dim=-3)
    return rows


def _columns(x: Tensor, powers: list[Tensor]) -> Tensor:
    """Return A^0 x, A^1 x, ... for 2^len(powers) of them, (..., N, S) -> (..., 2^b, N, S)."""
    columns = x[..., None, :, :]
    for power in powers:
        columns = torch.cat([columns, power[..., None, :, :] @ columns], dim=-3)
    return columns


def _products(A: Tensor, left: Tensor, right: Tensor, length: int) -> Tensor:
    """Return left A^l right for l < length, (..., M, N), (..., N, S) -> (..., length, M, S)."""
    inner, outer = _halves(length)
    powers = _powers(A, inner + outer)
    rows = _rows(left, powers[:inner])  # (..., 2^a, M, N)
    columns = _columns(right, powers[inner : inner + outer])  # (..., 2^b, N, S), steps of 2^a
    found = torch.einsum("...imn,...jns->...jims", rows, columns)
    return found.flatten(-4, -3)[..., :length, :, :]


def krylov_kernel(A: Tensor, B: Tensor, C: Tensor, length: int) -> Tensor:
    """Return the kernel (C B, C A B, ..., C A^{L-1} B) of the convolution that a discrete system is.

    Args:
        A, B, C: the discrete system, M outputs.
        length: L.

    Shapes:
        A: (..., N, N); B: (..., N); C: (..., M, N) -> (..., M, L).

    Example:
        >>> half, one = torch.tensor([[0.5]]), torch.ones(1)
        >>> krylov_kernel(half, one, one[None], 4).tolist()
        [[1.0, 0.5, 0.25, 0.125]]

    Raises:
        BadInput: ``length`` is below 1.
    """
    if length < 1:
        raise BadInput(f"length must be at least 1, got {length}")
    return _products(A, C, B[..., None], length)[..., 0].mT


def state_output(A: Tensor, C: Tensor, x: Tensor, length: int) -> Tensor:
    """Return what a state adds to the next ``length`` outputs, C A^t x for t = 1 ... L.

    Shapes:
        A: (D, N, N); C: (D, M, N); x: (B, D, N) -> (B, L, D, M).
    """
    found = _products(A, C @ A, x.permute(1, 2, 0), length)  # (D, L, M, B)
    return found.permute(3, 1, 0, 2)


def state_scan(A: Tensor, B: Tensor, u: Tensor, x: Tensor | None = None) -> Tensor:
    """Return the state after all of ``u``, A^T x + sum_t A^{T-1-t} B u_t, in O(log T) rounds.

    Shapes:
        A: (D, N, N); B: (D, N); u: (B, T, D); x: (B, D, N) -> (B, D, N).
    """
    tokens = u.shape[1]
    inner, outer = _halves(tokens)
    powers = _powers(A, max(tokens.bit_length(), inner + outer, 1))
    taps = _columns(B[..., None], powers[:inner])[..., 0]  # (D, 2^a, N): A^i B
    ages = torch.nn.functional.pad(u.flip(1), (0, 0, 0, (1 << inner + outer) - tokens))
    blocks = ages.reshape(len(u), 1 << outer, 1 << inner, u.shape[-1])  # (B, 2^b, 2^a, D)
    sums = torch.einsum("bjid,din->dbjn", blocks, taps)  # (D, B, 2^b, N)
    for power in powers[inner : inner + outer]:  # the second of each pair is older by as many tokens
        sums = sums[:, :, ::2] + sums[:, :, 1::2] @ power[:, None].mT
    last = sums[:, :, 0]
    if x is not None:
        moved = x.transpose(0, 1)
        for bit in range(tokens.bit_length()):
            if tokens >> bit & 1:
                moved = moved @ powers[bit].mT
        last = last + moved
    return last.transpose(0, 1)


def quasiseparable(measure: str, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return p, d, q, (N,) each, and T, (N, N) tridiagonal, with P (D + T^-1) Q = A of ``hippo(measure, size)``.

    Raises:
        BadInput: the measure is not ``"legs"`` or ``"legt"``.
    """
    if measure not in ("legs", "legt"):
        raise BadInput(f"only the measures 'legs' and 'legt' are of the structured form, got {measure!r}")
    A, root = hippo(measure, size)
    d = torch.zeros_like(root)
    if measure == "legs":  # n + 1 on the diagonal where the triangle of root root^T has 2 n + 1
        n = torch.arange(size, dtype=torch.float64, device="cpu")
        d = -n / (2 * n + 1)
    inverse = torch.linalg.inv(-A / torch.outer(root, root) - torch.diag(d))
    return -root, d, root, inverse.tril(1).triu(-1)


def log_uniform(count: int, low: float, high: float) -> Tensor:
    """Return logarithms of ``count`` steps that are drawn log-uniformly between ``low`` and ``high``.

    Raises:
        BadInput: not 0 < low <= high.
    """
    if not 0 < low <= high:
        raise BadInput(f"the range of dt must rise from above 0, got {low} to {high}")
    return math.log(low) + torch.rand(count) * (math.log(high) - math.log(low))
