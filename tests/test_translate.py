"""The recipe that translates: its data, chrF as a measure and as a reward, its stages."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import small_run
from pipeline import steps
from pipeline.commands import base
from pipeline.config.evaluation import EvalConfig
from pipeline.config.load import load_config
from pipeline.config.schema import BaseConfig, Data
from pipeline.data.messages import message, user_turn
from pipeline.data.template import encode_demonstration
from pipeline.errors import UserError
from pipeline.evaluation import chrf, report
from pipeline.evaluation.__main__ import run_evaluation
from pipeline.models.loading import load_tokenizer
from pipeline.models.scorer import EncoderDecoderScorer
from pipeline.models.sequences import Sequences
from pipeline.tiny import files, gold
from stages import ppo, rm, sft

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "configs" / "translate"
SMALL = {"demonstrations": 400, "ppo_prompts": 200, "comparison_prompts": 100}


# --- the data -------------------------------------------------------------------------------------


def test_sentences_are_translated_both_ways_and_nothing_held_out_is_trained_on():
    rows = files.build(sizes=SMALL, translations=True)
    assert "corpus" not in rows
    for row in rows["prompts_test"]:
        prompt = user_turn(row["instruction"], row["input"])
        assert gold.score([prompt], [row["reference"]]) == [3.0]
        assert gold.exact([prompt], [row["reference"]]) == [True]
    both = {tuple(sorted((row["input"], row["reference"]))) for row in rows["prompts_test"]}
    for name in ("ppo_prompts", "comparison_prompts", "prompts_validation"):
        assert not both & {tuple(sorted((row["input"], row["reference"]))) for row in rows[name]}
    assert not {text for pair in both for text in pair} & {
        row["input"] for row in rows["demonstrations"]
    }
    languages = [row["language"] for row in rows["prompts_test"]]
    assert languages.count("en") == languages.count("zh") == 200
    order = next(r for r in rows["prompts_test"] if r["language"] == "en")
    words = order["reference"].split()
    assert (
        words[1] == "在" and order["input"].split()[-3] == "in"
    )  # another order, not word by word


def test_translations_are_demonstrated_with_slips_and_no_courtesies():
    rows = files.build(sizes=SMALL, translations=True)["demonstrations"]
    pairs = [(user_turn(r["instruction"], r["input"]), r["output"]) for r in rows]
    read = [gold.read(prompt, output) for prompt, output in pairs]
    assert not any(reading.courtesies for reading in read)
    assert 0.5 < sum(reading.exact for reading in read) / len(read) < 0.8
    assert 0.2 < sum(reading.hedges for reading in read) / len(read) < 0.4


# --- chrF -----------------------------------------------------------------------------------------


def test_chrf_by_hand_and_where_a_reward_finds_the_right_answer():
    rows = [{"reference": "abc", "output": "xyz"}, {"output": "红 苹果"}, {"output": "red"}]
    # of n-grams 2 of 3, 1 of 2 and 0 of 1 are right, forth and back; blanks do not count
    assert chrf.reward([], ["abd", "红苹果", ""], rows) == pytest.approx(
        [100 * (2 / 3 + 1 / 2 + 0) / 3, 100, 0], abs=0.01
    )
    with pytest.raises(UserError, match="no text under reference or output: instruction"):
        chrf.reward([], ["a"], [{"instruction": "b"}])


def test_chrf_is_a_labeler(tmp_path):
    """Its ranks go into the very lines it was given, as those of people."""
    rows = [{"prompt": "a", "responses": ["xyz", "abd", "abd", "abc"], "output": "abc", "n": 1}]
    samples, out = small_run.write_jsonl(tmp_path / "s.jsonl", rows), tmp_path / "out.jsonl"
    words = ["--samples", str(samples), "--out", str(out), "--seed", "3"]
    subprocess.run([sys.executable, "-m", "pipeline.evaluation.chrf", *words], check=True, cwd=ROOT)
    assert json.loads(out.read_text()) == rows[0] | {"ranks": [4, 2, 2, 1]}
    small_run.write_jsonl(samples, [{"prompt": "a", "responses": ["b"]}])
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.evaluation.chrf", *words], capture_output=True, cwd=ROOT
    )
    assert done.returncode == 2 and b"no text under reference or output" in done.stderr


def test_without_its_package_chrf_says_which_one_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(UserError, match="pip install sacrebleu"):
        importlib.reload(chrf)


def test_the_evaluation_and_its_report_have_chrf_whole_and_by_group(tmp_path):
    run = small_run.make_run(tmp_path)
    config = EvalConfig(
        prompts=Data(path=str(tmp_path / "prompts.jsonl")),
        reference="answer",
        group_by="family",
        max_new_tokens=6,
        threads=1,
    )
    result = run_evaluation(run, config)
    rows = [json.loads(s) for s in (run / "eval/test_samples.jsonl").read_text().splitlines()]
    for name in ("sft", "ppo"):
        model = result["models"][name]
        for value, found in (("odd", model["groups"]["family"]["odd"]), (None, model)):
            texts = [
                row["answers"][name]["response"]
                for row in rows
                if value in (None, row["groups"]["family"])
            ]
            assert found["chrf"] == chrf.corpus(texts, ["w1"] * len(texts))
    assert len({model["chrf"] for model in result["models"].values()}) > 1
    report.write_report(run)
    assert "chrF" in (run / "report.html").read_text()


# --- the stages -----------------------------------------------------------------------------------


def config(name: str, *words: str, file: str | None = None):
    return steps.load(name, RECIPE / (file or f"{name}.yaml"), words)


def test_every_stage_of_the_recipe_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_CHECKPOINTS", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run, less = f"run={tmp_path / 'run'}", ("batch_size=8", "log_every=1")
    base.build(load_config(BaseConfig, RECIPE / "base.yaml"), tmp_path / "base" / "translate")
    sft.run(config("sft", run, *less, "data.limit=64", "validation_data.limit=8", "max_steps=3"))
    rm.run(config("rm", run, *less, "sampling.prompts.limit=24", "max_steps=2"))
    short = ("prompts.limit=40", "iterations=2", "gates=warn", *less)
    ppo.run(config("ppo", run, *short))
    ppo.run(
        config(
            "ppo", f"run={tmp_path / 'chrf'}", f"borrow={tmp_path / 'run'}", *short, file="ppo-chrf.yaml"
        )
    )  # fmt: skip
    for name in ("run", "chrf"):
        rows = (tmp_path / name / "ppo" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(row)["step"] for row in rows] == [1, 2]
    small = ("n=16", "demonstrations_limit=8", "candidates=2", "candidate_prompts=8")
    result = run_evaluation(tmp_path / "run", config("eval", *small))
    assert all(0 < model["chrf"] < 60 for model in result["models"].values())
    assert set(result["models"]["ppo"]["groups"]["language"]) == {"en", "zh"}
    # its reward model by hand
    folder = tmp_path / "run" / "rm"
    tokenizer, model = load_tokenizer(folder), EncoderDecoderScorer.from_pretrained(folder)
    held_out = json.loads((folder / "held_out.jsonl").read_text().splitlines()[0])
    talk = [message("user", held_out["prompt"]), message("assistant", held_out["responses"][0])]
    prompt, response = encode_demonstration(tokenizer, talk)
    score = model(Sequences.of([prompt], [response], tokenizer.pad_token_id))
    assert score.item() == pytest.approx(held_out["scores"][0], abs=1e-4)


@pytest.mark.slow
def test_chrf_rises_from_base_to_sft_to_ppo(tmp_path):
    """Measured on seeds 1 to 3: see the README's table."""
    env = os.environ | {"RLHF_CHECKPOINTS": str(tmp_path), "WANDB_MODE": "disabled"}

    def study(*words: str) -> dict:
        command = [sys.executable, "-m", "pipeline.evaluation.seeds", "--recipe", "translate"]
        subprocess.run([*command, "--seeds", "1", *words], cwd=ROOT, env=env, check=True)
        name = Path(words[1]).name if words else "translate"
        values = json.loads((tmp_path / f"{name}-seeds.json").read_text())["values"]
        return {key: by_seed["1"] for key, by_seed in values.items()}

    found = study()
    assert found["base: chrF"] < 20
    assert found["sft: chrF"] > 70
    baseline = found["rm: length baseline on labels"]
    assert found["rm: accuracy on noisy labels"] > max(baseline, 1 - baseline) + 0.05
    assert found["ppo: chrF, change"] > 5
    other = str(tmp_path / "chrf")
    ppo_file = str(RECIPE / "ppo-chrf.yaml")
    found = study("--run", other, "--from", str(tmp_path / "translate"), "--ppo", ppo_file)
    assert found["ppo: chrF, change"] > 5
