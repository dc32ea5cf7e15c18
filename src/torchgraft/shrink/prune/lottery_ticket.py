"""Find sparse subnetworks that train as well as the whole, by pruning trained weights and rewinding the rest.

`The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks <https://arxiv.org/abs/1803.03635>`_ (Frankle
and Carbin, 2019): train f(x; m_r * theta_0), m_{r+1} = m_r minus the floor(p n_r) smallest |theta_T| of each layer.

As a lever of ``fit``, :class:`LotteryTicket` prunes a trained model in rounds, trains what is left for a few steps and
ends in sparse layers; :func:`lottery_ticket` is the experiment of the paper, from first weights.

Departures:
- :class:`LotteryTicket` goes back to the weights that it is given, for a task brings no earlier ones; so theta_0 is a
  trained model, a round is a short training, and no claim is made that such tickets train as well from scratch.
- There only layers that can be executed sparse are pruned, all at one rate, the first and the last not at all.
- A scope of all layers leaves the output layer out, which is pruned at its own rate, unless ``output_rate_scale`` is
  ``None``; then it is ranked with the others.
- With ``rewind_step`` k every round starts from theta_k, and its run is as long as the first and sees the same batches
  from the first on; the follow-up paper goes on at batch k.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor, nn

from torchgraft.bench.task import Task
from torchgraft.catalogue import Card, Claim
from torchgraft.engines.finetune import finetune
from torchgraft.engines.masks import magnitude, prunable
from torchgraft.engines.sparse import block_scores
from torchgraft.engines.sparse.gradual import fitting_rows
from torchgraft.engines.sparse.procedure import SparseTraining
from torchgraft.engines.sparse_training import (
    Rewound,
    SparsityTags,
    TrainFn,
    prune_and_rewind,
    remove_lowest,
    trainer,
)
from torchgraft.errors import BadInput, nearest

__all__ = [
    "CARD",
    "TAGS",
    "LotteryTicket",
    "lottery_ticket",
    "one_shot",
    "prune_blocks",
    "prune_smallest",
    "ticket_counts",
    "trainer",
]

CARD = Card(
    key="lottery-ticket",
    title="Lottery tickets by iterative magnitude pruning",
    seed_id=62,
    authors="Frankle and Carbin, 2019",
    reference="https://arxiv.org/abs/1803.03635",
    family="shrink/prune",
    kind="procedure",
    engine=("masks", "surgery"),
    equation="m_{r+1} = m_r minus the floor(p n_r) smallest |theta_T|, theta <- m_{r+1} * theta_0",
    entry="LotteryTicket",
    stage="weights",
    capabilities=frozenset({"needs-data", "needs-labels", "needs-training"}),
    example={"timed": False, "rounds": 2, "steps": 1},
    oracles=(
        "each layer's count follows n_{r+1} = n_r - floor(p n_r) exactly, and masks are nested",
        "after the reset every weight that is left equals theta_0 bit for bit",
        "masked weights stay exactly 0 through training with momentum and weight decay",
        "every removed weight is at most as large as every kept one of its scope",
        "the controls keep as many weights of each layer; one-shot pruning has the counts of all rounds together",
        "the lever's masks are nested and end at the count asked for, and every round starts from the weights as given",
    ),
    claim=Claim(
        text="digits MLP 64-300-100-10, Adam 1.2e-3, 10 rounds at p = 0.2, 1200 steps a round; then 3000 steps each:"
        " tickets against the dense model, the same masks with fresh weights, and shuffled masks; test accuracy, step"
        " of least validation loss (early stop), mean of 3 seeds",
        figure="at 20% density (7 prunings) ticket accuracy >= dense - 0.3 points and its early stop <= dense's; at 10%"
        " (10 prunings) fresh weights stop >= 1.2x later than the ticket or lose >= 1 point to it",
    ),
    choose_when="most single weights of linear layers or 1x1 convolutions are to go and a few hundred steps of training"
    " are affordable; or you study which weights of a small model matter",
    choose_instead="fast-sparse-conv without training or where blocks of weights run faster; sparseland-handbook's"
    " drop-and-grow training, which finds such masks from scratch in one run",
    bibtex="""@inproceedings{frankle2019lottery,
  title={The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks},
  author={Frankle, Jonathan and Carbin, Michael},
  booktitle={International Conference on Learning Representations},
  year={2019}
}""",
)

#: What kind of sparsity this is.
TAGS = SparsityTags(stage="after", trajectory="dense-to-sparse", mask="dynamic", moves=("drop",))


def _count(rate: float, kept: int) -> int:
    """Return floor(rate x kept), the rate read as the decimal that it was written as."""
    return math.floor(Fraction(rate).limit_denominator(10**6) * kept)


def prune_smallest(
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    *,
    rate: float = 0.2,
    scope: Literal["layer", "global"] = "layer",
    output: str | None = None,
    output_rate_scale: float | None = 0.5,
) -> dict[str, Tensor]:
    """Return ``masks`` without the smallest weights that are left: floor(rate n) of each layer, or of all together.

    Args:
        weights: trained weights, by name.
        masks: which of them are there.
        rate: the share that goes.
        scope: whether layers are ranked one by one or together.
        output: the output layer's weight; the last one by default.
        output_rate_scale: its rate in units of ``rate``; ``None`` treats it as the others.

    Raises:
        BadInput: a rate lies outside [0, 1), the scope is unknown, or there is no such output.

    Example:
        >>> w = {"fc.weight": torch.tensor([[0.1, -3.0, 0.5, 2.0]])}
        >>> keep = {"fc.weight": torch.tensor([[True, True, True, True]])}
        >>> prune_smallest(w, keep, rate=0.5, output_rate_scale=None)
        {'fc.weight': tensor([[False,  True, False,  True]])}
    """
    names = list(masks)
    last = names[-1] if output is None else output
    scale = 1.0 if output_rate_scale is None else output_rate_scale
    if last not in masks:
        raise BadInput(f"the model has no prunable weight {last!r}{nearest(last, names)}")
    if not 0.0 <= rate < 1.0 or not 0.0 <= rate * scale < 1.0:
        raise BadInput(f"rates must lie in [0, 1), got {rate} and {rate * scale} for the output layer")
    if scope not in ("layer", "global"):
        raise BadInput(f"scope must be 'layer' or 'global', got {scope!r}")
    apart = [[last]] if output_rate_scale is not None else []
    others = [name for name in names if [name] not in apart]
    groups = [*([[name] for name in others] if scope == "layer" else [others]), *apart]
    found = {name: mask.clone() for name, mask in masks.items()}
    sizes = magnitude(weights)
    for group in groups:
        left = sum(int(masks[name].sum()) for name in group)
        share = rate * scale if group in apart else rate
        part = {name: masks[name] for name in group}
        found.update(remove_lowest({n: sizes[n] for n in group}, part, _count(share, left)) if group else {})
    return found


def one_shot(
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    rounds: int,
    *,
    rate: float = 0.2,
    scope: Literal["layer", "global"] = "layer",
    output: str | None = None,
    output_rate_scale: float | None = 0.5,
) -> dict[str, Tensor]:
    """Return the masks that ``rounds`` prunings of the same weights leave: one pruning of 1 - (1 - rate)^rounds.

    Args:
        weights: trained weights, by name.
        masks: which of them are there.
        rounds: how many rounds are done at once.
        rate: as in :func:`prune_smallest`, and so the rest.
        scope: whether layers are ranked one by one or together.
        output: the output layer's weight.
        output_rate_scale: its rate in units of ``rate``.
    """
    found = dict(masks)
    for _ in range(rounds):
        found = prune_smallest(
            weights, found, rate=rate, scope=scope, output=output, output_rate_scale=output_rate_scale
        )
    return found


def lottery_ticket(
    model: nn.Module,
    train_fn: Task | TrainFn,
    rounds: int,
    *,
    rate: float = 0.2,
    scope: Literal["layer", "global"] = "layer",
    output: str | None = None,
    output_rate_scale: float | None = 0.5,
    rewind_step: int = 0,
) -> Rewound:
    """Train, prune the smallest weights and rewind, ``rounds`` times; ``model`` itself is left as it was.

    Only weights of linear and convolution layers are pruned. The result has the masks, every round's trained model,
    ``ticket()`` to train in isolation, and the controls ``reinitialized()`` and ``shuffled()``.

    Args:
        model: the model with its first weights.
        train_fn: ``train_fn(model, stop)`` trains a model in place, by the whole run or by its first ``stop`` steps; or
            a task, for 400 steps of Adam at a constant rate (:func:`trainer` sets others).
        rounds: how often.
        rate: the share of the weights left that goes each time.
        scope: whether layers are ranked one by one or together.
        output: the output layer's weight; the last one by default.
        output_rate_scale: its rate in units of ``rate``; ``None`` treats it as the others.
        rewind_step: the step of the first run whose weights the rounds go back to; deep models need some.

    Raises:
        BadInput: a setting is out of range, or the model has no prunable weight.

    Example:
        >>> model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 5))
        >>> found = lottery_ticket(model, lambda net, stop: None, 2, rate=0.5)
        >>> {name: int(mask.sum()) for name, mask in found.masks.items()}
        {'0.weight': 5, '2.weight': 12}
        >>> bool((found.ticket()[0].weight == model[0].weight)[found.masks["0.weight"]].all())
        True
    """

    def prune(end: Mapping[str, Tensor], start: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return prune_smallest(end, masks, scope=scope, output=output, rate=rate, output_rate_scale=output_rate_scale)

    weights = {name: weight.detach() for name, weight in prunable(model).items()}
    if weights:  # say what is wrong before hours of training
        prune(weights, weights, {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()})
    return prune_and_rewind(model, train_fn, prune, rounds, rewind_step=rewind_step)


def ticket_counts(size: int, kept: int, rounds: int) -> list[int]:
    """Return how many of ``size`` weights are left after each round, the same share going each time.

    Example:
        >>> ticket_counts(1000, 125, 3)
        [500, 250, 125]
    """
    return [round(size * (kept / size) ** (number / rounds)) for number in range(1, rounds + 1)]


def prune_blocks(weight: Tensor, mask: Tensor, kept: int, *, rows: int = 1) -> Tensor:
    """Return ``mask`` with only the ``kept`` largest of the blocks that it shows, by the sum of magnitudes.

    Args:
        weight: the trained weight.
        mask: what is left of it, constant inside blocks.
        kept: how many blocks stay, at most those that are left.
        rows: output channels that share a pattern.

    Shapes:
        weight, mask, result: (M, ...)

    Example:
        >>> w = torch.tensor([[3.0, 1.0], [0.0, 2.5]])
        >>> prune_blocks(w, torch.tensor([[False, True], [False, True]]), 1)
        tensor([[False, False],
                [False,  True]])
    """
    shown = mask.flatten(1)[::rows]
    left = int(shown.sum()) - kept
    best = remove_lowest({"": block_scores(weight.flatten(1), (rows, 1))}, {"": shown}, left)[""]
    return best.repeat_interleave(rows, 0).reshape(mask.shape)


class LotteryTicket(SparseTraining):
    """Sparse linear layers and 1x1 convolutions, found in rounds; strength is how few stay, as (1 - most) ** strength.

    Each round trains the model as given under the masks so far and removes the same share of the smallest weights of
    every layer; at the end the ticket, rewound once more, is trained for as many steps. Which layers become sparse is
    decided as in :class:`~torchgraft.engines.sparse.procedure.SparseProcedure`: only where that pays.

    Args:
        rounds: how often weights are pruned.
        steps: training steps of each round, and of the ticket.
        lr: the highest learning rate; default: the task's.
        block: output channels that share a pattern: 1 as in the paper, 2 or 4, halved where it does not divide.
        most: the sparsity at strength 1.
        timed: whether only layers that are measured to be faster become sparse.

    Example:
        >>> x, y = torch.randn(32, 6), torch.randint(0, 3, (32,))
        >>> model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> loss = nn.functional.cross_entropy
        >>> task = Task(model, (x, y), (x, y), (x, y), loss, lambda out, target: (out.argmax(1) == target).float())
        >>> LotteryTicket(timed=False, steps=2).apply(model, task, 1.0)[2]
        SparseLinear(16, 16, bias=True, sparsity=0.949, block=1x1, backend='kernel')

    Raises:
        BadInput: a setting is out of range.
    """

    card = CARD

    def __init__(
        self,
        *,
        rounds: int = 3,
        steps: int = 60,
        lr: float | None = None,
        block: int = 1,
        most: float = 0.95,
        timed: bool = True,
    ) -> None:
        super().__init__(block=block, most=most, timed=timed)
        if rounds < 1 or steps < 0:
            raise BadInput(f"lottery-ticket needs rounds >= 1 and steps >= 0, got {rounds} and {steps}")
        self.rounds, self.steps, self.lr = rounds, steps, lr

    def pruned(
        self, model: nn.Module, task: Task, kept: Mapping[str, int], *, ignore: Sequence[str], seed: int
    ) -> nn.Module:
        """Return the trained ticket, masks on. See :class:`SparseTraining`."""

        def run(net: nn.Module, stop: int | None) -> None:
            finetune(net, task, steps=self.steps, lr=self.lr, seed=seed, ignore=ignore)

        done = itertools.count()
        goals = {f"{name}.weight": count for name, count in kept.items()}

        def prune(
            end: Mapping[str, Tensor], start: Mapping[str, Tensor], masks: Mapping[str, Tensor]
        ) -> dict[str, Tensor]:
            number = next(done)
            found = {}
            for name, goal in goals.items():
                rows = fitting_rows(len(end[name]), self.block)
                count = ticket_counts(end[name].numel() // rows, goal, self.rounds)[number]
                found[name] = prune_blocks(end[name], masks[name], count, rows=rows)
            return found

        ticket = prune_and_rewind(model, run, prune, self.rounds, names=goals).ticket()
        run(ticket, None)
        return ticket
