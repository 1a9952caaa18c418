"""What must survive, one test a fault: real processes on a tiny model, compared with an undisturbed run."""

import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fault_runs import ROOT, STAGES, Project, leftovers
from pipeline.handoff import artifacts, sealed

pytestmark = pytest.mark.fault


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    made = Project(tmp_path_factory.mktemp("faults")).straight()
    yield made
    made.server.close()


def interrupted(project: Project, stage: str, run: str, step: int = 7) -> Path:
    """A run that was killed in `step`, after saving; returns its working directory."""
    assert project.make(stage, run, fault=f"{stage}:step:{step}:kill").code == -9
    return project.work(run, stage)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# --- states on disk -------------------------------------------------------------------------------

DAMAGES = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "a bit flipped": flip_a_bit,
    "missing": Path.unlink,
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_named_and_the_one_before_is_used(project, stage, damage):
    run = damage.replace(" ", "-")
    state = interrupted(project, stage, run) / "step-000006"
    file = max(state.iterdir(), key=lambda path: path.stat().st_size)
    DAMAGES[damage](file)
    outcome = project.make(stage, run)
    assert outcome.code == 0, outcome.told
    assert f"step-000006: not used, {file.name} is " in outcome.told
    assert "goes on after" in outcome.told and " 3" in outcome.told.partition("goes on after")[2]
    assert project.differences(run, stage) == []


@pytest.mark.parametrize("stage", STAGES)
def test_damaged_states_alone_are_no_reason_to_start_again_silently(project, stage):
    work = interrupted(project, stage, "all-damaged")
    (work / "step-000006" / "seal.json").unlink()
    flip_a_bit(work / "step-000003" / "seal.json")
    outcome = project.make(stage, "all-damaged")
    assert outcome.code == 2
    assert "no saved state is whole" in outcome.told and f"FORCE={stage}" in outcome.told
    assert "step-000006: seal.json is missing" in outcome.told
    assert sorted(p.name for p in work.glob("step-*")) == ["step-000003", "step-000006"]
    argv = [*project.arguments(stage, "all-damaged"), "--force"]
    assert project.make(stage, "all-damaged", "--force").code == 0, argv
    assert project.differences("all-damaged", stage) == []


class Evil:
    """Unpickling it writes a file."""

    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self):
        return (Path.touch, (self.sentinel,))


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        ("sft", "optimizer.pt"),
        ("rm", "rng_state.pth"),
        ("sft", "scheduler.pt"),
        ("ppo", "state.pt"),
    ],
)
def test_a_pickle_in_a_state_is_never_run(project, stage, name):
    """Neither when its hash is wrong, nor when somebody has mended the seal."""
    run = name.replace(".", "-")
    work, sentinel = interrupted(project, stage, run), project.root / "sentinel"
    for state in work.glob("step-*"):
        with (state / name).open("wb") as file:
            pickle.dump(Evil(sentinel), file)
    outcome = project.make(stage, run)
    assert outcome.code == 2 and f"{name} is corrupt" in outcome.told
    for state in work.glob("step-*"):
        sealed.seal(state)
    outcome = project.make(stage, run)
    assert outcome.code == 2 and "refused, it may carry code" in outcome.told, outcome.told
    assert not sentinel.exists()


def test_what_is_published_are_tensors_and_text(project):
    kinds = {path.suffix for path in project.run("straight").rglob("*") if path.is_file()}
    assert kinds <= {".safetensors", ".json", ".jsonl", ".jinja"}


def test_a_record_cut_short_is_mended(project):
    """A power cut may leave half a line; the lines of the saved steps were synced before the state."""
    record = interrupted(project, "sft", "torn") / "metrics.jsonl"
    record.write_bytes(record.read_bytes() + b'{"step": 7, "tra')
    assert project.make("sft", "torn").code == 0
    assert project.differences("torn", "sft") == []


