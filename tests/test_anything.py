"""`make eval MODEL= DATA=`: any models on any rows."""

import json
import math
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console

import small_run
import tiny_models
from pipeline.config.evaluation import EvalConfig
from pipeline.errors import UserError
from pipeline.evaluation import anything, classification, metrics, overlap
from pipeline.evaluation.__main__ import run_evaluation
from pipeline.evaluation.likelihoods import kl_to_sft
from pipeline.models.adapted import load_adapted
from pipeline.models.loading import load_policy

ROWS = [
    {"prompt": f"w{i} w{i + 1}", "completion": f"w{1 + i % 2} w3", "lang": "xy"[i % 3 == 0]}
    for i in range(6)
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_CHECKPOINTS", str(tmp_path / "ck"))
    tiny_models.saved_policy(tmp_path / "a" / "sft")
    small_run.write_jsonl(tmp_path / "rows.jsonl", ROWS)
    return tmp_path


def evaluate(place, *words: str, models: tuple[str, ...] = ("a/sft",), rows: str = "rows.jsonl"):
    paths = [str(place / model) for model in models]
    arguments = ["--model", *paths, "--data", str(place / rows), "eval.threads=1", *words]
    anything.main([*arguments, "eval.max_new_tokens=6"])
    [file] = (place / "ck" / "eval").glob("*.json")
    samples = file.with_name(f"{file.stem}_samples.jsonl").read_text().splitlines()
    return json.loads(file.read_text()), [json.loads(line) for line in samples]


def nats(model, *pairs: tuple[list[int], list[int]]) -> float:
    """Of the second of each pair after the first, by an unpadded pass."""
    total = 0.0
    for prompt, ids in pairs:
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        total -= logits.log_softmax(-1)[range(len(ids)), ids].sum().item()
    return total


def encoded(row: dict) -> tuple[list[int], list[int]]:
    tokenizer = tiny_models.tokenizer()
    return (
        tokenizer.encode(f"<user> {row['prompt']} <bot>"),
        tokenizer.encode(f"{row['completion']} <end>"),
    )


def test_perplexities_are_those_of_the_references_and_groups_are_parts(place, capsys):
    result, samples = evaluate(place, "eval.group_by=lang")
    [(name, found)] = result["models"].items()
    assert name == "a-sft" and result["prompts"] == 6
    total = nats(tiny_models.policy(0), *map(encoded, ROWS))
    assert found["perplexity"] == pytest.approx(math.exp(total / 18), rel=1e-4)
    assert found["byte_perplexity"] == pytest.approx(math.exp(total / 30), rel=1e-4)
    parts = found["groups"]["lang"]
    assert {value: part["n"] for value, part in parts.items()} == {"x": 4, "y": 2}
    x = nats(tiny_models.policy(0), *(encoded(row) for row in ROWS if row["lang"] == "x"))
    assert parts["x"]["perplexity"] == pytest.approx(math.exp(x / 12), rel=1e-4)
    mean = (4 * parts["x"]["token_f1"] + 2 * parts["y"]["token_f1"]) / 6
    assert found["token_f1"] == pytest.approx(mean)
    assert {"exact", "distinct_2", "self_bleu", "repetition", "length", "ended"} <= found.keys()
    assert [row["reference"] for row in samples] == [row["completion"] for row in ROWS]
    _, same = evaluate(place, "eval.group_by=lang", "eval.seed=7")  # the likeliest tokens
    assert same == samples
    told = capsys.readouterr().out
    assert "lang y, 2 rows" in told and "Perplexity of the references, per token" in told


def test_what_a_tokenizer_cannot_spell_is_told(place, capsys):
    small_run.write_jsonl(place / "rows.jsonl", [{"prompt": "w1", "completion": "zz w3"}])
    evaluate(place)
    told = " ".join(capsys.readouterr().out.split())
    assert "references: 1 of 3 tokens are <unk>" in told and "its perplexity says little" in told


def test_keys_that_nothing_reads_here_are_refused(place):
    with pytest.raises(UserError, match=r"candidates, judge: of a run.*judges: \[\{module: NAME"):
        evaluate(place, "eval.judge=small_judge", "eval.candidates=2")
    assert not (place / "ck" / "eval").exists()


def test_encoder_decoders_and_adapters_answer_beside_a_causal_model(place):
    tiny_models.seq2seq("bart").save_pretrained(place / "b" / "bart")
    tiny_models.tokenizer().save_pretrained(place / "b" / "bart")
    base = str(place / "a" / "sft")
    lora = LoraConfig(
        r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    adapted = get_peft_model(load_policy(base), lora)
    adapted.save_pretrained(place / "c" / "adapter")
    result, _ = evaluate(place, models=("a/sft", "b/bart", "c/adapter"))
    found = {name: model["perplexity"] for name, model in result["models"].items()}
    assert list(found) == ["a-sft", "b-bart", "c-adapter"]
    total = nats(adapted.merge_and_unload(), *map(encoded, ROWS))
    assert found["c-adapter"] == pytest.approx(math.exp(total / 18), rel=1e-3)
    assert len({round(value, 3) for value in found.values()}) == 3

    model, tokenizer = load_adapted(str(place / "c" / "adapter"))
    assert len(tokenizer) == 29 and not hasattr(model, "peft_config")
    config = place / "c" / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 2', '"r": 3'))
    with pytest.raises(UserError, match="does not fit its base .*a/sft"):
        load_adapted(str(place / "c" / "adapter"))


def test_the_likeliest_label_is_that_of_the_most_nats_per_token(place, capsys):
    rows = [{"prompt": f"w{i}", "label": ("w1", "w2 w3 w4")[i % 2]} for i in range(6)]
    small_run.write_jsonl(place / "labels.jsonl", rows)
    words = ["--task", "likelihood", "eval.reference=label"]
    result, samples = evaluate(place, *words, rows="labels.jsonl")
    wanted = []
    for row in rows:
        means = {}
        for label in ("w1", "w2 w3 w4"):
            pair = encoded({**row, "completion": label})
            means[label] = -nats(tiny_models.policy(0), pair) / len(pair[1])
        wanted.append(max(means, key=means.__getitem__))
    assert [row["answers"]["a-sft"] for row in samples] == [{"label": label} for label in wanted]
    found = result["models"]["a-sft"]
    right = sum(w == row["label"] for w, row in zip(wanted, rows, strict=True))
    assert found["accuracy"] == right / 6 and found["unmatched"] == 0 and "exact" not in found
    assert "a-sft: right / answered" in capsys.readouterr().out


def test_answers_are_matched_with_labels(place):
    result, samples = evaluate(place, "--task=classification", 'eval.labels=["w1 w3", "w2 w3"]')
    found = result["models"]["a-sft"]
    labels = [row["answers"]["a-sft"]["label"] for row in samples]
    assert found["unmatched"] == labels.count(None) / 6
    assert sum(sum(row.values()) for row in found["confusion"].values()) == 6
    assert result["config"]["labels"] == ["w1 w3", "w2 w3"]


@pytest.mark.parametrize(
    ("words", "rows", "said"),
    [
        ([], [{"prompt": "w1"}, {"prompt": "w2"}], r"rows\.jsonl:1: no reference \(2 such rows\)"),
        (["eval.reference=gold"], ROWS, r"rows\.jsonl:1: no reference \(6 such rows\)"),
        (["eval.group_by=tongue"], ROWS, "no row of .* has a 'tongue'"),
        (["--task=label"], ROWS, "task: input should be 'text', 'classification' or"),
        (
            ["--task=likelihood", "eval.labels=[w1, w2]"],
            ROWS,
            r":1: 'w1 w3' is no label; labels: w1",
        ),
        (["--task=likelihood"], ROWS[:1], "1 different references are no labels"),
        (["--model", "no/such/model"], ROWS, "no/such/model: cannot load"),
        (["eval.max_new_tokens=64"], ROWS, "no row fits among the models' places"),
        (["sft.epochs=1", "eval.nn=1"], ROWS, "no key `nn` in eval"),
    ],
)
def test_a_mistake_is_told_and_nothing_is_written(place, words, rows, said):
    small_run.write_jsonl(place / "rows.jsonl", rows)
    model = [] if "--model" in words else ["--model", str(place / "a" / "sft")]
    with pytest.raises(UserError, match=said):
        anything.main([*words, "--data", str(place / "rows.jsonl"), *model])
    assert not (place / "ck").exists()


def test_what_no_model_has_places_for_is_left_out(place, capsys):
    rows = [
        *ROWS,
        {"prompt": "w1 " * 58, "completion": "w1"},
        {"prompt": "w1", "completion": "w2 " * 63},
    ]
    small_run.write_jsonl(place / "rows.jsonl", rows)
    assert evaluate(place)[0]["prompts"] == 6
    assert "2 of 8 rows are left out" in capsys.readouterr().out


# --- by hand ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("positive", "positive"),
        ("  Positive.", "positive"),
        ("The review is POSITIVE, I think", "positive"),
        ("positive or negative?", "positive"),
        ("either positive or negative", None),
        ("nonpositive", None),
        ("very positive", "very positive"),
        ("", None),
        ("不好", "不好"),
        ("我觉得好", "好"),
        ("C+", "C+"),
    ],
)
def test_which_label_an_answer_means(answer, label):
    labels = ["positive", "negative", "very positive", "好", "不好", "C+"]
    assert classification.match(answer, labels) == label


