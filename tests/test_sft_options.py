"""Options of the first two stages that change how, and not what, is learned."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import tiny_models
from pipeline import artifacts
from pipeline.errors import UserError
from pipeline.schema import PPOConfig, RMConfig, SFTConfig
from stages import ppo, rm, sft

ROWS = [{"prompt": f"w{i} w{i + 3}", "completion": f"w{i + 1} " * (1 + i % 4)} for i in range(16)]
RANKED = [
    {"prompt": row["prompt"], "responses": [row["completion"], "w0"], "ranks": [1, 2]}
    for row in ROWS
]
QUIET = {"wandb": {"mode": "disabled"}, "log_every": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("base")
    tiny_models.policy(0).save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return str(folder)


def train_sft(base: str, run: Path, **changes) -> Path:
    keys = {"model": base, "run": run, "max_steps": 1, "batch_size": 16, "validation_fraction": 0}
    return sft.run(SFTConfig(**{**keys, **QUIET, **changes}), ROWS)


def first_loss(folder: Path) -> float:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return next(line["train/loss"] for line in lines if "train/loss" in line)


def test_packing_and_micro_batches_keep_examples_apart_and_the_loss_the_same(base, tmp_path):
    plain = first_loss(train_sft(base, tmp_path / "plain"))
    micro = first_loss(train_sft(base, tmp_path / "micro", micro_batch_size=4))
    # all examples fit in one packed row: one batch holds the same tokens
    packed = train_sft(base, tmp_path / "packed", packing=True, max_length=512, batch_size=1)
    assert micro == pytest.approx(plain, rel=1e-5)
    assert first_loss(packed) == pytest.approx(plain, rel=1e-4)


def test_the_loss_is_on_responses_only(base, tmp_path):
    """The loss of the untrained model, computed one example at a time on response tokens."""
    model, tokenizer = tiny_models.policy(0), tiny_models.tokenizer()
    total, count = 0.0, 0
    for row in ROWS:
        prompt = tokenizer.encode(f"<user> {row['prompt']} <bot>")
        reply = tokenizer.encode(row["completion"]) + [tokenizer.eos_token_id]
        with torch.no_grad():
            logp = torch.log_softmax(model(torch.tensor([prompt + reply])).logits[0], dim=-1)
        total -= sum(logp[len(prompt) - 1 + t, token].item() for t, token in enumerate(reply))
        count += len(reply)
    assert first_loss(train_sft(base, tmp_path / "run")) == pytest.approx(total / count, rel=1e-4)


def test_a_batch_that_does_not_divide_is_refused(base, tmp_path):
    with pytest.raises(UserError, match="micro_batch_size 5"):
        train_sft(base, tmp_path, micro_batch_size=5)


def test_lora_in_every_stage_publishes_plain_merged_models(base, tmp_path):
    lora = {"lora": {"r": 4}, "learning_rate": 1e-2}
    train_sft(base, tmp_path, max_steps=3, **lora)
    rm.run(RMConfig(run=tmp_path, max_steps=3, batch_size=4, **QUIET, **lora), RANKED)
    ppo.run(
        PPOConfig(
            run=tmp_path, batch_size=4, minibatches=2, iterations=2, max_new_tokens=4,
            value_lora={"r": 4}, ema_decay=0.5, gates="off", **QUIET, **lora,
        ),
        [{"prompt": row["prompt"]} for row in ROWS],
    )  # fmt: skip
    before = tiny_models.policy(0).state_dict()
    for stage in ("sft", "ppo", "ppo/ema"):
        after = AutoModelForCausalLM.from_pretrained(tmp_path / stage).state_dict()
        assert after.keys() == before.keys()
        changed = {name for name in before if not torch.allclose(before[name], after[name])}
        assert changed and all("_proj" in name for name in changed)  # adapters sit on linear layers
    reward = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    assert not any("lora" in name for name, _ in reward.named_parameters())
    assert artifacts.read(tmp_path / "ppo").parents["rm"]


def test_a_small_reward_model_trains_its_head_alone(base, tmp_path):
    train_sft(base, tmp_path)
    config = RMConfig(
        run=tmp_path, max_steps=2, batch_size=4, head_only=True, learning_rate=0.1, **QUIET
    )
    rm.run(config, RANKED)
    trunk = AutoModelForCausalLM.from_pretrained(tmp_path / "sft").model.state_dict()
    reward = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    for name, weight in reward.model.state_dict().items():
        assert torch.equal(weight, trunk[name]), name


def test_ppo_logs_and_stops_as_told(base, tmp_path):
    """log_every thins the record; a KL limit ends the run and publishes what was reached."""
    train_sft(base, tmp_path)
    shared = {
        "run": tmp_path, "rewards": [{"function": "test_sft_options:length"}], "batch_size": 4,
        "minibatches": 2, "max_new_tokens": 4, "learning_rate": 1e-2, "wandb": {"mode": "disabled"},
        "gates": "off",
    }  # fmt: skip
    prompts = [{"prompt": row["prompt"]} for row in ROWS]

    def steps() -> list[int]:
        lines = (tmp_path / "ppo" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["step"] for line in lines]

    ppo.run(PPOConfig(iterations=7, log_every=3, **shared), prompts)
    assert steps() == [1, 3, 6, 7]
    ppo.run(PPOConfig(iterations=7, kl_limit=1e-6, **shared), prompts)
    assert 1 < len(steps()) < 7
    assert "rm" not in artifacts.read(tmp_path / "ppo").parents  # no reward names it


def length(prompts, responses, rows):
    """A reward for the test above."""
    return [float(len(response)) for response in responses]
