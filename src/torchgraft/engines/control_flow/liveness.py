"""Which variables are still to be read: the backward fixed point over a control-flow graph."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

__all__ = ["live_variables"]


def live_variables(
    successors: Sequence[Sequence[int]], use: Sequence[AbstractSet[str]], define: Sequence[AbstractSet[str]]
) -> tuple[list[frozenset[str]], list[frozenset[str]]]:
    """Return the variables that are live where each node begins, and where it ends.

    in(B) = use(B) | (out(B) - def(B)), out(B) = union of in(S) over the successors S of B; the least solution.

    Args:
        successors: of each node, by number.
        use: what each node reads before it writes it.
        define: what each node writes.

    Example:
        >>> live_in, live_out = live_variables([[1], [0, 2], []], [set(), {"x"}, {"y"}], [{"x"}, set(), set()])
        >>> sorted(live_in[0]), sorted(live_out[0])
        (['y'], ['x', 'y'])
    """
    count = len(successors)
    before: list[list[int]] = [[] for _ in range(count)]
    for node, following in enumerate(successors):
        for other in following:
            before[other].append(node)
    live_in = [frozenset(each) for each in use]
    live_out: list[frozenset[str]] = [frozenset()] * count
    waiting = list(range(count))
    while waiting:
        node = waiting.pop()
        out = frozenset().union(*(live_in[other] for other in successors[node]))
        new = frozenset(use[node]) | (out - define[node])
        live_out[node] = out
        if new != live_in[node]:
            live_in[node] = new
            waiting.extend(before[node])
    return live_in, live_out
