"""A simulated labeler: ranks K replies to a prompt as a noisy human would.

Plackett-Luce on gold: each reply's perceived worth is gold / temperature plus Gumbel noise, and
replies are ranked by it. Replies of equal gold cannot be told apart and share one draw, so they
tie.

    python -m pipeline.tiny.labeler --samples samples.jsonl --out rankings.jsonl --seed 7
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path

from pipeline.process.files import jsonl
from pipeline.tiny import gold

TEMPERATURE = 0.5


def rank(worths: list[float], rng: random.Random, temperature: float = TEMPERATURE) -> list[int]:
    """Ranks drawn by Plackett-Luce: 1 = best, equal worth = equal rank, as in 1 2 2 4."""
    perceived = {}
    for worth in sorted({round(w, 6) for w in worths}):
        gumbel = -math.log(-math.log(rng.uniform(1e-12, 1 - 1e-12)))
        perceived[worth] = worth / temperature + gumbel
    seen = [perceived[round(w, 6)] for w in worths]
    return [1 + sum(other > mine for other in seen) for mine in seen]


def last_user_text(prompt: list[dict]) -> str:
    return next(m["content"] for m in reversed(prompt) if m["role"] == "user")


def label(row: dict, rng: random.Random, temperature: float = TEMPERATURE) -> dict:
    """One samples row with `ranks`; other keys are kept. `ended` (list of bool) is heeded if there."""
    text = last_user_text(row["prompt"])
    responses = row["responses"]
    worths = gold.score(
        [text] * len(responses), responses, [row] * len(responses), ended=row.get("ended")
    )
    return {**row, "ranks": rank(worths, rng, temperature)}


def label_file(samples: Path, out: Path, seed: int, temperature: float = TEMPERATURE) -> int:
    """Rank every row of a samples file; returns how many there were."""
    rng = random.Random(seed)
    with samples.open(encoding="utf-8") as source:
        rows = [json.loads(line) for line in source if line.strip()]
    text = jsonl(label(row, rng, temperature) for row in rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    return len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--temperature", type=float, default=TEMPERATURE)
    args = parser.parse_args()
    count = label_file(args.samples, args.out, args.seed, args.temperature)
    print(
        f"{args.out}: {count} rankings by the simulated labeler at temperature {args.temperature}"
    )


if __name__ == "__main__":
    main()
