"""Search the widths and depths of a network by gradient, then let the network of that size learn from the whole one.

`Network Pruning via Transformable Architecture Search <https://arxiv.org/abs/1905.09717>`_ (Dong and Yang, 2019):
O = sum_{j in I} p_j CWI(x[:, :c_j], max_{i in I} c_i), I two widths drawn by p = softmax((log softmax(a) + g) / tau), g
Gumbel noise; the logits a follow the task's loss and lambda times +log or -log of the expected cost.

Departures:
- the search starts from the trained weights and not from random ones; the cost's band is 5 % of the target on both
  sides (the released code has one side only), and the last architecture inside it is taken;
- :class:`TransformableArchitectureSearch` (the procedure, for any traced model) leaves channels in place and masks the
  weights that read them, without interpolation, since sums of branches fix where a channel stands; the best units by
  norm come first; budgets are searched one after another, widths never rise again, and what the logits leave above a
  budget is cut where it costs least probability, so that budgets are kept and nested. Depth is not searched there.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, cast

import torch
from torch import Tensor, nn

from torchgraft.bench.task import Task, take
from torchgraft.catalogue import Card, Claim
from torchgraft.engines.allocation import Counts
from torchgraft.engines.distill import distill
from torchgraft.engines.staged_search import Architecture, StagedCNN, Widths, expected_macs, staged_macs, supernet
from torchgraft.engines.width import Study, WidthProcedure
from torchgraft.engines.width_search import (
    Relaxation,
    channel_interpolate,
    cost_loss,
    draw_two,
    temperature,
    two_halves,
)
from torchgraft.errors import BadInput

__all__ = [
    "CARD",
    "StagedCNN",
    "TransformableArchitectureSearch",
    "channel_interpolate",
    "cost_loss",
    "draw_two",
    "expected_macs",
    "supernet",
    "tas_prune",
    "transfer",
]

_CHOICES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

CARD = Card(
    key="transformable-architecture-search",
    title="Transformable architecture search (TAS)",
    seed_id=197,
    authors="Dong and Yang, 2019",
    reference="https://arxiv.org/abs/1905.09717",
    family="shrink/prune",
    kind="procedure",
    engine=("surgery", "search"),
    equation="O = sum_{j in I} p_j CWI(x[:, :c_j], max_I c), |I| = 2, p = softmax((log softmax(a) + g) / tau)",
    entry="TransformableArchitectureSearch",
    stage="width",
    capabilities=frozenset({"needs-trace", "needs-data", "needs-labels", "needs-training"}),
    example={"steps": 4, "levels": 4},
    oracles=(
        "interpolation is torch's adaptive average pool along the channels, the identity at equal counts, keeps"
        " constants, and is block averaging where counts divide, 1e-12",
        "one-hot logits give the output of the sliced network, 1e-6 of it",
        "expected cost is the enumeration of all widths and depths with counted MACs, 1e-9, for stages of blocks and"
        " for the groups of a traced residual network",
        "the cost's gradient lowers it above the band, raises it below and is zero inside",
        "drawn pairs are of two different widths, their weights sum to one and carry gradients to the logits",
    ),
    claim=Claim(
        text="noisy digits, CNN of six convolutions of width 32, half the MACs: searched widths and depths against all"
        " widths scaled alike, both trained from scratch with the same distillation; the searched one also with labels"
        " alone",
        figure="MACs within 5 % of the target; accuracy >= the uniform network's; distillation adds >= 0.2 points to"
        " plain training; means of 3 seeds",
    ),
    choose_when="there is time to train, and layers differ in the width that they need",
    choose_instead="taylor-pruning or rd-layer-adaptive-pruning where a few passes over the data must do",
    bibtex="""@inproceedings{dong2019network,
  title={Network Pruning via Transformable Architecture Search},
  author={Dong, Xuanyi and Yang, Yi},
  booktitle={Advances in Neural Information Processing Systems},
  year={2019}
}""",
)


def tas_prune(
    model: StagedCNN,
    task: Task,
    *,
    flops_ratio: float = 0.5,
    width_choices: Sequence[float] = _CHOICES,
    search_depth: bool = True,
    steps: int = 300,
    lr: float = 2e-3,
    logit_lr: float = 1e-2,
    cost_weight: float = 2.0,
    tolerance: float = 0.05,
    seed: int = 0,
) -> Widths:
    """Return the widths of every block of every stage that the search finds; :func:`transfer` trains that network.

    Args:
        model: the trained network, left as it was.
        task: its training samples: one half moves weights, the other the logits.
        flops_ratio: share of the MACs that is wanted.
        width_choices: shares of a block's width to choose among.
        search_depth: whether stages may end before their last block.
        steps: of weights and of logits, each.
        lr: of the weights.
        logit_lr: of the logits.
        cost_weight: lambda.
        tolerance: see :func:`cost_loss`.
        seed: of batches and noise.

    Raises:
        BadInput: a share lies outside (0, 1].
    """
    if not 0 < flops_ratio <= 1 or not width_choices or min(width_choices) <= 0 or max(width_choices) > 1:
        raise BadInput(f"flops_ratio and width_choices must lie in (0, 1], got {flops_ratio} and {width_choices}")
    images = cast(Tensor, task.train.inputs)
    sides = [(images.shape[-2] >> stage, images.shape[-1] >> stage) for stage in range(len(model.widths))]
    positions = [height * width for height, width in sides]
    target = flops_ratio * staged_macs(model, model.widths, positions)
    found, nearest = model.widths, math.inf
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weights = copy.deepcopy(model).train()
        options = [
            [torch.tensor(sorted({max(1, round(c * full)) for c in width_choices})).float() for full in stage]
            for stage in model.widths
        ]
        searched = Architecture(
            options,
            [[torch.zeros(len(c), requires_grad=True) for c in stage] for stage in options],
            [torch.zeros(len(s), requires_grad=True) if search_depth and len(s) > 1 else None for s in options],
        )
        moving = torch.optim.AdamW(weights.parameters(), lr=lr, weight_decay=0.01)
        choosing = torch.optim.Adam(searched.parameters(), lr=logit_lr, betas=(0.5, 0.999))
        generator = torch.Generator().manual_seed(seed)
        for step in range(steps):
            for place, rows in enumerate(two_halves(task, task.batch_size, generator)):
                blocks, depths = searched.draw(temperature(step, steps))
                output = supernet(weights, images[rows], blocks, depths)
                loss = task.loss(output, task.train.target[rows])
                if place:
                    actual = staged_macs(model, searched.likeliest(), positions)
                    expected = searched.expected(model, positions)
                    loss = loss + cost_weight * cost_loss(expected, actual, target, tolerance=tolerance)
                optimizer = choosing if place else moving
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            gap = max(abs(staged_macs(model, searched.likeliest(), positions) / target - 1), tolerance)
            if gap <= nearest:
                found, nearest = searched.likeliest(), gap
    return found


def transfer(
    widths: Sequence[Sequence[int]],
    teacher: StagedCNN,
    task: Task,
    *,
    temperature: float = 4.0,
    alpha: float = 0.9,
    steps: int = 300,
    lr: float | None = None,
    seed: int = 0,
) -> StagedCNN:
    """Return a new network of ``widths``, trained from scratch by (1 - alpha) CE + alpha T^2 KL(teacher || student)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = StagedCNN(widths, channels=teacher.channels, classes=teacher.classes)
    distill(student, teacher, task, steps=steps, lr=lr, seed=seed, temperature=temperature, alpha=alpha)
    return student.eval()


