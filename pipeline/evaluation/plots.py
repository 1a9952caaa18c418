"""Charts of the report as SVG data URIs: no file, no font and no network needed to show them.

Text becomes outlines and the background is transparent, so that a chart looks the same everywhere
and fits a light and a dark page. No text of a user's data goes into a chart.
"""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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


def chart(draw: Callable[[Axes], None], width: float = 3.9, height: float = 2.3) -> str:
    """What `draw` puts on an axes, as a data URI; sizes in inches."""
    out = io.BytesIO()
    _save(draw, width, height, out, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode()


def _save(
    draw: Callable[[Axes], None],
    width: float,
    height: float,
    out: Path | io.BytesIO,
    **options: Any,
) -> None:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.add_subplot())
        figure.savefig(out, **options)


def lines(series: Mapping[str, Points], xlabel: str = "step", level: float | None = None) -> str:
    """One curve per name; a legend only where there are several. `level` is a dashed line."""

    def draw(axes: Axes) -> None:
        for colour, (name, points) in zip(COLOURS, series.items(), strict=False):
            x, y = zip(*points, strict=True)
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

    return chart(draw)


def calibration(rows: Sequence[tuple[float, float, int]]) -> str:
    """Rows of predicted and observed probability and pairs, against the diagonal."""

    def draw(axes: Axes) -> None:
        axes.plot([0.5, 1], [0.5, 1], color=INK, linewidth=0.9, linestyle="--", label="calibrated")
        predicted, observed, pairs = zip(*rows, strict=True)
        largest = max(pairs)
        axes.plot(predicted, observed, color=COLOURS[0])
        axes.scatter(
            predicted, observed, s=[12 + 70 * n / largest for n in pairs], color=COLOURS[0]
        )
        axes.set_xlabel("predicted chance that the higher-scored is better")
        axes.set_ylabel("observed")
        axes.set_xlim(0.49, 1.01)

    return chart(draw)


def scatter(points: Points, xlabel: str, ylabel: str) -> str:
    """One faint dot per point, at most 2,000 of them."""

    def draw(axes: Axes) -> None:
        x, y = zip(*points[:: 1 + len(points) // 2000], strict=True)
        axes.scatter(x, y, s=7, color=COLOURS[0], alpha=0.35, linewidths=0)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)

    return chart(draw)


def root_kl(gold: Mapping[str, Points], proxy: Mapping[str, Points]) -> str:
    """Gold (full) and proxy (dashed) of each study against the square root of KL."""
    return chart(_root_kl(gold, proxy), width=9.4, height=3.2)


def root_kl_file(gold: Mapping[str, Points], proxy: Mapping[str, Points], path: Path) -> None:
    """`root_kl` as a PNG file."""
    _save(_root_kl(gold, proxy), 9.4, 4.2, path, dpi=150)


def gold_and_proxy(
    studies: Mapping[str, Sequence[Mapping[str, float]]],
) -> tuple[dict[str, Points], dict[str, Points]]:
    """(KL, judge) and (KL, score) of each study of `pipeline.evaluation.overopt`."""
    gold = {name: [(p["kl"], p["judge"]) for p in points] for name, points in studies.items()}
    proxy = {name: [(p["kl"], p["rm_score"]) for p in points] for name, points in studies.items()}
    return gold, proxy  # type: ignore[return-value]


def _root_kl(gold: Mapping[str, Points], proxy: Mapping[str, Points]) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for colour, name in zip(COLOURS, gold, strict=False):
            axes.plot(*_columns(gold[name]), color=colour, label=name, marker="o", markersize=3)
            if proxy.get(name):
                axes.plot(*_columns(proxy[name]), color=colour, linestyle="--", linewidth=1.1)
        axes.set_xlabel("square root of KL to SFT (nats per response)")
        axes.set_ylabel("judge (full), reward model (dashed)")
        axes.legend()

    return draw


def _columns(points: Points) -> tuple[list[float], list[float]]:
    ordered = sorted((max(x, 0.0) ** 0.5, y) for x, y in points)
    return [x for x, _ in ordered], [y for _, y in ordered]
