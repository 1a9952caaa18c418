"""The summary and the verdicts of a run, from records alone."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

import small_run
from pipeline.config.ppo import GateBars
from pipeline.errors import UserError
from pipeline.evaluation import about, record, summary
from pipeline.handoff import found
from pipeline.handoff.remembered import Made, command, note
from pipeline.ppo.preflight import of_sft


@pytest.fixture
def run(tmp_path):
    return small_run.make_run(tmp_path)


def printed(run) -> str:
    console = Console(file=io.StringIO(), width=110)
    summary.show(record.load_record(run), console)
    return console.file.getvalue()


def judged(run, **changes) -> None:
    """Write an evaluation of the run's artifacts as they are."""
    versus = {"rate": 0.7, "low": 0.6, "high": 0.8, "groups": {}}
    stages = found.find_stages(run)
    result = {
        "split": "test",
        "prompts": 12,
        "config": {"judge": "some.judge"},
        "artifacts": {n: {"manifest_sha256": s.manifest_sha256} for n, s in stages.items()},
        "models": {
            "base": {"judge": -3.0, "ended": 0.1, "length": 9.0},
            "sft": {"judge": 1.0, "exact": 0.5, "ended": 0.99, "length": 8.0},
            "ppo": {"judge": 1.5, "exact": 0.6, "ended": 1.0, "length": 9.0},
        },
        "comparisons": {"sft_vs_base": versus, "ppo_vs_sft": versus},
        "kl": {"ppo_vs_sft": 2.34, "std_error": 0.1},
    }
    (run / "eval").mkdir(exist_ok=True)
    (run / "eval" / "test.json").write_text(json.dumps({**result, **changes}))


def level_of(run, stage: str) -> str:
    return {v.stage: v.level for v in about.verdicts(record.load_record(run))}[stage]


def test_before_any_evaluation_it_tells_what_the_stages_recorded(run):
    out = printed(run)
    for text in ("Held-out perplexity went from 40 to", "accuracy is 0.75 on 4 pairs", "make eval"):
        assert text in out
    assert "The score it optimises went from 0.75" in out  # objective/scores of the first line


def test_with_an_evaluation_it_tells_win_rate_kl_and_exact_match(run):
    judged(run)
    out = printed(run)
    for text in (
        "some.judge",
        "70.0%",
        "60.0% to 80.0%",
        "2.34 ± 0.10",
        "Exact match",
        "make report",
    ):
        assert text in out


@pytest.mark.parametrize(
    ("stages", "command"),
    [
        (("base", "sft"), "make rm RUN=run CKPT="),
        (("base", "sft", "rm"), "make ppo RUN=run"),
        (("base", "sft", "ppo"), "make eval report RUN=run"),  # on other rewards
        (("rm",), "make sft RUN=run"),  # the SFT model that it was trained from is gone
    ],
)
def test_the_next_step_is_the_first_missing_stage(tmp_path, stages, command):
    assert command in printed(small_run.make_run(tmp_path, stages))


def test_the_next_step_never_is_an_evaluation_that_the_recipe_does_not_have(run, tmp_path):
    note(run, "ppo", Made(config="ppo.yaml"), tmp_path, None)
    assert "next     make report RUN=run" in printed(run)
    assert "make eval" not in printed(run)
    (tmp_path / "eval.yaml").touch()
    assert "next     make eval report RUN=run" in printed(run)


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ("checkpoints/a", "make chat RUN=a"),
        ("runs/a", "make chat RUN=a CKPT=runs"),
        ("/data/my runs/a", "make chat RUN=a CKPT='/data/my runs'"),
    ],
)
def test_a_command_names_the_folder_of_runs_where_it_is_not_the_usual_one(run, words):
    assert command(Path(run), "chat") == words


def test_nothing_made_yet_is_said(tmp_path):
    with pytest.raises(UserError, match="begin with: make sft RUN=none"):
        summary.main(["--run", str(tmp_path / "none")])


def test_an_evaluation_of_other_artifacts_is_not_shown(run):
    judged(run, artifacts={"sft": {"manifest_sha256": "0" * 64}})
    out = printed(run)
    assert "earlier artifacts" in out
    assert "The judge prefers" not in out


