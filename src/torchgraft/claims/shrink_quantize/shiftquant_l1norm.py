"""ShiftQuant on digits: a residual network trained with weights, activations and gradients in 4 bits."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.models import ResidualNet
from torchgraft.bench.task import Split
from torchgraft.claims.images import accuracy, digits, images_of, train_images
from torchgraft.claims.record import ClaimRecord, judge
from torchgraft.engines.normalize import RunningNorm, update_running
from torchgraft.engines.quantize.l1_norms import rounded_values
from torchgraft.engines.surgery.swap import swap
from torchgraft.shrink.quantize.shiftquant_l1norm import CARD, L1BatchNorm, integer_train, rounded_statistic

__all__ = ["run"]

_STEPS, _RATE = 120, 4e-3
_EDGES = ("stem", "head")
_TRAINED: dict[str, int | None] = {"a scale a tensor": 1, "ShiftQuant, 4 groups": 4}
_GROUPS = {**_TRAINED, "a scale a channel": None}


class _L2BatchNorm(RunningNorm):
    """The baseline of :class:`L1BatchNorm`: the same rounding, of the variance."""

    def __init__(self, channels: int, *, bits: int) -> None:
        super().__init__(channels, layout="first")
        self.bits = bits

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, *[1] * (x.ndim - 2))
        axes = [axis for axis in range(x.ndim) if axis != 1]
        mean = x.mean(axes) if self.training else self.running_mean
        centred = x - rounded_values(mean, self.bits).reshape(shape)
        var = centred.square().mean(axes) if self.training else self.running_var
        if self.training:
            share = self.counted()
            update_running(self.running_mean, mean.detach(), share)
            update_running(self.running_var, var.detach(), share)
        spread = (rounded_statistic(var, self.bits) + self.eps).sqrt().reshape(shape)
        return self.affine(rounded_values(centred / spread, self.bits))


def _build(norm_bits: int | None = None, kind: type[nn.Module] | None = None) -> nn.Module:
    model = ResidualNet(widths=(16, 32), depth=1)
    if kind is not None:
        swap(model, nn.BatchNorm2d, lambda old, name: kind(old.num_features, bits=norm_bits))
    return model


def _gradient(model: nn.Module, split: Split) -> Tensor:
    loss = F.cross_entropy(model(images_of(split)), split.target)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def _cosines(model: nn.Module, training: Split) -> dict[str, float]:
    """Return the cosine with the float gradient, gradients alone in 4 bits, by quantiser."""
    model.train()
    found: dict[str, list[float]] = {}
    for start in range(0, 320, 64):
        batch = training[slice(start, start + 64)]
        exact = _gradient(model, batch)
        for name, groups in _GROUPS.items():
            few = integer_train(model, w_bits=8, a_bits=8, g_bits=4, groups=groups)
            found.setdefault(name, []).append(float(F.cosine_similarity(exact, _gradient(few, batch), dim=0)))
    model.eval()
    return {name: fmean(values) for name, values in found.items()}


def measure(seed: int) -> dict[str, float]:
    """Return what is measured with one seed, by name."""
    found: dict[str, float] = {}

    def note(name: str, value: float) -> None:
        found[name] = round(value, 6)

    training, _, test = digits()
    plain = train_images(_build, training, steps=_STEPS, lr=_RATE, seed=seed)
    note("float32", accuracy(plain, test))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, value in _cosines(plain, training).items():
            note(f"cosine, {name}", value)
    for name, groups in _TRAINED.items():
        made = train_images(
            lambda groups=groups: integer_train(_build(), groups=groups, ignore=_EDGES),  # type: ignore[misc]
            training,
            steps=_STEPS,
            lr=_RATE,
            seed=seed,
        )
        note(f"4 bits, {name}", accuracy(made, test))
    kinds: dict[str, type[nn.Module]] = {"L1": L1BatchNorm, "L2": _L2BatchNorm}
    for name, kind in kinds.items():
        made = train_images(
            lambda kind=kind: integer_train(_build(4, kind), ignore=_EDGES),  # type: ignore[misc]
            training,
            steps=_STEPS,
            lr=_RATE,
            seed=seed,
        )
        note(f"4 bits, ShiftQuant, 4-bit {name} batch norm", accuracy(made, test))
    return found


def run(seeds: Sequence[int] = (0, 1, 2)) -> ClaimRecord:
    """Run the claim: two stages of one block (16 and 32 channels), 120 steps of AdamW (4e-3) at every precision.

    First and last layer stay float, as is usual. The cosine is taken in the trained float network on 5 batches, with
    weights and activations in 8 bits, so that the gradients' 4 bits decide it. Size and steps were chosen on seed 100,
    outside the claim.

    Args:
        seeds: initial weights, order of the data, rounding.
    """
    figure = CARD.claim.figure if CARD.claim is not None else ""
    begun = time.perf_counter()
    measured = [measure(seed) for seed in seeds]
    metrics = {name: [found[name] for found in measured] for name in measured[0]}
    mean = {name: fmean(values) for name, values in metrics.items()}
    low, own, high = (mean[f"cosine, {name}"] for name in _GROUPS)
    effects = {
        "ShiftQuant below float32, points": 100 * (mean["float32"] - mean["4 bits, ShiftQuant, 4 groups"]),
        "share of the gap in cosine that is recovered": (own - low) / (high - low),
        "ShiftQuant above a scale a tensor, points": 100
        * (mean["4 bits, ShiftQuant, 4 groups"] - mean["4 bits, a scale a tensor"]),
        "L1 above L2 norm, points": 100
        * (mean["4 bits, ShiftQuant, 4-bit L1 batch norm"] - mean["4 bits, ShiftQuant, 4-bit L2 batch norm"]),
    }
    values = list(effects.values())
    record = judge(
        CARD.key,
        figure,
        metrics=metrics,
        effects={name: round(value, 4) for name, value in effects.items()},
        parts={
            "ShiftQuant within 1.5 points of fp32": values[0] <= 1.5,
            "recovers >= 70 % of the gap in cosine between a scale a tensor and a scale a channel": values[1] >= 0.7,
            "4-bit L1 norm >= 4-bit L2 norm in accuracy": values[3] >= 0,
        },
        seeds=seeds,
        seconds=time.perf_counter() - begun,
    )
    words = (
        "The share recovered lies a hair below what was asked; group boundaries at powers of two leave scales up to "
        "twice what a channel needs, and the paper's own boundaries could not be read. L1 and L2 norms differ by less "
        "than seeds do: L1 is ahead on two of three. 120 steps are few; they are what the time of the claim allows "
        "for an emulation."
    )
    return record.model_copy(update={"notes": words})
