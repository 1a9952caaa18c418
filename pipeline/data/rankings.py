"""Rows of comparisons -> rankings of K responses to one prompt, 2 <= K <= 9, rank 1 the best.

    pairs          chosen, rejected beside a prompt (texts, messages or whole transcripts), or
                   alone as HH's two transcripts
    verdicts       two answers whose names differ at the end (response_1 and _2, output_a and _b,
                   response_0 and _1, ...) and a column that names the better one by that end, or a
                   signed preference, or a score of each (score_0 and _1)
    labels         answers labelled true or false one by one: compared where a prompt has both
    ranked lists   responses, completions or answers with `ranks` (lower is better, ties allowed; several
                   lists of ranks, one of each person)
    scored lists   the same with `scores` (higher is better), or with the `choice` of the best, from 0
    candidates     lists of objects with their own response/answer/text/content and
                   rank/overall_score/score, as UltraFeedback and Nectar have them
    trees          the answers to each message of a user: see `pipeline.data.trees`

The prompt stands in any of the columns of `pipeline.data.forms`. Where ranks and scores are both
there, ranks count. A response whose rank or score is null was not judged and is left out.
"""

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.data import trees
from pipeline.data.forms import (
    check_prompt,
    find_prompt,
    first_of,
    load,
    without_reply,
)
from pipeline.data.judgements import LISTS, consensus, paired
from pipeline.data.meaning import TWO, as_number, missing, number_of, two_answers, unknown_label
from pipeline.data.messages import Message, complete, list_of
from pipeline.data.problems import BadRow, Report
from pipeline.data.readers import Row
from pipeline.errors import UserError

MAX_K = trees.MOST
TEXTS = ("response", "answer", "text", "content")
RANKS = ("rank",)
SCORES = ("overall_score", "score")


@dataclass(slots=True)
class Ranking:
    """K different responses to one prompt; ranks are 1, 2, ... without gaps, equal ones tie."""

    messages: list[Message]
    responses: list[str]
    ranks: list[int]
    where: str
    row: dict[str, Any] = field(default_factory=dict)
    """For judges."""
    source: str = ""
    """Of several that are mixed."""


def load_rankings(source: Any, notes: list[str] | None = None, seed: int = 0) -> Sequence[Ranking]:
    """Rankings of a schema.Data or an in-memory dataset.

    Equal responses of equal rank are merged; groups left with one response or with nothing but
    ties are dropped; both are counted, in `notes` or printed. UserError: the first 20 rows that are
    malformed, contradict themselves (the same response at two ranks) or have more than 9 responses.
    """

    def ranked(row: Row, report: Report) -> Ranking | None:
        return ranking(row.values, row.where, report)

    def gathered(rows: Iterable[Row], report: Report) -> Iterator[Row]:
        return paired(trees.grown(trees.rankings, rows, report), report)

    return load(source, notes, seed, ranked, gathered, agreed)


def agreed(rankings: Sequence[Ranking], report: Report) -> list[Ranking]:
    """Several rankings of the same responses to one prompt, as by several people, made one by majority."""
    same: dict[Any, list[Ranking]] = {}
    for ranking in rankings:
        prompt = json.dumps(ranking.messages)
        same.setdefault((prompt, frozenset(ranking.responses)), []).append(ranking)
    report.count(
        "rankings of the same responses merged by majority",
        sum(len(several) for several in same.values() if len(several) > 1),
    )
    merged = []
    for first, *others in same.values():
        if others:
            by_response = [dict(zip(r.responses, r.ranks, strict=True)) for r in (first, *others)]
            places = consensus([[ranks[text] for text in first.responses] for ranks in by_response])
            if len(set(places)) == 1:
                report.count("prompts whose responses all tie dropped")
                continue
            first.ranks = dense_ranks([place for place in places if place is not None])
        merged.append(first)
    return merged


def strengths(ranking: Ranking) -> dict[str, float]:
    """Response -> its strength, of a row that has `strengths`; UserError with its line without them."""
    own, texts = ranking.row.get("strengths"), ranking.row.get("responses")
    fit = isinstance(own, list) and isinstance(texts, list) and len(own) == len(texts)
    fit = fit and all(isinstance(s, int | float) and math.isfinite(s) for s in own or ())
    found = dict(zip(map(str, texts or ()), map(float, own or ()), strict=True)) if fit else {}
    if not found.keys() >= set(ranking.responses):
        raise UserError(
            f"{ranking.where}: soft_labels: no `strengths`, a number for each of `responses`, which are texts; "
            "exports of `make label` have them"
        )
    return {text: found[text] for text in ranking.responses}


