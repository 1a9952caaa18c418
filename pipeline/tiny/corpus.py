"""Plain text of the tiny world, which is all that its base model ever reads."""

import random
from collections.abc import Iterator

from pipeline.tiny.world import (
    ADJECTIVES,
    ASKED,
    COURTESIES,
    DRAW,
    HEDGES,
    LANGUAGES,
    NAMES,
    NUMBERS,
    REFUSALS,
    STOPS,
    THINGS,
    VERBS,
    WORD_CLASS,
    Case,
    question,
    reply_to_question,
    say,
    spoil,
    words_of,
)


def draw_allowed(family: str, rng: random.Random, language: str, forbidden: set) -> Case:
    """A case that is not held out."""
    while True:
        case = DRAW[family](rng, language)
        if case.key not in forbidden:
            return case


def text_of_facts(rng: random.Random, language: str, forbidden: set) -> str:
    """A fact, and talk about it: asked, answered, confirmed and denied."""
    stop, yes, no = STOPS[language], *(("yes", "no") if language == "en" else ("对", "不对"))
    case = draw_allowed("question", rng, language, forbidden)
    asked_last = case.input.split(stop)[1].strip()
    sentence = case.input[: -len(asked_last)].strip()
    words = {WORD_CLASS[word]: word for word in sentence.split() if word in WORD_CLASS}
    parts = [sentence]
    for _ in range(5):
        kind = rng.choice(list(ASKED))
        answer = " ".join(reply_to_question(kind, words[kind], language))
        parts.append(question(kind, language))
        if rng.random() < 0.35:
            other = " ".join(
                reply_to_question(kind, rng.choice(words_of(kind, language)), language)
            )
            claim = answer if rng.random() < 0.5 else other
            parts += [claim, "?", yes if claim == answer else no]
        parts += [answer, stop]
    return " ".join(parts)


def text_of_stories(rng: random.Random, language: str, forbidden: set) -> str:
    """Short news with its headline, true or put right."""
    stop, yes, no = STOPS[language], *(("yes", "no") if language == "en" else ("对", "不对"))
    parts = []
    for _ in range(2):
        case = draw_allowed("summary", rng, language, forbidden)
        head = " ".join(case.answer)
        if rng.random() < 0.5:
            parts += [case.input, head, stop]
        else:
            claim = head if rng.random() < 0.5 else " ".join(spoil(case, rng))
            parts += [case.input, claim, "?", yes if claim == head else no, head, stop]
    return " ".join(parts)


PHRASES = (
    (NAMES,),
    (ADJECTIVES,),
    (NUMBERS, THINGS),
    (NAMES, VERBS),
    (ADJECTIVES, THINGS),
    (VERBS, ADJECTIVES, THINGS),
    (NAMES, VERBS, THINGS),
)


def text_of_glossary(rng: random.Random, language: str, forbidden: set) -> str:
    """Bilingual word lists, words and phrases; never a whole sentence as the translation prompts have it."""
    other = "zh" if language == "en" else "en"
    yes, no = ("yes", "no") if language == "en" else ("对", "不对")
    parts = []
    for _ in range(6):
        kinds = rng.choice(PHRASES)
        words = [rng.choice(list(kind)) for kind in kinds]
        source, target = say(words, language), say(words, other)
        if rng.random() < 0.7:
            parts += [*source, "=", *target, "."]
        else:
            claim = list(target)
            if rng.random() < 0.5:
                at = rng.randrange(len(claim))
                claim[at] = rng.choice(words_of(WORD_CLASS[claim[at]], other))
            parts += [*source, "=", *claim, "?", yes if claim == target else no, *target, "."]
    return " ".join(parts)


def text_of_service(rng: random.Random, language: str, forbidden: set) -> str:
    """Orders and how they were served, with the small courtesies and doubts that go with them."""
    stop, yes, no = STOPS[language], *(("yes", "no") if language == "en" else ("对", "不对"))
    parts = []
    for _ in range(3):
        case = draw_allowed("dialogue", rng, language, forbidden)
        parts.append(case.input)
        if rng.random() < 0.3:
            claim = list(case.answer) if rng.random() < 0.5 else spoil(case, rng)
            parts += [*claim, "?", yes if claim == list(case.answer) else no]
        parts += [*case.answer, stop]
        if rng.random() < 0.4:
            parts.append(rng.choice(COURTESIES[language]))
        if rng.random() < 0.1:
            parts += [REFUSALS[language], stop]
        if rng.random() < 0.2:
            parts += [rng.choice(HEDGES[language])]
    return " ".join(parts)


TEXTS = (text_of_facts, text_of_stories, text_of_glossary, text_of_service)


def corpus(rng: random.Random, count: int, forbidden: set) -> Iterator[str]:
    """`count` documents, kinds and languages in equal shares, with no held-out story or order in them."""
    for made in range(count):
        yield TEXTS[made % len(TEXTS)](rng, LANGUAGES[made // len(TEXTS) % 2], forbidden)
