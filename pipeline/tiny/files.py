"""The tiny world as files.

Held-out contents are drawn first, from seeds of their own; training rows and the base model's text
skip them.
"""

import random
from pathlib import Path

from pipeline.process.files import jsonl
from pipeline.tiny.corpus import corpus
from pipeline.tiny.world import demonstrate, draw_cases, row_of

SIZES = {
    "demonstrations": 5000,
    "demonstrations_validation": 200,
    "comparison_prompts": 5000,
    "ppo_prompts": 4000,
    "prompts_validation": 320,
    "prompts_test": 400,
}
CORPUS_SIZE = 24000
HELD_OUT_TEXTS = 400
"""Documents of `corpus_validation`: of the corpus' kinds, none of them in it."""
_SEED_OFFSETS = {name: 1 + i for i, name in enumerate([*SIZES, "corpus", "corpus_validation"])}
HELD_OUT = ("prompts_test", "prompts_validation", "demonstrations_validation")


def build(
    seed: int = 0, sizes: dict[str, int] | None = None, corpus_size: int = CORPUS_SIZE
) -> dict[str, list[dict]]:
    """All files of the world as rows, by file stem. The same seed gives the same rows."""
    sizes = SIZES | (sizes or {})
    files: dict[str, list[dict]] = {}
    forbidden: set = set()
    for name in [*HELD_OUT, *(n for n in sizes if n not in HELD_OUT)]:
        rng = random.Random(1000 * seed + _SEED_OFFSETS[name])
        cases = draw_cases(rng, sizes[name], forbidden)
        if name in HELD_OUT:
            forbidden |= {case.key for case in cases}
        if name.startswith("demonstrations"):
            files[name] = [row_of(case, output=demonstrate(case, rng)) for case in cases]
        else:
            files[name] = [row_of(case) for case in cases]
    rng = random.Random(1000 * seed + _SEED_OFFSETS["corpus"])
    files["corpus"] = [{"text": text} for text in corpus(rng, corpus_size, forbidden)]
    read = {row["text"] for row in files["corpus"]}
    rng = random.Random(1000 * seed + _SEED_OFFSETS["corpus_validation"])
    texts = corpus(rng, HELD_OUT_TEXTS, forbidden)
    files["corpus_validation"] = [{"text": text} for text in texts if text not in read]
    return files


def write(out: Path, seed: int = 0) -> dict[str, Path]:
    """Write the world's JSONL files into `out` and return their paths by stem."""
    out.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, rows in build(seed).items():
        paths[name] = out / f"{name}.jsonl"
        paths[name].write_text(jsonl(rows), encoding="utf-8")
    return paths
