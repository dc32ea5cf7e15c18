"""Attention of groups of queries to few keys each: discs of an image, windows, blocks; linear in the number of tokens.

Keys are gathered by their index, group by group, so that no table of all pairs is ever made. A group is a tile of the
image, a stretch of tokens or one query; its keys are what any of its queries sees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from torchgraft.engines.attention.attend import attend
from torchgraft.engines.attention.masks import Given
from torchgraft.engines.attention.stages import Normalize, Transform, softmax
from torchgraft.errors import BadInput

__all__ = ["Groups", "attend_in_groups", "disc_groups", "disc_offsets", "local_attention", "strip_attention"]


@dataclass(frozen=True)
class Groups:
    """Which tokens of an image see which, by groups.

    Args:
        queries: tokens of each group, (P, c); a token may stand there twice to fill a group.
        keys: tokens that a query of the group may see, (P, m).
        seen: True where it does, (P, c, m).
        place: where each query of interest stands among the P c, in the order of the tokens.
    """

    queries: Tensor
    keys: Tensor
    seen: Tensor
    place: Tensor


def disc_offsets(radius: float) -> Tensor:
    """Return all (y, x) with y^2 + x^2 < radius^2, (count, 2).

    Example:
        >>> len(disc_offsets(1)), len(disc_offsets(2)), len(disc_offsets(8))
        (1, 9, 193)
    """
    if not radius > 0:
        raise BadInput(f"radius must be positive, got {radius}")
    reach = math.ceil(radius)
    side = torch.arange(-reach, reach + 1)
    pairs = torch.cartesian_prod(side, side)
    return pairs[pairs.square().sum(1) < radius**2]


@lru_cache(maxsize=64)
def disc_groups(
    height: int, width: int, radius: float, *, tile: int = 1, first: int = 0, last: int | None = None
) -> Groups:
    """Return tiles of an image and the tokens within the discs around theirs.

    Args:
        height: rows of the image; tokens go row by row.
        width: tokens a row.
        radius: a query sees tokens less than this far away.
        tile: side of the tiles; larger ones waste some products and make larger ones of the rest.
        first: first row whose tokens are queries.
        last: the row after the last; by default all rows.

    Raises:
        BadInput: a size is below 1, the radius not positive, or there is no row of queries.
    """
    last = height if last is None else last
    if not 0 < radius < math.inf:
        raise BadInput(f"radius must be positive and finite, got {radius}")
    if min(height, width, tile) < 1 or not 0 <= first < last <= height:
        raise BadInput(
            f"a grid needs height, width and tile of at least 1 and rows of queries within it, got {height} x {width}, "
            f"tile {tile}, rows {first} to {last}"
        )
    within = torch.cartesian_prod(torch.arange(tile), torch.arange(tile))  # (c, 2)
    reach = math.ceil(radius)
    side = torch.arange(-reach, tile + reach)
    around = torch.cartesian_prod(side, side)
    outside = torch.maximum(-around, around - (tile - 1)).clamp_min(0)  # how far from the tile
    around = around[outside.square().sum(1) < radius**2]  # (m, 2)
    corners = torch.cartesian_prod(torch.arange(first, last, tile), torch.arange(0, width, tile))  # (P, 2)
    most = torch.tensor([last - 1, width - 1])
    queries = torch.minimum(corners[:, None] + within, most)  # (P, c, 2)
    keys = corners[:, None] + around  # (P, m, 2)
    bound = torch.tensor([height, width])
    inside = ((keys >= 0) & (keys < bound)).all(-1)  # (P, m)
    near = (queries[:, :, None] - keys[:, None]).square().sum(-1) < radius**2  # (P, c, m)
    seen = near & inside[:, None]
    used = seen.any((0, 1))
    keys, seen = keys[:, used].clamp_min(0).minimum(bound - 1), seen[..., used]
    flat = queries[..., 0] * width + queries[..., 1]  # (P, c)
    place = torch.empty((last - first) * width, dtype=torch.long)
    place[flat.flatten() - first * width] = torch.arange(flat.numel())
    return Groups(flat, keys[..., 0] * width + keys[..., 1], seen, place)


def attend_in_groups(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    *,
    seen: Tensor | None = None,
    shared: tuple[Tensor, Tensor] | None = None,
    transform: Transform | None = None,
    normalize: Normalize = softmax,
    scale: float | None = None,
) -> Tensor:
    """Mix, for each group of queries, the values at the places that ``index`` gives the group.

    Args:
        q: queries by groups.
        k: keys.
        v: values.
        index: which of the S keys each group may see.
        seen: True where a query does see the key; by default everywhere.
        shared: further keys and values that every query sees; ``seen`` does not speak of them.
        transform: what is done to scores; it is called with B P groups as the batch, and the last R columns are shared.
        normalize: how scores become weights, likewise.
        scale: by default 1 / sqrt(K).

    Shapes:
        q: (B, P, c, H, K); k, v: (B, S, G, K or V); index: (B or 1, P, m); seen: (B or 1, P, c or 1, m);
        shared: (B, R, G, K or V) each -> (B, P, c, H, V)

    Example:
        >>> x = torch.randn(1, 6, 2, 4)
        >>> attend_in_groups(x.view(1, 3, 2, 2, 4), x, x, torch.arange(6).view(1, 3, 2)).shape
        torch.Size([1, 3, 2, 2, 4])

    Raises:
        BadInput: shapes disagree.
    """
    if q.ndim != 5 or index.ndim != 3 or index.shape[1] != q.shape[1] or index.shape[0] not in (1, len(q)):
        raise BadInput(
            f"q must have shape (B, P, c, H, K) and index (B or 1, P, m), got {tuple(q.shape)} and {tuple(index.shape)}"
        )
    batch, groups, size = q.shape[:3]
    count = index.shape[2]
    if seen is not None and (
        seen.dtype != torch.bool
        or seen.ndim != 4
        or seen.shape[0] not in (1, batch)
        or seen.shape[2] not in (1, size)
        or (seen.shape[1], seen.shape[3]) != (groups, count)
    ):
        wanted = (batch, groups, size, count)
        raise BadInput(f"seen must be boolean and broadcast to {wanted}, got {seen.dtype} {tuple(seen.shape)}")
    keys, values = gathered(k, index), gathered(v, index)  # (B, P, m, G, K)
    if shared is not None:
        more = shared[0].shape[1]
        keys, values = (
            torch.cat([own, common[:, None].expand(-1, groups, -1, -1, -1)], dim=2)
            for own, common in ((keys, shared[0]), (values, shared[1]))
        )
        if seen is not None:
            seen = torch.cat([seen, seen.new_ones(()).expand(*seen.shape[:3], more)], dim=-1)
    mask = None
    if seen is not None:
        mask = Given(seen.expand(batch, -1, -1, -1).flatten(0, 1)[:, None])  # (B P, 1, c or 1, m + R)
    mixed = attend(
        q.flatten(0, 1),
        keys.flatten(0, 1),
        values.flatten(0, 1),
        transform=transform,
        normalize=normalize,
        mask=mask,
        scale=scale,
    )
    return torch.unflatten(mixed, 0, (batch, groups))


def gathered(x: Tensor, index: Tensor) -> Tensor:
    """Return the tokens of ``x`` at ``index``: (B, S, G, K), (B or 1, P, m) -> (B, P, m, G, K)."""
    if index.shape[0] == 1:
        return torch.unflatten(x.index_select(1, index.flatten()), 1, tuple(index.shape[1:]))
    rows = torch.arange(len(x), device=x.device)[:, None, None]
    return x[rows, index]


def default_tile(radius: float) -> int:
    """Return a side of tiles near the radius: they multiply twice what is seen, and are the fastest on processors.

    Example:
        >>> [default_tile(radius) for radius in (1, 2, 8, 32)]
        [1, 2, 8, 16]
    """
    return 1 << max(0, min(round(math.log2(radius)), 4))


def _check(q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], text: int) -> None:
    tokens = grid[0] * grid[1] + text
    if text < 0 or any(x.ndim != 4 or x.shape[1] != tokens for x in (q, k, v)):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise BadInput(
            f"q, k and v must hold {text} text tokens and {grid[0]} x {grid[1]} image tokens, (B, {tokens}, H, K), "
            f"got {shapes}"
        )


def _image(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: Groups,
    shared: tuple[Tensor, Tensor] | None,
    scale: float | None,
) -> Tensor:
    """Return what the groups' queries mix; q, k and v hold image tokens only, (B, N, H, K)."""
    device = q.device
    asked = gathered(q, groups.queries.to(device)[None])  # (B, P, c, H, K)
    mixed = attend_in_groups(
        asked, k, v, groups.keys.to(device)[None], seen=groups.seen.to(device)[None], shared=shared, scale=scale
    )
    return mixed.flatten(1, 2).index_select(1, groups.place.to(device))


