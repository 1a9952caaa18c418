"""What to believe of the rankings of several people, who are not equally reliable.

Each pair of a task's responses is a question, each ranking an answer to all of its task's. How reliable a
person is comes from how often they agree with what the others say, where those are sure (symmetric
Dawid-Skene, Applied Statistics 28, 1979, with the person's own vote left out; on a difficult pair the others are not
sure, and it counts little); a task's strengths are those of Bradley and Terry, votes counted by reliability.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from pipeline.feedback.store import Label

BEFORE = 0.8
"""Reliability of a person of whom nothing is known, which counts as much as four sure pairs."""
_PRIOR = (1 - BEFORE) / (2 * BEFORE - 1)
"""Wins each way between any two responses before anyone votes: one vote of such a person then means BEFORE."""
_ROUNDS = 20


@dataclass
class Posterior:
    """Of every task and person with labels."""

    strengths: dict[int, list[float]]
    """(K,) by task: response i is better than j with probability sigmoid(s_i - s_j)."""
    reliability: dict[str, float]
    """By person: the probability of saying rightly which of two is better."""
    difficulty: dict[int, float]
    """By task: 0 = all pairs are sure, 1 = all are a toss-up."""

    def probability(self, label: Label) -> float:
        """The mean probability that a pair of this ranking is the right way round; a tie counts 1/2."""
        return float(
            np.mean([_sigmoid(v * self._apart(label.task, i, j)) for i, j, v in verdicts(label)])
        )

    def _apart(self, task: int, i: int, j: int) -> float:
        return self.strengths[task][i] - self.strengths[task][j]


def verdicts(label: Label) -> list[tuple[int, int, int]]:
    """Every pair i < j of a ranking with 1 (i is better), -1 (j is) or 0 (a tie)."""
    ranks = label.body["ranks"]
    pairs = combinations(range(len(ranks)), 2)
    return [(i, j, (ranks[j] > ranks[i]) - (ranks[j] < ranks[i])) for i, j in pairs]


def posterior(labels: Sequence[Label]) -> Posterior:
    """Of labels of the kind `label`."""
    reliability = reliabilities(labels)
    wins: dict[int, np.ndarray] = {}
    for label in labels:
        k, count = len(label.body["ranks"]), _odds(reliability[label.annotator]) / _odds(BEFORE)
        own = wins.setdefault(label.task, _PRIOR * (1 - np.eye(k)))
        for i, j, verdict in verdicts(label):
            better, worse = (i, j) if verdict * count >= 0 else (j, i)
            own[better, worse] += abs(count) / (1 if verdict else 2)
            own[worse, better] += 0 if verdict else abs(count) / 2
    fitted = {task: bradley_terry(own) for task, own in wins.items()}
    return Posterior(
        {task: [float(s) for s in strengths] for task, strengths in fitted.items()},
        reliability,
        {task: _difficulty(strengths) for task, strengths in fitted.items()},
    )


def reliabilities(labels: Sequence[Label]) -> dict[str, float]:
    """By person; BEFORE of somebody who shares no task with another."""
    names = list(dict.fromkeys(label.annotator for label in labels))
    pairs: dict[tuple[int, int, int], int] = defaultdict(lambda: len(pairs))
    votes = [
        (names.index(label.annotator), pairs[label.task, i, j], verdict)
        for label in labels
        for i, j, verdict in verdicts(label)
    ]
    person, pair, said = np.array(votes, dtype=int).reshape(-1, 3).T
    right = np.full(len(names), BEFORE)
    for _ in range(_ROUNDS):
        own = _odds(right)[person] * said
        others = np.bincount(pair, own, len(pairs))[pair] - own
        sure = np.abs(2 * _sigmoid(others) - 1)
        agrees = np.where(said == 0, 0.5, said == np.sign(others))
        right = (4 * BEFORE + np.bincount(person, sure * agrees, len(names))) / (
            4 + np.bincount(person, sure, len(names))
        )
    return {name: float(value) for name, value in zip(names, right, strict=True)}


def bradley_terry(wins: np.ndarray) -> np.ndarray:
    """(K,) log strengths, mean 0, of (K, K) wins of i over j, all above 0 off the diagonal."""
    import choix

    strengths = choix.ilsr_pairwise_dense(wins)
    return strengths - strengths.mean()


def _difficulty(strengths: np.ndarray) -> float:
    """2 min(p, 1 - p), averaged over the pairs."""
    pairs = combinations(strengths, 2)
    return float(np.mean([2 * _sigmoid(-abs(a - b)) for a, b in pairs]))


def _odds(right):
    """Log odds of being right, of at most 19 : 1 either way."""
    bounded = np.clip(right, 0.05, 0.95)
    return np.log(bounded / (1 - bounded))


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))
