"""The four models of RLHF: policy, reference, reward model and value network.

All are plain transformers models; what is published loads with `AutoModelForCausalLM` or
`AutoModelForSequenceClassification`. Dropout is off everywhere: a policy that samples with one mask
and trains with another is not on-policy (invariant 2).
"""

import contextlib
import inspect
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pipeline.data.template import prepare_tokenizer
from pipeline.errors import UserError
from pipeline.ppo.maths import position_ids
from pipeline.schema import Lora

Model = Any
"""A transformers model, bare or in peft's wrapper; `nn.Module` declares none of what we call."""

# --- the process ---------------------------------------------------------------------------------


def quiet() -> None:
    """Silence transformers' own progress bars and remarks; ours show what matters."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl|peft")


def set_threads(threads: int | None) -> None:
    """Limit torch's CPU threads, when asked to."""
    if threads is not None:
        torch.set_num_threads(threads)


# --- loading ------------------------------------------------------------------------------------


def load_tokenizer(path: str | Path, chat_template: Path | None = None) -> PreTrainedTokenizerBase:
    """Tokenizer with a pad token and a chat template (see `pipeline.data.template`)."""
    tokenizer = _load(AutoTokenizer, path)
    prepare_tokenizer(tokenizer, chat_template)
    _pad_apart_from_eos(tokenizer)
    return tokenizer


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
    path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> PreTrainedModel:
    """Causal language model in float32, dropout off, with a generation config free of sampling rules.

    Truncated sampling or penalties that a model ships with (top-k 50, repetition penalty) would make
    the rollout distribution differ from the one PPO computes logprobs of (trl#6789).
    """
    if AutoConfig_of(path).is_encoder_decoder:
        raise UserError(f"{path}: an encoder-decoder model; this stage needs a causal one")
    model = _load(AutoModelForCausalLM, path, dtype=torch.float32)
    model.generation_config = GenerationConfig(
        eos_token_id=model.generation_config.eos_token_id,
        bos_token_id=model.generation_config.bos_token_id,
        pad_token_id=model.generation_config.pad_token_id,
    )
    if tokenizer is not None:
        fit_tokenizer(model, tokenizer)
    return disable_dropout(model)


def load_reward(path: str | Path) -> PreTrainedModel:
    """Sequence classifier with one output, float32, dropout off."""
    model = _load(AutoModelForSequenceClassification, path, dtype=torch.float32)
    if model.config.num_labels != 1:
        raise UserError(
            f"{path}: a reward model has num_labels 1, this has {model.config.num_labels}"
        )
    return disable_dropout(model)


def reward_from_policy(path: str | Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The policy's trunk with a fresh scalar head, drawn with std 1/sqrt(d + 1) (arXiv 2403.17031).

    Draws from the global generator: seed it first.
    """
    model = _load(AutoModelForSequenceClassification, path, num_labels=1, dtype=torch.float32)
    fit_tokenizer(model, tokenizer)
    head = score_head(model)
    nn.init.normal_(head.weight, std=1 / math.sqrt(head.in_features + 1))
    model.config.reward_bias = 0.0
    return disable_dropout(model)


def AutoConfig_of(path: str | Path):
    """The config of a model directory or hub id."""
    return _load(AutoConfig, path)


def _load(auto_class, path: str | Path, **kwargs):
    """`from_pretrained` that never runs a repository's code and says plainly what is missing."""
    try:
        return auto_class.from_pretrained(str(path), trust_remote_code=False, **kwargs)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{path}: cannot load ({auto_class.__name__}): {reason}\n"
            "Give a directory made by save_pretrained, or a hub id while the hub is reachable."
        ) from error


