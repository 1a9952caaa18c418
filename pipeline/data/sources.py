"""Rows from files, folders, hub ids and memory, each with the place it came from.

Files: .jsonl (an object a line), .json (an array of objects, or lines as in .jsonl), .parquet, and
.txt for plain text (paragraphs between blank lines become rows with a `text`). A folder stands for
its .jsonl, .json and .parquet files in sorted order, or for its .txt files if it has no others.
"""

import difflib
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.config.schema import Data
from pipeline.data.problems import BadRow, Report, kind
from pipeline.data.strict_json import end_of, parse_line, parse_object, skip_space
from pipeline.errors import UserError

MAX_LINE = 10_000_000
"""Bytes; a longer line is taken for a mistake, not for a row."""

# fmt: off
STANDARD_COLUMNS = frozenset((
    "messages", "conversations", "instruction", "input", "output", "prompt", "completion", "query",
    "response", "text", "system", "history", "chosen", "rejected", "responses", "completions",
    "answers", "ranks", "scores",
))
# fmt: on
"""Every column that some form reads (see `pipeline.data.forms` and `.rankings`)."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?")


@dataclass(slots=True)
class Row:
    """A row under standard column names, and its place: `file:line`, `file: item N`, ..."""

    values: dict[str, Any]
    where: str


def read_rows(data: Data) -> list[Row]:
    """All rows of a source. UserError: missing files, unknown columns, malformed rows by line."""
    report = report_for(data)
    rows = list(scan(data, report))
    report.close(source_name(data), len(rows))
    return rows


def report_for(source: Any) -> Report:
    """An empty report that allows the share of bad rows its source allows."""
    return Report(allowed=source.bad_rows if isinstance(source, Data) else 0.0)


def source_name(source: Any) -> str:
    """A short name for messages."""
    if not isinstance(source, Data):
        return "dataset"
    return source.path if isinstance(source.path, str) else ", ".join(source.path)


def scan(source: Any, report: Report) -> Iterator[Row]:
    """Rows one after the other; malformed ones go to the report and the next one follows.

    `source`: a schema.Data, a dict of columns, a list of dicts or a datasets.Dataset.
    """
    rows: Iterable[Row]
    if isinstance(source, Data):
        rows = islice(_scan_files(source, report), source.limit)
        if source.columns:
            rows = _rename(rows, source.columns, source_name(source))
    else:
        rows = _scan_memory(source)
    for row in rows:
        report.rows += 1
        yield row


def _scan_files(data: Data, report: Report) -> Iterator[Row]:
    known = STANDARD_COLUMNS | set(data.columns.values())
    for path in [data.path] if isinstance(data.path, str) else data.path:
        if not Path(path).exists() and _looks_like_hub_id(path):
            yield from hub_rows(path, data.split)
            continue
        for file in _files(Path(path), report):
            yield from _watch_keys(READERS[file.suffix](file, report), known, report)


# --- memory ---------------------------------------------------------------------------------------


def rows_from_memory(dataset: Any) -> list[Row]:
    """Rows of a dict of columns, a list of dicts or a datasets.Dataset; UserError otherwise."""
    return list(_scan_memory(dataset))


def _scan_memory(dataset: Any) -> Iterator[Row]:
    if isinstance(dataset, dict):
        dataset = _from_columns(dataset)
    if isinstance(dataset, str | bytes) or not isinstance(dataset, Iterable):
        raise UserError(
            f"dataset: {kind(dataset)}, not a dict of columns, a list of dicts or a Dataset"
        )
    for number, values in enumerate(dataset, 1):
        if not isinstance(values, dict):
            raise UserError(f"dataset: row {number}: {kind(values)}, not a dict")
        yield Row(values, f"dataset: row {number}")


def _from_columns(columns: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if any(hasattr(column, "column_names") for column in columns.values()):
        raise UserError(f"dataset: several splits ({', '.join(columns)}); give one of them")
    for name, column in columns.items():
        if isinstance(column, str | bytes) or not isinstance(column, Iterable):
            raise UserError(f"dataset: column `{name}` is {kind(column)}, not a list of values")
    lists = {name: list(column) for name, column in columns.items()}
    lengths = {name: len(column) for name, column in lists.items()}
    if len(set(lengths.values())) > 1:
        raise UserError(f"dataset: columns of different lengths: {lengths}")
    for cells in zip(*lists.values(), strict=True):
        yield dict(zip(lists, cells, strict=True))


# --- files ----------------------------------------------------------------------------------------


def _files(path: Path, report: Report) -> list[Path]:
    """The file itself, or the files of a folder in sorted order."""
    if not path.exists():
        raise UserError(_missing(path))
    if not path.is_dir():
        if path.suffix not in READERS:
            raise UserError(f"{path}: unknown kind of file; known are {', '.join(READERS)}")
        return [path]
    inside = sorted(file for file in path.iterdir() if file.is_file() and file.name[0] != ".")
    files = [file for file in inside if file.suffix in READERS and file.suffix != ".txt"]
    files = files or [file for file in inside if file.suffix == ".txt"]
    if not files:
        raise UserError(f"{path}: no {', '.join(READERS)} file in this folder")
    if len(files) > 1:
        report.remarks.append("read " + ", ".join(file.name for file in files))
    return files


def _missing(path: Path) -> str:
    """`path: no such file`, with what lies nearest to it."""
    parent = path
    while not parent.is_dir():
        missing, parent = parent, parent.parent
    names = [entry.name for entry in parent.iterdir()]
    near = difflib.get_close_matches(missing.name, names, n=1, cutoff=0.5)
    hint = f"did you mean {parent / near[0]}?" if near else f"{parent} has no `{missing.name}`"
    return f"{path}: no such file or folder, and not a hub id (owner/name): {hint}"


def _looks_like_hub_id(path: str) -> bool:
    """`owner/name` or `owner/name:config`, unless it is a mistyped path into an existing folder."""
    if not _HUB_ID.fullmatch(path) or Path(path).suffix in READERS:
        return False
    return not Path(path).parent.exists()


def read_jsonl(path: Path, report: Report) -> Iterator[Row]:
    """One object a line. Lines end at \\n alone: U+2028 may stand inside a text."""
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
            f"not UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start + 1}"
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
    """Paragraphs of a plain text file as rows {text}; the place is a paragraph's first line."""
    try:
        lines = _decoded(path.read_bytes()).split("\n")
    except BadRow as error:
        raise UserError(f"{path}: {error}") from error
    start, paragraph = 0, list[str]()
    for number, line in enumerate([*lines, ""], 1):
        if line.strip():
            start = start or number
            paragraph.append(line.rstrip("\r"))
        elif paragraph:
            yield Row({"text": "\n".join(paragraph)}, f"{path}:{start}")
            start, paragraph = 0, []


