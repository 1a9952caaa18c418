"""Charts of the report as SVG data URIs: no file, no font and no network needed to show them.

Text becomes outlines and the background is transparent, so that a chart looks the same everywhere
and fits a light and a dark page. No text of a user's data goes into a chart.
"""

import base64
import functools
import io
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.evaluation.bands import Band

INK = "#7d8590"  # readable on white and on near-black
COLOURS = ("#4c8dff", "#f0883e", "#3fb950", "#db61a2", "#a371f7")

STYLE: Any = {
    "svg.fonttype": "path",
    "svg.hashsalt": "report",  # the same input gives the same bytes
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.18,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
}

Points = Sequence[tuple[float, float]]


def chart(draw: Callable[..., None], width: float = 3.9, height: float = 2.3) -> Callable[..., str]:
    """`draw(axes, ...)` as a function that returns a data URI; sizes in inches."""

    @functools.wraps(draw)
    def drawn(*args: Any, **more: Any) -> str:
        out = io.BytesIO()
        with mpl.rc_context(STYLE):
            figure = Figure(figsize=(width, height), layout="constrained")
            draw(*args, **more, axes=figure.add_subplot())
            figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
        return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode()

    return drawn


@chart
def lines(
    series: Mapping[str, Points],
    xlabel: str = "step",
    level: float | None = None,
    bands: Mapping[str, Band] = MappingProxyType({}),
    *,
    axes: Axes,
) -> None:
    """One curve per name, before its band if it has one; a legend only where there are several. `level` is a
    dashed line."""
    for colour, (name, points) in zip(COLOURS, series.items(), strict=False):
        x, y = zip(*points, strict=True)
        if name in bands:
            steps, low, high = zip(*bands[name], strict=True)
            axes.fill_between(steps, low, high, color=colour, alpha=0.14, linewidth=0)
        if len(points) < 4:  # a line between so few would claim too much
            axes.plot(x, y, "D", color=colour, label=name, markersize=5)
        else:
            marker = "o" if len(points) < 25 else None
            axes.plot(x, y, color=colour, label=name, marker=marker, markersize=2.6)
    if level is not None:
        axes.axhline(level, color=INK, linewidth=0.9, linestyle="--")
    axes.set_xlabel(xlabel)
    if len(series) > 1:
        axes.legend()


@chart
def bands(
    places: Sequence[str],
    groups: Mapping[str, Sequence[Points]],
    xlabel: str = "step",
    level: float | None = None,
    *,
    axes: Axes,
) -> None:
    """A line per group of curves, their mean, in a band from the lowest to the highest; the colour is its
    place's in `places`."""
    for name, curves in groups.items():
        colour = COLOURS[places.index(name) % len(COLOURS)]
        at: dict[float, list[float]] = {}
        for step, value in (point for curve in curves for point in curve):
            at.setdefault(step, []).append(value)
        steps = sorted(at)
        axes.plot(steps, [sum(at[s]) / len(at[s]) for s in steps], color=colour, label=name)
        if len(curves) > 1:
            low, high = ([of(at[s]) for s in steps] for of in (min, max))
            axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    if level is not None:
        axes.axhline(level, color=INK, linewidth=0.9, linestyle="--")
    axes.set_xlabel(xlabel)


@chart
def calibration(rows: Sequence[tuple[float, float, int]], *, axes: Axes) -> None:
    """Rows of predicted and observed probability and pairs, against the diagonal."""
    axes.plot([0.5, 1], [0.5, 1], color=INK, linewidth=0.9, linestyle="--", label="calibrated")
    predicted, observed, pairs = zip(*rows, strict=True)
    sizes = [12 + 70 * n / max(pairs) for n in pairs]
    axes.plot(predicted, observed, color=COLOURS[0])
    axes.scatter(predicted, observed, s=sizes, color=COLOURS[0])
    axes.set_xlabel("predicted chance that the higher-scored is better")
    axes.set_ylabel("observed")
    axes.set_xlim(0.49, 1.01)


