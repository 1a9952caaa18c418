"""Artifacts: whole or absent, verified by hash, swapped by renames, one writer at a time."""

import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config.schema import BaseConfig
from pipeline.errors import UserError
from pipeline.handoff import artifacts
from pipeline.handoff.artifacts import Lock, Manifest, Parent, manifest_hash, publish, read, recover


def staged(root: Path, content: bytes = b"weights", name: str = "staging") -> Path:
    staging = root / name
    (staging / "data").mkdir(parents=True)
    (staging / "model.safetensors").write_bytes(content)
    (staging / "data" / "rows.jsonl").write_text("{}\n")
    return staging


def published(root: Path, content: bytes = b"weights", stage: str = "sft") -> Path:
    final = root / "checkpoints" / "tiny" / stage
    manifest = Manifest(stage=stage, config={"seed": 1}, metrics={"loss": 0.5})
    return publish(staged(root, content), final, manifest)


def refusal(directory: Path, stage: str | None = None) -> str:
    with pytest.raises(UserError) as error:
        read(directory, stage)
    return str(error.value)


def edit_manifest(directory: Path, change) -> None:
    path = directory / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# --- publishing -----------------------------------------------------------------------------------


def test_what_is_published_reads_back(tmp_path):
    directory = published(tmp_path)
    manifest = read(directory, "sft")
    assert set(manifest.files) == {"model.safetensors", "data/rows.jsonl"}
    assert manifest.files["model.safetensors"].size == 7
    assert manifest.config == {"seed": 1}
    assert manifest.packages["pydantic" if "pydantic" in manifest.packages else "torch"]
    assert manifest.created.endswith("+00:00")
    assert not (tmp_path / "staging").exists()
    assert [p.name for p in directory.parent.iterdir()] == ["sft"]


def test_publishing_again_replaces_the_whole(tmp_path):
    directory = published(tmp_path, b"old")
    before = manifest_hash(directory)
    published(tmp_path, b"newer")
    assert (directory / "model.safetensors").read_bytes() == b"newer"
    assert manifest_hash(directory) != before
    read(directory)


def test_a_published_file_is_never_written_to(tmp_path):
    directory = published(tmp_path, b"old")
    held = (directory / "model.safetensors").open("rb")  # a reader that began before
    published(tmp_path, b"new")
    assert held.read() == b"old"
    held.close()


@pytest.mark.parametrize("killed_at", range(1, 6))
def test_killed_between_any_two_renames_the_artifact_is_whole(tmp_path, monkeypatch, killed_at):
    directory = published(tmp_path, b"old")
    steps = 0

    def dying(function):
        def call(*args, **kwargs):
            nonlocal steps
            steps += 1
            if steps == killed_at:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(artifacts.os, "rename", dying(os.rename))
        patch.setattr(artifacts.shutil, "rmtree", dying(artifacts.shutil.rmtree))
        with contextlib.suppress(KeyboardInterrupt):
            published(tmp_path, b"new")
    assert read(directory)  # settles what was left
    content = (directory / "model.safetensors").read_bytes()
    assert content == (b"old" if killed_at <= 2 else b"new")
    recover(directory)
    assert sorted(p.name for p in directory.parent.iterdir() if p.name != ".work") == ["sft"]


@pytest.mark.parametrize("place", ["sft", "sft/notes.txt", "sft/more/model.safetensors"])
@pytest.mark.parametrize("made", [False, True])
def test_what_a_person_put_in_the_place_of_an_artifact_stays(tmp_path, place, made):
    final = tmp_path / "checkpoints" / "tiny" / "sft"
    if made and place != "sft":
        published(tmp_path, b"old")
    mine = final.parent / place
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(UserError, match="sft: something else is there, and it stays; move it away"):
        published(tmp_path, b"new")
    with contextlib.suppress(UserError):
        read(final)
    assert mine.read_text() == "mine"


def test_what_comes_between_two_renames_stays_until_it_is_moved_away(tmp_path, monkeypatch):
    """Files put there after the new artifact was certain: it waits for its place."""
    final = tmp_path / "checkpoints" / "tiny" / "sft"
    ready = published(tmp_path, b"new").rename(final.with_name(".sft.ready"))
    final.mkdir()
    (final / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not made yet"):
        read(final)
    with pytest.raises(UserError, match=r"move it away: notes\.txt"):
        recover(final)
    assert (ready / "model.safetensors").exists()
    final.rename(tmp_path / "aside")
    assert read(final).metrics == {"loss": 0.5}


def test_half_a_staging_directory_is_not_taken_for_an_artifact(tmp_path):
    directory = published(tmp_path, b"old")
    (directory.parent / ".sft.ready").mkdir()
    read(directory)
    assert (directory / "model.safetensors").read_bytes() == b"old"


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "training_args.pt", "modeling_x.py", "a.pkl"]
)
def test_files_that_can_carry_code_are_not_published(tmp_path, name):
    staging = staged(tmp_path)
    (staging / name).write_bytes(b"")
    with pytest.raises(ValueError, match="may carry code"):
        publish(staging, tmp_path / "run" / "sft", Manifest(stage="sft"))
    assert not (tmp_path / "run" / "sft").exists()


def test_a_base_is_published_from_its_config(tmp_path):
    config = BaseConfig(builder="tiny", seed=3)
    directory = artifacts.publish_directory(staged(tmp_path), tmp_path / "base" / "tiny", config)
    manifest = read(directory, "base")
    assert (manifest.seed, manifest.config["builder"]) == (3, "tiny")


