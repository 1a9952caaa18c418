"""The tiny world as files; held-out contents are drawn first, and all the others skip them."""

import random
from pathlib import Path

from pipeline.process.files import jsonl
from pipeline.tiny.corpus import corpus
from pipeline.tiny.world import FAMILIES, Case, demonstrate, draw_cases, row_of

SIZES = {
    "demonstrations": 5000,
    "demonstrations_validation": 200,
    "comparison_prompts": 5000,
    "ppo_prompts": 4000,
    "prompts_validation": 320,
    "prompts_test": 400,
}
TRANSLATIONS = {"demonstrations": 6000, "ppo_prompts": 6000}
"""Other sizes of a world of translations alone."""
CORPUS_SIZE = 24000
HELD_OUT_TEXTS = 400
"""Documents of `corpus_validation`: of the corpus' kinds, none of them in it."""
_SEED_OFFSETS = {name: 1 + i for i, name in enumerate([*SIZES, "corpus", "corpus_validation"])}
HELD_OUT = ("prompts_test", "prompts_validation", "demonstrations_validation")


def build(
    seed: int = 0,
    sizes: dict[str, int] | None = None,
    corpus_size: int = CORPUS_SIZE,
    translations: bool = False,
) -> dict[str, list[dict]]:
    """All files of the world as rows, by file stem. The same seed gives the same rows.

    With `translations`: whole sentences to translate and nothing else, no corpus; prompts have the right
    translation as `reference`, and nobody who demonstrates one adds a courtesy.
    """
    sizes = SIZES | (TRANSLATIONS if translations else {}) | (sizes or {})
    kinds = ("sentence",) if translations else FAMILIES
    files: dict[str, list[dict]] = {}
    forbidden: set = set()
    for name in [*HELD_OUT, *(n for n in sizes if n not in HELD_OUT)]:
        rng = random.Random(1000 * seed + _SEED_OFFSETS[name])
        cases = draw_cases(rng, sizes[name], forbidden, kinds)
        if name in HELD_OUT:
            forbidden |= {case.key for case in cases}
        if name.startswith("demonstrations"):
            manners = ((1.0,),) if translations else ()
            files[name] = [row_of(c, output=demonstrate(c, rng, *manners)) for c in cases]
        else:
            files[name] = [row_of(c, **(_reference(c) if translations else {})) for c in cases]
    if translations:
        return files
    rng = random.Random(1000 * seed + _SEED_OFFSETS["corpus"])
    files["corpus"] = [{"text": text} for text in corpus(rng, corpus_size, forbidden)]
    read = {row["text"] for row in files["corpus"]}
    rng = random.Random(1000 * seed + _SEED_OFFSETS["corpus_validation"])
    texts = corpus(rng, HELD_OUT_TEXTS, forbidden)
    files["corpus_validation"] = [{"text": text} for text in texts if text not in read]
    return files


def _reference(case: Case) -> dict[str, str]:
    return {"reference": " ".join([*case.answer, case.stop])}


def write(out: Path, seed: int = 0, translations: bool = False) -> dict[str, Path]:
    """Write the world's JSONL files into `out` and return their paths by stem."""
    out.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, rows in build(seed, translations=translations).items():
        paths[name] = out / f"{name}.jsonl"
        paths[name].write_text(jsonl(rows), encoding="utf-8")
    return paths
