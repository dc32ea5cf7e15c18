"""The front and the profile as matplotlib figures, drawn without pyplot and without leaving a trace in its settings."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from torchgraft.report.numbers import COST_NAMES, TIMES, Scale, cost_text, scale_of
from torchgraft.report.page import profile_groups, shown_costs
from torchgraft.report.records import Candidate, RunRecord

__all__ = ["STYLE", "front_figure", "profile_figure", "to_bytes"]

# The colours of the page: blue and burnt orange stay apart for every common colour blindness.
_GRAFT, _STOCK, _ZONE, _INK, _SOFT, _GRID = "#00639c", "#a84300", "#0b6b4f", "#16201d", "#52605b", "#e8ecea"
#: Settings of every figure, for matplotlib.rc_context.
STYLE: Any = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.bbox": None,
    "axes.edgecolor": "#d5dcd9",
    "axes.labelcolor": _SOFT,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": _GRID,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "axes.unicode_minus": True,
    "svg.hashsalt": "torchgraft",
    "svg.fonttype": "path",
    "text.usetex": False,
}
_RING: Any = {
    "marker": "o",
    "markersize": 12,
    "markerfacecolor": "none",
    "markeredgecolor": _GRAFT,
    "linestyle": "none",
    "zorder": 4,
}


def to_bytes(figure: Figure, form: str) -> bytes:
    """Return ``figure`` as ``"png"`` or ``"svg"``; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        if form == "svg":
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": "torchgraft"})
        else:
            figure.savefig(buffer, format="png", dpi=160, metadata={"Software": "torchgraft"})
    return buffer.getvalue()


def front_figure(candidates: Sequence[Candidate], run: RunRecord) -> Figure:
    """Return the front: validation score against each cost of the budget, or against the first cost.

    Args:
        candidates: the front, the original first.
        run: the budget and the trials.
    """
    costs = shown_costs(candidates, run)
    limited = [cost for cost in costs if any(limit.cost == cost for limit in run.budget)] or costs[:1]
    with matplotlib.rc_context(STYLE):
        columns = min(2, len(limited))
        rows = math.ceil(len(limited) / columns)
        figure = Figure(figsize=(7.2 if columns == 1 else 11.0, 4.5 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for place, cost in zip(axes.flat, limited, strict=False):
            _draw_front(place, candidates, run, cost)
        for place in list(axes.flat)[len(limited) :]:
            place.set_visible(False)
        figure.legend(*_key(axes.flat[0]), loc="outside lower center", ncols=3, frameon=False, labelcolor=_SOFT)
    return figure


def _key(axes: Axes) -> tuple[list[Any], list[str]]:
    """Return the entries of the legend; the saved model is drawn with its ring."""
    handles, names = axes.get_legend_handles_labels()
    ring = Line2D([], [], **_RING)
    entries = [(ring, handle) if name == "saved model" else handle for handle, name in zip(handles, names, strict=True)]
    order = ("original", "saved model", "within every limit", "outside a limit", "other trials")
    places = sorted(range(len(names)), key=lambda i: order.index(names[i]) if names[i] in order else len(order))
    return [entries[i] for i in places], [names[i] for i in places]


def _draw_front(axes: Axes, candidates: Sequence[Candidate], run: RunRecord, cost: str) -> None:
    scale, original = scale_of(candidates), candidates[0]
    reading = original.costs[cost]
    shown = [
        (trial.ratios[cost], scale.plain(trial.validation))
        for trial in run.trials
        if trial.validation is not None and trial.state != "failed" and cost in trial.ratios
    ]
    xs = [
        value for c in candidates for value in (c.costs[cost].ratio_low, c.costs[cost].ratio, c.costs[cost].ratio_high)
    ]
    ys = [value for c in candidates for value in _changes(c, scale)]
    limit = next((each.ratio for each in run.budget if each.cost == cost), None)
    if limit is not None:
        xs.append(limit)
    floor = None if run.max_drop is None else scale.plain(original.validation.value - run.max_drop)
    if floor is not None:
        ys.append(floor)
    room_x, room_y = max(0.02, 0.07 * (max(xs) - min(xs))), max(1e-9, 0.1 * (max(ys) - min(ys)))
    low_x, high_x = max(0.0, min(xs) - room_x), max(xs) + room_x
    low_y, high_y = min(ys) - room_y, max(ys) + room_y
    if limit is not None or floor is not None:
        corner = (low_x, low_y if floor is None else floor)
        zone = Rectangle(corner, (high_x if limit is None else limit) - low_x, high_y - corner[1])
        zone.set(facecolor=_ZONE, alpha=0.09, linewidth=0, label="within these limits", zorder=0.5)
        axes.add_patch(zone)
    if limit is not None:
        axes.axvline(limit, color=_ZONE, linewidth=1.0, linestyle=(0, (5, 4)))
    if floor is not None:
        axes.axhline(floor, color=_ZONE, linewidth=1.0, linestyle=(0, (5, 4)))
    if shown:
        shown_x, shown_y = zip(*shown, strict=True)
        axes.scatter(shown_x, shown_y, s=9, color="#7d8a85", alpha=0.55, linewidths=0, label="other trials")
    best: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.costs[cost].ratio, -c.validation.value)):
        if not best or candidate.validation.value > best[-1].validation.value:
            best.append(candidate)
    axes.step(
        [c.costs[cost].ratio for c in best],
        [scale.plain(c.validation.value) for c in best],
        where="post",
        color=_GRAFT,
        linewidth=1.1,
        alpha=0.55,
    )
    seen: set[str] = set()
    for candidate in candidates:
        kind = (
            "original"
            if candidate is original
            else "saved model"
            if candidate.best
            else "within every limit"
            if candidate.feasible
            else "outside a limit"
        )
        x = candidate.costs[cost]
        colour = _STOCK if kind == "original" else _GRAFT
        low, at_y, high = _changes(candidate, scale)
        at_x = x.ratio
        axes.plot([at_x, at_x], [low, high], color=colour, linewidth=0.9, alpha=0.4)
        axes.plot([x.ratio_low, x.ratio_high], [at_y, at_y], color=colour, linewidth=0.9, alpha=0.4)
        if kind == "saved model":
            axes.plot(at_x, at_y, **_RING)
        axes.plot(
            at_x,
            at_y,
            "D" if kind == "original" else "o",
            markersize=7 if kind in ("original", "saved model") else 6,
            markerfacecolor="white" if kind == "outside a limit" else colour,
            markeredgecolor=colour if kind == "outside a limit" else "white",
            linestyle="none",
            zorder=5,
            label="_" if kind in seen else kind,
        )
        seen.add(kind)
    axes.set_xlim(low_x, high_x)
    axes.set_ylim(low_y, high_y)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.2g}{TIMES}")
    axes.set_xlabel(
        f"{COST_NAMES.get(cost, cost)}, share of the original (1{TIMES} = {cost_text(reading.value, reading.unit)})"
    )
    axes.set_ylabel("validation score" + (f", {scale.unit}" if scale.unit else ""))
    axes.tick_params(length=0)
    axes.spines[["top", "right"]].set_visible(False)


