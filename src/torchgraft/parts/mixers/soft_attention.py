"""Attention without softmax: a Gaussian kernel between tokens, seen through a few landmarks, in linear time.

`Softmax-free Linear Transformers <https://arxiv.org/abs/2207.03341>`_ (Lu et al., 2024): S_ij = exp(-|q_i - q_j|^2 /
(2 sqrt(K))) with one projection for queries and keys; with m landmarks, A = S(landmarks, landmarks) and
P = S(landmarks, tokens), O = P^T D^{-1/2} A^+ D^{-1/2} P V, D the row sums of A, and A^+ by Newton's iteration.

Departures: without a grid the landmarks are means of stretches of tokens, whose number is given rather than the ratio;
the convolution on the values is then over neighbours in the sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines.attention import Gaussian, attend, attention_weights, exp, unnormalized
from torchgraft.engines.recurrence.heads import head_size, merge_heads, split_heads
from torchgraft.engines.recurrence.mixer import Mixer
from torchgraft.errors import BadInput

__all__ = ["CARD", "SoftAttention", "newton_inverse"]

CARD = Card(
    key="soft-attention",
    title="Softmax-free attention (SOFT, SOFT++)",
    seed_id=287,
    authors="Lu et al., 2024",
    reference="https://arxiv.org/abs/2207.03341",
    family="parts/mixers",
    kind="part",
    engine=("attention",),
    equation="O = P^T D^{-1/2} A^+ D^{-1/2} P V,  A = S(L, L),  P = S(L, Q),  S_ij = exp(-|q_i - q_j|^2 / (2 sqrt(K)))",
    entry="SoftAttention",
    capabilities=frozenset({"linear-time"}),
    declared={"parameters": "3*d_model**2 + 2*d_model/num_heads + 3*d_model"},
    example={"d_model": 16, "num_heads": 2, "landmarks": 6},
    shapes=((2, 12, 16),),
    oracles=(
        "with every token a landmark the output is S V, the full Gaussian kernel times the values",
        "each Newton step squares the residual I - A A_k, and ends at the inverse that numpy finds",
        "the backward pass equals automatic differentiation through the inverse",
        "the low-rank kernel is symmetric and has no negative eigenvalue",
        "with the symmetric normalisation the kernel among landmarks has a spectral norm of at most 1",
    ),
    claim=Claim(
        text="Digits as 64 tokens, four blocks of width 48: SOFT++ beside softmax, positive random features "
        "(Performer) and SOFT without the normalisation; the size of untrained outputs at 1024 tokens; time from "
        "256 to 4096 tokens.",
        figure="SOFT++ within 1 point of softmax and above random features; finite at 1024 tokens, where SOFT's "
        "largest output is at least 5 times SOFT++'s; time grows with an exponent of at most 1.2",
    ),
    choose_when="images as many tokens, all seeing all, in linear time, without a softmax to approximate",
    choose_instead="softmax-attention below a thousand tokens; a recurrence where the order is causal",
    bibtex="""@article{lu2024softmax,
  title={Softmax-free Linear Transformers},
  author={Lu, Jiachen and Zhang, Junge and Zhu, Xiatian and Feng, Jianfeng and Xiang, Tao and Zhang, Li},
  journal={International Journal of Computer Vision},
  year={2024}
}""",
)

#: The first iterate is A times this share of what is known to converge.
_SAFE = 0.9


class _Newton(torch.autograd.Function):
    """A^+ by iteration, its gradient by the formula of the inverse."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, iterations: int) -> Tensor:
        bound = a.abs().sum(-2).amax(-1)[..., None, None]  # the 1-norm of A
        found = a.mT * (2 * _SAFE / bound.square().clamp_min(torch.finfo(a.dtype).tiny))
        for _ in range(iterations):
            found = 2 * found - found @ a @ found
        ctx.save_for_backward(found)
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (found,) = ctx.saved_tensors
        return -found.mT @ grad @ found.mT, None


def newton_inverse(a: Tensor, iterations: int = 20) -> Tensor:
    """Return the inverse of A by A_{k+1} = 2 A_k - A_k A A_k, which squares the residual I - A A_k at every step.

    The backward pass takes dL/dA = -(A^+)^T dL/dA^+ (A^+)^T, without the iterations; it is as exact as they are.

    Args:
        a: symmetric and positive definite.
        iterations: steps; a matrix of condition number c takes about 2 log2(c) + 5.

    Shapes:
        (..., m, m) -> (..., m, m)

    Example:
        >>> newton_inverse(torch.diag(torch.tensor([1.0, 2.0]))).diagonal()
        tensor([1.0000, 0.5000])

    Raises:
        BadInput: A is not square, or there is no step.
    """
    if a.ndim < 2 or a.shape[-1] != a.shape[-2] or iterations < 1:
        raise BadInput(f"a must be square and iterations at least 1, got {tuple(a.shape)} and {iterations}")
    inverse: Tensor = _Newton.apply(a, iterations)  # type: ignore[no-untyped-call]  # torch's
    return inverse


