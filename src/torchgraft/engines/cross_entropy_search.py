"""The cross-entropy method: draw settings from a product distribution, keep the best, fit the distribution to them.

`The cross-entropy method for combinatorial and continuous optimization
<https://doi.org/10.1023/A:1010091220143>`_ (Rubinstein, 1999): theta <- a theta_elite + (1 - a) theta, until theta has
settled. Choices are drawn from a categorical distribution, numbers from a normal one that is cut at its bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchgraft.errors import BadInput

__all__ = ["Choice", "Number", "SearchResult", "cross_entropy_search"]

#: Share of the range that a deviation must fall below for a number to count as settled, and what a choice must reach.
_SETTLED, _CERTAIN = 1e-3, 0.999


@dataclass(frozen=True)
class Choice:
    """One of several values.

    Args:
        values: what may be chosen.
    """

    values: Sequence[Any]

    def __post_init__(self) -> None:
        if not self.values:
            raise BadInput("a Choice needs at least one value")


@dataclass(frozen=True)
class Number:
    """A number between bounds.

    Args:
        low: the least.
        high: the greatest.
        log: whether the logarithm is what is drawn.
        whole: whether it is rounded to an integer.
    """

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise BadInput(f"a Number needs low < high, and low > 0 for log, got {self.low} to {self.high}")

    @property
    def bounds(self) -> tuple[float, float]:
        """Bounds of what is drawn."""
        return (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)

    def value(self, drawn: float) -> float | int:
        """Return the number that was drawn."""
        found = min(max(math.exp(drawn) if self.log else drawn, self.low), self.high)
        return round(found) if self.whole else found


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Args:
        best: the best settings that were tried.
        value: what the objective said of them.
        rounds: number of rounds.
        tried: number of settings that were tried.
        means: mean of the elite's values in every round.
        distribution: name -> probabilities of choices, or mean and deviation of what is drawn for a number.
    """

    best: dict[str, Any]
    value: float
    rounds: int
    tried: int
    means: tuple[float, ...]
    distribution: dict[str, tuple[float, ...]]


def cross_entropy_search(
    objective: Callable[[dict[str, Any]], float],
    space: Mapping[str, Choice | Number],
    *,
    samples: int = 50,
    elite: float = 0.1,
    smoothing: float = 0.7,
    rounds: int = 20,
    seed: int = 0,
) -> SearchResult:
    """Search ``space`` for the settings that make ``objective`` smallest.

    Args:
        objective: settings -> value; NaN counts as infinitely bad.
        space: what each setting may be.
        samples: settings drawn a round.
        elite: share of them that the distribution is fitted to.
        smoothing: a, the weight of the fit in the next distribution.
        rounds: the most rounds; the search ends before where every setting has settled.
        seed: of the draws.

    Example:
        >>> space = {"x": Number(-5, 5), "kind": Choice([0, 1])}
        >>> found = cross_entropy_search(lambda s: (s["x"] - 2) ** 2 + s["kind"], space)
        >>> round(found.best["x"], 1), found.best["kind"]
        (2.0, 0)

    Raises:
        BadInput: the space is empty, a setting out of range, or every value of a round is infinite.
    """
    if not space:
        raise BadInput("space must name at least one setting")
    if samples < 2 or not 0.0 < elite <= 1.0 or not 0.0 < smoothing <= 1.0 or rounds < 1:
        raise BadInput(
            "samples must be at least 2, elite and smoothing in (0, 1] and rounds at least 1, got "
            f"{samples}, {elite}, {smoothing} and {rounds}"
        )
    draw = np.random.default_rng(seed)
    theta: dict[str, NDArray[np.float64]] = {name: _start(each) for name, each in space.items()}
    kept = max(1, round(elite * samples))
    best: dict[str, Any] = {}
    least, means, done = math.inf, [], 0
    for _ in range(rounds):
        drawn = {name: _drawn(each, theta[name], samples, draw) for name, each in space.items()}
        settings = [{name: _value(space[name], drawn[name][row]) for name in space} for row in range(samples)]
        values = np.array([float(objective(each)) for each in settings])
        values[np.isnan(values)] = math.inf
        order = np.argsort(values, kind="stable")[:kept]
        done += 1
        if values[order[0]] < least:
            least, best = float(values[order[0]]), settings[order[0]]
        order = order[np.isfinite(values[order])]
        if not len(order):
            raise BadInput("objective gave no finite value in a whole round; look at the space or the objective")
        means.append(float(values[order].mean()))
        for name, each in space.items():
            theta[name] = smoothing * _fitted(each, drawn[name][order]) + (1 - smoothing) * theta[name]
        if all(_settled(each, theta[name]) for name, each in space.items()):
            break
    distribution = {name: tuple(float(x) for x in value) for name, value in theta.items()}
    return SearchResult(best, least, done, done * samples, tuple(means), distribution)


def _start(each: Choice | Number) -> NDArray[np.float64]:
    """Return even probabilities, or the middle of the range and half of it."""
    if isinstance(each, Choice):
        return np.full(len(each.values), 1 / len(each.values))
    low, high = each.bounds
    return np.array([(low + high) / 2, (high - low) / 2])


def _drawn(
    each: Choice | Number, theta: NDArray[np.float64], samples: int, draw: np.random.Generator
) -> NDArray[np.float64]:
    if isinstance(each, Choice):
        return draw.choice(len(each.values), samples, p=theta / theta.sum()).astype(np.float64)
    found: NDArray[np.float64] = np.clip(draw.normal(theta[0], theta[1], samples), *each.bounds)
    return found


def _value(each: Choice | Number, drawn: float) -> Any:
    return each.values[int(drawn)] if isinstance(each, Choice) else each.value(float(drawn))


def _fitted(each: Choice | Number, elite: NDArray[np.float64]) -> NDArray[np.float64]:
    if isinstance(each, Choice):
        return np.bincount(elite.astype(np.int64), minlength=len(each.values)) / len(elite)
    return np.array([elite.mean(), elite.std()])


def _settled(each: Choice | Number, theta: NDArray[np.float64]) -> bool:
    if isinstance(each, Choice):
        return bool(theta.max() >= _CERTAIN)
    low, high = each.bounds
    return bool(theta[1] <= _SETTLED * (high - low))
