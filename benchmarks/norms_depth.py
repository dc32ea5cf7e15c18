"""Draw the variance of the residual stream over 48 blocks, pre, post, peri and depth-scaled, beside the stated laws.

Left, the premises of the laws: every block is one random linear branch of gain s = 0.7 (weights N(0, s^2/D)). Right, a
byte transformer (attention and GELU feed-forward, torch's initial weights) on the standard library's source, untrained.

    peri    Var(x_l) = Var(x_0) + n l mean(g^2), n branches a block
    pre     Var(x_l) = Var(x_0) + s^2 l
    scaled  Var(x_l) = Var(x_0) + s^2 (1 + 1/2 + ... + 1/l)
    post    Var(x_l) = 1

with s^2 = 0.49 on the left, and on the right the variance of what the branches of the first pre-norm block add. Nothing
is trained. Prints, and writes to results/norm_depth.json, the ratio of measured to law at the last block and its range.

Run: ``python benchmarks/norms_depth.py``; writes results/norm_depth.png and .svg too.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from torchgraft.bench.files import write_atomic
from torchgraft.bench.models import ByteTransformer
from torchgraft.bench.tasks.stdlib_bytes import byte_splits
from torchgraft.engines.normalize.depth import residual_stream
from torchgraft.parts.norms.layernorm_scaling import DepthScaledNorm, apply_layernorm_scaling, harmonic
from torchgraft.parts.norms.peri_ln import PeriLNBlock, set_norm_placement

mpl.use("Agg")
from matplotlib import pyplot as plt

LAYERS, WIDTH, SEEDS = 48, 256, 3
GAIN = 0.7
KINDS = ("pre", "post", "peri", "scaled")
COLOURS = dict(zip(KINDS, ("tab:red", "tab:grey", "tab:blue", "tab:green"), strict=True))


def laws(start: float, gain: float, branches: int) -> dict[str, list[float]]:
    """Return the stated variance before the first block and after every one.

    Args:
        start: Var(x_0), of pre and scaled.
        gain: s^2.
        branches: a block, for peri.
    """
    depth = range(LAYERS + 1)
    return {
        "pre": [start + gain * layer for layer in depth],
        "post": [start, *([1.0] * LAYERS)],
        "peri": [start + branches * layer for layer in depth],
        "scaled": [start + gain * harmonic(layer) for layer in depth],
    }


@torch.no_grad()
def linear_branches(seed: int) -> dict[str, list[float]]:
    """Return Var(x_l) of blocks that are one random linear branch."""
    torch.manual_seed(seed)
    weights = [GAIN * torch.randn(WIDTH, WIDTH) / WIDTH**0.5 for _ in range(LAYERS)]
    found: dict[str, list[float]] = {}
    start = torch.randn(16, 32, WIDTH)
    norm = nn.LayerNorm(WIDTH)
    for kind in KINDS:
        x = start
        found[kind] = [float(x.var())]
        for layer, weight in enumerate(weights, start=1):
            branch = nn.Linear(WIDTH, WIDTH, bias=False)
            branch.weight.copy_(weight)
            if kind == "peri":
                x = PeriLNBlock(WIDTH, sublayer=branch, norm="layer")(x)
            elif kind == "post":
                x = norm(x + branch(x))
            else:
                x = x + branch(DepthScaledNorm(WIDTH, layer_index=layer if kind == "scaled" else 1)(x))
            found[kind].append(float(x.var()))
    return found


@torch.no_grad()
def transformer(seed: int, tokens: Tensor) -> tuple[dict[str, list[float]], float, dict[str, float]]:
    """Return Var(x_l) of a byte transformer, what the first pre-norm block adds, and Var(x_0) of each kind."""
    torch.manual_seed(seed)
    plain = ByteTransformer(256, tokens.shape[1], d_model=WIDTH, depth=LAYERS, num_heads=4, spread=0.7).eval()
    found: dict[str, list[float]] = {}
    starts: dict[str, float] = {}
    for kind in KINDS:
        model: nn.Module = copy.deepcopy(plain)
        if kind == "scaled":
            apply_layernorm_scaling(model)
        elif kind != "pre":
            set_norm_placement(model, "peri" if kind == "peri" else "post")
        with residual_stream(model) as stream:
            model(tokens)
        if kind == "peri":  # the embedding's norm stands within the first block
            stream[0] = nn.functional.layer_norm(stream[0], (WIDTH,))
        found[kind] = [float(x.var()) for x in stream]
        starts[kind] = found[kind][0]
    with residual_stream(plain) as stream:
        plain(tokens)
    added = float((stream[1] - stream[0]).var())
    return found, added, starts


def mean(rows: list[list[float]]) -> list[float]:
    """Return the mean of rows of equal length."""
    return [sum(each) / len(each) for each in zip(*rows, strict=True)]


def main() -> None:
    """Measure, print and draw."""
    torch.set_num_threads(1)
    tokens = byte_splits(64, 8, 8)[0].inputs
    linear = [linear_branches(seed) for seed in range(SEEDS)]
    if not isinstance(tokens, Tensor):
        raise TypeError("bytes are one tensor")
    whole = [transformer(seed, tokens) for seed in range(SEEDS)]
    gain = sum(row[1] for row in whole) / SEEDS
    panels: dict[str, tuple[dict[str, list[float]], dict[str, list[float]]]] = {}
    left = {kind: mean([row[kind] for row in linear]) for kind in KINDS}
    panels["one random linear branch a block (s² = 0.49)"] = (left, laws(left["pre"][0], GAIN**2, 1))
    right = {kind: mean([row[0][kind] for row in whole]) for kind in KINDS}
    stated = laws(right["pre"][0], gain, 2)
    stated["peri"] = [right["peri"][0] + 2.0 * layer for layer in range(LAYERS + 1)]
    panels[f"byte transformer, untrained (s² = {gain:.3f})"] = (right, stated)

    drawn, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    table = Table("blocks", "norms", f"Var(x_{LAYERS})", "law", "measured / law", "over all depths")
    record: dict[str, Any] = {"layers": LAYERS, "width": WIDTH, "seeds": SEEDS, "torch": torch.__version__}
    for axis, (title, (measured, law)) in zip(axes, panels.items(), strict=True):
        for kind in KINDS:
            ratios = [a / b for a, b in zip(measured[kind][1:], law[kind][1:], strict=True)]
            axis.plot(measured[kind], color=COLOURS[kind], label=kind)
            axis.plot(law[kind], color=COLOURS[kind], linestyle="--", linewidth=1, alpha=0.7)
            table.add_row(
                title,
                kind,
                f"{measured[kind][-1]:.3f}",
                f"{law[kind][-1]:.3f}",
                f"{ratios[-1]:.3f}",
                f"{min(ratios):.3f} to {max(ratios):.3f}",
            )
            record.setdefault("panels", {}).setdefault(title, {})[kind] = {
                "variance": measured[kind],
                "law": law[kind],
                "measured over law at the last block": ratios[-1],
                "range": [min(ratios), max(ratios)],
            }
        axis.set(title=title, xlabel="blocks", yscale="log")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("variance of the residual stream (dashed: law)")
    axes[0].legend(fontsize=8, frameon=False, loc="upper left")
    for suffix in ("png", "svg"):
        drawn.savefig(f"results/norm_depth.{suffix}", dpi=150)
    write_atomic(Path("results/norm_depth.json"), json.dumps(record, indent=1) + "\n")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
