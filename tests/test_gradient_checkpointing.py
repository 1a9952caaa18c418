"""`gradient_checkpointing` computes activations again, in policy and value, and changes no number."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tiny_models
from pipeline.config.ppo import PPOConfig
from pipeline.models.packing import trunk
from pipeline.ppo.build import build_ppo
from pipeline.ppo.rollout import Query

QUERIES = [Query(ids) for ids in ([2, 7, 8, 3], [2, 9, 3], [2, 5, 6, 7, 11, 3], [2, 12, 3])]
CONFIG = {
    "prompts": {"path": "none"},
    "rewards": [{"function": "own_rewards:length"}],
    "batch_size": 4,
    "minibatches": 1,
    "learning_rate": 1e-2,
    "max_new_tokens": 6,
}


def updated(folder: Path, **changes) -> tuple[list, dict, dict[str, list[int]], list, int]:
    """Responses, metrics, passes through a layer in (rollout, update), weights after it, and the bytes that
    a pass keeps."""
    torch.manual_seed(0)
    ppo = build_ppo(PPOConfig(**{**CONFIG, **changes}), folder)
    count: dict[str, list[int]] = {}
    for name, model in (("policy", ppo.networks.policy), ("value", ppo.networks.value)):
        if model is not None:
            count[name] = [0, 0]
            body = trunk(model)
            layer = getattr(body, "layers", None) or body.h
            inside = [m for m in layer[0].modules() if isinstance(m, torch.nn.LayerNorm)] or [
                layer[0].input_layernorm
            ]

            def add(*_, seen=count[name]) -> None:
                seen[torch.is_grad_enabled()] += 1

            inside[0].register_forward_hook(add)
    torch.manual_seed(1)
    rollout = ppo.rollout(QUERIES)
    kept = saved_bytes(ppo, rollout)
    for passes in count.values():
        passes[True] = 0
    metrics = ppo.update(rollout)
    return rollout.response_ids(), metrics, count, list(ppo.networks.trained().values()), kept


def saved_bytes(ppo, rollout) -> int:
    """What policy and value keep for going backward, each by itself."""
    kept = 0

    def count(tensor):
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    ppo.networks.train()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        for networks in ppo.passes:
            networks(rollout, 1.0)
    ppo.networks.eval()
    return kept


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama-gqa", {}),
        ("llama-gqa", {"lora": {"r": 2}, "value_lora": {"r": 2}}),
        ("llama-gqa", {"value": "shared"}),
        ("llama-gqa", {"lora": {"r": 2}, "shared_base": True}),
        ("llama-gqa", {"lora": {"r": 2}, "shared_base": True, "dtype": "nf4"}),
        ("bloom", {}),  # padded batches, transformers' own cache
    ],
)
def test_no_number_changes_and_the_update_runs_layers_twice_keeping_less(
    kind, changes, tmp_path, monkeypatch
):
    rewards = SimpleNamespace(length=lambda prompts, texts, rows: [float(len(t)) for t in texts])
    monkeypatch.setitem(sys.modules, "own_rewards", rewards)
    tiny_models.causal(kind).save_pretrained(tmp_path)
    tiny_models.tokenizer().save_pretrained(tmp_path)
    plain = updated(tmp_path, **changes)
    again = updated(tmp_path, gradient_checkpointing=True, **changes)
    assert plain[0] == again[0]
    assert plain[1] == pytest.approx(again[1], rel=1e-5, abs=1e-7)
    for a, b in zip(plain[3], again[3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert again[4] < 0.5 * plain[4]
    for name, (rollout, update) in plain[2].items():
        assert again[2][name] == [rollout, 2 * update] and update > 0, name