@chart
def scatter(points: Points, xlabel: str, ylabel: str, *, axes: Axes) -> None:
    """One faint dot per point, at most 2,000 of them."""
    x, y = zip(*points[:: 1 + len(points) // 2000], strict=True)
    axes.scatter(x, y, s=7, color=COLOURS[0], alpha=0.35, linewidths=0)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)


@functools.partial(chart, width=9.4, height=3.2)
def root_kl(studies: Mapping[str, Sequence[Mapping[str, float]]], *, axes: Axes) -> None:
    """Judge (full) and score (dashed) of each study of `pipeline.evaluation.overopt` against the square
    root of KL."""
    for colour, (name, points) in zip(COLOURS, studies.items(), strict=False):
        gold: Any = {"label": name, "marker": "o", "markersize": 3}
        proxy: Any = {"linestyle": "--", "linewidth": 1.1}
        for key, style in (("judge", gold), ("rm_score", proxy)):
            curve = sorted((max(p["kl"], 0.0) ** 0.5, p[key]) for p in points)
            axes.plot([x for x, _ in curve], [y for _, y in curve], color=colour, **style)
    axes.set_xlabel("square root of KL to SFT (nats per response)")
    axes.set_ylabel("judge (full), reward model (dashed)")
    axes.legend()


@functools.partial(chart, width=9.4, height=3.6)
def parallel(columns: Mapping[str, Sequence[Any]], *, axes: Axes) -> None:
    """A line per row through one axis per column, from its least to its greatest; the last column colours.

    Columns of numbers are axes of numbers, others have a place for each value.
    """
    places = {name: _places(values) for name, values in columns.items()}
    last = list(places.values())[-1][0]
    colours = mpl.colormaps["viridis"]
    for row, place in enumerate(last):
        colour = colours(
            0.25 + 0.65 * place
        )  # its ends are too dark, or too light, for one of two pages
        axes.plot([at[row] for at, _ in places.values()], color=colour, marker="o")
    for x, (_, labels) in enumerate(places.values()):
        axes.axvline(x, color=INK, linewidth=0.9)
        for y, label in labels.items():
            axes.annotate(ascii(label)[:24], (x, y), (4, 2), textcoords="offset points", fontsize=8)
    axes.set_xticks(range(len(places)), [ascii(name)[1:-1] for name in places])
    axes.set_yticks([])
    axes.grid(visible=False)


def _places(values: Sequence[Any]) -> tuple[list[float], dict[float, Any]]:
    """Where values stand on an axis from 0 to 1, and what is written where."""
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        low, high = min(values), max(values)
        at = [(v - low) / (high - low) if high > low else 0.5 for v in values]
        return at, {min(at): float(f"{low:.4g}"), max(at): float(f"{high:.4g}")}
    kinds = list(dict.fromkeys(map(str, values)))
    own = {kind: (i + 0.5) / len(kinds) for i, kind in enumerate(kinds)}
    return [own[str(v)] for v in values], {y: kind for kind, y in own.items()}


@functools.partial(chart, width=9.4, height=3.6)
def growth(rows: Sequence[Mapping[str, Any]], *, axes: Axes) -> None:
    """Of rows of `pipeline.bench`, CPU seconds of an iteration by those of its floor (full) and
    memory (dashed), as each thing grows to so many times what it was."""
    memory = axes.twinx()
    for colour, name in zip(COLOURS, dict.fromkeys(row["grows"] for row in rows), strict=False):
        points = [row for row in rows if row["grows"] == name and not row["failed"]]
        times = [row["to"] / points[0]["to"] for row in points]
        floors = [row["cpu_seconds"] / row["floor"] for row in points]
        axes.plot(times, floors, "o-", color=colour, label=f"{name} from {points[0]['to']:,}")
        memory.plot(times, [row["peak_mb"] for row in points], "--", color=colour)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("times as large")
    axes.set_ylabel("CPU seconds / floor (full)")
    memory.set_ylabel("peak MiB (dashed)")
    memory.grid(visible=False)
    for each in (axes, memory):
        each.set_ylim(bottom=0)
    axes.legend()