def test_when_even_the_first_stage_is_of_something_else_it_is_the_next(run):
    path = run.parent / "base" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "template_hash": "another"}))
    out = printed(run)
    assert "sft was made from another base" in out and "next     make sft RUN=run" in out


def test_it_starts_fast_without_torch(run):
    code = "import sys; from pipeline.evaluation import summary; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


# --- verdicts -------------------------------------------------------------------------------------


def test_a_win_rate_below_one_half_is_bad_and_an_open_one_is_watched(run):
    judged(run)
    assert level_of(run, "sft") == "good"
    lost = {"rate": 0.3, "low": 0.2, "high": 0.4, "groups": {}}
    open_ = {"rate": 0.52, "low": 0.45, "high": 0.59, "groups": {}}
    judged(run, comparisons={"sft_vs_base": open_, "ppo_vs_sft": lost})
    assert (level_of(run, "sft"), level_of(run, "ppo")) == ("watch", "bad")


def test_over_optimisation_is_named(run):
    lost = {"rate": 0.3, "low": 0.2, "high": 0.4, "groups": {}}
    by_rm = {"rate": 0.9, "low": 0.8, "high": 0.95, "groups": {}}
    judged(run, comparisons={"ppo_vs_sft": lost, "ppo_vs_sft_by_rm": by_rm})
    texts = [f.text for v in about.verdicts(record.load_record(run)) for f in v.findings]
    assert any(text.startswith("Over-optimised") for text in texts)


def rewrite(run, stage: str, **metrics) -> None:
    """Other headline metrics in a stage's manifest."""
    path = run / stage / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["metrics"].update(metrics)
    path.write_text(json.dumps(manifest))


def test_too_few_pairs_are_said_to_be_too_few(run):
    """Of four pairs three are right, and the longer one wins in two: nobody can tell that from chance."""
    rm = next(v for v in about.verdicts(record.load_record(run)) if v.stage == "rm")
    assert rm.level == "watch"
    assert rm.findings[0].text.startswith("accuracy is 0.75 on 4 pairs")
    assert "the 0.5 of 'the longer one wins': too few pairs to tell" in rm.findings[0].text
    assert "watch  accuracy is 0.75 on 4 pairs" in printed(run)


def test_a_reward_model_no_better_than_length_is_bad_and_the_summary_says_why(run):
    rewrite(run, "rm", accuracy=0.52, accuracy_low=0.49, pairs=900, length_baseline=0.41)
    found = about.verdicts(record.load_record(run))
    assert about.conclusion(found).startswith("Bad: Reward model. Later stages build on it")
    out = " ".join(printed(run).split())
    assert "rm (bad)" in out
    assert (
        "bad accuracy is 0.52 on 900 pairs (95 % interval from 0.49), must exceed the 0.59 of"
        in out
    )
    assert "'the shorter one wins': no better than length" in out


def test_an_sft_that_ppo_refuses_is_not_good_and_the_bar_is_the_runs_own(run, tmp_path):
    (run / "ppo").rename(tmp_path / "not-made-yet")
    judged(run)
    rewrite(run, "sft", eos_share=0.05, format=0.9)
    judged(run)
    sft = about.verdicts(record.load_record(run))[0]
    refused = [f.text for f in of_sft(record.load_record(run).stages["sft"].metrics, GateBars())
               if f.level == "bad"]  # fmt: skip
    assert sft.level == "bad" and [f.text for f in sft.findings if f.level == "bad"] == refused
    assert f"bad    {refused[0][:40]}" in printed(run)
    (tmp_path / "ppo.yaml").write_text("gate_bars: {eos_share: 0.01}\n")
    note(run, "ppo", Made(config=str(tmp_path / "ppo.yaml")), tmp_path, None)
    assert level_of(run, "sft") == "good"
    (tmp_path / "ppo.yaml").write_text("gate_bars: {eos_share: 0.01\n")  # being written
    assert level_of(run, "sft") == "bad"


