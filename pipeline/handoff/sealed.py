"""Training states on disk: numbered directories, each whole or absent, sealed by hashes.

`work/step-NNNNNN` appears by a rename, after all of it is on disk. Its `seal.json`, written last,
names every file with its SHA-256: nothing is read before all of it was found as it says. No torch.
"""

import json
import shutil
from pathlib import Path

from pipeline.errors import UserError
from pipeline.process import faults, files
from pipeline.process.progress import say

SEAL = "seal.json"
_MOST_BYTES = 10_000_000  # of a seal


def directory_of(work: Path, step: int) -> Path:
    """Where the state after `step` lies."""
    return work / f"step-{step:06d}"


def temporary(work: Path, step: int) -> Path:
    """Where it is written; `sweep` removes what a killed process left there."""
    return work / f".new-{directory_of(work, step).name}"


def step_of(directory: Path) -> int:
    """The number a state directory ends in."""
    return int(directory.name.rsplit("-", 1)[1])


def states(work: Path) -> list[Path]:
    """State directories, oldest first, whole or not."""
    found = [path for path in work.glob("step-*") if path.name[5:].isdecimal()]
    return sorted(found, key=step_of)


def publish(written: Path, work: Path, step: int, keep: int = 2) -> Path:
    """Seal `written`, put it in its place and prune; killed at any moment, earlier states are whole."""
    final = directory_of(work, step)
    faults.at("mid-write", step)
    seal(written)
    faults.at("before-rename", step)
    files.remove(final)  # a corrupt one: a whole one would have been gone on from
    files.move(written, final)
    faults.at("after-rename", step)
    _prune(work, step, keep)
    return final


def seal(directory: Path) -> None:
    """Write the hashes of every file in `directory` as the last of them, all on disk."""
    sums = {name: files.sha256(directory / name) for name in files.walk(directory) if name != SEAL}
    files.sync_all(directory)
    files.write_atomically(directory / SEAL, json.dumps(sums, indent=1))


def fault(directory: Path) -> str | None:
    """Why a state cannot be used, naming the file; None when it is whole and nothing was added."""
    if directory.is_symlink() or not directory.is_dir():
        return "it is not a plain folder"
    try:
        present = set(files.walk(directory)) - {SEAL}
        sums = _read_seal(directory / SEAL)
    except UserError as error:
        return str(error)
    for name, digest in sums.items():
        if name not in present:
            return f"{name} is missing"
        if files.sha256(directory / name) != digest:
            return f"{name} is corrupt"
    if extra := sorted(present - sums.keys()):
        return f"{extra[0]} is not part of it"
    return None


def newest(work: Path) -> Path | None:
    """The newest whole state, or None when nothing was ever saved.

    Corrupt ones are named and passed over; when only such are left it is an error, never a silent
    start from the beginning.
    """
    corrupt = []
    for directory in reversed(states(work)):
        reason = fault(directory)
        if reason is None:
            return directory
        corrupt.append(f"{directory}: {reason}")
        say(f"{directory}: not used, {reason}")
    if corrupt:
        raise UserError(
            "no saved state is whole:\n  "
            + "\n  ".join(corrupt)
            + f"\nRemove {work} to start again, or FORCE={work.name} (--force)."
        )
    return None


def sweep(work: Path) -> None:
    """Remove what a killed process had not finished writing or removing."""
    for path in [*work.glob(".new-*"), *work.glob(".*.gone")]:
        shutil.rmtree(path)


def _read_seal(path: Path) -> dict[str, str]:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UserError(f"{SEAL} is too long to be one")
        sums = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{SEAL} is missing") from None
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{SEAL} is corrupt") from None
    if not isinstance(sums, dict) or not sums:
        raise UserError(f"{SEAL} is corrupt")
    if outside := [name for name in sums if not files.is_inside(name)]:
        raise UserError(f"{SEAL} is refused: it lists {outside[0]!r}, outside of it")
    return sums


def _prune(work: Path, step: int, keep: int) -> None:
    """Keep `keep` states up to `step`; later ones are corrupt, or `step` were not being saved."""
    found = states(work)
    kept = [path for path in found if step_of(path) <= step][-keep:]
    for old in found:
        if old not in kept:
            hidden = files.hide(old)
            faults.at("prune", step)
            shutil.rmtree(hidden)
