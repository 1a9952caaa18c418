"""Stage 1: supervised fine-tuning on demonstrations, loss on responses only.

`python -m stages.sft --config configs/tiny/sft.yaml --run checkpoints/tiny [key=value ...]`
"""

from pipeline import cli

if __name__ == "__main__":
    cli.main("sft")  # checks config and data before the slow imports below

import itertools
import math
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer

from pipeline.config.schema import SFTConfig
from pipeline.data.forms import Demonstration, load_demonstrations
from pipeline.data.kept import like, pick
from pipeline.data.lengths import over_limit
from pipeline.data.literals import tell_spelled, tell_unknown
from pipeline.data.messages import Message
from pipeline.data.splits import split_by_prompt
from pipeline.data.template import (
    encode_demonstration,
    encode_prompt,
    role_markers,
    template_hash,
    tokenizer_hash,
    well_formed,
)
from pipeline.engines.start import check_started, together
from pipeline.engines.whole import plain
from pipeline.errors import UserError, at
from pipeline.handoff import checkpoint
from pipeline.models.adapters import ADAPTER, add_lora, merged, save_adapter
from pipeline.models.device import device
from pipeline.models.generation import generate
from pipeline.models.loading import load_policy, load_tokenizer, prepare_cpu
from pipeline.models.needs import check_training
from pipeline.process import faults
from pipeline.process.files import jsonl
from pipeline.process.progress import tracked
from pipeline.run import StageRun, by_source, given
from pipeline.training.best import Best
from pipeline.training.supervised import check_packing, sft_trainer
from pipeline.training.trainers import (
    Recorder,
    ShowsEvaluation,
    check,
    check_length,
    quiet,
    train,
)

LOGGED = {
    "loss": "train/loss",
    "mean_token_accuracy": "train/token_accuracy",
    "grad_norm": "train/grad_norm",
    "learning_rate": "lr",
    "eval_loss": "validation/loss",
    "eval_mean_token_accuracy": "validation/token_accuracy",
}

KEPT = 512
"""Demonstrations published with the model, on which the reward stage centres its scores."""

ANSWERED, SHOWN = 64, 8
"""Held-out prompts that are answered at the end, and those whose answers are kept as samples."""


def run(config: SFTConfig, dataset: Any = None) -> Path:
    """Fine-tune `config.model` and publish `RUN/sft`; returns that directory.

    `dataset` replaces `config.data` by rows in memory: a dict of columns, a list of dicts, or a
    `datasets.Dataset`, in any form of `pipeline.data.forms`.
    """
    check(config, SFTConfig)
    demonstrations = load_demonstrations(given(config.data, dataset, "data"), seed=config.seed)
    check_started(config)
    with StageRun(config, dataset) as stage:
        together()  # the first has tidied up
        quiet()
        prepare_cpu(config.threads)
        checkpoint.seed_everything(config.seed)
        check_training(config, config.model)
        tokenizer = load_tokenizer(
            config.model, config.chat_template, config.source_language, config.target_language
        )
        policy = load_policy(config.model, tokenizer, config.dtype)
        if config.packing:
            check_packing(policy)
        training, held_out = _split(config, demonstrations)
        training_rows, too_long = _encode(tokenizer, training, config, config.too_long)
        validation_rows, _ = _encode(tokenizer, held_out, config)

        rows = itertools.chain(training_rows, validation_rows)
        check_length(policy, ((row["prompt"], row["response"]) for row in rows))
        trainer = sft_trainer(config, policy, tokenizer, training_rows, validation_rows, stage.work)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(ShowsEvaluation("sft: held-out loss"))
        before = _validation_loss(trainer)
        best = Best(config, "eval_loss") if config.keep == "best" else None
        if best and not before:
            raise UserError("sft: keep: best needs held-out data, and there is a single prompt")
        recorder = Recorder(stage.tracker, LOGGED, config.log_every, best)
        train(trainer, stage.work, recorder, before)
        after = _validation_loss(trainer)
        trained = plain(trainer.model, lambda: _model(config, tokenizer))
        if not stage.main:
            return stage.final

        if config.lora is not None:
            save_adapter(trained, stage.output / ADAPTER)
        final = merged(trained, lambda: _base(config, tokenizer))
        samples, answered = _answers(config, final, tokenizer, held_out)
        stage.tracker.samples(trainer.state.global_step, samples)
        _write_demonstrations(stage.output / "demonstrations.jsonl", training[:KEPT])
        final.save_pretrained(stage.output)
        tokenizer.save_pretrained(stage.output)
        return stage.publish(
            {
                **_perplexity(before, "validation_perplexity_before"),
                **_perplexity(after, "validation_perplexity"),
                **answered,
                "examples": len(training_rows),
                "examples_too_long": too_long,
                **by_source(training),
                "steps": trainer.state.global_step,
                **({"best_step": best.step} if best else {}),
            },
            tokenizer_hash(tokenizer),
            template_hash(tokenizer),
        )


