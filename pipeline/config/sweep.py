"""Keys of a sweep file (`make sweep SWEEP=file.yaml`), in W&B's own words; trials are drawn from it here."""

import itertools
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.load import load_config
from pipeline.config.schema import Positive, Seed
from pipeline.config.section import Section, Text

Trial = dict[str, Any]
"""Key of a config, `ppo.kl_coef` -> value."""


class Metric(Section):
    """What the best trial is best by."""

    name: Text
    """`STAGE.NAME` = a headline metric of a stage's manifest, such as `rm.accuracy`; else a number of the
    evaluation on validation prompts, such as `models.ppo.judge` or `comparisons.ppo_vs_sft.rate`."""
    goal: Literal["maximize", "minimize"] = "maximize"
    """Which end is better."""


class Parameter(Section):
    """The values of one key."""

    values: Annotated[list[Any], Field(min_length=1)] | None = None
    """Each of these; a plain list means the same."""
    value: Any = None
    """This one alone; so does the value itself."""
    min: float | int | None = None
    """From this one on, ..."""
    max: float | int | None = None
    """... up to this one."""
    distribution: Literal["uniform", "int_uniform", "log_uniform_values"] | None = None
    """Between min and max; none = whole numbers where both are, else evenly."""

    @model_validator(mode="after")
    def _one_kind(self):
        given = self.model_fields_set
        if (self.min is None) != (self.max is None) or ("min" in given) == bool(
            given & {"value", "values"}
        ):
            raise ValueError("give values, value, or min and max")
        if self.distribution and self.min is None:
            raise ValueError("distribution goes with min and max")
        if self.min is not None and self.max is not None and self.min >= self.max:
            raise ValueError("min must be below max")
        if self.distribution == "log_uniform_values" and (self.min or 0) <= 0:
            raise ValueError("log_uniform_values: min must be above 0")
        return self

    def listed(self) -> list[Any] | None:
        """The values, where they are so many."""
        return self.values if self.min is None and self.values is not None else self._one()

    def _one(self) -> list[Any] | None:
        return [self.value] if self.min is None else None

    def draw(self, rng: random.Random) -> Any:
        """One of them, at random."""
        if (listed := self.listed()) is not None:
            return rng.choice(listed)
        low, high = self.min, self.max
        assert low is not None and high is not None
        whole = isinstance(low, int) and isinstance(high, int)
        if self.distribution == "int_uniform" or (whole and self.distribution is None):
            return rng.randint(math.ceil(low), math.floor(high))
        if self.distribution == "log_uniform_values":
            return _short(math.exp(rng.uniform(math.log(low), math.log(high))))
        return _short(rng.uniform(low, high))


class SweepConfig(Section):
    """What `make sweep` tries."""

    method: Literal["grid", "random"] = "grid"
    """grid = every combination; random = `run_cap` draws."""
    metric: Metric | None = None
    """none = of PPO's policy the judge's grade, without a judge token F1, without answers the reward model's score."""
    parameters: dict[Text, Parameter]
    """Key of a config -> its values. A key is written as in SET: `ppo.kl_coef`; `seed` is every stage's."""
    run_cap: Positive | None = None
    """At most so many trials."""
    seed: Seed = 1
    """Of the draws."""

    @field_validator("parameters", mode="before")
    @classmethod
    def _written_out(cls, given: Any) -> Any:
        return dict(_flat(given)) if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _can_be_tried(self):
        ranges = [key for key, values in self.parameters.items() if values.listed() is None]
        if self.method == "grid" and ranges:
            raise ValueError(
                f"{ranges[0]}: a grid needs values; min and max go with method: random"
            )
        if self.method == "random" and self.run_cap is None:
            raise ValueError("run_cap: say how many trials a random sweep makes")
        if not self.parameters:
            raise ValueError("parameters: nothing to try")
        return self

    def trials(self) -> list[Trial]:
        """All of them, each once, always the same."""
        found = self._grid() if self.method == "grid" else self._random()
        return list(itertools.islice(found, self.run_cap))

    def _grid(self) -> Iterator[Trial]:
        for values in itertools.product(*(p.listed() or [] for p in self.parameters.values())):
            yield dict(zip(self.parameters, values, strict=True))

    def _random(self) -> Iterator[Trial]:
        rng, seen = random.Random(self.seed), list[Trial]()
        for _ in range(100 * (self.run_cap or 1)):  # of a few values there are no more
            trial = {key: values.draw(rng) for key, values in self.parameters.items()}
            if trial not in seen:
                seen.append(trial)
                yield trial


def load_sweep(path: Path) -> SweepConfig:
    """A sweep file; UserError lists all that is wrong with it."""
    return load_config(SweepConfig, path)


def _flat(given: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """W&B's nested `parameters`, lists and single values as groups of keys."""
    for key, value in given.items():
        if isinstance(value, dict) and "parameters" in value:
            yield from _flat(value["parameters"], f"{above}{key}.")
        elif isinstance(value, dict):
            yield f"{above}{key}", value
        else:
            yield f"{above}{key}", {"values" if isinstance(value, list) else "value": value}


def _short(number: float) -> float:
    return float(f"{number:.6g}")
