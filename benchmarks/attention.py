"""Time and memory of the attention engine, beside ``scaled_dot_product_attention``, in one run.

1. Speed: forward at T = 4096, causal (batch 1, 4 heads, K = V = 64) of the point-wise members and of the others, as a
   ratio to the fused kernel's time, and forward and backward likewise. Printed only where the output agrees with the
   same pipeline in float64, written out. The form "flex" has a row where it can be compiled, forward only: its kernel
   for the CPU has no backward pass.
2. Memory: the peak of forward and backward by a child process at 2k to 16k tokens, its exponent, and at 8192 tokens the
   share of what the written-out matrix needs.
3. Windows and axes: time against the number of tokens, with a window of 128, with image tokens attended along axes
   (where the library has such a member), and with a disc around each token (likewise).

Ratios come from interleaved rounds, with the 95 % interval of their median.

Run: ``python benchmarks/attention.py [--threads 1] [--rounds 7] [--sections speed memory linear]``
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from paired import Call, peak_bytes, reset_peak, rounds, shown
from torchgraft.bench.files import write_atomic
from torchgraft.bench.meters.spread import interval
from torchgraft.catalogue import cards
from torchgraft.engines.attention import (
    Gaussian,
    Harmonic,
    Reweighted,
    Window,
    attend,
    exp,
    l1,
    relu,
    sigmoid,
    softplus,
    unnormalized,
)
from torchgraft.engines.recurrence.distance import slopes
from torchgraft.errors import BadInput

mpl.use("Agg")
from matplotlib import pyplot as plt

HEADS, SIZE, LONG = 4, 64, 4096
MEMORY = (2048, 4096, 8192, 16384)
WRITTEN_OUT = 8192
PIPELINES: dict[str, dict[str, Any]] = {
    "sigmoid": {"transform": sigmoid, "normalize": unnormalized},
    "relu": {"transform": relu, "normalize": unnormalized},
    "softplus": {"transform": softplus, "normalize": l1},
    "softplus, re-weighted": {"transform": softplus, "normalize": Reweighted(l1)},
    "gaussian": {"score": Gaussian(), "transform": exp, "normalize": l1},
    "softmax, harmonic positions": {"transform": Harmonic(slopes(HEADS))},
    "softmax by blocks": {"form": "blocks"},
}
#: Beside the same pipeline by blocks; only where torch can compile it.
FLEX: dict[str, dict[str, Any]] = {
    "softmax, harmonic positions, flex": {"transform": Harmonic(slopes(HEADS)), "form": "flex"},
}
POINTWISE = ("sigmoid", "relu", "softplus")
SECTIONS = ("speed", "memory", "linear")


def heads(tokens: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return queries, keys and values."""
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(1, tokens, HEADS, SIZE, generator=draw).to(dtype) for _ in range(3)]


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return causal softmax attention by the fused kernel."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)


def agreement(stages: dict[str, Any], tokens: int = 700) -> float:
    """Return the largest relative difference of output and gradients to the matrix written out in float64."""

    def everything(form: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.requires_grad_() for x in heads(tokens, dtype)]
        out = attend(*leaves, causal=True, **{**stages, "form": form})
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]

    exact = everything("dense", torch.float64)
    if stages.get("form") == "flex":
        with torch.no_grad():
            found = [attend(*heads(tokens), causal=True, **stages)]
    else:
        found = everything("blocks", torch.float32)
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=False))


def compiled() -> dict[str, dict[str, Any]]:
    """Return the rows of FLEX that can be compiled here."""
    found = {}
    for name, stages in FLEX.items():
        try:
            with torch.no_grad():
                attend(*heads(LONG), causal=True, **stages)
        except BadInput as error:
            print(f"{name}: {error}", flush=True)
        else:
            found[name] = stages
    return found


def speed(count: int) -> dict[str, Any]:
    """Measure section 1."""
    given = heads(LONG)
    weight = torch.ones_like(given[2])

    def forward(function: Callable[..., Tensor]) -> Call:
        def call() -> None:
            with torch.no_grad():
                function(*given)

        return call

    def both_ways(function: Callable[..., Tensor]) -> Call:
        leaves = [x.clone().requires_grad_() for x in given]

        def call() -> None:
            torch.autograd.grad(function(*leaves), leaves, weight)

        return call

    once = PIPELINES | compiled()
    found: dict[str, Any] = {name: {"agreement": agreement(stages)} for name, stages in once.items()}
    for what, make, pipelines in (("forward", forward, once), ("forward and backward", both_ways, PIPELINES)):
        functions: list[Callable[..., Tensor]] = [
            fused,
            *(functools.partial(attend, causal=True, **stages) for stages in pipelines.values()),
        ]
        rows = rounds([make(function) for function in functions], count)
        for place, name in enumerate(pipelines, start=1):
            over = interval([row[place] / row[0] for row in rows])
            found[name][what] = [over.value, over.low, over.high]
    return found


def memory_child(name: str, tokens: int, form: str) -> None:
    """Print the peak growth of forward and backward, inputs not counted."""
    torch.set_num_threads(1)

    def once(tokens: int) -> None:
        leaves = [x.requires_grad_() for x in heads(tokens)]
        options = {**PIPELINES[name], "form": form}
        reset_peak()
        before = peak_bytes()
        torch.autograd.grad(attend(*leaves, causal=True, **options).sum(), leaves)
        print(json.dumps({"peak": peak_bytes() - before}))

    once(512)
    once(tokens)


