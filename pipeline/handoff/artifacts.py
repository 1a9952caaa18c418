"""The hand-off between stages: published directories, sealed by a manifest.

A published directory is complete or absent, and never modified. Its `manifest.json`, written last,
names every file with size and SHA-256 and says what the artifact was made from.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.config.schema import BaseConfig
from pipeline.errors import UserError
from pipeline.handoff.remembered import make_command
from pipeline.process import faults
from pipeline.process.files import (
    Lock,
    is_inside,
    move,
    remove,
    sha256,
    sync_all,
    walk,
    write_atomically,
)

MANIFEST = "manifest.json"
RECORDS = ("metrics.jsonl", "samples.jsonl", "tokens.jsonl")
"""Files of an artifact that tell of its making, with wall-clock times."""
FORMAT_VERSION = 1
_MOST_BYTES = 10_000_000
"""A longer manifest is none."""
_MOMENTS = 100
"""Hundredths of a second that a reader waits for a swap of two directories."""
UNSAFE = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth", ".py", ".pyc"}
"""Endings of files that can carry code; an artifact holds none."""

PACKAGES = (
    "torch transformers trl peft accelerate datasets safetensors tokenizers numpy wandb".split()
)


class FileEntry(BaseModel):
    """Size in bytes and SHA-256 of one file."""

    model_config = ConfigDict(extra="forbid")
    size: int
    sha256: str


class Parent(BaseModel):
    """An artifact this one was made from."""

    model_config = ConfigDict(extra="forbid")
    path: str
    manifest_sha256: str
    """Its `content_hash`."""


class Manifest(BaseModel):
    """What an artifact is and what it was made from; of an older version, it may say more."""

    format_version: int = FORMAT_VERSION
    stage: str
    files: dict[str, FileEntry] = {}
    """Relative POSIX path -> size and hash; filled by `publish`."""
    config: dict[str, Any] = {}
    """Resolved config."""
    inputs: dict[str, str] = {}
    """Data file -> SHA-256; hub id -> itself."""
    tokenizer_hash: str = ""
    template_hash: str = ""
    parents: dict[str, Parent] = {}
    packages: dict[str, str] = {}
    seed: int | None = None
    metrics: dict[str, float | int | str | bool | None] = {}
    created: str = ""
    """ISO time, UTC."""


def write_manifest(directory: Path, manifest: Manifest) -> Manifest:
    """Hash the files of `directory` and write its manifest as the last of them, all on disk."""
    paths = sorted(set(walk(directory)) - {MANIFEST})
    if unsafe := [path for path in paths if PurePosixPath(path).suffix in UNSAFE]:
        raise ValueError(f"{directory}: {', '.join(unsafe)}: may carry code, not published")
    files = [directory / path for path in paths]
    entries = [FileEntry(size=file.stat().st_size, sha256=sha256(file)) for file in files]
    complete = manifest.model_copy(
        update={
            "files": dict(zip(paths, entries, strict=True)),
            "packages": manifest.packages or installed_packages(),
            "created": manifest.created or datetime.now(UTC).isoformat(timespec="seconds"),
        }
    )
    sync_all(directory)
    write_atomically(directory / MANIFEST, complete.model_dump_json(indent=1) + "\n")
    return complete


def publish(staging: Path, final: Path, manifest: Manifest) -> Path:
    """Seal `staging` and put it in the place of `final` by renames alone.

    Killed at any moment, either the old or the new artifact is there, or `recover` brings the new
    one. Hold the stage's lock. Both must lie on one file system.
    """
    write_manifest(staging, manifest)
    faults.at("publish", 1)
    final.parent.mkdir(parents=True, exist_ok=True)
    recover(final)
    move(staging, _fresh(final))  # from here on the new artifact is certain
    faults.at("publish", 2)
    recover(final)
    return final


def recover(final: Path) -> None:
    """Complete an interrupted swap: `.NAME.ready` is whole and takes the place of `NAME`.

    What the stage kept in case it was killed goes first: nobody would come back for it. UserError for
    what no stage made in its place; moved away, the next call completes the swap.
    """
    check_free(final)
    fresh, old = _fresh(final), _old(final)
    if (fresh / MANIFEST).is_file():
        remove(work_path(final))
        faults.at("publish", 3)
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(final, old)
            faults.at("publish", 4)
        move(fresh, final)
        faults.at("publish", 5)
    elif old.exists() and not final.exists():
        os.rename(old, final)
    shutil.rmtree(old, ignore_errors=True)


def check_free(final: Path) -> None:
    """UserError when there is in the place of an artifact what a person put there: it stays."""
    try:
        listed = {MANIFEST, *Manifest.model_validate_json((final / MANIFEST).read_bytes()).files}
    except ValidationError:
        return  # a damaged one
    except OSError:
        listed = set()
    places = [final] if final.is_file() else final.rglob("*")
    there = {path.relative_to(final).as_posix() for path in places if not path.is_dir()}
    if others := [name for name in sorted(there - listed) if not _is_hidden(name)]:
        told = ", ".join(others[:3]) + ", ..." * (len(others) > 3)
        raise UserError(f"{final}: something else is there, and it stays; move it away: {told}")


def settle(final: Path) -> None:
    """`recover`, unless a running stage is at it; then wait for the moment that it takes."""
    for _ in range(_MOMENTS):
        if not (_fresh(final).exists() or _old(final).exists()):
            return
        with contextlib.suppress(UserError), Lock(lock_path(final)):
            return recover(final)
        if final.exists():
            return  # whole, the old one or the new one
        time.sleep(0.01)


def publish_directory(
    staging: Path, final: Path, config: BaseConfig, inputs: dict[str, str] | None = None
) -> Path:
    """Publish what needs no frame of a stage: a base model, made from these files (name -> SHA-256)."""
    manifest = Manifest(
        stage=config.stage,
        config=config.model_dump(mode="json"),
        inputs=inputs or {},
        seed=config.seed,
    )
    return publish(staging, final, manifest)


def installed_packages() -> dict[str, str]:
    """Versions of the packages that can change a result."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def read(directory: Path | str, stage: str | None = None) -> Manifest:
    """The manifest of a published directory whose files are as it says; UserError names one that is not."""
    directory = Path(directory)
    before = _state(directory)
    try:
        manifest = read_listing(directory, stage)
        for name, entry in manifest.files.items():
            if sha256(directory / name) != entry.sha256:
                raise _damaged(directory, name, "is corrupt: its SHA-256 is not the manifest's")
    except (UserError, OSError):
        if _state(directory) == before:
            raise
        return read(directory, stage)  # another one was published meanwhile
    return manifest


