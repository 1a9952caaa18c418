"""What to say when the disk is full, in whichever library's words that arrives."""

import errno
import shutil
from pathlib import Path

_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# safetensors raises its own error with the number in its text; torch.save says only that it failed,
# in one of three ways.
_PHRASES = (
    *(f"os error {number}" for number in _ERRNOS),
    "PytorchStreamWriter failed writing",
    "basic_ios::clear: iostream error",
    "unexpected pos ",
    "database or disk is full",  # SQLite
)


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, says that a file could not be written for space."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _ERRNOS:
            return True
        if any(phrase in str(error) for phrase in _PHRASES):
            return True
        error = error.__cause__ or error.__context__
    return False


def message(folder: Path | None, needed: int = 0) -> str:
    """What is needed in a run's folder (bytes), what there is, and that nothing is lost."""
    told = "no space left to write to, or files may not grow further"
    if folder is None:
        return told
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    return (
        f"{folder}: {told}: saved states and the published model take up to {needed} bytes "
        f"({needed / 1e9:.1f} GB), {free} are free. What was saved before is whole: make room and "
        "run the same command again"
    )
