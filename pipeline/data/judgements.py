"""Judgements of several people made one, and answers that were judged alone made comparisons."""

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from typing import Any

from pipeline.data.forms import demonstration, first_of
from pipeline.data.meaning import check_whole, label_of, two_answers
from pipeline.data.messages import Message
from pipeline.data.problems import BadRow, Report
from pipeline.data.readers import Row
from pipeline.data.trees import MOST

LISTS = ("responses", "completions", "answers")


def consensus(ballots: Sequence[Sequence[float | None]]) -> list[float | None]:
    """One place per response, lower = better, from those that several people gave; None = not judged.

    By majority, pair by pair: of the people who told two apart more must have preferred one, else the
    two tie; a response's place is by how many others it beats, less those that beat it (Copeland).
    """
    points = [0] * len(ballots[0])
    for a, b in combinations(range(len(points)), 2):
        pairs = [(ballot[a], ballot[b]) for ballot in ballots]
        votes = [(x < y) - (x > y) for x, y in pairs if x is not None and y is not None]
        won = (sum(votes) > 0) - (sum(votes) < 0)
        points[a], points[b] = points[a] + won, points[b] - won
    judged = [any(place is not None for place in column) for column in zip(*ballots, strict=True)]
    return [-float(p) if is_so else None for p, is_so in zip(points, judged, strict=True)]


def paired(rows: Iterable[Row], report: Report) -> Iterator[Row]:
    """Rows as they are and, in the place of answers labelled one by one (KTO's data), a ranked list for
    each prompt that has answers of both kinds."""
    first: dict[str, Row] = {}
    asked: dict[str, list[Message]] = {}
    votes: dict[str, dict[str, int]] = {}
    for row in rows:
        label = label_of(row.values)
        if label is None or first_of(row.values, (*LISTS, "rejected")) or two_answers(row.values):
            yield row
            continue
        try:
            check_whole(row.values)
            *prompt, answer = demonstration(row.values)
        except BadRow as error:
            report.problem(row.where, error)
            continue
        key = json.dumps(prompt)
        first.setdefault(key, row)
        asked.setdefault(key, prompt)
        votes.setdefault(key, {}).setdefault(answer["content"], 0)
        votes[key][answer["content"]] += 1 if label else -1
    for key, row in first.items():
        good = [answer for answer, vote in votes[key].items() if vote > 0]
        bad = [answer for answer, vote in votes[key].items() if vote < 0]
        report.count(
            "answers labelled both ways equally often left out", len(votes[key]) - len(good + bad)
        )
        if good and bad:
            yield Row(row.values | _ranked(asked[key], good, bad), row.where)
        else:
            report.count(
                "prompts whose answers are all labelled alike left out: a comparison needs both kinds of "
                "one prompt"
            )


def _ranked(prompt: list[Message], good: list[str], bad: list[str]) -> dict[str, Any]:
    """Of more answers than can be ranked as many of each kind as there are, or half."""
    good = good[: max(MOST // 2, MOST - len(bad))]
    bad = bad[: MOST - len(good)]
    ranks = [1] * len(good) + [2] * len(bad)
    return {"messages": prompt, "responses": good + bad, "ranks": ranks}
