"""Judges: modules that grade responses for evaluation, and for nothing else.

A judge has `score(prompts, responses, rows, ended=None) -> list[float]` and, if it can tell a right
answer, `exact(prompts, responses, rows) -> list[bool]`. It is named in eval.yaml and imported by
that name here, the only place that does: training never sees one.
"""

import importlib
import math
from types import ModuleType

from pipeline.errors import UserError


class Judge:
    """A judge module whose answers are checked: one finite number per response."""

    def __init__(self, module: ModuleType):
        self.module, self.name = module, module.__name__
        self.about = (module.__doc__ or "").strip().partition("\n")[0]

    def score(
        self, prompts: list[str], responses: list[str], rows: list[dict], ended: list[bool]
    ) -> list[float]:
        """One grade per response, higher is better. `ended` tells which responses reached EOS."""
        grades = self._call("score", float, prompts, responses, rows, ended=ended)
        for i, grade in enumerate(grades):
            if not math.isfinite(grade):
                told = f"\n  prompt:   {prompts[i]!r}\n  response: {responses[i]!r}"
                raise UserError(f"judge {self.name}: score {i} is {grade}{told}")
        return grades

    def exact(
        self, prompts: list[str], responses: list[str], rows: list[dict]
    ) -> list[bool] | None:
        """Whether each response is right; None when the judge cannot tell."""
        if not hasattr(self.module, "exact"):
            return None
        return self._call("exact", bool, prompts, responses, rows)

    def _call(self, what: str, kind: type, prompts: list, responses: list, rows, **more) -> list:
        """The judge's answers, one of a `kind` for each response; what it raises is told with its name."""
        try:
            function = getattr(self.module, what)
            answers = [kind(answer) for answer in function(prompts, responses, rows, **more)]
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
            raise UserError(f"judge {self.name}: {what} failed: {told}") from error
        if (given := len(answers)) != (asked := len(responses)):
            raise UserError(f"judge {self.name}: {what} gave {given} answers for {asked} responses")
        return answers


def load_judge(name: str | None) -> Judge | None:
    """The judge called `package.module`, None for none; UserError when it is not to be had."""
    if name is None:
        return None
    try:
        module = importlib.import_module(name)
    except Exception as error:
        raise UserError(
            f"judge: cannot import {name!r} ({type(error).__name__}: {error}); name a module that can be imported from the "
            "folder you start from, or set judge: null"
        ) from error
    if not callable(getattr(module, "score", None)):
        raise UserError(
            f"judge: {name} has no function score(prompts, responses, rows, ended=None)"
        )
    return Judge(module)
