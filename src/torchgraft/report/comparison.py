"""A comparison of mixers as a table and as a figure."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from torchgraft.bench.files import write_atomic
from torchgraft.compare import Comparison, Row
from torchgraft.report.figures import STYLE, to_bytes
from torchgraft.report.numbers import cost_text

__all__ = ["comparison_figure", "comparison_rows", "write_figure"]

_COLOURS = ("#00639c", "#a84300", "#0b6b4f", "#7a3b8f", "#8a6d00", "#52605b", "#c2185b", "#1b9aaa")


def comparison_rows(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return the heads and the cells of the table, one row a mixer.

    Args:
        found: a comparison; mixers whose seeds are not all finished are left out.
    """
    columns = ["mixer", "score", "spread", "against the first", "steps", "parameters", "time a step", "state"]
    return columns, [_cells(row) for row in found.rows()]


def _cells(row: Row) -> list[str]:
    against = "" if row.verdict == "first" else f"{row.difference:+.3f} {row.verdict}"
    state = "none kept" if row.state_bytes is None else cost_text(row.state_bytes, "B")
    return [
        row.key,
        f"{row.mean:.3f}",
        "" if math.isnan(row.spread) else f"{row.spread:.3f}",
        against,
        str(row.steps),
        cost_text(row.parameters, ""),
        cost_text(row.seconds_per_step * 1000, "ms"),
        f"{state}, grows" if row.state_bytes is not None and row.state_grows else state,
    ]


def comparison_figure(found: Comparison) -> Figure:
    """Return the scores of every seed and their means, and beside them the scores by length where lengths differ.

    Args:
        found: a comparison.

    Raises:
        ValueError: no mixer has finished every seed.
    """
    rows = found.rows()
    if not rows:
        raise ValueError("no mixer has finished every seed")
    lengths = any(cell.scores_by_length for cell in found.cells)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.0 if lengths else 7.2, 1.4 + 0.45 * len(rows)), layout="constrained")
        if lengths:
            figure.set_figheight(max(3.4, figure.get_figheight()))
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, 2 if lengths else 1, squeeze=False)[0]
        _draw_scores(axes[0], rows, found)
        if lengths:
            _draw_lengths(axes[1], rows, found)
    return figure


def _draw_scores(axes: Axes, rows: list[Row], found: Comparison) -> None:
    for place, row in enumerate(rows):
        colour = _COLOURS[place % len(_COLOURS)]
        axes.plot(row.scores, [place] * len(row.scores), "o", color=colour, alpha=0.45, markersize=5)
        axes.plot([row.mean], [place], "|", color=colour, markersize=18, markeredgewidth=2.2)
    if found.reference is not None:
        axes.axvline(found.reference, color="#52605b", linewidth=1.0, linestyle=(0, (5, 4)), label="the task's model")
        axes.legend(frameon=False, labelcolor="#52605b", loc="best")
    axes.set_yticks(range(len(rows)), [row.key for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(f"test score on {found.settings.task} (each seed, and the mean)")
    _plain(axes)


def _draw_lengths(axes: Axes, rows: list[Row], found: Comparison) -> None:
    for place, row in enumerate(rows):
        cells = [cell for cell in (found.cell(row.key, seed) for seed in found.seeds) if cell is not None]
        lengths = sorted(cells[0].scores_by_length)
        series = [[cell.scores_by_length[length] for length in lengths] for cell in cells]
        colour = _COLOURS[place % len(_COLOURS)]
        for values in series:
            axes.plot(lengths, values, color=colour, alpha=0.25, linewidth=0.9)
        means = [sum(values) / len(values) for values in zip(*series, strict=True)]
        axes.plot(lengths, means, marker="o", markersize=4, color=colour, linewidth=1.5, label=row.key)
    axes.set_xlabel("length of the sequence")
    axes.set_ylabel("accuracy")
    axes.legend(frameon=False, labelcolor="#52605b", fontsize=8.0)
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.tick_params(length=0)
    axes.spines[["top", "right"]].set_visible(False)


def write_figure(found: Comparison, folder: Path) -> list[Path]:
    """Write the figure of ``found`` into ``folder`` as ``try.png`` and ``try.svg``, and return their paths."""
    figure = comparison_figure(found)
    paths = []
    for form in ("png", "svg"):
        paths.append(folder / f"try.{form}")
        write_atomic(paths[-1], to_bytes(figure, form))
    return paths
