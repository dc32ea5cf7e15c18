"""NUPES on a small digits transformer: 3 and 4 bits on a bent grid beside the uniform one, with and without data."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from torchgraft.bench.files import size_of_tensors
from torchgraft.bench.models import VisionTransformer
from torchgraft.claims.images import accuracy, digits, images_of, train_images
from torchgraft.claims.record import ClaimRecord, judge
from torchgraft.engines.quantize.fewbit import FewBit, storable_layers
from torchgraft.engines.surgery.edits import apply_edits
from torchgraft.shrink.quantize.nupes_power_quant import CARD, nupes_refine, search_exponent

__all__ = ["run"]

_SAMPLES = 128
_STEPS, _BATCH = 40, 32
_WIDTH, _DEPTH, _TRAINING = 16, 4, 400

#: The claim is about layers: positions stay floats in every arm.
_KEPT = ("position",)


def measure(seed: int) -> dict[str, float]:
    """Return what is measured with one seed, by name."""
    found: dict[str, float] = {}

    def note(name: str, value: float) -> None:
        found[name] = round(value, 6)

    training, _, test = digits()
    model = train_images(
        lambda: VisionTransformer(d_model=_WIDTH, depth=_DEPTH, num_heads=4),
        training,
        steps=_TRAINING,
        lr=4e-3,
        seed=seed,
    )
    names, calib = storable_layers(model), images_of(training)[:_SAMPLES]
    note("float", accuracy(model, test))
    for bits in (3, 4):
        a = search_exponent(model, bits, granularity="tensor", ignore=_KEPT)
        note(f"{bits} bits, exponent", a)
        widths = dict.fromkeys(names, bits)
        bent = FewBit(bits=widths, exponents=dict.fromkeys(names, a), granularity="tensor")
        made = {
            "uniform": apply_edits(model, [FewBit(bits=widths, granularity="tensor")]),
            "PowerQuant": apply_edits(model, [bent]),
        }
        if bits == 4:
            ways: dict[str, dict[str, Any]] = {
                "AdaRound-style": {"exponent": 1.0, "learn_exponent": False, "whole_grid": False},
                "NUPES": {"exponent": a},
            }
            for name, how in ways.items():
                made[name] = nupes_refine(
                    model, calib, steps=_STEPS, batch_size=_BATCH, granularity="tensor", ignore=_KEPT, seed=seed, **how
                )
        for name, each in made.items():
            note(f"{bits} bits, {name}", accuracy(each, test))
        size = size_of_tensors(made["PowerQuant"].state_dict())
        note(f"{bits} bits, bytes / float's", size / size_of_tensors(model.state_dict()))
    return found


def run(seeds: Sequence[int] = (0, 1, 2, 3, 4)) -> ClaimRecord:
    """Run the claim: 4 blocks of width 16, 400 steps of AdamW (4e-3); first and last layer are quantised too.

    The width is the widest of 32, 24 and 16 at which, on the validation images of seed 100, uniform rounding loses a
    point at 4 bits and 5 points at 3. Refinement has 40 steps of 32 samples a layer, the same for the AdaRound-style
    baseline, and was not tuned. Scores are accuracies on the test split.

    Args:
        seeds: initial weights and order of the data.
    """
    figure = CARD.claim.figure if CARD.claim is not None else ""
    begun = time.perf_counter()
    measured = [measure(seed) for seed in seeds]
    metrics = {name: [found[name] for found in measured] for name in measured[0]}
    mean = {name: fmean(values) for name, values in metrics.items()}
    wins = [a > b for a, b in zip(metrics["4 bits, NUPES"], metrics["4 bits, uniform"], strict=True)]
    effects = {
        "3 bits, PowerQuant above uniform, points": 100 * (mean["3 bits, PowerQuant"] - mean["3 bits, uniform"]),
        "4 bits, PowerQuant above uniform, points": 100 * (mean["4 bits, PowerQuant"] - mean["4 bits, uniform"]),
        "4 bits, NUPES above uniform, points": 100 * (mean["4 bits, NUPES"] - mean["4 bits, uniform"]),
        "4 bits, share of seeds where NUPES is above uniform": fmean(wins),
        "4 bits, NUPES above AdaRound-style, points": 100 * (mean["4 bits, NUPES"] - mean["4 bits, AdaRound-style"]),
        "4 bits, NUPES below float, points": 100 * (mean["float"] - mean["4 bits, NUPES"]),
    }
    values = list(effects.values())
    record = judge(
        CARD.key,
        figure,
        metrics=metrics,
        effects={name: round(value, 4) for name, value in effects.items()},
        parts={
            "PowerQuant >= uniform + 3 points at 3 bits data-free": values[0] >= 3.0,
            "NUPES > uniform at 4 bits in mean and in >= 4 of 5 seeds": values[2] > 0 and values[3] >= 0.8,
            "NUPES >= AdaRound-style at 4 bits": values[4] >= 0,
            "NUPES within 1 point of float at 4 bits": values[5] <= 1.0,
        },
        seeds=seeds,
        seconds=time.perf_counter() - begun,
    )
    words = (
        "This is the second run. The first was on digits-vit (width 64, seeds 0 to 4), where nothing was to be gained: "
        "uniform rounding lost 0 points at 4 bits and 0.3 at 3, and PowerQuant and NUPES lay within 0.2 points of it. "
        "The figure is as it was. Weights of such small models are less bell-shaped than those of the paper's: the "
        "exponents found are about 0.8, not 0.5, and the gain is the smaller for it."
    )
    return record.model_copy(update={"notes": words})
