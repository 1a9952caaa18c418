"""Rows from files, folders, hub ids and memory, each with the place it came from."""

import gzip
import random
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from os import PathLike
from typing import Any

from pipeline.config.load import did_you_mean
from pipeline.config.schema import Cell, Data, Source
from pipeline.data.meaning import STANDARD_COLUMNS
from pipeline.data.problems import Report, kind
from pipeline.data.readers import READERS, Row
from pipeline.errors import UserError
from pipeline.handoff import datafiles
from pipeline.process import hub


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
    paths = [source.path] if isinstance(source.path, str) else source.path
    return ", ".join(path if isinstance(path, str) else source_name(path) for path in paths)


def sources_of(source: Any) -> list[Source]:
    """The sources that a config mixes, with the keys they share; [] when it mixes none."""
    paths = source.path if isinstance(source, Data) and isinstance(source.path, list) else []
    if not any(isinstance(path, Source) for path in paths):
        return []
    shared = {key: getattr(source, key) for key in source.model_fields_set - {"path"}}
    groups = [path if isinstance(path, Source) else Source(path=path) for path in paths]
    return [
        group.model_copy(
            update={k: v for k, v in shared.items() if k not in group.model_fields_set}
        )
        for group in groups
    ]


def drawn(number: int, weight: float, seed: int, name: str) -> list[int]:
    """Which of so many rows of a source an epoch has: all of them as often as `weight` is whole, and of its
    fraction a part, drawn by the seed. UserError where that is none."""
    whole, part = int(weight), weight % 1
    some = random.Random(f"{seed}:{name}").sample(range(number), round(part * number))
    if not whole and not some:
        raise UserError(
            f"{name}: weight {weight:g} of {number} rows is less than one row; raise it, or leave the "
            "source out"
        )
    return [*range(number)] * whole + sorted(some)


def scan(source: Any, report: Report) -> Iterator[Row]:
    """Rows one after the other; malformed ones go to the report and the next one follows.

    `source`: a schema.Data, a dict of columns, a list of dicts, a datasets.Dataset or a pandas DataFrame.
    """
    rows: Iterable[Row]
    if isinstance(source, Data):
        rows = _scan_files(source, report)
        if source.only:
            rows = _chosen(rows, source.only, report, source_name(source))
        rows = islice(rows, source.limit)
        if source.columns:
            rows = _rename(rows, source.columns, source_name(source))
    else:
        rows = _scan_memory(source)
    for row in rows:
        report.rows += 1
        yield row


def _scan_files(data: Data, report: Report) -> Iterator[Row]:
    known = STANDARD_COLUMNS | set(data.columns.values())
    paths = [data.path] if isinstance(data.path, str) else data.path
    for path in (path for path in paths if isinstance(path, str)):
        if datafiles.is_hub_id(path):
            yield from hub_rows(path, data.split)
            continue
        files, aside = datafiles.files(path)
        if len(files) > 1 or aside:
            unread = f"; not read: {', '.join(aside)}" if aside else ""
            report.remarks.append(f"read {', '.join(file.name for file in files)}{unread}")
        for file in files:
            rows = READERS[datafiles.kind_of(file)](file, report)
            try:
                yield from _watch_keys(rows, known, report)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise UserError(f"{file}: not a whole gzip file: {error}") from error


# --- memory ---------------------------------------------------------------------------------------


def rows_from_memory(dataset: Any) -> list[Row]:
    """Rows of a dict of columns, a list of dicts, a Dataset or a DataFrame; UserError otherwise."""
    return list(_scan_memory(dataset))


def _scan_memory(dataset: Any) -> Iterator[Row]:
    if type(dataset).__module__.partition(".")[0] == "pandas":
        dataset = _from_frame(dataset)
    if isinstance(dataset, str | bytes | PathLike):
        raise UserError(f"dataset: {str(dataset)[:80]!r} is a text; give a file as Data(path=...)")
    if isinstance(dataset, Iterator):
        raise UserError("dataset: rows that can be read only once; give a list of them")
    if not isinstance(dataset, Iterable):
        raise UserError(
            f"dataset: {kind(dataset)}, not a dict of columns, a list of dicts, a Dataset or a DataFrame"
        )
    rows = _from_columns(dataset) if isinstance(dataset, dict) else dataset
    for number, values in enumerate(rows, 1):
        if not isinstance(values, dict):
            raise UserError(
                f"dataset: row {number} is {kind(values)}; a row is a dict such as "
                '{"prompt": "...", "completion": "..."}'
            )
        yield Row(values, f"dataset: row {number}")


