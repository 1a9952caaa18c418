"""Stage 2: a reward model on K-wise ranked comparisons, from the SFT model.

`python -m stages.rm --config configs/tiny/rm.yaml --run checkpoints/tiny [key=value ...]`
"""

from pipeline import cli

if __name__ == "__main__":
    cli.main("rm")  # checks config and data before the slow imports below

import itertools
import shutil
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import RewardConfig as TRLConfig

from pipeline.config.schema import Data, RMConfig
from pipeline.data.forms import load_demonstrations
from pipeline.data.kept import like
from pipeline.data.lengths import over_limit
from pipeline.data.literals import tell_spelled, tell_unknown
from pipeline.data.messages import message, prompt_text
from pipeline.data.rankings import Ranking, label_noise, load_rankings, strengths
from pipeline.data.splits import split_by_prompt
from pipeline.data.template import (
    encode_demonstration,
    encode_responses,
    template_hash,
    tokenizer_hash,
    without_thinking,
)
from pipeline.engines.shares import worked_on
from pipeline.engines.start import check_started, together, wait_for
from pipeline.engines.whole import on_whole, plain
from pipeline.errors import UserError, at
from pipeline.evaluation.card import write_card
from pipeline.evaluation.rankings import Scored, measure, write_scored
from pipeline.feedback.comparisons import sampled_rankings
from pipeline.handoff import checkpoint
from pipeline.models.adapters import ADAPTER, add_lora, merged, save_adapter
from pipeline.models.causal import places
from pipeline.models.device import device
from pipeline.models.forward import layout, score_head, score_sequences
from pipeline.models.loading import load_tokenizer, prepare_cpu, reward_from_policy
from pipeline.models.needs import check_training
from pipeline.models.tokens import pad_id
from pipeline.process import faults
from pipeline.process.progress import say, tracked
from pipeline.run import StageRun, by_source, given
from pipeline.training.best import Best
from pipeline.training.kwise import KwiseCollator, KwiseTrainer
from pipeline.training.trainers import (
    Recorder,
    arguments,
    check,
    check_length,
    dataset_of,
    one_gpu,
    quiet,
    train,
)

LOGGED = {
    "loss": "train/loss",
    "accuracy": "train/accuracy",
    "margin": "train/margin",
    "mean_reward": "train/score_mean",
    "grad_norm": "train/grad_norm",
    "learning_rate": "lr",
    "eval_accuracy": "validation/accuracy",
    "eval_loss": "validation/loss",
}

PADDING_TOLERANCE = 1e-2
"""Scores are about 1 apart; float32 in another order of summation moves one by some 1e-5."""


