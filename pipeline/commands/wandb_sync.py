"""Send what was mirrored offline: `python -m pipeline.commands.wandb_sync --run checkpoints/tiny` (make wandb-sync).

Runs go in the order of the pipeline, each once: what was sent is marked beside it, so that the same command
goes on after an interruption. Then come the edges from artifact to artifact, which need a server.
"""

import argparse
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline import steps
from pipeline.cli import reporting_errors
from pipeline.errors import UserError
from pipeline.handoff.found import Stage, check_there, find_stages
from pipeline.process.files import write_atomically
from pipeline.process.progress import say
from pipeline.tracking import contents, view
from pipeline.tracking.mirror import has_key, server, settings

HEADER = 7
"""Bytes of a file in which nothing was written: its run ended too early."""
EDGES = "edges.json"
"""Ids of the runs whose edges are drawn."""


def main(argv: list[str] | None = None) -> None:
    """Command line of `make wandb-sync`."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.commands.wandb_sync", description=__doc__
    )
    parser.add_argument("--run", type=Path, required=True)
    run = parser.parse_args(argv).run
    check_there(run)
    if not has_key():
        raise UserError("wandb-sync: no key: set WANDB_API_KEY, or log in once: wandb login")
    check_server()
    found = dict(offline(run))
    if not found:
        say(f"wandb-sync: nothing was mirrored offline in {run / 'wandb'}")
    stages = find_stages(run)
    missing = [name for step, folders in found.items() for name in send(run, step, folders, stages)]
    for name in dict.fromkeys(missing):
        run_name = name.partition(":")[0].rpartition("-")[0]
        say(f"wandb-sync: {name} is not there; send it first: make wandb-sync RUN={run_name}")


def check_server() -> None:
    """UserError when nobody answers: wandb itself would try again for hours."""
    try:
        with urllib.request.urlopen(server(), timeout=20):
            pass
    except urllib.error.HTTPError:
        pass  # somebody does
    except (OSError, ValueError) as error:
        raise UserError(f"wandb-sync: {server()} cannot be reached: {error}") from None


def offline(run: Path) -> Iterator[tuple[str, list[Path]]]:
    """(step, its folders from the earliest), in the order of the pipeline."""
    for step in steps.TABLE:
        name = f"{run.name}-{step}" if step != "eval" else f"{run.name}-eval*"
        folders = sorted((run / "wandb").glob(f"offline-run-*-{name}-??????"))
        held = [f for f in folders if any(p.stat().st_size > HEADER for p in f.glob("*.wandb"))]
        if held:
            yield step, held


def send(run: Path, step: str, folders: list[Path], stages: dict[str, Stage]) -> list[str]:
    """Send a step's runs that were not, then the edges of the last; returns parents that the server lacks."""
    waiting = [folder for folder in folders if not list(folder.glob("*.synced"))]
    if waiting:
        say(f"wandb-sync: {step}: {len(waiting)} to send")
        command = [sys.executable, "-m", "wandb", "sync", "--yes", *map(str, waiting)]
        subprocess.run(command, env={**os.environ, "WANDB_DIR": str(run)})  # its own logs go there
    if left := [folder for folder in waiting if not list(folder.glob("*.synced"))]:
        raise UserError(f"wandb-sync: {left[0]} was not sent; the same command goes on from there")
    marks = run / "wandb" / EDGES
    done = json.loads(marks.read_text()) if marks.is_file() else []
    last = folders[-1].name.removeprefix("offline-run-").partition("-")[2]
    if last in done:
        return []
    try:
        missing = draw(run, last, step, stages)
    except Exception as error:  # wandb's are of many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"wandb-sync: {step} was sent, its lineage not: {reason}") from None
    if not missing:
        write_atomically(marks, json.dumps([*done, last]))
    return missing


def draw(run: Path, run_id: str, step: str, stages: dict[str, Stage]) -> list[str]:
    """Edges of a run that was sent, from what it was made from; returns parents that the server lacks."""
    import wandb

    own = stages.get(step)
    links = own.manifest.get("parents", {}) if own else {}
    places = {Path(link["path"]): link["manifest_sha256"] for link in links.values()}
    if own is None:  # an evaluation or a report, of all that there is
        places = {stage.path: stage.manifest_sha256 for stage in stages.values()}
    names = [
        f"{contents.name_of(path)}:sha-{sha[:12]}"
        for path, sha in places.items()
        if path.name in steps.stages()  # base models are not sent
    ]
    config = contents.settings_of({step: own} if own else stages)
    again: dict[str, Any] = {"id": run_id, "resume": "must", "mode": "online", "dir": str(run)}
    quiet = settings(x_disable_stats=True)
    with wandb.init(**contents.where(config), **again, settings=quiet) as sent:
        missing = contents.use(sent, names)
        if own:
            contents.use_data(sent, own.path, own.manifest.get("inputs", {}))
        if own and config.registry:
            name = f"{contents.name_of(own.path)}:sha-{own.manifest_sha256[:12]}"
            artifact = wandb.Api().artifact(f"{sent.entity}/{sent.project}/{name}")
            sent.link_artifact(artifact, config.registry)
        view.ensure(sent.entity, sent.project)
    return missing


if __name__ == "__main__":
    with reporting_errors():
        main()
