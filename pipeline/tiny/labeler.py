"""A simulated labeler: ranks K replies to a prompt as a noisy human would.

Plackett-Luce on gold: each reply's perceived worth is gold / temperature plus Gumbel noise, and
replies are ranked by it. Replies of equal gold cannot be told apart and share one draw, so they
tie.

    python -m pipeline.tiny.labeler --samples samples.jsonl --out rankings.jsonl --seed 7
"""

import argparse
import math
import random
from pathlib import Path

from pipeline.process.files import jsonl, read_jsonl
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


def label(row: dict, rng: random.Random, temperature: float = TEMPERATURE) -> dict:
    """One samples row with `ranks`; other keys are kept. `ended` (list of bool) is heeded if there."""
    text = next(m["content"] for m in reversed(row["prompt"]) if m["role"] == "user")
    responses = row["responses"]
    worths = gold.score([text] * len(responses), responses, ended=row.get("ended"))
    return {**row, "ranks": rank(worths, rng, temperature)}


def label_file(samples: Path, out: Path, seed: int) -> int:
    """Rank every row of a samples file; returns how many there were."""
    rng = random.Random(seed)
    rows = [label(row, rng) for row in read_jsonl(samples)]
    out.write_text(jsonl(rows), encoding="utf-8")
    return len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    args = parser.parse_args()
    count = label_file(args.samples, args.out, args.seed)
    print(f"{args.out}: {count} rankings by the simulated labeler at temperature {TEMPERATURE}")


if __name__ == "__main__":
    main()
