"""From graded answers to tables: means, shares, win rates and best-of-n, whole and by group; pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.evaluation import metrics


@dataclass
class Answers:
    """One answer of one model to each of P prompts; grades that nobody gave are None."""

    texts: list[str]
    lengths: list[int]  # tokens, EOS included
    ended: list[bool]
    judge: list[float] | None = None
    exact: list[bool] | None = None
    rm_score: list[float] | None = None
    extra: dict[str, list[float]] = field(default_factory=dict)  # token_f1, ...

    def columns(self) -> dict[str, Sequence[float]]:
        """Name -> one number per prompt."""
        named: dict[str, Sequence[float] | None] = {
            "length": self.lengths,
            "ended": self.ended,
            "judge": self.judge,
            "exact": self.exact,
            "rm_score": self.rm_score,
        }
        return {name: values for name, values in named.items() if values is not None} | self.extra

    def row(self, i: int) -> dict[str, Any]:
        """The i-th answer as a line of a samples file has it."""
        numbers = {name: values[i] for name, values in self.columns().items()}
        return {"response": self.texts[i], **numbers}


def memberships(rows: Sequence[dict], keys: Sequence[str]) -> dict[str, dict[str, list[int]]]:
    """key -> value -> indices of the rows with that value; rows without the key are left out."""
    out: dict[str, dict[str, list[int]]] = {}
    for key in keys:
        there = [(i, str(row[key])) for i, row in enumerate(rows) if row.get(key) is not None]
        values = sorted({value for _, value in there})
        members = {v: [i for i, value in there if value == v] for v in values}
        if members:
            out[key] = members
    return out


def means(columns: dict[str, Sequence[float]], indices: Sequence[int]) -> dict[str, float]:
    """Mean of each column over some rows, and their number `n`."""
    chosen = {name: [float(values[i]) for i in indices] for name, values in columns.items()}
    return {
        "n": len(indices),
        **{name: sum(values) / len(values) for name, values in chosen.items()},
    }


def summary(answers: Answers, groups: dict[str, dict[str, list[int]]]) -> dict[str, Any]:
    """Means over all prompts and, under `groups`, over the prompts of each value of each key."""
    columns = answers.columns()
    whole = means(columns, range(len(answers.texts)))
    parts = {
        key: {value: means(columns, rows) for value, rows in members.items()}
        for key, members in groups.items()
    }
    return {**whole, "groups": parts}


def comparison(
    first: Sequence[float], second: Sequence[float], groups: dict[str, dict[str, list[int]]]
) -> dict[str, Any]:
    """Win rate of one model's grades over another's, the mean difference, and both by group."""
    difference = [a - b for a, b in zip(first, second, strict=True)]
    low, high = metrics.bootstrap_mean(difference)
    return {
        **metrics.win_rate(first, second)._asdict(),
        "difference": sum(difference) / len(difference),
        "difference_low": low,
        "difference_high": high,
        "groups": {
            key: {
                value: metrics.win_rate(
                    [first[i] for i in rows], [second[i] for i in rows]
                )._asdict()
                for value, rows in members.items()
            }
            for key, members in groups.items()
        },
    }


def agreement(
    scores: Sequence[Sequence[float]],
    grades: Sequence[Sequence[float]],
    lengths: Sequence[Sequence[int]],
) -> dict[str, Any]:
    """A reward model against a judge on K candidates of each of P prompts; all (P, K).

    Accuracy on the pairs that the judge does not tie, with Wilson's interval (pairs of one prompt
    hang together), the baseline "the longer one wins", and how far scores and grades follow length.
    """
    ranks = [[-g for g in grade] for grade in grades]
    accuracy = metrics.pair_accuracy(scores, ranks)
    low, high = metrics.clustered_wilson(*zip(*metrics.pair_points(scores, ranks), strict=True))
    flat_scores = [s for row in scores for s in row]
    flat_lengths = [float(n) for row in lengths for n in row]
    return {
        "pairs": accuracy.pairs,
        "accuracy": accuracy.share if accuracy.pairs else None,
        "accuracy_low": low,
        "accuracy_high": high,
        "length_baseline": metrics.pair_accuracy(lengths, ranks).share if accuracy.pairs else None,
        "score_length_pearson": metrics.pearson(flat_scores, flat_lengths),
        "score_length_spearman": metrics.spearman(flat_scores, flat_lengths),
        "judge_length_pearson": metrics.pearson([g for row in grades for g in row], flat_lengths),
        "score_judge_pearson": metrics.pearson(flat_scores, [g for row in grades for g in row]),
    }


def best_of(
    scores: Sequence[Sequence[float]], grades: Sequence[Sequence[float]]
) -> list[dict[str, float]]:
    """Best-of-n by a reward model for n = 1, 2, 4, ... up to K, means over prompts; both (P, K).

    Each row: n, KL in nats from the model sampled, the judge's grade and the reward model's score
    of what the reward model picks, and the grade of what the judge itself would pick.
    """
    n, out = 1, []
    while n <= len(scores[0]):
        pairs = list(zip(scores, grades, strict=True))
        out.append(
            {
                "n": n,
                "kl": metrics.kl_of_best_of_n(n),
                "judge": _mean([metrics.best_of_n(s, g, n) for s, g in pairs]),
                "rm_score": _mean([metrics.best_of_n(s, s, n) for s, _ in pairs]),
                "judge_by_judge": _mean([metrics.best_of_n(g, g, n) for _, g in pairs]),
            }
        )
        n *= 2
    return out


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
