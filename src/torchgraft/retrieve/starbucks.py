"""Embeddings for a fixed list of pairs of layers and coordinates, trained on the whole list at every step.

`Starbucks: Improved Training for 2D Matryoshka Embeddings <https://arxiv.org/abs/2410.13230>`_ (Zhuang, Wang, Koopman
and Zuccon, 2024).

Equation: ``L = l(e_N) + sum_{i<K} [l(e_{n_i}[:d_i]) + c KL(softmax e_N[:d_i] || softmax e_{n_i}[:d_i])], n_K = N``.

Departures: the masked autoencoder reads the pooled embedding, whatever the encoder's pooling, where the paper reads
the state of the class token. In :class:`Starbucks` the loss l is the task's own, of what the model says where a vector
of fewer layers and coordinates stands; it trains a copy that all smaller budgets share, while the full budget runs the
frozen original. It does no masked pre-training, which needs texts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.models import TransformerBlock
from torchgraft.bench.task import Inputs, Split, Task
from torchgraft.bench.training import Objective, train
from torchgraft.catalogue import Card, Claim
from torchgraft.engines.nesting.embed import ElasticEmbedder, Views, coordinate_divergence, cut, in_batch_contrast
from torchgraft.engines.nesting.exit_models import ExitProcedure, Menu, shared_copy
from torchgraft.engines.nesting.exits import Exits, read
from torchgraft.errors import BadInput

__all__ = ["CARD", "MaskedAutoencoder", "Starbucks", "StarbucksLoss", "smae_pretrain"]

CARD = Card(
    key="starbucks",
    title="Starbucks: a fixed menu of embedding sizes",
    seed_id=219,
    authors="Zhuang, Wang, Koopman and Zuccon, 2024",
    reference="https://arxiv.org/abs/2410.13230",
    family="retrieve",
    kind="procedure",
    engine=("nesting",),
    equation="L = l(e_N) + sum_i [l(e_{n_i}[:d_i]) + c KL(softmax(e_N[:d_i]) || softmax(e_{n_i}[:d_i]))]",
    entry="Starbucks",
    capabilities=frozenset({"elastic", "needs-data", "needs-labels", "needs-training"}),
    oracles=(
        "with the one pair (N, D) the loss is the base loss; with kl_weight = 0 it is the sum of the truncated losses",
        "the truncated head is the whole head on states padded with zeros",
        "two calls give the same loss, and the last pair adds no divergence",
        "the masked losses look at masked positions only",
        "the loss of a step is the task's losses of models of copied weights, one a size, plus divergences, by hand",
    ),
    claim=Claim(
        text="Docstring to function search in the standard library, an encoder of four layers, width 32, sizes (1, 8), "
        "(2, 16), (4, 32), against the same loss with random layers and sizes and against small encoders "
        "trained alone; with and without masked pre-training of the sizes. MRR@10.",
        figure=">= 2 points of MRR@10 above random sampling, mean of the two least sizes; at most 2 points below the "
        "encoders trained alone, mean over sizes; and masked pre-training adds >= 0.5 points at the least",
    ),
    choose_when="the few layer and size pairs that an encoder must serve are known before it is trained",
    choose_instead="two-d-matryoshka where any layer and size may be asked for",
    bibtex="@article{zhuang2024starbucks, title={Starbucks: Improved Training for {2D} {Matryoshka} Embeddings}, "
    "author={Zhuang, Shengyao and Wang, Shuai and Koopman, Bevan and Zuccon, Guido}, journal={arXiv:2410.13230}, "
    "year={2024}}",
)

Loss = Callable[..., Tensor]
Sizes = Sequence[tuple[int, int]]


def menu(sizes: Sizes) -> tuple[tuple[int, int], ...]:
    """Return the pairs (layers, coordinates) where both rise.

    Raises:
        BadInput: there is none, or they do not rise.
    """
    found = tuple((int(layer), int(dim)) for layer, dim in sizes)
    rising = all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(found))
    if not found or not rising or min(found[0]) < 1:
        raise BadInput(f"sizes must be pairs (layers, coordinates) that rise from 1 on, got {list(found)}")
    return found


class StarbucksLoss:
    """The sum over a menu of sizes of a loss on truncated embeddings, each held to the whole one.

    Args:
        loss: ``loss(*embeddings)`` of (B, d) each, such as in-batch contrast.
        sizes: pairs (layers, coordinates), rising; the last is the whole encoder.
        kl_weight: weight of the divergence.
        kl_scale: a further factor of it (in the release it is no temperature).
        detach: whether the whole embedding's gradient is stopped in the divergence (in the release it is not).

    Example:
        >>> loss = StarbucksLoss(lambda a, b: (a - b).square().mean(), sizes=((1, 2), (2, 4)))
        >>> views = {1: torch.randn(3, 4), 2: torch.randn(3, 4)}
        >>> loss(views, views).shape
        torch.Size([])
    """

    def __init__(
        self, loss: Loss, sizes: Sizes, *, kl_weight: float = 1.0, kl_scale: float = 0.3, detach: bool = False
    ) -> None:
        if not kl_weight >= 0 or not kl_scale >= 0:
            raise BadInput(f"kl_weight and kl_scale must not be negative, got {kl_weight} and {kl_scale}")
        self.loss, self.sizes = loss, menu(sizes)
        self.factor, self.detach = kl_weight * kl_scale, detach

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose embeddings the loss reads."""
        return tuple(layer for layer, _ in self.sizes)

    def __call__(self, *views: Views) -> Tensor:
        """Return the loss from the embeddings of (at least) the menu's layers, for every side."""
        last, whole = self.sizes[-1]
        if any(layer not in view for view in views for layer in self.layers) or not views:
            raise BadInput(f"the loss reads the layers {list(self.layers)}, got {[sorted(view) for view in views]}")
        if any(view[last].shape[-1] != whole for view in views):
            raise BadInput(f"the last size keeps all coordinates, {views[0][last].shape[-1]}, got {whole}")
        total = self.loss(*(view[last] for view in views))
        for layer, dim in self.sizes[:-1]:
            small = [cut(view[layer], dim) for view in views]
            total = total + self.loss(*small)
            if self.factor:
                parts = [
                    coordinate_divergence(cut(view[last], dim), each, detach=self.detach)
                    for view, each in zip(views, small, strict=True)
                ]
                total = total + self.factor * torch.stack(parts).mean()
        return total

    def nearest(self, layer: int) -> tuple[int, int]:
        """Return the pair of the menu whose number of layers is nearest to ``layer``, the smaller one of two."""
        return min(self.sizes, key=lambda size: (abs(size[0] - layer), size[0]))


