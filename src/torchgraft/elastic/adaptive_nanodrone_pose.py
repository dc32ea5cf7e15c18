"""Run a small network where a stream is easy and a big one where it is not, as a cheap sign on the stream says.

`Adaptive Deep Learning for Efficient Visual Pose Estimation aboard Ultra-low-power Nano-drones
<https://arxiv.org/abs/2401.15236>`_ (Motetti et al., 2024).

Equation: ``d_t = sum_k |y_t[k] - y_{t-1}[k]| / range_k``; frame t + 1 is the big network's where ``d_t >= theta``.

Departures: the score of the output policy, the grid of the auxiliary task and the form of its table could not be
verified and are the plainest reading of the abstract. Cost is counted in multiply-accumulates, where the paper
measures a GAP8.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from torchgraft.bench.meters import macs
from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.errors import BadInput

__all__ = ["CARD", "AuxMapPolicy", "AuxMarginPolicy", "BigLittle", "OutputPolicy", "Step", "SweepPoint", "error_table"]

CARD = Card(
    key="adaptive-nanodrone-pose",
    title="A small and a big network on one stream",
    seed_id=1,
    authors="Motetti, Crupi, Elshaigi, Risso, Pagliari, Palossi and Burrello, 2024",
    reference="https://arxiv.org/abs/2401.15236",
    family="elastic",
    kind="tool",
    engine=("none",),
    equation="d_t = sum_k |y_t[k] - y_{t-1}[k]| / range_k; the big network runs at t + 1 where d_t >= theta",
    entry="BigLittle",
    oracles=(
        "at extreme thresholds a stream is that of the small or the big network alone, bit for bit, and so is its "
        "cost, the auxiliary head added",
        "the number of calls of the big network falls with the threshold of the output margin, and rises as fewer "
        "cells are small enough",
        "the table's cells are the best of all choices of as many cells, by brute force",
        "the output policy decides on a frame by earlier frames alone",
    ),
    claim=Claim(
        text="A bright disc moves over clutter in 24x24 frames, occluded now and then; a small and a big convolutional "
        "network regress x, y, radius and angle. Beside each policy: the big network alone, and the two mixed at "
        "random with as many calls of the big one.",
        figure="the best policy, chosen on validation tracks, within 2 % of the big network's MAE at >= 20 % fewer "
        "MACs, and >= 3 % less MAE than random mixing at equal cost (mean of 3 seeds)",
    ),
    choose_when="two trained networks of very different cost answer the same stream and frames differ in difficulty",
    choose_instead="dynamic-perceiver or adaptive-computation-module where one network is to adapt within itself",
    confidence="low",
    bibtex="@inproceedings{motetti2024adaptive, title={Adaptive Deep Learning for Efficient Visual Pose Estimation "
    "aboard Ultra-low-power Nano-drones}, author={Motetti, Beatrice Alessandra and Crupi, Luca and Elshaigi, Mustafa "
    "Omer Mohammed Elamin and Risso, Matteo and Pagliari, Daniele Jahier and Palossi, Daniele and Burrello, "
    "Alessio}, booktitle={DATE}, year={2024}}",
)


class Policy(Protocol):
    """Says which network a frame gets."""

    @property
    def head(self) -> nn.Module | None:
        """A network that runs on every frame first, or none."""

    def wants_big(self, seen: Tensor | None, before: Sequence[Tensor]) -> bool:
        """Decide on a frame by what the head says of it, (...), and the outputs of the frames before it."""


@dataclass(frozen=True)
class OutputPolicy:
    """The big network on the frame after one whose output moved by ``threshold`` or more.

    Args:
        threshold: theta; minus infinity gives the big network alone, infinity the small one.
        ranges: range of each output, by which it is divided, (K,).
    """

    threshold: float
    ranges: Tensor
    head: nn.Module | None = None

    def wants_big(self, seen: Tensor | None, before: Sequence[Tensor]) -> bool:
        """See :class:`Policy`; before two frames were seen nothing has moved."""
        moved = 0.0
        if len(before) >= 2:
            moved = float(((before[-1] - before[-2]).abs() / self.ranges).sum())
        return moved >= self.threshold


@dataclass(frozen=True)
class AuxMarginPolicy:
    """The big network where a head is not sure in which cell of a grid the target stands.

    Args:
        head: frame (1, ...) -> logits of the cells (1, M).
        threshold: the least margin between the two likeliest cells at which the small network does.
    """

    head: nn.Module
    threshold: float

    def wants_big(self, seen: Tensor | None, before: Sequence[Tensor]) -> bool:
        """See :class:`Policy`."""
        return margin(_said(seen)) < self.threshold


@dataclass(frozen=True)
class AuxMapPolicy:
    """The big network where it gains at least ``threshold`` over the small one in the cell that a head names.

    Args:
        head: frame (1, ...) -> logits of the cells (1, M).
        table: mean gain by cell, (M,), see :func:`error_table`.
        threshold: the least gain.
    """

    head: nn.Module
    table: Tensor
    threshold: float

    def wants_big(self, seen: Tensor | None, before: Sequence[Tensor]) -> bool:
        """See :class:`Policy`."""
        return float(self.table[int(_said(seen).argmax())]) >= self.threshold


def _said(seen: Tensor | None) -> Tensor:
    if seen is None:
        raise BadInput("this policy needs what its head says of the frame")
    return seen


def margin(logits: Tensor) -> float:
    """Return the largest probability less the second largest.

    Example:
        >>> round(margin(torch.tensor([0.0, 0.0, -50.0])), 6)
        0.0
    """
    first, second = logits.flatten().double().softmax(0).topk(2).values.tolist()
    return float(first - second)


def error_table(cells: Tensor, small: Tensor, big: Tensor, *, size: int) -> Tensor:
    """Return by how much the small network's error exceeds the big one's in each cell; 0 where no sample fell.

    Args:
        cells: the cell that the head names for each validation sample.
        small: the error of the small network on each.
        big: that of the big one.
        size: number M of cells.

    Shapes:
        (N,), (N,), (N,) -> (M,)

    Example:
        >>> error_table(torch.tensor([0, 0, 1]), torch.tensor([3.0, 1.0, 1.0]), torch.ones(3), size=3).tolist()
        [1.0, 0.0, 0.0]
    """
    gain = torch.zeros(size, dtype=torch.float64).index_add(0, cells, (small - big).double())
    return gain / torch.bincount(cells, minlength=size).clamp_min(1)


@dataclass(frozen=True)
class Step:
    """What happened at one frame.

    Args:
        output: of the network that ran, (K,).
        big: whether that was the big one.
        macs: multiply-accumulates since the beginning of the stream.
    """

    output: Tensor
    big: bool
    macs: int


@dataclass(frozen=True)
class SweepPoint:
    """One threshold of :meth:`BigLittle.sweep`.

    Args:
        threshold: the threshold.
        macs: mean multiply-accumulates a frame.
        error: mean absolute error of the outputs.
        big: share of the frames that the big network saw.
    """

    threshold: float
    macs: float
    error: float
    big: float


class BigLittle:
    """Two networks and a policy that says which of them a frame gets.

    Args:
        small: frame (1, ...) -> outputs (1, K).
        big: the same, at a higher cost.
        policy: an :class:`OutputPolicy`, :class:`AuxMarginPolicy` or :class:`AuxMapPolicy`.
        frame: an example frame (1, ...), on which multiply-accumulates are counted.

    Example:
        >>> small, big = nn.Linear(2, 1), nn.Sequential(nn.Linear(2, 8), nn.Linear(8, 1))
        >>> pair = BigLittle(small, big, OutputPolicy(float("inf"), torch.ones(1)), torch.zeros(1, 2))
        >>> [(step.big, step.macs) for step in pair.stream(torch.zeros(3, 2))]
        [(False, 2), (False, 4), (False, 6)]

    Raises:
        BadInput: the big network costs less than the small one.
    """

    def __init__(self, small: nn.Module, big: nn.Module, policy: Policy, frame: Tensor) -> None:
        self.small, self.big, self.policy = small, big, policy
        self.cost_small, self.cost_big = macs(small, frame), macs(big, frame)
        self.cost_head = 0 if policy.head is None else macs(policy.head, frame)
        if self.cost_big < self.cost_small:
            raise BadInput(f"big must cost more than small, got {self.cost_big} and {self.cost_small} MACs a frame")

    @torch.no_grad()
    def stream(self, frames: Iterable[Tensor]) -> Iterator[Step]:
        """Yield what is said to each frame (...), in order; one network a frame runs, and the head."""
        before: list[Tensor] = []
        spent = 0
        for frame in frames:
            seen = None if self.policy.head is None else self.policy.head(frame[None])[0]
            large = self.policy.wants_big(seen, before)
            output = (self.big if large else self.small)(frame[None])[0]
            before = [*before[-1:], output]
            spent += self.cost_head + (self.cost_big if large else self.cost_small)
            yield Step(output, large, spent)

    def sweep(
        self, tracks: Sequence[tuple[Tensor, Tensor]], policies: Sequence[tuple[float, Policy]]
    ) -> list[SweepPoint]:
        """Return cost and error of each threshold, over tracks that each start anew.

        Args:
            tracks: frames (T, ...) and true outputs (T, K).
            policies: each threshold and the policy that has it.
        """
        points = []
        for threshold, policy in policies:
            frame = tracks[0][0][:1]
            pair = BigLittle(self.small, self.big, policy, frame)
            steps = [list(pair.stream(frames)) for frames, _ in tracks]
            errors = torch.cat(
                [
                    (torch.stack([s.output for s in run]) - truth).abs()
                    for run, (_, truth) in zip(steps, tracks, strict=True)
                ]
            )
            count = sum(len(run) for run in steps)
            points.append(
                SweepPoint(
                    threshold=threshold,
                    macs=sum(run[-1].macs for run in steps if run) / count,
                    error=float(errors.mean()),
                    big=sum(step.big for run in steps for step in run) / count,
                )
            )
        return points
