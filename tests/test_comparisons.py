"""The reward stage's data step on a random model: what is sampled, ranked, trained on and kept."""

import json
from pathlib import Path

import pytest
import torch
import transformers

import small_run
import tiny_models
from pipeline.config.schema import Data, RMConfig
from pipeline.data.rankings import label_noise, load_rankings, strengths
from pipeline.errors import UserError
from pipeline.feedback import comparisons
from pipeline.feedback.comparisons import sampled_rankings
from pipeline.handoff import artifacts
from pipeline.handoff.lineage import why_stale
from pipeline.run import start_again
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


def test_a_labeler_and_the_held_out_rankings_have_the_prompts_rows(tmp_path, monkeypatch):
    """Of which a column that one prompt has alone is no misspelt one of the rankings, and an earlier answer
    or a ranking of other responses is not read in the place of what was sampled."""
    small_run.make_run(tmp_path, ("base", "sft"))
    rows = [{**p, "ranks": [2, 1], "output": "w3"} for p in small_run.PROMPTS]
    rows[3]["messages"] = [{"role": "system", "content": "w1"}, {"role": "user", "content": "w2"}]
    rows[3]["alone"] = "w1"
    small_run.write_jsonl(tmp_path / "prompts.jsonl", rows)
    (tmp_path / "reading.py").write_text(LABELER.replace("keys = [", "row['answer']; keys = ["))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    asked = config(tmp_path, "reading")
    asked.sampling.prompts.bad_rows = 0.1
    folder = rm.run(asked)
    kept = read(folder / "rankings.jsonl")
    assert kept[3]["prompt"] == rows[3]["messages"] and kept[3]["alone"] == "w1"
    assert all(row["answer"] == "w1" for row in kept)
    held_out = read(folder / "held_out.jsonl")
    assert held_out and all(item["row"]["output"] == "w3" for item in held_out)
    assert all(set(item["responses"]) <= set(item["row"]["responses"]) for item in held_out)


# --- people -----------------------------------------------------------------------------------------


def ask(root: Path, **changes) -> Path:
    """A run whose samples wait for people; returns the file."""
    small_run.make_run(root, ("base", "sft"))
    with pytest.raises(UserError, match=r"to_rank\.jsonl: 12 .* to be ranked by people") as told:
        rm.run(config(root, None, **changes))
    assert "the same command goes on" in str(told.value)
    return root / "run" / "to_rank.jsonl"


def rank(path: Path, only: int | None = None) -> bytes:
    """Add ranks to the first lines of a file, in place, as a person would; returns what it is then."""
    rows = read(path)
    for row in rows[:only]:
        row["ranks"] = [1 + sorted(set(row["responses"])).index(r) for r in row["responses"]]
    small_run.write_jsonl(path, rows)
    return path.read_bytes()


def refused(root: Path, path: Path, match: str, **changes) -> None:
    """The command is refused in these words, names the way out, and leaves the file as it is."""
    before = path.read_bytes()
    with pytest.raises(UserError, match=match) as told:
        rm.run(config(root, None, **changes))
    assert f"rm.sampling=null rm.data.path={path}" in str(told.value)
    assert path.read_bytes() == before
    assert not (root / "run" / "rm").exists()


def test_the_same_command_goes_on_with_what_people_ranked_in_place(tmp_path):
    path = ask(tmp_path)
    assert "ranks" not in read(path)[0]
    refused(tmp_path, path, "12 of 12 lines have no ranks yet: lines 1, 2, 3")
    rank(path, 10)
    refused(tmp_path, path, "2 of 12 lines have no ranks yet: lines 11, 12")
    whole = rank(path)
    rm.run(config(tmp_path, None))
    assert path.read_bytes() == whole == (tmp_path / "run" / "rm" / "rankings.jsonl").read_bytes()
    assert artifacts.read(tmp_path / "run" / "rm").inputs["to_rank.jsonl"]


def test_the_command_that_is_told_trains_on_the_file_as_it_is(tmp_path):
    path = ask(tmp_path)
    whole = rank(path)
    folder = rm.run(config(tmp_path, None, sampling=None, data={"path": str(path)}))
    assert path.read_bytes() == whole and artifacts.read(folder, "rm")


def test_ranks_changed_afterwards_make_the_stage_out_of_date(tmp_path):
    path = ask(tmp_path)
    rank(path)
    rm.run(config(tmp_path, None))
    assert why_stale("rm", config(tmp_path, None), tmp_path / "run") is None
    rows = read(path)
    rows[0]["ranks"] = [9, *rows[0]["ranks"][1:]]
    small_run.write_jsonl(path, rows)
    assert why_stale("rm", config(tmp_path, None), tmp_path / "run") == "to_rank.jsonl has changed"


