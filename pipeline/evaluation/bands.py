"""What healthy runs of a recipe look like: `configs/RECIPE/expect.yaml`, and whether a curve stays within; pure.

A band lies around the mean of the seeds that it was made from, `WIDTH` standard deviations to either side. The deviation
at a step is pooled over its neighbours, each about its own mean, since few seeds tell little of it.
"""

import json
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.config.section import Section, Text

WIDTH = 5.0
NEIGHBOURS = 2
LEAST = 0.01
"""Share of a mean that its deviation is taken to be at least."""
POINTS = 30
"""At most so many of a band's steps are kept; between them it is straight."""

Band = list[tuple[int, float, float]]
"""Rows of step, low and high; step 0 alone for a number that a stage has once."""
Points = Sequence[tuple[int, float]]
"""(step, value) of one metric."""


class Expected(Section):
    """The contents of expect.yaml."""

    seeds: list[int]
    """Of the runs that the bands were made from."""
    packages: dict[Text, Text]
    """Their versions."""
    made_with: dict[Text, dict[Text, Any]]
    """Stage -> keys that decide its result, where they were not the defaults."""
    bands: dict[Text, dict[Text, Band]]
    """Stage -> metric -> band."""


class Left(NamedTuple):
    """Where a curve left its band for the first time."""

    step: int
    value: float
    low: float
    high: float

    @property
    def above(self) -> bool:
        """Else it is below."""
        return self.value > self.high


def band(curves: Sequence[Points]) -> Band:
    """The band of one metric's curves, one a seed, at the steps that all of them have."""
    tables = [dict(curve) for curve in curves]
    steps = sorted(set.intersection(*(set(table) for table in tables)))
    columns = [[table[step] for table in tables] for step in steps]
    means = [statistics.fmean(column) for column in columns]
    variances = [statistics.variance(column) for column in columns]
    never_negative = min(map(min, columns)) >= 0
    rows = []
    for i in np.unique(np.linspace(0, len(steps) - 1, min(POINTS, len(steps))).round().astype(int)):
        near = variances[max(0, i - NEIGHBOURS) : i + NEIGHBOURS + 1]
        deviation = max(statistics.fmean(near) ** 0.5, LEAST * abs(means[i]))
        half = WIDTH * (1 + 1 / len(curves)) ** 0.5 * deviation  # of a new run, about a mean of few
        low, high = _short(means[i] - half), _short(means[i] + half)
        rows.append((steps[i], max(low, 0.0) if never_negative else low, high))
    return rows


def _short(x: float) -> float:
    return float(f"{x:.4g}")


def left(curve: Points, band: Band) -> Left | None:
    """Where a curve is outside for the first of two points in succession, or at its end; None when it stays.

    Points before the band's first step and after its last are not looked at.
    """
    steps, lows, highs = zip(*band, strict=True)
    there = [(step, value) for step, value in curve if steps[0] <= step <= steps[-1]]
    seen = [
        Left(step, value, float(np.interp(step, steps, lows)), float(np.interp(step, steps, highs)))
        for step, value in there
    ]
    out = [not one.low <= one.value <= one.high for one in seen]
    return next((one for i, one in enumerate(seen) if all(out[i : i + 2])), None)


def text(expected: Expected, head: Sequence[str]) -> str:
    """expect.yaml, a metric a line; `head`: lines of comment."""
    lines = [f"# {line}" for line in head]
    lines += [f"{key}: {_flow(getattr(expected, key))}" for key in ("seeds", "packages")]
    for key in ("made_with", "bands"):
        lines.append(f"{key}:")
        for stage, part in getattr(expected, key).items():
            lines += [f"  {stage}:", *(f"    {name}: {_flow(part[name])}" for name in part)]
    return "\n".join(lines) + "\n"


def _flow(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
