"""Recurrent cells beside torch's own: one table of measured ratios, printed only where outputs and gradients agree.

    python benchmarks/cells.py [--threads N] [--rounds N] [--tokens N] [--hidden N] [--out results/cells.json]

A round runs forward and backward of every contender once, in an order drawn anew; a ratio is the median over rounds of
the time of torch's dense layer over the contender's, with its 95 % bootstrap interval. Input, hidden size and input
projection are the same for all. The dense cell is held against torch's layer with the same weights, outputs and all
gradients; the head-wise one, of which torch has no counterpart, against the same cell written as a loop of steps.

Contenders: ``dense`` and ``head-wise`` are what ``run_cell`` chooses by itself; ``fused`` is the hand-written backward
pass even where it would choose oneDNN's kernel, which is the one behind ``torch.nn.LSTM``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from torchgraft.bench.files import write_atomic
from torchgraft.bench.meters import interval
from torchgraft.engines.recurrence.cells import GATES, Form, from_torch, run_cell

HEADS = 4
#: Largest difference from the reference, over the largest value of the reference.
TOLERANCE = 1e-3
#: Where torch itself varies more than this between rounds, the machine was busy and the row should be run again.
STEADY = 1.5
Run = Callable[[], "tuple[Tensor, ...]"]


def differ(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Return the largest relative difference of any tensor."""
    worst = [
        float(((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).detach())
        for a, b in zip(found, expected, strict=True)
    ]
    return max(worst)


def ours(leaves: list[Tensor], cell: str, push: Tensor, form: Form, tokens: int | None = None) -> Run:
    """Return forward and backward of our cell on ``leaves`` (x, weight, bias, R and, for the GRU, a bias)."""
    x, weight, bias, recurrent, *side = leaves
    piece = x if tokens is None else x[:, :tokens]

    def run() -> tuple[Tensor, ...]:
        y, _ = run_cell(piece, weight, bias, recurrent, cell=cell, recurrent_bias=side[0] if side else None, form=form)  # type: ignore[arg-type]  # one of GATES
        y = y.flatten(-2)
        return y, *torch.autograd.grad(y, leaves, push[:, : y.shape[1]])

    return run


def row(kind: type[nn.RNN | nn.GRU | nn.LSTM], batch: int, tokens: int, hidden: int, rounds: int) -> dict[str, Any]:
    """Time torch's layer and ours, and compare them."""
    torch.manual_seed(0)
    rnn = kind(hidden, hidden, batch_first=True)
    x, push = torch.randn(batch, tokens, hidden, requires_grad=True), torch.randn(batch, tokens, hidden)
    cell, *tensors = from_torch(rnn)
    dense = [x, *(each.detach().clone().requires_grad_() for each in tensors if isinstance(each, Tensor))]
    size = hidden // HEADS
    heads = [*dense[:3], (torch.randn(HEADS, len(GATES[cell]), size, size) * size**-0.5).requires_grad_()]
    if cell == "gru":
        heads.append(torch.zeros(HEADS, size, requires_grad=True))

    def theirs() -> tuple[Tensor, ...]:
        y, _ = rnn(x)
        return y, *torch.autograd.grad(y, [x, *rnn.parameters()], push)

    runs: dict[str, Run] = {
        "torch": theirs,
        "dense": ours(dense, cell, push, "auto"),
        "head-wise": ours(heads, cell, push, "auto"),
    }
    if cell == "lstm":
        runs["dense fused"] = ours(dense, cell, push, "fused")
        runs["head-wise fused"] = ours(heads, cell, push, "fused")
    expected = theirs()
    mapped = from_torch(with_gradients(rnn, expected[2:]))
    # gradients of weight and R, in our order; those of the biases are sums of the same terms
    reference = (expected[0], expected[1], mapped[1], mapped[3])
    record: dict[str, Any] = {"cell": cell, "batch": batch, "tokens": tokens, "hidden": hidden, "differ": {}}
    short = min(tokens, 64)
    for name in list(runs)[1:]:
        if name.startswith("dense"):
            y, dx, dw, _, dr, *_ = runs[name]()
            record["differ"][name] = differ((y, dx, dw, dr), reference)
        else:
            form: Form = "fused" if name.endswith("fused") else "auto"
            record["differ"][name] = differ(
                ours(heads, cell, push, form, short)(), ours(heads, cell, push, "step", short)()
            )
    seconds = np.zeros((rounds, len(runs)))
    order = np.random.default_rng(0)
    functions = list(runs.values())
    for take in range(-1, rounds):  # the first is for warming up
        for column in order.permutation(len(functions)):
            begun = time.perf_counter()
            functions[column]()
            if take >= 0:
                seconds[take, column] = time.perf_counter() - begun
    record["torch_ms"] = float(np.median(seconds[:, 0])) * 1e3
    record["torch_spread"] = float(seconds[:, 0].max() / seconds[:, 0].min())
    record["load"] = os.getloadavg()[0]
    record["ratio"] = {}
    for column, name in enumerate(runs):
        if column:
            spread = interval((seconds[:, 0] / seconds[:, column]).tolist())
            record["ratio"][name] = [spread.value, spread.low, spread.high]
    return record


def with_gradients(rnn: nn.RNN | nn.GRU | nn.LSTM, gradients: tuple[Tensor, ...]) -> nn.RNN | nn.GRU | nn.LSTM:
    """Return a layer whose weights are ``gradients``, so that they are put in our order like weights."""
    holder = type(rnn)(rnn.input_size, rnn.hidden_size)
    with torch.no_grad():
        for parameter, gradient in zip(holder.parameters(), gradients, strict=True):
            parameter.copy_(gradient)
    return holder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("results/cells.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console(width=140)
    records = []
    for kind in (nn.RNN, nn.GRU, nn.LSTM):
        for batch in (1, 8):
            records.append(row(kind, batch, options.tokens, options.hidden, options.rounds))
            console.print(f"[dim]{kind.__name__}, batch {batch} done[/dim]")
    about = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "heads": HEADS,
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
    }
    write_atomic(options.out, json.dumps({"machine": about, "rows": records}, indent=1) + "\n")
    names = ["dense", "head-wise", "dense fused", "head-wise fused"]
    table = Table(
        title=f"times faster than torch's dense layer, forward and backward, hidden {options.hidden}, "
        f"{options.tokens} tokens, {about['threads']} threads"
    )
    for column in ("cell", "batch", "torch ms", *names):
        table.add_column(column, justify="left" if column == "cell" else "right")
    for record in records:
        unsteady = "\n[red]unsteady[/red]" if record["torch_spread"] > STEADY else ""
        cells = [record["cell"], str(record["batch"]), f"{record['torch_ms']:.0f}{unsteady}"]
        for name in names:
            if name not in record["ratio"]:
                cells.append("as chosen")
            elif not record["differ"][name] <= TOLERANCE:
                cells.append(f"[red]wrong by {record['differ'][name]:.0e}[/red]")
            else:
                value, low, high = record["ratio"][name]
                cells.append(f"{value:.2f}x ({low:.2f} to {high:.2f})")
        table.add_row(*cells)
    console.print(table)
    console.print(
        f"95 % interval; no ratio where outputs or gradients differ by more than {TOLERANCE:g} of the largest value. "
        f"Head-wise has {HEADS} heads and torch's dense layer as its base."
    )


if __name__ == "__main__":
    main()
