"""What a group of keys is, and how its keys say what their text names."""

from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

AnyPath = Annotated[Path, Field(strict=False)]
"""A path, or the text of one."""


class Reads(Enum):
    """What the text under a key names: what is behind it decides whether a result is up to date."""

    DATA = "a file of rows, a folder of them, or a hub id"
    MODEL = "a folder of weights, a hub id, or a stage of this run"
    CODE = "a module"
    FUNCTION = "a function, as module:function"
    FILE = "a file"
    NOTHING = "nothing on a disk"


DataName = Annotated[str, Reads.DATA]
ModelName = Annotated[str, Reads.MODEL]
CodeName = Annotated[str, Reads.CODE]
FunctionName = Annotated[str, Reads.FUNCTION]
File = Annotated[AnyPath, Reads.FILE]
Text = Annotated[str, Reads.NOTHING]


class Reference(NamedTuple):
    """A text in a config that names something: the group it stands in and its dotted key."""

    group: "Section"
    key: str
    reads: Reads
    name: str


class Section(BaseModel):
    """A strict group of keys: a key that nobody declared is an error, and so is a number in quotes.

    Every key that holds text says what it names (`Reads`), or its class is refused here: a forgotten
    one would have a stale result called up to date.
    """

    # a field's docstring is its description, which `make show-config` prints
    model_config = ConfigDict(
        extra="forbid", validate_default=True, strict=True, use_attribute_docstrings=True
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        for name, field in cls.model_fields.items():
            if reads(field) is None and {str, Path} & set(parts(field)):
                raise TypeError(f"{cls.__name__}.{name}: say what this text names: see `Reads`")

    def references(self, above: str = "") -> Iterator[Reference]:
        """Every text of these keys and of those in them; `above` stands before their names."""
        for name, field in type(self).model_fields.items():
            pending = [(f"{above}{name}", getattr(self, name))]
            while pending:
                key, value = pending.pop(0)
                if isinstance(value, Section):
                    yield from value.references(f"{key}.")
                elif isinstance(value, list | dict):
                    inside = value.items() if isinstance(value, dict) else enumerate(value)
                    pending += [(f"{key}.{part}", inner) for part, inner in inside]
                elif isinstance(value, str | Path) and (kind := reads(field)) is not None:
                    yield Reference(self, key, kind, str(value))


def reads(field: FieldInfo) -> Reads | None:
    """What a key's text names; None when nobody said so."""
    return next((part for part in parts(field) if isinstance(part, Reads)), None)


def parts(field: FieldInfo) -> list[Any]:
    """All that a key's annotation is made of, metadata included."""
    found: list[Any] = [*field.metadata, field.annotation]
    for part in found:
        found += get_args(part)
    return found
