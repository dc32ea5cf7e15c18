"""The arithmetic of signs: their estimated gradients, eight of them to a byte, and products of sign vectors.

A product of sign vectors of length K is K - 2 d, d being the number of places where they differ; it is an integer, and
every backend gives the same one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchgraft.errors import BadInput, nearest

__all__ = [
    "BACKENDS",
    "Estimator",
    "Identity",
    "Polynomial",
    "Straight",
    "pack_signs",
    "scaled_rows",
    "sign",
    "sign_product",
    "unpack_signs",
]

#: How a product of signs is executed: bytes and ``torch._int_mm``, packed bits with xor and a table, or floats.
BACKENDS = ("int8", "xnor", "float")
#: Entries of the largest table of xors that is held at once.
_CHUNK = 2**22


def sign(x: Tensor) -> Tensor:
    """Return +1 where ``x`` is at least 0 and -1 elsewhere, in its dtype.

    Example:
        >>> sign(torch.tensor([-2.0, 0.0, 3.0]))
        tensor([-1.,  1.,  1.])
    """
    return (x >= 0).to(x.dtype).mul_(2).sub_(1)


def scaled_rows(weight: Tensor, largest: float) -> Tensor:
    """Return ``weight``, each row scaled so that its largest magnitude is ``largest``; a row of zeros stays.

    Example:
        >>> scaled_rows(torch.tensor([[2.0, -4.0], [0.0, 0.0]]), 1.0).tolist()
        [[0.5, -1.0], [0.0, 0.0]]
    """
    rows = weight.flatten(1)
    sizes = rows.abs().amax(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
    return (rows / sizes * largest).reshape(weight.shape)


class _Estimated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, estimator: Estimator) -> Tensor:
        ctx.save_for_backward(z)
        ctx.estimator = estimator
        return estimator.binary(z)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (z,) = ctx.saved_tensors
        estimator: Estimator = ctx.estimator
        return gradients[0] * estimator.slope(z), None


class Estimator(ABC):
    """A sign whose gradient is declared: forward :meth:`binary`, backward the upstream gradient times :meth:`slope`."""

    @abstractmethod
    def slope(self, z: Tensor) -> Tensor:
        """Return what the gradient is multiplied with at ``z``."""

    def surrogate(self, z: Tensor) -> Tensor:
        """Return the function whose derivative the slope is meant to be; the estimating error is its distance."""
        return z

    def binary(self, z: Tensor) -> Tensor:
        """Return +1 or -1 for each entry of the latent ``z``."""
        return sign(z)

    def start(self, dense: Tensor) -> Tensor:
        """Return latents with the signs of trained weights ``dense``, from which training goes on."""
        return dense

    def latent(self, signs: Tensor) -> Tensor:
        """Return latents that stand for ``signs`` where nothing else is known, with a slope that is not zero."""
        return 0.1 * signs

    def __call__(self, z: Tensor) -> Tensor:
        """Return the signs of ``z``; gradients take the estimated way."""
        if not (torch.is_grad_enabled() and z.requires_grad) or torch.compiler.is_exporting():
            return self.binary(z)
        out: Tensor = _Estimated.apply(z, self)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return out

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value:g}' for name, value in vars(self).items())})"


class Straight(Estimator):
    """The straight-through estimator: slope 1 where |z| <= ``limit``, else 0.

    Example:
        >>> z = torch.tensor([-2.0, 0.5], requires_grad=True)
        >>> Straight()(z).sum().backward()
        >>> z.grad
        tensor([0., 1.])
    """

    def __init__(self, limit: float = 1.0) -> None:
        self.limit = limit

    def slope(self, z: Tensor) -> Tensor:
        """Return 1 within the limit."""
        return (z.abs() <= self.limit).to(z.dtype)


class Identity(Estimator):
    """Slope 1 everywhere."""

    def slope(self, z: Tensor) -> Tensor:
        """Return ones."""
        return torch.ones_like(z)


class Polynomial(Estimator):
    """The piecewise polynomial estimator of activations: slope max(0, 2 - 2 |z|)."""

    def slope(self, z: Tensor) -> Tensor:
        """Return the triangle."""
        return (2 - 2 * z.abs()).clamp(min=0)

    def surrogate(self, z: Tensor) -> Tensor:
        """Return the two parabolas 2 z - z |z|, constant beyond 1."""
        inner = z.clamp(-1, 1)
        return 2 * inner - inner * inner.abs()


def pack_signs(x: Tensor) -> Tensor:
    """Return the signs of ``x`` as bits, eight to a byte, the first in the lowest bit; a bit is 1 for +1.

    Shapes:
        (..., N) -> (..., ceil(N / 8)) uint8

    Example:
        >>> pack_signs(torch.tensor([1.0, -1.0, 1.0]))
        tensor([5], dtype=torch.uint8)
    """
    bits = F.pad((x >= 0).to(torch.uint8), (0, -x.shape[-1] % 8))
    places = 2 ** torch.arange(8, device=x.device)
    return (torch.unflatten(bits, -1, (bits.shape[-1] // 8, 8)).long() * places).sum(-1).to(torch.uint8)


def unpack_signs(packed: Tensor, n: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the first ``n`` signs of each row that :func:`pack_signs` packed.

    Example:
        >>> unpack_signs(torch.tensor([5], dtype=torch.uint8), 3)
        tensor([ 1., -1.,  1.])

    Raises:
        BadInput: ``packed`` holds no bytes, or not as many as ``n`` signs take.
    """
    if packed.dtype != torch.uint8 or packed.shape[-1] != -(-n // 8):
        raise BadInput(f"{n} signs a row need uint8 (..., {-(-n // 8)}), got {packed.dtype} {tuple(packed.shape)}")
    bits = (packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1  # (..., bytes, 8)
    return bits.flatten(-2)[..., :n].to(dtype).mul_(2).sub_(1)


def _popcounts(device: torch.device) -> Tensor:
    values = torch.arange(256, device=device)
    return ((values[:, None] >> torch.arange(8, device=device)) & 1).sum(1).to(torch.uint8)


def sign_product(x: Tensor, weight: Tensor, *, backend: str = "int8") -> Tensor:
    """Return the integer products of the sign vectors in the rows of ``x`` and ``weight``.

    Args:
        x: signs, or numbers whose signs are meant.
        weight: the same.
        backend: ``"int8"`` multiplies bytes (``torch._int_mm``), ``"xnor"`` counts differing bits of packed rows,
            ``"float"`` multiplies floats, which is exact below 2**24 entries a row.

    Shapes:
        (M, K), (N, K) -> (M, N) int32

    Example:
        >>> sign_product(torch.tensor([[1.0, -1.0, 1.0]]), torch.ones(1, 3), backend="xnor")
        tensor([[1]], dtype=torch.int32)

    Raises:
        BadInput: the backend is unknown, or the rows differ in length.
    """
    if backend not in BACKENDS:
        raise BadInput(f"unknown backend {backend!r}{nearest(backend, list(BACKENDS))}")
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise BadInput(f"signs must be (M, K) and (N, K), got {tuple(x.shape)} and {tuple(weight.shape)}")
    if x.numel() == 0 or weight.numel() == 0:
        return torch.zeros(len(x), len(weight), dtype=torch.int32, device=x.device)
    if backend == "xnor":
        return _xnor(pack_signs(x), pack_signs(weight), x.shape[1])
    # With K = 1 torch 2.13's kernel leaves its output unwritten.
    if backend == "int8" and x.device.type == "cpu" and x.shape[1] > 1:
        return torch._int_mm(sign(x).to(torch.int8), sign(weight).to(torch.int8).t().contiguous())
    return (sign(x.float()) @ sign(weight.float()).t()).to(torch.int32)


def _xnor(x: Tensor, weight: Tensor, n: int) -> Tensor:
    """Return n - 2 popcount(x xor weight) for packed rows (M, bytes), (N, bytes), some rows at a time."""
    table = _popcounts(x.device)
    step = max(1, _CHUNK // weight.numel())
    parts = [
        n - 2 * table[(rows[:, None] ^ weight[None]).long()].sum(-1, dtype=torch.int32) for rows in torch.split(x, step)
    ]
    return torch.cat(parts)
