"""Who ranks the responses that wait in a `to_rank.jsonl`, other than by hand: a judge of pairs."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from pipeline.data.rankings import dense_ranks
from pipeline.data.waiting import Waiting
from pipeline.evaluation.panel import Contest, Judging
from pipeline.evaluation.tallies import Answers


def rank_by(judging: Judging, path: Path) -> int:
    """Put a judge's ranks into those lines that have none, by the wins of each response over the others, half
    for a tie or where it says nothing; how many lines that were. Nothing is written before all are ranked, or where the file has changed meanwhile (UserError)."""
    file = Waiting(path)
    waiting = [row.values for row in file.rows.values()]
    pairs = [
        (row, *pair) for row in waiting for pair in combinations(range(len(row["responses"])), 2)
    ]
    if not pairs:
        return 0
    verdicts, _ = judging(
        Contest(
            [row["prompt"] for row, _, _ in pairs],
            [row for row, _, _ in pairs],
            _answers([(row, i) for row, i, _ in pairs]),
            _answers([(row, j) for row, _, j in pairs]),
        )
    )
    points: dict[int, list[float]] = {id(row): [0.0] * len(row["responses"]) for row in waiting}
    for (row, i, j), verdict in zip(pairs, verdicts, strict=True):
        won = 0.5 if verdict is None else verdict
        points[id(row)][i] += won
        points[id(row)][j] += 1 - won
    file.put(
        {at: dense_ranks([-won for won in points[id(row.values)]]) for at, row in file.rows.items()}
    )
    return len(waiting)


def _answers(of: Sequence[tuple[dict[str, Any], int]]) -> Answers:
    """The i-th response of each row; nobody needs their lengths."""
    ended = [(row.get("ended") or [True] * len(row["responses"]))[i] for row, i in of]
    return Answers([row["responses"][i] for row, i in of], [0] * len(of), ended)