def test_a_corrupt_finished_artifact_is_refused_by_those_after_it(project):
    run = project.run("bad-sft")
    shutil.copytree(project.run("straight"), run)
    shutil.rmtree(run / "ppo")
    flip_a_bit(run / "sft" / "model.safetensors")
    outcome = project.make("ppo", "bad-sft")
    assert outcome.code == 2
    assert "sft/model.safetensors: is corrupt" in outcome.told
    assert "make sft RUN=bad-sft" in outcome.told and "FORCE=sft" in outcome.told
    assert not (run / "ppo").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_ends_the_run_and_nothing_saved_is_lost(project, stage):
    work = interrupted(project, stage, "full", step=4)
    state = work / "step-000003"
    largest = max(path.stat().st_size for path in state.iterdir())
    outcome = project.make(stage, "full", file_bytes=largest - 1000)
    assert outcome.code == 1, outcome.told
    assert "Traceback" not in outcome.told
    assert " bytes" in outcome.told and "make room" in outcome.told
    assert [path.name for path in work.glob("step-*")] == ["step-000003"]
    outcome = project.make(stage, "full")
    assert outcome.code == 0 and "goes on after" in outcome.told
    assert project.differences("full", stage) == []
    assert leftovers(project.run("full")) == []


# --- numbers --------------------------------------------------------------------------------------


def test_a_model_with_a_nan_is_not_trained(project):
    import torch
    from safetensors.torch import load_file, save_file

    base = project.root / "nan-base"
    shutil.copytree(project.root / "base", base)
    weights = load_file(base / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] = torch.nan
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    outcome = project.make("sft", "nan-base", f"model={base}", "validation_fraction=0")
    assert outcome.code == 2
    assert "step 1: the loss is nan" in outcome.told
    assert list(project.work("nan-base", "sft").glob("step-*")) == []


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_reward_that_is_no_number_names_the_sample(project, value):
    rewards = f"rewards=[{{function: 'fault_reward:{value}'}}]"
    outcome = project.make("ppo", f"reward-{value}", rewards)
    assert outcome.code == 2
    assert f"iteration 0: the reward of sample 1 is {value}" in outcome.told
    assert "response: " in outcome.told
    assert list(project.work(f"reward-{value}", "ppo").glob("step-*")) == []


def test_memory_that_does_not_suffice(project):
    outcome = project.make("ppo", "memory", "rewards=[{function: 'fault_reward:hungry'}]")
    assert outcome.code == 1
    assert "can't allocate memory" in outcome.told and "rollout_batch_size" in outcome.told
    assert "Traceback" not in outcome.told


# --- mistakes -------------------------------------------------------------------------------------


def test_malformed_rows_are_told_by_line_before_a_model_loads(project):
    good = '{"prompt": "w1", "completion": "w2"}'
    wrong = [
        '{"prompt": "w1"',
        '{"prompt": 3, "completion": "w2"}',
        '{"prompt": "w1", "prompt": "w2"}',
    ]
    wrong += ['{"prompt": "\\ud800", "completion": "w2"}', '{"prompt": "' + "w" * 10_000_001 + '"}']
    data = project.root / "wrong.jsonl"
    data.write_text("\n".join([good, *wrong]) + "\n")
    outcome = project.make(
        "sft", "rows", f"data.path={data}", f"model={project.root / 'no-model'}/x"
    )
    assert outcome.code == 2 and "Traceback" not in outcome.told
    outcome = project.make("sft", "rows", f"data.path={data}")
    assert outcome.code == 2 and "Traceback" not in outcome.told
    for line in range(2, 7):
        assert f"wrong.jsonl:{line}: " in outcome.told
    assert not project.work("rows", "sft").exists()


def test_typos_are_told_all_at_once(project):
    outcome = project.make("sft", "typos", "lerning_rate=1e-5", "batch_size=-1", "sede=3")
    assert outcome.code == 2
    assert "learning_rate" in outcome.told and "seed" in outcome.told


# --- another config, another process --------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_another_config_does_not_go_on_with_what_a_run_left(project, stage):
    interrupted(project, stage, "changed")
    outcome = project.make(stage, "changed", "learning_rate=0.5", "seed=7")
    assert outcome.code == 2
    assert "learning_rate: 0.0" in outcome.told and "-> 0.5" in outcome.told
    assert "seed: 1 -> 7" in outcome.told and f"FORCE={stage}" in outcome.told
    assert project.make(stage, "changed", "save_every=2").code == 0
    assert project.differences("changed", stage) == []


@pytest.mark.parametrize("stage", STAGES)
def test_a_cosmetic_key_may_change(project, stage):
    interrupted(project, stage, "cosmetic")
    assert project.make(stage, "cosmetic", "log_every=1").code == 0
    weights = "model.safetensors"
    made, expected = project.run("cosmetic") / stage, project.run("straight") / stage
    assert (made / weights).read_bytes() == (expected / weights).read_bytes()


