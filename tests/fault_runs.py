"""Whole stages on a tiny model, in processes that start in no time: see `fault_server.py`."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.process.files import sha256

ROOT = Path(__file__).parent.parent
STAGES = ("sft", "rm", "ppo")
STEPS, SAVED = 7, (3, 6, 7)
"""Optimizer steps or iterations, and those after which a state is saved (save_every: 3, and the last)."""
SHARED = "log_every: 2\nsave_every: 3\nthreads: 1\nwandb: {mode: disabled}\n"
CONFIGS = {
    "sft": SHARED
    + "max_steps: 7\nbatch_size: 4\nmicro_batch_size: 2\nlearning_rate: 1.0e-2\n"
    + "validation_fraction: 0.2\nsample_tokens: 6\n",
    "rm": SHARED + "max_steps: 7\nbatch_size: 4\nlearning_rate: 1.0e-2\nvalidation_fraction: 0.2\n",
    "ppo": SHARED
    + "iterations: 7\nbatch_size: 8\nminibatches: 2\nmicro_batch_size: 2\nmax_new_tokens: 6\n"
    + "learning_rate: 1.0e-3\nema_decay: 0.9\nkl_target: 1.0\nscale_scores: true\nsample_every: 2\n"
    + "gates: 'off'\nalarms: {length: 1.01, value_warmup: 0}\n",
}
_CLOCKS = ("time", "memory/")
FSDP2 = {
    "SHARDED": "1",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
"""What accelerate makes of configs/engines/fsdp2.yaml, and the shim of `fault_server.py`."""


@dataclass
class Outcome:
    """How a process ended: its exit code, or minus the signal that ended it, and what it said."""

    code: int
    told: str


class Server:
    """A process that has imported everything slow and computed nothing, and forks a child a stage."""

    def __init__(self, base: Path, kind: str):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        }
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "fault_server.py"), str(base), kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def ask(self, **request: Any) -> Any:
        """A request as a line of JSON, and the answer."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the server has died; see what it printed"
        return json.loads(answer)

    def close(self) -> None:
        self._process.communicate(timeout=10)


class Child:
    """A process that runs a stage."""

    def __init__(self, server: Server, request: dict[str, Any]):
        self._server, self._output = server, Path(request["output"])
        self._code: int | None = None
        self.pid: int = server.ask(**request)

    def poll(self) -> int | None:
        if self._code is None:
            self._code = self._server.ask(poll=self.pid)
        return self._code

    def wait(self, seconds: float = 120.0) -> Outcome:
        """Until it ends; it is killed, which fails any test, when that takes longer."""
        end = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                self.signal(signal.SIGKILL)
            time.sleep(0.01)
        return Outcome(code, self._output.read_text(errors="replace"))

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


class Job:
    """Processes that train together, and what a launcher does with them: when one fails the others are
    asked to end."""

    def __init__(self, children: list[Child]):
        self.children = children

    def wait(
        self, seconds: float = 600.0, grace: float = 5.0, limit: float = 60.0
    ) -> list[Outcome]:
        """Until all have ended, and how each did; those that have not `grace` s after the first failure are
        sent SIGTERM, and a minute after it none may be left."""
        end, asked = time.monotonic() + seconds, False
        while any(child.poll() is None for child in self.children) and time.monotonic() < end:
            time.sleep(0.02)
            if seconds and any(child.poll() for child in self.children):
                end, seconds = time.monotonic() + limit, 0.0
            if not seconds and not asked and time.monotonic() > end - limit + grace:
                asked = self.signal(signal.SIGTERM)
        hung = [rank for rank, child in enumerate(self.children) if child.poll() is None]
        outcomes = [child.wait(0.0) for child in self.children]
        assert not hung, f"processes {hung} hung: {outcomes}"
        return outcomes

    def signal(self, number: int) -> bool:
        for child in self.children:
            if child.poll() is None:
                child.signal(number)
        return True


