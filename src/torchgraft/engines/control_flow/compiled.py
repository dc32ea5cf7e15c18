"""A network with data-dependent control flow as straight-line networks, each compiled, and a host that decides."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from torchgraft.bench.files import write_atomic
from torchgraft.bench.meters.forward import resting
from torchgraft.engines.control_flow.fused import fused
from torchgraft.engines.control_flow.graphs import TEST, Flow, computes, network, signature
from torchgraft.engines.control_flow.host import Host, HostNode, HostProgram, Run, onnx_session, save_host
from torchgraft.engines.surgery.trace import quiet
from torchgraft.errors import BadInput, MissingExtra

__all__ = ["BACKENDS", "Backend", "CompiledDynamic", "difference", "onnx_bytes"]

Backend = Literal["export", "trace", "fused", "onnx", "eager"]
BACKENDS: tuple[Backend, ...] = ("export", "trace", "fused", "onnx", "eager")


def onnx_bytes(module: nn.Module, example: tuple[Tensor, ...]) -> bytes:
    """Return a straight-line network as an ONNX model."""
    try:
        import onnxruntime  # noqa: F401  # it will run the model
        import onnxscript  # noqa: F401  # the exporter needs it
    except ImportError as error:
        raise MissingExtra(error.name or "onnxruntime", "onnx") from None
    with quiet(), torch.no_grad():
        program = torch.onnx.export(module, example, dynamo=True, verbose=False, external_data=False)
    if program is None:
        raise BadInput("torch.onnx.export returned nothing")
    data: bytes = program.model_proto.SerializeToString()
    return data


class _Decisions(TorchFunctionMode):
    """Note every truth value that a tensor is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bool] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.Tensor.__bool__:
            self.seen.append(found)
        return found


