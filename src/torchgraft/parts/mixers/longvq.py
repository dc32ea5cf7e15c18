"""Moving averages in front of attention over quantised keys, whose cost is set by the size of a codebook.

`LongVQ: Long Sequence Modeling with Vector Quantization on Structured Memory <https://arxiv.org/abs/2404.11163>`_ (Liu
et al., 2024). With khat_j the code C_s nearest to k_j and Delta the one-hot assignments,
softmax(Q Khat^T) V = [exp(Q C^T) (Delta V)] / [exp(Q C^T) Delta 1], linear in T. The block: X' = EMA(X),
Z = SiLU(X' W_z), q and k = kappa Z + mu, V = SiLU(X W_v), H = SiLU(X' W_h + (SiLU(X' W_g) * O) U), and
Y = f H + (1 - f) X with f = sigmoid(X' W_f).

Departures: no code was published, and the wiring above follows `Mega <https://arxiv.org/abs/2209.10655>`_ and
`Transformer-VQ <https://arxiv.org/abs/2309.16354>`_. Queries and keys are normed; the attention function is softmax, in
one causal head. The commitment loss enters as its gradient at the keys, so that no loss needs to be passed on. As in
Transformer-VQ, keys get gradients from the last ``window`` queries only; unlike there, that does not depend on how the
sequence is cut into blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines.longconv.ema import DampedEMA
from torchgraft.engines.recurrence.mixer import State, StatefulMixer
from torchgraft.errors import BadInput

__all__ = ["CARD", "LongVQ", "VectorQuantizer", "causal_vq_attention", "code_perplexity", "vq_attention"]

CARD = Card(
    key="longvq",
    title="LongVQ: attention over vector-quantised keys",
    seed_id=280,
    authors="Liu et al., 2024",
    reference="https://arxiv.org/abs/2404.11163",
    family="parts/mixers",
    kind="part",
    engine=("recurrence", "longconv"),
    equation="softmax(Q Khat^T) V = [exp(Q C^T) (Delta V)] / [exp(Q C^T) Delta 1]",
    entry="LongVQ",
    capabilities=frozenset({"causal", "stateful", "linear-time"}),
    declared={
        "parameters": "2*d_model**2 + d_model*key_size + 3*d_model*value_size + 2*d_model + 5*key_size + 2*value_size"
        " + window + 4*d_model*order"
    },
    example={"d_model": 8, "key_size": 4, "value_size": 12, "codes": 8, "window": 4, "block": 8, "order": 2},
    shapes=((2, 12, 8),),
    oracles=(
        "grouped by codes or in causal blocks of any size, it equals dense attention with quantised keys",
        "a codebook that holds every key gives softmax attention over the keys themselves",
        "the gradient at a key is that at its code plus 2 commit (k - khat); averages of the codebook settle at the "
        "means of the clusters",
        "twice the tokens are exactly twice the multiplications",
    ),
    claim=Claim(
        text="Nested maxima and minima of digits (as in ListOps) with sequences of up to 64 symbols, two layers of "
        "width 32: LongVQ against its moving averages alone and against the same block with dense attention.",
        figure="accuracy >= 3 points above averages alone and at most 2 points below dense attention; counted work of "
        "2048 tokens at most 2.3x that of 1024",
    ),
    choose_when="a causal model should address old tokens by content in constant memory a token",
    choose_instead="gated-linear-attention, which trains without a codebook; softmax-attention below a few thousand "
    "tokens",
    expected_failures={
        "gradients-are-the-derivatives": "straight-through gradients of a rounding are no derivatives, by design"
    },
    confidence="low",
    bibtex="""@inproceedings{liu2024longvq,
  title={LongVQ: Long Sequence Modeling with Vector Quantization on Structured Memory},
  author={Liu, Zicheng and Wang, Li and Li, Siyuan and Wang, Zedong and Lin, Haitao and Li, Stan Z.},
  booktitle={International Joint Conference on Artificial Intelligence},
  year={2024}
}""",
)


class _StraightThrough(torch.autograd.Function):
    """Replace keys by codes; pass the codes' gradient to the keys and add that of the commitment loss."""

    @staticmethod
    def forward(ctx: Any, keys: Tensor, codes: Tensor, commit: float) -> Tensor:
        ctx.save_for_backward(keys - codes)
        ctx.commit = commit
        return codes.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (apart,) = ctx.saved_tensors
        return grads[0] + 2.0 * ctx.commit * apart, None, None