class Starbucks(ExitProcedure):
    """Encoders and classifiers that may stop at a few sizes, fewer coordinates with fewer layers.

    Args:
        sizes: pairs (layers, coordinates), rising, the last one the whole encoder; default: halves of the width down
            to 8, with layers evenly spaced, in as many sizes as both allow.
        kl_weight: weight of the divergence.
        kl_scale: a further factor of it.
        detach: whether the whole vector's gradient is stopped in the divergence.
        lr: highest learning rate; default: the task's.

    Example:
        >>> from torchgraft.bench.models import VisionTransformer
        >>> x, y = torch.randn(8, 1, 8, 8), torch.randint(0, 3, (8,))
        >>> net = VisionTransformer(8, 4, 1, 3, d_model=32, depth=3, num_heads=2)
        >>> task = Task(net, (x, y), (x, y), (x, y), nn.functional.cross_entropy, lambda out, t: out[:, 0])
        >>> elastic = Starbucks().build(net, task)
        >>> [elastic.set_budget(budget).size for budget in elastic.budgets]
        [(1, 8), (2, 16), (3, 32)]
    """

    card = CARD

    def __init__(
        self,
        *,
        sizes: Sizes | None = None,
        kl_weight: float = 1.0,
        kl_scale: float = 0.3,
        detach: bool = False,
        lr: float | None = None,
    ) -> None:
        super().__init__(lr=lr)
        self.sizes = None if sizes is None else menu(sizes)
        self.kl_weight, self.kl_scale, self.detach = kl_weight, kl_scale, detach
        self._loss(((1, 1),))

    def _loss(self, sizes: Sizes) -> StarbucksLoss:
        return StarbucksLoss(
            in_batch_contrast, sizes, kl_weight=self.kl_weight, kl_scale=self.kl_scale, detach=self.detach
        )

    def pairs(self, layers: int, width: int) -> tuple[tuple[int, int], ...]:
        """Return the sizes for encoders of that many layers and coordinates.

        Raises:
            BadInput: the last of the given ones is not the whole encoder.
        """
        if self.sizes is None:
            return spaced(layers, width)
        if self.sizes[-1] != (layers, width):
            raise BadInput(f"the last size must be the whole encoder, {(layers, width)}, got {self.sizes[-1]}")
        return self.sizes

    def menu(self, layers: int, width: int) -> Menu:
        """Return all sizes but the last."""
        return tuple((layer, (dim,)) for layer, dim in self.pairs(layers, width)[:-1])

    def objective(self, found: Exits, task: Task, *, seed: int) -> Objective:
        """Return the sum over all sizes with the task's loss for l."""
        total = self._loss(self.pairs(found.layers, found.width))

        def loss(model: nn.Module, inputs: Inputs, target: Tensor, rows: Tensor) -> Tensor:
            seen = read(shared_copy(model), found, inputs, total.layers)
            total.loss = lambda *vectors: task.loss(seen.finish(*vectors), target)
            return total(*seen.views)

        return loss


