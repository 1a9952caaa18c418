"""What the labelling page sends, field by field; anything else is refused."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Flag = Literal["fails_task", "untrue", "harmful", "unfinished", "repeats", "wrong_language"]
Number = Annotated[int, Field(ge=0, lt=2**63)]
"""Of a row in SQLite."""


class Said(BaseModel):
    """What every judgement has."""

    model_config = ConfigDict(extra="forbid", strict=True)
    uuid: str = Field(pattern="^[0-9a-f-]{36}$")
    task: Number
    after: Number | None = None
    seconds: float = Field(ge=0, le=86_400)
    guideline: Number
    comment: str = Field("", max_length=2_000)


class Ranked(Said):
    """A ranking; one rank, grade and list of flags a response."""

    ranks: list[Annotated[int, Field(ge=1, le=9)]]
    overall: list[Annotated[int, Field(ge=1, le=7)] | None]
    flags: list[list[Flag]]


class Skipped(Said):
    """Why somebody would not rank this."""

    reason: Literal["cannot_judge", "unclear", "broken", "rather_not", "other"]


class Token(BaseModel):
    """An invitation's."""

    token: str = Field(max_length=200)


class Named(BaseModel):
    """A person, for the admin."""

    name: str = Field(pattern=r"^[\w .@-]{1,60}$")
    admin: bool = False


class Preferred(BaseModel):
    """What to ask next."""

    by: Literal["disagreement", "margin"]
    number: int = Field(ge=0, le=10_000)
