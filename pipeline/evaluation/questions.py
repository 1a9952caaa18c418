"""The rows of a file as questions: what is asked of a model, and what would be right; no torch."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config.evaluation import EvalConfig
from pipeline.data import forms, trees
from pipeline.data.messages import Message, optional_text
from pipeline.data.problems import BadRow, Report
from pipeline.data.readers import Row
from pipeline.data.template import without_thinking
from pipeline.errors import UserError

MOST_LABELS = 100
"""More different references are no labels."""


@dataclass
class Question:
    """A row: its prompt, and the answer that would be right."""

    messages: list[Message]
    row: dict[str, Any]
    where: str
    reference: str


def questions(config: EvalConfig) -> list[Question]:
    """The first `n` rows; UserError for those without a reference."""
    lacking: list[str] = []

    def asked(row: Row, _: Report) -> Question:
        reference = _reference(row.values, config.reference)
        if not reference.strip():
            lacking.append(row.where)
        return Question(forms.prompt(row.values), row.values, row.where, reference)

    grow = functools.partial(trees.grown, trees.prompts)
    found = list(forms.load(config.prompts, None, 0, asked, grow)[: config.n])
    if lacking:
        raise UserError(
            f"{lacking[0]}: no reference ({len(lacking)} such rows): name the column of the right answers: "
            'SET="eval.reference=COLUMN"'
        )
    for key in config.groups():
        if all(question.row.get(key) is None for question in found):
            raise UserError(f"eval: group_by: no row of {config.prompts.path} has a {key!r}")
    return found


def _reference(values: dict[str, Any], column: str | None) -> str:
    """A row's column, or its reply; empty without one."""
    if column is not None:
        return without_thinking(optional_text(values, column))
    try:
        return without_thinking(forms.demonstration(values)[-1]["content"])
    except BadRow:  # prompts alone
        return ""


def labels_of(config: EvalConfig, asked: Sequence[Question]) -> list[str]:
    """The labels that the task has, by default all that occur; UserError for a reference that is none."""
    if config.task == "text":
        return []
    labels = config.labels or sorted({question.reference.strip() for question in asked})
    for question in asked:
        if question.reference.strip() not in labels:
            raise UserError(
                f"{question.where}: {question.reference!r} is no label; labels: {', '.join(labels)}"
            )
    if not 2 <= len(labels) <= MOST_LABELS:
        raise UserError(
            f"eval: task {config.task}: {len(labels)} different references are no labels (2 to {MOST_LABELS}); "
            "TASK=text"
        )
    return labels
