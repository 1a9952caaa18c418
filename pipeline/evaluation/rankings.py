"""A reward model on held-out rankings: what the stage publishes and the report shows."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.evaluation import metrics


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


def measure(items: Sequence[Scored]) -> dict[str, float]:
    """Accuracy on untied pairs, overall and by K, beside the baseline "the longer one wins".

    Also the K-wise loss (mean over prompts of the mean over their pairs), the calibration error of
    the Bradley-Terry probabilities, the correlation of scores with length, and `best_of_n`.
    """
    scores, ranks = [i.scores for i in items], [i.ranks for i in items]
    lengths = [[float(n) for n in i.lengths] for i in items]
    accuracy = metrics.pair_accuracy(scores, ranks)
    margins = [[i.scores[b] - i.scores[w] for b, w in metrics.untied_pairs(i.ranks)] for i in items]
    losses = [sum(map(_log_loss, row)) / len(row) for row in margins if row]
    flat = [m for row in margins for m in row]
    return {
        "accuracy": accuracy.share,
        "pairs": accuracy.pairs,
        "length_baseline": metrics.pair_accuracy(lengths, ranks).share,
        "loss": sum(losses) / len(losses),
        "calibration_error": metrics.calibration_error(metrics.calibration(flat)),
        "score_length_correlation": metrics.pearson(
            [s for row in scores for s in row], [n for row in lengths for n in row]
        ),
        **_by_k("accuracy", scores, ranks),
        **_by_k("length_baseline", lengths, ranks),
        **{f"pairs_k{k}": s.pairs for k, s in metrics.pair_accuracy_by_k(scores, ranks).items()},
        **{f"best_of_{n}": quality for n, quality in best_of_n(items).items()},
    }


def _by_k(name: str, scores: list[list[float]], ranks: list[list[int]]) -> dict[str, float]:
    by_k = metrics.pair_accuracy_by_k(scores, ranks)
    return {f"{name}_k{k}": share.share for k, share in by_k.items()}


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
    return [
        (sum(r < other for other in ranks) + 0.5 * (sum(r == other for other in ranks) - 1))
        / others
        for r in ranks
    ]


def _log_loss(margin: float) -> float:
    """-log sigmoid(margin), without overflow."""
    return max(-margin, 0.0) + math.log1p(math.exp(-abs(margin)))


def write_scored(path: Path, items: Sequence[Scored]) -> None:
    """One JSON line per prompt."""
    lines = [json.dumps(asdict(item), ensure_ascii=False) for item in items]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_scored(path: Path) -> list[Scored]:
    """What `write_scored` wrote."""
    return [
        Scored(**json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line
    ]