def test_a_manifest_of_an_older_version_may_say_more(tmp_path):
    directory = publish(staged(tmp_path), tmp_path / "run" / "sft", Manifest(stage="sft"))
    path = directory / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "config_hash": "0" * 64}))
    assert read(directory, "sft").stage == "sft"


# --- refusing -------------------------------------------------------------------------------------


def test_a_flipped_bit_is_named_with_the_rebuild_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    published(Path("."))
    directory = Path("checkpoints/tiny/sft")
    (directory / "model.safetensors").write_bytes(b"weightz")
    told = refusal(directory)
    assert told.startswith("checkpoints/tiny/sft/model.safetensors: is corrupt")
    assert told.endswith("rebuild: make sft RUN=tiny FORCE=sft")


def test_a_truncated_or_missing_file_is_named(tmp_path):
    directory = published(tmp_path)
    (directory / "model.safetensors").write_bytes(b"wei")
    assert "model.safetensors: has 3 bytes, not 7" in refusal(directory)
    (directory / "model.safetensors").unlink()
    assert "model.safetensors: is missing" in refusal(directory)


def test_a_missing_artifact_names_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refusal(Path("checkpoints/tiny/rm")) == (
        "checkpoints/tiny/rm: not made yet; make it: make rm RUN=tiny"
    )
    assert "make it: make base RECIPE=tiny" in refusal(Path("checkpoints/base/tiny"))
    assert "make sft RUN=a CKPT=elsewhere" in refusal(Path("elsewhere/a/sft"))


def test_a_symlink_is_refused(tmp_path):
    directory = published(tmp_path)
    secret = tmp_path / "secret"
    secret.write_bytes(b"weights")
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors").symlink_to(secret)
    assert "symbolic link" in refusal(directory)


def test_a_linked_folder_is_refused(tmp_path):
    directory = published(tmp_path)
    (directory / "data").rename(tmp_path / "elsewhere")
    (directory / "data").symlink_to(tmp_path / "elsewhere")
    assert "symbolic link" in refusal(directory)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "data/../../secret", "..\\secret"])
def test_a_manifest_that_points_outside_is_refused(tmp_path, name):
    directory = published(tmp_path)

    def point(manifest):
        manifest["files"][name] = manifest["files"].pop("model.safetensors")

    edit_manifest(directory, point)
    assert "outside" in refusal(directory)


def test_files_that_do_not_belong_are_refused_but_hidden_ones_are_not(tmp_path):
    directory = published(tmp_path)
    (directory / ".DS_Store").write_bytes(b"")
    read(directory)
    (directory / "adapter_config.json").write_text("{}")
    assert "adapter_config.json: is not part of the artifact" in refusal(directory)


def test_a_broken_or_newer_manifest_is_refused(tmp_path):
    directory = published(tmp_path)
    edit_manifest(directory, lambda manifest: manifest.update(format_version=2))
    assert "has format 2" in refusal(directory)
    (directory / "manifest.json").write_text('{"stage": ')
    assert "manifest.json: is not a manifest" in refusal(directory)


def test_an_artifact_of_another_stage_is_refused(tmp_path):
    assert "made by stage sft, expected rm" in refusal(published(tmp_path), "rm")


def test_other_tokenizers_and_templates_are_refused():
    sft = Manifest(stage="sft", tokenizer_hash="a", template_hash="b")
    artifacts.check_same_tokenizer(sft, sft.model_copy(update={"stage": "rm"}))
    with pytest.raises(UserError, match="different tokenizers"):
        artifacts.check_same_tokenizer(sft, Manifest(stage="rm", tokenizer_hash="x"))
    with pytest.raises(UserError, match="different chat templates"):
        artifacts.check_same_tokenizer(sft, Manifest(stage="rm", tokenizer_hash="a"))


def test_a_reward_model_of_another_sft_is_refused(tmp_path):
    sft = published(tmp_path, b"one")
    link = Parent(path=str(sft), manifest_sha256=manifest_hash(sft))
    manifest = Manifest(stage="rm", parents={"sft": link})
    rm = publish(staged(tmp_path), tmp_path / "checkpoints" / "tiny" / "rm", manifest)
    artifacts.check_trained_from(rm, "sft", sft)
    published(tmp_path, b"two")
    with pytest.raises(UserError, match="trained from another sft"):
        artifacts.check_trained_from(rm, "sft", sft)


# --- locks ----------------------------------------------------------------------------------------


def hold(path: str, ready, done) -> None:
    with Lock(Path(path)):
        ready.set()
        done.wait(30)


def test_a_second_holder_is_refused_with_the_firsts_pid(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(str(tmp_path / "x.lock"), ready, done))
    holder.start()
    assert ready.wait(10)
    with pytest.raises(UserError, match=f"in use by process {holder.pid}"):
        Lock(tmp_path / "x.lock").__enter__()
    done.set()
    holder.join(10)
    with Lock(tmp_path / "x.lock"):
        pass
    assert not (tmp_path / "x.lock").exists()


def test_the_lock_dies_with_its_process(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from pipeline.process.files import Lock\n"
        "Lock(Path(sys.argv[1])).__enter__(); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.lock")], check=False)
    assert killed.returncode == -9
    assert (tmp_path / "x.lock").exists()
    with Lock(tmp_path / "x.lock"):
        pass
