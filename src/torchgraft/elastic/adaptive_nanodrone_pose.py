"""Run a small network where a stream is easy and a big one where it is not, as a cheap sign on the stream says.

`Adaptive Deep Learning for Efficient Visual Pose Estimation aboard Ultra-low-power Nano-drones
<https://arxiv.org/abs/2401.15236>`_ (Motetti et al., 2024).

Equation: ``d_t = sum_k |y_t[k] - y_{t-1}[k]| / range_k``; frame t + 1 is the big network's where ``d_t >= theta``.
In :class:`LittleFirst` a sample is the big network's where ``p_(1) - p_(2) < theta`` for the small one's probabilities.

Departures: the score of the output policy, the grid of the auxiliary task and the form of its table could not be
verified and are the plainest reading of the abstract. Cost is counted in multiply-accumulates, where the paper
measures a GAP8. :class:`LittleFirst` cuts its small network from the big one, where the paper has two designs, and
reads the margin off the small network's own classes, where the paper has a head with a task of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from torchgraft.bench.meters import macs
from torchgraft.bench.task import Task, take
from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines.distill import distill
from torchgraft.engines.nesting import (
    ElasticModule,
    ElasticProcedure,
    batches,
    importance,
    nest_beside,
    settle,
    uncompounded,
)
from torchgraft.engines.nesting.by_sample import apart, without_margin
from torchgraft.engines.nesting.little_first import AddLittle, LittleFirstModel, margins
from torchgraft.engines.sites import Refusal, Site
from torchgraft.engines.surgery.edits import Edit
from torchgraft.engines.width import Study, study
from torchgraft.errors import BadInput

__all__ = [
    "CARD",
    "AuxMapPolicy",
    "AuxMarginPolicy",
    "BigLittle",
    "LittleFirst",
    "OutputPolicy",
    "Step",
    "SweepPoint",
    "error_table",
]

CARD = Card(
    key="adaptive-nanodrone-pose",
    title="A small and a big network on one stream",
    seed_id=1,
    authors="Motetti, Crupi, Elshaigi, Risso, Pagliari, Palossi and Burrello, 2024",
    reference="https://arxiv.org/abs/2401.15236",
    family="elastic",
    kind="procedure",
    engine=("nesting", "surgery"),
    equation="d_t = sum_k |y_t[k] - y_{t-1}[k]| / range_k; the big network runs at t + 1 where d_t >= theta",
    entry="LittleFirst",
    capabilities=frozenset({"elastic", "needs-data", "needs-labels", "needs-trace", "needs-training"}),
    oracles=(
        "at extreme thresholds a stream is that of the small or the big network alone, bit for bit, and so is its "
        "cost, the auxiliary head added",
        "the number of calls of the big network falls with the threshold of the output margin, and rises as fewer "
        "cells are small enough",
        "the table's cells are the best of all choices of as many cells, by brute force",
        "the output policy decides on a frame by earlier frames alone",
        "at thresholds 0 and above 1 a model of budgets is the small or the big network alone, bit for bit, and at the "
        "least and the full budget the other one does not run",
        "the samples that the big network answers are those whose margin, taken one by one, is below the threshold, "
        "and a higher budget adds to them",
        "every declared budget is the count of multiply-accumulates on the calibration samples, after training too",
    ),
    claim=Claim(
        text="A bright disc moves over clutter in 24x24 frames, occluded now and then; a small and a big convolutional "
        "network regress x, y, radius and angle. Beside each policy: the big network alone, and the two mixed at "
        "random with as many calls of the big one.",
        figure="the best policy, chosen on validation tracks, within 2 % of the big network's MAE at >= 20 % fewer "
        "MACs, and >= 3 % less MAE than random mixing at equal cost (mean of 3 seeds)",
    ),
    choose_when="two networks of very different cost answer the same stream and frames differ in difficulty; in "
    "fit --elastic a classifier whose easy samples a network cut from it can answer",
    choose_instead="dynamic-perceiver or adaptive-computation-module where one network is to adapt within itself; "
    "sortednet where every sample must cost the same",
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
    return float(margins(logits.detach().flatten()))


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


class LittleFirst(ElasticProcedure):
    """A small network cut from a classifier answers first, and the classifier where the small one is not sure.

    The original has learned from the samples on which thresholds are found, and hands that on to the network cut from
    it: on unseen samples budgets cost up to a quarter more than is declared here (digits). ``fit --elastic`` therefore
    counts anew, on validation samples, what they cost.

    Args:
        small: share of the multiply-accumulates that is aimed at for the small network; what it costs is declared.
        calls: shares of the samples that the original answers, one budget each beside the two networks alone.
        samples: training samples by which units are ranked, and at most as many by which thresholds are found; of 320
            training samples or more, a fifth at most is kept from the small network for that.
        alpha: share of distillation from the original in training, the rest is the task's loss.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 20), nn.Tanh(), nn.Linear(20, 3))
        >>> x, y = torch.randn(20, 4), torch.randint(0, 3, (20,))
        >>> task = Task(net, (x, y), (x, y), (x, y), nn.functional.cross_entropy, lambda out, t: out[:, 0])
        >>> elastic = LittleFirst(calls=(0.1, 0.5)).build(net, task)
        >>> [round(budget, 3) for budget in elastic.budgets], elastic.set_budget(0.5)(x).shape
        ([0.1, 0.2, 0.6, 1.0], torch.Size([20, 3]))

    Raises:
        BadInput: a setting is out of range.
    """

    card: ClassVar[Card] = CARD

    def __init__(
        self,
        *,
        small: float = 0.1,
        calls: Sequence[float] = (0.05, 0.1, 0.2, 0.4),
        samples: int = 512,
        alpha: float = 0.9,
    ) -> None:
        if not 0.0 < small < 1.0 or samples < 1 or not 0.0 <= alpha <= 1.0:
            raise BadInput(
                "small must lie in (0, 1), samples be at least 1 and alpha lie in [0, 1]; "
                f"got {small}, {samples} and {alpha}"
            )
        if not calls or any(not 0.0 < share < 1.0 for share in calls) or sorted(set(calls)) != list(calls):
            raise BadInput(f"calls must be rising shares in (0, 1), got {tuple(calls)}")
        self.small, self.calls, self.samples, self.alpha = small, tuple(calls), samples, alpha

    def _study(self, model: nn.Module, task: Task, ignore: Sequence[str]) -> Study:
        return uncompounded(study(model, task, ignore=ignore))

    def applies_to(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Site]:
        """Return the groups of dimensions that the small network is cut in. See :class:`ElasticProcedure`."""
        if without_margin(model, task):
            return []
        groups = self._study(model, task, ignore).groups.values()
        return [Site(group.name, group.kind, group.size, group.size * group.parameters) for group in groups]

    def refusals(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Refusal]:
        """Return why no sample has a margin, or what cannot be cut. See :class:`ElasticProcedure`."""
        why = without_margin(model, task)
        if why:
            return [Refusal("the whole model", why)]
        return list(self._study(model, task, ignore).structure.refused)

    def plan(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = (), seed: int = 0) -> list[Edit]:
        """Return the edit that puts the small network before the model. See :class:`ElasticProcedure`."""
        found = self._study(model, task, ignore)
        scores = importance(found, task, samples=self.samples, seed=seed)
        nest = nest_beside(found, scores, take(task.train.inputs, slice(0, 2)), (self.small,))
        cost = nest.budgets[0]
        calls = tuple(share for share in self.calls if cost + share < 0.98)
        if not calls:
            raise BadInput(f"the least network that can be cut costs {cost:.3g}, too much to run beside the original")
        return [AddLittle(small=(*nest.base, *nest.levels[0]), calls=calls, cost=cost)]

    def initialise(self, elastic: ElasticModule, task: Task, *, seed: int = 0) -> None:
        """Measure the small network's batch norms and find thresholds. See :class:`ElasticProcedure`."""
        model = _little(elastic)
        learn, held = apart(task, self.samples, seed)
        settle(model.small, batches(learn, seed=seed))
        model.set_thresholds(held, batch_size=task.batch_size)

    def train(
        self, elastic: ElasticModule, task: Task, *, steps: int, seed: int = 0, deadline: float | None = None
    ) -> int:
        """Train the small network to follow the original, then find thresholds anew. See :class:`ElasticProcedure`."""
        model = _little(elastic)
        learn, _ = apart(task, self.samples, seed)
        record = distill(model.small, model.big, learn, steps=steps, seed=seed, alpha=self.alpha, deadline=deadline)
        if record.steps:
            self.initialise(model, task, seed=seed)
        model.eval()
        return record.steps


def _little(elastic: ElasticModule) -> LittleFirstModel:
    if not isinstance(elastic, LittleFirstModel):
        raise BadInput(f"{CARD.key} trains what it built, got {type(elastic).__name__}")
    return elastic
