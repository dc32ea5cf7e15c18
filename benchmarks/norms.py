"""Time of every norm of the catalogue, forward and backward in training, beside the torch layer that it replaces.

Every card of family ``parts/norms`` that declares what it replaces is built at width 512 for tokens (64, 128, 512), or
at 64 channels for images of as many numbers (64, 64, 32, 32); a layer that takes the place of norm and activation
stands beside both. Outputs and gradients must be finite, and those of a norm that declares to equal torch's must agree
with it in the same run, or no time is printed. Ratios come from interleaved rounds, with the 95 % interval of their
median; times of a shared machine mean nothing and are not printed.

Run: ``python benchmarks/norms.py [--threads 2] [--rounds 31] [--out results/norms.json]``
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from paired import Call, keep_memory
from paired import rounds as timed
from torchgraft.bench.files import write_atomic
from torchgraft.bench.meters.spread import interval
from torchgraft.catalogue import Card, cards
from torchgraft.catalogue.registry import entry
from torchgraft.parts.norms.evonorm import EvoNorm
from torchgraft.parts.norms.weight_standardization_bcn import BatchChannelNorm

TOKENS, IMAGES = (64, 128, 512), (64, 64, 32, 32)
#: Times this much of torch's are allowed.
MOST = 1.3


class _ChannelsLast(nn.Module):
    """A batch norm of tokens: the layer of torch between two transpositions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return out


def replaced(card: Card, shape: tuple[int, ...]) -> nn.Module:
    """Return the torch layer that ``card`` replaces, for inputs of ``shape``."""
    name, width = str(card.declared["replaces"]), shape[-1] if len(shape) == 3 else shape[1]
    if name == "BatchNorm1d":
        return _ChannelsLast(width)
    return nn.GroupNorm(32, width) if name == "GroupNorm" else getattr(nn, name)(width)


def both_ways(module: nn.Module, x: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    """Return the output and the gradients of input and parameters."""
    leaf = x.detach().requires_grad_()
    out = module(leaf)
    used = [value for value in module.parameters() if value.requires_grad]
    return (out.detach(), *torch.autograd.grad(out, [leaf, *used], upstream, allow_unused=True))


def compared(norm: nn.Module, torchs: nn.Module, shape: tuple[int, ...], rounds: int, *, equal: bool) -> dict[str, Any]:
    """Return the ratio of the times with its interval, or why there is none."""
    draw = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(shape, generator=draw) for _ in range(2))
    pair = norm.train(), torchs.train()
    results = [both_ways(module, x, upstream) for module in pair]
    if not all(bool(value.isfinite().all()) for value in results[0] if value is not None):
        return {"refused": "an output or a gradient is not finite"}
    if equal:
        gap = max(float((one - other).abs().max() / other.abs().max()) for one, other in zip(*results, strict=True))
        if gap > 1e-4:
            return {"refused": f"differs from torch's by {gap:.2g}"}
    calls: list[Call] = [functools.partial(both_ways, module, x, upstream) for module in pair]
    rows = timed(calls, rounds)
    ratio = interval([row[0] / row[1] for row in rows])
    return {"ratio": round(ratio.value, 3), "low": round(ratio.low, 3), "high": round(ratio.high, 3)}


def measured(rounds: int) -> dict[str, dict[str, Any]]:
    """Return what was found, by name of the norm."""
    found: dict[str, dict[str, Any]] = {}

    def note(name: str, norm: nn.Module, torchs: nn.Module, shape: tuple[int, ...], *, equal: bool = False) -> None:
        what = [type(part).__name__ for part in torchs.children()] or [type(torchs).__name__]
        found[name] = {"beside": " and ".join(what), "shape": list(shape)}
        found[name].update(compared(norm, torchs, shape, rounds, equal=equal))

    for key, card in cards().items():
        if card.family != "parts/norms" or "replaces" not in card.declared:
            continue
        shape = TOKENS if len(card.shapes[0]) == 3 else IMAGES
        width = shape[-1] if len(shape) == 3 else shape[1]
        if key != "evonorm":
            equal = "equals-replaced" in card.capabilities
            note(key, entry(card)(width), replaced(card, shape), shape, equal=equal)
    note(
        "weight-standardization-bcn, exact",
        BatchChannelNorm(IMAGES[1], estimate=False),
        nn.Sequential(nn.BatchNorm2d(IMAGES[1]), nn.GroupNorm(16, IMAGES[1])),
        IMAGES,
    )
    for variant in ("B0", "B1", "B2", "S0", "S1", "S2"):
        norm = nn.BatchNorm2d(IMAGES[1]) if variant.startswith("B") else nn.GroupNorm(32, IMAGES[1])
        note(f"evonorm, {variant}", EvoNorm(IMAGES[1], variant=variant), nn.Sequential(norm, nn.ReLU()), IMAGES)  # type: ignore[arg-type]
    return found


def table(found: dict[str, dict[str, Any]]) -> Table:
    """Return the table that is printed."""
    made = Table(title="forward and backward in training, times that of the torch layer")
    for name in ("norm", "beside", "shape", "ratio", "95 % interval", f"at most {MOST}"):
        made.add_column(name)
    for name, row in found.items():
        shape = " x ".join(str(size) for size in row["shape"])
        if "refused" in row:
            made.add_row(name, row["beside"], shape, row["refused"], "", "no")
        else:
            spread = f"{row['low']:.2f} to {row['high']:.2f}"
            good = "yes" if row["high"] <= MOST else "no" if row["low"] > MOST else "cannot tell"
            made.add_row(name, row["beside"], shape, f"{row['ratio']:.2f}", spread, good)
    return made


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--out", type=Path, default=Path("results/norms.json"))
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    keep_memory()
    record = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "threads": chosen.threads,
        "rounds": chosen.rounds,
        "norms": measured(chosen.rounds),
    }
    write_atomic(chosen.out, json.dumps(record, indent=1) + "\n")
    Console(width=160).print(table(record["norms"]))


if __name__ == "__main__":
    main()
