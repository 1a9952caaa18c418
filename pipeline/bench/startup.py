"""How long a command takes until something happens."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pipeline import steps
from pipeline.config.load import checkpoints_root
from pipeline.handoff.artifacts import is_published

RECIPE = "tiny"
STAGES = list(steps.stages())
NEEDS = {name: STAGES[:at] for at, name in enumerate(STAGES)}
HELP_GOAL, STEP_GOAL = 0.5, 6.0
LONGEST = 120.0


def measure() -> list[dict]:
    """Rows of `what`, `seconds` and `goal`; `not_run` says what was missing."""
    rows = [{"what": "python -m stages.ppo --help", "seconds": help_seconds(), "goal": HELP_GOAL}]
    for stage in NEEDS:
        row: dict = {"what": f"first step of {stage}, recipe {RECIPE}", "goal": STEP_GOAL}
        missing = [str(path) for path in _needed(stage) if not is_published(path)]
        if missing:
            row["not_run"] = f"needs {', '.join(missing)}"
        else:
            row["seconds"] = first_step(stage)
        rows.append(row)
    return rows


def _needed(stage: str) -> list[Path]:
    root = checkpoints_root()
    return [root / "base" / RECIPE, *(root / RECIPE / parent for parent in NEEDS[stage])]


def help_seconds() -> float:
    """The best of three, as the first fills the disk cache."""
    return min(_seconds([sys.executable, "-m", "stages.ppo", "--help"]) for _ in range(3))


def _seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def first_step(stage: str) -> float:
    """Seconds from a stage's command to its first optimizer step (PPO: iteration) in the record."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        run = Path(folder) / "first"
        command = [sys.executable, "-m", f"stages.{stage}", "--run", str(run)]
        command += ["--config", f"configs/{RECIPE}/{stage}.yaml", "--set", "wandb.mode=disabled"]
        if NEEDS[stage]:
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
        if record.is_file():
            whole = record.read_text().rpartition("\n")[0].splitlines()
            if any(json.loads(line)["step"] >= 1 for line in whole):
                return time.perf_counter()
        time.sleep(0.02)
    return float("nan")
