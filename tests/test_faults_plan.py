"""Planned faults, signals and messages, without a run."""

import errno
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline import steps
from pipeline.errors import UserError
from pipeline.handoff import sealed
from pipeline.process import disk, faults, memory

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def none_left():
    yield
    faults.clear()


def plan(monkeypatch, text: str, stage: str = "sft") -> None:
    monkeypatch.setenv("PIPELINE_FAULT", text)
    faults.setup(stage, steps.phases())


def test_without_a_plan_nothing_happens(monkeypatch):
    plan(monkeypatch, "")
    assert not faults.at("step", 1)
    weight = torch.zeros(1, requires_grad=True)
    faults.watch_gradient(weight, lambda: 1)
    assert not weight._backward_hooks


def test_a_fault_happens_to_its_stage_in_its_phase_at_its_step(monkeypatch):
    plan(monkeypatch, "rm:step:3:enospc", "sft")
    assert not faults.at("step", 3)
    plan(monkeypatch, "rm:step:3:enospc, sft:step:2:enospc", "sft")
    assert not faults.at("step", 3)
    assert not faults.at("update", 2)
    with pytest.raises(OSError, match="planned") as error:
        faults.at("step", 2)
    assert error.value.errno == errno.ENOSPC and disk.is_full(error.value)


def test_nan_and_out_of_memory(monkeypatch):
    plan(monkeypatch, "ppo:rollout:1:nan,ppo:update:2:nan,ppo:load:0:oom", "ppo")
    assert faults.at("rollout", 1)
    weight = torch.ones(1, requires_grad=True)
    step = 1
    faults.watch_gradient(weight, lambda: step)
    (weight * 2).sum().backward()
    assert weight.grad.item() == 2
    step = 2
    (weight * 2).sum().backward()
    assert weight.grad.isnan().all()
    with pytest.raises(torch.OutOfMemoryError):
        faults.at("load", 0)


@pytest.mark.parametrize(
    "text",
    ["x", "sft:step:3", "sft:step:x:kill", "sfft:step:3:kill", "sft:stepp:3:kill", "sft:step:3:kil"]
    + ["sft:step:3:nan", "sft:step:-1:kill", "sft:step:٣:kill", "sft:step:3:kill:x"],
)
def test_a_fault_that_does_not_exist_is_told_with_those_that_do(monkeypatch, text):
    with pytest.raises(UserError) as error:
        plan(monkeypatch, text)
    told = str(error.value)
    assert told.startswith(f"PIPELINE_FAULT={text}: not stage:phase:step:action")
    assert all(name in told for name in [*faults.PHASES, *faults.ACTIONS, "ppo"])


@pytest.mark.parametrize(
    ("error", "out"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("CUDA out of memory"), False),
    ],
)
def test_what_is_out_of_memory(error, out):
    assert memory.is_out(error) == out


def test_the_allocators_own_error_is_known():
    with pytest.raises(RuntimeError) as error, memory.relieved_by("rollout_batch_size"):
        torch.empty(2**50)
    assert memory.is_out(error.value)
    assert "smaller rollout_batch_size" in memory.message(error.value)


STOPPED = """
import os, signal, sys, time
from pipeline.process import stopping
stopping.install()
me, number = os.getpid(), int(sys.argv[2])
if sys.argv[1] == "idle":
    os.kill(me, number)
with stopping.deferred():
    os.kill(me, number)
    if sys.argv[1] == "passed-on":
        os.kill(me, signal.SIGTERM)
    if sys.argv[1] == "twice":
        time.sleep(0.6)
        os.kill(me, number)
    print("end of the step", stopping.asked(), flush=True)
    if sys.argv[1] == "leave":
        stopping.leave("sft", 3)
print("never", flush=True)
"""


@pytest.mark.parametrize(
    ("number", "code", "name"),
    [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "Ctrl-C")],
)
@pytest.mark.parametrize(
    ("how", "told", "warned"),
    [
        ("idle", [], ""),
        ("twice", [], "ended at once: what came after the last saved state is lost"),
        ("once", ["end of the step True"], ": saving at the end of this step"),
        ("passed-on", ["end of the step True"], ": saving at the end of this step"),
        ("leave", ["end of the step True", "sft: stopped by NAME, saved after step 3"], ""),
    ],
)
def test_the_first_signal_waits_for_the_end_of_a_step_and_the_second_does_not(
    number, code, name, how, told, warned
):
    done = subprocess.run(
        [sys.executable, "-c", STOPPED, how, str(int(number))],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    # an idle program's own KeyboardInterrupt ends it as Python ends it; the command line says 130
    assert done.returncode == (code if (how, code) != ("idle", 130) else -2)
    lines = done.stdout.splitlines()
    assert len(lines) == len(told)
    assert all(
        line.startswith(start.replace("NAME", name))
        for line, start in zip(lines, told, strict=True)
    )
    assert warned in done.stderr


def test_states_are_pruned_to_two_and_later_corrupt_ones_go(tmp_path):
    for step in (1, 2, 9, 3):
        written = sealed.temporary(tmp_path, step)
        written.mkdir()
        (written / "state.pt").write_bytes(b"x")
        sealed.publish(written, tmp_path, step)
    assert [path.name for path in sealed.states(tmp_path)] == ["step-000002", "step-000003"]
    assert sealed.newest(tmp_path) == tmp_path / "step-000003"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000003"]


def test_what_was_left_half_written_or_half_removed_is_swept(tmp_path):
    for name in (".new-step-000004", ".step-000001.gone", "step-000003"):
        (tmp_path / name).mkdir()
    sealed.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]
