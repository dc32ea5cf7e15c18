"""Time and memory of the recurrences and of every mixer, beside causal softmax attention, in one run.

1. The engine, by transition: forward and backward over T, as a ratio to ``scaled_dot_product_attention`` on the same
   shapes (batch 1, 4 heads, K = V = 64), the share of this machine's own rate of 64 x 64 products on the transition's
   arithmetic (chunk 64; the forward pass counted three times), growth from 8k to 32k, and the length from which it is
   faster. The delta rule beside its own loop over tokens. Outputs are compared with the float64 loop in the same run.
2. One generated token at position 16k beside one at position 64.
3. Peak resident memory of forward and backward at 32k, by a child process, beside its inputs, outputs and gradients.
4. Every mixer of the catalogue as a module (width 256): forward and backward, and a step, beside softmax attention.

Ratios come from interleaved rounds, with the 95 % interval of their median. Times of a shared machine mean nothing and
are not printed.

Run: ``python benchmarks/mixers.py [--threads 2] [--rounds 7] [--sections engine step memory modules]``
"""

from __future__ import annotations

import argparse
import json
import math
import os
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

from paired import Call, peak_bytes, ratio, reset_peak, rounds, shown
from torchgraft.bench.files import write_atomic
from torchgraft.bench.meters.spread import interval
from torchgraft.catalogue import cards
from torchgraft.catalogue.registry import entry
from torchgraft.engines.recurrence.linear import linear_recurrence, with_state
from torchgraft.engines.recurrence.mixer import Mixer, StatefulMixer

mpl.use("Agg")
from matplotlib import pyplot as plt

HEADS, SIZE = 4, 64
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
LONGEST_SOFTMAX = 8192
LOOP = 4096
SECTIONS = ("engine", "step", "memory", "modules")


def rate(count: int = 200) -> float:
    """Return the best of several medians of multiply-adds a second of batched 64 x 64 products in cache."""
    a, b = torch.randn(32, 64, 64), torch.randn(32, 64, 64)
    out = torch.empty_like(a)
    best = 0.0

    def product() -> None:
        torch.bmm(a, b, out=out)

    for _ in range(3):
        seconds = sorted(row[0] for row in rounds([product], count))[count // 2]
        best = max(best, 2 * 32 * 64**3 / seconds)
    return best


def transitions(tokens: int, dtype: torch.dtype = torch.float32) -> dict[str, dict[str, Tensor]]:
    """Return the inputs of every transition."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, tokens, HEADS, *shape, generator=draw)

    q, k, v = normal(SIZE), F.normalize(normal(SIZE), dim=-1), normal(SIZE)
    per_head = torch.log1p(-(2.0 ** (-5.0 - torch.arange(HEADS))))
    per_token, per_channel, beta = F.logsigmoid(normal()), F.logsigmoid(normal(SIZE)) / 16, normal().sigmoid()
    extra: dict[str, dict[str, Tensor]] = {
        "no decay": {},
        "fixed decay a head": {"log_decay": per_head},
        "decay a head": {"log_decay": per_token},
        "decay a channel": {"log_decay": per_channel},
        "delta rule": {"beta": beta},
        "delta rule, decay a head": {"beta": beta, "log_decay": per_token},
        "delta rule, decay a channel": {"beta": beta, "log_decay": per_channel},
    }
    return {
        name: {key: x.to(dtype) for key, x in {"q": q, "k": k, "v": v, **rest}.items()} for name, rest in extra.items()
    }


def arithmetic(tokens: int, delta: bool) -> float:
    """Return the multiply-adds (two operations each) of forward, times three: the products of chunks of 64."""
    each = 64 * 2 * SIZE + 2 * SIZE * SIZE
    if delta:
        each += 64 * 3 * SIZE + 64 * 64 // 3 + SIZE * SIZE
    return 3.0 * 2 * tokens * HEADS * each


def both_ways(inputs: dict[str, Tensor], run: Callable[..., Tensor]) -> Call:
    """Return a call of forward and backward."""
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    weight = torch.randn(inputs["v"].shape, generator=torch.Generator().manual_seed(1), dtype=inputs["v"].dtype)

    def call() -> None:
        torch.autograd.grad(run(**leaves), list(leaves.values()), weight)

    return call


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return causal softmax attention on (B, T, H, K)."""
    heads = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)


