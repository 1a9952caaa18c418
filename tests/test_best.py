"""`keep: best`: the state that did best on held-out data is published, also of a run that was killed."""

import json

import pytest

import tiny_models
from pipeline.config.schema import Data, Lora, RMConfig, SFTConfig
from pipeline.errors import UserError
from pipeline.handoff import artifacts
from pipeline.process.files import sha256
from pipeline.tracking.tracker import Tracker
from stages import rm, sft

QUIET = {"wandb": {"mode": "disabled"}, "log_every": 1, "save_every": 2, "batch_size": 4}
TAUGHT = [{"prompt": f"w{n} w{n + 3}", "completion": "w1 w2"} for n in range(16)]
ASKED = [{"prompt": f"w{n} w{n + 4}", "completion": "w7 w8"} for n in range(4)]  # of something else
RANKED = [
    {"prompt": f"w{n}", "responses": [f"w{n + 1}", "w0 w0 w0", "w5 w6"], "ranks": [1, 2, 2]}
    for n in range(18)
]


@pytest.fixture
def stages(tmp_path):
    """name -> a function of a run and more keys."""
    tiny_models.policy(0).save_pretrained(tmp_path / "base")
    tiny_models.tokenizer().save_pretrained(tmp_path / "base")
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ASKED))
    held_out = {"model": str(tmp_path / "base"), "validation_data": Data(path=str(path))}
    best = {"keep": "best", "eval_every": 2, "learning_rate": 3e-2, "max_steps": 10}

    def one(run, **more):
        return sft.run(SFTConfig(run=tmp_path / run, **held_out, **(QUIET | best | more)), TAUGHT)

    def two(run, **more):
        keys = QUIET | best | {"validation_fraction": 0.3} | more
        return rm.run(RMConfig(run=tmp_path / run, **keys), RANKED)

    return one, two


def measured(folder, name):
    """Step -> the number in the record; the last measurement is of what was published."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [(line["step"], line[name]) for line in lines if name in line]
    return dict(rows[1:-1]), rows[-1][1]


def contents(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return sha256(folder / "model.safetensors"), [
        {key: value for key, value in line.items() if key != "time"} for line in lines
    ]


def test_a_loss_that_gets_worse_publishes_the_earlier_state_and_patience_stops(stages):
    one, _ = stages
    folder = one("a")
    losses, published = measured(folder, "validation/loss")
    metrics = artifacts.read_manifest(folder).metrics
    best = min(losses, key=losses.get)
    assert list(losses) == [2, 4, 6, 8, 10] and best < 10
    assert metrics["best_step"] == best and metrics["steps"] == 10
    assert published == pytest.approx(losses[best], rel=1e-6)
    assert losses[10] > losses[best]
    folder = one("b", patience=2)
    metrics = artifacts.read_manifest(folder).metrics
    assert (metrics["best_step"], metrics["steps"]) == (best, best + 4)
    folder = one("c", keep="last", eval_every=50)
    assert "best_step" not in artifacts.read_manifest(folder).metrics


@pytest.mark.parametrize("lora", [None, Lora(r=2, alpha=4)])
def test_a_reward_model_is_kept_by_its_accuracy(stages, lora):
    one, two = stages
    one("a", keep="last", eval_every=50)
    folder = two("a", lora=lora, learning_rate=0.1)
    shares, _ = measured(folder, "validation/accuracy")
    metrics = artifacts.read_manifest(folder).metrics
    best = max(shares, key=shares.get)
    assert metrics["best_step"] == best
    assert metrics["accuracy"] == pytest.approx(shares[best])


@pytest.mark.parametrize("at", [3, 5, 7, 9])
@pytest.mark.parametrize("patience", [None, 2])
def test_a_killed_run_publishes_the_same_bytes(stages, monkeypatch, tmp_path, at, patience):
    one, _ = stages
    straight = contents(one("a", patience=patience))
    log = Tracker.log

    def dying(self, step, metrics):
        if step == at:
            raise KeyboardInterrupt
        log(self, step, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "log", dying)
        try:
            one("b", patience=patience)
        except KeyboardInterrupt:
            assert one.__closure__ is not None
    assert contents(one("b", patience=patience)) == straight


def test_a_run_killed_after_patience_ended_does_not_train_on(stages, monkeypatch):
    one, two = stages
    for call in (one, two):
        straight = contents(call("a", patience=1))
        with monkeypatch.context() as patch:
            patch.setattr(
                "pipeline.run.StageRun.publish", lambda *_: exec("raise KeyboardInterrupt")
            )
            with pytest.raises(KeyboardInterrupt):
                call("b", patience=1)
        if call is one:
            assert contents(call("b", patience=1)) == straight


def test_the_best_of_nothing_measured_is_refused(stages, tmp_path):
    config = SFTConfig(model=str(tmp_path / "base"), run=tmp_path / "x", keep="best", **QUIET)
    with pytest.raises(UserError, match="keep: best needs held-out data, and there is a single"):
        sft.run(config, [TAUGHT[0]])
    with pytest.raises(ValueError, match="keep: best needs validation_data or a validation_fract"):
        SFTConfig(model="m", keep="best", validation_fraction=0)
    with pytest.raises(ValueError, match="eval_every and patience go with keep: best"):
        SFTConfig(model="m", patience=3)
