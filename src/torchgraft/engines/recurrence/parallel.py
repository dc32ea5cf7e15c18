"""The linear recurrence as one matrix over all pairs of tokens: quadratic in T, without any order of computation."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["parallel_form"]


def parallel_form(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the outputs, (B, T, H, V), and the last state, (B, H, K, V).

    With ``b_t`` the sum of the log decays up to t, token t sees what token s wrote through
    ``P_ts = sum_K q_tK k_sK exp(b_tK - b_sK)``. Under the delta rule, what is written is the solution ``U`` of
    ``(I + A) U = beta (V - K S_0)`` with ``A_ts = beta_t sum_K k_tK k_sK exp(b_tK - b_sK)`` for s < t.

    Shapes: those of :func:`torchgraft.engines.recurrence.step.step_form`.
    """
    tokens = q.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, ...)
    lower = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril()
    if log_decay is None:
        pairs = None
        since_start, to_end = torch.ones_like(k[..., :1]), torch.ones_like(k[..., :1])
    else:
        decay = log_decay.transpose(1, 2)  # (B, H, T, K or 1)
        inside = lower[:, :, None] & lower.T.new_ones(tokens).diag().logical_not()[:, :, None]
        # Sums over s < i <= t, each by itself: differences of long sums would cancel.
        spread = decay[..., :, None, :].expand(*decay.shape[:-2], tokens, tokens, decay.shape[-1])
        pairs = spread.masked_fill(~inside, 0.0).cumsum(-3)  # (B, H, T, S, K or 1)
        pairs = pairs.masked_fill(~lower[:, :, None], -torch.inf).exp()
        since_start = decay.cumsum(-2).exp()
        to_end = pairs[..., -1, :, :] if tokens else decay

    def gram(x: Tensor, y: Tensor) -> Tensor:
        if pairs is None:
            return (x @ y.mT).masked_fill(~lower, 0.0)
        if pairs.shape[-1] == 1:
            return (x @ y.mT) * pairs[..., 0]
        return torch.einsum("bhtk,bhsk,bhtsk->bhts", x, y, pairs)

    written = v
    if beta is not None:
        weight = beta.transpose(1, 2)[..., None]  # (B, H, T, 1)
        system = (weight * gram(k, k)).tril(-1) + torch.eye(tokens, dtype=q.dtype, device=q.device)
        known = weight * (v - (k * since_start) @ state)
        written = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)
    output = scale * ((q * since_start) @ state + gram(q, k) @ written)
    if tokens:
        state = since_start[..., -1, :, None] * state + (k * to_end).mT @ written
    return output.transpose(1, 2), state