def label_noise(rankings: Sequence[Ranking]) -> dict[str, float]:
    """How often two people's rankings of the same two responses contradict each other: `labels_repeated` (pairs of
    verdicts that both prefer something) and `labels_contradict` (their share); {} without a repeat."""
    times: Counter[int] = Counter()
    for ranking in rankings:
        times[hash(json.dumps(ranking.messages))] += 1
    said: dict[tuple[int, str, str], list[int]] = {}
    for ranking in rankings:
        prompt, people = hash(json.dumps(ranking.messages)), _people(ranking)
        if times[prompt] > 1 or len(people) > 1:
            for ranked in people:
                for (a, first), (b, second) in itertools.combinations(sorted(ranked.items()), 2):
                    if first != second:
                        said.setdefault((prompt, a, b), []).append(first < second)
    both = [(sum(votes), len(votes)) for votes in said.values()]
    pairs = sum(math.comb(n, 2) for _, n in both)
    against = sum(one * (n - one) for one, n in both)
    return {"labels_repeated": pairs, "labels_contradict": against / pairs} if pairs else {}


def _people(ranking: Ranking) -> list[dict[str, float]]:
    """Response -> place, of each person whose ranks the row has."""
    row = ranking.row
    name = first_of(row, LISTS)
    ballots = _ballots(row, name, "ranks") if name and first_of(row, ("ranks",)) else []
    if len(ballots) < 2:
        return [dict(zip(ranking.responses, ranking.ranks, strict=True))]
    texts = [conversation[-1]["content"] for conversation in _list(row)[0]]
    named = [zip(texts, ballot, strict=True) for ballot in ballots]
    return [{text: place for text, place in own if place is not None} for own in named]


def ranking(values: dict[str, Any], where: str, report: Report) -> Ranking | None:
    """One row's ranking, or None (counted in the report) if it compares nothing."""
    ordered = first_of(values, LISTS) and first_of(values, ("ranks", "scores"))
    read = _pair if first_of(values, ("chosen", "rejected")) and not ordered else _list
    conversations, places = (None if ordered else _verdict(values)) or read(values)
    prompts = [conversation[:-1] for conversation in conversations]
    if any(prompt != prompts[0] for prompt in prompts):
        raise BadRow("the responses do not share a prompt")
    judged = [(c, p) for c, p in zip(conversations, places, strict=True) if p is not None]
    report.count("responses without a rank left out", len(places) - len(judged))
    merged = _merge([(c[-1]["content"], p) for c, p in judged])
    report.count("identical responses of equal rank merged", len(judged) - len(merged))
    if prompts:
        check_prompt(prompts[0])
    if len(merged) > MAX_K:
        raise BadRow(f"{len(merged)} responses; at most {MAX_K} can be ranked")
    if len(merged) < 2:
        report.count("prompts with fewer than 2 responses dropped")
        return None
    if len(set(merged.values())) == 1:
        report.count("prompts whose responses all tie dropped")
        return None
    return Ranking(prompts[0], list(merged), dense_ranks(list(merged.values())), where, values)


def dense_ranks(places: Sequence[float]) -> list[int]:
    """Ranks 1, 2, ... without gaps, the smallest place first; equal places share a rank."""
    order = {place: rank for rank, place in enumerate(sorted(set(places)), 1)}
    return [order[place] for place in places]


def _merge(judged: list[tuple[str, float]]) -> dict[str, float]:
    merged: dict[str, float] = {}
    for response, place in judged:
        if merged.setdefault(response, place) != place:
            shown = response if len(response) <= 40 else response[:40] + "..."
            raise BadRow(f"the same response at two ranks: {shown!r}")
    return merged


# --- pairs ----------------------------------------------------------------------------------------


def _pair(values: dict[str, Any]) -> tuple[list[list[Message]], list[float | None]]:
    for name in ("chosen", "rejected"):
        if values.get(name) is None:
            raise BadRow(missing(values, [name]))
    before = without_reply(find_prompt(values) or [])
    pair = [complete(before, values[name], name) for name in ("chosen", "rejected")]
    if len(pair[0]) == 1:
        raise BadRow("no prompt: `chosen` and `rejected` are not transcripts and no column has it")
    if pair[0][:-1] != pair[1][:-1]:
        raise BadRow("`chosen` and `rejected` do not share a prompt")
    return pair, [1, 2]


# --- two answers and a verdict --------------------------------------------------------------------

VERDICTS = ("preference", "winner", "better", "label", "better_response_id", "safer_response_id")
SIGNED = ("overall_preference", "preference_strength")
"""Below 0: the first answer; above: the second."""
_TIES = ("tie", "both", "draw", "equal", "neither")


def _verdict(values: dict[str, Any]) -> tuple[list[list[Message]], list[float | None]] | None:
    """AlpacaEval's, LLMBar's, PandaLM's, PKU-SafeRLHF's, HelpSteer's, WebGPT's and the Chatbot Arena's
    rows. A verdict may be a list, one of each person; without any the row was not judged."""
    names = two_answers(values)
    columns = (*VERDICTS, *SIGNED)
    column = first_of(values, columns)
    if names is None or (column is None and first_of(values, ("chosen", *LISTS))):
        return None
    ends = TWO[names]
    places: list[float | None]
    if column is not None:
        said = values[column]
        votes = said if isinstance(said, list | tuple) else [said]
        places = consensus([_places_of(vote, column, ends) for vote in votes or [None]])
    elif scores := [name for dash in ("_", "") if (name := f"score{dash}{ends[0]}") in values]:
        other = scores[0].removesuffix(ends[0]) + ends[1]
        places = [_score(values.get(name), name) for name in (scores[0], other)]
    elif any(name in values for name in columns):
        places = [None, None]
    else:
        told = missing(values, columns)
        raise BadRow(f"`{names[0]}` and `{names[1]}` without a verdict: {told}")
    before = without_reply(find_prompt(values) or [])
    return [complete(before, values[name], name) for name in names], places


