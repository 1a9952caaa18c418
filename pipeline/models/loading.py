"""The four models of RLHF: policy, reference, reward model and value network.

All are plain transformers models; what is published loads with `AutoModelForCausalLM`,
`AutoModelForSeq2SeqLM` or `AutoModelForSequenceClassification`, but for reward models of encoder-decoders
(`pipeline.models.scorer`). Dropout is off everywhere: a policy that samples with one mask
and trains with another is not on-policy (invariant 2).
"""

import math
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pipeline.config.schema import Dtype
from pipeline.data.literals import around
from pipeline.data.template import prepare_tokenizer
from pipeline.errors import UserError
from pipeline.models import encoder_decoder
from pipeline.models.dtypes import check_dtype, held_in, settle
from pipeline.models.forward import score_head
from pipeline.models.packing import pack_if_possible
from pipeline.models.scorer import EncoderDecoderScorer
from pipeline.process import hub, memory

# --- the process ---------------------------------------------------------------------------------


def quiet() -> None:
    """Silence transformers' own progress bars and remarks; ours show what matters."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl|peft")


def prepare_cpu(threads: int | None) -> None:
    """Limit torch's CPU threads, when asked to, and keep the memory that tensors give back."""
    if threads is not None:
        torch.set_num_threads(threads)
    memory.keep_freed()


# --- loading ------------------------------------------------------------------------------------


def load_tokenizer(
    path: str | Path,
    chat_template: Path | None = None,
    source_language: str | None = None,
    target_language: str | None = None,
) -> PreTrainedTokenizerBase:
    """Tokenizer with a pad token and a chat template (see `pipeline.data.template`).

    The languages are what a model that translates among several reads and writes, as its tokenizer names
    them; UserError where it does not.
    """
    _check_tokenizer_files(Path(path))
    tokenizer = _load(AutoTokenizer, path)
    for name, code in (("src_lang", source_language), ("tgt_lang", target_language)):
        if code is not None:
            _set_language(tokenizer, name, code)
    prepare_tokenizer(tokenizer, chat_template, _is_encoder_decoder(path))
    _pad_apart_from_eos(tokenizer)
    return tokenizer


def _check_tokenizer_files(path: Path) -> None:
    """UserError for a folder of a model without a tokenizer: transformers makes one up of a handful of
    special tokens."""
    known = ("tokenizer*", "vocab*", "*.model", "*.spm", "*.tiktoken", "*.tekken*", "tekken*")
    if path.is_dir() and not any(next(path.glob(name), None) for name in known):
        raise UserError(
            f"{path}: there is no tokenizer; save the model's own there (save_pretrained)"
        )


def _is_encoder_decoder(path: str | Path) -> bool:
    try:
        return config_of(path).is_encoder_decoder
    except UserError:  # a tokenizer's folder, without a model
        return False


def _set_language(tokenizer: PreTrainedTokenizerBase, name: str, code: str) -> None:
    if not hasattr(tokenizer, name):
        raise UserError(f"{type(tokenizer).__name__} has no languages: leave out {code}")
    try:
        setattr(tokenizer, name, code)
        before, after = around(tokenizer, target=name == "tgt_lang")
    except KeyError:  # M2M100's own way to say so
        before, after = [tokenizer.unk_token_id], []
    if tokenizer.unk_token_id in (*before, *after):
        known = ", ".join(
            getattr(tokenizer, "lang_code_to_id", None) or tokenizer.all_special_tokens
        )
        raise UserError(f"{type(tokenizer).__name__} has no language {code}; it has {known}")


