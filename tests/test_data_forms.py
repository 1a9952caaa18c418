"""Every form that demonstrations, prompts and texts come in."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.schema import Data
from pipeline.data.forms import (
    PROMPTS,
    REPLIES,
    Demonstration,
    Prompt,
    load_demonstrations,
    load_prompts,
    load_texts,
)
from pipeline.data.meaning import STANDARD_COLUMNS
from pipeline.data.rankings import load_rankings
from pipeline.data.splits import split_by_prompt
from pipeline.errors import UserError


def turns(*contents, system=None):
    """user, assistant, user, ... with an optional system message before them."""
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def sharegpt(*contents):
    roles = ["human", "gpt"] * len(contents)
    return [{"from": r, "value": c} for r, c in zip(roles, contents, strict=False)]


PREAMBLE = "Below is an instruction that describes a task. Write a response.\n\n"

DEMONSTRATIONS = [
    ({"instruction": "q", "output": "a"}, turns("q", "a")),
    ({"instruction": "q", "input": None, "output": "a"}, turns("q", "a")),
    ({"instruction": "q", "input": "x", "output": "a", "text": "?"}, turns("q\nx", "a")),
    ({"instruction": "", "input": "x", "output": "a"}, turns("x", "a")),
    ({"instruction": "q", "output": "a", "system": "s"}, turns("q", "a", system="s")),
    ({"instruction": "q", "output": "a", "system": ""}, turns("q", "a")),
    (
        {"instruction": "q", "output": "a", "history": [["q0", "a0"], ("q1", "a1")], "system": "s"},
        turns("q0", "a0", "q1", "a1", "q", "a", system="s"),
    ),
    ({"instruction": "q", "output": "a", "history": []}, turns("q", "a")),
    ({"prompt": "q", "completion": "a"}, turns("q", "a")),
    ({"prompt": turns("q"), "completion": turns("q", "a")[1:]}, turns("q", "a")),
    ({"prompt": "q", "completion": {"role": "assistant", "content": "a"}}, turns("q", "a")),
    ({"prompt": "q", "response": "a"}, turns("q", "a")),
    ({"query": "q", "response": "a"}, turns("q", "a")),
    ({"input": "q", "output": "a"}, turns("q", "a")),
    ({"messages": turns("q", "a", "r", "b", system="s")}, turns("q", "a", "r", "b", system="s")),
    ({"messages": turns("q", "a", system=" ")}, turns("q", "a")),
    ({"messages": turns("q", "a"), "system": "s"}, turns("q", "a", system="s")),
    ({"messages": turns("q", "a", system="t"), "system": "s"}, turns("q", "a", system="t")),
    ({"messages": turns("q", "a"), "prompt": "q", "chosen": "z"}, turns("q", "a")),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q"}]},
                turns("", "a")[1],
            ]
        },
        turns("q", "a"),
    ),
    ({"conversations": sharegpt("q", "a", "r", "b")}, turns("q", "a", "r", "b")),
    (
        {"conversations": [{"from": "system", "value": "s"}, *sharegpt("q", "a")]},
        turns("q", "a", system="s"),
    ),
    (
        {
            "conversations": [
                {"role": "prompter", "content": "q"},
                {"role": "Assistant", "content": "a"},
            ]
        },
        turns("q", "a"),
    ),
    ({"conversations": sharegpt("q"), "chosen": {"from": "gpt", "value": "a"}}, turns("q", "a")),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, turns("q", "a")),
    (
        {"chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: b", "rejected": "?"},
        turns("q", "a", "r", "b"),
    ),
    (
        {"prompt": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:", "response": "b"},
        turns("q", "a", "r", "b"),
    ),
    ({"text": f"{PREAMBLE}### Instruction:\nq\n\n### Response:\na"}, turns("q", "a")),
    ({"text": "### Instruction: q ### Input: x ### Response: a"}, turns("q\nx", "a")),
    (
        {"text": "下面是指令。\n### Instruction:\n你好\n\n### Response:\n再见"},
        turns("你好", "再见"),
    ),
    (
        {"text": f"{PREAMBLE}### Instruction:\nq\n\n### Input:\n\n\n### Response:\na\n\n### b"},
        turns("q", "a\n\n### b"),
    ),
    ({"text": "Human: q\n\nAssistant: a"}, turns("q", "a")),
    (
        {"text": "### Human: q\n### Assistant: a\n### Human: r\n### Assistant: b"},
        turns("q", "a", "r", "b"),
    ),
]


@pytest.mark.parametrize(("row", "messages"), DEMONSTRATIONS)
def test_a_demonstration_and_its_prompt(row, messages):
    (demonstration,) = load_demonstrations([row])
    assert demonstration.messages == messages
    (prompt,) = load_prompts([row])
    assert prompt.messages == messages[:-1]
    assert prompt.row == row


def test_a_completion_may_go_on_for_several_turns():
    row = {"prompt": turns("q"), "completion": turns("q", "a", "r", "b")[1:]}
    assert load_demonstrations([row])[0].messages == turns("q", "a", "r", "b")
    assert load_prompts([row])[0].messages == turns("q")


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"prompt": "q"}, turns("q")),
        ({"query": "q", "answer": 42}, turns("q")),
        ({"instruction": "q", "input": "x"}, turns("q\nx")),
        ({"messages": turns("q", "a", "r")}, turns("q", "a", "r")),
        ({"conversations": sharegpt("q")}, turns("q")),
        ({"prompt": "q", "responses": ["a", "b"], "ranks": [1, 2]}, turns("q")),
        ({"prompt": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r"}, turns("q", "a", "r")),
        ({"prompt": "\n\nHuman: q"}, turns("q")),
        ({"prompt": "Human: what does this word mean?"}, turns("Human: what does this word mean?")),
        ({"text": "Once upon a time"}, turns("Once upon a time")),
    ],
)
def test_a_prompt_needs_no_reply(row, messages):
    assert load_prompts([row])[0].messages == messages


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "no prompt: none of messages"),
        ({"foo": 1}, "the row has foo"),
        ({"instuction": "q", "output": "a"}, "is `instuction` meant?"),
        ({"output": "a"}, "no prompt"),
        ({"instruction": "q"}, "no reply to `instruction`"),
        ({"instruction": " ", "input": "\n", "output": "a"}, "the prompt is empty"),
        ({"prompt": "", "completion": "a"}, "the prompt is empty"),
        ({"instruction": "q", "output": " \n"}, "the reply is empty"),
        ({"instruction": "q", "input": 3, "output": "a"}, "`input` is a number"),
        ({"instruction": "q", "output": True}, "`output` is a boolean"),
        ({"instruction": "q", "output": "a", "system": 1}, "`system` is a number"),
        ({"instruction": "q", "output": "a", "history": "x"}, "`history` is a text"),
        ({"instruction": "q", "output": "a", "history": [["q"]]}, "`history[0]` is not a pair"),
        ({"instruction": "q", "output": "a", "history": [["q", 1]]}, "`history[0]` is a number"),
        ({"messages": "q"}, "`messages` is a text"),
        ({"messages": []}, "`messages` is an empty list"),
        (
            {"messages": [{"role": "system", "content": " "}]},
            "`messages` has nothing but an empty system message",
        ),
        ({"messages": ["q", "a"]}, "`messages[0]` is a text"),
        ({"messages": turns("q")}, "`messages` does not end in an assistant message"),
        ({"messages": turns("q", "a")[1:]}, "no user message before the reply"),
        ({"messages": turns("q", "a", "r", "b")[1:]}, "begins with the assistant"),
        ({"messages": turns("q", " ")}, "the reply is empty"),
        ({"messages": [{"role": "wizard", "content": "q"}]}, "the unknown role 'wizard'"),
        ({"messages": [{"content": "q"}]}, "`messages[0]` has no `role`"),
        ({"messages": [{"role": "user"}]}, "`messages[0]` has no `content`"),
        (
            {"messages": [*turns("q", "a"), *turns(system="s")]},
            "system message that is not the first",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "a part that is not text",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "value": "q"}]}]},
            "`messages[0].content` has a part without `text`; it has type, value",
        ),
        ({"conversations": sharegpt("q")}, "`conversations` does not end in an assistant"),
        (
            {"conversations": [{"from": "human", "value": None}]},
            "`conversations[0]` has no `value`",
        ),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, "uses tools"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "uses tools"),
        (
            {"prompt": turns("q"), "completion": turns("other", "a")},
            "does not begin with the prompt",
        ),
        ({"prompt": "q", "completion": turns("q")}, "does not end in an assistant message"),
        ({"prompt": turns("q", "a"), "completion": "b"}, "no user message before the reply"),
        ({"text": "Once upon a time"}, "plain text is no demonstration"),
        ({"text": "### Instruction:\nq\n\n### Response:\n"}, "the reply is empty"),
    ],
)
def test_what_is_no_demonstration(row, reason):
    with pytest.raises(UserError) as error:
        load_demonstrations([{"instruction": "q", "output": "a"}, row])
    assert str(error.value).startswith("dataset: row 2: ")
    assert reason in str(error.value)


def test_texts_are_kept_and_demonstrations_are_written_out():
    rows = [
        {"text": " = Title = \n"},
        {"text": "### Instruction:\nq\n\n### Response:\na"},
        {"instruction": "q", "output": "a", "system": "s"},
    ]
    assert load_texts(rows) == [
        rows[0]["text"],
        rows[1]["text"],
        "System: s\n\nUser: q\n\nAssistant: a",
    ]
    with pytest.raises(UserError, match="`text` is empty"):
        load_texts([{"text": " "}])


def test_every_column_that_is_read_can_be_mapped():
    assert {*PROMPTS, *REPLIES, "input", "system", "history"} <= STANDARD_COLUMNS


# --- columns that change what a row means ---------------------------------------------------------

KTO = [
    {"prompt": "q", "completion": "good", "label": True},
    {"prompt": "q", "completion": "bad", "label": False},
    {"messages": turns("q", "bad"), "label": False},
    {"messages": turns("q", "fine"), "label": None},
    {"prompt": "q", "response": "bad", "chosen": False},
]


def test_answers_labelled_false_are_not_learnt():
    notes: list[str] = []
    learnt = load_demonstrations(KTO, notes)
    assert [item.messages[-1]["content"] for item in learnt] == ["good", "fine"]
    assert "3 rows labelled false left out" in notes[0]
    assert load_texts(KTO, notes) == ["User: q\n\nAssistant: good", "User: q\n\nAssistant: fine"]
    assert len(load_prompts(KTO)) == 5  # their prompts are as good as any
    with pytest.raises(UserError, match="nothing to use in 1 rows .1 rows labelled false"):
        load_demonstrations(KTO[1:2])


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        (1, 0),
        (1.0, 0.0),
        ("True", "False"),
        ("1", "0"),
        (1, -1),
        ("desirable", "undesirable"),
        ("up", "down"),
        ("Like", "dislike"),
        ("thumbs_up", "Thumbs down"),
        ("+1", "-1"),
    ],
)
def test_a_label_may_be_a_number_or_a_text_as_in_csv(good, bad):
    rows = [
        {"prompt": "q", "completion": "a", "label": good},
        {"prompt": "q", "completion": "b", "label": bad},
    ]
    notes: list[str] = []
    assert [item.messages[-1]["content"] for item in load_demonstrations(rows, notes)] == ["a"]
    assert "1 rows labelled false left out" in notes[0] and "heeded" not in notes[0]
    (found,) = load_rankings(rows, notes)
    assert (found.responses, found.ranks) == (["a", "b"], [1, 2])


TRANSLATED = {"id": 1, "translation": {"en": "a dog", "de": "ein Hund"}}


@pytest.mark.parametrize(("asked", "answer"), [("en", "de"), ("de", "en")])
def test_a_pair_of_languages_is_asked_in_the_direction_that_columns_give(tmp_path, asked, answer):
    (tmp_path / "a.jsonl").write_text(json.dumps(TRANSLATED))
    columns = {"prompt": f"translation.{asked}", "completion": f"translation.{answer}"}
    data = Data(path=str(tmp_path / "a.jsonl"), columns=columns)
    pair = TRANSLATED["translation"]
    assert load_demonstrations(data)[0].messages == turns(pair[asked], pair[answer])
    (prompt,) = load_prompts(data)
    assert prompt.messages == turns(pair[asked])
    assert prompt.row["translation"] == pair  # the reference, for reward functions
    for load in (load_demonstrations, load_prompts, load_rankings):
        with pytest.raises(UserError, match="columns: {prompt: translation.en, completion: transl"):
            load(Data(path=data.path))
    with pytest.raises(
        UserError, match="no row has `translation.dd` .did you mean `translation.de`"
    ):
        load_prompts(Data(path=data.path, columns={"prompt": "translation.dd"}))


def test_a_label_of_another_kind_is_told():
    notes: list[str] = []
    assert len(load_demonstrations([{"prompt": "q", "completion": "a", "label": 2}], notes)) == 1
    assert "1 rows with a `label` that is neither true nor false" in notes[0]


@pytest.mark.parametrize("load", [load_demonstrations, load_prompts, load_texts, load_rankings])
@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("images", ["a.png"], "`images` is filled: only text is read"),
        ("image", {"bytes": "", "path": "a.png"}, "`image` is filled"),
        ("audio", "a.wav", "`audio` is filled"),
        ("tools", [{"name": "f"}], "`tools` is filled: no stage trains on tools"),
        ("tools", '[{"name": "f"}]', "no stage trains on tools"),
        ("parent_id", "x", "a message of a tree (`parent_id`) needs `message_id`"),
    ],
)
def test_a_row_that_is_more_than_its_text_is_refused(load, column, value, reason):
    row = {"prompt": "q", "response": "a", "chosen": "a", "rejected": "b", column: value}
    row |= {"role": "assistant"} if column == "parent_id" else {}
    with pytest.raises(UserError) as error:
        load([row])
    assert reason in str(error.value)


@pytest.mark.parametrize("empty", [None, [], "", "[]", [None], {}, {"bytes": None}, 3])
def test_an_empty_column_changes_nothing(empty):
    row = {"prompt": "q", "response": "a", "images": empty, "tools": empty, "audio": empty}
    assert len(load_demonstrations([row])) == 1


def test_a_hint_names_no_column_that_is_what_it_says():
    with pytest.raises(UserError) as error:
        load_demonstrations([{"prompt": "q", "responses": ["a", "b"], "ranks": [1, 2]}])
    assert "is `responses` meant" not in str(error.value)


@pytest.mark.parametrize("pair", [("output_1", "output_2"), ("response1", "response2")])
def test_two_answers_are_no_misspelt_reply(pair):
    row = {"instruction": "q", **dict.fromkeys(pair, "a"), "preference": 1}
    with pytest.raises(UserError) as error:
        load_demonstrations([row])
    assert f"`{pair[0]}` and `{pair[1]}` are a comparison" in str(error.value)
    assert "meant?" not in str(error.value)


def test_thinking_beside_a_messages_content_is_put_before_it():
    for key in ("reasoning_content", "thinking"):
        said = [turns("q")[0], {"role": "assistant", "content": "a", key: "hm\n"}]
        (item,) = load_demonstrations([{"messages": said}])
        assert item.messages[1]["content"] == "<think>\nhm\n</think>\n\na"
    said = [turns("q")[0], {"role": "assistant", "content": "a", "reasoning_content": None}]
    assert load_demonstrations([{"messages": said}])[0].messages == turns("q", "a")


def test_turns_that_are_only_read_are_no_demonstrations():
    said = turns("q", "a", "r", "b", "s", "c")
    for mark in ({"weight": 0}, {"train": False}):
        messages = [said[0], said[1] | mark, *said[2:5], said[5] | mark]
        (item,) = load_demonstrations([{"messages": messages, "system": "x"}])
        assert item.messages == [{"role": "system", "content": "x"}, *said[:4]]
        assert 2 in item.context and 4 not in item.context
    notes: list[str] = []
    row = {"messages": [said[0], said[1] | {"weight": 0}]}
    assert len(load_demonstrations([row, {"messages": said}], notes)) == 1
    assert "1 conversations left out: none of their turns" in notes[0]
    with pytest.raises(UserError, match="`weight` is 0.5"):
        load_demonstrations([{"messages": [said[0], said[1] | {"weight": 0.5}]}])


# --- splits ---------------------------------------------------------------------------------------

SPLITTABLE = st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=40)


@given(SPLITTABLE, st.floats(0, 0.9), st.integers(0, 5))
def test_split_parts_share_no_prompt_and_lose_nothing(questions, fraction, seed):
    items = [Demonstration(turns(q, str(n)), f"row {n}") for n, q in enumerate(questions)]
    training, held = split_by_prompt(items, fraction, seed)
    assert sorted([*training, *held], key=items.index) == items
    asked = [{item.messages[0]["content"] for item in part} for part in (training, held)]
    assert not asked[0] & asked[1]
    assert training
    if fraction == 0:
        assert not held
    elif len(set(questions)) > 1:
        assert len(asked[1]) == min(
            max(1, round(fraction * len(set(questions)))), len(set(questions)) - 1
        )


@given(SPLITTABLE, st.randoms(), st.integers(0, 5))
def test_split_does_not_depend_on_the_order(questions, random, seed):
    items = [Prompt(turns(q), {}, q) for q in questions]
    shuffled = items.copy()
    random.shuffle(shuffled)
    held = [
        {item.where for item in split_by_prompt(part, 0.3, seed)[1]} for part in (items, shuffled)
    ]
    assert held[0] == held[1]


def test_split_depends_on_the_seed():
    items = [Prompt(turns(str(n)), {}, str(n)) for n in range(50)]
    parts = {
        tuple(item.where for item in split_by_prompt(items, 0.2, seed)[1]) for seed in range(5)
    }
    assert len(parts) == 5
    assert all(len(part) == 10 for part in parts)


def parts(texts, fraction=0.5, seed=1):
    items = [Prompt(messages, {}, str(at)) for at, messages in enumerate(texts)]
    return [{item.where for item in part} for part in split_by_prompt(items, fraction, seed)]


def test_turns_of_one_conversation_stay_on_one_side():
    texts = [turns(f"q{n}", *["a", "r", "b", "s"][:k]) for n in range(20) for k in (0, 2, 4)]
    training, held = parts(texts)
    assert len(training) == len(held) == 30
    assert all(len({f"{3 * n + k}" for k in range(3)} & held) in (0, 3) for n in range(20))


@pytest.mark.parametrize(
    "twin", ["caf\u0065\u0301 au lait?", "caf\u00e9\u00a0au lait?", "Caf\u00e9 AU  lait?\n"]
)
def test_twins_stay_on_one_side(twin):
    for seed in range(20):
        training, held = parts(
            [turns("caf\u00e9 au lait?"), turns(twin), *map(turns, "abcd")], seed=seed
        )
        assert {"0", "1"} <= training or {"0", "1"} <= held


def test_the_split_of_plain_prompts_does_not_move():
    """A hash of roles and words alone decides, so files split the same from version to version."""
    _, held = parts([turns(word) for word in "alpha beta gamma delta epsilon zeta".split()])
    assert held == {"1", "3", "4"}
