"""What has to run: decided by content, told at once, never a damaged artifact rebuilt unasked."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from fake_stages import config_of, make_all, make_base, train, write_recipe
from pipeline.commands import chat
from pipeline.commands import plan as status
from pipeline.commands import status as show_status
from pipeline.errors import UserError
from pipeline.evaluation.__main__ import main as evaluate
from pipeline.handoff.artifacts import manifest_hash
from pipeline.handoff.remembered import Asked

CONFIGS = Path("configs/tiny")


@pytest.fixture(autouse=True)
def a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    write_recipe(tmp_path)


def asked(*settings: str, run: str = "tiny", borrow: Path | None = None, chosen=None) -> Asked:
    words = list(settings)
    return Asked(Path("checkpoints") / run, CONFIGS, chosen or {}, words, borrow)


def plan(goals: str = "sft rm ppo", *settings: str, force=(), base=None, **options) -> list[str]:
    """Steps to run for these goals, and no other."""
    made = status.stale(asked(*settings, **options), goals.split(), force, base)
    unasked = set() if "report" in goals else {"eval", "report"} - set(goals.split())
    return [step for step in status.to_run(made) if step not in unasked]


def report() -> None:
    from pipeline.evaluation.report import write_report

    write_report(Path("checkpoints/tiny"))


def test_on_a_fresh_machine_a_goal_pulls_in_what_it_needs():
    assert plan("ppo") == ["base", "sft", "rm", "ppo"]
    assert plan("rm") == ["base", "sft", "rm"]
    assert plan("base") == ["base"]
    assert plan("report") == ["base", "sft", "rm", "ppo", "report"]


def test_when_all_is_made_nothing_runs_whatever_the_times_say(tmp_path):
    make_all(tmp_path)
    report()
    assert plan("sft rm ppo report") == []
    for path in Path("checkpoints").rglob("*"):
        os.utime(path, (1, 1))
    os.utime(CONFIGS / "sft.yaml")
    os.utime("checkpoints/tiny/sft/manifest.json")
    assert plan("sft rm ppo") == []


def test_an_edited_config_redoes_its_stage_and_those_after_it(tmp_path):
    make_all(tmp_path)
    report()
    with (CONFIGS / "rm.yaml").open("a") as file:
        file.write("learning_rate: 1e-3\n")
    assert plan("sft rm ppo report") == ["rm", "ppo", "report"]
    assert plan("sft") == []
    with (CONFIGS / "rm.yaml").open("a") as file:
        file.write("# a remark\nlog_every: 3\n")
    train(config_of(tmp_path, "rm"))
    assert plan("sft rm ppo") == []  # the same weights came out of it
    train(config_of(tmp_path, "rm"), b"other weights")
    assert plan("sft rm ppo") == ["ppo"]


def test_a_key_that_came_after_a_stage_was_made_has_its_default_there(tmp_path):
    make_all(tmp_path)
    path = Path("checkpoints/tiny/sft/manifest.json")
    manifest = json.loads(path.read_text())
    del manifest["config"]["data"]["votes"], manifest["config"]["keep"]
    path.write_text(json.dumps(manifest))
    assert plan("sft") == []
    assert plan("sft", "sft.keep=best") == ["sft"]
    assert plan("sft", "sft.data.votes=majority") == ["sft"]


def test_settings_force_and_other_files(tmp_path):
    make_all(tmp_path)
    assert plan("ppo", "ppo.kl_coef=0.5") == ["ppo"]
    assert plan("ppo", "seed=7") == ["sft", "rm", "ppo"]
    assert plan("ppo", force=["rm"]) == ["rm", "ppo"]
    assert plan("rm", force=["1"]) == ["rm"]
    other = CONFIGS / "other.yaml"
    other.write_text((CONFIGS / "ppo.yaml").read_text() + "iterations: 3\n")
    assert plan("ppo", chosen={"ppo": other}) == ["ppo"]


def test_another_base_redoes_everything(tmp_path):
    make_all(tmp_path)
    (CONFIGS / "base.yaml").write_text("builder: tiny\nseed: 9\n")
    assert plan("ppo") == ["base", "sft", "rm", "ppo"]


def test_a_recipe_without_base_or_reward_model_needs_neither(tmp_path):
    (CONFIGS / "base.yaml").unlink()
    (CONFIGS / "sft.yaml").write_text("model: org/name\ndata: {path: org/data}\n")
    (CONFIGS / "ppo.yaml").write_text(
        "prompts: {path: org/p}\nrewards: [{function: 'json:loads'}]\n"
    )
    assert plan("ppo") == ["sft", "ppo"]


def test_borrowed_stages_are_not_made(tmp_path):
    make_all(tmp_path, "a")
    borrow = Path("checkpoints/a")
    assert plan("ppo", run="b", borrow=borrow) == ["ppo"]
    assert plan("rm ppo", run="b", borrow=borrow) == ["rm", "ppo"]
    assert plan("ppo", "seed=9", run="b", borrow=borrow) == ["ppo"]
    with pytest.raises(
        UserError, match=r"sft\.seed=9: sft is borrowed from checkpoints/a.*make sft RUN=b"
    ):
        plan("ppo", "sft.seed=9", run="b", borrow=borrow)
    with pytest.raises(UserError, match="checkpoints/c/sft: not made yet; make it: make sft RUN=c"):
        plan("ppo", run="b", borrow=Path("checkpoints/c"))


def test_a_damaged_artifact_is_named_unless_it_is_to_be_rebuilt(tmp_path):
    make_all(tmp_path)
    Path("checkpoints/tiny/sft/model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"sft/model\.safetensors: has 0 bytes.*FORCE=sft"):
        plan("ppo")
    assert plan("ppo", force=["sft"]) == ["sft", "rm", "ppo"]


def test_all_mistakes_of_all_configs_at_once():
    (CONFIGS / "sft.yaml").write_text("modl: x\ndata: {path: org/data}\n")
    with (CONFIGS / "ppo.yaml").open("a") as file:
        file.write("kl_coef: -1\n")
    with pytest.raises(UserError) as error:
        plan("sft")
    assert "sft.yaml: modl: unknown key (did you mean `model`?)" in str(error.value)
    assert "ppo.yaml: kl_coef:" in str(error.value)


def test_missing_data_is_told_hours_before_it_is_read():
    Path("rankings.jsonl").unlink()
    with pytest.raises(
        UserError, match=r"configs/tiny/rm\.yaml: data\.path: rankings\.jsonl: no such file"
    ):
        plan("ppo")
    assert plan("sft") == ["base", "sft"]


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("own_rewards:polit", "own_rewards.py has no `polit` (did you mean `polite`?)"),
        ("own_rewards:hidden", "own_rewards.py has no `hidden`"),
        ("own_reward:polite", "no module own_reward in"),
        ("own_rewards.more:polite", "no module own_rewards.more in"),
        ("own_rewards", "write it as package.module:function"),
        ("own_broken:f", "own_broken.py is broken: "),
        ("own_rewards:polite", ""),
        ("own_rewards:kind", ""),
        ("own_rewards:sqrt", ""),
        ("own_lazy:anything", ""),
        ("own_folder.inner.rewards:polite", ""),
        ("own_folder.inner.rewards:polit", "has no `polit` (did you mean `polite`?)"),
        ("own_folder.iner.rewards:polite", "no module own_folder.iner in"),
        ("urllib.request:urlopen", ""),
    ],
)
def test_a_reward_that_nobody_could_import_is_told_before_anything_runs(
    tmp_path, monkeypatch, function, told
):
    monkeypatch.syspath_prepend(tmp_path)
    body = "from math import sqrt\nif sqrt(4):\n  async def polite(p, r, rows):\n    hidden = 1\n"
    Path("own_rewards.py").write_text(f"{body}kind = polite\nraise RuntimeError('never run')\n")
    Path("own_lazy.py").write_text("def __getattr__(name): ...\nraise RuntimeError('never run')\n")
    Path("own_broken.py").write_text("def f(:\n")
    Path("own_folder/inner").mkdir(parents=True)  # folders without __init__.py, as configs/NAME
    Path("own_folder/inner/rewards.py").write_text("def polite(p, r, rows): ...\n")
    with (CONFIGS / "ppo.yaml").open("a") as file:
        file.write(f"rewards: [{{model: rm}}, {{function: '{function}'}}]\n")
    if not told:
        assert plan("ppo") == ["base", "sft", "rm", "ppo"]
        return
    with pytest.raises(UserError) as error:
        plan("sft rm ppo")
    assert f"configs/tiny/ppo.yaml: rewards.1.function: {function}: " in str(error.value)
    assert told in str(error.value)
    assert plan("sft") == ["base", "sft"]


def test_a_labeler_and_a_judge_are_looked_for_like_a_reward():
    (CONFIGS / "eval.yaml").write_text(
        "prompts: {path: rankings.jsonl}\njudge: pipeline.tiny.gld\n"
    )
    (CONFIGS / "rm.yaml").write_text("sampling: {prompts: {path: rankings.jsonl}, labeler: a:b}\n")
    with pytest.raises(UserError) as error:
        plan("rm eval")
    eval_told = "eval.yaml: judge: pipeline.tiny.gld: no module pipeline.tiny.gld in"
    assert "rm.yaml: sampling.labeler: a:b: write it as package.module" in str(error.value)
    assert eval_told in str(error.value)
    assert "(did you mean `gold`?)" in str(error.value)


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(UserError, match="RECIPE=tyny.*did you mean `tiny`"):
        status.stale(Asked(Path("checkpoints/x"), Path("configs/tyny")), ["sft"])


def test_evaluation_follows_models_config_and_data(tmp_path):
    (CONFIGS / "eval.yaml").write_text("prompts: {path: rankings.jsonl}\n")
    make_all(tmp_path)
    assert plan("ppo eval report") == ["eval", "report"]
    write_result()
    report()
    assert plan("ppo eval report") == []
    assert plan("ppo eval report", "eval.n=5") == ["eval", "report"]
    Path("rankings.jsonl").write_text("{}\n{}\n{}\n")
    assert plan("eval") == ["rm", "ppo", "eval"]


def test_evaluation_alone_takes_what_there_is(tmp_path):
    (CONFIGS / "eval.yaml").write_text("prompts: {path: rankings.jsonl}\n")
    assert plan("eval") == ["base", "sft", "eval"]
    make_base(tmp_path)
    train(config_of(tmp_path, "sft"))
    assert plan("eval") == ["eval"]
    assert plan("rm eval") == ["rm", "eval"]
    assert plan("report") == plan("ppo eval report") == ["rm", "ppo", "eval", "report"]
    write_result()
    assert plan("eval") == []
    assert plan("report") == ["rm", "ppo", "eval", "report"]  # a PPO that is to come is measured
    train(config_of(tmp_path, "rm"))
    (CONFIGS / "rm.yaml").write_text("data: {path: rankings.jsonl}\nseed: 5\n")
    assert plan("eval") == ["rm", "eval"]


def test_evaluation_does_not_ask_for_a_reward_model_that_ppo_does_not_use():
    (CONFIGS / "eval.yaml").write_text("prompts: {path: rankings.jsonl}\n")
    with (CONFIGS / "ppo.yaml").open("a") as file:
        file.write("rewards: [{function: 'json:loads'}]\n")
    assert plan("ppo eval report") == ["base", "sft", "ppo", "eval", "report"]


def test_an_edited_judge_makes_the_evaluation_stale(tmp_path, monkeypatch):
    judge = tmp_path / "own_judge.py"
    judge.write_text("raise RuntimeError('looking at what has to run runs no judge')\n")
    monkeypatch.syspath_prepend(tmp_path)
    (CONFIGS / "eval.yaml").write_text("prompts: {path: rankings.jsonl}\njudge: own_judge\n")
    make_all(tmp_path)
    write_result({"own_judge.py": hashlib.sha256(judge.read_bytes()).hexdigest()})
    assert plan("eval") == []
    judge.write_text("# a stricter one\n")
    assert plan("eval") == ["eval"]
    judge.unlink()
    assert plan("sft") == []


def write_result(judge: dict[str, str] | None = None) -> None:
    """What `python -m pipeline.evaluation` records about its inputs; `judge`: name -> hash."""
    from pipeline.config.evaluation import EvalConfig
    from pipeline.config.load import load_config
    from pipeline.handoff.lineage import inputs_of

    config = load_config(EvalConfig, CONFIGS / "eval.yaml")
    places = {name: Path("checkpoints/tiny") / name for name in ("sft", "rm", "ppo")}
    places["base"] = Path("checkpoints/base/tiny")
    result = {
        "config": config.of_split("test").model_dump(mode="json"),
        "split": "test",
        "prompts": 1,
        "artifacts": {
            name: {"path": str(path), "manifest_sha256": manifest_hash(path)}
            for name, path in places.items()
            if path.exists()
        },
        "inputs": inputs_of(config.prompts) | (judge or {}),
    }
    path = Path("checkpoints/tiny/eval/test.json")
    path.parent.mkdir()
    path.write_text(json.dumps(result))


# --- what people and make see ---------------------------------------------------------------------


def command(capsys, *words: str) -> tuple[str, str]:
    show_status.main(["--run", "checkpoints/tiny", "--recipe", "configs/tiny", *words])
    told = capsys.readouterr()
    return told.out, told.err


def test_the_makefile_gets_one_line(tmp_path, capsys):
    assert command(capsys, "--plan", "sft")[0] == "base sft\n"
    make_base(tmp_path)
    assert command(capsys, "--plan", "sft")[0] == "sft\n"
    train(config_of(tmp_path, "sft"))
    assert command(capsys, "--plan", "sft")[0] == "nothing\n"


def test_the_makefile_gets_a_word_when_there_is_a_mistake(capsys):
    out, told = command(capsys, "--plan", "sft", "--set", "sed=3")
    assert out == "error\n"
    assert "did you mean `seed`" in told
    assert "FORCE=nope" in command(capsys, "--plan", "sft", "--force", "nope")[1]


def test_the_table_shows_state_and_reason(tmp_path, capsys):
    make_all(tmp_path)
    Path("checkpoints/tiny/.work/ppo/step-000010").mkdir(parents=True)
    shown = command(capsys, "--set", "ppo.seed=3")[0]
    assert re.search(r"sft +up to date +20\d\d-", shown)
    assert re.search(r"ppo +config: seed: 1 -> 3", shown)
    assert "step-000010" in shown
    assert "loss 1" in shown


def test_a_run_that_is_not_there_is_told_with_those_that_are(tmp_path):
    make_all(tmp_path, "b")
    make_all(tmp_path, "a")
    Path("checkpoints/c/notes").mkdir(parents=True)  # none
    told = r"^checkpoints/nosuch: no such run; there are: a, b \(a new one: make sft RUN=nosuch\)$"
    (CONFIGS / "eval.yaml").write_text("prompts: {path: rankings.jsonl}\n")
    for main in (show_status.main, chat.main, evaluate):
        with pytest.raises(UserError, match=told):
            main(["--run", "checkpoints/nosuch"])


def test_an_evaluation_of_a_misspelt_run_trains_nothing(tmp_path, capsys):
    make_all(tmp_path, "b")
    for goals, told in (("eval", "no such run"), ("report", "no such run"), ("ppo", "")):
        show_status.main(["--run", "checkpoints/bb", "--recipe", str(CONFIGS), "--plan", goals])
        assert told in capsys.readouterr().err


def test_status_leaves_out_a_stage_that_later_ones_did_without(tmp_path, capsys):
    make_all(tmp_path, "b")
    shutil.rmtree(tmp_path / "checkpoints" / "b" / "rm")
    assert show_status._left_out(Path("checkpoints/b"), None, "rm")
    (Path("checkpoints/b") / ".work" / "rm").mkdir(parents=True)
    assert not show_status._left_out(Path("checkpoints/b"), None, "rm")


def test_looking_changes_nothing(tmp_path, capsys):
    Path("checkpoints/tiny").mkdir(parents=True)
    before = sorted(Path(".").rglob("*"))
    command(capsys)
    assert sorted(Path(".").rglob("*")) == before
