"""Demonstrations and rankings -> the rows that the first two stages train on."""

import tiny_models
from pipeline.data.forms import load_demonstrations
from stages import sft


def test_only_turns_to_be_learnt_become_rows():
    turns = [{"role": r, "content": "w1"} for r in ("user", "assistant", "user", "assistant")]
    tokenizer = tiny_models.tokenizer()
    whole = load_demonstrations([{"messages": turns}])
    marked = load_demonstrations([{"messages": [turns[0], turns[1] | {"weight": 0}, *turns[2:]]}])
    rows = [sft._encode(tokenizer, items, 64, "training") for items in (whole, marked)]
    assert [len(found) for found in rows] == [2, 1]
    assert rows[1] == rows[0][1:]
