"""Human ratings of restaurant descriptions -> the files this recipe reads.

    python -m configs.e2e.prepare quality.csv data/e2e

`quality.csv` is the file of that name in `human_ratings/` of github.com/tuetschek/e2e-eval: in a row one person has
rated five texts (`ref1`..`ref5`) by how well they say an attribute list (`mr`), 0 to 100 or so (`quality1`..).
"""

import argparse
import csv
import hashlib
import json
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path

SHARES = {"sft": 0.10, "rm": 0.34, "ppo": 0.14, "judge": 0.18, "validation": 0.08, "test": 0.16}
"""Part -> share of the attribute lists. `judge` is what the held-out reward model is made from."""

NEAREST = 10
"""Mean ratings are rounded to a multiple of this. Two or three people's means that are less than 5 apart say nothing:
there the rule of `configs.e2e.rule` agrees with them in .56 of the pairs of the training parts, beyond 10 in .77."""

Ranking = dict  # prompt, responses, scores (rounded mean rating of each), raters


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ratings", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args(argv)
    with args.ratings.open(encoding="utf-8", newline="") as file:
        files = splits(rankings(csv.DictReader(file)))
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (args.out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{len(rows):5} rows, {len({row['prompt'] for row in rows}):4} lists in {name}.jsonl")


def rankings(rows: Iterable[dict[str, str]]) -> list[Ranking]:
    """One ranking for each five texts that the same people rated, by the mean of their ratings, rounded.

    A text that is there twice is one response, with the mean of all its ratings. In the order of the file.
    """
    rated: dict[tuple[str, ...], list[list[float]]] = {}
    for row in rows:
        texts = tuple(row[f"ref{i}"].strip() for i in range(1, 6))
        ratings = [float(row[f"quality{i}"]) for i in range(1, 6)]
        rated.setdefault((row["mr"].strip(), *texts), []).append(ratings)
    out = []
    for (prompt, *texts), ratings in rated.items():
        of_text: dict[str, list[float]] = {}
        for text, column in zip(texts, zip(*ratings, strict=True), strict=True):
            of_text.setdefault(text, []).extend(column)
        scores = [NEAREST * round(statistics.fmean(found) / NEAREST) for found in of_text.values()]
        raters = len(ratings)
        out.append(
            {"prompt": prompt, "responses": list(of_text), "scores": scores, "raters": raters}
        )
    return out


def part(prompt: str) -> str:
    """The part of an attribute list: by its hash, so that it stays where it is whatever else is there."""
    place = int(hashlib.sha256(prompt.encode()).hexdigest()[:13], 16) / 16**13
    for name, share in SHARES.items():
        if place < share:
            return name
        place -= share
    return name


def splits(found: list[Ranking]) -> dict[str, list[dict]]:
    """Name of a file -> its rows; an attribute list is in one part alone."""
    parts: dict[str, list[Ranking]] = {name: [] for name in SHARES}
    for ranking in found:
        parts[part(ranking["prompt"])].append(ranking)
    return {
        "sft": list(demonstrations(parts["sft"])),
        "rm": list(ranked(parts["rm"])),
        "ppo": prompts(parts["ppo"]),
        "validation": prompts(parts["validation"]),
        "test": prompts(parts["test"]),
        "judge_sft": list(demonstrations(parts["judge"])),
        "judge_rm": list(ranked(parts["judge"])),
        # what nobody trains on: is a reward model right about these?
        "validation_rm": list(ranked(parts["validation"])),
        "test_rm": list(ranked(parts["test"])),
        # in the place of a reward model and PPO: the texts that people liked best, of its lists
        "best": list(best(parts["rm"])),
    }


def demonstrations(found: list[Ranking]) -> Iterator[dict]:
    """Every text once, whatever people thought of it."""
    texts = {(ranking["prompt"], text): None for ranking in found for text in ranking["responses"]}
    return ({"prompt": prompt, "completion": text} for prompt, text in texts)


def ranked(found: list[Ranking]) -> Iterator[Ranking]:
    """Rankings that prefer something."""
    return (ranking for ranking in found if len(set(ranking["scores"])) > 1)


def prompts(found: list[Ranking]) -> list[dict]:
    """Every attribute list once, without texts."""
    return [{"prompt": prompt} for prompt in dict.fromkeys(r["prompt"] for r in found)]


def best(found: list[Ranking]) -> Iterator[dict]:
    """The best text of every ranking, the first of equals, once."""
    texts = {}
    for ranking in ranked(found):
        scores = ranking["scores"]
        texts[ranking["prompt"], ranking["responses"][scores.index(max(scores))]] = None
    return ({"prompt": prompt, "completion": text} for prompt, text in texts)


if __name__ == "__main__":
    main()
