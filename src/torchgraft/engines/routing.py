"""Routers and exits: who goes where, at which threshold, at what cost, so that skipped work is truly not done.

A choice is one integer a sample or token. Work is done on gathered rows and scattered back, so that a row's result does
not depend on the rows beside it. Thresholds stand midway between the values of two calibration samples, where rounding
in another batch cannot turn a decision over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from torchgraft.errors import BadInput

__all__ = [
    "choose_exits",
    "exit_thresholds",
    "expected_cost",
    "geometric_shares",
    "ratio_for_cost",
    "refine",
    "run_rows",
    "share_threshold",
    "solve_falling",
    "straight_through",
]


def straight_through(logits: Tensor, *, tau: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Return a one-hot sample of softmax(logits) with the gradient of its Gumbel-softmax relaxation.

    Args:
        logits: scores of the choices.
        tau: temperature of the relaxation.
        generator: where the noise comes from.

    Shapes:
        (..., N) -> (..., N)

    Example:
        >>> straight_through(torch.tensor([0.0, 50.0])).tolist()
        [0.0, 1.0]

    Raises:
        BadInput: ``tau`` is not positive.
    """
    if not tau > 0:
        raise BadInput(f"tau must be positive, got {tau}")
    noise = torch.empty_like(logits).exponential_(generator=generator).clamp_min(1e-20).log().neg()
    soft = torch.softmax((logits + noise) / tau, -1)
    hard = F.one_hot(soft.argmax(-1), logits.shape[-1]).to(soft.dtype)
    return hard + soft - soft.detach()


def share_threshold(values: Tensor, share: float) -> float:
    """Return t such that ``values >= t`` holds for floor(N share) of them, or the next count that ties allow.

    Args:
        values: one number a calibration sample, (N,), N at least 1.
        share: between 0 and 1.

    Example:
        >>> share_threshold(torch.tensor([1.0, 2.0, 3.0, 4.0]), 0.5)
        2.5
    """
    if values.ndim != 1 or len(values) == 0:
        raise BadInput(f"values must be one number a sample, at least one, got shape {tuple(values.shape)}")
    if not 0.0 <= share <= 1.0:
        raise BadInput(f"share must lie in [0, 1], got {share}")
    ordered = values.detach().double().sort(descending=True).values
    count = math.floor(len(ordered) * share + 1e-9)
    if count == 0:
        return math.inf
    if count == len(ordered):
        return -math.inf
    return float((ordered[count - 1] + ordered[count]) / 2)


def geometric_shares(ratio: float, exits: int) -> Tensor:
    """Return p_k proportional to ratio^k for k = 1..exits: below 1 most leave early, above 1 late.

    Example:
        >>> geometric_shares(1.0, 4).tolist()
        [0.25, 0.25, 0.25, 0.25]

    Raises:
        BadInput: ``ratio`` is not positive or there is no exit.
    """
    if not (ratio > 0 and math.isfinite(ratio)) or exits < 1:
        raise BadInput(f"shares need a positive ratio and at least one exit, got ratio {ratio}, exits {exits}")
    return torch.softmax(math.log(ratio) * torch.arange(1, exits + 1, dtype=torch.float64), 0)


def exit_thresholds(confidence: Tensor, shares: Tensor) -> Tensor:
    """Return the threshold of each exit, so that floor(N p_k) calibration samples leave at exit k and the rest last.

    Args:
        confidence: how sure each exit is of each calibration sample.
        shares: p_k, which sum to 1.

    Shapes:
        confidence (N, E), shares (E,) -> (E,), the last -inf

    Raises:
        BadInput: shapes do not fit, or the shares are no distribution.
    """
    if confidence.ndim != 2 or len(confidence) == 0 or shares.shape != confidence.shape[1:]:
        raise BadInput(
            f"thresholds need confidences (N, E) and shares (E,), got {tuple(confidence.shape)} and "
            f"{tuple(shares.shape)}"
        )
    if bool((shares < 0).any()) or abs(float(shares.sum()) - 1.0) > 1e-6:
        raise BadInput(f"shares must be a distribution over the exits, got {shares.tolist()}")
    found, left = [], torch.arange(len(confidence))
    for exit_, share in enumerate(shares.tolist()[:-1]):
        values = confidence[left, exit_]
        count = math.floor(len(confidence) * share + 1e-9)
        found.append(share_threshold(values, min(1.0, count / len(left))) if len(left) else math.inf)
        left = left[values.double() < found[-1]]
    return torch.tensor([*found, -math.inf], dtype=torch.float64)


