"""Options of the stages, each seen to do what it says."""

import json
import math
import statistics
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    TrainingArguments,
)
from transformers.models.llama.modeling_llama import LlamaMLP

import tiny_models
from pipeline.config.ppo import PPOConfig
from pipeline.config.schema import RMConfig, SFTConfig
from pipeline.errors import UserError
from pipeline.handoff import artifacts
from pipeline.models.forward import score_sequences
from pipeline.models.loading import load_reward
from pipeline.process import progress
from pipeline.training.trainers import one_gpu
from stages import ppo, rm, sft

ROWS = [{"prompt": f"w{i} w{i + 3}", "completion": f"w{i + 1} " * (1 + i % 4)} for i in range(16)]
RANKED = [
    {"prompt": row["prompt"], "responses": [row["completion"], "w0"], "ranks": [1, 2]}
    for row in ROWS
]
QUIET = {"wandb": {"mode": "disabled"}, "log_every": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return tiny_models.saved_policy(tmp_path_factory.mktemp("base"))


def train_sft(base: str, run: Path, only: list[dict] = ROWS, **changes) -> Path:
    keys = {"model": base, "run": run, "max_steps": 1, "batch_size": 16, "validation_fraction": 0}
    return sft.run(SFTConfig(**{**keys, **QUIET, **changes}), only)


def all_losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in lines if "train/loss" in line]


def first_loss(folder: Path) -> float:
    return all_losses(folder)[0]


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_packing_and_micro_batches_keep_examples_apart_and_the_loss_the_same(base, tmp_path):
    plain = first_loss(train_sft(base, tmp_path / "plain"))
    micro = first_loss(train_sft(base, tmp_path / "micro", micro_batch_size=4))
    # all examples fit in one packed row: one batch holds the same tokens
    packed = train_sft(base, tmp_path / "packed", packing=True, max_length=512, batch_size=1)
    assert micro == pytest.approx(plain, rel=1e-5)
    assert first_loss(packed) == pytest.approx(plain, rel=1e-4)


def test_what_takes_long_before_and_after_training_is_told(base, tmp_path, monkeypatch, capsys):
    for name in ("SECONDS_UNTOLD", "SECONDS_BETWEEN_LINES"):
        monkeypatch.setattr(progress, name, -1.0)
    train_sft(base, tmp_path, validation_fraction=0.25)
    rm.run(
        RMConfig(run=tmp_path, max_steps=1, batch_size=4, validation_fraction=0.25, **QUIET), RANKED
    )
    told = capsys.readouterr().out
    for what in (
        "sft: encoding training examples  12/12",
        "sft: held-out loss",
        "sft: answering held-out prompts",
        "rm: encoding held-out  4/4",
        "rm: scoring held-out responses",
        "rm: scoring demonstrations",
    ):
        assert what in told, what


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
    ids = torch.tensor([[2, 7, 3]])
    for stage, under in (
        ("sft", base),
        ("ppo", tmp_path / "sft"),
    ):  # the adapters are kept beside them
        model = AutoModelForCausalLM.from_pretrained(under)
        own = PeftModel.from_pretrained(model, tmp_path / stage / "adapter")(ids).logits
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / stage)(ids).logits
        assert torch.allclose(own, whole, atol=1e-4)


def test_what_is_held_out_may_have_a_file_of_its_own(base, tmp_path):
    """The validation loss is that of the file's rows, on all of which nothing was trained."""
    held_out = write_rows(tmp_path / "held_out.jsonl", [ROWS[3]] * 3)
    other = write_rows(tmp_path / "other.jsonl", [ROWS[4]] * 3)
    found = []
    for number, path in enumerate((held_out, other)):
        folder = train_sft(base, tmp_path / str(number), validation_data={"path": path})
        metrics = artifacts.read(folder).metrics
        assert metrics["examples"] == len(ROWS)
        found.append(metrics["validation_perplexity_before"])
    alone = [
        math.exp(first_loss(train_sft(base, tmp_path / name, only=[row])))
        for name, row in (("a", ROWS[3]), ("b", ROWS[4]))
    ]
    assert found == pytest.approx(alone, rel=1e-4)


def test_gradient_checkpointing_computes_again_and_learns_the_same(base, tmp_path, monkeypatch):
    passes = []
    inner = LlamaMLP.forward

    def counted(self, *args, **kwargs):
        passes[-1] += torch.is_grad_enabled()
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    losses = []
    for on in (False, True):
        folder = tmp_path / str(on)
        keys = {"max_steps": 2, "gradient_checkpointing": on, "learning_rate": 1e-2}
        passes.append(0)
        train_sft(base, folder, **keys)
        passes.append(0)
        rm.run(RMConfig(run=folder, batch_size=4, **QUIET, **keys), RANKED)
        losses += [all_losses(folder / "sft"), all_losses(folder / "rm")]
    assert passes[2:] == [2 * count for count in passes[:2]]
    assert passes[0] > 0
    assert losses[2:] == [pytest.approx(loss, rel=1e-5) for loss in losses[:2]]


