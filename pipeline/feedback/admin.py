"""How labelling goes: progress, how far people agree, who is to be believed, what to look at and to ask next."""

import threading
from collections import Counter, defaultdict
from collections.abc import Sequence
from statistics import mean, median
from typing import Any

import numpy as np

from pipeline.feedback.posterior import Posterior, posterior, verdicts
from pipeline.feedback.store import Label, Store, Task

SHOWN = 20
"""Disagreements, and tasks worth labelling, that are listed."""


class Overview:
    """The admin's numbers; computed again when something was said since."""

    def __init__(self, store: Store):
        self.store = store
        self._lock = threading.Lock()
        self._made: tuple[Any, dict[str, Any]] = (None, {})

    def told(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        with self._lock:
            state = (self.store.newest(), self.store.people())
            if self._made[0] != state:
                self._made = (state, overview(self.store))
            return self._made[1]


def overview(store: Store) -> dict[str, Any]:
    """Progress, agreement, people, disagreements and what is worth labelling."""
    tasks, said = store.tasks(), store.labels()
    real = [one for one in said if tasks[one.task].last is None]
    labels = [one for one in real if one.kind == "label"]
    believed = posterior(labels)
    agreed = agreement(labels)
    return {
        "progress": progress(store, tasks, real),
        "agreement": {
            "pairs": sum(agreed.pairs.values()) // 2,
            "share": agreed.share(),
            "alpha": alpha(labels),
        },
        "people": [
            _person(name, is_admin, invited, tasks, said, agreed, believed)
            for name, is_admin, invited in store.people()
        ],
        "disagreements": _disagreements(tasks, labels, believed),
        "next": {
            by: [
                {"task": n, "worth": round(worth, 3), "prompt": _short(tasks[n])}
                for n, worth in _worth(by, tasks, labels, believed)[:SHOWN]
            ]
            for by in ("disagreement", "margin")
        },
    }


def progress(store: Store, tasks: dict[int, Task], said: Sequence[Label]) -> dict[str, Any]:
    """Counts of tasks, of labels and of why tasks were skipped; attention checks left out."""
    per = Counter(one.task for one in said if one.kind == "label")
    wanted = {n: votes for n, votes in store.wanted().items() if tasks[n].last is None}
    skips = Counter(str(one.body.get("reason")) for one in said if one.kind == "skip")
    return {
        "tasks": len(wanted),
        "labelled": sum(per[n] > 0 for n in wanted),
        "complete": sum(per[n] >= votes for n, votes in wanted.items()),
        "labels": per.total(),
        "wanted": sum(max(votes, per[n]) for n, votes in wanted.items()),
        "skips": dict(skips.most_common()),
    }


# --- agreement ------------------------------------------------------------------------------------


class agreement:
    """Of every two people about every pair of responses that both told apart, how often they agree."""

    def __init__(self, labels: Sequence[Label]):
        self.pairs: Counter[str] = Counter()
        self.same: Counter[str] = Counter()
        for votes in _votes(labels).values():
            for name, verdict in votes.items():
                others = [v for other, v in votes.items() if other != name and v]
                if verdict:
                    self.pairs[name] += len(others)
                    self.same[name] += others.count(verdict)

    def share(self, name: str | None = None) -> float | None:
        """Of one person with the rest, or of all; None where nobody shares a task."""
        pairs, same = (
            (self.pairs.total(), self.same.total())
            if name is None
            else (self.pairs[name], self.same[name])
        )
        return round(same / pairs, 4) if pairs else None


def alpha(labels: Sequence[Label]) -> float | None:
    """Krippendorff's alpha, ordinal, of worse, tie, better for every pair of a task's responses, in both
    orders, so that which is shown first plays no part; None where no two people judged the same, or all said ties."""
    import krippendorff

    votes = [own for own in _votes(labels).values() if len(own) > 1]
    if not any(verdict for own in votes for verdict in own.values()):
        return None
    names = list(dict.fromkeys(name for own in votes for name in own))
    table = np.array([[own.get(name, np.nan) for own in votes] for name in names])
    table = np.concatenate([table, -table], axis=1)
    return round(float(krippendorff.alpha(table, level_of_measurement="ordinal")), 4)


def _votes(labels: Sequence[Label]) -> dict[tuple[int, int, int], dict[str, int]]:
    """By task and pair what each person said, as `posterior.verdicts`."""
    out: dict[tuple[int, int, int], dict[str, int]] = defaultdict(dict)
    for label in labels:
        for i, j, verdict in verdicts(label):
            out[label.task, i, j][label.annotator] = verdict
    return out


# --- people and tasks -----------------------------------------------------------------------------


def _person(
    name: str,
    is_admin: bool,
    invited: bool,
    tasks: dict[int, Task],
    said: Sequence[Label],
    agreed: agreement,
    believed: Posterior,
) -> dict[str, Any]:
    own = [one for one in said if one.annotator == name]
    labels = [one for one in own if one.kind == "label" and tasks[one.task].last is None]
    checks = [passed(tasks[one.task], one) for one in own if tasks[one.task].last is not None]
    seconds = [one.body["seconds"] for one in labels if one.body.get("seconds") is not None]
    reliability = believed.reliability.get(name)
    return {
        "name": name,
        "admin": is_admin,
        "invited": invited,
        "labels": len(labels),
        "skips": sum(one.kind == "skip" for one in own),
        "seconds": round(median(seconds), 1) if seconds else None,
        "agreement": agreed.share(name),
        "reliability": None if reliability is None else round(reliability, 3),
        "checks": [sum(checks), len(checks)],
    }


def passed(task: Task, label: Label) -> bool:
    """Whether an attention check's answer that asks to be last is last, and alone there."""
    ranks = label.body.get("ranks") or []
    return bool(ranks) and ranks.count(max(ranks)) == 1 and ranks.index(max(ranks)) == task.last


def _disagreements(
    tasks: dict[int, Task], labels: Sequence[Label], believed: Posterior
) -> list[dict[str, Any]]:
    """Tasks of several people, the most disputed first: each ranking with the probability that it is right."""
    several: dict[int, list[Label]] = defaultdict(list)
    for label in labels:
        several[label.task].append(label)
    disputed = [
        n for n, own in several.items() if len({tuple(one.body["ranks"]) for one in own}) > 1
    ]
    disputed.sort(key=lambda n: -believed.difficulty[n])
    return [
        {
            "task": n,
            "difficulty": round(believed.difficulty[n], 3),
            "prompt": _short(tasks[n]),
            "responses": [one.text[:400] for one in tasks[n].candidates],
            "rankings": [
                {
                    "name": one.annotator,
                    "ranks": one.body["ranks"],
                    "probability": round(believed.probability(one), 3),
                    "comment": one.body.get("comment") or "",
                }
                for one in several[n]
            ],
        }
        for n in disputed[:SHOWN]
    ]


def worth_labelling(store: Store, by: str) -> list[tuple[int, float]]:
    """Tasks with what another label of each is worth (0 to 1), the most first: `disagreement`, of those who
    have labelled it; `margin`, how little the reward model tells its responses apart."""
    tasks = store.tasks()
    labels = [n for n in store.labels() if n.kind == "label" and tasks[n.task].last is None]
    return _worth(by, tasks, labels, posterior(labels))


def _worth(
    by: str, tasks: dict[int, Task], labels: Sequence[Label], believed: Posterior
) -> list[tuple[int, float]]:
    if by == "margin":
        worth = {n: _unsure([one.score for one in task.candidates]) for n, task in tasks.items()}
    else:
        people = Counter(label.task for label in labels)
        worth = {n: believed.difficulty[n] for n, several in people.items() if several > 1}
    fit = [(n, w) for n, w in worth.items() if w is not None and tasks[n].last is None]
    return sorted(fit, key=lambda item: (-item[1], item[0]))


def _unsure(scores: list[float | None]) -> float | None:
    """2 min(p, 1 - p) of the reward model, averaged over the pairs; None without its scores."""
    known = [score for score in scores if score is not None]
    if len(known) < len(scores):
        return None
    apart = [abs(a - b) for i, a in enumerate(known) for b in known[:i]]
    return mean(2 / (1 + float(np.exp(min(gap, 50)))) for gap in apart)


def _short(task: Task) -> str:
    return task.prompt[-1]["content"][:300]
