"""Stages 1 and 2 on tiny models: steps, packing, and means that do not depend on how a batch is cut up."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import tiny_models
from pipeline.config.ppo import PPOConfig
from pipeline.config.schema import RMConfig, SFTConfig
from pipeline.errors import UserError
from pipeline.handoff import artifacts
from pipeline.models.generation import generate
from pipeline.models.loading import load_policy
from pipeline.tracking.tracker import Tracker
from pipeline.training import checked, kwise
from pipeline.training.supervised import check_packing, packed
from pipeline.training.trainers import steps_of
from stages import rm, sft

ROWS = [{"prompt": f"w{i} w{i + 3}", "completion": f"w{i + 1} " * (1 + i % 5)} for i in range(18)]
RANKED = [
    {
        "prompt": f"w{i} w{i + 2}",
        "responses": [f"w{j} " * (1 + (i + j) % 4) for j in range(2 + i % 8)],
        "ranks": [1 + (j * 5 + i) % 3 for j in range(2 + i % 8)],
    }
    for i in range(11)
]
QUIET = {"wandb": {"mode": "disabled"}, "log_every": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return tiny_models.saved_policy(tmp_path_factory.mktemp("base"))


def train_sft(base: str, run: Path, only: list[dict] = ROWS, **changes) -> Path:
    keys = {"model": base, "run": run, "batch_size": 4, "learning_rate": 1e-2}
    return sft.run(SFTConfig(**{**keys, "validation_fraction": 0, **QUIET, **changes}), only)


def train_rm(run: Path, **changes) -> Path:
    keys = {"run": run, "batch_size": 4, "learning_rate": 1e-2, "validation_fraction": 0.1}
    return rm.run(RMConfig(**{**keys, **QUIET, **changes}), RANKED)


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def furthest(a: Path, b: Path) -> float:
    one, other = weights(a), weights(b)
    return max(float((one[name] - other[name]).abs().max()) for name in one)


# --- steps ------------------------------------------------------------------------------------------


def seen(steps: int, examples: int, batch: int) -> int:
    """Examples of so many steps, counted one by one."""
    epoch = [min(batch, examples - start) for start in range(0, examples, batch)]
    return sum(epoch[step % len(epoch)] for step in range(steps))


@pytest.mark.parametrize("examples", [1, 2, 5, 10, 31, 32, 33, 40])
@pytest.mark.parametrize("batch", [1, 4, 32])
@pytest.mark.parametrize("epochs", [0.01, 0.3, 1, 2.5, 3])
def test_epochs_are_passes_over_the_data_to_within_half_a_batch(examples, batch, epochs):
    steps, wanted = steps_of(epochs, examples, batch), epochs * examples
    assert seen(steps, examples, batch) >= wanted - min(batch, examples) / 2
    assert seen(steps - 1, examples, batch) < wanted
    if epochs == 1 or (epochs == int(epochs) and (examples % batch == 0 or batch > examples)):
        assert seen(steps, examples, batch) == wanted


def test_a_packed_epoch_reads_every_token_once(base, tmp_path, monkeypatch):
    tokens, inner = [], LlamaModel.forward

    def counted(self, input_ids=None, **kwargs):
        if torch.is_grad_enabled():
            tokens.append(input_ids.numel())
        return inner(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", counted)
    keys = {"packing": True, "max_length": 32, "batch_size": 1, "epochs": 2}
    folder = train_sft(base, tmp_path, **keys)
    lengths = [len(tiny_models.tokenizer().encode(row["completion"])) + 5 for row in ROWS]
    assert sum(tokens) == 2 * sum(lengths)
    metrics = artifacts.read_manifest(folder).metrics
    assert metrics["examples"] == len(ROWS)
    assert metrics["steps"] == len(tokens) == 2 * math.ceil(sum(lengths) / 32)


def test_a_packed_run_that_was_killed_in_an_epoch_goes_on_as_if_it_had_not_been(
    base, tmp_path, monkeypatch
):
    keys = {"packing": True, "max_length": 16, "batch_size": 2, "epochs": 2.5, "save_every": 3}
    straight = train_sft(base, tmp_path / "straight", **keys)
    monkeypatch.setenv("PIPELINE_FAULT", "sft:step:8:oom")
    with pytest.raises(torch.OutOfMemoryError):
        train_sft(base, tmp_path / "killed", **keys)
    monkeypatch.delenv("PIPELINE_FAULT")
    again = train_sft(base, tmp_path / "killed", **keys)
    assert weights(again).keys() == weights(straight).keys() and furthest(again, straight) == 0


# --- packing ----------------------------------------------------------------------------------------

LEAKY = {
    "Falcon": {"alibi": True, "new_decoder_architecture": False},
    "BioGpt": {"intermediate_size": 32},
    "XGLM": {"d_model": 16, "ffn_dim": 32, "num_layers": 2, "attention_heads": 2},
    "Mamba": {"state_size": 4},
    "OPT": {"ffn_dim": 32, "word_embed_proj_dim": 16},
}


def leaky(name: str) -> transformers.PreTrainedModel:
    """A random model of a kind whose attention looks across the examples of a row."""
    if name == "bloom":
        return tiny_models.causal("bloom")
    sizes = {
        "vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 64, "initializer_range": 0.5, "pad_token_id": 0, "eos_token_id": 4,
    }  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**sizes, **LEAKY[name]})
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize("name", ["bloom", *LEAKY])
def test_models_that_let_packed_examples_see_each_other_are_refused(name):
    with pytest.raises(UserError, match=r"does not keep the examples .*set packing: false"):
        check_packing(leaky(name))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt-neox", "qwen3", "mistral-window", "gemma2"])
def test_where_packing_is_let_through_examples_are_alone(kind):
    """A row's loss is that of its examples, and another first token moves no logit of the second."""
    model = tiny_models.causal(kind)
    check_packing(model)
    assert not model.training
    rows = Dataset.from_list(
        [{"input_ids": ids, "labels": ids} for ids in ([7, 9, 11, 5], [8, 6, 4])]
    )
    [row] = packed(rows, 8)
    inputs = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([row])
    labels = inputs.pop("labels")
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[0]
        inputs["input_ids"][0, 0] = 20
        moved = model(**inputs, use_cache=False).logits[0]
        alone = torch.cat(
            [model(torch.tensor([one["input_ids"]]), use_cache=False).logits[0] for one in rows]
        )
    first = row["seq_lengths"][0]
    assert (moved[:first] != logits[:first]).any() and torch.equal(moved[first:], logits[first:])
    loss = torch.nn.functional.cross_entropy(logits[:-1], labels[0, 1:], reduction="sum")
    apart = torch.nn.functional.cross_entropy(alone[:-1], labels[0, 1:], reduction="sum")
    assert float(loss) == pytest.approx(float(apart), rel=1e-5)


