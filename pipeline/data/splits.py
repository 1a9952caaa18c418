"""Held-out parts that share no conversation with the training part."""

import hashlib
import json
import unicodedata
from collections.abc import Sequence
from typing import TypeVar

from pipeline.data.forms import Demonstration, Prompt
from pipeline.data.kept import once, pick
from pipeline.data.rankings import Ranking

Item = TypeVar("Item", Demonstration, Prompt, Ranking)


def opening(item: Demonstration | Prompt | Ranking) -> str:
    """What two items of one conversation have in common: its words up to the first user message.

    Later turns are left out, for the same conversation may stand in several rows, each with more of it.
    """
    roles = [message["role"] for message in item.messages]
    first = item.messages[: roles.index("user") + 1]
    return json.dumps([[m["role"], normal_form(m["content"])] for m in first])


def normal_form(text: str) -> str:
    """A text for telling whether two are the same: case, kinds of space and accents' encoding aside."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def split_by_prompt(
    items: Sequence[Item], fraction: float, seed: int
) -> tuple[Sequence[Item], Sequence[Item]]:
    """(training, held out): about `fraction` of the distinct openings, at least one, are held out.

    The choice depends on the openings and the seed, not on the order of the items;
    both parts keep that order. With fraction 0, or a single opening, nothing is held out. An item that
    is there several times, by its source's weight, is held out once.
    """
    import numpy  # here, for whoever only looks at rows

    # of each item its opening and what the draw makes of it, as numbers: there may be millions
    keys = numpy.fromiter((_number(opening(item)) for item in items), numpy.uint64, len(items))
    draws = numpy.fromiter((_draw(item, seed) for item in items), numpy.uint64, len(items))
    _, first, group, sizes = numpy.unique(
        keys, return_index=True, return_inverse=True, return_counts=True
    )
    draw_of = draws[first]
    several = numpy.flatnonzero(sizes[group] > 1)
    names: dict[int, str] = {}  # of an opening's items the first by the alphabet, as it is written
    for at in several.tolist():
        name = _written(items[at])
        if name <= names.setdefault(int(group[at]), name):
            names[int(group[at])] = name
            draw_of[group[at]] = draws[at]
    number = min(max(1, round(fraction * len(first))), len(first) - 1) if fraction > 0 else 0
    is_held = numpy.zeros(len(first), bool)
    is_held[numpy.argsort(draw_of, kind="stable")[: max(0, number)]] = True
    held = is_held[group]
    training, held_out = (numpy.flatnonzero(side).tolist() for side in (~held, held))
    return pick(items, training), once(pick(items, held_out))


def _draw(item: Demonstration | Prompt | Ranking, seed: int) -> int:
    return _number(f"{seed}:{_written(item)}")


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def _written(item: Demonstration | Prompt | Ranking) -> str:
    messages = item.messages[:-1] if isinstance(item, Demonstration) else item.messages
    return json.dumps([[m["role"], m["content"].strip()] for m in messages])
