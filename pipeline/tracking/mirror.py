"""Weights & Biases in a thread of its own, so that nothing it does can stall or stop a run."""

import contextlib
import logging
import netrc
import os
import queue
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from pipeline.config import schema
from pipeline.config.schema import StageConfig
from pipeline.handoff.artifacts import MANIFEST, Manifest, is_published, manifest_hash
from pipeline.process.files import write_atomically
from pipeline.process.progress import say

INIT_SECONDS = 10
"""An unreachable server is given up after so long; the run goes on meanwhile."""
FINISH_SECONDS = 15
"""Time for the last rows, besides the upload of files; with the above, all that a run ever waits."""
UPLOAD_BYTES_PER_SECOND = 1_000_000
"""A slower upload of the artifact is given up."""

Job = Callable[[Any], None]  # takes the wandb run


class Mirror:
    """A run in W&B: name `RUN-STAGE`, group RUN, a job type a stage. Never raises, never prompts."""

    def __init__(self, work: Path, config: StageConfig, parents: dict[str, Path]):
        self.work, self.config, self.parents = work, config, parents
        self.stage, self.run, self.wandb = config.stage, config.run, config.wandb
        self.mode = mode_of(self.wandb)
        self.started = False
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="wandb-mirror", daemon=True)
        self._wandb_run: Any = None
        self._warned = self._failed = False

    def start(self, earlier: list[dict[str, Any]]) -> None:
        """Begin in the background; `earlier` are rows of a record that is being continued."""
        self.started = True
        if self.mode == "disabled":
            return
        self._thread.start()
        for row in earlier:
            self.log(row["step"], {k: v for k, v in row.items() if k not in ("step", "time")})

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Queue a row."""
        self._put(lambda run: _log(run, step, metrics))

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Queue a table of samples."""
        self._put(lambda run: _log(run, step, {"samples": _table(rows)}))

    def finish(self, artifact: Path | None, manifest: Manifest | None) -> None:
        """Wait, but not forever, until all is written; say how to see it."""
        if not self.started or self.mode == "disabled":
            return
        seconds = float(FINISH_SECONDS)
        if artifact is not None and manifest is not None:
            self._put(lambda run: self._log_artifact(run, artifact, manifest))
            size = sum(entry.size for entry in manifest.files.values()) if self.wandb.upload else 0
            seconds += size / UPLOAD_BYTES_PER_SECOND if self.mode == "online" else 0
        exit_code = 0 if artifact else 1
        self._put(lambda run: run.finish(exit_code))
        self._jobs.put(None)
        self._thread.join(seconds + INIT_SECONDS)
        if self._thread.is_alive():
            self._failed = True
            self._warn(f"given up, not finished after {seconds + INIT_SECONDS:.0f} s")
        if self._failed:
            _abandon()
        self._tell()

    # --- in the thread ----------------------------------------------------------------------------

    def _work(self) -> None:
        """Everything that touches wandb; the first failure ends the mirror, not the run."""
        try:
            self._wandb_run = self._init()
            while (job := self._jobs.get()) is not None:
                job(self._wandb_run)
        except BaseException as error:  # wandb raises even SystemExit
            self._failed = True
            self._warn(_first_line(error))
            if self._wandb_run is not None:
                _quietly(self._wandb_run.finish)  # else its exit handler would, and wait for ever

    def _init(self) -> Any:
        """The wandb run: online if asked for and reachable, else offline."""
        if self.mode == "online":
            try:
                return self._init_as("online")
            except BaseException as error:
                self._warn(f"{_first_line(error)}; writing offline")
                self.mode = "offline"
                sys.modules["wandb"].teardown()  # its service holds the id of the failed run
        return self._init_as("offline")

    def _init_as(self, mode: Any) -> Any:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb  # seconds to import

        wanted: dict[str, Any] = {
            "silent": True,
            "console": "off",
            "init_timeout": INIT_SECONDS,
            "finish_timeout": FINISH_SECONDS,
            "login_timeout": 1,
            "save_code": False,
            "disable_git": True,
        }
        known = wandb.Settings.model_fields  # older versions lack some
        settings = wandb.Settings(**{k: v for k, v in wanted.items() if k in known})
        self.run.mkdir(parents=True, exist_ok=True)
        name = f"{self.run.name}-{self.stage}"
        parents = {"parents": {n: _alias(path) for n, path in self.parents.items()}}
        return wandb.init(
            project=self.wandb.project,
            entity=self.wandb.entity,
            id=stable_id(self.work, name),
            name=name,
            group=self.run.name,
            job_type=self.stage,
            dir=str(self.run),
            config=self.config.model_dump(mode="json") | parents,
            resume="allow",
            mode=mode,
            settings=settings,
        )

    def _log_artifact(self, run: Any, directory: Path, manifest: Manifest) -> None:
        """Its parents, hashes of its data, its manifest with each file's; files only when asked to."""
        import wandb

        if self.mode == "online":  # offline `use_artifact` raises
            for parent in self.parents.values():
                with contextlib.suppress(Exception):  # a parent that was never uploaded
                    run.use_artifact(f"{_artifact_name(parent)}:{_alias(parent)}")
            if manifest.inputs:
                name = f"{_artifact_name(directory)}-data"
                run.use_artifact(wandb.Artifact(name, "dataset", metadata=manifest.inputs))
        artifact = wandb.Artifact(
            _artifact_name(directory),
            type="model",
            metadata=manifest.model_dump(mode="json", exclude={"files"}),
        )
        if self.wandb.upload:
            artifact.add_dir(str(directory), policy="immutable")  # refers to the files, copies none
        else:
            artifact.add_file(str(directory / MANIFEST), policy="immutable")
        run.log_artifact(artifact, aliases=["latest", _alias(directory)])

    def _put(self, job: Job) -> None:
        if self._thread.is_alive():
            self._jobs.put(job)

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            say(f"{self.stage}: W&B: {reason} (the record in metrics.jsonl is complete)")

    def _tell(self) -> None:
        """One line at the end: where to look, or how to send it later."""
        run = self._wandb_run
        if run is None:
            return
        with contextlib.suppress(Exception):
            if self.mode == "online":
                say(f"{self.stage}: W&B: {run.url}")
            else:
                folder = Path(run.settings.sync_dir)
                with contextlib.suppress(ValueError):
                    folder = folder.relative_to(Path.cwd())
                say(f"{self.stage}: W&B offline; to view it online: wandb sync {folder}")


