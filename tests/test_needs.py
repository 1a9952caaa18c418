"""A stage that this machine's memory cannot hold is refused before a weight is read."""

import shutil
from pathlib import Path

import pytest

import tiny_models
from pipeline.config.ppo import PPOConfig
from pipeline.config.schema import RMConfig, SFTConfig
from pipeline.errors import UserError
from pipeline.models import loading, needs
from pipeline.ppo.build import build_ppo
from pipeline.process import memory
from stages import sft

WEIGHTS = sum(p.numel() for p in tiny_models.policy(0).parameters())
ROWS = [{"prompt": f"w{i}", "completion": f"w{i + 1}"} for i in range(16)]
QUIET = {"wandb": {"mode": "disabled"}}
PPO = {"prompts": {"path": "none"}, "batch_size": 4, "minibatches": 2}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    tiny_models.saved_policy(tmp_path / "sft")
    tiny_models.reward(1).save_pretrained(tmp_path / "rm")
    tiny_models.tokenizer().save_pretrained(tmp_path / "rm")
    return tmp_path


def machine(monkeypatch, size: float) -> None:
    """One with so many bytes, on which no weight may be read."""
    monkeypatch.setattr(needs, "room", lambda: int(size))
    monkeypatch.setattr(loading, "_load_weights", lambda *a, **k: pytest.fail("reads weights"))


def test_training_needs_weights_gradients_and_two_moments(run, monkeypatch):
    machine(monkeypatch, 16 * WEIGHTS - 1)
    config = SFTConfig(model=str(run / "sft"), run=run / "new", **QUIET)
    with pytest.raises(UserError, match=r"sft: weights, gradients and .* try lora, dtype: bf16"):
        sft.run(config, ROWS)
    monkeypatch.setattr(needs, "room", lambda: 16 * WEIGHTS)
    needs.check_training(config, run / "sft")


def test_what_trains_is_cut_up_under_fsdp(run, monkeypatch):
    for name, value in {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "WORLD_SIZE": "2",
    }.items():
        monkeypatch.setenv(name, value)
    config = SFTConfig(model=str(run / "sft"), batch_size=4, run=run / "new", **QUIET)
    machine(monkeypatch, 8 * WEIGHTS)
    needs.check_training(config, run / "sft")
    machine(monkeypatch, 8 * WEIGHTS - 1)
    with pytest.raises(UserError, match=r"try lora, dtype: bf16 \(with lora\)$"):
        needs.check_training(config, run / "sft")
    monkeypatch.setenv("WORLD_SIZE", "16")
    machine(monkeypatch, 4 * WEIGHTS)  # all of them, while they are loaded
    needs.check_training(config, run / "sft")
    machine(monkeypatch, 4 * WEIGHTS - 1)
    with pytest.raises(UserError, match="sft: weights"):
        needs.check_training(config, run / "sft")
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    with pytest.raises(UserError, match="int8 or nf4 .*, ENGINE=fsdp2$"):
        needs.check_training(config, run / "sft")


@pytest.mark.parametrize(("dtype", "size"), [("fp32", 4), ("bf16", 2), ("int8", 1), ("nf4", 0.5)])
def test_a_frozen_base_needs_its_dtype(run, monkeypatch, dtype, size):
    config = RMConfig(lora={"r": 2}, dtype=dtype)
    machine(monkeypatch, size * WEIGHTS)
    needs.check_training(config, run / "sft")
    machine(monkeypatch, size * WEIGHTS - 1)
    with pytest.raises(UserError, match="rm: weights"):
        needs.check_training(config, run / "sft")


@pytest.mark.parametrize(
    ("keys", "policies", "rewards"),
    [
        ({}, 16 + 4, 16 + 4),  # policy and reference; value network and reward model
        ({"offload": "cpu"}, 16, 16),
        ({"dtype": "bf16"}, 16 + 2, 16 + 2),
        ({"value": "shared"}, 16 + 4, 4),
        ({"advantages": "rloo", "samples_per_prompt": 2}, 16 + 4, 4),
        ({"lora": {"r": 2}, "value_lora": {"r": 2}, "dtype": "nf4"}, 0.5, 1),
        ({"lora": {"r": 2}, "shared_base": True, "dtype": "int8"}, 1, 0),
    ],
)
def test_ppo_needs_its_networks(run, monkeypatch, keys, policies, rewards):
    config = PPOConfig(**PPO, **keys)
    size = policies * WEIGHTS + rewards * sum(p.numel() for p in tiny_models.reward(1).parameters())
    machine(monkeypatch, size - 1)
    with pytest.raises(UserError, match=r"ppo: weights.* GiB \(the policy") as told:
        build_ppo(config, run / "sft", run / "rm")
    assert ("shared_base" in str(told.value)) == ("shared_base" not in keys)
    machine(monkeypatch, size)
    needs.check_ppo(config, run / "sft", run / "rm")


def test_what_may_not_fit_is_said_and_goes_on(run, monkeypatch, capsys):
    config = PPOConfig(**PPO)
    monkeypatch.setattr(needs, "room", lambda: 41 * WEIGHTS)
    needs.check_ppo(config, run / "sft", run / "rm")
    told = capsys.readouterr().out
    assert "memory may not suffice" in told and "gradient_checkpointing: true" in told
    monkeypatch.setattr(needs, "room", lambda: 10**12)
    needs.check_ppo(config, run / "sft", run / "rm")
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("group", "file"),
    [
        ("0::/box/inner", "box/memory.max"),
        ("0::/", "memory.max"),
        ("9:memory:/box", "memory/box/memory.limit_in_bytes"),
        ("3:memory,hugetlb:/box", "memory/box/memory.limit_in_bytes"),
    ],
)
def test_a_cgroup_limits_the_machine(tmp_path, group, file):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:  8192 kB\nSwapTotal: 1024 kB\nHugepages: 0\n")
    (tmp_path / "proc/self/cgroup").write_text(f"3:cpu:/\n{group}\n")
    assert memory.limit(tmp_path) == 9 << 20
    limited = tmp_path / "sys/fs/cgroup" / file
    limited.parent.mkdir(parents=True)
    for value, size in (("max", 9 << 20), (str(4 << 20), 5 << 20), (str(2**63), 9 << 20)):
        limited.write_text(f"{value}\n")
        assert memory.limit(tmp_path) == size


def test_a_cgroup_without_swap_and_a_machine_that_tells_of_none(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/box\n")
    (tmp_path / "proc/meminfo").write_text("MemTotal:  8192 kB\nSwapTotal: 1024 kB\n")
    box = tmp_path / "sys/fs/cgroup/box"
    box.mkdir(parents=True)
    (box / "memory.swap.max").write_text("0\n")
    assert memory.limit(tmp_path) == 8 << 20
    (tmp_path / "proc/meminfo").write_text("MemTotal:  8192 kB\n")
    assert memory.limit(tmp_path) == 8 << 20


def test_weights_are_counted_once_whatever_else_lies_there(tmp_path):
    model = tiny_models.policy(0)
    model.save_pretrained(tmp_path)
    count = needs._weights(tmp_path)
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "model.fp32-00001-of-00001.safetensors")
    assert needs._weights(tmp_path) == count == sum(p.numel() for p in model.parameters())
    model.save_pretrained(tmp_path / "parts", max_shard_size=4000)
    assert len(list((tmp_path / "parts").glob("model*.safetensors"))) > 1
    assert needs._weights(tmp_path / "parts") == count
