"""Several processes, of which one is killed, or the launcher, or all are asked to end: the job ends within a
minute, nobody hangs, and the same command ends with the same bytes.

`make faults` prints a row for each.
"""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from fault_runs import FSDP2, ROOT, Project, leftovers
from pipeline.engines.start import LOST
from test_faults_matrix import Line, table  # noqa: F401

pytestmark = pytest.mark.fault

ENGINES = {"ddp": {}, "fsdp2": FSDP2}
CASES = [
    ("ddp", "sft", "load", 3, "kill@1"),
    ("ddp", "sft", "update", 4, "kill@0"),
    ("ddp", "sft", "eval", 7, "kill@1"),
    ("ddp", "sft", "publish", 2, "kill@0"),
    ("ddp", "rm", "rollout", 0, "kill@0"),  # the second process waits for what the first has ranked
    ("ddp", "rm", "update", 4, "kill@1"),
    ("ddp", "rm", "mid-write", 6, "kill@0"),
    ("ddp", "rm", "step", 5, "term@1"),
    ("ddp", "ppo", "rollout", 4, "kill@1"),
    ("ddp", "ppo", "update", 4, "kill@0"),
    ("ddp", "ppo", "after-rename", 6, "kill@0"),
    ("ddp", "ppo", "export", 0, "kill@0"),
    ("ddp", "ppo", "update", 4, "oom@1"),
    ("fsdp2", "sft", "step", 5, "kill@1"),
    ("fsdp2", "sft", "export", 0, "kill@0"),
    ("fsdp2", "rm", "before-rename", 6, "kill@0"),
    ("fsdp2", "ppo", "rollout", 4, "kill@1"),
    ("fsdp2", "ppo", "step", 5, "term@1"),
]
CODES = {"kill": -9, "term": 143, "oom": 1}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    made = Project(tmp_path_factory.mktemp("faults")).straight()
    yield made
    made.server.close()


def in_two(project: Project, engine: str, stage: str) -> str:
    """The run in two processes that nothing happens to."""
    run = f"{engine}-{stage}"
    if not (project.run(run) / stage).exists():
        outcomes = project.start_all(2, stage, run, **ENGINES[engine]).wait()
        assert [out.code for out in outcomes] == [0, 0], outcomes
    return run


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_one_of_two_processes(project, table, case):  # noqa: F811
    engine, stage, phase, step, action = case
    line = Line(f"{engine} {stage}", phase, step, action)
    table.append(line)
    one, run, how = in_two(project, engine, stage), "-".join(map(str, case)), ENGINES[engine]
    if phase == "load":
        project.start_all(2, stage, run, fault=f"{stage}:step:{step + 1}:kill", **how).wait()
    word = f"{stage}:{phase}:{step}:{action}"
    outcomes = project.start_all(2, stage, run, fault=word, **how).wait()
    codes = [out.code for out in outcomes]
    line.code = "/".join(map(str, codes))
    name, rank = action.split("@")
    assert codes[int(rank)] == CODES[name], outcomes
    assert codes[1 - int(rank)] in (143,) if name == "term" else (0, LOST, 143), outcomes
    told = "".join(out.told for out in outcomes)
    assert "Traceback" not in told and told.count("error:") == (name == "oom")
    again = project.start_all(2, stage, run, **how).wait()
    assert [out.code for out in again] == [0, 0], again
    assert leftovers(project.run(run)) == []
    assert project.differences(run, stage, one) == []
    line.resumed_equal = "yes"


def launched(project: Project, run: str, fault: str) -> subprocess.Popen:
    """Two processes under the launcher that make calls, held for a while in the fourth step."""
    config = str(ROOT / "configs/engines/ddp.yaml")
    command = [
        sys.executable,
        "-m",
        "pipeline.engines",
        "--config_file",
        config,
        "--num_processes",
        "2",
    ]
    told = [*command, "-m", "stages.sft", *project.arguments("sft", run)]
    changed = {"PIPELINE_FAULT": fault, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        told, env=os.environ | changed, cwd=ROOT, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


SLOW = "sft:step:4:slow,sft:step:4:slow"


@pytest.mark.parametrize("action", ["a rank", "launcher", "SIGTERM"])
def test_a_launch(project, table, action):  # noqa: F811
    line = Line("ddp sft", action, 4, "kill" if action != "SIGTERM" else "term")
    table.append(line)
    one, run = in_two(project, "ddp", "sft"), f"launch-{action.replace(' ', '-')}"
    job = launched(project, run, "sft:step:4:kill@1" if action == "a rank" else SLOW)
    if action != "a rank":
        state = project.work(run, "sft") / "step-000003"
        while not state.exists():
            assert job.poll() is None, job.communicate()
            time.sleep(0.05)
        workers = psutil.Process(job.pid).children()
        job.send_signal(signal.SIGKILL if action == "launcher" else signal.SIGTERM)
        _, alive = psutil.wait_procs(workers, timeout=60)
        assert not alive
    told, _ = job.communicate(timeout=60)
    line.code = job.returncode
    assert job.returncode == {"a rank": 137, "launcher": -9, "SIGTERM": 143}[action], told
    assert "Traceback" not in told
    assert told.count("process 1 was ended by SIGKILL") == (action == "a rank")
    assert told.count("saved after step 4") == (action != "a rank")
    assert [out.code for out in project.start_all(2, "sft", run).wait()] == [0, 0]
    assert project.differences(run, "sft", one) == []
    line.resumed_equal = "yes"