def _changes(candidate: Candidate, scale: Scale) -> tuple[float, float, float]:
    """Return the score with the interval of its paired change against the original."""
    score, drop = candidate.validation.value, candidate.drop
    low, high = score - (drop.high - drop.value), score + (drop.value - drop.low)
    return scale.plain(low), scale.plain(score), scale.plain(high)


def profile_figure(run: RunRecord) -> Figure:
    """Return where the time goes, by part of the network, before and after.

    Raises:
        ValueError: the run holds no profile of the original.
    """
    profile = profile_groups(run)
    if profile is None:
        raise ValueError("the run holds no profile of the original")
    groups = profile["groups"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 0.9 + 0.42 * len(groups)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        middles = list(range(len(groups)))
        both = profile["has_after"]
        height = 0.36 if both else 0.6
        shift = 0.19 if both else 0.0
        axes.barh([m - shift for m in middles], [g["before"] for g in groups], height, color=_STOCK)
        if both:
            axes.barh([m + shift for m in middles], [g["after"] for g in groups], height, color=_GRAFT)
        axes.set_yticks(middles, [_printable(group["name"]) for group in groups])
        for label in axes.get_yticklabels():
            label.set_parse_math(False)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("own time in one forward pass, ms")
        axes.tick_params(length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        if both:
            axes.legend(["original", "saved model"], frameon=False, labelcolor=_SOFT)
    return figure


def _printable(name: str) -> str:
    """Return ``name`` as the font can show it: other letters become their escape, and long names keep their end."""
    plain = "".join(c if c.isprintable() and ord(c) < 0x250 else c.encode("unicode_escape").decode() for c in name)
    return plain if len(plain) <= 40 else "…" + plain[-39:]