def test_an_alarms_limit_is_the_verdicts_bar_too(tmp_path):
    for limit, level in ((0.3, "good"), (0.2, "watch")):
        run = small_run.make_run(tmp_path / str(limit), ppo={"alarms": {"kl_per_token": limit}})
        judged(run)
        ppo = about.verdicts(record.load_record(run))[-1]
        [kl] = [f for f in ppo.findings if f.text.startswith("KL to SFT is 2.34")]
        assert kl.level == level
        assert f"0.26 a token (watch above {limit:.3g})" in kl.text  # 9 tokens


def test_responses_that_do_not_end_are_bad_and_a_far_policy_is_to_be_watched(run):
    models = {"sft": {"ended": 0.4, "length": 8.0}, "ppo": {"ended": 0.97, "length": 20.0}}
    judged(run, models=models, kl={"ppo_vs_sft": 60.0, "std_error": 1.0}, comparisons={})
    found = {v.stage: v for v in about.verdicts(record.load_record(run))}
    assert found["sft"].level == "bad"
    levels = [(f.level, f.text[:12]) for f in found["ppo"].findings]
    assert ("watch", "KL to SFT is") in levels
    assert ("watch", "97.0% of res") in levels
    assert ("watch", "Responses ar") in levels  # 2.5 times as long; the alarm's limit is 2


def test_a_family_that_got_worse_is_named(run):
    groups = {"family": {"odd": {"rate": 0.2, "low": 0.1, "high": 0.3}}}
    versus = {"rate": 0.7, "low": 0.6, "high": 0.8, "groups": groups}
    judged(run, comparisons={"ppo_vs_sft": versus})
    texts = [f.text for v in about.verdicts(record.load_record(run)) for f in v.findings]
    assert "family odd: wins only 20% against SFT, worse than even." in texts


# --- reading --------------------------------------------------------------------------------------


def test_a_borrowed_stage_is_found_through_the_manifest_that_names_it(run, tmp_path):
    child = tmp_path / "child"
    child.mkdir()
    (run / "ppo").rename(child / "ppo")
    stages = found.find_stages(child)
    assert list(stages) == ["base", "sft", "rm", "ppo"]
    assert stages["rm"].path == run / "rm"


def test_null_values_and_a_line_cut_short_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "a": 2.0}\n{"step": 2, "a": null}\n{"step": 3, "a": 4.0}\n{"step": 4, "a"'
    )
    curve = found.read_jsonl(path)
    assert record.values(curve, "a") == [(1, 2.0), (3, 4.0)]
    assert record.ends(curve, "a") == (2.0, 3.0)
    assert record.ends(curve, "b") is None


def test_the_summary_says_how_long_each_stage_took(run):
    path = run / "sft" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["metrics"]["minutes"] = 1.26
    path.write_text(json.dumps(manifest))
    assert f"{run / 'sft'} (1.3 min)" in printed(run).replace("\n", "")


def test_a_judge_on_few_pairs_cannot_tell_either(run):
    few = {"accuracy": 0.0, "accuracy_low": 0.0, "accuracy_high": 0.79, "pairs": 1}
    best = [{"n": 1, "judge": 0.5}, {"n": 2, "judge": 0.0}]
    judged(run, rm={**few, "length_baseline": 0.0, "best_of_n": best})
    assert level_of(run, "rm") == "watch"
    many = {**few, "accuracy": 0.45, "accuracy_high": 0.5, "pairs": 900}
    judged(run, rm={**many, "length_baseline": 0.5, "best_of_n": best})
    found = about.verdicts(record.load_record(run))
    rm = next(v for v in found if v.stage == "rm")
    assert [f.text[:22] for f in rm.findings if f.level == "bad"] == [
        "It agrees with the jud",
        "The best of 2 by its s",
    ]


def test_bars_of_an_older_version_are_the_defaults(run):
    path = run / "ppo" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["config"]["alarms"] = {"length": 3.0, "a_limit_that_is_no_more": 1}
    path.write_text(json.dumps(manifest))
    assert record.load_record(run).limits.length == 2.0


def test_a_stale_evaluation_that_the_recipe_cannot_make_again_is_said_without_a_command(run):
    judged(run, artifacts={"sft": {"manifest_sha256": "0" * 64}})
    note(run, "sft", Made(config="nowhere/sft.yaml"), Path("nowhere"), None)
    assert "the evaluation is of earlier artifacts" in printed(run)
    assert "make eval" not in printed(run)