def memory(_: int) -> dict[str, Any]:
    """Measure section 2."""

    def child(name: str, tokens: int, form: str) -> int:
        arguments = [sys.executable, __file__, "--child", name, str(tokens), form]
        done = subprocess.run(arguments, capture_output=True, text=True, check=True)
        return int(json.loads(done.stdout.splitlines()[-1])["peak"])

    found: dict[str, Any] = {}
    for name in PIPELINES:
        peaks = {tokens: child(name, tokens, "blocks") for tokens in MEMORY}
        written = child(name, WRITTEN_OUT, "dense")
        found[name] = {
            "peak": {str(tokens): value for tokens, value in peaks.items()},
            "exponent": math.log(peaks[MEMORY[-1]] / peaks[MEMORY[0]]) / math.log(MEMORY[-1] / MEMORY[0]),
            "share of the matrix": peaks[WRITTEN_OUT] / written,
        }
        print(name, found[name], flush=True)
    return found


def linear(count: int) -> dict[str, Any]:
    """Measure section 3."""
    found: dict[str, Any] = {}
    lengths = (2048, 4096, 8192, 16384)

    def grow(name: str, calls: dict[int, Call]) -> None:
        rows = rounds(list(calls.values()), count)
        sizes = list(calls)
        last = interval([row[-1] / row[0] for row in rows])
        exponent = [math.log(value) / math.log(sizes[-1] / sizes[0]) for value in (last.value, last.low, last.high)]
        found[name] = {"from": sizes[0], "to": sizes[-1], "exponent": exponent}
        print(name, found[name], flush=True)

    for name, stages in PIPELINES.items():
        options = {**stages, "form": "blocks"}

        def windowed(tokens: int, options: dict[str, Any] = options) -> Call:
            given = heads(tokens)

            def call() -> None:
                with torch.no_grad():
                    attend(*given, mask=Window(128), causal=True, **options)

            return call

        grow(f"{name}, window of 128", {tokens: windowed(tokens) for tokens in lengths})
    if "axial-attention" in cards():
        from torchgraft.parts.mixers.axial_attention import AxialAttention

        layer = AxialAttention(64, num_heads=4, axis=2)

        def along(side: int) -> Call:
            x = torch.randn(1, side, 64, 64)

            def call() -> None:
                with torch.no_grad():
                    layer(x)

            return call

        grow("axial, rows of 64", {64 * side: along(side) for side in (32, 64, 128, 256)})
    return found


def tables(record: dict[str, Any]) -> list[Table]:
    """Return the tables of the sections that were measured."""
    made = []
    if "speed" in record:
        table = Table(
            "pipeline", "forward", "forward and backward", "to float64", title=f"time over SDPA's, T={LONG}, causal"
        )
        for name, cell in record["speed"].items():
            agrees = cell["agreement"] < 1e-3
            times = [
                (shown(cell[what]) if agrees else "disagrees") if what in cell else "none"
                for what in ("forward", "forward and backward")
            ]
            table.add_row(name, *times, f"{cell['agreement']:.0e}")
        made.append(table)
    if "memory" in record:
        table = Table("pipeline", "exponent 2k to 16k", "share of the matrix at 8192", title="peak memory, both ways")
        for name, cell in record["memory"].items():
            table.add_row(name, f"{cell['exponent']:.2f}", f"{cell['share of the matrix']:.3f}")
        made.append(table)
    if "linear" in record:
        table = Table("what", "exponent of time")
        for name, cell in record["linear"].items():
            table.add_row(name, shown(cell["exponent"]))
        made.append(table)
    return made


def figure(record: dict[str, Any], path: Path) -> None:
    """Draw time and memory as bars, each beside the line that it should stay under."""
    left, right = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")[1]
    names = list(record["speed"])
    places = range(len(names))
    left.barh(places, [record["speed"][name]["forward"][0] for name in names], color="#4269d0", height=0.6)
    left.axvline(1.0, color="black", lw=1)
    left.axvline(1.5, color="gray", lw=1, ls="--")
    left.set(yticks=list(places), yticklabels=names, xlabel="forward time over the fused kernel's")
    left.invert_yaxis()
    for name, colour in zip(record["memory"], plt.colormaps["tab10"].colors, strict=False):
        peaks = record["memory"][name]["peak"]
        right.plot([int(t) for t in peaks], [value / 2**20 for value in peaks.values()], "o-", label=name, color=colour)
    right.set(xscale="log", yscale="log", xlabel="tokens", ylabel="peak of forward and backward (MiB)")
    right.set_xticks(MEMORY, [f"{tokens // 1024}k" for tokens in MEMORY])
    right.set_yticks((50, 100, 200, 400), ("50", "100", "200", "400"))
    right.minorticks_off()
    right.legend(frameon=False, fontsize=7)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    for suffix in (".png", ".svg"):
        plt.savefig(path.with_suffix(suffix), dpi=150)
    plt.close()


def main() -> None:
    """Measure what was asked for, keep the record, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sections", nargs="+", default=SECTIONS, choices=SECTIONS)
    parser.add_argument("--out", type=Path, default=Path("results/attention.json"))
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        memory_child(chosen.child[0], int(chosen.child[1]), chosen.child[2])
        return
    torch.set_num_threads(chosen.threads)
    record: dict[str, Any] = json.loads(chosen.out.read_text()) if chosen.out.exists() else {}
    sections: dict[str, Callable[[int], dict[str, Any]]] = {"speed": speed, "memory": memory, "linear": linear}
    for name in chosen.sections:
        record[name] = sections[name](chosen.rounds)
        record.setdefault("threads", {})[name] = chosen.threads
        record["machine"] = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
        record["torch"] = torch.__version__
        write_atomic(chosen.out, json.dumps(record, indent=1) + "\n")
    for table in tables(record):
        Console(width=120).print(table)
    if "speed" in record and "memory" in record:
        figure(record, chosen.out)


if __name__ == "__main__":
    main()
