"""What a stage is made from: earlier artifacts, data files, models and code, by content."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pipeline.config.load import checkpoints_root
from pipeline.config.schema import (
    Data,
    PPOConfig,
    Reward,
    RMConfig,
    Sampling,
    SFTConfig,
    StageConfig,
)
from pipeline.errors import UserError
from pipeline.handoff.artifacts import is_published
from pipeline.process.files import sha256, write_atomically

DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")
_WORTH_CACHING = 1_000_000  # bytes; a smaller file is hashed as fast as it is looked up
_SETTLED = 2.0  # seconds; a younger file may still change within one tick of its time stamp


def parents_of(config: StageConfig) -> dict[str, Path]:
    """Name -> directory of every artifact the stage reads."""
    parents: dict[str, Path] = {}
    if isinstance(config, SFTConfig) and _is_artifact(config.model):
        parents["base"] = Path(config.model)
    if isinstance(config, RMConfig | PPOConfig):
        parents["sft"] = own_or_borrowed(config, "sft")
    if isinstance(config, PPOConfig):
        for index, member in enumerate(m for reward in config.rewards for m in reward.members()):
            if member == "rm":
                parents["rm"] = own_or_borrowed(config, "rm")
            elif _is_artifact(member):
                parents[f"reward_{index}"] = Path(member)
    return parents


def own_or_borrowed(config: StageConfig, stage: str) -> Path:
    """This run's stage when it has been made, else that of the run it borrows from."""
    own = config.run / stage
    return own if config.borrow is None or is_published(own) else config.borrow / stage


def inputs_of(config: StageConfig, in_memory: bool = False) -> dict[str, str]:
    """Everything else the stage reads: file -> SHA-256, hub id -> itself.

    `in_memory`: the stage's main data was given as objects and not by its config.
    """
    inputs: dict[str, str] = {"dataset": "in memory"} if in_memory else {}
    for section in _sections(config):
        if in_memory and section in (
            getattr(config, "data", None),
            getattr(config, "prompts", None),
        ):
            continue
        if isinstance(section, Data):
            inputs |= data_fingerprint(section)
        if isinstance(section, Reward) and section.function:
            inputs |= _module(section.function.partition(":")[0])
        if isinstance(section, Reward):
            for member in section.members():
                inputs |= {} if member == "rm" else _model(member)
        if isinstance(section, Sampling) and section.labeler:
            inputs |= _module(section.labeler)
    if isinstance(config, SFTConfig):
        inputs |= _model(config.model)
        if config.chat_template:
            inputs |= _hashed([config.chat_template])
    return inputs


def data_fingerprint(data: Data) -> dict[str, str]:
    """File -> SHA-256 of a source's files; a hub id -> itself. UserError for a missing file."""
    found: dict[str, str] = {}
    for name in [data.path] if isinstance(data.path, str) else data.path:
        path = Path(name)
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix in DATA_SUFFIXES and p.is_file())
            found |= _hashed([p for p in inside if not p.name.startswith(".")])
        elif path.exists():
            found |= _hashed([path])
        elif looks_local(name):
            raise UserError(f"{name}: no such file")
        else:
            found[name] = name
    return found


def missing_data(config: BaseModel, coming: list[Path]) -> list[str]:
    """Local data files of a config that do not exist, those below `coming` directories excepted."""
    problems = []
    for section in _sections(config):
        if isinstance(section, Data):
            for name in [section.path] if isinstance(section.path, str) else section.path:
                path = Path(name)
                awaited = any(folder == path or folder in path.parents for folder in coming)
                if not awaited and not path.exists() and looks_local(name):
                    problems.append(f"{name}: no such file")
    return problems


def looks_local(name: str) -> bool:
    """Whether a name that does not exist was meant as a path and not as a hub id."""
    path = Path(name)
    if path.is_absolute() or name.startswith((".", "~")) or path.suffix in DATA_SUFFIXES:
        return True
    return name.count("/") != 1 or path.parts[0] == checkpoints_root().name or path.parent.is_dir()


def _sections(value: Any) -> Iterator[BaseModel]:
    """Every group of keys inside a config."""
    if isinstance(value, BaseModel):
        yield value
        for name in type(value).model_fields:
            yield from _sections(getattr(value, name))
    elif isinstance(value, list):
        for inner in value:
            yield from _sections(inner)


def _is_artifact(name: str) -> bool:
    """Whether a model is one of ours: published here, or to be published in our folder."""
    path = Path(name)
    return is_published(path) or (not path.exists() and checkpoints_root() in path.parents)


def _model(name: str) -> dict[str, str]:
    """A model that is no artifact: its files' hashes, or its hub id."""
    path = Path(name)
    if _is_artifact(name):
        return {}  # a parent
    if path.is_dir():
        return _hashed(sorted(p for p in path.iterdir() if p.is_file() and p.name[0] != "."))
    if Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"{name}: no such model directory")
    return {name: name}


def _module(name: str) -> dict[str, str]:
    """The file of a module given by name, found without importing it."""
    relative = Path(*name.split("."))
    for folder in sys.path:
        for candidate in (relative.with_suffix(".py"), relative / "__init__.py"):
            path = Path(folder or ".") / candidate
            if path.is_file():
                return {candidate.as_posix(): sha256(path)}
    return {name: name}


# --- hashes of big files are kept -----------------------------------------------------------------


def _hashed(paths: list[Path]) -> dict[str, str]:
    """Path -> SHA-256, remembered by size and time stamp for big files."""
    store = checkpoints_root() / ".cache" / "hashes.json"
    known = _load(store)
    before = dict(known)
    hashes = {}
    for path in paths:
        stat = path.stat()
        key = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
        hashes[path.as_posix()] = known.get(key) or sha256(path)
        if stat.st_size >= _WORTH_CACHING and time.time() - stat.st_mtime > _SETTLED:
            known[key] = hashes[path.as_posix()]
    if known != before:
        write_atomically(store, json.dumps(known, indent=0))
    return hashes


def _load(store: Path) -> dict[str, str]:
    try:
        return dict(json.loads(store.read_text()))
    except (OSError, ValueError):
        return {}