def test_a_stage_refuses_to_pack_such_a_model_before_it_trains(tmp_path):
    tiny_models.causal("bloom").save_pretrained(tmp_path / "bloom")
    tiny_models.tokenizer().save_pretrained(tmp_path / "bloom")
    with pytest.raises(UserError, match="BloomForCausalLM does not keep"):
        train_sft(str(tmp_path / "bloom"), tmp_path, packing=True)
    train_sft(str(tmp_path / "bloom"), tmp_path, max_steps=1)


# --- means ------------------------------------------------------------------------------------------


def test_perplexity_is_per_token_whatever_the_batches(base, tmp_path):
    """Long answers beside short ones, in batches of one kind each."""
    held = [{"prompt": "w1", "completion": "w2"}] * 2
    held += [{"prompt": "w3", "completion": "w4 w9 w7 w5 w4 w3 w8 w6 w6"}] * 3
    path = tmp_path / "held.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in held))
    model, tokenizer = load_policy(base), tiny_models.tokenizer()
    total, count, right = 0.0, 0, 0
    for row in held:
        prompt = tokenizer.encode(f"<user> {row['prompt']} <bot>")
        reply = [*tokenizer.encode(row["completion"]), tokenizer.eos_token_id]
        with torch.no_grad():
            logp = (
                model(torch.tensor([prompt + reply])).logits[0].log_softmax(-1)[len(prompt) - 1 :]
            )
        total -= sum(float(logp[at, token]) for at, token in enumerate(reply))
        right += sum(int(logp[at].argmax()) == token for at, token in enumerate(reply))
        count += len(reply)
    keys = {"validation_data": {"path": str(path)}, "learning_rate": 1e-9, "max_steps": 1}
    for micro, packing in ((1, False), (2, False), (4, False), (2, True)):
        folder = train_sft(
            base, tmp_path / f"{micro}{packing}", micro_batch_size=micro, packing=packing, **keys
        )
        metrics = artifacts.read_manifest(folder).metrics
        assert metrics["validation_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
        last = [row for row in rows_of(folder) if "validation/token_accuracy" in row][-1]
        assert last["validation/token_accuracy"] == pytest.approx(right / count)


LORA = {"lora": {"r": 4}}


@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora"])
def test_micro_batches_of_demonstrations_give_the_whole_batch_s_gradient(
    base, tmp_path, monkeypatch, changes, counts
):
    """18 examples in batches of 8: the last one of an epoch has 2. Gemma 3's class and others say that
    they do not count a loss's tokens themselves."""
    monkeypatch.setattr(LlamaForCausalLM, "accepts_loss_kwargs", counts, raising=False)
    keys = {"batch_size": 8, "epochs": 2, **changes}
    whole = train_sft(base, tmp_path / "whole", **keys)
    for micro in (1, 4):
        part = train_sft(base, tmp_path / str(micro), micro_batch_size=micro, **keys)
        assert furthest(part, whole) < 2e-5
        for one, other in zip(rows_of(part), rows_of(whole), strict=True):
            for key in ("train/loss", "train/token_accuracy"):
                assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize(
    "changes", [{}, LORA, {"head_only": True}], ids=["full", "lora", "head_only"]
)
def test_micro_batches_of_rankings_give_the_whole_batch_s_gradient(base, tmp_path, changes):
    """K from 2 to 9; the last batch of an epoch has two prompts, its micro-batches one or both."""
    train_sft(base, tmp_path, max_steps=1)
    keys = {"epochs": 2, "batch_size": 8, **changes}
    published = tmp_path / "rm"
    found = {}
    for micro in (None, 1, 4):
        train_rm(tmp_path, micro_batch_size=micro, **keys)
        found[micro] = (weights(published), rows_of(published))
        shutil.rmtree(published)
    whole, lines = found.pop(None)
    for part, told in found.values():
        for name, weight in part.items():
            assert torch.allclose(weight, whole[name], atol=2e-5), name
        for one, other in zip(told, lines, strict=True):
            for key in ("train/loss", "train/accuracy", "train/margin", "train/score_mean"):
                if key in other:
                    assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), key


