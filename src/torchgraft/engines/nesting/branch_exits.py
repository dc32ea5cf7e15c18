"""Exits of a trained classifier that stand in a branch beside it, which reads the classifier and never writes to it.

The classifier's own forward pass is paused at a few waists (``engines.surgery.waists``). There the branch looks at the
features; samples of which it is sure have their answer, and the pass goes on with the others alone, or ends. Who
leaves nowhere gets the classifier's own logits. Only the branch is trained.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from torchgraft.bench.meters.counts import CountingMode
from torchgraft.bench.meters.forward import plain_attention, resting
from torchgraft.bench.task import Inputs, Task
from torchgraft.bench.training import train
from torchgraft.engines.distill import Teacher, soft_loss
from torchgraft.engines.nesting.by_sample import apart, without_margin
from torchgraft.engines.nesting.elastic import ElasticModule, ElasticProcedure
from torchgraft.engines.routing import choose_exits, exit_thresholds, geometric_shares, ratio_for_cost
from torchgraft.engines.sites import Refusal, Site
from torchgraft.engines.surgery.edits import Edit
from torchgraft.engines.surgery.waists import Waist, narrows, pausing, waists
from torchgraft.errors import BadInput, Untraceable

__all__ = ["AddBranch", "BranchExits", "BranchProcedure", "spread"]

#: What a branch hands from one waist to the next: tensors with the samples along dimension 0, logits (B, C) last.
State = tuple[Tensor, ...]
#: Between which shares of the whole cost exits may stand.
_EARLIEST, _LATEST = 0.02, 0.9
#: How far above the price of the first exit a budget must lie, as a share of it.
_ROOM = 1.05


def _sure(logits: Tensor) -> Tensor:
    """Return the largest probability, in float64; (..., C) -> (...)."""
    return logits.detach().double().softmax(-1).amax(-1)


class BranchExits(ElasticModule):
    """A classifier, and a branch that reads it at some waists and may answer for a sample there.

    Args:
        full: the original, which the full budget runs alone; its parameters are frozen.
        branch: ``branch(number of the waist, features there, state) -> state``, see :data:`State`; the first state is
            empty. What it makes of a sample may not depend on the others.
        places: names of the modules of ``full`` that are waists, in the order of its pass.
        wanted: rising shares of its multiply-accumulates in (0, 1), one budget each.

    Shapes:
        (B, ...) -> (B, C)
    """

    by_sample: ClassVar[bool] = True

    def __init__(self, full: nn.Module, branch: nn.Module, places: Sequence[str], wanted: Sequence[float]) -> None:
        super().__init__((*wanted, 1.0))
        self.full, self.branch = full.requires_grad_(False), branch
        self.places, self.wanted = tuple(places), tuple(wanted)
        self.thresholds: Tensor
        shape = (len(self.wanted), len(self.places))
        self.register_buffer("thresholds", torch.full(shape, torch.inf, dtype=torch.float64))
        self.running = self.level

    def select(self, level: int) -> None:
        """Let samples leave by the thresholds of ``level``; at the last level the original runs alone."""
        self.running = level

    def train(self, mode: bool = True) -> BranchExits:
        """Set the mode of the branch; the original stays in eval mode."""
        super().train(mode)
        self.full.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Answer at the budget that is set; nothing behind a waist sees a sample that has left there."""
        out: Tensor
        if self.running == len(self.wanted):
            out = self.full(x)
            return out
        thresholds = self.thresholds[self.running]
        left = torch.arange(len(x), device=x.device)
        state: State = ()
        rows: list[Tensor] = []
        said: list[Tensor] = []

        def visit(place: int, features: Tensor) -> Tensor | None:
            nonlocal left, state
            # What follows may change the features in place, which a gradient would not survive.
            state = self.branch(place, features.clone() if torch.is_grad_enabled() else features, state)
            leaving = _sure(state[-1]) >= thresholds[place]
            if not bool(leaving.any()) and len(left):
                return features
            rows.append(left[leaving])
            said.append(state[-1][leaving])
            left, state = left[~leaving], tuple(value[~leaving] for value in state)
            return features[~leaving] if len(left) else None

        rest = pausing(self.full, self.places[: self._reach(thresholds)], visit, x)
        if rest is not None:
            rows.append(left)
            said.append(rest)
        return said[0] if len(said) == 1 else torch.cat(said)[torch.cat(rows).argsort()]

    @staticmethod
    def _reach(thresholds: Tensor) -> int:
        """Return how many waists the branch reads: none behind the last at which a sample can leave."""
        possible = (thresholds <= 1.0).nonzero()
        return int(possible[-1]) + 1 if len(possible) else 0

    def exits(self, x: Tensor) -> Tensor:
        """Return the logits of all exits, with gradients to the branch alone; (B, ...) -> (B, E, C)."""
        state: State = ()
        said: list[Tensor] = []
        grad = torch.is_grad_enabled()

        def visit(place: int, features: Tensor) -> Tensor | None:
            nonlocal state
            with torch.set_grad_enabled(grad):
                state = self.branch(place, features.clone(), state)
            said.append(state[-1])
            return features if len(said) < len(self.places) else None

        with torch.no_grad():
            pausing(self.full, self.places, visit, x)
        return torch.stack(said, 1)

    @torch.no_grad()
    def prices(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the original costs up to each waist and in all, and the branch up to there; (E + 1,) each.

        Args:
            x: samples to count on; costs are multiply-accumulates in shares of the original's.
        """
        state: State = ()
        before: list[int] = []
        spent = [0]
        counting = CountingMode()

        def visit(place: int, features: Tensor) -> Tensor:
            nonlocal state
            before.append(counting.total - spent[-1])
            begun = counting.total
            state = self.branch(place, features, state)
            spent.append(spent[-1] + counting.total - begun)
            return features

        with resting(self), plain_attention(), counting:
            pausing(self.full, self.places, visit, x)
        whole = counting.total - spent[-1]
        own = torch.tensor([*before, whole], dtype=torch.float64) / whole
        return own, torch.tensor([*spent[1:], spent[-1]], dtype=torch.float64) / whole

    @torch.no_grad()
    def set_thresholds(self, x: Tensor, *, batch_size: int) -> None:
        """Find the thresholds of each budget on samples ``x``, and declare what is then spent on them.

        Samples leave in shares that fall or rise geometrically from exit to exit, so that the budget is spent. The
        exit from which on they may leave is the one by which most answers agree with the original's.

        Args:
            x: the samples, (N, ...).
            batch_size: how many run at once.
        """
        with resting(self):
            parts = torch.split(x, batch_size)
            logits = torch.cat([self.exits(part) for part in parts])
            answers = torch.cat([self.full(part) for part in parts]).argmax(-1)
        sure = torch.cat([_sure(logits), torch.ones(len(x), 1, dtype=torch.float64, device=x.device)], 1)
        agree = torch.cat([logits.argmax(-1) == answers[:, None], torch.ones_like(answers[:, None]).bool()], 1)
        own, spent = self.prices(x[:batch_size])
        counted: list[float] = []
        for level, wanted in enumerate(self.wanted):
            best, cost = -1.0, 1.0
            for found in _ways(sure.cpu(), (own + spent).tolist(), wanted):
                choice = choose_exits(sure, found.to(sure.device))
                right = float(agree.gather(1, choice[:, None]).double().mean())
                if right > best:
                    best = right
                    self.thresholds[level] = found[:-1]
                    reach = self._reach(found[:-1])
                    costs = own + spent
                    costs[-1] = 1.0 + (float(spent[reach - 1]) if reach else 0.0)
                    cost = float(costs[choice.cpu()].mean())
            counted.append(cost)
        self.declare(counted)


def _ways(sure: Tensor, prices: Sequence[float], wanted: float) -> Iterator[Tensor]:
    """Yield thresholds at which ``wanted`` is spent: samples leave at all exits, at all but the first, and so on."""
    for first, price in enumerate(prices[:-1]):
        if price < wanted:
            shares = torch.zeros(len(prices), dtype=torch.float64)
            shares[first:] = geometric_shares(ratio_for_cost(prices[first:], wanted), len(prices) - first)
            yield exit_thresholds(sure, shares)


class AddBranch(Edit):
    """Put a branch with exits beside a classifier; a subclass says which.

    Args:
        places: names of the waists that are read.
        channels: of the features at each.
        classes: number of classes.
        wanted: as for :class:`BranchExits`.
    """

    places: tuple[str, ...] = Field(min_length=1)
    channels: tuple[int, ...] = Field(min_length=1)
    classes: int = Field(ge=2)
    wanted: tuple[float, ...] = Field(min_length=1)

    @abstractmethod
    def branch(self) -> nn.Module:
        """Return a new branch, see :class:`BranchExits`."""

    def rewrite(self, model: nn.Module) -> nn.Module:
        """Return the elastic model."""
        lost = [name for name in self.places if name not in dict(model.named_modules())]
        if lost:
            raise BadInput(f"the model has no module {lost[0]!r}, which a branch was to read")
        branch = self.branch()
        like = next((value for value in model.parameters() if value.is_floating_point()), None)
        if like is not None:
            branch = branch.to(like)
        return BranchExits(model, branch, self.places, self.wanted).train(model.training)

    def describe(self) -> dict[str, str]:
        """Return where samples may leave."""
        return dict.fromkeys(self.places, "samples leave here that a branch beside it is sure of")


def spread(model: nn.Module, x: Tensor, *, exits: int, ignore: Sequence[str] = ()) -> list[Waist]:
    """Return waists of ``model`` spread over its cost, ``exits`` of them or as many as there are, two at least.

    Args:
        model: a classifier.
        x: samples for it.
        exits: how many are wanted; the n-th stands nearest to n / (exits + 1) of the cost.
        ignore: globs of module names that are none.

    Raises:
        Untraceable: the forward pass cannot be traced.
        BadInput: there are fewer than two.
    """
    open_ = [each for each in waists(model, x, ignore=ignore) if _EARLIEST <= each.cost <= _LATEST]
    chosen: list[Waist] = []
    for number in range(1, exits + 1):
        wanted = number / (exits + 1)
        for each in sorted(open_, key=lambda waist: abs(waist.cost - wanted)):
            open_.remove(each)
            if narrows(model, each.name, x):
                chosen.append(each)
                break
    if len(chosen) < 2:
        raise BadInput(
            f"exits need two modules or more behind which one tensor (B, C, h, w) is all that is read, between "
            f"{_EARLIEST:.0%} and {_LATEST:.0%} of the multiply-accumulates; it has {len(chosen)}"
        )
    return sorted(chosen, key=lambda waist: waist.cost)


class BranchProcedure(ElasticProcedure):
    """An elastic procedure that adds a branch with exits; a subclass says of which sizes.

    Args:
        exits: how many exits the branch has, at most.
        wanted: rising shares of the multiply-accumulates, one budget each; those that the first exit alone would
            exceed are left out.
        share: the most that the whole branch may cost beside the classifier.
        samples: training samples by which thresholds are found, at most; of 320 training samples or more, a fifth at
            most is kept from the branch for that.
        alpha: share of distillation from the original in training, the rest is the task's loss.
        temperature: of the distillation.

    Raises:
        BadInput: a setting is out of range.
    """

    def __init__(
        self,
        *,
        exits: int = 3,
        wanted: Sequence[float] = (0.25, 0.35, 0.5, 0.7),
        share: float = 0.15,
        samples: int = 512,
        alpha: float = 0.9,
        temperature: float = 4.0,
    ) -> None:
        if exits < 2 or samples < 1 or not 0.0 < share < 1.0:
            raise BadInput(
                f"exits must be at least 2, samples at least 1 and share lie in (0, 1); got {exits}, {samples} and "
                f"{share}"
            )
        if not 0.0 <= alpha <= 1.0 or not temperature > 0:
            raise BadInput(f"alpha must lie in [0, 1] and temperature be positive, got {alpha} and {temperature}")
        if not wanted or any(not 0.0 < each < 1.0 for each in wanted) or sorted(set(wanted)) != list(wanted):
            raise BadInput(f"wanted must be rising shares in (0, 1), got {tuple(wanted)}")
        self.exits, self.wanted, self.share = exits, tuple(wanted), share
        self.samples, self.alpha, self.temperature = samples, alpha, temperature
        self._refused: list[Refusal] = []

    @abstractmethod
    def sizes(self, places: Sequence[Waist], classes: int, wanted: Sequence[float]) -> Iterator[AddBranch]:
        """Yield edits that add a branch at ``places``, from the most costly one on."""

    def _design(self, model: nn.Module, task: Task, ignore: Sequence[str]) -> AddBranch:
        why = without_margin(model, task)
        if why or not isinstance(task.train.inputs, Tensor):
            raise BadInput(why)
        x = task.train.inputs[:4]
        places = spread(model, x, exits=self.exits, ignore=ignore)
        features: list[Tensor] = []

        def keep(place: int, seen: Tensor) -> Tensor:
            features.append(seen.clone())
            return seen

        counting = CountingMode()
        with resting(model), torch.no_grad(), plain_attention(), counting:
            classes = pausing(model, [each.name for each in places], keep, x).shape[1]
        for edit in self.sizes(places, classes, self.wanted):
            first, whole = (cost / counting.total for cost in _cost(edit, features))
            if whole <= self.share:
                wanted = tuple(each for each in self.wanted if each > _ROOM * (places[0].cost + first))
                if not wanted:
                    raise BadInput(
                        f"an answer at the first exit costs {places[0].cost + first:.3g} of the model, more than the "
                        f"budgets that are wanted, {', '.join(f'{each:g}' for each in self.wanted)}"
                    )
                return edit.model_copy(update={"wanted": wanted})
        raise BadInput(f"the least branch costs more than {self.share:g} of the model's multiply-accumulates")

    def applies_to(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Site]:
        """Return the modules behind which samples can leave. See :class:`ElasticProcedure`."""
        self._refused = []
        try:
            edit = self._design(model, task, ignore)
        except Untraceable as error:
            self._refused = [Refusal("the whole model", str(error), error.line)]
        except BadInput as error:
            self._refused = [Refusal("the whole model", str(error))]
        else:
            return [Site(name, "exit", 1) for name in edit.places]
        return []

    def refusals(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Refusal]:
        """Return why no sample can leave early. See :class:`ElasticProcedure`."""
        return list(self._refused)

    def plan(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = (), seed: int = 0) -> list[Edit]:
        """Return the edit that adds the branch. See :class:`ElasticProcedure`."""
        return [self._design(model, task, ignore)]

    def initialise(self, elastic: ElasticModule, task: Task, *, seed: int = 0) -> None:
        """Find the thresholds. See :class:`ElasticProcedure`."""
        _, held = apart(task, self.samples, seed)
        self._own(elastic).set_thresholds(held, batch_size=task.batch_size)

    def train(
        self, elastic: ElasticModule, task: Task, *, steps: int, seed: int = 0, deadline: float | None = None
    ) -> int:
        """Train all exits of the branch, then find thresholds anew. See :class:`ElasticProcedure`."""
        model = self._own(elastic)
        if steps < 0:
            raise BadInput(f"steps must not be negative, got {steps}")
        learn, _ = apart(task, self.samples, seed)
        guide = Teacher(model.full, learn)
        if steps:
            guide.prepare(steps * task.batch_size)

        def loss(branch: nn.Module, inputs: Inputs, target: Tensor, rows: Tensor) -> Tensor:
            if not isinstance(inputs, Tensor):
                raise BadInput(f"exits need inputs of one tensor, got {type(inputs).__name__}")
            wanted = guide.logits(inputs, rows)
            each = [
                (1 - self.alpha) * task.loss(said, target)
                + self.alpha * soft_loss(said, wanted, temperature=self.temperature, target=target)
                for said in model.exits(inputs).unbind(1)
            ]
            return torch.stack(each).mean()

        record = train(
            model.branch,
            learn.train,
            loss,
            steps=steps,
            batch_size=task.batch_size,
            lr=task.learning_rate,
            seed=seed,
            deadline=deadline,
        )
        if record.steps:
            self.initialise(model, task, seed=seed)
        model.eval()
        return record.steps

    def _own(self, elastic: ElasticModule) -> BranchExits:
        if not isinstance(elastic, BranchExits):
            raise BadInput(f"{self.card.key} trains what it built, got {type(elastic).__name__}")
        return elastic


@torch.no_grad()
def _cost(edit: AddBranch, features: Sequence[Tensor]) -> tuple[int, int]:
    """Return the multiply-accumulates of the branch at the first waist and at all, on ``features`` at each."""
    with torch.random.fork_rng():
        branch = edit.branch().eval()
    state: Any = ()
    totals: list[int] = []
    counting = CountingMode()
    with plain_attention(), counting:
        for place, seen in enumerate(features):
            state = branch.to(seen)(place, seen, state)
            totals.append(counting.total)
    return totals[0], totals[-1]
