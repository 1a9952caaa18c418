"""From graded answers to tables: means, shares, win rates and best-of-n, whole and by group; pure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.evaluation import metrics

Groups = dict[str, dict[str, list[int]]]
"""Key -> value -> indices of the rows with that value."""


@dataclass
class Answers:
    """One answer of one model to each of P prompts."""

    texts: list[str]
    lengths: list[int]  # tokens, EOS included
    ended: list[bool]
    grades: dict[str, Sequence[float]] = field(default_factory=dict)
    """judge, exact, rm_score, token_f1, ...: those that somebody gave."""

    def columns(self) -> dict[str, Sequence[float]]:
        """Name -> one number per prompt."""
        return {"length": self.lengths, "ended": self.ended, **self.grades}

    def at(self, places: Sequence[int]) -> "Answers":
        """Some of them."""
        texts, lengths, ended = self.texts, self.lengths, self.ended
        return Answers(
            [texts[i] for i in places],
            [lengths[i] for i in places],
            [ended[i] for i in places],
            {name: [values[i] for i in places] for name, values in self.grades.items()},
        )

    def row(self, i: int) -> dict[str, Any]:
        """The i-th answer as a line of a samples file has it."""
        numbers = {name: values[i] for name, values in self.columns().items()}
        return {"response": self.texts[i], **numbers}


def memberships(rows: Sequence[dict], keys: Sequence[str]) -> Groups:
    """Groups of rows by these keys; rows without a key are left out."""
    out: Groups = {}
    for key in keys:
        there = [(i, str(row[key])) for i, row in enumerate(rows) if row.get(key) is not None]
        values = sorted({value for _, value in there})
        members = {v: [i for i, value in there if value == v] for v in values}
        if members:
            out[key] = members
    return out


def by_group(groups: Groups, measure: Callable[[list[int]], Any]) -> dict[str, dict[str, Any]]:
    """What `measure` makes of the rows of each value of each key."""
    return {
        key: {value: measure(rows) for value, rows in members.items()}
        for key, members in groups.items()
    }


def means(columns: dict[str, Sequence[float]], indices: Sequence[int]) -> dict[str, float]:
    """Mean of each column over some rows, and their number `n`."""
    sums = {name: sum(float(values[i]) for i in indices) for name, values in columns.items()}
    return {"n": len(indices), **{name: total / len(indices) for name, total in sums.items()}}


def summary(answers: Answers, groups: Groups) -> dict[str, Any]:
    """Means over all prompts and, under `groups`, over the prompts of each value of each key."""
    columns = answers.columns()
    whole = means(columns, range(len(answers.texts)))
    return {**whole, "groups": by_group(groups, lambda rows: means(columns, rows))}


def comparison(first: Sequence[float], second: Sequence[float], groups: Groups) -> dict[str, Any]:
    """Win rate of one model's grades over another's, the mean difference, and both by group."""

    def rate(rows: Sequence[int]) -> dict[str, Any]:
        return metrics.win_rate([first[i] for i in rows], [second[i] for i in rows])._asdict()

    difference = [a - b for a, b in zip(first, second, strict=True)]
    low, high = metrics.bootstrap_mean(difference)
    return {
        **rate(range(len(first))),
        "difference": sum(difference) / len(difference),
        "difference_low": low,
        "difference_high": high,
        "groups": by_group(groups, rate),
    }


def agreement(
    scores: Sequence[Sequence[float]],
    grades: Sequence[Sequence[float]],
    lengths: Sequence[Sequence[float]],
) -> dict[str, Any]:
    """A reward model against a judge on K candidates of each of P prompts; all (P, K).

    Accuracy on the pairs that the judge does not tie, with Wilson's interval (pairs of one prompt
    hang together), and the baseline "the longer one wins".
    """
    ranks = [[-g for g in grade] for grade in grades]
    accuracy = metrics.pair_accuracy(scores, ranks)
    low, high = metrics.clustered_wilson(*zip(*metrics.pair_points(scores, ranks), strict=True))
    return {
        "pairs": accuracy.pairs,
        "accuracy": accuracy.share if accuracy.pairs else None,
        "accuracy_low": low,
        "accuracy_high": high,
        "length_baseline": metrics.pair_accuracy(lengths, ranks).share if accuracy.pairs else None,
    }


def best_of(
    scores: Sequence[Sequence[float]], grades: Sequence[Sequence[float]]
) -> list[dict[str, float]]:
    """Best-of-n by a reward model for n = 1, 2, 4, ... up to K, means over prompts; both (P, K).

    Each row: n, KL in nats from the model sampled, the judge's grade and the reward model's score
    of what the reward model picks, and the grade of what the judge itself would pick.
    """

    def mean(proxies: Sequence[Sequence[float]], golds: Sequence[Sequence[float]]) -> float:
        pairs = zip(proxies, golds, strict=True)
        return sum(metrics.best_of_n(proxy, gold, n) for proxy, gold in pairs) / len(scores)

    n, out = 1, []
    while n <= len(scores[0]):
        out.append(
            {
                "n": n,
                "kl": metrics.kl_of_best_of_n(n),
                "judge": mean(scores, grades),
                "rm_score": mean(scores, scores),
                "judge_by_judge": mean(grades, grades),
            }
        )
        n *= 2
    return out
