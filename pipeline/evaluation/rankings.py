"""A reward model on held-out rankings: what the stage publishes and the report shows."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.evaluation import metrics
from pipeline.process.files import jsonl, read_jsonl

HELD_OUT = "held_out.jsonl"


@dataclass
class Scored:
    """One prompt with its K ranked responses and a reward model's scores of them."""

    prompt: str
    responses: list[str]
    ranks: list[int]
    """1 = best; equal ranks tie."""
    lengths: list[int]
    """Tokens of each response, EOS included."""
    scores: list[float]
    row: dict[str, Any] | None = None
    """The row of the data as judges read it; older artifacts have none."""


@dataclass
class Measured:
    """What a reward model's scores say about rankings that it was not trained on."""

    prompts: int
    accuracy: metrics.Share
    """On untied pairs; equal scores are half right."""
    interval: metrics.Interval
    """Of the accuracy, 95 %, pairs of one prompt hanging together."""
    length_baseline: float
    """Accuracy of "the longer one wins"."""
    by_k: dict[int, metrics.Share]
    length_by_k: dict[int, metrics.Share]
    loss: float
    """Mean over prompts of the mean over their pairs of -log sigmoid(better - worse)."""
    calibration: list[metrics.CalibrationRow]
    calibration_error: float
    """Of the Bradley-Terry probabilities."""
    pearson: float
    """Correlation of scores with length."""
    best_of_n: dict[int, float]
    points: list[tuple[int, float]]
    """(length in tokens, score) of every response."""

    def metrics(self) -> dict[str, float]:
        """Flat, as a manifest and the record have them."""
        return {
            "accuracy": self.accuracy.share,
            "pairs": self.accuracy.pairs,
            "accuracy_low": self.interval.low,
            "accuracy_high": self.interval.high,
            "length_baseline": self.length_baseline,
            "loss": self.loss,
            "calibration_error": self.calibration_error,
            "score_length_correlation": self.pearson,
            **{f"accuracy_k{k}": part.share for k, part in self.by_k.items()},
            **{f"length_baseline_k{k}": part.share for k, part in self.length_by_k.items()},
            **{f"pairs_k{k}": part.pairs for k, part in self.by_k.items()},
            **{f"best_of_{n}": quality for n, quality in self.best_of_n.items()},
        }


def measure(items: Sequence[Scored]) -> Measured:
    """Measure scored rankings; ValueError without a pair, UserError when a score is no number."""
    scores, ranks = [i.scores for i in items], [i.ranks for i in items]
    lengths = [[float(n) for n in i.lengths] for i in items]
    if bad := sum(not math.isfinite(score) for row in scores for score in row):
        raise UserError(
            f"rm: {bad} scores of held-out responses are not finite; train it again, more gently"
        )
    margins = [[i.scores[b] - i.scores[w] for b, w in metrics.untied_pairs(i.ranks)] for i in items]
    losses = [sum(map(_log_loss, row)) / len(row) for row in margins if row]
    if not losses:
        raise ValueError("no ranking has an untied pair")
    table = metrics.calibration([m for row in margins for m in row])
    points = [pair for i in items for pair in zip(i.lengths, i.scores, strict=True)]
    x, y = zip(*points, strict=True)
    return Measured(
        prompts=len(items),
        accuracy=metrics.pair_accuracy(scores, ranks),
        interval=metrics.clustered_wilson(*zip(*metrics.pair_points(scores, ranks), strict=True)),
        length_baseline=metrics.pair_accuracy(lengths, ranks).share,
        by_k=metrics.pair_accuracy_by_k(scores, ranks),
        length_by_k=metrics.pair_accuracy_by_k(lengths, ranks),
        loss=sum(losses) / len(losses),
        calibration=table,
        calibration_error=metrics.calibration_error(table),
        pearson=metrics.pearson(y, x),
        best_of_n=best_of_n(items),
        points=points,
    )


def best_of_n(items: Sequence[Scored]) -> dict[int, float]:
    """n -> expected quality of the response scored highest among n random ones of its prompt's K.

    Quality is a person's word, not the model's: the share of the other responses that a response
    beats in the ranking, ties half. For n = 1 it is 0.5 whatever the model. n goes up to the
    commonest K, over the prompts that have so many, so that every n is asked of the same prompts.
    """
    sizes = [len(item.ranks) for item in items]
    largest = max(sorted(set(sizes)), key=sizes.count)
    chosen = [item for item in items if len(item.ranks) >= largest]
    return {
        n: sum(metrics.best_of_n(i.scores, quality(i.ranks), n) for i in chosen) / len(chosen)
        for n in range(1, largest + 1)
    }


def quality(ranks: Sequence[float]) -> list[float]:
    """Share of the other responses that each response beats; ties count half."""
    others = len(ranks) - 1
    beaten = [sum(r < other for other in ranks) for r in ranks]
    ties = [sum(r == other for other in ranks) - 1 for r in ranks]
    return [(b + 0.5 * t) / others for b, t in zip(beaten, ties, strict=True)]


def _log_loss(margin: float) -> float:
    """-log sigmoid(margin), without overflow."""
    return max(-margin, 0.0) + math.log1p(math.exp(-abs(margin)))


def write_scored(folder: Path, items: Sequence[Scored]) -> None:
    """One JSON line per prompt, in a reward model's folder."""
    (folder / HELD_OUT).write_text(jsonl(map(asdict, items)), encoding="utf-8")


def read_scored(folder: Path) -> list[Scored]:
    """What `write_scored` wrote; nothing where there is no such file, or no pair in it to be right about."""
    items = [Scored(**row) for row in read_jsonl(folder / HELD_OUT)]
    return items if any(len(set(item.ranks)) > 1 for item in items) else []
