"""A cache of keys and values that keeps old tokens in fewer bits, in steps, packed in bytes.

x_hat = s round((x - z) / s) + z with s = (max - min) / (2^b - 1) and z = min, keys by channel over a block of tokens,
values by token, so that |x_hat - x| <= s / 2. Scales and zeros are kept in float16, rounded outwards, which widens s by
about a thousandth. A block that grows old is quantised again from what was left of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchgraft.engines.attention.mixer import AttentionMixer
from torchgraft.engines.recurrence.heads import merge_heads
from torchgraft.errors import BadInput, MissingExtra

if TYPE_CHECKING:
    from transformers import Cache

__all__ = ["Quantized", "StaircaseKVCache", "hugging_face_cache", "pack", "prefill_from", "quantize", "unpack"]

#: Widths that fill bytes without a rest.
_WIDTHS = (1, 2, 4, 8)
#: Beyond this, rounding outwards could leave the range of float16.
_LARGEST = 65_000.0


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return codes below 2^bits as bytes, the first in the lowest bits: (B, n) -> (B, ceil(n bits / 8)), uint8.

    Example:
        >>> pack(torch.tensor([[1, 2, 3, 0, 1]], dtype=torch.uint8), 2).tolist()
        [[57, 1]]
    """
    each = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % each))
    shifts = torch.arange(each, device=codes.device, dtype=torch.uint8) * bits
    return torch.unflatten(padded, 1, (-1, each)).bitwise_left_shift(shifts).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the first ``count`` codes of every row: (B, bytes) -> (B, count), uint8.

    Example:
        >>> unpack(torch.tensor([[57, 1]], dtype=torch.uint8), 2, 5).tolist()
        [[1, 2, 3, 0, 1]]
    """
    shifts = torch.arange(8 // bits, device=packed.device, dtype=torch.uint8) * bits
    return packed[..., None].bitwise_right_shift(shifts).bitwise_and(2**bits - 1).flatten(1)[:, :count]


@dataclass(frozen=True)
class Quantized:
    """A tensor in few bits.

    Args:
        codes: packed, (B, bytes), uint8.
        scale: s of every group, float16, of a shape that broadcasts to the tensor's.
        zero: z of every group, likewise.
        bits: of a code.
        shape: the tensor's without its batch.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zeros."""
        return sum(value.numel() * value.element_size() for value in (self.codes, self.scale, self.zero))

    def restored(self) -> Tensor:
        """Return the tensor, in float32."""
        count = int(torch.Size(self.shape).numel())
        codes = torch.unflatten(unpack(self.codes, self.bits, count), 1, self.shape)
        return codes * self.scale.float() + self.zero.float()

    def rows(self, index: Tensor) -> Quantized:
        """Return the sequences ``index`` of the batch."""
        return replace(self, codes=self.codes[index], scale=self.scale[index], zero=self.zero[index])


def quantize(x: Tensor, bits: int, *, dim: int) -> Quantized:
    """Return ``x``, (B, ...), in ``bits`` a number, with one scale and zero for all numbers along ``dim``.

    Raises:
        BadInput: ``bits`` does not divide 8, or a number is beyond the range of float16 or NaN.

    Example:
        >>> quantize(torch.tensor([[[1.0], [2.0], [4.0]]]), 2, dim=1).restored().flatten().round(decimals=2).tolist()
        [1.0, 2.0, 4.0]
    """
    if bits not in _WIDTHS:
        raise BadInput(f"bits must be one of {_WIDTHS}, got {bits}")
    wide = x.detach().float()
    if wide.numel() and not bool(wide.abs().max() <= _LARGEST):
        raise BadInput(f"keys and values to be quantised must lie within {_LARGEST:g}, got {wide.abs().max():g}")
    low, high = wide.amin(dim, keepdim=True), wide.amax(dim, keepdim=True)
    zero = (low - low.abs() * 2**-10 - 2**-24).half()  # no larger than the least
    scale = ((high - zero.float()) / (2**bits - 1) * (1 + 2**-10) + 2**-24).half()  # wide enough for the greatest
    codes = ((wide - zero.float()) / scale.float()).round().clamp(0, 2**bits - 1)
    return Quantized(pack(codes.flatten(1).to(torch.uint8), bits), scale, zero, bits, tuple(x.shape[1:]))


@dataclass(frozen=True)
class _Block:
    """Keys and values of some tokens in succession."""

    keys: Quantized
    values: Quantized

    @staticmethod
    def of(k: Tensor, v: Tensor, bits: int) -> _Block:
        """Quantise (B, t, G, K) by channel and (B, t, G, V) by token."""
        return _Block(quantize(k, bits, dim=1), quantize(v, bits, dim=-1))

    def again(self, bits: int) -> _Block:
        return _Block.of(self.keys.restored(), self.values.restored(), bits)

    def rows(self, index: Tensor) -> _Block:
        return _Block(self.keys.rows(index), self.values.rows(index))


