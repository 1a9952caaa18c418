"""Forward passes: what a model says of responses (`Sequences`), and scores of whole texts.

Which of a model's outputs predict a response's tokens is decided here and nowhere else.
"""

import contextlib
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from pipeline.errors import UserError
from pipeline.models.adapters import AdapterScorer
from pipeline.models.packing import Model, inner, pack, packs, trunk
from pipeline.models.sequences import Sequences
from pipeline.models.tokens import logprobs_and_entropy, position_ids, right_pad
from pipeline.process.progress import tracked

# --- of responses -----------------------------------------------------------------------------------


def response_logits(model: Model, s: Sequences) -> Tensor:
    """Logits (n, V) that predict the n real tokens of the responses, row by row."""
    ids, mask = _joined(s)
    return logits_at(model, ids, mask, predicting(mask, s.responses.shape[1]))


def response_logits_and_hidden(model: Model, s: Sequences) -> tuple[Tensor, Tensor]:
    """Those, and the last hidden states (n, d) they come from."""
    ids, mask = _joined(s)
    return logits_and_hidden_at(model, ids, mask, predicting(mask, s.responses.shape[1]))


def response_hidden(model: Model, s: Sequences) -> Tensor:
    """Last hidden states (n, d) where the responses' tokens are predicted."""
    ids, mask = _joined(s)
    return hidden_at(model, ids, mask, predicting(mask, s.responses.shape[1]))


def response_scores(model: Model, s: Sequences) -> Tensor:
    """A sequence classifier's scores (B, T) where the responses' tokens are predicted; 0 on padding."""
    ids, mask = _joined(s)
    scores = scores_at(model, ids, mask, predicting(mask, s.responses.shape[1]))
    return spread(scores, s.response_mask)


def response_logprobs(model: Model, s: Sequences, temperature: float) -> Tensor:
    """log pi of the responses' tokens at a temperature; (B, T), 0 on padding."""
    tokens = s.responses[s.response_mask]
    logprobs, _ = logprobs_and_entropy(response_logits(model, s), tokens, temperature, False)
    return spread(logprobs, s.response_mask)


def _joined(s: Sequences) -> tuple[Tensor, Tensor]:
    """What a causal model reads: prompt and response side by side, ids (B, Q + T) and their mask.

    An encoder-decoder enters here and in the functions above: the queries, right-padded, go to its
    encoder, its decoder reads a start token and the responses, and outputs predict where they stand.
    """
    ids = torch.cat([s.queries, s.responses], dim=1)
    return ids, torch.cat([s.query_mask, s.response_mask], dim=1).long()


# --- of a padded batch, (B, W) ids and their mask, real tokens of a row side by side ----------------
#
# Models that can be packed (see `pipeline.models.packing`) see the real tokens alone.


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
    prompts: list[list[int]],
    responses: list[list[int]],
    pad_token_id: int,
    batch_size: int = 64,
    progress: str | None = None,
) -> list[float]:
    """Score of each response to its prompt (lists of ids), read at its last token; `progress` names its
    bar.

    The last token is known from the carried length, not from `ids != pad`, so pad == eos is safe.
    A classifier that pools otherwise (an encoder such as DeBERTa) scores the sequence its own way.
    """
    device = next(model.parameters()).device
    sequences = [before + after for before, after in zip(prompts, responses, strict=True)]
    scores: list[float] = []
    for start in tracked(range(0, len(sequences), batch_size), progress):
        ids, real = right_pad(sequences[start : start + batch_size], pad_token_id)
        mask = real.long()
        with torch.no_grad():
            if _scores_hidden_states(model):
                ids, mask = ids.to(device), mask.to(device)
                scores += scores_at(model, ids, mask, last_real(mask)).tolist()
            else:
                logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
                scores += logits[:, 0].tolist()
    return scores
