"""Every stage x every phase: killed, or asked to end, there; the same command ends with the same bytes.

`make faults` prints the table of what was done and what came of it.
"""

from dataclasses import astuple, dataclass

import pytest

from fault_runs import STAGES, Outcome, Project, leftovers, rows_of

pytestmark = pytest.mark.fault

EVERY = {  # phase -> steps at which it is tried; states are saved after 3, 6 and 7
    "load": [0, 3],
    "update": [1, 4],
    "step": [3, 5],
    "mid-write": [3, 6],
    "before-rename": [6],
    "after-rename": [6, 7],
    "prune": [7],
    "export": [0],
    "publish": [1, 2, 3, 4, 5],
}
OWN = {
    "sft": {"eval": [0, 7]},
    "rm": {"rollout": [0], "eval": [7]},
    "ppo": {"rollout": [1, 4], "eval": [2]},
}
KILLS = [
    (stage, phase, step, "kill")
    for stage in STAGES
    for phase, steps in {**EVERY, **OWN[stage]}.items()
    for step in steps
]
TERMS = [
    (stage, phase, max(steps), "term")
    for stage in STAGES
    for phase, steps in {**EVERY, **OWN[stage]}.items()
]
RAISED = [
    (stage, phase, step, action)
    for stage in STAGES
    for phase, step, action in [
        ("update", 4, "nan"),
        ("rollout", 4, "nan"),
        ("update", 4, "oom"),
        ("rollout", 4, "oom"),
        ("mid-write", 6, "enospc"),
        ("export", 0, "enospc"),
        ("publish", 1, "enospc"),
    ]
    if phase != "rollout" or stage == "ppo"
]
CODES = {"kill": -9, "term": 143, "nan": 2, "oom": 1, "enospc": 1}
TOLD = {
    "kill": "",
    "term": "",
    "nan": "nothing was stepped",
    "oom": "Try a smaller",
    "enospc": "What was saved before is whole",
}


@dataclass
class Line:
    """A row of the table."""

    stage: str
    phase: str
    step: int
    action: str
    code: int | str = "-"
    resumed_equal: str = "no"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    made = Project(tmp_path_factory.mktemp("faults")).straight()
    yield made
    made.server.close()


@pytest.fixture(scope="module")
def bart(tmp_path_factory):
    made = Project(tmp_path_factory.mktemp("faults"), "bart").straight()
    yield made
    made.server.close()


@pytest.fixture(scope="module")
def table(request):
    lines: list[Line] = []
    yield lines
    reporter = request.config.pluginmanager.getplugin("terminalreporter")
    names = ("stage", "phase", "step", "action", "exit code", "resumed equal?")
    rows = [names, *(astuple(line) for line in lines)]
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        reporter.write_line("")
        for row in rows:
            reporter.write_line("{:<11}{:<15}{:<6}{:<8}{:<11}{}".format(*row))


def fault(project: Project, table: list[Line], case: tuple[str, str, int, str]) -> Outcome:
    """Have it happen, run the same command again, and compare with the run that nothing happened to."""
    stage, phase, step, action = case
    line = Line(*case)
    table.append(line)
    word = ":".join(map(str, case))
    run = word.replace(":", "-")
    if phase == "load" and step:
        assert project.make(stage, run, fault=f"{stage}:step:{step + 1}:kill").code == -9
    if phase == "publish" and step == 4:  # there is an older artifact to be replaced
        assert project.make(stage, run, "seed=2").code == 0
    outcome = project.make(stage, run, fault=word)
    line.code = outcome.code
    assert outcome.code == CODES[action], outcome.told
    before = [row["step"] for row in rows_of(project.work(run, stage) / "metrics.jsonl")]
    again = project.make(stage, run)
    assert again.code == 0, again.told
    if before:
        assert len(rows_of(project.run(run) / stage / "metrics.jsonl")) >= len(set(before))
    assert leftovers(project.run(run)) == []
    assert project.differences(run, stage) == []
    line.resumed_equal = "yes"
    return outcome


@pytest.mark.parametrize("case", KILLS, ids=lambda case: "-".join(map(str, case)))
def test_killed_anywhere(project, table, case):
    fault(project, table, case)


@pytest.mark.parametrize("case", KILLS, ids=lambda case: "-".join(map(str, case)))
def test_an_encoder_decoder_killed_anywhere(bart, table, case):
    fault(bart, table, case)


@pytest.mark.parametrize("case", TERMS, ids=lambda case: "-".join(map(str, case)))
def test_asked_to_end_anywhere(project, table, case):
    _, phase, step, _ = case
    told = fault(project, table, case).told
    assert "Traceback" not in told
    if phase in ("update", "step") and step < 7:
        assert f"saved after step {step}" in told


@pytest.mark.parametrize("case", RAISED, ids=lambda case: "-".join(map(str, case)))
def test_what_goes_wrong_within_a_step(project, table, case):
    told = fault(project, table, case).told
    assert TOLD[case[3]] in told
    assert "Traceback" not in told
    if case[1:] == ("rollout", 4, "oom"):
        assert "rollout_batch_size" in told


@pytest.mark.parametrize("stage", STAGES)
def test_asked_twice_it_ends_at_once(project, stage):
    """The second comes in the same step, two seconds later."""
    twice = ",".join(f"{stage}:update:4:{action}" for action in ("term", "slow", "term"))
    outcome = project.make(stage, "twice", fault=twice)
    assert outcome.code == 143
    assert "saved after" not in outcome.told
    assert [p.name for p in project.work("twice", stage).glob("step-*")] == ["step-000003"]
    assert project.make(stage, "twice").code == 0
    assert project.differences("twice", stage) == []