def test_reordered_lines_and_a_renamed_run_go_on(tmp_path):
    path = ask(tmp_path)
    rank(path)
    small_run.write_jsonl(path, read(path)[::-1])
    (tmp_path / "run").rename(tmp_path / "other")
    whole = (tmp_path / "other" / "to_rank.jsonl").read_bytes()
    rm.run(config(tmp_path, None, run=tmp_path / "other"))
    assert (tmp_path / "other" / "to_rank.jsonl").read_bytes() == whole


def _without_the_last(rows):
    del rows[-1]


def _another_prompt(rows):
    rows[2]["prompt"][0]["content"] = "w9"


def _another_response(rows):
    rows[2]["responses"][0] = "w9 w9"


def _a_copy(rows):
    rows[2] = rows[3]


def _a_bad_rank(rows):
    rows[2]["ranks"][0] = "best"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_without_the_last, "1 of 12 samples are missing"),
        (_another_prompt, "1 lines are no samples or repeat one: lines 3, 1 of 12 samples are"),
        (_another_response, "1 lines are no samples or repeat one: lines 3, 1 of 12 samples are"),
        (_a_copy, "1 lines are no samples or repeat one: lines 4, 1 of 12 samples are missing"),
        (_a_bad_rank, r"to_rank.jsonl:3: `ranks\[0\]` is"),
    ],
)
def test_a_file_that_is_not_the_samples_any_more_is_refused_with_the_way_out(
    tmp_path, change, told
):
    path = ask(tmp_path)
    rank(path)
    rows = read(path)
    change(rows)
    small_run.write_jsonl(path, rows)
    refused(tmp_path, path, told)


def test_what_people_touched_outlives_other_settings_force_and_a_lost_record(tmp_path):
    path = ask(tmp_path)
    rank(path, 1)
    refused(tmp_path, path, "was not sampled from this model with these settings", seed=2)
    start_again(config(tmp_path, None))
    refused(tmp_path, path, "11 of 12 lines have no ranks")
    (path.parent / ".to_rank.json").unlink()
    refused(tmp_path, path, "was not sampled from this model with these settings")


def test_samples_that_nobody_touched_give_way_to_those_of_other_settings(tmp_path):
    path = ask(tmp_path)
    before = path.read_bytes()
    with pytest.raises(UserError, match="to be ranked by people"):
        rm.run(config(tmp_path, None, seed=2))
    assert path.read_bytes() != before


@pytest.mark.parametrize("name", [".to_rank.json", "to_rank.jsonl"])
def test_cut_off_while_the_samples_are_written_they_are_sampled_again(tmp_path, monkeypatch, name):
    """Whichever of the two files is being written when the process dies."""
    small_run.make_run(tmp_path, ("base", "sft"))
    write = comparisons.write_atomically

    def dying(path, text):
        if path.name == name:
            raise KeyboardInterrupt
        write(path, text)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(comparisons, "write_atomically", dying)
        rm.run(config(tmp_path, None))
    with pytest.raises(UserError, match="to be ranked by people"):
        rm.run(config(tmp_path, None))
    rank(tmp_path / "run" / "to_rank.jsonl")
    rm.run(config(tmp_path, None))


# --- a labeler --------------------------------------------------------------------------------------


def test_the_policy_samples_on_the_accelerator(tmp_path, labeler, monkeypatch):
    """What `device()` says is what the model is moved to: here another precision, which is seen."""
    run, seen = small_run.make_run(tmp_path, ("base", "sft")), []
    generate = comparisons.generate

    def watched(model, *args, **kwargs):
        seen.append(model.dtype)
        return generate(model, *args, **kwargs)

    monkeypatch.setattr(comparisons, "device", lambda: torch.float64)
    monkeypatch.setattr(comparisons, "generate", watched)
    (tmp_path / "work").mkdir()
    sampled_rankings(
        config(tmp_path, labeler), run / "sft", tiny_models.tokenizer(), tmp_path / "work"
    )
    assert set(seen) == {torch.float64}


BAD_LABELERS = {
    "wrote nothing": "",
    "nothing to use in 0 rows": "open(args.out, 'w').close()",
    "1 of 12 samples are missing": "write(rows[:-1])",
    "1 lines are no samples or repeat one: lines 13": "write([*rows, rows[0]])",
    "2 lines are no samples or repeat one: lines 1, 2": "rows[0]['prompt'] = rows[1]['prompt'] = 'w1'; write(rows)",
    "1 of 12 lines have no ranks yet: lines 3": "del rows[2]['ranks']; write(rows)",
    "ranked.jsonl:2: .*expected a number": "rows[1]['ranks'][0] = 'good'; write(rows)",
    "ranked.jsonl:1: ": "open(args.out, 'w').write('{')",
}


