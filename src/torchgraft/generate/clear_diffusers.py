"""CLEAR inside a diffusers transformer: an attention processor under which joint attention is local in discs.

:mod:`torchgraft.generate.clear_local_dit` has the method; this is its way into models of diffusers, whose attentions
hand their mixing to an object given by ``set_processor``. Text sees all tokens, an image token sees text and its disc.
Blocks of Flux are served, those with a text stream of its own and those in which text and image are one sequence, and
those of Stable Diffusion 3 with their second, image-only attention. diffusers is not imported and no dependency:
attentions are known by what they hold.

Tested: in the test suite on stand-ins written after the published protocol; by hand, once, on tiny randomly initialised
Flux and SD3 transformers of diffusers 0.42.1, whose outputs stayed within 1e-6 under a radius beyond the image. Not
tested: trained checkpoints, pipelines, image quality, other families of models, and fused or sharded projections.
``distill_attention`` does not know these attentions, whose outputs are pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.engines.recurrence.heads import merge_heads
from torchgraft.errors import BadInput
from torchgraft.generate.clear_local_dit import checked_discs, mix_discs

__all__ = ["DiscAttnProcessor", "set_disc_processors"]

_PARTS = ("set_processor", "to_q", "to_k", "to_v", "heads")


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighbouring pairs of channels, (B, T, H, K), (T, K), (T, K) -> (B, T, H, K), in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (each.to(x.device, wide)[:, None] for each in (cos, sin))  # (T, 1, K)
    even, odd = x[..., 0::2].to(wide), x[..., 1::2].to(wide)
    turned = (even * cos[..., 0::2] - odd * sin[..., 0::2], odd * cos[..., 1::2] + even * sin[..., 1::2])
    return torch.stack(turned, dim=-1).flatten(-2).to(x.dtype)


class DiscAttnProcessor(nn.Module):
    """What a diffusers attention calls to mix tokens, here within discs of the image and with all text.

    Args:
        grid: rows of the image in tokens and tokens a row, or one number for a square; height and width of the latents
            divided by the size of a patch.
        radius: an image token sees those less than this far away; the paper takes 8, 16 and 32.
        down: side of the patches whose summed keys and values all image tokens see besides; 1 for none. The weights of
            the sum are learned; they are saved with the model as ``processor.spatial``.
        train_tokens: where given, scores are scaled as for :class:`DiscAttention`.
        strips: into how many strips of rows the work is split.

    Example:
        >>> DiscAttnProcessor(grid=(64, 64), radius=8, down=4).spatial.shape
        torch.Size([16])

    Raises:
        BadInput: a size is out of range.
    """

    def __init__(
        self,
        *,
        grid: int | tuple[int, int],
        radius: float = 16.0,
        down: int = 1,
        train_tokens: int | None = None,
        strips: int = 1,
    ) -> None:
        super().__init__()
        self.grid = checked_discs(grid, radius=radius, down=down, text_len=0, train_tokens=train_tokens, strips=strips)
        self.radius, self.train_tokens, self.strips = radius, train_tokens, strips
        self.spatial = nn.Parameter(torch.full((down * down,), 1 / down**2)) if down > 1 else None

    # diffusers passes on the keywords that this signature names, so it cannot be nn.Module's own
    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Mix the tokens of ``attn``.

        Args:
            attn: the attention whose projections and norms are used.
            hidden_states: image tokens, (B, h w, D); without text of their own, text tokens may stand before them.
            encoder_hidden_states: text tokens, (B, text, D).
            attention_mask: must be ``None``.
            image_rotary_emb: cosines and sines of text and image tokens, (text + h w, K) each.

        Returns:
            Image tokens, or all in one sequence; where text was given, also text tokens.

        Raises:
            BadInput: there is a mask, the grid has other tokens, or text meets an attention that cannot join it.
        """
        tokens = self.grid[0] * self.grid[1]
        if attention_mask is not None:
            raise BadInput("attention_mask must be None: discs are the mask")
        if hidden_states.ndim != 3:
            raise BadInput(f"hidden_states must have shape (B, T, D), got {tuple(hidden_states.shape)}")
        text = hidden_states.shape[1] - tokens if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        if text < 0 or (encoder_hidden_states is not None and hidden_states.shape[1] != tokens):
            raise BadInput(
                f"hidden_states must hold the {self.grid[0]} x {self.grid[1]} = {tokens} image tokens of grid, got "
                f"{hidden_states.shape[1]}; set processors for the size that is drawn"
            )
        size = attn.to_q.out_features // attn.heads
        q, k, v = self._projected(attn, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), hidden_states, size)
        if encoder_hidden_states is not None:
            names = ("add_q_proj", "add_k_proj", "add_v_proj")
            if any(getattr(attn, name, None) is None for name in names):
                raise BadInput(f"an attention with text must have {', '.join(names)}; {type(attn).__name__} lacks some")
            norms = ("norm_added_q", "norm_added_k")
            context = self._projected(attn, names, norms, encoder_hidden_states, size)
            q, k, v = (torch.cat(pair, dim=1) for pair in zip(context, (q, k, v), strict=True))
        if image_rotary_emb is not None:
            q, k = _rotated(q, *image_rotary_emb), _rotated(k, *image_rotary_emb)
        mixed = mix_discs(
            q,
            k,
            v,
            grid=self.grid,
            radius=self.radius,
            text=text,
            spatial=self.spatial,
            train_tokens=self.train_tokens,
            strips=self.strips,
        )
        y = merge_heads(mixed).to(q.dtype)
        if encoder_hidden_states is None:
            return self._out(attn, y)
        words, image = y[:, :text], self._out(attn, y[:, text:])
        last = getattr(attn, "to_add_out", None)  # the last block of SD3 has none, its text is read no more
        return image, words if last is None else last(words)

    @staticmethod
    def _projected(
        attn: Any, names: tuple[str, ...], norms: tuple[str, ...], x: Tensor, size: int
    ) -> tuple[Tensor, ...]:
        """Return queries, keys and values, (B, T, H, K) each, the former two normed where there are norms."""
        parts = [getattr(attn, name)(x).unflatten(-1, (-1, size)) for name in names]
        for place, name in enumerate(norms):
            norm = getattr(attn, name, None)
            parts[place] = parts[place] if norm is None else norm(parts[place])
        return tuple(parts)

    @staticmethod
    def _out(attn: Any, x: Tensor) -> Tensor:
        for layer in getattr(attn, "to_out", None) or ():
            x = layer(x)
        return x