class CompiledDynamic(nn.Module):
    """A host program and its straight-line sub-networks; called like the original, on inputs of the example's sizes.

    Args:
        model: the original, kept for :meth:`verify`.
        example: its arguments.
        flow: the control-flow graph.
        backend: how sub-networks run.
    """

    original: nn.Module

    def __init__(self, model: nn.Module, example: tuple[Tensor, ...], flow: Flow, backend: Backend) -> None:
        super().__init__()
        self.__dict__["original"] = model  # not a part of the compiled module
        self.flow, self.backend = flow, backend
        self.subgraphs: list[fx.GraphModule] = []
        self.examples: list[tuple[Tensor, ...]] = []
        known: dict[Any, int] = {}
        nodes = []
        for node in flow.nodes:
            module, outputs, moves = network(node)
            number = None
            if computes(node):
                number = known.setdefault(signature(node), len(self.subgraphs))
                if number == len(self.subgraphs):
                    self.subgraphs.append(module)
                    # Copies: torch.export takes one tensor given twice for one argument.
                    self.examples.append(tuple(node.example[name].clone() for name in node.inputs))
            nodes.append(
                HostNode(
                    net=number,
                    inputs=tuple(node.inputs) if number is not None else (),
                    outputs=tuple(map(tuple, outputs)),
                    moves=tuple(moves),
                    test=TEST if node.test else None,
                    next=tuple(node.following),
                    result=node.result,
                    line=node.line,
                )
            )
        self.program = HostProgram(
            arguments=flow.arguments,
            sizes=tuple(tuple(each.shape) for each in example),
            kinds=tuple(str(each.dtype).removeprefix("torch.") for each in example),
            entry=flow.entry,
            nodes=tuple(nodes),
        )
        self._kinds = tuple(each.dtype for each in example)
        self._onnx: list[bytes] = []
        self.host = Host(self.program, self._compiled(backend))
        self._edges: set[tuple[int, int]] = set()
        self.eval()

    def _compiled(self, backend: Backend) -> list[Callable[[list[Any]], Sequence[Any]]]:
        nets: list[Callable[[list[Any]], Sequence[Any]]] = []
        for module, example in zip(self.subgraphs, self.examples, strict=True):
            try:
                if backend == "onnx":
                    self._onnx.append(onnx_bytes(module, example))
                    nets.append(onnx_session(self._onnx[-1], torch.get_num_threads()))
                    continue
                compiled: Any = module
                if backend == "export":
                    with quiet(), torch.no_grad():
                        compiled = torch.export.export(module, example, strict=False).module()
                elif backend == "fused":
                    compiled = fused(module, example)
                elif backend == "trace":
                    with quiet(), torch.no_grad():
                        trace: Any = torch.jit.trace
                        compiled = trace(module, example, check_trace=False)
            except BadInput:
                raise
            except Exception as error:
                why = str(error).splitlines()[0]
                raise BadInput(f"backend {backend!r} cannot compile a sub-network: {why}") from error
            nets.append(lambda values, run=compiled: run(*values))  # type: ignore[misc]  # bound now
        return nets

    def forward(self, *inputs: Tensor) -> Any:
        """Run the program."""
        return self.run(*inputs)[0]

    def run(self, *inputs: Tensor) -> tuple[Any, Run]:
        """Return the output and what was done: nodes gone through, decisions made.

        Raises:
            BadInput: inputs are not of the sizes and types of the example.
        """
        sizes = tuple(tuple(each.shape) for each in inputs)
        if sizes != self.program.sizes:
            raise BadInput(f"inputs must have the sizes {self.program.sizes} that were compiled, got {sizes}")
        kinds = tuple(each.dtype for each in inputs)
        if kinds != self._kinds:
            raise BadInput(f"inputs must be {self._kinds}, got {kinds}")
        done = Run()
        with torch.no_grad():
            if self.backend == "onnx":
                found = _tensors(self.host(*(each.detach().cpu().numpy() for each in inputs), run=done))
            else:
                found = self.host(*inputs, run=done)
        self._edges.update(zip(done.path, done.path[1:], strict=False))
        return found, done

    def verify(self, inputs: Iterable[Tensor | tuple[Tensor, ...]], *, tolerance: float = 1e-5) -> dict[str, float]:
        """Run the original beside the program and return what differs.

        Args:
            inputs: the arguments of each call.
            tolerance: largest accepted difference, relative to the largest output but 1 at least.

        Returns:
            ``calls``; ``mismatches``, calls whose output differs by more or in form; ``decisions``, calls whose
            decisions on tensors differ (those on Python numbers are not seen in the original); ``largest``, the largest
            relative difference.
        """
        calls = mismatches = decisions = 0
        largest = 0.0
        with resting(self.original), torch.no_grad():
            for each in inputs:
                given = (each,) if isinstance(each, Tensor) else tuple(each)
                with _Decisions() as noted:
                    expected = self.original(*given)
                found, done = self.run(*given)
                gap = difference(expected, found)
                calls, largest = calls + 1, max(largest, gap)
                mismatches += not gap <= tolerance
                ours = [holds for place, holds in done.decisions if not self.flow.nodes[place].number]
                decisions += noted.seen != ours
        return {"calls": calls, "mismatches": mismatches, "decisions": decisions, "largest": largest}

    def coverage(self) -> dict[str, Any]:
        """Return how many edges of the graph calls have taken so far, and the lines after which one was not."""
        edges = self.flow.edges()
        missed = [edge for edge in edges if edge not in self._edges]
        return {
            "nodes": len(self.flow.nodes),
            "subgraphs": len(self.subgraphs),
            "edges": len(edges),
            "taken": len(edges) - len(missed),
            "missed": sorted({self.flow.nodes[place].line for place, _ in missed}),
        }

    def save(self, folder: Path | str) -> None:
        """Write the program as JSON and ONNX files, which :func:`load_host` runs by ONNX Runtime on numpy arrays.

        Programs of the backend ``"export"`` are also written as ``net_K.pt2``, for ``torch.export.load``.
        """
        folder = Path(folder)
        nets = zip(self.subgraphs, self.examples, strict=True)
        data = self._onnx or [onnx_bytes(module, example) for module, example in nets]
        if self.backend == "export":
            for place, (module, example) in enumerate(zip(self.subgraphs, self.examples, strict=True)):
                buffer = io.BytesIO()
                with quiet(), torch.no_grad():
                    torch.export.save(torch.export.export(module, example, strict=False), buffer)
                write_atomic(folder / f"net_{place}.pt2", buffer.getvalue())
        save_host(self.program, data, folder)


def _tensors(value: Any) -> Any:
    """Return a result of ONNX Runtime with tensors for arrays."""
    if isinstance(value, tuple | list):
        parts = [_tensors(each) for each in value]
        return parts if isinstance(value, list) else tuple(parts)
    if isinstance(value, dict):
        return {name: _tensors(each) for name, each in value.items()}
    return torch.from_numpy(value) if hasattr(value, "__array__") and not isinstance(value, Tensor) else value


def difference(expected: Any, found: Any) -> float:
    """Return the largest relative difference of two results; infinity where they differ in form."""
    if isinstance(expected, Tensor):
        if not isinstance(found, Tensor) or expected.shape != found.shape:
            return float("inf")
        if not expected.numel() or torch.equal(expected, found):
            return 0.0
        wide, other = expected.detach().double(), found.detach().double()
        gaps = torch.where(wide == other, 0.0, (wide - other).abs())  # entries may both be infinite
        gap = gaps.max() / torch.where(wide.isfinite(), wide.abs(), 0.0).max().clamp_min(1.0)
        return float(gap) if bool(torch.isfinite(gap)) else float("inf")
    if isinstance(expected, tuple | list | dict):
        if not isinstance(found, tuple | list | dict) or len(expected) != len(found):
            return float("inf")
        keys = expected if isinstance(expected, dict) else range(len(expected))
        return max((difference(expected[key], found[key]) for key in keys), default=0.0)
    if isinstance(found, Tensor) and found.numel() == 1:
        found = found.item()  # a number that was computed out of tensors
    return 0.0 if expected == found else float("inf")
