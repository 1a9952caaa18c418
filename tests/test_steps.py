"""The table of steps is all there is to a step, and every input of every step is noticed."""

import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import pytest

from fake_stages import make_base, train, write_recipe
from pipeline import cli, run, steps
from pipeline.commands import chat, status
from pipeline.commands import plan as planning
from pipeline.config.schema import Data, StageConfig
from pipeline.errors import UserError
from pipeline.evaluation import record, report
from pipeline.handoff import artifacts, lineage
from pipeline.handoff.found import need_first
from pipeline.handoff.remembered import Asked, Made, note, recall
from pipeline.process.files import jsonl, write_atomically
from pipeline.steps import Step

RUN, RECIPE = Path("checkpoints/tiny"), Path("configs/tiny")


@pytest.fixture(autouse=True)
def a_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.startswith("own_")]:
        monkeypatch.delitem(sys.modules, name)
    write_recipe(tmp_path)


def plan(goals: str = "ppo eval report") -> list[str]:
    return planning.to_run(planning.stale(Asked(RUN, RECIPE), goals.split()))


# --- a step is an entry of the table --------------------------------------------------------------


class ToyConfig(StageConfig):
    stage = "toy"
    data: Data
    """Rows."""


TOY = """
from pipeline.handoff import checkpoint
from pipeline.process import faults
from pipeline.run import StageRun

def run(config):
    with StageRun(config) as stage:
        newest = checkpoint.newest(stage.work)
        total = 0 if newest is None else checkpoint.load(newest)["total"]
        for step in range(total, 4):
            faults.at("step", step)
            stage.tracker.log(step + 1, {"total": step + 1})
            checkpoint.save(stage.work, step + 1, {"total": step + 1})
        (stage.output / "model.safetensors").write_bytes(b"toy")
        return stage.publish({"began": total})
"""


def test_a_fourth_step_through_the_table_alone(tmp_path, monkeypatch, capsys):
    step = Step(
        "toy", "stage", "own_toy", ToyConfig, "toy/manifest.json", after=("sft",), phases=("step",)
    )
    monkeypatch.setattr(steps, "TABLE", {**steps.TABLE, "toy": step})
    (tmp_path / "own_toy.py").write_text(TOY)
    (RECIPE / "toy.yaml").write_text("data: {path: rankings.jsonl}\n")
    assert plan("toy") == ["base", "sft", "toy"]
    import fake_stages

    fake_stages.make_base(tmp_path)
    train(fake_stages.config_of(tmp_path, "sft"))
    assert plan("toy") == ["toy"]

    def call(*words: str) -> int:
        with pytest.raises(SystemExit) as end:
            cli.main("toy", ["--run", str(RUN), "--recipe", str(RECIPE), *words])
        return end.value.code

    monkeypatch.setenv("PIPELINE_FAULT", "toy:step:2:enospc")
    assert call() == 1  # interrupted: two states are saved
    monkeypatch.setenv("PIPELINE_FAULT", "toy:rollout:2:kill")
    assert call() == 2
    assert "toy has no phase rollout" in capsys.readouterr().err
    monkeypatch.delenv("PIPELINE_FAULT")
    status.main(["--run", str(RUN), "--recipe", str(RECIPE)])
    assert "interrupted after step-000002" in capsys.readouterr().out
    assert call() == 0  # and goes on
    assert artifacts.read(RUN / "toy", "toy").metrics["began"] == 2
    assert call() == 0
    assert "toy: up to date" in capsys.readouterr().out
    assert plan("toy") == []
    status.main(["--run", str(RUN), "--recipe", str(RECIPE)])
    assert "began 2" in capsys.readouterr().out
    assert "<h3>toy</h3>" in report.render(record.load_record(RUN))

    train(fake_stages.config_of(tmp_path, "sft"), b"another")
    assert plan("toy") == ["toy"]
    (RUN / "toy" / "model.safetensors").write_bytes(b"tox")
    with pytest.raises(UserError, match="is corrupt.*make toy RUN=tiny FORCE=toy"):
        artifacts.read(RUN / "toy")