def agreement(name: str, tokens: int = 300) -> float:
    """Return the largest relative difference of outputs and gradients to the float64 loop."""

    def everything(form: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = {key: x.requires_grad_() for key, x in transitions(tokens, dtype)[name].items()}
        output = linear_recurrence(**leaves, form=form)  # type: ignore[arg-type]
        weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(dtype)  # type: ignore[union-attr]
        return [output.detach(), *torch.autograd.grad((output * weight).sum(), list(leaves.values()))]  # type: ignore[union-attr,operator]

    pairs = zip(everything("chunk", torch.float32), everything("step", torch.float64), strict=True)
    return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)


def engine(count: int) -> dict[str, Any]:
    """Measure section 1."""
    found: dict[str, Any] = {"agreement": {name: agreement(name) for name in transitions(1)}, "lengths": {}}
    for tokens in LENGTHS:
        inputs = transitions(tokens)
        calls = [both_ways(given, lambda **x: linear_recurrence(**x)) for given in inputs.values()]  # type: ignore[misc,return-value]
        names = list(inputs)
        if tokens <= LONGEST_SOFTMAX:
            calls.append(both_ways({key: inputs["no decay"][key] for key in "qkv"}, softmax))
        machine = rate()
        rows = rounds(calls, count if tokens < LENGTHS[-1] else max(count // 2, 3))
        cell: dict[str, Any] = {"rate": machine, "seconds": {}, "share": {}, "softmax over it": {}}
        for place, name in enumerate(names):
            seconds = interval([row[place] for row in rows])
            cell["seconds"][name] = seconds.value
            cell["share"][name] = arithmetic(tokens, "delta" in name) / seconds.value / machine
            if tokens <= LONGEST_SOFTMAX:
                over = ratio(rows, len(names), place)
                cell["softmax over it"][name] = [over.value, over.low, over.high]
        if tokens <= LONGEST_SOFTMAX:
            cell["seconds"]["softmax"] = interval([row[-1] for row in rows]).value
        found["lengths"][str(tokens)] = cell
        print(f"T={tokens}:", {name: round(value, 2) for name, value in cell["share"].items()}, flush=True)
    seconds = {name: {t: c["seconds"][name] for t, c in found["lengths"].items()} for name in names}
    found["time(32k) / time(8k)"] = {name: each["32768"] / each["8192"] for name, each in seconds.items()}
    given = transitions(LOOP)["delta rule"]
    chunked = both_ways(given, lambda **x: linear_recurrence(**x))  # type: ignore[misc,return-value]
    looped = both_ways(given, lambda **x: linear_recurrence(**x, form="step"))  # type: ignore[misc,return-value]
    over = ratio(rounds([looped, chunked], 3), 0, 1)
    found["delta loop over chunks"] = [over.value, over.low, over.high]
    half = {name: x.bfloat16() for name, x in transitions(LOOP)["decay a channel"].items()}
    narrow = both_ways(half, lambda **x: linear_recurrence(**x))  # type: ignore[misc,return-value]
    wide = both_ways(transitions(LOOP)["decay a channel"], lambda **x: linear_recurrence(**x))  # type: ignore[misc,return-value]
    over = ratio(rounds([wide, narrow], count), 0, 1)
    found["float32 over bfloat16"] = [over.value, over.low, over.high]
    return found


def step(count: int) -> dict[str, Any]:
    """Measure section 2: the time of one token at a late position over that at an early one."""
    found = {}
    for name, given in transitions(16384).items():
        _, early = with_state(**{key: x[:, :64] if x.ndim > 1 else x for key, x in given.items()})
        _, late = with_state(**given)
        one = {key: x[:, :1] if x.ndim > 1 else x for key, x in given.items()}

        def repeated(state: Tensor, one: dict[str, Tensor] = one) -> Call:
            def call() -> None:
                for _ in range(50):
                    with_state(**one, state=state)

            return call

        with torch.no_grad():
            over = ratio(rounds([repeated(late), repeated(early)], 4 * count), 0, 1)
        found[name] = [over.value, over.low, over.high]
    return found


def memory_child(name: str, tokens: int) -> None:
    """Print the peak growth of forward and backward, and the bytes of inputs, outputs and gradients."""
    torch.set_num_threads(1)
    both_ways(transitions(256)[name], lambda **x: linear_recurrence(**x))()  # type: ignore[misc,return-value]
    given = transitions(tokens)[name]
    leaves = {key: x.requires_grad_() for key, x in given.items()}
    weight = torch.ones_like(given["v"])
    held = sum(x.nbytes for x in [*leaves.values(), weight])
    reset_peak()
    before = peak_bytes()
    output = linear_recurrence(**leaves)
    gradients = torch.autograd.grad(output, list(leaves.values()), weight)  # type: ignore[arg-type]
    own = sum(x.nbytes for x in [output, *gradients])  # type: ignore[union-attr]
    print(json.dumps({"peak": peak_bytes() - before + held, "tensors": held + own}))


def memory(_: int) -> dict[str, Any]:
    """Measure section 3."""
    found: dict[str, Any] = {}
    for name in transitions(1):
        found[name] = {}
        for tokens in (8192, 32768):
            arguments = [sys.executable, __file__, "--child", name, str(tokens)]
            done = subprocess.run(arguments, capture_output=True, text=True, check=True)
            seen = json.loads(done.stdout)
            found[name][str(tokens)] = {**seen, "ratio": seen["peak"] / seen["tensors"]}
        first, last = (found[name][t]["peak"] for t in ("8192", "32768"))
        found[name]["exponent"] = math.log(last / first) / math.log(4)
    return found


def modules(count: int) -> dict[str, Any]:
    """Measure section 4: every mixer of the catalogue at width 256, T = 1024 and one step."""
    width, tokens = 256, 1024
    x = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(0))

    def trained(mixer: Mixer) -> Call:
        def call() -> None:
            given = x.clone().requires_grad_()
            torch.autograd.grad(mixer(given).sum(), [given, *(p for p in mixer.parameters())], allow_unused=True)

        return call

    def stepped(mixer: StatefulMixer) -> Call:
        _, state = mixer.prefill(x)

        def call() -> None:
            for _ in range(20):
                mixer.step(x[:, 0], state)

        return call

    found: dict[str, Any] = {}
    keys = [key for key, card in cards().items() if card.family == "parts/mixers" and card.kind == "part"]
    baseline = entry(cards()["softmax-attention"])(width)
    for key in keys:
        card = cards()[key]
        try:
            mixer = entry(card)(width)
            over = ratio(rounds([trained(mixer), trained(baseline)], count), 0, 1)
            found[key] = {
                "parameters": sum(p.numel() for p in mixer.parameters()),
                "training over softmax": [over.value, over.low, over.high],
            }
            if isinstance(mixer, StatefulMixer):
                with torch.no_grad():
                    over = ratio(rounds([stepped(mixer), stepped(baseline)], 2 * count), 0, 1)
                    state = mixer.prefill(x)[1]
                found[key]["step over softmax"] = [over.value, over.low, over.high]
                found[key]["state bytes"] = sum(part.nbytes for part in state.values())
        except (ValueError, RuntimeError) as error:
            found[key] = {"not measured": str(error).splitlines()[0]}
        print(key, found[key], flush=True)
    return found


def tables(record: dict[str, Any]) -> list[Table]:
    """Return the tables of the sections that were measured."""
    made = []
    if "engine" in record:
        lengths = record["engine"]["lengths"]
        table = Table("T", *record["engine"]["agreement"], title="softmax attention's time over its own")
        for tokens, cell in lengths.items():
            if cell["softmax over it"]:
                table.add_row(tokens, *(shown(each) for each in cell["softmax over it"].values()))
        made.append(table)
        table = Table("T", *record["engine"]["agreement"], title="share of the rate of 64 x 64 products")
        for tokens, cell in lengths.items():
            table.add_row(tokens, *(f"{each:.0%}" for each in cell["share"].values()))
        growth = record["engine"]["time(32k) / time(8k)"]
        table.add_row("t(32k)/t(8k)", *(f"{each:.2f}" for each in growth.values()))
        table.add_row("to float64", *(f"{each:.0e}" for each in record["engine"]["agreement"].values()))
        made.append(table)
    if "memory" in record:
        table = Table("transition", "peak over tensors at 32k", "exponent", title="memory of forward and backward")
        for name, cell in record["memory"].items():
            table.add_row(name, f"{cell['32768']['ratio']:.2f}", f"{cell['exponent']:.2f}")
        made.append(table)
    if "step" in record:
        table = Table("transition", "a token at 16k over one at 64")
        for name, value in record["step"].items():
            table.add_row(name, shown(value))
        made.append(table)
    if "modules" in record:
        table = Table("mixer", "parameters", "training over softmax's", "step over softmax's", "state bytes")
        for key, cell in record["modules"].items():
            if "not measured" in cell:
                table.add_row(key, cell["not measured"])
                continue
            stepped = shown(cell["step over softmax"]) if "step over softmax" in cell else "-"
            sizes = (f"{cell['parameters']:,}", f"{cell['state bytes']:,}" if "state bytes" in cell else "-")
            table.add_row(key, sizes[0], shown(cell["training over softmax"]), stepped, sizes[1])
        made.append(table)
    return made


def figure(record: dict[str, Any], folder: Path) -> None:
    """Draw time over length and the share of the machine's rate."""
    lengths = record["engine"]["lengths"]
    drawn, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    names = [*record["engine"]["agreement"], "softmax"]
    start = lengths["128"]["seconds"]["no decay"]
    for place, name in enumerate(names):
        points = [(int(t), c["seconds"][name] / start) for t, c in lengths.items() if name in c["seconds"]]
        style = {"color": "black", "linestyle": "--"} if name == "softmax" else {"color": f"C{place}"}
        left.loglog(*zip(*points, strict=True), marker="o", markersize=3, label=name, **style)
        if name != "softmax":
            shares = [(int(t), c["share"][name]) for t, c in lengths.items()]
            right.semilogx(*zip(*shares, strict=True), marker="o", markersize=3, color=f"C{place}")
    left.set(xlabel="tokens", ylabel="time of forward + backward (no decay at 128 = 1)")
    right.set(xlabel="tokens", ylabel="share of the rate of 64 x 64 products", ylim=(0, None))
    left.legend(fontsize=7, frameon=False)
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for suffix in ("png", "svg"):
        drawn.savefig(folder / f"mixers.{suffix}", dpi=150)
    plt.close(drawn)


def main() -> None:
    """Measure, keep and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sections", nargs="+", default=SECTIONS, choices=SECTIONS)
    parser.add_argument("--out", type=Path, default=Path("results/mixers.json"))
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        memory_child(chosen.child[0], int(chosen.child[1]))
        return
    torch.set_num_threads(chosen.threads)
    record = json.loads(chosen.out.read_text()) if chosen.out.exists() else {}
    record |= {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "torch": torch.__version__}
    for section in chosen.sections:
        record[section] = globals()[section](chosen.rounds)
        record.setdefault("threads", {})[section] = 1 if section == "memory" else chosen.threads
        write_atomic(chosen.out, json.dumps(record, indent=1) + "\n")
    console = Console(width=200)
    for table in tables(record):
        console.print(table)
    if "engine" in record:
        figure(record, chosen.out.parent)
        print({key: record["engine"][key] for key in ("delta loop over chunks", "float32 over bfloat16")})


if __name__ == "__main__":
    main()
