"""The tiny base models: a word-level tokenizer and a small language model trained on the world's
plain text, or an encoder-decoder that has learnt nothing.

The base has read plain text only: facts and questions, news and headlines, word lists, orders. It
has never seen the chat format or an instruction; that is what the SFT stage is for. The number of
steps is fixed, never the seconds, so the same seed and thread count give the same bytes.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from pipeline.errors import UserError
from pipeline.process.progress import tracked
from pipeline.tiny import world

SPECIALS = ["<|pad|>", "<|unknown|>", "<|user|>", "<|assistant|>", "<|end|>"]
PAD, UNKNOWN, USER, ASSISTANT, END = SPECIALS

# `generation` marks the assistant's own tokens for trainers that mask the rest.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|> "
    "{% generation %}{{ message['content'] }} <|end|>{% endgeneration %}"
    "{% else %}<|user|> {{ message['content'] }} {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)

PIECES = 4000
"""Tokens that are learnt from a text of one's own."""
LAYERS, WIDTH, HEADS, MLP, INIT = 3, 96, 4, 192, 0.1
STEPS, BATCH, LENGTH, LEARNING_RATE, WARMUP = 1000, 16, 64, 4e-3, 30


def vocabulary() -> list[str]:
    """Every word of the world in a fixed order, the special tokens first."""
    words: list[str] = []
    for english, chinese in world.TO_CHINESE.items():
        words += [english, chinese]
    for group in (world.COURTESIES, world.HEDGES):
        words += [word for language in world.LANGUAGES for word in group[language]]
    words += " ".join(
        [*world.REFUSALS.values(), *world.STOPS.values(), *world.INSTRUCTIONS.values()]
    ).split()
    words += world.WORDS_OF_FORM
    return [*SPECIALS, *dict.fromkeys(words)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer over the world's vocabulary, split at whitespace, with the chat template."""
    table = {word: index for index, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _whole(tokenizer)


def learnt_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Pieces of words (byte-level BPE) that are frequent in `texts`; any other text can be spelled too."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _whole(tokenizer)


def _whole(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIALS]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,  # would glue "." to the word before it
        model_max_length=256,
        padding_side="left",
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of under a million parameters, drawn from torch's current seed.

    Rotary positions, tied embeddings and an initial std near 1/sqrt(WIDTH) make looking a word up in
    the context and repeating it quick to learn (with the usual 0.02 it takes several times as long).
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        attention_dropout=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        initializer_range=INIT,
    )
    return LlamaForCausalLM(config)


def pack(texts: list[str], tokenizer: PreTrainedTokenizerFast, length: int) -> torch.Tensor:
    """All texts in one stream, each closed by EOS, cut into rows of `length` tokens. (N, length)"""
    stream: list[int] = []
    for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        stream += [*ids, tokenizer.eos_token_id]
    rows = len(stream) // length
    return torch.tensor(stream[: rows * length]).view(rows, length)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then cosine to a tenth."""
    if step < WARMUP:
        return LEARNING_RATE * (step + 1) / WARMUP
    progress = (step - WARMUP) / max(1, steps - WARMUP)
    return LEARNING_RATE * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def train_base(out: Path, data: Path, seed: int, steps: int) -> Path:
    """Train the base on `data/corpus.jsonl`; model and tokenizer go into `out`, which is returned."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    with (data / "corpus.jsonl").open(encoding="utf-8") as file:
        rows = pack([json.loads(line)["text"] for line in file], tokenizer, LENGTH)
    shuffle = torch.Generator().manual_seed(seed)
    passes = 1 + steps * BATCH // len(rows)
    order = torch.cat([torch.randperm(len(rows), generator=shuffle) for _ in range(passes)])
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01
    )
    model.train()
    for step in tracked(range(steps), "base"):
        batch = rows[order[step * BATCH : (step + 1) * BATCH]]  # (B, T)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        logits = model(input_ids=batch, use_cache=False).logits  # (B, T, V)
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.generation_config.do_sample = True  # T = 1, no truncation, unless told otherwise
    model.generation_config.top_k = 0
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


BART = {
    "model_type": "bart",
    "d_model": WIDTH,
    "max_position_embeddings": 256,
    "init_std": INIT,
    "dropout": 0.0,
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": HEADS for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": MLP for side in ("encoder", "decoder")},
}
"""Half a million parameters."""


def random_model(
    out: Path, seed: int, architecture: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A model as it was drawn, and its tokenizer without a chat template, in `out`.

    architecture: `model_type` and sizes; UserError where transformers knows none such.
    """
    torch.manual_seed(seed)
    tokenizer.chat_template = None
    sizes = dict(architecture) | {"vocab_size": len(tokenizer), "bos_token_id": None}
    sizes |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    try:
        config = AutoConfig.for_model(**sizes)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        if config.is_encoder_decoder:
            config.decoder_start_token_id = tokenizer.eos_token_id
            config.forced_eos_token_id = None
        model = kind.from_config(config)
    except (TypeError, ValueError) as error:
        raise UserError(f"architecture: {' '.join(str(error).split())[:200]}") from None
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out
