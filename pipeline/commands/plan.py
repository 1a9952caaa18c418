"""What is up to date and what has to run, decided by content and never by time stamps."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel

from pipeline import run
from pipeline.config.evaluation import EvalConfig
from pipeline.config.load import (
    checkpoints_root,
    config_hash,
    did_you_mean,
    load_config,
    stage_overrides,
)
from pipeline.config.schema import STAGES, BaseConfig, PPOConfig, StageConfig
from pipeline.errors import UserError
from pipeline.evaluation.judges import judge_file
from pipeline.handoff import artifacts, lineage
from pipeline.handoff.found import find_stages, fresh_stages, read_json
from pipeline.process.files import sha256

STEPS = ("base", "sft", "rm", "ppo", "eval", "report")
FORCED = "asked for"
_SCHEMAS: dict[str, type[BaseModel]] = {"base": BaseConfig, **STAGES, "eval": EvalConfig}


@dataclass
class Plan:
    """A run's steps, their configs, and why each has to run (None: it has not)."""

    run: Path
    base: Path
    borrow: Path | None
    configs: dict[str, BaseModel]
    goals: set[str]
    forced: set[str] = field(default_factory=set)
    reasons: dict[str, str | None] = field(default_factory=dict)

    def stage(self, step: str) -> StageConfig:
        """Config of sft, rm or ppo."""
        config = self.configs[step]
        assert isinstance(config, StageConfig)
        return config

    def borrowed(self, step: str) -> bool:
        """Whether another run's stage is used: none asked for here and none made here."""
        if self.borrow is None or step not in STAGES or step in self.goals | self.forced:
            return False
        return not artifacts.is_published(self.run / step)

    def needs(self, step: str) -> list[str]:
        """Steps that `step` reads directly, in the order they run."""
        needed = {
            "rm": ["sft"],
            "ppo": ["sft", "rm"],
            "eval": [stage for stage in STAGES if step == "eval" and self._evaluated(stage)],
            "report": ["ppo"],
        }
        found = needed.get(step, [])
        if "base" in self.configs and step in self.configs and step != "base":
            found = ["base", *found] if self._reads_base(step) else found
        if step == "ppo" and not _uses_rm(self.configs["ppo"]):
            found = [name for name in found if name != "rm"]
        if step == "report" and "eval" in self.configs:
            found = [*found, "eval"]
        return found

    def _evaluated(self, stage: str) -> bool:
        """Whether the evaluation looks at a stage: what is there, what is asked for, SFT at least."""
        if self.goals & {"ppo", "report"} and stage in ["ppo", *self.needs("ppo")]:
            return True
        places = [self.run, *([self.borrow] if self.borrow else [])]
        there = any(artifacts.is_published(place / stage) for place in places)
        return stage == "sft" or stage in self.goals or there

    def _reads_base(self, step: str) -> bool:
        return f'"{self.base}' in self.configs[step].model_dump_json()


def stale(
    recipe: dict[str, Path],
    run_directory: Path,
    goals: Iterable[str] = STEPS,
    settings: Iterable[str] = (),
    borrow: Path | None = None,
    force: Iterable[str] = (),
    base: Path | None = None,
) -> Plan:
    """Why each step that the goals need has to run.

    recipe: step -> config file. UserError tells all mistakes of all configs at once, missing data
    files among them, and names a damaged artifact that nobody asked to rebuild.
    """
    goals = [goal for goal in goals if goal in recipe or goal == "report"]
    forced = set(goals) if "1" in force else set(force)
    plan = Plan(
        run=run_directory,
        base=base or checkpoints_root() / "base" / "tiny",
        borrow=borrow,
        configs=_load_all(recipe, run_directory, borrow, list(settings)),
        goals=set(goals),
        forced=forced,
    )
    needed = _closure(plan, goals)
    for step in STEPS:
        if step in needed:
            plan.reasons[step] = _reason(plan, step)
    _check_inputs(plan)
    return plan


def to_run(plan: Plan) -> list[str]:
    """Steps that have to run, in order."""
    return [step for step in STEPS if plan.reasons.get(step)]


# --- why ------------------------------------------------------------------------------------------


def _reason(plan: Plan, step: str) -> str | None:
    if plan.borrowed(step):
        assert plan.borrow is not None
        artifacts.read_listing(plan.borrow / step, step)
        return None
    if step in plan.forced:
        return FORCED
    for earlier in plan.needs(step):
        if plan.reasons.get(earlier):
            made = step not in STAGES or artifacts.is_published(plan.run / step)
            return f"after {earlier}" if made else "not made yet"
    checks: dict[str, Callable[[Plan], str | None]] = {
        "base": _base_reason,
        "eval": _eval_reason,
        "report": _report_reason,
    }
    return checks[step](plan) if step in checks else run.why_stale(plan.stage(step))