def test_a_process_uses_one_of_several_gpus(tmp_path):
    """Trainer would split each batch over all of them, after making it as many times larger."""
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=3)
    args._n_gpu = 2
    assert args.train_batch_size == 6
    assert one_gpu(args) is args
    assert (args.n_gpu, args.train_batch_size) == (1, 3)


def test_bf16_multiplies_in_bf16_and_publishes_float32(base, tmp_path, monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    seen = set()
    inner = LlamaMLP.forward

    def noted(self, *args, **kwargs):
        out = inner(self, *args, **kwargs)
        if torch.is_grad_enabled():
            seen.add(out.dtype)
        return out

    monkeypatch.setattr(LlamaMLP, "forward", noted)
    keys = {"run": tmp_path, "max_steps": 2, "precision": "bf16"}
    train_sft(base, **keys)
    rm.run(RMConfig(batch_size=4, **QUIET, **keys), RANKED)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert seen == {torch.bfloat16}
    for stage in ("sft", "rm"):
        weights = load_file(tmp_path / stage / "model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_so_many_demonstrations_centre_the_reward_model(base, tmp_path):
    """The bias is the mean score of the first `demonstrations_limit`."""
    train_sft(base, tmp_path)
    keys = {"run": tmp_path, "max_steps": 2, "batch_size": 4, "learning_rate": 1e-2, **QUIET}
    rows = [{"prompt": row["prompt"], "completion": row["completion"]} for row in ROWS]
    keys["demonstrations"] = {"path": write_rows(tmp_path / "d.jsonl", rows)}
    tokenizer = tiny_models.tokenizer()
    for limit in (2, 5):
        rm.run(RMConfig(demonstrations_limit=limit, **keys), RANKED)
        reward = load_reward(tmp_path / "rm")
        ids = [
            tokenizer.encode(f"<user> {row['prompt']} <bot> {row['completion']} <end>")
            for row in rows[:limit]
        ]
        assert statistics.fmean(score_sequences(reward, [[]] * len(ids), ids, 0)) == pytest.approx(
            0, abs=1e-5
        )


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
        "run": tmp_path, "rewards": [{"function": "test_stage_options:length"}], "batch_size": 4,
        "minibatches": 2, "max_new_tokens": 4, "learning_rate": 1e-2, "wandb": {"mode": "disabled"},
        "gates": "off",
    }  # fmt: skip
    prompts = [{"prompt": row["prompt"]} for row in ROWS]

    def steps(record: str = "metrics.jsonl") -> list[int]:
        lines = (tmp_path / "ppo" / record).read_text().splitlines()
        return [json.loads(line)["step"] for line in lines]

    ppo.run(PPOConfig(iterations=7, log_every=3, **shared), prompts)
    assert steps() == [1, 3, 6, 7]
    rows = [json.loads(line) for line in (tmp_path / "ppo" / "metrics.jsonl").open()]
    told, scores = artifacts.read(tmp_path / "ppo").metrics, [r["objective/scores"] for r in rows]
    assert told["score_before"] == scores[0]
    assert told["score"] == pytest.approx(sum(scores[1:]) / 3)
    ppo.run(PPOConfig(iterations=7, kl_limit=1e-6, **shared), prompts)
    assert 1 < len(steps()) < 7
    assert {0, steps()[-1]} == set(steps("samples.jsonl"))  # answers at the start and at the end
    assert "rm" not in artifacts.read(tmp_path / "ppo").parents  # no reward names it


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_prompts_that_are_watched_may_have_a_file(base, tmp_path, checkpointing):
    train_sft(base, tmp_path)
    watched = write_rows(tmp_path / "watched.jsonl", [{"prompt": "w7 w7"}, {"prompt": "w9"}])
    config = PPOConfig(
        run=tmp_path, rewards=[{"function": "test_stage_options:length"}], batch_size=4, minibatches=2,
        max_new_tokens=4, iterations=2, sample_every=1, sample_prompts={"path": watched}, gates="off",
        gradient_checkpointing=checkpointing, **QUIET,
    )  # fmt: skip
    folder = ppo.run(config, [{"prompt": row["prompt"]} for row in ROWS])
    lines = map(json.loads, (folder / "samples.jsonl").read_text().splitlines())
    asked = [(line["step"], line["prompt"]) for line in lines]
    assert asked == [(step, prompt) for step in (0, 1, 2) for prompt in ("w7 w7", "w9")]
    episodes = [json.loads(line) for line in (folder / "tokens.jsonl").read_text().splitlines()]
    assert [episode["step"] for episode in episodes] == [1] * 4 + [2] * 4
    for one in episodes:
        words = [word for word in one["tokens"] if "<" not in word]
        assert {len(one[name]) for name in ("kl", "value", "advantage")} == {len(one["tokens"])}
        assert one["score"] == len("".join(words).strip())
        if one["step"] == 1:  # the policy is the reference: no penalty, and the score at the end
            missing = 0.0 if one["ended"] else config.missing_eos_penalty
            last = one["score"] - missing
            assert one["reward"] == pytest.approx([0.0] * (len(one["tokens"]) - 1) + [last])
            assert one["kl"] == pytest.approx([0.0] * len(one["tokens"]), abs=1e-4)


def length(prompts, responses, rows):
    """A reward for the test above."""
    return [float(len(response)) for response in responses]