@pytest.mark.parametrize(
    ("answer", "label"),
    [("US", "US"), ("us.", "us"), ("Us", None), ("US or us?", "US"), ("OTHER, not us", "other")],
)
def test_labels_that_differ_by_case_alone_are_told_apart_by_it(answer, label):
    assert classification.match(answer, ["US", "us", "other"]) == label


def test_precision_recall_and_f1_of_a_confusion_matrix_by_hand():
    wanted = ["a"] * 4 + ["b"] * 3 + ["c"]
    said = ["a", "a", "b", None, "b", "b", "a", "a"]
    found = classification.report(said, wanted, ["a", "b", "c"])
    assert found["accuracy"] == 4 / 8 and found["unmatched"] == 1 / 8
    assert found["labels"]["a"] == {"precision": 2 / 4, "recall": 2 / 4, "f1": 1 / 2, "support": 4}
    b = found["labels"]["b"]
    assert (b["precision"], b["recall"], b["f1"]) == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    assert found["labels"]["c"] == {"precision": 0, "recall": 0, "f1": 0, "support": 1}
    assert found["macro_f1"] == pytest.approx((1 / 2 + 2 / 3) / 3)
    assert found["confusion"]["a"] == {"a": 2, "b": 1, "": 1}
    assert found["confusion"]["c"] == {"a": 1}
    assert found["accuracy_low"] == pytest.approx(0.2152, abs=1e-4)  # Wilson of 4 in 8


