"""Embeddings that stay useful with fewer layers and fewer coordinates, by a loss on a random layer and size a step.

`2D Matryoshka Sentence Embeddings <https://arxiv.org/abs/2402.14776>`_ (Li, Li, Li, Xie and Li, 2024).

Equation: ``L = l(e_N) + l(e_N[:d]) + w_n (l(e_n) + l(e_n[:d])) + lambda KL(softmax e_N || softmax e_n)``.

Departures: with ``layers="list"`` or ``dims="list"`` the loss is the mean over all layers or sizes, of which the
sampled loss is an unbiased estimate. :func:`angle` ranks by the mean absolute angle of a pair's coordinates. In
:class:`TwoDMatryoshka` the loss l is the task's own, of what the model says where a vector of fewer layers or
coordinates stands; it trains a copy that all smaller budgets share, while the full budget runs the frozen original.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from torchgraft.bench.task import Inputs, Task
from torchgraft.bench.training import Objective
from torchgraft.catalogue import Card, Claim
from torchgraft.engines.nesting.embed import (
    ElasticEmbedder,
    Views,
    coordinate_divergence,
    cut,
    grid_eval,
    in_batch_contrast,
    reciprocal_rank,
)
from torchgraft.engines.nesting.exit_models import ExitProcedure, Menu, shared_copy
from torchgraft.engines.nesting.exits import Exits, read
from torchgraft.errors import BadInput

__all__ = [
    "CARD",
    "ElasticEmbedder",
    "MatryoshkaGrid",
    "TwoDMatryoshka",
    "angle",
    "cosent",
    "grid_eval",
    "in_batch_contrast",
    "reciprocal_rank",
]

CARD = Card(
    key="two-d-matryoshka",
    title="2D Matryoshka embeddings",
    seed_id=208,
    authors="Li, Li, Li, Xie and Li, 2024",
    reference="https://arxiv.org/abs/2402.14776",
    family="retrieve",
    kind="procedure",
    engine=("nesting",),
    equation="L = l(e_N) + l(e_N[:d]) + w_n (l(e_n) + l(e_n[:d])) + lambda KL(softmax e_N || softmax e_n)",
    entry="TwoDMatryoshka",
    capabilities=frozenset({"elastic", "needs-data", "needs-labels", "needs-training"}),
    oracles=(
        "at all layers and coordinates the embedder is the encoder; at m layers it runs m blocks and gives what a "
        "whole pass has after them",
        "with lambda = 0 and layer and size forced to the full ones, the loss is four times the base loss",
        "the alignment is 0 exactly where the difference of the embeddings is constant over the coordinates",
        "the gradient averaged over all draws of layer and size is that of the whole grid",
        "the loss of a step is the task's loss of four models of copied weights, plus the divergence, by hand",
    ),
    claim=Claim(
        text="Docstring to function search in the standard library with an encoder of four layers, width 32, against "
        "the last layer alone and against Matryoshka over coordinates alone; MRR@10 over layers and coordinates.",
        figure="at layer 2 >= 5 points of MRR@10 above coordinates alone, mean over sizes; at the full setting <= 2 "
        "points below it",
    ),
    choose_when="one encoder must serve several speeds and index sizes, chosen after training",
    choose_instead="starbucks where the few sizes that will be used are known beforehand",
    bibtex="@article{li20242d, title={{2D} {Matryoshka} Sentence Embeddings}, author={Li, Xianming and Li, Zongxi and "
    "Li, Jing and Xie, Haoran and Li, Qing}, journal={arXiv:2402.14776}, year={2024}}",
)

Loss = Callable[..., Tensor]


class MatryoshkaGrid:
    """A loss on embeddings of some layers and sizes, out of a loss on embeddings.

    Args:
        loss: ``loss(*embeddings)`` of (B, d) each, such as :func:`in_batch_contrast`.
        layers: ``"sample"``: one shallow layer a step; ``"list"``: all of them, averaged.
        dims: ``"sample"``: one of ``sizes`` a step; ``"list"``: all of them, averaged.
        sizes: numbers of coordinates; default: halves of the width down to 8.
        align: ``"kl"``, or ``None`` for no alignment.
        weight: lambda, the weight of the alignment.
        depth_weight: ``"none"``: shallow layers weigh 1; ``"log"``: layer n weighs 1 / (1 + ln n).
        seed: makes the draws.

    Example:
        >>> grid = MatryoshkaGrid(in_batch_contrast, sizes=(2, 4))
        >>> views = {1: torch.randn(3, 4), 2: torch.randn(3, 4)}
        >>> grid(views, views).shape
        torch.Size([])
    """

    def __init__(
        self,
        loss: Loss,
        *,
        layers: Literal["sample", "list"] = "sample",
        dims: Literal["sample", "list"] = "sample",
        sizes: Sequence[int] | None = None,
        align: Literal["kl"] | None = "kl",
        weight: float = 1.0,
        depth_weight: Literal["none", "log"] = "none",
        seed: int = 0,
    ) -> None:
        if layers not in ("sample", "list") or dims not in ("sample", "list"):
            raise BadInput(f"layers and dims are 'sample' or 'list', got {layers!r} and {dims!r}")
        if align not in ("kl", None) or depth_weight not in ("none", "log"):
            raise BadInput(f"align is 'kl' or None and depth_weight 'none' or 'log', got {align!r}, {depth_weight!r}")
        if not weight >= 0 or (sizes is not None and (not sizes or min(sizes) < 1)):
            raise BadInput(f"weight must not be negative and sizes be at least 1, got {weight} and {sizes}")
        self.loss, self.layers, self.dims, self.align = loss, layers, dims, align
        self.sizes = None if sizes is None else tuple(sizes)
        self.weight, self.depth_weight = weight, depth_weight
        self._generator = torch.Generator().manual_seed(seed)

    def sizes_of(self, width: int) -> tuple[int, ...]:
        """Return the sizes for embeddings of ``width`` coordinates."""
        if self.sizes is not None:
            return self.sizes
        found = [width]
        while found[-1] >= 16:
            found.append(found[-1] // 2)
        return tuple(reversed(found))

    def draw(self, layers: int, width: int) -> tuple[list[int], list[int]]:
        """Return the shallow layers and the sizes of one step, for an encoder of ``layers`` layers."""
        shallow, sizes = list(range(1, layers)), list(self.sizes_of(width))
        if self.layers == "sample" and shallow:
            shallow = [shallow[self._pick(len(shallow))]]
        if self.dims == "sample":
            sizes = [sizes[self._pick(len(sizes))]]
        return shallow, sizes

    def _pick(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self._generator))

    def at(self, views: Sequence[Views], layer: int, dim: int) -> Tensor:
        """Return the loss for one shallow layer and one size."""
        last = max(views[0])
        deep, shallow = [view[last] for view in views], [view[layer] for view in views]
        share = 1.0 / (1.0 + math.log(layer)) if self.depth_weight == "log" else 1.0
        total = self.loss(*deep) + self.loss(*(cut(each, dim) for each in deep))
        total = total + share * (self.loss(*shallow) + self.loss(*(cut(each, dim) for each in shallow)))
        if self.align and self.weight:
            parts = [coordinate_divergence(high, low) for high, low in zip(deep, shallow, strict=True)]
            total = total + self.weight * torch.stack(parts).mean()
        return total

    def __call__(self, *views: Views) -> Tensor:
        """Return the loss of one step from the embeddings of all layers, the deepest last."""
        if not views or len({tuple(sorted(view)) for view in views}) != 1:
            raise BadInput("the grid needs embeddings of the same layers for every side")
        last = max(views[0])
        shallow, sizes = self.draw(last, views[0][last].shape[-1])
        return self.mean(views, shallow, sizes)

    def mean(self, views: Sequence[Views], shallow: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """Return the mean of :meth:`at` over the layers and sizes; an encoder of one layer has its own alone."""
        layers = list(shallow) or [max(views[0])]
        return torch.stack([self.at(views, layer, size) for layer in layers for size in sizes]).mean()


class TwoDMatryoshka(ExitProcedure):
    """Encoders and classifiers that may stop after any layer and keep some of their coordinates.

    A budget is a number of layers, with all coordinates; ``keep(d)`` of the elastic model gives the first ``d`` of
    them, which makes an index smaller and saves hardly a multiplication.

    Args:
        sizes: numbers of coordinates; default: halves of the width down to 8. The whole width is always among them.
        layers: ``"sample"``: one shallow layer a step; ``"list"``: all of them, averaged.
        dims: ``"sample"``: one size a step; ``"list"``: all of them, averaged.
        weight: lambda, the weight of the alignment.
        depth_weight: ``"none"``: shallow layers weigh 1; ``"log"``: layer n weighs 1 / (1 + ln n).
        lr: highest learning rate; default: the task's.

    Example:
        >>> from torchgraft.bench.models import VisionTransformer
        >>> x, y = torch.randn(8, 1, 8, 8), torch.randint(0, 3, (8,))
        >>> net = VisionTransformer(8, 4, 1, 3, d_model=16, depth=3, num_heads=2)
        >>> task = Task(net, (x, y), (x, y), (x, y), nn.functional.cross_entropy, lambda out, t: out[:, 0])
        >>> elastic = TwoDMatryoshka().build(net, task)
        >>> [round(b, 1) for b in elastic.budgets], elastic.keep(8).set_budget(0.5).size
        ([0.3, 0.7, 1.0], (1, 8))
    """

    card = CARD

    def __init__(
        self,
        *,
        sizes: Sequence[int] | None = None,
        layers: Literal["sample", "list"] = "sample",
        dims: Literal["sample", "list"] = "sample",
        weight: float = 1.0,
        depth_weight: Literal["none", "log"] = "none",
        lr: float | None = None,
    ) -> None:
        super().__init__(lr=lr)
        self.sizes = None if sizes is None else tuple(sizes)
        self.layers, self.dims, self.weight, self.depth_weight = layers, dims, weight, depth_weight
        self._grid(1, 0)

    def _grid(self, width: int, seed: int) -> MatryoshkaGrid:
        grid = MatryoshkaGrid(
            in_batch_contrast, layers=self.layers, dims=self.dims, sizes=self.sizes, weight=self.weight,
            depth_weight=self.depth_weight, seed=seed,
        )  # fmt: skip
        grid.sizes = tuple(sorted({*grid.sizes_of(width), width}))
        return grid

    def menu(self, layers: int, width: int) -> Menu:
        """Return every number of layers but the greatest, with all sizes."""
        sizes = tuple(self._grid(width, 0).sizes_of(width))
        return tuple((layer, sizes) for layer in range(1, layers))

    def objective(self, found: Exits, task: Task, *, seed: int) -> Objective:
        """Return the loss of the grid with the task's loss for l."""
        grid = self._grid(found.width, seed)

        def loss(model: nn.Module, inputs: Inputs, target: Tensor, rows: Tensor) -> Tensor:
            shallow, sizes = grid.draw(found.layers, found.width)
            seen = read(shared_copy(model), found, inputs, shallow)
            grid.loss = lambda *vectors: task.loss(seen.finish(*vectors), target)
            return grid.mean(seen.views, shallow, sizes)

        return loss