def test_of_two_runs_in_one_directory_the_second_ends_at_once(project):
    first = project.start("sft", "two", fault=",".join(["sft:step:4:slow"] * 3))
    wait_for(project.work("two", "sft") / "step-000003")
    begin = time.monotonic()
    second = project.make("sft", "two")
    assert second.code == 2
    assert f"in use by process {first.pid}" in second.told
    assert time.monotonic() - begin < 5
    assert first.wait().code == 0
    assert project.differences("two", "sft") == []


def test_the_lock_of_a_killed_run_holds_nobody_up(project):
    first = project.start("sft", "lock", fault="sft:step:4:slow")
    wait_for(project.work("lock", "sft") / "step-000003")
    first.signal(signal.SIGKILL)
    assert first.wait().code == -9
    assert project.make("sft", "lock").code == 0
    assert project.differences("lock", "sft") == []


def test_a_reader_sees_the_old_artifact_or_the_new_one(project):
    """While a stage is made again four times, somebody reads it all the time."""
    final = project.run("read") / "sft"
    assert project.make("sft", "read").code == 0
    seen, reads = set(), 0
    for seed in (2, 3, 4, 5):
        child = project.start("sft", "read", f"seed={seed}")
        while child.poll() is None:
            seen.add(artifacts.read(final, "sft").seed)
            reads += 1
        assert child.wait().code == 0
    assert seen >= {1, 2, 3, 4}
    assert reads > 100


# --- W&B ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_no_mirror_changes_a_weight(project, stage):
    begin = time.monotonic()
    outcome = project.make(
        stage,
        "mirrored",
        "wandb.mode=online",
        WANDB_API_KEY="0123456789" * 4,
        WANDB_BASE_URL="http://127.0.0.1:9",
        WANDB_MODE="",
    )
    assert outcome.code == 0, outcome.told
    assert time.monotonic() - begin < 45
    assert outcome.told.count("W&B: ") == 1, outcome.told
    assert project.differences("mirrored", stage) == []


# --- the real command lines -----------------------------------------------------------------------