def run(config: RMConfig, dataset: Any = None) -> Path:
    """Train a reward model and publish `RUN/rm`; returns that directory.

    `dataset` replaces `config.data` by rankings in memory (see `pipeline.data.rankings`).
    """
    check(config, RMConfig)
    rankings: Sequence[Ranking] = ()
    samples = config.sampling is not None and dataset is None
    if config.data is not None or not samples:
        rankings = load_rankings(given(config.data, dataset, "data or sampling"), seed=config.seed)
    check_started(config)
    with StageRun(config, dataset) as stage:
        together()  # the first has tidied up
        quiet()
        prepare_cpu(config.threads)
        checkpoint.seed_everything(config.seed)
        sft = stage.parent("sft")
        check_training(config, sft)
        tokenizer = load_tokenizer(sft)
        if samples:
            faults.at("rollout", 0)
            if not stage.main:
                wait_for(stage.work / "rankings.jsonl")
                together()
            rankings = sampled_rankings(config, sft, tokenizer, stage.work, rankings)
            if stage.main:
                together()
                shutil.copyfile(stage.work / "rankings.jsonl", stage.output / "rankings.jsonl")
        training, held_out = split_by_prompt(rankings, config.validation_fraction, config.seed)
        training_rows, too_long = _encode(tokenizer, training, config, config.too_long)
        held_out_rows, _ = _encode(tokenizer, held_out, config)
        if not training_rows or not held_out_rows:
            raise UserError(
                "rm: no comparison is left to train on, or none to hold out; give more prompts, or "
                "another max_length or validation_fraction"
            )

        checkpoint.seed_everything(config.seed)
        model = reward_from_policy(sft, tokenizer, config.dtype).to(device())
        check_length(model, _pairs(itertools.chain(training_rows, held_out_rows)))
        before = _measured(model, tokenizer, held_out_rows)
        trainer = KwiseTrainer(
            model=_trainable(model, config),
            args=one_gpu(
                TRLConfig(
                    **arguments(config, len(training_rows), stage.work),
                    max_length=None,
                    remove_unused_columns=False,
                )
            ),
            data_collator=KwiseCollator(pad_id(tokenizer)),
            train_dataset=dataset_of(training_rows, _ranked_ids, stage.work),
            processing_class=tokenizer,
        )
        first = {"validation/accuracy": before.accuracy.share, "validation/loss": before.loss}
        best = Best(config, "eval_accuracy") if config.keep == "best" else None
        trainer.margin = config.margin
        trainer.held_out = lambda: _held_out(trainer, tokenizer, held_out_rows)
        recorder = Recorder(stage.tracker, LOGGED, config.log_every, best)
        train(trainer, stage.work, recorder, first)
        trained = plain(
            trainer.model,
            lambda: _trainable(reward_from_policy(sft, tokenizer, config.dtype), config),
        )
        if not stage.main:
            return stage.final

        if config.lora is not None:
            save_adapter(trained, stage.output / ADAPTER)
        final = merged(trained, lambda: reward_from_policy(sft, tokenizer).to(device()))
        final.config.reward_bias = _demonstration_mean(final, tokenizer, config, sft)
        faults.at("eval", trainer.state.global_step)
        scored = _score(final, tokenizer, held_out_rows)
        gap = _padding_gap(final, tokenizer, held_out_rows)
        write_scored(stage.output, scored)
        about = {
            "demonstration_mean": _demonstration_mean(final, tokenizer, config, sft),
            "padding_gap": gap,
        }
        write_card(stage.output, scored, about)
        after = measure(scored).metrics()
        stage.tracker.log(
            trainer.state.global_step, {f"validation/{k}": v for k, v in after.items()}
        )
        held_out_scores = np.array([score for item in scored for score in item.scores])
        stage.tracker.histograms(trainer.state.global_step, {"scores": held_out_scores})
        final.save_pretrained(stage.output)
        tokenizer.save_pretrained(stage.output)
        return stage.publish(
            {
                "accuracy_before": before.accuracy.share,
                **after,
                "reward_bias": final.config.reward_bias,
                **about,
                "prompts": len({row["prompt"] for row in training_rows}),
                "rankings": len(training_rows),
                "rankings_dropped": len(training) - len(training_rows),
                "responses_too_long": too_long,
                **by_source(training),
                **label_noise(rankings),
                "steps": trainer.state.global_step,
                **({"best_step": best.step} if best else {}),
            },
            tokenizer_hash(tokenizer),
            template_hash(tokenizer),
        )


def _trainable(model: PreTrainedModel, config: RMConfig):
    """The whole model, its adapters and head, or its head alone."""
    if config.head_only:
        model.requires_grad_(False)
        score_head(model).requires_grad_(True)
        return model
    return add_lora(model, config.lora, "SEQ_CLS")


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    rankings: Sequence[Ranking],
    config: RMConfig,
    too_long: float | None = None,
) -> tuple[Sequence[dict], int]:
    """Rows of a prompt's ids, those of K responses and their ranks, and how many responses are over `max_length`.

    Those go (UserError above a share `too_long`); so do those whose ids equal another's of the prompt,
    and then prompts that are left with fewer than two responses or with nothing but ties.
    """
    name = "held-out" if too_long is None else "training"
    rows, lengths, same, empty = like(rankings), array("q"), 0, 0
    for ranking in tracked(rankings, f"rm: encoding {name}"):
        said = [without_thinking(text) for text in ranking.responses]
        with at(ranking.where):
            prompt, encoded = encode_responses(tokenizer, ranking.messages, said)
        believed = strengths(ranking) if config.soft_labels and too_long is not None else {}
        kept: dict[tuple[int, ...], tuple[int, str]] = {}
        for response, own, rank in zip(ranking.responses, encoded, ranking.ranks, strict=True):
            ids, length = tuple(own), len(prompt) + len(own)
            lengths.append(length)
            same += ids in kept
            if length <= config.max_length:
                kept.setdefault(ids, (rank, response))
        ranks = [rank for rank, _ in kept.values()]
        if len(set(ranks)) < 2:
            empty += 1
            continue
        rows.append(
            {
                "prompt_ids": prompt,
                "ids": [list(ids) for ids in kept],
                "ranks": ranks,
                "strengths": [believed[text] for _, text in kept.values() if believed],
                "prompt": prompt_text(ranking.messages),
                "responses": [text for _, text in kept.values()],
                "row": ranking.row,
            }
        )
    what = f"rm: {name} responses"
    all_texts = ([m["content"] for m in r.messages] + r.responses for r in rankings)
    tell_spelled(f"rm: {name}", tokenizer, (text for texts in all_texts for text in texts))
    tell_unknown(what, tokenizer, (response for _, response in _pairs(rows)))
    long = over_limit(what, lengths, "max_length", config.max_length, too_long)
    if long or same or empty:
        say(
            f"rm: {name}: dropped {same} duplicates and {empty} prompts without an untied pair; "
            f"{len(rows)} prompts are left"
        )
    return rows, long