def test_every_name_in_the_table_is_there():
    for name, step in steps.TABLE.items():
        assert step.name == name
        assert set(step.after) <= steps.TABLE.keys()
        for look in (steps.about, steps.gates):
            look(name)  # imports what the entry names


def test_a_key_that_does_not_say_what_it_names_is_refused_where_it_is_declared():
    with pytest.raises(TypeError, match=r"Careless\.path: say what this text names"):

        class Careless(StageConfig):
            stage = "careless"
            path: str = "x"


# --- every input of every step --------------------------------------------------------------------


def write(name: str, text: str) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def everything() -> None:
    """A recipe that names something of every kind, made from beginning to end."""
    (RECIPE / "base.yaml").unlink()
    for part in ("config.json", "tokenizer.json", "adapter/adapter_model.safetensors"):
        write(f"models/own/{part}", "{}")
    write("models/judge/config.json", "{}")
    for name in ("demonstrations", "prompts", "held_out", "text", "rankings"):
        write(f"{name}.jsonl", "{}\n")
    write("template.jinja", "{{ messages }}")
    write("own_labeler.py", "import own_help\n")
    write("own_pack/__init__.py", "from . import words\n")
    write("own_pack/words.py", "")
    write("own_help.py", "import own_pack.words, json\n")
    write("own_reward.py", "def f(p, r, rows):\n    from own_help import x\n")
    write("own_judge.py", "import own_pack\ndef score(*a, **k): ...\n")
    write(
        "configs/tiny/sft.yaml",
        "model: models/own\nchat_template: template.jinja\ndata: {path: demonstrations.jsonl}\n",
    )
    write(
        "configs/tiny/rm.yaml",
        "sampling: {prompts: {path: prompts.jsonl}, labeler: own_labeler}\n",
    )
    write(
        "configs/tiny/ppo.yaml",
        "prompts: {path: prompts.jsonl}\n"
        "rewards: [{model: rm}, {model: models/judge}, {function: 'own_reward:f'}]\n",
    )
    write(
        "configs/tiny/eval.yaml",
        "prompts: {path: held_out.jsonl}\ndemonstrations: {path: demonstrations.jsonl}\n"
        "pretraining: {path: text.jsonl}\njudge: own_judge\n",
    )
    write("checkpoints/tiny/overopt/overopt.json", "{}")
    make_what_is_stale()
    assert plan() == []


def make_what_is_stale() -> None:
    """What the Makefile would run, in a moment."""
    for step in plan():
        asked = Asked(RUN, RECIPE)
        made = asked.of(step) if steps.TABLE[step].config else None
        config = steps.load(step, made.config, made.settings) if made else None
        if step in steps.stages():
            train(config.model_copy(update={"run": RUN}), f"weights {next_number()}".encode())
            note(RUN, step, made, RECIPE, None)
        elif step == "eval":
            evaluated(config.of_split("test"))
        else:
            report.write_report(RUN)


def next_number() -> int:
    path = Path("number")
    path.write_text(str(int(path.read_text() if path.exists() else 0) + 1))
    return int(path.read_text())


def evaluated(config) -> None:
    """An evaluation's file, as `pipeline.evaluation` writes it."""
    now = lineage.identity("eval", config, RUN)
    parents = {name: {"path": "", "manifest_sha256": sha} for name, sha in now.parents.items()}
    done = {"config": now.config, "artifacts": parents, "inputs": now.inputs}
    done |= {"split": "test", "prompts": 1}
    write_atomically(RUN / "eval" / "test.json", jsonl([done]))


EDITS = {
    "models/own/config.json": "sft",
    "models/own/tokenizer.json": "sft",
    "models/own/adapter/adapter_model.safetensors": "sft",
    "template.jinja": "sft",
    "demonstrations.jsonl": "sft",
    "prompts.jsonl": "rm",
    "own_labeler.py": "rm",
    "own_help.py": "rm",
    "own_pack/words.py": "rm",
    "own_pack/__init__.py": "rm",
    "own_reward.py": "ppo",
    "models/judge/config.json": "ppo",
    "held_out.jsonl": "eval",
    "text.jsonl": "eval",
    "own_judge.py": "eval",
    "checkpoints/tiny/overopt/overopt.json": "report",
}
"""File -> the first step that is to be made again."""


