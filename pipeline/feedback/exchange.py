"""Tasks and labels from and to files: JSONL in the ranked form, with who said it, when, and of which model."""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

from pipeline.config.schema import Data
from pipeline.data.forms import PROMPTS, check_prompt, find_prompt, without_reply
from pipeline.data.problems import BadRow
from pipeline.data.rankings import MAX_K, dense_ranks
from pipeline.data.sources import read_rows
from pipeline.data.waiting import Waiting, is_ranked
from pipeline.errors import UserError
from pipeline.feedback.posterior import Posterior, posterior
from pipeline.feedback.store import Candidate, Conflict, Label, Store, Task
from pipeline.process.files import jsonl, write_atomically

REPLACED = {*PROMPTS, "system", "history", "ranks", "scores"}
"""Columns of a prompt's row that would be read in the place of what is written beside them."""
_OURS = (
    "responses ended sources model_scores annotator time id seconds guideline overall flags comment "
    "probability strengths"
).split()
_CELLS: dict[str, tuple[tuple[type, ...], str]] = {
    "sources": ((str,), "a text"),
    "scores": ((int, float, type(None)), "a number or null"),
    "ended": ((bool,), "true or false"),
    "overall": ((int, type(None)), "a whole number or null"),
    "flags": ((list,), "a list"),
    "ranks": ((int, float), "a whole number, 1 the best"),
}
"""What each of the K cells of a column is."""


def shuffled(task: Task) -> Task:
    """The same responses, each text once, in an order that tells nothing of where they come from."""
    merged: dict[str, Candidate] = {}
    for own in task.candidates:
        first = merged.setdefault(own.text, own)
        names = dict.fromkeys([*first.source.split(", "), *own.source.split(", ")])
        merged[own.text] = dataclasses.replace(first, source=", ".join(names))
    order = [merged[text] for text in sorted(merged)]
    Random(dataclasses.replace(task, candidates=order).key).shuffle(order)
    asks = None if task.last is None else order.index(merged[task.candidates[task.last].text])
    return dataclasses.replace(task, candidates=order, last=asks)


# --- in -------------------------------------------------------------------------------------------


def bring(store: Store, path: Path, overlap: float = 0.0, votes: int = 1) -> dict[str, int]:
    """Add a file's rows, `prompt` and `responses`, as tasks, and their `ranks` as labels; what came of it, counted.

    The same file again adds nothing; whom the file does not name is `imported`, and a list of several people's ranks is
    nobody's label. Of the store's own `to_rank.jsonl` only lines without ranks count: the others have what `fill` put there.
    UserError with file and line: no prompt, no responses, more than 9, ranks or other cells that do not fit.
    """
    told: Counter[str] = Counter()
    waiting = path.resolve() == store.path.with_name("to_rank.jsonl").resolve()
    rows = [r for r in read_rows(Data(path=str(path))) if not (waiting and is_ranked(r.values))]
    read = [_read(row.values, row.where) for row in rows]
    tasks = [shuffled(task) for task, _ in read]
    fit = [len(task.candidates) > 1 for task in tasks]
    told["tasks"] = store.add(
        [t for t, is_fit in zip(tasks, fit, strict=True) if is_fit], overlap, votes
    )
    told["with fewer than two different responses left out"] = fit.count(False)
    for task, (given, values), is_fit in zip(tasks, read, fit, strict=True):
        if is_fit and values.get("ranks"):
            if isinstance(values["ranks"][0], list):
                told["with several people's ranks, not said whose: tasks alone"] += 1
                continue
            told[_said(store, task, given, values)] += 1
    return {what: number for what, number in told.items() if number}


def _read(values: dict[str, Any], where: str) -> tuple[Task, dict[str, Any]]:
    """The task of a row, its responses as they stand there."""
    texts, k = values.get("responses"), 0
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: `responses` is no list of texts")
    if (k := len(texts)) > MAX_K:
        raise UserError(f"{where}: {k} responses; at most {MAX_K} can be ranked")
    try:
        prompt = without_reply(find_prompt(values) or [])
        check_prompt(prompt)
    except BadRow as error:
        raise UserError(f"{where}: {error}") from None
    if not prompt:
        raise UserError(f"{where}: no prompt beside `responses`")
    scores = values.get("model_scores") or (None if values.get("ranks") else values.get("scores"))
    columns = {
        "sources": values.get("sources") or [""] * k,
        "scores": scores or [None] * k,
        "ended": values.get("ended") or [True] * k,
        "overall": values.get("overall") or [None] * k,
        "flags": values.get("flags") or [[]] * k,
    }
    ballots = values.get("ranks") or [1] * k
    ballots = ballots if isinstance(ballots, list) and isinstance(ballots[0], list) else [ballots]
    for name, cells in [*columns.items(), *(("ranks", own) for own in ballots)]:
        if not isinstance(cells, list) or len(cells) != k:
            raise UserError(f"{where}: {k} responses, and `{name}` is no list of as many")
        types, told = _CELLS[name]
        if not all(type(cell) in types and (name != "ranks" or cell % 1 == 0) for cell in cells):
            raise UserError(f"{where}: `{name}` holds what is not {told}")
    for own in ballots:
        ranks = dict(zip(texts, own, strict=True))
        if [ranks[text] for text in texts] != own:
            raise UserError(f"{where}: the same response at two ranks")
    cells = zip(texts, columns["sources"], columns["scores"], columns["ended"], strict=True)
    row = {name: cell for name, cell in values.items() if name not in {*REPLACED, *_OURS}}
    return Task(prompt, [Candidate(*own) for own in cells], row), values


