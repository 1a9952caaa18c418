"""A sweep over config keys: `python -m pipeline.evaluation.sweep --sweep file.yaml --recipe tiny` (make sweep).

Trial N is the run RUN-FILE-N, one after the other. Stages before the first that a key touches are RUN's; a
stage that an earlier trial made with the same settings is taken from it. Whatever is up to date is not made
again, so a killed sweep goes on. Trials are compared on validation prompts alone, or on what a stage held out.
Writes RUN-FILE.json and the page RUN-FILE.html.
"""

import json
import math
import os
import shutil
import sys
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline import steps
from pipeline.cli import reporting_errors
from pipeline.config.evaluation import EvalConfig, Split
from pipeline.config.load import did_you_mean, differences
from pipeline.config.sweep import Metric, SweepConfig, Trial, load_sweep
from pipeline.errors import UserError, at
from pipeline.evaluation import calls
from pipeline.evaluation.judges import load_judge
from pipeline.evaluation.mirrored import flat
from pipeline.evaluation.sweep_page import write_page
from pipeline.handoff.artifacts import MANIFEST, is_published, manifest_hash
from pipeline.handoff.found import read_json
from pipeline.handoff.remembered import command, note, recall
from pipeline.process.files import remove, write_atomically
from pipeline.process.progress import say

SPLIT: Split = "validation"
"""Never test: what is chosen on prompts cannot be reported on them."""


def main(argv: list[str] | None = None) -> None:
    """Command line of `make sweep`; ends with code 1 when a trial failed."""
    out = calls.parser("sweep", __doc__)
    out.add_argument("--sweep", type=Path, required=True, help="the sweep's YAML file")
    out.add_argument(
        "--force", action="store_true", help="begin again with a file that has changed"
    )
    args = out.parse_intermixed_args(argv)
    recipe, run, settings = calls.asked(args)
    sweep = Sweep(args.sweep, load_sweep(args.sweep), recipe, run, settings)
    sweep.check()
    sweep.check_same(args.force)
    page = sweep.run_all()
    say(f"sweep: {page}")
    sys.exit(1 if any("failed" in row for row in sweep.rows) else 0)


