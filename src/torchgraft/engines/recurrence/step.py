"""The linear recurrence one token at a time: the definition, in a loop, against which every faster form is tested."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["step_form", "step_token"]


def step_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the output of one token and the next state.

    Shapes:
        q, k: (B, H, K); v: (B, H, V); log_decay: (B, H, K) or (B, H, 1); beta: (B, H); state: (B, H, K, V) ->
        (B, H, V), (B, H, K, V).
    """
    if log_decay is not None:
        state = log_decay.exp()[..., None] * state
    if beta is not None:  # what the state holds for this key gives way to the new value, by a share of beta
        v = beta[..., None] * (v - torch.einsum("bhkv,bhk->bhv", state, k))
    state = state + k[..., None] * v[..., None, :]
    return scale * torch.einsum("bhkv,bhk->bhv", state, q), state


def step_form(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the outputs, (B, T, H, V), and the last state, (B, H, K, V), by a loop over the tokens.

    Shapes:
        q, k: (B, T, H, K); v: (B, T, H, V); log_decay: (B, T, H, K) or (B, T, H, 1); beta: (B, T, H);
        state: (B, H, K, V).
    """
    outputs = []
    for t in range(q.shape[1]):
        decay_t = None if log_decay is None else log_decay[:, t]
        beta_t = None if beta is None else beta[:, t]
        output, state = step_token(q[:, t], k[:, t], v[:, t], decay_t, beta_t, scale, state)
        outputs.append(output)
    return (torch.stack(outputs, dim=1) if outputs else torch.zeros_like(v)), state