def test_rouge_is_rouge_scores_own_on_english_and_of_characters_in_chinese():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(list(overlap.KINDS))
    texts = ["The cat, it sat on 3 mats.", "a b", "nothing alike"]
    references = ["A cat sat on the mat_s 3 times!", "b a", "else"]
    found = overlap.rouge(texts, references)
    for i, pair in enumerate(zip(references, texts, strict=True)):
        for kind, score in scorer.score(*pair).items():
            assert found[kind][i] == score.fmeasure
    chinese = overlap.rouge(["汤姆买了红苹果。"], ["汤姆 买了 两个 苹果"])
    # 7 characters and 8; 汤姆买了苹果 in common; pairs 汤姆 姆买 买了 苹果 of 6 and 7
    assert chinese == {
        "rouge1": [pytest.approx(12 / 15)],
        "rouge2": [pytest.approx(8 / 13)],
        "rougeL": [pytest.approx(12 / 15)],
    }
    assert scorer.score("汤姆", "汤姆")["rouge1"].fmeasure == 0  # why there is a tokenizer here


def test_bleu_takes_chinese_for_characters():
    texts, references = ["汤姆买了两个红苹果。"], ["汤姆买了三个红苹果。"]
    assert overlap.bleu_tokenizer(references) == "zh"
    assert overlap.bleu_tokenizer(["the cat"]) == "13a"
    assert overlap.bleu_tokenizer(["猫が好きです。", "犬も好きです。"]) == "char"
    assert overlap.bleu_tokenizer(["中文", "名字の"] + ["中文"] * 2) == "zh"
    # 9 of 10 characters, 7 of 9 pairs, 5 of 8 triples, 3 of 7
    by_hand = 100 * math.exp(sum(map(math.log, (9 / 10, 7 / 9, 5 / 8, 3 / 7))) / 4)
    assert overlap.corpus(texts, references)["bleu"] == pytest.approx(by_hand)
    assert overlap.corpus(texts, texts) == pytest.approx({"bleu": 100, "chrf": 100})


