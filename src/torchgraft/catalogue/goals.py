"""What a person may want, and which methods can bring it: the costs that a budget names, and accuracy regained."""

from __future__ import annotations

from torchgraft.catalogue.card import Card
from torchgraft.errors import BadInput, nearest

__all__ = ["GOALS", "serves"]

_STRUCTURAL = frozenset({"depth", "width", "rank"})
_ALL = _STRUCTURAL | {"norms", "weights", "precision"}
#: goal -> the stages whose procedures serve it.
_STAGES = {
    "latency": _ALL | {"mixer", "execution"},
    "macs": _STRUCTURAL | {"mixer", "weights"},
    "params": _STRUCTURAL | {"norms", "weights"},
    "memory": _STRUCTURAL | {"mixer"},
    "size": _ALL,
}
#: goal -> the families whose methods serve it.
_FAMILIES = {"accuracy": "shrink/distill", "understanding": "analyze"}
#: What ``torchgraft list --goal`` takes.
GOALS = (*_STAGES, *_FAMILIES)


def serves(card: Card, goal: str) -> bool:
    """Say whether the method of ``card`` is meant for ``goal``.

    Raises:
        BadInput: there is no such goal.

    Example:
        >>> serves(None, "latncy")
        Traceback (most recent call last):
        torchgraft.errors.BadInput: unknown goal 'latncy'; did you mean 'latency'?
    """
    if goal in _STAGES:
        return card.stage in _STAGES[goal]
    if goal in _FAMILIES:
        return card.family.startswith(_FAMILIES[goal])
    raise BadInput(f"unknown goal {goal!r}{nearest(goal, list(GOALS))}")