class SoftAttention(Mixer):
    """Gaussian-kernel attention through landmarks.

    Args:
        d_model: the width D.
        num_heads: H; divides ``d_model``.
        landmarks: m, how many there are at most; without a grid they are means of stretches of tokens.
        grid: rows and columns of patches, where the tokens are those of an image; landmarks are then a smaller grid.
        iterations: Newton steps.
        symmetric: whether landmarks are normalised by their row sums (SOFT++).
        project: whether landmarks pass through a layer norm and GELU, as in the paper.
        ridge: added to the diagonal of A.
        kernel: taps of the depthwise convolution that is added to the values, odd; 0 for none.

    Shapes:
        (B, T, D) -> (B, T, D)

    Example:
        >>> SoftAttention(8, num_heads=2, landmarks=4)(torch.randn(1, 10, 8)).shape
        torch.Size([1, 10, 8])

    Raises:
        BadInput: a size is out of range.
    """

    causal = False

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 4,
        landmarks: int = 49,
        grid: tuple[int, int] | None = None,
        iterations: int = 20,
        symmetric: bool = True,
        project: bool = True,
        ridge: float = 0.01,
        kernel: int = 3,
    ) -> None:
        super().__init__(d_model)
        size = head_size(d_model, num_heads)
        if landmarks < 1 or iterations < 1 or ridge < 0 or kernel < 0 or (kernel and kernel % 2 == 0):
            raise BadInput(
                "landmarks and iterations must be at least 1, ridge not negative, kernel odd or 0, "
                f"got {landmarks}, {iterations}, {ridge}, {kernel}"
            )
        self.num_heads, self.landmarks, self.grid, self.iterations = num_heads, landmarks, grid, iterations
        self.symmetric, self.ridge = symmetric, ridge
        self.q = nn.Linear(d_model, d_model, bias=False)
        self.v = nn.Linear(d_model, d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.norm = nn.LayerNorm(size) if project else None
        build = nn.Conv1d if grid is None else nn.Conv2d
        self.local = (
            build(d_model, d_model, kernel, padding=kernel // 2, groups=d_model, bias=False) if kernel else None
        )

    def pooled(self, q: Tensor) -> Tensor:
        """Return the landmarks of ``q``, (B, T, H, K) -> (B, m, H, K)."""
        flat = merge_heads(q).mT  # (B, D, T)
        if self.grid is None:
            means = F.adaptive_avg_pool1d(flat, min(self.landmarks, q.shape[1]))
        else:
            side = max(int(self.landmarks**0.5), 1)
            shape = (min(side, self.grid[0]), min(side, self.grid[1]))
            means = F.adaptive_avg_pool2d(torch.unflatten(flat, -1, self.grid), shape).flatten(2)
        found = split_heads(means.mT, self.num_heads)
        if self.norm is None:
            return found
        weight, bias = self.norm.weight.to(found.dtype), self.norm.bias.to(found.dtype)
        return F.gelu(F.layer_norm(found, self.norm.normalized_shape, weight, bias, self.norm.eps))

    def kernels(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return the landmarks, (B, m, H, K), and what stands between P^T and P, (B, H, m, m)."""
        marks = self.pooled(q)
        a = attention_weights(marks, marks, score=Gaussian(), transform=exp, normalize=unnormalized)
        middle = newton_inverse(
            a + self.ridge * torch.eye(a.shape[-1], dtype=a.dtype, device=a.device), self.iterations
        )
        if self.symmetric:
            root = a.sum(-1).rsqrt()
            middle = root[..., :, None] * middle * root[..., None, :]
        return marks, middle

    def forward(self, x: Tensor) -> Tensor:
        """Mix ``x``, (B, T, D) -> (B, T, D).

        Raises:
            BadInput: the tokens do not fill the grid.
        """
        self.checked(x)
        if self.grid is not None and x.shape[1] != self.grid[0] * self.grid[1]:
            raise BadInput(f"x must have {self.grid[0] * self.grid[1]} tokens, a grid of {self.grid}, got {x.shape[1]}")
        q, v = split_heads(self.q(x), self.num_heads), split_heads(self.v(x), self.num_heads)
        with torch.autocast(x.device.type, enabled=False):
            q = q.to(torch.promote_types(q.dtype, torch.float32))
            marks, middle = self.kernels(q)
            read = attend(marks, q, v.to(q.dtype), score=Gaussian(), transform=exp, normalize=unnormalized)
            between = (middle @ read.transpose(1, 2)).transpose(1, 2)  # (B, m, H, V)
            mixed = attend(q, marks, between, score=Gaussian(), transform=exp, normalize=unnormalized)
        found = merge_heads(mixed).to(x.dtype)
        if self.local is not None:
            flat = merge_heads(v).mT
            flat = flat if self.grid is None else torch.unflatten(flat, -1, self.grid)
            found = found + self.local(flat).flatten(2).mT
        y: Tensor = self.out(found)
        return y
