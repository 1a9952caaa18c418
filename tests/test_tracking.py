"""metrics.jsonl is complete whatever W&B does."""

import contextlib
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from pipeline.config import ppo, schema
from pipeline.handoff.artifacts import Manifest, publish
from pipeline.tracking import mirror
from pipeline.tracking import tracker as tracking
from pipeline.tracking.tracker import Tracker, read_rows

KEY = "0123456789" * 4


@pytest.fixture(autouse=True)
def no_wandb_settings_of_the_user(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def tracker(root: Path, mode: str = "disabled", upload: bool = False, **options) -> Tracker:
    run = root / "tiny"
    work = run / ".work" / "ppo"
    work.mkdir(parents=True, exist_ok=True)
    settings = schema.Wandb(mode=mode, upload=upload)  # type: ignore[arg-type]
    return Tracker(work, ppo.PPOConfig(run=run, wandb=settings), **options)


def rows(made: Tracker) -> list[dict]:
    return [json.loads(line) for line in made.metrics_path.read_text().splitlines()]


class FakeRun:
    """Stands for wandb's run: remembers what it was given."""

    def __init__(self, log=None):
        self.logged: list[tuple[int, dict]] = []
        self.finished: int | None = None
        self.resumed, self.step, self.url = False, 0, "there"
        self.summary, self.alerts, self.used, self.made, self.defined = {}, [], [], [], {}
        self._log = log

    def log(self, metrics, step):
        if self._log:
            self._log(step)
        self.logged.append((step, metrics))

    def finish(self, exit_code=0):
        self.finished = exit_code

    def define_metric(self, name, **about):
        self.defined[name] = about

    def alert(self, title, text, **_):
        self.alerts.append((title, text))

    def use_artifact(self, artifact):
        self.used.append(artifact)

    def log_artifact(self, artifact, aliases):
        self.made.append((artifact, aliases))


def with_fake(monkeypatch, init) -> None:
    monkeypatch.setattr(mirror.Mirror, "_init_as", lambda self, mode: init(mode))


# --- the record -----------------------------------------------------------------------------------


def test_a_row_is_on_disk_before_log_returns(tmp_path):
    made = tracker(tmp_path)
    made.log(1, {"loss": 0.5, "count": 3})
    [row] = rows(made)
    assert row["step"] == 1
    assert row["loss"] == 0.5
    assert row["count"] == 3
    assert abs(row["time"] - time.time()) < 60


def test_nan_is_written_as_null_and_told_once(tmp_path, capsys):
    made = tracker(tmp_path)
    made.log(1, {"loss": float("nan"), "kl": float("inf")})
    made.log(2, {"loss": float("nan")})
    assert rows(made)[0]["loss"] is None
    assert rows(made)[0]["kl"] is None
    assert capsys.readouterr().out.count("loss is nan") == 1


def test_numbers_of_other_libraries_become_plain(tmp_path):
    import numpy as np

    made = tracker(tmp_path)
    made.log(1, {"loss": np.float32(0.5)})
    assert rows(made)[0]["loss"] == 0.5


def test_truncate_forgets_later_rows_and_a_torn_line(tmp_path):
    made = tracker(tmp_path)
    for step in (1, 2, 3):
        made.log(step, {"loss": 0.1 * step})
        made.samples(step, [{"prompt": "p", "response": "回", "score": None, "ended": True}] * 2)
    before = made.metrics_path.read_bytes()
    with made.metrics_path.open("a") as file:
        file.write('{"step": 2, "lo')
    with made.samples_path.open("ab") as file:
        file.write('{"step": 1, "response": "回'.encode()[:-1])  # half a character
    made.log(2, {"validation/loss": 0.5})  # measured after the state of step 2 was saved
    made.truncate(2)
    assert made.metrics_path.read_bytes() == b"".join(before.splitlines(keepends=True)[:2])
    assert [row["step"] for row in read_rows(made.samples_path)] == [1, 1]  # so were its samples


def test_samples_are_rows_with_their_step(tmp_path):
    made = tracker(tmp_path)
    made.samples(5, [{"prompt": "a", "response": "b", "score": 1.0, "ended": False}])
    assert list(read_rows(made.samples_path)) == [
        {"step": 5, "prompt": "a", "response": "b", "score": 1.0, "ended": False}
    ]


def test_processes_beside_the_first_write_nothing(tmp_path):
    made = tracker(tmp_path, main=False)
    made.log(1, {"loss": 1.0})
    made.samples(1, [{"prompt": "a"}])
    made.truncate(0)
    made.finish()
    assert not made.metrics_path.exists()


# --- when W&B is used -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "environment", "expected"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": KEY}, "online"),
        ("online", {}, "offline"),
        ("disabled", {"WANDB_API_KEY": KEY}, "disabled"),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "offline"),
        ("online", {"WANDB_API_KEY": KEY, "WANDB_MODE": "disabled"}, "disabled"),
        ("auto", {"WANDB_MODE": "dryrun"}, "offline"),
    ],
)
def test_online_only_with_a_key(monkeypatch, mode, environment, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert mirror.mode_of(schema.Wandb(mode=mode)) == expected


def test_a_key_in_netrc_counts_for_its_server_alone(monkeypatch, tmp_path):
    file = tmp_path / "netrc"
    file.write_text(f"machine api.wandb.ai login user password {KEY}\n")
    file.chmod(0o600)
    monkeypatch.setenv("NETRC", str(file))
    assert mirror.has_key()
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert not mirror.has_key()


def test_what_is_logged_reaches_the_mirror_in_order(tmp_path, monkeypatch):
    run = FakeRun()
    with_fake(monkeypatch, lambda mode: run)
    made = tracker(tmp_path, "offline")
    for step in range(1, 4):
        made.log(step, {"loss": float(step)})
    made.finish()
    assert run.logged == [(n, {"ppo/step": n, "loss": float(n)}) for n in range(1, 4)]
    assert run.finished == 1  # nothing was published


def test_a_resumed_run_tells_the_mirror_the_earlier_rows_and_keeps_its_id(tmp_path, monkeypatch):
    run = FakeRun()
    with_fake(monkeypatch, lambda mode: run)
    first = tracker(tmp_path)
    for step in (1, 2, 3):
        first.log(step, {"loss": float(step)})
    name = mirror.stable_id(first.metrics_path.parent, "tiny-ppo")
    second = tracker(tmp_path, "offline")
    second.truncate(2)
    second.log(3, {"loss": 30.0})
    second.finish()
    assert [(step, m["loss"]) for step, m in run.logged] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert mirror.stable_id(first.metrics_path.parent, "tiny-ppo") == name
    assert mirror.stable_id(tmp_path, "tiny-ppo") != name
    copied = mirror.stable_id(
        first.metrics_path.parent, "copy-ppo"
    )  # the folder under another name
    assert copied.startswith("copy-ppo-")


def test_steps_the_server_already_has_are_not_sent_again(tmp_path, monkeypatch):
    run = FakeRun()
    run.resumed, run.step = True, 2
    with_fake(monkeypatch, lambda mode: run)
    made = tracker(tmp_path, "offline")
    for step in (1, 2, 3):
        made.log(step, {"loss": 0.0})
    made.finish()
    assert [step for step, _ in run.logged] == [2, 3]


# --- when W&B fails -------------------------------------------------------------------------------


def test_an_unreachable_server_means_offline_with_one_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    run, tried = FakeRun(), []

    def init(mode):
        tried.append(mode)
        if mode == "online":
            raise TimeoutError("no answer\nand a long tail")
        return run

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(teardown=lambda: None))
    with_fake(monkeypatch, init)
    made = tracker(tmp_path, "auto")
    made.log(1, {"loss": 1.0})
    made.finish()
    told = capsys.readouterr().out
    assert tried == ["online", "offline"]
    assert run.logged == [(1, {"ppo/step": 1, "loss": 1.0})]
    assert "no answer; writing offline" in told
    assert "make wandb-sync RUN=tiny" in told
    assert "tail" not in told


