"""The frame of a stage: lock, verified parents, what an interrupted run leaves, publication."""

import errno
import json
import os
from pathlib import Path

import pytest

from fake_stages import config_of, make_all, make_base, train, write_recipe
from pipeline.config.rewards import Reward
from pipeline.config.schema import Data
from pipeline.errors import UserError
from pipeline.handoff import lineage
from pipeline.handoff.artifacts import manifest_hash, read
from pipeline.handoff.datafiles import is_hub_id
from pipeline.handoff.lineage import inputs_of, parents_of
from pipeline.run import StageRun, start_again


@pytest.fixture(autouse=True)
def a_recipe(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.run._command", None)  # what a command line in this process told
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    write_recipe(tmp_path)
    make_base(tmp_path)
    return tmp_path


def interrupted(config, dataset=None, step: str = "step-000010") -> Path:
    """A run that saved a state and was killed."""
    with pytest.raises(KeyboardInterrupt), StageRun(config, dataset) as stage:
        stage.tracker.log(10, {"loss": 1.0})
        (stage.work / step).mkdir()
        raise KeyboardInterrupt
    return stage.work


def test_a_stage_publishes_what_it_was_made_from(tmp_path):
    config = config_of(tmp_path, "sft")
    manifest = read(train(config), "sft")
    assert set(manifest.files) == {"model.safetensors", "metrics.jsonl"}
    assert manifest.parents["base"].manifest_sha256 == manifest_hash(Path("checkpoints/base/tiny"))
    assert list(manifest.inputs) == ["checkpoints/base/tiny/data/d.jsonl"]
    assert manifest.metrics.pop("minutes") >= 0
    assert manifest.metrics == {"loss": 1.0}
    assert manifest.config["learning_rate"] == 1e-5
    assert os.listdir("checkpoints/tiny") == ["sft"]


def why_stale(config):
    return lineage.why_stale(config.stage, config, config.run)


def up_to_date(config) -> bool:
    return why_stale(config) is None


def test_up_to_date_is_decided_by_content(tmp_path):
    config = config_of(tmp_path, "sft")
    assert why_stale(config) == "not made yet"
    train(config)
    assert up_to_date(config)
    os.utime("checkpoints/base/tiny/data/d.jsonl")
    os.utime("checkpoints/base/tiny/manifest.json")
    assert up_to_date(config)
    assert up_to_date(config_of(tmp_path, "sft", "tiny", "log_every=3"))
    told = why_stale(config_of(tmp_path, "sft", "tiny", "seed=3", "learning_rate=1e-4"))
    assert told == "config: learning_rate: 1e-05 -> 0.0001; seed: 1 -> 3"


def test_changed_data_and_changed_parents_make_a_stage_stale(tmp_path):
    make_all(tmp_path)
    Path("rankings.jsonl").write_text("{}\n{}\n")
    assert why_stale(config_of(tmp_path, "rm")) == "rankings.jsonl has changed"
    assert up_to_date(config_of(tmp_path, "ppo"))
    train(config_of(tmp_path, "sft"), b"other")
    assert why_stale(config_of(tmp_path, "ppo")) == "sft has changed"


def test_a_damaged_stage_is_refused_and_not_silently_rebuilt(tmp_path):
    config = config_of(tmp_path, "sft")
    train(config)
    Path("checkpoints/tiny/sft/model.safetensors").unlink()
    with pytest.raises(UserError, match="FORCE=sft"):
        up_to_date(config)


def test_rows_in_memory_are_never_up_to_date_and_need_no_file(tmp_path):
    config = config_of(tmp_path, "sft", "tiny", "data.path=nowhere.jsonl")
    train(config, dataset=[{"text": "a"}])
    read(Path("checkpoints/tiny/sft"))
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        why_stale(config)
    Path("nowhere.jsonl").write_text("{}\n")
    assert why_stale(config) == "dataset has changed"


def test_a_corrupt_parent_is_refused_before_anything_runs(tmp_path):
    make_all(tmp_path)
    Path("checkpoints/tiny/sft/model.safetensors").write_bytes(b"weightz")
    with pytest.raises(UserError, match="is corrupt.*make sft RUN=tiny FORCE=sft"):
        StageRun(config_of(tmp_path, "ppo")).__enter__()
    assert not Path("checkpoints/tiny/.work/ppo.lock").exists()


def test_a_missing_parent_is_named(tmp_path):
    with pytest.raises(UserError, match="make it: make sft RUN=tiny"):
        StageRun(config_of(tmp_path, "rm")).__enter__()


def test_a_reward_model_of_another_sft_is_refused(tmp_path):
    make_all(tmp_path)
    train(config_of(tmp_path, "sft"), b"other")
    with pytest.raises(UserError, match="trained from another sft"):
        StageRun(config_of(tmp_path, "ppo")).__enter__()


def test_two_runs_of_one_stage_are_one_too_many(tmp_path):
    config = config_of(tmp_path, "sft")
    with (
        StageRun(config),
        pytest.raises(UserError, match=f"in use by process {os.getpid()}"),
        StageRun(config),
    ):
        pass


def test_stages_are_borrowed_until_the_run_has_its_own(tmp_path):
    make_all(tmp_path, "a")
    config = config_of(tmp_path, "rm", "b").model_copy(update={"borrow": Path("checkpoints/a")})
    assert parents_of(config) == {"sft": Path("checkpoints/a/sft")}
    train(config_of(tmp_path, "sft", "b"))
    assert parents_of(config) == {"sft": Path("checkpoints/b/sft")}


def test_ppo_reads_the_reward_model_only_if_a_reward_is_it(tmp_path):
    config = config_of(tmp_path, "ppo")
    assert list(parents_of(config)) == ["sft", "rm"]
    (tmp_path / "mine.py").write_text("def f(): ...")
    other = config.model_copy(update={"rewards": [Reward(function="mine:f")]})
    assert list(parents_of(other)) == ["sft"]


def test_code_and_hub_ids_are_inputs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mine.py").write_text("def f(): ...")
    config = config_of(tmp_path, "ppo")
    rewards = [Reward(function="mine:f"), Reward(model="owner/scorer")]
    inputs = inputs_of(config.model_copy(update={"rewards": rewards}))
    assert inputs["owner/scorer"] == "owner/scorer"
    before = inputs["mine.py"]
    (tmp_path / "mine.py").write_text("def f(): return 1")
    assert inputs_of(config.model_copy(update={"rewards": rewards}))["mine.py"] != before


# --- interruptions --------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_with_its_record(tmp_path):
    config = config_of(tmp_path, "sft")
    work = interrupted(config)
    cosmetic = config_of(tmp_path, "sft", "tiny", "log_every=3", "save_every=5")
    with StageRun(cosmetic) as stage:
        assert (stage.work / "step-000010").is_dir()
        assert json.loads((work / "metrics.jsonl").read_text())["step"] == 10
        assert list(stage.output.iterdir()) == []


def test_an_interrupted_run_with_another_config_is_refused_with_the_difference(tmp_path):
    interrupted(config_of(tmp_path, "sft"))
    with pytest.raises(UserError) as error, StageRun(config_of(tmp_path, "sft", "tiny", "seed=3")):
        pass
    assert "seed: 1 -> 3" in str(error.value)
    assert "FORCE=sft" in str(error.value)
    start_again(config_of(tmp_path, "sft"))
    train(config_of(tmp_path, "sft", "tiny", "seed=3"))


def test_an_interrupted_run_with_other_data_or_parents_is_refused(tmp_path):
    train(config_of(tmp_path, "sft"))
    interrupted(config_of(tmp_path, "rm"))
    Path("rankings.jsonl").write_text("{}\n{}\n")
    with pytest.raises(UserError, match=r"rankings\.jsonl has changed"):
        StageRun(config_of(tmp_path, "rm")).__enter__()
    Path("rankings.jsonl").write_text("{}\n")
    train(config_of(tmp_path, "sft"), b"other")
    with pytest.raises(UserError, match="sft has changed"):
        StageRun(config_of(tmp_path, "rm")).__enter__()


def test_rows_in_memory_cannot_be_swapped_under_an_interrupted_run(tmp_path):
    config, rows = config_of(tmp_path, "sft"), [{"text": "a"}]
    interrupted(config, rows)
    with pytest.raises(UserError, match="dataset has changed"):
        StageRun(config, [{"text": "b"}]).__enter__()
    assert train(config, dataset={"text": ["a"]})  # the same rows, in another container


def test_a_run_that_saved_nothing_starts_its_record_anew_and_may_change(tmp_path):
    with pytest.raises(KeyboardInterrupt), StageRun(config_of(tmp_path, "sft")) as stage:
        stage.tracker.log(1, {"loss": 1.0})
        raise KeyboardInterrupt
    with StageRun(config_of(tmp_path, "sft", "tiny", "seed=3")) as stage:
        assert not (stage.work / "metrics.jsonl").exists()


def test_rankings_that_people_wait_for_survive_a_restart(tmp_path):
    train(config_of(tmp_path, "sft"))
    with pytest.raises(UserError), StageRun(config_of(tmp_path, "rm")) as stage:
        (stage.work / "to_rank.jsonl").write_text("{}")
        raise UserError("to be ranked")
    with StageRun(config_of(tmp_path, "rm")) as stage:
        assert (stage.work / "to_rank.jsonl").exists()


@pytest.mark.parametrize("moment", [2, 3, 5])
def test_cut_off_while_publishing_the_artifact_is_whole_and_nothing_is_left(
    tmp_path, monkeypatch, moment
):
    config = config_of(tmp_path, "sft")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="planned"):
        patch.setenv("PIPELINE_FAULT", f"sft:publish:{moment}:enospc")
        train(config)
    assert up_to_date(config)
    assert os.listdir("checkpoints/tiny") == ["sft"]
    with StageRun(config_of(tmp_path, "sft", "tiny", "seed=3")) as stage:  # not refused
        assert not (stage.work / "metrics.jsonl").exists()


