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

_LABELS = dict.fromkeys("true 1 1.0 yes good chosen desirable".split(), True)
_LABELS |= dict.fromkeys("false 0 0.0 -1 -1.0 no bad rejected undesirable".split(), False)

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


def label_of(values: dict[str, Any]) -> bool | None:
    """What an unpaired row's `label` says of its answer, as KTO's data has it: true or false, 1 or 0,
    1 or -1, those as text, or a word for them. None for anything else."""
    return _LABELS.get(str(values.get("label")).strip().lower())


def is_rejected(values: dict[str, Any]) -> bool:
    """Whether an unpaired row says that its answer is not to be learnt."""
    return label_of(values) is False or values.get("chosen") is False


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
