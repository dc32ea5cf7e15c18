"""A small solver for integer constraints with divisibility, which chooses sizes of tiles and blocks.

Variables have finite domains. Constraints compare sums, products and powers of them: A == B, A <= B, A % B == 0.
Domains are narrowed until nothing moves: a value is dropped when no choice of the other variables, each taken by
itself, can satisfy some constraint. That is a relaxation, so no solution is ever dropped; what is left is searched.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product

from torchgraft.errors import BadInput

__all__ = ["Expression", "IntCSP", "block_of_tokens"]

#: Sets of values larger than this are replaced by their range.
_MOST = 512
Domains = dict[str, frozenset[int]]


@dataclass(frozen=True)
class _Values:
    """What an expression may be: at least every value that it can take."""

    low: int
    high: int
    exact: frozenset[int] | None  # None where there are too many to list

    @staticmethod
    def of(values: Iterable[int]) -> _Values:
        listed = frozenset(values)
        return _Values(min(listed), max(listed), listed if len(listed) <= _MOST else None)

    def combine(self, other: _Values, how: Callable[[int, int], int]) -> _Values:
        if self.exact is not None and other.exact is not None and len(self.exact) * len(other.exact) <= _MOST * 8:
            return _Values.of(how(a, b) for a, b in product(self.exact, other.exact))
        corners = [how(a, b) for a in (self.low, self.high) for b in (other.low, other.high)]
        return _Values(min(corners), max(corners), None)


@dataclass(frozen=True)
class Expression:
    """A variable, a number, or a sum, product or power of expressions; written with ``+``, ``*`` and ``**``."""

    kind: str
    parts: tuple[Expression, ...] = ()
    name: str = ""
    number: int = 0

    def __add__(self, other: Expression | int) -> Expression:
        return Expression("+", (self, _lift(other)))

    def __mul__(self, other: Expression | int) -> Expression:
        return Expression("*", (self, _lift(other)))

    __radd__, __rmul__ = __add__, __mul__

    def __pow__(self, exponent: int) -> Expression:
        if exponent < 0:
            raise BadInput(f"exponent must be at least 0, got {exponent}")
        return Expression("**", (self,), number=exponent)

    def names(self) -> frozenset[str]:
        """Return the variables in it."""
        own = frozenset({self.name}) if self.kind == "variable" else frozenset()
        return own.union(*(part.names() for part in self.parts))

    def at(self, values: Mapping[str, int]) -> int:
        """Return its value where every variable has one."""
        if self.kind == "variable":
            return values[self.name]
        if self.kind == "number":
            return self.number
        inner = [part.at(values) for part in self.parts]
        if self.kind == "**":
            return int(inner[0] ** self.number)
        return inner[0] + inner[1] if self.kind == "+" else inner[0] * inner[1]

    def within(self, domains: Domains) -> _Values:
        """Return what it may be when each variable is anywhere in its domain."""
        if self.kind == "variable":
            return _Values.of(domains[self.name])
        if self.kind == "number":
            return _Values.of([self.number])
        inner = [part.within(domains) for part in self.parts]
        if self.kind == "**":
            if inner[0].exact is not None:
                return _Values.of(int(a**self.number) for a in inner[0].exact)
            ends = [int(inner[0].low ** self.number), int(inner[0].high ** self.number)]
            crosses = inner[0].low < 0 < inner[0].high and self.number % 2 == 0
            return _Values(min(ends + [0] * crosses), max(ends), None)
        return inner[0].combine(inner[1], operator.add if self.kind == "+" else operator.mul)


def _lift(value: Expression | int) -> Expression:
    return value if isinstance(value, Expression) else Expression("number", number=value)


def _may_equal(a: _Values, b: _Values) -> bool:
    if a.exact is not None and b.exact is not None:
        return bool(a.exact & b.exact)
    return a.low <= b.high and b.low <= a.high


def _may_divide(a: _Values, b: _Values) -> bool:
    if a.exact is not None and b.exact is not None and len(a.exact) * len(b.exact) <= _MOST * 8:
        return any(y != 0 and x % y == 0 for x in a.exact for y in b.exact)
    if (b.low, b.high) == (0, 0):
        return False
    least = 0 if a.low <= 0 <= a.high else min(abs(a.low), abs(a.high))
    return least == 0 or max(abs(a.low), abs(a.high)) >= (1 if b.low <= 0 else b.low)


_MAY: dict[str, Callable[[_Values, _Values], bool]] = {
    "==": _may_equal,
    "<=": lambda a, b: a.low <= b.high,
    "%": _may_divide,
}
_HOLDS: dict[str, Callable[[int, int], bool]] = {
    "==": operator.eq,
    "<=": operator.le,
    "%": lambda a, b: b != 0 and a % b == 0,
}


@dataclass
class IntCSP:
    """Integer variables and constraints on them.

    Example:
        >>> csp = IntCSP()
        >>> rows, columns = csp.variable("rows", range(1, 65)), csp.variable("columns", range(1, 65))
        >>> csp.divides(rows, 48); csp.divides(columns, 48); csp.at_most(rows * columns, 100)
        >>> csp.solve(maximize=rows * columns + rows)
        {'rows': 48, 'columns': 2}

    Raises:
        BadInput: an empty domain, or a name that is taken or unknown.
    """

    domains: Domains = field(default_factory=dict)
    constraints: list[tuple[str, Expression, Expression]] = field(default_factory=list)

    def variable(self, name: str, domain: Iterable[int]) -> Expression:
        """Add a variable with a finite ``domain``."""
        values = frozenset(domain)
        if name in self.domains or not values:
            raise BadInput(f"a variable needs a new name and values, got {name!r} with {len(values)} values")
        self.domains[name] = values
        return Expression("variable", name=name)

    def _add(self, kind: str, a: Expression | int, b: Expression | int) -> None:
        left, right = _lift(a), _lift(b)
        if unknown := (left.names() | right.names()) - set(self.domains):
            raise BadInput(f"variables must be made by this problem's variable(), got {sorted(unknown)}")
        self.constraints.append((kind, left, right))

    def equal(self, a: Expression | int, b: Expression | int) -> None:
        """Require a == b."""
        self._add("==", a, b)

    def at_most(self, a: Expression | int, b: Expression | int) -> None:
        """Require a <= b."""
        self._add("<=", a, b)

    def divides(self, b: Expression | int, a: Expression | int) -> None:
        """Require a % b == 0."""
        self._add("%", a, b)

    def holds(self, values: Mapping[str, int]) -> bool:
        """Whether ``values`` of all variables satisfy every constraint."""
        return all(_HOLDS[kind](a.at(values), b.at(values)) for kind, a, b in self.constraints)

    def propagate(self, domains: Domains | None = None) -> Domains:
        """Return narrower domains that hold every solution; one of them is empty where there is none."""
        narrow = dict(self.domains if domains is None else domains)
        moved = True
        while moved and all(narrow.values()):
            moved = False
            for kind, a, b in self.constraints:
                for name in sorted(a.names() | b.names()):
                    left = frozenset(
                        value
                        for value in narrow[name]
                        if _MAY[kind](*(side.within({**narrow, name: frozenset({value})}) for side in (a, b)))
                    )
                    if left != narrow[name]:
                        narrow[name], moved = left, True
                    if not left:
                        return narrow
        return narrow

    def solve(self, *, maximize: Expression | int = 0) -> dict[str, int] | None:
        """Return the solution in which ``maximize`` is largest, or ``None`` where there is none."""
        goal = _lift(maximize)
        best: tuple[int, dict[str, int]] | None = None
        stack = [self.propagate()]
        while stack:
            domains = stack.pop()
            if not all(domains.values()) or (best is not None and goal.within(domains).high <= best[0]):
                continue
            open_ones = [name for name in domains if len(domains[name]) > 1]
            if not open_ones:
                values = {name: next(iter(domain)) for name, domain in domains.items()}
                if self.holds(values) and (best is None or goal.at(values) > best[0]):
                    best = goal.at(values), values
                continue
            name = min(open_ones, key=lambda each: len(domains[each]))
            tried = sorted(domains[name], key=lambda v: goal.within({**domains, name: frozenset({v})}).high)
            stack += [self.propagate({**domains, name: frozenset({value})}) for value in tried]  # best one on top
        return None if best is None else best[1]


@lru_cache(maxsize=256)
def block_of_tokens(tokens: int, row: int, room: int) -> int:
    """Return the largest power-of-two number of tokens whose rows fit into ``room``; at least 1, at most 512.

    Args:
        tokens: T; the block is not twice as long.
        row: elements a token.
        room: elements that should be worked on at a time.

    Example:
        >>> block_of_tokens(1024, 8192, 1 << 18)
        32
    """
    csp = IntCSP()
    block = csp.variable("block", [1 << power for power in range(10)])
    csp.at_most(block * max(1, row), max(room, row, 1))
    csp.at_most(block, 2 * tokens)
    found = csp.solve(maximize=block)
    return 1 if found is None else found["block"]
