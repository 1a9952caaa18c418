"""A reward model's card: how far its scores can be trusted, from rankings that it was not trained on; pure."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.evaluation import metrics
from pipeline.evaluation.rankings import Scored, measure

LIKE = 0.1
"""Lengths are matched when they differ by at most this share of the longer one."""
EXAMPLES = 8
"""Errors that a card shows."""

Choice = Callable[[Scored, int, int], bool]
"""Whether a pair of a prompt's responses, the better one first, counts."""


def card(items: Sequence[Scored]) -> dict[str, Any]:
    """Accuracies with intervals, whole and in parts, beside what length alone reaches, and examples of errors.

    Of untied pairs; equal scores are half right, so that a model that scores everything alike gets .5.
    `by_distance`: by how many places of the ranking lie between; `with_best`: the better one is its
    prompt's best, as best-of-n and PPO need it told. Intervals are of 95 %, the pairs of a prompt hang together.
    """
    measured = measure(items)
    longer = measured.length_baseline
    subsets = sorted({str(s) for item in items if (s := _subset(item)) is not None})
    sizes = sorted({len(item.ranks) for item in items})
    distances = sorted({b - a for item in items for a, b in _rank_pairs(item)})
    return {
        "prompts": measured.prompts,
        **_accuracy(items, lambda *pair: True),
        "longer_wins": longer,
        "shorter_wins": 1 - longer,
        "above_length": _above_length(items, longer),
        "length_matched": _accuracy(items, _same_length),
        "with_best": _accuracy(items, lambda item, b, w: item.ranks[b] == min(item.ranks)),
        "without_best": _accuracy(items, lambda item, b, w: item.ranks[b] > min(item.ranks)),
        "by_k": _parts(items, sizes, lambda item, b, w: len(item.ranks)),
        "by_distance": _parts(items, distances, lambda item, b, w: item.ranks[w] - item.ranks[b]),
        "by_subset": _parts(items, subsets, lambda item, b, w: str(_subset(item))),
        "score_length_correlation": measured.pearson,
        "calibration": [row._asdict() for row in measured.calibration],
        "calibration_error": measured.calibration_error,
        "errors": _errors(items),
    }


def write_card(folder: Path, items: Sequence[Scored], about: dict[str, float]) -> None:
    """`card.json` in a reward model's folder; `about`: what else was measured of it."""
    whole = card(items) | about
    text = json.dumps(whole, indent=1, ensure_ascii=False, default=str) + "\n"
    (folder / "card.json").write_text(text, encoding="utf-8")


def _subset(item: Scored) -> Any:
    return (item.row or {}).get("subset")


def _rank_pairs(item: Scored) -> Iterable[tuple[int, int]]:
    return ((item.ranks[b], item.ranks[w]) for b, w in metrics.untied_pairs(item.ranks))


def _parts(
    items: Sequence[Scored], values: Sequence[Any], of: Callable[[Scored, int, int], Any]
) -> dict[str, Any]:
    return {str(v): _accuracy(items, lambda *pair, v=v: of(*pair) == v) for v in values}


def _accuracy(items: Sequence[Scored], counts: Choice) -> dict[str, Any]:
    """Share, interval and number of the pairs that count; a share of None without any."""
    points, sizes = [], []
    for item in items:
        pairs = [(b, w) for b, w in metrics.untied_pairs(item.ranks) if counts(item, b, w)]
        points.append(sum(_point(item.scores, b, w) for b, w in pairs))
        sizes.append(len(pairs))
    low, high = metrics.clustered_wilson(points, sizes)
    share = sum(points) / sum(sizes) if sum(sizes) else None
    return {"accuracy": share, "low": low, "high": high, "pairs": sum(sizes)}


def _point(scores: Sequence[float], better: int, worse: int) -> float:
    margin = scores[better] - scores[worse]
    return 0.5 if margin == 0 else float(margin > 0)


def _same_length(item: Scored, better: int, worse: int) -> bool:
    a, b = item.lengths[better], item.lengths[worse]
    return abs(a - b) <= LIKE * max(a, b)


def _above_length(items: Sequence[Scored], longer: float, rounds: int = 2000) -> dict[str, float]:
    """Accuracy less that of the better of "the longer wins" and "the shorter wins", prompts resampled."""
    lengths = [[float(n) for n in item.lengths] for item in items]
    signed = lengths if longer >= 0.5 else [[-n for n in row] for row in lengths]
    ranks = [item.ranks for item in items]
    ours = np.array(metrics.pair_points([item.scores for item in items], ranks))
    theirs = np.array(metrics.pair_points(signed, ranks))
    gained, pairs = ours[:, 0] - theirs[:, 0], ours[:, 1]
    picks = np.random.default_rng(0).integers(len(items), size=(rounds, len(items)))
    total = pairs[picks].sum(axis=1)
    drawn = gained[picks].sum(axis=1) / np.maximum(total, 1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"margin": float(gained.sum() / pairs.sum()), "low": float(low), "high": float(high)}


def _errors(items: Sequence[Scored]) -> dict[str, Any]:
    """How many pairs are wrong, in how many of them the longer one was taken for better, and the widest."""
    wrong = [
        (item.scores[w] - item.scores[b], n, b, w)
        for n, item in enumerate(items)
        for b, w in metrics.untied_pairs(item.ranks)
        if item.scores[w] > item.scores[b]
    ]
    longer = sum(items[n].lengths[w] > items[n].lengths[b] for _, n, b, w in wrong)
    seen: dict[int, dict[str, Any]] = {}
    for margin, n, b, w in sorted(wrong, reverse=True):
        item = items[n]
        sides = {
            name: {"response": item.responses[i], "rank": item.ranks[i], "score": item.scores[i]}
            for name, i in (("better", b), ("worse", w))
        }
        seen.setdefault(n, {"prompt": item.prompt, "margin": margin, **sides})  # one a prompt
    share = longer / len(wrong) if wrong else None
    return {"pairs": len(wrong), "longer_taken": share, "examples": list(seen.values())[:EXAMPLES]}
