"""Rows of one file, each with its place: JSONL, JSON, CSV, TSV, Parquet, plain text; all but Parquet also
packed by gzip.

A row that cannot be read goes to the report, and the next one follows. No more than a few rows of a file
are in memory.
"""

import csv
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.problems import BadRow, Report, not_utf8
from pipeline.data.strict_json import MAX_LINE, WRAPPERS, Window, end_of, parse_line, skip_space
from pipeline.errors import UserError
from pipeline.handoff.datafiles import opened

MAX_PARAGRAPH = 100_000
"""Characters; a longer paragraph is taken for a file whose texts are not kept apart."""


@dataclass(slots=True)
class Row:
    """A row under standard column names, and its place: `file:line`, `file: item N`, ..."""

    values: dict[str, Any]
    where: str


def read_jsonl(path: Path, report: Report) -> Iterator[Row]:
    """An object a line. Lines end at \\n alone: U+2028 may stand inside a text."""
    with opened(path) as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            where = f"{path}:{number}"
            try:
                if len(line) > MAX_LINE:
                    _skip_line(file, line)
                    raise BadRow(f"a line of more than {MAX_LINE // 1_000_000} MB")
                text = decoded(line).strip(" \t\r\n")
                if text:
                    yield Row(parse_line(text), where)
            except BadRow as error:
                report.rows += 1
                report.problem(where, error)


def _skip_line(file: Any, line: bytes) -> None:
    while line and not line.endswith(b"\n"):
        line = file.readline(MAX_LINE)


def decoded(raw: bytes) -> str:
    """A line's text, less a mark of the byte order; BadRow where it is not UTF-8."""
    try:
        return raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow(not_utf8(error, f" at byte {error.start + 1}")) from error


def read_json(path: Path, report: Report) -> Iterator[Row]:
    """An array of objects, alone or in an object under one of `WRAPPERS`; lines of objects under this
    ending are read as JSONL."""
    with opened(path) as file:
        window = Window(path, file)
        first, key = window.next(), ""
        if first == "[":
            window.at += 1
        if first == "[" or (first == "{" and (key := _enters(window))):
            yield from _items(window, report, key)
            return
        if first == "{" and window.next() == "}" and window.lines > 1 and not _starts_whole(path):
            raise UserError(
                f"{path}: one object; a .json file holds an array of rows, an object with one under "
                f"{' or '.join(WRAPPERS)}, or a row a line"
            )
    yield from read_jsonl(path, report)


def _enters(window: Window) -> str:
    """The one of `WRAPPERS` under which the object here holds rows, objects too, or ""; the window is then
    before the first of them, else behind what can be read."""
    window.at += 1
    while (name := window.name()) is not None:
        if window.holds_rows(name):
            window.at += 1
            return name
        if (end := window.end()) is None:
            break
        window.at = end
        if window.next() == ",":
            window.at += 1
    return ""


def _leaves(window: Window, report: Report, key: str) -> None:
    """Tell what follows the rows, the window being at their closing bracket: UserError for anything but
    the rest of the object that has them under `key`."""
    window.at, whole = window.at + 1, True
    while key and window.next() == ",":
        window.at += 1
        if window.holds_rows(name := window.name()):
            report.remarks.append(
                f"{window.path.name} has rows under `{key}` and `{name}`; those of `{key}` are read"
            )
        if name is None or (end := window.end()) is None:
            whole = False
            break
        window.at = end
    if key:
        whole = whole and window.next() == "}"
        window.at += 1
    if len(window.text) - window.at > MAX_LINE:
        return  # a value too large to look behind
    if not whole or window.next():
        line = window.lines - window.text.count("\n", window.at)
        raise UserError(
            f"{window.path}:{line}: bad JSON behind the array of rows: one array a file, or a row a line"
        )


def _starts_whole(path: Path) -> bool:
    """Whether the first line is an object by itself."""
    with opened(path) as file:
        line = file.readline(MAX_LINE).decode("utf-8-sig", "replace")
    return end_of(line, skip_space(line, 0)) is not None


def _items(window: Window, report: Report, key: str) -> Iterator[Row]:
    """Rows of an array, the window being behind its bracket; `key`: of the object that has it."""
    number = 0
    while window.next() not in ("", "]"):
        number += 1
        where = f"{window.path}: item {number}"
        try:
            yield Row(window.row(), where)
        except BadRow as error:
            report.rows += 1
            report.problem(where, error)
            if (end := window.end()) is None:
                return  # nothing behind a syntax error can be told apart
            window.at = end
        if window.next() == ",":
            window.at += 1
        elif window.next() != "]":
            break
    if window.next() == "]":
        _leaves(window, report, key)
    else:
        report.problem(
            window.path.as_posix(), f"bad JSON: no comma or closing ] after item {number}"
        )


