"""Every form that comparisons come in, and what is merged, dropped or refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.schema import Data
from pipeline.data.judgements import consensus
from pipeline.data.meaning import STANDARD_COLUMNS
from pipeline.data.rankings import LISTS, dense_ranks, load_rankings
from pipeline.errors import UserError

Q = [{"role": "user", "content": "q"}]
GOOD = {"prompt": "q", "responses": ["x", "y"], "ranks": [1, 2]}


def reply(text):
    return {"role": "assistant", "content": text}


PAIRS = [
    {"prompt": "q", "chosen": "a", "rejected": "b"},
    {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 1.0, "score_rejected": 9.0},
    {"prompt": Q, "chosen": [reply("a")], "rejected": [reply("b")]},
    {"prompt": Q, "chosen": reply("a"), "rejected": reply("b")},
    {"prompt": "q", "chosen": [*Q, reply("a")], "rejected": [*Q, reply("b")]},
    {
        "prompt": "q",
        "messages": [*Q, reply("a")],
        "chosen": [*Q, reply("a")],
        "rejected": [*Q, reply("b")],
    },
    {"chosen": [*Q, reply("a")], "rejected": [*Q, reply("b")]},
    {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    },
    {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
    {"instruction": "q", "chosen": "a", "rejected": "b", "history": [], "system": ""},
    {"prompt": "q", "chosen": "a", "rejected": "b", "responses": None, "ranks": None},
]


@pytest.mark.parametrize(
    ("columns", "cells"),
    [
        ("response_0,response_1,score_0,score_1", "b,a,0.5,7e-1"),
        ("response_1,response_2,overall_preference", "a,b,-1"),
        ("response_1,response_2,preference", "a,b,1.0"),
        ("response_0,response_1,label", "a,b,0.0"),
        ("responses,choice", '"[""b"", ""a""]",1'),
        ("responses,choice", '"[""b"", ""a""]",1.0'),
        ("responses,ranks", '"[""a"", ""b""]","[""1"", "" 2.0""]"'),
        ("responses,scores", '"[""a"", ""b""]","[""-1"", ""-.5e1""]"'),
        (
            "responses",
            '"[{""text"": ""a"", ""rank"": ""1""}, {""text"": ""b"", ""rank"": ""2""}]"',
        ),
    ],
)
def test_a_number_in_a_table_is_one(tmp_path, columns, cells):
    path = tmp_path / "a.csv"
    path.write_text(f"prompt,{columns}\nq,{cells}\n")
    (found,) = load_rankings(Data(path=str(path)))
    assert dict(zip(found.responses, found.ranks, strict=True)) == {"a": 1, "b": 2}


@pytest.mark.parametrize("number", ["", "1e400", "nan", "1_0", "one", "1 2", "٣"])
def test_a_text_that_is_no_finite_number_is_none(number):
    with pytest.raises(UserError, match="`ranks.1.` is"):
        load_rankings([GOOD | {"ranks": [1, number]}])


@pytest.mark.parametrize("row", PAIRS)
def test_a_pair_is_a_ranking_of_two(row):
    (ranking,) = load_rankings([row])
    assert (ranking.messages, ranking.responses, ranking.ranks) == (Q, ["a", "b"], [1, 2])


def talk(answer):
    return [{"role": "user", "content": "q"}, reply(answer)]


VERDICTS = [
    ({"prompt": "q", "response_1": "a", "response_2": "b", "preference": 1}, [1, 2]),
    ({"instruction": "q", "output_1": "a", "output_2": "b", "preference": 2.0}, [2, 1]),
    ({"input": "q", "output_1": "a", "output_2": "b", "label": "2"}, [2, 1]),
    ({"instruction": "q", "input": "", "response1": "a", "response2": "b", "label": 1}, [1, 2]),
    ({"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 0}, [1, 2]),
    ({"prompt": "q", "response_a": "a", "response_b": "b", "winner": "B"}, [2, 1]),
    ({"prompt": "q", "answer_A": "a", "answer_B": "b", "winner": "response_a"}, [1, 2]),
    ({"conversation_a": talk("a"), "conversation_b": talk("b"), "winner": "model_b"}, [2, 1]),
]


PAIR = {"prompt": "q", "response_0": "a", "response_1": "b"}
VERDICTS += [
    ({**PAIR, "better_response_id": 1, "safer_response_id": 0}, [2, 1]),
    ({**PAIR, "safer_response_id": 0}, [1, 2]),
    ({**PAIR, "better": "response_1"}, [2, 1]),
    ({**PAIR, "score_0": 0.5, "score_1": -0.5}, [1, 2]),
    ({"prompt": "q", "answer_a": "a", "answer_b": "b", "winner": "b"}, [2, 1]),
    ({"prompt": "q", "response1": "a", "response2": "b", "overall_preference": -3}, [1, 2]),
    ({"prompt": "q", "response1": "a", "response2": "b", "preference_strength": 1}, [2, 1]),
    ({**PAIR, "preference": [0, 1, 1, None]}, [2, 1]),
    ({**PAIR, "preference": ["tie", 0]}, [1, 2]),
    ({"prompt": "q", "responses": [{"text": "a"}, {"text": "b"}], "choice": 1}, [2, 1]),
    ({"prompt": "q", "responses": ["a", "b"], "choice": [0, 1, 0]}, [1, 2]),
]


@pytest.mark.parametrize(("row", "ranks"), VERDICTS)
def test_two_answers_are_ranked_by_a_verdict(row, ranks):
    (ranking,) = load_rankings([row])
    assert (ranking.messages, ranking.responses, ranking.ranks) == (Q, ["a", "b"], ranks)


@pytest.mark.parametrize("verdict", ["tie", "tie (bothbad)", "Both", "neither", 0, [1, 2]])
def test_a_verdict_may_be_a_tie(verdict):
    notes: list[str] = []
    load_rankings(
        [GOOD, {"prompt": "q", "output_1": "a", "output_2": "b", "label": verdict}], notes
    )
    assert "1 prompts whose responses all tie dropped" in notes[0]


def test_an_answer_that_nobody_judged_is_left_out():
    notes: list[str] = []
    row = {"prompt": "q", "output_1": "a", "output_2": "b"}
    load_rankings(
        [GOOD, row | {"preference": None}, row | {"score_1": None, "score_2": 1.0}], notes
    )
    assert notes[1] == "dataset: 2 prompts with fewer than 2 responses dropped"


# --- several people -------------------------------------------------------------------------------


def test_consensus_goes_by_the_majority_of_each_pair():
    assert consensus([[1, 2, 3], [1, 2, 3], [3, 1, 2]]) == [
        -2,
        0,
        2,
    ]  # mean ranks would tie 0 and 1
    assert consensus([[1, 2, 3], [2, 3, 1], [3, 1, 2]]) == [0, 0, 0]  # a circle says nothing
    assert consensus([[1, 2], [2, 1]]) == [0, 0]
    assert consensus([[1, 1], [1, 2], [1, 1]]) == [-1, 1]  # who ties two does not vote on them
    assert consensus([[1, None, 2], [None, None, 1]]) == [-1, None, 1]


@given(st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=1, max_size=5))
def test_consensus_does_not_depend_on_who_is_asked_first(ballots):
    assert consensus(ballots) == consensus(ballots[::-1])
    turned = consensus([ballot[::-1] for ballot in ballots])
    assert turned == consensus(ballots)[::-1]
    assert dense_ranks(consensus(ballots[:1])) == dense_ranks(ballots[0])


def test_ranks_of_several_people_are_merged():
    ranks = [[1, 2, 3], [1, 2, 3], [3, 1, 2], [None, 1, None]]
    (found,) = load_rankings([{"prompt": "q", "responses": list("abc"), "ranks": ranks}])
    assert (found.responses, found.ranks) == (list("abc"), [1, 2, 3])


def test_rows_of_several_people_are_merged_by_majority_when_asked(tmp_path):
    notes: list[str] = []
    rows = [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "other", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "b", "rejected": "a"},
        {"prompt": "q", "responses": ["b", "a"], "ranks": [2, 1]},
        {"prompt": "q", "responses": ["a", "b", "c"], "ranks": [2, 1, 3]},  # another question
        {"prompt": "split", "chosen": "a", "rejected": "b"},
        {"prompt": "split", "chosen": "b", "rejected": "a"},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert len(load_rankings(Data(path=str(tmp_path / "a.jsonl")))) == 7
    found = load_rankings(Data(path=str(tmp_path / "a.jsonl"), votes="majority"), notes)
    assert [
        (r.messages[0]["content"], dict(zip(r.responses, r.ranks, strict=True))) for r in found
    ] == [
        ("q", {"a": 1, "b": 2}),
        ("other", {"a": 1, "b": 2}),
        ("q", {"a": 2, "b": 1, "c": 3}),
    ]
    assert [note.partition("a.jsonl: ")[2] for note in notes] == [
        "5 rankings of the same responses merged by majority",
        "1 prompts whose responses all tie dropped",
    ]


# --- answers judged alone -------------------------------------------------------------------------


def alone(answer, label, prompt="q"):
    return {"prompt": prompt, "completion": answer, "label": label}


def test_answers_labelled_alone_are_compared_where_a_prompt_has_both_kinds():
    notes: list[str] = []
    rows = [
        alone("a", True),
        alone("x", True, "only good"),
        alone("b", False),
        {"messages": [*Q, reply("c")], "label": 0},
        alone("d", "good"),
        alone("e", True),
        alone("e", False),
        GOOD | {"prompt": "r"},
    ]
    other, found = load_rankings(rows, notes)
    assert other.responses == ["x", "y"]
    assert dict(zip(found.responses, found.ranks, strict=True)) == {"a": 1, "d": 1, "b": 2, "c": 2}
    assert found.messages == Q and found.where == "dataset: row 1"
    assert "dataset: 1 answers labelled both ways equally often left out" in notes
    with pytest.raises(
        UserError, match="nothing to use in 1 rows .1 prompts whose answers are all lab"
    ):
        load_rankings(rows[:1])


@pytest.mark.parametrize(("good", "bad"), [(12, 12), (1, 12), (12, 1), (5, 5)])
def test_of_many_labelled_answers_nine_are_compared(good, bad):
    rows = [alone(f"a{n}", True) for n in range(good)] + [alone(f"b{n}", False) for n in range(bad)]
    (found,) = load_rankings(rows)
    assert len(found.ranks) == 9 and set(found.ranks) == {1, 2}


def test_transcripts_split_at_the_last_assistant():
    start = "\n\nHuman: q\n\nAssistant: Ask.\n\nHuman: r?"
    row = {"chosen": f"{start}\n\nAssistant: a\n\nb", "rejected": f"{start}\n\nAssistant:"}
    (ranking,) = load_rankings([row])
    assert [message["content"] for message in ranking.messages] == ["q", "Ask.", "r?"]
    assert ranking.responses == ["a\n\nb", ""]


def test_a_transcript_keeps_the_system_message_of_its_prompt():
    row = {"prompt": "q", "system": "s", "chosen": [*Q, reply("a")], "rejected": [*Q, reply("b")]}
    assert load_rankings([row])[0].messages == [{"role": "system", "content": "s"}, *Q]


LISTED = [
    {"prompt": "q", "responses": ["a", "b", "c"], "ranks": [2, 1, 3]},
    {"prompt": "q", "responses": ["a", "b", "c"], "ranks": [1.0, 0.0, 2.0]},
    {"prompt": "q", "responses": ["a", "b", "c"], "ranks": [5, 2, 9]},
    {"prompt": "q", "responses": ["a", "b", "c"], "ranks": [2, 1, 3], "scores": [9, 0, 10]},
    {
        "prompt": [{"role": "prompter", "content": "q"}],
        "responses": list("abc"),
        "ranks": [1, 0, 2],
    },
    {"prompt": "q", "completions": ["a", "b", "c"], "scores": [0.5, 1, -2]},
    {"prompt": "q", "responses": [[reply("a")], reply("b"), "c"], "scores": [3, 4, 0]},
    {
        "instruction": "q",
        "completions": [
            {"response": "a", "overall_score": 7.5, "model": "m"},
            {"response": "b", "overall_score": 8.0, "model": "n"},
            {"response": "c", "overall_score": 1.0, "model": "o"},
        ],
    },
    {
        "prompt": "\n\nHuman: q\n\nAssistant: ",
        "answers": [
            {"answer": "a", "rank": 2.0},
            {"answer": "b", "rank": 1.0},
            {"answer": "c", "rank": 3.0},
        ],
    },
    {"messages": [*Q, reply("z")], "responses": ["a", "b", "c"], "ranks": [2, 1, 3]},
]


@pytest.mark.parametrize("row", LISTED)
def test_a_list_is_ranked_by_ranks_or_scores(row):
    (ranking,) = load_rankings([row])
    assert ranking.messages == Q
    assert dict(zip(ranking.responses, ranking.ranks, strict=True)) == {"a": 2, "b": 1, "c": 3}


def test_two_to_nine_responses_mix_in_one_source():
    rows = [
        {"prompt": "q", "responses": [str(n) for n in range(k)], "ranks": list(range(k))}
        for k in range(2, 10)
    ]
    assert [len(ranking.responses) for ranking in load_rankings(rows)] == list(range(2, 10))


def test_ties_stay_ties():
    (ranking,) = load_rankings([{"prompt": "q", "responses": list("abcd"), "ranks": [1, 1, 3, 3]}])
    assert ranking.ranks == [1, 1, 2, 2]


def test_an_empty_reply_can_be_ranked():
    assert load_rankings([{"prompt": "q", "chosen": "a", "rejected": ""}])[0].responses == ["a", ""]


def test_what_compares_nothing_is_dropped_and_counted():
    notes = []
    rows = [
        GOOD,
        {"prompt": "q", "responses": ["a", "a", "b"], "ranks": [1, 1, 2]},
        {"prompt": "q", "responses": ["a", "b", "c"], "ranks": [1, None, 2]},
        {"prompt": "q", "responses": ["a", "b"], "ranks": [1, 1]},
        {"prompt": "q", "responses": ["a", "a"], "ranks": [1, 1]},
        {"prompt": "q", "responses": ["a"], "ranks": [1]},
        {"prompt": "q", "responses": [], "scores": []},
        {
            "prompt": "q",
            "completions": [{"response": "a", "score": 1}, {"response": "b", "score": None}],
        },
    ]
    kept = load_rankings(rows, notes)
    assert [ranking.responses for ranking in kept] == [["x", "y"], ["a", "b"], ["a", "c"]]
    assert sorted(notes) == [
        "dataset: 1 prompts whose responses all tie dropped",
        "dataset: 2 identical responses of equal rank merged",
        "dataset: 2 responses without a rank left out",
        "dataset: 4 prompts with fewer than 2 responses dropped",
    ]


def test_nine_are_left_of_ten_with_a_duplicate():
    row = {"prompt": "q", "responses": [*"abcdefghi", "a"], "ranks": [*range(9), 0]}
    assert len(load_rankings([row])[0].responses) == 9


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"prompt": "q", "responses": list("abcdefghij"), "ranks": list(range(10))},
            "10 responses; at most 9",
        ),
        (
            {"prompt": "q", "responses": ["a", "a"], "ranks": [1, 2]},
            "the same response at two ranks: 'a'",
        ),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "the same response at two ranks"),
        ({"prompt": "q", "responses": ["a", "b"], "ranks": [1]}, "2 `responses` but 1 `ranks`"),
        (
            {"prompt": "q", "responses": ["a", "b"], "scores": [1, 2, 3]},
            "2 `responses` but 3 `scores`",
        ),
        ({"prompt": "q", "responses": ["a", "b"], "ranks": 1}, "`ranks` is a number"),
        ({"prompt": "q", "responses": "ab", "ranks": [1, 2]}, "`responses` is a text"),
        ({"prompt": "q", "responses": ["a", "b"], "ranks": [1, True]}, "`ranks[1]` is a boolean"),
        ({"prompt": "q", "responses": ["a", "b"], "ranks": [1, "2nd"]}, "`ranks[1]` is a text"),
        ({"prompt": "q", "responses": ["a", "b"], "ranks": [1, 1.5]}, "ranks are whole numbers"),
        ({"prompt": "q", "responses": ["a", "b"], "ranks": [-1, 1]}, "ranks are whole numbers"),
        ({"prompt": "q", "responses": ["a", "b"], "ranks": [1, float("nan")]}, "`ranks[1]` is nan"),
        (
            {"prompt": "q", "responses": ["a", "b"], "scores": [1, float("inf")]},
            "`scores[1]` is inf",
        ),
        (
            {"prompt": "q", "responses": ["a", False], "ranks": [1, 2]},
            "`responses[1]` is a boolean",
        ),
        ({"prompt": "q", "responses": ["a", None], "ranks": [1, 2]}, "`responses[1]` is null"),
        ({"prompt": "q", "responses": ["a", "b"]}, "`responses` without an order"),
        ({"prompt": "q", "responses": ["a", "b"], "rank": [1, 2]}, "is `rank` meant?"),
        ({"responses": ["a", "b"], "ranks": [1, 2]}, "no prompt beside `responses`"),
        ({"prompt": " ", "responses": ["a", "b"], "ranks": [1, 2]}, "the prompt is empty"),
        ({"prompt": "q"}, "no comparison"),
        ({"prompt": "q", "completion": 1, "label": True}, "`completion` is a number"),
        (
            {"prompt": "q", "completion": "a", "label": "meh"},
            "`label` is 'meh'; known are true (1, 1.0, +1, yes, good, chosen, desirable, up, like, thumbs_up)",
        ),
        ({"prompt": "q", "responses": ["a", "b"], "choice": 2}, "`choice` is 2; the 2 responses"),
        ({"prompt": "q", "responses": ["a", "b"], "choice": True}, "`choice` is True"),
        ({"prompt": "q", "responses": ["a", "b"], "ranks": [[1, 2], [1]]}, "2 `responses` but 1"),
        ({"prompt": "q", "responses": ["a", "b"], "ranks": [[1, 2], 3]}, "but not a list of"),
        (
            {"prompt": "q", "output_1": "a", "output_2": "b", "overall_preference": "a"},
            "`overall_preference` is a text",
        ),
        (
            {"prompt": "q", "output_1": "a", "output_2": "b"},
            "without a verdict: none of preference",
        ),
        ({"prompt": "q", "output_1": "a", "output_2": "b", "label": 3}, "`label` is 3, not 1, 2"),
        ({"prompt": "q", "output_1": "a", "output_2": "b", "label": True}, "`label` is True"),
        (
            {"prompt": "q", "answers": [{"answer": "a"}, {"answer": "b"}]},
            "`answers[0]` has neither rank",
        ),
        ({"prompt": "q", "answers": [{"rank": 1}, {"rank": 2}]}, "`answers[0]` has no text"),
        ({"prompt": "q", "chosen": "a"}, "no rejected"),
        ({"prompt": "q", "rejected": "a", "chosen": None}, "`chosen` is null"),
        ({"prompt": "q", "chosen": "a", "rejected": True}, "`rejected` is a boolean"),
        ({"chosen": "a", "rejected": "b"}, "no prompt: `chosen` and `rejected`"),
        ({"prompt": "q", "chosen": Q, "rejected": "b"}, "`chosen` does not end in an assistant"),
        (
            {"prompt": "z", "chosen": [*Q, reply("a")], "rejected": [*Q, reply("b")]},
            "`chosen` is a conversation that does not begin with the prompt",
        ),
        (
            {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: r\n\nAssistant: b"},
            "do not share a prompt",
        ),
        (
            {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "b"},
            "do not share a prompt",
        ),
    ],
)
def test_what_is_no_ranking(row, reason):
    with pytest.raises(UserError) as error:
        load_rankings([GOOD, row])
    assert str(error.value).startswith("dataset: row 2: ")
    assert reason in str(error.value)


def test_what_was_dropped_is_printed_where_nobody_takes_the_notes(capsys):
    load_rankings([GOOD, {"prompt": "q", "responses": ["a"], "ranks": [1]}])
    assert capsys.readouterr().out == "dataset: 1 prompts with fewer than 2 responses dropped\n"


def test_nothing_left_is_an_error_that_says_why():
    with pytest.raises(UserError, match="1 prompts whose responses all tie dropped"):
        load_rankings([{"prompt": "q", "responses": ["a", "b"], "ranks": [0, 0]}])


@given(st.lists(st.integers(-5, 5), min_size=2, max_size=9).filter(lambda s: len(set(s)) > 1))
def test_ranks_from_scores_keep_order_and_ties(scores):
    responses = [f"response {n}" for n in range(len(scores))]
    (ranking,) = load_rankings([{"prompt": "q", "responses": responses, "scores": scores}])
    assert set(ranking.ranks) == set(range(1, len(set(scores)) + 1))
    for a, rank_a in zip(scores, ranking.ranks, strict=True):
        for b, rank_b in zip(scores, ranking.ranks, strict=True):
            assert (a > b) == (rank_a < rank_b)


@given(st.lists(st.integers(0, 9), min_size=1), st.integers(0, 1))
def test_dense_ranks_do_not_depend_on_the_first_rank(ranks, shift):
    assert dense_ranks([rank + shift for rank in ranks]) == dense_ranks(ranks)


def test_every_column_that_is_read_can_be_mapped():
    assert {*LISTS, "chosen", "rejected", "ranks", "scores", "preference"} <= STANDARD_COLUMNS


def test_a_ranked_list_counts_before_a_pair_beside_it():
    row = {
        "prompt": "p",
        "responses": ["a", "b", "c"],
        "ranks": [2, 1, 3],
        "chosen": "c",
        "rejected": "b",
    }
    [found] = load_rankings([row, {**row, "prompt": "q"}])[:1]
    assert (found.responses, found.ranks) == (["a", "b", "c"], [2, 1, 3])


def test_a_number_beyond_every_float_is_a_bad_row():
    with pytest.raises(UserError, match=r"row 1: `scores\[0\]` is too large, not a finite number"):
        load_rankings([{"prompt": "p", "responses": ["a", "b"], "scores": [10**400, 1]}])
