"""Columns beside a row's text that change what it means: used rightly, or the row is refused."""

from typing import Any

from pipeline.data.problems import BadRow

_UNREAD = {
    **dict.fromkeys(
        ("images", "image", "videos", "video", "audios", "audio"),
        "only text is read; remove such rows, or the column if their text stands alone",
    ),
    **dict.fromkeys(
        ("tools", "functions", "function_call", "tool_calls"),
        "no stage trains on tools; remove such rows",
    ),
}
"""Columns that, where they are filled, say that the text is not the whole example -> what to do."""

_EMPTY = ("", "[]", "{}", "null")


def check_whole(values: dict[str, Any]) -> None:
    """BadRow for a row whose text is only a part of it: pictures, tools, a tree."""
    for name, why in _UNREAD.items():
        if _filled(values.get(name)):
            raise BadRow(f"`{name}` is filled: {why}")
    if {"parent_id", "role"} <= values.keys():
        raise BadRow("a message of a tree (`parent_id`); write its paths as rows of `messages`")


def _filled(value: Any) -> bool:
    if isinstance(value, list | tuple | dict):
        return any(map(_filled, value.values() if isinstance(value, dict) else value))
    if isinstance(value, str):
        return value.strip() not in _EMPTY
    return value is not None and not isinstance(value, int | float)


def is_rejected(values: dict[str, Any]) -> bool:
    """Whether an unpaired row says `label: false`, as KTO's data does: an answer not to be learnt."""
    return any(values.get(name) is False for name in ("label", "chosen"))


def is_context(turn: Any) -> bool:
    """Whether a turn is there to be read and not to be learnt: `weight: 0`, `train: false`.

    OpenAI's and Mistral's fine-tuning files have the first, axolotl's the second. BadRow for a weight
    between.
    """
    if not isinstance(turn, dict):
        return False
    weight = turn.get("weight")
    if weight not in (None, 0, 1):
        raise BadRow(f"a turn's `weight` is {weight!r}; 1 (learnt) and 0 (only read) are known")
    return weight == 0 or turn.get("train") is False
