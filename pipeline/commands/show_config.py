"""The configs of a run as its steps will see them, every key with what it means (make show-config)."""

import signal
import textwrap
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipeline.cli import reporting_errors
from pipeline.commands.status import parse, plan_of
from pipeline.config.section import parts


def documented(config: BaseModel) -> str:
    """The resolved config as YAML, each key under the docstring of its declaration."""
    return "\n".join(_lines(config))


def _lines(group: BaseModel) -> Iterator[str]:
    """A group of keys and those inside it, indented."""
    plain = group.model_dump(mode="json")
    for key, field in type(group).model_fields.items():
        value = getattr(group, key)
        yield from (f"# {line}" for line in (field.description or "").splitlines())
        if choices := _choices(field):
            yield f"# One of: {', '.join(choices)}."
        if isinstance(value, BaseModel):
            yield f"{key}:"
            yield from _indented(value)
        elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
            yield f"{key}:"
            for item in value:
                yield "-"
                yield from _indented(item)
        else:
            one: dict[str, Any] = {key: plain.get(key, value)}  # one left out is its default
            yield yaml.safe_dump(one, sort_keys=False, allow_unicode=True).rstrip()


def _indented(group: BaseModel) -> Iterator[str]:
    return (textwrap.indent(line, "  ") for line in _lines(group))


def _choices(field: FieldInfo) -> list[str]:
    """The words that a key takes, if it takes certain words alone."""
    literal = next((kind for kind in parts(field) if get_origin(kind) is Literal), None)
    return [str(word) for word in get_args(literal)]


def main() -> None:
    """Command line of `make show-config`."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no error
    plan = plan_of(parse(), [])
    for name, config in plan.configs.items():
        print(f"# --- {name}: {plan.asked.of(name)} ---\n{documented(config)}\n")


if __name__ == "__main__":
    with reporting_errors():
        main()
