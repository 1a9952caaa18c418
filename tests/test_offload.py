"""`offload: cpu`: reference and reward models are placed around each use, and no number changes."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaModel, PreTrainedModel

import tiny_models
from pipeline.config.ppo import PPOConfig
from pipeline.models.device import placed
from pipeline.ppo.build import build_ppo
from pipeline.ppo.rollout import Query

CLASSIFIER = "LlamaForSequenceClassification"
QUERIES = [Query(ids) for ids in ([2, 7, 8, 3], [2, 9, 3], [2, 5, 6, 7, 11, 3], [2, 12, 3])]
CONFIG = {
    "prompts": {"path": "none"}, "batch_size": 4, "minibatches": 1, "max_new_tokens": 6,
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    tiny_models.saved_policy(tmp_path / "sft")
    tiny_models.reward(1).save_pretrained(tmp_path / "rm")
    tiny_models.tokenizer().save_pretrained(tmp_path / "rm")
    return tmp_path


def updated(run: Path, monkeypatch, **keys) -> tuple[dict, list[str]]:
    """Metrics of an iteration, and what befell the models that do not train in it."""
    torch.manual_seed(0)
    ppo = build_ppo(PPOConfig(**CONFIG, **keys), run / "sft", run / "rm")
    trained, befell = set(ppo.networks.modules()), []
    move = PreTrainedModel.to

    def moved(model, at):
        befell.append(f"{type(model).__name__} to {at}")
        return move(model, at)

    def passed(module, *_):
        if isinstance(module, LlamaModel) and module not in trained:
            befell.append("passes")

    monkeypatch.setattr(PreTrainedModel, "to", moved)
    with torch.nn.modules.module.register_module_forward_pre_hook(passed):
        torch.manual_seed(1)
        metrics = ppo.update(ppo.rollout(QUERIES))
    return metrics, befell


def test_reference_and_reward_model_are_placed_around_each_use(run, monkeypatch, capsys):
    plain, stayed = updated(run, monkeypatch)
    assert stayed == ["passes", "passes"]
    offloaded, befell = updated(run, monkeypatch, offload="cpu")
    assert befell == [
        *("LlamaForCausalLM to cpu", "passes", "LlamaForCausalLM to cpu"),
        *(f"{CLASSIFIER} to cpu", "passes", f"{CLASSIFIER} to cpu"),
    ]
    assert offloaded == plain
    assert "offload: this machine has no accelerator" in capsys.readouterr().out


def test_a_model_goes_home_after_an_error_too():
    model, there, seen = tiny_models.reward(1), torch.device("meta"), []
    model.to = seen.append
    with pytest.raises(KeyboardInterrupt), placed(model, there, "cpu"):
        assert seen == [there]
        raise KeyboardInterrupt
    assert seen == [there, "cpu"]


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"lora": {"r": 2}, "shared_base": True}, "nothing to move"),
        ({"lora": {"r": 2}, "rewards": [{"function": "len:len"}]}, "nothing to move"),
        ({"dtype": "int8"}, "needs dtype: fp32 or bf16"),
    ],
)
def test_offload_without_a_use_is_refused(keys, why):
    with pytest.raises(ValueError, match=why):
        PPOConfig(**CONFIG, offload="cpu", **keys)