READERS: dict[str, Callable[[Path, Report], Iterator[Row]]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".parquet": read_parquet,
    ".txt": read_text,
}


def hub_rows(name: str, split: str) -> Iterator[Row]:
    """Rows of `owner/name` or `owner/name:config` through datasets; its code is never run."""
    import datasets  # seconds to import

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()  # its bars fill log files with carriage returns
    repository, _, config = name.partition(":")
    try:
        dataset = datasets.load_dataset(repository, config or None, split=split)
    except Exception as error:  # its errors share no base class
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{name}[{split}]: cannot load from the hub: {reason}") from error
    for number, values in enumerate(dataset, 1):
        yield Row(values, f"{name}[{split}]: row {number}")


# --- columns --------------------------------------------------------------------------------------


def _rename(rows: Iterable[Row], columns: dict[str, str], name: str) -> Iterator[Row]:
    """Give mapped columns their standard names; UserError for a column that no row has."""
    if unknown := sorted(columns.keys() - STANDARD_COLUMNS):
        near = (
            _nearest(unknown[0], STANDARD_COLUMNS)
            or f"; those are {', '.join(sorted(STANDARD_COLUMNS))}"
        )
        raise UserError(f"{name}: columns: `{unknown[0]}` is not a standard name{near}")
    gone = set(columns.values()) - columns.keys()
    seen: dict[str, None] = {}
    for row in rows:
        seen.update(dict.fromkeys(row.values))
        mapped = {new: row.values[old] for new, old in columns.items() if old in row.values}
        rest = {key: value for key, value in row.values.items() if key not in gone}
        yield Row(rest | mapped, row.where)
    for standard, column in columns.items():
        if seen and column not in seen:
            near = _nearest(column, seen) or f"; there are {', '.join(seen)}"
            raise UserError(f"{name}: columns: {standard}: no row has `{column}`{near}")


def _watch_keys(rows: Iterable[Row], known: frozenset[str], report: Report) -> Iterator[Row]:
    """Report keys that no form knows and hardly a row of the file has: misspelt or misplaced."""
    seen: dict[tuple[str, ...], tuple[int, str]] = {}  # keys of a row -> how many rows, the first
    for row in rows:
        keys = tuple(row.values)
        times, first = seen.get(keys, (0, row.where))
        seen[keys] = (times + 1, first)
        yield row
    total = sum(times for times, _ in seen.values())
    if total < 3 or len(seen) == 1:
        return
    for key, (times, first) in _by_key(seen).items():
        if key not in known and times <= max(1, total // 1000):
            near = _nearest(key, known)
            report.problem(first, f"extra key `{key}`, in {times} of {total} rows{near}")


def _by_key(seen: dict[tuple[str, ...], tuple[int, str]]) -> dict[str, tuple[int, str]]:
    """Key -> how many rows have it and where the first of them is."""
    found: dict[str, tuple[int, str]] = {}
    for keys, (times, first) in seen.items():
        for key in keys:
            before, place = found.get(key, (0, first))
            found[key] = (before + times, place)
    return found


def _nearest(name: str, names: Iterable[str]) -> str:
    """` (did you mean x?)` with up to three near names, or nothing."""
    near = difflib.get_close_matches(name, list(names), n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(f'`{one}`' for one in near)}?)" if near else ""
