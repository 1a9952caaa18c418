"""Trees of messages, flat and nested, as conversations, prompts and rankings."""

import json
import random

import pandas
import pytest

from pipeline.config.schema import Data
from pipeline.data.forms import load_demonstrations, load_prompts, load_texts
from pipeline.data.rankings import load_rankings
from pipeline.errors import UserError


def said(name, parent, text, rank=None, **more):
    role = "prompter" if text.startswith("q") else "assistant"
    row = {"message_id": name, "parent_id": parent, "text": text, "role": role, "rank": rank}
    return row | {"lang": "en", "deleted": False, "tree_state": "ready_for_export"} | more


# q1 -> a1 (rank 1), a2 (rank 0) -> q2 (rank 1) -> a4
#                                 -> q3 (rank 0) -> a5 (1), a6 (2), a7 (0), a8 (none)
FLAT = [
    said("r", None, "q1"),
    said("1", "r", "a1", 1),
    said("2", "r", "a2", 0.0),
    said("3", "2", "q2", 1),
    said("4", "3", "a4"),
    said("5", "2", "q3", 0),
    said("6", "5", "a5", 1),
    said("7", "5", "a6", 2),
    said("8", "5", "a7", 0),
    said("9", "5", "a8", None),
]


def nested(rows):
    """The same as one object."""
    by_name = {row["message_id"]: {**row, "replies": []} for row in rows}
    for row in by_name.values():
        if row["parent_id"]:
            by_name[row["parent_id"]]["replies"].append(row)
    return [{"message_tree_id": "r", "tree_state": "ready_for_export", "prompt": by_name["r"]}]


FORMS = pytest.mark.parametrize(
    "rows", [FLAT, FLAT[::-1], nested(FLAT)], ids=["flat", "back", "nested"]
)


def words(messages):
    return [m["content"] for m in messages]


@FORMS
def test_a_tree_is_one_conversation_along_its_best_answers(rows):
    (item,) = load_demonstrations(rows)
    assert words(item.messages) == ["q1", "a2", "q3", "a7"]
    assert [m["role"] for m in item.messages] == ["user", "assistant"] * 2
    assert load_texts(rows) == ["User: q1\n\nAssistant: a2\n\nUser: q3\n\nAssistant: a7"]


@FORMS
def test_siblings_are_ranked_and_those_without_a_rank_left_out(rows):
    notes = []
    found = {r.messages[-1]["content"]: r for r in load_rankings(rows, notes)}
    assert words(found["q3"].messages) == ["q1", "a2", "q3"]
    ranks = {q: dict(zip(r.responses, r.ranks, strict=True)) for q, r in found.items()}
    assert ranks == {"q1": {"a2": 1, "a1": 2}, "q3": {"a7": 1, "a5": 2, "a6": 3}}
    assert "dataset: 2 responses without a rank left out" in notes


@FORMS
def test_every_message_of_a_user_is_a_prompt(rows):
    found = load_prompts(rows)
    assert sorted(words(p.messages)[-1] for p in found) == ["q1", "q2", "q3"]
    assert found[0].row["lang"] == "en"  # for reward functions


def test_what_moderators_took_out_goes_with_its_answers():
    rows = [row | {"deleted": row["message_id"] == "2"} for row in FLAT]
    for form in (rows, nested(rows)):
        notes = []
        (item,) = load_demonstrations(form, notes)
        assert words(item.messages) == ["q1", "a1"]
        assert "1 messages that moderators took out" in notes[0]
    halted = [row | {"tree_state": "halted_by_moderator"} for row in FLAT]
    with pytest.raises(UserError, match="nothing to use in 10 rows"):
        load_prompts(halted)


@pytest.mark.parametrize(("ending", "separator"), [("csv", ","), ("tsv", "\t")])
def test_cells_of_a_table_mean_what_the_same_tree_says_in_json(tmp_path, ending, separator):
    rows = [row | {"review_result": None} for row in FLAT]
    rows[1] |= {"deleted": "false", "review_result": "TRUE"}
    rows.append(said("10", "r", "a9", 0) | {"deleted": True, "review_result": None})
    rows.append(said("11", "r", "a10", 0) | {"review_result": False})
    path = tmp_path / f"trees.{ending}"
    pandas.DataFrame(rows).to_csv(path, sep=separator, index=False)
    assert "1.0" in path.read_text() and "True" in path.read_text()
    notes = []
    (item,) = load_demonstrations(Data(path=str(path)), notes)
    assert words(item.messages) == ["q1", "a2", "q3", "a7"]
    assert "2 messages that moderators took out" in notes[0]
    found = {r.messages[-1]["content"]: r for r in load_rankings(Data(path=str(path)))}
    assert found["q1"].responses == ["a2", "a1"]
    assert found["q3"].responses == ["a7", "a5", "a6"]


def test_unranked_and_ill_ranked_messages():
    for empty in (None, ""):
        rows = [FLAT[0], said("1", "r", "a1", empty), said("2", "r", "a2", "0")]
        assert words(load_demonstrations(rows)[0].messages) == ["q1", "a2"]
    for rank in ("first", "nan", True, [1]):
        rows = [FLAT[0], said("1", "r", "a1", rank), said("2", "r", "a2", 0)]
        with pytest.raises(UserError, match="row 2: `rank` is a .*expected a number"):
            load_demonstrations(rows)
        with pytest.raises(UserError, match="row 1: `rank` is a .*expected a number"):
            load_demonstrations(nested(rows))


def test_trees_lie_in_any_order_and_beside_other_rows(tmp_path):
    other = [
        {**row, "text": row["text"] + "'", "message_id": row["message_id"] + "'"} for row in FLAT
    ]
    other = [row | {"parent_id": row["parent_id"] and row["parent_id"] + "'"} for row in other]
    rows = [*FLAT, *other]
    random.Random(0).shuffle(rows)
    rows.append({"prompt": "q", "completion": "a"})
    path = tmp_path / "trees.jsonl"
    path.write_text("\ufeff" + "\r\n".join(json.dumps(row) for row in rows))
    found = load_demonstrations(Data(path=str(path)))
    assert sorted(words(item.messages) for item in found) == [
        ["q", "a"],
        ["q1", "a2", "q3", "a7"],
        ["q1'", "a2'", "q3'", "a7'"],
    ]


def test_no_more_answers_than_can_be_ranked():
    rows = [said("r", None, "q"), *(said(str(n), "r", f"a{n}", n) for n in range(12))]
    (found,) = load_rankings(rows)
    assert found.responses == [f"a{n}" for n in range(9)]


def test_odd_messages_are_named():
    cycle = [said("x", "y", "a"), said("y", "x", "q")]  # hangs from nothing
    notes = []
    assert len(load_prompts([*FLAT, *cycle, said("z", "gone", "a")], notes)) == 3
    assert "1 messages left out: what they answer is not among the rows" in notes[0]
    for rows, reason in [
        ([FLAT[0], FLAT[0]], "dataset: row 2: `message_id` r is also dataset: row 1"),
        (
            [FLAT[0], said("1", "r", "a") | {"text": None}],
            "row 2: .*`messages.*null|row 2: .*content",
        ),
        ([FLAT[0], said("1", "r", "a") | {"role": "wizard"}], "row 2: .*unknown role 'wizard'"),
        (
            [{"prompt": {"text": "q", "role": "prompter", "replies": [3]}}],
            "row 1: `replies` is not",
        ),
        ([{"prompt": {"text": "q", "replies": []}}], "row 1: a message of the tree has no"),
    ]:
        with pytest.raises(UserError, match=reason):
            load_demonstrations(rows)