def fit_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the model agree with the tokenizer on size, padding and end."""
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    for config in (model.config, getattr(model, "generation_config", None)):
        if config is not None:
            config.pad_token_id = tokenizer.pad_token_id
            config.eos_token_id = tokenizer.eos_token_id


def disable_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Turn off dropout in modules, in attention functions and in the config that rebuilds them.

    Zeroing `nn.Dropout` misses floats such as `attention_dropout` that attention code reads at each
    call (LLaMA-Factory#10779).
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    for name, value in model.config.to_dict().items():
        if isinstance(value, float) and (name.endswith(("dropout", "pdrop", "dropout_rate"))):
            setattr(model.config, name, 0.0)
    return model


# --- adapters -----------------------------------------------------------------------------------


def add_lora(model: PreTrainedModel, lora: Lora | None, task: str) -> Model:
    """Wrap in a peft LoRA model (`task` CAUSAL_LM or SEQ_CLS), or return the model as it is.

    A sequence classifier's head trains in full beside its adapters.
    """
    if lora is None:
        return model
    from peft import LoraConfig, get_peft_model  # slow to import, and only LoRA runs need it

    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        exclude_modules=["score"] if task == "SEQ_CLS" else None,
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
        task_type=task,
    )
    return get_peft_model(model, config)


def merged(model: Model) -> Model:
    """A plain transformers model: adapters folded into the weights they adapt."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


@contextlib.contextmanager
def adapter_off(model: Model) -> Iterator[None]:
    """Within, a LoRA policy is its own reference."""
    with model.disable_adapter():
        yield


# --- forward passes -----------------------------------------------------------------------------


def accepts(model: Model, argument: str) -> bool:
    """Whether the model's forward takes an argument (peft wrappers are looked through)."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return argument in inspect.signature(inner.forward).parameters


def response_logits(model: Model, ids: Tensor, attention_mask: Tensor, width: int) -> Tensor:
    """Logits that *predict* the last `width` tokens: ids (B, L) -> (B, width, V).

    The logits at position t predict token t + 1, so they are read at [-width-1 : -1].
    """
    kwargs: dict[str, Any] = _positions(model, attention_mask)
    if accepts(model, "logits_to_keep"):
        kwargs["logits_to_keep"] = width + 1
    logits = model(input_ids=ids, attention_mask=attention_mask, use_cache=False, **kwargs).logits
    return logits[:, -width - 1 : -1]


def score_head(model: Model) -> nn.Linear:
    """The linear layer of a decoder-only classifier that turns a hidden state into its score."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if _scores_hidden_states(inner):
        head = inner.score
        return getattr(head, "modules_to_save", {"default": head})["default"]  # peft's copy, if any
    raise UserError(
        f"{type(inner).__name__}: no linear `score` head on its last hidden state; "
        "use a decoder-only sequence classifier (Llama, Qwen, GPT-2, GPT-NeoX, ...)"
    )


def _scores_hidden_states(model: Model) -> bool:
    """Whether the score is a linear function of one token's last hidden state, as in decoders."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = getattr(inner, "score", None)
    return isinstance(getattr(head, "modules_to_save", {"default": head})["default"], nn.Linear)


def token_scores(model: Model, ids: Tensor, attention_mask: Tensor) -> Tensor:
    """A sequence classifier's head at *every* token, less its stored bias; (B, L) -> (B, L)."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    trunk = getattr(inner, inner.base_model_prefix)
    kwargs = _positions(trunk, attention_mask)
    hidden = trunk(input_ids=ids, attention_mask=attention_mask, use_cache=False, **kwargs)
    scores = score_head(model)(hidden.last_hidden_state).squeeze(-1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return scores - getattr(inner.config, "reward_bias", 0.0)


def _positions(model: Model, attention_mask: Tensor) -> dict[str, Tensor]:
    return {"position_ids": position_ids(attention_mask)} if accepts(model, "position_ids") else {}


def score_sequences(
    model: Model, sequences: list[list[int]], pad_token_id: int, batch_size: int = 64
) -> list[float]:
    """Score of each sequence (prompt ids + response ids), read at its last token.

    The last token is known from the carried length, not from `ids != pad`, so pad == eos is safe.
    A classifier that pools otherwise (an encoder such as DeBERTa) scores the sequence its own way.
    """
    device = next(model.parameters()).device
    scores: list[float] = []
    for start in range(0, len(sequences), batch_size):
        rows = [torch.tensor(ids) for ids in sequences[start : start + batch_size]]
        lengths = torch.tensor([len(row) for row in rows])
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        with torch.no_grad():
            if _scores_hidden_states(model):
                every = token_scores(model, ids.to(device), mask.to(device))
                last = (lengths - 1).to(device)
                scores += every[torch.arange(len(rows), device=device), last].tolist()
            else:
                logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
                scores += logits[:, 0].tolist()
    return scores
