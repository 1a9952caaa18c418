"""The Makefile, run for real with a fake interpreter: what runs, in which order, and what is said."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fake_stages import config_of, make_all, make_base, train, write_recipe
from pipeline.evaluation import overopt, seeds
from pipeline.evaluation.report import write_report
from pipeline.handoff.remembered import Made, note

ROOT = Path(__file__).parent.parent

# Stages are real command lines around a stage that publishes a few bytes; the rest is noted down.
INTERPRETER = """#!/bin/sh
case "$*" in -c*) exec {python} "$@";; esac
echo "$*" >> calls
case "$2" in
  pipeline.commands.base) exec {python} -c 'import fake_stages, pathlib
fake_stages.make_base(pathlib.Path("."))';;
  pipeline.evaluation.summary) echo "the summary";;
  *) exec {python} "$@";;
esac
"""
MAKES_OWN = (
    "MAKEFLAGS MFLAGS MAKELEVEL GNUMAKEFLAGS MAKEOVERRIDES RECIPE RUN FROM SFT RM PPO EVAL SET FORCE "
    "DRY ENGINE PROCESSES MODEL DATA TASK CKPT PYTHON VENV TORCH_INDEX ARGS RLHF_CHECKPOINTS"
).split()
STAGE = """from pipeline import cli
from fake_stages import train as run
if __name__ == "__main__":
    cli.main("{stage}")
