"""Plain text of the tiny world, which is all that its base model ever reads."""

import random
from collections.abc import Iterator, Sequence

from pipeline.tiny import world
from pipeline.tiny.world import LANGUAGES, STOPS, WORD_CLASS, Case, say, spoil, words_of

YES_NO = {"en": ("yes", "no"), "zh": ("对", "不对")}


def draw_allowed(family: str, rng: random.Random, language: str, forbidden: set) -> Case:
    """A case that is not held out."""
    while True:
        case = world.DRAW[family](rng, language)
        if case.key not in forbidden:
            return case


def claimed(claim: Sequence[str], truth: Sequence[str], language: str) -> list[str]:
    """A claim, asked, and whether it is true."""
    return [*claim, "?", YES_NO[language][list(claim) != list(truth)]]


def text_of_facts(rng: random.Random, language: str, forbidden: set) -> str:
    """A fact, and talk about it: asked, answered, confirmed and denied."""
    stop = STOPS[language]
    case = draw_allowed("question", rng, language, forbidden)
    sentence = case.input.partition(stop)[0] + stop
    words = {WORD_CLASS[word]: word for word in sentence.split() if word in WORD_CLASS}
    parts = [sentence]
    for _ in range(5):
        kind = rng.choice(list(world.ASKED))
        answer = world.reply_to_question(kind, words[kind], language)
        parts.append(world.question(kind, language))
        if rng.random() < 0.35:
            other = world.reply_to_question(kind, rng.choice(words_of(kind, language)), language)
            parts += claimed(answer if rng.random() < 0.5 else other, answer, language)
        parts += [*answer, stop]
    return " ".join(parts)


def told(case: Case, rng: random.Random, language: str, with_claim: bool) -> list[str]:
    """A case and what answers it, maybe after a claim that is true or put right."""
    parts = [case.input]
    if with_claim:
        claim = case.answer if rng.random() < 0.5 else spoil(case, rng)
        parts += claimed(claim, case.answer, language)
    return [*parts, *case.answer, STOPS[language]]


def text_of_stories(rng: random.Random, language: str, forbidden: set) -> str:
    """Short news with its headline."""
    parts = []
    for _ in range(2):
        case = draw_allowed("summary", rng, language, forbidden)
        parts += told(case, rng, language, rng.random() >= 0.5)
    return " ".join(parts)


PHRASES = (
    (world.NAMES,),
    (world.ADJECTIVES,),
    (world.NUMBERS, world.THINGS),
    (world.NAMES, world.VERBS),
    (world.ADJECTIVES, world.THINGS),
    (world.VERBS, world.ADJECTIVES, world.THINGS),
    (world.NAMES, world.VERBS, world.THINGS),
)


def text_of_glossary(rng: random.Random, language: str, forbidden: set) -> str:
    """Bilingual word lists, words and phrases; never a whole sentence as the translation prompts have it."""
    other = "zh" if language == "en" else "en"
    parts = []
    for _ in range(6):
        kinds = rng.choice(PHRASES)
        words = [rng.choice(list(kind)) for kind in kinds]
        source, target = say(words, language), say(words, other)
        parts += [*source, "="]
        if rng.random() >= 0.7:
            claim = list(target)
            if rng.random() < 0.5:
                at = rng.randrange(len(claim))
                claim[at] = rng.choice(words_of(WORD_CLASS[claim[at]], other))
            parts += claimed(claim, target, language)
        parts += [*target, "."]
    return " ".join(parts)


def text_of_service(rng: random.Random, language: str, forbidden: set) -> str:
    """Orders and how they were served, with the small courtesies and doubts that go with them."""
    parts = []
    for _ in range(3):
        case = draw_allowed("dialogue", rng, language, forbidden)
        parts += told(case, rng, language, rng.random() < 0.3)
        if rng.random() < 0.4:
            parts.append(rng.choice(world.COURTESIES[language]))
        if rng.random() < 0.1:
            parts += [world.REFUSALS[language], STOPS[language]]
        if rng.random() < 0.2:
            parts.append(rng.choice(world.HEDGES[language]))
    return " ".join(parts)


TEXTS = (text_of_facts, text_of_stories, text_of_glossary, text_of_service)


def corpus(rng: random.Random, count: int, forbidden: set) -> Iterator[str]:
    """`count` documents, kinds and languages in equal shares, with no held-out story or order in them."""
    for made in range(count):
        yield TEXTS[made % len(TEXTS)](rng, LANGUAGES[made // len(TEXTS) % 2], forbidden)
