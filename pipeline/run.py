"""The frame of a stage: lock, verified parents, working directory, tracker, publication."""

import contextlib
import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self, overload

from pipeline import steps
from pipeline.config.ppo import PPOConfig
from pipeline.config.schema import Data, StageConfig
from pipeline.data.sources import rows_from_memory
from pipeline.errors import UserError
from pipeline.handoff import artifacts, sealed
from pipeline.handoff.artifacts import RECORDS, Lock, Manifest, Parent, is_published
from pipeline.handoff.lineage import Identity, deciding, inputs_of, parents_of, why_stale
from pipeline.handoff.remembered import Made, note
from pipeline.process import faults
from pipeline.process.files import remove, write_atomically
from pipeline.process.progress import is_main_process
from pipeline.tracking.tracker import Tracker

IDENTITY = "made_from.json"
_SCRATCH = ("output", "trainer")  # of no use to a run that goes on
_UNRANKED = ("to_rank.jsonl", "ranked.jsonl")  # samples, and what a labeler had not finished
_TRANSIENT = {*RECORDS, *_SCRATCH, *_UNRANKED, IDENTITY, "wandb_id"}


@dataclass
class Command:
    """What a command line knows of the stage it starts: which artifact was there when it looked, and
    which file and settings it was given."""

    final: Path
    seen: bytes | None
    made: Made
    recipe: Path | None


_command: Command | None = None


def started(config: StageConfig, made: Made, recipe: Path | None) -> None:
    """Tell the frame how this process was called; the stage it starts remembers it."""
    global _command
    final = config.run / config.stage
    _command = Command(final, _manifest_bytes(final), made, recipe)


def _taken(final: Path) -> Command | None:
    """What a command line has told of this stage, once."""
    global _command
    found, _command = _command, None
    return found if found and found.final == final else None


class UpToDate(Exception):
    """Another process has made the stage while this one was starting."""


def _manifest_bytes(final: Path) -> bytes | None:
    path = final / artifacts.MANIFEST
    return path.read_bytes() if path.is_file() else None


class StageRun:
    """`with StageRun(config) as stage:` around everything a stage does.

    Holds the stage's lock, refuses corrupt or ill-fitting parents, and keeps `stage.work` for what
    must survive a killed process. The stage saves its model in `stage.output`, and `publish` is its
    last act. Of several processes the first alone locks, writes and publishes.

    `dataset`: rows in memory that replaced the configured data; they count by content, like a file.
    """

    def __init__(self, config: StageConfig, dataset: Any = None):
        self.config = config
        self.stage = config.stage
        self.final = config.run / config.stage
        self.work = artifacts.work_path(self.final)
        self.output = self.work / "output"
        self.main = is_main_process()
        self.inputs = inputs_of(config, None if dataset is None else fingerprint(dataset))
        self._directories = parents_of(config)
        self.parents: dict[str, Manifest] = {}
        self.links: dict[str, Parent] = {}
        self.tracker: Tracker
        self._lock = Lock(artifacts.lock_path(self.final))
        self._command = _taken(self.final)

    def __enter__(self) -> Self:
        faults.setup(self.stage, steps.phases())
        if self.main:
            self._lock.__enter__()
        try:
            self._look_again()
            for name, directory in self._directories.items():
                self.parents[name] = artifacts.read(directory)
            self.links = self._links()
            self._check_lineage()
            if self.main:
                artifacts.recover(self.final)
                self._prepare_work()
                if not is_published(self.final):
                    self._remember()  # what is published is remembered until it is replaced
        except BaseException:
            faults.clear()
            self._unlock()
            raise
        self.tracker = Tracker(self.work, self.config, self._directories, main=self.main)
        self._started = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.tracker.finish()
        faults.clear()
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
        """Publish `output` as `RUN/STAGE` with the records; the working directory goes with it.

        UserError when an artifact that the stage was made from has been replaced meanwhile.

        Adds `minutes` to the headline metrics: what this process took, without its imports; of a
        stage that went on after an interruption, the last part.
        """
        if not self.main:
            return self.final
        faults.at("export", 0)
        if changed := _changed_names(_hashes(self.links), _hashes(self._links())):
            raise UserError(
                f"{self.stage}: {', '.join(changed)} was made again while this was made from it; "
                f"not published. {_start_again(self.stage)}"
            )
        for name in RECORDS:
            if (self.work / name).exists():
                shutil.copyfile(self.work / name, self.output / name)
        manifest = Manifest(
            stage=self.stage,
            config=self.config.model_dump(mode="json"),
            inputs=self.inputs,
            tokenizer_hash=tokenizer_hash,
            template_hash=template_hash,
            parents=self.links,
            seed=self.config.seed,
            metrics={**metrics, "minutes": round((time.monotonic() - self._started) / 60, 2)},
        )
        artifacts.publish(self.output, self.final, manifest)
        self._remember()
        self.tracker.finish(self.final, artifacts.read_manifest(self.final))
        return self.final

    def _look_again(self) -> None:
        """Under the lock: what the command line saw before its imports may no longer be so."""
        if self._command and _manifest_bytes(self.final) != self._command.seen:
            if not why_stale(self.stage, self.config, self.config.run):
                raise UpToDate

    def _remember(self) -> None:
        if self._command:
            run, borrow = self.config.run, self.config.borrow
            note(run, self.stage, self._command.made, self._command.recipe, borrow)

    def _links(self) -> dict[str, Parent]:
        return {
            name: Parent(path=str(path), manifest_sha256=artifacts.manifest_hash(path))
            for name, path in self._directories.items()
        }

    def _check_lineage(self) -> None:
        """A parent must come from the other parent it is used with, and read text as it does: a
        reward model from its SFT model."""
        for name, manifest in self.parents.items():
            for earlier in steps.TABLE[name].after if name in steps.TABLE else ():
                if earlier in self.parents:
                    artifacts.check_same_tokenizer(self.parents[earlier], manifest)
                    own, before = self._directories[name], self._directories[earlier]
                    artifacts.check_trained_from(own, earlier, before)

    def _prepare_work(self) -> None:
        """Keep what an interrupted run of the same kind left; refuse what another kind left."""
        values = deciding(type(self.config), self.config.model_dump(mode="json"))
        identity = Identity(values, _hashes(self.links), self.inputs)
        sealed.sweep(self.work)
        before = _read_identity(self.work / IDENTITY)
        if before is None and sealed.states(self.work):
            raise UserError(
                f"{self.work / IDENTITY}: missing or unreadable: nobody can tell which config the "
                f"states beside it belong to. {_start_again(self.stage)}"
            )
        if before and (told := list(before.differences(identity))):
            if any(entry.name not in _TRANSIENT for entry in self.work.iterdir()):
                raise UserError(_refusal(self.work, told, self.stage))
            remove(self.work)
        for name in _SCRATCH:
            remove(self.work / name)
        self.output.mkdir(parents=True)
        if not sealed.states(self.work):
            for name in (*RECORDS, "wandb_id"):
                (self.work / name).unlink(missing_ok=True)
        write_atomically(self.work / IDENTITY, json.dumps(asdict(identity), indent=1))

    def _unlock(self) -> None:
        if self.main:
            self._lock.__exit__(None, None, None)


