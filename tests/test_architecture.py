"""The arrows between the rooms, read from the imports themselves."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("stages/*.py")])
FLOORS = [
    ["pipeline", "pipeline.errors"],
    ["pipeline.process"],
    ["pipeline.config"],
    ["pipeline.engines"],
    ["pipeline.steps"],
    ["pipeline.handoff"],
    ["pipeline.data", "pipeline.tracking"],
    ["pipeline.run"],
    ["pipeline.cli"],
    ["pipeline.models"],
    ["pipeline.training", "pipeline.feedback", "pipeline.ppo"],
    ["pipeline.evaluation", "pipeline.tiny"],
    ["pipeline.commands", "pipeline.bench"],
    ["pipeline.budget"],
    ["stages"],
]
"""From the ground up: what stands on a floor imports what is below it, and of its own floor its own
room alone."""
LARGEST = 350
"""Lines of a file."""
TORCHLESS = (
    "cli run steps errors commands.plan commands.status config.load config.evaluation handoff.artifacts "
    "handoff.lineage handoff.remembered handoff.sealed handoff.found tracking.tracker process.disk "
    "process.memory process.faults process.stopping ppo.alarms ppo.preflight"
).split()


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


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


def ours(path: Path) -> set[str]:
    """Modules of this program that a file imports."""
    return imports(path) & MODULES.keys() - {module_of(path)}


def room(module: str) -> str:
    return (
        ".".join(module.split(".")[:2]) if module.startswith("pipeline.") else module.split(".")[0]
    )


def floor(module: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room(module) in rooms)


def reaches(path: Path, name: str) -> bool:
    return any(found == name or found.startswith(name + ".") for found in imports(path))


def test_there_is_something_to_look_at():
    assert {"pipeline.config.schema", "stages.ppo", "pipeline.ppo.maths"} <= MODULES.keys()
    assert "pipeline.ppo.maths" in ours(ROOT / "pipeline/ppo/trainer.py")


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_arrows_go_down_and_never_up(path):
    me = module_of(path)
    wrong = [
        name
        for name in ours(path)
        if floor(name) > floor(me) or (floor(name) == floor(me) and room(name) != room(me))
    ]
    assert not wrong, f"{me} reaches up to {wrong}"


def test_no_stage_reaches_another():
    for path in ROOT.glob("stages/*.py"):
        assert not [name for name in ours(path) if name.startswith("stages.")], path


def test_there_is_no_circle():
    graph = {
        name: {other for other in ours(path) if not name.startswith(f"{other}.")}
        for name, path in MODULES.items()
    }
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(MODULES)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_modules_are_imported_by_computed_names_where_a_table_or_a_user_names_them(path):
    """`importlib` would be a way around the arrows: a name of ours in a string is the table's alone."""
    me, tree = module_of(path), ast.parse(path.read_text())
    docs = {
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    if reaches(path, "importlib"):
        named = [
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docs
        ]
        assert me == "pipeline.steps" or not [
            n for n in named if n.startswith(("stages", "pipeline."))
        ]


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_no_file_outgrows_a_head(path):
    assert len(path.read_text().splitlines()) <= LARGEST


def test_the_maths_import_torch_alone():
    standard = sys.stdlib_module_names
    for name in ("ppo/maths.py", "models/tokens.py"):
        names = {name.partition(".")[0] for name in imports(ROOT / "pipeline" / name)}
        assert {name for name in names if name not in standard} == {"torch"}


KNOW_A_KIND = {
    "pipeline.data.template": "what stands around words that an encoder reads",
    "pipeline.models.encoder_decoder": "its passes",
    "pipeline.models.scorer": "its reward model",
    "pipeline.models.forward": "chooses the passes",
    "pipeline.models.decoding": "its caches",
    "pipeline.models.loading": "its classes and checks",
    "pipeline.models.adapters": "peft's name for the task, and T5's trunk",
    "pipeline.models.packing": "is for causal models",
    "pipeline.training.supervised": "its trainer",
    "pipeline.evaluation.likelihoods": "refuses a text by itself",
    "pipeline.budget.__main__": "refuses one",
    "pipeline.ppo.build": "refuses PPO-ptx and vLLM",
    "pipeline.tiny.base": "draws one at random",
    "pipeline.commands.export": "its card says how to load it",
}
"""The modules that know whether a model is an encoder-decoder, and what for."""


def test_nobody_else_asks_which_kind_a_model_is():
    """PPO's losses, advantages, minibatches, gates and state among them."""
    words = re.compile("encoder|seq2seq|cross_attention", re.IGNORECASE)
    asking = set()
    for path in FILES:
        tree = ast.parse(path.read_text())
        used = [n.id for n in ast.walk(tree) if isinstance(n, ast.Name)]
        used += [n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
        asking |= {module_of(path)} if any(map(words.search, used)) else set()
    assert asking == set(KNOW_A_KIND)


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
