"""TRL's SFT trainer with every mean over tokens, and packed rows that keep their examples apart."""

import torch
from datasets import Dataset
from transformers import PreTrainedModel
from trl import SFTTrainer
from trl.data_utils import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from pipeline.errors import UserError
from pipeline.training.trainers import Checked


class TokenTrainer(Checked, SFTTrainer):
    """TRL's SFT trainer; its losses are means over the tokens of a whole batch or validation set."""

    def __init__(self, *args, **kwargs):
        try:
            super().__init__(*args, **kwargs)
        except ValueError as error:  # what TRL does not support, in its words
            raise UserError(f"sft: {error}") from error
        # TRL's loss counts so itself; transformers would ask the model's forward and its class's name
        self.model_accepts_loss_kwargs = self._loss_shifts_labels = True

    def prediction_step(self, model, inputs, *args, **kwargs):
        out = super().prediction_step(model, inputs, *args, **kwargs)
        self._seen.append((float(out[0]), int((inputs["labels"][:, 1:] != -100).sum())))
        return out

    def evaluation_loop(self, *args, **kwargs):
        self._seen: list[tuple[float, int]] = []  # loss and tokens of each batch
        out = super().evaluation_loop(*args, **kwargs)
        accuracies = self._metrics["eval"]["mean_token_accuracy"]
        tokens = sum(count for _, count in self._seen)
        right = sum(a * n for a, (_, n) in zip(accuracies, self._seen, strict=True)) / tokens
        self._metrics["eval"]["mean_token_accuracy"] = [right]
        out.metrics["eval_loss"] = sum(loss * count for loss, count in self._seen) / tokens
        return out


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
    if not gap <= 1e-4 * float(torch.cat(alone).abs().max()):
        raise UserError(
            f"packing: {name} does not keep the examples of a row apart ({reason}); set packing: false"
        )