def _base_reason(plan: Plan) -> str | None:
    if not artifacts.is_published(plan.base):
        return "not made yet"
    manifest = artifacts.read_listing(plan.base)
    return None if manifest.config_hash == config_hash(plan.configs["base"]) else "config"


def _eval_reason(plan: Plan) -> str | None:
    """Compares what test.json says it was made from."""
    done = read_json(plan.run / "eval" / "test.json")
    if not done:
        return "not made yet"
    config = plan.configs["eval"]
    assert isinstance(config, EvalConfig)
    if done.get("config") != config.model_dump(mode="json"):
        return "config"
    stages, _ = fresh_stages(find_stages(plan.run))
    used = {name: made["manifest_sha256"] for name, made in done.get("artifacts", {}).items()}
    if used != {name: stage.manifest_sha256 for name, stage in stages.items()}:
        return "the models have changed"
    inputs: dict[str, str] = {}
    for data in (config.prompts, config.demonstrations):
        inputs |= lineage.data_fingerprint(data) if data else {}
    judge = judge_file(config.judge)
    inputs |= {config.judge: sha256(judge)} if config.judge and judge else {}
    known = done.get("inputs", {})
    changed = [name for name, digest in inputs.items() if known.get(name) != digest]
    return f"{changed[0]} has changed" if changed else None


def _report_reason(plan: Plan) -> str | None:
    """The report alone goes by time: it is a view of files that are themselves up to date."""
    report = plan.run / "report.html"
    if not report.is_file():
        return "not made yet"
    sources = [plan.run / "eval" / "test.json", *plan.run.glob("*/manifest.json")]
    newest = max((path.stat().st_mtime for path in sources if path.is_file()), default=0.0)
    return "the run has changed" if newest > report.stat().st_mtime else None


def _closure(plan: Plan, goals: Iterable[str]) -> set[str]:
    """The goals and all that they need; a borrowed stage needs nothing."""
    needed: set[str] = set()
    pending = list(goals)
    while pending:
        step = pending.pop()
        if step not in needed:
            needed.add(step)
            pending += [] if plan.borrowed(step) else plan.needs(step)
    return needed


def _uses_rm(config: BaseModel) -> bool:
    assert isinstance(config, PPOConfig)
    return any("rm" in reward.members() for reward in config.rewards)


# --- configs --------------------------------------------------------------------------------------


def _load_all(
    recipe: dict[str, Path], directory: Path, borrow: Path | None, settings: list[str]
) -> dict[str, BaseModel]:
    configs: dict[str, BaseModel] = {}
    problems: list[str] = []
    for step, path in recipe.items():
        try:
            config = load_config(_SCHEMAS[step], path, stage_overrides(step, settings))
        except UserError as error:
            problems += str(error).splitlines()
            continue
        if isinstance(config, StageConfig):
            config = config.model_copy(update={"run": directory, "borrow": borrow})
        configs[step] = config
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return configs


def _check_inputs(plan: Plan) -> None:
    """A data file that no earlier step will make must be there now, hours before it is read."""
    coming = [plan.base] if plan.reasons.get("base") else []
    coming += [plan.run / stage for stage in STAGES if plan.reasons.get(stage)]
    problems = [
        f"{step}: {problem}"
        for step in to_run(plan)
        if step in plan.configs
        for problem in lineage.missing_data(plan.configs[step], coming)
    ]
    if problems:
        raise UserError("\n".join(problems))


def recipe_files(recipe: Path, chosen: dict[str, Path | None]) -> dict[str, Path]:
    """Step -> config file: the chosen one, else the recipe's; base and eval may be absent."""
    files: dict[str, Path] = {}
    for step in _SCHEMAS:
        file = chosen.get(step) or recipe / f"{step}.yaml"
        if step in STAGES or chosen.get(step) or file.is_file():
            files[step] = file
    if not recipe.is_dir() and not all(chosen.get(stage) for stage in STAGES):
        names = [entry.name for entry in recipe.parent.glob("*/") if (entry / "ppo.yaml").is_file()]
        hint = did_you_mean(recipe.name, names) or f"; there are {', '.join(sorted(names))}"
        raise UserError(f"RECIPE={recipe.name}: no folder {recipe}{hint}")
    return files
