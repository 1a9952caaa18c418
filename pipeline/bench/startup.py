"""How long a command takes until something happens."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pipeline import steps
from pipeline.config.load import checkpoints_root
from pipeline.handoff.artifacts import is_published
from pipeline.process.files import read_jsonl

RECIPE = "tiny"
HELP_GOAL, STEP_GOAL = 0.5, 6.0
LONGEST = 120.0


def measure() -> list[dict]:
    """Rows of `what`, `seconds` and `goal`; `not_run` says what was missing."""
    rows = [{"what": "python -m stages.ppo --help", "seconds": help_seconds(), "goal": HELP_GOAL}]
    needed = [checkpoints_root() / "base" / RECIPE]
    for stage in steps.stages():
        row: dict = {"what": f"first step of {stage}, recipe {RECIPE}", "goal": STEP_GOAL}
        if missing := [str(path) for path in needed if not is_published(path)]:
            row["not_run"] = f"needs {', '.join(missing)}"
        else:
            row["seconds"] = first_step(stage)
        rows.append(row)
        needed.append(checkpoints_root() / RECIPE / stage)
    return rows


def help_seconds() -> float:
    """The best of three, as the first fills the disk cache."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        command = [sys.executable, "-m", "stages.ppo", "--help"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def first_step(stage: str) -> float:
    """Seconds from a stage's command to its first optimizer step (PPO: iteration) in the record."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        run = Path(folder) / "first"
        command = [sys.executable, "-m", f"stages.{stage}", "--run", str(run)]
        command += ["--config", f"configs/{RECIPE}/{stage}.yaml", "--set", "wandb.mode=disabled"]
        if steps.TABLE[stage].after:
            command += ["--from", str(checkpoints_root() / RECIPE)]
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            try:
                return _until_step(process, run / ".work" / stage / "metrics.jsonl") - start
            finally:
                process.kill()


def _until_step(process: subprocess.Popen, record: Path) -> float:
    """The time at which the record has a step."""
    end = time.perf_counter() + LONGEST
    while time.perf_counter() < end and process.poll() is None:
        if any(row["step"] >= 1 for row in read_jsonl(record)):
            return time.perf_counter()
        time.sleep(0.02)
    return float("nan")
