"""A term of the score that PPO optimises, documented where it is declared."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.section import FunctionName, ModelName, Section, Text


class Reward(Section):
    """One term of the score; exactly one of `model`, `models`, `function` and `url`."""

    model: ModelName | None = None
    """`rm` = this run's reward model; else a directory or hub id of a sequence classifier."""
    models: list[ModelName] | None = None
    """Several of those, combined by `aggregate`."""
    aggregate: Literal["mean", "min", "uncertainty"] = "mean"
    """How an ensemble becomes one score (arXiv 2310.02743); uncertainty = mean - coefficient * variance."""
    uncertainty_coef: Annotated[float, Field(ge=0)] = 0.5
    """Times the variance of the members' scores, in aggregate uncertainty."""
    function: FunctionName | None = None
    """`package.module:function` taking (prompts, responses, rows), returning one float per response."""
    per_token: bool = False
    """The function takes (prompts, responses, rows, tokens) and returns a list of floats per response."""
    url: Text | None = None
    """A service that answers POST {prompts, responses, rows} with {scores}."""
    timeout: Annotated[float, Field(gt=0)] | None = None
    """Seconds a function or service may take; none = as long as it likes."""
    retries: Annotated[int, Field(ge=0)] = 2
    """Further tries of a service that failed."""
    weight: float = 1.0
    """Of this term in the sum."""

    @model_validator(mode="after")
    def _one_kind(self):
        given = [k for k in ("model", "models", "function", "url") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError("a reward has exactly one of model, models, function and url")
        unread = {
            "aggregate": given != ["models"],
            "uncertainty_coef": self.aggregate != "uncertainty",
            "per_token": given != ["function"],
            "timeout": given not in (["function"], ["url"]) or self.per_token,
            "retries": given != ["url"],
        }
        for name in self.model_fields_set:
            if unread.get(name) and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no effect on this kind of reward")
        return self

    def members(self) -> list[str]:
        """The reward models of this term."""
        return self.models or ([] if self.model is None else [self.model])