def _places_of(verdict: Any, column: str, ends: tuple[str, ...]) -> list[float | None]:
    """1 and 2 or 2 and 1; equal for a tie: a word for it, or 0 where the answers are 1 and 2."""
    if verdict is None:
        return [None, None]
    if column in SIGNED:
        sign = number_of(verdict, column) or 0.0
        return [sign, -sign]
    said = as_number(verdict)
    said = str(int(said) if isinstance(said, float) and said.is_integer() else said).strip().lower()
    if said.startswith(_TIES) or (said == "0" and "0" not in ends):
        return [1, 1]
    end = said.rpartition("_")[2]  # model_a
    if end not in ends or isinstance(verdict, bool):
        raise BadRow(f"`{column}` is {verdict!r}, not {ends[0]}, {ends[1]} or tie")
    return [1, 2] if end == ends[0] else [2, 1]


# --- lists ----------------------------------------------------------------------------------------


def _list(values: dict[str, Any]) -> tuple[list[list[Message]], list[float | None]]:
    name = first_of(values, LISTS)
    if name is None:
        told = unknown_label(values) or missing(values, ["chosen", *LISTS])
        raise BadRow(f"no comparison: {told}")
    items = list_of(values[name], name)
    before = without_reply(find_prompt(values) or [])
    if not before:
        raise BadRow(
            f"no prompt beside `{name}`: {missing(values, ['prompt', 'messages', 'instruction'])}"
        )
    places = _places(values, name, items)
    texts = [_candidate_text(item, f"{name}[{at}]") for at, item in enumerate(items)]
    return [complete(before, text, f"{name}[{at}]") for at, text in enumerate(texts)], places


def _candidate_text(item: Any, name: str) -> Any:
    """A candidate's response: itself, or the cell of an object that holds it."""
    if not isinstance(item, dict) or "role" in item or "from" in item:
        return item
    column = first_of(item, TEXTS)
    if column is None:
        raise BadRow(f"`{name}` has no text: {missing(item, TEXTS)}")
    return item[column]


def _places(values: dict[str, Any], name: str, items: Sequence[Any]) -> list[float | None]:
    """A place per candidate, lower = better; None where it was not judged."""
    column = first_of(values, ("ranks", "scores"))
    if column is not None:
        ballots = _ballots(values, name, column)
        return consensus(ballots) if len(ballots) > 1 else ballots[0]
    if values.get("choice") is not None:
        return _chosen(values["choice"], len(items))
    if not all(isinstance(item, dict) for item in items):
        raise BadRow(f"`{name}` without an order: {missing(values, ['ranks', 'scores', 'choice'])}")
    if any(name in item for item in items for name in RANKS):
        return [_rank(item.get("rank"), f"{name}[{at}].rank") for at, item in enumerate(items)]
    places = []
    for at, item in enumerate(items):
        column = next((key for key in SCORES if key in item), None)
        if column is None:
            raise BadRow(f"`{name}[{at}]` has neither {', '.join((*RANKS, *SCORES))}")
        places.append(_score(item[column], f"{name}[{at}].{column}"))
    return places


def _ballots(values: dict[str, Any], name: str, column: str) -> list[list[float | None]]:
    """The places that each person gave the candidates in column `name`."""
    cells, number = list_of(values[column], column), len(list_of(values[name], name))
    read = _rank if column == "ranks" else _score
    people = cells if column == "ranks" and cells and isinstance(cells[0], list) else [cells]
    for own in people:
        if not isinstance(own, list) or len(own) != number:
            told = len(own) if isinstance(own, list) else "not a list of"
            raise BadRow(f"{number} `{name}` but {told} `{column}`")
    return [[read(cell, f"{column}[{at}]") for at, cell in enumerate(own)] for own in people]


def _chosen(choice: Any, number: int) -> list[float | None]:
    """Places when one response, counted from 0, was said to be the best; or several people said so."""
    votes = [as_number(vote) for vote in (choice if isinstance(choice, list) else [choice])]
    for vote in votes:
        if isinstance(vote, bool) or vote not in range(number):
            raise BadRow(f"`choice` is {vote!r}; the {number} responses are counted from 0")
    return [-float(votes.count(at)) for at in range(number)]


def _rank(value: Any, name: str) -> float | None:
    """A rank counted from 0 or 1, as an int or a float without a fraction."""
    rank = number_of(value, name)
    if rank is not None and (rank < 0 or rank != int(rank)):
        raise BadRow(f"`{name}` is {value}; ranks are whole numbers from 0 or 1, 1 before 2")
    return rank


def _score(value: Any, name: str) -> float | None:
    score = number_of(value, name)
    return None if score is None else -score