def spaced(layers: int, width: int) -> tuple[tuple[int, int], ...]:
    """Return sizes (layers, coordinates): halves of ``width`` down to 8, with evenly spaced numbers of layers.

    Example:
        >>> spaced(6, 96)
        ((2, 12), (3, 24), (5, 48), (6, 96))
    """
    dims = [width]
    while dims[-1] >= 16 and len(dims) < layers:
        dims.append(dims[-1] // 2)
    return tuple((math.ceil(layers * (place + 1) / len(dims)), dim) for place, dim in enumerate(reversed(dims)))


@dataclass(frozen=True)
class Masks:
    """Which tokens the encoder and the decoder do not see, (B, T) each."""

    encoder: Tensor
    decoder: Tensor


class MaskedAutoencoder(nn.Module):
    """Masked prediction from truncated states, and from a truncated embedding by a shallow decoder.

    Args:
        embedder: the encoder; it takes token identities (B, T), 0 being padding.
        embedding: its table of token embeddings, shared with decoder and output.
        norm: what the encoder applies to its last states (shared by all layers), such as its final norm.
        sizes: the menu.
        context: the longest text.
        num_heads: heads of the decoder.
        decoder_layers: layers of the decoder.
        rates: shares of tokens that encoder and decoder do not see.
        special: identities that are never hidden: padding, a class token.
    """

    def __init__(
        self,
        embedder: ElasticEmbedder,
        embedding: nn.Embedding,
        norm: nn.Module,
        sizes: Sizes,
        *,
        context: int,
        num_heads: int = 4,
        decoder_layers: int = 1,
        rates: tuple[float, float] = (0.2, 0.4),
        special: Sequence[int] = (0,),
    ) -> None:
        super().__init__()
        if not all(0.0 < rate < 1.0 for rate in rates):
            raise BadInput(f"rates must lie in (0, 1), got {rates}")
        width = embedding.embedding_dim
        self.embedder, self.embedding, self.norm = embedder, embedding, norm
        self.sizes, self.rates, self.special = menu(sizes), rates, tuple(special)
        self.mask = nn.Parameter(torch.randn(width) * 0.02)
        self.position = nn.Parameter(torch.randn(1, context, width) * 0.02)
        self.dense, self.head_norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.decoder = nn.ModuleList([TransformerBlock(width, num_heads) for _ in range(decoder_layers)])
        self.decoder_norm = nn.LayerNorm(width)
        self.bias = nn.Parameter(torch.zeros(embedding.num_embeddings))

    def transform(self, state: Tensor) -> Tensor:
        """Return (..., D) from truncated states (..., d): the first d columns of the head's dense layer are used."""
        return self.head_norm(F.gelu(F.linear(state, self.dense.weight[:, : state.shape[-1]], self.dense.bias)))  # type: ignore[no-any-return]

    def logits(self, state: Tensor) -> Tensor:
        """Return logits (..., vocabulary) by the table of embeddings."""
        return F.linear(state, self.embedding.weight, self.bias)

    def draw(self, tokens: Tensor, generator: torch.Generator | None = None) -> Masks:
        """Return masks of real tokens, at least one a text."""
        real = ~torch.isin(tokens, torch.tensor(self.special, device=tokens.device))

        def mask(rate: float) -> Tensor:
            noise = torch.rand(tokens.shape, generator=generator).masked_fill(~real, 2.0)
            return ((noise < rate) | (noise == noise.amin(1, keepdim=True))) & real

        return Masks(mask(self.rates[0]), mask(self.rates[1]))

    def states(self, tokens: Tensor, masked: Tensor) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Return by layer the states (B, T, D) of masked texts, and their embeddings (B, D)."""
        found: list[Tensor] = []
        children = list(self.embedder.encoder.get_submodule(self.embedder.stack.name))  # type: ignore[call-overload]
        own = children[self.embedder.stack.first :][: self.embedder.layers]
        handles = [block.register_forward_hook(lambda module, args, output: found.append(output)) for block in own]

        def hide(module: nn.Module, args: object, output: Tensor) -> Tensor:
            del module, args
            return torch.where(masked.unsqueeze(-1), self.mask, output)

        handles.append(self.embedding.register_forward_hook(hide))
        try:
            views = self.embedder(tokens)
        finally:
            for handle in handles:
                handle.remove()
        return {layer: self.norm(state) for layer, state in enumerate(found, 1)}, views

    def parts(self, tokens: Tensor, masks: Masks) -> list[tuple[Tensor, Tensor]]:
        """Return for every size the masked-prediction loss and the autoencoder's."""
        states, views = self.states(tokens, masks.encoder)
        real = (tokens != 0)[:, None, None, :]
        hidden = torch.where(masks.decoder.unsqueeze(-1), self.mask, self.embedding(tokens))
        found = []
        for layer, dim in self.sizes:
            seen = self.transform(cut(states[layer][masks.encoder], dim))
            predicted = F.cross_entropy(self.logits(seen), tokens[masks.encoder])
            start = self.transform(cut(views[layer], dim))[:, None]
            x = torch.cat([start, hidden[:, 1:]], 1) + self.position[:, : tokens.shape[1]]
            for block in self.decoder:
                x = block(x, real)
            rebuilt = F.cross_entropy(self.logits(self.decoder_norm(x)[masks.decoder]), tokens[masks.decoder])
            found.append((predicted, rebuilt))
        return found

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the mean over sizes of half the sum of both losses, masks drawn anew."""
        return torch.stack([(a + b) / 2 for a, b in self.parts(tokens, self.draw(tokens))]).mean()


def smae_pretrain(
    embedder: ElasticEmbedder,
    tokens: Tensor,
    embedding: nn.Embedding,
    norm: nn.Module,
    sizes: Sizes,
    *,
    steps: int,
    decoder_layers: int = 1,
    num_heads: int = 4,
    batch_size: int = 64,
    lr: float = 1e-3,
    special: Sequence[int] = (0,),
    seed: int = 0,
) -> list[float]:
    """Pre-train the encoder in place on texts without labels, and return the loss of every step.

    Args:
        embedder: the encoder.
        tokens: texts as token identities (N, T), 0 being padding.
        embedding: the encoder's table of embeddings.
        norm: what it applies to its last states.
        sizes: the menu of pairs (layers, coordinates).
        steps: optimiser steps.
        decoder_layers: layers of the decoder, which is thrown away.
        num_heads: heads of the decoder.
        batch_size: texts a step.
        lr: highest learning rate of AdamW.
        special: identities that are never hidden.
        seed: makes every random choice.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MaskedAutoencoder(
            embedder,
            embedding,
            norm,
            sizes,
            context=tokens.shape[1],
            num_heads=num_heads,
            decoder_layers=decoder_layers,
            special=special,
        )
    split = Split(tokens, torch.zeros(len(tokens)))
    record = train(
        model,
        split,
        lambda module, inputs, target, rows: module(inputs),
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        seed=seed,
    )
    return list(record.losses)
