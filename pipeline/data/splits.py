"""Held-out parts that share no conversation with the training part."""

import hashlib
import json
import unicodedata
from collections.abc import Sequence
from typing import TypeVar

from pipeline.data.forms import Demonstration, Prompt
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
) -> tuple[list[Item], list[Item]]:
    """(training, held out): about `fraction` of the distinct openings, at least one, are held out.

    The choice depends on the openings and the seed, not on the order of the items;
    both parts keep that order. With fraction 0, or a single opening, nothing is held out. An item that
    is there several times, by its source's weight, is held out once.
    """
    keys = [opening(item) for item in items]
    names: dict[str, str] = {}  # of an opening's items the first by the alphabet, as it is written
    for item, key in zip(items, keys, strict=True):
        name = _written(item)
        names[key] = min(name, names.get(key, name))
    order = sorted(names, key=lambda key: hashlib.sha256(f"{seed}:{names[key]}".encode()).digest())
    number = min(max(1, round(fraction * len(order))), len(order) - 1) if fraction > 0 else 0
    held = set(order[: max(0, number)])
    training = [item for item, key in zip(items, keys, strict=True) if key not in held]
    held_out = {id(item): item for item, key in zip(items, keys, strict=True) if key in held}
    return training, list(held_out.values())


def _written(item: Demonstration | Prompt | Ranking) -> str:
    messages = item.messages[:-1] if isinstance(item, Demonstration) else item.messages
    return json.dumps([[m["role"], m["content"].strip()] for m in messages])
