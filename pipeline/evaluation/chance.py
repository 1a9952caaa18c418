"""Whether two groups of runs differ by more than chance: bootstrap over prompts and seeds; pure."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pipeline.evaluation.metrics import Z95

Points = dict[str, tuple[float, float]]
"""Of one run: prompt -> (what was reached, of how much); the figure is the ratio of their sums."""
ROUNDS = 2000


class Known(NamedTuple):
    """A figure with its 95 % interval, of so many prompts and runs."""

    value: float
    low: float
    high: float
    prompts: int
    runs: int


class Difference(NamedTuple):
    """A difference with its 95 % interval; `paired`: prompt by prompt."""

    value: float
    low: float
    high: float
    paired: bool

    @property
    def real(self) -> bool:
        """Whether 0 lies outside of the interval."""
        return self.low > 0 or self.high < 0


def of(runs: Sequence[Points]) -> Known:
    """A group's figure: the mean of its runs, prompts and, where there are several, runs drawn anew."""
    drawn = _drawn(runs, *_picks(runs, np.random.default_rng(0)))
    return Known(_mean(runs), *_interval(drawn), min(map(len, runs)), len(runs))


def difference(before: Sequence[Points], after: Sequence[Points]) -> Difference:
    """What `after` has over `before`. The same prompts are drawn for both where all runs have the same."""
    random = np.random.default_rng(0)
    paired = len({frozenset(run) for run in (*before, *after)}) == 1
    prompts, seeds = _picks(before, random)
    others, other_seeds = _picks(after, random)
    if paired:
        others = prompts
    gap = _drawn(after, others, other_seeds) - _drawn(before, prompts, seeds)
    return Difference(_mean(after) - _mean(before), *_interval(gap), paired)


Mean = tuple[float, float]
"""Of one run: a mean over its samples and the standard error of that."""


def of_means(runs: Sequence[Mean]) -> Known:
    """A group's figure where its samples are not known one by one, by the normal distribution."""
    value, error = _normal(runs)
    return Known(value, value - Z95 * error, value + Z95 * error, 0, len(runs))


def difference_of_means(before: Sequence[Mean], after: Sequence[Mean]) -> Difference:
    """The same of a difference; never paired."""
    (a, error), (b, other) = _normal(before), _normal(after)
    reach = Z95 * math.hypot(error, other)
    return Difference(b - a, b - a - reach, b - a + reach, paired=False)


def _normal(runs: Sequence[Mean]) -> Mean:
    """Mean and standard error of a group: what its runs tell of it, and how far they lie apart."""
    means, errors = [mean for mean, _ in runs], [error for _, error in runs]
    apart = statistics.stdev(means) if len(runs) > 1 else 0.0
    within = math.sqrt(sum(e**2 for e in errors) / len(runs))
    return statistics.fmean(means), max(apart, within) / math.sqrt(len(runs))


def _mean(runs: Sequence[Points]) -> float:
    ratios = [sum(n for n, _ in run.values()) / sum(d for _, d in run.values()) for run in runs]
    return sum(ratios) / len(ratios)


def _picks(runs: Sequence[Points], random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Prompts (ROUNDS, P) and runs (ROUNDS, S) of each round."""
    prompts, count = min(map(len, runs)), len(runs)
    seeds = random.integers(count, size=(ROUNDS, count))
    return random.integers(prompts, size=(ROUNDS, prompts)), seeds


def _drawn(runs: Sequence[Points], prompts: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """The figure (ROUNDS,) with the picked prompts and runs in the place of all."""
    ratios = []
    for run in runs:
        points = np.array([run[key] for key in sorted(run)])[prompts]  # (ROUNDS, P, 2)
        done, whole = points[..., 0].sum(axis=1), points[..., 1].sum(axis=1)
        ratios.append(done / np.maximum(whole, 1e-12))
    return np.take_along_axis(np.stack(ratios, axis=1), seeds, axis=1).mean(axis=1)


def _interval(drawn: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)