class StaircaseKVCache:
    """Keys and values of one layer, the newest tokens in most bits.

    Tokens gather in 16 bits until they fill a block; blocks then go down the stairs as newer ones follow.

    Args:
        bits: of each band, from the newest tokens to the oldest, falling; 16 may only be the first.
        windows: how many tokens each band but the last holds, in whole blocks.
        group: tokens a block, over which keys share a scale for each channel.

    Example:
        >>> cache = StaircaseKVCache(bits=(8, 4, 2), windows=(8, 8), group=4)
        >>> k, v = cache.update(torch.randn(1, 30, 2, 16), torch.randn(1, 30, 2, 16))
        >>> len(cache), cache.bands()
        (30, ((16, 2), (8, 8), (4, 8), (2, 12)))

    Raises:
        BadInput: bits do not fall or do not divide 8, or windows are no whole blocks.
    """

    def __init__(
        self,
        *,
        bits: Sequence[int] = (16, 8, 4, 2),
        windows: Sequence[int] = (128, 256, 512),
        group: int = 32,
    ) -> None:
        bits, windows = tuple(bits), tuple(windows)
        quantised = bits[1:] if bits[:1] == (16,) else bits
        falling = all(left > right for left, right in itertools.pairwise(bits))
        if not bits or not falling or not set(quantised) <= set(_WIDTHS):
            raise BadInput(f"bits must fall, from 16 or one of {_WIDTHS}, got {bits}")
        if group < 1 or len(windows) != len(bits) - 1 or any(each < 1 or each % group for each in windows):
            raise BadInput(
                f"windows must be {len(bits) - 1} positive multiples of group, got {windows} and group {group}"
            )
        self.bits, self.windows, self.group = bits, windows, group
        self._whole = 16 in bits  # whether there is a band of 16 bits, beyond the block that fills
        self._widths = quantised
        self._room = [each // group for each in (windows[1:] if self._whole else windows)]
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self._recent: tuple[Tensor, Tensor] | None = None
        self._bands: list[list[_Block]] = [[] for _ in self._widths]  # oldest block first in each

    def __len__(self) -> int:
        recent = 0 if self._recent is None else self._recent[0].shape[1]
        return recent + self.group * sum(map(len, self._bands))

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is kept, scales and zeros included."""
        blocks = [part for band in self._bands for block in band for part in (block.keys, block.values)]
        recent = () if self._recent is None else self._recent
        return sum(part.nbytes for part in blocks) + sum(x.numel() * x.element_size() for x in recent)

    def bands(self) -> tuple[tuple[int, int], ...]:
        """Return (bits, tokens) from the newest tokens to the oldest; the first are in 16 bits."""
        recent = 0 if self._recent is None else self._recent[0].shape[1]
        held = zip(self._widths, self._bands, strict=True)
        return ((16, recent), *((width, self.group * len(band)) for width, band in held))

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add tokens; return all keys and values, the new ones as they were given and the others as they were kept.

        Shapes:
            (B, t, G, K), (B, t, G, V) -> (B, S, G, K), (B, S, G, V)

        Raises:
            BadInput: the tokens do not fit those before them, or are too large to be kept.
        """
        if k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3]:
            raise BadInput(f"k and v must have shapes (B, t, G, K) and (B, t, G, V), got {k.shape} and {v.shape}")
        if self._recent is not None:
            for name, new, kept in zip("kv", (k, v), self._recent, strict=True):
                if (new.shape[0], *new.shape[2:]) != (kept.shape[0], *kept.shape[2:]):
                    raise BadInput(f"{name} must fit the cached {tuple(kept.shape)}, got {tuple(new.shape)}")
        largest = max((float(x.detach().abs().max()) for x in (k, v) if x.numel()), default=0.0)
        if not largest <= _LARGEST:
            raise BadInput(f"keys and values to be cached must lie within {_LARGEST:g}, got {largest:g}")
        old_k, old_v = self.read(k, v)
        both = torch.cat([old_k, k], dim=1), torch.cat([old_v, v], dim=1)
        self._add(k, v)
        return both

    def read(self, like_k: Tensor, like_v: Tensor) -> tuple[Tensor, Tensor]:
        """Return all keys and values as they are kept, oldest first, in the types and on the device of others.

        Args:
            like_k: keys, (B, t, G, K).
            like_v: values, (B, t, G, V).
        """
        blocks = [block for band in reversed(self._bands) for block in band]
        keys = [block.keys.restored().to(like_k) for block in blocks]
        values = [block.values.restored().to(like_v) for block in blocks]
        if self._recent is not None:
            keys.append(self._recent[0].to(like_k))
            values.append(self._recent[1].to(like_v))
        return torch.cat([like_k[:, :0], *keys], dim=1), torch.cat([like_v[:, :0], *values], dim=1)

    def _add(self, k: Tensor, v: Tensor) -> None:
        k, v = (x.detach().to(x.dtype if x.dtype == torch.bfloat16 else torch.float16) for x in (k, v))
        if self._recent is not None:
            k, v = torch.cat([self._recent[0], k], dim=1), torch.cat([self._recent[1], v], dim=1)
        held = (self.windows[0] if self.windows else k.shape[1]) if self._whole else 0
        held = max(held, 0 if self._widths else k.shape[1])  # 16 bits alone keep everything
        blocks = max(k.shape[1] - held, 0) // self.group
        for number in range(blocks):
            part = slice(number * self.group, (number + 1) * self.group)
            self._push(_Block.of(k[:, part], v[:, part], self._widths[0]))
        self._recent = k[:, blocks * self.group :].clone(), v[:, blocks * self.group :].clone()

    def _push(self, block: _Block) -> None:
        """Put a block into the first quantised band, and the oldest of a band that overflows into the next."""
        for band, room, lower in itertools.zip_longest(self._bands, self._room, self._widths[1:]):
            band.append(block)
            if room is None or len(band) <= room:
                return
            block = band.pop(0).again(lower)

    def select(self, rows: Tensor) -> None:
        """Keep the sequences ``rows`` of the batch, in that order, as beam search does."""
        if self._recent is not None:
            self._recent = self._recent[0][rows], self._recent[1][rows]
        self._bands = [[block.rows(rows) for block in band] for band in self._bands]