def _shared(k: Tensor, v: Tensor, text: int, coarse: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
    if coarse is None:
        return (k[:, :text], v[:, :text]) if text else None
    return torch.cat([k[:, :text], coarse[0]], dim=1), torch.cat([v[:, :text], coarse[1]], dim=1)


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: tuple[int, int],
    radius: float,
    text: int = 0,
    coarse: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    tile: int | None = None,
) -> Tensor:
    """Attend within discs of an image, and to and from all text tokens.

    Args:
        q: queries, text tokens first, then the image row by row.
        k: keys.
        v: values.
        grid: rows of the image, and tokens a row.
        radius: an image token sees those less than this far away.
        text: so many tokens in front see all tokens and are seen by all.
        coarse: further keys and values, (B, R, G, K) each, that every image token sees, such as averages over patches.
        scale: by default 1 / sqrt(K).
        tile: side of the squares of queries that share their gathered keys; changes no number.

    Shapes:
        (B, text + h w, H, K), (B, text + h w, G, K), (B, text + h w, G, V) -> (B, text + h w, H, V)

    Example:
        >>> x = torch.randn(1, 1 + 6, 2, 4)
        >>> local_attention(x, x, x, grid=(2, 3), radius=2, text=1).shape
        torch.Size([1, 7, 2, 4])

    Raises:
        BadInput: the number of tokens is another, or a size is out of range.
    """
    _check(q, k, v, grid, text)
    groups = disc_groups(*grid, radius, tile=default_tile(radius) if tile is None else tile)
    image = _image(q[:, text:], k[:, text:], v[:, text:], groups, _shared(k, v, text, coarse), scale)
    if not text:
        return image
    return torch.cat([attend(q[:, :text], k, v, scale=scale), image], dim=1)