def test_an_edit_of_any_input_is_noticed_by_its_step_and_those_after_it():
    everything()
    order = ["sft", "rm", "ppo", "eval", "report"]
    for name, first in EDITS.items():
        path = Path(name)
        path.write_text(path.read_text() + (" " if path.suffix != ".py" else "# edited\n"))
        assert plan() == order[order.index(first) :], name
        make_what_is_stale()
        assert plan() == [], name


def test_an_edit_that_changes_nothing_makes_nothing(tmp_path):
    everything()
    for path in [*Path(".").rglob("*")]:
        path.touch()
    for config in RECIPE.glob("*.yaml"):
        config.write_text("# a remark\n" + config.read_text().replace(": ", ":  ", 1))
    assert plan() == []
    shutil.copytree(".", tmp_path / "copy", ignore=shutil.ignore_patterns("copy"))
    os.chdir(tmp_path / "copy")
    assert plan() == []


# --- a run remembers ------------------------------------------------------------------------------


def test_a_run_means_what_it_was_made_with():
    everything()
    write("configs/other/ppo.yaml", "prompts: {path: prompts.jsonl}\nseed: 9\n")
    note(RUN, "ppo", Made(config="configs/tiny/ppo.yaml", settings=["seed=4"]), RECIPE, None)
    asked = Asked(RUN)
    assert asked.recipe == RECIPE
    assert asked.of("ppo").settings == ["seed=4"]
    assert Asked(RUN, settings=["ppo.seed=5", "ppo.lam=1"]).of("ppo").settings == [
        "seed=5",
        "lam=1",
    ]
    other = Asked(RUN, Path("configs/other")).of("ppo")
    assert (other.config, other.settings) == ("configs/other/ppo.yaml", [])


def refused(*settings: str, **options) -> str:
    made = planning.stale(Asked(RUN, RECIPE, settings=list(settings)), ["ppo"], **options)
    try:
        planning.check_replaced(made)
    except UserError as error:
        return str(error)
    return ""


def test_another_setting_or_file_replaces_nothing_unasked():
    everything()
    assert not refused()
    told = refused("ppo.kl_coef=0.5")
    assert (
        "checkpoints/tiny/ppo: made from configs/tiny/ppo.yaml, would be replaced by one from"
        in told
    )
    assert 'SET="kl_coef=0.5"' in told
    assert "FORCE=ppo" in told
    assert "sft" in refused("sft.seed=3")
    assert not refused("ppo.kl_coef=0.5", force=["ppo"])
    with (RECIPE / "ppo.yaml").open("a") as file:
        file.write("seed: 7\n")
    assert not refused()  # an edited file is the same recipe
    (RUN / "run.json").unlink()
    assert "does not remember" in refused()


def test_a_run_remembers_whom_it_borrows_from():
    everything()
    note(Path("checkpoints/b"), "ppo", Made(config="configs/tiny/ppo.yaml"), RECIPE, RUN)
    asked = Asked(Path("checkpoints/b"))
    assert asked.borrow == RUN
    assert planning.to_run(planning.stale(asked, ["ppo"]))[0] == "ppo"


def test_a_run_that_borrows_begins_with_the_recipe_of_its_lender():
    everything()
    other = write("configs/other/ppo.yaml", "prompts: {path: prompts.jsonl}\n").parent
    note(RUN, "sft", Made(config="configs/other/sft.yaml"), other, None)
    assert Asked(Path("checkpoints/b"), borrow=RUN).recipe == other
    assert Asked(Path("checkpoints/b"), RECIPE, borrow=RUN).recipe == RECIPE