def test_the_steps_after_the_last_whole_row_are_recorded_too(base, tmp_path, monkeypatch):
    """Of a run that goes on as well: the state after step 6 has the sums of the steps 5 and 6."""
    keys = {"max_steps": 7, "save_every": 3}
    every = [row["train/loss"] for row in rows_of(train_sft(base, tmp_path / "every", **keys))]
    keys["log_every"] = 4
    log = Tracker.log

    def dying(self, step, metrics):
        if step == 7:
            raise KeyboardInterrupt
        log(self, step, metrics)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Tracker, "log", dying)
        train_sft(base, tmp_path / "run", **keys)
    found = {r["step"]: r["train/loss"] for r in rows_of(train_sft(base, tmp_path / "run", **keys))}
    means = {1: every[0], 4: sum(every[1:4]) / 3, 7: sum(every[4:]) / 3}
    assert found == pytest.approx(means, rel=1e-6)


def test_prompts_without_a_pair_weigh_nothing_wherever_they_stand():
    scores = torch.randn(9, generator=torch.Generator().manual_seed(0), requires_grad=True)
    ranks = torch.tensor([1, 2, 1, 1, 2, 1, 3, 1, 1])
    groups = torch.tensor([0, 0, 1, 1, 2, 2, 2, 3, 3])
    whole = torch.autograd.grad(kwise.kwise_loss(scores, ranks, groups)[0], scores)[0]
    prompts = kwise.prompts_with_pairs(ranks, groups)
    assert prompts == 2
    parts = [groups < 2, groups >= 2]
    losses = [kwise.kwise_loss(scores[p], ranks[p], groups[p], prompts)[0] for p in parts]
    assert torch.allclose(torch.autograd.grad(sum(losses), scores)[0], whole, atol=1e-7)


def test_the_reward_model_scores_and_trains_where_the_accelerator_is(base, tmp_path, monkeypatch):
    """What `device()` says is what the model is moved to: here another precision, which is seen."""
    train_sft(base, tmp_path, max_steps=1)
    monkeypatch.setattr(rm, "device", lambda: torch.float64)
    assert {weight.dtype for weight in weights(train_rm(tmp_path)).values()} == {torch.float64}


# --- what is refused --------------------------------------------------------------------------------


