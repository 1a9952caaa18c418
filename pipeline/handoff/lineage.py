"""What a result is made from - config, earlier artifacts, data, models, code - by content alone.

One function decides whether a step is up to date (`why_stale`); the plan and whoever makes the step
both ask it, and both sides' facts come from `identity` and `recorded`.
"""

import contextlib
import glob
import html
import json
import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from pipeline import steps
from pipeline.config.evaluation import EvalConfig
from pipeline.config.load import checkpoints_root, differences, portable
from pipeline.config.schema import StageConfig
from pipeline.config.section import Reads, Section
from pipeline.errors import UserError
from pipeline.handoff import artifacts, datafiles, sources
from pipeline.handoff.artifacts import is_published
from pipeline.handoff.found import find_stages, fresh_stages, read_json
from pipeline.handoff.remembered import expected_of, make_command
from pipeline.process.files import read_if_whole, sha256, write_atomically

_WORTH_CACHING = 1_000_000  # bytes; a smaller file is hashed as fast as it is looked up
_SETTLED = 2.0  # seconds; a younger file may still change within one tick of its time stamp
_PAGE_MARK = '<meta name="made-from" content="{}">'


@dataclass
class Identity:
    """All that decides a result: name -> value, content hash or file hash."""

    config: dict[str, Any]
    parents: dict[str, str]
    inputs: dict[str, str]

    def differences(self, now: "Identity") -> Iterator[str]:
        """What another one has differently, a line each."""
        yield from differences(self.config, now.config)
        for mine, theirs in ((self.parents, now.parents), (self.inputs, now.inputs)):
            for name in dict.fromkeys([*mine, *theirs]):
                if mine is self.parents and name not in theirs:
                    yield f"{name} is not there"
                elif mine.get(name) != theirs.get(name):
                    yield f"{name} has changed"

    def differs(self, now: "Identity") -> str | None:
        """The same in a few words: all of the config, else the first; None when nothing."""
        if told := differences(self.config, now.config):
            return "config: " + "; ".join(told)
        return next(self.differences(now), None)

    def mark(self) -> str:
        """A line for the head of a page, found again by `recorded`."""
        return _PAGE_MARK.format(html.escape(json.dumps(asdict(self))))


def why_stale(name: str, config: BaseModel | None, run: Path) -> str | None:
    """Why a step has to run, in words; None when it has not. Reads no weights.

    run: the run's directory, of a base model its own. UserError when a published directory has lost
    or changed a file: it is not rebuilt unasked.
    """
    before = recorded(name, run)
    if before is None:
        return "not made yet"
    config = config.of_split("test") if isinstance(config, EvalConfig) else config
    return before.differs(identity(name, config, run))


def recorded(name: str, run: Path, output: Path | None = None) -> Identity | None:
    """What a step's result says it was made from; None when there is none. `output`: another file of
    the same kind."""
    step = steps.TABLE[name]
    place = output or run / step.output
    if step.kind in ("base", "stage"):
        if not is_published(place.parent):
            return None
        manifest = artifacts.read_listing(place.parent, name)
        parents = {n: link.manifest_sha256 for n, link in manifest.parents.items()}
        return Identity(deciding(step.config, manifest.config), parents, _portable(manifest.inputs))
    if not place.is_file():
        return None
    if step.kind == "result":
        done = read_json(place)
        parents = {n: made["manifest_sha256"] for n, made in done.get("artifacts", {}).items()}
        config, inputs = done.get("config", {}), done.get("inputs", {})
        return Identity(deciding(step.config, config), parents, _portable(inputs))
    found = re.search(_PAGE_MARK.format("(.*?)"), place.read_text(encoding="utf-8"))
    return Identity(**json.loads(html.unescape(found[1]))) if found else Identity({}, {}, {})


def identity(name: str, config: BaseModel | None, run: Path) -> Identity:
    """What a step would be made from now. UserError for a file that is not there."""
    step = steps.TABLE[name]
    values = {} if config is None else deciding(type(config), config.model_dump(mode="json"))
    if isinstance(config, StageConfig):
        made = {n: path for n, path in parents_of(config).items() if is_published(path)}
        parents = {n: artifacts.manifest_hash(path) for n, path in made.items()}
    elif step.kind == "base":
        parents = {}
    else:
        fresh, _ = fresh_stages(find_stages(run))
        parents = {n: stage.manifest_sha256 for n, stage in fresh.items()}
    if step.kind == "page":
        shown = (
            "eval/test",
            "eval/validation",
            "overopt/overopt",
            "compare/compare",
            "rounds/rounds",
        )
        files = [*(run / f"{name}.json" for name in shown), expected_of(run)]
        inputs = _hashed([path for path in files if path.is_file()])
    else:
        inputs = inputs_of(config) if isinstance(config, Section) else {}
    if isinstance(config, EvalConfig):  # artifacts that judge are no parents
        models = [Path(name) for _, _, kind, name in config.references() if kind is Reads.MODEL]
        inputs |= {str(p): artifacts.manifest_hash(p) for p in models if is_published(p)}
    return Identity(values, parents, _portable(inputs))


def _portable(inputs: dict[str, str]) -> dict[str, str]:
    return {portable(name): value for name, value in inputs.items()}


def deciding(kind: type[BaseModel] | None, config: dict[str, Any]) -> dict[str, Any]:
    """A resolved config without the keys that decide nothing of the result.

    One that was recorded before a key was there has its default, which means what was done then.
    """
    cosmetic: set[str] = getattr(kind, "cosmetic", set())
    if kind is not None:
        with contextlib.suppress(ValidationError):  # of a version that had other keys: as it is
            config = kind.model_validate_json(json.dumps(config)).model_dump(mode="json")
    return {key: portable(value) for key, value in config.items() if key not in cosmetic}