class TransformableArchitectureSearch(WidthProcedure):
    """Structured pruning to widths that are searched by gradient; nothing of the trained copy but its widths is kept.

    Args:
        steps: of weights and of logits, each, at every level.
        levels: budgets that are searched, one after another; strengths in between take the next one.
        choices: options a group.
        lr: of the weights; default: the task's.
        logit_lr: of the logits.
        cost_weight: lambda.
        tolerance: see :func:`cost_loss`.
        exact_only, cost, floor, multiple: see :class:`torchgraft.engines.width.WidthProcedure`.

    Example:
        >>> x, y = torch.randn(32, 6), torch.randint(0, 3, (32,))
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> loss = torch.nn.functional.cross_entropy
        >>> task = Task(model, (x, y), (x, y), (x, y), loss, lambda out, target: (out.argmax(1) == target).float())
        >>> TransformableArchitectureSearch(steps=2, levels=2).apply(model, task, 0.5)[0].out_features <= 5
        True
    """

    card = CARD
    expense = 3

    def __init__(
        self,
        *,
        steps: int = 40,
        levels: int = 8,
        choices: int = 8,
        lr: float | None = None,
        logit_lr: float = 0.1,
        cost_weight: float = 2.0,
        tolerance: float = 0.05,
        exact_only: bool = False,
        cost: Literal["macs", "parameters"] = "macs",
        floor: float = 0.1,
        multiple: int = 8,
    ) -> None:
        super().__init__(exact_only=exact_only, cost=cost, floor=floor, multiple=multiple)
        if steps < 1 or levels < 1 or choices < 2:
            raise BadInput(
                f"steps and levels must be at least 1, choices at least 2; got {steps}, {levels} and {choices}"
            )
        self.steps, self.levels, self.choices = steps, levels, choices
        self.lr, self.logit_lr, self.cost_weight, self.tolerance = lr, logit_lr, cost_weight, tolerance

    def scores(self, study: Study, task: Task, *, seed: int) -> dict[str, Tensor]:
        """Return the norm of every unit: which ones a width keeps."""
        with torch.no_grad():
            squares = {name: value.detach().square() for name, value in study.model.named_parameters()}
            return {name: study.structure.unit_scores(name, squares).sqrt() for name in study.groups}

    def path(self, study: Study, scores: Mapping[str, Tensor], task: Task, *, seed: int) -> list[Counts]:
        """Return the widths found at every level's budget, each at or below those before it."""
        ladders = self.ladders(study)
        relaxed = Relaxation(study, {name: _thinned(rungs, self.choices) for name, rungs in ladders.items()}, scores)
        counts = {name: rungs[0] for name, rungs in ladders.items()}
        floors = {name: rungs[-1] for name, rungs in ladders.items()}
        found, whole, least = [counts], relaxed.cost(counts), relaxed.cost(floors)
        model = copy.deepcopy(study.model).train()
        weights = {
            name: value.detach().clone().requires_grad_(value.is_floating_point())
            for name, value in model.named_parameters()
        }
        logits = {name: torch.zeros(len(options), requires_grad=True) for name, options in relaxed.options.items()}
        rate = task.learning_rate if self.lr is None else self.lr
        movable = [value for value in weights.values() if value.requires_grad]
        moving = torch.optim.AdamW(movable, lr=rate, weight_decay=0.01)
        choosing = torch.optim.Adam(list(logits.values()), lr=self.logit_lr, betas=(0.5, 0.999))
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for level in range(1, self.levels):
                target = whole - (whole - least) * level / self.levels
                allowed = {name: relaxed.options[name] <= counts[name] for name in logits}
                for step, turn in itertools.product(range(self.steps), (0, 1)):
                    rows = two_halves(task, task.batch_size, generator)[turn]
                    tau = temperature(step, self.steps)
                    drawn = {name: draw_two(a, tau=tau, allowed=allowed[name]) for name, a in logits.items()}
                    output = relaxed.run(model, relaxed.masked(weights, drawn), take(task.train.inputs, rows))
                    loss = task.loss(output, task.train.target[rows])
                    if turn:
                        log_p = _log_chances(logits, allowed)
                        likeliest = {g: int(relaxed.options[g][int(p.argmax())]) for g, p in log_p.items()}
                        expected = relaxed.expected({g: p.exp() for g, p in log_p.items()})
                        priced = cost_loss(expected, relaxed.cost(likeliest), target, tolerance=self.tolerance)
                        loss = loss + self.cost_weight * priced.to(loss.dtype)
                    optimizer = choosing if turn else moving
                    optimizer.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                counts = _within(relaxed, _log_chances(logits, allowed), target)
                found.append(counts)
        return [*found, floors]

    def _study(self, model: nn.Module, task: Task, ignore: Sequence[str]) -> Study:
        """Return the study, less the groups that no weight reads: no mask could tell what they are worth."""
        found = super()._study(model, task, ignore)
        key = (type(self).__name__, "read")
        if key not in found._scores:
            flat = {name: torch.zeros(group.size) for name, group in found.groups.items()}
            read = Relaxation(found, {name: (group.size,) for name, group in found.groups.items()}, flat).read
            found._scores[key] = {name: flat[name] for name in read}
        return replace(found, groups={g: group for g, group in found.groups.items() if g in found._scores[key]})