def prefill_from(mixer: AttentionMixer, x: Tensor, cache: StaircaseKVCache) -> Tensor:
    """Mix ``x``, (B, T, D), after what ``cache`` holds, and add its tokens: ``mixer.prefill`` with another cache.

    Example:
        >>> from torchgraft.parts.mixers.sigmoid_attention import SigmoidAttention
        >>> mixer, cache = SigmoidAttention(16, num_heads=2).eval(), StaircaseKVCache()
        >>> prefill_from(mixer, torch.randn(1, 5, 16), cache).shape, len(cache)
        (torch.Size([1, 5, 16]), 5)

    Raises:
        BadInput: the mixer is not causal.
    """
    mixer.checked(x)
    if not mixer.causal:
        raise BadInput(f"{type(mixer).__name__} with causal=False keeps no state; use the forward pass")
    q, k, v = mixer.heads(x, len(cache))
    y: Tensor = mixer.out(merge_heads(mixer.mix(q, *cache.update(k, v))))
    return y


def hugging_face_cache(
    *, bits: Sequence[int] = (16, 8, 4, 2), windows: Sequence[int] = (128, 256, 512), group: int = 32
) -> Cache:
    """Return a cache for ``model.generate(..., past_key_values=cache)``, a :class:`StaircaseKVCache` for every layer.

    A prompt that is read at once is attended to as it is; quantised tokens are met from the next call on. Tokens cannot
    be taken back from it, so it is not for assisted generation.

    Args:
        bits: as for :class:`StaircaseKVCache`.
        windows: likewise.
        group: likewise.

    Raises:
        MissingExtra: transformers is not installed.
    """
    try:
        from transformers import Cache
        from transformers.cache_utils import CacheLayerMixin
    except ImportError:
        raise MissingExtra("transformers", "hf") from None

    class Layer(CacheLayerMixin):  # type: ignore[no-untyped-call]  # transformers'
        is_sliding = False

        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]  # transformers'
            self.stairs = StaircaseKVCache(bits=bits, windows=windows, group=group)

        def lazy_initialization(self, *states: Tensor) -> None:
            self.dtype, self.device, self.is_initialized = states[0].dtype, states[0].device, True

        def update(self, key_states: Tensor, value_states: Tensor, *rest: Any, **more: Any) -> tuple[Tensor, Tensor]:
            self.lazy_initialization(key_states, value_states)
            k, v = self.stairs.update(key_states.transpose(1, 2), value_states.transpose(1, 2))
            return k.transpose(1, 2), v.transpose(1, 2)

        def get_seq_length(self) -> int:
            return len(self.stairs)

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return len(self.stairs) + int(query_length), 0

        def get_max_length(self) -> int:
            return -1

        get_max_cache_shape = get_max_length  # its name in transformers 4

        def reset(self) -> None:
            self.stairs.reset()

        def reorder_cache(self, beam_idx: Tensor) -> None:
            self.stairs.select(beam_idx)

        batch_select_indices = reorder_cache

        def batch_repeat_interleave(self, repeats: int) -> None:
            held = self.stairs._recent
            if held is not None:
                self.stairs.select(torch.arange(len(held[0])).repeat_interleave(repeats))

    return Cache(layer_class_to_replicate=Layer)
