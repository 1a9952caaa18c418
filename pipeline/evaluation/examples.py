"""Samples worth looking at: errors first, then the worst and best by judge and by score, and tokens in colours."""

from collections.abc import Callable, Sequence
from typing import Any

from pipeline import steps
from pipeline.evaluation.record import Record

EACH = 8
"""Samples of a kind."""
MEASURES = {
    "advantage": "advantage",
    "reward": "reward",
    "kl": "KL to SFT, nats",
    "value": "value",
}
"""Of a token, with their titles."""

Sample = dict[str, Any]


def sample_lists(record: Record) -> dict[str, list[Sample]]:
    """Title -> prompts with the answers of the last two policies; those that are alike in kind, the most
    telling first, and the first ones as they come."""
    rows = [_sample(row) for row in record.samples]
    first = int((record.result.get("config") or {}).get("samples", 40))
    fooled = [row for row in rows if (_gain(row, "rm_score") or 0) > 0 > (_gain(row, "judge") or 0)]
    lists = {
        "Errors: the reward model's score rose and the judge's grade fell": _by(fooled, _gained),
        "Worst by the judge": _by(rows, _of("judge")),
        "Worst by the reward model": _by(rows, _of("rm_score")),
        "Best by the judge": _by(rows, _of("judge"), best=True),
        "Best by the reward model": _by(rows, _of("rm_score"), best=True),
        "The first ones": rows[:first],
    }
    return {title: found for title, found in lists.items() if found}


def _sample(row: dict[str, Any]) -> Sample:
    names = [name for name in steps.policies() if name in row["answers"]][-2:]
    answers = [{"name": name, **row["answers"][name]} for name in names]
    grades = [answer["judge"] for answer in answers if answer.get("judge") is not None]
    if len(set(grades)) == 2:
        answers[grades[1] > grades[0]]["better"] = True
    return {"prompt": row["prompt"], "groups": row["groups"], "answers": answers}


def _of(key: str) -> Callable[[Sample], float | None]:
    return lambda row: row["answers"][-1].get(key) if row["answers"] else None


def _gain(row: Sample, key: str) -> float | None:
    """What the last policy has over the one before it."""
    found = [answer[key] for answer in row["answers"] if answer.get(key) is not None]
    return found[1] - found[0] if len(found) == 2 else None


def _gained(row: Sample) -> float | None:
    return _gain(row, "judge")


def _by(
    rows: Sequence[Sample], key: Callable[[Sample], float | None], best: bool = False
) -> list[Sample]:
    known = [(value, row) for row in rows if (value := key(row)) is not None]
    return [row for _, row in sorted(known, key=lambda pair: pair[0], reverse=best)[:EACH]]


def token_view(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Episodes of the last recorded iteration, every token with its numbers and their colours.

    Colours: red below 0, green above it, blue for KL, as strong as the number beside the largest one shown
    but for one in fifty.
    """
    last = max((row["step"] for row in rows), default=0)
    shown = [row for row in rows if row["step"] == last]
    there = [name for name in MEASURES if any(name in row for row in shown)]
    limits = {name: _limit([x for row in shown for x in row[name]]) for name in there}
    return {
        "iteration": last,
        "measures": {name: MEASURES[name] for name in there},
        "limits": limits,
        "episodes": [
            {
                "prompt": row["prompt"],
                "score": row["score"],
                "ended": row["ended"],
                "tokens": [
                    {
                        "text": text,
                        "numbers": {name: row[name][at] for name in there},
                        "style": "; ".join(
                            f"--{name}: {_colour(name, row[name][at] / limits[name])}"
                            for name in there
                        ),
                    }
                    for at, text in enumerate(row["tokens"])
                ],
            }
            for row in shown
        ],
    }


def _limit(numbers: list[float]) -> float:
    sizes = sorted(map(abs, numbers))
    return (sizes[int(0.98 * (len(sizes) - 1))] if sizes else 0.0) or 1.0


def _colour(name: str, share: float) -> str:
    """A background that words stay readable on, in light and dark."""
    hue = "47, 111, 235" if name == "kl" else "218, 54, 51" if share < 0 else "46, 160, 67"
    return f"rgba({hue}, {0.45 * min(1.0, abs(share)):.2f})"
