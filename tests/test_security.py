"""Nothing that is read can run code, lead elsewhere or fill memory; nothing leaves unasked.

Whatever might run writes a sentinel file; it must never appear.
"""

import ast
import contextlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiny_models
from pipeline.config.load import strict_yaml
from pipeline.errors import UserError
from pipeline.handoff import artifacts, checkpoint, sealed
from pipeline.handoff.artifacts import Manifest, publish, read
from pipeline.models import loading as models

ROOT = Path(__file__).parent.parent
FILES = sorted([*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("stages/*.py")])


class Evil:
    """Unpickling it writes the sentinel."""

    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self):
        return (Path.touch, (self.sentinel,))


@pytest.fixture
def sentinel(tmp_path):
    path = tmp_path / "sentinel"
    pickle.loads(pickle.dumps(Evil(path)))
    assert path.exists()  # it does work
    path.unlink()
    yield path
    assert not path.exists()


# --- training states ------------------------------------------------------------------------------


def saved(work: Path, step: int = 3) -> Path:
    return checkpoint.save(work, step, {"weight": torch.zeros(2)})


def test_a_pickle_in_a_state_is_found_by_its_hash(tmp_path, sentinel):
    state = saved(tmp_path / "work")
    torch.save(Evil(sentinel), state / "state.pt")
    assert sealed.fault(state) == "state.pt is corrupt"
    with pytest.raises(UserError, match="no saved state is whole"):
        sealed.newest(tmp_path / "work")


def test_a_pickle_under_a_seal_that_fits_is_not_run(tmp_path, sentinel):
    state = saved(tmp_path / "work")
    torch.save(Evil(sentinel), state / "state.pt")
    sealed.seal(state)
    assert sealed.newest(tmp_path / "work") == state
    with pytest.raises(UserError, match="refused, it may carry code"):
        checkpoint.load(state)


def test_a_file_that_was_added_to_a_state_is_refused(tmp_path):
    """transformers would look for adapters, shards and pickled weights beside what was saved."""
    state = saved(tmp_path / "work")
    (state / "pytorch_model.bin").write_bytes(b"")
    assert sealed.fault(state) == "pytorch_model.bin is not part of it"


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret", "..\\secret"])
def test_a_seal_that_points_outside_is_refused(tmp_path, name):
    state = saved(tmp_path / "work")
    (state / "seal.json").write_text(json.dumps({name: "0" * 64}))
    assert "outside" in str(sealed.fault(state))


def test_links_in_and_to_states_are_refused(tmp_path):
    state = saved(tmp_path / "work")
    elsewhere = tmp_path / "elsewhere"
    (state / "state.pt").rename(elsewhere)
    (state / "state.pt").symlink_to(elsewhere)
    assert "symbolic link" in str(sealed.fault(state))
    (tmp_path / "work" / "step-000009").symlink_to(state)
    assert sealed.fault(tmp_path / "work" / "step-000009") == "it is not a plain folder"


def test_a_state_holds_no_pickle_that_nobody_reads(tmp_path):
    assert sorted(p.name for p in saved(tmp_path / "work").iterdir()) == ["seal.json", "state.pt"]


# --- models and artifacts -------------------------------------------------------------------------

EVIL_CODE = "from pathlib import Path\nPath({sentinel!r}).touch()\nclass Config: ...\n"