def _model(config: SFTConfig, tokenizer: PreTrainedTokenizerBase) -> Any:
    """A model with the parameters of that which is trained."""
    policy = load_policy(config.model, tokenizer, config.dtype)
    return add_lora(policy, config.lora, "CAUSAL_LM")


def _base(config: SFTConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model as it was loaded, rows for new tokens included, in float32."""
    checkpoint.seed_everything(config.seed)
    return load_policy(config.model, tokenizer).to(device())


def _validation_loss(trainer: Trainer) -> dict[str, float]:
    """Mean nats per held-out response token; nothing when nothing is held out."""
    if trainer.eval_dataset is None:
        return {}
    faults.at("eval", trainer.state.global_step)
    return {"validation/loss": trainer.evaluate()["eval_loss"]}


def _perplexity(measured: dict[str, float], name: str) -> dict[str, float]:
    if not measured:
        return {}
    return {name: math.exp(min(measured["validation/loss"], 50.0))}


def _split(
    config: SFTConfig, demonstrations: Sequence[Demonstration]
) -> tuple[Sequence[Demonstration], Sequence[Demonstration]]:
    """Training and held-out demonstrations; prompts never overlap when one file is split."""
    if config.validation_data is not None:
        return demonstrations, load_demonstrations(config.validation_data)
    return split_by_prompt(demonstrations, config.validation_fraction, config.seed)


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Demonstration],
    config: SFTConfig,
    too_long: float | None = None,
) -> tuple[Sequence[dict], int]:
    """One row of a `prompt` and its `response` for every assistant turn to be learnt; the loss is on that
    turn alone. And how many rows are left out as over `max_length`: UserError above a share `too_long`.
    """
    name = "held-out" if too_long is None else "training"
    rows, lengths = like(items), array("q")
    for item in tracked(items, f"sft: encoding {name} examples"):
        for turn, message in enumerate(item.messages):
            if message["role"] != "assistant" or turn in item.context:
                continue
            with at(item.where):
                prompt, response = encode_demonstration(tokenizer, item.messages[: turn + 1])
            lengths.append(len(prompt) + len(response))
            rows.append({"prompt": prompt, "response": response})
    limit, what = config.max_length, f"sft: {name} examples"
    tell_spelled(what, tokenizer, (m["content"] for item in items for m in item.messages))
    tell_unknown(what, tokenizer, (row["prompt"] + row["response"] for row in rows))
    dropped = over_limit(what, lengths, "max_length", limit, too_long)
    return pick(rows, (at for at, length in enumerate(lengths) if length <= limit)), dropped


def _write_demonstrations(path: Path, items: Sequence[Demonstration]) -> None:
    path.write_text(jsonl({"messages": item.messages} for item in items), encoding="utf-8")


def _answers(
    config: SFTConfig, policy, tokenizer: PreTrainedTokenizerBase, items: Sequence[Demonstration]
) -> tuple[list[dict], dict[str, float]]:
    """Responses to a few held-out prompts, and how well-formed those to `ANSWERED` of them are.

    Sampled at temperature 1, as PPO's first rollout will be. `eos_share`: share that end by EOS within
    `sample_tokens`; `format`: share that are `well_formed`. No metrics when nothing is held out.
    """
    asked: dict[str, tuple[list[Message], list[int]]] = {}
    for context in (item.messages[:-1] for item in items):
        if len(asked) < ANSWERED and str(context) not in asked:
            ids = encode_prompt(tokenizer, context)
            asked |= {str(context): (context, ids)} if len(ids) <= config.max_length else {}
    if not asked:
        return [], {}
    with torch.random.fork_rng():  # the same samples, wherever the generator stands
        torch.manual_seed(0)
        responses = generate(
            policy,
            tokenizer,
            [ids for _, ids in asked.values()],
            max_new_tokens=config.sample_tokens,
            progress="sft: answering held-out prompts",
        )
    samples = [
        {"prompt": context[-1]["content"], "response": r.text, "score": None, "ended": r.ended}
        for (context, _), r in zip([*asked.values()][:SHOWN], responses, strict=False)
    ]
    markers = role_markers(tokenizer)
    return samples, {
        "eos_share": sum(r.ended for r in responses) / len(responses),
        "format": sum(well_formed(tokenizer, r.ids, markers) for r in responses) / len(responses),
    }
