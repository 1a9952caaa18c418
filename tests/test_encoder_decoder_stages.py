"""All three stages, evaluation and chat on every kind of encoder-decoder, whole and as adapters."""

import contextlib
import copy
import html
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

import small_run
import tiny_models
from pipeline.commands import chat
from pipeline.config.ppo import PPOConfig
from pipeline.config.schema import RMConfig, SFTConfig
from pipeline.errors import UserError
from pipeline.evaluation import compare, report
from pipeline.evaluation.__main__ import main as evaluate
from pipeline.models.loading import load_reward
from pipeline.models.scorer import EncoderDecoderScorer
from pipeline.ppo import build
from stages import ppo, rm, sft

COMMON = {"threads": 1, "batch_size": 8, "wandb": {"mode": "disabled"}}
ADAPTERS = {"lora": {"r": 2}}
VARIANTS = {
    "whole": ({}, {}, {}),
    "lora": (ADAPTERS, ADAPTERS, ADAPTERS | {"value_lora": {"r": 2}}),
    "shared base": (ADAPTERS, ADAPTERS, ADAPTERS | {"shared_base": True}),
    "value head": ({}, {}, {"value": "shared"}),
    "checkpointing": ({"gradient_checkpointing": True},) * 3,
    "micro": ({"micro_batch_size": 2}, {"micro_batch_size": 4}, {"micro_batch_size": 2}),
}
"""Keys of sft, rm and ppo."""


def base(folder: Path, kind: str) -> str:
    """A random model that was never told what its decoder reads, and a tokenizer without a template."""
    model = tiny_models.seq2seq(kind)
    model.config.decoder_prefix = None
    model.save_pretrained(folder)
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return str(folder)


def train(root: Path, kind: str, variant: str = "whole") -> Path:
    """SFT, a reward model and PPO, a few steps each."""
    pairs = [(f"w1 w{i % 8 + 3}", f"w{i % 8 + 4}") for i in range(64)]
    rows = [
        {"instruction": "w2", "input": asked, "output": f"{said} {said}"} for asked, said in pairs
    ]
    ranked = [
        {"prompt": f"w2 {asked}", "responses": [f"{said} {said}", said, "w20"], "ranks": [1, 2, 3]}
        for asked, said in pairs[:40]
    ]
    run = root / "run"
    known = COMMON | {"run": run}
    for_sft, for_rm, for_ppo = VARIANTS[variant]
    held_out = {"validation_fraction": 0.2, "learning_rate": 1e-2}
    model = base(root / "base", kind)
    sft.run(
        SFTConfig(**known, **held_out, model=model, max_steps=12, sample_tokens=8, **for_sft),
        dataset=rows,
    )
    rm.run(RMConfig(**known, **held_out, max_steps=8, **for_rm), dataset=ranked)
    keys = {"iterations": 2, "minibatches": 2, "max_new_tokens": 8, "gates": "off"}
    ppo.run(PPOConfig(**known, **keys, **for_ppo), dataset=rows)
    return run


def metrics(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())["metrics"]


def test_a_bart_from_rows_to_an_evaluation_and_a_chat(tmp_path, monkeypatch, capsys):
    run = train(tmp_path, "bart")
    first = metrics(run / "sft")
    assert first["validation_perplexity"] < first["validation_perplexity_before"]
    assert metrics(run / "rm")["demonstration_mean"] == pytest.approx(0, abs=1e-5)
    assert metrics(run / "rm")["padding_gap"] < 1e-4
    assert isinstance(load_reward(run / "rm"), EncoderDecoderScorer)
    told = AutoModelForSeq2SeqLM.from_pretrained(run / "ppo").generation_config
    assert (told.decoder_start_token_id, told.forced_bos_token_id) == (4, 1)
    judge = small_run.install(monkeypatch, small_run.judge_module())
    prompts = small_run.write_jsonl(tmp_path / "prompts.jsonl", small_run.PROMPTS)
    held_out = [{"prompt": "w2 w1 w3", "completion": "w4 w4"}]
    held_out_path = small_run.write_jsonl(tmp_path / "held_out.jsonl", held_out)
    config = tmp_path / "eval.yaml"
    config.write_text(
        f"prompts: {{path: {prompts}}}\ndemonstrations: {{path: {held_out_path}}}\njudge: {judge}\n"
        "n: 12\nmax_new_tokens: 8\ncandidates: 2\ncandidate_prompts: 4\nthreads: 1\n"
    )
    evaluate(["--config", str(config), "--run", str(run)])
    found = json.loads((run / "eval" / "test.json").read_text())
    assert {"sft", "ppo"} <= set(found["models"]) and found["kl"]["ppo_vs_sft"] is not None
    assert all(model["perplexity"] > 1 for name, model in found["models"].items())
    compared_without_dpo(run, config, monkeypatch, capsys)
    chat.main(["--run", str(run), "--prompt", "w2 w1 w3", "--greedy"])
    assert "ppo" in capsys.readouterr().out


def compared_without_dpo(run: Path, config: Path, monkeypatch, capsys) -> None:
    """What TRL cannot train is left out with its reason, though three betas were asked for; the others are judged."""
    for rival, stage in (("_best_ranked", "sft"), ("_rloo", "ppo")):  # trained in test_compare.py
        policy = compare.Policy(run / stage, 1.0)
        monkeypatch.setattr(compare.Study, rival, lambda *_, policy=policy: policy)
    (config.parent / "sft.yaml").write_text("model: none\n")
    capsys.readouterr()
    compare.main(["--recipe", str(config.parent), "--run", str(run)])
    reason = "TRL's trainer takes causal models alone"
    assert f"compare: DPO is left out: {reason}" in capsys.readouterr().out
    found = json.loads((run / "compare" / "compare.json").read_text())
    assert list(found["rows"]) == ["SFT", "PPO", "best of 4", "SFT on the best-ranked", "RLOO"]
    assert found["left_out"] == {"DPO": reason} and found["rows"]["PPO"]["wins"] >= 0
    assert f"DPO ({reason})" in html.unescape(report.write_report(run).read_text(encoding="utf-8"))


def test_a_prompt_that_leaves_no_place_for_its_response_is_refused_before_it_is_sampled(tmp_path):
    """An encoder's places are not the decoder's: 40 + 40 tokens fit a BART of 64, not a GPT-2."""
    row = [{"prompt": " ".join(["w1"] * 40)}] * 8
    keys = COMMON | {"iterations": 1, "max_new_tokens": 40, "rewards": [{"function": "len:len"}]}
    for model, fits in ((tiny_models.gpt2(), False), (tiny_models.seq2seq("bart"), True)):
        made = build.PPO(
            PPOConfig(**keys, prompts={"path": "none"}),
            tiny_models.tokenizer(),
            policy=model,
            reference=copy.deepcopy(model),
            value=None,
            score=len,
        )
        queries = made.queries([r["prompt"] for r in row])
        with (
            contextlib.nullcontext() if fits else pytest.raises(UserError, match="leaves 21 places")
        ):
            ppo._check_room(made, queries)


@pytest.mark.slow
@pytest.mark.parametrize("kind", tiny_models.SEQ2SEQ)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_in_every_variant(tmp_path, kind, variant):
    run = train(tmp_path, kind, variant)
    before, after = (
        AutoModelForSeq2SeqLM.from_pretrained(run / stage).state_dict() for stage in ("sft", "ppo")
    )
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert metrics(run / "ppo")["kl"] == pytest.approx(0, abs=0.5)
    assert load_reward(run / "rm").config.reward_bias != 0
