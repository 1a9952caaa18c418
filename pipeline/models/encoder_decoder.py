"""An encoder-decoder's passes: its encoder reads prompts, its decoder writes the responses.

The decoder reads a prefix and the response: the prefix is the token that decoding starts from and,
where a model forces one, the first of the text (BART's `<s>`, mBART's language). It is never derived from
labels, nor masks from `ids != pad`, for with several of these models padding is the start token.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.data.literals import around
from pipeline.errors import UserError
from pipeline.models.causal import head_at, places
from pipeline.models.packing import Model, inner
from pipeline.models.sequences import Sequences
from pipeline.models.tokens import to_the_left

KINDS = ("bart", "mbart", "m2m_100", "marian", "pegasus", "t5", "mt5", "umt5")
"""`model_type` of those that went through all stages; others differ in what their passes take and give."""


def is_encoder_decoder(model: Model) -> bool:
    """Whether the model is one (peft wrappers are looked through)."""
    return inner(model).config.is_encoder_decoder


def decoder_prefix(config: PreTrainedConfig) -> list[int]:
    """What the decoder reads before any response."""
    return getattr(config, "decoder_prefix", None) or [config.decoder_start_token_id]


def one_table(model: Model) -> bool:
    """Whether encoder and decoder look words up in the same embeddings."""
    sides = (inner(model).get_encoder(), inner(model).get_decoder())
    one, other = (side.get_input_embeddings().weight for side in sides)
    return one is other


def set_decoder_prefix(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Note in the model's config what its decoder reads before a response: the start token, and what the
    tokenizer puts before a text that a decoder writes. `generate` is told the same.

    UserError for a model that writes several languages and was told none.
    """
    told, config = getattr(model, "generation_config", None), model.config
    language = getattr(tokenizer, "tgt_lang", None)
    if getattr(config, "decoder_prefix", None) is None or language:
        if hasattr(tokenizer, "tgt_lang") and language is None:
            raise UserError(
                "target_language: this tokenizer has several; give one, such as de_DE (and source_language)"
            )
        before, after = around(tokenizer, target=True)
        if after and after[-1] != tokenizer.eos_token_id:
            config.decoder_prefix = after[
                -1:
            ]  # mBART begins with the language, which its labels end in
        else:
            start = _first_told("decoder_start_token_id", told, config)
            if start is None:
                raise UserError(
                    f"{type(model).__name__}: its config names no decoder_start_token_id"
                )
            forced = _first_told("forced_bos_token_id", told, config)
            config.decoder_prefix = [start, *(before or ([] if forced is None else [forced]))]
    if told is not None:
        start, *rest = config.decoder_prefix
        told.decoder_start_token_id, told.forced_bos_token_id = start, rest[0] if rest else None


def _first_told(name: str, *configs: Any) -> int | None:
    values = (getattr(config, name, None) for config in configs)
    return next((value for value in values if value is not None), None)


# --- of responses (see `pipeline.models.forward`) ---------------------------------------------------


def logits(model: Model, s: Sequences) -> Tensor:
    """Logits (n, V) that predict the n real tokens of the responses, row by row."""
    return logits_and_hidden(model, s)[0]


def logits_and_hidden(model: Model, s: Sequences) -> tuple[Tensor, Tensor]:
    """Those, and the decoder's last hidden states (n, d) they come from."""
    bare, states = inner(model), list[Tensor]()
    kept = bare.get_decoder().register_forward_hook(lambda _, __, out: states.append(out[0]))
    with kept, head_at(bare, lambda all_of: _of_responses(all_of, s.response_mask)):
        read = embedded(model, _decoder_ids(bare, s)[:, :-1])
        out = model(**_encoder_inputs(s), decoder_inputs_embeds=read, use_cache=False)
    return out.logits, _of_responses(states[0], s.response_mask)


def hidden(model: Model, s: Sequences) -> Tensor:
    """The decoder's last hidden states (n, d) where the responses' tokens are predicted."""
    bare = inner(model)
    states = _decoded(bare, s, _decoder_ids(bare, s)[:, :-1])
    return _of_responses(states, s.response_mask)


def hidden_at_end(model: Model, s: Sequences) -> Tensor:
    """The decoder's last hidden states (B, d) at the last real token that it reads."""
    bare = inner(model)
    ids = _decoder_ids(bare, s)
    last = s.response_mask.sum(dim=1) + ids.shape[1] - s.responses.shape[1] - 1
    return _decoded(bare, s, ids)[torch.arange(len(s), device=last.device), last]


def room(model: Model, prompt: int) -> int:
    """Tokens that a response to a prompt of so many may have: encoder and decoder have places of their own."""
    size = places(model)
    return size - len(decoder_prefix(inner(model).config)) if prompt <= size else 0


def _of_responses(states: Tensor, mask: Tensor) -> Tensor:
    """Of states (B, p - 1 + T, d), those that predict the real tokens (B, T) of responses; (n, d)."""
    return states[:, states.shape[1] - mask.shape[1] :][mask]


def _decoded(bare: Model, s: Sequences, ids: Tensor) -> Tensor:
    """The decoder's last hidden states (B, W, d) of its input ids (B, W)."""
    inputs = _encoder_inputs(s)
    read = bare.get_encoder()(**inputs).last_hidden_state
    decoder = bare.get_decoder()
    return decoder(
        inputs_embeds=embedded(bare, ids),
        encoder_hidden_states=read,
        encoder_attention_mask=inputs["attention_mask"],
        use_cache=False,
    ).last_hidden_state


def embedded(model: Model, ids: Tensor) -> Tensor:
    """What stands for the decoder's ids (B, W); (B, W, d).

    Of ids M2M100 would not count those of padding, which may be sampled as any other, and so see other
    places in a whole response than it saw token by token.
    """
    return inner(model).get_decoder().get_input_embeddings()(ids)


def _encoder_inputs(s: Sequences) -> dict[str, Tensor]:
    """Prompts, right-padded: most of these models count positions from the first column."""
    ids, mask = to_the_left(s.queries, s.query_mask)
    return {"input_ids": ids, "attention_mask": mask.long()}


def _decoder_ids(bare: Model, s: Sequences) -> Tensor:
    """The prefix and the responses, (B, p + T). Padding stands after all that is real, and a decoder never
    looks ahead, so no mask is needed."""
    prefix = torch.tensor(decoder_prefix(bare.config), device=s.responses.device)
    return torch.cat([prefix.expand(len(s), -1), s.responses], dim=1)
