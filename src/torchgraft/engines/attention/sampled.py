"""Attention to a sample of the sources: which are drawn, and attending from blocks of queries to those of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from torchgraft.engines.attention.blocked import default_scale
from torchgraft.engines.attention.local import attend_in_groups
from torchgraft.engines.attention.masks import Mask, Padding, as_mask
from torchgraft.engines.attention.rows import Rows
from torchgraft.engines.attention.stages import Stage
from torchgraft.errors import BadInput

__all__ = ["attend_to_sources", "check_sampling", "draw_sources", "pairs_seen"]


@dataclass(frozen=True, eq=False)
class _BesideOwn(Stage):
    """Softmax over the columns and, besides, the query's own key, whose weight is what is missing from a sum of 1."""

    own: Tensor  # (B, H, T, 1)

    def __call__(self, s: Tensor, rows: Rows) -> Tensor:
        both = torch.cat([rows.hide(s, torch.finfo(s.dtype).min), self.own[:, :, rows.queries]], dim=-1)
        return both.softmax(-1)[..., :-1]


def check_sampling(keep: float, bias: str = "uniform", sigma: float | None = None) -> None:
    """Refuse what :func:`draw_sources` cannot use.

    Raises:
        BadInput: ``keep`` is not in (0, 1], ``bias`` unknown or ``sigma`` negative.
    """
    if not 0.0 < keep <= 1.0:
        raise BadInput(f"keep must lie in (0, 1], got {keep}")
    if bias not in ("uniform", "local"):
        raise BadInput(f"bias must be 'uniform' or 'local', got {bias!r}")
    if sigma is not None and not sigma >= 0.0:
        raise BadInput(f"sigma must be at least 0, got {sigma}")


def draw_sources(
    tokens: int,
    *,
    keep: float = 0.25,
    bias: Literal["uniform", "local"] = "uniform",
    sigma: float | None = None,
    rows: int = 1,
    causal: bool = False,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return which sources each block of queries sees, (rows, blocks, keep T), in rising order.

    With ``"uniform"`` there is one block; with ``"local"`` blocks of half a window, each with the window around it (or,
    where causal, the window that ends with it) of a sequence whose order is disturbed by noise.

    Args:
        tokens: T.
        keep: share of the sources that is kept.
        bias: whether far sources are as likely as near ones.
        sigma: standard deviation of the noise, in tokens; 0 gives windows, a large one uniform subsets; by default half
            the window.
        rows: independent draws.
        causal: where the windows lie.
        device: where the draws are made.

    Example:
        >>> draw_sources(8, keep=0.5, bias="local", sigma=0.0, causal=True).tolist()
        [[[0, 1, 2, 3], [0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7]]]

    Raises:
        BadInput: ``keep`` is not in (0, 1], ``bias`` unknown or ``sigma`` negative.
    """
    check_sampling(keep, bias, sigma)
    count = max(1, round(keep * tokens))
    if bias == "uniform":
        order = torch.rand(rows, tokens, device=device).argsort(-1)
        return torch.sort(order[:, None, :count], -1).values
    sigma = count / 2 if sigma is None else sigma
    noise = sigma * torch.randn(rows, tokens, device=device)
    order = (torch.arange(tokens, device=device) + noise).argsort(dim=-1, stable=True)
    blocks = -(-tokens // max(1, count // 2))
    size = -(-tokens // max(1, blocks))
    begin = size * torch.arange(blocks, device=device)
    start = begin + size - count if causal else begin - (count - size) // 2
    places = start.clamp(0, tokens - count)[:, None] + torch.arange(count, device=device)  # (P, m)
    return torch.sort(order[:, places], -1).values


def pairs_seen(mask: Mask | Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Return who sees whom, of a shape that broadcasts to (B, H, T, S)."""
    found = as_mask(mask)
    if found is None:
        return None
    found.check(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    if isinstance(found, Padding):
        return found.valid[:, None, None]
    place = torch.arange(k.shape[1], device=k.device)
    seen = found.seen(Rows(slice(0, q.shape[1]), slice(0, k.shape[1]), place[k.shape[1] - q.shape[1] :], place))
    return seen.reshape((1,) * (4 - seen.ndim) + seen.shape)


def attend_to_sources(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sources: Tensor,
    *,
    seen: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Mix, for each block of queries, what its sources hold.

    Args:
        q: queries, the last T of S tokens.
        k: keys.
        v: values.
        sources: of every block of the S tokens, all of them of one length but for the last.
        seen: True where a query may see a key, of a shape that broadcasts to (B, 1, T, S).
        causal: whether a query sees itself, which needs not be among its sources, and of these the earlier ones.
        scale: by default 1 / sqrt(K).

    Shapes:
        (B, T, H, K), (B, S, G, K), (B, S, G, V), sources (1 or B, P, m) -> (B, T, H, V)

    Raises:
        BadInput: ``seen`` differs by head.
    """
    pairs = seen
    batch, tokens, heads, _ = q.shape
    total, blocks = k.shape[1], sources.shape[1]
    size = -(-total // blocks)  # queries a block
    before = total - tokens
    place = torch.arange(blocks * size, device=q.device)  # of the queries, padding included
    padded = nn.functional.pad(q, (0, 0, 0, 0, before, blocks * size - total))  # (B, P c, H, K)
    grouped = torch.unflatten(padded, 1, (blocks, size))
    seen = None
    if pairs is not None:
        if pairs.shape[1] > 1:
            raise BadInput("a mask that differs by head needs per='head' with as many heads of keys as of queries")
        wide = pairs[:, 0].expand(batch, tokens, total)
        wide = nn.functional.pad(wide, (0, 0, before, blocks * size - total), value=True)  # (B, P c, S)
        wide = torch.unflatten(wide, 1, (blocks, size))
        seen = wide.gather(-1, sources[:, :, None].expand(batch, -1, size, -1))
    if not causal:
        mixed = attend_in_groups(grouped, k, v, sources, seen=seen, scale=scale)
        return mixed.flatten(1, 2)[:, before:total]
    earlier = sources[:, :, None] < place.view(1, blocks, size, 1)  # (1 or B, P, c, m); a query sees itself besides
    seen = earlier if seen is None else seen & earlier
    own_k, own_v = (x[:, before:].repeat_interleave(heads // x.shape[2], dim=2) for x in (k, v))  # (B, T, H, K)
    factor = default_scale(q.shape[-1]) if scale is None else scale
    wide_type = torch.promote_types(q.dtype, torch.float32)
    own = (q.to(wide_type) * own_k.to(wide_type)).sum(-1) * factor  # (B, T, H)
    own = nn.functional.pad(own, (0, 0, before, blocks * size - total))
    own = torch.unflatten(own, 1, (blocks, size)).flatten(0, 1).transpose(1, 2)[..., None]  # (B P, H, c, 1)
    # A column of ones among the values says how much weight the sources have; what is missing is the query's own.
    ones = v.new_ones(()).expand(*v.shape[:3], 1)
    mixed = attend_in_groups(
        grouped, k, torch.cat([v, ones], dim=-1), sources, seen=seen, normalize=_BesideOwn(own), scale=scale
    )
    mixed = mixed.flatten(1, 2)[:, before:total]
    return mixed[..., :-1] + (1 - mixed[..., -1:]) * own_v