def _pad_apart_from_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give padding a token of its own, a spare special token or a new one.

    Our own masks come from lengths, but transformers' sequence classifiers look for the last token
    that is not padding: with pad == eos a published reward model would be read one token early by
    any program but this one.
    """
    if tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    taken = {tokenizer.eos_token, tokenizer.bos_token}
    spare = [
        token
        for token in tokenizer.all_special_tokens
        if token not in taken and token not in str(tokenizer.chat_template)
    ]
    if spare:
        tokenizer.pad_token = spare[0]
    else:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})


def load_policy(
    path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None, dtype: Dtype = "fp32"
) -> PreTrainedModel:
    """Language model, dropout off, with a generation config free of sampling rules.

    Truncated sampling or penalties that a model ships with (top-k 50, repetition penalty, beams) would
    make the rollout distribution differ from the one PPO computes logprobs of (trl#6789).
    """
    config = check_policy(path)
    if tokenizer is not None:
        check_vocabulary(path, config, tokenizer)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = _load_weights(kind, path, dtype)
    shipped = model.generation_config
    model.generation_config = GenerationConfig(**{name: getattr(shipped, name) for name in _KEPT})
    if tokenizer is not None:
        fit_tokenizer(model, tokenizer)
    return _ready(model)


_KEPT = ["eos_token_id", "bos_token_id", "pad_token_id"]
_KEPT += ["decoder_start_token_id", "forced_bos_token_id"]
_CAUSAL = re.compile("CausalLM|LMHead|ConditionalGeneration")
_SEQ2SEQ = re.compile("ConditionalGeneration|MTModel|LMHead")


def check_policy(path: str | Path) -> PreTrainedConfig:
    """The config of a model that writes text; UserError for a classifier, an encoder, a bare trunk.

    transformers would load its trunk and add what is missing, drawn at random. No weight is read.
    """
    config = config_of(path)
    names = config.architectures or []
    if config.is_encoder_decoder:
        known, wanted = _SEQ2SEQ, "an encoder-decoder's ...ForConditionalGeneration"
        if config.model_type not in encoder_decoder.KINDS:
            raise UserError(
                f"{path}: {config.model_type} is none of the encoder-decoders that are known to work: "
                f"{', '.join(encoder_decoder.KINDS)}"
            )
    else:
        known, wanted = _CAUSAL, "a ...ForCausalLM, ...LMHeadModel or ...ForConditionalGeneration"
    if names and not any(known.search(name) for name in names):
        raise UserError(
            f"{path}: a {', '.join(names)}, which does not predict the next token; give a language "
            f"model (its config.json names {wanted})"
        )
    return config


def check_reward(path: str | Path) -> PreTrainedConfig:
    """The config of a model with one score for a text; UserError for any other. No weight is read."""
    config = config_of(path)
    names = config.architectures or []
    ours = EncoderDecoderScorer.__name__
    if config.is_encoder_decoder and names != [ours]:
        raise UserError(
            f"{path}: a {', '.join(names) or config.model_type}: of encoder-decoders, a reward model is "
            f"what the rm stage publishes (its config.json names {ours})"
        )
    if names and not any(name == ours or "SequenceClassification" in name for name in names):
        raise UserError(f"{path}: a {', '.join(names)}, which has no score; give a reward model")
    if config.num_labels != 1:
        raise UserError(f"{path}: a reward model has num_labels 1, this has {config.num_labels}")
    return config


def load_reward(path: str | Path, dtype: Dtype = "fp32") -> PreTrainedModel:
    """Sequence classifier with one output, dropout off; a linear head on its trunk is in float32."""
    model = _load_weights(_classifier(check_reward(path)), path, dtype)
    if isinstance(head := getattr(model, "score", None), nn.Linear):
        head.float()
    return _ready(model)


def _classifier(config: PreTrainedConfig) -> Any:
    return EncoderDecoderScorer if config.is_encoder_decoder else AutoModelForSequenceClassification


def reward_from_policy(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, dtype: Dtype = "fp32"
) -> PreTrainedModel:
    """The policy's trunk with a fresh scalar head in float32, drawn with std 1/sqrt(d + 1) (arXiv
    2403.17031).

    Draws from the global generator: seed it first.
    """
    config = check_policy(path)
    check_vocabulary(path, config, tokenizer)
    model = _load_weights(_classifier(config), path, dtype, fresh="score.weight", num_labels=1)
    fit_tokenizer(model, tokenizer)
    head = score_head(model).float()
    nn.init.normal_(head.weight, std=1 / math.sqrt(head.in_features + 1))
    model.config.reward_bias = 0.0
    return _ready(model)


def _load_weights(
    kind: Any, path: str | Path, dtype: Dtype, fresh: str = "", **kwargs: Any
) -> PreTrainedModel:
    """A model, read weight by weight into a dtype; UserError if the file lacks a weight other than the `fresh` one.

    transformers would draw it at random.
    """
    check_dtype(dtype)
    with memory.returned_at_once():
        model, info = _load(kind, path, output_loading_info=True, **held_in(dtype), **kwargs)
    if lacking := sorted(set(info["missing_keys"]) - {fresh}):
        raise UserError(
            f"{path}: of a {type(model).__name__} its weights lack {', '.join(lacking[:3])}"
            f"{', ...' if lacking[3:] else ''}; give a folder that save_pretrained wrote of the whole model"
        )
    settle(model, dtype)
    return model


def _ready(model: PreTrainedModel) -> PreTrainedModel:
    disable_dropout(model)
    pack_if_possible(model)
    return model


def config_of(path: str | Path):
    """The config of a model directory or hub id."""
    return _load(AutoConfig, path)


def _load(auto_class, path: str | Path, **kwargs):
    """`from_pretrained` that never runs a repository's code and says plainly what is missing."""
    hub.look(path)
    try:
        return auto_class.from_pretrained(str(path), trust_remote_code=False, **kwargs)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{path}: cannot load ({auto_class.__name__}): {reason}\n"
            "Give a directory made by save_pretrained, or a hub id while the hub is reachable."
        ) from error


