"""Replace linear and feed-forward layers by learners that add up, as many for each token as a gate finds it to need.

`Adaptive Computation Modules: Granular Conditional Computation For Efficient Inference
<https://arxiv.org/abs/2312.10193>`_ (Wójcik et al., 2025).

Equation: ``h_0 = b_0, h_n(x) = h_{n-1}(x) + s_n(x), y = h_k(x)`` with ``k = argmax_n (g(x)_n - lambda n)``.

Departures: learners start from slices of the layer itself (its neurons by their contribution; singular directions of a
lone linear layer), where the paper's start at random. One set of gates serves several budgets: a price lambda of one
learner, found for each on training samples, where the paper trains gates for each. The full budget runs the original
layers, so only learners and gates are trained. A lone linear layer gets at least one learner. Gates are narrower than
16 in narrow models, where they would cost more than they save.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.bench.meters import macs
from torchgraft.bench.task import Inputs, Task, call, take
from torchgraft.bench.training import Objective, train
from torchgraft.catalogue import Card
from torchgraft.catalogue.card import Claim
from torchgraft.engines.learners import ACM, Acmize, AcmModel, acmize, learner_edit, start_from_layers, watch
from torchgraft.engines.nesting import ElasticModule, ElasticProcedure
from torchgraft.engines.routing import solve_falling
from torchgraft.engines.sites import Site
from torchgraft.engines.surgery.edits import Edit
from torchgraft.errors import BadInput

__all__ = [
    "ACM",
    "CARD",
    "AdaptiveComputationModules",
    "AcmModel",
    "acmize",
    "budget_shares",
    "calibrate_acm",
    "distill_acm",
    "finetune_acm",
    "gate_labels",
    "mean_cost",
    "spread_losses",
    "train_gates",
]

CARD = Card(
    key="adaptive-computation-module",
    title="Adaptive computation modules",
    seed_id=3,
    authors="Wojcik, Devoto, Pustelnik, Minervini and Scardapane, 2025",
    reference="https://arxiv.org/abs/2312.10193",
    family="elastic",
    kind="procedure",
    engine=("nesting", "surgery"),
    equation="h_0 = b_0; h_n(x) = h_{n-1}(x) + s_n(x); y = h_k(x), k = argmax_n (g(x)_n - lambda n)",
    entry="AdaptiveComputationModules",
    capabilities=frozenset({"elastic", "needs-data", "needs-training"}),
    oracles=(
        "all learners together equal the one dense layer made of their neurons, to 1e-12 in float64, and before "
        "training the feed-forward layer that they were made from",
        "gates that always choose n give what n learners give, and choices by token what a loop over tokens gives",
        "the multiply-accumulates that are reported are the sum over tokens of the choice times a learner's cost, and "
        "no learner sees a token that did not choose it",
        "the distillation gradient of a layer's learners does not change when another layer's learners do",
    ),
    claim=Claim(
        text="A 2-layer vision transformer of width 64 on digits; its feed-forward layers and projections become 4 "
        "learners each. Beside it the same learners with one fixed number of them everywhere, and with random "
        "numbers, both at no fewer multiply-accumulates and trained as long.",
        figure="at the budget below half of the layers' cost: accuracy drop < 1.5 points, and >= 1 point above both "
        "baselines (mean of 3 seeds)",
    ),
    choose_when="a trained transformer is given inputs of very different difficulty, and training is affordable",
    choose_instead="first-layer-routers where whole layers can go; structured pruning where all inputs are alike, "
    "since gathering tokens costs time that fixed widths do not",
    bibtex="@inproceedings{wojcik2025adaptive, title={Adaptive Computation Modules: Granular Conditional Computation "
    "for Efficient Inference}, author={W{\\'o}jcik, Bartosz and Devoto, Alessio and Pustelnik, Karol and Minervini, "
    "Pasquale and Scardapane, Simone}, booktitle={AAAI}, year={2025}}",
)


def _train(
    elastic: AcmModel,
    task: Task,
    objective: Callable[[Inputs, Tensor], Tensor],
    moving: Sequence[nn.Parameter],
    *,
    steps: int,
    lr: float,
    seed: int,
    deadline: float | None,
    sampling: bool = False,
) -> int:
    """Train some parameters of the ACMs; the rest of the model rests, so that the full budget stays what it is."""
    held = nn.ParameterList(moving)
    flags = {value: value.requires_grad for value in elastic.parameters()}
    elastic.requires_grad_(False)
    for value in held:
        value.requires_grad_(True)
    for acm in elastic.acms.values():
        acm.training = sampling
    try:
        loss: Objective = lambda _model, inputs, target, _rows: objective(inputs, target)  # noqa: E731
        size = min(task.batch_size, len(task.train))
        record_ = train(
            held, task.train, loss, steps=steps, batch_size=size, lr=lr, seed=seed, clip=None, deadline=deadline
        )
    finally:
        for value, flag in flags.items():
            value.requires_grad_(flag)
        elastic.eval().set_budget(1.0)
    return record_.steps


def distill_acm(
    elastic: AcmModel, task: Task, *, steps: int, lr: float = 1e-3, seed: int = 0, deadline: float | None = None
) -> int:
    """First stage: train learners, each layer by itself, so that h_n(x) nears f(x) for every n; return the steps.

    Minimises the mean over n = 1..N of ||h_n(x) - f(x)||^2, in units of the outputs' variance, summed over layers; x
    and f(x) are those of the original model.
    """

    def objective(inputs: Inputs, target: Tensor) -> Tensor:
        losses = []
        for name, (x, f) in watch(elastic, inputs).items():
            errors = (elastic.acms[name].partial_sums(x)[1:] - f).square().mean()
            losses.append(errors / f.var(0, correction=0).mean().clamp_min(1e-12))
        return torch.stack(losses).sum()

    parts = [part for acm in elastic.acms.values() for part in (acm.up, acm.down)]
    moving = [value for part in parts for value in part.parameters()] + [acm.biases for acm in elastic.acms.values()]
    return _train(elastic, task, objective, moving, steps=steps, lr=lr, seed=seed, deadline=deadline)


def gate_labels(errors: Tensor, tau: float = 1.2) -> Tensor:
    """Return the smallest n >= 1 with e_{n-1} / e_n < tau, and N where there is none.

    Args:
        errors: e_0..e_N of each token, positive.
        tau: by what factor a learner must lower the error to be worth a further one.

    Shapes:
        (..., N + 1) -> (...)

    Example:
        >>> gate_labels(torch.tensor([[8.0, 4.0, 3.9, 1.0], [8.0, 4.0, 2.0, 1.0]])).tolist()
        [2, 3]
    """
    enough = errors[..., :-1] < tau * errors[..., 1:]
    first = enough.int().argmax(-1) + 1
    return torch.where(enough.any(-1), first, errors.shape[-1] - 1)


def train_gates(
    elastic: AcmModel,
    task: Task,
    *,
    steps: int,
    tau: float | None = 1.2,
    lr: float = 5e-3,
    seed: int = 0,
    deadline: float | None = None,
) -> int:
    """Second stage: train the gates alone, each layer by itself; return the steps.

    Args:
        elastic: the model.
        task: its task.
        steps: optimiser steps.
        tau: of the paper's labels, see :func:`gate_labels`. With ``None`` the scores learn to be the negative squared
            errors, so that at any price lambda the gate chooses the n of least error plus lambda n.
        lr: learning rate.
        seed: makes the order of the samples.
        deadline: a :func:`time.monotonic` moment after which no step is begun.
    """

    def objective(inputs: Inputs, target: Tensor) -> Tensor:
        losses = []
        for name, (x, f) in watch(elastic, inputs).items():
            acm = elastic.acms[name]
            with torch.no_grad():
                errors = (acm.partial_sums(x) - f).square().sum(-1).movedim(0, -1)  # (M, N + 1)
            scores = acm.gate(x)
            if tau is None:
                wanted = -errors / errors[:, 0].mean().clamp_min(1e-12)
                losses.append(F.mse_loss(scores, wanted))
            else:
                losses.append(F.cross_entropy(acm.sharpness * scores, gate_labels(errors.sqrt(), tau)))
        return torch.stack(losses).sum()

    moving = [value for acm in elastic.acms.values() for value in acm.gate.parameters()]
    return _train(elastic, task, objective, moving, steps=steps, lr=lr, seed=seed, deadline=deadline)


def finetune_acm(
    elastic: AcmModel,
    task: Task,
    *,
    steps: int,
    level: int | None = None,
    lr: float = 1e-3,
    seed: int = 0,
    deadline: float | None = None,
    cost_weight: float = 0.1,
    entropy_weight: float = 0.05,
    diversity_weight: float = 0.05,
) -> int:
    """Third stage: train learners and gates from end to end at sampled choices; return the steps.

    L = task loss + a |mean cost / full cost - target| + b L_ent + c L_div, where the target is what
    :func:`budget_shares` gives for the budget, L_ent is minus the entropy of the mean choice of each layer and sample,
    and L_div minus twice the mean difference of the loads of two samples, a load being the mean choice over N.

    Args:
        elastic: the model, its prices found.
        task: its task.
        steps: optimiser steps.
        level: the budget that is trained; default: all in turn.
        lr: learning rate.
        seed: makes the order of the samples and the choices.
        deadline: a :func:`time.monotonic` moment after which no step is begun.
        cost_weight, entropy_weight, diversity_weight: a, b, c.
    """
    turn = [0]
    acms = list(elastic.acms.values())
    targets = budget_shares(elastic, take(task.train.inputs, slice(64))) if cost_weight else list(elastic.wanted)

    def objective(inputs: Inputs, target: Tensor) -> Tensor:
        now = turn[0] % len(elastic.wanted) if level is None else level
        turn[0] += 1
        elastic.select(now)
        loss = task.loss(call(elastic, inputs), target)
        ran = [(acm, acm.sample) for acm in acms if acm.sample is not None]
        # Every sample has as many rows in a layer as any other: (B, rows, N + 1), and its mean is the sample's share.
        shares = torch.stack([torch.unflatten(sample, 0, (len(target), -1)).mean(1) for _, sample in ran])  # (L, B, .)
        weight = torch.tensor([float(len(sample) * acm.learner_macs) for acm, sample in ran]).to(shares)
        cost = mean_cost(shares, weight)
        entropy, apart = spread_losses(shares)
        terms = cost_weight * (cost - targets[now]).abs() + entropy_weight * entropy
        total: Tensor = loss + terms + diversity_weight * apart
        return total

    moving = [value for acm in acms for value in acm.parameters()]
    return _train(elastic, task, objective, moving, steps=steps, lr=lr, seed=seed, deadline=deadline, sampling=True)


def mean_cost(shares: Tensor, weight: Tensor) -> Tensor:
    """Return what is spent of what all learners of all layers cost.

    Args:
        shares: how often each number of learners was chosen, by layer and sample.
        weight: multiply-accumulates of one learner of each layer, over all rows that it sees.

    Shapes:
        (L, B, N + 1), (L,) -> ()

    Example:
        >>> shares = torch.tensor([[[0.0, 0.0, 1.0]], [[1.0, 0.0, 0.0]]])
        >>> mean_cost(shares, torch.tensor([3.0, 1.0]))
        tensor(0.7500)
    """
    count = shares.shape[-1] - 1
    loads = (shares @ torch.arange(count + 1).to(shares)).mean(1) / count  # (L,)
    return (weight / weight.sum()) @ loads


def spread_losses(shares: Tensor) -> tuple[Tensor, Tensor]:
    """Return L_ent, minus the entropy of what each sample chooses in each layer, in units of the largest, and L_div.

    L_div is minus twice the mean difference of the loads of two samples, a sample's load being its mean choice over N.

    Args:
        shares: how often each number of learners was chosen, by layer and sample.

    Shapes:
        (L, B, N + 1) -> (), ()
    """
    count = shares.shape[-1] - 1
    entropy = (shares * (shares + 1e-9).log()).sum(-1).mean() / math.log(count + 1)
    load = (shares @ torch.arange(count + 1).to(shares)).mean(0) / count  # (B,)
    return entropy, -2.0 * (load[:, None] - load).abs().mean()


@torch.no_grad()
def _span(elastic: AcmModel, inputs: Inputs) -> tuple[float, float, float]:
    """Return the multiply-accumulates of learners at which budgets 0 and 1 stand, and those of all learners.

    The least is what layers spend that must have a learner; the most keeps gates and learners within the original's.
    """
    low, high = _price_range(elastic, inputs)
    prices = [float(place.prices[0]) for place in elastic.places.values()]
    full = macs(elastic.set_budget(1.0), inputs)
    found = []
    for price in (high, low):
        elastic.set_price(0, price)
        elastic.select(0)
        whole = macs(elastic, inputs)
        found.append(float(sum(acm.spent for acm in elastic.acms.values())))
    for place, price in zip(elastic.places.values(), prices, strict=True):
        place.prices[0] = price
    elastic.set_budget(1.0)
    least, everything = found
    rest = whole - everything  # gates and the rest of the model
    return least, min(everything, max(full - rest, least)), everything


def budget_shares(elastic: AcmModel, inputs: Inputs) -> list[float]:
    """Return for each budget the share of all learners' cost at which :func:`calibrate_acm` sets it.

    A budget of 0 is what layers spend that must have a learner, and one of 1 what gates and learners may spend together
    without costing more than the layers that they stand for.

    Args:
        elastic: the model; left at its full budget.
        inputs: samples.
    """
    acms = elastic.acms.values()
    training = [acm.training for acm in acms]
    for acm in acms:
        acm.training = False
    least, most, everything = _span(elastic, inputs)
    for acm, flag in zip(acms, training, strict=True):
        acm.training = flag
    return [(least + share * (most - least)) / everything for share in elastic.wanted]


@torch.no_grad()
def calibrate_acm(elastic: AcmModel, inputs: Inputs) -> None:
    """Find the price of each budget on samples, and declare the multiply-accumulates that are then counted.

    Args:
        elastic: the model; left at its full budget.
        inputs: training samples; prices are found on the first 64.
    """
    elastic.eval()
    few = take(inputs, slice(64))
    acms = elastic.acms.values()
    low, high = _price_range(elastic, few)
    least, most, _ = _span(elastic, few)
    whole = macs(elastic.set_budget(1.0), inputs)
    shares: list[float] = []
    seen: dict[float, float] = {}

    def spent(price: float) -> float:
        if price not in seen:  # it is the same at every level
            elastic.set_price(0, price)
            elastic.select(0)
            call(elastic, few)
            seen[price] = float(sum(acm.spent for acm in acms))
        return seen[price]

    targets = [least + share * (most - least) for share in elastic.wanted]
    # What is declared is counted, so that a price need not be found to the last step of a neuron.
    prices = [solve_falling(spent, target, low=low, high=high, steps=16, near=0.01) for target in targets]
    for level, price in enumerate(prices):
        elastic.set_price(level, price)
        elastic.select(level)
        shares.append(macs(elastic, inputs) / whole)
    elastic.declare(shares)
    elastic.set_budget(1.0)


def _price_range(elastic: AcmModel, inputs: Inputs) -> tuple[float, float]:
    """Return prices at which all learners run, and none, whatever the input."""
    widest = 1.0
    for name, (x, _) in watch(elastic, inputs).items():
        scores = elastic.acms[name].sharpness * elastic.acms[name].gate(x)
        widest = max(widest, float(scores.max() - scores.min()))
    widest *= 2.0 / min(elastic.weights)
    return -widest, widest


class AdaptiveComputationModules(ElasticProcedure):
    """Make every feed-forward and linear layer adapt to each token, at several budgets.

    Args:
        learners: N of each layer.
        wanted: shares of what the adaptive layers can spend, one budget each.
        samples: training samples on which costs are counted, at most.
        lr: learning rate of learners; gates learn five times as fast in their own stage.

    Example:
        >>> from torchgraft.bench.models import VisionTransformer
        >>> x, y = torch.randn(8, 1, 8, 8), torch.randint(0, 10, (8,))
        >>> model = VisionTransformer(d_model=32, depth=1, num_heads=2).eval()
        >>> task = Task(model, (x, y), (x, y), (x, y), nn.functional.cross_entropy, lambda out, t: out[:, 0])
        >>> elastic = AdaptiveComputationModules().build(model, task)
        >>> len(elastic.budgets), torch.equal(elastic(x), model(x))
        (5, True)

    Raises:
        BadInput: a setting is out of range.
    """

    card: ClassVar[Card] = CARD

    def __init__(
        self,
        *,
        learners: int = 4,
        wanted: Sequence[float] = (0.25, 0.4, 0.6, 0.75),
        samples: int = 256,
        lr: float = 1e-3,
    ) -> None:
        if learners < 1 or samples < 1 or not lr > 0:
            raise BadInput(
                f"learners, samples and lr must be positive, got learners {learners}, samples {samples}, lr {lr}"
            )
        if not wanted or any(not 0 < share < 1 for share in wanted) or sorted(set(wanted)) != list(wanted):
            raise BadInput(f"wanted must be rising shares in (0, 1), got {tuple(wanted)}")
        self.learners, self.wanted, self.samples, self.lr = learners, tuple(wanted), samples, lr

    def _inputs(self, task: Task) -> Inputs:
        return take(task.train.inputs, slice(self.samples))

    def applies_to(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = ()) -> list[Site]:
        """Return the layers that can be replaced. See :class:`ElasticProcedure`."""
        try:
            edit = self._edit(model, task, ignore)
        except BadInput:
            return []
        return [
            Site(
                name,
                "linear" if activation == "identity" else "feed-forward",
                self.learners,
                sum(value.numel() for value in model.get_submodule(name).parameters()),
            )
            for name, activation in zip(edit.names, edit.activations, strict=True)
        ]

    def _edit(self, model: nn.Module, task: Task, ignore: Sequence[str]) -> Acmize:
        example = take(task.train.inputs, slice(4))
        return learner_edit(model, example, learners=self.learners, wanted=self.wanted, ignore=ignore)

    def plan(self, model: nn.Module, task: Task, *, ignore: Sequence[str] = (), seed: int = 0) -> list[Edit]:
        """Return the one edit that puts ACMs in. See :class:`ElasticProcedure`."""
        return [self._edit(model, task, ignore)]

    def initialise(self, elastic: ElasticModule, task: Task, *, seed: int = 0) -> None:
        """Slice the original layers into learners and find prices. See :class:`ElasticProcedure`."""
        if not isinstance(elastic, AcmModel):
            raise BadInput(f"{CARD.key} made no {type(elastic).__name__}")
        elastic.eval()
        start_from_layers(elastic, self._inputs(task))
        calibrate_acm(elastic, self._inputs(task))

    def train(
        self, elastic: ElasticModule, task: Task, *, steps: int, seed: int = 0, deadline: float | None = None
    ) -> int:
        """Spend half of the steps on learners, a fifth on gates, the rest from end to end. See the base class."""
        if steps < 0 or not isinstance(elastic, AcmModel):
            raise BadInput(f"steps must not be negative, got {steps}, for an AcmModel")
        if steps == 0:
            return 0
        first = max(1, steps // 2)
        second = min(max(1, steps // 5), steps - first)
        done = distill_acm(elastic, task, steps=first, lr=self.lr, seed=seed, deadline=deadline)
        if done:
            done += train_gates(elastic, task, steps=second, tau=None, lr=5 * self.lr, seed=seed + 1, deadline=deadline)
            calibrate_acm(elastic, self._inputs(task))
        if deadline is None or time.monotonic() < deadline:
            done += finetune_acm(
                elastic, task, steps=steps - first - second, lr=self.lr, seed=seed + 2, deadline=deadline
            )
            calibrate_acm(elastic, self._inputs(task))
        return done