def read_table(path: Path, report: Report, delimiters: str) -> Iterator[Row]:
    """Rows of cells under the names in the first, as spreadsheets write them: what holds a delimiter, a
    quote or a line break stands in quotes. Every cell is a text, an empty one null.

    The delimiter is the first of `delimiters` that stands in the first line.
    """
    csv.field_size_limit(MAX_LINE)
    with opened(path) as file:
        read = iter(lambda: file.readline(MAX_LINE), b"")
        head = next((line for line in read if line.strip(b"\xef\xbb\xbf \r\n")), b"")
    delimiter = next((by for by in delimiters if by.encode() in head), delimiters[0])
    if delimiter != delimiters[0]:
        report.remarks.append(
            f"{path.name} has no comma in its header and is read by its {delimiter!r}"
        )
    undecoded: dict[int, BadRow] = {}

    def lines() -> Iterator[str]:
        number = 0
        while raw := file.readline(MAX_LINE):
            number += 1
            try:
                yield decoded(raw)
            except BadRow as error:
                undecoded[number] = error
                yield raw.decode("utf-8", "replace")

    with opened(path) as file:
        table = csv.reader(lines(), delimiter=delimiter, strict=True)
        names, start = list[str](), 1
        try:
            for cells in table:
                where, start = f"{path}:{start}", table.line_num + 1
                if not names:
                    names = _header(cells, where)
                elif cells:
                    try:
                        yield Row(_cells(cells, names, undecoded), where)
                    except BadRow as error:
                        report.rows += 1
                        report.problem(where, error)
                    undecoded.clear()
        except csv.Error as error:
            raise UserError(
                f"{path}:{start}: {error}; a cell with a quote in it is quoted, each quote twice. Nothing "
                "behind it can be told apart"
            ) from error


def _header(cells: list[str], where: str) -> list[str]:
    names = [name.strip() for name in cells]
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise UserError(f"{where}: two columns are named `{twice[0]}`")
    return names


def _cells(cells: list[str], names: list[str], undecoded: dict[int, BadRow]) -> dict[str, Any]:
    for error in undecoded.values():
        raise error
    if len(cells) != len(names):
        raise BadRow(f"{len(cells)} cells, but {len(names)} columns: {', '.join(names)}")
    return {name: cell or None for name, cell in zip(names, cells, strict=True) if name}


def read_parquet(path: Path, report: Report) -> Iterator[Row]:
    """Rows of a Parquet file, numbered from 1."""
    import pyarrow.parquet  # slow to import

    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=4096):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(values, f"{path}: row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file: {error}") from error


def read_text(path: Path, report: Report) -> Iterator[Row]:
    """Rows {text} of a plain text file: paragraphs between blank lines, or lines where none is blank.

    The place is a row's first line.
    """
    each_alone = _has_no_blank_line(path)
    if each_alone:
        report.remarks.append(f"{path.name} has no blank line, so each of its lines is a row")
    start, paragraph, size = 0, list[str](), 0
    for number, line in _text_lines(path):
        if line.strip():
            start, size = start or number, size + len(line)
            if (
                size <= MAX_PARAGRAPH
            ):  # of a book without a blank line the length is all that is told
                paragraph.append(line.rstrip("\r"))
        if size and (each_alone or not line.strip()):
            where, text = f"{path}:{start}", "\n".join(paragraph)
            if size > MAX_PARAGRAPH:
                report.rows += 1
                report.problem(where, f"{size} characters without a blank line; part the texts")
            else:
                yield Row({"text": text}, where)
            start, paragraph, size = 0, [], 0


def _text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, and a blank one behind the last."""
    number = 0
    with opened(path) as file:
        while raw := file.readline(MAX_LINE):
            number += 1
            try:
                yield number, decoded(raw).removesuffix("\n")
            except BadRow as error:
                raise UserError(f"{path}:{number}: {error}") from error
    yield number + 1, ""


def _has_no_blank_line(path: Path) -> bool:
    """Whether there are several lines and none between or before them is blank."""
    blank, seen = False, 0
    for _, line in _text_lines(path):
        if line.strip() and blank:
            return False
        blank, seen = not line.strip(), seen + bool(line.strip())
    return seen > 1


READERS: dict[str, Callable[[Path, Report], Iterator[Row]]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": functools.partial(read_table, delimiters=",\t;"),
    ".tsv": functools.partial(read_table, delimiters="\t"),
    ".parquet": read_parquet,
    ".txt": read_text,
}
