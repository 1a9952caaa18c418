"""lm-evaluation-harness, where it is installed, runs our local task without a network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import small_run
import tiny_models
from pipeline.evaluation import anything

TASKS = Path(__file__).parent.parent / "configs" / "lm-eval"


@pytest.mark.slow
def test_the_local_task_finds_what_our_own_evaluation_finds(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(tmp_path)
    model = tiny_models.saved_policy(tmp_path / "a" / "sft")
    rows = [{"instruction": f"w{i}", "input": "w1", "output": "w2"} for i in range(6)]
    data = Path("checkpoints/base/tiny/data/demonstrations_validation.jsonl")
    small_run.write_jsonl(data, rows)
    words = ["eval.max_new_tokens=16", "--data", str(data), "--model", model]
    config = str(TASKS.parent / "eval.yaml")
    anything.main(["--config", config, *words])
    samples = [json.loads(line) for line in next(Path("checkpoints/eval").glob("*.jsonl")).open()]
    for row, sample in zip(rows, samples, strict=True):  # every second one is right
        answer = sample["answers"]["a-sft"]["response"]
        row["output"] = answer if int(row["instruction"][1:]) % 2 else f"{answer} w9"
    small_run.write_jsonl(data, rows)
    anything.main(["--config", config, *words])
    command = "--model hf --device cpu --tasks tiny --apply_chat_template --output_path out"
    command += f" --model_args pretrained={model} --include_path {TASKS}"
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    subprocess.run(
        [sys.executable, "-m", "lm_eval", *command.split()], env=os.environ | offline, check=True
    )
    theirs = json.loads(next(Path("out").rglob("results*.json")).read_text())
    ours = json.loads(next(Path("checkpoints/eval").glob("*.json")).read_text())
    assert ours["models"]["a-sft"]["exact"] == 0.5
    assert theirs["results"]["tiny"]["exact_match,none"] == 0.5
