"""chrF, the F-score of character n-grams (Popović 2015, doi 10.18653/v1/W15-3049), by sacrebleu: 0 to 100.

As a reward in ppo.yaml: `rewards: [{function: pipeline.evaluation.chrf:reward}]`; as a labeler in rm.yaml, in
the place of people: `labeler: pipeline.evaluation.chrf`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.cli import reporting_errors
from pipeline.errors import UserError
from pipeline.evaluation.tallies import Groups
from pipeline.process.files import jsonl, read_jsonl

try:
    from sacrebleu import corpus_chrf, sentence_chrf
except ImportError:
    raise UserError("chrF needs the sacrebleu package: pip install sacrebleu") from None

COLUMNS = ("reference", "output")
"""Where a reward looks for the right answer, in this order."""


def corpus(texts: Sequence[str], references: Sequence[str]) -> float:
    """chrF of all texts together, each against its reference."""
    return corpus_chrf(texts, [references]).score


def add(
    summary: dict[str, Any], texts: Sequence[str], references: Sequence[str], groups: Groups
) -> None:
    """Put it among the other numbers of a model's answers, whole and by group (see `tallies.summary`)."""
    summary["chrf"] = corpus(texts, references)
    for key, members in groups.items():
        for value, rows in members.items():
            chosen = [texts[i] for i in rows], [references[i] for i in rows]
            summary["groups"][key][value]["chrf"] = corpus(*chosen)


def reward(prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict]) -> list[float]:
    """chrF of each response against its row's `reference`, else `output`; UserError without both."""
    pairs = zip(responses, rows, strict=True)
    return [sentence_chrf(response, [_reference(row)]).score for response, row in pairs]


def _reference(row: dict) -> str:
    for name in COLUMNS:
        if isinstance(row.get(name), str):
            return row[name]
    raise UserError(
        f"chrf: a prompt's row has no text under {' or '.join(COLUMNS)}: {', '.join(row)}"
    )


def label(row: dict[str, Any]) -> dict[str, Any]:
    """A samples row with `ranks` by chrF: 1 = best, equal scores tie."""
    scores = reward([], row["responses"], [row] * len(row["responses"]))
    return {**row, "ranks": [1 + sum(other > mine for other in scores) for mine in scores]}


def main() -> None:
    """Command line of a labeler; it draws nothing, so a seed changes nothing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int)
    args = parser.parse_args()
    args.out.write_text(jsonl(map(label, read_jsonl(args.samples))), encoding="utf-8")


if __name__ == "__main__":
    with reporting_errors():
        main()