def strip_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: tuple[int, int],
    radius: float,
    parts: int,
    text: int = 0,
    coarse: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    tile: int | None = None,
) -> Tensor:
    """Do what :func:`local_attention` does by strips of rows, each with no more of its neighbours than a halo.

    A strip reads its own rows, ceil(radius) - 1 rows on either side, the text and the coarse keys, so that each may
    stand on a device of its own. Image tokens get the same numbers as in one piece; text tokens get the mean over
    strips of what they would mix from text and one strip, which is near, not equal.

    Args are those of :func:`local_attention`, and ``parts``, the number of strips.

    Raises:
        BadInput: there are more strips than rows.
    """
    _check(q, k, v, grid, text)
    height, width = grid
    if not 1 <= parts <= height:
        raise BadInput(f"parts must lie in 1 to {height}, the rows of the grid, got {parts}")
    halo = math.ceil(radius) - 1
    side = default_tile(radius) if tile is None else tile
    shared = _shared(k, v, text, coarse)
    words, images = [], []
    for part in range(parts):
        begin, end = part * height // parts, (part + 1) * height // parts
        top, bottom = max(begin - halo, 0), min(end + halo, height)
        strip = slice(text + top * width, text + bottom * width)  # all that this strip reads of the image
        groups = disc_groups(bottom - top, width, radius, tile=side, first=begin - top, last=end - top)
        images.append(_image(q[:, strip], k[:, strip], v[:, strip], groups, shared, scale))
        if text:
            own = slice(text + begin * width, text + end * width)
            keys, values = (torch.cat([x[:, :text], x[:, own]], dim=1) for x in (k, v))
            words.append(attend(q[:, :text], keys, values, scale=scale))
    if not text:
        return torch.cat(images, dim=1)
    return torch.cat([torch.stack(words).mean(0), *images], dim=1)
