"""The search that finds layers: a graph of primitives from tensor to tensor, mutation, two rejections, a tournament.

A layer is a chain of nodes. Four values are given: the input x, and per channel v0 (from 0), v1 (from 1) and a constant
1; each further node applies one primitive to earlier ones, and the last node, with a gain and an offset, is the layer.
Candidates that do not learn in a few steps, or whose weights can be moved to where gradients explode, are rejected
before anything else is spent on them (`Liu et al., 2020 <https://arxiv.org/abs/2004.02967>`_).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.errors import BadInput

__all__ = [
    "BINARY",
    "INDEX_SETS",
    "MOMENTS",
    "UNARY",
    "Data",
    "Discovered",
    "Genome",
    "Node",
    "Proxy",
    "Score",
    "evolve",
    "judged",
    "mutate",
    "non_dominated",
    "proxy_accuracy",
    "random_genome",
    "worst_gradient",
]

_TINY = 1e-3
UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "neg": torch.neg,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "exp": torch.exp,
    "log": lambda x: x.sign() * (x.abs() + _TINY).log(),
    "abs": torch.abs,
    "square": torch.square,
    "sqrt": lambda x: x.sign() * (x.abs() + _TINY).sqrt(),
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "mul": torch.mul,
    "div": lambda x, y: x / torch.where(y.abs() < _TINY, torch.full_like(y, _TINY), y),
    "max": torch.maximum,
}
MOMENTS = ("mean", "rms", "std")
#: Over what a moment is taken: batch and positions, positions, a sample, a group of channels of a sample.
INDEX_SETS = ("batch", "instance", "sample", "group")
_GIVEN = 4


class Node(NamedTuple):
    """One primitive, the places of its inputs, and for moments what they are over."""

    op: str
    inputs: tuple[int, ...]
    over: str = ""


Genome: TypeAlias = tuple[Node, ...]


def _draw(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))


def _random_node(place: int, generator: torch.Generator) -> Node:
    """Return a node that reads any of the values before ``place``."""
    names = (*UNARY, *BINARY, *MOMENTS)
    op = names[_draw(len(names), generator)]
    inputs = tuple(_draw(place, generator) for _ in range(2 if op in BINARY else 1))
    return Node(op, inputs, INDEX_SETS[_draw(len(INDEX_SETS), generator)] if op in MOMENTS else "")


def random_genome(nodes: int, generator: torch.Generator) -> Genome:
    """Return a random layer of ``nodes`` primitives.

    Example:
        >>> len(random_genome(10, torch.Generator().manual_seed(0)))
        10
    """
    if nodes < 1:
        raise BadInput(f"a layer needs at least one node, got {nodes}")
    return tuple(_random_node(_GIVEN + place, generator) for place in range(nodes))


def mutate(genome: Genome, generator: torch.Generator) -> Genome:
    """Return ``genome`` with one node drawn anew."""
    place = _draw(len(genome), generator)
    return (*genome[:place], _random_node(_GIVEN + place, generator), *genome[place + 1 :])


def _moment(op: str, x: Tensor, over: str, groups: int) -> Tensor:
    shape = x.shape
    if over == "group":
        x = x.unflatten(1, (groups, -1))  # type: ignore[no-untyped-call]  # torch's
    axes = {"batch": (0, 2, 3), "instance": (2, 3), "sample": (1, 2, 3), "group": (2, 3, 4)}[over]
    mean = x.mean(axes, keepdim=True)
    if op == "rms":
        mean = (x.square().mean(axes, keepdim=True) + _TINY).sqrt()
    elif op == "std":
        mean = ((x - mean).square().mean(axes, keepdim=True) + _TINY).sqrt()
    return mean.expand_as(x).reshape(shape)


class Discovered(nn.Module):
    """The layer that a genome stands for: y = last node * gain + offset.

    Args:
        genome: the nodes.
        channels: C.
        groups: for moments over groups; divides C.

    Shapes:
        (B, C, h, w) -> (B, C, h, w)

    Raises:
        BadInput: a node is none, or reads what does not come before it.
    """

    def __init__(self, genome: Genome, channels: int, *, groups: int = 4) -> None:
        super().__init__()
        for place, node in enumerate(genome):
            known = node.op in UNARY or node.op in BINARY or (node.op in MOMENTS and node.over in INDEX_SETS)
            many = 2 if node.op in BINARY else 1
            if not known or len(node.inputs) != many or not all(0 <= i < _GIVEN + place for i in node.inputs):
                raise BadInput(f"node {place} of a layer must be a primitive on earlier values, got {tuple(node)}")
        self.genome, self.groups = genome, groups
        self.v0, self.v1 = nn.Parameter(torch.zeros(channels)), nn.Parameter(torch.ones(channels))
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the nodes in order."""
        v0, v1 = (value.reshape(-1, 1, 1).expand_as(x) for value in (self.v0, self.v1))
        values = [x, v0, v1, torch.ones_like(x)]
        for op, inputs, over in self.genome:
            read = [values[place] for place in inputs]
            if op in UNARY:
                values.append(UNARY[op](read[0]))
            elif op in BINARY:
                values.append(BINARY[op](read[0], read[1]))
            else:
                values.append(_moment(op, read[0], over, self.groups))
        return values[-1] * self.weight.reshape(-1, 1, 1) + self.bias.reshape(-1, 1, 1)