def _score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict]
) -> list[Scored]:
    """Held-out rankings with the model's scores."""
    prompts, responses = _apart(rows)
    pad, bar = pad_id(tokenizer), "rm: scoring held-out responses"
    scores = iter(score_sequences(model, prompts, responses, pad, progress=bar))
    return [
        Scored(
            prompt=row["prompt"],
            responses=row["responses"],
            ranks=row["ranks"],
            lengths=[len(ids) for ids in row["ids"]],
            scores=[next(scores) for _ in row["ids"]],
            row=row["row"],
        )
        for row in rows
    ]


def _measured(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict]):
    """What held-out rankings say of a model, each process scoring its share of them."""

    def scored(bare: PreTrainedModel) -> list[Scored]:
        return worked_on(rows, lambda mine: _score(bare, tokenizer, mine))

    return measure(on_whole(model, scored))


def _held_out(
    trainer: KwiseTrainer, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict]
) -> dict[str, float]:
    """Accuracy and loss on held-out rankings while it trains."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    with torch.random.fork_rng():
        found = _measured(model, tokenizer, rows)
    return {"eval_accuracy": found.accuracy.share, "eval_loss": found.loss}


def _ranked_ids(row: dict) -> dict:
    """A row as the trainer takes it."""
    believed = {"strengths": row["strengths"]} if row["strengths"] else {}
    own = {"prompt": row["prompt_ids"], "responses": row["ids"], "ranks": row["ranks"]}
    return own | believed


def _pairs(rows: Iterable[dict]) -> Iterator[tuple[list[int], list[int]]]:
    """Ids of each response, behind those of its prompt."""
    return ((row["prompt_ids"], ids) for row in rows for ids in row["ids"])


def _apart(rows: Sequence[dict]) -> tuple[list[list[int]], list[list[int]]]:
    """Ids of all prompts and of all responses, as often as there are responses."""
    pairs = list(_pairs(rows))
    return [prompt for prompt, _ in pairs], [ids for _, ids in pairs]


def _demonstration_mean(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: RMConfig, sft: Path
) -> float:
    """Mean score of demonstrations, less the model's bias: before there is one, the bias itself."""
    source = config.demonstrations or Data(path=str(sft / "demonstrations.jsonl"))
    items = load_demonstrations(source)[: config.demonstrations_limit]
    encoded = []
    for *context, reply in (item.messages for item in items):
        said = message("assistant", without_thinking(reply["content"]))
        encoded.append(encode_demonstration(tokenizer, [*context, said]))
    limit = min(config.max_length, places(model))
    longest = min(limit - 1, layout(model).room(model, 1))  # a prompt has a token left at least
    responses = [response[-longest:] for _, response in encoded]
    prompts = [
        ids[-(limit - len(response)) :]
        for (ids, _), response in zip(encoded, responses, strict=True)
    ]
    pad, bar = pad_id(tokenizer), "rm: scoring demonstrations"
    scores = score_sequences(model, prompts, responses, pad, progress=bar)
    return sum(scores) / len(scores)


def _padding_gap(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict]
) -> float:
    """Most that a score changes with what else is in the batch, over some held-out responses.

    UserError above `PADDING_TOLERANCE`: such a model does not heed its mask.
    """
    prompts, responses = _apart(rows[:4])
    together = score_sequences(model, prompts, responses, pad_id(tokenizer))
    alone = score_sequences(model, prompts, responses, pad_id(tokenizer), batch_size=1)
    gap = max((abs(a - b) for a, b in zip(together, alone, strict=True)), default=0.0)
    if gap > PADDING_TOLERANCE:
        raise UserError(
            f"rm: scores change by {gap:.3g} with the padding beside them; "
            f"{type(model).__name__} does not heed its attention mask"
        )
    return gap
