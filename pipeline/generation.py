"""Sampling responses with transformers' own `generate`, token in and token out."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from pipeline.errors import UserError
from pipeline.models import Model
from pipeline.ppo.maths import response_lengths


@dataclass
class Response:
    """One generated response: its real tokens (EOS included if it ended), its text, whether it ended."""

    ids: list[int]
    text: str
    ended: bool


def stop_ids(tokenizer: PreTrainedTokenizerBase, stop_tokens: list[str]) -> list[int]:
    """EOS and the configured stop tokens as ids; a stop string must be one token."""
    ids = [tokenizer.eos_token_id]
    for token in stop_tokens:
        encoded = tokenizer.encode(token, add_special_tokens=False)
        if len(encoded) != 1:
            raise UserError(
                f"stop_tokens: {token!r} is {len(encoded)} tokens of this tokenizer, not 1"
            )
        ids += encoded
    return list(dict.fromkeys(ids))


def left_pad(sequences: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Lists of ids -> ids (B, Q), left-padded, and a bool mask of the real ones."""
    width = max(len(ids) for ids in sequences)
    ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in sequences])
    lengths = torch.tensor([len(row) for row in sequences])
    return ids, torch.arange(width)[None, :] >= width - lengths[:, None]


@torch.no_grad()
def sample(
    model: Model,
    queries: Tensor,
    query_mask: Tensor,
    *,
    max_new_tokens: int,
    temperature: float,
    stop: list[int],
    pad_id: int,
    greedy: bool = False,
) -> Tensor:
    """Responses (B, T) of ids to left-padded queries (B, Q); after a stop token comes padding.

    Plain sampling from softmax(logits / temperature): no top-k, no top-p, no penalties (trl#6789).
    Draws from torch's global generator and never seeds it.
    """
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=not greedy,
        temperature=None if greedy else temperature,
        top_k=None if greedy else 0,
        top_p=None if greedy else 1.0,
        eos_token_id=stop,
        pad_token_id=pad_id,
    )
    # generate() fills unset fields from the model's own config, so that one must be bare too
    kept, model.generation_config = model.generation_config, config
    try:
        full = model.generate(
            input_ids=queries, attention_mask=query_mask.long(), generation_config=config
        )
    finally:
        model.generation_config = kept
    return full[:, queries.shape[1] :]


def generate(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    stop_tokens: tuple[str, ...] = (),
    batch_size: int = 64,
    greedy: bool = False,
) -> list[Response]:
    """One response to each tokenised prompt, in the order of the prompts."""
    device = next(model.parameters()).device
    stop = stop_ids(tokenizer, list(stop_tokens))
    pad_id = int(tokenizer.pad_token_id)  # type: ignore[arg-type]
    out: list[Response] = []
    for start in range(0, len(prompts), batch_size):
        queries, mask = left_pad(prompts[start : start + batch_size], pad_id)
        responses = sample(
            model,
            queries.to(device),
            mask.to(device),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            stop=stop,
            pad_id=pad_id,
            greedy=greedy,
        ).cpu()
        lengths, ended = response_lengths(responses, stop)
        for row, length, end in zip(
            responses.tolist(), lengths.tolist(), ended.tolist(), strict=True
        ):
            ids = row[:length]
            text = tokenizer.decode(ids, skip_special_tokens=True)
            out.append(Response(ids, text, end))
    return out
