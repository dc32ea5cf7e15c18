"""Sparse layers beside dense ones: ratios of time with their intervals, printed only where the outputs agree.

    python benchmarks/sparse.py [--sections NAME ...] [--threads N] [--rounds N] [--out results/sparse.json]

Every row is timed in paired rounds: each round calls the dense layer and every sparse one, in turns, and a speed-up is
the median over rounds of the dense time over the sparse one, with its 95 % bootstrap interval. On one thread the time
is the processor's own, which a busy machine distorts less than the clock on the wall. Each sparse output is compared in
the same run with that of a dense layer of the same weights, zeros included. The sections are linear layers over tokens,
1x1 convolutions, whole networks, and what the procedure ``fast-sparse-conv`` makes of these by itself; a run replaces
the sections that it is asked for and leaves the others of the file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paired import ratio, shown
from torchgraft.bench.files import write_atomic
from torchgraft.bench.task import Task
from torchgraft.engines import sparse
from torchgraft.engines.masks import make_permanent
from torchgraft.engines.parametrize import fold
from torchgraft.engines.surgery.edits import apply_edits, history
from torchgraft.shrink.prune.fast_sparse_conv import FastSparseConv, sparsify_pointwise, to_sparse

WIDTHS = (256, 512, 1024, 2048)
COLUMNS = (64, 512, 3136)
SPARSITIES = (0.7, 0.8, 0.9, 0.95, 0.98)
BLOCKS = (1, 4)
#: (channels, side of the image, batch)
IMAGES = ((256, 28, 4), (512, 14, 1), (1024, 14, 1), (512, 7, 16))
#: Largest difference of the outputs over the largest output: float32 sums in another order.
AGREE = 1e-5
#: Where the dense layer itself varies more than this between the quartiles of its rounds, the machine was busy.
STEADY = 1.25
#: A call is repeated in its turn until this many seconds are filled.
ENOUGH = 0.002
SECTIONS = ("linear", "pointwise", "network", "procedure")
Call = Callable[[], Tensor]


def timed(calls: Sequence[Call], count: int) -> list[list[float]]:
    """Return seconds of each call, (rounds, calls), in turns that alternate their order, after a warm-up of each."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    found = []
    for turn in range(-1, count):
        row = [0.0] * len(calls)
        order = range(len(calls)) if turn % 2 == 0 else reversed(range(len(calls)))
        for place in order:
            begun, done = clock(), 0
            while done == 0 or (turn >= 0 and clock() - begun < ENOUGH):
                calls[place]()
                done += 1
            row[place] = (clock() - begun) / done
        found.append(row)
    return found[1:]


def compared(calls: dict[str, Call], count: int) -> dict[str, Any]:
    """Time ``calls``, the first of them the dense one, and return its time and the speed-ups of the others over it."""
    rows = timed(list(calls.values()), count)
    base = sorted(row[0] for row in rows)
    quarter = len(base) // 4
    return {
        "dense_ms": 1e3 * base[len(base) // 2],
        "dense_spread": base[-1 - quarter] / base[quarter],
        "load": os.getloadavg()[0],
        "speed_up": {
            name: [found.value, found.low, found.high]
            for place, name in enumerate(calls)
            if place
            for found in [ratio(rows, 0, place)]
        },
    }


def gap(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest output."""
    return float((found - expected).abs().max() / expected.abs().max())


def layer_row(dense: nn.Linear | nn.Conv2d, x: Tensor, label: str, count: int, *, peers: bool) -> dict[str, Any]:
    """Compare one dense layer with its sparse forms."""
    calls: dict[str, Call] = {"dense": lambda: dense(x)}
    gaps: dict[str, float] = {}
    rows, columns = dense.weight.shape[:2]
    for block in BLOCKS:
        for share in SPARSITIES:
            blocks = sparse.best_blocks(
                sparse.matrix(dense), sparse.kept_blocks(rows, columns, (block, 1), share), (block, 1)
            )
            names = ("auto", "csr") if peers and block == 1 and share in (0.9, 0.95) else ("auto",)
            for backend in names:
                layer = sparse.to_sparse_layer(dense, blocks, block=(block, 1), backend=backend).eval()
                name = f"{share}/{block}" + ("" if backend == "auto" else f" {backend}")
                if isinstance(dense, nn.Linear):
                    expected = F.linear(x, layer.weight, dense.bias)
                else:
                    expected = F.conv2d(x, layer.weight, dense.bias)
                gaps[name] = gap(layer(x), expected)
                calls[name] = lambda layer=layer: layer(x)
    return {"case": label, **compared(calls, count), "gap": gaps}


class MobileBlock(nn.Module):
    """A depthwise 3x3 and a pointwise 1x1 convolution, each with batch norm and ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.depth = nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False)
        self.norm1 = nn.BatchNorm2d(inputs)
        self.point = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm2(self.point(F.relu(self.norm1(self.depth(x))))))


def mobile_net() -> nn.Module:
    """Return MobileNet v1 (224 x 224, 1000 classes), random weights that let a signal through to the outputs."""
    plan = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *(((512, 1),) * 5), (1024, 2), (1024, 1))
    blocks: list[nn.Module] = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    before = 32
    for width, stride in plan:
        blocks.append(MobileBlock(before, width, stride))
        before = width
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1024, 1000, bias=False))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return model


