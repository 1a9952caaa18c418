"""The frame of a stage: lock, verified parents, working directory, tracker, publication."""

import json
import shutil
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, overload

from pipeline import artifacts
from pipeline.artifacts import Lock, Manifest, Parent
from pipeline.config import config_hash, differences
from pipeline.errors import UserError
from pipeline.files import write_atomically
from pipeline.lineage import inputs_of, parents_of
from pipeline.progress import is_main_process
from pipeline.schema import Data, StageConfig
from pipeline.tracking import Tracker

IDENTITY = "run.json"
_RECORDS = ("metrics.jsonl", "samples.jsonl")
_TRANSIENT = {*_RECORDS, IDENTITY, "wandb_id", "output"}


def up_to_date(config: StageConfig) -> bool:
    """Whether the published stage is what this config, these parents and these inputs would make."""
    return why_stale(config) is None


def why_stale(config: StageConfig) -> str | None:
    """Why the stage has to run, in words; None when it has not. Reads no weights.

    UserError when the published directory has lost or changed a file: it is not rebuilt unasked.
    """
    final = config.run / config.stage
    if not artifacts.is_published(final):
        return "not made yet"
    manifest = artifacts.read_listing(final, config.stage)
    return changed(manifest, config)


def changed(manifest: Manifest, config: StageConfig) -> str | None:
    """What differs between a manifest and what the config would give now."""
    if manifest.config_hash != config_hash(config):
        new = config.model_dump(mode="json")
        told = differences(manifest.config, new, skip=config.cosmetic)
        return "config: " + "; ".join(told or ["its keys have changed"])
    parents = parents_of(config)
    for name in dict.fromkeys([*manifest.parents, *parents]):
        if name not in parents or not artifacts.is_published(parents[name]):
            return f"{name} is not there"
        old = manifest.parents.get(name)
        if old is None or old.manifest_sha256 != artifacts.manifest_hash(parents[name]):
            return f"{name} has changed"
    inputs = inputs_of(config)
    told = differences(manifest.inputs, inputs)
    return f"{told[0].partition(': ')[0]} has changed" if told else None


