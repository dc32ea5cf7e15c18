"""Aaren beside a causal transformer of equal parameters, on forecasts and digits, and what a step costs each of them.

Forecasts: rows of the elevation map of Jacksboro that ships with matplotlib, 96 points to predict the next 24, each
window less the mean of its 96 points and over their deviation; a token is four points. The paper's own sets, sunspots
and CO2 are not shipped with a dependency. Digits: one row of eight pixels a token. Aaren knows no positions, so both
models read each token's position as extra inputs; the transformer has its rotary positions besides. The learning rate,
3e-3, is that of the harness and was tuned for neither.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import fmean

import numpy as np
import torch
from matplotlib import cbook
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.task import Split
from torchgraft.bench.tasks.digits import splits
from torchgraft.bench.training import supervised, train
from torchgraft.claims.record import ClaimRecord, judge
from torchgraft.contracts.mixers import Meter
from torchgraft.engines.recurrence.mixer import StatefulMixer
from torchgraft.parts.blocks.sequence_model import SequenceModel
from torchgraft.parts.mixers.aaren import CARD, Aaren
from torchgraft.parts.mixers.softmax_attention import SoftmaxAttention

__all__ = ["run"]

_PAST, _FUTURE, _PATCH = 96, 24, 4
_STEPS, _BATCH, _RATE = 300, 64, 3e-3
_MIXERS: dict[str, type[StatefulMixer]] = {"aaren": Aaren, "transformer": SoftmaxAttention}


def _placed(x: Tensor) -> Tensor:
    """Return ``x`` with a one-hot position beside every token, (N, T, F) -> (N, T, F + T)."""
    return torch.cat([x, torch.eye(x.shape[1]).expand(len(x), -1, -1)], -1)


def _profiles(rows: slice) -> Split:
    """Return normalised windows of some rows of the map: 24 tokens of 4 points, and the 24 points that follow."""
    with np.load(cbook.get_sample_data("jacksboro_fault_dem.npz", asfileobj=False)) as data:
        heights = torch.from_numpy(data["elevation"].astype(np.float32))[rows]
    windows = heights.unfold(1, _PAST + _FUTURE, 12).flatten(0, 1)
    past = windows[:, :_PAST]
    windows = (windows - past.mean(1, keepdim=True)) / past.std(1, keepdim=True).clamp(min=1.0)
    return Split(_placed(windows[:, :_PAST].reshape(len(windows), -1, _PATCH)), windows[:, _PAST:].contiguous())


def _last_point(split: Split) -> Tensor:
    if not isinstance(split.inputs, Tensor):
        raise TypeError("the profiles are one tensor")
    return split.inputs[:, -1, _PATCH - 1 : _PATCH]


def _lines(split: Split) -> Split:
    """Return digits as eight tokens of eight pixels."""
    if not isinstance(split.inputs, Tensor):
        raise TypeError("the digits are one tensor")
    return Split(_placed(split.inputs.flatten(0, 1)), split.target)


def _trained(name: str, split: Split, outputs: int, loss: nn.Module, seed: int) -> SequenceModel:
    features = split.inputs.shape[-1] if isinstance(split.inputs, Tensor) else 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SequenceModel(64, 2, _MIXERS[name], in_features=features, outputs=outputs, pool="last")
    train(model, split, supervised(loss), steps=_STEPS, batch_size=_BATCH, lr=_RATE, seed=seed)
    return model


def _outputs(model: nn.Module, split: Split) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(x) for x, _ in split.batches(256)])


def _step_at(mixer: StatefulMixer, tokens: int) -> tuple[int, int]:
    """Return the numbers in the state after ``tokens``, and the counted work of the step that follows."""
    with torch.no_grad():
        state = mixer.prefill(torch.randn(1, tokens, mixer.d_model))[1]
        with Meter() as meter:
            mixer.step(torch.randn(1, mixer.d_model), state)
    return sum(value.numel() for value in state.values()), meter.work


def run(seeds: Sequence[int] = (0, 1, 2)) -> ClaimRecord:
    """Run the claim.

    Args:
        seeds: weights and order of the data.
    """
    begun = time.perf_counter()
    metrics: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        metrics.setdefault(name, []).append(round(value, 4))

    profiles, unseen = _profiles(slice(0, 240)), _profiles(slice(280, 344))
    digits, fresh = _lines(splits()[0]), _lines(splits()[2])
    repeat = float(F.mse_loss(_last_point(unseen).expand_as(unseen.target), unseen.target))
    for seed in seeds:
        note("squared error of repeating the last point", repeat)
        for name in _MIXERS:
            model = _trained(name, profiles, _FUTURE, nn.MSELoss(), seed)
            note(f"{name}: parameters", sum(value.numel() for value in model.parameters()))
            note(f"{name}: squared error", float(F.mse_loss(_outputs(model, unseen), unseen.target)))
            model = _trained(name, digits, 10, nn.CrossEntropyLoss(), seed)
            note(f"{name}: accuracy", float((_outputs(model, fresh).argmax(-1) == fresh.target).float().mean()))
    near = {name: _step_at(mixer(64), 64) for name, mixer in _MIXERS.items()}
    far = {name: _step_at(mixer(64), 4095) for name, mixer in _MIXERS.items()}
    mean = {name: fmean(values) for name, values in metrics.items()}
    effects = {
        "squared error over the transformer's": mean["aaren: squared error"] / mean["transformer: squared error"],
        "accuracy below the transformer": mean["transformer: accuracy"] - mean["aaren: accuracy"],
        "state at 4096 tokens over 64, aaren": far["aaren"][0] / near["aaren"][0],
        "work of a step at 4096 tokens over 64, aaren": far["aaren"][1] / near["aaren"][1],
        "work of a step at 4096 tokens over 64, transformer": far["transformer"][1] / near["transformer"][1],
    }
    return judge(
        CARD.key,
        CARD.claim.figure if CARD.claim is not None else "",
        metrics=metrics,
        effects={name: round(value, 4) for name, value in effects.items()},
        parts={
            "squared error at most 5 % above": effects["squared error over the transformer's"] <= 1.05,
            "accuracy at most 1.5 points below": effects["accuracy below the transformer"] <= 0.015,
            "equal state at 64 and 4096 tokens": near["aaren"][0] == far["aaren"][0],
            "equal work of a step": near["aaren"][1] == far["aaren"][1],
            "the transformer's work grows more than 4x": far["transformer"][1] > 4 * near["transformer"][1],
        },
        seeds=seeds,
        seconds=time.perf_counter() - begun,
    )
