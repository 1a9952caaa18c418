"""Which stages a run has, where they lie, and what they recorded; no torch, nothing verified."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import steps
from pipeline.errors import UserError
from pipeline.handoff.artifacts import MANIFEST, content_hash
from pipeline.handoff.remembered import command, make_command, recall
from pipeline.process.files import read_jsonl


@dataclass
class Stage:
    """A published directory and its manifest ({} for a base model that was not built here)."""

    name: str
    path: Path
    manifest: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        """Resolved config of the stage."""
        return self.manifest.get("config") or {}

    @property
    def metrics(self) -> dict[str, Any]:
        """Headline metrics of the stage."""
        return self.manifest.get("metrics") or {}

    @property
    def manifest_sha256(self) -> str:
        """Hash of what it holds; "" without a manifest."""
        return content_hash(self.manifest) if self.manifest else ""

    def curve(self) -> list[dict[str, Any]]:
        """Lines of its metrics.jsonl."""
        return read_jsonl(self.path / "metrics.jsonl")


def find_stages(run: Path) -> dict[str, Stage]:
    """Stages of a run in order, earlier ones where later ones say they took them from (`FROM=`)."""
    found: dict[str, Stage] = {}
    for name in reversed(steps.stages()):
        path = run / name
        if not (path / MANIFEST).is_file():
            path = _parent_path(name, found) or path
        if manifest := read_json(path / MANIFEST):
            found[name] = Stage(name, path, manifest)
    first = next(iter(steps.stages()))
    if first in found:
        base = _parent_path("base", found) or Path(str(found[first].config.get("model", "")))
        found["base"] = Stage("base", base, read_json(base / MANIFEST))
    return {name: found[name] for name in steps.TABLE if name in found}


def need_first(run: Path, stages: dict[str, Stage], why: str) -> None:
    """UserError with `why` and what to do when the run's first stage is not among those found."""
    first = next(iter(steps.stages()))
    if first not in stages:
        check_there(run)
        if told := lost(run).get(first):
            raise UserError(f"{run}: {told}; {remedy(run, first)}")
        begun = [name for name in steps.stages() if name in recall(run).steps]
        goal = begun[-1] if begun else first
        raise UserError(f"{run}: {why}; make its {goal}: {command(run, goal)}")


def runs(root: Path) -> list[str]:
    """Names of the runs in a folder of checkpoints."""
    begun = ("run.json", *steps.stages())
    return sorted({path.parent.name for name in begun for path in root.glob(f"*/{name}")})


def check_there(run: Path) -> None:
    """UserError that names the runs there are when this is none of them."""
    if not run.is_dir():
        there = ", ".join(runs(run.parent)) or "none yet"
        make = command(run, next(iter(steps.stages())))
        raise UserError(f"{run}: no such run; there are: {there} (a new one: {make})")


def lost(run: Path) -> dict[str, str]:
    """Stages that this run took from another one, which is gone -> that, in words."""
    told = {}
    for child in steps.stages():
        for name, link in (read_json(run / child / MANIFEST).get("parents") or {}).items():
            own, path = run / name, Path(link["path"])
            there = any((place / MANIFEST).is_file() for place in (own, path))
            if name in steps.stages() and path.resolve() != own.resolve() and not there:
                told[name] = f"{child} was made from {path}, which is not there any more"
    return told


def remedy(run: Path, name: str) -> str:
    """What to do about a stage that is `lost`."""
    last = [stage for stage in steps.stages() if (run / stage / MANIFEST).is_file()][-1]
    return f"bring it back, or make all of it anew: {command(run, last)} FORCE={name}"


def _parent_path(name: str, found: dict[str, Stage]) -> Path | None:
    """Where a later stage says its parent `name` lies."""
    for stage in found.values():
        parent = (stage.manifest.get("parents") or {}).get(name)
        if parent:
            path = Path(parent["path"])
            return path if path.exists() or path.is_absolute() else stage.path / path
    return None


def read_json(path: Path) -> dict[str, Any]:
    """An object of a JSON file; {} when there is none, UserError when it is damaged."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); remove it, and it is made again") from None


def fresh_stages(stages: dict[str, Stage]) -> tuple[dict[str, Stage], list[str]]:
    """Stages made from the very artifacts found beside them, and a line about each other one."""
    fresh: dict[str, Stage] = {}
    problems: list[str] = []
    for name, stage in stages.items():
        parents = stage.manifest.get("parents") or {}
        known = {parent: stages[parent] for parent in parents if parent in stages}
        changed = [
            parent
            for parent, found in known.items()
            if found.manifest
            if parent not in fresh or parents[parent]["manifest_sha256"] != found.manifest_sha256
        ]
        if changed:
            remedy = make_command(stage.path, force=False)
            problems.append(f"{name} was made from another {' and '.join(changed)}: {remedy}")
        else:
            fresh[name] = stage
    return fresh, problems
