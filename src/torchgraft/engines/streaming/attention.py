"""Self-attention over a sliding window of tokens: every output renewed at each step, or the newest one alone.

With the scores s_ij = q_i . k_j / sqrt(K) of a window, a new token changes each row's sums by one key that leaves and
one that comes: d_i <- d_i - exp(s_i,old) + exp(s_i,new), and likewise sum_j exp(s_ij) v_j; O(n K) a step, not O(n^2 K).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from torchgraft.engines.streaming.cells import Cell
from torchgraft.errors import BadInput

__all__ = ["EncoderCell", "RecyclingPositionalEncoding", "RetroactiveAttention", "SingleOutputAttention", "finish"]


def _checked(attention: nn.MultiheadAttention, window: int) -> None:
    if not isinstance(attention, nn.MultiheadAttention):
        raise BadInput(f"attention must be an nn.MultiheadAttention, got {type(attention).__name__}")
    plain = attention.in_proj_weight is not None and attention.bias_k is None and not attention.add_zero_attn
    if not plain or not attention.batch_first:
        raise BadInput(
            "attention must have batch_first=True, one size for q, k and v, and neither extra keys nor zeros"
        )
    if window < 1:
        raise BadInput(f"window must be at least 1, got {window}")


class _Streamed(nn.Module):
    def __init__(self, attention: nn.MultiheadAttention, window: int) -> None:
        super().__init__()
        _checked(attention, window)
        self.attention, self.window = attention, window
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, already divided by sqrt(K), k and v, each (B, H, T, K), of tokens (B, T, D)."""
        heads = self.attention.num_heads
        packed = nn.functional.linear(x, self.attention.in_proj_weight, self.attention.in_proj_bias)
        q, k, v = (torch.unflatten(part, -1, (heads, -1)).transpose(1, 2) for part in packed.chunk(3, -1))
        return q / math.sqrt(q.shape[-1]), k, v

    def _out(self, mixed: Tensor) -> Tensor:
        out: Tensor = self.attention.out_proj(mixed.transpose(1, 2).flatten(2))  # (B, H, T, K) -> (B, T, D)
        return out

    def forward_step(self, x: Tensor) -> Tensor | None:
        """Take one token (B, D); return the output, or ``None`` before the window is full."""
        raise NotImplementedError

    def forward_steps(self, x: Tensor) -> Tensor | None:
        """Take tokens (B, T, D); return the outputs of all full windows along dimension 1, or ``None``."""
        made = [out for token in x.unbind(1) if (out := self.forward_step(token)) is not None]
        return torch.stack(made, 1) if made else None


class SingleOutputAttention(_Streamed):
    """The output of the newest token of a window alone; keys and values are kept.

    Args:
        attention: a trained ``nn.MultiheadAttention(batch_first=True)``, shared.
        window: tokens in a window.

    Shapes:
        forward: (B, T, D) -> (B, D); forward_step: (B, D) -> (B, D).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Attend from the last token of a clip to all of it."""
        q, k, v = self._project(x)
        return self._out(torch.softmax(q[:, :, -1:] @ k.transpose(-2, -1), -1) @ v)[:, 0]

    def forward_step(self, x: Tensor) -> Tensor | None:
        """Take one token (B, D); return its output (B, D) once the window is full."""
        q, k, v = self._project(x[:, None])
        if self.k is not None and self.v is not None:
            k, v = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)
        self.k, self.v = k[:, :, -self.window :], v[:, :, -self.window :]
        if self.k.shape[2] < self.window:
            return None
        return self._out(torch.softmax(q @ self.k.transpose(-2, -1), -1) @ self.v)[:, 0]


