"""Weights that are not trained in bf16, int8 or nf4: what is trained and what is published stay float32."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny_models
from pipeline.config.ppo import PPOConfig
from pipeline.config.schema import Lora, RMConfig, SFTConfig
from pipeline.errors import UserError
from pipeline.models import dtypes as holding
from pipeline.models.adapters import ADAPTER, add_lora, merged, save_adapter
from pipeline.models.forward import score_sequences
from pipeline.models.loading import (
    load_policy,
    load_reward,
    load_tokenizer,
    reward_from_policy,
)
from pipeline.ppo.build import build_ppo
from pipeline.ppo.gates import InvariantError
from pipeline.ppo.rollout import Query
from pipeline.tracking.tracker import read_rows
from stages import ppo, rm, sft
from test_resume import cut_off

ROWS = [{"prompt": f"w{i} w{i + 3}", "completion": f"w{i + 1} " * (1 + i % 4)} for i in range(16)]
RANKED = [
    {"prompt": row["prompt"], "responses": [row["completion"], "w0"], "ranks": [1, 2]}
    for row in ROWS
]
QUERIES = [Query(ids) for ids in ([2, 7, 8, 3], [2, 9, 3], [2, 5, 6, 7, 11, 3], [2, 12, 3])]
KEYS = {
    "prompts": {"path": "none"}, "batch_size": 4, "minibatches": 2, "iterations": 2,
    "max_new_tokens": 6, "learning_rate": 1e-2,
}  # fmt: skip
QUIET = {"wandb": {"mode": "disabled"}, "learning_rate": 1e-2, "lora": {"r": 4}}
HELD = {
    "bf16": {torch.bfloat16},
    "int8": {torch.int8, torch.float32},  # linear layers, and the rest
    "nf4": {torch.uint8, torch.float32},  # two to a byte
}
every_dtype = pytest.mark.parametrize("dtype", HELD)


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


@every_dtype
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
def test_what_is_not_trained_is_rounded_and_the_first_ratio_is_one(run, keys, dtype):
    torch.manual_seed(0)
    ours = build_ppo(PPOConfig(**KEYS, **keys, dtype=dtype), run / "sft", run / "rm")
    networks = ours.networks
    trained = networks.policy_parameters() + networks.value_parameters()
    assert trained and dtypes(trained) == {torch.float32}
    assert dtypes(frozen(networks)) == (HELD[dtype] if keys else set())
    assert ours.config.recompute() == ("lora" in keys)
    if "lora" not in keys:
        assert dtypes(ours.reference.parameters()) == HELD[dtype]
    if dtype == "nf4" and "lora" not in keys:  # the reference alone is rounded, to another model
        with pytest.raises(InvariantError, match="dtype round the reference less"):
            ours.rollout(QUERIES)
        return
    before = [p.clone() for p in frozen(networks)]
    for _ in range(2):
        rollout = ours.rollout(QUERIES)  # its gates compare policy, sampler and reference
        assert rollout.values.dtype == rollout.old_logprobs.dtype == torch.float32
        assert (rollout.old_logprobs - rollout.sampler_logprobs).abs().max() < 0.5
        metrics = ours.update(rollout)
        assert metrics["policy/grad_norm"] > 0 and metrics["value/grad_norm"] > 0
    assert all(map(torch.equal, before, frozen(networks)))


@pytest.mark.parametrize(("dtype", "error"), [("bf16", 0.5), ("int8", 0.5), ("nf4", 2.0)])
def test_a_rounded_reward_model_scores_as_in_float32_to_its_rounding(run, dtype, error):
    rows = [q.ids for q in QUERIES], [[10, 11, 4], [9, 4], [13, 14, 15, 4], [20, 4]]
    exact, rounded = (load_reward(run / "rm", dtype) for dtype in ("fp32", dtype))
    assert dtypes(rounded.model.parameters()) == HELD[dtype]
    assert rounded.score.weight.dtype == torch.float32
    wanted, got = (score_sequences(model, *rows, 0) for model in (exact, rounded))
    assert got == pytest.approx(wanted, abs=error * torch.tensor(wanted).std().item())


@every_dtype
@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_adapters_are_merged_into_the_weights_as_they_were(run, task, dtype):
    tokenizer = load_tokenizer(run / "sft")

    def base(dtype):
        if task == "CAUSAL_LM":
            return load_policy(run / "sft", tokenizer, dtype)
        torch.manual_seed(3)
        return reward_from_policy(run / "sft", tokenizer, dtype)

    def wrapped(dtype):
        return shaken(add_lora(base(dtype), Lora(r=2), task))

    exact, rounded = wrapped("fp32"), wrapped(dtype)
    assert dtypes(p for p in rounded.parameters() if p.requires_grad) == {torch.float32}
    if task == "SEQ_CLS":
        for model in (exact, rounded):
            head = model.base_model.model.score.modules_to_save["default"]
            head.weight.data = torch.arange(16.0)[None]
    else:  # another's adapter on the same base is not the policy's
        rounded.add_adapter("value", rounded.peft_config["default"])
    ours = merged(rounded, lambda: base("fp32")).state_dict()
    for name, weight in merged(exact).state_dict().items():
        assert torch.equal(ours[name], weight), name


@every_dtype
def test_all_stages_publish_float32_weights_that_were_never_rounded(tmp_path, dtype):
    keys = {**QUIET, "dtype": dtype}
    base = tiny_models.saved_policy(tmp_path / "base")
    root = tmp_path / "run"
    sft.run(SFTConfig(model=base, run=root, max_steps=3, batch_size=16, **keys), ROWS)
    rm.run(RMConfig(run=root, max_steps=3, batch_size=4, **keys), RANKED)
    ppo.run(
        PPOConfig(
            run=root, batch_size=4, minibatches=2, iterations=2, max_new_tokens=4, ema_decay=0.5,
            shared_base=True, gates="off", **keys,
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


@every_dtype
@pytest.mark.parametrize("config", [SFTConfig, RMConfig])
@pytest.mark.parametrize("also", [{}, {"head_only": True}])
def test_a_dtype_that_cannot_be_trained_is_refused(config, also, dtype):
    keys = {"model": "none"} if config is SFTConfig else also
    with pytest.raises(
        ValueError, match=rf"dtype {dtype} is for weights that are not trained: it needs lora"
    ):
        config(dtype=dtype, **keys)


@every_dtype
def test_merged_weights_are_not_handed_to_vllm_rounded(dtype):
    with pytest.raises(ValueError, match="vllm needs dtype: fp32"):
        PPOConfig(**KEYS, dtype=dtype, lora={"r": 2}, vllm={})


# --- quantised bases --------------------------------------------------------------------------------

quantised = pytest.mark.parametrize("dtype", holding.QUANTISED)


@quantised
def test_a_quantised_layer_computes_in_evaluation_as_in_training_and_row_by_row(tmp_path, dtype):
    """What bitsandbytes would not do by itself on a CPU: its int8 products differ by their own error."""
    tiny_models.policy(0, hidden_size=128, intermediate_size=256).save_pretrained(tmp_path)
    model = load_policy(tmp_path, None, dtype)
    ids = torch.arange(28).view(4, 7)
    with torch.no_grad():
        training = model.train()(ids).logits
        evaluated = model.eval()(ids).logits
        alone = torch.cat([model(row[None]).logits for row in ids])
    assert torch.equal(training, evaluated)
    torch.testing.assert_close(alone, evaluated, rtol=1e-4, atol=1e-4)


@quantised
def test_sft_on_a_quantised_base_learns_packed_rows_too(tmp_path, dtype):
    base = tiny_models.saved_policy(tmp_path / "base")
    rows = [{"prompt": f"w{i % 4}", "completion": f"w{i % 4 + 1} w{i % 4 + 5}"} for i in range(64)]
    config = SFTConfig(
        model=base, run=tmp_path / "run", max_steps=30, batch_size=8, max_length=32, packing=True,
        dtype=dtype, gradient_checkpointing=True, log_every=1, **QUIET,
    )  # fmt: skip
    losses = [
        row["train/loss"]
        for row in read_rows(sft.run(config, rows) / "metrics.jsonl")
        if "train/loss" in row
    ]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@quantised
def test_ppo_on_a_quantised_base_goes_on_exactly_where_it_was_saved(run, dtype):
    config = PPOConfig(**KEYS, dtype=dtype, lora={"r": 2}, shared_base=True)

    def trained(state=None):
        torch.manual_seed(0)
        ours = build_ppo(config, run / "sft", run / "rm")
        if state is not None:
            ours.load_state_dict(state)
        torch.manual_seed(5)
        ours.update(ours.rollout(QUERIES))
        return ours.state_dict()

    state = copy.deepcopy(trained())
    went_on = trained(state)["networks"]
    torch.manual_seed(0)
    straight = build_ppo(config, run / "sft", run / "rm")
    for _ in range(2):
        torch.manual_seed(5)
        straight.update(straight.rollout(QUERIES))
    expected = straight.state_dict()["networks"]
    assert all(torch.equal(went_on[name], expected[name]) for name in expected)


@quantised
@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_encoder_decoders_are_quantised_too(tmp_path, kind, dtype):
    for stage in ("sft", "rm"):
        tiny_models.tokenizer().save_pretrained(tmp_path / stage)
    tiny_models.seq2seq(kind).save_pretrained(tmp_path / "sft")
    tiny_models.seq2seq_reward(kind).save_pretrained(tmp_path / "rm")
    keys = {"lora": {"r": 2}, "value_lora": {"r": 2}, "dtype": dtype}
    torch.manual_seed(0)
    ours = build_ppo(PPOConfig(**KEYS, **keys), tmp_path / "sft", tmp_path / "rm")
    assert dtypes(frozen(ours.networks)) == HELD[dtype]
    metrics = ours.update(ours.rollout(QUERIES))
    assert metrics["policy/grad_norm"] > 0 and metrics["value/grad_norm"] > 0


@quantised
@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_without_bitsandbytes_a_quantised_base_is_refused_at_once(
    tmp_path, monkeypatch, stage, dtype
):
    monkeypatch.setattr(holding, "find_spec", lambda name: None)
    keys = {"run": tmp_path, "dtype": dtype, **QUIET}
    calls = {
        "sft": lambda: sft.run(SFTConfig(model="none", **keys)),
        "rm": lambda: rm.run(RMConfig(**keys)),
        "ppo": lambda: ppo.run(PPOConfig(**keys)),
    }
    with pytest.raises(UserError, match=rf"dtype {dtype} needs bitsandbytes: pip install"):
        calls[stage]()


@quantised
def test_sft_on_a_quantised_base_cut_off_and_gone_on_with_ends_the_same(
    tmp_path, monkeypatch, dtype
):
    base = tiny_models.saved_policy(tmp_path / "base")
    keys = {
        **QUIET,
        "model": base,
        "max_steps": 6,
        "batch_size": 4,
        "save_every": 2,
        "log_every": 1,
    }
    straight, broken = (SFTConfig(run=tmp_path / n, dtype=dtype, **keys) for n in ("a", "b"))
    sft.run(straight, ROWS)
    with monkeypatch.context() as patch:
        cut_off(patch, at=5)
        with pytest.raises(KeyboardInterrupt):
            sft.run(broken, ROWS)
    sft.run(broken, ROWS)
    one, other = (load_file(tmp_path / n / "sft" / "model.safetensors") for n in ("a", "b"))
    assert all(torch.equal(one[name], other[name]) for name in one)
