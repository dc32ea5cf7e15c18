"""Association by content: a state moves to the mean of stored patterns weighted by softmax, and what that guarantees.

xi' = sum_i softmax(beta x . xi)_i x_i, the energy that it never raises, the bound on its error, and how many patterns
it mixes. Everything is computed in float32 at least.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchgraft.errors import BadInput

__all__ = ["energy", "hopfield_retrieve", "metastable_size", "retrieval_bound", "separation"]


def _scores(state: Tensor, stored: Tensor, beta: float, mask: Tensor | None) -> Tensor:
    """Return beta x_i . xi in float32 at least, -inf-like where masked; (..., S, K), (..., N, K) -> (..., S, N)."""
    if not beta > 0:
        raise BadInput(f"beta must be above 0, got {beta}")
    dtype = torch.promote_types(state.dtype, torch.float32)
    scores = beta * (state.to(dtype) @ stored.to(dtype).mT)
    return scores if mask is None else scores.masked_fill(~_pairs(mask, stored), torch.finfo(dtype).min)


def _pairs(mask: Tensor, stored: Tensor) -> Tensor:
    """Return a mask of patterns (..., N) as one of pairs (..., 1, N); one of pairs (..., S, N) as it is."""
    return mask[..., None, :] if mask.ndim < stored.ndim else mask


def _weights(state: Tensor, stored: Tensor, beta: float, mask: Tensor | None) -> Tensor:
    weights = _scores(state, stored, beta, mask).softmax(-1)
    return weights if mask is None else weights.masked_fill(~_pairs(mask, stored), 0)


def hopfield_retrieve(
    state: Tensor, stored: Tensor, *, beta: float, steps: int = 1, eps: float = 1e-4, mask: Tensor | None = None
) -> Tensor:
    """Return the state after updates xi' = sum_i softmax(beta x . xi)_i x_i.

    Args:
        state: xi, (..., S, K).
        stored: the patterns, (..., N, K).
        beta: the inverse temperature.
        steps: the most updates that are made.
        eps: a state that moves less than this is left where it is from then on; 0 never stops.
        mask: True where a pattern is there, (..., N) or (..., S, N); a state that sees no pattern becomes zero.

    Example:
        >>> stored = 4 * torch.eye(3)
        >>> hopfield_retrieve(torch.tensor([[3.0, 1.0, 0.0]]), stored, beta=2.0).round(decimals=2)
        tensor([[4., 0., 0.]])
    """
    if steps < 1:
        raise BadInput(f"update steps must be at least 1, got {steps}")
    dtype = torch.promote_types(state.dtype, torch.float32)
    patterns, xi = stored.to(dtype), state.to(dtype)
    moving = torch.ones_like(xi[..., :1], dtype=torch.bool)
    for step in range(steps):
        after = torch.where(moving, _weights(xi, patterns, beta, mask) @ patterns, xi)
        if eps > 0 and step + 1 < steps:
            moving = moving & ((after - xi).detach().norm(dim=-1, keepdim=True) >= eps)
        xi = after
    return xi.to(state.dtype)


def energy(state: Tensor, stored: Tensor, *, beta: float, mask: Tensor | None = None) -> Tensor:
    """Return E of every state in float32 at least, (..., S, K), (..., N, K) -> (..., S)."""
    scores = _scores(state, stored, beta, mask)
    squares = stored.to(scores.dtype).square().sum(-1)  # (..., N)
    if mask is None:
        count, largest = torch.full_like(squares[..., :1], stored.shape[-2]), squares.amax(-1, keepdim=True)
    else:
        seen = _pairs(mask, stored)
        count = seen.sum(-1).to(scores.dtype)
        largest = squares[..., None, :].expand(*squares.shape[:-1], *seen.shape[-2:]).masked_fill(~seen, 0).amax(-1)
    kinetic = state.to(scores.dtype).square().sum(-1)
    return (count.log() - scores.logsumexp(-1)) / beta + (kinetic + largest) / 2


def separation(stored: Tensor) -> Tensor:
    """Return x_i . x_i - max_{j != i} x_i . x_j of every pattern, (..., N, K) -> (..., N)."""
    products: Tensor = stored @ stored.mT
    own = torch.eye(stored.shape[-2], dtype=torch.bool, device=stored.device)
    found: Tensor = products.diagonal(dim1=-2, dim2=-1) - products.masked_fill(own, -math.inf).amax(-1)
    return found


def retrieval_bound(stored: Tensor, *, beta: float, distance: Tensor | float = 0.0) -> Tensor:
    """Return how far from x_i one update can end that starts at most ``distance`` from it, (..., N, K) -> (..., N).

    2 (N - 1) exp(-beta (separation_i - 2 distance M)) M, with M the largest norm.
    """
    largest = stored.norm(dim=-1).amax(-1, keepdim=True)
    exponent = -beta * (separation(stored) - 2 * distance * largest)
    bound: Tensor = 2 * (stored.shape[-2] - 1) * exponent.exp() * largest
    return bound


def metastable_size(
    state: Tensor, stored: Tensor, *, beta: float, mass: float = 0.9, mask: Tensor | None = None
) -> Tensor:
    """Return how many patterns an update mixes: the fewest that hold more than ``mass`` of its weights, (..., S).

    1 is the retrieval of a single pattern, near ``mass`` times N the average over all, between them a metastable state.
    """
    if not 0 < mass < 1:
        raise BadInput(f"mass must be within 0 and 1, got {mass}")
    held = _weights(state, stored, beta, mask).sort(-1, descending=True).values.cumsum(-1)
    return (held <= mass).sum(-1).add(1).clamp(max=stored.shape[-2])
