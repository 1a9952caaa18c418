"""Which files a data path stands for, found by their names and first bytes: before anything slow starts.

A folder stands for its .jsonl, .json, .csv, .tsv and .parquet files in sorted order, or for its .txt
files if it has no others. All but .parquet may be packed by gzip.
"""

import difflib
import gzip
import re
import zlib
from pathlib import Path
from typing import IO, cast

from pipeline.config.load import checkpoints_root
from pipeline.errors import UserError

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?")
_HUB_URL = re.compile(r"https?://huggingface\.co/datasets/([\w.-]+/[\w.-]+)")
_TABLE = "write it as JSON lines, e.g. pandas.{}(IN).to_json(OUT, orient='records', lines=True)"
_REMEDY = {
    ".xlsx": _TABLE.format("read_excel"),
    ".arrow": "write it with datasets' to_json",
    ".ndjson": "name it .jsonl",
    **dict.fromkeys((".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz"), "unpack it first"),
}
_GZIP = b"\x1f\x8b"
_NO_ROWS = {
    _GZIP: "packed by gzip; name it so, with .gz behind its ending",
    b"PK\x03\x04": "packed by zip; unpack it first",
    b"version https://git-lfs": "a pointer of Git LFS and not the file itself; fetch it (git lfs pull)",
    b"\xff\xfe": "UTF-16; recode it: iconv -f UTF-16 -t UTF-8 IN > OUT",
    b"\xfe\xff": "UTF-16; recode it: iconv -f UTF-16 -t UTF-8 IN > OUT",
}
"""First bytes of what is no file of rows, whatever its name."""


def kind_of(path: Path) -> str:
    """A file's ending, one of `KINDS` or another: `.jsonl` of `a.jsonl`, `A.JSONL` and `a.jsonl.gz`."""
    ending, last = Path(path.stem).suffix.lower(), path.suffix.lower()
    return ending if last == ".gz" and ending in KINDS[:4] + KINDS[5:] else last


def opened(path: Path) -> IO[bytes]:
    """A file's bytes, unpacked if it is packed; whoever reads them may meet a `BadGzipFile`."""
    return cast(IO[bytes], gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb")


def is_hub_id(name: str) -> bool:
    """`owner/name` or `owner/name:config`, unless it is a mistyped path into an existing folder."""
    path = Path(name)
    if path.exists() or not _HUB_ID.fullmatch(name) or kind_of(path) in KINDS:
        return False
    return path.parts[0] != checkpoints_root().name and not path.parent.exists()


def files(name: str) -> tuple[list[Path], list[str]]:
    """The files behind a name that is no hub id, and what lies beside them; UserError with a remedy."""
    path = Path(name)
    if "://" in name:
        hub = _HUB_URL.match(name)
        remedy = f"give the hub id: {hub[1]}" if hub else "fetch the file and give its path"
        raise UserError(f"{name}: addresses are not read; {remedy}")
    if not path.exists():
        raise UserError(
            f"{path}: no such file or folder, and not a hub id (owner/name){nearest(path)}"
        )
    if not path.is_dir():
        if not path.is_file():
            raise UserError(
                f"{path}: no plain file; rows are read more than once: write them to one"
            )
        if kind_of(path) not in KINDS:
            remedy = _REMEDY.get(path.suffix.lower(), "write it as one of those")
            raise UserError(f"{path}: unknown kind of file; known are {', '.join(KINDS)}: {remedy}")
        return [_looked_at(path)], []
    inside = sorted(entry for entry in path.iterdir() if entry.name[0] != ".")
    found = [entry for entry in inside if kind_of(entry) in KINDS and entry.is_file()]
    rows = [file for file in found if kind_of(file) != ".txt"] or found
    others = [entry for entry in inside if entry not in rows and entry.suffix != ".md"]
    aside = [entry.name + "/" * entry.is_dir() for entry in others]
    if not rows:
        raise UserError(f"{path}: no {', '.join(KINDS)} file in this folder{_shown(aside)}")
    return [_looked_at(file) for file in rows], aside


def problem(name: str) -> str | None:
    """Why a data path cannot be read, as far as names and first bytes tell; None when it can."""
    try:
        None if is_hub_id(name) else files(name)
    except UserError as error:
        return str(error)
    return None


def _looked_at(path: Path) -> Path:
    try:
        with opened(path) as file:
            head = file.read(32)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a whole gzip file: {error}") from error
    for begin, what in _NO_ROWS.items():
        if head.startswith(begin):
            raise UserError(f"{path}: {what}")
    if b"\0" in head and kind_of(path) != ".parquet":
        raise UserError(f"{path}: no text; if it is UTF-16: iconv -f UTF-16LE -t UTF-8 IN > OUT")
    return path


def _shown(names: list[str]) -> str:
    return f"; there are {', '.join(names[:8])}{', ...' * (len(names) > 8)}" if names else ""


def nearest(path: Path) -> str:
    """What is named almost like a path that is not there, endings aside; else what is missing of it."""
    parent = path
    while not parent.is_dir():
        missing, parent = parent, parent.parent
    names = {entry.stem: entry.name for entry in sorted(parent.iterdir())}
    near = difflib.get_close_matches(missing.stem, names, n=1, cutoff=0.7)
    if near:
        return f": did you mean {parent / names[near[0]]}?"
    return f": {parent} has no `{missing.name}`"