@pytest.mark.parametrize("error", [RuntimeError("gone"), SystemExit(1), ImportError("no wandb")])
def test_a_mirror_that_cannot_start_changes_nothing(tmp_path, monkeypatch, capsys, error):
    def init(mode):
        raise error

    with_fake(monkeypatch, init)
    made = tracker(tmp_path, "offline")
    for step in range(50):
        made.log(step, {"loss": 1.0})
    made.finish()
    assert len(rows(made)) == 50
    assert capsys.readouterr().out.count("W&B") == 1


def test_a_mirror_that_dies_half_way_changes_nothing(tmp_path, monkeypatch, capsys):
    def log(step):
        if step == 5:
            raise BrokenPipeError("service gone")

    with_fake(monkeypatch, lambda mode: FakeRun(log))
    made = tracker(tmp_path, "offline")
    for step in range(20):
        made.log(step, {"loss": 1.0})
    made.finish()
    assert [row["step"] for row in rows(made)] == list(range(20))
    assert "service gone" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_mirror_that_hangs_is_given_up(tmp_path, monkeypatch, capsys, where):
    monkeypatch.setattr(mirror, "INIT_SECONDS", 0.1)
    monkeypatch.setattr(mirror, "FINISH_SECONDS", 0.1)
    run = FakeRun(lambda step: time.sleep(60) if where == "log" else None)
    if where == "finish":
        run.finish = lambda exit_code=0: time.sleep(60)  # type: ignore[method-assign]
    with_fake(monkeypatch, lambda mode: time.sleep(60) if where == "init" else run)
    made = tracker(tmp_path, "offline")
    begin = time.monotonic()
    for step in range(20):
        made.log(step, {"loss": 1.0})
    assert time.monotonic() - begin < 1
    made.finish()
    assert time.monotonic() - begin < 5
    assert len(rows(made)) == 20
    assert "given up" in capsys.readouterr().out


