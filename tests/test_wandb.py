"""What Weights & Biases is told, read back from its own files: all of the record, and no more."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import small_run
from pipeline.config import ppo
from pipeline.evaluation import mirrored
from pipeline.evaluation.report import main as report
from pipeline.handoff.found import find_stages
from pipeline.ppo.alarms import Alarms
from pipeline.process.files import sha256
from pipeline.tracking import mirror
from pipeline.tracking.tracker import Tracker, read_rows
from test_resume import base, records, stages_of


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def read_back(run: Path) -> dict[str, list[Any]]:
    """Records of each kind in the one offline run below a directory."""
    [folder] = (run / "wandb").glob("offline-run-*")
    wandb = Path(sys.executable).with_name("wandb")
    command = [str(wandb), "leet", "inspect", "--json", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=run)
    out: dict[str, list[Any]] = {}
    for line in map(json.loads, done.stdout.splitlines()):
        out.setdefault(line["type"], []).append(line.get(line["type"]))
    return out


def history(records: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Rows as they were logged, nested names flat again."""
    return [record["item"] for record in records["history"]]


def a_tracker(run: Path) -> Tracker:
    work = run / ".work" / "ppo"
    work.mkdir(parents=True)
    return Tracker(work, ppo.PPOConfig(run=run))


@pytest.mark.slow
def test_every_metric_and_alert_is_there_and_equals_the_record(tmp_path, monkeypatch):
    for name, value in (("TAGS", "a,b"), ("NOTES", "why"), ("NAME", "mine"), ("RUN_GROUP", "all")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    made = a_tracker(tmp_path / "tiny")
    alarms = Alarms(ppo.AlarmLimits(kl_per_token=1), (), made.alert)
    for step in (1, 2, 3, 4):
        row = {
            "objective/kl": 0.5 * step,
            "objective/rlhf_reward": -abs(step - 3),
            "bad": float("nan"),
        }
        made.log(step, row | alarms(step, row))
    made.finish()

    found = read_back(tmp_path / "tiny")
    rows = [{k: v for k, v in row.items() if k[0] != "_"} for row in history(found)]
    for row, own in zip(rows, read_rows(made.metrics_path), strict=True):
        assert row.pop("ppo/step") == own.pop("step")
        del own["time"], own["bad"]  # wandb's NaN is no JSON
        assert {name: row[name] for name in own} == own
    [about] = found["run"]
    assert (about["display_name"], about["run_group"], about["notes"]) == ("mine-ppo", "all", "why")
    assert (about["tags"], about["job_type"]) == (["a", "b"], "ppo")
    config = about["config"]["update"]
    assert config["kl_coef"] == ppo.PPOConfig().kl_coef
    assert config["packages"]["wandb"] and config["code"]["commit"] == about["git"]["commit"]
    [alert] = found["alert"]  # over the limit in two iterations, told once
    assert alert["title"] == "ppo: alarm kl_per_token" and "iteration 3" in alert["text"]
    summary = {k: v for record in found["summary"] for k, v in record["update"].items()}
    assert summary["objective/kl"] == 2.0  # the last
    assert summary["objective/rlhf_reward"] == {"max": 0, "last": -1}
    axes = {m.get("glob_name") or m["name"]: m.get("step_metric") for m in found["metric"]}
    assert axes["*"] == "ppo/step"


@pytest.mark.slow
def test_an_evaluation_and_a_report_are_runs_of_their_own(tmp_path, monkeypatch):
    run = small_run.make_run(tmp_path, ["sft", "rm", "ppo"])
    answer = {"text": "yes", "ended": True, "judge": 1.5}
    samples = [
        {"prompt": f"p{i}", "groups": {}, "answers": {"sft": answer, "ppo": answer}} for i in "01"
    ]
    result = {
        "split": "test",
        "config": {"samples": 1},
        "models": {"ppo": {"judge": 1.5, "n": [1]}},
    }
    stages = find_stages(run)
    mirrored.evaluation(run, stages, result, samples)
    found = read_back(run)
    [about] = found["run"]
    assert (about["display_name"], about["job_type"]) == ("run-eval", "eval")
    assert about["config"]["update"]["parents"].keys() >= {"sft", "rm", "ppo"}
    assert {"models/ppo/judge": 1.5, "split": "test"} in [r["update"] for r in found["summary"]]
    [table] = (run / "wandb").glob("offline-run-*/files/media/table/*.json")
    held = json.loads(table.read_text())
    assert held["data"] == [["p0", "yes", True, 1.5, "yes", True, 1.5]]
    assert "ppo: judge" in held["columns"]

    (run / "wandb").rename(run / "eval-wandb")
    report(["--run", str(run)])
    found = read_back(run)
    summary = {k: v for record in found["summary"] for k, v in record["update"].items()}
    assert summary["verdict/ppo"] in ("good", "watch", "bad")
    assert "conclusion" in summary
    assert not list((run / "wandb").glob("offline-run-*/files/media/html/*"))  # not unless asked


def test_a_mirror_off_costs_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(mirror.Mirror, "_init_as", lambda *_: pytest.fail("begun"))
    made = a_tracker(tmp_path / "tiny")
    made.log(1, {"loss": 1.0})
    made.alert("a", "b")
    made.finish()
    assert not (tmp_path / "tiny" / "wandb").exists()


@pytest.mark.slow
def test_what_is_shown_changes_nothing_that_is_trained(tmp_path, monkeypatch):
    model, root, shown = base(tmp_path / "base"), tmp_path / "off", tmp_path / "shown"
    for _, call in stages_of(root, model):
        call()
    for name in ("sft", "rm"):
        shutil.copytree(root / name, shown / name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    _, call = stages_of(shown, model)[-1]
    call()
    for path in (root / "ppo").rglob("*.safetensors"):
        assert sha256(shown / path.relative_to(root)) == sha256(path)
    assert records(shown / "ppo") == records(root / "ppo")
    samples = (shown / "ppo" / "samples.jsonl").read_text()
    assert samples == (root / "ppo" / "samples.jsonl").read_text()

    found = read_back(shown)
    seen = {row["_step"]: row for row in history(found)}
    for step in range(1, 7):
        for name in ("scores", "lengths", "ratios", "values"):
            assert sum(seen[step][f"histogram/{name}.values"]) > 0
    assert sum(seen[3]["histogram/scores.values"]) == 4  # episodes of a batch
