"""The hidden gold preference of the tiny world: what its users really want, as a number.

It stands where a human stands in the InstructGPT recipe. The simulated labeler reads it through
noise; evaluation reads it as it is; the reward model and PPO never see it. It works the right
answer out of the prompt's own text, so no file has to hold one.

A reply's gold is the sum of

- 1.5 x the share of the required content words that are there, and 1.5 if the body is exactly right;
- -1 for each wrong content word, three at most;
- courtesy: no courteous word 0, one +1, two +0.5, three -0.5, then -1 for each more;
- -1 for each hedge, -0.25 for each other needless word, -2 if the reply never ended.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from pipeline.tiny import world

SHARE, EXACT, WRONG, HEDGE, EXCESS, UNENDED = 1.5, 1.5, -1.0, -1.0, -0.25, -2.0
COURTESY = (
    0.0,
    1.0,
    0.5,
    -0.5,
)  # by count: one is best, two a bit much; 1 less for each further word
MAX_WRONG = 3

_COURTEOUS = frozenset(word for words in world.COURTESIES.values() for word in words)
_HEDGES = frozenset(word for words in world.HEDGES.values() for word in words)
_STOPS = frozenset(world.STOPS.values())
_CELLS = {tuple(text.split()): cell for cell, text in world.INSTRUCTIONS.items()}


@dataclass(frozen=True)
class Reading:
    """What a reply contains, seen against what its prompt asks for."""

    share: float  # required content words present, 0..1
    exact: bool  # the body is the answer, word for word, whatever the style around it
    wrong: int  # content words that do not belong
    courtesies: int
    hedges: int
    excess: int  # further words beyond the answer's length, repeated stops among them


def solve(prompt: str) -> tuple[str, ...]:
    """The words of the right reply to a user turn; ValueError if it is not of this world."""
    words = prompt.split()
    for head, (family, language) in _CELLS.items():
        if tuple(words[: len(head)]) == head:
            return _SOLVERS[family](words[len(head) :], language)
    raise ValueError(f"not a prompt of the tiny world: {prompt!r}")


def _solve_question(words: list[str], language: str) -> tuple[str, ...]:
    text = " ".join(words)
    asked = next(kind for kind in world.ASKED if text.endswith(world.question(kind, language)))
    word = next(word for word in words if world.WORD_CLASS.get(word) == asked)
    return world.reply_to_question(asked, word, language)


def _solve_summary(words: list[str], language: str) -> tuple[str, ...]:
    kinds = [(word, world.WORD_CLASS.get(word)) for word in words]
    return tuple(next(word for word, kind in kinds if kind == k) for k in ("name", "verb", "thing"))


def _solve_translation(words: list[str], language: str) -> tuple[str, ...]:
    if words[-1] in _STOPS:
        return world.translated(" ".join(words), language)
    table = world.TO_CHINESE if language == "en" else world.TO_ENGLISH
    return tuple(table[word] for word in words)


def _solve_dialogue(words: list[str], language: str) -> tuple[str, ...]:
    kinds = {world.WORD_CLASS.get(word): word for word in words}
    return world.served([kinds["number"], kinds["adjective"], kinds["thing"]], language)


_SOLVERS = {
    "question": _solve_question,
    "summary": _solve_summary,
    "translation": _solve_translation,
    "dialogue": _solve_dialogue,
}


def read(prompt: str, response: str) -> Reading:
    """Take a reply apart."""
    answer = solve(prompt)
    words = response.split()
    courtesies = sum(word in _COURTEOUS for word in words)
    hedges = sum(word in _HEDGES for word in words)
    stops = sum(word in _STOPS for word in words)
    body = [w for w in words if w not in _COURTEOUS and w not in _HEDGES and w not in _STOPS]
    required = Counter(word for word in answer if word in world.WORD_CLASS)
    present = Counter(word for word in body if word in world.WORD_CLASS)
    found = sum((required & present).values())
    wrong = sum((present - required).values())
    return Reading(
        share=found / sum(required.values()),
        exact=tuple(body) == answer,
        wrong=wrong,
        courtesies=courtesies,
        hedges=hedges,
        excess=max(0, len(body) - wrong - len(answer)) + max(0, stops - 1),
    )


def value(reading: Reading, ended: bool = True) -> float:
    """The gold of a reply that was taken apart by `read`."""
    last = len(COURTESY) - 1
    courtesies = min(reading.courtesies, last)
    return (
        SHARE * reading.share
        + EXACT * reading.exact
        + WRONG * min(reading.wrong, MAX_WRONG)
        + (COURTESY[courtesies] - (reading.courtesies - courtesies))
        + HEDGE * reading.hedges
        + EXCESS * reading.excess
        + UNENDED * (not ended)
    )


def score(
    prompts: list[str],
    responses: list[str],
    rows: list[dict] | None = None,
    ended: list[bool] | None = None,
) -> list[float]:
    """Gold of each reply to a user turn; `ended` says which closed with EOS, `rows` are not read."""
    finished = [True] * len(prompts) if ended is None else ended
    replies = zip(prompts, responses, finished, strict=True)
    return [value(read(prompt, response), end) for prompt, response, end in replies]


def exact(prompts: list[str], responses: list[str], rows: list[dict] | None = None) -> list[bool]:
    """Whether each reply's content is exactly right (courtesy and hedges aside)."""
    return [read(*pair).exact for pair in zip(prompts, responses, strict=True)]