def real(project: Project, *words: str) -> subprocess.Popen:
    """A make or Python of its own in the project's directory."""
    environment = {
        **{name: value for name, value in os.environ.items() if "MAKE" not in name},
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
        "PIPELINE_FAULT": "",
    }
    return subprocess.Popen(
        words,
        cwd=project.root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def make(project):
    """The words of a make command line that runs the project's SFT stage."""
    recipe = project.root / "configs" / "small"
    recipe.mkdir(parents=True, exist_ok=True)
    for stage in STAGES:
        shutil.copyfile(project.config(stage), recipe / f"{stage}.yaml")
    shutil.copyfile(ROOT / "Makefile", project.root / "Makefile")
    shutil.copyfile(ROOT / "pyproject.toml", project.root / "pyproject.toml")
    shutil.copyfile(ROOT / "configs" / "constraints.txt", recipe.parent / "constraints.txt")
    return ["make", "sft", "RECIPE=small", "VENV=", f"PYTHON={sys.executable}"]


def wait_for(path: Path, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.005)


def test_make_passes_on_a_sigterm_and_goes_on_the_next_time(project, make):
    slow = ",".join(f"sft:step:{step}:slow" for step in (4, 5))
    process = real(project, "env", f"PIPELINE_FAULT={slow}", *make, "RUN=made")
    wait_for(project.work("made", "sft") / "step-000003")
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "stopped by SIGTERM, saved after step 4" in told, told
    assert not (project.run("made") / "sft").exists()
    again = real(project, *make, "RUN=made")
    told, _ = again.communicate(timeout=120)
    assert again.returncode == 0, told
    assert "goes on after step 4" in told
    assert project.differences("made", "sft") == []


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_saves_at_the_end_of_the_step_and_the_same_command_goes_on(project, stage):
    child = project.start(stage, "ctrl-c", fault=f"{stage}:step:4:slow")
    wait_for(project.work("ctrl-c", stage) / "step-000003")
    time.sleep(0.2)  # into the step that is slow
    child.signal(signal.SIGINT)
    outcome = child.wait()
    assert outcome.code == 130, outcome.told
    assert "Ctrl-C: saving at the end of this step" in outcome.told
    assert (
        f"{stage}: stopped by Ctrl-C, saved after step 4; the same command goes on" in outcome.told
    )
    assert project.make(stage, "ctrl-c").code == 0
    assert project.differences("ctrl-c", stage) == []


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_twice_ends_at_once_and_says_so(project, stage):
    child = project.start(stage, "ctrl-c-c", fault=",".join([f"{stage}:step:4:slow"] * 4))
    wait_for(project.work("ctrl-c-c", stage) / "step-000003")
    time.sleep(0.2)
    child.signal(signal.SIGINT)
    time.sleep(0.7)
    begin = time.monotonic()
    child.signal(signal.SIGINT)
    outcome = child.wait()
    assert outcome.code == 130 and time.monotonic() - begin < 1.5
    assert "ended at once: what came after the last saved state is lost" in outcome.told
    assert project.make(stage, "ctrl-c-c").code == 0
    assert project.differences("ctrl-c-c", stage) == []


def test_ctrl_c_while_nothing_trains_says_what_is_saved(project):
    fault = ",".join(["sft:eval:0:slow"] * 3)
    child = project.start("sft", "ctrl-c-before", fault=fault)
    wait_for(project.work("ctrl-c-before", "sft") / "made_from.json")
    time.sleep(0.5)
    child.signal(signal.SIGINT)
    outcome = child.wait()
    assert outcome.code == 130 and "interrupted; no training state was saved yet" in outcome.told
    fault = ",".join(["sft:eval:7:slow"] * 3)
    child = project.start("sft", "ctrl-c-after", fault=fault)
    wait_for(project.work("ctrl-c-after", "sft") / "step-000007")
    time.sleep(0.5)
    child.signal(signal.SIGINT)
    outcome = child.wait()
    assert outcome.code == 130 and "interrupted; saved after step 7" in outcome.told
    assert project.make("sft", "ctrl-c-after").code == 0
    assert project.differences("ctrl-c-after", "sft") == []


def test_a_killed_make_leaves_a_stage_that_holds_its_lock(project, make):
    process = real(
        project, "env", "PIPELINE_FAULT=" + ",".join(["sft:step:4:slow"] * 5), *make, "RUN=orphan"
    )
    wait_for(project.work("orphan", "sft") / "step-000003")
    process.kill()
    process.wait()
    second = project.make("sft", "orphan")
    assert second.code == 2 and "in use by process" in second.told
    wait_for(project.run("orphan") / "sft" / "manifest.json", 60)
    assert project.differences("orphan", "sft") == []


def test_two_makes_at_once_make_one_artifact(project, make):
    both = [real(project, *make, "-j4", "RUN=both") for _ in range(2)]
    told = [process.communicate(timeout=180)[0] for process in both]
    codes = sorted(process.returncode for process in both)
    assert codes[0] == 0, told
    if codes[1]:
        assert any("in use by process" in text for text in told)
    assert project.differences("both", "sft") == []


def test_a_stage_of_its_own_process_killed_at_random(project):
    argv = [sys.executable, "-m", "stages.ppo", *project.arguments("ppo", "own")]
    process = real(project, *argv)
    wait_for(project.work("own", "ppo") / "step-000003")
    process.kill()
    process.communicate()
    again = real(project, *argv)
    told, _ = again.communicate(timeout=120)
    assert again.returncode == 0, told
    assert project.differences("own", "ppo") == []


# --- a soak ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_killed_fifty_times_at_random_in_one_run(project, stage):
    """Saved at every step and killed at any instant, start, save and publication included."""
    chance = random.Random(stage)
    steps = "iterations=240" if stage == "ppo" else "max_steps=240"
    words = [steps, "save_every=1"]
    assert project.make(stage, "unkilled", *words).code == 0
    state, kills = project.work("soak", stage), 0
    while kills < 50:
        before = latest(state)
        child = project.start(stage, "soak", *words)
        while child.poll() is None and latest(state) == before and chance.random() > 0.003:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.05))
        child.signal(signal.SIGKILL)
        code = child.wait().code
        assert code == -9, "published before it was killed fifty times"
        kills += 1
    last = project.make(stage, "soak", *words)
    assert last.code == 0, last.told
    assert project.differences("soak", stage, "unkilled") == []


def latest(work: Path) -> str:
    return max((path.name for path in work.glob("step-*")), default="")
