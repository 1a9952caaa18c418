"""All that a run recorded, read once for the summary and the report; no torch."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline import steps
from pipeline.config.ppo import AlarmLimits, GateBars, PPOConfig
from pipeline.errors import UserError
from pipeline.evaluation import expect
from pipeline.evaluation.bands import Expected
from pipeline.evaluation.card import card
from pipeline.evaluation.rankings import Measured, measure, read_scored
from pipeline.handoff.found import Stage, find_stages, fresh_stages, read_json
from pipeline.handoff.remembered import FILE, Asked, command, expected_of
from pipeline.process.files import read_jsonl


@dataclass
class Record:
    """Stages, their curves, and the evaluation of a run; what is missing is empty."""

    run: Path
    stages: dict[str, Stage]
    problems: list[str]  # stages made from other artifacts than those found beside them
    curves: dict[str, list[dict[str, Any]]]
    result: dict[str, Any]  # eval/test.json, else eval/validation.json
    samples: list[dict[str, Any]]
    tokens: list[dict[str, Any]]  # episodes that PPO trained on, token by token
    rankings: Measured | None  # what the reward model's scores say about its held-out rankings
    card: dict[str, Any]  # of the reward model, see `pipeline.evaluation.card`
    overopt: dict[str, Any]
    compared: dict[str, Any]  # compare/compare.json
    rounds: dict[str, Any]  # rounds/rounds.json
    expected: Expected | None  # what healthy runs of its recipe look like
    bars: GateBars
    limits: AlarmLimits
    evaluable: bool  # whether `make eval` has a config for this run

    def command(self, *goals: str) -> str:
        """`make GOALS` for this run, as it must be typed; the run remembers its recipe and settings."""
        return command(self.run, *goals)

    def model(self, name: str) -> dict[str, Any]:
        """Evaluation of one policy."""
        return (self.result.get("models") or {}).get(name) or {}

    def policies(self) -> list[str]:
        """Those that were evaluated, in the order they were made."""
        return [name for name in steps.policies() if self.model(name)]

    def comparison(self, name: str) -> dict[str, Any]:
        """Evaluation of one policy against another, e.g. `ppo_vs_sft`."""
        return (self.result.get("comparisons") or {}).get(name) or {}


def load_record(run: Path) -> Record:
    """Read a run's directory; UserError for one without a stage. An evaluation of artifacts that were replaced
    since is left out."""
    run = run.resolve() if run.name in ("", "..") else run
    stages, problems = fresh_stages(find_stages(run))
    if not stages:
        raise UserError(f"{run}: nothing has been made yet; begin with: {command(run, 'sft')}")
    result, samples = _evaluation(run, stages)
    evaluable = not (run / FILE).is_file() or Path(Asked(run).of("eval").config).is_file()
    if (run / "eval").is_dir() and not result:
        remedy = f": {command(run, 'eval')}" if evaluable else ""
        problems.append(f"the evaluation is of earlier artifacts{remedy}")
    config = _bars(run, stages)
    held_out = [item for stage in stages.values() for item in read_scored(stage.path)]
    return Record(
        run=run,
        stages=stages,
        problems=problems,
        curves={name: stage.curve() for name, stage in stages.items()},
        result=result,
        samples=samples,
        tokens=[r for s in stages.values() for r in read_jsonl(s.path / "tokens.jsonl")],
        rankings=measure(held_out) if held_out else None,
        card=card(held_out) if held_out else {},
        overopt=read_json(run / "overopt" / "overopt.json"),
        compared=read_json(run / "compare" / "compare.json"),
        rounds=read_json(run / "rounds" / "rounds.json"),
        expected=expect.load(expected_of(run)),
        bars=config.gate_bars,
        limits=config.alarms,
        evaluable=evaluable,
    )


def _evaluation(run: Path, stages: dict[str, Stage]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Result and samples of the split test, else validation, if they are of these very stages."""
    current = {name: stage.manifest_sha256 for name, stage in stages.items()}
    for split in ("test", "validation"):
        result = read_json(run / "eval" / f"{split}.json")
        seen = {n: a["manifest_sha256"] for n, a in (result.get("artifacts") or {}).items()}
        if seen and seen.items() <= current.items():
            return result, read_jsonl(run / "eval" / f"{split}_samples.jsonl")
    return {}, []


def _bars(run: Path, stages: dict[str, Stage]) -> PPOConfig:
    """A config with the bars of the run's PPO: of the one that was made, else of the one that it would
    be made with."""
    name = next(n for n in steps.stages() if "gate_bars" in steps.config_class(n).model_fields)
    config = stages[name].config if name in stages else {}
    if not config and (run / FILE).is_file():
        with contextlib.suppress(UserError):  # one that is being written is told by what makes PPO
            made = Asked(run).of(name)
            config = steps.load(name, made.config, made.settings).model_dump()
    try:
        bars = {key: config[key] for key in ("gate_bars", "alarms") if key in config}
        return PPOConfig.model_validate(bars)
    except ValidationError:  # an older version's, with bars that are no more
        return PPOConfig()


def values(curve: list[dict[str, Any]], name: str, over: str = "step") -> list[tuple[float, float]]:
    """(step, value) of one metric, or over another one; lines without it or with null are left out."""
    both = [(row.get(over), row.get(name)) for row in curve]
    return [(x, y) for x, y in both if x is not None and y is not None]


def ends(curve: list[dict[str, Any]], name: str, last: int = 5) -> tuple[float, float] | None:
    """First value of a metric and the mean of its last few; None when it was not logged."""
    series = [value for _, value in values(curve, name)]
    tail = series[-last:]
    return (series[0], sum(tail) / len(tail)) if series else None