def test_states_without_the_config_they_belong_to_are_not_used(tmp_path):
    config = config_of(tmp_path, "sft")
    (interrupted(config) / "made_from.json").write_text("{")
    with pytest.raises(UserError, match=r"made_from.json: missing or unreadable.*FORCE=sft"):
        StageRun(config).__enter__()


def test_a_parent_made_again_meanwhile_keeps_a_stage_from_being_published(tmp_path):
    train(config_of(tmp_path, "sft"))
    with (
        pytest.raises(UserError, match="sft was made again"),
        StageRun(config_of(tmp_path, "rm")) as rm,
    ):
        train(config_of(tmp_path, "sft"), b"other")
        rm.publish({})
    assert not rm.final.exists()


def test_processes_beside_the_first_neither_lock_nor_publish(tmp_path, monkeypatch):
    config = config_of(tmp_path, "sft")
    with StageRun(config):
        monkeypatch.setenv("RANK", "1")
        with StageRun(config) as beside:
            beside.tracker.log(1, {"loss": 1.0})
            assert beside.publish({}) == Path("checkpoints/tiny/sft")
    assert not Path("checkpoints/tiny/sft").exists()


# --- fingerprints ---------------------------------------------------------------------------------


def test_fingerprints_of_files_folders_and_hub_ids(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("a.jsonl", "b.parquet", ".hidden.jsonl", "README"):
        (folder / name).write_text("x")
    assert list(inputs_of(Data(path=str(folder)))) == [
        (folder / "a.jsonl").as_posix(),
        (folder / "b.parquet").as_posix(),
    ]
    assert inputs_of(Data(path="owner/name")) == {"owner/name": "owner/name"}
    with pytest.raises(UserError, match=r"missing\.jsonl: no such file"):
        inputs_of(Data(path="missing.jsonl"))


@pytest.mark.parametrize(
    ("name", "hub"),
    [("a/b.jsonl", False), ("./a/b", False), ("a/b/c", False), ("owner/name", True), ("/a", False)]
    + [("owner/name:config", True), ("checkpoints/x", False)],
)
def test_what_is_meant_as_a_path(name, hub):
    assert is_hub_id(name) == hub


def test_hashes_of_big_files_are_remembered_until_the_file_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(lineage, "_SETTLED", -1.0)
    big = tmp_path / "big.jsonl"
    big.write_bytes(b"x" * 2_000_000)
    before = inputs_of(Data(path=str(big)))
    with monkeypatch.context() as patch:
        patch.setattr(lineage, "sha256", lambda path: pytest.fail("hashed again"))
        assert inputs_of(Data(path=str(big))) == before
    stat = big.stat()
    big.write_bytes(b"y" * 2_000_000)
    os.utime(big, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the same size and time
    assert inputs_of(Data(path=str(big))) != before


def test_looking_at_a_folder_that_may_only_be_read_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(lineage, "_SETTLED", -1.0)
    big = tmp_path / "big.jsonl"
    big.write_bytes(b"x" * 2_000_000)
    refusal = OSError(errno.EROFS, "Read-only file system")
    monkeypatch.setattr(lineage, "write_atomically", lambda *_: (_ for _ in ()).throw(refusal))
    assert len(inputs_of(Data(path=str(big)))) == 1
