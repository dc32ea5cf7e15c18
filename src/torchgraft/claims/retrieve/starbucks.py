"""Starbucks on docstring to function search: a fixed menu of sizes against random ones and against encoders alone.

Protocol: data, encoder, batches and rate are those of the claim of two-d-matryoshka, with the menu (1, 8), (2, 16),
(4, 32) and 200 steps. Compared at equal steps: the menu's loss, the sampled grid over the same numbers of coordinates,
and for each size an encoder of that many layers that is trained on that many coordinates alone. Masked pre-training on
the functions takes 150 steps before the menu's loss. MRR@10 among the 512 pairs of the test split.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor

from torchgraft.bench.task import Split
from torchgraft.claims.record import ClaimRecord, judge
from torchgraft.claims.retrieve.two_d_matryoshka import CLASS, DEPTH, WIDTH, Encoder, encoder, fitted, heat_map, texts
from torchgraft.engines.nesting.embed import ElasticEmbedder, Views, cut, in_batch_contrast
from torchgraft.retrieve.starbucks import CARD, StarbucksLoss, smae_pretrain
from torchgraft.retrieve.two_d_matryoshka import MatryoshkaGrid

__all__ = ["measured", "run"]

MENU = ((1, 8), (2, 16), (4, 32))
STEPS, PRE_STEPS = 200, 150


def _menu(embedder: ElasticEmbedder, data: Mapping[str, Split], seed: int) -> ElasticEmbedder:
    loss = StarbucksLoss(in_batch_contrast, MENU)
    return fitted(embedder, data["train"], lambda: loss.layers, loss, seed=seed, steps=STEPS)


def _grid(data: Mapping[str, Split], seed: int) -> ElasticEmbedder:
    grid = MatryoshkaGrid(in_batch_contrast, sizes=[dim for _, dim in MENU], seed=seed)
    drawn: list[tuple[list[int], list[int]]] = []

    def layers() -> list[int]:
        drawn[:] = [grid.draw(DEPTH, WIDTH)]
        return [*drawn[0][0], DEPTH]

    return fitted(
        encoder(seed), data["train"], layers, lambda a, b: grid.mean((a, b), *drawn[0]), seed=seed, steps=STEPS
    )


def _pretrained(data: Mapping[str, Split], seed: int) -> ElasticEmbedder:
    embedder = encoder(seed)
    model = embedder.encoder
    if not isinstance(model, Encoder):
        raise TypeError("the claim's encoder is another")
    code = data["train"].inputs[1]  # type: ignore[index]  # pairs
    smae_pretrain(embedder, code, model.embed, model.norm, MENU, steps=PRE_STEPS, special=(0, CLASS), seed=seed)
    return embedder


def _alone(data: Mapping[str, Split], layer: int, dim: int, seed: int) -> ElasticEmbedder:
    def loss(left: Views, right: Views) -> Tensor:
        return in_batch_contrast(cut(left[layer], dim), cut(right[layer], dim))

    # A stack is seen from two layers on, so the encoder of one layer is the first of two.
    embedder = encoder(seed, max(layer, 2))
    return fitted(embedder, data["train"], lambda: (layer,), loss, seed=seed, steps=STEPS)


def measured(seed: int, data: Mapping[str, Split], *, split: str = "test") -> dict[str, float]:
    """Return the scores of one seed."""
    found: dict[str, float] = {}

    def note(name: str, scores: Tensor) -> None:
        for place, (layer, dim) in enumerate(MENU):
            found[f"{name}: {layer} x {dim}"] = float(scores[place])

    def along(embedder: ElasticEmbedder) -> Tensor:
        return heat_map(embedder, data[split], [n for n, _ in MENU], [d for _, d in MENU]).diagonal()

    note("menu", along(_menu(encoder(seed), data, seed)))
    note("random", along(_grid(data, seed)))
    note("menu after masked pre-training", along(_menu(_pretrained(data, seed), data, seed)))
    alone = [_alone(data, layer, dim, seed) for layer, dim in MENU]
    scores = [float(heat_map(one, data[split], (n,), (d,))) for one, (n, d) in zip(alone, MENU, strict=True)]
    note("alone", torch.tensor(scores))
    return found


def run(seeds: Sequence[int] = (0, 1, 2)) -> ClaimRecord:
    """Run the claim; about forty seconds a seed."""
    begun = time.perf_counter()
    data = texts()
    with torch.random.fork_rng():
        found = [measured(seed, data) for seed in seeds]
    metrics = {name: [each[name] for each in found] for name in found[0]}
    mean = {name: 100 * fmean(values) for name, values in metrics.items()}
    sizes = [f"{layer} x {dim}" for layer, dim in MENU]

    def over(name: str, count: int) -> float:
        return fmean(mean[f"{name}: {size}"] for size in sizes[:count])

    effects = {
        "points above random sampling, two least sizes": over("menu", 2) - over("random", 2),
        "points below encoders trained alone, all sizes": over("alone", 3) - over("menu", 3),
        "points of masked pre-training, least size": over("menu after masked pre-training", 1) - over("menu", 1),
    }
    return judge(
        CARD.key,
        CARD.claim.figure if CARD.claim else "",
        metrics=metrics,
        effects=effects,
        parts={
            "at least 2 points above random": effects["points above random sampling, two least sizes"] >= 2.0,
            "at most 2 points below alone": effects["points below encoders trained alone, all sizes"] <= 2.0,
            "pre-training adds 0.5 points": effects["points of masked pre-training, least size"] >= 0.5,
        },
        seeds=seeds,
        seconds=time.perf_counter() - begun,
    )
