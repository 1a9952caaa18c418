"""What a model says of responses (`Sequences`): log-probabilities, hidden states, scores.

Which of a model's outputs predict a response's tokens is decided by its layout, `pipeline.models.causal` or
`pipeline.models.encoder_decoder`, and nowhere else.
"""

import contextlib
import functools
import weakref
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from pipeline.errors import UserError
from pipeline.models import causal, encoder_decoder
from pipeline.models.adapters import AdapterScorer
from pipeline.models.packing import Model, inner
from pipeline.models.sequences import Sequences
from pipeline.models.tokens import OfLogits, in_slices, logprobs_and_entropy, right_pad
from pipeline.process.progress import tracked

# --- of responses -----------------------------------------------------------------------------------


def layout(model: Model) -> ModuleType:
    """How the model reads prompts and responses: `logits`, `logits_and_hidden`, `hidden`, `hidden_at_end`."""
    return encoder_decoder if encoder_decoder.is_encoder_decoder(model) else causal


def response_logprobs(model: Model, s: Sequences, temperature: float) -> Tensor:
    """log pi of the responses' tokens at a temperature; (B, T), 0 on padding."""
    of = functools.partial(logprobs_and_entropy, temperature=temperature, entropy_grad=False)
    (logprobs, _), _ = of_predictions(model, s, of)
    return spread(logprobs, s.response_mask)


def of_predictions(
    model: Model, s: Sequences, of: OfLogits, hidden: bool = False
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """What `of` makes of the logits (n, V) that predict the n real tokens of the responses, row by row,
    and if asked for the last hidden states (n, d) they come from.

    Where they would be more than `LOGITS_AT_ONCE` they are never all in memory, forward or backward:
    the head is taken out of the model's pass and works on a few rows at a time. A model that does
    something else with what its head puts out (soft caps, scales) is found out by its first row.
    """
    passes, ids = layout(model), s.responses[s.response_mask]
    bare = inner(model)
    head, bias = bare.get_output_embeddings(), getattr(bare, "final_logits_bias", None)

    def run() -> tuple[Tensor, Tensor | None]:
        return passes.logits_and_hidden(model, s) if hidden else (passes.logits(model, s), None)

    def biased(x: Tensor) -> Tensor:
        return x if bias is None else x + bias

    rows = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
    if len(ids) > rows and bare not in _MORE_THAN_A_HEAD:
        with _first_row_alone(head) as seen:
            logits, states = run()
        inputs, first = seen
        first = biased(first).to(logits.dtype).view_as(logits)
        if torch.allclose(first, logits, rtol=0.0, atol=0.0, equal_nan=True):
            trains = any(p.requires_grad for p in head.parameters())
            out = in_slices(lambda x: biased(head(x)), trains, inputs, ids, of, rows)
            return out, states
        _MORE_THAN_A_HEAD.add(bare)
    logits, states = run()
    return of(logits, ids), states


LOGITS_AT_ONCE = 2**24
"""Floats of logits in memory at a time (64 MiB)."""
_MORE_THAN_A_HEAD = weakref.WeakSet[nn.Module]()


@contextlib.contextmanager
def _first_row_alone(head: nn.Module) -> Iterator[list[Tensor]]:
    """Within, a head computes of its first row alone; what it was given (n, d) and that row's logits."""
    seen = list[Tensor]()

    def first(_: nn.Module, states: tuple[Tensor]) -> tuple[Tensor]:
        seen.append(states[0].flatten(end_dim=-2))
        return (states[0][..., :1, :],)

    before = head.register_forward_pre_hook(first)
    after = head.register_forward_hook(lambda _, __, out: seen.append(out))
    with before, after:
        yield seen


def response_scores(model: Model, s: Sequences) -> Tensor:
    """A sequence classifier's scores (B, T) where the responses' tokens are predicted; 0 on padding."""
    with _active(model):
        return spread(_scores(model, layout(model).hidden(model, s)), s.response_mask)


def final_scores(model: Model, s: Sequences) -> Tensor:
    """A sequence classifier's scores (B,) of whole responses, read at their last tokens."""
    with _active(model):
        return _scores(model, layout(model).hidden_at_end(model, s))


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


def _active(model: Model) -> contextlib.AbstractContextManager[None]:
    return model.active() if isinstance(model, AdapterScorer) else contextlib.nullcontext()


def _scores(model: Model, hidden: Tensor) -> Tensor:
    """The head's numbers (n,) for hidden states (n, d), less the stored bias."""
    scores = in_full(score_head(model), hidden).squeeze(-1)
    shared = isinstance(model, AdapterScorer)
    return scores - (model.reward_bias if shared else reward_bias(inner(model).config))


def in_full(head: nn.Linear, hidden: Tensor) -> Tensor:
    """A scalar head's numbers (n, 1) in float32 at least, whatever its trunk (n, d) computes in."""
    out = head(hidden.to(head.weight.dtype))
    return out.to(torch.promote_types(out.dtype, torch.float32))


def reward_bias(config: PreTrainedConfig) -> float:
    """What is taken off a reward model's scores, so that demonstrations average 0."""
    return getattr(config, "reward_bias", 0.0)


def fold_bias(model: Model) -> bool:
    """Take a reward model's stored bias off a bias of its head, or of the norm before it, so that the logits
    of any program are the scores; whether there is such a bias (GPT-2, GPT-NeoX, OPT, Phi; not Llama, Qwen).
    """
    bias, head, ids = reward_bias(model.config), score_head(model), torch.arange(1, 9)[None]
    norms = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm) and not any(map(str.isdigit, name.split(".")))
    ]
    place = head if head.bias is not None else norms[-1] if norms else None
    if place is None or place.bias is None or place.bias.shape[0] not in head.weight.shape:
        return False
    with torch.no_grad():
        before, kept = model(ids).logits, place.bias.clone()
        step = head.weight[0] / head.weight[0].square().sum()  # moves the head's number by one
        place.bias.sub_(bias * (1.0 if place is head else step))
        if not torch.allclose(model(ids).logits, before - bias, atol=1e-3):
            place.bias.copy_(kept)  # something stands between the norm and the head
            return False
    model.config.reward_bias = 0.0
    return True


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
    linear = _scores_hidden_states(model)
    for prompt, response in (
        zip(map(len, prompts), map(len, responses), strict=True) if linear else ()
    ):
        if response > layout(model).room(model, prompt):
            raise UserError(
                f"a reward model for {causal.places(model)} tokens, and {prompt} and {response} to score"
            )
    scores: list[float] = []
    for start in tracked(range(0, len(prompts), batch_size), progress):
        rows = slice(start, start + batch_size)
        with torch.no_grad():
            if linear:
                s = Sequences.of(prompts[rows], responses[rows], pad_token_id)
                scores += final_scores(model, s.to(device)).tolist()
            else:
                pairs = zip(prompts[rows], responses[rows], strict=True)
                ids, mask = right_pad([before + after for before, after in pairs], pad_token_id)
                logits = model(
                    input_ids=ids.to(device), attention_mask=mask.long().to(device)
                ).logits
                scores += logits[:, 0].tolist()
    return scores