class Project:
    """Configs, data and a base model of a kind in `root`; runs lie in `root/checkpoints`."""

    def __init__(self, root: Path, kind: str = "llama"):
        self.root = root
        demonstrations = [
            {"prompt": f"w{i} w{i + 3}", "completion": f"w{i + 1} w{i}"} for i in range(18)
        ]
        _write_rows(root / "demonstrations.jsonl", demonstrations)
        _write_rows(root / "prompts.jsonl", [{"prompt": row["prompt"]} for row in demonstrations])
        reads = {
            "sft": f"model: {root / 'base'}\ndata: {{path: {root / 'demonstrations.jsonl'}}}\n",
            "rm": f"sampling: {{prompts: {{path: {root / 'prompts.jsonl'}}}, labeler: fault_labeler, "
            "k: {3: 0.5, 4: 0.5}, max_new_tokens: 6}\n",
            "ppo": f"prompts: {{path: {root / 'prompts.jsonl'}}}\n",
        }
        for stage, text in CONFIGS.items():
            self.config(stage).write_text(text + reads[stage])
        self.server = Server(root / "base", kind)

    def config(self, stage: str) -> Path:
        return self.root / f"{stage}.yaml"

    def run(self, run: str) -> Path:
        return self.root / "checkpoints" / run

    def work(self, run: str, stage: str) -> Path:
        return self.run(run) / ".work" / stage

    def arguments(self, stage: str, run: str, *words: str) -> list[str]:
        """Command line of a stage; the stages before it are those of the straight run."""
        told = ["--config", str(self.config(stage)), "--run", str(self.run(run))]
        return [*told, "--from", str(self.run("straight")), *words]

    def start(
        self,
        stage: str,
        run: str,
        *words: str,
        fault: str = "",
        file_bytes: int | None = None,
        **environment: str,
    ) -> Child:
        """Begin a stage; `file_bytes`: no file may grow further."""
        name = environment.get("RANK", "")
        request = {
            "stage": stage,
            "argv": self.arguments(stage, run, *words),
            "environment": {"PIPELINE_FAULT": fault, **environment},
            "output": str(self.root / f"{run}-{stage}.{name}{time.monotonic_ns()}.log"),
            "file_bytes": file_bytes,
        }
        return Child(self.server, request)

    def start_all(self, processes: int, stage: str, run: str, *words: str, **how: Any) -> "Job":
        """A stage in several processes, as a launcher starts them."""
        told = self.root / f"launch.{time.monotonic_ns()}"
        told.mkdir()
        port = str(_free_port())
        shared = {
            "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_PORT": port,
            "MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true", "PIPELINE_LAUNCH": str(told),
        }  # fmt: skip
        return Job(
            [
                self.start(stage, run, *words, **shared, RANK=str(r), LOCAL_RANK=str(r), **how)
                for r in range(processes)
            ]
        )

    def make(self, stage: str, run: str, *words: str, **how: Any) -> Outcome:
        """A stage from its start to its end, whichever that is; see `start`."""
        return self.start(stage, run, *words, **how).wait()

    def straight(self) -> "Project":
        """Make the run that nothing happens to."""
        for stage in STAGES:
            outcome = self.make(stage, "straight")
            assert outcome.code == 0, outcome.told
        return self

    def differences(self, run: str, stage: str, other: str = "straight") -> list:
        """Where a stage of two runs differs: weights by hash, lines of the records."""
        made, expected = result(self.run(run) / stage), result(self.run(other) / stage)
        return sorted({*made.items()} ^ {*expected.items()})


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def result(directory: Path) -> dict[str, str]:
    """What has to be equal: weights by hash, and the records without their clocks."""
    assert (directory / "manifest.json").is_file(), directory
    weights = {str(p.relative_to(directory)): sha256(p) for p in directory.rglob("*.safetensors")}
    assert weights
    return weights | {
        f"{name}:{line}": json.dumps(_without_clocks(row), sort_keys=True)
        for name in ("metrics.jsonl", "samples.jsonl")
        for line, row in enumerate(rows_of(directory / name), 1)
    }


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def leftovers(run: Path) -> list[str]:
    """Files of a run beside those published and its memory; a lock whose holder is dead holds nothing."""
    found = (path.relative_to(run) for path in run.rglob("*") if path.is_file())
    kept = (*STAGES, "run.json")
    return sorted(str(p) for p in found if p.parts[0] not in kept and p.suffix != ".lock")


def _without_clocks(row: dict) -> dict:
    return {name: value for name, value in row.items() if not name.startswith(_CLOCKS)}


def _write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