def check_vocabulary(
    path: str | Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """UserError for a tokenizer with more words than the model: another's. Tokens that were added to it get
    rows of their own."""
    rows = getattr(config.get_text_config(), "vocab_size", sys.maxsize)
    if len(tokenizer) - len(tokenizer.get_added_vocab()) > rows:
        raise UserError(
            f"{path}: a vocabulary of {rows}, and a tokenizer of {len(tokenizer)} words; give the model's "
            "own tokenizer"
        )


def fit_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the model agree with the tokenizer on size, padding, end, and where a decoder begins.

    UserError for tokens that were added where encoder and decoder have tables of their own, for
    transformers would put one in the place of the other.
    """
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        if model.config.is_encoder_decoder and not encoder_decoder.one_table(model):
            raise UserError(
                f"{type(model).__name__}: encoder and decoder have a table of {rows} embeddings each, which "
                f"cannot grow to the {len(tokenizer)} words of the tokenizer; give it no new tokens"
            )
        model.resize_token_embeddings(len(tokenizer))
    for config in (model.config, getattr(model, "generation_config", None)):
        if config is not None:
            config.pad_token_id = tokenizer.pad_token_id
            config.eos_token_id = tokenizer.eos_token_id
    if model.config.is_encoder_decoder:
        encoder_decoder.set_decoder_prefix(model, tokenizer)


_DROPS = ("dropout", "pdrop", "dropout_rate", "layerdrop")


def disable_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Turn off dropout in modules, in attention functions and in the config that rebuilds them.

    Zeroing `nn.Dropout` misses floats such as `attention_dropout` that attention code reads at each
    call (LLaMA-Factory#10779), and the chance by which M2M100 leaves out whole layers.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if ("dropout" in name or "layerdrop" in name) and isinstance(value, float):
                setattr(module, name, 0.0)
    for name, value in model.config.to_dict().items():
        if isinstance(value, float) and name.endswith(_DROPS):
            setattr(model.config, name, 0.0)
    return model
