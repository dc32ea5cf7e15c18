"""Nodes of a control-flow graph that carry straight-line graphs of tensor operations, and what makes them fewer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from torchgraft.engines.control_flow.liveness import live_variables

__all__ = ["TEST", "Flow", "Node", "network", "optimise", "signature"]

#: The variable in which a node leaves the value of its predicate.
TEST = "?"
_SMALL = 24


@dataclass
class Node:
    """Straight-line operations, and where control goes after them.

    Args:
        graph: the operations, without an output node.
        inputs: variable -> its placeholder.
        outputs: variable -> what it holds afterwards.
        root: name -> the module or tensor that the graph names so.
        example: variable -> a value that it had when the node was made, for compilers that need one.
        test: whether the node decides, by the output :data:`TEST`.
        number: whether the original decides by a Python number here.
        following: the next node; of a test, where it holds and where it does not; none at the end.
        result: at the end, the structure that is returned (see :mod:`torchgraft.engines.control_flow.host`).
        line: ``file:line`` of the source.
    """

    graph: fx.Graph = field(default_factory=fx.Graph)
    inputs: dict[str, fx.Node] = field(default_factory=dict)
    outputs: dict[str, fx.Node] = field(default_factory=dict)
    root: dict[str, Any] = field(default_factory=dict)
    example: dict[str, Tensor] = field(default_factory=dict)
    test: bool = False
    number: bool = False
    following: list[int] = field(default_factory=list)
    result: Any = None
    line: str = ""

    @property
    def ends(self) -> bool:
        """Whether the program ends here."""
        return not self.following

    @property
    def size(self) -> int:
        """Number of operations."""
        return sum(node.op != "placeholder" for node in self.graph.nodes)

    def read(self, variable: str, value: Tensor) -> fx.Node:
        """Return the placeholder of a variable."""
        if variable not in self.inputs:
            name = "v_" + "".join(letter if letter.isalnum() else "_" for letter in variable)
            first = next(iter(self.graph.nodes), None)
            if first is None:
                self.inputs[variable] = self.graph.placeholder(name)
            else:
                with self.graph.inserting_before(first):
                    self.inputs[variable] = self.graph.placeholder(name)
            self.example[variable] = value
        return self.inputs[variable]


@dataclass
class Flow:
    """A program: nodes, the one where it begins, and the variables that hold its arguments."""

    nodes: list[Node]
    entry: int
    arguments: tuple[str, ...]

    def live(self) -> tuple[list[frozenset[str]], list[frozenset[str]]]:
        """Return the variables that are live where each node begins and ends."""
        use = [set(node.inputs) for node in self.nodes]
        define = [set(node.outputs) - {TEST} for node in self.nodes]
        return live_variables([node.following for node in self.nodes], use, define)

    def edges(self) -> list[tuple[int, int]]:
        """Return every edge."""
        return [(place, other) for place, node in enumerate(self.nodes) for other in dict.fromkeys(node.following)]


def _returned(result: Any) -> set[str]:
    """Return the variables in the structure that a program returns."""
    if not isinstance(result, dict):
        return set()
    found = {result["var"]} if "var" in result else set()
    for kind in ("tuple", "list", "dict"):
        parts = result.get(kind, ())
        for part in parts.values() if isinstance(parts, dict) else parts:
            found |= _returned(part)
    return found


def _copied(source: Node, into: Node, values: dict[fx.Node, fx.Node]) -> None:
    """Copy the operations of ``source`` behind those of ``into``."""
    for node in source.graph.nodes:
        if node.op != "placeholder":
            values[node] = into.graph.node_copy(node, lambda each: values[each])
    into.root.update(source.root)


def _joined(first: Node, second: Node) -> Node:
    """Return one node that does what ``first`` and then ``second`` do."""
    made = Node(test=second.test, number=second.number, following=list(second.following), result=second.result)
    made.line = second.line if second.test else first.line
    for node in (first, second):
        for variable in node.inputs:
            if node is first or variable not in first.outputs:
                made.read(variable, node.example[variable])
    values = {place: made.inputs[variable] for variable, place in first.inputs.items()}
    _copied(first, made, values)
    made.outputs = {variable: values[place] for variable, place in first.outputs.items()}
    for variable, place in second.inputs.items():
        values[place] = made.outputs[variable] if variable in made.outputs else made.inputs[variable]
    _copied(second, made, values)
    made.outputs.update({variable: values[place] for variable, place in second.outputs.items()})
    return made


def _prune(node: Node, live_out: frozenset[str]) -> None:
    """Drop outputs that nobody reads, operations that nobody needs, and inputs that are not used."""
    wanted = live_out | _returned(node.result) | ({TEST} if node.test else set())
    node.outputs = {variable: place for variable, place in node.outputs.items() if variable in wanted}
    for variable, place in list(node.outputs.items()):
        if node.inputs.get(variable) is place:  # it stays what it was
            del node.outputs[variable]
    kept = set(node.outputs.values())
    for each in reversed(list(node.graph.nodes)):
        if each.users or each in kept:
            continue
        if each.op == "placeholder":
            node.inputs = {variable: place for variable, place in node.inputs.items() if place is not each}
        node.graph.erase_node(each)
    node.example = {variable: value for variable, value in node.example.items() if variable in node.inputs}
    named = {str(each.target) for each in node.graph.nodes if each.op in ("call_module", "get_attr")}
    node.root = {name: value for name, value in node.root.items() if name in named}


def optimise(flow: Flow) -> Flow:
    """Return a program of fewer nodes that does the same; ``flow`` is used up.

    Dead variables and operations are dropped, nodes without work are passed by, a node and its only successor become
    one where nothing else leads there, and a small decision where several paths meet is repeated at the end of each.
    """
    nodes = flow.nodes
    entry = flow.entry
    changed = True
    while changed:
        changed = False
        _, live_out = flow.live()
        for place, node in enumerate(nodes):
            _prune(node, live_out[place])
        reached = _reached(nodes, entry)
        for place in reached:
            for side, other in enumerate(nodes[place].following):
                following = _past_empty(nodes, other)
                if following != other:
                    nodes[place].following[side] = following
                    changed = True
        entry_past = _past_empty(nodes, entry)
        changed |= entry_past != entry
        flow.entry = entry = entry_past
        while _merged(nodes, entry):
            changed = True
    order = sorted(_reached(nodes, entry))
    number = {old: new for new, old in enumerate(order)}
    for place in order:
        nodes[place].following = [number[other] for other in nodes[place].following]
    return Flow([nodes[place] for place in order], number[entry], flow.arguments)


def _merged(nodes: list[Node], entry: int) -> bool:
    """Join one node with its successor, where that may be done; return whether there was one."""
    reached = _reached(nodes, entry)
    leading = dict.fromkeys(reached, 0)
    for place in reached:
        for other in set(nodes[place].following):
            leading[other] += 1
    for place in reached:
        node = nodes[place]
        if node.test or len(node.following) != 1 or node.following[0] == place:
            continue
        (other,) = node.following
        alone = leading[other] == 1 and other != entry
        if alone or (nodes[other].test and nodes[other].size <= _SMALL and other not in nodes[other].following):
            nodes[place] = _joined(node, nodes[other])
            return True
    return False


def _past_empty(nodes: list[Node], place: int) -> int:
    seen = set()
    while place not in seen:
        seen.add(place)
        node = nodes[place]
        if node.outputs or node.test or node.ends:
            break
        place = node.following[0]
    return place


def _reached(nodes: list[Node], entry: int) -> list[int]:
    seen, waiting = {entry}, [entry]
    while waiting:
        for other in nodes[waiting.pop()].following:
            if other not in seen:
                seen.add(other)
                waiting.append(other)
    return sorted(seen)


def network(node: Node) -> tuple[fx.GraphModule, list[list[str]], list[tuple[str, str]]]:
    """Return a node's module, the variables that each of its outputs goes to, and the copies to make.

    The module takes the node's inputs in order and returns a tuple. A copy (from, to) moves what was there before the
    node ran.
    """
    made: dict[fx.Node, list[str]] = {}
    moves = []
    origin = {place: variable for variable, place in node.inputs.items()}
    for variable, place in node.outputs.items():
        if place in origin:
            moves.append((origin[place], variable))
        else:
            made.setdefault(place, []).append(variable)
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    rest = [each for each in node.graph.nodes if each.op != "placeholder"]
    for each in (*node.inputs.values(), *rest):
        values[each] = graph.node_copy(each, lambda other: values[other])
    graph.output(tuple(values[place] for place in made))
    module = fx.GraphModule(nn.Module() if not node.root else node.root, graph)
    return module.eval(), list(made.values()), moves


def signature(node: Node) -> tuple[Any, ...]:
    """Return what tells whether two nodes compute the same from inputs in the same order."""
    places = {each: place for place, each in enumerate(node.graph.nodes)}

    def said(value: Any) -> str:
        number: Any = lambda each: _Number(places[each])  # noqa: E731  # given away as another type
        return repr(fx.map_arg(value, number))

    rows = [
        (each.op, str(each.target) if each.op != "placeholder" else "", said(each.args), said(each.kwargs))
        for each in node.graph.nodes
    ]
    order = list(node.inputs)
    sizes = tuple((tuple(node.example[each].shape), node.example[each].dtype) for each in order)
    origin = set(node.inputs.values())
    outputs = tuple(dict.fromkeys(places[place] for place in node.outputs.values() if place not in origin))
    return tuple(rows), sizes, tuple(places[node.inputs[each]] for each in order), outputs


class _Number:
    def __init__(self, place: int) -> None:
        self.place = place

    def __repr__(self) -> str:
        return f"%{self.place}"


def computes(node: Node) -> bool:
    """Whether a node does more than to copy."""
    origin = set(node.inputs.values())
    return any(place not in origin for place in node.outputs.values())