def parents_of(config: StageConfig) -> dict[str, Path]:
    """Name -> directory of every artifact the stage reads."""
    own = steps.TABLE[config.stage].after
    parents = {name: own_or_borrowed(config, name) for name in own}
    models = [(g, key, name) for g, key, kind, name in config.references() if kind is Reads.MODEL]
    for index, (group, key, name) in enumerate(models):
        if name in steps.stages():
            parents[name] = own_or_borrowed(config, name)
        elif _is_artifact(name):
            own_key = "base" if key == "model" else key
            role = own_key if group is config else f"{type(group).__name__.lower()}_{index}"
            parents[role] = Path(name)
    return parents


def own_or_borrowed(config: StageConfig, stage: str) -> Path:
    """This run's stage when it has been made, else that of the run it borrows from."""
    own = config.run / stage
    return own if config.borrow is None or is_published(own) else config.borrow / stage


def _is_artifact(name: str) -> bool:
    """Whether a model is one of ours: published here, or to be published in our folder."""
    path = Path(name)
    return is_published(path) or (not path.exists() and checkpoints_root() in path.parents)


def inputs_of(config: Section, in_memory: str | None = None) -> dict[str, str]:
    """Everything else that a config names: file -> SHA-256, hub id -> itself. UserError for a missing file.

    `in_memory`: hash of the rows that were given as objects in the place of the config's main data.
    """
    inputs: dict[str, str] = {} if in_memory is None else {"dataset": in_memory}
    replaced = ("data.", "prompts.") if in_memory else ()
    for _, key, kind, name in config.references():
        if kind is Reads.DATA and not key.startswith(replaced):
            inputs |= _data(name)
        elif kind is Reads.MODEL and name not in steps.stages():
            inputs |= _model(name)
        elif kind in (Reads.CODE, Reads.FUNCTION):
            inputs |= _code(name)
        elif kind is Reads.FILE:
            if told := _problem(kind, name):
                raise UserError(told)
            inputs |= _hashed([Path(name)])
    people = getattr(config, "to_rank", None)
    if people and people.is_file() and in_memory is None:
        inputs[people.name] = sha256(people)
    return inputs


def missing(config: Section, coming: Iterable[Path] = ()) -> list[str]:
    """What a config names and is not there, as `key: reason`, without what lies below `coming` directories."""
    problems = []
    for _, key, kind, name in config.references():
        path = Path(name)
        if not any(folder == path or folder in path.parents for folder in coming):
            if told := _problem(kind, name):
                problems.append(f"{key}: {told}")
    return problems


def _problem(kind: Reads, name: str) -> str | None:
    if kind is Reads.DATA:
        return datafiles.problem(name)
    if kind is Reads.MODEL and name not in steps.stages():
        return _no_model(name)
    if kind in (Reads.CODE, Reads.FUNCTION):
        return sources.problem(name, function=kind is Reads.FUNCTION)
    # not Path: a template given as text is a name too long for it
    missing_file = kind is Reads.FILE and not os.path.isfile(name)
    return f"{name[:200]}: no such file" if missing_file else None


def _data(name: str) -> dict[str, str]:
    return {name: name} if datafiles.is_hub_id(name) else _hashed(datafiles.files(name)[0])


def _model(name: str) -> dict[str, str]:
    """A model that is no artifact: the hashes of its folder's files, but hidden ones, or its hub id."""
    path = Path(name)
    if _is_artifact(name):
        return {}  # a parent
    if path.is_dir():
        found = [path / name for name in glob.glob("**", root_dir=path, recursive=True)]
        return _hashed(sorted(file for file in found if file.is_file()))
    if told := _no_model(name):
        raise UserError(told)
    return {name: name}


def _no_model(name: str) -> str | None:
    """Why a name is no model: neither a folder, nor a hub id because of what it looks like."""
    path = Path(name)
    if path.is_dir():
        return None
    if _is_artifact(name):
        return f"{name}: not made yet; make it: {make_command(path, force=False)}"
    if path.exists():
        return f"{name}: a file; give the folder that holds the model"
    named = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if named or ("/" in name and path.parent.exists()):
        return f"{name}: no such model directory{datafiles.nearest(path)}"
    return None


def _code(name: str) -> dict[str, str]:
    """The files of a module and of what it imports, by their names below the import path."""
    module = name.partition(":")[0]
    found = sources.files_of(module)
    return {place: sha256(path) for place, path in sorted(found.items())} or {module: module}


def _hashed(paths: list[Path]) -> dict[str, str]:
    """Path -> SHA-256, of big files remembered by what changes with every write (`st_ctime` too, which
    nobody can set back)."""
    store = checkpoints_root() / ".cache" / "hashes.json"
    known = read_if_whole(store)
    before = dict(known)
    hashes = {}
    for path in paths:
        stat = path.stat()
        facts = stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
        key = f"{path.resolve()} {' '.join(map(str, facts))}"
        hashes[path.as_posix()] = known.get(key) or sha256(path)
        if stat.st_size >= _WORTH_CACHING and time.time() - stat.st_ctime > _SETTLED:
            known[key] = hashes[path.as_posix()]
    if known != before:
        with contextlib.suppress(OSError):  # where nothing may be written, hashed again next time
            write_atomically(store, json.dumps(known, indent=0))
    return hashes
