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
from pipeline.handoff.artifacts import Manifest
from pipeline.handoff.remembered import command
from pipeline.process.files import write_atomically
from pipeline.process.progress import say
from pipeline.tracking import contents, view

INIT_SECONDS = 10
"""An unreachable server is given up after so long; the run goes on meanwhile."""
FINISH_SECONDS = 15
"""Time for the last rows, besides the upload of files; with the above, all that a run ever waits."""
LOCAL_SECONDS = 60
"""More for a result that begins and ends its run at once, where no server but a busy machine alone is slow."""
UPLOAD_BYTES_PER_SECOND = 1_000_000
"""A slower upload of the artifact is given up."""

Job = Callable[[Any], None]  # takes the wandb run


class Mirror:
    """A run in W&B: name `RUN-STEP`, group RUN, a job type a step. Never raises, never prompts.

    `config` is what the run shows as its own; `parents`: name -> directory of the artifacts it reads.
    """

    def __init__(
        self,
        work: Path,
        stage: str,
        run: Path,
        wandb: schema.Wandb,
        config: dict[str, Any],
        parents: dict[str, Path],
    ):
        self.work, self.stage, self.run, self.wandb = work, stage, run, wandb
        self.config, self.parents = config, parents
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
        """Queue a row; the step it is drawn against is the stage's own."""
        self._put(lambda run: _log(run, step, {f"{self.stage}/step": step, **metrics}))

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Queue a table of samples; W&B shows those of several steps as one, with a slider."""
        self._put(lambda run: _log(run, step, {"samples": contents.table(rows)}))

    def histograms(self, step: int, values: dict[str, Any]) -> None:
        """Queue distributions of arrays of numbers."""
        named = {f"histogram/{name}": array for name, array in values.items()}
        self._put(lambda run: _log(run, step, {n: contents.histogram(x) for n, x in named.items()}))

    def alert(self, title: str, text: str) -> None:
        """Queue a warning, which W&B sends to whom the user told it to."""
        self._put(lambda run: run.alert(title, text, level="WARN", wait_duration=0))

    def summary(self, values: dict[str, Any]) -> None:
        """Queue numbers that stand for the whole run."""
        self._put(lambda run: run.summary.update(values))

    def page(self, file: Path) -> None:
        """Queue an HTML page."""
        self._put(lambda run: run.log({"page": contents.page(file)}))

    def finish(
        self,
        artifact: Path | None = None,
        manifest: Manifest | None = None,
        code: int | None = None,
    ) -> None:
        """Wait, but not forever, until all is written; say how to see it. `code`: 0 where nothing is published."""
        if not self.started or self.mode == "disabled":
            return
        seconds = float(FINISH_SECONDS)
        if artifact is not None and manifest is not None:
            published = artifact, manifest
            self._put(lambda run: self._log_artifact(run, *published))
            size = sum(entry.size for entry in manifest.files.values()) if self.wandb.upload else 0
            seconds += size / UPLOAD_BYTES_PER_SECOND if self.mode == "online" else 0
        seconds += LOCAL_SECONDS if self.mode == "offline" and code is not None else 0
        exit_code = code if code is not None else 0 if artifact else 1
        self._put(lambda run: run.finish(exit_code))
        if self.mode == "online":  # last: it keeps nothing waiting, if a server is slow
            self._put(lambda run: _quietly(lambda: view.ensure(run.entity, run.project)))
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
            contents.define_metrics(self._wandb_run, self.stage)
            if self.mode == "online":
                contents.use(self._wandb_run, map(contents.versioned, self.parents.values()))
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

        code = contents.code_version()
        self.run.mkdir(parents=True, exist_ok=True)
        asked = os.environ.get  # over the config; tags and notes wandb reads itself
        return wandb.init(
            **contents.where(self.wandb),
            id=stable_id(self.work, f"{self.run.name}-{self.stage}"),
            name=f"{asked('WANDB_NAME') or self.run.name}-{self.stage}",
            group=asked("WANDB_RUN_GROUP") or self.run.name,
            job_type=self.stage,
            dir=str(self.run),
            config=self.config | contents.about(self.parents, code),
            resume="allow",
            mode=mode,
            settings=settings(git_commit=code.get("commit")),
        )

    def _log_artifact(self, run: Any, directory: Path, manifest: Manifest) -> None:
        online = self.mode == "online"  # offline an artifact can be neither used nor linked
        if online:
            contents.use_data(run, directory, manifest.inputs)
        artifact = contents.log_artifact(run, directory, manifest, self.wandb.upload)
        if online and self.wandb.registry:
            try:
                run.link_artifact(artifact, self.wandb.registry)
            except Exception as error:  # no such registry, or not allowed: all else is there
                say(f"{self.stage}: W&B: not linked to {self.wandb.registry}: {_first_line(error)}")

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
                say(f"{self.stage}: W&B offline; to send it: {command(self.run, 'wandb-sync')}")


def settings(**more: Any) -> Any:
    """wandb's own: quiet, and not waiting for ever."""
    import wandb

    wanted: dict[str, Any] = {
        "silent": True,
        "console": "off",
        "init_timeout": INIT_SECONDS,
        "finish_timeout": FINISH_SECONDS,
        "login_timeout": 1,
        "save_code": False,
        "disable_git": True,  # it would send the remote's address as well
        **more,
    }
    known = wandb.Settings.model_fields  # older versions lack some
    return wandb.Settings(**{k: v for k, v in wanted.items() if k in known and v is not None})


def mode_of(wandb: schema.Wandb) -> str:
    """online, offline or disabled: WANDB_MODE first, then the config; auto asks whether a key is there."""
    asked = os.environ.get("WANDB_MODE", "").lower() or wandb.mode
    asked = {"dryrun": "offline", "run": "online"}.get(asked, asked)
    if asked in ("offline", "disabled"):
        return asked
    return "online" if has_key() else "offline"


def server() -> str:
    """Where W&B is."""
    return os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"


def has_key() -> bool:
    """Whether a W&B key is configured; without one, going online would prompt or fail."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    file = os.environ.get("NETRC") or str(Path.home() / ".netrc")
    try:
        return netrc.netrc(file).authenticators(urlparse(server()).hostname or "") is not None
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


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