class StageRun:
    """`with StageRun(config) as stage:` around everything a stage does.

    Holds the stage's lock, refuses corrupt or ill-fitting parents, and keeps `stage.work` for what
    must survive a killed process. The stage saves its model in `stage.output`, and `publish` is its
    last act. Of several processes the first alone locks, writes and publishes.

    `dataset`: rows in memory that replaced the configured data; they leave no fingerprint, so such
    a stage is never up to date.
    """

    def __init__(self, config: StageConfig, dataset: Any = None):
        self.config = config
        self.stage = config.stage
        self.final = config.run / config.stage
        self.work = config.run / ".work" / config.stage
        self.output = self.work / "output"
        self.main = is_main_process()
        self.inputs = inputs_of(config, in_memory=dataset is not None)
        self._directories = parents_of(config)
        self.parents: dict[str, Manifest] = {}
        self.tracker: Tracker
        self._lock = Lock(artifacts.lock_path(self.final))

    def __enter__(self) -> Self:
        if self.main:
            self._lock.__enter__()
        try:
            for name, directory in self._directories.items():
                self.parents[name] = artifacts.read(directory)
            self._check_lineage()
            if self.main:
                artifacts.recover(self.final)
                self._prepare_work()
        except BaseException:
            self._unlock()
            raise
        self.tracker = Tracker(
            self.work,
            self.stage,
            self.config.run,
            self.config.model_dump(mode="json"),
            self.config.wandb,
            self._directories,
            main=self.main,
        )
        self._started = time.monotonic()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.tracker.finish()
        self._unlock()

    @overload
    def parent(self, name: Literal["sft"]) -> Path: ...

    @overload
    def parent(self, name: str) -> Path | None: ...

    def parent(self, name: str) -> Path | None:
        """Directory of an earlier stage's verified artifact; None when this config reads none."""
        return self._directories.get(name)

    def publish(
        self,
        metrics: dict[str, Any],
        tokenizer_hash: str = "",
        template_hash: str = "",
    ) -> Path:
        """Publish `output` as `RUN/STAGE` with the records, and remove the working directory.

        Adds `minutes` to the headline metrics: what this process took, without its imports; of a
        stage that went on after an interruption, the last part.
        """
        if not self.main:
            return self.final
        for name in _RECORDS:
            if (self.work / name).exists():
                shutil.copyfile(self.work / name, self.output / name)
        manifest = Manifest(
            stage=self.stage,
            config=self.config.model_dump(mode="json"),
            config_hash=config_hash(self.config),
            inputs=self.inputs,
            tokenizer_hash=tokenizer_hash,
            template_hash=template_hash,
            parents=self._links(),
            seed=self.config.seed,
            metrics={**metrics, "minutes": round((time.monotonic() - self._started) / 60, 2)},
        )
        artifacts.publish(self.output, self.final, manifest)
        self.tracker.finish(self.final, artifacts.read_manifest(self.final))
        shutil.rmtree(self.work)
        return self.final

    def _links(self) -> dict[str, Parent]:
        return {
            name: Parent(path=str(path), manifest_sha256=artifacts.manifest_hash(path))
            for name, path in self._directories.items()
        }

    def _check_lineage(self) -> None:
        """A reward model must come from the SFT model it is used with, and read text as it does."""
        if {"sft", "rm"} <= self.parents.keys():
            artifacts.check_same_tokenizer(self.parents["sft"], self.parents["rm"])
            artifacts.check_trained_from(self._directories["rm"], "sft", self._directories["sft"])

    def _prepare_work(self) -> None:
        """Keep what an interrupted run of the same kind left; refuse what another kind left."""
        identity = {
            "config": self.config.model_dump(mode="json"),
            "inputs": self.inputs,
            "parents": {name: link.manifest_sha256 for name, link in self._links().items()},
        }
        before = _read_identity(self.work / IDENTITY)
        if before and self._is_finished(before):
            shutil.rmtree(self.work)  # killed between publishing and cleaning up
        elif before and (told := self._told(before, identity)):
            if any(entry.name not in _TRANSIENT for entry in self.work.iterdir()):
                raise UserError(_refusal(self.work, told, self.stage))
            shutil.rmtree(self.work)
        shutil.rmtree(self.output, ignore_errors=True)
        self.output.mkdir(parents=True)
        if not any(self.work.glob("step-*")) and not any(self.work.glob("checkpoint-*")):
            for name in (*_RECORDS, "wandb_id"):
                (self.work / name).unlink(missing_ok=True)
        write_atomically(self.work / IDENTITY, json.dumps(identity, indent=1))

    def _told(self, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
        """What decides the result and differs between the interrupted run and this one."""
        return [
            *differences(before["config"], now["config"], skip=self.config.cosmetic),
            *(f"{what} has changed" for what in _changed_names(before["inputs"], now["inputs"])),
            *(f"{what} has changed" for what in _changed_names(before["parents"], now["parents"])),
        ]

    def _is_finished(self, before: dict[str, Any]) -> bool:
        """Whether the run that left `work` is the one that is published."""
        if not artifacts.is_published(self.final):
            return False
        manifest = artifacts.read_manifest(self.final)
        links = {name: link.manifest_sha256 for name, link in manifest.parents.items()}
        published = {"config": manifest.config, "inputs": manifest.inputs, "parents": links}
        return not self._told(before, published)

    def _unlock(self) -> None:
        if self.main:
            self._lock.__exit__(None, None, None)


def given(source: Data | None, dataset: Any, key: str) -> Any:
    """Rows in memory if there are any, else the configured source; UserError without either."""
    if dataset is None and source is None:
        raise UserError(f"{key}: not set, and no dataset was passed to run(); give one of them")
    return source if dataset is None else dataset


def start_again(config: StageConfig) -> None:
    """Forget an interrupted run of the stage (`FORCE=`)."""
    final = config.run / config.stage
    with Lock(artifacts.lock_path(final)):
        shutil.rmtree(config.run / ".work" / config.stage, ignore_errors=True)


def _changed_names(old: dict[str, str], new: dict[str, str]) -> list[str]:
    return [name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]


def _read_identity(path: Path) -> dict[str, Any] | None:
    try:
        identity = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return identity if isinstance(identity, dict) else None


def _refusal(work: Path, told: list[str], stage: str) -> str:
    return "\n".join(
        [
            f"{work}: an interrupted run with another config; it cannot go on with this one:",
            *(f"  {line}" for line in told),
            f"Put these back to go on, or FORCE={stage} (--force) to start again.",
        ]
    )