def set_disc_processors(
    transformer: nn.Module,
    *,
    grid: int | tuple[int, int],
    radius: float = 16.0,
    down: int = 1,
    train_tokens: int | None = None,
    strips: int = 1,
) -> list[str]:
    """Give every self- and joint attention of a diffusers transformer a :class:`DiscAttnProcessor`, in place.

    Weights stay as they are; ``transformer.set_attn_processor`` with the old ``attn_processors`` takes it back.

    Args:
        transformer: holds attentions of diffusers; those of images to foreign text alone are passed over.
        grid, radius, down, train_tokens, strips: as for :class:`DiscAttnProcessor`.

    Returns:
        The names of the attentions.

    Raises:
        BadInput: there is none, or a size is out of range.
    """
    found: list[str] = []
    for name, module in list(transformer.named_modules()):
        attn: Any = module
        if not all(hasattr(attn, part) for part in _PARTS) or getattr(attn, "is_cross_attention", False):
            continue
        processor = DiscAttnProcessor(grid=grid, radius=radius, down=down, train_tokens=train_tokens, strips=strips)
        attn.set_processor(processor.to(attn.to_q.weight.device, attn.to_q.weight.dtype))
        found.append(name)
    if not found:
        raise BadInput(f"an attention must have {', '.join(_PARTS)}; {type(transformer).__name__} holds none such")
    return found
