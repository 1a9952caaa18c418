"""YAML without surprises: plain scalars, lists and mappings, every key once.

Unlike `yaml.safe_load`: `1e-5` is a number, a duplicate key is an error, `no`, `on`, `1:30` and dates
are text, and tags, anchors and merges are refused.
"""

import functools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UserError

_BIGGEST_INTEGER = 2**53
_LONGEST, _DEEPEST = 1_000_000, 50
"""Characters of a text and levels of nesting; more is a mistake or an attack."""


_refused = functools.partial(yaml.MarkedYAMLError, None, None)


class _Loader(yaml.SafeLoader):
    """Reads one document; keys become text, as they are in JSON."""

    yaml_implicit_resolvers: dict[str | None, list] = {}
    depth = 0

    def __init__(self, stream):
        super().__init__(stream)
        self.duplicates: list[tuple[int, str]] = []  # line and words of each

    def compose_node(self, parent, index):
        event: Any = self.peek_event()
        self.depth += 1
        if self.depth > _DEEPEST:
            raise _refused(f"nested more than {_DEEPEST} levels deep", event.start_mark)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _refused("anchors are not supported", event.start_mark)
        if event.tag is not None:  # `!!int` too: on a list it would be a lie
            raise _refused(f"tag {event.tag} refused", event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def mapping(self, node: yaml.MappingNode) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _refused("a key must be one word", key_node.start_mark)
            if key_node.value in result:
                said = f"duplicate key `{key_node.value}`"
                self.duplicates.append((key_node.start_mark.line + 1, said))
            result[key_node.value] = self.construct_object(value_node, deep=True)
        return result

    def integer(self, node: yaml.ScalarNode) -> int:
        return int(node.value.replace("_", ""))

    def floating(self, node: yaml.ScalarNode) -> float | int:
        number = self.construct_yaml_float(node)  # knows .inf and .nan
        if "e" in node.value.lower() and number.is_integer() and abs(number) < _BIGGEST_INTEGER:
            return int(number)  # 1e4 serves for an integer too
        return number


def _resolve(kind: str, pattern: str, first: Iterable[str]) -> None:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(pattern), list(first))


_resolve("null", r"(?:~|null|Null|NULL|)$", ["~", "n", "N", ""])
_resolve("bool", r"(?:true|True|TRUE|false|False|FALSE)$", "tTfF")
_resolve("int", r"[-+]?[0-9][0-9_]*$", "-+0123456789")
_resolve(
    "float",
    r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?$"
    r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$",
    "-+.0123456789",
)
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.integer)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.floating)


def parse(text: str, where: str, problems: list[str] | None = None) -> Any:
    """The value of a YAML text; UserError `where:line: reason`. Duplicate keys may go to `problems`."""
    if len(text) > _LONGEST:
        raise UserError(f"{where}: {len(text)} characters are too many for a config")
    try:
        loader = _Loader(text)
        value = loader.get_single_data()
        told = [f"{where}:{line}: {said}" for line, said in sorted(loader.duplicates)]
        if problems is not None:
            problems += told
        elif told:
            raise UserError("\n".join(told))
        return value
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: not YAML: {' '.join(str(error).split())}") from None


def read_mapping(path: Path, problems: list[str] | None = None) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping. `problems` as in `parse`."""
    try:
        if path.stat().st_size > 4 * _LONGEST:
            raise UserError(f"{path}: {path.stat().st_size} bytes are too many for a config")
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    value = parse(text, str(path), problems)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected `key: value` lines, found {type(value).__name__}")
    return value
