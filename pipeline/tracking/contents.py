"""What a run in Weights & Biases holds: its axes, what it was made from and with, tables, artifacts."""

import contextlib
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.config import schema
from pipeline.handoff.artifacts import (
    MANIFEST,
    Manifest,
    installed_packages,
    is_published,
    manifest_hash,
)
from pipeline.handoff.found import Stage

BEST = {
    "validation/loss": "min",
    "validation/accuracy": "max",
    "objective/rlhf_reward": "max",
}
"""Metrics whose best value means something, beside the last; a score alone is best when it is over-optimised."""


def define_metrics(run: Any, stage: str) -> None:
    """The stage's own step on the x axis; in the summary the last value, and the best of some."""
    step = f"{stage}/step"
    run.define_metric(step, hidden=True)
    for name in ("*", "objective/*", "val/*"):
        run.define_metric(name, step_metric=step, summary=None if name == "*" else "last")
    for name, best in BEST.items():
        run.define_metric(name, step_metric=step, summary=f"{best},last")


def about(parents: dict[str, Path], code: dict[str, Any]) -> dict[str, Any]:
    """What a run was made from and with: parents by their aliases, code, packages."""
    return {
        "parents": {name: alias(path) for name, path in parents.items()},
        "code": code,
        "packages": installed_packages(),
    }


def code_version() -> dict[str, Any]:
    """The commit of this program and whether files differ from it; nothing where it is no checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # a folder that happens to lie in another checkout is not it
        return {}

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        changed = git("status", "--porcelain", "--untracked-files=no")
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(changed)}
    return {}


def histogram(array: Any) -> Any:
    """Counts of finite numbers in 64 bins."""
    import numpy as np
    import wandb

    return wandb.Histogram(np_histogram=np.histogram(array[np.isfinite(array)], bins=64))


def table(rows: list[dict[str, Any]]) -> Any:
    """Rows with the same keys as a table."""
    import wandb

    columns: list[str | int] = list(rows[0])
    return wandb.Table(columns=columns, data=[[row.get(str(c)) for c in columns] for row in rows])


def page(file: Path) -> Any:
    """A file of HTML."""
    import wandb

    return wandb.Html(str(file), inject=False)


def log_artifact(run: Any, directory: Path, manifest: Manifest, upload: bool) -> Any:
    """Its manifest with each file's hash; the files themselves only when asked to."""
    import wandb

    held = manifest.model_dump(mode="json", exclude={"files"})
    artifact = wandb.Artifact(name_of(directory), type="model", metadata=held)
    if upload:
        artifact.add_dir(str(directory), policy="immutable")  # refers to the files, copies none
    else:
        artifact.add_file(str(directory / MANIFEST), policy="immutable")
    run.log_artifact(artifact, aliases=["latest", alias(directory)])
    return artifact


def use(run: Any, names: Iterable[str]) -> list[str]:
    """Edges from the artifacts that a run reads; returns those that were never sent, and have none."""
    missing = []
    for name in names:
        try:
            run.use_artifact(name)
        except Exception:
            missing.append(name)
    return missing


def use_data(run: Any, directory: Path, inputs: dict[str, str]) -> None:
    """An edge from the data of an artifact, as hashes."""
    import wandb

    if inputs:
        run.use_artifact(wandb.Artifact(f"{name_of(directory)}-data", "dataset", metadata=inputs))


def where(settings: schema.Wandb) -> dict[str, Any]:
    """Project and entity, the environment's over the config's."""
    asked = os.environ.get
    return {
        "project": asked("WANDB_PROJECT") or settings.project,
        "entity": asked("WANDB_ENTITY") or settings.entity,
    }


def settings_of(stages: dict[str, Stage]) -> schema.Wandb:
    """As the last stage that was made is mirrored."""
    made = [stage.config["wandb"] for stage in stages.values() if stage.config.get("wandb")]
    return schema.Wandb.model_validate(made[-1]) if made else schema.Wandb()


def name_of(directory: Path) -> str:
    """The name of an artifact: RUN-STAGE."""
    return f"{directory.parent.name}-{directory.name}"


def alias(directory: Path) -> str:
    """What an artifact is by content."""
    return f"sha-{manifest_hash(directory)[:12]}" if is_published(directory) else MANIFEST


def versioned(directory: Path) -> str:
    """An artifact as it is now."""
    return f"{name_of(directory)}:{alias(directory)}"