def test_a_reward_model_an_encoder_and_a_bare_trunk_are_no_policies(base, tmp_path):
    sizes = {"vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = transformers.BertForMaskedLM(transformers.BertConfig(**sizes, intermediate_size=32))
    models = {
        "reward": tiny_models.reward(),
        "encoder": encoder,
        "trunk": tiny_models.policy().model,
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        tiny_models.tokenizer().save_pretrained(tmp_path / name)
        (tmp_path / name / "model.safetensors").write_bytes(b"not read")
        told = f"{name}: a {type(model).__name__}, which does not predict the next token"
        with pytest.raises(UserError, match=told):
            train_sft(str(tmp_path / name), tmp_path)


def gpt2(folder: Path) -> str:
    """A model of 64 learned positions: past them is nothing to look up."""
    tiny_models.gpt2().save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return str(folder)


def test_examples_longer_than_the_model_has_places_are_refused_with_the_length_to_set(tmp_path):
    model = gpt2(tmp_path / "gpt2")
    long = [{"prompt": "w1 " * 30, "completion": "w2 " * 60}] * 4
    told = "max_length: an example has 32 and 61 tokens, GPT2LMHeadModel was made for 64"
    with pytest.raises(UserError, match=told):
        train_sft(model, tmp_path, long)
    train_sft(model, tmp_path, long + ROWS, max_length=64, too_long=0.5)
    ranked = [{**row, "responses": ["w1 " * 70, "w1", "w2"], "ranks": [1, 2, 3]} for row in RANKED]
    with pytest.raises(UserError, match="GPT2ForSequenceClassification was made for 64"):
        rm.run(RMConfig(run=tmp_path, **QUIET), ranked)
    rm.run(RMConfig(run=tmp_path, max_length=64, too_long=0.5, **QUIET), ranked)


def test_answers_end_where_the_model_has_no_more_places(tmp_path):
    rows = [{"prompt": f"w{i} " * 50, "completion": "w2"} for i in range(8)]
    model = gpt2(tmp_path / "gpt2")
    folder = train_sft(model, tmp_path, rows, validation_fraction=0.3, sample_tokens=60)
    assert artifacts.read_manifest(folder).metrics["eos_share"] <= 1
    policy, tokenizer = load_policy(folder), tiny_models.tokenizer()
    [response] = generate(policy, tokenizer, [[7] * 60], max_new_tokens=60, temperature=9.0)
    assert len(response.ids) <= 4
    with pytest.raises(UserError, match="a prompt of 64 tokens, a model for 64"):
        generate(policy, tokenizer, [[7] * 64], max_new_tokens=1)


def test_adapters_on_layers_that_are_not_there_or_cannot_have_them_are_told(base, tmp_path):
    for targets, told in ((["nope"], "Target modules"), (["q_proj", "lm_head"], "lm_head")):
        with pytest.raises(UserError, match=told):
            train_sft(base, tmp_path, lora={"r": 2, "target_modules": targets})


def test_when_every_example_is_too_long_it_is_an_error(base, tmp_path):
    with pytest.raises(UserError):
        train_sft(base, tmp_path, max_length=3)


@pytest.mark.parametrize(
    "keys",
    [
        {"head_only": True, "lora": {"r": 2}},
        {"sampling": {"prompts": {"path": "p.jsonl"}, "k": {3: 0.0}}},
        {"seed": -1},
        {"seed": 2**32},
        {"learning_rate": "1e-3"},
        {"max_steps": True},
        {"lora": {"r": "2"}},
    ],
)
def test_a_library_s_config_is_as_strict_as_yaml(keys):
    with pytest.raises(ValidationError, match=next(iter(keys))):
        RMConfig(**keys)


def test_plain_values_still_make_a_config():
    made = PPOConfig(batch_size=8, rewards=[{"function": "a:b"}], run="x", lora={"r": 2})
    assert made.run == Path("x") and made.rewards[0].function == "a:b"
    assert SFTConfig(model="m", learning_rate=1, chat_template="t.jinja").learning_rate == 1.0


def test_what_is_no_config_is_named():
    for stage, name in ((sft, "SFTConfig"), (rm, "RMConfig")):
        with pytest.raises(UserError, match=rf"run\(\) takes a {name}, not a dict"):
            stage.run({"model": "x"})
        with pytest.raises(UserError, match=rf"run\(\) takes a {name}, not a PPOConfig"):
            stage.run(PPOConfig())


def test_a_file_name_in_the_place_of_rows_is_told(base, tmp_path):
    for stage, config in (
        (sft, SFTConfig(model=base, run=tmp_path, **QUIET)),
        (rm, RMConfig(run=tmp_path, **QUIET)),
    ):
        with pytest.raises(UserError, match="'file.jsonl' is a text; give a file as Data"):
            stage.run(config, dataset="file.jsonl")


def test_the_makers_of_a_library_are_told_nothing():
    assert checked.Checked._send_telemetry is kwise.KwiseTrainer._send_telemetry
