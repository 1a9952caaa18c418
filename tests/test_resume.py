"""A stage cut off after a save goes on and ends with the very bytes of a run that was not."""

import json
from pathlib import Path

import pytest

import tiny_models
from pipeline.config.ppo import PPOConfig
from pipeline.config.schema import RMConfig, SFTConfig
from pipeline.process.files import sha256
from pipeline.run import StageRun
from pipeline.tracking.tracker import Tracker
from stages import ppo, rm, sft

QUIET = {"wandb": {"mode": "disabled"}, "log_every": 1, "save_every": 2}
DEMONSTRATIONS = [{"prompt": f"w{i} w{i + 3}", "completion": f"w{i + 1}"} for i in range(18)]
RANKINGS = [
    {"prompt": f"w{i}", "responses": [f"w{i + 1}", "w0 w0 w0", "w5 w6"], "ranks": [1, 2, 2]}
    for i in range(18)
]
WALL_CLOCK = ("time", "time/rollout", "time/update", "memory/peak_mb")


def base(folder: Path) -> str:
    tiny_models.policy(0).save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return str(folder)


def stages_of(root: Path, model: str):
    """(name, call) of each stage, small, in `root`."""
    shared = {"run": root, **QUIET}
    one = SFTConfig(
        model=model,
        max_steps=6,
        batch_size=4,
        learning_rate=1e-2,
        validation_fraction=0.2,
        **shared,
    )
    two = RMConfig(max_steps=6, batch_size=4, learning_rate=1e-2, validation_fraction=0.2, **shared)
    three = PPOConfig(
        batch_size=4, minibatches=2, iterations=6, max_new_tokens=4, learning_rate=1e-3,
        ema_decay=0.9, kl_target=1.0, scale_scores=True, sample_every=1, gates="off",
        alarms={"length": 1.01, "value_warmup": 0}, **shared,
    )  # fmt: skip
    return [
        ("sft", lambda: sft.run(one, DEMONSTRATIONS)),
        ("rm", lambda: rm.run(two, RANKINGS)),
        ("ppo", lambda: ppo.run(three, [{"prompt": row["prompt"]} for row in RANKINGS])),
    ]


def cut_off(monkeypatch, at: int) -> None:
    """The process dies while it logs step `at`."""
    log = Tracker.log

    def dying(self, step, metrics):
        if step == at:
            raise KeyboardInterrupt
        log(self, step, metrics)

    monkeypatch.setattr(Tracker, "log", dying)


def records(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in WALL_CLOCK} for line in lines]


@pytest.mark.slow
def test_a_run_cut_off_in_every_stage_equals_one_that_was_not(tmp_path, monkeypatch):
    model = base(tmp_path / "base")
    for _, call in stages_of(tmp_path / "straight", model):
        call()
    for name, call in stages_of(tmp_path / "broken", model):
        with monkeypatch.context() as patch:
            cut_off(patch, at=5)
            with pytest.raises(KeyboardInterrupt):
                call()
        assert not (tmp_path / "broken" / name).exists()
        call()
        straight, broken = tmp_path / "straight" / name, tmp_path / "broken" / name
        assert records(broken) == records(straight)
        weights = [p.relative_to(straight) for p in straight.rglob("*.safetensors")]
        assert weights
        for path in weights:
            assert sha256(broken / path) == sha256(straight / path), path


@pytest.mark.slow
def test_a_run_cut_off_after_its_last_save_does_not_train_on(tmp_path, monkeypatch):
    model = base(tmp_path / "base")
    for _, call in stages_of(tmp_path / "straight", model):
        call()
    for name, call in stages_of(tmp_path / "broken", model):
        with monkeypatch.context() as patch:
            patch.setattr(
                StageRun, "publish", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt)
            )
            with pytest.raises(KeyboardInterrupt):
                call()
        call()
        straight, broken = tmp_path / "straight" / name, tmp_path / "broken" / name
        assert records(broken) == records(straight)
        for record in ("samples.jsonl", "tokens.jsonl"):
            if (straight / record).exists():
                assert (broken / record).read_text() == (straight / record).read_text()
        for path in straight.rglob("*.safetensors"):
            assert sha256(broken / path.relative_to(straight)) == sha256(path), path


@pytest.mark.slow
def test_a_torn_state_is_passed_over_and_a_corrupt_one_never_used(tmp_path, monkeypatch, capsys):
    model = base(tmp_path / "base")
    calls = stages_of(tmp_path / "run", model)
    for _, call in calls[:2]:
        call()
    with monkeypatch.context() as patch:
        cut_off(patch, at=6)
        with pytest.raises(KeyboardInterrupt):
            calls[2][1]()
    work = tmp_path / "run" / ".work" / "ppo"
    assert sorted(p.name for p in work.glob("step-*")) == ["step-000002", "step-000004"]
    state = bytearray((work / "step-000004" / "state.pt").read_bytes())
    state[len(state) // 2] ^= 1  # torch.load would take it without a word
    (work / "step-000004" / "state.pt").write_bytes(state)
    calls[2][1]()
    told = capsys.readouterr().out
    assert "step-000004" in told and "state.pt is corrupt" in told and "after iteration 2" in told
