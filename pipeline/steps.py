"""The one table of steps: what there is to make, from what, where it lies, and what is said of it.

Whatever knows a step by its name reads it here. A step is added by an entry: the module that makes it
(`python -m MODULE`), its config, and the steps it reads; keys of its config that name models, data or
code say so themselves (`pipeline.config.section.Reads`).
"""

import importlib
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

from pydantic import BaseModel

from pipeline.config.evaluation import EvalConfig
from pipeline.config.load import did_you_mean, load_config
from pipeline.config.ppo import PPOConfig
from pipeline.config.schema import BaseConfig, RMConfig, SFTConfig, StageConfig
from pipeline.errors import UserError

_SAVES = ("mid-write", "before-rename", "after-rename", "prune", "export", "publish")


@dataclass(frozen=True)
class Step:
    """Something that is made, and made again when what it was made from has changed.

    kind: base = an artifact that runs share; stage = an artifact of a run, made under its lock and
    resumable; result = a file of numbers about a run; page = a view of all that.
    """

    name: str
    kind: Literal["base", "stage", "result", "page"]
    module: str
    config: type[BaseModel] | None = None
    output: str = ""
    """What exists once it is made, below the run's directory (base: below its own)."""
    after: tuple[str, ...] = ()
    """Steps it always reads; those that its config names come on top."""
    of_what_is_there: bool = False
    """It reads those stages of `after` that were made or asked for."""
    brings: tuple[str, ...] = ()
    """Steps that are made as well when this one is asked for by name."""
    phases: tuple[str, ...] = ()
    """Moments at which `PIPELINE_FAULT` can strike."""
    policy: bool = False
    """It holds a model that answers prompts."""
    title: str = ""
    gates: str | None = None
    """`module:function` of the health checks that PPO makes of it: (metrics, bars) -> findings."""
    about: str | None = None
    """Module with CHARTS, EXPECTED and verdict: what the report and the summary say of it."""


TABLE: dict[str, Step] = {
    step.name: step
    for step in (
        Step("base", "base", "pipeline.commands.base", BaseConfig, "manifest.json", policy=True),
        Step(
            "sft",
            "stage",
            "stages.sft",
            SFTConfig,
            "sft/manifest.json",
            phases=("load", "update", "step", "eval", *_SAVES),
            policy=True,
            title="Supervised fine-tuning",
            gates="pipeline.ppo.preflight:of_sft",
            about="pipeline.evaluation.about.sft",
        ),
        Step(
            "rm",
            "stage",
            "stages.rm",
            RMConfig,
            "rm/manifest.json",
            after=("sft",),
            phases=("load", "rollout", "update", "step", "eval", *_SAVES),
            title="Reward model",
            gates="pipeline.ppo.preflight:of_rm",
            about="pipeline.evaluation.about.rm",
        ),
        Step(
            "ppo",
            "stage",
            "stages.ppo",
            PPOConfig,
            "ppo/manifest.json",
            after=("sft",),
            brings=("eval", "report"),
            phases=("load", "rollout", "update", "step", "eval", *_SAVES),
            policy=True,
            title="PPO",
            about="pipeline.evaluation.about.ppo",
        ),
        Step(
            "eval",
            "result",
            "pipeline.evaluation",
            EvalConfig,
            "eval/test.json",
            after=("sft", "rm", "ppo"),
            of_what_is_there=True,
        ),
        Step(
            "report",
            "page",
            "pipeline.evaluation.report",
            output="report.html",
            after=("ppo", "eval"),
        ),
    )
}


def stages() -> dict[str, Step]:
    """Those that train and publish an artifact of a run, in the order they run."""
    return {name: step for name, step in TABLE.items() if step.kind == "stage"}


def policies() -> list[str]:
    """Those that hold a model which answers prompts, the base model first."""
    return [name for name, step in TABLE.items() if step.policy]


def phases() -> dict[str, tuple[str, ...]]:
    """Stage -> its phases, as `pipeline.process.faults.setup` wants them."""
    return {name: step.phases for name, step in stages().items()}


def config_class(name: str) -> type[StageConfig]:
    """The config of a stage."""
    kind = TABLE[name].config
    assert kind is not None and issubclass(kind, StageConfig)
    return kind


def about(name: str) -> ModuleType | None:
    """The module that says what there is to say of a step; None when nobody does."""
    where = TABLE[name].about if name in TABLE else None
    return importlib.import_module(where) if where else None


def gates(name: str) -> Callable | None:
    """The health checks of a step, to be asked before a later one is built on it."""
    where = TABLE[name].gates if name in TABLE else None
    module, _, function = (where or "").partition(":")
    return getattr(importlib.import_module(module), function) if where else None


# --- configs and settings -------------------------------------------------------------------------


def load(name: str, path: Path | str, words: Iterable[str] = ()) -> BaseModel:
    """A step's config file with `key=value` words put over it; UserError lists every problem."""
    kind = TABLE[name].config
    assert kind is not None, f"{name} has no config"
    return load_config(kind, path, words, {n: s.config for n, s in stages().items() if s.config})


def split_settings(text: str) -> list[str]:
    """The words of SET, split as a shell would."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"SET: {error}: {text}") from None


def overrides(name: str, settings: Iterable[str]) -> list[str]:
    """Those words of SET that are for a step, without its prefix.

    `ppo.kl_coef=.02` is for ppo alone; `seed=3` for every stage that has such a key. A key that no
    step has is an error, and all of them are told at once.
    """
    mine, problems = [], []
    for word in settings:
        key, equals, value = word.partition("=")
        owner, _, rest = key.partition(".")
        owned = owner in TABLE and TABLE[owner].kind in ("stage", "result") and bool(rest)
        if not equals or not key:
            problems.append(
                f"{word}: not of the form key=value; no blanks around =, and quotes around a value that "
                "has some: SET=\"ppo.rewards='[{model: rm}]'\""
            )
        elif owned:
            problems += _unknown(rest, [owner], word)
            mine += [f"{rest}={value}"] if owner == name else []
        else:
            problems += _unknown(key, list(stages()), word)
            known = stages().get(name)
            mine += [word] if known and owner in known.config.model_fields else []  # type: ignore[union-attr]
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return mine


def _unknown(key: str, names: list[str], word: str) -> list[str]:
    """A problem when no step of `names` has `key`'s first part, else nothing."""
    first = key.partition(".")[0]
    fields = dict.fromkeys(f for name in names for f in TABLE[name].config.model_fields)  # type: ignore[union-attr]
    if first in ("run", "borrow"):
        return [f"{word}: use RUN= and FROM= (on a command line --run and --from)"]
    if first in fields:
        return []
    return [f"{word}: no key `{first}` in {' or '.join(names)}{did_you_mean(first, fields)}"]