def choose_exits(confidence: Tensor, thresholds: Tensor) -> Tensor:
    """Return the first exit at which each sample is sure enough; the last takes whoever is left; (N, E) -> (N,)."""
    sure = confidence.double() >= thresholds
    sure[:, -1] = True
    return sure.int().argmax(1)


def expected_cost(choice: Tensor, costs: Tensor) -> float:
    """Return the mean cost of choices, such as what each exit costs from the beginning; (N,), (E,) -> number."""
    return float(costs.double()[choice].mean())


def ratio_for_cost(costs: Sequence[float], budget: float) -> float:
    """Return the ratio of :func:`geometric_shares` at which the expected cost is ``budget``.

    Raises:
        BadInput: the costs do not rise, or the budget lies outside them.
    """
    prices = torch.tensor([float(cost) for cost in costs], dtype=torch.float64)
    if len(prices) < 2 or bool((prices.diff() < 0).any()):
        raise BadInput(f"costs must rise from exit to exit, got {prices.tolist()}")
    if not float(prices[0]) < budget < float(prices[-1]):
        raise BadInput(f"budget must lie between the costs of the first and the last exit, {prices[0]:g} and "
                       f"{prices[-1]:g}, got {budget}")  # fmt: skip
    low, high = -200.0, 200.0
    for _ in range(100):
        middle = (low + high) / 2
        spent = float(geometric_shares(math.exp(middle), len(prices)) @ prices)
        low, high = (middle, high) if spent < budget else (low, middle)
    return math.exp((low + high) / 2)


def run_rows(x: Tensor, rows: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Return ``x`` with ``function`` applied to the given rows alone: gathered, computed, scattered back.

    Args:
        x: samples or tokens along dimension 0.
        rows: which are computed, a mask (N,) of booleans.
        function: keeps the shape of what it takes; it is called once, and not at all where no row is chosen.

    Example:
        >>> run_rows(torch.ones(3), torch.tensor([True, False, True]), lambda x: 5 * x).tolist()
        [5.0, 1.0, 5.0]
    """
    if bool(rows.all()):
        return function(x) if len(x) else x
    places = rows.nonzero()[:, 0]
    if len(places) == 0:
        return x
    return x.index_copy(0, places, function(x[places]).to(x.dtype))


def refine(x: Tensor, choice: Tensor, start: Tensor, learners: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    """Return start + the sum of the first ``choice`` learners' answers, row by row; the others are not run on a row.

    Args:
        x: rows.
        choice: how many learners each row gets.
        start: what a row has before any learner.
        learners: each maps rows to rows of the outputs' width.

    Shapes:
        x (N, D), choice (N,), start (F,) -> (N, F)
    """
    order = choice.argsort(descending=True, stable=True)
    sorted_x = x[order]
    # Rows with most learners stand first, so that the rows of the n-th learner are a leading slice.
    counts = [int((choice >= n).sum()) for n in range(1, len(learners) + 1)]
    parts = [learner(sorted_x[:count]) for learner, count in zip(learners, counts, strict=True) if count]
    total = start.to(x.dtype).expand(len(x), -1)
    if not parts:
        return total.clone()
    whole = total.to(parts[0].dtype).clone()
    for part in parts:
        whole[: len(part)] += part
    return whole[order.argsort()]


def solve_falling(
    function: Callable[[float], float], target: float, *, low: float, high: float, steps: int, near: float = 0.0
) -> float:
    """Return an argument at which a function that falls, but for small ripples, comes nearest to ``target``.

    Args:
        function: such as the measured cost at a price of computing.
        target: its wanted value.
        low: where the search begins.
        high: where it ends.
        steps: how often the interval is halved, at most.
        near: a gap, as a share of the target, that is small enough to stop at.

    Example:
        >>> round(solve_falling(lambda x: -x, -0.3, low=0.0, high=1.0, steps=20), 3)
        0.3
    """
    best, gap = low, math.inf
    for _ in range(steps):
        middle = (low + high) / 2
        value = function(middle)
        if abs(value - target) < gap:
            best, gap = middle, abs(value - target)
        if gap <= near * abs(target):
            break
        low, high = (middle, high) if value > target else (low, middle)
    return best
