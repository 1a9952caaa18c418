"""bf16 for weights that are not trained: what is trained and what is published stay float32."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny_models
from pipeline.config.schema import Lora, PPOConfig, RMConfig, SFTConfig
from pipeline.models.adapters import ADAPTER, add_lora, merged, save_adapter
from pipeline.models.forward import score_sequences
from pipeline.models.loading import load_policy, load_reward, load_tokenizer, reward_from_policy
from pipeline.ppo.build import build_ppo
from pipeline.ppo.rollout import Query
from stages import ppo, rm, sft

ROWS = [{"prompt": f"w{i} w{i + 3}", "completion": f"w{i + 1} " * (1 + i % 4)} for i in range(16)]
RANKED = [
    {"prompt": row["prompt"], "responses": [row["completion"], "w0"], "ranks": [1, 2]}
    for row in ROWS
]
QUERIES = [Query(ids) for ids in ([2, 7, 8, 3], [2, 9, 3], [2, 5, 6, 7, 11, 3], [2, 12, 3])]
KEYS = {
    "prompts": {"path": "none"}, "batch_size": 4, "minibatches": 2, "iterations": 2,
    "max_new_tokens": 6, "learning_rate": 1e-2, "dtype": "bf16",
}  # fmt: skip
QUIET = {"wandb": {"mode": "disabled"}, "learning_rate": 1e-2, "lora": {"r": 4}, "dtype": "bf16"}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run's sft and rm, the latter trained with LoRA, as the stages publish them."""
    run = tmp_path_factory.mktemp("run")
    tiny_models.saved_policy(run / "sft")
    tokenizer = load_tokenizer(run / "sft")
    torch.manual_seed(2)
    model = shaken(add_lora(reward_from_policy(run / "sft", tokenizer), Lora(r=3), "SEQ_CLS"))
    save_adapter(model, run / "rm" / ADAPTER)
    merged(model).save_pretrained(run / "rm")
    tokenizer.save_pretrained(run / "rm")
    return run


def shaken(model):
    """Adapters as training leaves them."""
    draws = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = 0.3 * torch.randn(p.shape, generator=draws)
    return model


def dtypes(parameters) -> set[torch.dtype]:
    return {p.dtype for p in parameters}


def frozen(module) -> list[torch.Tensor]:
    """Weights that are not trained, adapters and heads left out."""
    named = [(n, p) for n, p in module.named_parameters() if not p.requires_grad]
    return [p for n, p in named if "lora" not in n and "score" not in n]


@pytest.mark.parametrize(
    "keys",
    [
        {"lora": {"r": 2}, "shared_base": True},
        {"lora": {"r": 2}, "value_lora": {"r": 2}},
        {"lora": {"r": 2}, "value": "shared"},
        {"value_lora": {"r": 2}},
        {},
    ],
)
def test_what_is_not_trained_is_bf16_and_the_first_ratio_is_one(run, keys):
    torch.manual_seed(0)
    ours = build_ppo(PPOConfig(**KEYS, **keys), run / "sft", run / "rm")
    networks = ours.networks
    trained = networks.policy_parameters() + networks.value_parameters()
    assert trained and dtypes(trained) == {torch.float32}
    assert dtypes(frozen(networks)) == ({torch.bfloat16} if keys else set())
    assert ours.config.recompute() == ("lora" in keys)
    if "lora" not in keys:
        assert dtypes(ours.reference.parameters()) == {torch.bfloat16}
    before = [p.clone() for p in frozen(networks)]
    for _ in range(2):
        rollout = ours.rollout(QUERIES)  # its gates compare policy, sampler and reference
        assert rollout.values.dtype == rollout.old_logprobs.dtype == torch.float32
        assert (rollout.old_logprobs - rollout.sampler_logprobs).abs().max() < 0.5
        metrics = ours.update(rollout)
        assert metrics["policy/grad_norm"] > 0 and metrics["value/grad_norm"] > 0
    assert all(map(torch.equal, before, frozen(networks)))


def test_a_reward_model_in_bf16_scores_as_in_float32_to_its_rounding(run):
    rows = [q.ids for q in QUERIES], [[10, 11, 4], [9, 4], [13, 14, 15, 4], [20, 4]]
    exact, rounded = (load_reward(run / "rm", dtype) for dtype in ("fp32", "bf16"))
    assert dtypes(rounded.model.parameters()) == {torch.bfloat16}
    assert rounded.score.weight.dtype == torch.float32
    wanted, got = (score_sequences(model, *rows, 0) for model in (exact, rounded))
    assert got == pytest.approx(wanted, abs=0.5 * torch.tensor(wanted).std().item())


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_adapters_are_merged_into_the_weights_as_they_were(run, task):
    tokenizer = load_tokenizer(run / "sft")

    def base(dtype):
        if task == "CAUSAL_LM":
            return load_policy(run / "sft", tokenizer, dtype)
        torch.manual_seed(3)
        return reward_from_policy(run / "sft", tokenizer, dtype)

    def wrapped(dtype):
        return shaken(add_lora(base(dtype), Lora(r=2), task))

    exact, rounded = wrapped("fp32"), wrapped("bf16")
    assert dtypes(p for p in rounded.parameters() if p.requires_grad) == {torch.float32}
    if task == "SEQ_CLS":
        for model in (exact, rounded):
            head = model.base_model.model.score.modules_to_save["default"]
            head.weight.data = torch.arange(16.0)[None]
    else:  # another's adapter on the same base is not the policy's
        rounded.add_adapter("value", rounded.peft_config["default"])
    ours = merged(rounded, lambda: base("fp32")).state_dict()
    for name, weight in merged(exact).state_dict().items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=1e-6)


def test_all_stages_publish_float32_weights_that_were_never_rounded(tmp_path):
    base = tiny_models.saved_policy(tmp_path / "base")
    root = tmp_path / "run"
    sft.run(SFTConfig(model=base, run=root, max_steps=3, batch_size=16, **QUIET), ROWS)
    rm.run(RMConfig(run=root, max_steps=3, batch_size=4, **QUIET), RANKED)
    ppo.run(
        PPOConfig(
            run=root, batch_size=4, minibatches=2, iterations=2, max_new_tokens=4, ema_decay=0.5,
            shared_base=True, gates="off", **QUIET,
        ),
        [{"prompt": row["prompt"]} for row in ROWS],
    )  # fmt: skip
    before = tiny_models.policy(0).state_dict()
    for stage in ("sft", "rm", "ppo", "ppo/ema"):
        after = load_file(root / stage / "model.safetensors")
        assert {weight.dtype for weight in after.values()} == {torch.float32}
        same = {
            name for name in before.keys() & after.keys() if torch.equal(before[name], after[name])
        }
        moved = before.keys() & after.keys() - same
        assert any("embed" in name for name in same)  # adapters sit on linear layers alone
        assert moved and all("_proj" in name for name in moved)
        for name in moved:  # by less than rounding would leave of them
            assert (before[name] - after[name]).abs().max() < 1


@pytest.mark.parametrize("config", [SFTConfig, RMConfig])
@pytest.mark.parametrize("also", [{}, {"head_only": True}])
def test_a_dtype_that_cannot_be_trained_is_refused(config, also):
    keys = {"model": "none"} if config is SFTConfig else also
    with pytest.raises(
        ValueError, match=r"dtype bf16 is for weights that are not trained: it needs lora"
    ):
        config(dtype="bf16", **keys)


def test_merged_weights_are_not_handed_to_vllm_through_bf16():
    with pytest.raises(ValueError, match="vllm needs dtype: fp32"):
        PPOConfig(**KEYS, lora={"r": 2}, vllm={})