def test_what_is_what_was_asked_for_is_remembered_under_the_recipe_that_asks():
    """Made with a file of its own under one recipe, asked for with the same file under another."""
    everything()
    mine = write("mine/ppo.yaml", Path("configs/tiny/ppo.yaml").read_text())
    note(RUN, "ppo", Made(config=mine.as_posix()), RECIPE, None)
    other = write("configs/other/ppo.yaml", mine.read_text() + "seed: 9\n").parent
    for name in ("sft", "rm", "eval"):
        write(f"configs/other/{name}.yaml", Path(f"configs/tiny/{name}.yaml").read_text())
    words = ["--run", str(RUN), "--recipe", str(other), "--ppo", str(mine), "--plan", "ppo"]
    status.main(words)
    note(RUN, "eval", Made(config="configs/other/eval.yaml"), other, None)
    assert Asked(RUN, other).of("ppo").config == "mine/ppo.yaml"
    assert planning.stale(Asked(RUN), ["ppo"]).reasons["ppo"] is None


def test_another_recipe_is_not_mixed_with_the_one_that_is_remembered():
    everything()
    other = write("configs/other/sft.yaml", Path("configs/tiny/sft.yaml").read_text()).parent
    for name in ("rm", "ppo"):
        write(f"configs/other/{name}.yaml", Path(f"configs/tiny/{name}.yaml").read_text())
    note(RUN, "sft", Made(config="configs/other/sft.yaml"), other, None)
    assert Asked(RUN, other).of("rm").config == "configs/other/rm.yaml"
    assert Asked(RUN).of("rm").config == "configs/tiny/rm.yaml"


def test_what_comes_after_a_stale_stage_is_not_replaced_by_another_setting_either():
    everything()
    with (RECIPE / "sft.yaml").open("a") as file:
        file.write("seed: 7\n")
    assert not refused()
    assert "FORCE=ppo" in refused("ppo.kl_coef=0.5")


def test_a_lost_memory_is_found_again_where_it_fits():
    everything()
    (RUN / "run.json").unlink()
    status.main(["--run", str(RUN), "--recipe", str(RECIPE), "--plan", "ppo"])
    assert Asked(RUN).memory.steps["ppo"].config == "configs/tiny/ppo.yaml"


def note_many(name: str, begin) -> None:
    begin.wait(30)
    for number in range(40):
        note(RUN, f"{name}-{number}", Made(config=f"{name}.yaml"), RECIPE, None)


def test_two_that_note_at_one_moment_lose_nothing():
    context = multiprocessing.get_context("fork")
    begin = context.Barrier(2)
    both = [context.Process(target=note_many, args=(name, begin)) for name in ("sft", "rm")]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert len(recall(RUN).steps) == 80
    assert not (RUN / ".work").exists()


def test_what_failed_is_not_what_the_run_is():
    everything()
    run.started(
        loaded("ppo", "seed=9"), Made(config="configs/tiny/ppo.yaml", settings=["seed=9"]), RECIPE
    )
    with pytest.raises(ZeroDivisionError), run.StageRun(loaded("ppo", "seed=9")):
        raise ZeroDivisionError
    assert Asked(RUN).of("ppo").settings == []


def loaded(name: str, *words: str):
    return steps.load(name, RECIPE / f"{name}.yaml", words).model_copy(update={"run": RUN})


def test_a_later_setting_stands_later():
    asked = Asked(
        RUN, RECIPE, settings=["ppo.prompts.path=a", "ppo.prompts={path: b}", "ppo.prompts.path=c"]
    )
    assert asked.of("ppo").settings == ["prompts={path: b}", "prompts.path=c"]


def test_status_shows_what_is_borrowed(capsys):
    everything()
    b = Path("checkpoints/b")
    borrowing = loaded("ppo").model_copy(update={"run": b, "borrow": RUN})
    train(borrowing)
    note(b, "ppo", Asked(b, RECIPE).of("ppo"), RECIPE, RUN)
    status.main(["--run", str(b)])
    shown = capsys.readouterr().out
    assert "borrowed from checkpoints/tiny" in shown
    assert "not made yet" not in shown.partition("eval")[0]


