"""One set of weights in which every smaller network is the beginning of the larger ones, trained by random levels.

`SortedNet, a Place for Every Network and Every Network in its Place <https://arxiv.org/abs/2309.00255>`_ (Valipour et
al., 2023), and its variant for the fine-tuning of language models, `SoFT <https://arxiv.org/abs/2309.08968>`_.

Equation: ``theta <- theta - lr (1/g) sum_i grad L(f(x; theta_{b_i}), y), b_i ~ U(B), theta_b in theta_b' for b <= b'``.

Departures: in :class:`SortedNet` the full budget is the frozen original, and the smaller budgets start from its most
important units (by gradient times weight) and follow its outputs; the paper trains all from scratch on labels, which
:class:`SortedTrainer` does. The micro-steps of :class:`SortedNet` share one batch, for less variance. Batch norms have
statistics of their own at every level.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.bench.task import Batch, Inputs, Task, call, take
from torchgraft.catalogue import Card, Claim
from torchgraft.engines.depth import Stack, stacks
from torchgraft.engines.nesting import (
    ElasticModule,
    ElasticProcedure,
    Nested,
    NestedElastic,
    Sampler,
    calibrate,
    draws,
    evaluate_levels,
    grid,
    importance,
    nest,
    nest_beside,
    train_levels,
    uncompounded,
)
from torchgraft.engines.procedure import Refusal, Site
from torchgraft.engines.surgery.edits import Edit
from torchgraft.engines.width import Study, study
from torchgraft.errors import BadInput

__all__ = ["CARD", "SortedNet", "SortedTrainer", "sort", "sum_over_depths"]

CARD = Card(
    key="sortednet",
    title="SortedNet",
    seed_id=19,
    authors="Valipour, Rezagholizadeh, Rajabzadeh, Kavehzadeh, Tahaei, Chen and Ghodsi, 2023",
    reference="https://arxiv.org/abs/2309.00255",
    family="elastic",
    kind="procedure",
    engine=("nesting", "surgery"),
    equation="theta <- theta - lr (1/g) sum_i grad L(f(x; theta_{b_i}), y), b_i ~ U(B), theta_b nested",
    entry="SortedNet",
    capabilities=frozenset({"elastic", "needs-data", "needs-labels", "needs-trace", "needs-training"}),
    oracles=(
        "a level gives what a network of copied slices gives, and parameters outside it get no gradient at all",
        "the gradient of g micro-steps, averaged over all draws of a grid of six configs, is the mean of the six",
        "a saved checkpoint gives the outputs of every level bit for bit",
        "the sum of losses over depths is that of the losses taken one by one through a shared head",
    ),
    claim=Claim(
        text="Residual MLP on digits, widths {16, 24, 32, 40, 48, 56, 64} x depths {2, 3, 4}, 60 epochs of one run, "
        "against sub-networks trained alone (as many epochs each), slices of a network trained as a whole, and the "
        "sandwich rule at equal cost.",
        figure="mean accuracy of the sub-networks >= 96 % of those trained alone and >= 20 points above slices, at "
        "<= 1/10 of the training steps",
    ),
    choose_when="one model must run at several budgets that are switched at run time, and training it is possible",
    choose_instead="stitchable-nets where trained models of several sizes exist; structured pruning for one budget",
    bibtex="@article{valipour2023sortednet, title={{SortedNet}, a Place for Every Network and Every Network in its "
    "Place}, author={Valipour, Mojtaba and Rezagholizadeh, Mehdi and Rajabzadeh, Hossein and Kavehzadeh, Parsa and "
    "Tahaei, Marzieh and Chen, Boxing and Ghodsi, Ali}, journal={arXiv:2309.00255}, year={2023}}",
)


class SortedNet(ElasticProcedure):
    """Nested smaller networks beside the original.

    Args:
        budgets: shares of the multiply-accumulates that are aimed at below the full one; what levels truly cost is
            declared.
        depth: a level of share b keeps the first b^depth of the layers of every stack; 0 cuts widths alone.
        sampler: ``"uniform"`` (the paper's), ``"sandwich"`` or ``"all"``.
        grad_accum: levels trained a step.
        samples: training samples by which units are ranked.

    Example:
        >>> from torchgraft.bench.task import Task
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))
        >>> task = Task(net, (x, y), (x, y), (x, y), nn.functional.cross_entropy, lambda out, t: out[:, 0])
        >>> elastic = SortedNet(budgets=(0.25, 0.5)).build(net, task)
        >>> elastic.budgets, elastic.set_budget(0.3)(x).shape
        ((0.25, 0.5, 1.0), torch.Size([8, 3]))
    """

    card = CARD

    def __init__(
        self,
        *,
        budgets: Sequence[float] = (0.25, 0.5, 0.75),
        depth: float = 0.0,
        sampler: Sampler = "uniform",
        grad_accum: int = 2,
        samples: int = 256,
    ) -> None:
        if not budgets or any(not 0.0 < budget < 1.0 for budget in budgets):
            raise BadInput(f"budgets must lie in (0, 1), at least one, got {tuple(budgets)}")
        if samples < 1 or not 0.0 <= depth <= 1.0:
            raise BadInput(f"samples must be at least 1 and depth in [0, 1], got {samples} and {depth}")
        draws(sampler, 2, grad_accum, 0)
        self.budgets = tuple(budgets)
        self.depth, self.sampler, self.grad_accum, self.samples = depth, sampler, grad_accum, samples

    def _study(self, model: nn.Module, task: Task, ignore: Sequence[str]) -> Study:
        return uncompounded(study(model, task, ignore=ignore))

    def applies_to(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Site]:
        """Return the groups of coupled dimensions that can be cut."""
        groups = self._study(model, task, ignore).groups.values()
        return [Site(group.name, group.kind, group.size, group.size * group.parameters) for group in groups]

    def refusals(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Refusal]:
        """Return the dimensions that cannot be cut, and the source lines that stand in the way."""
        return list(self._study(model, task, ignore).structure.refused)

    def plan(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = (), seed: int = 0) -> list[Edit]:
        """Return the edit that puts the nested levels beside the model."""
        found = self._study(model, task, ignore)
        example = take(task.train.inputs, slice(0, 2))
        layers: list[Stack] = []
        if self.depth and not ignore:
            layers = stacks(found.model, example)
        scores = importance(found, task, samples=self.samples, seed=seed)
        return [nest_beside(found, scores, example, self.budgets, layers, self.depth)]

    def initialise(self, elastic: ElasticModule, task: Task, *, seed: int = 0) -> None:
        """Measure the statistics of the levels' batch norms."""
        calibrate(_nested(elastic), task, seed=seed)

    def train(
        self, elastic: ElasticModule, task: Task, *, steps: int, seed: int = 0, deadline: float | None = None
    ) -> int:
        """Train the levels below the full budget to follow the original and the labels."""
        done = train_levels(
            _nested(elastic),
            task,
            steps=steps,
            teacher=elastic.full if isinstance(elastic, NestedElastic) else None,
            sampler=self.sampler,
            count=self.grad_accum,
            seed=seed,
            deadline=deadline,
        )
        elastic.eval()
        return done


