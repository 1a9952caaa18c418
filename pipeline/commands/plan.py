"""What is up to date and what has to run, decided by content and never by time stamps."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pipeline import steps
from pipeline.config.load import checkpoints_root, did_you_mean
from pipeline.config.schema import StageConfig
from pipeline.config.section import Reads, Section
from pipeline.errors import UserError
from pipeline.handoff import artifacts, found, lineage
from pipeline.handoff.artifacts import is_published
from pipeline.handoff.found import check_there
from pipeline.handoff.lineage import why_stale
from pipeline.handoff.remembered import Asked, note, recall

FORCED = "asked for"
_AFTER = "after "


@dataclass
class Plan:
    """A run's steps, their configs, and why each has to run (None: it has not)."""

    asked: Asked
    base: Path
    configs: dict[str, Section]
    goals: set[str]
    forced: set[str] = field(default_factory=set)
    reasons: dict[str, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.run, self.borrow = self.asked.run, self.asked.borrow
        self.lost = found.lost(self.run)

    def place(self, step: str) -> Path:
        """The directory that a step's output lies in, below which `Step.output` says more."""
        return self.base if steps.TABLE[step].kind == "base" else self.run

    def borrowed(self, step: str) -> bool:
        """Whether another run's stage is used: none asked for here (a run that was made with a borrowed
        one, and never began its own, stays so when its name alone is given) and none made here."""
        begun = self.asked.memory.steps.keys() if self.asked.lent else self.goals
        own = self.forced | (self.goals & begun)
        if self.borrow is None or step not in steps.stages() or step in own:
            return False
        if (self.run / ".work" / step).is_dir():  # begun here, and stopped
            return False
        if self.asked.lent and not is_published(self.borrow / step):
            return False
        return not is_published(self.run / step)

    def needs(self, step: str) -> list[str]:
        """Steps that `step` reads directly, in the order they run."""
        names = set(steps.TABLE[step].after)
        if steps.TABLE[step].of_what_is_there:
            names = {name for name in names if self._looked_at(name)}
        for _, _, kind, name in self.configs[step].references() if step in self.configs else ():
            if kind is Reads.MODEL and name in steps.stages():
                names.add(name)
            if "base" in self.configs and self.base in (Path(name), *Path(name).parents):
                names.add("base")
        made = [name for name in steps.TABLE if name in names]
        return [name for name in made if name in self.configs or steps.TABLE[name].config is None]

    def _looked_at(self, stage: str) -> bool:
        """Whether an evaluation reads a stage: what is there, what is asked for, the first at least."""
        goals = [steps.TABLE[goal] for goal in self.goals]
        asked = {n for g in goals for n in (g.name, *(() if g.of_what_is_there else g.after))}
        if any(stage in _closure(self, [goal]) for goal in asked & steps.stages().keys()):
            return True
        places = [self.run, *([self.borrow] if self.borrow else [])]
        first = stage == next(iter(steps.stages()))
        return first or any(is_published(place / stage) for place in places)


def stale(
    asked: Asked, goals: Iterable[str], force: Iterable[str] = (), base: Path | None = None
) -> Plan:
    """Why each step that the goals need has to run.

    UserError tells all mistakes of all configs at once, missing data files among them, and names a
    damaged artifact that nobody asked to rebuild.
    """
    goals, configs = list(goals), _load_all(asked)
    assert asked.recipe is not None
    if "eval" in goals and "eval" not in configs:
        raise UserError(f"eval: there is no {asked.of('eval').config}; another file: EVAL=")
    brought = [b for goal in goals for b in steps.TABLE[goal].brings]
    goals += [b for b in brought if b in configs or steps.TABLE[b].config is None]
    plan = Plan(
        asked=asked,
        base=base or checkpoints_root() / "base" / asked.recipe.name,
        configs=configs,
        goals={goal for goal in goals if goal in configs or steps.TABLE[goal].config is None},
        forced=set(goals) if "1" in force else set(force),
    )
    needed = _closure(plan, plan.goals)
    for step in steps.TABLE:
        if step in needed:
            plan.reasons[step] = _reason(plan, step)
    _check_inputs(plan)
    _check_borrowed(plan)
    return plan


def to_run(plan: Plan) -> list[str]:
    """Steps that have to run, in order."""
    return [step for step in steps.TABLE if plan.reasons.get(step)]


def check_used(plan: Plan) -> None:
    """UserError for what was asked for and would do nothing: no step that is looked at reads it."""
    asked, reads = plan.asked, [step for step in plan.reasons if steps.TABLE[step].config]
    idle = [f"FORCE={step}" for step in sorted(plan.forced - plan.reasons.keys())]
    idle += [
        f"{n.upper()}={file}" for n, file in asked.files.items() if n not in {"base", *plan.reasons}
    ]
    idle += [w for w in asked.settings if not any(steps.overrides(step, [w]) for step in reads)]
    if idle:
        raise UserError(f"{', '.join(idle)}: read by none of {', '.join(plan.reasons)}")
    if asked.borrow and not asked.lent:
        check_there(asked.borrow)
        if not any(map(plan.borrowed, plan.reasons)):
            own = ", ".join(step for step in plan.reasons if step in steps.stages())
            raise UserError(f"FROM: nothing is borrowed: {plan.run} has or makes its own {own}")


def check_replaced(plan: Plan) -> None:
    """UserError for a published stage that would be replaced by one of another file or setting, or by one
    of other parents since its own are gone, unless that was asked for: an edited file redoes it, another
    file is another run."""
    problems = []
    for step in [step for step in to_run(plan) if step in steps.stages()]:
        try:
            artifacts.check_free(plan.run / step)
        except UserError as error:
            problems.append(str(error))
    for step in set(to_run(plan)) & steps.stages().keys() - plan.forced:
        reason, told = plan.reasons[step] or "", plan.asked.replaces(step)
        if reason == plan.lost.get(step):
            problems.append(f"{plan.run}: {reason}.\n  {found.remedy(plan.run, step)}")
        if told is None and step not in plan.asked.memory.steps and not reason.startswith(_AFTER):
            told = (
                f"made from what the run does not remember, would be one from {plan.asked.of(step)}"
            )
        if told and is_published(plan.run / step):
            problems.append(
                f"{plan.run / step}: {told} ({reason}).\n"
                f"  Keep it: another RUN=. Replace it: FORCE={step}"
            )
    if problems:
        raise UserError("\n".join(problems))


def remember_what_fits(plan: Plan) -> None:
    """A stage that is what was asked for is remembered as such: nobody remembers it, its `run.json` lost, or
    it was made from another file or under another recipe that says the same."""
    for step in steps.stages():
        made = plan.asked.of(step)
        if plan.reasons.get(step, "") is None and plan.asked.memory.steps.get(step) != made:
            if is_published(plan.run / step):
                note(plan.run, step, made, plan.asked.recipe, plan.asked.borrow)


def _reason(plan: Plan, step: str) -> str | None:
    if plan.borrowed(step):
        assert plan.borrow is not None
        further = recall(plan.borrow).borrow
        if further and not is_published(plan.borrow / step):
            raise UserError(f"FROM: {plan.borrow} has no {step}, it borrows from {further} itself")
        artifacts.read_listing(plan.borrow / step, step)
        return None
    if step in plan.forced:
        return FORCED
    for earlier in plan.needs(step):
        if plan.reasons.get(earlier):
            made = step not in steps.stages() or is_published(plan.run / step)
            return f"{_AFTER}{earlier}" if made else "not made yet"
    return plan.lost.get(step) or why_stale(step, plan.configs.get(step), plan.place(step))


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


def _load_all(asked: Asked) -> dict[str, Section]:
    """Configs of all steps that have a file; stages must have one."""
    _check_recipe(asked)
    configs: dict[str, Section] = {}
    problems: list[str] = []
    for name, step in steps.TABLE.items():
        if step.config is None:
            continue
        try:
            made = asked.of(name)
            if step.kind != "stage" and name not in asked.files and not Path(made.config).is_file():
                continue
            config = steps.load(name, made.config, made.settings)
        except UserError as error:
            problems += str(error).splitlines()
            continue
        if isinstance(config, StageConfig):
            config = config.model_copy(update={"run": asked.run, "borrow": asked.borrow})
        assert isinstance(config, Section)
        configs[name] = config
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return configs


def _check_recipe(asked: Asked) -> None:
    recipe = asked.recipe
    assert recipe is not None
    if not recipe.is_dir() and not all(
        Path(asked.of(name).config).is_file() for name in steps.stages()
    ):
        last = f"{list(steps.stages())[-1]}.yaml"
        names = [entry.name for entry in recipe.parent.glob("*/") if (entry / last).is_file()]
        hint = did_you_mean(recipe.name, names) or f"; there are {', '.join(sorted(names))}"
        raise UserError(f"RECIPE={recipe.name}: no folder {recipe}{hint}")


def _check_inputs(plan: Plan) -> None:
    """Data, models and code that no earlier step will make must be there now, hours before they are read."""
    coming = [plan.base] if plan.reasons.get("base") else []
    coming += [plan.run / stage for stage in steps.stages() if plan.reasons.get(stage)]
    problems = [
        f"{plan.asked.of(step).config}: {problem}"
        for step in to_run(plan)
        if step in plan.configs
        for problem in lineage.missing(plan.configs[step], coming)
    ]
    if problems:
        raise UserError("\n".join(problems))


def _check_borrowed(plan: Plan) -> None:
    """Settings of a stage that another run has made would do nothing."""
    for step in filter(plan.borrowed, plan.reasons):
        if words := [w for w in plan.asked.settings if w.startswith(f"{step}.")]:
            raise UserError(
                f"{words[0]}: {step} is borrowed from {plan.borrow} as it is; leave the setting out, or "
                f"make it here: make {step} RUN={plan.run.name}"
            )
