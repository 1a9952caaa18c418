"""Judges: modules that grade responses for evaluation, and for nothing else.

A judge has `score(prompts, responses, rows, ended=None) -> list[float]` and, if it can tell a right
answer, `exact(prompts, responses, rows) -> list[bool]`. It is named in eval.yaml and imported by
that name here, the only place that does: training never sees one.
"""

import importlib
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from pipeline.errors import UserError


class Judge:
    """A judge module whose answers are checked: one finite number per response."""

    def __init__(self, module: ModuleType):
        self.name = module.__name__
        self.file = (
            None if getattr(module, "__file__", None) is None else Path(str(module.__file__))
        )
        self.about = (module.__doc__ or "").strip().partition("\n")[0]
        self._score: Callable = module.score
        self._exact: Callable | None = getattr(module, "exact", None)

    def score(
        self, prompts: list[str], responses: list[str], rows: list[dict], ended: list[bool]
    ) -> list[float]:
        """One grade per response, higher is better. `ended` tells which responses reached EOS."""
        grades = [
            float(grade) for grade in self._call(self._score, prompts, responses, rows, ended=ended)
        ]
        self._count("score", grades, responses)
        for i, grade in enumerate(grades):
            if not math.isfinite(grade):
                raise UserError(
                    f"judge {self.name}: score {i} is {grade}\n  prompt:   {prompts[i]!r}\n"
                    f"  response: {responses[i]!r}"
                )
        return grades

    def exact(
        self, prompts: list[str], responses: list[str], rows: list[dict]
    ) -> list[bool] | None:
        """Whether each response is right; None when the judge cannot tell."""
        if self._exact is None:
            return None
        right = [bool(answer) for answer in self._call(self._exact, prompts, responses, rows)]
        self._count("exact", right, responses)
        return right

    def _call(self, function: Callable, *args, **kwargs) -> list:
        """The judge's answer; what it raises is told with its name."""
        try:
            return list(function(*args, **kwargs))
        except Exception as error:
            raise UserError(
                f"judge {self.name}: {function.__name__} failed: {type(error).__name__}: {error}"
            ) from error

    def _count(self, what: str, answers: list, responses: list[str]) -> None:
        if len(answers) != len(responses):
            raise UserError(
                f"judge {self.name}: {what} gave {len(answers)} answers for {len(responses)} responses"
            )


def judge_file(name: str | None) -> Path | None:
    """Source of the judge called `package.module`, found without running it; None for none."""
    try:
        spec = importlib.util.find_spec(name) if name else None
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec and spec.has_location and spec.origin else None


def load_judge(name: str | None) -> Judge | None:
    """The judge called `package.module`; None for none.

    UserError when it cannot be imported or has no `score`.
    """
    if name is None:
        return None
    try:
        module = importlib.import_module(name)
    except (ImportError, ValueError, TypeError) as error:
        raise UserError(
            f"judge: cannot import {name!r} ({error}); name a module that can be imported from the "
            "folder you start from, or set judge: null"
        ) from error
    if not callable(getattr(module, "score", None)):
        raise UserError(
            f"judge: {name} has no function score(prompts, responses, rows, ended=None)"
        )
    return Judge(module)