def _said(store: Store, task: Task, given: Task, values: dict[str, Any]) -> str:
    """Save a row's ranks as somebody's label; what came of it."""
    texts = [one.text for one in given.candidates]
    at = [texts.index(one.text) for one in task.candidates]
    body = {name: values.get(name) for name in ("seconds", "guideline", "comment")}
    body |= {"ranks": dense_ranks([values["ranks"][i] for i in at])}
    for name in ("overall", "flags"):
        cells = values.get(name)
        body[name] = [cells[i] for i in at] if isinstance(cells, list) else None
    whole = json.dumps([task.key, values], sort_keys=True, default=str)
    uuid = str(
        values.get("id") or hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()
    )
    annotator = store.annotator(str(values.get("annotator") or "imported"))
    number = store.number_of(task)
    newest = store.newest()[1] or 0
    try:
        event = store.save(annotator, number, "label", body, uuid, when=_time(values.get("time")))
    except Conflict:
        return "labels left out, of people who have judged the same otherwise"
    return "labels" if event > newest else "labels that were there"


def _time(value: Any) -> float | None:
    try:
        return (
            float(value)
            if not isinstance(value, str)
            else datetime.fromisoformat(value).timestamp()
        )
    except (TypeError, ValueError):
        return None


# --- out ------------------------------------------------------------------------------------------


def rows(store: Store) -> Iterator[dict[str, Any]]:
    """A row for each person's ranking, in the form that the reward model's stage reads (`pipeline.data.rankings`).

    `ranks` (K, 1 the best), `sources` (K), `annotator`, `time`, `seconds`, `guideline` (its version),
    `overall` (K of 1 to 7 or null), `flags` (K lists), `comment`, `model_scores` (K or null), `probability` that its
    pairs are the right way round, and `strengths` (K): of all people's labels, response i is better than j with
    probability 1 / (1 + exp(s_j - s_i)). Attention checks and what was skipped are left out.
    """
    tasks = {number: task for number, task in store.tasks().items() if task.last is None}
    labels = [one for one in store.labels() if one.kind == "label" and one.task in tasks]
    believed = posterior(labels)
    for label in labels:
        yield _row(tasks[label.task], label, believed)


def _row(task: Task, label: Label, believed: Posterior) -> dict[str, Any]:
    said, every = label.body, task.candidates
    scores = [one.score for one in every]
    return task.row | {
        "prompt": task.prompt,
        "responses": [one.text for one in every],
        "ranks": said["ranks"],
        "sources": [one.source for one in every],
        "ended": [one.ended for one in every],
        "model_scores": None if None in scores else scores,
        "annotator": label.annotator,
        "time": datetime.fromtimestamp(label.time, UTC).isoformat(),
        "id": label.uuid,
        **{name: said.get(name) for name in "seconds guideline overall flags comment".split()},
        "probability": round(believed.probability(label), 4),
        "strengths": [round(strength, 4) for strength in believed.strengths[label.task]],
    }


def exportable(store: Store, path: Path) -> list[dict[str, Any]]:
    """`rows`, for a new file. UserError: there is one already, or nothing to write."""
    if path.exists():
        raise UserError(f"{path}: is there already, and is not overwritten; give another name")
    found = list(rows(store))
    if not found:
        raise UserError(f"{store.path}: nobody has ranked anything yet")
    return found


def export(store: Store, path: Path) -> int:
    """Write what is `exportable`; the number of rows."""
    found = exportable(store, path)
    write_atomically(path, jsonl(found))
    return len(found)


def fill(store: Store, path: Path) -> tuple[int, int]:
    """Put people's ranks into the lines of a `to_rank.jsonl` that have none; lines filled, lines that lack them still.

    The ranks of several people are a list of lists; responses that are all alike tie. Other lines stay as they are,
    to the byte. UserError, and nothing written: a faulty line, or a file that was changed meanwhile.
    """
    labels: dict[int, list[Label]] = {}
    for label in store.labels():
        if label.kind == "label":
            labels.setdefault(label.task, []).append(label)
    by_key = {task.key: (task, labels[n]) for n, task in store.tasks().items() if n in labels}
    file, ranks = Waiting(path), dict[int, list]()
    for at, row in file.rows.items():
        asked, responses = shuffled(_read(row.values, row.where)[0]), row.values["responses"]
        if len(asked.candidates) < 2:  # nobody is asked to compare these
            ranks[at] = [1] * len(responses)
        elif asked.key in by_key:
            task, own = by_key[asked.key]
            texts = [one.text for one in task.candidates]
            order = [texts.index(text) for text in responses]
            several = [[label.body["ranks"][i] for i in order] for label in own]
            ranks[at] = several if len(several) > 1 else several[0]
    file.put(ranks)
    return len(ranks), len(file.rows) - len(ranks)