def _from_frame(frame: Any) -> list[dict[str, Any]]:
    """Rows of a pandas DataFrame, its missing values as None and its arrays as lists."""
    import pyarrow  # slow to import

    try:
        return pyarrow.Table.from_pandas(frame, preserve_index=False).to_pylist()
    except (pyarrow.ArrowException, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"dataset: {kind(frame)} cannot be read as rows: {error}") from error


def _from_columns(columns: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if any(hasattr(column, "column_names") for column in columns.values()):
        raise UserError(f"dataset: several splits ({', '.join(columns)}); give one of them")
    for name, column in columns.items():
        if isinstance(column, str | bytes | Iterator) or not isinstance(column, Iterable):
            raise UserError(f"dataset: column `{name}` is {kind(column)}, not a list of values")
    lists = {  # of arrays plain values: a numpy False is not False
        name: column.tolist() if hasattr(column, "tolist") else list(column)
        for name, column in columns.items()
    }
    lengths = {name: len(column) for name, column in lists.items()}
    if len(set(lengths.values())) > 1:
        raise UserError(f"dataset: columns of different lengths: {lengths}")
    for cells in zip(*lists.values(), strict=True):
        yield dict(zip(lists, cells, strict=True))


def hub_rows(name: str, split: str) -> Iterator[Row]:
    """Rows of `owner/name` or `owner/name:config` through datasets; its code is never run."""
    import datasets  # seconds to import

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()  # its bars fill log files with carriage returns
    repository, _, config = name.partition(":")
    hub.look(repository)
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
            did_you_mean(unknown[0], STANDARD_COLUMNS, 3)
            or f"; those are {', '.join(sorted(STANDARD_COLUMNS))}"
        )
        raise UserError(f"{name}: columns: `{unknown[0]}` is not a standard name{near}")
    gone = set(columns.values()) - columns.keys()
    seen: dict[str, None] = {}
    for row in rows:
        cells = _cells(row.values)
        seen.update(dict.fromkeys(cells))
        mapped = {new: cells[old] for new, old in columns.items() if old in cells}
        rest = {key: value for key, value in row.values.items() if key not in gone}
        yield Row(rest | mapped, row.where)
    for standard, column in columns.items():
        if seen and column not in seen:
            near = did_you_mean(column, seen, 3) or f"; there are {', '.join(seen)}"
            raise UserError(f"{name}: columns: {standard}: no row has `{column}`{near}")


def _cells(values: dict[str, Any]) -> dict[str, Any]:
    """A row's cells by name, and those of objects in it: `translation.en` is `en` of `translation`."""
    inner = {
        f"{name}.{key}": cell
        for name, value in values.items()
        if isinstance(value, dict)
        for key, cell in value.items()
    }
    return inner | values


def _chosen(
    rows: Iterable[Row], only: dict[str, Cell | list[Cell]], report: Report, name: str
) -> Iterator[Row]:
    """Rows with one of the wanted values in each of some columns; UserError for one that no row has."""
    values = {key: value if isinstance(value, list) else [value] for key, value in only.items()}
    wanted = {key: {*own, *map(str, own)} for key, own in values.items()}
    seen: dict[str, None] = {}
    for row in rows:
        cells = _cells(row.values)
        seen.update(dict.fromkeys(cells))
        found = ((cells.get(key), own) for key, own in wanted.items())
        if all(
            str(cell) in own or (type(cell) in (int, float) and cell in own) for cell, own in found
        ):
            yield row
        else:
            report.count("rows left out by `only`")
    if gone := sorted(wanted.keys() - seen) if seen else []:
        raise UserError(f"{name}: only: no row has `{gone[0]}`{did_you_mean(gone[0], seen, 3)}")


def _watch_keys(rows: Iterable[Row], known: frozenset[str], report: Report) -> Iterator[Row]:
    """Report keys that no form knows and hardly a row of the file has: misspelt or misplaced."""
    times: Counter[str] = Counter()  # rows that have a key
    first: dict[str, str] = {}  # where the first of them is
    total = 0
    for row in rows:
        total += 1
        times.update(row.values.keys())
        if len(times) > len(first):
            first |= {key: row.where for key in row.values if key not in first}
        yield row
    for key in first if total >= 3 else ():
        if key not in known and times[key] <= max(1, total // 1000):
            near = did_you_mean(key, known, 3)
            report.problem(first[key], f"extra key `{key}`, in {times[key]} of {total} rows{near}")