class RetroactiveAttention(_Streamed):
    """The outputs of all tokens of a window, renewed at each step by the one key that came and the one that left.

    Sums are kept in float64 with a shift for each row, and are formed anew every ``renew`` steps, and where a score
    exceeds its row's shift so far that its exponential would be large.

    Args:
        attention: a trained ``nn.MultiheadAttention(batch_first=True)``, shared.
        window: tokens in a window.
        renew: steps between two fresh starts of the sums; default: 8 windows.

    Shapes:
        forward: (B, T, D) -> (B, T, D); forward_step: (B, D) -> (B, window, D).
    """

    def __init__(self, attention: nn.MultiheadAttention, window: int, *, renew: int | None = None) -> None:
        if renew is not None and renew < 1:
            raise BadInput(f"renew must be at least 1, got {renew}")
        super().__init__(attention, window)
        self.renew = renew or 8 * window

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.q: Tensor | None = None
        #: Shift and denominator (B, H, n), numerator (B, H, n, K), and the largest denominator since they were formed.
        self.sums: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        self.since = 0

    def forward(self, x: Tensor) -> Tensor:
        """Attend from all tokens of a clip to all of it."""
        q, k, v = self._project(x)
        return self._out(torch.softmax(q @ k.transpose(-2, -1), -1) @ v)

    def _fresh(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scores = (q @ k.transpose(-2, -1)).double()
        shift = scores.amax(-1)
        weights = (scores - shift[..., None]).exp()
        total = weights.sum(-1)
        return shift, total, weights @ v.double(), total

    def forward_step(self, x: Tensor) -> Tensor | None:
        """Take one token (B, D); return all outputs (B, window, D) once the window is full."""
        q, k, v = self._project(x[:, None])
        if self.q is None or self.k is None or self.v is None:
            self.q, self.k, self.v = q, k, v
        else:
            full = self.k.shape[2] == self.window
            old_k, old_v = (self.k[:, :, :1], self.v[:, :, :1]) if full else (None, None)
            kept = self.q[:, :, 1:] if full else self.q
            self.q = torch.cat([kept, q], 2)
            self.k = torch.cat([self.k[:, :, 1:] if full else self.k, k], 2)
            self.v = torch.cat([self.v[:, :, 1:] if full else self.v, v], 2)
            self.since += 1
            if self.sums is not None and self.since < self.renew and old_k is not None and old_v is not None:
                self.sums = self._moved(kept, q, k, v, old_k, old_v)
            else:
                self.sums = None
        if self.k.shape[2] < self.window:
            return None
        if self.sums is None:
            self.sums, self.since = self._fresh(self.q, self.k, self.v), 0
        return self._out((self.sums[2] / self.sums[1][..., None]).to(x.dtype))

    def _moved(
        self, kept: Tensor, q: Tensor, k: Tensor, v: Tensor, old_k: Tensor, old_v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Return the sums after one key has left and one has come, or ``None`` where they must be formed anew."""
        if self.sums is None or self.k is None or self.v is None:
            return None
        shift, total, mixed, most = (part[:, :, 1:] for part in self.sums)
        gone = (kept @ old_k.transpose(-2, -1)).double()[..., 0]
        come = (kept @ k.transpose(-2, -1)).double()[..., 0]
        # What is rounded off is a share of the largest sum there was, however many steps it took to lose the rest.
        if bool((come - shift > 20).any()) or bool((total - (gone - shift).exp() < 1e-6 * most).any()):
            return None
        leaving, coming = (gone - shift).exp(), (come - shift).exp()
        total = total - leaving + coming
        mixed = mixed - leaving[..., None] * old_v.double() + coming[..., None] * v.double()
        first, ones, row, _ = self._fresh(q, self.k, self.v)
        most = torch.maximum(most, total)
        return (
            torch.cat([shift, first], 2),
            torch.cat([total, ones], 2),
            torch.cat([mixed, row], 2),
            torch.cat([most, ones], 2),
        )


def finish(layer: nn.TransformerEncoderLayer, x: Tensor, attended: Tensor) -> Tensor:
    """Return what an encoder layer makes of its input and its attention's output: residuals, norms, feed-forward."""

    def feed(h: Tensor) -> Tensor:
        out: Tensor = layer.linear2(layer.activation(layer.linear1(h)))
        return out

    if layer.norm_first:
        x = x + attended
        return x + feed(layer.norm2(x))
    x = layer.norm1(x + attended)
    out: Tensor = layer.norm2(x + feed(x))
    return out


class EncoderCell(Cell):
    """An ``nn.TransformerEncoderLayer`` over a sliding window of tokens.

    Args:
        layer: the trained layer, ``batch_first``, in eval mode.
        window: tokens in a window.
        single: whether the newest token's output is enough.
    """

    def __init__(self, layer: nn.TransformerEncoderLayer, window: int, *, single: bool) -> None:
        super().__init__(1, wait=window - 1)
        self.layer, self.window, self.single = layer, window, single
        kind = SingleOutputAttention if single else RetroactiveAttention
        self.attention: SingleOutputAttention | RetroactiveAttention = kind(layer.self_attn, window)
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self.attention.reset()
        self.held: Tensor | None = None

    def push_windows(self, x: Tensor | None) -> list[Tensor]:
        """Take tokens (B, T, D); return the layer's output for every full window: (B, window, D) or (B, 1, D)."""
        made = []
        for token in [] if x is None else x.unbind(1):
            normed = self.layer.norm1(token) if self.layer.norm_first else token
            out = self.attention.forward_step(normed)
            keep = 1 if self.single else self.window
            held = token[:, None] if self.held is None else torch.cat([self.held, token[:, None]], 1)
            self.held = held[:, -keep:]
            if out is not None:
                made.append(finish(self.layer, self.held, out[:, None] if self.single else out))
        return made


class RecyclingPositionalEncoding(nn.Module):
    """Learned positions used in a circle, so that a frame keeps its position while the window moves on.

    Args:
        d_model: width.
        length: positions, at least the tokens of a window.

    Shapes:
        (B, T, D) -> (B, T, D)
    """

    def __init__(self, d_model: int, length: int) -> None:
        super().__init__()
        if length < 1:
            raise BadInput(f"length must be at least 1, got {length}")
        self.table = nn.Parameter(0.02 * torch.randn(length, d_model))

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        """Add the positions offset, offset + 1, ... modulo ``length`` to the tokens."""
        places = (torch.arange(x.shape[1], device=x.device) + offset) % len(self.table)
        return x + self.table[places]
