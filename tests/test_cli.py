"""The command line of a stage: cheap refusals, exit codes, no tracebacks for mistakes."""

import errno
import gc
import importlib
import sys
import types
from pathlib import Path

import pytest

from fake_stages import make_base, train, write_recipe
from pipeline import cli, run
from pipeline.handoff.artifacts import manifest_hash
from pipeline.process import disk
from test_architecture import imported_by

CALL = ["--config", "configs/tiny/sft.yaml", "--run", "checkpoints/tiny"]


@pytest.fixture(autouse=True)
def a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    write_recipe(tmp_path)
    make_base(tmp_path)
    install(monkeypatch, train)


def install(monkeypatch, run) -> None:
    monkeypatch.setitem(sys.modules, "stages.sft", types.SimpleNamespace(run=run))


def call(*words: str) -> int:
    with pytest.raises(SystemExit) as done:
        cli.main("sft", [*CALL, *words])
    return done.value.code  # type: ignore[return-value]


def test_a_stage_is_run_once_and_then_up_to_date(capsys):
    assert call() == 0
    assert "sft: published checkpoints/tiny/sft" in capsys.readouterr().out
    assert call() == 0
    assert capsys.readouterr().out == "sft: up to date (checkpoints/tiny/sft)\n"


def test_of_two_that_start_at_once_one_trains(monkeypatch, capsys):
    made = []

    def another_was_faster(config):
        mine, run._command = run._command, None
        train(config, b"the other's")
        run._command = mine
        made.append(train(config))

    install(monkeypatch, another_was_faster)
    assert call() == 0
    assert made == []
    assert "another process has just made it" in capsys.readouterr().out
    assert Path("checkpoints/tiny/sft/model.safetensors").read_bytes() == b"the other's"


def test_made_again_from_the_same_things_nothing_after_it_is_stale():
    call()
    before = manifest_hash(Path("checkpoints/tiny/sft"))
    assert call("--force") == 0
    assert manifest_hash(Path("checkpoints/tiny/sft")) == before


def test_a_run_goes_on_as_it_was_made_when_its_name_alone_is_given(capsys):
    call("seed=3")
    with pytest.raises(SystemExit):
        cli.main("sft", ["--run", "checkpoints/tiny"])
    assert capsys.readouterr().out.endswith("sft: up to date (checkpoints/tiny/sft)\n")


def test_garbage_is_not_looked_for_while_a_stage_is_imported(monkeypatch):
    looking = []

    def imported(name):
        looking.append(gc.isenabled())
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", imported)
    with pytest.raises(ImportError):
        cli.main("sft", CALL)
    assert [*looking, gc.isenabled()] == [False, True]


def test_a_changed_config_says_why_it_runs_again(capsys):
    call()
    assert call("seed=3") == 0
    assert "sft: made again, config: seed: 1 -> 3" in capsys.readouterr().out
    assert call("--set", "sft.seed=3 ppo.kl_coef=0.3") == 0
    assert "up to date" in capsys.readouterr().out


def test_set_may_be_given_more_than_once(capsys):
    assert call("--set", "seed=3", "--set", "sft.epochs=2") == 0
    capsys.readouterr()
    assert call("--set", "seed=3 sft.epochs=2") == 0
    assert "up to date" in capsys.readouterr().out


def test_settings_may_stand_on_both_sides_of_an_option(capsys):
    assert call("epochs=2", "--set", "seed=3", "max_length=40") == 0
    capsys.readouterr()
    assert call("--set", "seed=3 sft.epochs=2 sft.max_length=40") == 0
    assert "up to date" in capsys.readouterr().out


def test_force_starts_again_even_after_an_interruption(monkeypatch, capsys):
    call()
    work = Path("checkpoints/tiny/.work/sft/step-000001")
    work.mkdir(parents=True)
    assert call("--force") == 0
    assert "published" in capsys.readouterr().out
    assert not work.exists()


def test_mistakes_are_a_message_and_exit_code_2(monkeypatch, capsys):
    install(monkeypatch, lambda config: pytest.fail("ran"))
    assert call("sed=3", "ppo.kl_coeff=1") == 2
    told = capsys.readouterr().err
    assert told.startswith("error: sed=3: no key `sed`")
    assert "kl_coeff" in told
    assert "Traceback" not in told


def test_what_a_stage_needs_late_or_never_is_not_imported_with_it():
    loaded = imported_by(
        "import importlib\nfrom pipeline import cli\nfrom pipeline.config import SFTConfig\n"
        "cli._imported('sft', SFTConfig(model='any'))\nassert importlib.util.find_spec('wandb')"
    )
    assert "trl.trainer.sft_trainer" in loaded
    assert not loaded & {"wandb", "bitsandbytes"}


def test_missing_data_is_told_before_the_stage_is_imported(monkeypatch, capsys):
    install(monkeypatch, lambda config: pytest.fail("ran"))
    call_first = call("data.path=missing.jsonl", "--force")
    assert call_first == 2
    assert "missing.jsonl: no such file" in capsys.readouterr().err


def test_rows_without_a_reply_are_told_before_the_stage_is_imported(tmp_path, monkeypatch, capsys):
    install(monkeypatch, lambda config: pytest.fail("ran"))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    for given in (f"{tmp_path}/rows.jsonl", f"[{{path: {tmp_path}/rows.jsonl, weight: 2}}]"):
        assert call(f"data.path={given}", "--force") == 2
        assert "rows.jsonl:2: " in capsys.readouterr().err


def raising(error: BaseException):
    def run(config):
        raise error

    return run


class OutOfMemoryError(RuntimeError):
    """Has the name of torch's."""


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OutOfMemoryError("CUDA out of memory.\nlong tail"), 1, "Try a smaller micro_batch_size"),
        (OSError(errno.ENOSPC, "No space left on device", "x.bin"), 1, "make room"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 1, "make room"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0"), 1, "make room"),
    ],
)
def test_failures_that_a_user_can_mend_have_no_traceback(monkeypatch, capsys, error, code, told):
    install(monkeypatch, raising(error))
    assert call() == code
    assert told in capsys.readouterr().err


def test_a_full_disk_is_told_with_the_bytes_it_needs(monkeypatch, capsys):
    Path("checkpoints/base/tiny/more.safetensors").write_bytes(b"x" * 1000)
    write = raising(OSError(errno.EFBIG, "File too large"))
    config = cli.configured("sft", cli.request("sft", cli.parser("sft").parse_args(CALL)))
    told = disk.message(config.run, run.bytes_needed(config))
    size = sum(p.stat().st_size for p in Path("checkpoints/base/tiny").glob("*.safetensors"))
    assert f"up to {10 * size} bytes" in told
    Path("checkpoints/base/tiny/more.safetensors").unlink()
    install(monkeypatch, write)
    assert call() == 1
    assert "What was saved before is whole" in capsys.readouterr().err


def test_other_failures_keep_their_traceback(monkeypatch):
    install(monkeypatch, raising(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main("sft", CALL)


def test_from_borrows(capsys):
    parsed = cli.parser("rm").parse_args(["--config", "c", "--run", "b", "--from", "a", "seed=3"])
    assert parsed.borrow == Path("a")
    assert parsed.settings == ["seed=3"]