def read_listing(directory: Path, stage: str | None = None) -> Manifest:
    """`read` without the hashes: files are there, of the right size and kind, and no others are."""
    manifest = read_manifest(directory, stage)
    present = set(walk(directory)) - {MANIFEST}
    for name, entry in manifest.files.items():
        if not is_inside(name):
            raise _damaged(directory, MANIFEST, f"is refused: it lists {name!r}, outside of it")
        if name not in present:
            raise _damaged(directory, name, "is missing")
        if PurePosixPath(name).suffix in UNSAFE:
            raise _damaged(directory, name, "is refused: such a file may carry code")
        if (size := (directory / name).stat().st_size) != entry.size:
            raise _damaged(directory, name, f"has {size} bytes, not {entry.size}")
    for name in sorted(present - manifest.files.keys()):
        if not _is_hidden(name):
            raise _damaged(directory, name, "is not part of the artifact; remove it")
    return manifest


def read_manifest(directory: Path, stage: str | None = None) -> Manifest:
    """The manifest alone, its files unseen."""
    settle(directory)
    path = directory / MANIFEST
    if directory.is_symlink() or path.is_symlink():
        raise UserError(f"{path}: refused: a symbolic link")
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise _damaged(directory, MANIFEST, "is too long for a manifest")
        manifest = Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"{directory}: not made yet; make it: {make_command(directory, force=False)}"
        ) from None
    except (OSError, ValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise _damaged(directory, MANIFEST, f"is not a manifest: {reason}") from None
    if manifest.format_version != FORMAT_VERSION:
        raise _damaged(directory, MANIFEST, f"has format {manifest.format_version}, not 1")
    if stage is not None and manifest.stage != stage:
        raise UserError(f"{directory}: made by stage {manifest.stage}, expected {stage}")
    return manifest


def is_published(directory: Path) -> bool:
    """Whether an artifact is there, whole or not."""
    settle(directory)
    return (directory / MANIFEST).is_file()


def manifest_hash(directory: Path) -> str:
    """`content_hash` of a published directory."""
    return content_hash(read_manifest(directory).model_dump())


def content_hash(manifest: dict[str, Any]) -> str:
    """SHA-256 of what an artifact holds, but not of when and how long: made again of the same, it is the same."""
    files = {n: entry["sha256"] for n, entry in manifest["files"].items() if n not in RECORDS}
    held = [manifest[key] for key in ("stage", "tokenizer_hash", "template_hash")]
    return hashlib.sha256(json.dumps([held, files], sort_keys=True).encode()).hexdigest()


def check_same_tokenizer(a: Manifest, b: Manifest) -> None:
    """UserError when two artifacts tokenise or format differently."""
    for what in ("tokenizer", "template"):
        if getattr(a, f"{what}_hash") != getattr(b, f"{what}_hash"):
            name = "chat template" if what == "template" else what
            raise UserError(
                f"{a.stage} and {b.stage} have different {name}s: train {b.stage} again"
            )


def check_trained_from(child: Path, name: str, parent: Path) -> None:
    """UserError unless `child` was made from exactly the artifact `parent` (e.g. rm from this sft)."""
    link = read_manifest(child).parents.get(name)
    if link is None or link.manifest_sha256 != manifest_hash(parent):
        origin = f"another {name} ({link.path})" if link else f"no {name}"
        raise UserError(
            f"{child}: trained from {origin}, not from {parent}; "
            f"train it again: {make_command(child)}"
        )


def _damaged(directory: Path, name: str, reason: str) -> UserError:
    return UserError(f"{directory / name}: {reason}; rebuild: {make_command(directory)}")


def lock_path(final: Path) -> Path:
    """The lock of the artifact `RUN/STAGE`."""
    return final.parent / ".work" / f"{final.name}.lock"


def work_path(final: Path) -> Path:
    """Where the stage that makes `RUN/STAGE` keeps what must survive a killed process."""
    return final.parent / ".work" / final.name


def _is_hidden(name: str) -> bool:
    return PurePosixPath(name).name.startswith(".")


def _state(directory: Path) -> tuple[int, int] | None:
    """Changes when another artifact takes the place of this one."""
    settle(directory)
    try:
        stat = (directory / MANIFEST).stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns


def _fresh(final: Path) -> Path:
    return final.with_name(f".{final.name}.ready")


def _old(final: Path) -> Path:
    return final.with_name(f".{final.name}.old")
