"""Sampling responses, token in and token out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.data.template import response_text
from pipeline.errors import UserError
from pipeline.models.causal import places
from pipeline.models.decoding import decoder, survivors
from pipeline.models.forward import layout
from pipeline.models.packing import Model, inner
from pipeline.models.tokens import left_pad, logprobs_of, pad_id, scaled
from pipeline.process.progress import tracked


@dataclass
class Response:
    """One generated response: its real tokens (EOS included if it ended), its text, whether it ended."""

    ids: list[int]
    text: str
    ended: bool


@dataclass
class Sampled:
    """B sampled responses of at most T tokens."""

    responses: Tensor  # (B, T) ids, padding after the end
    lengths: Tensor  # (B,) real tokens, the stop token included
    ended: Tensor  # (B,) bool, by a stop token or a stop string
    logprobs: Tensor  # (B, T) log pi of the tokens as they were drawn, 0 on padding


@dataclass
class Stop:
    """What ends a response: token ids, and strings looked for in its text."""

    ids: list[int]
    strings: list[str]
    tokenizer: PreTrainedTokenizerBase

    def hits(self, responses: Tensor) -> Tensor:
        """Which of B responses (B, t) their newest token ends, by its id or by the text of the last ones; (B,) bool."""
        newest = responses[:, -1]
        hit = torch.isin(newest, torch.tensor(self.ids, device=newest.device))
        for string in self.strings:
            tails = responses[:, -len(string.encode()) - 4 :].tolist()
            found = [self._says(tail, string) for tail in tails]
            hit = hit | torch.tensor(found, device=newest.device)
        return hit

    def _says(self, tail: list[int], string: str) -> bool:
        """Whether a string is in the text of some last tokens: as many as it has bytes and one more.

        Where those begin within a character, one to three more may be needed: tokenizers that spell
        rare characters in bytes give up on all bytes in a row that do not begin one.
        """
        size = len(string.encode()) + 1
        for count in range(size, size + 4):
            text = self.tokenizer.decode(tail[-count:], clean_up_tokenization_spaces=False)
            if string in text or not text.startswith("\ufffd"):
                return string in text
        return False


def stops(tokenizer: PreTrainedTokenizerBase, stop_tokens: Sequence[str] = ()) -> Stop:
    """EOS and the configured stop tokens: special tokens by their ids, all else by its text, since the
    same text may be spelled by other tokens."""
    ids: list[int] = [tokenizer.eos_token_id]  # type: ignore[list-item]
    strings = []
    for string in stop_tokens:
        encoded = tokenizer.encode(string, add_special_tokens=False)
        if not encoded or tokenizer.unk_token_id in encoded:
            raise UserError(f"stop_tokens: this tokenizer cannot spell {string!r}")
        if len(encoded) == 1:
            ids += encoded
        if len(encoded) > 1 or encoded[0] not in tokenizer.all_special_ids:
            strings.append(string)
    return Stop(list(dict.fromkeys(ids)), strings, tokenizer)


def joined(parts: list[Sampled], pad_id: int) -> Sampled:
    """Batches of responses as one, as wide as its longest."""
    width = max(part.responses.shape[1] for part in parts)

    def wide(name: str, value: float) -> Tensor:
        tensors = [getattr(part, name) for part in parts]
        pads = [torch.nn.functional.pad(t, (0, width - t.shape[1]), value=value) for t in tensors]
        return torch.cat(pads)

    return Sampled(
        responses=wide("responses", pad_id),
        lengths=torch.cat([part.lengths for part in parts]),
        ended=torch.cat([part.ended for part in parts]),
        logprobs=wide("logprobs", 0.0),
    )


@torch.no_grad()
def sample(
    model: Model,
    queries: Tensor,
    query_mask: Tensor,
    *,
    max_new_tokens: int,
    temperature: float,
    stop: Stop,
    pad_id: int,
    uniforms: Tensor | None = None,
    greedy: bool = False,
    lengths: Tensor | None = None,
) -> Sampled:
    """Responses to left-padded queries (B, Q).

    Plain sampling from softmax(logits / temperature): no top-k, no top-p, no penalties (trl#6789).
    Token t of row b is drawn at `uniforms[b, t]` (B, T), so that no response depends on which others
    share its batch; without them they come from torch's global generator, never seeded here.
    `lengths` (B,) forces how long the responses are, to time equal work: EOS comes then, not before.
    """
    count, width, device = len(queries), max_new_tokens, queries.device
    uniforms = (torch.rand(count, width) if uniforms is None else uniforms).to(device)
    responses = queries.new_full((count, width), pad_id)
    logprobs = torch.zeros(count, width, device=device)
    ended = torch.zeros(count, dtype=torch.bool, device=device)
    real = torch.zeros(count, dtype=torch.long, device=device)  # tokens of each response
    rows = torch.arange(count, device=device)  # those that go on
    decode = decoder(model, queries, query_mask, width)
    logits = decode.start()
    for t in range(width):
        logits = scaled(logits, temperature)
        tokens = logits.argmax(dim=-1) if greedy else drawn(logits, uniforms[rows, t])
        if lengths is not None:
            tokens = _forced(logits, uniforms[rows, t], lengths[rows] == t + 1, stop.ids)
        own = logprobs_of(logits, tokens.clamp(max=logits.shape[-1] - 1), 1.0)
        if bool(own.isnan().any()):  # from no number a token past the vocabulary is drawn
            name = inner(model).name_or_path or type(inner(model)).__name__
            raise UserError(
                f"{name}: this model's logits are no numbers; make it again, or move it away"
            )
        responses[rows, t], real[rows] = tokens, t + 1
        logprobs[rows, t] = own.to(logprobs.dtype)
        hit = stop.hits(responses[rows, : t + 1])
        ended[rows[hit]] = True
        if t + 1 == width or bool(hit.all()):
            break
        if bool(hit.any()):
            order = survivors(hit)
            decode.keep(order)
            rows, tokens = rows[order], tokens[order]
        logits = decode.step(tokens)
    return Sampled(responses[:, : t + 1], real, ended, logprobs[:, : t + 1])


def drawn(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Ids (B,) from softmax(logits) (B, V): the first at which the distribution function exceeds u.

    Several times faster than `torch.multinomial` on large vocabularies, and a function of `uniforms`
    (B,) in [0, 1) alone. A token of probability 0 is never drawn.
    """
    cumulative = torch.softmax(logits, dim=-1).cumsum(dim=-1)
    total = cumulative[:, -1:]
    below = torch.nextafter(total, torch.zeros_like(total))  # u * total may round up to total
    target = torch.minimum(uniforms.to(total.dtype)[:, None] * total, below)
    return torch.searchsorted(cumulative, target, right=True).squeeze(1)


def _forced(logits: Tensor, uniforms: Tensor, last: Tensor, stop: list[int]) -> Tensor:
    """Tokens that end the rows that are `last` (B,) bool, and no other."""
    going_on = logits.index_fill(1, torch.tensor(stop, device=logits.device), -torch.inf)
    return torch.where(last, stop[0], drawn(going_on, uniforms))


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
    progress: str | None = None,
) -> list[Response]:
    """One response to each tokenised prompt, in the order of the prompts; `progress` names its bar.

    Where the model has no more places a response is cut off; UserError for a prompt that takes them all.
    """
    device = next(model.parameters()).device
    stop = stops(tokenizer, stop_tokens)
    pad = pad_id(tokenizer)
    out: list[Response] = []
    for start in tracked(range(0, len(prompts), batch_size), progress):
        queries, mask = left_pad(prompts[start : start + batch_size], pad)
        width = queries.shape[1]
        # a reward model reads an EOS after what is cut off
        room = layout(model).room(model, width) - 1
        if room < 1:
            raise UserError(f"a prompt of {width} tokens, a model for {places(model)}")
        sampled = sample(
            model,
            queries.to(device),
            mask.to(device),
            max_new_tokens=min(max_new_tokens, room),
            temperature=temperature,
            stop=stop,
            pad_id=pad,
            greedy=greedy,
        )
        columns = (sampled.responses, sampled.lengths, sampled.ended)
        for row, length, ended in zip(*(column.tolist() for column in columns), strict=True):
            out.append(Response(row[:length], response_text(tokenizer, row[:length]), ended))
    return out


@torch.no_grad()
def stream(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    greedy: bool = False,
) -> Iterator[Response]:
    """The response to a prompt as it grows, a token at a time, from the same random numbers as `generate`."""
    device, stop = next(model.parameters()).device, stops(tokenizer)
    room = layout(model).room(model, len(prompt)) - 1
    if room < 1:
        raise UserError(f"a prompt of {len(prompt)} tokens, a model for {places(model)}")
    queries, mask = left_pad([prompt], pad_id(tokenizer))
    uniforms = torch.rand(1, min(max_new_tokens, room)).to(device)
    decode = decoder(model, queries.to(device), mask.to(device), uniforms.shape[1])
    ids, logits = queries.new_zeros(1, 0).to(device), decode.start()
    for t in range(uniforms.shape[1]):
        logits = scaled(logits, temperature)
        token = logits.argmax(dim=-1) if greedy else drawn(logits, uniforms[:, t])
        ids = torch.cat([ids, token[:, None]], dim=1)
        ended, row = bool(stop.hits(ids)), ids[0].tolist()
        yield Response(row, response_text(tokenizer, row), ended)
        if ended:
            return
        if t + 1 < uniforms.shape[1]:
            logits = decode.step(token)