#: Builds a small network from a function that makes its layers by the number of channels.
Proxy: TypeAlias = Callable[[Callable[[int], nn.Module]], nn.Module]
Data: TypeAlias = tuple[Tensor, Tensor]


def _built(proxy: Proxy, genome: Genome, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return proxy(lambda channels: Discovered(genome, channels)).train()


def proxy_accuracy(
    genome: Genome, proxy: Proxy, data: Data, *, steps: int = 100, batch: int = 64, lr: float = 0.05, seed: int = 0
) -> float:
    """Return the accuracy on ``data`` after a few steps of training on it, 0 where the loss is not finite."""
    model, (inputs, target) = _built(proxy, genome, seed), data
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(inputs), (batch,), generator=generator)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs[rows]), target[rows])
        if not bool(loss.isfinite()):
            return 0.0
        loss.backward()  # type: ignore[no-untyped-call]  # torch's
        optimizer.step()
    with torch.no_grad():
        out = model(inputs)
    return float((out.argmax(-1) == target).float().mean()) if bool(out.isfinite().all()) else 0.0


def worst_gradient(
    genome: Genome, proxy: Proxy, data: Data, *, steps: int = 100, lr: float = 0.1, stop: float = 1e8, seed: int = 0
) -> float:
    """Return the largest norm of the weights' gradient that ascent on the weights reaches; infinity if not finite.

    Args:
        genome: the layer.
        proxy: the network that it stands in.
        data: one batch.
        steps: of ascent on the norm.
        lr: how far each goes, in units of the norm of the weights.
        stop: nothing is tried beyond this norm.
        seed: of the weights.
    """
    model, (inputs, target) = _built(proxy, genome, seed), data
    # What the layer does to others' weights is judged: its own parameters only scale the result.
    weights = [value for value in model.parameters() if value.ndim > 1]
    worst = 0.0
    for _ in range(steps):
        loss = F.cross_entropy(model(inputs), target)
        grads = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
        some = [grad for grad in grads if grad is not None]
        square = torch.stack([grad.square().sum() for grad in some]).sum() if some else loss * 0.0
        norm = float(square.detach().sqrt())
        if not norm <= stop:
            return float("inf") if norm != norm else norm
        worst = max(worst, norm)
        if not square.requires_grad:
            return worst
        upward = torch.autograd.grad(square, weights, allow_unused=True)
        size = float(torch.stack([grad.square().sum() for grad in upward if grad is not None]).sum().sqrt())
        if size == 0.0:
            return worst
        if not size < float("inf"):
            return float("inf")
        with torch.no_grad():
            reach = lr * float(torch.stack([value.square().sum() for value in weights]).sum().sqrt())
            for value, grad in zip(weights, upward, strict=True):
                if grad is not None:
                    value.add_(grad, alpha=reach / size)
    return worst


