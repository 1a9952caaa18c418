"""JSON without its silent traps: duplicate keys, lone surrogates, NaN that a caller overlooks."""

import json
import re
from typing import Any

from pipeline.data.problems import BadRow, kind

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SPACE = re.compile(r"[ \t\r\n]*")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadRow(f"duplicate key `{twice}`")
    return values


_STRICT = json.JSONDecoder(object_pairs_hook=_without_duplicates)
_LOOSE = json.JSONDecoder()


def skip_space(text: str, start: int) -> int:
    """Position of the next character that is not JSON white space."""
    found = _SPACE.match(text, start)
    return found.end() if found else start


def parse_object(text: str, start: int = 0) -> tuple[dict[str, Any], int]:
    """The JSON object at `start` and the position after it.

    Raises BadRow on anything else, duplicate keys or lone surrogates. NaN and Infinity are let
    through as floats: only the column that uses them can tell whether they matter.
    """
    try:
        value, end = _STRICT.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise BadRow(f"bad JSON: {error.msg} at character {error.pos - start + 1}") from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits; 100,000 brackets
        raise BadRow(f"bad JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadRow(f"{kind(value)} where a row, an object, was expected")
    if _SURROGATE.search(text, start, end):
        check_unicode(value)
    return value, end


def parse_line(text: str) -> dict[str, Any]:
    """One line of a JSONL file."""
    start = skip_space(text, 0)
    value, end = parse_object(text, start)
    if (rest := skip_space(text, end)) != len(text):
        raise BadRow(f"bad JSON: text after the row at character {rest + 1}")
    return value


def end_of(text: str, start: int) -> int | None:
    """Where a value ends that `parse_object` refused, or None if it is not JSON at all."""
    try:
        return _LOOSE.raw_decode(text, start)[1]
    except (ValueError, RecursionError):
        return None


def check_unicode(value: Any) -> None:
    """Raise BadRow if any text in a value has half of a surrogate pair, which no file can hold."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"a lone surrogate ({error.object[error.start]!a}) in a text") from error
