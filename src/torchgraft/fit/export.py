"""Writing the best model in a form that other runtimes read, compared number by number with the model itself."""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from torchgraft.bench.files import write_atomic
from torchgraft.bench.task import Inputs
from torchgraft.engines.control_flow.execution import Execution
from torchgraft.errors import BadInput, MissingExtra

__all__ = ["export_model"]

#: Largest accepted difference, relative to the largest output: float32 sums in another order.
TOLERANCE = 1e-3


def _spread(example: Inputs) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    return tuple(example), {}


def _tensor(output: object) -> Tensor:
    if isinstance(output, Tensor):
        return output
    found = getattr(output, "logits", None)
    if isinstance(found, Tensor):
        return found
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    raise BadInput(f"export compares tensors, and the model returns {type(output).__name__}")


def _difference(expected: Tensor, found: Tensor) -> float:
    if expected.shape != found.shape:
        raise BadInput(f"the exported model returns shape {tuple(found.shape)}, the model {tuple(expected.shape)}")
    return float((expected - found).abs().max() / expected.abs().max().clamp_min(1e-12))


def _torch_program(model: nn.Module, example: Inputs) -> torch.export.ExportedProgram:
    positional, named = _spread(example)
    return torch.export.export(model, positional, named, strict=False)


def _onnx(model: nn.Module, example: Inputs, path: Path) -> Tensor:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # the exporter needs it
    except ImportError as error:
        raise MissingExtra(error.name or "onnxruntime", "onnx") from None
    positional, named = _spread(example)
    with tempfile.TemporaryDirectory() as scratch:
        written = Path(scratch) / "model.onnx"
        program = torch.onnx.export(
            model, positional, kwargs=named or None, dynamo=True, verbose=False, external_data=False
        )
        if program is None:
            raise BadInput("torch.onnx.export returned nothing")
        program.save(str(written), external_data=False)
        data = written.read_bytes()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    values = [*positional, *named.values()]
    feeds = {spec.name: value.numpy() for spec, value in zip(session.get_inputs(), values, strict=True)}
    found = torch.from_numpy(np.asarray(session.run(None, feeds)[0]))
    write_atomic(path, data)
    return found


def export_model(model: nn.Module, example: Inputs, folder: Path, form: str) -> str:
    """Write ``model.onnx`` or ``model.pt2`` into ``folder`` and return a line that says how well it agrees.

    What is exported computes in the numbers that the model holds, also where its own passes are rounded; they are
    compared without the rounding, and the line says so.

    Args:
        model: the model, in eval mode.
        example: the inputs to trace and compare on.
        folder: where to write.
        form: ``"onnx"`` or ``"torch"``.

    Raises:
        BadInput: the model cannot be exported, or the exported one computes something else.
    """
    model = model.eval()
    standing = model.__dict__.get("forward")
    rounding = standing if isinstance(standing, Execution) and standing.arithmetic is not None else None
    positional, named = _spread(example)
    path = folder / ("model.onnx" if form == "onnx" else "model.pt2")
    quiet = io.StringIO()
    with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(quiet):
        warnings.simplefilter("ignore")
        expected = _tensor((model if rounding is None else rounding.in_own_numbers)(*positional, **named))
        try:
            if form == "onnx":
                found = _onnx(model, example, path)
            else:
                program = _torch_program(model, example)
                found = _tensor(program.module()(*positional, **named))
                buffer = io.BytesIO()
                torch.export.save(program, buffer)
                write_atomic(path, buffer.getvalue())
        except BadInput:
            raise
        except Exception as error:
            raise BadInput(f"the model cannot be exported as {form}: {str(error).strip().splitlines()[0]}") from error
    difference = _difference(expected, found)
    if not difference <= TOLERANCE:
        path.unlink(missing_ok=True)
        raise BadInput(f"the exported model differs by {difference:.1e} of the largest output; it is not kept")
    line = f"exported to {path.name}; largest difference {difference:.1e} of the largest output"
    if rounding is not None:
        line += f" in float32, which it computes in; the model's own passes are {rounding.arithmetic}'s, and faster"
    return line
