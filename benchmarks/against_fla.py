"""Our recurrences beside the naive forms of flash-linear-attention, on random inputs: outputs and gradients.

Its naive forms are plain PyTorch and need no GPU. They are loaded file by file from a checkout or an installed package,
so nothing of the package is imported. Both sides run in float32 and ours in float64 too: where the two disagree, the
float64 loop, which is the definition, decides.

Run: ``python benchmarks/against_fla.py FOLDER`` with FOLDER the one that holds ``ops/gla/naive.py``; needs einops.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from torchgraft.bench.files import write_atomic
from torchgraft.engines.recurrence.linear import additive_recurrence, linear_recurrence

BATCH, TOKENS, HEADS, KEY, VALUE = 2, 128, 3, 16, 24
Run = Callable[..., Tensor]


def naive(folder: Path, operation: str) -> ModuleType:
    """Load ``ops/<operation>/naive.py`` by its path."""
    path = folder / "ops" / operation / "naive.py"
    spec = importlib.util.spec_from_file_location(f"naive_{operation}", path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def made(seed: int) -> dict[str, Tensor]:
    """Return random inputs in float64."""
    draw = torch.Generator().manual_seed(seed)
    shape = (BATCH, TOKENS, HEADS)

    def normal(*size: int) -> Tensor:
        return torch.randn(*shape, *size, generator=draw, dtype=torch.float64)

    return {
        "q": normal(KEY),
        "k": F.normalize(normal(KEY), dim=-1),
        "v": normal(VALUE),
        "token": F.logsigmoid(normal()),
        "channel": F.logsigmoid(normal(KEY)),
        "beta": normal().sigmoid(),
        "logits": normal(KEY),
    }


def heads_first(function: Callable[..., Any]) -> Run:
    """Wrap a form of layout (B, H, T, K)."""

    def run(*inputs: Tensor) -> Tensor:
        found = function(*(x.transpose(1, 2) for x in inputs))
        output: Tensor = found[0] if isinstance(found, tuple) else found
        return output.transpose(1, 2)

    return run


def first(function: Callable[..., Any]) -> Run:
    """Wrap a form that returns its state too."""

    def run(*inputs: Tensor) -> Tensor:
        found = function(*inputs)
        output: Tensor = found[0] if isinstance(found, tuple) else found
        return output

    return run


def pairs(folder: Path) -> dict[str, tuple[tuple[str, ...], Run, Run]]:
    """Return by name: the inputs, its form, ours."""
    scale = KEY**-0.5
    retention_decay = (1 - 2.0 ** (-5.0 - torch.arange(HEADS))).log()
    gla, simple, delta = naive(folder, "gla"), naive(folder, "simple_gla"), naive(folder, "delta_rule")
    gated, linear, retention = (
        naive(folder, "gated_delta_rule"),
        naive(folder, "linear_attn"),
        naive(folder, "retention"),
    )
    kda = naive(folder, "kda")

    def ours(**options: Any) -> Run:
        def run(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
            extra = dict(zip(options.get("names", ()), rest, strict=True))
            if "log_decay" in options:
                extra["log_decay"] = options["log_decay"].to(q.dtype)
            found: Tensor = linear_recurrence(q, k, v, scale=options["scale"], form=options["form"], **extra)  # type: ignore[assignment]
            return found

        return run

    def lightnet(q: Tensor, logits: Tensor, v: Tensor) -> Tensor:
        z = logits.logcumsumexp(1)
        keys = (logits - z).exp()
        decay = torch.cat([z[:, :1], z[:, :-1]], dim=1) - z
        output: Tensor = gla.naive_recurrent_gla(q, keys, v, decay)[0]
        return output

    rows: dict[str, tuple[tuple[str, ...], Run, Callable[[str], Run]]] = {
        "linear_attn": (
            ("q", "k", "v"),
            first(linear.naive_recurrent_linear_attn),
            lambda f: ours(scale=scale, form=f),
        ),
        "retention": (
            ("q", "k", "v"),
            heads_first(retention.naive_retention),
            lambda f: ours(scale=scale, form=f, log_decay=retention_decay),
        ),
        "simple_gla": (
            ("q", "k", "v", "token"),
            first(simple.naive_recurrent_simple_gla),
            lambda f: ours(scale=scale, form=f, names=("log_decay",)),
        ),
        "gla": (
            ("q", "k", "v", "channel"),
            first(gla.naive_recurrent_gla),
            lambda f: ours(scale=scale, form=f, names=("log_decay",)),
        ),
        "delta_rule": (
            ("q", "k", "v", "beta"),
            heads_first(delta.delta_rule_recurrence),
            lambda f: ours(scale=scale, form=f, names=("beta",)),
        ),
        "gated_delta_rule": (
            ("q", "k", "v", "beta", "token"),
            first(gated.naive_recurrent_gated_delta_rule),
            lambda f: ours(scale=scale, form=f, names=("beta", "log_decay")),
        ),
        "kda": (
            ("q", "k", "v", "channel", "beta"),
            first(kda.naive_recurrent_kda),
            lambda f: ours(scale=scale, form=f, names=("log_decay", "beta")),
        ),
        "lightnet": (
            ("q", "logits", "v"),
            lightnet,
            lambda f: lambda q, logits, v: additive_recurrence(q, logits, v, scale=scale, form=f)[0],  # type: ignore[arg-type]
        ),
    }
    return {name: (names, theirs, make) for name, (names, theirs, make) in rows.items()}  # type: ignore[misc]


def all_of(function: Run, inputs: list[Tensor]) -> list[Tensor]:
    """Return the output and the gradients of a fixed random sum of it."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    output = function(*leaves)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(output.dtype)
    return [output.detach(), *torch.autograd.grad((output * weight).sum(), leaves)]


def distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Return the largest difference relative to the largest entry."""
    return max(float((a.double() - b.double()).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True))


def main() -> None:
    """Print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results/fla_naive.json"))
    chosen = parser.parse_args()
    table = Table(
        "form",
        "ours to theirs",
        "ours to the float64 loop",
        "theirs to the float64 loop",
        title="largest relative difference",
    )
    record: dict[str, dict[str, float]] = {}
    for name, (names, theirs, make) in pairs(chosen.folder).items():
        inputs = made(0)
        exact = [inputs[each] for each in names]
        narrow = [x.float() for x in exact]
        truth = all_of(make("step"), exact)  # type: ignore[operator]
        ours, other = all_of(make("chunk"), narrow), all_of(theirs, narrow)  # type: ignore[operator]
        record[name] = {
            "ours to theirs": distance(ours, other),
            "ours to float64": distance(ours, truth),
            "theirs to float64": distance(other, truth),
        }
        table.add_row(name, *(f"{value:.1e}" for value in record[name].values()))
    Console().print(table)
    write_atomic(chosen.out, json.dumps({"torch": torch.__version__, "forms": record}, indent=1) + "\n")


if __name__ == "__main__":
    main()
