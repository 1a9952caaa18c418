"""Trainers of the first stage, every mean over tokens, and packed rows that keep their examples apart."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)
from trl import SFTConfig as TRLConfig
from trl import SFTTrainer
from trl.data_utils import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from pipeline.config.schema import SFTConfig
from pipeline.engines.whole import within
from pipeline.errors import UserError
from pipeline.models.adapters import add_lora
from pipeline.models.encoder_decoder import is_encoder_decoder
from pipeline.models.forward import of_predictions
from pipeline.models.packing import rounded
from pipeline.models.sequences import Sequences
from pipeline.models.tokens import pad_id
from pipeline.process.progress import say
from pipeline.training.checked import Checked
from pipeline.training.trainers import arguments, dataset_of, one_gpu


def sft_trainer(
    config: SFTConfig,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    training: Sequence[dict],
    held_out: Sequence[dict],
    work: Path,
) -> Any:
    """The trainer for a policy's kind; rows hold the ids of a `prompt` and of the `response` to be learnt."""
    model = add_lora(policy, config.lora, "CAUSAL_LM")
    if is_encoder_decoder(policy):
        args = Seq2SeqTrainingArguments(
            **arguments(config, len(training), work), remove_unused_columns=False
        )
        return Seq2SeqTokenTrainer(
            model=model,
            args=one_gpu(args),
            data_collator=lambda rows: _sequences(rows, pad_id(tokenizer)),
            train_dataset=training,
            eval_dataset=held_out or None,
            processing_class=tokenizer,
        )
    rows = dataset_of(training, _joined, work)
    if config.packing:
        rows = packed(rows, config.max_length)
        say(f"sft: {len(training)} examples packed into {len(rows)} rows")
    args = TRLConfig(
        **arguments(config, len(rows), work),
        max_length=None,  # rows that are too long have been dropped
        padding_free=config.packing,
    )
    return TokenTrainer(
        model=model,
        args=one_gpu(args),
        train_dataset=rows,
        eval_dataset=dataset_of(held_out, _joined, work) if held_out else None,
        processing_class=tokenizer,
    )


def _joined(row: dict) -> dict:
    """A row as TRL takes it."""
    prompt, response = row["prompt"], row["response"]
    return {"input_ids": prompt + response, "labels": [-100] * len(prompt) + response}


def _sequences(rows: list[dict], pad: int) -> dict[str, Tensor]:
    """A batch of rows."""
    return vars(Sequences.of([r["prompt"] for r in rows], [r["response"] for r in rows], pad))


class Seq2SeqTokenTrainer(Checked, Seq2SeqTrainer):
    """transformers' trainer of encoder-decoders; its losses are sums over response tokens, divided by those
    of the whole batch or validation set.

    Left to themselves the models would average each micro-batch, for they do not heed the count of
    items that the trainer believes they divide by.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # the loss below is scaled by `num_items_in_batch`
        # nats, right tokens, tokens; float32 would count no further than 2**24
        self._sums = {part: torch.zeros(3, dtype=torch.float64) for part in ("train", "eval")}

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        tokens = sum(int(batch["response_mask"].sum()) for batch in batches)
        return batches, int(*self.total([tokens]))

    def blank(self, batch):
        batch["response_mask"].zero_()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        s = Sequences.within(inputs)
        # which only the model's own forward would enter by itself
        with self.accelerator.autocast():
            nats, right = within(model, lambda bare: of_predictions(bare, s, _nats_and_right)[0])
        loss, tokens = nats.sum(), len(nats)
        seen = torch.stack([loss.detach(), right.sum(), torch.tensor(tokens)]).cpu()
        self._sums["train" if model.training else "eval"] += seen
        if num_items_in_batch:  # engines average gradients over processes
            loss = loss * self.args.world_size
        loss = loss / (num_items_in_batch or max(tokens, 1))
        return (loss, {}) if return_outputs else loss

    def prediction_step(self, model, inputs, *args, **kwargs):
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)), None, None

    def evaluation_loop(self, *args, **kwargs):
        self._sums["eval"].zero_()
        out = super().evaluation_loop(*args, **kwargs)
        nats, right, tokens = self.total(self._sums["eval"].tolist())
        out.metrics.update(eval_loss=nats / tokens, eval_mean_token_accuracy=right / tokens)
        return out

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            _, right, tokens = self.total(self._sums["train"].tolist())
            logs["mean_token_accuracy"] = right / tokens
            self._sums["train"].zero_()
        super().log(logs, *args, **kwargs)


def _nats_and_right(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Nats of each token, and whether it is the likeliest."""
    nats = torch.nn.functional.cross_entropy(logits.float(), ids, reduction="none")
    return nats, logits.argmax(dim=-1) == ids