def _nested(elastic: ElasticModule) -> Nested:
    if not isinstance(elastic, NestedElastic):
        raise BadInput(f"sortednet trains what it built, got {type(elastic).__name__}")
    return elastic.nested


def sort(
    model: nn.Module,
    example: Inputs,
    *,
    width: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    depth: Sequence[float] = (1.0,),
) -> Nested:
    """Return a copy of ``model`` in which every config of the grid ``width`` x ``depth`` is a level.

    Args:
        model: the model, trained or not.
        example: inputs for its trace.
        width: shares of the units of every group of coupled dimensions (channels, heads).
        depth: shares of the layers of every stack.

    Example:
        >>> nested = sort(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)), torch.ones(2, 2))
        >>> nested.select({"width": 0.25, "depth": 1.0})(torch.ones(3, 2)).shape
        torch.Size([3, 1])
    """
    return nest(model, example, grid(width, depth))


class SortedTrainer:
    """Sorted training: each step adds up the gradients of micro-steps at random configs.

    Args:
        elastic_model: what :func:`sort` returned.
        optimizer: over its parameters.
        loss: ``loss(output, target)``.
        grad_accum: micro-steps an optimiser step.
        sampler: ``"uniform"``, ``"sandwich"`` or ``"all"`` (then ``grad_accum`` plays no part).
        seed: makes the draws.

    Example:
        >>> nested = sort(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)), torch.ones(2, 2))
        >>> trainer = SortedTrainer(nested, torch.optim.SGD(nested.parameters(), lr=0.1), nn.functional.mse_loss)
        >>> len(trainer.step((torch.ones(4, 2), torch.ones(4, 1))))
        1
    """

    def __init__(
        self,
        elastic_model: Nested,
        optimizer: torch.optim.Optimizer,
        loss: Callable[[Any, Tensor], Tensor],
        *,
        grad_accum: int = 1,
        sampler: Sampler = "uniform",
        seed: int = 0,
    ) -> None:
        self.elastic_model = elastic_model
        self.optimizer = optimizer
        self.loss = loss
        self.draw = draws(sampler, len(elastic_model.edits), grad_accum, seed)

    def step(self, *batches: Batch) -> list[float]:
        """Take one optimiser step and return the loss of every micro-step, which take the batches in turn."""
        if not batches:
            raise BadInput("a step needs at least one batch")
        levels = self.draw()
        self.optimizer.zero_grad()
        losses = []
        for place, level in enumerate(levels):
            inputs, target = batches[place % len(batches)]
            loss = self.loss(call(self.elastic_model.use(level), inputs), target)
            (loss / len(levels)).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            losses.append(float(loss.detach()))
        self.optimizer.step()
        return losses

    def evaluate_all(self, task: Task, split: str = "val") -> dict[tuple[tuple[str, float], ...], float]:
        """Return the mean score of every config, batch norms recalibrated on training samples first."""
        calibrate(self.elastic_model, task)
        scores = evaluate_levels(self.elastic_model, task, split)
        return {tuple(config.items()): score for config, score in zip(self.elastic_model.configs, scores, strict=True)}


def sum_over_depths(
    hidden: Mapping[int, Tensor],
    head: Callable[[Tensor], Tensor],
    target: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Return the sum over depths l of ``loss(head(h_l), target)``: SoFT's loss with a shared norm and head.

    Args:
        hidden: by depth, the hidden states after that many layers.
        head: the final norm and head, shared by all depths.
        target: what every depth is to say.
        loss: of logits and target.

    Raises:
        BadInput: there are no hidden states.
    """
    if not hidden:
        raise BadInput("sum_over_depths needs the hidden states of at least one depth")
    return torch.stack([loss(head(state), target) for _, state in sorted(hidden.items())]).sum()
