"""The arrows between the rooms, read from the imports themselves."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("stages/*.py")])
TORCHLESS = (
    "cli run errors commands.plan commands.status config.load config.evaluation handoff.artifacts "
    "handoff.lineage handoff.sealed handoff.found tracking.tracker process.disk process.memory "
    "process.faults process.stopping ppo.alarms ppo.preflight"
).split()


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Absolute names of modules that a file imports, anywhere in it."""
    package = module_of(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            found |= {source} | {f"{source}.{alias.name}" for alias in node.names}
    return found


def reaches(path: Path, name: str) -> bool:
    return any(found == name or found.startswith(name + ".") for found in imports(path))


def test_there_is_something_to_look_at():
    assert {"pipeline.config.schema", "stages.ppo", "pipeline.ppo.maths"} <= {
        module_of(f) for f in FILES
    }


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_arrows_go_from_stages_to_the_pipeline_and_never_back(path):
    assert not reaches(path, "stages"), "only a command line starts a stage, by its name"


def test_the_maths_import_torch_alone():
    standard = sys.stdlib_module_names
    names = {name.partition(".")[0] for name in imports(ROOT / "pipeline/ppo/maths.py")}
    assert {name for name in names if name not in standard} == {"torch"}


def test_gold_is_seen_by_evaluation_and_the_labeler_alone():
    seeing = {module_of(path) for path in FILES if reaches(path, "pipeline.tiny.gold")}
    assert all(
        name == "pipeline.tiny.labeler" or name.startswith("pipeline.evaluation.")
        for name in seeing
    ), seeing


def imported_by(code: str) -> set[str]:
    """Modules loaded in a fresh interpreter after `code`."""
    script = f"{code}\nimport sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_what_make_asks_at_once_imports_nothing_slow():
    code = "import " + ", ".join(f"pipeline.{name}" for name in TORCHLESS)
    loaded = imported_by(code)
    assert "pipeline.commands.plan" in loaded
    slow = {"torch", "transformers", "trl", "datasets", "wandb", "numpy", "matplotlib", "rich"}
    assert not loaded & slow


@pytest.mark.slow
def test_training_never_loads_gold():
    loaded = imported_by("import stages.sft, stages.rm, stages.ppo")
    assert "stages.ppo" in loaded
    assert "torch" in loaded
    assert "pipeline.tiny.gold" not in loaded
