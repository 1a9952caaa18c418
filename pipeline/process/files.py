"""Files that are whole or absent, their hashes, and a lock that dies with its process."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Self

from pipeline.errors import UserError


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, text: str, over: bytes | None = None) -> None:
    """Write a small file whole or not at all. UserError unless it still is what it is written `over`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    if over is not None and path.read_bytes() != over:
        temporary.unlink()
        raise UserError(f"{path}: changed meanwhile, and is left as it is; run the same again")
    os.replace(temporary, path)
    sync(path.parent)


def jsonl(rows: Iterable[dict[str, Any]]) -> str:
    """Rows as the text of a JSONL file; what JSON has no word for, such as a date, as text."""
    return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSONL file; [] without one. What a killed process cut short is left out."""
    rows = []
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():
        with contextlib.suppress(ValueError, RecursionError):  # cut within a character, too
            row = json.loads(line.decode("utf-8"))
            rows += [row] if isinstance(row, dict) else []
    return rows


def read_if_whole(path: Path) -> dict[str, Any]:
    """An object of a JSON file; {} without one, or of a damaged one."""
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}


def sync(path: Path) -> None:
    """Have a file or a folder's entries on disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_all(directory: Path) -> None:
    """`sync` every file below a folder, and the folders."""
    for folder, _, names in os.walk(directory, topdown=False):
        for name in names:
            sync(Path(folder, name))
        sync(Path(folder))


def move(source: Path, target: Path) -> None:
    """Rename, on disk before this returns. Both lie in one file system; no `target` is there."""
    os.rename(source, target)
    sync(target.parent)
    if source.parent != target.parent:
        sync(source.parent)


def remove(directory: Path) -> None:
    """Remove a folder so that a killed process leaves all of it or none under its name."""
    shutil.rmtree(hide(directory), ignore_errors=True)


def hide(directory: Path) -> Path:
    """Move a folder, if it is there, to the name it is removed from, in the place of an older one."""
    gone = directory.with_name(f".{directory.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        os.rename(directory, gone)
    return gone


def walk(directory: Path) -> Iterator[str]:
    """Relative POSIX paths of all files below; UserError for a link or anything else that is no file."""
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        if entry.is_symlink():
            raise UserError(f"{entry.path}: refused: a symbolic link")
        if entry.is_dir():
            for name in walk(Path(entry.path)):
                yield f"{entry.name}/{name}"
        elif entry.is_file():
            yield entry.name
        else:
            raise UserError(f"{entry.path}: refused: not a plain file")


def is_inside(name: str) -> bool:
    """Whether a relative path that somebody wrote down stays in its directory."""
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and "\\" not in name


class Lock:
    """An exclusive lock that dies with its process; UserError names the holder's pid, unless it is to `wait`."""

    def __init__(self, path: Path, wait: bool = False):
        self.path = path
        self._how = fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)
        self._file = -1

    def __enter__(self) -> Self:
        while self._file < 0:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            except (FileNotFoundError, FileExistsError):
                if self.path.parent.is_file():
                    raise
                continue  # another holder removed the empty folder meanwhile
            try:
                fcntl.flock(file, self._how)
            except OSError:
                holder = os.read(file, 32).decode(errors="replace").strip() or "unknown"
                os.close(file)
                raise UserError(
                    f"{self.path}: in use by process {holder}, which is at the same thing; wait for its end"
                ) from None
            if self._is_current(file):
                self._file = file
            else:
                os.close(file)  # its last holder removed it meanwhile
        os.truncate(self._file, 0)
        os.write(self._file, f"{os.getpid()}\n".encode())
        return self

    def __exit__(self, *_: object) -> None:
        self.path.unlink(missing_ok=True)
        if self.path.parent.name == ".work":
            with contextlib.suppress(OSError):  # not empty
                self.path.parent.rmdir()
        os.close(self._file)
        self._file = -1

    def _is_current(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.stat(self.path))
        except FileNotFoundError:
            return False
