"""Draw accuracy over length of parity and modulo 3 from results/claims/negative-eigenvalue-rnn.json.

Run: ``python benchmarks/parity_figure.py``; it trains nothing. Writes results/state_tracking.png and .svg.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

LENGTHS = (32, 64, 96, 128)


def main() -> None:
    """Draw the figure."""
    record = json.loads(Path("results/claims/negative-eigenvalue-rnn.json").read_text(encoding="utf-8"))
    metrics: dict[str, list[float]] = record["metrics"]
    drawn, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
    for axis, problem in zip(axes, ("parity", "modulo 3"), strict=True):
        start = f"rescaled accuracy at {LENGTHS[0]}, {problem}, "
        for name in (key.removeprefix(start) for key in metrics if key.startswith(start)):
            values = [median(metrics[f"rescaled accuracy at {length}, {problem}, {name}"]) for length in LENGTHS]
            axis.plot(LENGTHS, values, marker="o", label=name)
        axis.axvline(LENGTHS[0], color="grey", linestyle=":", linewidth=1)
        axis.set(title=problem, xlabel="digits (trained up to the dotted line)", xticks=LENGTHS, ylim=(-0.08, 1.08))
        axis.legend(fontsize=7, frameon=False, loc="center right")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("accuracy, 0 is guessing (median of 3 seeds)")
    for suffix in ("png", "svg"):
        drawn.savefig(f"results/state_tracking.{suffix}", dpi=150)


if __name__ == "__main__":
    main()