def test_a_stage_that_was_begun_and_stopped_is_not_called_borrowed(capsys):
    everything()
    b = Path("checkpoints/b")
    note(b, "ppo", Asked(b, RECIPE).of("ppo"), RECIPE, RUN)
    (b / ".work" / "ppo" / "step-00000005").mkdir(parents=True)
    status.main(["--run", str(b)])
    lines = capsys.readouterr().out.splitlines()
    assert "borrowed" in next(line for line in lines if line.startswith("sft"))
    assert "interrupted after step-00000005" in next(x for x in lines if x.startswith("ppo"))
    with pytest.raises(UserError, match="make its ppo: make ppo RUN=b"):
        need_first(b, {}, "nothing to see")


def test_a_run_whose_lender_is_gone_says_so_and_is_not_made_anew_unasked(capsys):
    everything()
    b = Path("checkpoints/b")
    train(loaded("ppo").model_copy(update={"run": b, "borrow": RUN}))
    note(b, "ppo", Asked(b, RECIPE).of("ppo"), RECIPE, RUN)
    shutil.rmtree(RUN)
    gone = "ppo was made from checkpoints/tiny/sft, which is not there any more"
    remedy = "make ppo RUN=b FORCE=sft"
    for goals in ("ppo", "sft rm ppo"):
        status.main(["--run", str(b), "--plan", goals])
        told = capsys.readouterr()
        assert (told.out, gone in told.err, remedy in told.err) == ("error\n", True, True)
    status.main(["--run", str(b)])
    assert gone in capsys.readouterr().out
    with pytest.raises(UserError, match=f"{gone}.*{remedy}"):
        chat.main(["--run", str(b)])
    status.main(["--run", str(b), "--plan", "ppo", "--force", "sft"])
    assert capsys.readouterr().out.split() == ["sft", "rm", "ppo", "eval", "report"]


def test_stages_of_another_lender_replace_nothing_unasked():
    everything()
    other, b = Path("checkpoints/c"), Path("checkpoints/b")
    train(loaded("sft").model_copy(update={"run": other}), b"other")
    train(loaded("rm").model_copy(update={"run": other}), b"other")
    train(loaded("ppo").model_copy(update={"run": b, "borrow": RUN}))
    note(b, "ppo", Asked(b, RECIPE).of("ppo"), RECIPE, RUN)
    again = planning.stale(Asked(b, borrow=other), ["ppo"])
    told = "made from stages of checkpoints/tiny, would be replaced by one from stages of checkpoints/c"
    with pytest.raises(UserError, match=told):
        planning.check_replaced(again)
    planning.check_replaced(planning.stale(Asked(b, borrow=other), ["ppo"], ["ppo"]))


def test_a_lender_that_borrows_itself_names_its_own():
    everything()
    b = Path("checkpoints/b")
    train(loaded("ppo").model_copy(update={"run": b, "borrow": RUN}))
    note(b, "ppo", Asked(b, RECIPE).of("ppo"), RECIPE, RUN)
    told = "checkpoints/b has no sft, it borrows from checkpoints/tiny itself"
    with pytest.raises(UserError, match=told):
        planning.stale(Asked(Path("checkpoints/c"), RECIPE, borrow=b), ["ppo"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--plan", "sft", "--force", "ppo"], "FORCE=ppo: read by none of base, sft"),
        (["--plan", "sft", "--ppo", "own.yaml"], "PPO=own.yaml: read by none of base, sft"),
        (["--plan", "sft", "--set", "ppo.seed=3 seed=1"], "ppo.seed=3: read by none of base, sft"),
        (["--plan", "base", "--set", "seed=3"], "seed=3: read by none of base"),
        (["--plan", "sft", "--from", "checkpoints/x"], "checkpoints/x: no such run; there are: b"),
        (["--plan", "sft", "--from", "checkpoints/b"], "FROM: nothing is borrowed: checkpoints/"),
        (["--plan", "rm", "--from", "checkpoints/b", "--set", "seed=3"], ""),
        (["--plan", "ppo", "--force", "report", "--set", "ppo.seed=3"], ""),
    ],
)
def test_what_would_do_nothing_is_told(words, told, capsys):
    write("own.yaml", (RECIPE / "ppo.yaml").read_text())
    make_base(Path("."))
    train(loaded("sft").model_copy(update={"run": Path("checkpoints/b")}))
    status.main(["--run", str(RUN), "--recipe", str(RECIPE), *words])
    shown = capsys.readouterr()
    assert told in shown.err
    assert (shown.out == "error\n") == bool(told)