class VectorQuantizer(nn.Module):
    """A codebook that follows the means of the keys assigned to each code; it moves in training only.

    Args:
        size: K, the width of a key.
        codes: S, the number of codes.
        ema: how much of the averages a training step keeps.
        commit: weight of the commitment loss.
        dead: a code whose average number of keys falls below is put on a random key of the batch.

    Shapes:
        (..., K) -> (..., K) and the codes' numbers (...)

    Example:
        >>> quantizer = VectorQuantizer(2, codes=3).eval()
        >>> keys, numbers = quantizer(quantizer.codebook.flip(0))
        >>> numbers.tolist()
        [2, 1, 0]

    Raises:
        BadInput: a setting is out of range.
    """

    codebook: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(
        self, size: int, *, codes: int = 512, ema: float = 0.99, commit: float = 1e-4, dead: float = 0.1
    ) -> None:
        super().__init__()
        if size < 1 or codes < 1:
            raise BadInput(f"size and codes must be at least 1, got {size} and {codes}")
        if not 0 <= ema < 1 or commit < 0 or dead < 0:
            raise BadInput(f"ema must be in [0, 1), commit and dead at least 0, got {ema}, {commit} and {dead}")
        self.codes, self.ema, self.commit, self.dead = codes, ema, commit, dead
        self.register_buffer("codebook", torch.randn(codes, size))
        self.register_buffer("counts", torch.ones(codes))
        self.register_buffer("sums", self.codebook.clone())

    def forward(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return the nearest code of every key, with a straight-through gradient, and its number."""
        codebook = self.codebook.to(keys.dtype)
        with torch.no_grad():
            far = codebook.square().sum(-1) - 2.0 * (keys @ codebook.mT)  # |k - c|^2 less |k|^2
            numbers = far.argmin(-1)
        found: Tensor = _StraightThrough.apply(keys, codebook[numbers], self.commit if self.training else 0.0)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
        if self.training and keys.numel():
            self._follow(keys.detach().flatten(0, -2), numbers.flatten())
        return found, numbers

    @torch.no_grad()
    def _follow(self, keys: Tensor, numbers: Tensor) -> None:
        one_hot = F.one_hot(numbers, self.codes).to(keys.dtype)  # (N, S)
        counts = torch.lerp(one_hot.sum(0), self.counts.to(keys.dtype), self.ema)
        sums = torch.lerp(one_hot.mT @ keys, self.sums.to(keys.dtype), self.ema)
        dead = counts < self.dead
        drawn = keys[torch.randint(len(keys), (self.codes,), device=keys.device)]
        counts = torch.where(dead, 1.0, counts)
        sums = torch.where(dead[:, None], drawn, sums)
        self.counts.copy_(counts)
        self.sums.copy_(sums)
        self.codebook.copy_(sums / counts[:, None])


def code_perplexity(numbers: Tensor, codes: int) -> float:
    """Return the exponential of the entropy of code usage: ``codes`` where all are used alike, 1 where one is.

    Example:
        >>> round(code_perplexity(torch.tensor([0, 1, 0, 1]), 8), 4)
        2.0
    """
    share = numbers.flatten().bincount(minlength=codes).double() / max(numbers.numel(), 1)
    return float(torch.special.entr(share).sum().exp())


def vq_attention(q: Tensor, numbers: Tensor, codebook: Tensor, v: Tensor) -> Tensor:
    """Return softmax attention of all queries to all quantised keys, grouped by codes.

    Args:
        q: queries, scaled.
        numbers: the code of every key.
        codebook: C.
        v: values.

    Shapes:
        q: (B, T, K); numbers: (B, N); codebook: (S, K); v: (B, N, V) -> (B, T, V).
    """
    one_hot = F.one_hot(numbers, len(codebook)).to(v.dtype)  # (B, N, S)
    counts, sums = one_hot.sum(1), one_hot.mT @ v
    logits = (q @ codebook.mT).masked_fill(counts[:, None] == 0, -torch.inf)
    weights = (logits - logits.amax(-1, keepdim=True)).exp()  # (B, T, S)
    return (weights @ sums) / (weights @ counts[..., None])


def causal_vq_attention(
    q: Tensor, k: Tensor, numbers: Tensor, v: Tensor, codebook: Tensor, bias: Tensor, *, state: State, block: int = 64
) -> tuple[Tensor, State]:
    """Return causal softmax attention to quantised keys, with a bias on the last W tokens, and the next state.

    In blocks of C tokens: the block's own keys and the W - 1 before it one by one, everything older by its code. The
    result does not depend on C.

    Args:
        q: queries, scaled.
        k: quantised keys; a gradient reaches those among the last W of a query.
        numbers: the code of every key.
        v: values.
        codebook: C.
        bias: what is added to the logit of the token 0, 1, ... W - 1 back.
        state: the sums over codes, and the last W - 1 tokens.
        block: tokens a block.

    Shapes:
        q, k: (B, T, K); numbers: (B, T); v: (B, T, V); codebook: (S, K); bias: (W,) -> (B, T, V).
    """
    tokens, codes, near = q.shape[1], len(codebook), len(bias) - 1
    block = min(block, tokens)
    short = -tokens % block
    blocks = (tokens + short) // block
    # what stands before and in the sequence, (B, W - 1 + T, ...), and what is filled up to whole blocks
    keys = torch.cat([state["recent_key"], k], 1)
    values = torch.cat([state["recent_value"], v], 1)
    every = torch.cat([state["recent_code"], numbers], 1)  # -1 where there is no token
    padded = F.pad(every, (0, short), value=-1)
    wide_k, wide_v = F.pad(keys, (0, 0, 0, short)), F.pad(values, (0, 0, 0, short))

    # tokens that leave the explicit stretch at the end of each block: the first T of all
    gone = padded[:, : tokens + short].masked_fill(torch.arange(tokens + short, device=q.device) >= tokens, -1)
    one_hot = F.one_hot(gone + 1, codes + 1)[..., 1:].to(v.dtype).reshape(len(q), blocks, block, codes)  # (B, N, C, S)
    leaving = one_hot.mT @ wide_v[:, : tokens + short].reshape(len(q), blocks, block, v.shape[-1])  # (B, N, S, V)
    sums = torch.cat([state["code_sum"][:, None], leaving], 1).cumsum(1)  # (B, N + 1, S, V)
    counts = torch.cat([state["code_count"][:, None], one_hot.sum(2)], 1).cumsum(1)  # (B, N + 1, S)

    queries = F.pad(q, (0, 0, 0, short)).reshape(len(q), blocks, block, q.shape[-1])  # (B, N, C, K)
    seen_k = wide_k.unfold(1, near + block, block)  # (B, N, K, W - 1 + C)
    seen_v = wide_v.unfold(1, near + block, block).mT  # (B, N, W - 1 + C, V)
    there = padded.unfold(1, near + block, block)[:, :, None] >= 0  # (B, N, 1, W - 1 + C)
    back = torch.arange(block, device=q.device)[:, None] + near - torch.arange(near + block, device=q.device)
    local = (back >= 0) & (back <= near)
    fixed = seen_k.detach()
    logits = queries @ fixed  # (B, N, C, W - 1 + C)
    if k.requires_grad or keys.requires_grad:  # adds zero, and the keys' gradient within the window
        logits = logits + (queries.detach() @ (seen_k - fixed)) * local
    logits = logits + bias[back.clamp(0, near)] * local
    # tokens of padding see themselves, so that their softmax is finite
    hidden = (back < 0) | (~there & (back != 0))
    logits = logits.masked_fill(hidden, -torch.inf)
    old = (queries @ codebook.mT).masked_fill(counts[:, :-1, None] == 0, -torch.inf)  # (B, N, C, S)
    top = torch.maximum(logits.amax(-1, keepdim=True), old.amax(-1, keepdim=True)).detach()
    new_weights, old_weights = (logits - top).exp(), (old - top).exp()
    total = new_weights.sum(-1, keepdim=True) + old_weights @ counts[:, :-1, :, None]
    out = (new_weights @ seen_v + old_weights @ sums[:, :-1]) / total
    last = {
        "code_sum": sums[:, -1],
        "code_count": counts[:, -1],
        "recent_key": keys[:, tokens:],
        "recent_value": values[:, tokens:],
        "recent_code": every[:, tokens:],
    }
    return out.flatten(1, 2)[:, :tokens], last


class LongVQ(StatefulMixer):
    """Damped moving averages, attention over quantised keys, and gates between them.

    Args:
        d_model: the width D.
        key_size: K of queries and keys; default D / 2.
        value_size: V of the values; default 2 D.
        codes: size S of the codebook.
        window: W, how many tokens back the learned bias and the keys' gradients reach.
        block: tokens a block, which changes the cost but no number.
        order: moving averages a channel.
        ema: how much of the codebook's averages a training step keeps.
        commit: weight of the commitment loss.

    Shapes:
        (B, T, D) -> (B, T, D)

    Example:
        >>> mixer = LongVQ(8, codes=4, window=2).eval()
        >>> y, state = mixer.prefill(torch.randn(1, 5, 8))
        >>> y.shape, state["code_count"].sum().item()
        (torch.Size([1, 5, 8]), 4.0)

    Raises:
        BadInput: a setting is out of range.
    """

    def __init__(
        self,
        d_model: int,
        *,
        key_size: int | None = None,
        value_size: int | None = None,
        codes: int = 512,
        window: int = 32,
        block: int = 64,
        order: int = 16,
        ema: float = 0.99,
        commit: float = 1e-4,
    ) -> None:
        super().__init__(d_model)
        self.key_size = max(1, d_model // 2) if key_size is None else key_size
        self.value_size = 2 * d_model if value_size is None else value_size
        sizes = {"key_size": self.key_size, "value_size": self.value_size, "window": window, "block": block}
        for name, value in sizes.items():
            if value < 1:
                raise BadInput(f"{name} must be at least 1, got {value}")
        self.window, self.block = window, block
        self.average = DampedEMA(d_model, order)
        self.inner = nn.Linear(d_model, self.key_size + self.value_size + 2 * d_model)
        self.value = nn.Linear(d_model, self.value_size)
        self.recall = nn.Linear(self.value_size, d_model, bias=False)
        self.scales = nn.Parameter(torch.ones(2, self.key_size) + 0.1 * torch.randn(2, self.key_size))
        self.shifts = nn.Parameter(torch.zeros(2, self.key_size))
        self.bias = nn.Parameter(torch.zeros(window))
        self.quantizer = VectorQuantizer(self.key_size, codes=codes, ema=ema, commit=commit)

    def init_state(self, batch_size: int) -> State:
        """Return averages of zero, empty codes, and no recent token."""
        averages = self.average.init_state(batch_size)
        near, like = self.window - 1, averages["ema"]
        return {
            **averages,
            "code_sum": like.new_zeros(batch_size, self.quantizer.codes, self.value_size),
            "code_count": like.new_zeros(batch_size, self.quantizer.codes),
            "recent_key": like.new_zeros(batch_size, near, self.key_size),
            "recent_value": like.new_zeros(batch_size, near, self.value_size),
            "recent_code": torch.full((batch_size, near), -1, dtype=torch.long, device=like.device),
        }

    def prefill(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Mix ``x``, (B, T, D), after ``state``."""
        self.checked(x)
        held = self.init_state(len(x)) if state is None else state
        smooth, averages = self.average(x, held)  # X'
        z, gate, update, carried = self.inner(smooth).split(
            [self.key_size, self.value_size, self.d_model, self.d_model], dim=-1
        )
        v = F.silu(self.value(x))
        with torch.autocast(x.device.type, enabled=False):
            dtype = held["code_sum"].dtype
            both = F.silu(z.to(dtype))[:, :, None] * self.scales.to(dtype) + self.shifts.to(dtype)  # (B, T, 2, K)
            q, k = F.rms_norm(both, (self.key_size,), eps=1e-6).unbind(2)
            mixed, last = self.attend(q * self.key_size**-0.5, k, v.to(dtype), held)
        fresh = F.silu(update + self.recall(F.silu(gate) * mixed.to(gate.dtype)))
        y = torch.lerp(x, fresh.to(x.dtype), carried.sigmoid().to(x.dtype))
        return y, {**averages, **last}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, held: State) -> tuple[Tensor, State]:
        """Return attention to the codes of the keys, and the state but for the averages."""
        codebook = self.quantizer.codebook.to(k.dtype, copy=True)  # as it is before it follows these keys
        bias = self.bias.to(k.dtype)
        k, numbers = self.quantizer(k)
        return causal_vq_attention(q, k, numbers, v, codebook, bias, state=held, block=self.block)