def _pairwise(similarity: Tensor, score: Tensor, scale: float) -> Tensor:
    """Return log(1 + sum of exp(scale (s_i - s_j))) over the pairs that should be the other way round."""
    difference = scale * (similarity[:, None] - similarity[None, :])  # (B, B): i over j
    wrong = score[:, None] < score[None, :]
    terms = difference.masked_fill(~wrong, float("-inf")).flatten()
    return torch.logsumexp(torch.cat([terms.new_zeros(1), terms]), 0)


def cosent(left: Tensor, right: Tensor, score: Tensor, *, scale: float = 20.0) -> Tensor:
    """Return CoSENT's loss: pairs of a lower score should have a lower cosine.

    Shapes:
        left, right (B, D); score (B,) -> ()
    """
    return _pairwise(torch.cosine_similarity(left, right, -1), score, scale)


def angle(left: Tensor, right: Tensor, score: Tensor, *, scale: float = 20.0) -> Tensor:
    """Return AnglE's loss: pairs of a lower score should stand at a greater angle in the complex plane.

    The first half of the coordinates are real parts, the second imaginary ones; the angle of a pair is the mean over
    coordinates of the absolute angle of the quotient of ``left`` and ``right``.

    Shapes:
        left, right (B, D) with even D; score (B,) -> ()
    """
    if left.shape[-1] % 2:
        raise BadInput(f"angle needs an even number of coordinates, got {left.shape[-1]}")
    a, b = left.chunk(2, -1)
    c, d = right.chunk(2, -1)
    # The quotient's length plays no part, so it is that of left times the conjugate of right.
    turned = torch.atan2(b * c - a * d, a * c + b * d).abs().mean(-1)
    return _pairwise(-turned, score, scale)
