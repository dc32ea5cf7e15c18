"""Trained networks of several sizes joined by linear maps, so that one model holds many costs between theirs.

`Stitchable Neural Networks <https://arxiv.org/abs/2302.06586>`_ (Pan, Cai and Zhuang, 2023).

Equation: ``y = tail(blocks'_{j+1..L}(W h_i + b)), h_i = blocks_{1..i}(stem(x)), [W, b] = argmin ||W h_i + b - h'_j||``.

Departures: what stands before the layers of the entered network runs too (any model can then take part, and its cost
is counted). In :class:`StitchableNets` the large anchor is the original and stays frozen, the small one is cut from
it; the paper trains all anchors, which :class:`SNNet` does.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torchgraft.bench.meters import macs
from torchgraft.bench.task import Inputs, Task, take
from torchgraft.bench.training import Objective, evaluate, supervised, train
from torchgraft.catalogue import Card, Claim
from torchgraft.engines.allocation import strongest
from torchgraft.engines.depth import Stack, stacks
from torchgraft.engines.distill import Teacher, objective
from torchgraft.engines.nesting import ElasticModule, ElasticProcedure, batches, importance, settle, uncompounded
from torchgraft.engines.nesting.slices import unit_counts
from torchgraft.engines.nesting.stitch import (
    Route,
    Stitch,
    Stitched,
    StitchedElastic,
    channel_dim,
    layer_outputs,
    windows,
)
from torchgraft.engines.procedure import Refusal, Site
from torchgraft.engines.surgery.edits import Edit, edit_to_record
from torchgraft.engines.width import Study, study
from torchgraft.errors import BadInput

__all__ = ["CARD", "SNNet", "StitchableNets"]

CARD = Card(
    key="stitchable-nets",
    title="Stitchable neural networks",
    seed_id=173,
    authors="Pan, Cai and Zhuang, 2023",
    reference="https://arxiv.org/abs/2302.06586",
    family="elastic",
    kind="procedure",
    engine=("nesting", "surgery"),
    equation="y = tail_end(blocks_{j+1..L}(W h_i + b)), [W, b] = argmin ||W h_i + b - h'_j||",
    entry="StitchableNets",
    capabilities=frozenset({"elastic", "needs-data", "needs-trace", "needs-training"}),
    oracles=(
        "configs that are anchors give the outputs of the anchors bit for bit",
        "between equal anchors the aligned stitches are the identity on the features, and every config says the same",
        "a stitch satisfies the normal equations: its residual is orthogonal to [X, 1]",
        "the multiply-accumulates of a config are the parts it runs: front layers, stitch, stem and end layers",
    ),
    claim=Claim(
        text="Three residual MLPs of four blocks on digits, widths 24, 48 and 96, trained apart and then stitched: "
        "least-squares against random stitches, and 30 epochs of joint training that also follow the largest.",
        figure="least squares >= 15 points above random before training; after it >= 80 % of the stitches within 1 "
        "point of the line that joins the neighbouring anchors, and no anchor down by more than 1 point",
    ),
    choose_when="trained models of one family and several sizes exist, and costs between theirs are wanted",
    choose_instead="sortednet where there is one model and it can be trained longer",
    bibtex="@inproceedings{pan2023stitchable, title={Stitchable Neural Networks}, author={Pan, Zizheng and Cai, "
    "Jianfei and Zhuang, Bohan}, booktitle={CVPR}, year={2023}}",
)


def _longest(model: nn.Module, example: Inputs) -> Stack:
    found = stacks(model, example)
    if not found:
        raise BadInput(f"{type(model).__name__} has no stack of layers that could be stitched")
    return max(found, key=lambda stack: stack.length)


class SNNet(Stitched):
    """A family of trained networks, stitched.

    Args:
        anchors: trained networks of one task, small to large; copied neither here nor later.
        example: inputs of theirs.
        kernel: layers a window; the pairs of a window share one stitch.
        stride: layers from one window to the next.
        nearest: stitch only neighbours in size, not every smaller one to every larger one.

    Example:
        >>> class Block(nn.Module):
        ...     def __init__(self, d):
        ...         super().__init__()
        ...         self.fc = nn.Linear(d, d)
        ...     def forward(self, x):
        ...         return x + self.fc(x)
        >>> net = lambda d: nn.Sequential(nn.Linear(2, d), *(Block(d) for _ in range(3)), nn.Linear(d, 1)).eval()
        >>> x = torch.randn(5, 2)
        >>> family = SNNet([net(4), net(8)], x)
        >>> family.init_stitches(x)
        >>> len(family), family.use(2)(x).shape
        (7, torch.Size([5, 1]))

    Raises:
        BadInput: there are fewer than two anchors, one has no stack of layers, or their layers do not fit.
    """

    def __init__(
        self, anchors: Sequence[nn.Module], example: Inputs, *, kernel: int = 2, stride: int = 1, nearest: bool = True
    ) -> None:
        if len(anchors) < 2:
            raise BadInput(f"stitching needs at least two anchors, got {len(anchors)}")
        found = [_longest(anchor, example) for anchor in anchors]
        shapes = [layer_outputs(anchor, stack, example)[0] for anchor, stack in zip(anchors, found, strict=True)]
        channels = channel_dim(shapes[0])
        if len({value.movedim(channels, -1).shape[:-1] for value in shapes}) != 1:
            raise BadInput(f"the layers of the anchors make shapes that do not fit: {[tuple(v.shape) for v in shapes]}")
        routes: list[Route] = []
        sizes: dict[str, tuple[int, int]] = {}
        for front in range(len(anchors)):
            for end in range(front + 1, min(front + 2, len(anchors)) if nearest else len(anchors)):
                for place, pairs in enumerate(
                    windows(found[front].length, found[end].length, kernel=kernel, stride=stride)
                ):
                    key = f"{front}-{end}-{place}"
                    sizes[key] = (shapes[front].shape[channels], shapes[end].shape[channels])
                    routes += [Route(front, end, left, entered, key) for left, entered in pairs]
        super().__init__(anchors, found, routes, sizes, channels)

    def init_stitches(self, batch: Inputs) -> None:
        """Set the stitches by least squares on the features of ``batch``, in place."""
        self.fit_stitches(batch)

    def fit(
        self,
        task: Task,
        *,
        steps: int,
        teacher: nn.Module | None = None,
        lr: float | None = None,
        temperature: float = 4.0,
        alpha: float = 0.5,
        seed: int = 0,
        deadline: float | None = None,
    ) -> int:
        """Train anchors and stitches in place, one random config a step, and return the steps taken.

        Args:
            task: training samples and loss.
            steps: optimiser steps.
            teacher: whose outputs are followed beside the labels.
            lr: highest learning rate; default: a tenth of the task's.
            temperature: of the distillation.
            alpha: share of the distillation.
            seed: makes every random choice.
            deadline: a :func:`time.monotonic` moment after which no step is begun.
        """
        configs = range(len(self))
        rate = task.learning_rate / 10 if lr is None else lr
        return _train(self, self, configs, task, teacher, steps, rate, temperature, alpha, seed, deadline)

    def pareto(self, task: Task, split: str = "val") -> list[tuple[int, float]]:
        """Return (multiply-accumulates of one sample, mean score) of every config; the config that is set stays."""
        kept, one = self.config, take(task.train.inputs, slice(0, 1))
        found = [
            (macs(self.use(config), one), float(evaluate(self, task, split).mean())) for config in range(len(self))
        ]
        self.use(kept)
        return found


def _train(
    model: nn.Module,
    family: Stitched,
    configs: Sequence[int],
    task: Task,
    teacher: nn.Module | None,
    steps: int,
    lr: float,
    temperature: float,
    alpha: float,
    seed: int,
    deadline: float | None,
) -> int:
    if steps < 0:
        raise BadInput(f"steps must not be negative, got {steps}")
    if steps == 0:
        return 0
    if teacher is None:
        loss: Objective = supervised(task.loss)
    else:
        loss = objective(Teacher(teacher, task).prepare(steps * task.batch_size), temperature=temperature, alpha=alpha)
    generator = torch.Generator().manual_seed(seed)

    def one(model: nn.Module, inputs: Inputs, target: Tensor, rows: Tensor) -> Tensor:
        family.use(configs[int(torch.randint(len(configs), (), generator=generator))])
        return loss(model, inputs, target, rows)

    kept = family.config
    record = train(
        model, task.train, one, steps=steps, batch_size=task.batch_size, lr=lr, seed=seed, weight_decay=0.0,
        deadline=deadline,
    )  # fmt: skip
    family.use(kept)
    return record.steps


class StitchableNets(ElasticProcedure):
    """The original, stitched to a smaller network that is cut from it.

    Args:
        width: share of the units of every group of coupled dimensions that the smaller network keeps.
        kernel: layers a window.
        stride: layers from one window to the next.
        apart: the least difference between two budgets, as a share of the full one.
        samples: training samples by which units are ranked and stitches are fitted.
        alpha: share of distillation from the original in training.

    Example:
        >>> from torchgraft.bench.models import VisionTransformer
        >>> x, y = torch.randn(8, 1, 8, 8), torch.randint(0, 3, (8,))
        >>> net = VisionTransformer(8, 4, 1, 3, d_model=8, depth=3, num_heads=2)
        >>> task = Task(net, (x, y), (x, y), (x, y), nn.functional.cross_entropy, lambda out, t: out[:, 0])
        >>> elastic = StitchableNets().build(net, task)
        >>> len(elastic.budgets), elastic.set_budget(0.8)(x).shape
        (7, torch.Size([8, 3]))
    """

    card = CARD

    def __init__(
        self,
        *,
        width: float = 0.5,
        kernel: int = 2,
        stride: int = 1,
        apart: float = 0.05,
        samples: int = 256,
        alpha: float = 0.9,
    ) -> None:
        if not 0.0 < width < 1.0 or not 0.0 <= apart < 1.0 or samples < 1:
            raise BadInput(
                f"width must lie in (0, 1), apart in [0, 1) and samples be at least 1; got {width}, {apart}, {samples}"
            )
        self.width, self.kernel, self.stride, self.apart = width, kernel, stride, apart
        self.samples, self.alpha = samples, alpha

    def _study(self, model: nn.Module, task: Task, ignore: Sequence[str]) -> Study:
        return uncompounded(study(model, task, ignore=ignore))

    def applies_to(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Site]:
        """Return the groups of dimensions that the smaller network is cut in, where the model has a stack of layers."""
        if not _plain(model, take(task.train.inputs, slice(0, 2))):
            return []
        groups = self._study(model, task, ignore).groups.values()
        return [Site(group.name, group.kind, group.size, group.size * group.parameters) for group in groups]

    def refusals(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Refusal]:
        """Return why the model cannot be stitched, or what cannot be cut in it."""
        if not _plain(model, take(task.train.inputs, slice(0, 2))):
            return [Refusal(type(model).__name__, "it has no stack of layers that return plain tensors", None)]
        return list(self._study(model, task, ignore).structure.refused)

    def plan(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = (), seed: int = 0) -> list[Edit]:
        """Return the edit that stitches a smaller copy to the model."""
        found = self._study(model, task, ignore)
        example = take(task.train.inputs, slice(0, 2))
        scores = importance(found, task, samples=self.samples, seed=seed)
        small: list[Edit] = [
            *found.prelude,
            found.structure.slice(strongest(scores, unit_counts(found, self.width))),
        ]
        cut = copy.deepcopy(model)
        for edit in small:
            cut = edit.rewrite(cut)
        stack = _longest(model, example)
        large_state, small_state = (layer_outputs(each, stack, example)[0] for each in (model, cut))
        channels = channel_dim(large_state)
        routes = [
            (left, entered, str(place))
            for place, pairs in enumerate(windows(stack.length, stack.length, kernel=self.kernel, stride=self.stride))
            for left, entered in pairs
        ]
        stitch = Stitch(
            small=tuple(edit_to_record(edit) for edit in small),
            stack=(stack.name, stack.first, stack.length, stack.size),
            routes=tuple(routes),
            sizes=(small_state.shape[channels], large_state.shape[channels]),
            channels=channels,
            configs=(),
            budgets=(),
        )
        family = stitch.family(model)
        whole = macs(family.use(1), example)
        costs = {config: macs(family.use(config), example) / whole for config in range(len(family)) if config != 1}
        # Routes that go on where they left come first: the others only fill gaps.
        aligned = sorted(costs, key=lambda config: config >= 2 and routes[config - 2][0] != routes[config - 2][1])
        chosen: list[int] = []
        for config in aligned:
            near = [abs(costs[config] - costs[other]) < self.apart for other in chosen]
            if costs[config] <= 1.0 - self.apart and not any(near):
                chosen.append(config)
        if not chosen:
            raise BadInput("stitching saves nothing here: the smaller network costs as much as the original")
        chosen.sort(key=lambda config: costs[config])
        used = {routes[config - 2][2] for config in chosen if config >= 2}
        kept = [route for route in routes if route[2] in used]
        configs = [config if config < 2 else 2 + kept.index(routes[config - 2]) for config in chosen]
        budgets = (*(costs[config] for config in chosen), 1.0)
        return [
            stitch.model_copy(update={"routes": tuple(kept), "configs": (*configs, 1), "budgets": budgets}),
        ]

    def initialise(self, elastic: ElasticModule, task: Task, *, seed: int = 0) -> None:
        """Fit the stitches by least squares, after the smaller network's batch norms."""
        family = _family(elastic)
        some = batches(task, seed=seed)
        settle(family.anchors[0], some)
        family.fit_stitches(take(task.train.inputs, slice(0, self.samples)))

    def train(
        self, elastic: ElasticModule, task: Task, *, steps: int, seed: int = 0, deadline: float | None = None
    ) -> int:
        """Train the smaller network and the stitches, one random budget a step, to follow the original."""
        if not isinstance(elastic, StitchedElastic):
            raise BadInput(f"stitchable-nets trains what it built, got {type(elastic).__name__}")
        family = elastic.family
        done = _train(
            elastic, family, elastic.configs[:-1], task, elastic.full, steps, task.learning_rate, 4.0, self.alpha,
            seed, deadline,
        )  # fmt: skip
        if done:
            settle(family.anchors[0], batches(task, seed=seed))
        elastic.eval()
        return done


def _plain(model: nn.Module, example: Inputs) -> bool:
    """Say whether the model has a stack of at least two layers that return plain tensors."""
    try:
        stack = _longest(model, example)
        return stack.length > 1 and len(layer_outputs(model, stack, example)) == stack.length
    except BadInput:
        return False


def _family(elastic: ElasticModule) -> Stitched:
    if not isinstance(elastic, StitchedElastic):
        raise BadInput(f"stitchable-nets trains what it built, got {type(elastic).__name__}")
    return elastic.family
