"""Columns: those that forms read, and those that change what a row means, used rightly or refused."""

import re
import sys
from difflib import get_close_matches
from typing import Any

from pipeline.data.problems import BadRow, kind

# fmt: off
STANDARD_COLUMNS = frozenset((
    "messages", "conversations", "instruction", "input", "output", "prompt", "completion", "query",
    "response", "text", "system", "history", "chosen", "rejected", "responses", "completions",
    "answers", "ranks", "scores", "label", "response_1", "response_2", "preference",
    "message_id", "parent_id", "role", "choice",
))
# fmt: on
"""Every column that some form reads (see `pipeline.data.forms` and `.rankings`)."""

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

_GOOD = "true 1 1.0 +1 yes good chosen desirable up like thumbs_up"
_BAD = "false 0 0.0 -1 -1.0 no bad rejected undesirable down dislike thumbs_down"
_LABELS = dict.fromkeys(_GOOD.split(), True) | dict.fromkeys(_BAD.split(), False)

_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)

_EMPTY = ("", "[]", "{}", "null")

_ANSWERS = ("response", "output", "answer", "completion", "conversation")
_ENDS = (("1", "2"), ("a", "b"), ("0", "1"))
TWO = {
    tuple(f"{stem}{dash}{shape(end)}" for end in ends): ends
    for stem in _ANSWERS
    for dash in ("_", "")
    for ends in _ENDS
    for shape in (str.lower, str.upper)
}
"""Pairs of columns -> the ends by which a verdict names them."""


def check_whole(values: dict[str, Any]) -> None:
    """BadRow for a row whose text is only a part of it: pictures, tools."""
    for name, why in _UNREAD.items():
        if _filled(values.get(name)):
            raise BadRow(f"`{name}` is filled: {why}")


def _filled(value: Any) -> bool:
    if isinstance(value, list | tuple | dict):
        return any(map(_filled, value.values() if isinstance(value, dict) else value))
    if isinstance(value, str):
        return value.strip() not in _EMPTY
    return value is not None and not isinstance(value, int | float)


def label_of(values: dict[str, Any]) -> bool | None:
    """What an unpaired row's `label` says of its answer, as KTO's data has it: true or false, 1 or 0,
    1 or -1, those as text, or a word for them; or its `chosen`, true or false. None for anything else."""
    if isinstance(chosen := values.get("chosen"), bool):
        return chosen
    return _LABELS.get(str(values.get("label")).strip().lower().replace(" ", "_"))


def unknown_label(values: dict[str, Any]) -> str | None:
    """What to say of a `label` that `label_of` makes nothing of; None where there is none."""
    if (label := values.get("label")) is None or label_of(values) is not None:
        return None
    known = f"true ({', '.join(_GOOD.split()[1:])}) and false ({', '.join(_BAD.split()[1:])})"
    return f"`label` is {repr(label)[:40]}; known are {known}"


def as_number(value: Any) -> Any:
    """Of a number's text the number, as a table's cells are texts; anything else as it is."""
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


def number_of(value: Any, name: str) -> float | None:
    """A number, or the text of one. BadRow for anything else but null."""
    value = as_number(value)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(f"`{name}` is {kind(value)}, expected a number")
    if not abs(value) <= sys.float_info.max:  # NaN, and integers beyond floats
        shown = value if isinstance(value, float) else "too large"
        raise BadRow(f"`{name}` is {shown}, not a finite number")
    return value


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


def two_answers(values: dict[str, Any]) -> tuple[str, ...] | None:
    """The columns of a row's two answers, such as `output_1` and `output_2`."""
    return next((pair for pair in TWO if all(values.get(n) is not None for n in pair)), None)


def missing(values: dict[str, Any], wanted: Any) -> str:
    """`none of a, b; the row has x, y (did you mean x?)`, for a row that lacks a column."""
    if isinstance(pair := values.get("translation"), dict) and len(pair) > 1:
        asked, answer, *_ = pair
        return (
            f"`translation` has {', '.join(pair)}; say which is asked and which answers, e.g. columns: "
            f"{{prompt: translation.{asked}, completion: translation.{answer}}}"
        )
    null = [name for name in wanted if name in values]
    if null:
        return f"`{null[0]}` is null"
    names = [str(name) for name in values]
    free = [name for name in names if name not in STANDARD_COLUMNS]
    near = [found for name in wanted for found in get_close_matches(name, free, 1, 0.6)]
    meant = f"is `{near[0]}` meant? " if near else ""
    hint = f" ({meant}`columns` in the config can rename it)" if free else ""
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    needed = f"no {wanted[0]}" if len(wanted) == 1 else f"none of {', '.join(wanted)}"
    return f"{needed}; the row has {shown or 'nothing'}{hint}"
