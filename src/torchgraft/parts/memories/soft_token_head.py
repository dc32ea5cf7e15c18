"""One sequence head for outputs of several kinds: a tokenizer for each, and a decoder that speaks the tokens of all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.errors import BadInput, nearest
from torchgraft.parts.memories.soft_token_codebook import (
    SoftTokenDecoder,
    VQCodebook,
    mask_augment,
    soft_token,
    valid_loss,
)

__all__ = ["UnifiedHead", "VQTokenizer", "dice_loss", "map_tokenizer"]

#: ``loss(found, target, valid)`` -> scalar
MapLoss: TypeAlias = "Callable[[Tensor, Tensor, Tensor], Tensor]"


def dice_loss(found: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Return 1 - Dice of masks in [0, 1] plus their squared error, where ``valid`` is true; (B, 1, h, w)."""
    found, target, kept = found.clamp(0, 1), torch.where(valid, target, 0), valid.to(found.dtype)
    both = (found * target * kept).sum((1, 2, 3))
    each = (found * kept).sum((1, 2, 3)) + target.sum((1, 2, 3))
    return (1 - (2 * both + 1) / (each + 1)).mean() + valid_loss(found, target, valid)


class VQTokenizer(nn.Module):
    """An autoencoder of label maps through a codebook; 0 is the undefined value of its inputs.

    Args:
        encoder: (B, C, h, w) -> (B, D, rows, columns).
        decoder: the way back.
        book: codes of width D.
        patch: size of the patches of mask augmentation.
        ratio: share of patches that training hides from the encoder; 0 for no augmentation.

    Shapes:
        (B, C, h, w) -> (B, C, h, w)

    Example:
        >>> tokenizer = map_tokenizer(1, 8, num_codes=16, width=4, dim=4)
        >>> tokenizer(torch.rand(2, 1, 16, 16)).shape, tokenizer.tokens(torch.rand(2, 1, 16, 16)).shape
        (torch.Size([2, 1, 16, 16]), torch.Size([2, 4]))
    """

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module, book: VQCodebook, *, patch: int = 16, ratio: float = 0.5
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, self.book, self.patch, self.ratio = encoder, decoder, book, patch, ratio

    def tokens(self, labels: Tensor) -> Tensor:
        """Return the tokens of labels, (B, C, h, w) -> (B, rows * columns)."""
        z = self.encoder(labels).flatten(2).mT
        return torch.unflatten(self.book.encode(z.flatten(0, 1)), 0, tuple(z.shape[:2]))

    def decode(self, q: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the map of embeddings (B, T, D), rows by columns of them."""
        y: Tensor = self.decoder(torch.unflatten(q.mT, 2, size))
        return y

    def forward(self, labels: Tensor) -> Tensor:
        """Return what is left of labels after the codebook."""
        z = self.encoder(labels)
        return self.decode(self.book(z.flatten(2).mT)[0], (z.shape[2], z.shape[3]))

    def loss(
        self,
        labels: Tensor,
        valid: Tensor | None = None,
        *,
        recon: MapLoss = valid_loss,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return reconstruction and commitment loss; patches are hidden from the encoder, not from the loss.

        Args:
            labels: (B, C, h, w).
            valid: where there is a label at all; default where it is not 0, which suits depth and not masks. Only there
                the reconstruction counts.
            recon: the reconstruction's loss.
            generator: decides which patches are hidden.
        """
        valid = labels != 0 if valid is None else valid
        given = torch.where(valid, labels, 0)
        if self.ratio > 0:
            given = mask_augment(given, patch=self.patch, ratio=self.ratio, generator=generator)
        z = self.encoder(given)
        quantized, _, commitment = self.book(z.flatten(2).mT)
        found = self.decode(quantized, (z.shape[2], z.shape[3]))
        total: Tensor = recon(found, labels, valid) + commitment
        return total


def map_tokenizer(
    channels: int,
    cell: int,
    *,
    num_codes: int = 128,
    width: int = 16,
    dim: int = 64,
    patch: int = 16,
    ratio: float = 0.5,
    ema: float = 0.99,
) -> VQTokenizer:
    """Return a small convolutional tokenizer whose tokens stand for cells of ``cell`` x ``cell`` pixels.

    Args:
        channels: channels of the labels.
        cell: a power of 2.
        num_codes, dim, ema: as for :class:`VQCodebook`.
        width: channels of the first convolution; each halving of the map doubles them.
        patch, ratio: as for :class:`VQTokenizer`.

    Raises:
        BadInput: ``cell`` is no power of 2.
    """
    halvings = cell.bit_length() - 1
    if cell < 2 or 2**halvings != cell:
        raise BadInput(f"cell must be a power of 2 and at least 2, got {cell}")
    widths = [width * 2**level for level in range(halvings)]
    down: list[nn.Module] = []
    for before, after in zip([channels, *widths], widths, strict=False):
        down += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
    up: list[nn.Module] = [nn.Conv2d(dim, widths[-1], 1), nn.ReLU()]
    for before, after in zip(widths[::-1], [*widths[-2::-1], width], strict=True):
        up += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
    return VQTokenizer(
        nn.Sequential(*down, nn.Conv2d(widths[-1], dim, 1)),
        nn.Sequential(*up, nn.Conv2d(width, channels, 1)),
        VQCodebook(dim, num_codes=num_codes, ema=ema),
        patch=patch,
        ratio=ratio,
    )


class UnifiedHead(nn.Module):
    """A decoder whose tasks are tokenizers: features in, label maps of the task that is asked for out.

    Args:
        decoder: has a task for each tokenizer, in their order.
        tokenizers: trained ones by name; the head freezes them.
        size: rows and columns of tokens.
        tau: softness of the output, see :func:`soft_token`.
        soft: whether tokens are soft, in what is fed and in what is decoded; with False both are the likeliest.

    Example:
        >>> tokenizers = {name: map_tokenizer(1, 8, num_codes=16, dim=4) for name in ("depth", "mask")}
        >>> head = UnifiedHead(SoftTokenDecoder(8, num_codes=16, length=4, num_heads=2), tokenizers, size=(2, 2))
        >>> head(torch.randn(3, 5, 8), "mask").shape
        torch.Size([3, 1, 16, 16])

    Raises:
        BadInput: decoder and tokenizers do not fit.
    """

    def __init__(
        self,
        decoder: SoftTokenDecoder,
        tokenizers: Mapping[str, VQTokenizer],
        *,
        size: tuple[int, int],
        tau: float = 0.8,
        soft: bool = True,
    ) -> None:
        super().__init__()
        counts = [tokenizer.book.codes.shape[0] for tokenizer in tokenizers.values()]
        if counts != [decoder.num_codes] * decoder.tasks or size[0] * size[1] != decoder.length:
            raise BadInput(
                f"the decoder's {decoder.tasks} tasks of {decoder.num_codes} codes and {decoder.length} tokens do not "
                f"fit tokenizers of {counts} codes and {size[0]} x {size[1]} tokens"
            )
        self.decoder, self.tokenizers = decoder, nn.ModuleDict(tokenizers)
        self.size, self.tau, self.soft = size, tau, soft
        self.tokenizers.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> UnifiedHead:
        """Set the mode of the decoder; tokenizers stay in evaluation, so that no code moves."""
        super().train(mode)
        self.tokenizers.eval()
        return self

    def _task(self, task: str) -> tuple[int, VQTokenizer]:
        names = list(self.tokenizers)
        if task not in names:
            raise BadInput(f"there is no task {task!r}{nearest(task, names)}")
        return names.index(task), cast(VQTokenizer, self.tokenizers[task])

    def _map(self, logits: Tensor, tokenizer: VQTokenizer, soft: bool) -> Tensor:
        tau = self.tau if soft else math.inf
        return tokenizer.decode(soft_token(logits, tokenizer.book.codes, tau=tau), self.size)

    def forward(self, features: Tensor, task: str) -> Tensor:
        """Return the map of a task, token by token; features (B, S, D)."""
        number, tokenizer = self._task(task)
        return self._map(self.decoder(features, task=number, soft=self.soft), tokenizer, self.soft)

    def loss(
        self,
        features: Tensor,
        labels: Tensor,
        task: str,
        *,
        valid: Tensor | None = None,
        output_weight: float = 1.0,
        output_loss: MapLoss = valid_loss,
    ) -> Tensor:
        """Return cross-entropy on the tokens of labels, plus a loss on the map of the soft tokens, end to end.

        Args:
            features: (B, S, D).
            labels: (B, C, h, w); tokens are made of what is valid in them, the rest undefined.
            task: the name of the task.
            valid: where there is a label; default where it is not 0, which suits depth and not masks.
            output_weight: weight of the second loss; 0 leaves hard tokens alone to learn from.
            output_loss: the second loss.
        """
        number, tokenizer = self._task(task)
        valid = labels != 0 if valid is None else valid
        with torch.no_grad():
            tokens = tokenizer.tokens(torch.where(valid, labels, 0))
        logits = self.decoder.teach(features, tokens, task=number)
        total = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        if output_weight:
            total = total + output_weight * output_loss(self._map(logits, tokenizer, True), labels, valid)
        return total