@pytest.fixture
def repository(tmp_path, sentinel):
    """A model whose config names code of its own."""
    folder = tmp_path / "repository"
    tiny_models.policy().save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    (folder / "evil.py").write_text(EVIL_CODE.format(sentinel=str(sentinel)))
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "evil"
    names = "AutoConfig AutoModelForCausalLM AutoModelForSequenceClassification AutoTokenizer"
    config["auto_map"] = dict.fromkeys(names.split(), "evil.Config")
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {
        "auto_map": {"AutoTokenizer": ["evil.Config", "evil.Config"]},
        "tokenizer_class": "Evil",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.mark.parametrize("load", [models.load_policy, models.load_reward])
def test_a_repositorys_own_code_is_never_run(repository, load):
    with pytest.raises(UserError, match="cannot load"):
        load(repository)


def test_nor_that_of_a_tokenizer(repository):
    with contextlib.suppress(UserError):  # or it is the plain tokenizer that its files hold
        models.load_tokenizer(repository)


def test_weights_that_are_a_pickle_are_not_run(tmp_path, sentinel):
    folder = tmp_path / "model"
    tiny_models.policy().save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(Evil(sentinel), folder / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"(?i)weights|cannot load|unsupported"):
        models.load_policy(folder)


def test_a_manifest_of_gigabytes_is_not_read(tmp_path):
    staging = tmp_path / "staging"
    staging.mkdir()
    (staging / "model.safetensors").write_bytes(b"weights")
    final = publish(staging, tmp_path / "run" / "sft", Manifest(stage="sft"))
    with (final / "manifest.json").open("ab") as file:
        file.truncate(10_000_001)
    with pytest.raises(UserError, match="too long"):
        read(final)


def test_an_artifact_holds_no_pipe_or_device(tmp_path):
    staging = tmp_path / "staging"
    staging.mkdir()
    os.mkfifo(staging / "pipe")
    with pytest.raises(UserError, match="not a plain file"):
        publish(staging, tmp_path / "run" / "sft", Manifest(stage="sft"))


# --- configs --------------------------------------------------------------------------------------

TAGS = [
    '!!python/object/apply:os.system ["touch {sentinel}"]',
    '!!python/object/new:os.system ["touch {sentinel}"]',
    "!!python/name:os.system",
    "!!python/module:evil",
    '!!python/object/apply:subprocess.check_output [["touch", "{sentinel}"]]',
    "!evil {{}}",
]


@pytest.mark.parametrize("tag", TAGS)
def test_a_config_runs_nothing(tag, sentinel):
    with pytest.raises(UserError, match="tag .* refused"):
        strict_yaml.parse("seed: " + tag.format(sentinel=sentinel), "x.yaml")


def test_a_config_on_the_command_line_runs_nothing(tmp_path, sentinel):
    config = tmp_path / "sft.yaml"
    config.write_text("model: " + TAGS[0].format(sentinel=sentinel))
    done = subprocess.run(
        [sys.executable, "-m", "stages.sft", "--config", str(config), "--run", str(tmp_path / "r")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "sft.yaml:1: tag" in done.stderr and "Traceback" not in done.stderr


def test_bombs_are_refused():
    laughs = "a: &a [x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20)
    )
    with pytest.raises(UserError, match="anchors are not supported"):
        strict_yaml.parse(laughs, "x.yaml")
    for deep in ("[" * 100_000, "{a: " * 5_000, "- " * 50_000, "[" * 60 + "]" * 60):
        with pytest.raises(UserError, match="nested more than"):
            strict_yaml.parse(deep, "x.yaml")
    with pytest.raises(UserError, match="too many for a config"):
        strict_yaml.parse("a" * 2_000_000, "x.yaml")


# --- what leaves the machine ----------------------------------------------------------------------


def test_the_libraries_do_not_report_to_their_makers():
    script = (
        "import pipeline.cli; from huggingface_hub import constants; import wandb.env; "
        "print(constants.HF_HUB_DISABLE_TELEMETRY, wandb.env.error_reporting_enabled())"
    )
    names = ("TELEMETRY", "WANDB", "DO_NOT_TRACK")
    environment = {k: v for k, v in os.environ.items() if not any(name in k for name in names)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == ["True", "False"], done.stderr


# --- the source itself ----------------------------------------------------------------------------


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


def keyword(call: ast.Call, name: str):
    """The constant given for a keyword; "absent" when it is not given."""
    found = [k.value for k in call.keywords if k.arg == name]
    return getattr(found[0], "value", "not a constant") if found else "absent"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_line_of_the_source_could(path):
    for call in calls(path):
        name = ast.unparse(call.func)
        where = f"{path}:{call.lineno}"
        assert keyword(call, "trust_remote_code") in ("absent", False), where
        assert name not in ("eval", "exec", "os.system", "pickle.load", "pickle.loads"), where
        assert name not in ("yaml.unsafe_load", "yaml.full_load", "yaml.safe_load"), where
        if name == "torch.load":
            assert keyword(call, "weights_only") is True, where
        if name == "yaml.load":
            assert path.name == "strict_yaml.py", where
        assert keyword(call, "shell") in ("absent", False), where


def test_what_is_unsafe_is_said_once():
    assert {".bin", ".pt", ".pkl", ".py"} <= artifacts.UNSAFE
