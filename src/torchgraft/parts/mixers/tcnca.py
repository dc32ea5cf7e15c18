"""Mega's gated attention within chunks, with a tree of dilated convolutions where Mega has a moving average.

`TCNCA: Temporal Convolution Network with Chunked Attention for Scalable Sequence Processing
<https://arxiv.org/abs/2312.05605>`_ (Katsch et al., 2023), on `Mega <https://arxiv.org/abs/2209.10655>`_ (Ma et al.):
x'' = TCN(x), y = u c + (1 - u) x with u = sigmoid(W_u x''), c = silu(W_h x'' + U_h (g O)), g = silu(W_g x''),
O = softmax(q k^T / sqrt(K) + bias) v within a chunk, q and k scaled and shifted copies of silu(W_z x''), v =
silu(W_v x).

Departures: convolutions are depthwise unless ``groups`` says otherwise, with SiLU and a residual a layer, since the
paper leaves these open; the bias is one learned number a distance and head; the sizes by default are ours.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.catalogue import Card, Claim
from torchgraft.engines.longconv import DampedEMA, DilatedStack
from torchgraft.engines.recurrence.heads import head_size, merge_heads, split_heads
from torchgraft.engines.recurrence.mixer import State, StatefulMixer
from torchgraft.errors import BadInput

__all__ = ["CARD", "TCNCA", "chunk_attention"]

CARD = Card(
    key="tcnca",
    title="Temporal convolution network with chunked attention",
    seed_id=154,
    authors="Katsch et al., 2023",
    reference="https://arxiv.org/abs/2312.05605",
    family="parts/mixers",
    kind="part",
    engine=("longconv",),
    equation="x'' = TCN(x),  O = softmax_chunk(q k^T / sqrt(K) + bias) v,  y = u silu(W_h x'' + U_h (g O)) + (1 - u) x",
    entry="TCNCA",
    capabilities=frozenset({"causal", "stateful", "linear-time", "compilable"}),
    declared={
        "parameters": "depth*kernel*d_model + num_heads*chunk + 4*num_heads*key_size"
        " + (d_model + 1)*(num_heads*key_size + 2*expand_v*d_model + 2*d_model) + expand_v*d_model*d_model"
    },
    example={"d_model": 8, "kernel": 3, "depth": 2, "chunk": 8, "num_heads": 2, "key_size": 4},
    shapes=((2, 20, 8),),
    oracles=(
        "without activation and residual the output reaches back exactly 1 + (K - 1)(f^D - 1)/(f - 1) tokens",
        "with f = K the impulse response at lag sum_l j_l K^l is the product of the taps w^l_{j_l}",
        "with the convolutions bypassed, outputs of one chunk do not depend on any other chunk",
        "the moving average by FFT is the one by recurrence",
    ),
    claim=Claim(
        text="Recall of 10 pairs, twice each, in 64 tokens where the pairs stand before the queries' chunk of 32: "
        "TCNCA, simplified, beside Mega's average in its place and chunked attention alone; and its time by length.",
        figure="accuracy >= EMA - 1 point, chunk alone >= 20 points lower, time as T^0.9 to T^1.15 from 1k to 16k",
    ),
    choose_when="long inputs where convolutions are quick, and what matters is near or at learned distances",
    choose_instead="gla or gated-deltanet where what to remember depends on its content, whatever the distance",
    confidence="medium",
    bibtex="""@article{katsch2023tcnca,
  title={TCNCA: Temporal Convolution Network with Chunked Attention for Scalable Sequence Processing},
  author={Katsch, Tobias and others},
  journal={arXiv preprint arXiv:2312.05605},
  year={2023}
}""",
)


def _attended(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, seen: Tensor) -> Tensor:
    """Attend with ``bias`` (..., H, Q, S) where ``seen``; (..., Q, H, K), (..., S, H, K or V) -> (..., Q, H, V)."""
    scores = torch.einsum("...qhk,...shk->...hqs", q, k).to(bias.dtype) * q.shape[-1] ** -0.5 + bias
    weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
    return torch.einsum("...hqs,...shv->...qhv", weights.to(v.dtype), v)


def chunk_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Attend causally within consecutive chunks.

    Args:
        q, k, v: queries, keys and values.
        bias: added to the scores by distance; its length is that of a chunk.

    Shapes:
        q, k: (B, T, H, K); v: (B, T, H, V); bias: (H, chunk) -> (B, T, H, V).

    Example:
        >>> zero, v = torch.zeros(1, 4, 1, 1), torch.tensor([1.0, 3.0, 5.0, 7.0]).view(1, 4, 1, 1)
        >>> chunk_attention(zero, zero, v, torch.zeros(1, 2)).flatten().tolist()
        [1.0, 2.0, 5.0, 6.0]
    """
    tokens, chunk = q.shape[1], min(bias.shape[-1], q.shape[1])
    missing = -tokens % chunk
    padded = [F.pad(x, (0, 0, 0, 0, 0, missing)) for x in (q, k, v)]
    cut = [x.reshape(len(x), -(-tokens // chunk), chunk, *x.shape[2:]) for x in padded]  # (B, n, c, H, .)
    place = torch.arange(chunk, device=q.device)
    far = place[:, None] - place  # (c, c)
    wide = bias.to(torch.promote_types(bias.dtype, torch.float32))
    out = _attended(cut[0], cut[1], cut[2], wide[:, far.clamp(min=0)], far >= 0)
    return out.flatten(1, 2)[:, :tokens]


class _Bypass(nn.Module):
    """Chunked attention alone: the tokens as they are, and no state."""

    def init_state(self, batch_size: int) -> State:
        return {}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        return x, {}


class TCNCA(StatefulMixer):
    """A temporal convolution network, and attention within chunks on what it gives.

    Args:
        d_model: width D.
        kernel: taps of each convolution.
        depth: convolutions.
        dilation_factor: ratio of the gaps of one convolution to those before; default ``kernel``, a tree.
        chunk: tokens that attend to each other.
        num_heads: heads H.
        key_size: K; default D / (4 H), at least 1.
        expand_v: width of the values as a multiple of D.
        simple: whether y = x + W_o O, with q, k and v linear in TCN(x), and no gates.
        groups: of the convolutions; default D.
        temporal: ``"tcn"``; ``"ema"`` puts Mega's moving average of order 16 in its place, ``"none"`` nothing.

    Shapes:
        (B, T, D) -> (B, T, D); state: the last inputs of every convolution, the keys and values of the present chunk,
        (B, chunk, H, K) and (B, chunk, H, V), zero where no token stands yet, and how many stand, (B,).

    Example:
        >>> mixer = TCNCA(8, kernel=4, depth=2, chunk=16)
        >>> mixer.receptive_field(), mixer(torch.randn(2, 40, 8)).shape
        (16, torch.Size([2, 40, 8]))

    Raises:
        BadInput: an argument is out of range.
    """

    def __init__(
        self,
        d_model: int,
        *,
        kernel: int = 8,
        depth: int = 3,
        dilation_factor: int | None = None,
        chunk: int = 128,
        num_heads: int = 1,
        key_size: int | None = None,
        expand_v: int = 2,
        simple: bool = False,
        groups: int | None = None,
        temporal: Literal["tcn", "ema", "none"] = "tcn",
    ) -> None:
        super().__init__(d_model)
        key_size = max(1, d_model // (4 * max(num_heads, 1))) if key_size is None else key_size
        if min(chunk, key_size, expand_v) < 1:
            raise BadInput(f"chunk, key_size and expand_v must be at least 1, got {chunk}, {key_size} and {expand_v}")
        values = expand_v * d_model
        self.value_size = head_size(values, num_heads, "expand_v * d_model")
        self.chunk, self.num_heads, self.key_size, self.simple = chunk, num_heads, key_size, simple
        keys = num_heads * key_size
        if temporal == "tcn":
            self.temporal: DilatedStack | DampedEMA | _Bypass = DilatedStack(
                d_model, kernel=kernel, depth=depth, factor=dilation_factor, groups=groups
            )
        elif temporal in ("ema", "none"):
            self.temporal = DampedEMA(d_model) if temporal == "ema" else _Bypass()
        else:
            raise BadInput(f"temporal must be 'tcn', 'ema' or 'none', got {temporal!r}")
        self.bias = nn.Parameter(torch.zeros(num_heads, chunk))
        if simple:
            self.sizes = [keys, keys, values]
            self.inner = nn.Linear(d_model, sum(self.sizes))
        else:
            self.sizes = [keys, values, d_model, d_model]  # z, g, u, h
            self.inner = nn.Linear(d_model, sum(self.sizes))
            self.value = nn.Linear(d_model, values)
            self.scale = nn.Parameter(torch.ones(2, num_heads, key_size) + torch.randn(2, num_heads, key_size) * 0.02)
            self.shift = nn.Parameter(torch.zeros(2, num_heads, key_size))
        self.out = nn.Linear(values, d_model, bias=False)

    def receptive_field(self) -> int:
        """Return how many tokens reach an output of the convolutions, the present one included.

        Raises:
            BadInput: there are no convolutions.
        """
        if not isinstance(self.temporal, DilatedStack):
            raise BadInput("receptive_field() is of temporal='tcn'; a moving average sees all tokens, a bypass one")
        return self.temporal.receptive_field

    def init_state(self, batch_size: int) -> State:
        """Return zeros: no token stands in the chunk, none before it."""
        shape = (batch_size, self.chunk, self.num_heads)
        return {
            **self.temporal.init_state(batch_size),
            "keys": self.bias.new_zeros(*shape, self.key_size),
            "values": self.bias.new_zeros(*shape, self.value_size),
            "filled": torch.zeros(batch_size, dtype=torch.long, device=self.bias.device),
        }

    def _projected(self, x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """Return q, k (B, T, H, K), v (B, T, H, V) and, unless simple, the inputs of the gates g, u and h."""
        parts = self.inner(seen).split(self.sizes, dim=-1)
        if self.simple:
            q, k, v = (split_heads(part, self.num_heads) for part in parts)
            return q, k, v, ()
        z = split_heads(F.silu(parts[0]), self.num_heads)
        q, k = (z * self.scale[side] + self.shift[side] for side in (0, 1))
        return q, k, split_heads(F.silu(self.value(x)), self.num_heads), tuple(parts[1:])

    def _mixed(self, x: Tensor, attended: Tensor, gates: tuple[Tensor, ...]) -> Tensor:
        """Return the layer's output from what was attended to, (B, T, H, V)."""
        read = merge_heads(attended)
        if self.simple:
            added: Tensor = self.out(read)
            return x + added.to(x.dtype)
        g, u, h = gates
        candidate = F.silu(h + self.out(F.silu(g) * read))
        return torch.lerp(x, candidate.to(x.dtype), torch.sigmoid(u).to(x.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Mix ``x``, (B, T, D) -> (B, T, D)."""
        self.checked(x)
        q, k, v, gates = self._projected(x, self.temporal(x)[0])
        return self._mixed(x, chunk_attention(q, k, v, self.bias), gates)

    def prefill(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Mix ``x`` after ``state``; rows may stand at different places of their chunks."""
        self.checked(x)
        batch, tokens, _ = x.shape
        if state is None:
            state = self.init_state(batch)
        elif missing := sorted(self.init_state(0).keys() - state.keys()):
            raise BadInput(f"the state lacks {missing}; begin with init_state()")
        if len(state["filled"]) != batch:
            raise BadInput(f"the state must be of {batch} rows, got {len(state['filled'])}")
        seen, after = self.temporal(x, state)
        q, k, v, gates = self._projected(x, seen)
        filled = state["filled"]
        places = filled[:, None] + torch.arange(tokens, device=x.device)  # (B, T), counted from the chunk's begin
        if tokens == 1:
            k, v = (
                state[name].to(value.dtype).scatter(1, places[..., None, None].expand_as(value), value)
                for name, value in (("keys", k), ("values", v))
            )
            far = places - torch.arange(self.chunk, device=x.device)  # (B, chunk)
            wide = self.bias.to(torch.promote_types(self.bias.dtype, torch.float32))
            bias = wide[:, far.clamp(min=0)].transpose(0, 1)[:, :, None]  # (B, H, 1, chunk)
            y = _attended(q, k, v, bias, (far >= 0)[:, None, None])
            full = (filled + 1 == self.chunk)[:, None, None, None]
            after["keys"], after["values"] = (
                torch.where(full, torch.zeros_like(value), value).to(state[name].dtype)
                for name, value in (("keys", k), ("values", v))
            )
            after["filled"] = (filled + 1) % self.chunk
            return self._mixed(x, y, gates), after
        room = -(-(self.chunk - 1 + tokens) // self.chunk) * self.chunk  # wherever in the chunk a row stands
        laid = []
        for value, before in ((q, None), (k, state["keys"]), (v, state["values"])):
            base = value.new_zeros(batch, room + self.chunk, *value.shape[2:])
            if before is not None:
                base = torch.cat([before.to(value.dtype), base[:, self.chunk :]], dim=1)
            laid.append(base.scatter(1, places[..., None, None].expand_as(value), value))
        y = chunk_attention(laid[0][:, :room], laid[1][:, :room], laid[2][:, :room], self.bias)
        y = y.gather(1, places[..., None, None].expand(-1, -1, *y.shape[2:]))
        end = filled + tokens
        kept = (end - end % self.chunk)[:, None] + torch.arange(self.chunk, device=x.device)  # (B, chunk)
        after["keys"], after["values"] = (
            value.gather(1, kept[..., None, None].expand(-1, -1, *value.shape[2:])).to(state[name].dtype)
            for name, value in (("keys", laid[1]), ("values", laid[2]))
        )
        after["filled"] = end % self.chunk
        return self._mixed(x, y, gates), after