class TokenTrainer(Checked, SFTTrainer):
    """TRL's SFT trainer; its losses are means over the tokens of a whole batch or validation set."""

    def __init__(self, *args, **kwargs):
        try:
            super().__init__(*args, **kwargs)
        except ValueError as error:  # what TRL does not support, in its words
            raise UserError(f"sft: {error}") from error
        # TRL's loss counts so itself; transformers would ask the model's forward and its class's name
        self.model_accepts_loss_kwargs = self._loss_shifts_labels = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        out = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.model.training:  # of a step's micro-batches the plain mean is logged
            [tokens] = self.total([_tokens(inputs)])
            share = tokens / float(num_items_in_batch)
            accuracies = self._metrics["train"]["mean_token_accuracy"]
            accuracies[-1] *= share * self.current_gradient_accumulation_steps
        return out

    def prediction_step(self, model, inputs, *args, **kwargs):
        out = super().prediction_step(model, inputs, *args, **kwargs)
        self._seen.append((float(out[0]), _tokens(inputs)))
        return out

    def evaluation_loop(self, *args, **kwargs):
        self._seen: list[tuple[float, int]] = []  # loss and tokens of each batch
        out = super().evaluation_loop(*args, **kwargs)
        accuracies = self._metrics["eval"]["mean_token_accuracy"]
        counts = self.total([count for _, count in self._seen])
        tokens = sum(counts)
        right = sum(a * n for a, n in zip(accuracies, counts, strict=True)) / tokens
        self._metrics["eval"]["mean_token_accuracy"] = [right]
        [nats] = self.total([sum(loss * count for loss, count in self._seen)])
        out.metrics["eval_loss"] = nats / tokens
        return out

    def blank(self, batch):
        batch["labels"].fill_(-100)


def _tokens(inputs: dict[str, Tensor]) -> int:
    """How many tokens of a batch are learnt."""
    return int((inputs["labels"][:, 1:] != -100).sum())


def packed(rows: Dataset, max_length: int) -> Dataset:
    """Examples of `input_ids` and `labels` end to end in rows of up to `max_length` tokens, best fit first;
    `seq_lengths` says where each ends."""
    return pack_dataset(rows, max_length, "bfd")


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """UserError for a model that lets packed examples see each other, or counts their places on.

    Two short examples go through it in one row, laid out as they are for training, and alone.
    """
    name, training = type(model).__name__, model.training
    if is_encoder_decoder(model):
        raise UserError(f"packing: {name} is an encoder-decoder, not packed; set packing: false")
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = [number * 7919 % vocabulary for number in range(9)]
    row = {"input_ids": ids, "labels": ids, "seq_lengths": [5, 4]}
    inputs = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([row])
    del inputs["labels"]
    model.eval()
    alone = [
        model(input_ids=part, attention_mask=torch.ones_like(part), use_cache=False).logits[0]
        for part in torch.tensor([ids]).split([5, 4], dim=1)
    ]
    try:
        gap = float((model(**inputs, use_cache=False).logits[0] - torch.cat(alone)).abs().max())
        reason = f"it moves logits by {gap:.1g}"
    except (
        Exception
    ) as error:  # whatever a model's own code may raise on a layout it does not expect
        gap, reason = float("inf"), f"it refused the row: {type(error).__name__}"
    model.train(training)
    if not gap <= (0.05 if rounded(model) else 1e-4) * float(torch.cat(alone).abs().max()):
        raise UserError(
            f"packing: {name} does not keep the examples of a row apart ({reason}); set packing: false"
        )
