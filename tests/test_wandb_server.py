"""All of a run reaches a server, at once or later, in order and with its lineage; a stub stands for the server."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.process.files import read_jsonl
from test_tracking import KEY, server

pytestmark = [pytest.mark.slow, pytest.mark.fault]

RUN = """
import sys, shutil
from pathlib import Path
import numpy as np
from pipeline.config import ppo, schema
from pipeline.handoff.artifacts import Manifest, Parent, manifest_hash, publish, read
from pipeline.tracking import mirror
from pipeline.tracking.tracker import Tracker
mirror.INIT_SECONDS = mirror.FINISH_SECONDS = 60  # of a busy machine
run, sft = Path(sys.argv[1]), Path(sys.argv[1]) / "sft"
for kind in (schema.SFTConfig, ppo.PPOConfig):
    own = dict(model="m") if kind.stage == "sft" else dict(wandb=schema.Wandb(registry="best"))
    config = kind(run=run, **own)
    parents = {} if kind.stage == "sft" else {"sft": sft}
    work = run / ".work" / kind.stage
    (work / "output").mkdir(parents=True)
    tracker = Tracker(work, config, parents)
    for step in range(1, 4):
        tracker.log(step, {"objective/kl": 0.5 * step, "lr": 1e-3})
    tracker.histograms(3, {"scores": np.array([1.0, 2.0, np.nan])})
    tracker.alert("alarm kl", "too far")
    tracker.samples(3, [{"prompt": p, "response": "回", "score": 1.5, "kl": 0.1} for p in "ab"])
    for name in ("metrics.jsonl", "samples.jsonl"):
        shutil.copy(work / name, work / "output")
    links = {n: Parent(path=str(p), manifest_sha256=manifest_hash(p)) for n, p in parents.items()}
    made = Manifest(stage=kind.stage, config=config.model_dump(mode="json"), parents=links, inputs={"d": "h"})
    final = publish(work / "output", run / kind.stage, made)
    tracker.finish(final, read(final))
"""


def python(*words: str, **environment: str) -> subprocess.CompletedProcess:
    own = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    command = [sys.executable, *words]
    return subprocess.run(
        command,
        env=own | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


class Seen:
    """What a server was sent, by kind."""

    def __init__(self, file: Path):
        lines = file.read_text().splitlines() if file.exists() else []
        self.asked, self.rows, self.files = [], {}, {}
        for line in lines:
            path, _, body = line.partition(" ")
            if "graphql" in path:
                self.asked.append(json.loads(body))
            elif path.endswith("file_stream"):
                sent = json.loads(body).get("files", {}).get("wandb-history.jsonl", {})
                rows = [json.loads(row) for row in sent.get("content", [])]
                self.rows.setdefault(path.split("/")[-2], []).extend(rows)
            elif path.startswith("/upload"):
                self.files[path] = body

    def variables(self, word: str) -> list[dict[str, Any]]:
        return [a["variables"] for a in self.asked if word in a["query"]]

    def check(self, run: Path) -> None:
        """Every row, table, alert, artifact and edge, equal to the records."""
        begun = [v["name"] for v in self.variables("UpsertBucket") if v["displayName"]]
        assert [name.rpartition("-")[0] for name in begun] == ["tiny-sft", "tiny-ppo"]
        for name, stage in zip(begun, ("sft", "ppo"), strict=True):
            record = read_jsonl(run / stage / "metrics.jsonl")
            for row, own in zip(self.rows[name], record, strict=True):
                assert row[f"{stage}/step"] == own["step"]
                assert (row["objective/kl"], row["lr"]) == (own["objective/kl"], own["lr"])
            assert sum(self.rows[name][-1]["histogram/scores"]["values"]) == 2
            [table] = [json.loads(b) for p, b in self.files.items() if name in p and "table" in p]
            samples = read_jsonl(run / stage / "samples.jsonl")
            held = [dict(zip(table["columns"], values, strict=True)) for values in table["data"]]
            assert [{"step": 3} | row for row in held] == samples
        alerts = self.variables("ScriptableRunAlert")
        assert [(a["title"], a["text"]) for a in alerts] == [
            (f"{s}: alarm kl", "too far") for s in ("sft", "ppo")
        ]
        made = [
            v["input"]["artifactCollectionName"]
            for v in self.variables("mutation CreateArtifact (")
        ]
        assert {"tiny-sft", "tiny-ppo", "tiny-ppo-data"} <= set(made)
        used = [v.get("input", v) for v in self.variables("UseArtifact")]
        edges = {(v["runName"], v["artifactID"].partition(":")[0]) for v in used}
        sft, ppo = begun
        assert edges == {(sft, "tiny-sft-data"), (ppo, "tiny-sft"), (ppo, "tiny-ppo-data")}
        [link] = self.variables("LinkArtifact")
        assert link["input"]["artifactPortfolioName"] == "best"


def test_all_of_a_run_reaches_a_server_at_once(tmp_path):
    run = tmp_path / "tiny"
    with server(tmp_path, "good") as (address, file):
        done = python("-c", RUN, str(run), WANDB_API_KEY=KEY, WANDB_BASE_URL=address)
    assert done.returncode == 0 and "not linked" not in done.stdout, done.stderr
    seen = Seen(file)
    seen.check(run)
    pytest.importorskip("wandb_workspaces")
    assert [v["displayName"] for v in seen.variables("UpsertView2")] == ["rlhf-pipeline"]  # once


def test_what_was_mirrored_offline_is_sent_later_once_with_its_edges(tmp_path):
    run, sync = tmp_path / "tiny", ("-m", "pipeline.commands.wandb_sync", "--run")
    nothing = {"NETRC": str(tmp_path / "none")}
    done = python("-c", RUN, str(run), **nothing)
    assert done.returncode == 0, done.stderr
    empty = run / "wandb" / "offline-run-20990101_000000-tiny-sft-abcdef"  # ended before it began
    empty.mkdir()
    (empty / "run-tiny-sft-abcdef.wandb").write_bytes(b":W&B...")
    done = python(*sync, str(run), **nothing)
    assert done.returncode == 2 and "no key: set WANDB_API_KEY" in done.stderr
    done = python(*sync, str(run), WANDB_API_KEY=KEY, WANDB_BASE_URL="http://127.0.0.1:9")
    assert done.returncode == 2 and "127.0.0.1:9 cannot be reached" in done.stderr
    with server(tmp_path, "wrong-key") as (address, _):
        done = python(*sync, str(run), WANDB_API_KEY=KEY, WANDB_BASE_URL=address)
    assert done.returncode == 2 and "was not sent" in done.stderr
    (tmp_path / "sent").unlink()
    with server(tmp_path, "good") as (address, file):
        for _ in range(2):
            done = python(*sync, str(run), WANDB_API_KEY=KEY, WANDB_BASE_URL=address)
            assert done.returncode == 0, done.stderr
        assert "to send" not in done.stdout
    Seen(file).check(run)
