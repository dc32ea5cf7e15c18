"""A small vision transformer that any mixer fits into: the same patches, blocks and head, whatever mixes the tokens.

Pre-norm blocks, ``x + mixer(norm(x))`` and then ``x + feed-forward(norm(x))``, between patches and a head. What is
compared in such a model differs in the mixer and in nothing else. Patches stand row by row; a class token stands before
them, from the block on that is named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from torchgraft.bench.models import FeedForward
from torchgraft.engines.attention import attend
from torchgraft.engines.attention.mixer import AttentionMixer
from torchgraft.engines.recurrence.mixer import Mixer
from torchgraft.errors import BadInput
from torchgraft.parts.blocks.sequence_model import Build, Option, build_mixer

__all__ = ["SelfAttention", "VisionModel"]

#: One mixer for all blocks, or one for each: keys of the catalogue, or functions from the width to a mixer.
_Mixers: TypeAlias = "str | Build | Sequence[str | Build]"


class SelfAttention(AttentionMixer):
    """Softmax attention in which every token sees every token, and no positions: what others are held against.

    Args:
        d_model: the width D.
        num_heads: H; divides ``d_model``.

    Shapes:
        (B, T, D) -> (B, T, D)

    Example:
        >>> SelfAttention(8, num_heads=2)(torch.randn(1, 5, 8)).shape
        torch.Size([1, 5, 8])
    """

    def __init__(self, d_model: int, *, num_heads: int = 4) -> None:
        super().__init__(d_model, num_heads=num_heads, rotary=False, causal=False)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return what the queries mix."""
        return attend(q, k, v)


class _Block(nn.Module):
    """``x + mixer(norm(x))``, then ``x + feed-forward(norm(x))``; (B, T, D) -> (B, T, D)."""

    def __init__(self, mixer: Mixer, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(mixer.d_model)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(mixer.d_model)
        self.mlp = FeedForward(mixer.d_model, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm1(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class VisionModel(nn.Module):
    """Patches, blocks of a mixer and a feed-forward part, norm, head.

    Args:
        d_model: width D of the residual stream.
        layers: L, number of blocks.
        mixer: what mixes tokens: the key of a mixer, a function from the width to one, or L of them.
        image_size: height and width of an image.
        patch_size: height and width of a patch; divides ``image_size``.
        channels: colour channels.
        classes: number of classes.
        hidden: width of the feed-forward part; default 4 ``d_model``.
        class_token: whether the answer is read from a token of its own instead of from the mean of all patches.
        class_from: blocks before the class token joins; those see patches only.
        positions: whether learned positions are added to the tokens; without them position is the mixers' business.
        mixer_options: keyword arguments of mixers named by key.

    Attributes:
        grid: number of rows and columns of patches.
        tokens: number of tokens in the last block.

    Shapes:
        (B, channels, image_size, image_size) -> (B, classes)

    Example:
        >>> model = VisionModel(16, 2, lambda d: SelfAttention(d, num_heads=2))
        >>> model.tokens, model(torch.zeros(3, 1, 8, 8)).shape
        (17, torch.Size([3, 10]))

    Raises:
        BadInput: a size is below 1, patches do not tile the image, or the mixers cannot be built.
    """

    def __init__(
        self,
        d_model: int,
        layers: int,
        mixer: _Mixers,
        *,
        image_size: int = 8,
        patch_size: int = 2,
        channels: int = 1,
        classes: int = 10,
        hidden: int | None = None,
        class_token: bool = True,
        class_from: int = 0,
        positions: bool = True,
        mixer_options: Mapping[str, Option] | None = None,
    ) -> None:
        super().__init__()
        hidden = 4 * d_model if hidden is None else hidden
        sizes = {"d_model": d_model, "layers": layers, "image_size": image_size, "patch_size": patch_size}
        for name, value in {**sizes, "channels": channels, "classes": classes, "hidden": hidden}.items():
            if value < 1:
                raise BadInput(f"{name} must be at least 1, got {value}")
        if image_size % patch_size:
            raise BadInput(f"patch_size must divide image_size = {image_size}, got {patch_size}")
        each = [mixer] * layers if isinstance(mixer, str) or callable(mixer) else list(mixer)
        if len(each) != layers:
            raise BadInput(f"mixer must be one for all blocks or one for each of {layers}, got {len(each)}")
        if not 0 <= class_from < layers:
            raise BadInput(f"class_from must lie in [0, {layers}), got {class_from}")
        side = image_size // patch_size
        self.image = (channels, image_size, image_size)
        self.grid, self.tokens, self.class_from = (side, side), side * side + int(class_token), class_from
        self.patch = nn.Conv2d(channels, d_model, patch_size, stride=patch_size)
        self.cls = nn.Parameter(torch.zeros(1, 1, d_model)) if class_token else None
        # Positions as large as the patches themselves: small ones cost a small data set many epochs to find.
        place = torch.randn(1, side * side, d_model) * 0.3
        self.position = nn.Parameter(place) if positions else None
        self.blocks = nn.ModuleList(_Block(build_mixer(one, d_model, mixer_options), hidden) for one in each)
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, classes)

    def mixers(self) -> list[Mixer]:
        """Return the mixer of every block."""
        return [block.mixer for block in self.blocks if isinstance(block.mixer, Mixer)]

    def seen_by_mixers(self, image: Tensor) -> list[Tensor]:
        """Return what the mixer of every block gets, (B, T, D) each: what diagnostics of a mixer are asked about."""
        found: list[Tensor] = []
        hooks = [
            mixer.register_forward_pre_hook(lambda _, given: found.append(given[0]))  # the order is that of the blocks
            for mixer in self.mixers()
        ]
        try:
            self(image)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def forward(self, image: Tensor) -> Tensor:
        """Return class logits."""
        if image.ndim != 4 or image.shape[1:] != self.image:
            raise BadInput(f"image must have shape (B, {', '.join(map(str, self.image))}), got {tuple(image.shape)}")
        x = self.patch(image).flatten(2).transpose(1, 2)  # (B, T, D)
        if self.position is not None:
            x = x + self.position
        for index, block in enumerate(self.blocks):
            if self.cls is not None and index == self.class_from:
                x = torch.cat([self.cls.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
            x = block(x)
        x = self.norm(x)
        logits: Tensor = self.head(x.mean(dim=1) if self.cls is None else x[:, 0])
        return logits
