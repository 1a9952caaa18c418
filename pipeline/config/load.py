"""Stage configs: strict YAML and `a.b=c` overrides into the models of `pipeline.config`."""

import argparse
import difflib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from pipeline.config import strict_yaml
from pipeline.config.section import parts
from pipeline.errors import UserError

Config = TypeVar("Config", bound=BaseModel)

CHECKPOINTS = "checkpoints"
"""First folder of paths in configs; RLHF_CHECKPOINTS names the folder that really stands for it."""


def load_config(
    cls: type[Config],
    path: Path | str,
    overrides: Iterable[str] = (),
    others: Mapping[str, type[BaseModel]] = MappingProxyType({}),
) -> Config:
    """A config file with `a.b=c` overrides, checked; UserError lists all problems, `others` may have a lost key."""
    path = Path(path)
    problems: list[str] = []
    raw = strict_yaml.read_mapping(path, problems)
    words = list(overrides)
    problems += [problem for word in words if (problem := _override(raw, word))]
    problems += [f"{path}: {key}: not a finite number" for key in _not_finite(raw)]
    raw = _defaults_as_text(cls) | _relocated(raw)
    try:
        config = cls.model_validate_json(json.dumps(raw), strict=True)  # "3" is no 3, true is no 1
    except ValidationError as error:
        for problem in _problems(cls, error, others):
            key = problem.partition(": ")[0]
            set_by = [w for w in words if f"{key}.".startswith(f"{w.partition('=')[0]}.")]
            problems.append(f"{set_by[-1] if set_by else path}: {problem}")
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return config


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`key: old -> new` for every key of two resolved configs that differs, `group.key` inside groups."""
    told = []
    for key in dict.fromkeys([*old, *new]):
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            told += [f"{key}.{line}" for line in differences(before, now)]
        elif before != now:
            told.append(f"{key}: {json.dumps(before)} -> {json.dumps(now)}")
    return told


class AddSettings(argparse.Action):
    """`--set "seed=3 ppo.lam=1"`, as often as one likes; argparse itself would keep the last alone."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, f"{getattr(namespace, self.dest)} {values}".strip())


def _override(raw: dict[str, Any], word: str) -> str | None:
    """Put one `a.b=c` into the raw config; returns what is wrong with it, if anything is."""
    key, equals, text = word.partition("=")
    if not equals or not all(key.split(".")):
        return f"{word}: not of the form key=value"
    try:
        value = strict_yaml.parse(text, word)
    except UserError as error:
        return str(error)
    *parents, last = key.split(".")
    place: Any = raw
    for depth, name in enumerate([*parents, last]):
        is_item = isinstance(place, list) and name.isdigit() and int(name) < len(place)
        if not is_item and not isinstance(place, dict):
            return f"{word}: `{name}` is not inside a group of keys"
        at = int(name) if is_item else name
        if depth == len(parents):
            place[at] = value
        elif not is_item and place.get(name) is None:
            place[name] = {}
        place = place[at]
    return None


def did_you_mean(name: str, known: Iterable[str], most: int = 1) -> str:
    """` (did you mean `x`?)` with up to so many near names, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=most, cutoff=0.6)
    return f" (did you mean {' or '.join(f'`{one}`' for one in near)}?)" if near else ""


def _problems(
    cls: type[BaseModel], error: ValidationError, others: Mapping[str, type[BaseModel]]
) -> Iterator[str]:
    """pydantic's errors as `key: reason`."""
    problems = error.errors(include_url=False)
    for problem in problems:
        *place, last = problem["loc"] or ("",)
        if (
            problem["type"] == "string_type"
            and last == "str"
            and any(
                len(other["loc"]) > len(place) + 1 and [*other["loc"]][: len(place)] == place
                for other in problems
            )
        ):
            continue  # a list or a group stands there, and what is wrong inside is told
        names = [str(part) for part in problem["loc"]]
        location = [part for part in names if "[" not in part and part not in ("str", "Source")]
        if problem["type"] == "extra_forbidden":
            location += names[-1:] if location[-1:] != names[-1:] else []  # whatever it is called
            yield f"{'.'.join(location)}: unknown key{_nearest_key(cls, location, others)}"
            continue
        reason = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "missing":
            reason = "missing"
        elif problem["type"] != "value_error":
            reason = f"{reason[0].lower()}{reason[1:]}, not {json.dumps(problem['input'])}"
        key = ".".join(location)
        yield f"{key}: {reason}" if key else reason


def _nearest_key(
    cls: type[BaseModel], location: list[str], others: Mapping[str, type[BaseModel]]
) -> str:
    """The nearest key of the same group, else the stage that has such a key."""
    *groups, name = location
    for group in groups:
        if not group.isdigit():
            cls = _section(cls, group) or cls
    if hint := did_you_mean(name, cls.model_fields):
        return hint
    if groups:
        return f"; known are {', '.join(cls.model_fields)}"
    owners = [stage for stage, other in others.items() if name in other.model_fields]
    return f" (a key of {' and '.join(owners)})" if owners else ""


def _section(cls: type[BaseModel], field: str) -> type[BaseModel] | None:
    """The model inside a field's annotation (`Lora | None`, `list[Reward]`, ...), if it has one."""
    if field not in cls.model_fields:
        return None
    kinds = [kind for kind in parts(cls.model_fields[field]) if isinstance(kind, type)]
    return next((kind for kind in kinds if issubclass(kind, BaseModel)), None)


def _not_finite(value: Any, key: str = "") -> Iterator[str]:
    """Dotted keys of values that are NaN or infinite; JSON has none."""
    if isinstance(value, float) and not math.isfinite(value):
        yield key
    if isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _not_finite(inner, f"{key}.{name}" if key else str(name))


def checkpoints_root() -> Path:
    """The folder that stands for `checkpoints/` (make's CKPT)."""
    return Path(os.environ.get("RLHF_CHECKPOINTS") or CHECKPOINTS)


def _relocated(value: Any, there: Any = CHECKPOINTS, root: Any = None) -> Any:
    """The raw config with what lies below the folder `there` moved below `root`: `checkpoints_root()`."""
    if isinstance(value, dict):
        return {key: _relocated(inner, there, root) for key, inner in value.items()}
    if isinstance(value, list):
        return [_relocated(inner, there, root) for inner in value]
    if isinstance(value, str) and value.startswith(f"{there}/"):
        return str(Path(root or checkpoints_root(), value.removeprefix(f"{there}/")))
    return value


def portable(value: Any) -> Any:
    """`_relocated` undone: what lies below `checkpoints_root()`, by whatever name of that folder, as
    `checkpoints/...`."""
    for root in (checkpoints_root(), checkpoints_root().resolve()):
        value = _relocated(value, root, CHECKPOINTS)
    return value


def _defaults_as_text(cls: type[BaseModel]) -> dict[str, str]:
    """Defaults that are paths: strict JSON validation wants even those as text."""
    fields = cls.model_fields.items()
    return {name: str(field.default) for name, field in fields if isinstance(field.default, Path)}