"""


@pytest.fixture(autouse=True)
def a_project(tmp_path, monkeypatch):
    """The Makefile, a recipe, fake stages and an interpreter that notes its calls."""
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path)
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "__init__.py").write_text("")
    for stage in ("sft", "rm", "ppo"):
        (tmp_path / "stages" / f"{stage}.py").write_text(STAGE.format(stage=stage))
    for name in ("Makefile", "pyproject.toml", "configs/constraints.txt"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    interpreter = tmp_path / "python"
    interpreter.write_text(INTERPRETER.format(python=sys.executable))
    interpreter.chmod(0o755)
    for name in [*os.environ]:  # as in a plain shell, not as inside `make test`
        if name in MAKES_OWN:
            monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([".", str(ROOT), str(ROOT / "tests")]))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    return tmp_path


def make(*words: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "--no-print-directory", "VENV=", "PYTHON=./python", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def dry(*words: str) -> list[str]:
    """Modules that `make -n` says it would run, and their arguments."""
    done = make("-n", *words)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "./python" in line]
    return [line.partition("./python -m ")[2] for line in lines]


def modules(lines: list[str]) -> list[str]:
    return [line.split()[0] for line in lines]


def calls() -> list[str]:
    """Modules that were run, without the looking."""
    names = [line.split()[1] for line in Path("calls").read_text().splitlines()]
    return [name for name in names if name != "pipeline.commands.status"]


CHAIN = ["pipeline.commands.base", "stages.sft", "stages.rm", "stages.ppo"]
AFTER = ["pipeline.evaluation.report", "pipeline.evaluation.summary"]


# --- what would run -------------------------------------------------------------------------------


def test_ppo_alone_pulls_in_everything():
    assert modules(dry("ppo")) == CHAIN + AFTER


def test_a_stage_is_called_as_the_readme_says():
    assert dry("sft")[1] == "stages.sft --run checkpoints/tiny --recipe configs/tiny"


def test_any_model_is_evaluated_on_any_rows_without_a_run(tmp_path):
    words = ["MODEL=my/model owner/name", "DATA=it's.jsonl", "TASK=likelihood", "SET=eval.n=3"]
    line = make("-n", "eval", *words).stdout.partition("./python ")[2]
    asked = "--model my/model owner/name --data it's.jsonl --task likelihood --set eval.n=3"
    assert shlex.split(line.replace("\\\n", "")) == [
        "-m",
        "pipeline.evaluation.anything",
        *asked.split(" "),
    ]
    for words in (["eval", "MODEL=a"], ["eval", "DATA=a"], ["ppo", "MODEL=a", "DATA=b"]):
        assert "are for make eval MODEL=" in make(*words).stderr
    assert "what was measured of any model" in make("sft", "RUN=eval").stderr


def test_nothing_would_run_when_all_is_made(tmp_path):
    make_all(tmp_path)
    write_report(Path("checkpoints/tiny"))
    done = make("-n", "sft", "rm", "ppo")
    assert "python" not in done.stdout
    assert done.returncode == 0


def test_a_second_make_does_nothing_says_so_and_is_quick(tmp_path):
    make_all(tmp_path)
    write_report(Path("checkpoints/tiny"))
    begin = time.monotonic()
    done = make("sft", "rm", "ppo")
    seconds = time.monotonic() - begin
    assert calls() == []
    assert done.stdout.splitlines() == [
        f"{stage}: up to date (checkpoints/tiny/{stage})" for stage in ("sft", "rm", "ppo")
    ]
    assert seconds < 10  # far less on an idle machine


def test_variables_reach_the_stages():
    lines = dry("ppo", "RUN=mine", "PPO=configs/tiny/ppo.yaml", "CKPT=elsewhere", "FORCE=ppo")
    assert lines[0].endswith("--out elsewhere/base/tiny")
    assert (
        lines[3].split()
        == (
            "stages.ppo --run elsewhere/mine --recipe configs/tiny --config 'configs/tiny/ppo.yaml' --force"
        ).split()
    )
    assert "--force" not in lines[1]


def test_rm_is_a_config_and_not_makes_own_variable(tmp_path):
    Path("other.yaml").write_text("data: {path: rankings.jsonl}\nseed: 5\n")
    assert "--config" not in dry("rm")[2]
    assert "--config 'other.yaml'" in dry("rm", "RM=other.yaml")[2]


def test_a_dry_run_is_one_of_its_own_with_each_stage_s_settings_alone():
    lines = dry("rm", "DRY=1", "SET=sft.max_steps=1 rm.seed=2")
    assert modules(lines) == CHAIN[:3]
    assert lines[0].endswith("--config configs/tiny/base.yaml --out checkpoints/base/tiny-dry")
    assert "--run checkpoints/tiny-dry --recipe configs/tiny --set 'sft." in lines[1]
    assert (
        " sft.model=checkpoints/base/tiny-dry " in lines[1]
        and " rm." not in lines[1].partition("' --set")[0]
    )
    assert lines[1].endswith("--set 'sft.max_steps=1 rm.seed=2'")
    Path("configs/tiny/dry").mkdir()
    Path("configs/tiny/dry/base.yaml").write_text("builder: tiny\nsteps: 1\n")
    assert "--config configs/tiny/dry/base.yaml" in dry("sft", "DRY=1", "RUN=x")[0]
    assert "--run checkpoints/x " in dry("sft", "DRY=1", "RUN=x")[1]


def test_a_dry_run_of_a_recipe_that_lacks_its_rows_is_refused():
    Path("configs/tiny/ppo.yaml").write_text("prompts: {path: owner/name}\n")
    done = make("ppo", "DRY=1")
    assert done.returncode == 2 and "configs/tiny/dry/name.jsonl" in done.stderr


def test_a_dry_run_ends_by_saying_that_its_numbers_mean_nothing():
    assert "its numbers mean nothing" in make("-n", "ppo", "DRY=1").stdout
    assert "its numbers" not in make("-n", "ppo").stdout


def test_a_study_is_not_run_dry():
    done = make("seeds", "DRY=1")
    assert done.returncode == 2 and "DRY=1 is for a run" in done.stderr


def test_a_run_borrows_with_from(tmp_path):
    make_all(tmp_path, "a")
    lines = dry("ppo", "RUN=b", "FROM=a")
    assert modules(lines) == ["stages.ppo", *AFTER]
    assert "--run checkpoints/b --recipe configs/tiny --from 'checkpoints/a'" in lines[0]


def test_a_run_that_borrows_begins_with_the_recipe_of_its_lender(tmp_path):
    make_all(tmp_path, "a")
    shutil.copytree("configs/tiny", "configs/other")
    note(Path("checkpoints/a"), "sft", Made(config="x"), Path("configs/other"), None)
    assert "--recipe configs/other --from 'checkpoints/a'" in dry("ppo", "RUN=b", "FROM=a")[0]
    assert "--recipe configs/tiny " in dry("ppo", "RUN=b", "FROM=a", "RECIPE=tiny")[0]


def test_an_engine_starts_every_stage(tmp_path):
    shutil.copytree(ROOT / "configs/engines", tmp_path / "configs" / "engines")
    done = make("-n", "ppo", "ENGINE=ddp", "PROCESSES=4").stdout.splitlines()
    launch = (
        "./python -m pipeline.engines --config_file configs/engines/ddp.yaml --num_processes 4 -m"
    )
    for stage in ("sft", "rm", "ppo"):
        [line] = [line for line in done if f"stages.{stage} " in line]
        assert line.startswith(f"exec {launch} stages.{stage} --run")
    [line] = [x for x in make("-n", "sft", "ENGINE=ddp").stdout.splitlines() if "stages.sft" in x]
    assert "ddp.yaml -m" in line  # as many as there are devices
    [line] = [x for x in make("-n", "sft", "PROCESSES=2").stdout.splitlines() if "stages.sft" in x]
    assert "ddp.yaml --num_processes 2 -m" in line
    assert not [line for line in done if "evaluation" in line and "engines" in line]
    assert "no configs/engines/none.yaml" in make("-n", "ppo", "ENGINE=none").stderr
    for wrong in ("0", "two", "-1", "2;true"):
        assert "PROCESSES=" in make("-n", "ppo", f"PROCESSES={wrong}").stderr


def test_a_manifest_is_a_target():
    assert modules(dry("checkpoints/tiny/sft/manifest.json")) == CHAIN[:2]


@pytest.mark.parametrize(
    "run", ["../x", "a/b", "a b", "a;b", "$(shell touch oops)", ".", "base", "eval", ""]
)
def test_a_run_is_a_plain_name(run):
    done = make("-n", "sft", f"RUN={run}")
    assert done.returncode == 2
    assert not Path("oops").exists()


@pytest.mark.parametrize("word", ["sed=3", "kl_coef=x", "seed='3"])
def test_mistakes_stop_make_before_anything_runs(word):
    done = make("ppo", f"SET={word}")
    assert done.returncode == 2
    assert word.partition("=")[0] in done.stderr
    assert calls() == []


# --- what runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["sft", "rmm"], "rmm: no such target"),
        (["sft", "run=b"], "run= does nothing: variables are written in capitals"),
        (["sft", "RECPIE=b"], "RECPIE= does nothing"),
        (["sft", "sft.epochs=3"], "sft.epochs= does nothing"),
        (["clean", "sft"], "clean stands alone"),
    ],
)
def test_a_slip_is_told_before_the_goals_beside_it_are_made(words, told):
    done = make(*words)
    assert done.returncode == 2
    assert told in done.stderr
    assert not Path("calls").exists()


def test_stages_run_in_order_whatever_the_order_and_the_jobs():
    done = make("-j4", "ppo", "rm", "sft")
    assert done.returncode == 0, done.stderr
    assert calls() == CHAIN + AFTER
    assert done.stdout.rstrip().endswith("the summary")
    again = make("ppo")
    assert "ppo: up to date" in again.stdout
    assert calls() == CHAIN + AFTER


def test_settings_arrive_as_typed(tmp_path):
    text = """ppo.stop_tokens='["it'"'"'s `x` $HOME; #é"]' ppo.seed=3"""
    done = make("ppo", f"SET={text}")
    assert done.returncode == 0, done.stderr
    manifest = Path("checkpoints/tiny/ppo/manifest.json").read_text()
    assert "it's `x` $HOME; #é" in manifest
    assert '"seed":3' in manifest.replace(" ", "")


def test_an_edited_config_redoes_the_rest_and_says_why(tmp_path):
    make("sft", "rm", "ppo")
    Path("calls").unlink()
    with Path("configs/tiny/rm.yaml").open("a") as file:
        file.write("seed: 5\n")
    done = make("sft", "rm", "ppo")
    assert calls() == ["stages.rm", "stages.ppo", *AFTER]
    assert "rm: made again, config: seed: 1 -> 5" in done.stdout
    assert "sft: up to date" in done.stdout


def test_force_redoes_what_is_up_to_date(tmp_path):
    make_all(tmp_path)
    make("ppo", "FORCE=1")
    assert calls() == ["stages.ppo", *AFTER]


def test_a_failed_stage_fails_make_and_is_tried_again(tmp_path):
    Path("stages/rm.py").write_text("raise SystemExit(3)")
    assert make("ppo").returncode == 2
    assert calls() == CHAIN[:3]
    Path("stages/rm.py").write_text(STAGE.format(stage="rm"))
    assert make("ppo").returncode == 0
    assert calls() == CHAIN[:3] + CHAIN[2:] + AFTER


def test_a_signal_to_make_reaches_the_stage_and_make_waits(tmp_path):
    Path("stages/sft.py").write_text(
        "import pathlib, signal, sys, time\n"
        "def stop(*_):\n"
        "    time.sleep(0.5); pathlib.Path('saved').write_text(''); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "pathlib.Path('started').write_text('')\n"
        "time.sleep(60)\n"
    )
    command = ["make", "VENV=", "PYTHON=./python", "sft"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(600):
        if Path("started").exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) != 0
    assert Path("saved").exists()


def test_clean_removes_the_run_and_nothing_else(tmp_path):
    make_all(tmp_path, "a")
    make_all(tmp_path, "b")
    asked = make("clean", "RUN=a")  # nobody answers
    assert asked.returncode == 2
    assert "checkpoints/a: ppo rm sft" in asked.stdout
    assert Path("checkpoints/a/sft/manifest.json").is_file()
    assert make("clean", "RUN=a", "FORCE=sft").returncode == 2  # as if it removed that alone
    assert make("clean", "ppo", "RUN=a", "FORCE=1").returncode == 2  # a plan from before it
    assert Path("checkpoints/a/sft/manifest.json").is_file()
    Path("checkpoints/a/.work").mkdir()
    Path("checkpoints/a/.work/sft.lock").write_text(f"{os.getpid()}\n")
    assert f"in use by process {os.getpid()}" in make("clean", "RUN=a", "FORCE=1").stderr
    assert Path("checkpoints/a/sft/manifest.json").is_file()
    Path("checkpoints/a/.work/sft.lock").unlink()
    assert make("clean", "RUN=a", "FORCE=1").returncode == 0
    assert sorted(p.name for p in Path("checkpoints").iterdir()) == ["b", "base"]


def test_clean_names_the_runs_that_borrow_before_it_asks(tmp_path):
    make_all(tmp_path, "a.1")
    for run in ("a-1", "b"):  # one only looks like it
        train(config_of(tmp_path, "sft", run))
    train(config_of(tmp_path, "rm", "c").model_copy(update={"borrow": Path("checkpoints/a.1")}))
    note(Path("checkpoints/b"), "sft", Made(config="x.yaml"), None, Path("checkpoints/a.1"))
    asked = make("clean", "RUN=a.1").stdout
    assert "without it: b c\n" in asked
    assert asked.index("b c") < asked.index("Remove it?")
    assert "without it" not in make("clean", "RUN=b").stdout


# --- around them ----------------------------------------------------------------------------------


def test_make_alone_tells_every_target():
    told = make().stdout
    targets = "sft rm ppo base venv test test-slow check eval report chat label compare expect overopt seeds status".split()
    for target in [*targets, "show-config", "clean"]:
        assert f"make {target} " in told
    for (
        variable
    ) in "RECIPE RUN FROM SFT RM PPO SET FORCE CKPT PYTHON VENV ENGINE PROCESSES".split():
        assert f"{variable}=" in told
    assert not Path("calls").exists()  # help needs no Python


def test_every_rule_is_one_that_make_3_81_knows():
    text = (ROOT / "Makefile").read_text()
    for newer in (
        ".ONESHELL",
        "$(file ",
        "!=",
        "&:",
        "::=",
        "undefine ",
        "private ",
        "$(let ",
        ".RECIPEPREFIX",
    ):
        assert newer not in text
    assert not re.search(r"^\t[@+-]*\$\(RM\)", text, re.MULTILINE)


def test_other_targets_call_what_they_say():
    assert dry("chat", "RUN=x") == ["pipeline.commands.chat --run checkpoints/x "]
    assert dry("export", "ARGS=--ema") == ["pipeline.commands.export --run checkpoints/tiny --ema"]
    assert dry("serve", "RUN=x") == ["pipeline.commands.serve --run checkpoints/x "]
    assert dry("report", "RUNS=a b.1") == ["pipeline.evaluation.runs checkpoints/a checkpoints/b.1"]
    assert "names of runs" in make("report", "RUNS=a $(shell touch oops)").stderr
    assert not Path("oops").exists()
    pushed = "pipeline.commands.push --run checkpoints/tiny --repo 'me/it' "
    assert dry("push", "REPO=me/it") == [pushed]
    asked = "--recipe tiny --run checkpoints/x --seeds 1 2 --write"
    assert dry("expect", "RUN=x", "SEEDS=1 2", "ARGS=--write") == [
        f"pipeline.evaluation.expect {asked}"
    ]
    assert modules(dry("check")) == ["ruff", "ruff", "mypy"]
    assert modules(dry("test")) == ["pytest"]


STUDIES = {"seeds": seeds, "overopt": overopt}


def test_label_installs_its_packages_once_in_the_environment_alone():
    assert dry("label", "RUN=x", "ARGS=--k 3") == [
        "pipeline.commands.label --run checkpoints/x --k 3"
    ]
    done = subprocess.run(["make", "-n", "label"], capture_output=True, text=True, check=True)
    assert ".[label]" in done.stdout and ".[label]" not in make("-n", "label").stdout


def study(name: str, *words: str):
    """Arguments with which make would start a study, as the study reads them."""
    [line] = dry(name, *words)
    module, *arguments = shlex.split(line)
    assert module == f"pipeline.evaluation.{name}"
    return STUDIES[name].parser().parse_args(arguments)


@pytest.mark.parametrize("name", STUDIES)
def test_studies_get_recipe_run_and_settings(name):
    plain = study(name)
    assert (plain.recipe, plain.run, plain.set) == ("tiny", Path("checkpoints/tiny"), "")
    text = "ppo.stop_tokens='[\"a b\"]' eval.n=5"
    given = study(name, "RECIPE=tiny", "RUN=mine", "CKPT=else", f"SET={text}")
    assert (given.run, given.set) == (Path("else/mine"), text)


def test_seeds_are_handed_over_and_further_arguments_with_them():
    assert study("seeds").seeds == [1, 2, 3, 4, 5]
    given = study("seeds", "SEEDS=4 7 9", "ARGS=--split validation sft.max_steps=3")
    assert given.seeds == [4, 7, 9]
    assert given.split == "validation"
    assert given.settings == ["sft.max_steps=3"]
    assert study("overopt", "ARGS=--points 3").points == 3


def test_a_study_over_seeds_takes_another_ppo_config_and_another_studys_models():
    plain, other = study("seeds"), study("seeds", "RUN=b", "FROM=a", "PPO=my own.yaml")
    assert (plain.ppo, plain.borrow) == (None, None)
    assert (other.run, other.borrow) == (Path("checkpoints/b"), Path("checkpoints/a"))
    assert other.ppo == Path("my own.yaml")


def test_evaluation_alone_takes_what_there_is(tmp_path):
    Path("configs/tiny/eval.yaml").write_text("prompts: {path: rankings.jsonl}\n")
    assert modules(dry("eval")) == [*CHAIN[:2], "pipeline.evaluation"]
    make_base(tmp_path)
    train(config_of(tmp_path, "sft"))
    assert dry("eval") == ["pipeline.evaluation --run checkpoints/tiny --recipe configs/tiny"]
    assert modules(dry("ppo")) == [*CHAIN[2:], "pipeline.evaluation", *AFTER]


def test_bases_of_other_recipes(tmp_path):
    shutil.copytree("configs/tiny", "configs/other")
    assert "--out checkpoints/base/other" in dry("base-other")[0]
    (tmp_path / "configs/tiny/base.yaml").unlink()
    assert "tiny needs none" in make("base").stdout


def test_configs_are_shown():
    told = make("show-config", "SET=ppo.kl_coef=0.5").stdout
    assert "\nkl_coef: 0.5\n" in told
    assert "model: checkpoints/base/tiny" in told


# --- the environment ------------------------------------------------------------------------------


def environment(*words: str) -> list[str]:
    """Shell lines that `make -n venv` would run in a project without .venv."""
    done = subprocess.run(
        ["make", "-n", "PYTHON=./python", *words], capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_the_environment_comes_first_and_only_once(tmp_path):
    lines = environment("ppo")
    shown = "\n".join(lines)
    assert shown.index("-m venv") < shown.index("stages.sft") < shown.index("stages.ppo")
    assert "torch==2.13.0+cpu" in shown
    stamp = Path(".venv/.installed")
    stamp.parent.mkdir()
    key = next(line for line in lines if line.endswith("> .venv/.installed")).split()[1]
    stamp.write_text(key + "\n")
    os.utime(stamp, (1, 1))
    done = subprocess.run(["make", "-n", "venv"], capture_output=True, text=True, check=True)
    assert "pip" not in done.stdout
    with Path("pyproject.toml").open("a") as file:
        file.write("\n# changed\n")
    assert any("pip" in line for line in environment("venv"))


@pytest.mark.parametrize(("driver", "torch"), [(0, "torch===2.13.0"), (1, "torch==2.13.0+cpu")])
def test_a_first_make_builds_the_environment_and_then_the_stages(
    tmp_path, monkeypatch, driver, torch
):
    """A fake `python -m venv` puts the noting interpreter where the environment's would be."""
    fake = tmp_path / "system-python"
    fake.write_text(
        "#!/bin/sh\n"
        f'case "$*" in "-m venv "*) mkdir -p .venv/bin; cp {tmp_path}/python .venv/bin/python;; esac\n'
    )
    fake.chmod(0o755)
    noting = tmp_path / "python"
    noting.write_text(noting.read_text().replace('case "$2" in', 'case "$2" in pip) exit 0;;', 1))
    for name, script in {"nvidia-smi": f"exit {driver}", "uname": "echo Linux"}.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    words = ["make", "-j2", f"PYTHON={fake}", "sft"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Nothing to be done" not in done.stdout
    names = calls()
    assert names[-2:] == CHAIN[:2]
    installs = [line for line in Path("calls").read_text().splitlines() if " pip " in line]
    assert torch in [line.split()[-1] for line in installs]
    assert installs[-1].endswith("--editable .[gguf,quantized,marian,eval,wandb]")
    assert Path("checkpoints/tiny/sft/manifest.json").exists()
    assert Path(".venv/.installed").exists()


def test_wandb_sync_of_a_run_that_is_not_there_names_those_that_are(tmp_path):
    make_all(tmp_path)
    done = make("wandb-sync", "RUN=nope")
    assert done.returncode != 0
    assert "checkpoints/nope: no such run; there are: tiny" in done.stderr


def test_sweep_wants_a_file_and_hands_over_what_the_studies_have():
    done = make("sweep")
    assert done.returncode != 0 and "sweep: SWEEP=file.yaml" in done.stderr
    [line] = dry("sweep", "SWEEP=my sweep.yaml", "RUN=mine", "SET=ppo.lam=1", "FORCE=1")
    words = "--sweep 'my sweep.yaml' --force --recipe tiny --run checkpoints/mine --set 'ppo.lam=1'"
    assert line.strip() == f"pipeline.evaluation.sweep {words}"


def test_vllm_is_tried_in_an_environment_of_its_own(tmp_path):
    done = make("-n", "test-vllm", "TORCH_INDEX=index")
    assert done.returncode == 0 and "tests/test_vllm_real.py" in done.stdout
    assert "--extra-index-url index -r configs/vllm-cpu.txt --editable ." in done.stdout
    assert not [line for line in done.stdout.splitlines() if line.startswith("./python")]
    (tmp_path / ".venv-vllm").mkdir()  # one that was made from this very list
    (tmp_path / "configs/vllm-cpu.txt").write_text("vllm\n")
    (tmp_path / ".venv-vllm/.installed").write_text("vllm\n")
    done = make("test-vllm")
    assert done.returncode != 0 and "minutes" not in done.stdout