# --- the real wandb -------------------------------------------------------------------------------

REAL = """
import shutil, sys, time
from pathlib import Path
from pipeline.tracking import mirror
from pipeline.config import ppo, schema
from pipeline.handoff.artifacts import Manifest, publish, read
from pipeline.tracking.tracker import Tracker
mirror.INIT_SECONDS = 3
run = Path(sys.argv[1])
(run / ".work/ppo/output").mkdir(parents=True)
tracker = Tracker(run / ".work/ppo", ppo.PPOConfig(run=run))
for step in range(1, 4):
    begin = time.monotonic()
    tracker.log(step, {"objective/kl": 0.5 * step, "bad": float("nan")})
    assert time.monotonic() - begin < 0.5
tracker.samples(3, [{"prompt": "p", "response": "r", "score": 1.0, "ended": True}])
(run / ".work/ppo/output/model.safetensors").write_bytes(b"weights")
shutil.copy(tracker.metrics_path, run / ".work/ppo/output")
final = publish(run / ".work/ppo/output", run / "ppo", Manifest(stage="ppo", inputs={"d": "h"}))
tracker.finish(final, read(final))
"""


def run_real(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess:
    """Three steps with the real wandb, no terminal and nobody to answer a prompt."""
    return subprocess.run(
        [sys.executable, "-c", REAL, str(tmp_path / "tiny")],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


def check_real(done: subprocess.CompletedProcess, tmp_path: Path) -> None:
    assert done.returncode == 0, done.stderr
    record = tmp_path / "tiny" / "ppo" / "metrics.jsonl"
    assert [json.loads(line)["step"] for line in record.read_text().splitlines()] == [1, 2, 3]
    [folder] = (tmp_path / "tiny" / "wandb").glob("offline-run-*")
    [file] = folder.glob("*.wandb")
    assert b"objective/kl" in file.read_bytes()
    assert b"tiny-ppo" in file.read_bytes()
    assert "make wandb-sync RUN=tiny" in done.stdout


@pytest.mark.slow
def test_real_wandb_without_a_key_is_offline_at_once(tmp_path):
    done = run_real(tmp_path)
    check_real(done, tmp_path)
    assert done.stderr == ""


@pytest.mark.slow
@pytest.mark.fault
def test_real_wandb_with_a_key_and_no_server_goes_offline(tmp_path):
    begin = time.monotonic()
    done = run_real(tmp_path, WANDB_API_KEY=KEY, WANDB_BASE_URL="http://127.0.0.1:9")
    check_real(done, tmp_path)
    assert time.monotonic() - begin < 45  # imports included
    assert done.stdout.count("writing offline") == 1


@contextlib.contextmanager
def server(tmp_path: Path, how: str):
    """The address of a server on loopback that behaves like this, and what it is sent."""
    seen = tmp_path / "sent"
    stub = Path(__file__).parent / "wandb_stub.py"
    process = subprocess.Popen(
        [sys.executable, str(stub), how, str(seen)], stdout=subprocess.PIPE, text=True
    )
    try:
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}", seen
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("how", ["wrong-key", "silent", "dies", "hangs"])
def test_real_wandb_and_a_server_that_fails(tmp_path, how):
    with server(tmp_path, how) as (address, _):
        begin = time.monotonic()
        done = run_real(tmp_path, WANDB_API_KEY=KEY, WANDB_BASE_URL=address)
        took = time.monotonic() - begin
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.count("the record in metrics.jsonl is complete") == 1
    assert took < 45  # the imports of a busy machine, and at most 30 s
    record = tmp_path / "tiny" / "ppo" / "metrics.jsonl"
    assert [json.loads(line)["step"] for line in record.read_text().splitlines()] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.fault
def test_real_wandb_is_sent_numbers_and_no_weights(tmp_path):
    with server(tmp_path, "good") as (address, seen):
        done = run_real(tmp_path, WANDB_API_KEY=KEY, WANDB_BASE_URL=address)
        sent = seen.read_bytes()
    assert done.returncode == 0, done.stderr
    assert b"objective/kl" in sent
    assert b"model.safetensors" not in sent
    assert f"W&B: {address}" in done.stdout


def test_plain_keeps_text_and_flags():
    values = ["a", True, 3, None, 0.5, float("-inf")]
    assert [tracking.plain(v) for v in values] == ["a", True, 3, None, 0.5, None]


@pytest.mark.parametrize("upload", [False, True])
def test_an_artifact_has_its_lineage_and_its_files_only_when_asked(tmp_path, monkeypatch, upload):
    added: list[tuple] = []

    class Artifact:
        def __init__(self, name, type, metadata=None):
            self.name, self.type, self.metadata = name, type, metadata

        def add_dir(self, path, policy):
            added.append((path, policy))

        add_file = add_dir

    run = FakeRun()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(Artifact=Artifact))
    with_fake(monkeypatch, lambda mode: run)

    def make(stage: str, manifest: Manifest) -> Path:
        staging = tmp_path / "staging"
        staging.mkdir()
        return publish(staging, tmp_path / "tiny" / stage, manifest)

    sft = make("sft", Manifest(stage="sft"))
    manifest = Manifest(stage="ppo", inputs={"prompts.jsonl": "hash"})
    ppo = make("ppo", manifest)
    made = tracker(tmp_path, "online", upload, parents={"sft": sft})
    made.log(1, {"loss": 1.0})
    made.finish(ppo, manifest)
    assert added == [(str(ppo if upload else ppo / "manifest.json"), "immutable")]
    assert str(run.used[0]).startswith("tiny-sft:sha-")
    assert run.used[1].metadata == {"prompts.jsonl": "hash"}
    [(artifact, aliases)] = run.made
    assert artifact.name == "tiny-ppo"
    assert aliases[0] == "latest"
    assert run.finished == 0
