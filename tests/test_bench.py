"""The benchmark: equal work on both sides, its floor by hand, and what becomes of the numbers."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.bench import floor, machine, ours, overlay, startup, table, theirs
from pipeline.bench.__main__ import OVERLAY, main, parser, refuse_unequal
from pipeline.bench.shapes import CASES, EOS, PAD, SIZES, Size, Work, demonstrations, draw, ranked
from pipeline.bench.turns import Phases, Worker, WorkerFailed
from pipeline.errors import UserError
from pipeline.ppo.rollout import Query
from test_architecture import FILES, imported_by, module_of, reaches

XS = SIZES["XS"]


# --- the work -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_the_work_is_drawn_once_for_all(size):
    work = draw(size)
    assert work == draw(size)
    assert len(work.prompts) == len(work.lengths) == size.episodes
    assert max(map(len, work.prompts)) == size.prompt
    assert all(1 <= length <= size.response for length in work.lengths)
    assert len(set(work.lengths)) > 3, "there is padding to be saved"
    assert all(token not in (PAD, EOS) for prompt in work.prompts for token in prompt)


def test_lengths_are_geometric_and_truncated():
    size = Size("", 1, 1, 1, 1, 9, 8, 48, 1 / 24, episodes=20_000)
    lengths = draw(size).lengths
    expected = sum((1 - 1 / 24) ** t for t in range(48))  # E min(T, 48) = sum of P(T > t)
    assert sum(lengths) / len(lengths) == pytest.approx(expected, rel=0.02)


def test_full_length_leaves_no_padding_among_responses():
    assert set(draw(XS, full=True).lengths) == {XS.response}
    assert [case.name for case in CASES.values() if case.full] == ["full"]


def test_all_pairs_of_a_ranking_the_better_first():
    (row,) = ranked(XS, prompts=1, k=4)
    a, b, c, d = (row.prompt + response for response in row.responses)
    assert row.pairs == [(a, b), (a, c), (a, d), (b, c), (b, d), (c, d)]
    assert all(response[-1] == EOS for response in row.responses)


def test_the_loss_of_a_demonstration_is_on_its_response():
    row = demonstrations(XS, 1)[0]
    learnt = [token for token in row["labels"] if token != -100]
    assert row["input_ids"][-len(learnt) :] == learnt
    assert len(row["labels"]) == len(row["input_ids"])


# --- the floor ------------------------------------------------------------------------------------


def test_the_floor_by_hand():
    size = Size("", 1, 2, 1, 3, 5, 2, 2, 0.5, episodes=1, epochs=2)
    work = Work(prompts=[[4, 4]], lengths=[2])
    assert floor.linear(size) == 2 * (4 * 2 * 2 + 3 * 2 * 3)  # 68
    assert floor.attention(size, 3) == (1 + 2 + 3) * 2 * (2 + 2)  # 6 pairs; q.k and p*v
    policy = 3 * 68 + 48 + 2 * (2 * 2 * 5)  # 3 tokens read, logits at 2 positions
    assert floor.of_ppo(size, work) == {
        "generation": policy,
        "reference": policy,
        "reward and value": (4 * 68 + 80) + (3 * 68 + 48),
        "optimisation": 2 * (3 * policy + 3 * 252),
    }
    assert floor.of_ppo(size, work, lora=True)["optimisation"] == 2 * 2 * (policy + 252)


def test_the_floor_counts_what_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    from pipeline.bench import shared

    model, ids = shared.policy(XS), torch.full((1, 12), 5)
    model.set_attn_implementation("eager")  # products that torch counts, of the whole square
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    causal = floor.attention(XS, 12)
    square = XS.layers * 2 * (2 * XS.hidden) * 12 * 12
    counted = floor.trunk(XS, [12]) + floor.head(XS, 12)
    assert counter.get_total_flops() == counted - causal + square


# --- equal lengths --------------------------------------------------------------------------------


def test_our_responses_have_the_drawn_lengths():
    work, trainer = draw(XS), ours.ppo_of(XS, CASES["fp32"])
    trainer.sampler.forced_lengths = torch.tensor(work.lengths)
    rollout = trainer.rollout([Query(ids) for ids in work.prompts])
    assert rollout.response_mask.sum(dim=1).tolist() == work.lengths
    ends = (rollout.responses == EOS) & rollout.response_mask
    assert ends.sum(dim=1).tolist() == [1] * len(work.lengths)
    assert rollout.ended.all()


def test_their_processor_forces_the_same():
    forced = theirs.ForcedLengths([2, 1], prompt_width=3)
    first = forced(torch.zeros(2, 3), torch.zeros(2, 5))
    assert first[0].tolist() == [-torch.inf, -torch.inf, 0, 0, 0], "no end and no padding yet"
    assert first[1].tolist() == [-torch.inf, 0, -torch.inf, -torch.inf, -torch.inf], "the end"
    second = forced(torch.zeros(2, 4), torch.zeros(2, 5))
    assert second[0].argmax() == EOS


# --- turns ----------------------------------------------------------------------------------------


def test_a_phase_within_another_is_counted_once():
    clock = Phases()
    slow = SimpleNamespace(inner=lambda: time.sleep(0.3))
    clock.timed(slow, "inner", "inner")
    with clock.phase("outer"):
        time.sleep(0.02)
        slow.inner()
    clock.rest("tail")
    clock.rest("tail")  # the last call counts
    time.sleep(0.01)
    clock.end()
    assert clock.seconds["inner"] >= 0.3
    assert 0.02 <= clock.seconds["outer"] < 0.3
    assert clock.seconds["tail"] >= 0.01


def test_an_iteration_of_our_worker(tmp_path):
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with Worker("pipeline.bench.ours", ["XS", "fp32"], environment, tmp_path / "log") as worker:
        worker.ready()
        answer = worker.turn()
    assert set(answer["phases"]) == set(table.PHASES)
    assert sum(answer["phases"].values()) <= answer["seconds"]
    assert answer["tokens"] == draw(XS).response_tokens
    assert answer["peak_mb"] > 100
    assert worker.process.returncode == 0


def test_a_worker_that_fails_says_why(tmp_path):
    worker = Worker("pipeline.no_such_module", [], {}, tmp_path / "log")
    with worker, pytest.raises(WorkerFailed, match="No module named pipeline.no_such_module"):
        worker.turn()


@pytest.mark.slow
@pytest.mark.skipif(not overlay.is_filled(OVERLAY), reason="no TRL with PPO; `make bench` gets it")
@pytest.mark.parametrize("case", ["fp32", "full", "lora"])
def test_an_iteration_of_their_worker(tmp_path, case):
    environment = {"PYTHONPATH": str(OVERLAY.resolve()), "CUDA_VISIBLE_DEVICES": ""}
    with Worker("pipeline.bench.theirs", ["XS", case], environment, tmp_path / "log") as worker:
        worker.ready()
        answer = worker.turn()
    assert set(answer["phases"]) == set(table.PHASES)
    assert answer["tokens"] == draw(XS, CASES[case].full).response_tokens
    assert f"'val/num_eos_tokens': {XS.episodes}" in (tmp_path / "log").read_text()


class Enough(Exception):
    """Three turns were taken."""


@pytest.mark.parametrize("side", [ours, theirs], ids=["ours", "theirs"])
@pytest.mark.parametrize("case", ["rm-4", "sft"])
def test_the_other_stages_take_turns(side, case):
    taken = []

    def turns() -> None:
        taken.append(time.perf_counter())
        if len(taken) == 3:
            raise Enough

    with pytest.raises(Enough):
        getattr(side, CASES[case].task)(XS, CASES[case], turns)


# --- the other TRL --------------------------------------------------------------------------------


def test_a_filled_overlay_is_used_as_it_is(tmp_path):
    (tmp_path / "there" / "trl-1.12.0.dist-info").mkdir(parents=True)
    (tmp_path / "there" / "trl-1.12.0.dist-info" / "METADATA").touch()
    assert overlay.overlay(tmp_path / "there") == tmp_path / "there"


def test_an_overlay_that_cannot_be_filled_says_so_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(overlay, "VERSION", "0.0.0.dev999")
    for name, value in {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="could not install trl==0.0.0.dev999"):
        overlay.overlay(tmp_path / "away")
    assert not (tmp_path / "away").exists()


def test_one_worker_alone_imports_what_trl_has_removed():
    importing = {module_of(path) for path in FILES if reaches(path, "trl.experimental")}
    assert importing == {"pipeline.bench.theirs"}


def test_the_asking_side_imports_nothing_slow():
    loaded = imported_by("import pipeline.bench.__main__")
    assert not loaded & {"torch", "transformers", "trl", "matplotlib", "numpy"}


# --- results --------------------------------------------------------------------------------------


def answers(*seconds: float) -> list[dict]:
    return [
        {
            "seconds": s,
            "cpu_seconds": 3 * s,
            "phases": {"generation": s / 2, "optimisation": s / 4},
            "peak_mb": 100 * s,
        }
        for s in seconds
    ]


def whole() -> dict:
    def result(case: str, a: list[dict], b: list[dict], **more) -> dict:
        failed: dict = {}
        return {"case": case, "answers": {"ours": a, "theirs": b}, "failed": failed, **more}

    broken = result("lora", answers(1), [], flops=1e9) | {"failed": {"theirs": "it broke"}}
    return {
        "size": "XS",
        "iterations": 3,
        "machine": {"processor": "a | b", "threads": 2},
        "results": [
            result("fp32", answers(2, 1, 4), answers(6, 7, 8), flops=1e9),
            broken,
            {"case": "autocast", "not_run": "this CPU has no bf16 instructions"},
            result("rm-4", answers(0.1), answers(0.25)),
        ],
        "startup": [
            {"what": "help", "seconds": 0.2, "goal": 0.5},
            {"what": "first step", "not_run": "needs a base", "goal": 6.0},
        ],
    }


def cells(text: str, start: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_has_medians_ratios_and_distances():
    text = table.markdown(whole())
    assert (least := table.floor_seconds("XS", CASES["fp32"], 1e9)) > 0
    row = cells(text, CASES["fp32"].title)
    assert row[1:9] == ["ours", "1.00", "0.00", "0.00", "0.50", "2.00", "6.00", "3.50"]
    assert row[9:] == ["28", "400", f"{2 / least:.1f} x {least:.2f} s"]
    assert cells(text, CASES["rm-4"].title)[1:5] == ["100", "250", "2.50", ">= 2.40"]


def test_the_table_says_what_was_not_run_and_why():
    text = table.markdown(whole())
    assert "not run: this CPU has no bf16 instructions" in text
    assert "TRL 1.12.0 failed: it broke" in text
    assert "not run: needs a base" in text


def test_a_side_with_other_lengths_is_refused():
    drawn = draw(XS).response_tokens
    answers = {"ours": [{"tokens": drawn}] * 2, "theirs": [{"tokens": drawn}, {"tokens": 1}]}
    failed: dict[str, str] = {}
    refuse_unequal(drawn, answers, failed)
    assert failed == {"theirs": f"sampled [1, {drawn}] tokens an iteration, not {drawn}"}


def test_every_case_can_be_asked_for():
    for name in (*CASES, "startup", "growth"):
        assert parser().parse_args(["--cases", name]).cases == [name]


def test_the_machine_is_named():
    said = machine.describe(2, "cpu")
    assert said["processor"] and said["threads"] == 2 and said["torch"] == torch.__version__
    json.dumps(said)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads are pinned Linux's way")
def test_a_thread_that_waits_leaves_its_core_to_the_one_it_waits_for():
    """Two threads on one core, as beside other programs: each waits while the other computes."""
    code = """
