"""The reward stage's data step on a random model: what is sampled, ranked, trained on and kept."""

import json
from pathlib import Path

import pytest
import transformers

import small_run
import tiny_models
from pipeline.config.schema import Data, RMConfig
from pipeline.data.rankings import load_rankings
from pipeline.errors import UserError
from pipeline.feedback.comparisons import sampled_rankings
from pipeline.handoff import artifacts
from stages import rm

# Likes short responses and those that ended; a real labeler's command line.
LABELER = """import argparse, json
parser = argparse.ArgumentParser()
for name in ("samples", "out", "seed"):
    parser.add_argument("--" + name)
args = parser.parse_args()
with open(args.samples) as source, open(args.out, "w") as out:
    for row in map(json.loads, source):
        keys = [(not e, len(r)) for e, r in zip(row["ended"], row["responses"], strict=True)]
        order = sorted(set(keys))
        out.write(json.dumps({**row, "ranks": [1 + order.index(key) for key in keys]}) + "\\n")
"""


@pytest.fixture
def labeler(tmp_path, monkeypatch) -> str:
    (tmp_path / "own_labeler.py").write_text(LABELER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "own_labeler"


def config(root: Path, labeler: str | None, **changes) -> RMConfig:
    demonstrations = [{"prompt": "w1", "response": "w2 w3"}]
    sampling = {
        "prompts": {"path": str(root / "prompts.jsonl")},
        "labeler": labeler,
        "k": {3: 0.5, 5: 0.5},
        "max_new_tokens": 6,
    }
    keys = {
        "run": root / "run",
        "sampling": sampling,
        "demonstrations": {
            "path": str(small_run.write_jsonl(root / "demos.jsonl", demonstrations))
        },
        "validation_fraction": 0.3,
        "max_steps": 1,
        "batch_size": 4,
        "wandb": {"mode": "disabled"},
    }
    return RMConfig(**{**keys, **changes})


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_samples_say_which_responses_ended_and_rankings_with_that_key_load(tmp_path, labeler):
    run, work = small_run.make_run(tmp_path, ("base", "sft")), tmp_path / "work"
    work.mkdir()
    asked = config(tmp_path, labeler)
    rankings = sampled_rankings(asked, run / "sft", tiny_models.tokenizer(), work)
    rows = read(work / "to_rank.jsonl")
    assert len(rows) == len(small_run.PROMPTS)
    assert {len(row["responses"]) for row in rows} == {3, 5}
    ended = [flag for row in rows for flag in row["ended"]]
    assert set(ended) == {True, False}
    assert all(len(row["ended"]) == len(row["responses"]) for row in rows)
    assert rankings == load_rankings(Data(path=str(work / "rankings.jsonl")))
    unended = {
        r for row in rows for r, e in zip(row["responses"], row["ended"], strict=True) if not e
    }
    assert any(set(ranking.responses) & unended for ranking in rankings)
    stamp = (work / "rankings.jsonl").stat().st_mtime_ns
    assert sampled_rankings(asked, run / "sft", tiny_models.tokenizer(), work) == rankings
    assert (work / "rankings.jsonl").stat().st_mtime_ns == stamp  # a restart ranks nothing again


def test_the_reward_model_is_published_with_the_rankings_it_learnt_from(tmp_path, labeler, capfd):
    run = small_run.make_run(tmp_path, ("base", "sft"))
    transformers.utils.logging.enable_progress_bar()
    capfd.readouterr()
    rm.run(config(tmp_path, labeler))
    assert "it/s" not in capfd.readouterr().err  # transformers' own bars
    assert "rankings.jsonl" in artifacts.read(run / "rm", "rm").files
    kept = read(run / "rm" / "rankings.jsonl")
    assert [row["prompt"][0]["content"] for row in kept] == [p["prompt"] for p in small_run.PROMPTS]
    assert all(len(row["ranks"]) == len(row["responses"]) for row in kept)


def test_without_a_labeler_people_are_asked(tmp_path):
    run = small_run.make_run(tmp_path, ("base", "sft"))
    work = tmp_path / "work"
    work.mkdir()
    with pytest.raises(UserError, match=r"to_rank\.jsonl: .* to be ranked by people"):
        sampled_rankings(config(tmp_path, None), run / "sft", tiny_models.tokenizer(), work)
    assert "ranks" not in read(run / "to_rank.jsonl")[0]


def test_a_labeler_that_fails_is_shown(tmp_path, monkeypatch):
    run = small_run.make_run(tmp_path, ("base", "sft"))
    work = tmp_path / "work"
    work.mkdir()
    (tmp_path / "bad_labeler.py").write_text("raise SystemExit('no such scale')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UserError, match=r"the labeler failed: .*bad_labeler[^$]*no such scale"):
        sampled_rankings(
            config(tmp_path, "bad_labeler"), run / "sft", tiny_models.tokenizer(), work
        )
    assert not (work / "rankings.jsonl").exists()
