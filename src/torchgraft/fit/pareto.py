"""Which candidates no other candidate beats, and how much they hold together."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["front", "hypervolume"]


def front(points: Sequence[tuple[float, Sequence[float]]]) -> list[int]:
    """Return the indices of the points that are not dominated, in their order.

    A point is a score (higher is better) and costs (lower is better). One point dominates another when it is at least
    as good in everything and better in something; of equal points the first stays.

    Args:
        points: (score, costs), all with the same number of costs.

    Example:
        >>> front([(0.9, [1.0]), (0.8, [0.5]), (0.7, [0.6])])
        [0, 1]
    """
    kept = []
    for i, (score, costs) in enumerate(points):
        beaten = False
        for j, (other, others) in enumerate(points):
            if i == j or len(others) != len(costs):
                continue
            no_worse = other >= score and all(b <= a for a, b in zip(costs, others, strict=True))
            better = other > score or any(b < a for a, b in zip(costs, others, strict=True))
            if no_worse and (better or j < i):
                beaten = True
                break
        if not beaten:
            kept.append(i)
    return kept


def hypervolume(points: Sequence[Sequence[float]]) -> float:
    """Return the volume that ``points`` dominate above the origin: how much a front holds, as one number.

    Args:
        points: gains, higher is better, all of one length; what lies below the origin adds nothing.

    Example:
        >>> hypervolume([(2.0, 1.0), (1.0, 2.0), (1.0, 1.0)])
        3.0
    """
    inside = [tuple(point) for point in points if all(value > 0 for value in point)]
    if not inside:
        return 0.0
    if len(inside[0]) == 1:
        return float(max(value for (value,) in inside))
    volume, ordered = 0.0, sorted(inside, key=lambda point: -point[-1])
    for place, point in enumerate(ordered):  # slices of the last axis, from the top down
        floor = ordered[place + 1][-1] if place + 1 < len(ordered) else 0.0
        if point[-1] > floor:
            volume += (point[-1] - floor) * hypervolume([other[:-1] for other in ordered[: place + 1]])
    return volume
