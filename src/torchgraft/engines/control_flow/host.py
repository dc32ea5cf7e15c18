"""The host program: a small interpreter that runs straight-line networks and decides which one comes next.

A program is plain data, checked before it runs; nothing in it is code. Where its networks are ONNX files
(:func:`load_host`), ONNX Runtime and numpy do all the work.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from torchgraft.bench.files import write_atomic
from torchgraft.errors import BadInput, MissingExtra

__all__ = ["Host", "HostNode", "HostProgram", "Run", "load_host", "onnx_session", "save_host"]

#: Nodes that one call may visit; a loop that never ends stops here.
_MOST = 1_000_000
_FILE = re.compile(r"[A-Za-z0-9_-]+\.onnx")


class HostNode(BaseModel):
    """One node.

    Args:
        net: number of the network that runs here, or ``None``.
        inputs: variables that it takes.
        outputs: for each of its outputs, the variables that it goes to.
        moves: (from, to), copies of what stood there before the network ran.
        test: the variable by which it is decided where to go on.
        next: the next node; of a decision, where it holds and where it does not; none at the end.
        result: at the end, ``{"var": name}``, ``{"const": value}``, or ``{"tuple" | "list" | "dict": parts}``.
        line: ``file:line`` of the source.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    net: int | None = None
    inputs: tuple[str, ...] = ()
    outputs: tuple[tuple[str, ...], ...] = ()
    moves: tuple[tuple[str, str], ...] = ()
    test: str | None = None
    next: tuple[int, ...] = ()
    result: Any = None
    line: str = ""


class HostProgram(BaseModel):
    """A program of nodes.

    Args:
        format: version of this form.
        arguments: variables that hold what the program is called with.
        sizes: the shape of each argument.
        kinds: the element type of each argument, as numpy calls it.
        entry: the node where it begins.
        nodes: the nodes.
        files: the file of each network, or empty.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    arguments: tuple[str, ...]
    sizes: tuple[tuple[int, ...], ...]
    kinds: tuple[str, ...]
    entry: int
    nodes: tuple[HostNode, ...]
    files: tuple[str, ...] = ()

    @field_validator("files")
    @classmethod
    def _files_are_plain_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := [name for name in value if not _FILE.fullmatch(name)]:
            raise ValueError(f"a network's file must be a plain name ending in .onnx, got {wrong[0]!r}")
        return value

    @model_validator(mode="after")
    def _edges_lead_somewhere(self) -> HostProgram:
        places = range(len(self.nodes))
        for node in self.nodes:
            if any(other not in places for other in node.next) or len(node.next) != (
                2 if node.test else len(node.next[:1])
            ):
                raise ValueError(f"a node leads to {node.next}")
            if node.net is not None and self.files and not 0 <= node.net < len(self.files):
                raise ValueError(f"a node names network {node.net}, which is not there")
        if self.entry not in places or not len(self.arguments) == len(self.sizes) == len(self.kinds):
            raise ValueError("entry and arguments do not fit the nodes")
        return self


class Run:
    """What one call did: the nodes that it went through, and the decisions that it made, each with its node."""

    def __init__(self) -> None:
        self.path: list[int] = []
        self.decisions: list[tuple[int, bool]] = []


class Host:
    """Runs a program.

    Args:
        program: what to do.
        nets: for each network, a function from its inputs, in order, to its outputs.

    Example:
        >>> nodes = (HostNode(net=0, inputs=("x",), outputs=(("x",),), test="x", next=(0, 1)),)
        >>> nodes += (HostNode(result={"tuple": [{"var": "x"}, {"const": "done"}]}),)
        >>> program = HostProgram(arguments=("x",), sizes=((),), kinds=("int64",), entry=0, nodes=nodes)
        >>> Host(program, [lambda values: [values[0] - 1]])(3)
        (0, 'done')
    """

    def __init__(self, program: HostProgram, nets: Sequence[Callable[[list[Any]], Sequence[Any]]]) -> None:
        self.program, self.nets = program, list(nets)

    def __call__(self, *values: Any, run: Run | None = None) -> Any:
        """Return what the program returns for ``values``; ``run`` is told the way."""
        program, nets = self.program, self.nets
        if len(values) != len(program.arguments):
            raise BadInput(f"the program takes {len(program.arguments)} arguments, got {len(values)}")
        held: dict[str, Any] = dict(zip(program.arguments, values, strict=True))
        place = program.entry
        for _ in range(_MOST):
            node = program.nodes[place]
            if run is not None:
                run.path.append(place)
            moved = [(to, held[source]) for source, to in node.moves]
            if node.net is not None:
                made = nets[node.net]([held[name] for name in node.inputs])
                for names, value in zip(node.outputs, made, strict=True):
                    for name in names:
                        held[name] = value
            held.update(moved)
            if not node.next:
                return _structured(node.result, held)
            holds = node.test is None or bool(held[node.test])
            if run is not None and node.test is not None:
                run.decisions.append((place, holds))
            place = node.next[0 if holds else 1]
        raise BadInput(f"the program went through {_MOST} nodes without an end")


def _structured(result: Any, held: Mapping[str, Any]) -> Any:
    if "var" in result:
        return held[result["var"]]
    if "const" in result:
        return result["const"]
    if "tuple" in result:
        return tuple(_structured(part, held) for part in result["tuple"])
    if "list" in result:
        return [_structured(part, held) for part in result["list"]]
    return {name: _structured(part, held) for name, part in result["dict"].items()}


def onnx_session(data: bytes, threads: int = 1) -> Callable[[list[Any]], Sequence[Any]]:
    """Return a function from numpy arrays to numpy arrays that runs an ONNX model."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtra(error.name or "onnxruntime", "onnx") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    run = session.run

    def call(values: list[Any]) -> Sequence[Any]:
        found: Sequence[Any] = run(None, dict(zip(names, values, strict=True)))
        return found

    return call


def save_host(program: HostProgram, nets: Sequence[bytes], folder: Path | str) -> None:
    """Write ``program.json`` and one ONNX file a network into ``folder``, the program last."""
    folder = Path(folder)
    named = program.model_copy(update={"files": tuple(f"net_{place}.onnx" for place in range(len(nets)))})
    for name, data in zip(named.files, nets, strict=True):
        write_atomic(folder / name, data)
    write_atomic(folder / "program.json", named.model_dump_json(indent=1) + "\n")


def load_host(folder: Path | str, *, threads: int = 1) -> Host:
    """Return the program in ``folder``, run by ONNX Runtime on numpy arrays.

    Args:
        folder: what :func:`save_host` wrote.
        threads: threads of ONNX Runtime.

    Raises:
        BadInput: a file is missing or is not what it should be.
    """
    folder = Path(folder)
    try:
        program = HostProgram.model_validate(json.loads((folder / "program.json").read_text(encoding="utf-8")))
        data = [(folder / name).read_bytes() for name in program.files]
    except OSError as error:
        raise BadInput(f"cannot read {folder}: {error.strerror or error}") from None
    except ValidationError as error:
        raise BadInput(f"{folder / 'program.json'}: {error.errors()[0]['msg']}") from None
    except ValueError as error:
        raise BadInput(f"{folder / 'program.json'} is no JSON: {error}") from None
    needed = {node.net for node in program.nodes if node.net is not None}
    if needed - set(range(len(data))):
        raise BadInput(f"{folder / 'program.json'} names networks that it has no files for")
    return Host(program, [onnx_session(each, threads) for each in data])