@dataclass
class Sweep:
    """What is the same for every trial, and the trials that were made."""

    file: Path
    config: SweepConfig
    recipe: Path
    run: Path
    settings: list[str]
    rows: list[dict[str, Any]] = field(default_factory=list)
    """number, run, trial, and value or failed."""

    @property
    def name(self) -> str:
        """Of the sweep, and of its group in W&B."""
        return f"{self.run.name}-{self.file.stem}"

    @property
    def result(self) -> Path:
        """The table as JSON."""
        return self.run.with_name(f"{self.name}.json")

    @cached_property
    def metric(self) -> Metric:
        """What was asked for, else what the evaluation has."""
        config = self._eval_config()
        key = "judge" if config.judge else "token_f1" if config.reference else "rm_score"
        return self.config.metric or Metric(name=f"models.{list(steps.stages())[-1]}.{key}")

    @cached_property
    def stages(self) -> list[str]:
        """Those that a trial needs, up to the one that is measured."""
        names, parts = list(steps.stages()), self.metric.name.split(".")
        measured = next((part for part in parts[:2] if part in names), names[-1])
        return names[: names.index(measured) + 1]

    @cached_property
    def evaluates(self) -> bool:
        """Whether the metric is one of the evaluation."""
        return self.metric.name.partition(".")[0] not in steps.stages()

    def words(self, trial: Trial, stage: str) -> list[str]:
        """Settings of one stage."""
        swept = [f"{key}={json.dumps(value)}" for key, value in trial.items()]
        return steps.overrides(stage, [*self.settings, *swept])

    def first(self) -> int:
        """Index of the first stage that a swept key touches."""
        keys = [f"{key}=0" for key in self.config.parameters]
        return min(i for i, name in enumerate(steps.stages()) if steps.overrides(name, keys))

    # --- before anything runs ---------------------------------------------------------------------

    def check(self) -> None:
        """UserError for all that would end a trial, if only after its training."""
        problems: list[str] = []
        for trial in self.config.trials():
            for stage in steps.stages():
                try:
                    steps.load(stage, self.recipe / f"{stage}.yaml", self.words(trial, stage))
                except UserError as error:
                    problems += str(error).splitlines()
        if problems:
            raise UserError("\n".join(f"{self.file}: {told}" for told in dict.fromkeys(problems)))
        with at(str(self.file)):
            if eval_keys := [key for key in self.config.parameters if key.startswith("eval.")]:
                raise UserError(f"{eval_keys[0]}: trials are measured alike; put it into SET")
            kinds = [*steps.stages(), "models", "comparisons", "kl", "labels"]
            head, _, rest = self.metric.name.partition(".")
            if head not in kinds or not rest:
                near = did_you_mean(head, kinds) or f"; it begins with one of {', '.join(kinds)}"
                raise UserError(f"metric.name: {self.metric.name}: no such number{near}")
            if self.first() >= len(self.stages):
                raise UserError(f"metric.name: {self.metric.name}: no swept key touches it")
        if self.evaluates:
            config = self._eval_config()
            if config.data(SPLIT) is None:
                raise UserError(
                    f"{self.recipe / 'eval.yaml'}: validation_prompts: a sweep chooses on them"
                )
            load_judge(config.judge)

    def _eval_config(self) -> EvalConfig:
        words = steps.overrides("eval", self.settings)
        config = steps.load("eval", self.recipe / "eval.yaml", words)
        assert isinstance(config, EvalConfig)
        return config

    def _identity(self) -> dict[str, Any]:
        told = {"recipe": str(self.recipe), "settings": self.settings}
        return told | json.loads(self.config.model_dump_json(exclude_defaults=True))

    def check_same(self, force: bool) -> None:
        """UserError when the sweep was begun with another file or other settings."""
        before = read_json(self.result).get("sweep")
        if before is not None and not force and (told := differences(before, self._identity())):
            raise UserError(
                f"{self.file}: changed since {self.result} was begun ({'; '.join(told)}); "
                "give it another name, or FORCE=1 (--force)"
            )

    # --- trials -----------------------------------------------------------------------------------

    def run_all(self) -> Path:
        """All trials that were not made, then the page."""
        calls.ensure_base(self.recipe)
        for stage in self.stages[: self.first()]:
            if not is_published(self.run / stage):  # one that is there is used as it is
                words = steps.overrides(stage, self.settings)
                calls.stage(stage, self.recipe, self.run, *words)
        os.environ.setdefault("WANDB_RUN_GROUP", self.name)
        trials = self.config.trials()
        page = self.result.with_suffix(".html")
        for number, trial in enumerate(trials, 1):
            own = self.run.with_name(f"{self.name}-{number}")
            told = " ".join(f"{key}={json.dumps(value)}" for key, value in trial.items())
            say(f"\nsweep: {number} of {len(trials)}: {told} in {own}")
            row: dict[str, Any] = {"number": number, "run": own.name, "trial": trial}
            try:
                self._make(own, trial)
            except calls.StepFailed as error:
                say(f"sweep: trial {number} failed: {error}")
                row["failed"] = str(error)
            else:
                row["value"] = self._value(own)
            self.rows.append(row)
            page = self._write(len(trials))
        return page

    def _make(self, own: Path, trial: Trial) -> None:
        first = self.first()
        lender = self.run if first else None
        for i, stage in enumerate(self.stages[first:], first):
            if donor := self._donor(trial, self.stages[: i + 1]):
                _take(donor / stage, own / stage, self.recipe, lender)
            else:
                words = self.words(trial, stage)
                calls.stage(stage, self.recipe, own, *words, borrow=lender)
        if self.evaluates:
            words = steps.overrides("eval", self.settings)
            calls.evaluation(self.recipe, own, SPLIT, *words)

    def _donor(self, trial: Trial, stages: list[str]) -> Path | None:
        """An earlier trial whose stages, up to this one, have the same settings."""
        wanted = [self.words(trial, stage) for stage in stages]
        for row in self.rows:
            run = self.run.with_name(row["run"])
            if [self.words(row["trial"], stage) for stage in stages] == wanted:
                if is_published(run / stages[-1]):
                    return run
        return None

    def _value(self, own: Path) -> float:
        """The number that the trial is compared by."""
        stage, _, key = self.metric.name.partition(".")
        if self.evaluates:
            file, key = own / "eval" / f"{SPLIT}.json", self.metric.name
            found = dict(flat(read_json(file)))
        else:
            file = own / stage / MANIFEST
            found = dict(flat(read_json(file)["metrics"]))
        value = found.get(key.replace(".", "/"))
        if isinstance(value, int | float):
            return float(value)
        names = [name.replace("/", ".") for name, v in found.items() if not isinstance(v, str)]
        hint = did_you_mean(key, names, 3) or f"; there are {', '.join(names)}"
        raise UserError(f"{self.file}: metric.name: {file} has no number {key}{hint}")

    def _write(self, trials: int) -> Path:
        best = self.best()
        whole: dict[str, Any] = {"sweep": self._identity(), "metric": self.metric.model_dump()}
        whole |= {"trials": trials, "best": best and best["run"], "rows": self.rows}
        write_atomically(self.result, json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
        on_test = command(self.run.with_name(best["run"]), "eval") if best else ""
        return write_page(self.result.with_suffix(".html"), self.name, whole, on_test)

    def best(self) -> dict[str, Any] | None:
        """The trial with the best value, of those that have a number."""
        measured = [row for row in self.rows if not math.isnan(row.get("value", math.nan))]
        sign = 1 if self.metric.goal == "maximize" else -1
        return max(measured, key=lambda row: sign * row["value"], default=None)


def _take(there: Path, here: Path, recipe: Path, borrow: Path | None) -> None:
    """The artifact of another trial as this one's own, the same files; and remembered as made so."""
    if not is_published(here) or manifest_hash(here) != manifest_hash(there):
        staging = here.parent / ".work" / f"{here.name}.taken"
        remove(staging)
        shutil.copytree(there, staging, copy_function=_link)
        remove(here)  # of a sweep that was begun again
        os.rename(staging, here)
    if made := recall(there.parent).steps.get(there.name):
        note(here.parent, here.name, made, recipe, borrow)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)


if __name__ == "__main__":
    with reporting_errors():
        main()
