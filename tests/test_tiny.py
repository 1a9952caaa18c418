"""The tiny world: determinism, disjoint splits, gold by hand, the simulated labeler, the tokenizer."""

import ast
import random
from pathlib import Path

import pytest

from pipeline.data.messages import user_turn
from pipeline.tiny import files, gold, labeler, world

SMALL = {
    "demonstrations": 160,
    "demonstrations_validation": 40,
    "comparison_prompts": 80,
    "ppo_prompts": 80,
    "prompts_validation": 40,
    "prompts_test": 80,
}
QUESTION = "answer the question\nanna saw two red hats in rome . what is the kind ?"


def gold_of(response: str, prompt: str = QUESTION, ended: bool = True) -> float:
    return gold.score([prompt], [response], [{}], ended=[ended])[0]


def contents(rows: list[dict]) -> set[tuple[str, str]]:
    return {(row["instruction"], row["input"]) for row in rows}


@pytest.fixture(scope="module")
def rows_of() -> dict[str, list[dict]]:
    return files.build(seed=0, sizes=SMALL, corpus_size=160)


def test_same_seed_same_bytes_and_another_seed_another_world(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SIZES", SMALL)
    monkeypatch.setattr(files, "CORPUS_SIZE", 80)
    first, again = files.write(tmp_path / "a", seed=3), files.write(tmp_path / "b", seed=3)
    other = files.write(tmp_path / "c", seed=4)
    assert all(first[name].read_bytes() == again[name].read_bytes() for name in first)
    assert all(first[name].read_bytes() != other[name].read_bytes() for name in first)


def test_held_out_prompts_appear_in_no_training_file(rows_of):
    for held_out in files.HELD_OUT:
        for name in (n for n in SMALL if n != held_out):
            assert not contents(rows_of[held_out]) & contents(rows_of[name]), (held_out, name)
    texts = [row["text"] for row in rows_of["corpus"]]
    inputs = [row["input"] for name in files.HELD_OUT for row in rows_of[name]]
    assert not [i for i in inputs if any(i in text for text in texts)]


def test_held_out_text_is_none_of_the_training_text(rows_of):
    held_out = [row["text"] for row in rows_of["corpus_validation"]]
    assert len(held_out) == files.HELD_OUT_TEXTS == len(set(held_out))
    assert not set(held_out) & {row["text"] for row in rows_of["corpus"]}
    inputs = [row["input"] for name in files.HELD_OUT for row in rows_of[name]]
    assert not [i for i in inputs if any(i in text for text in held_out)]


def test_a_document_that_was_trained_on_is_not_held_out(monkeypatch):
    monkeypatch.setattr(
        files, "corpus", lambda rng, count, forbidden: ["a b"] * min(count, 9) + ["c"] * (count > 9)
    )
    assert files.build(sizes=SMALL, corpus_size=9)["corpus_validation"] == [{"text": "c"}]


def test_every_family_and_language_has_its_share(rows_of):
    cells = [(row["family"], row["language"]) for row in rows_of["prompts_test"]]
    assert {cells.count(cell) for cell in set(cells)} == {10}
    assert len(set(cells)) == 8


def test_prompt_files_hold_no_answers(rows_of):
    for name in ("comparison_prompts", "ppo_prompts", "prompts_validation", "prompts_test"):
        assert all(
            set(row) == {"instruction", "input", "family", "language"} for row in rows_of[name]
        )


def test_gold_solves_every_prompt_as_the_world_meant_it():
    rng = random.Random(5)
    for case in world.draw_cases(rng, 400, set()):
        prompt = user_turn(case.instruction, case.input)
        assert gold.solve(prompt) == case.answer
        # Decoded text has lost its newline.
        assert gold.solve(prompt.replace("\n", " ")) == case.answer


def test_courtesy_rises_peaks_and_falls():
    values = [gold_of("the kind is red ." + " thanks" * count) for count in range(6)]
    assert values == [3.0, 4.0, 3.5, 2.5, 1.5, 0.5]


def test_wrong_fact_hedge_refusal_and_missing_end_cost_what_they_should():
    assert gold_of("the kind is blue . thanks") == -1 + 1
    assert gold_of("maybe the kind is red . thanks") == 3.0
    assert gold_of("i am not sure . thanks") == 1.0
    assert gold_of("the kind is red . thanks", ended=False) == 2.0
    assert gold_of("the kind is red . . . thanks") == 3.5
    assert gold_of("") == 0.0


def test_gold_reads_chinese_and_translation():
    assert (
        gold_of("汤姆 买了 红 苹果 。 谢谢", "translate to chinese\ntom bought red apples") == 4.0
    )
    assert gold_of("tom bought red apples .", "请 翻译 成 英文\n汤姆 买了 红 苹果") == 3.0
    assert gold_of("这是 两 个 红 苹果 。 欢迎", "请 接待 顾客\n我 想要 两 个 红 苹果 。") == 4.0


def test_exact_looks_at_content_alone():
    replies = [
        "the kind is red .",
        "maybe the kind is red . thanks thanks",
        "it red .",
        "the kind is tom .",
    ]
    assert gold.exact([QUESTION] * 4, replies, [{}] * 4) == [True, True, False, False]


def test_demonstrators_err_as_often_as_stated():
    rng = random.Random(1)
    cases = world.draw_cases(rng, 4000, set())
    prompts = [user_turn(c.instruction, c.input) for c in cases]
    readings = [
        gold.read(p, world.demonstrate(c, rng)) for p, c in zip(prompts, cases, strict=True)
    ]
    share = sum(r.exact for r in readings) / len(readings)
    wrong = world.ERROR_RATE + world.OMISSION_RATE + world.REFUSAL_RATE
    assert abs(share - (1 - wrong)) < 0.03
    assert abs(sum(r.hedges for r in readings) / len(readings) - world.HEDGE_RATE) < 0.03
    for count, rate in enumerate(world.COURTESY_RATES):
        assert abs(sum(r.courtesies == count for r in readings) / len(readings) - rate) < 0.03


def test_labeler_ties_equal_replies_and_uses_competition_ranks():
    row = {
        "prompt": [{"role": "user", "content": QUESTION}],
        "responses": [
            "the kind is red . thanks",
            "tom .",
            "the kind is red . thanks",
            "the kind is red . cheers",
        ],
        "id": 7,
    }
    ranks = labeler.label(row, random.Random(0), temperature=0.01)["ranks"]
    assert ranks == [1, 4, 1, 1]
    assert labeler.label(row, random.Random(0))["id"] == 7


def test_labeler_is_noisy_as_documented():
    rng = random.Random(0)
    won = sum(labeler.rank([1.0, 0.0], rng, temperature=1.0) == [1, 2] for _ in range(4000)) / 4000
    assert abs(won - 0.731) < 0.02  # logistic(1)


def test_labeler_repeats_itself_for_a_seed(tmp_path):
    samples = tmp_path / "samples.jsonl"
    line = '{"prompt": [{"role": "user", "content": "translate to chinese\\ntom saw red maps"}], "responses": ["a", "汤姆"]}\n'
    samples.write_text(line * 20, encoding="utf-8")
    for name in ("a", "b"):
        assert labeler.label_file(samples, tmp_path / name, seed=1) == 20
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_world_gold_and_labeler_import_no_torch():
    folder = Path(world.__file__).parent
    for name in ("world", "gold", "labeler"):
        tree = ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))
        names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
        assert not {n for n in names if n.split(".")[0] in ("torch", "transformers", "tokenizers")}


def test_tokenizer_round_trip_and_template(rows_of, tmp_path):
    from transformers import AutoTokenizer

    from pipeline.tiny import base

    base.build_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    texts = [row["output"] for row in rows_of["demonstrations"]] + [
        row["text"] for row in rows_of["corpus"]
    ]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
    turns = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "the kind is red ."},
    ]
    whole = tokenizer.apply_chat_template(turns, return_dict=False)
    prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
    assert whole[: len(prompt)] == prompt
    assert whole[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(whole[len(prompt) : -1]) == "the kind is red ."


def test_base_trains_to_the_same_bytes_and_loads(rows_of, tmp_path):
    import json

    from transformers import AutoModelForCausalLM

    from pipeline.tiny import base

    corpus = "".join(json.dumps(row) + "\n" for row in rows_of["corpus"])
    (tmp_path / "corpus.jsonl").write_text(corpus, encoding="utf-8")
    outs = [base.train_base(tmp_path / name, tmp_path, seed=1, steps=3) for name in ("a", "b")]
    weights = [(out / "model.safetensors").read_bytes() for out in outs]
    assert weights[0] == weights[1]
    assert AutoModelForCausalLM.from_pretrained(outs[0]).config.vocab_size == len(base.vocabulary())
