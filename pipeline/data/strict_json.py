"""JSON without its silent traps: duplicate keys, lone surrogates, NaN that a caller overlooks; files in parts."""

import codecs
import json
import re
from pathlib import Path
from typing import IO, Any

from pipeline.data.problems import BadRow, kind, not_utf8
from pipeline.errors import UserError

MAX_LINE = 10_000_000
"""Bytes; a longer line is taken for a mistake, not for a row."""
CHUNK = 1_000_000
"""Bytes of a JSON array that are read at once."""
WRAPPERS = ("data", "rows", "examples", "instances")
"""Keys of an object under which a JSON file may hold its rows."""

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


class Window:
    """A part of a JSON file's text that moves on as its values are read."""

    def __init__(self, path: Path, file: IO[bytes]):
        self.path, self.file = path, file
        self.text, self.at = "", 0
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.lines = 1  # read so far
        self.ended = False

    def more(self) -> bool:
        """Read on, and forget what lies behind; False at the end of the file."""
        if self.ended:
            return False
        raw = self.file.read(CHUNK)
        self.ended = not raw
        try:
            said = self.decoder.decode(raw, self.ended)
        except UnicodeDecodeError as error:
            line = self.lines + error.object[: error.start].count(b"\n")
            raise UserError(f"{self.path}:{line}: {not_utf8(error)}") from error
        self.lines += raw.count(b"\n")
        self.text, self.at = self.text[self.at :] + said, 0
        return True

    def next(self, beyond: int = 0) -> str:
        """The next character that is no white space, "" at the end of the file; `beyond`: the one after so
        many, which moves nothing."""
        while (at := skip_space(self.text, self.at + beyond)) >= len(self.text) and self.more():
            pass
        self.at = self.at if beyond else at
        return self.text[at : at + 1]

    def row(self) -> dict[str, Any]:
        """The object here; BadRow if there is none, or a faulty one."""
        try:
            values, end = parse_object(self.text, self.at)
        except BadRow:
            if self.end() is None:
                raise
            values, end = parse_object(
                self.text, self.at
            )  # read to its end, or as faulty as before
        self.at = end
        return values

    def end(self) -> int | None:
        """Where the value here ends, read as far as that; None if it is not JSON."""
        while (end := end_of(self.text, self.at)) is None or end > len(self.text) - 4:
            # a number's 1e+ may go on
            if len(self.text) - self.at > MAX_LINE or not self.more():
                break
        return end

    def name(self) -> str | None:
        """The name of an object's next value, which the window is then before; None if none is here."""
        if self.next() != '"' or (end := self.end()) is None:
            return None
        name, self.at = self.text[self.at + 1 : end - 1], end
        if self.next() != ":":
            return None
        self.at += 1
        self.next()
        return name

    def holds_rows(self, name: str | None) -> bool:
        """Whether the value here, of that name, is an array of objects under one of `WRAPPERS`."""
        return name in WRAPPERS and self.next() == "[" and self.next(1) == "{"
