"""Which of two answers is better, by any judge: win rates, the same at equal length, how far judges agree; pure.

A verdict is 1 where the first answer is better, 0.5 for a tie, 0 where the second is, None where nobody judged.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from pipeline.evaluation import metrics

Verdicts = Sequence[float | None]
WORDS = {1.0: "win", 0.5: "tie", 0.0: "loss"}


def of_scores(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """Verdicts of whoever gives scores."""
    return [float(a > b) + 0.5 * (a == b) for a, b in zip(first, second, strict=True)]


def rate(
    verdicts: Verdicts, longer: Sequence[float], prompts: Sequence[Hashable]
) -> dict[str, Any]:
    """Share of wins, ties half, of what was judged, and that share at equal length, with 95 % intervals.

    longer: by how many tokens the first answer is the longer one; answers to the same prompt hang together.
    """
    judged = [i for i, verdict in enumerate(verdicts) if verdict is not None]
    said = [float(verdicts[i]) for i in judged]  # type: ignore[arg-type]
    told = {word: said.count(value) for value, word in WORDS.items()}
    counts = {"wins": told["win"], "ties": told["tie"], "losses": told["loss"]}
    if not judged:
        return {"judged": 0, "rate": None, **counts}
    own = [prompts[i] for i in judged]
    groups = clusters(own)
    low, high = metrics.clustered_wilson(
        [sum(said[i] for i in rows) for rows in groups], list(map(len, groups))
    )
    return {
        "judged": len(judged),
        "rate": sum(said) / len(said),
        "low": low,
        "high": high,
        **counts,
        "at_equal_length": (
            at_equal_length(said, [longer[i] for i in judged], own)
            if len(set(said)) > 1
            else {"value": said[0], "low": low, "high": high}  # all alike: length explains nothing
        ),
    }


def at_equal_length(
    wins: Sequence[float], longer: Sequence[float], prompts: Sequence[Hashable]
) -> dict[str, float]:
    """Share of wins were the first answers no longer than the second; `longer`: tokens more.

    Length-controlled AlpacaEval's curve (arXiv 2404.04475) without its term for the prompt: a logistic one over
    tanh(longer / its deviation), taken at 0.
    """
    y, spread = np.asarray(wins, dtype=float), float(np.std(longer))
    x = np.tanh(np.asarray(longer) / spread) if spread > 0 else np.zeros(len(y))
    return bootstrap(lambda counts: _at_zero(x, y, counts), prompts)


def _at_zero(x: np.ndarray, wins: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Logistic curves of wins (n,) over x (n,) at 0, of R samples with so many of each row (R, n); (R,).

    By Newton's method, held in by a hundredth of a row's weight.
    """
    level, slope = np.zeros((2, len(counts)))
    for _ in range(12):
        p = 1 / (1 + np.exp(-np.clip(level[:, None] + slope[:, None] * x, -30, 30)))
        off, weight = counts * (wins - p), counts * p * (1 - p)
        down, across = off.sum(axis=1) - 0.01 * level, off @ x - 0.01 * slope
        a, b, d = weight.sum(axis=1) + 0.01, weight @ x, weight @ (x * x) + 0.01
        level = level + (d * down - b * across) / (a * d - b * b)
        slope = slope + (a * across - b * down) / (a * d - b * b)
    return 1 / (1 + np.exp(-level))


def interval(values: Sequence[float], prompts: Sequence[Hashable]) -> dict[str, float]:
    """Mean and 95 % interval."""
    x = np.asarray(values, dtype=float)
    return bootstrap(lambda counts: (counts @ x) / counts.sum(axis=1), prompts)


def bootstrap(
    measure: Callable[[np.ndarray], np.ndarray], prompts: Sequence[Hashable], rounds: int = 1000
) -> dict[str, float]:
    """A measure of rows with its 95 % percentile interval, prompts drawn with replacement.

    `measure` makes a number of each of R samples from how often each of n rows is in it; (R, n) -> (R,).
    """
    groups, draw = clusters(prompts), np.random.default_rng(0)
    picks = [draw.integers(len(groups), size=len(groups)) for _ in range(rounds)]
    of_groups = np.stack([np.bincount(pick, minlength=len(groups)) for pick in picks])
    counts = np.empty((rounds, len(prompts)))
    for number, rows in enumerate(groups):
        counts[:, rows] = of_groups[:, [number]]
    low, high = np.quantile(measure(counts), [0.025, 0.975])
    [value] = measure(np.ones((1, len(prompts))))
    return {"value": float(value), "low": float(low), "high": float(high)}


def clusters(prompts: Sequence[Hashable]) -> list[list[int]]:
    """Indices of the rows of each prompt."""
    members: dict[Hashable, list[int]] = {}
    for i, prompt in enumerate(prompts):
        members.setdefault(prompt, []).append(i)
    return list(members.values())


def agreement(first: Verdicts, second: Verdicts) -> dict[str, Any]:
    """Of two judges: how often they say the same, Cohen's kappa (doi 10.1177/001316446002000104), and the table.

    table: the first judge's word -> the second's -> pairs that both judged. A kappa of None says nothing: each
    always says one and the same word.
    """
    pairs = [
        (WORDS[a], WORDS[b])
        for a, b in zip(first, second, strict=True)
        if a is not None and b is not None
    ]
    table = {a: {b: pairs.count((a, b)) for b in WORDS.values()} for a in WORDS.values()}
    if not pairs:
        return {"judged": 0, "same": None, "kappa": None, "table": table}
    same = sum(table[word][word] for word in table) / len(pairs)
    shares = [[[pair[k] for pair in pairs].count(w) / len(pairs) for w in table] for k in (0, 1)]
    by_chance = sum(a * b for a, b in zip(*shares, strict=True))
    kappa = (same - by_chance) / (1 - by_chance) if by_chance < 1 else None
    return {"judged": len(pairs), "same": same, "kappa": kappa, "table": table}
