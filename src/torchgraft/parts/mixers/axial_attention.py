"""Attention along one axis of an array at a time, and an autoregressive model of images that is made of it.

`Axial Attention in Multidimensional Transformers <https://arxiv.org/abs/1912.12180>`_ (Ho et al., 2019): softmax
attention over one axis with all others as batch, N^(1 + 1/n) instead of N^2 for n axes; p(x) = prod_ij p(x_ij | x_<ij).

Departures: blocks have the library's GELU feed-forward part; nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torchgraft.bench.models import FeedForward
from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines.attention import attend
from torchgraft.engines.attention.mixer import AttentionMixer
from torchgraft.engines.recurrence.mixer import State
from torchgraft.errors import BadInput

__all__ = ["CARD", "AxialAttention", "AxialBlock", "AxialTransformer", "shift"]

CARD = Card(
    key="axial-attention",
    title="Axial attention and the axial transformer",
    seed_id=234,
    authors="Ho et al., 2019",
    reference="https://arxiv.org/abs/1912.12180",
    family="parts/mixers",
    kind="part",
    engine=("attention",),
    equation="O = softmax(Q K^T / sqrt(K)) V along one axis, all others as batch;  p(x) = prod_ij p(x_ij | x_<ij)",
    entry="AxialAttention",
    capabilities=frozenset({"grid"}),
    declared={"parameters": "4*d_model**2"},
    example={"d_model": 16, "num_heads": 2, "axis": 2},
    shapes=((2, 3, 4, 16),),
    oracles=(
        "on an array of one axis it is softmax attention, and it commutes with permutations of the other axes",
        "the logits of a pixel depend on every earlier pixel and channel, and on no later one",
        "sampling row by row with a cache draws the image that pixel by pixel recomputation draws",
        "the probabilities of all 2 x 2 binary images sum to 1",
    ),
    claim=Claim(
        text="Density of the 8 x 8 digits with 17 levels: the axial transformer, causal attention over all 64 pixels "
        "with as many blocks, and masked row attention alone; time of a training step at 32 x 32.",
        figure="bits a pixel at most 2 % above full attention; rows alone at least 5 % above the axial transformer; a "
        "step at 32 x 32 at least 3 times as fast as full attention",
    ),
    choose_when="images, video or other arrays, in which every position must see all others at little cost",
    choose_instead="softmax-attention on short sequences; windows where near is all that matters",
    expected_failures={"wrong-shape-is-refused": "arrays of any number of axes are meant, one more is no wrong shape"},
    bibtex="""@article{ho2019axial,
  title={Axial Attention in Multidimensional Transformers},
  author={Ho, Jonathan and Kalchbrenner, Nal and Weissenborn, Dirk and Salimans, Tim},
  journal={arXiv preprint arXiv:1912.12180},
  year={2019}
}""",
)


class _Softmax(AttentionMixer):
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, causal=self.causal)


class AxialAttention(nn.Module):
    """Multi-head attention along one axis of an array.

    Args:
        d_model: the width D.
        num_heads: H; divides ``d_model``.
        axis: which axis of the input, (B, N_1, ..., N_n, D), from 1 to n.
        causal: whether a position sees itself and those before it on the axis only.

    Shapes:
        (B, N_1, ..., N_n, D) -> (B, N_1, ..., N_n, D)

    Example:
        >>> AxialAttention(8, num_heads=2, axis=1)(torch.randn(1, 3, 4, 8)).shape
        torch.Size([1, 3, 4, 8])

    Raises:
        BadInput: ``num_heads`` does not divide ``d_model``, or the axis is that of the batch.
    """

    def __init__(self, d_model: int, *, num_heads: int = 4, axis: int = 1, causal: bool = False) -> None:
        super().__init__()
        if axis < 1:
            raise BadInput(f"axis must be at least 1 (0 is the batch), got {axis}")
        self.d_model, self.axis = d_model, axis
        self.mixer = _Softmax(d_model, num_heads=num_heads, rotary=False, causal=causal)

    def forward(self, x: Tensor) -> Tensor:
        """Mix along the axis.

        Raises:
            BadInput: ``x`` has another width, or no such axis.
        """
        if x.ndim < self.axis + 2 or x.shape[-1] != self.d_model or not x.is_floating_point():
            raise BadInput(
                f"x must be floating point with {self.axis} axes or more between batch and width {self.d_model}, "
                f"got {x.dtype} {tuple(x.shape)}"
            )
        moved = x.movedim(self.axis, -2)  # (B, ..., N, D)
        mixed = self.mixer(moved.reshape(-1, *moved.shape[-2:])) if x.numel() else moved
        return mixed.reshape(moved.shape).movedim(-2, self.axis)


def shift(x: Tensor, axis: int) -> Tensor:
    """Return ``x`` moved by one along ``axis``: what was last falls off, zeros come first.

    Example:
        >>> shift(torch.tensor([[1, 2, 3]]), 1)
        tensor([[0, 1, 2]])
    """
    return torch.cat([torch.zeros_like(x.narrow(axis, 0, 1)), x.narrow(axis, 0, x.shape[axis] - 1)], dim=axis)


class AxialBlock(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)).

    Args:
        d_model: the width D.
        num_heads: H.
        axis: the axis of the attention.
        causal: whether it is masked.

    Shapes:
        (B, ..., D) -> (B, ..., D)
    """

    def __init__(self, d_model: int, num_heads: int, axis: int, *, causal: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.attention = AxialAttention(d_model, num_heads=num_heads, axis=axis, causal=causal)
        self.mlp = FeedForward(d_model, 4 * d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Mix along the axis, then each position by itself."""
        x = x + self.attention(self.norm1(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Take one position, (B, D), after those that the state holds."""
        mixed, state = self.attention.mixer.step(self.norm1(x), state)
        x = x + mixed
        y: Tensor = x + self.mlp(self.norm2(x))
        return y, state


class AxialTransformer(nn.Module):
    """The density of images with discrete values, in raster order, one channel after another.

    Args:
        shape: (rows, columns).
        levels: number of values of a pixel.
        channels: C.
        d_model: the width D.
        num_heads: H.
        upper: pairs of blocks (all of a row; a column, masked) over the rows above; with 0 a pixel sees its row only.
        row: masked blocks within a row.

    Shapes:
        (B, C, rows, columns), integers -> (B, C, rows, columns, levels)

    Example:
        >>> model = AxialTransformer((2, 3), levels=4, d_model=8, num_heads=2)
        >>> model(torch.zeros(5, 1, 2, 3, dtype=torch.long)).shape
        torch.Size([5, 1, 2, 3, 4])

    Raises:
        BadInput: a size is below 1.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        levels: int,
        channels: int = 1,
        d_model: int = 64,
        num_heads: int = 4,
        upper: int = 1,
        row: int = 2,
    ) -> None:
        super().__init__()
        if min(*shape, levels, channels, d_model, row) < 1 or upper < 0:
            raise BadInput(
                f"sizes must be at least 1 (upper 0), got {shape}, {levels}, {channels}, {d_model}, {upper}, {row}"
            )
        self.size, self.levels, self.channels = tuple(shape), levels, channels
        self.embed = nn.ModuleList(nn.Embedding(levels, d_model) for _ in range(channels))
        self.rows = nn.Parameter(0.02 * torch.randn(shape[0], 1, d_model))
        self.columns = nn.Parameter(0.02 * torch.randn(1, shape[1], d_model))

        def pair(*, causal: bool) -> list[nn.Module]:
            return [
                AxialBlock(d_model, num_heads, 2, causal=False),
                AxialBlock(d_model, num_heads, 1, causal=causal),
            ]

        self.earlier = nn.Sequential(*pair(causal=False)) if channels > 1 else None
        self.outer = nn.Sequential(*(block for _ in range(upper) for block in pair(causal=True)))
        self.inner = nn.ModuleList(AxialBlock(d_model, num_heads, 2, causal=True) for _ in range(row))
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, levels * channels)

    def _place(self) -> Tensor:
        return self.rows + self.columns  # (rows, columns, D)

    def _given(self, x: Tensor, channel: int) -> Tensor:
        """Return what the channels before ``channel`` say, (B, rows, columns, D); zeros before the first."""
        base = self._place().expand(len(x), -1, -1, -1)
        if channel == 0 or self.earlier is None:
            return torch.zeros_like(base)
        for each in range(channel):
            base = base + self.embed[each](x[:, each])
        found: Tensor = self.earlier(base)
        return found

    def _above(self, x: Tensor, channel: int, given: Tensor) -> Tensor:
        """Return for every pixel what the rows above it say, (B, rows, columns, D)."""
        if not len(self.outer):
            return given + self._place()
        found: Tensor = self.outer(shift(self.embed[channel](x[:, channel]), 1) + self._place() + given)
        return found

    def _logits(self, h: Tensor, channel: int) -> Tensor:
        levels = self.levels
        found: Tensor = self.head(self.norm(h))[..., channel * levels : (channel + 1) * levels]
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of every pixel given those before it.

        Raises:
            BadInput: ``x`` has another shape, or values beyond the levels.
        """
        self._checked(x)
        found = []
        for channel in range(self.channels):
            h = self._above(x, channel, self._given(x, channel)) + shift(self.embed[channel](x[:, channel]), 2)
            for block in self.inner:
                h = block(h)
            found.append(self._logits(h, channel))
        return torch.stack(found, dim=1)

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log-probability of each image, in nats, (B, C, rows, columns) -> (B,)."""
        chosen: Tensor = self(x).log_softmax(-1).gather(-1, x[..., None])
        return chosen.flatten(1).sum(-1)

    @torch.no_grad()
    def sample(self, count: int, *, semi_parallel: bool = True, generator: torch.Generator | None = None) -> Tensor:
        """Draw images, (count, C, rows, columns).

        Args:
            count: how many.
            semi_parallel: whether the rows above are read once for each row, and a row pixel by pixel with a cache;
                otherwise everything is computed anew for every pixel. The draws are the same.
            generator: of the uniform numbers.
        """
        rows, columns = self.size
        device = self.rows.device
        uniform = torch.rand(count, self.channels, rows, columns, generator=generator, dtype=torch.float64).to(device)
        x = torch.zeros(count, self.channels, rows, columns, dtype=torch.long, device=device)
        for channel in range(self.channels):
            given = self._given(x, channel)
            for i in range(rows):
                if semi_parallel:
                    self._fill(x, channel, i, self._above(x, channel, given)[:, i], uniform)
                    continue
                for j in range(columns):
                    x[:, channel, i, j] = _drawn(self(x)[:, channel, i, j], uniform[:, channel, i, j])
        return x

    def _fill(self, x: Tensor, channel: int, i: int, above: Tensor, uniform: Tensor) -> None:
        """Draw row ``i`` from what the rows above say, (B, columns, D), in place."""
        states = [block.attention.mixer.init_state(len(x)) for block in self._inner()]
        before = torch.zeros_like(above[:, 0])
        for j in range(self.size[1]):
            h = above[:, j] + before
            for place, block in enumerate(self._inner()):
                h, states[place] = block.step(h, states[place])
            x[:, channel, i, j] = _drawn(self._logits(h, channel), uniform[:, channel, i, j])
            before = self.embed[channel](x[:, channel, i, j])

    def _inner(self) -> Sequence[AxialBlock]:
        return [block for block in self.inner if isinstance(block, AxialBlock)]

    def _checked(self, x: Tensor) -> None:
        expected = (self.channels, *self.size)
        if x.ndim != 4 or x.shape[1:] != expected or x.is_floating_point():
            raise BadInput(f"x must be integers of shape (B, {', '.join(map(str, expected))}), got {tuple(x.shape)}")
        if x.numel() and not 0 <= int(x.min()) <= int(x.max()) < self.levels:
            raise BadInput(f"values must lie in [0, {self.levels}), got {int(x.min())} to {int(x.max())}")


def _drawn(logits: Tensor, uniform: Tensor) -> Tensor:
    """Return the value at which the cumulated probabilities pass ``uniform``; (B, levels), (B,) -> (B,)."""
    cumulated = logits.double().softmax(-1).cumsum(-1)
    return (cumulated < uniform[:, None]).sum(-1).clamp(max=logits.shape[-1] - 1)
