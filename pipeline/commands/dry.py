"""What makes a run of a recipe a dry one (`make ... DRY=1`): settings for a few steps of a small model on a
few local rows, so that nothing is fetched. All other keys are the recipe's, and are read and checked.

In its folder `dry` a recipe says what stands for its model and data: `base.yaml` makes the model, and
`NAME.jsonl` has rows in the columns of the data set `owner/NAME` or of a file of that name. What has nothing
that stands for it is used as it is, if it is here.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pipeline import steps
from pipeline.config.load import checkpoints_root
from pipeline.config.schema import Data
from pipeline.config.section import Reads, Reference, Section
from pipeline.errors import UserError
from pipeline.handoff.datafiles import KINDS

ROWS = 96
"""Rows of a source that are read at most."""

_ALL = {"log_every": 1, "threads": 1, "wandb.mode": "disabled"}
_TRAINS = {"max_steps": 3, "batch_size": 4, "micro_batch_size": 2}
SIZES: dict[str, dict[str, Any]] = {
    "sft": _ALL | _TRAINS | {"sample_tokens": 8},
    "rm": _ALL | _TRAINS | {"sampling.max_new_tokens": 8, "sampling.batch_size": 8},
    "ppo": _ALL
    | {"iterations": 2, "batch_size": 8, "minibatches": 2, "micro_batch_size": 2, "vllm": None}
    | {"rollout_batch_size": None, "max_new_tokens": 8, "gates": "warn"},
    "eval": {"n": 4, "max_new_tokens": 8, "batch_size": 8, "threads": 1}
    | {"candidates": 2, "candidate_prompts": 2},
}
"""Step -> key -> the value it has in a dry run. The small model has learnt nothing: PPO's gates warn alone."""


def base_config(recipe: Path) -> Path:
    """The config of the model of a recipe's dry runs."""
    return next(filter(Path.is_file, [recipe / "dry" / "base.yaml"]), recipe / "base.yaml")


def settings(recipe: Path, files: Mapping[str, Path], base: Path) -> list[str]:
    """`step.key=value` words for the recipe, of which some steps may have other files; `base`: the folder of
    the dry runs' model. UserError tells all that nothing local stands for."""
    words, problems = [], list[str]()
    for name, sizes in SIZES.items():
        path = files.get(name, recipe / f"{name}.yaml")
        if not path.is_file():
            continue  # missed by whoever needs it
        config = steps.load(name, path)
        assert isinstance(config, Section)
        changes = {key: value for key, value in sizes.items() if _differs(config, key, value)}
        for reference in config.references():
            try:
                changes |= _local(reference, recipe, base)
            except UserError as error:
                problems.append(f"{path}: {reference.key}: {error}")
        words += [f"{name}.{k}={'null' if v is None else v}" for k, v in changes.items()]
    if problems:
        raise UserError("\n".join(["DRY: what stands for these?", *problems]))
    return words


def _differs(config: BaseModel, key: str, value: Any) -> bool:
    """Whether a key has another value; one in a group that is not there has none."""
    found: Any = config
    for name in key.split("."):
        if found is None:
            return False
        found = getattr(found, name)
    return found != value


def _local(reference: Reference, recipe: Path, base: Path) -> Iterator[tuple[str, Any]]:
    """What stands for a model or a source, and how many rows of it are read."""
    group, key, kind, name = reference
    made, there = checkpoints_root() / "base" / recipe.name, Path(name)
    if kind is Reads.DATA:
        if (rows := recipe / "dry" / f"{_of_data(name)}.jsonl").is_file():
            yield key, rows
        elif made in there.parents:
            yield key, base / there.relative_to(made)
        elif not there.exists():
            raise UserError(f"{name} is not here; write a few rows in its columns as {rows}")
        if isinstance(group, Data) and (group.limit or ROWS + 1) > ROWS:
            yield f"{key.rpartition('.path')[0]}.limit", ROWS
    elif kind is Reads.MODEL and name not in steps.stages():
        if key != "model":
            if not there.exists():
                yield key, "rm"  # the run's own reward model is one too
        elif there == made or (recipe / "dry" / "base.yaml").is_file():
            yield key, base
        elif not there.exists():
            told = recipe / "dry" / "base.yaml"
            raise UserError(
                f"{name} is not here; say in {told} what stands for it: builder: random"
            )


def _of_data(name: str) -> str:
    """`c` of a/b/c.jsonl and of the hub's a/c:config."""
    last = Path(name.partition(":")[0])
    return last.stem if last.suffix in KINDS else last.name