import os, time
import pipeline
import torch
torch.set_num_threads(2)
a, b = torch.randn(200, 400), torch.randn(400, 200)
a @ b
for thread in os.listdir("/proc/self/task"):
    os.sched_setaffinity(int(thread), {min(os.sched_getaffinity(0))})
start = time.process_time()
for _ in range(100):
    torch.relu(a) @ b
print(time.process_time() - start)
"""
    free = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}

    def seconds(**more: str) -> float:
        command = [sys.executable, "-c", code]
        out = subprocess.run(command, env=free | more, capture_output=True, text=True, check=True)
        return float(out.stdout)

    assert seconds() < seconds(GOMP_SPINCOUNT="300000") / 5  # measured: a fiftieth


# --- start-up -------------------------------------------------------------------------------------


def test_the_first_step_is_seen_and_measuring_before_it_is_none(tmp_path):
    record = tmp_path / "metrics.jsonl"
    write = (
        "import sys, time; f = open(sys.argv[1], 'w', buffering=1); print('{\"step\": 0}', file=f);"
        "time.sleep(0.3); print('{\"step\": 1}', file=f); time.sleep(30)"
    )
    start = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", write, str(record)]) as process:
        seconds = startup._until_step(process, record) - start
        process.kill()
    assert 0.3 <= seconds < 10


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_help_imports_nothing_slow(stage):
    loaded = imported_by(
        f"import runpy, sys; sys.argv = ['x', '--help']\n"
        f"try: runpy.run_module('stages.{stage}', run_name='__main__')\n"
        "except SystemExit: pass"
    )
    assert "pipeline.cli" in loaded
    assert not loaded & {"torch", "transformers", "trl", "datasets", "numpy"}


def test_make_passes_its_variables_on():
    words = ["make", "-n", "bench", "VENV=", "PYTHON=py", "SIZE=M", "THREADS=2", "CASES=sft rm-4"]
    root = Path(__file__).parent.parent
    plain = {"PATH": os.environ["PATH"]}  # not as inside `make test`
    done = subprocess.run(words, cwd=root, env=plain, capture_output=True, text=True, check=True)
    said = " ".join(done.stdout.replace("\\\n", " ").split())
    assert said == "exec py -m pipeline.bench --size M --threads 2 --cases sft rm-4"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--iterations", "0"], "at least 1"),
        (["--threads", "-1"], "at least 1"),
        (["--device", "cuda"], "torch finds none"),
    ],
)
def test_what_would_measure_nothing_or_something_else_is_refused(
    tmp_path, monkeypatch, words, told
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=told):
        main([*words, "--size", "XS", "--cases", "sft", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())
