"""Demonstrations and rankings -> the rows that the first two stages train on."""

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

import tiny_models
from pipeline.config.ppo import PPOConfig
from pipeline.config.schema import RMConfig, SFTConfig
from pipeline.data.forms import load_demonstrations
from pipeline.data.messages import message
from pipeline.data.rankings import load_rankings
from pipeline.data.template import encode_prompt
from pipeline.errors import UserError
from pipeline.models.generation import generate
from pipeline.ppo.rollout import Query
from pipeline.ppo.trainer import PPO
from stages import ppo, rm, sft


def test_only_turns_to_be_learnt_become_rows():
    turns = [{"role": r, "content": "w1"} for r in ("user", "assistant", "user", "assistant")]
    tokenizer, config = tiny_models.tokenizer(), SFTConfig(model="none")
    whole = load_demonstrations([{"messages": turns}])
    marked = load_demonstrations([{"messages": [turns[0], turns[1] | {"weight": 0}, *turns[2:]]}])
    rows = [sft._encode(tokenizer, items, config)[0] for items in (whole, marked)]
    assert [len(found) for found in rows] == [2, 1]
    assert rows[1] == rows[0][1:]


def demonstrations(*words):
    rows = [{"prompt": f"w{n}", "completion": " ".join(["w1"] * k)} for n, k in enumerate(words)]
    return load_demonstrations(rows)


def rankings(*words):
    return load_rankings(
        [{"prompt": f"w{n}", "chosen": "w1 " * k, "rejected": "w2"} for n, k in enumerate(words)]
    )


SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 30)  # + 4 of the template


def test_the_few_that_are_too_long_are_dropped_counted_and_told(capsys):
    tokenizer = tiny_models.tokenizer()
    config = SFTConfig(model="none", max_length=20)
    rows, dropped = sft._encode(tokenizer, demonstrations(*SIZES), config, config.too_long)
    assert (len(rows), dropped) == (9, 1)
    assert "sft: training examples: 1 of 10 are over max_length 20" in capsys.readouterr().out
    config = RMConfig(max_length=20)
    rows, dropped = rm._encode(tokenizer, rankings(*SIZES), config, config.too_long)
    assert (len(rows), dropped) == (9, 1)


@pytest.mark.parametrize(("stage", "make"), [(sft, demonstrations), (rm, rankings)])
def test_the_many_that_are_too_long_are_refused_with_the_limit_that_would_do(stage, make):
    tokenizer = tiny_models.tokenizer()
    config = SFTConfig(model="none") if stage is sft else RMConfig()
    short = config.model_copy(update={"max_length": 4})  # nothing is as short as that
    with pytest.raises(UserError, match=r"10 of 10|20 of 20"):
        stage._encode(tokenizer, make(*SIZES), short, short.too_long)
    half = config.model_copy(update={"max_length": 9})
    with pytest.raises(UserError) as error:
        stage._encode(tokenizer, make(*SIZES), half, half.too_long)
    assert "max_length=13 is enough" in str(error.value) or stage is rm
    enough = int(str(error.value).partition("max_length=")[2].split()[0])
    fits = config.model_copy(update={"max_length": enough})
    assert stage._encode(tokenizer, make(*SIZES), fits, fits.too_long)[1] <= 2
    rows, dropped = stage._encode(tokenizer, make(*SIZES), half)  # held out
    assert dropped and len(rows) < 10


def test_prompts_of_ppo_go_by_the_same_rule():
    config = PPOConfig(prompts={"path": "none"}, max_prompt_length=4)
    queries = [Query([0] * n) for n in (1, 2, 3, 4, 4, 4, 4, 4, 4, 5)]
    assert len(ppo._short_enough(queries, config)) == 9
    with pytest.raises(UserError, match="2 of 11 are over max_prompt_length 4"):
        ppo._short_enough([*queries, Query([0] * 9)], config)


def test_a_special_token_that_words_spell_is_told_by_the_stages(capsys):
    tokenizer = tiny_models.tokenizer()
    spelled = load_demonstrations([{"prompt": "w1 <end>", "completion": "w2 <bot>"}] * 3)
    rows, _ = sft._encode(tokenizer, spelled, SFTConfig(model="none"))
    assert tokenizer.convert_ids_to_tokens(rows[0]["response"])[-3:] == ["w2", "<unk>", "<end>"]
    compared = load_rankings([{"prompt": "w1 <end>", "chosen": "w2 <end>", "rejected": "w3"}])
    rm._encode(tokenizer, compared, RMConfig())
    assert [line for line in capsys.readouterr().out.splitlines() if "<unk>" not in line] == [
        "sft: held-out examples: special tokens are spelled 6 times (<bot>, <end>); read as plain text",
        "rm: held-out: special tokens are spelled 2 times (<end>); read as plain text",
    ]


def test_text_that_a_tokenizer_cannot_spell_is_counted(capsys):
    tokenizer = tiny_models.tokenizer()
    rows = load_demonstrations([{"prompt": "w1 你好", "completion": "w2"}] * 3)
    sft._encode(tokenizer, rows, SFTConfig(model="none"))
    rm._encode(
        tokenizer, load_rankings([{"prompt": "w1", "chosen": "您好", "rejected": "w3"}]), RMConfig()
    )
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith(
        "sft: held-out examples: 3 of 18 tokens are <unk>: this tokenizer cannot"
    )
    assert told[1].startswith("rm: held-out responses: 1 of 4 tokens are <unk>")
    sft._encode(
        tokenizer, load_demonstrations([{"prompt": "w1", "completion": "w2"}]), SFTConfig(model="x")
    )
    assert capsys.readouterr().out == ""


def test_rewards_and_judges_see_no_thinking():
    plain = tiny_models.tokenizer()
    rules = (
        plain.backend_tokenizer.to_str().replace('"w0"', '"<think>"').replace('"w1"', '"</think>"')
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(rules),
        eos_token="<end>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=plain.chat_template,
    )
    thought = tokenizer.encode("<think> w2 </think> w3 <end>")
    config = PPOConfig(prompts={"path": "none"})
    model = tiny_models.policy()
    trainer = PPO(config, tokenizer, model, tiny_models.policy(), tiny_models.reward(), None)
    asked = [message("user", "w4")]
    query = Query(encode_prompt(tokenizer, asked), "w4", messages=asked)
    episodes = trainer.episodes([query] * 2, [thought, tokenizer.encode("w3 w4 <end>")])
    assert episodes.responses == ["w3", "w3 w4"]
    # a reward model scores what it is trained on: the words that are ranked, in a file with thinking too
    for responses in (episodes.responses, ["<think> w7 </think> w3", "w3 w4"]):
        ranked = load_rankings([{"prompt": "w4", "responses": responses, "ranks": [1, 2]}])
        (row,), _ = rm._encode(tokenizer, ranked, RMConfig())
        assert (query.ids, episodes.response_ids) == (row["prompt_ids"], row["ids"])
    torch.nn.init.zeros_(model.lm_head.weight)  # any token is as likely as another
    torch.manual_seed(0)
    answers = generate(model, tokenizer, [[2, 7, 3]] * 400, max_new_tokens=8)
    opened = [a for a in answers if a.ids[0] == thought[0]]
    assert len(opened) > 5
    assert all("<think>" not in a.text.split(" ")[:1] for a in opened)
    assert {thought[0]} <= {number for a in opened for number in a.ids}
