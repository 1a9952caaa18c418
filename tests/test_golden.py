"""The tiny recipe, whole, against the committed curve of a reference run.

Machines differ in the last bits and training amplifies them, so the curve is compared as means over
fifths of a stage, with a tolerance for each quantity. A change that moves it says so by a new file:
`python tests/test_golden.py > tests/golden/tiny.json`.
"""

import json
import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden" / "tiny.json"
TOLERANCE = {  # absolute, on the mean over a fifth of the stage
    ("sft", "train/loss"): 0.08,
    ("rm", "train/loss"): 0.04,
    ("ppo", "objective/scores"): 0.30,
    ("ppo", "objective/kl"): 0.60,
    ("ppo", "response/length"): 0.60,
}
PARTS = 5


def run_recipe(root: Path) -> Path:
    """Base, SFT, RM and PPO of configs/tiny in `root`; returns the run."""
    env = os.environ | {"RLHF_CHECKPOINTS": str(root), "WANDB_MODE": "disabled"}

    def python(*words: str) -> None:
        subprocess.run([sys.executable, *words], cwd=ROOT, env=env, check=True, stdout=sys.stderr)

    base = str(root / "base" / "tiny")
    python("-m", "pipeline.commands.base", "--config", "configs/tiny/base.yaml", "--out", base)
    for stage in ("sft", "rm", "ppo"):
        config = f"configs/tiny/{stage}.yaml"
        python("-m", f"stages.{stage}", "--config", config, "--run", str(root / "tiny"))
    return root / "tiny"


def curve(run: Path) -> dict[str, list[float]]:
    """Means over fifths of each stage: "stage name" -> numbers."""
    out = {}
    for stage, name in TOLERANCE:
        lines = (run / stage / "metrics.jsonl").read_text().splitlines()
        values = [row[name] for row in map(json.loads, lines) if name in row]
        edges = [round(i * len(values) / PARTS) for i in range(PARTS + 1)]
        parts = [values[a:b] for a, b in pairwise(edges)]
        out[f"{stage} {name}"] = [round(sum(part) / len(part), 4) for part in parts]
    return out


@pytest.mark.slow
def test_the_tiny_recipe_follows_its_golden_curve(tmp_path):
    expected, seen = json.loads(GOLDEN.read_text()), curve(run_recipe(tmp_path / "checkpoints"))
    assert seen.keys() == expected.keys()
    for (stage, name), tolerance in TOLERANCE.items():
        key = f"{stage} {name}"
        assert seen[key] == pytest.approx(expected[key], abs=tolerance), key


def test_the_golden_curve_shows_training():
    golden = json.loads(GOLDEN.read_text())
    assert golden["sft train/loss"][-1] < golden["sft train/loss"][0] - 0.2
    assert golden["ppo objective/scores"][-1] > golden["ppo objective/scores"][0] + 0.3


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(curve(run_recipe(Path(folder) / "checkpoints")), indent=1))
