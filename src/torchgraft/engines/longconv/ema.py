"""Multi-dimensional damped exponential moving averages: by the FFT over many tokens, by recurrence over one.

`Mega: Moving Average Equipped Gated Attention <https://arxiv.org/abs/2209.10655>`_ (Ma et al., 2023):
s_t = alpha beta x_t + (1 - alpha delta) s_{t-1},  y_t = eta^T s_t, for every channel with N averages.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.engines.longconv.fft import fft_conv
from torchgraft.errors import BadInput

__all__ = ["DampedEMA", "damped_ema", "damped_ema_steps"]


def damped_ema(
    x: Tensor, update: Tensor, log_decay: Tensor, readout: Tensor, *, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return y_t = sum_n readout_n s_{t,n} with s_t = update x_t + exp(log_decay) s_{t-1}, and the last s.

    Args:
        x: the signal.
        update: weight of the token in each average.
        log_decay: logarithm of what stays of each average, below 0.
        readout: weight of each average in the output.
        state: the averages before the first token; default zeros.

    Shapes:
        x: (B, T, C); update, log_decay, readout: (C, N); state: (B, C, N) -> (B, T, C), (B, C, N).
        Computed in float32 at least; the output has the dtype of ``x``, the state stays wide.

    Example:
        >>> one = torch.ones(1, 1)
        >>> y, state = damped_ema(torch.ones(1, 3, 1), one, one.mul(0.5).log(), one)
        >>> [round(value, 4) for value in y.flatten().tolist()], state.item()
        ([1.0, 1.5, 1.75], 1.75)
    """
    if x.ndim != 3 or update.ndim != 2 or x.shape[-1] != len(update):
        raise BadInput(f"x must be (B, T, C) and update (C, N), got {tuple(x.shape)} and {tuple(update.shape)}")
    wide = torch.promote_types(x.dtype, torch.float32)
    update, log_decay, readout, signal = (value.to(wide) for value in (update, log_decay, readout, x))
    tokens = x.shape[1]
    with torch.autocast(x.device.type, enabled=False):
        lags = torch.arange(tokens + 1, device=x.device, dtype=wide)
        powers = (lags[:, None, None] * log_decay).exp()  # (T + 1, C, N)
        y = fft_conv(signal, torch.einsum("tcn,cn->tc", powers[:-1], readout * update))
        last = torch.einsum("btc,tcn->bcn", signal.flip(1), powers[:-1]) * update
        if state is not None:
            before = state.to(wide)
            y = y + torch.einsum("tcn,bcn->btc", powers[1:], before * readout)
            last = last + powers[-1] * before
    return y.to(x.dtype), last


def damped_ema_steps(
    x: Tensor, update: Tensor, log_decay: Tensor, readout: Tensor, *, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return what :func:`damped_ema` returns, token by token: the reference, and the shorter way for one token."""
    wide = torch.promote_types(x.dtype, torch.float32)
    update, decay, readout = update.to(wide), log_decay.to(wide).exp(), readout.to(wide)
    s = x.new_zeros(len(x), *update.shape, dtype=wide) if state is None else state.to(wide)
    outputs = []
    for x_t in x.to(wide).unbind(1):
        s = update * x_t[..., None] + decay * s  # (B, C, N)
        outputs.append((readout * s).sum(-1))
    return torch.stack(outputs, dim=1).to(x.dtype), s


class DampedEMA(nn.Module):
    """Mega's moving average over every channel: alpha and delta in (0, 1), beta and eta free.

    Args:
        channels: C.
        order: N, the averages a channel.

    Shapes:
        x: (B, T, C), state: {"ema": (B, C, N)} -> (B, T, C) and the next state.
    """

    def __init__(self, channels: int, order: int = 16) -> None:
        super().__init__()
        if channels < 1 or order < 1:
            raise BadInput(f"channels and order must be at least 1, got {channels} and {order}")
        self.channels, self.order = channels, order
        self.alpha = nn.Parameter(torch.randn(channels, order) * 0.2)  # before the sigmoid
        self.delta = nn.Parameter(torch.randn(channels, order) * 0.2)
        signs = torch.ones(order)
        signs[1::2] = -1.0
        self.beta = nn.Parameter(signs + torch.randn(channels, order) * 0.02)
        self.eta = nn.Parameter(torch.randn(channels, order))

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return update, log_decay and readout, (C, N) each, in float32 at least."""
        alpha, delta, beta, eta = (
            value.to(torch.promote_types(value.dtype, torch.float32))
            for value in (self.alpha, self.delta, self.beta, self.eta)
        )
        rate = torch.sigmoid(alpha)
        # 1 - sigmoid(a) sigmoid(d) = sigmoid(-a) + sigmoid(a) sigmoid(-d), which keeps its digits near 0
        log_decay = torch.logaddexp(F.logsigmoid(-alpha), F.logsigmoid(alpha) + F.logsigmoid(-delta))
        return rate * beta, log_decay, eta * self.order**-0.5

    def init_state(self, batch_size: int) -> dict[str, Tensor]:
        """Return zeros: nothing was averaged yet."""
        wide = torch.promote_types(self.alpha.dtype, torch.float32)
        return {"ema": self.alpha.new_zeros(batch_size, self.channels, self.order, dtype=wide)}

    def forward(self, x: Tensor, state: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Average ``x`` after ``state``; return the output and the averages after the last token."""
        before = None if state is None else state["ema"]
        average = damped_ema_steps if x.shape[1] == 1 else damped_ema
        y, last = average(x, *self.coefficients(), state=before)
        return y, {"ema": last}