@pytest.mark.parametrize("told", BAD_LABELERS)
def test_a_labeler_that_does_not_keep_to_its_samples_is_named(tmp_path, monkeypatch, told):
    (tmp_path / "own_labeler.py").write_text(
        LABELER.partition("with open")[0]
        + "rows = [json.loads(line) for line in open(args.samples)]\n"
        + "for row in rows:\n"
        + "    row['ranks'] = [1 + sorted(set(row['responses'])).index(r) for r in row['responses']]\n"
        + "def write(rows):\n"
        + "    open(args.out, 'w').write(''.join(json.dumps(row) + '\\n' for row in rows))\n"
        + BAD_LABELERS[told]
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    small_run.make_run(tmp_path, ("base", "sft"))
    with pytest.raises(UserError, match=f"the labeler own_labeler .*{told}"):
        rm.run(config(tmp_path, "own_labeler"))
    (tmp_path / "mended.py").write_text(LABELER)
    rm.run(config(tmp_path, "mended"))  # nothing that the bad one left is in the way


def test_a_labeler_that_is_not_there_is_told_before_anything_is_sampled(tmp_path, monkeypatch):
    small_run.make_run(tmp_path, ("base", "sft"))
    monkeypatch.setattr(comparisons, "_sample", None)
    with pytest.raises(UserError, match=r"sampling\.labeler: no module no\.labeler"):
        rm.run(config(tmp_path, "no.labeler"))


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


# --- what rankings are worth ------------------------------------------------------------------------


def several(root: Path) -> Path:
    """Two people's rankings of the same responses, of which one pair in three contradicts; strengths beside them."""
    rows = []
    for prompt in small_run.PROMPTS:
        responses, strengths = ["w1 w2", "w3", "w4 w5 w6"], [2.0, 0.0, -2.0]
        for ranks in ([1, 2, 3], [1, 3, 2]):
            row = {"prompt": prompt["prompt"], "responses": responses, "ranks": ranks}
            rows.append({**row, "strengths": strengths})
    return small_run.write_jsonl(root / "several.jsonl", rows)


def test_contradicting_repeats_are_counted(tmp_path):
    rankings = load_rankings(Data(path=str(several(tmp_path))))
    assert label_noise(rankings) == {
        "labels_repeated": 36,
        "labels_contradict": pytest.approx(1 / 3),
    }
    assert label_noise(rankings[::2]) == {}


def test_contradictions_within_a_row_are_counted():
    row = {"prompt": "w1", "responses": [{"role": "assistant", "content": "w2"}, "w3", "w4"]}
    people = [[1, 2, 3], [3, 2, 1], [1, 1, 2], [2, 1, None]]
    rankings = load_rankings([row | {"ranks": people}], notes=[])
    assert label_noise(rankings) == {
        "labels_repeated": 9,  # of w2 and w3 three, w2 and w4 three, w3 and w4 three
        "labels_contradict": pytest.approx(2 / 3),
    }
    with pytest.raises(UserError, match=r"1: soft_labels: no `strengths`, .* which are texts"):
        strengths(load_rankings([row | {"ranks": [1, 2, 3], "strengths": [2, 1, 0]}], notes=[])[0])


def test_scores_far_apart_are_sure(tmp_path, monkeypatch):
    monkeypatch.setattr(comparisons, "score_sequences", lambda *_, **__: [0.0, 800.0, 1.0, 1.5])
    tiny_models.reward(2).save_pretrained(tmp_path / "rm")
    sampling = config(tmp_path, None).sampling.model_copy(
        update={"unsure": str(tmp_path / "rm"), "count": 1}
    )
    asking = comparisons.Asking(sampling, 0, tmp_path, tiny_models.tokenizer(), set())
    prompt = [{"role": "user", "content": "w1"}]
    rows = [{"prompt": prompt, "responses": texts} for texts in (["w2", "w3"], ["w4", "w5"])]
    assert comparisons._least_sure(asking, rows) == rows[1:]


def test_soft_labels_and_a_margin_reach_the_training(tmp_path):
    run = small_run.make_run(tmp_path, ("base", "sft"))
    source = {"path": str(several(tmp_path))}
    weights, losses = [], []
    for n, keys in enumerate(({}, {"soft_labels": True}, {"margin": 1.0})):
        changes = {"run": tmp_path / str(n), "borrow": run, "sampling": None, "data": source}
        folder = rm.run(config(tmp_path, None, **changes, **keys))
        manifest = artifacts.read(folder, "rm")
        assert manifest.metrics["labels_contradict"] == pytest.approx(1 / 3)
        weights.append((folder / "model.safetensors").read_bytes())
        losses.append(read(folder / "metrics.jsonl")[1]["train/loss"])
    assert len(set(weights)) == 3
    assert losses[2] > losses[0]
    rows = read(tmp_path / "several.jsonl")
    del rows[5]["strengths"]
    small_run.write_jsonl(tmp_path / "several.jsonl", rows)
    changes = {"run": tmp_path / "3", "borrow": run, "sampling": None, "data": source}
    with pytest.raises(UserError, match=r"several\.jsonl:6: soft_labels: no `strengths`"):
        rm.run(config(tmp_path, None, soft_labels=True, validation_fraction=0.1, **changes))