def given(source: Data | None, dataset: Any, key: str) -> Any:
    """Rows in memory if there are any, else the configured source; UserError without either."""
    if dataset is None and source is None:
        raise UserError(f"{key}: not set, and no dataset was passed to run(); give one of them")
    return source if dataset is None else dataset


def fingerprint(dataset: Any) -> str:
    """SHA-256 of rows in memory."""
    digest = hashlib.sha256()
    for row in rows_from_memory(dataset):
        digest.update((json.dumps(row.values, sort_keys=True, default=str) + "\n").encode())
    return digest.hexdigest()


def by_source(items: Iterable[Any]) -> dict[str, int]:
    """Of items that several mixed sources gave, how many each did, for the manifest."""
    counts = Counter(item.source for item in items if item.source)
    return {f"from {name}": number for name, number in counts.items()}


def bytes_needed(config: StageConfig) -> int:
    """Room that a stage takes at most: three states (two are kept while the next is written), each a
    model with Adam's two moments, and what is published."""
    networks = 2 if isinstance(config, PPOConfig) and config.value == "separate" else 1
    averages = int(getattr(config, "ema_decay", None) is not None)
    places = [Path(str(getattr(config, "model", "")) or ".none")]
    with contextlib.suppress(UserError):
        places += parents_of(config).values()
    model = max(sum(p.stat().st_size for p in place.glob("*.safetensors")) for place in places)
    best = int(getattr(config, "keep", "last") == "best")
    return (3 * (3 * networks + averages + best) + 1 + averages) * model


def start_again(config: StageConfig) -> None:
    """Forget an interrupted run of the stage (`FORCE=`)."""
    final = config.run / config.stage
    with Lock(artifacts.lock_path(final)):
        remove(artifacts.work_path(final))


def _changed_names(old: dict[str, str], new: dict[str, str]) -> list[str]:
    return [name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]


def _hashes(links: dict[str, Parent]) -> dict[str, str]:
    return {name: link.manifest_sha256 for name, link in links.items()}


def _start_again(stage: str) -> str:
    return f"FORCE={stage} (--force) starts again."


def _read_identity(path: Path) -> Identity | None:
    try:
        return Identity(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _refusal(work: Path, told: list[str], stage: str) -> str:
    return "\n".join(
        [
            f"{work}: an interrupted run with another config; it cannot go on with this one:",
            *(f"  {line}" for line in told),
            f"Put these back to go on. {_start_again(stage)}",
        ]
    )