@dataclass(frozen=True)
class Score:
    """What the search knows of a layer.

    Args:
        genome: the layer.
        accuracies: one a proxy; empty where it was rejected.
        rejected: by which rejection, ``"quality"`` or ``"stability"``, or "".
    """

    genome: Genome
    accuracies: tuple[float, ...] = ()
    rejected: str = ""


def non_dominated(scores: Sequence[Score]) -> list[Score]:
    """Return those that no other beats on one proxy without losing on another.

    Example:
        >>> a, b, c = (Score((), accuracies=pair) for pair in ((0.9, 0.1), (0.2, 0.8), (0.1, 0.1)))
        >>> [score.accuracies for score in non_dominated([a, b, c])]
        [(0.9, 0.1), (0.2, 0.8)]
    """

    def beats(one: Score, other: Score) -> bool:
        pairs = list(zip(one.accuracies, other.accuracies, strict=True))
        return all(x >= y for x, y in pairs) and any(x > y for x, y in pairs)

    return [score for score in scores if not any(beats(other, score) for other in scores)]


def judged(
    genome: Genome, proxies: Sequence[Proxy], data: Data, *, least: float = 0.2, most: float = 1e8, steps: int = 100
) -> Score:
    """Return the score of a layer; both rejections look at the first proxy alone, the cheaper one first."""
    first = proxy_accuracy(genome, proxies[0], data, steps=steps)
    if first < least:
        return Score(genome, rejected="quality")
    few = (data[0][:64], data[1][:64])
    if worst_gradient(genome, proxies[0], few, steps=steps, stop=most) > most:
        return Score(genome, rejected="stability")
    return Score(genome, (first, *(proxy_accuracy(genome, proxy, data, steps=steps) for proxy in proxies[1:])))


def evolve(
    proxies: Sequence[Proxy],
    data: Data,
    *,
    start: Sequence[Genome] = (),
    population: int = 20,
    rounds: int = 20,
    tournament: float = 0.25,
    nodes: int = 10,
    steps: int = 100,
    seed: int = 0,
) -> list[Score]:
    """Return every layer that was looked at: a random population, then mutations of winners of tournaments.

    A tournament draws a share of the population; its winner is any one that no other of them dominates. A mutation that
    is rejected is left out; the oldest of the population goes when a new one comes.

    Args:
        proxies: K networks; each layer is scored on all.
        data: images (N, C, h, w) and classes (N,).
        start: layers to begin with; the rest of the population is random.
        population: how many layers live at a time.
        rounds: how many mutations are tried.
        tournament: the share that is drawn for a tournament.
        nodes: of a random layer.
        steps: of proxy training, and of ascent.
        seed: of everything.

    Raises:
        BadInput: there is no proxy, or a number is out of range.
    """
    if not proxies or population < 1 or rounds < 0 or not 0 < tournament <= 1:
        raise BadInput(
            "a search needs a proxy, population >= 1, rounds >= 0 and tournament in (0, 1], got "
            f"{len(proxies)}, {population}, {rounds}, {tournament}"
        )
    generator = torch.Generator().manual_seed(seed)
    seen = [judged(genome, proxies, data, steps=steps) for genome in start]
    while len(seen) < population:
        seen.append(judged(random_genome(nodes, generator), proxies, data, steps=steps))
    alive = [score for score in seen if not score.rejected]
    for _ in range(rounds):
        if alive:
            count = max(1, round(tournament * len(alive)))
            drawn = [alive[place] for place in torch.randperm(len(alive), generator=generator)[:count].tolist()]
            winners = non_dominated(drawn)
            child = mutate(winners[_draw(len(winners), generator)].genome, generator)
        else:
            child = random_genome(nodes, generator)
        seen.append(judged(child, proxies, data, steps=steps))
        if not seen[-1].rejected:
            alive = [*alive, seen[-1]][-population:]
    return seen
