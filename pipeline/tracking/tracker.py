"""metrics.jsonl first, W&B second: the file is the record, the mirror may fail at any time."""

import math
import time
from pathlib import Path
from typing import Any

from pipeline.config.schema import StageConfig
from pipeline.handoff.artifacts import Manifest
from pipeline.process.files import jsonl, read_jsonl, sync, write_atomically
from pipeline.process.progress import say
from pipeline.tracking.mirror import Mirror


class Tracker:
    """Writes `metrics.jsonl`, `samples.jsonl` and `tokens.jsonl` in `work`; Weights & Biases mirrors the first two.

    `parents`: name -> directory of the artifacts the stage reads, for the mirror's lineage.
    With `main=False` (a process beside the first) nothing is written.
    """

    def __init__(
        self,
        work: Path,
        config: StageConfig,
        parents: dict[str, Path] | None = None,
        main: bool = True,
    ):
        self.stage, self.main = config.stage, main
        self.metrics_path = work / "metrics.jsonl"
        self.samples_path = work / "samples.jsonl"
        self.tokens_path = work / "tokens.jsonl"
        self._warned: set[str] = set()
        about = config.model_dump(mode="json")
        mirror = Mirror(work, config.stage, config.run, config.wandb, about, parents or {})
        self._mirror = mirror if main else None

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One line `{"step": …, "time": …, …}`, on disk before this returns; NaN becomes null."""
        if not self.main:
            return
        self._start_mirror()
        self._warn_not_finite(step, metrics)
        _append(self.metrics_path, [{"step": step, "time": round(time.time(), 3)} | metrics])
        if self._mirror:
            self._mirror.log(step, dict(metrics))

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Responses to fixed prompts: rows with `prompt`, `response`, `score`, `ended`."""
        if not self.main or not rows:
            return
        self._start_mirror()
        _append(self.samples_path, [{"step": step} | row for row in rows])
        if self._mirror:
            self._mirror.samples(step, rows)

    def tokens(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Episodes token by token, for the report alone: what was trained on at this step."""
        if self.main:
            _append(self.tokens_path, [{"step": step} | row for row in rows])

    @property
    def mirrored(self) -> bool:
        """Whether anybody is shown what the record does not hold."""
        return self._mirror is not None and self._mirror.mode != "disabled"

    def histograms(self, step: int, values: dict[str, Any]) -> None:
        """Distributions of arrays by name, for the mirror alone."""
        self._start_mirror()
        if self._mirror:
            self._mirror.histograms(step, values)

    def alert(self, title: str, text: str) -> None:
        """Tell who is not looking; the mirror alone has it, said it must be as well. Once is the caller's."""
        self._start_mirror()
        if self._mirror:
            self._mirror.alert(f"{self.stage}: {title}", text)

    def sync(self) -> None:
        """Have the record on disk: done before a training state that it belongs to is saved."""
        for path in (self.metrics_path, self.samples_path, self.tokens_path):
            if self.main and path.exists():
                sync(path)

    def truncate(self, step: int) -> None:
        """Forget what was recorded after the state of `step` was saved (its samples too), and a torn line."""
        if not self.main:
            return
        for path in (self.metrics_path, self.samples_path, self.tokens_path):
            if path.exists():
                kept = [
                    row
                    for row in read_rows(path)
                    if row["step"] < step or (row["step"] == step and _comes_before_the_save(row))
                ]
                write_atomically(path, jsonl(kept))

    def finish(self, artifact: Path | None = None, manifest: Manifest | None = None) -> None:
        """Close the mirror, with the artifact when one was published. Never raises or hangs."""
        if self._mirror:
            self._mirror.finish(artifact, manifest)
            self._mirror = None

    def _start_mirror(self) -> None:
        """Start the mirror at the first row; on a resumed run it is given the earlier rows again."""
        if self._mirror and not self._mirror.started:
            self._mirror.start(read_rows(self.metrics_path))

    def _warn_not_finite(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            if plain(value) is None and value is not None and name not in self._warned:
                self._warned.add(name)
                say(f"{self.stage}: step {step}: {name} is {value}, written as null")


def _comes_before_the_save(row: dict[str, Any]) -> bool:
    is_sample = "response" in row
    return not is_sample and not any(name.startswith("validation/") for name in row)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a record; a last line cut short by a killed process is left out."""
    return [row for row in read_jsonl(path) if "step" in row]


def plain(value: Any) -> Any:
    """A value as JSON has it: numbers of other libraries become floats, NaN and inf null."""
    if isinstance(value, str | bool | int | dict | list) or value is None:
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(jsonl({name: plain(value) for name, value in row.items()} for row in rows))
