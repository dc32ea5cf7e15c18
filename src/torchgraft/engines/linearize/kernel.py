"""What stands between the projections of an attention: queries, keys and values in, mixed values out, in linear time.

A method that turns softmax attention into linear attention is a :class:`Kernel`. The projections around it belong to
whoever holds the kernel: a mixer of our own, or the attention of a model that somebody else wrote.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.engines.recurrence.linear import Form, with_state
from torchgraft.engines.recurrence.mixer import State
from torchgraft.errors import BadInput

__all__ = [
    "FeatureKernel",
    "Heads",
    "Kernel",
    "Watch",
    "linear_weights",
    "normalized_linear",
    "softmax_attention",
    "softmax_weights",
    "window_attention",
]

#: The least sum of weights that a row of linear attention is divided by; maps that can be zero everywhere need it.
_LEAST = 1e-6


@dataclass(frozen=True)
class Heads:
    """What an attention compares and mixes.

    Args:
        q: queries as softmax attention would compare them, after rotation by position where the model has one.
        k: keys, likewise; where groups of queries share keys, they are repeated.
        v: values.
        raw_q: queries before rotation.
        raw_k: keys before rotation.
        scale: factor on the products of queries and keys.
        seen: which tokens may be looked at (no padding), or ``None`` for all.

    Shapes:
        q, k, raw_q, raw_k: (B, T, H, K); v: (B, T, H, V); seen: (B, T), boolean.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    raw_q: Tensor
    raw_k: Tensor
    scale: float
    seen: Tensor | None = None


#: What may stand in for a kernel for a while: (kernel, heads, causal) -> mixed values.
Watch: TypeAlias = "Callable[[Kernel, Heads, bool], Tensor]"