class MlpBlock(nn.Module):
    """A pre-norm residual block of two linear layers, as in a transformer without its attention."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.relu(self.fc1(self.norm(x))))


def mlp_net() -> nn.Module:
    """Return three residual blocks of 1024 x 1024 layers between an input and an output layer."""
    return nn.Sequential(nn.Linear(64, 1024), *(MlpBlock(1024, 1024) for _ in range(3)), nn.Linear(1024, 64))


def network_row(name: str, model: nn.Module, x: Tensor, count: int) -> dict[str, Any]:
    """Compare a dense network with its sparse forms, end to end; first and last layer stay dense."""
    calls: dict[str, Call] = {"dense": lambda: model(x)}
    gaps: dict[str, float] = {}
    for block in BLOCKS:
        for share in (0.8, 0.9, 0.95):
            masked = apply_edits(model, []).eval()
            sparsify_pointwise(masked, share, block=block, linear=True)
            made = to_sparse(masked, block=block).eval()
            key = f"{share}/{block}"
            gaps[key] = gap(made(x), make_permanent(masked)(x))
            calls[key] = lambda made=made: made(x)
    return {"case": name, **compared(calls, count), "gap": gaps}


def procedure_row(name: str, model: nn.Module, x: Tensor, count: int) -> dict[str, Any]:
    """Compare a dense network with what the procedure makes of it, layers left dense where that is faster."""
    target = torch.zeros(len(x), dtype=torch.long)
    task = Task(model, (x, target), (x, target), (x, target), F.cross_entropy, lambda out, t: t.float(), batch_size=1)
    procedure = FastSparseConv()
    calls: dict[str, Call] = {"dense": lambda: model(x)}
    gaps: dict[str, float] = {}
    sparse_layers: dict[str, int] = {}
    for strength in (0.4, 0.65, 0.85):
        made = procedure.apply(model, task, strength).eval()
        key = f"{1 - 0.03**strength:.2f}/4"
        sparse_layers[key] = sum(len(edit.describe()) for edit in history(made))
        with torch.enable_grad():  # the form that trains fills the weights in and multiplies densely
            expected = made(x).detach()
        gaps[key] = gap(made(x), expected)
        calls[key] = lambda made=made: made(x)
    refusals = {refusal.name: refusal.reason for refusal in procedure.refusals(model, task)}
    return {"case": name, **compared(calls, count), "gap": gaps, "sparse_layers": sparse_layers, "left_dense": refusals}


def machine() -> dict[str, Any]:
    """Return what a reader needs to know of the machine."""
    name = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "backends": {"1": sparse.backends_for((1, 1)), "4": sparse.backends_for((4, 1))},
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
    }


def show(record: dict[str, Any]) -> None:
    """Print one row; a speed-up only where the outputs agree."""
    unsteady = " (unsteady: run again)" if record["dense_spread"] > STEADY else ""
    print(f"{record['case']}: dense {record['dense_ms']:.2f} ms{unsteady}")
    for name, speed in record["speed_up"].items():
        found = record.get("gap", {}).get(name, 0.0)
        print(f"    {name:>10}  {shown(speed) if found <= AGREE else f'wrong: differs by {found:.1e}'}", flush=True)
    for name, words in record.get("left_dense", {}).items():
        print(f"    {name}: {words}")


def linear(count: int) -> Iterator[dict[str, Any]]:
    for width in WIDTHS:
        for columns in COLUMNS:
            layer, x = nn.Linear(width, width).eval(), torch.randn(columns, width)
            yield layer_row(layer, x, f"linear {width}x{width}, {columns} columns", count, peers=width == 1024)


def pointwise(count: int) -> Iterator[dict[str, Any]]:
    for channels, side, batch in IMAGES:
        conv, x = nn.Conv2d(channels, channels, 1).eval(), torch.randn(batch, channels, side, side)
        label = f"1x1 convolution {channels}x{channels}, {batch} x {side} x {side} pixels"
        yield layer_row(conv, x, label, count, peers=False)


def plain_net() -> nn.Module:
    """Return six 1024 x 1024 layers with ReLU between an input and an output layer."""
    hidden = [module for _ in range(6) for module in (nn.Linear(1024, 1024), nn.ReLU())]
    return nn.Sequential(nn.Linear(64, 1024), *hidden, nn.Linear(1024, 64))


def networks() -> dict[str, tuple[nn.Module, Tensor]]:
    image = torch.randn(1, 3, 224, 224)
    return {
        "MobileNet v1, batch norms folded, 1 x 224 x 224": (fold(mobile_net().eval(), image), image),
        "MLP of 6 x 1024x1024, 3136 tokens": (plain_net().eval(), torch.randn(1, 3136, 64)),
        "residual MLP with layer norms, 6 x 1024x1024, 3136 tokens": (mlp_net().eval(), torch.randn(1, 3136, 64)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("results/sparse.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    record: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    rows: dict[str, Callable[[int], Iterator[dict[str, Any]]]] = {
        "linear": linear,
        "pointwise": pointwise,
        "network": lambda count: (network_row(name, *given, count) for name, given in networks().items()),
        "procedure": lambda count: (procedure_row(name, *given, count) for name, given in networks().items()),
    }
    for section in options.sections:
        begun = time.perf_counter()
        found: list[dict[str, Any]] = []
        with torch.no_grad():
            for row in rows[section](options.rounds):
                found.append(row)
                show(row)
                seconds = round(time.perf_counter() - begun, 1)
                record[section] = {"machine": machine(), "seconds": seconds, "rows": found}
                write_atomic(options.out, json.dumps(record, indent=1) + "\n")
        print(f"{section}: {seconds:.0f} s; speed-ups over dense with 95 % intervals, by sparsity/rows of a block\n")


if __name__ == "__main__":
    main()