def test_what_a_run_lost_of_its_own_is_made_again():
    everything()
    shutil.rmtree(RUN / "sft")
    assert refused() == ""
    assert plan("ppo")[0] == "sft"


def test_what_a_person_put_where_a_stage_goes_is_told_before_anything_runs():
    write("checkpoints/tiny/ppo/notes.txt", "mine")
    assert "checkpoints/tiny/ppo: something else is there" in refused()
    assert "something else is there" in refused(force=["ppo"])
    everything_but = planning.stale(Asked(RUN, RECIPE), ["rm"])
    planning.check_replaced(everything_but)


def test_a_run_that_was_made_with_borrowed_stages_stays_so_by_its_name_alone():
    everything()
    b = Path("checkpoints/b")
    train(loaded("ppo").model_copy(update={"run": b, "borrow": RUN}))
    note(b, "ppo", Asked(b, RECIPE).of("ppo"), RECIPE, RUN)
    assert planning.to_run(planning.stale(Asked(b), ["sft", "rm", "ppo"])) == ["eval", "report"]
    assert planning.to_run(planning.stale(Asked(b), ["ppo"], ["rm"]))[0] == "rm"
    assert planning.to_run(planning.stale(Asked(b, borrow=RUN), ["rm", "ppo"]))[:2] == ["rm", "ppo"]


def test_the_folder_of_checkpoints_is_the_same_by_any_name(tmp_path, monkeypatch):
    everything()
    with (RECIPE / "ppo.yaml").open("a") as file:
        file.write("sample_prompts: {path: checkpoints/own/p.jsonl}\n")
    write("checkpoints/own/p.jsonl", "{}\n")
    make_what_is_stale()
    assert plan() == []
    monkeypatch.setenv("RLHF_CHECKPOINTS", str(tmp_path / "checkpoints"))
    named = Asked(tmp_path / RUN, RECIPE)
    assert planning.to_run(planning.stale(named, ["ppo", "eval", "report"])) == []


def test_a_model_that_is_not_there_is_told_before_anything_runs():
    """Of a step that comes last, when nothing has been made yet."""
    with (RECIPE / "ppo.yaml").open("a") as file:
        file.write("rewards: [{model: /nowhere/judge}]\n")
    with pytest.raises(UserError, match=r"ppo.yaml: rewards\.0\.model: /nowhere/judge: no such"):
        plan("ppo")
    assert plan("sft") == ["base", "sft"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("models/juge", "no such model directory: did you mean models/judge?"),
        ("./x", "no such model directory"),
        ("models/judge/model.gguf", "a file; give the folder"),
        ("checkpoints/base/tiny", "not made yet; make it: make base RECIPE=tiny"),
        ("owner/name", ""),
        ("gpt2", ""),
    ],
)
def test_what_looks_like_a_path_is_not_sought_on_the_hub(name, told):
    write("models/judge/model.gguf", "x")
    problems = lineage.missing(loaded("sft", f"model={name}"))
    assert [p for p in problems if p.startswith("model: ")] == problems[: bool(told)]
    assert told in " ".join(problems)


def test_a_stage_s_own_command_replaces_nothing_by_a_setting_alone(capsys):
    everything()
    with pytest.raises(SystemExit) as end:
        cli.main("ppo", ["--run", str(RUN), "ppo.seed=9"])
    assert end.value.code == 2
    assert "would be replaced by one from configs/tiny/ppo.yaml with SET" in capsys.readouterr().err