def _thinned(rungs: Sequence[int], options: int) -> list[int]:
    """Return at most ``options`` of the counts on a ladder, both ends among them, ascending."""
    count = min(options, len(rungs))
    return sorted({rungs[round(place * (len(rungs) - 1) / max(1, count - 1))] for place in range(count)})


def _log_chances(logits: Mapping[str, Tensor], allowed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {g: torch.log_softmax(a.masked_fill(~allowed[g], -math.inf), 0) for g, a in logits.items()}


def _within(relaxed: Relaxation, log_p: Mapping[str, Tensor], target: float) -> Counts:
    """Return the likeliest widths, narrowed where that loses least log-probability for what it saves, till they fit."""
    places = {group: int(p.argmax()) for group, p in log_p.items()}

    def counts(of: Mapping[str, int]) -> Counts:
        return {group: int(relaxed.options[group][place]) for group, place in of.items()}

    cost = relaxed.cost(counts(places))
    while cost > target * (1 + 1e-9) and any(places.values()):
        best = (math.inf, "")
        for group, place in places.items():
            if place:
                saved = cost - relaxed.cost(counts({**places, group: place - 1}))
                lost = float((log_p[group][place] - log_p[group][place - 1]).detach())
                best = min(best, (lost / max(saved, 1e-9), group))
        places[best[1]] -= 1
        cost = relaxed.cost(counts(places))
    return counts(places)
