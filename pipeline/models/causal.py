"""A causal model's passes: prompt and response side by side, padded or packed.

ids (B, W) and their mask hold the real tokens of a row without a gap; models that can be packed (see
`pipeline.models.packing`) see the real tokens alone.
"""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pipeline.models.packing import Model, inner, pack, packs, trunk
from pipeline.models.sequences import Sequences
from pipeline.models.tokens import position_ids

# --- of responses (see `pipeline.models.forward`) ---------------------------------------------------


def logits(model: Model, s: Sequences) -> Tensor:
    """Logits (n, V) that predict the n real tokens of the responses, row by row."""
    ids, mask = joined(s)
    return logits_at(model, ids, mask, predicting(mask, s.responses.shape[1]))


def logits_and_hidden(model: Model, s: Sequences) -> tuple[Tensor, Tensor]:
    """Those, and the last hidden states (n, d) they come from."""
    ids, mask = joined(s)
    where = predicting(mask, s.responses.shape[1])
    logits, hidden = _output_at(model, ids, mask, where, output_hidden_states=True)
    assert hidden is not None
    return logits, hidden


def hidden(model: Model, s: Sequences) -> Tensor:
    """Last hidden states (n, d) where the responses' tokens are predicted."""
    ids, mask = joined(s)
    return hidden_at(model, ids, mask, predicting(mask, s.responses.shape[1]))


def hidden_at_end(model: Model, s: Sequences) -> Tensor:
    """Last hidden states (B, d) at the last real token of each row."""
    ids, mask = joined(s)
    return hidden_at(model, ids, mask, last_real(mask))


def room(model: Model, prompt: int) -> int:
    """Tokens that a response to a prompt of so many may have; a great many if the model does not say."""
    return places(model) - prompt


def places(model: Model) -> int:
    """Tokens of the longest text that the model was made for; a great many if it does not say."""
    config = inner(model).config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or sys.maxsize


def joined(s: Sequences) -> tuple[Tensor, Tensor]:
    """Prompt and response side by side, ids (B, Q + T) and their mask."""
    ids = torch.cat([s.queries, s.responses], dim=1)
    return ids, torch.cat([s.query_mask, s.response_mask], dim=1).long()


# --- of a padded batch ------------------------------------------------------------------------------


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


def last_real(mask: Tensor) -> Tensor:
    """(B, W) -> (B, W) bool, True on the last real token of each row."""
    after = nn.functional.pad(mask[:, 1:].bool(), (0, 1))
    return mask.bool() & ~after


def needed(mask: Tensor, where: Tensor) -> Tensor:
    """The real tokens that outputs at `where` come from, (B, W) bool: none after a row's last of them.

    What predicts a response never reads its last token. A row of which nothing is asked stays whole.
    """
    upto = where.flip(1).cumsum(1).flip(1) > 0
    return mask.bool() & (upto | ~where.any(dim=1, keepdim=True))


def logits_at(model: Model, ids: Tensor, mask: Tensor, where: Tensor) -> Tensor:
    """Logits (n, V) at the n positions of `where` (B, W), row by row."""
    return _output_at(model, ids, mask, where)[0]


def _output_at(
    model: Model, ids: Tensor, mask: Tensor, where: Tensor, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Logits (n, V) at the positions of `where` (B, W), and if asked for the last hidden states (n, d)."""
    if packs(model):
        packed = pack(ids, needed(mask, where))
        at = packed.index[where]
        out = model(**packed.inputs(), logits_to_keep=at, **kwargs)
        return out.logits.squeeze(0), out.hidden_states[-1][0, at] if kwargs else None
    with head_at(inner(model), lambda states: states[where]):
        out = model(
            input_ids=ids,
            attention_mask=mask,
            use_cache=False,
            **_positions(model, mask),
            **kwargs,
        )
    return out.logits, out.hidden_states[-1][where] if kwargs else None


def head_at(bare: Model, pick: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Within, the vocabulary's head sees what `pick` takes, (n, d), of the states (B, W, d) it is given;
    a model's own scaling and bias stay in force."""
    return bare.get_output_embeddings().register_forward_pre_hook(
        lambda _, states: (pick(states[0]),), prepend=True
    )


def hidden_at(model: Model, ids: Tensor, mask: Tensor, where: Tensor) -> Tensor:
    """Last hidden states (n, d) at the n positions of `where` (B, W), row by row."""
    body = trunk(model)
    if packs(model):
        packed = pack(ids, needed(mask, where))
        return body(**packed.inputs()).last_hidden_state.squeeze(0)[packed.index[where]]
    out = body(input_ids=ids, attention_mask=mask, use_cache=False, **_positions(body, mask))
    return out.last_hidden_state[where]


def _positions(model: Model, mask: Tensor) -> dict[str, Tensor]:
    return {"position_ids": position_ids(mask)} if accepts(model, "position_ids") else {}