def test_variety_by_hand():
    found = overlap.variety(["a b a", "a b c"])
    assert found["distinct_1"] == 3 / 6 and found["distinct_2"] == 3 / 4
    assert overlap.variety(["a b c d e"] * 2)["self_bleu"] == pytest.approx(100)
    assert overlap.variety(["a b c d e", "v w x y z"])["self_bleu"] < 10
    assert overlap.variety(["", ""]).keys() == {"self_bleu"}
    assert overlap.variety(["我 我"])["distinct_1"] == 1 / 2


def test_without_rouges_package_the_rest_is_measured(place, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    found = evaluate(place)[0]["models"]["a-sft"]
    assert "rouge1" not in found and "bleu" in found
    assert "pip install rouge-score" in capsys.readouterr().out


def test_what_a_run_records_is_what_it_was_before_there_were_tasks():
    keys = {"prompts": {"path": "x"}}
    plain = EvalConfig.model_validate(keys).model_dump(mode="json")
    assert not {"task", "labels"} & plain.keys()
    with pytest.raises(ValueError, match="labels: of task classification or likelihood"):
        EvalConfig.model_validate({**keys, "labels": ["a"]})
    asked = EvalConfig.model_validate({**keys, "task": "likelihood", "labels": ["a"]})
    assert asked.model_dump(mode="json").items() >= {"task": "likelihood", "labels": ["a"]}.items()


def test_a_label_that_looks_like_markup_is_printed_as_it_is():
    report = classification.report(["[red]", "b"], ["[red]", "b"], ["[red]", "b"])
    result = {"prompts": 2, "models": {"m": {**report, "groups": {}}}}
    console = Console(record=True, width=120)
    anything.show(result, console)
    assert "[red]" in console.export_text()
    assert metrics.exact_match("[red]", "[red]")


def test_a_run_at_temperature_0_has_no_kl_and_no_other_task(tmp_path):
    run = small_run.make_run(tmp_path)
    keys = {"prompts": {"path": str(tmp_path / "prompts.jsonl")}, "max_new_tokens": 4, "threads": 1}
    keys |= {"n": 3, "candidates": 1, "temperature": 0.0}
    result = run_evaluation(run, EvalConfig.model_validate(keys))
    assert "kl" not in result and "ppo_vs_sft_by_rm" in result["comparisons"]
    config = EvalConfig.model_validate({**keys, "task": "classification"})
    with pytest.raises(UserError, match="task classification is for make eval MODEL="):
        run_evaluation(run, config)
    with pytest.raises(UserError, match="KL is of what is sampled"):
        kl_to_sft(config, {}, tiny_models.tokenizer(), [], [])
