"""Codebooks: the nearest code, running means of what each code stands for, a k-means start, and dead codes re-seeded.

Vectors x (..., M, D) are compared with codes (..., N, D); leading sizes broadcast as in matmul, so that C codebooks
(C, N, D) are searched at once. Similarities are computed in float64, whatever the inputs are, so that the code found is
the nearest one; rows are taken in chunks, so that memory stays below chunk x N. Nothing here carries a gradient except
:func:`lookup` and :func:`straight_through`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.errors import BadInput, nearest

__all__ = [
    "Codebook",
    "Similarity",
    "Usage",
    "assigned",
    "ema_update",
    "kmeans",
    "kmeans_plus_plus",
    "lookup",
    "means",
    "nearest_code",
    "reseeded",
    "similarities",
    "straight_through",
    "topk_codes",
    "usage",
]

Similarity: TypeAlias = Literal["euclid", "cosine"]


def _wide(x: Tensor) -> Tensor:
    """Return ``x`` in float64, or in float32 where the device has no float64."""
    return x.detach().to(torch.float32 if x.device.type == "mps" else torch.float64)


def similarities(x: Tensor, codes: Tensor, *, similarity: Similarity = "euclid") -> Tensor:
    """Return how near each code is, larger is nearer: -|x - c|^2 or cos(x, c); (..., M, D), (..., N, D) -> (..., M, N).

    A vector of zeros has the cosine 0 with every code. The result is float64 and carries no gradient.
    """
    if similarity not in get_args(Similarity):
        raise BadInput(
            f"similarity must be euclid or cosine, got {similarity!r}{nearest(similarity, ['euclid', 'cosine'])}"
        )
    if x.ndim < 2 or codes.ndim < 2 or x.shape[-1] != codes.shape[-1]:
        raise BadInput(
            f"x must be (..., M, D) and codes (..., N, D), got shapes {tuple(x.shape)} and {tuple(codes.shape)}"
        )
    x, codes = _wide(x), _wide(codes)
    if similarity == "cosine":
        return F.normalize(x, dim=-1) @ F.normalize(codes, dim=-1).mT
    centre = codes.mean(-2, keepdim=True)  # differences do not depend on it, rounding does
    x, codes = x - centre, codes - centre
    return 2 * x @ codes.mT - (codes * codes).sum(-1)[..., None, :] - (x * x).sum(-1, keepdim=True)


def nearest_code(x: Tensor, codes: Tensor, *, similarity: Similarity = "euclid", chunk: int = 4096) -> Tensor:
    """Return the number of the nearest code, the first of equals; (..., M, D), (..., N, D) -> (..., M).

    Example:
        >>> nearest_code(torch.tensor([[0.9], [0.2]]), torch.tensor([[0.0], [1.0]]))
        tensor([1, 0])
    """
    found = [similarities(rows, codes, similarity=similarity).argmax(-1) for rows in torch.split(x, chunk, -2)]
    return torch.cat(found, -1)


def topk_codes(x: Tensor, codes: Tensor, k: int, *, similarity: Similarity = "euclid", chunk: int = 4096) -> Tensor:
    """Return the numbers of the k nearest codes, nearest first; (..., M, D), (..., N, D) -> (..., M, k).

    Raises:
        BadInput: ``k`` is not within 1..N.
    """
    if not 1 <= k <= codes.shape[-2]:
        raise BadInput(f"k must be within 1 and the {codes.shape[-2]} codes, got {k}")
    rows = torch.split(x, chunk, -2)
    return torch.cat([similarities(part, codes, similarity=similarity).topk(k, -1).indices for part in rows], -2)


def lookup(codes: Tensor, indices: Tensor) -> Tensor:
    """Return the rows of ``codes`` that ``indices`` name; (*G, N, D), (*G, ...) -> (*G, ..., D), differentiable."""
    groups = codes.shape[:-2]
    if tuple(indices.shape[: len(groups)]) != tuple(groups):
        raise BadInput(f"indices must begin with the codebooks' sizes {tuple(groups)}, got {tuple(indices.shape)}")
    rows = F.embedding(_places(indices, groups, codes.shape[-2]), codes.reshape(-1, codes.shape[-1]))
    return rows.reshape(*indices.shape, codes.shape[-1])


def _places(indices: Tensor, groups: torch.Size, n: int) -> Tensor:
    """Return the place of each index (*G, ...) where the n codes of all codebooks lie end to end."""
    start = n * torch.arange(groups.numel(), device=indices.device).reshape(groups)
    return indices + start.reshape(*groups, *(1,) * (indices.ndim - len(groups)))


def straight_through(x: Tensor, quantized: Tensor) -> Tensor:
    """Return exactly ``quantized``, whose gradient goes to both: to it, and unchanged to ``x`` as if they were one."""
    return quantized + (x - x.detach())


def assigned(x: Tensor, indices: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return how many vectors each of n codes was given and their sum; (*G, M, D), (*G, M) -> (*G, N), (*G, N, D).

    Both are float32 at least.
    """
    if x.shape[:-1] != indices.shape:
        raise BadInput(f"indices must be {tuple(x.shape[:-1])}, one for each vector of x, got {tuple(indices.shape)}")
    groups, size = indices.shape[:-1], x.shape[-1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    places = _places(indices, groups, n).flatten()
    counts = torch.zeros(groups.numel() * n, dtype=dtype, device=x.device)
    counts.index_add_(0, places, torch.ones_like(places, dtype=dtype))
    sums = torch.zeros(groups.numel() * n, size, dtype=dtype, device=x.device)
    sums.index_add_(0, places, x.detach().to(dtype).reshape(-1, size))
    return counts.reshape(*groups, n), sums.reshape(*groups, n, size)


def ema_update(
    counts: Tensor, sums: Tensor, new_counts: Tensor, new_sums: Tensor, *, decay: float
) -> tuple[Tensor, Tensor]:
    """Return g n + (1 - g) #, g m + (1 - g) sum: running counts (..., N) and sums (..., N, D), g the decay.

    Raises:
        BadInput: ``decay`` is not within [0, 1).
    """
    if not 0 <= decay < 1:
        raise BadInput(f"decay must be within [0, 1), got {decay}")
    return decay * counts + (1 - decay) * new_counts, decay * sums + (1 - decay) * new_sums


def means(codes: Tensor, counts: Tensor, sums: Tensor, *, floor: float = 1e-12) -> Tensor:
    """Return sums / counts, and the old code where the count is not above ``floor``; (..., N, D)."""
    live = (counts > floor)[..., None]
    return torch.where(live, sums / torch.where(live, counts[..., None], 1), codes.to(sums.dtype)).to(codes.dtype)


def kmeans_plus_plus(x: Tensor, n: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Return n rows of x, each drawn in proportion to the squared distance from those before; (M, D) -> (n, D).

    As long as a row is left that is none of the codes, no row is drawn twice.

    Raises:
        BadInput: there is no row, or no code is asked for.
    """
    if x.ndim != 2 or not len(x) or n < 1:
        raise BadInput(f"k-means++ needs rows (M, D) and n >= 1, got shape {tuple(x.shape)} and n = {n}")
    wide = _wide(x)
    place = int(torch.randint(len(x), (), generator=generator))
    chosen, gap = [place], (wide - wide[place]).square().sum(-1)
    for _ in range(n - 1):
        # Where all rows are codes already, any row will do.
        weight = gap if bool(gap.any()) else torch.ones_like(gap)
        edges = weight.cpu().cumsum(0)
        draw = torch.rand((), generator=generator, dtype=torch.float64) * edges[-1]
        place = min(int(torch.searchsorted(edges, draw, right=True)), int(weight.nonzero()[-1]))
        chosen.append(place)
        gap = torch.minimum(gap, (wide - wide[place]).square().sum(-1))
    return x.detach()[torch.tensor(chosen, device=x.device)]


def kmeans(x: Tensor, n: int, *, steps: int = 10, generator: torch.Generator | None = None) -> Tensor:
    """Return n codes after ``steps`` rounds of Lloyd's algorithm from k-means++; (M, D) -> (n, D).

    A code that gets no row stays where it is.
    """
    codes = kmeans_plus_plus(x, n, generator=generator)
    for _ in range(steps):
        counts, sums = assigned(x, nearest_code(x, codes), n)
        codes = means(codes, counts, sums)
    return codes


def reseeded(
    codes: Tensor, dead: Tensor, x: Tensor, *, noise: float = 0.0, generator: torch.Generator | None = None
) -> Tensor:
    """Return codes whose ``dead`` ones are rows of ``x`` drawn at random; (*G, N, D), (*G, N), (*G, M, D).

    No row is drawn twice while others are left. ``noise`` is the deviation of Gaussian noise that is added, in units of
    the deviation of ``x``.
    """
    if not x.shape[-2] and bool(dead.any()):
        raise BadInput("dead codes are re-seeded from rows of x, which has none")
    result, x = codes.clone(memory_format=torch.contiguous_format), x.detach()
    for group in range(codes.shape[:-2].numel()):
        rows = x.flatten(0, -3)[group] if x.ndim > 2 else x
        mask = dead.reshape(-1, dead.shape[-1])[group]
        wanted = int(mask.sum())
        if not wanted:
            continue
        order = [torch.randperm(len(rows), generator=generator) for _ in range(-(-wanted // len(rows)))]
        drawn = rows[torch.cat(order)[:wanted].to(rows.device)]
        if noise:
            deviation = (rows - rows.mean(0)).square().mean().sqrt()
            drawn = drawn + noise * deviation * torch.randn(drawn.shape, generator=generator).to(drawn)
        result.view(-1, *codes.shape[-2:])[group][mask] = drawn.to(codes.dtype)
    return result


@dataclass(frozen=True)
class Usage:
    """How evenly codes are used.

    Args:
        counts: how often each code was chosen, (*G, N).
        used: the share of codes that were chosen at all, (*G,).
        perplexity: exp of the entropy of the choices, between 1 and N, (*G,); 0 where none was made.
    """

    counts: Tensor
    used: Tensor
    perplexity: Tensor


def usage(indices: Tensor, n: int, *, groups: int = 0) -> Usage:
    """Count the choices of n codes.

    Args:
        indices: the numbers chosen, of any shape; its first ``groups`` sizes are codebooks.
        n: N.
        groups: how many leading sizes of ``indices`` are codebooks.

    Example:
        >>> usage(torch.tensor([0, 0, 2, 2]), 4).perplexity
        tensor(2.)
    """
    flat = indices.reshape(*indices.shape[:groups], -1)
    counts, _ = assigned(torch.ones_like(flat, dtype=torch.float32)[..., None], flat, n)
    total = counts.sum(-1)
    share = counts / total.clamp(min=1)[..., None]
    entropy = -torch.xlogy(share, share).sum(-1)
    return Usage(counts, (counts > 0).float().mean(-1), torch.where(total > 0, entropy.exp(), 0))


class Codebook(nn.Module):
    """Codes that follow the running mean of the vectors nearest to them; no gradient ever trains them.

    Args:
        num_codes: N.
        dim: D.
        groups: number of codebooks beside each other, or ``None`` for one without that leading size.
        decay: how much of the running counts and sums an update keeps.
        similarity: ``"euclid"`` or ``"cosine"``.

    Attributes:
        codes: (*G, N, D).
        counts: running number of vectors of each code, (*G, N).
        sums: running sum of them, (*G, N, D).
        idle: updates since a code was last chosen, (*G, N).

    Shapes:
        x (*G, M, D) -> quantized (*G, M, D), indices (*G, M)

    Example:
        >>> book = Codebook(4, 2)
        >>> book.start_(torch.randn(32, 2))
        >>> quantized, indices = book(torch.randn(5, 2))
        >>> quantized.shape, indices.shape
        (torch.Size([5, 2]), torch.Size([5]))

    Raises:
        BadInput: a size is below 1, or the decay is not within [0, 1).
    """

    codes: Tensor
    counts: Tensor
    sums: Tensor
    idle: Tensor

    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        groups: int | None = None,
        decay: float = 0.99,
        similarity: Similarity = "euclid",
    ) -> None:
        super().__init__()
        for name, value in {"num_codes": num_codes, "dim": dim, "groups": 1 if groups is None else groups}.items():
            if value < 1:
                raise BadInput(f"{name} must be at least 1, got {value}")
        if not 0 <= decay < 1:
            raise BadInput(f"decay must be within [0, 1), got {decay}")
        lead = () if groups is None else (groups,)
        self.decay, self.similarity = decay, similarity
        self.register_buffer("codes", torch.randn(*lead, num_codes, dim))
        self.register_buffer("counts", torch.zeros(*lead, num_codes))
        self.register_buffer("sums", torch.zeros(*lead, num_codes, dim))
        self.register_buffer("idle", torch.zeros(*lead, num_codes, dtype=torch.long))

    def extra_repr(self) -> str:
        """Return the sizes."""
        return f"{tuple(self.codes.shape)}, decay={self.decay}, similarity={self.similarity!r}"

    def encode(self, x: Tensor) -> Tensor:
        """Return the number of the nearest code, (*G, M, D) -> (*G, M)."""
        return nearest_code(x, self.codes, similarity=self.similarity)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the nearest codes, with the gradient passed straight through to x, and their numbers."""
        indices = self.encode(x)
        return straight_through(x, lookup(self.codes, indices).to(x.dtype)), indices

    @torch.no_grad()
    def start_(self, x: Tensor, *, steps: int = 10, generator: torch.Generator | None = None) -> None:
        """Set the codes by k-means on x, (*G, M, D), and the counts and sums to those of its last round."""
        size = self.codes.shape[-2:]
        rows = x.reshape(-1, *x.shape[-2:])
        found = [kmeans(part, size[0], steps=steps, generator=generator) for part in rows]
        self.codes.copy_(torch.stack(found).reshape(self.codes.shape))
        counts, _ = assigned(x, self.encode(x), self.codes.shape[-2])
        self.counts.copy_(counts)
        self.sums.copy_(self.counts[..., None] * self.codes)
        self.idle.zero_()

    @torch.no_grad()
    def update_(self, x: Tensor, indices: Tensor | None = None) -> Tensor:
        """Take x, (*G, M, D), into the running means; returns the numbers of the codes that it was given."""
        indices = self.encode(x) if indices is None else indices
        fresh, totals = assigned(x, indices, self.codes.shape[-2])
        counts, sums = ema_update(
            self.counts.to(fresh.dtype), self.sums.to(fresh.dtype), fresh, totals, decay=self.decay
        )
        self.codes.copy_(means(self.codes, counts, sums))
        self.counts.copy_(counts)
        self.sums.copy_(sums)
        self.idle.copy_(torch.where(fresh > 0, 0, self.idle + 1))
        return indices

    @torch.no_grad()
    def reseed_(self, x: Tensor, *, after: int, noise: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
        """Replace codes that ``after`` updates have not chosen by rows of x, (*G, M, D); returns which, (*G, N)."""
        dead = self.idle >= after
        self.codes.copy_(reseeded(self.codes, dead, x, noise=noise, generator=generator))
        # A new code weighs as much as one vector of one update.
        self.counts.copy_(torch.where(dead, 1 - self.decay, self.counts))
        self.sums.copy_(torch.where(dead[..., None], (1 - self.decay) * self.codes, self.sums))
        self.idle.copy_(torch.where(dead, 0, self.idle))
        return dead