def mode_of(wandb: schema.Wandb) -> str:
    """online, offline or disabled: WANDB_MODE first, then the config; auto asks whether a key is there."""
    asked = os.environ.get("WANDB_MODE", "").lower() or wandb.mode
    asked = {"dryrun": "offline", "run": "online"}.get(asked, asked)
    if asked in ("offline", "disabled"):
        return asked
    return "online" if has_key() else "offline"


def has_key() -> bool:
    """Whether a W&B key is configured; without one, going online would prompt or fail."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    file = os.environ.get("NETRC") or str(Path.home() / ".netrc")
    try:
        return netrc.netrc(file).authenticators(urlparse(server).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _abandon() -> None:
    """End wandb's service process, for which its exit handler would wait for ever."""
    import psutil

    if "wandb" not in sys.modules:
        return
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # else it tells of the cut connection
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if child.name().startswith("wandb"):
                child.kill()
    # Now that it cannot wait: tear down here, in place of the exit handler that would complain.
    teardown = threading.Thread(target=_quietly, args=[sys.modules["wandb"].teardown], daemon=True)
    teardown.start()
    teardown.join(2)


def _quietly(function: Callable[[], None]) -> None:
    with contextlib.suppress(BaseException):
        function()


def stable_id(work: Path, name: str) -> str:
    """`name` and a random tail, kept in `work`: a resumed run goes on under its id, a new or a copied one not."""
    file = work / "wandb_id"
    if not file.exists() or file.read_text().rpartition("-")[0] != name:
        write_atomically(file, f"{name}-{os.urandom(3).hex()}")
    return file.read_text()


def _log(run: Any, step: int, metrics: dict[str, Any]) -> None:
    """When an online run is resumed, earlier steps are already there."""
    if step >= (int(run.step) if getattr(run, "resumed", False) else 0):
        run.log(metrics, step=step)


def _table(rows: list[dict[str, Any]]) -> Any:
    import wandb

    columns: list[str | int] = list(rows[0])
    return wandb.Table(columns=columns, data=[[row.get(str(c)) for c in columns] for row in rows])


def _artifact_name(directory: Path) -> str:
    return f"{directory.parent.name}-{directory.name}"


def _alias(directory: Path) -> str:
    return f"sha-{manifest_hash(directory)[:12]}" if is_published(directory) else MANIFEST


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
