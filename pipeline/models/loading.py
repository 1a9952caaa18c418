"""The four models of RLHF: policy, reference, reward model and value network.

All are plain transformers models; what is published loads with `AutoModelForCausalLM` or
`AutoModelForSequenceClassification`. Dropout is off everywhere: a policy that samples with one mask
and trains with another is not on-policy (invariant 2).
"""

import contextlib
import inspect
import math
import warnings
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
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pipeline.data.template import prepare_tokenizer
from pipeline.errors import UserError
from pipeline.models.adapters import AdapterScorer
from pipeline.models.packing import Model, inner, pack, pack_if_possible, packs, trunk
from pipeline.ppo.maths import logprobs_and_entropy, position_ids
from pipeline.process import memory
from pipeline.process.progress import tracked

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
    return _ready(model)


def load_reward(path: str | Path) -> PreTrainedModel:
    """Sequence classifier with one output, float32, dropout off."""
    model = _load(AutoModelForSequenceClassification, path, dtype=torch.float32)
    if model.config.num_labels != 1:
        raise UserError(
            f"{path}: a reward model has num_labels 1, this has {model.config.num_labels}"
        )
    return _ready(model)


def reward_from_policy(path: str | Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The policy's trunk with a fresh scalar head, drawn with std 1/sqrt(d + 1) (arXiv 2403.17031).

    Draws from the global generator: seed it first.
    """
    model = _load(AutoModelForSequenceClassification, path, num_labels=1, dtype=torch.float32)
    fit_tokenizer(model, tokenizer)
    head = score_head(model)
    nn.init.normal_(head.weight, std=1 / math.sqrt(head.in_features + 1))
    model.config.reward_bias = 0.0
    return _ready(model)


def _ready(model: PreTrainedModel) -> PreTrainedModel:
    disable_dropout(model)
    pack_if_possible(model)
    return model


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


# --- forward passes -----------------------------------------------------------------------------
#
# Batches come padded, (B, W) ids and their mask, with real tokens of a row side by side. Models that
# can be packed (see `pipeline.models.packing`) see the real tokens alone.


def accepts(model: Model, argument: str) -> bool:
    """Whether the model's forward takes an argument (peft wrappers are looked through)."""
    return argument in inspect.signature(inner(model).forward).parameters


def predicting(mask: Tensor, width: int) -> Tensor:
    """Where the real ones of the last `width` tokens are predicted: (B, W) -> (B, W) bool.

    The output at position t predicts token t + 1.
    """
    where = torch.zeros_like(mask, dtype=torch.bool)
    where[:, -width - 1 : -1] = mask[:, -width:].bool()
    return where


def needed(mask: Tensor, where: Tensor) -> Tensor:
    """The real tokens that outputs at `where` come from, (B, W) bool: none after a row's last of them.

    What predicts a response never reads its last token. A row of which nothing is asked stays whole.
    """
    upto = where.flip(1).cumsum(1).flip(1) > 0
    return mask.bool() & (upto | ~where.any(dim=1, keepdim=True))


def logits_at(model: Model, ids: Tensor, mask: Tensor, where: Tensor) -> Tensor:
    """Logits (n, V) at the n positions of `where` (B, W), row by row."""
    return _output_at(model, ids, mask, where)[0]


def logits_and_hidden_at(
    model: Model, ids: Tensor, mask: Tensor, where: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits (n, V) and the last hidden states (n, d) they come from."""
    logits, out = _output_at(model, ids, mask, where, output_hidden_states=True)
    hidden = out.hidden_states[-1]
    return logits, hidden.squeeze(0)[where[needed(mask, where)]] if packs(model) else hidden[where]


def _output_at(
    model: Model, ids: Tensor, mask: Tensor, where: Tensor, **kwargs: Any
) -> tuple[Tensor, Any]:
    """Logits (n, V) at the positions of `where` (B, W), and the model's whole output."""
    if packs(model):
        packed = pack(ids, needed(mask, where))
        out = model(**packed.inputs(), logits_to_keep=packed.index[where], **kwargs)
        return out.logits.squeeze(0), out
    first = int(where.any(dim=0).int().argmax())  # before it no logits are needed
    if accepts(model, "logits_to_keep"):
        kwargs["logits_to_keep"] = where.shape[1] - first
    kwargs |= _positions(model, mask)
    out = model(input_ids=ids, attention_mask=mask, use_cache=False, **kwargs)
    return out.logits[:, first - where.shape[1] :][where[:, first:]], out


def hidden_at(model: Model, ids: Tensor, mask: Tensor, where: Tensor) -> Tensor:
    """Last hidden states (n, d) at the n positions of `where` (B, W), row by row."""
    body = trunk(model)
    if packs(model):
        packed = pack(ids, needed(mask, where))
        return body(**packed.inputs()).last_hidden_state.squeeze(0)[packed.index[where]]
    out = body(input_ids=ids, attention_mask=mask, use_cache=False, **_positions(body, mask))
    return out.last_hidden_state[where]


def response_logprobs(
    model: Model, ids: Tensor, mask: Tensor, width: int, temperature: float
) -> Tensor:
    """log pi of the last `width` tokens at a temperature; (B, W) -> (B, width), 0 on padding."""
    logits = logits_at(model, ids, mask, predicting(mask, width))
    real = mask[:, -width:].bool()
    tokens = ids[:, -width:][real]
    return spread(logprobs_and_entropy(logits, tokens, temperature, False)[0], real)


def spread(flat: Tensor, real: Tensor) -> Tensor:
    """(n,) numbers onto the n true places of `real` (B, T), row by row; 0 elsewhere."""
    return flat.new_zeros(real.shape).masked_scatter(real, flat)


def score_head(model: Model) -> nn.Linear:
    """The linear layer of a decoder-only classifier that turns a hidden state into its score."""
    bare = _scorer(model)
    if _scores_hidden_states(model):
        head = bare.score
        return getattr(head, "modules_to_save", {"default": head})["default"]  # peft's copy, if any
    raise UserError(
        f"{type(bare).__name__}: no linear `score` head on its last hidden state; "
        "use a decoder-only sequence classifier (Llama, Qwen, GPT-2, GPT-NeoX, ...)"
    )


def _scorer(model: Model) -> Model:
    return model if isinstance(model, AdapterScorer) else inner(model)


def _scores_hidden_states(model: Model) -> bool:
    """Whether the score is a linear function of one token's last hidden state, as in decoders."""
    head = getattr(_scorer(model), "score", None)
    return isinstance(getattr(head, "modules_to_save", {"default": head})["default"], nn.Linear)


def scores_at(model: Model, ids: Tensor, mask: Tensor, where: Tensor) -> Tensor:
    """A sequence classifier's head, less its stored bias, at the n positions of `where`; (n,)."""
    shared = isinstance(model, AdapterScorer)
    with model.active() if shared else contextlib.nullcontext():
        hidden = hidden_at(model, ids, mask, where)
    scores = score_head(model)(hidden).squeeze(-1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return scores - (model.reward_bias if shared else reward_bias(inner(model).config))


def reward_bias(config: PreTrainedConfig) -> float:
    """What is taken off a reward model's scores, so that demonstrations average 0."""
    return getattr(config, "reward_bias", 0.0)


def last_real(mask: Tensor) -> Tensor:
    """(B, W) -> (B, W) bool, True on the last real token of each row."""
    after = nn.functional.pad(mask[:, 1:].bool(), (0, 1))
    return mask.bool() & ~after


def _positions(model: Model, mask: Tensor) -> dict[str, Tensor]:
    return {"position_ids": position_ids(mask)} if accepts(model, "position_ids") else {}


def score_sequences(
    model: Model,
    sequences: list[list[int]],
    pad_token_id: int,
    batch_size: int = 64,
    progress: str | None = None,
) -> list[float]:
    """Score of each sequence (prompt ids + response ids), read at its last token; `progress` names
    its bar.

    The last token is known from the carried length, not from `ids != pad`, so pad == eos is safe.
    A classifier that pools otherwise (an encoder such as DeBERTa) scores the sequence its own way.
    """
    device = next(model.parameters()).device
    scores: list[float] = []
    for start in tracked(range(0, len(sequences), batch_size), progress):
        rows = [torch.tensor(ids) for ids in sequences[start : start + batch_size]]
        lengths = torch.tensor([len(row) for row in rows])
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        with torch.no_grad():
            if _scores_hidden_states(model):
                ids, mask = ids.to(device), mask.to(device)
                scores += scores_at(model, ids, mask, last_real(mask)).tolist()
            else:
                logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
                scores += logits[:, 0].tolist()
    return scores
