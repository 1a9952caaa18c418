"""What both sides are made of: Llamas with random weights, their tokenizer, turns in a trainer."""

import atexit
import tempfile
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
)

from pipeline.bench.shapes import EOS, PAD, Size
from pipeline.bench.turns import Turns


def config(size: Size) -> LlamaConfig:
    """A Llama of this size."""
    return LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.feed_forward,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads or size.heads,
        tie_word_embeddings=size.tied,
        max_position_embeddings=4 * (size.prompt + size.response),
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
        num_labels=1,
    )


def policy(size: Size, seed: int = 0) -> LlamaForCausalLM:
    """A policy; the same one for the same seed."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(config(size))


def reward(size: Size, seed: int = 1) -> LlamaForSequenceClassification:
    """A network with a scalar head."""
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(config(size))


def tokenizer(size: Size) -> PreTrainedTokenizerFast:
    """A word for every id."""
    specials = ["<pad>", "<end>", "<unk>"]
    words = [*specials, *(f"w{i}" for i in range(len(specials), size.vocabulary))]
    inner = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unk>",
        padding_side="left",
    )


def scratch() -> str:
    """A folder that goes with this process."""
    folder = tempfile.TemporaryDirectory(prefix="bench-")
    atexit.register(folder.cleanup)
    return folder.name


def wait() -> None:
    """Until the accelerator has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class TakesTurns(TrainerCallback):
    """A turn lasts from the end of one step of a trainer to the end of the next."""

    def __init__(self, turns: Turns):
        self.turns = turns

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.turns()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.turns()


def train(trainer: Any, turns: Turns) -> None:
    """A transformers trainer, a turn an optimizer step."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(TakesTurns(turns))
    trainer.train()
