"""Rows of one file, each with its place: JSONL, JSON, Parquet, plain text.

A row that cannot be read goes to the report, and the next one follows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.problems import BadRow, Report
from pipeline.data.strict_json import end_of, parse_line, parse_object, skip_space
from pipeline.errors import UserError

MAX_LINE = 10_000_000
"""Bytes; a longer line is taken for a mistake, not for a row."""
MAX_PARAGRAPH = 100_000
"""Characters; a longer paragraph is taken for a file whose texts are not kept apart."""


@dataclass(slots=True)
class Row:
    """A row under standard column names, and its place: `file:line`, `file: item N`, ..."""

    values: dict[str, Any]
    where: str


def read_jsonl(path: Path, report: Report) -> Iterator[Row]:
    """An object a line. Lines end at \\n alone: U+2028 may stand inside a text."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            where = f"{path}:{number}"
            try:
                if len(line) > MAX_LINE:
                    _skip_line(file, line)
                    raise BadRow(f"a line of more than {MAX_LINE // 1_000_000} MB")
                text = _decoded(line).strip(" \t\r\n")
                if text:
                    yield Row(parse_line(text), where)
            except BadRow as error:
                report.rows += 1
                report.problem(where, error)


def _skip_line(file: Any, line: bytes) -> None:
    while line and not line.endswith(b"\n"):
        line = file.readline(MAX_LINE)


def _decoded(raw: bytes) -> str:
    try:
        return raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow(
            f"not UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start + 1}; recode the file, for "
            "example from GBK: iconv -f GB18030 -t UTF-8 IN > OUT"
        ) from error


def read_json(path: Path, report: Report) -> Iterator[Row]:
    """An array of objects; lines of objects under this ending are read as JSONL."""
    try:
        text = _decoded(path.read_bytes())
    except BadRow as error:
        raise UserError(f"{path}: {error}") from error
    start = skip_space(text, 0)
    if text[start : start + 1] == "[":
        yield from _items(path, text, report)
        return
    end = end_of(text, start)
    if end is not None and "\n" in text[start:end]:
        raise UserError(f"{path}: one object; a .json file holds an array of rows, or a row a line")
    del text
    yield from read_jsonl(path, report)


def _items(path: Path, text: str, report: Report) -> Iterator[Row]:
    at, number = skip_space(text, skip_space(text, 0) + 1), 0
    while at < len(text) and text[at] != "]":
        number += 1
        where = f"{path}: item {number}"
        try:
            values, end = parse_object(text, at)
            yield Row(values, where)
        except BadRow as error:
            report.rows += 1
            report.problem(where, error)
            if (after := end_of(text, at)) is None:
                return  # nothing behind a syntax error can be told apart
            end = after
        at = skip_space(text, end)
        if text[at : at + 1] == ",":
            at = skip_space(text, at + 1)
        elif text[at : at + 1] != "]":
            break
    if text[at : at + 1] != "]":
        report.problem(path.as_posix(), f"bad JSON: no comma or closing ] after item {number}")


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
    try:
        lines = _decoded(path.read_bytes()).rstrip().split("\n")
    except BadRow as error:
        raise UserError(f"{path}: {error}") from error
    each_alone = len(lines) > 1 and all(line.strip() for line in lines)
    if each_alone:
        report.remarks.append(f"{path.name} has no blank line, so each of its lines is a row")
    start, paragraph = 0, list[str]()
    for number, line in enumerate([*lines, ""], 1):
        if line.strip():
            start = start or number
            paragraph.append(line.rstrip("\r"))
        if paragraph and (each_alone or not line.strip()):
            where, text = f"{path}:{start}", "\n".join(paragraph)
            if len(text) > MAX_PARAGRAPH:
                report.rows += 1
                report.problem(
                    where, f"{len(text)} characters without a blank line; part the texts"
                )
            else:
                yield Row({"text": text}, where)
            start, paragraph = 0, []


READERS: dict[str, Callable[[Path, Report], Iterator[Row]]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".parquet": read_parquet,
    ".txt": read_text,
}
