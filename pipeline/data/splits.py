"""Held-out parts that share no prompt with the training part."""

import hashlib
import json
from collections.abc import Sequence
from typing import TypeVar

from pipeline.data.forms import Demonstration, Prompt
from pipeline.data.rankings import Ranking

Item = TypeVar("Item", Demonstration, Prompt, Ranking)


def prompt_key(item: Demonstration | Prompt | Ranking) -> str:
    """What two items of the same prompt have in common: its roles and words, outer spaces aside."""
    messages = item.messages[:-1] if isinstance(item, Demonstration) else item.messages
    return json.dumps([[m["role"], m["content"].strip()] for m in messages])


def split_by_prompt(
    items: Sequence[Item], fraction: float, seed: int
) -> tuple[list[Item], list[Item]]:
    """(training, held out): about `fraction` of the distinct prompts, at least one, are held out.

    The choice depends on the prompts and the seed, not on the order of the items; both parts keep
    that order. With fraction 0, or a single prompt, nothing is held out.
    """
    keys = [prompt_key(item) for item in items]
    order = sorted(set(keys), key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
    number = min(max(1, round(fraction * len(order))), len(order) - 1) if fraction > 0 else 0
    held = set(order[: max(0, number)])
    training = [item for item, key in zip(items, keys, strict=True) if key not in held]
    return training, [item for item, key in zip(items, keys, strict=True) if key in held]
