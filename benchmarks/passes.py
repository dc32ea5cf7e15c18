"""How a finished model is run: in Python, compiled, and compiled in bfloat16, beside autocast and ``model.bfloat16()``.

Every row is a model of a built-in task, whole or cut in depth and width, timed in paired, interleaved rounds on the
task's own batch. A ratio is the median over rounds of a contender's time over that of the whole model in Python, with
its 95 % bootstrap interval, and is printed only where outputs agree: to 1e-4 of the largest for float32, to 5 % for
bfloat16. Beside it stands what bfloat16 does to the validation score of the same model.

Run: ``python benchmarks/passes.py [--threads N] [--rounds N] [--out results/passes.json]``
"""

from __future__ import annotations

import argparse
import json
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from torchgraft.bench.files import write_atomic
from torchgraft.bench.meters import interleaved, interval
from torchgraft.bench.task import Task, call
from torchgraft.bench.tasks import builtin
from torchgraft.bench.training import evaluate
from torchgraft.catalogue.registry import entry, lookup
from torchgraft.elastic.dycl_compile import CompiledPasses
from torchgraft.engines.control_flow.compiled import difference
from torchgraft.engines.control_flow.narrow import Narrow, narrowed
from torchgraft.shrink.quantize.bfloat16_passes import Bfloat16Passes

TASKS = ("digits-vit", "digits-cnn", "stdlib-bytes", "stdlib-search")
CUTS = (0.0, 0.5, 0.85)
CUTTING = ("chain-of-layers", "rd-layer-adaptive-pruning")
#: Largest difference of a contender's outputs from Python's in float32, relative to the largest output.
AGREE = {"compiled": 1e-4, "autocast": 0.05, "rounded": 0.05, "bfloat16": 0.05}
WORDS = {
    "python": "Python",
    "compiled": "compiled",
    "autocast": "autocast, Python",
    "rounded": "bfloat16, Python",
    "bfloat16": "bfloat16, compiled",
}


class Autocast(nn.Module):
    """A model under ``torch.autocast``; its results in float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        with torch.autocast("cpu", torch.bfloat16):
            return _wide(self.model(*args, **kwargs))


class Rounded(nn.Module):
    """A rounded copy of a model, run by Python."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = narrowed(model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the copy on rounded inputs."""
        return Narrow(self.model)(*args, **kwargs)


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def cut(model: nn.Module, task: Task, strength: float) -> nn.Module:
    """Return ``model`` without layers and units, untrained: only times count here."""
    for key in CUTTING if strength else ():
        model = entry(lookup(key))().apply(model, task, strength)
    return model


def measure(name: str, strength: float, rounds: int) -> dict[str, Any]:
    """Return the ratios of every contender to the whole model in Python, and both scores."""
    task = builtin(name, 0)
    whole = task.trained()
    model = cut(whole, task, strength)
    made = {
        "python": model,
        "compiled": CompiledPasses().apply(model, task, 1.0),
        "autocast": Autocast(model),
        "rounded": Rounded(model),
        "bfloat16": Bfloat16Passes().apply(model, task, 1.0),
    }
    ratios: dict[str, Any] = {}
    with torch.inference_mode():
        expected = call(model, task.example)
        gaps = {key: difference(expected, call(each, task.example)) for key, each in made.items()}
    seconds = interleaved([whole, *made.values()], task.example, rounds=rounds)
    for place, key in enumerate(made, 1):
        if gaps[key] <= AGREE.get(key, 0.0):
            ratio = interval((seconds[:, place] / seconds[:, 0]).tolist())
            ratios[key] = [ratio.value, ratio.low, ratio.high]
    scores = {key: float(evaluate(made[key], task, task.val).mean()) for key in ("python", "bfloat16")}
    return {"ratios": ratios, "gaps": gaps, "scores": scores}


def table(rows: dict[str, Any]) -> Table:
    """Return one line a model, a column a contender."""
    shown = Table("task", "cut", *WORDS.values(), "score", "in bfloat16", title="time of a pass over the whole model's")
    for place, row in rows.items():
        name, _, strength = place.partition("/")
        cells = []
        for key in WORDS:
            found = row["ratios"].get(key)
            cells.append("differs" if found is None else "{:.3f} ({:.3f} to {:.3f})".format(*found))
        shown.add_row(name, strength, *cells, *(f"{row['scores'][key]:.4f}" for key in ("python", "bfloat16")))
    return shown


def main() -> None:
    """Measure all, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("results/passes.json"))
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    rows = {f"{name}/{strength:g}": measure(name, strength, chosen.rounds) for name in TASKS for strength in CUTS}
    record = {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {chosen.threads} thread",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "rounds": chosen.rounds,
        "rows": rows,
    }
    write_atomic(chosen.out, json.dumps(record, indent=1) + "\n")
    Console(width=180).print(table(rows))


if __name__ == "__main__":
    main()
