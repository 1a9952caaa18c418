"""A run in Chinese from files to the report: rows and template in, every artifact readable and right."""

import json
import re

import pytest
import torch

import small_run
import tiny_models
from pipeline.commands import chat
from pipeline.config.evaluation import EvalConfig
from pipeline.config.ppo import PPOConfig
from pipeline.config.schema import Data, RMConfig, SFTConfig
from pipeline.data.template import encode_responses
from pipeline.evaluation import report
from pipeline.evaluation.__main__ import run_evaluation
from pipeline.models.generation import generate
from pipeline.models.loading import load_policy, load_tokenizer
from stages import ppo, rm, sft
from test_template_families import CHINESE, FAMILIES, byte_level, dressed

CITIES = {"中国": "北京", "法国": "巴黎", "日本": "东京", "英国": "伦敦"}
QUESTIONS = [
    "{}的首都是哪里？",
    "请问{}的首都？",
    "{}首都叫什么名字？",
    "告诉我，{}的首都。",
    "{}：首都？",
]
ROWS = [
    {"问题": question.format(country), "回答": f"{city}。", "类别": f"首都“{country}”"}
    for question in QUESTIONS
    for country, city in CITIES.items()
] * 2
RANKED = [
    {"问题": row["问题"], "responses": [row["回答"], "不知道。", "！？"], "ranks": [1, 2, 3]}
    for row in ROWS[:20]
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of all stages, evaluated, with its report."""
    root = tmp_path_factory.mktemp("中文")
    tokenizer = dressed(byte_level(), FAMILIES["chinese"])
    tokenizer.chat_template = None
    tokenizer.save_pretrained(root / "base")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 128}
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    tiny_models.policy(
        0, vocab_size=len(tokenizer), initializer_range=0.05, **sizes, **special
    ).save_pretrained(root / "base")
    (root / "模板.jinja").write_text(CHINESE, encoding="utf-8")
    assert len(ROWS) == 40
    columns = {"prompt": "问题", "completion": "回答"}
    data = Data(path=str(small_run.write_jsonl(root / "数据.jsonl", ROWS)), columns=columns)
    ranked = Data(
        path=str(small_run.write_jsonl(root / "排序.jsonl", RANKED)), columns={"prompt": "问题"}
    )
    run, one = root / "运行", {"wandb": {"mode": "disabled"}, "threads": 1}
    shared = {"run": run, "learning_rate": 1e-2, "max_length": 120, **one}
    sft.run(SFTConfig(
        model=str(root / "base"), data=data, chat_template=root / "模板.jinja", epochs=40,
        batch_size=20, validation_fraction=0.2, sample_tokens=16, **shared,
    ))  # fmt: skip
    rm.run(RMConfig(data=ranked, epochs=4, batch_size=4, validation_fraction=0.2, **shared))
    ppo.run(PPOConfig(
        run=run, prompts=data, batch_size=8, minibatches=2, iterations=2, max_new_tokens=16,
        learning_rate=1e-4, sample_every=1, gates="warn", stop_tokens=["。"], **one,
    ))  # fmt: skip
    run_evaluation(run, EvalConfig(
        prompts=data, reference="completion", group_by="类别", n=20, max_new_tokens=16, candidates=1,
        threads=1,
    ))  # fmt: skip
    report.write_report(run)
    return run


def texts_of(run) -> dict[str, str]:
    """Files that people read, but for tokenizers' own."""
    kinds = {".json", ".jsonl", ".html", ".yaml", ".jinja"}
    files = [
        path for path in run.rglob("*") if path.suffix in kinds and "tokenizer" not in path.name
    ]
    return {str(path.relative_to(run)): path.read_text(encoding="utf-8") for path in files}


def test_every_file_is_readable_chinese(run):
    texts = texts_of(run)
    for name in (
        "sft/demonstrations.jsonl", "sft/samples.jsonl", "rm/held_out.jsonl", "ppo/samples.jsonl",
        "eval/test_samples.jsonl", "report.html",
    ):  # fmt: skip
        assert "首都" in texts[name] and "。" in texts[name], name
    for name in ("eval/test.json", "report.html"):
        assert "首都“中国”" in texts[name], name
    assert "模板.jinja" in texts["sft/manifest.json"] and "数据.jsonl" in texts["sft/manifest.json"]
    for name, text in texts.items():
        text = re.sub(r"<meta [^>]*>", "", text)  # a mark for programs
        assert not re.search(r"\\u(?!00)", text), name  # but for control characters
        assert not any(sign in text for sign in ("Ã", "ä½", "å", "ã€", "é¦–")), name


def test_the_template_is_the_files_in_every_stage(run):
    assert (run / "ppo" / "chat_template.jinja").read_text(encoding="utf-8") == CHINESE
    tokenizer = load_tokenizer(run / "ppo")
    prompt, [ids] = encode_responses(tokenizer, [{"role": "user", "content": "你好"}], ["北京。"])
    assert tokenizer.decode(prompt) == "用户：你好\n助手："
    assert tokenizer.decode(ids) == "北京。</s>"


def test_a_learnt_answer_is_right_and_ends(run):
    tokenizer = load_tokenizer(run / "sft")
    policy = load_policy(run / "sft", tokenizer)
    asked = [[{"role": "user", "content": row["问题"]}] for row in ROWS[:20]]
    prompts = [encode_responses(tokenizer, messages, [])[0] for messages in asked]
    got = generate(policy, tokenizer, prompts, max_new_tokens=16, greedy=True)
    right = [answer.text == row["回答"] for answer, row in zip(got, ROWS[:20], strict=True)]
    assert sum(right) >= 14 and all(answer.ended for answer in got)


def test_ppo_stops_at_the_full_stop(run):
    """Which is three bytes; what was cut in the middle of a character has no half of one."""
    samples = [json.loads(line) for line in (run / "ppo/samples.jsonl").open(encoding="utf-8")]
    ended = [row["response"] for row in samples if row["ended"]]
    assert ended and all(text.count("。") <= 1 for text in ended)
    assert not any(row["response"].endswith("\ufffd") for row in samples if not row["ended"])


def test_evaluation_counts_characters(run):
    result = json.loads((run / "eval/test.json").read_text(encoding="utf-8"))
    sft_model = result["models"]["sft"]
    assert sft_model["exact"] > 0.5 and sft_model["token_f1"] >= sft_model["exact"]
    assert set(sft_model["groups"]["类别"]) == {f"首都“{country}”" for country in CITIES}


def test_chat_speaks_chinese(run, capsys):
    chat.main(["--run", str(run), "--prompt", "法国的首都是哪里？", "--greedy"])
    out = capsys.readouterr().out
    assert "法国的首都是哪里？" in out and "巴黎。" in out