def wide(x: Tensor) -> Tensor:
    """Return ``x`` in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _visible(heads: Heads, causal: bool) -> Tensor | None:
    """Return which pairs may be looked at, broadcast to (B, H, T, T), or ``None`` for all."""
    tokens = heads.q.shape[1]
    pairs = None if heads.seen is None else heads.seen[:, None, None, :]
    if not causal:
        return pairs
    before = torch.ones(tokens, tokens, dtype=torch.bool, device=heads.q.device).tril()
    return before[None, None] if pairs is None else before & pairs


def softmax_weights(heads: Heads, *, causal: bool) -> Tensor:
    """Return the weights of softmax attention, (B, H, T, T), rows for queries."""
    scores = torch.einsum("bthk,bshk->bhts", wide(heads.q), wide(heads.k)) * heads.scale
    pairs = _visible(heads, causal)
    if pairs is not None:
        scores = scores.masked_fill(~pairs, torch.finfo(scores.dtype).min)
    return scores.softmax(-1)


def softmax_attention(heads: Heads, *, causal: bool) -> Tensor:
    """Return what softmax attention mixes, (B, T, H, V)."""
    return torch.einsum("bhts,bshv->bthv", softmax_weights(heads, causal=causal).to(heads.v.dtype), heads.v)


def linear_weights(phi_q: Tensor, phi_k: Tensor, heads: Heads, *, causal: bool) -> Tensor:
    """Return the weights of linear attention, written out: (B, T, H, F), (B, T, H, F) -> (B, H, T, T)."""
    products = torch.einsum("bthf,bshf->bhts", phi_q, phi_k)
    pairs = _visible(heads, causal)
    if pairs is not None:
        products = products.masked_fill(~pairs, 0.0)
    return products / products.sum(-1, keepdim=True).clamp_min(_LEAST)


def normalized_linear(
    phi_q: Tensor,
    phi_k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    memory: Tensor | None = None,
    form: Form = "auto",
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """Return ``(phi_q_t . sum_s phi_k_s v_s) / (phi_q_t . sum_s phi_k_s)`` and the sums that it was read from.

    Args:
        phi_q: features of queries, not negative.
        phi_k: features of keys, not negative; zero where a token shall not be seen.
        v: values.
        causal: whether sums run over the tokens up to t, or over all.
        memory: the sums before the first token; the last column belongs to the denominator.
        form: in which form the causal sums are made.
        chunk: tokens a chunk.

    Shapes:
        phi_q, phi_k: (B, T, H, F); v: (B, T, H, V); memory: (B, H, F, V + 1) -> (B, T, H, V), (B, H, F, V + 1)

    Example:
        >>> q, k, v = torch.rand(1, 3, 1, 2), torch.rand(1, 3, 1, 2), torch.ones(1, 3, 1, 4)
        >>> torch.allclose(normalized_linear(q, k, v, causal=True)[0], v)  # weights of a row sum to 1
        True
    """
    v = v.to(phi_k.dtype)
    both = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)  # (B, T, H, V + 1)
    if causal:
        read, memory = with_state(phi_q, phi_k, both, state=memory, form=form, chunk=chunk)
    else:
        memory = phi_k.permute(0, 2, 3, 1) @ both.transpose(1, 2)  # (B, H, F, V + 1)
        read = (phi_q.transpose(1, 2) @ memory).transpose(1, 2)
    return read[..., :-1] / read[..., -1:].clamp_min(_LEAST), memory


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int, scale: float, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return softmax attention of each token over itself and the ``window - 1`` tokens before it.

    The second result is the logarithm of the sum of exponentials that each row was divided by.

    Args:
        q: queries of T tokens.
        k: keys of the ``window - 1`` tokens before them, and theirs.
        v: values, likewise.
        window: how many tokens are seen.
        scale: factor on the products.
        valid: which keys exist; default all.

    Shapes:
        q: (B, T, H, K); k: (B, window - 1 + T, H, K); v: (B, window - 1 + T, H, V); valid: (B, window - 1 + T)
        -> (B, T, H, V), (B, T, H)
    """
    B, T, H, K = q.shape
    V = v.shape[-1]
    # Blocks of queries see one block of keys more than their own: work grows with T * window.
    block = min(window, T)
    blocks = -(-T // block)
    pad = blocks * block - T
    span = window - 1 + block
    q, k, v = F.pad(q, (0, 0, 0, 0, 0, pad)), F.pad(k, (0, 0, 0, 0, 0, pad)), F.pad(v, (0, 0, 0, 0, 0, pad))
    place = torch.arange(span, device=q.device)
    row = torch.arange(block, device=q.device)[:, None]
    mask = ((place >= row) & (place < row + window)).expand(1, 1, block, span)
    if valid is not None:
        there = F.pad(valid, (0, pad)).unfold(1, span, block).reshape(B * blocks, 1, 1, span)
        own = place == row + window - 1  # a row without any key would be NaN; its output is not looked at
        mask = mask & (there | own)
    q = q.reshape(B * blocks, block, H, K).transpose(1, 2)  # (B N, H, block, K)
    k = k.unfold(1, span, block).permute(0, 1, 2, 4, 3).flatten(0, 1)  # (B N, H, span, K)
    v = v.unfold(1, span, block).permute(0, 1, 2, 4, 3).flatten(0, 1)
    scores = (wide(q) @ wide(k).mT * scale).masked_fill(~mask, float("-inf"))  # (B N, H, block, span)
    total = scores.logsumexp(-1, keepdim=True)
    y = (scores - total).exp().to(v.dtype) @ v
    y = y.transpose(1, 2).reshape(B, blocks * block, H, V)[:, :T]
    return y, total.transpose(1, 2).reshape(B, blocks * block, H)[:, :T]


class Kernel(nn.Module, ABC):
    """A way to mix values by queries and keys.

    Args:
        num_heads: H, of the queries.
        key_size: K.
        value_size: V.

    Attributes:
        sees: ``"causal"``, ``"all"`` or both: what it can do.
        form: in which form its recurrence runs; the numbers are the same.
        chunk: tokens a chunk.
    """

    sees: ClassVar[frozenset[str]] = frozenset({"causal", "all"})
    form: Form = "auto"
    chunk: int = 64

    def __init__(self, *, num_heads: int, key_size: int, value_size: int) -> None:
        super().__init__()
        self.num_heads, self.key_size, self.value_size = num_heads, key_size, value_size

    def settle(self) -> None:
        """Begin as near as can be to the attention whose projections are inherited; by default as built."""

    @abstractmethod
    def init_state(self, batch_size: int, like: Tensor) -> State:
        """Return the state before the first token, on the device of ``like``."""

    @abstractmethod
    def advance(self, heads: Heads, state: State) -> tuple[Tensor, State]:
        """Mix causally after ``state``; return the mixed values, (B, T, H, V), and the state after the last token."""

    def mix(self, heads: Heads, *, causal: bool) -> Tensor:
        """Mix a whole sequence; return (B, T, H, V).

        Raises:
            BadInput: the kernel cannot look that way.
        """
        if ("causal" if causal else "all") not in self.sees:
            raise BadInput(
                f"{type(self).__name__} is {' or '.join(sorted(self.sees))}, this attention "
                f"{'is causal' if causal else 'sees all tokens'}; choose another method"
            )
        if causal:
            return self.advance(heads, self.init_state(len(heads.q), heads.q))[0]
        return self.mix_all(heads)

    def run(self, heads: Heads, causal: bool) -> Tensor:
        """Return :meth:`mix`, as a function of two arguments."""
        return self.mix(heads, causal=causal)

    def mix_all(self, heads: Heads) -> Tensor:
        """Mix where every token sees every other, (B, T, H, V)."""
        raise BadInput(f"{type(self).__name__} mixes causally only")


class FeatureKernel(Kernel):
    """Linear attention by features of queries and keys, divided by the sum of its weights."""

    @abstractmethod
    def features(self, heads: Heads) -> tuple[Tensor, Tensor]:
        """Return features that are not negative, of queries and keys, (B, T, h, F) each, in float32 at least."""

    @property
    @abstractmethod
    def memory_shape(self) -> tuple[int, int, int]:
        """Heads, features, and values + 1 of the memory."""

    def values(self, heads: Heads) -> Tensor:
        """Return the values as they are mixed, (B, T, h, V)."""
        return heads.v

    def finish(self, o: Tensor, heads: Heads) -> Tensor:
        """Return the mixed values with what else belongs to them, (B, T, H, V)."""
        return o.to(heads.v.dtype)

    def weights(self, heads: Heads, *, causal: bool) -> Tensor:
        """Return the weights that this attention implies, (B, h, T, T); for looking and learning, not for speed."""
        phi_q, phi_k = self.features(heads)
        return linear_weights(phi_q, phi_k, heads, causal=causal)

    def _hidden(self, phi_k: Tensor, heads: Heads) -> Tensor:
        return phi_k if heads.seen is None else phi_k * heads.seen[..., None, None]

    def init_state(self, batch_size: int, like: Tensor) -> State:
        """Return empty sums."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return {"memory": like.new_zeros((batch_size, *self.memory_shape), dtype=dtype)}

    def advance(self, heads: Heads, state: State) -> tuple[Tensor, State]:
        """Mix causally after ``state``."""
        phi_q, phi_k = self.features(heads)
        phi_k, v = self._hidden(phi_k, heads), self.values(heads)
        o, memory = normalized_linear(
            phi_q, phi_k, v, causal=True, memory=state["memory"], form=self.form, chunk=self.chunk
        )
        return self.finish(o, heads), {"memory": memory}

    def mix_all(self, heads: Heads) -> Tensor:
        """Mix where every token sees every other."""
        phi_q, phi_k = self.features(heads)
        o, _ = normalized_linear(phi_q, self._hidden(phi_k, heads), self.values(heads), causal=False)
        return self.finish(o, heads)
