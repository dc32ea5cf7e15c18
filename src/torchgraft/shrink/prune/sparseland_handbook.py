"""Tell kinds of sparsity apart, count what each costs, and compare them on one model at one density.

`Ten Lessons We Have Learned in the New "Sparseland": A Short Handbook for Sparse Neural Network Researchers
<https://arxiv.org/abs/2302.02596>`_ (Liu and Wang, 2023): d = sum_l nnz_l / sum_l size_l; a step costs 3 f_s, and with
the gradient of all weights every T steps (3 f_s T + 2 f_s + f_d) / (T + 1).

It is an analysis and no lever of ``fit``; what it compares are (``fast-sparse-conv``, ``lottery-ticket``, ``ssvi``).

Departures:
- The paper proposes no algorithm. :func:`sparsity_bench` is the comparison that follows from its distinctions: each
  method beside random masks of the same layer densities and a small dense model of as many weights.
- All schemes take the same number of steps; those in which masks move and weights do not are among them.
- Masks save no time in PyTorch by themselves, so FLOPs and seconds stand in columns of their own.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchgraft.bench.task import Task, take
from torchgraft.bench.training import evaluate, supervised
from torchgraft.catalogue import Card, Claim
from torchgraft.engines.masks import (
    erdos_renyi_kernel,
    gradient_weight,
    keep_best,
    keep_global,
    magnitude,
    prunable,
    random,
    uniform,
)
from torchgraft.engines.sparse_training import DropGrow, Gradual, SparsityReport, SparsityTags, Step, train_masked
from torchgraft.errors import BadInput, nearest

__all__ = [
    "ALLOCATIONS",
    "CARD",
    "SCHEMES",
    "BenchRow",
    "SparsityReport",
    "SparsityTags",
    "sparsity_bench",
    "train_sparse",
]

CARD = Card(
    key="sparseland-handbook",
    title="The sparsity handbook's comparison",
    seed_id=132,
    authors="Liu and Wang, 2023",
    reference="https://arxiv.org/abs/2302.02596",
    family="shrink/prune",
    kind="tool",
    engine=("masks",),
    equation="d = sum_l nnz_l / sum_l size_l; a step costs 3 f_s, growth by gradients (3 f_s T + 2 f_s + f_d)/(T+1)",
    entry="sparsity_bench",
    capabilities=frozenset({"needs-data", "needs-labels", "needs-training"}),
    oracles=(
        "every scheme ends at exactly the requested number of weights, and sparse-to-sparse ones hold it at every step",
        "ERK densities are at most 1 and their counts add up to the budget",
        "FLOPs in training and inference equal a count by hand on a net of two layers",
        "contradictory tags are refused, such as a static mask that drops and grows",
        "drop and grow by gradients equals a dense model's gradient by hand, and moves no weight in that step",
        "weights under a mask are zero after every step of SGD, Adam, AdamW and RMSprop with momentum and decay",
    ),
    claim=Claim(
        text="digits MLP at 10% density of all weights, as many steps for all: RigL (ERK) against static random masks"
        " (ERK and uniform), SET, gradual pruning, and a small dense MLP of as many weights; mean of 3 seeds,"
        " accuracy on held-out samples and training FLOPs",
        figure="RigL >= static random + 0.5 points and >= gradual - 1 point at <= 0.35x its training FLOPs; small dense"
        " below static random, RigL and gradual; static ERK >= static uniform",
    ),
    choose_when="you want to know whether sparse training pays on your model, and which kind, before you build on one",
    choose_instead="lottery-ticket to study which weights matter; magnitude-pruning or svd where time must fall on"
    " dense hardware, which zeros do not make faster",
    bibtex="""@article{liu2023ten,
  title={Ten Lessons We Have Learned in the New "Sparseland": A Short Handbook for Sparse Neural Network Researchers},
  author={Liu, Shiwei and Wang, Zhangyang},
  journal={arXiv preprint arXiv:2302.02596},
  year={2023}
}""",
)

#: How many weights each layer keeps, by name of the rule.
ALLOCATIONS: Mapping[str, Callable[[Mapping[str, tuple[int, ...]], float], dict[str, int]]] = {
    "erk": erdos_renyi_kernel,
    "uniform": uniform,
}
_SAVED = ("train-flops", "infer-flops", "memory")
_FIXED = SparsityTags(stage="before", trajectory="sparse-to-sparse", mask="static", budget=_SAVED)
_MOVING = SparsityTags(
    stage="during", trajectory="sparse-to-sparse", mask="dynamic", moves=("drop", "grow"), budget=_SAVED
)
#: The kinds of sparse training, with their tags.
SCHEMES: Mapping[str, SparsityTags] = {
    "random": _FIXED,
    "snip": _FIXED,
    "set": _MOVING,
    "rigl": _MOVING,
    "gradual": SparsityTags(
        stage="during", trajectory="dense-to-sparse", mask="dynamic", moves=("drop",), budget=_SAVED
    ),
    "one-shot": SparsityTags(stage="after", trajectory="dense-to-sparse", mask="static"),
}


def train_sparse(
    model: nn.Module,
    task: Task,
    scheme: str,
    *,
    density: float,
    allocation: str = "erk",
    steps: int = 1000,
    lr: float | None = None,
    seed: int = 0,
    every: int = 100,
    fraction: float = 0.3,
    start: float = 0.1,
    end: float = 0.75,
) -> SparsityReport:
    """Train ``model`` in place by a scheme of :data:`SCHEMES`, or ``"dense"``, and report on it.

    Args:
        model: the model with its first weights.
        task: where the samples and the loss come from.
        scheme: a kind of sparse training.
        density: the share of all prunable weights that is kept.
        allocation: how that is split over layers, a name in :data:`ALLOCATIONS`; SNIP ranks all layers together.
        steps: steps of training.
        lr: AdamW's highest learning rate; the task's by default.
        seed: of masks, the order of the data and what grows at random.
        every: steps between two changes of a mask that drops and grows.
        fraction: the share of weights that moves at first.
        start: the share of the steps after which gradual pruning begins.
        end: the share of the steps after which masks stay; one-shot pruning comes half-way.

    Raises:
        BadInput: the scheme or allocation is unknown, or a share lies outside [0, 1].
    """
    if scheme != "dense" and scheme not in SCHEMES:
        raise BadInput(f"unknown scheme {scheme!r}{nearest(scheme, ['dense', *SCHEMES])}")
    if allocation not in ALLOCATIONS:
        raise BadInput(f"unknown allocation {allocation!r}{nearest(allocation, list(ALLOCATIONS))}")
    if not 0.0 <= density <= 1.0 or not 0.0 <= start < end <= 1.0:
        raise BadInput(f"density and 0 <= start < end <= 1 must be shares, got {density}, {start} and {end}")
    weights = prunable(model)
    sizes = {name: tuple(weight.shape) for name, weight in weights.items()}
    kept = ALLOCATIONS[allocation](sizes, 1.0 - density)
    whole = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    masks: dict[str, Tensor] = keep_best(random(weights, seed=seed), kept)
    change: DropGrow | Gradual | None = None
    last = max(2, round(end * steps))
    history: list[Step] = []

    def fit(masks: Mapping[str, Tensor], steps: int) -> None:
        made = train_masked(
            model,
            task.train,
            supervised(task.loss),
            masks,
            steps=steps,
            batch_size=task.batch_size,
            lr=lr or task.learning_rate,
            seed=seed,
            change=change,
        )
        history.extend(made.history)

    if scheme == "snip":
        model.train()
        rows = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(seed))[: 4 * task.batch_size]
        scores = gradient_weight(model, [(take(task.train.inputs, rows), task.train.target[rows])], task.loss)
        masks = keep_best(scores, keep_global(scores, 1.0 - density))
    elif scheme in ("set", "rigl"):
        change = DropGrow(end=last, grow="gradient" if scheme == "rigl" else "random", fraction=fraction, every=every)
    elif scheme == "gradual":
        change, masks = Gradual(final=kept, start=round(start * steps), end=last), whole
    if scheme == "one-shot":
        fit({}, steps // 2)
        fit(keep_best(magnitude(prunable(model)), kept), steps - steps // 2)
    else:
        fit({} if scheme == "dense" else masks, steps)
    return SparsityReport(model, history, example=take(task.train.inputs, slice(1)))


@dataclass(frozen=True)
class BenchRow:
    """One scheme's result.

    Args:
        scheme: its name.
        tags: what kind of sparsity it is; nothing for dense models.
        score: the task's mean score on the test split.
        weights: prunable weights at the end.
        density: their share of the dense model's.
        training_share: training FLOPs as a share of the dense model's.
        inference_share: inference FLOPs as a share of the dense model's.
        seconds: the time that training took here.
    """

    scheme: str
    tags: SparsityTags | None
    score: float
    weights: int
    density: float
    training_share: float
    inference_share: float
    seconds: float


def sparsity_bench(
    model: nn.Module,
    task: Task,
    density: float,
    *,
    small: nn.Module | None = None,
    schemes: Sequence[str] = tuple(SCHEMES),
    allocation: str = "erk",
    steps: int = 1000,
    lr: float | None = None,
    seed: int = 0,
) -> list[BenchRow]:
    """Train copies of ``model`` by every scheme at one density, and the two dense models to compare them with.

    Random masks of the same layer densities are among the schemes; keep them in.

    Args:
        model: the model with its first weights; left as it was.
        task: the samples, the loss and the score.
        density: the share of all prunable weights that is kept.
        small: a dense model of as many weights, for comparison.
        schemes: names in :data:`SCHEMES`.
        allocation: how the density is split over layers.
        steps: steps of training, the same for all.
        lr: AdamW's highest learning rate; the task's by default.
        seed: of masks and the order of the data.

    Raises:
        BadInput: ``small`` has more than 1.05 times the weights that are to be kept, or a name is unknown.

    Example:
        >>> from torchgraft.bench.models import mlp
        >>> x, y = torch.randn(64, 6), torch.randint(0, 3, (64,))
        >>> loss = nn.functional.cross_entropy
        >>> score = lambda out, target: (out.argmax(1) == target).float()
        >>> task = Task(mlp(6, 3, widths=(8,)), (x, y), (x, y), (x, y), loss, score, batch_size=16)
        >>> rows = sparsity_bench(task.architecture(), task, 0.5, schemes=("random", "rigl"), steps=4)
        >>> [(row.scheme, row.weights) for row in rows]
        [('dense', 72), ('random', 36), ('rigl', 36)]
    """
    dense = sum(weight.numel() for weight in prunable(model).values())
    if small is not None:
        count = sum(weight.numel() for weight in prunable(small).values())
        if count > 1.05 * density * dense:
            raise BadInput(f"small must have about {round(density * dense)} weights, got {count}")
    plan: list[tuple[str, nn.Module, str]] = [("dense", model, "dense")]
    if small is not None:
        plan.append(("small dense", small, "dense"))
    plan += [(scheme, model, scheme) for scheme in schemes]
    rows: list[BenchRow] = []
    flops = 1.0
    for name, start, scheme in plan:
        copied = copy.deepcopy(start)
        begun = time.perf_counter()
        report = train_sparse(
            copied, task, scheme, density=density, allocation=allocation, steps=steps, lr=lr, seed=seed
        )
        seconds = time.perf_counter() - begun
        flops = report.dense_flops if name == "dense" else flops
        weights = sum(report.kept.values())
        rows.append(
            BenchRow(
                name,
                SCHEMES.get(scheme),
                float(evaluate(copied, task, "test").mean()),
                weights,
                weights / dense,
                report.training_flops / (3 * flops * steps),
                report.inference_flops / flops,
                seconds,
            )
        )
    return rows
