"""Control flow: live variables against brute force, source that is refused by file and line, and the host program."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torchgraft.engines.control_flow import (
    Host,
    HostProgram,
    Run,
    live_variables,
    load_host,
    lower,
    specialise,
)
from torchgraft.errors import BadInput, Untraceable

NAMES = ["a", "b", "c"]


@st.composite
def _graphs(draw: st.DrawFn) -> tuple[list[list[int]], list[set[str]], list[set[str]]]:
    count = draw(st.integers(1, 6))
    successors = [draw(st.lists(st.integers(0, count - 1), max_size=2, unique=True)) for _ in range(count)]
    some = st.sets(st.sampled_from(NAMES))
    return successors, [draw(some) for _ in range(count)], [draw(some) for _ in range(count)]


def _read_before_written(
    successors: list[list[int]], use: list[set[str]], define: list[set[str]], at: int, x: str
) -> bool:
    """Whether some path from the beginning of ``at`` reads ``x`` before it writes it, by following all of them."""
    waiting, seen = [at], set()
    while waiting:
        node = waiting.pop()
        if x in use[node]:
            return True
        if node in seen or x in define[node]:
            continue
        seen.add(node)
        waiting += successors[node]
    return False


@settings(max_examples=100, deadline=None)
@given(_graphs())
def test_live_variables_are_those_that_some_path_reads_first(
    graph: tuple[list[list[int]], list[set[str]], list[set[str]]],
) -> None:
    successors, use, define = graph
    live_in, live_out = live_variables(successors, use, define)
    for node in range(len(successors)):
        assert live_in[node] == {x for x in NAMES if _read_before_written(successors, use, define, node, x)}
        assert live_out[node] == frozenset().union(*(live_in[other] for other in successors[node]))


def test_a_loop_keeps_what_the_next_round_reads() -> None:
    live_in, live_out = live_variables(
        [[1], [2, 3], [1], []], [set(), {"n"}, {"x"}, {"y"}], [{"n"}, set(), {"n"}, set()]
    )
    assert live_in[1] == {"n", "x", "y"}
    assert live_out[2] == {"n", "x", "y"}


class Bad(nn.Module):
    """Every construct that is refused, each in a method of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.state = 0
        self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])

    def attribute(self, x: Tensor) -> Tensor:
        self.state = self.state + 1  # attribute
        return x

    def element(self, x: Tensor) -> Tensor:
        x[0] = 1.0  # element
        return x

    def context(self, x: Tensor) -> Tensor:
        with torch.no_grad():  # a with statement
            return x + 1

    def trial(self, x: Tensor) -> Tensor:
        try:  # a try statement
            return x + 1
        finally:
            pass

    def anonymous(self, x: Tensor) -> Tensor:
        f = lambda y: y + 1  # noqa: E731  # a Lambda
        return f(x)

    def inplace(self, x: Tensor) -> Tensor:
        x.add_(1.0)  # in place by add_
        return x

    def picking(self, x: Tensor) -> Tensor:
        return self.layers[x.argmax().item()](x)  # by the value of a tensor

    def mask(self, x: Tensor) -> Tensor:
        return x[x > 0]  # shape depends on values

    def listing(self, x: Tensor) -> Tensor:
        return x * len(x.tolist())  # tolist

    def many(self, x: Tensor) -> Tensor:
        if x > 0:  # needs one number
            return x
        return -x

    def raising(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            raise ValueError("no")  # can reach this raise
        return x

    def unbound(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            y = x
        return y  # no value on some path

    def noise(self, x: Tensor) -> Tensor:
        return x + torch.rand(3)  # not fixed

    def foreign(self, x: Tensor) -> Tensor:
        return x + json.loads(x)  # fails

    def smallest(self, x: Tensor) -> Tensor:
        return min(x, x + 1)  # hands a tensor to min


METHODS = [name for name, value in vars(Bad).items() if callable(value) and not name.startswith("_")]


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_supported_is_refused_with_its_line(method: str) -> None:
    source, first = inspect.getsourcelines(getattr(Bad, method))
    marked = [(first + i, line.split("  # ")[-1].strip()) for i, line in enumerate(source) if "  # " in line]
    kind = type("Case", (Bad,), {"forward": getattr(Bad, method)})
    with pytest.raises(Untraceable) as caught:
        specialise(kind().eval(), (torch.randn(3),))
    line, words = marked[0]
    assert caught.value.line == f"{__file__}:{line}", str(caught.value)
    if method != "foreign":
        assert words in str(caught.value)


def test_a_function_without_source_is_refused() -> None:
    with pytest.raises(Untraceable, match="no source"):
        lower(torch.relu)


def _program(**changes: Any) -> dict[str, Any]:
    nodes: list[dict[str, Any]] = [
        {"net": 0, "inputs": ["x"], "outputs": [["x", "y"], ["?"]], "test": "?", "next": [0, 1]},
        {"moves": [["x", "z"], ["z", "x"]], "result": {"dict": {"a": {"var": "x"}, "b": {"list": [{"const": None}]}}}},
    ]
    return {
        "arguments": ["x", "z"],
        "sizes": [[], []],
        "kinds": ["int64", "int64"],
        "entry": 0,
        "nodes": nodes,
        **changes,
    }


def test_the_host_loops_moves_and_notes_its_way() -> None:
    host = Host(HostProgram.model_validate(_program()), [lambda values: (values[0] - 1, values[0] > 1)])
    done = Run()
    assert host(3, 9, run=done) == {"a": 9, "b": [None]}  # x and z change places
    assert done.path == [0, 0, 0, 1]
    assert [holds for _, holds in done.decisions] == [True, True, False]
    with pytest.raises(BadInput, match="takes 2 arguments"):
        host(3)


@pytest.mark.parametrize(
    "changes",
    [
        {"entry": 7},
        {"nodes": [{"next": [4]}]},
        {"nodes": [{"test": "x", "next": [0]}]},
        {"files": ["../net.onnx"]},
        {"files": ["net.pt"]},
        {"format": 2},
        {"code": "print()"},
        {"sizes": []},
    ],
)
def test_a_wrong_program_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "program.json").write_text(json.dumps(_program(**changes)))
    with pytest.raises(BadInput, match=r"program\.json"):
        load_host(tmp_path)


def test_files_that_are_not_there_or_no_json(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot read"):
        load_host(tmp_path)
    (tmp_path / "program.json").write_text("{")
    with pytest.raises(BadInput, match="no JSON"):
        load_host(tmp_path)
    (tmp_path / "program.json").write_text(json.dumps(_program()))
    with pytest.raises(BadInput, match="no files for"):
        load_host(tmp_path)
