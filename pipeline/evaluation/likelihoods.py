"""Log-likelihoods under each policy: KL to SFT, and perplexities of held-out data."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from pipeline.config.evaluation import EvalConfig
from pipeline.data.forms import load_demonstrations, load_texts
from pipeline.data.literals import text_ids
from pipeline.data.messages import Message
from pipeline.data.template import encode_demonstration, encode_responses
from pipeline.errors import UserError
from pipeline.evaluation import metrics
from pipeline.models.causal import places
from pipeline.models.encoder_decoder import is_encoder_decoder
from pipeline.models.forward import LOGITS_AT_ONCE, layout, response_logprobs
from pipeline.models.generation import Response
from pipeline.models.sequences import Sequences
from pipeline.models.tokens import pad_id
from pipeline.process.progress import tracked

Pair = tuple[list[int], list[int]]
"""Tokens that are given, and tokens whose likelihood is asked."""


def room(models: dict[str, nn.Module], prompt: int) -> int:
    """Tokens that every model has places for after a prompt of so many."""
    return min(layout(model).room(model, prompt) for model in models.values())


def check_texts(config: EvalConfig, models: dict[str, nn.Module]) -> None:
    """UserError where texts by themselves are to be rated and a model cannot."""
    if config.pretraining is not None and any(map(is_encoder_decoder, models.values())):
        raise UserError(
            "eval: pretraining: an encoder-decoder has no likelihood of a text by itself; leave it out"
        )


def kl_to_sft(
    config: EvalConfig,
    models: dict[str, nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    responses: list[Response],
) -> dict[str, float | None]:
    """KL(ppo || sft) in nats per response: mean of log pi - log pi_sft over samples of pi (k1)."""
    if config.temperature == 0:
        raise UserError("eval: temperature 0: KL is of what is sampled; give a temperature")
    ids = [r.ids for r in responses]
    args = (prompts, ids, pad_id(tokenizer), config.temperature)
    policy = sequence_logprobs(models["ppo"], *args)
    reference = sequence_logprobs(models["sft"], *args)
    ratios = torch.tensor(policy) - torch.tensor(reference)
    error = ratios.std().item() / len(ratios) ** 0.5 if len(ratios) > 1 else None
    return {"ppo_vs_sft": ratios.mean().item(), "std_error": error}


def demonstrations(
    config: EvalConfig, tokenizer: PreTrainedTokenizerBase, models: dict[str, nn.Module]
) -> list[Pair]:
    """Held-out demonstrations that the models have places for: prompts and last turns."""
    if config.demonstrations is None:
        return []
    items = load_demonstrations(config.demonstrations)[: config.demonstrations_limit]
    pairs = [encode_demonstration(tokenizer, item.messages) for item in items]
    found = [pair for pair in pairs if len(pair[1]) <= room(models, len(pair[0]))]
    if not found:
        sizes = " or ".join(map(str, sorted({places(model) for model in models.values()})))
        raise UserError(f"eval: demonstrations: none fits the models' {sizes} tokens")
    return found


def texts(
    config: EvalConfig, tokenizer: PreTrainedTokenizerBase, models: dict[str, nn.Module]
) -> list[Pair]:
    """Held-out pretraining texts with EOS, cut to the models' places; no BOS, so the first token is given."""
    if config.pretraining is None:
        return []
    most = min(config.pretraining_max_length, room(models, 0))
    rows = [
        [*text_ids(tokenizer, text), tokenizer.eos_token_id][:most]
        for text in load_texts(config.pretraining)[: config.pretraining_limit]
    ]
    found = [(ids[:1], ids[1:]) for ids in rows if len(ids) > 1]
    if not found:
        raise UserError("eval: pretraining: no text has two tokens")
    return found


def perplexity(model: nn.Module, pairs: list[Pair], pad: int) -> float:
    """exp of the mean nats per token of what follows the prompts, at temperature 1."""
    prompts, responses = ([pair[side] for pair in pairs] for side in (0, 1))
    nll = -sum(sequence_logprobs(model, prompts, responses, pad))
    return metrics.perplexity(nll, sum(map(len, responses)))


def label_likelihoods(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[list[Message]],
    labels: Sequence[str],
) -> list[list[float]]:
    """Mean nats per token of each label as the answer to each of P prompts, its end included; (P, L).

    Per token, so that a label is not unlikely for being long.
    """
    prompts, replies = list[list[int]](), list[list[int]]()
    for messages in asked:
        prompt, encoded = encode_responses(tokenizer, messages, labels)
        prompts += [prompt] * len(labels)
        replies += encoded
    sums = sequence_logprobs(model, prompts, replies, pad_id(tokenizer))
    means = [total / len(ids) for total, ids in zip(sums, replies, strict=True)]
    return [means[i : i + len(labels)] for i in range(0, len(means), len(labels))]


@torch.no_grad()
def sequence_logprobs(
    model: nn.Module,
    prompts: list[list[int]],
    responses: list[list[int]],
    pad: int,
    temperature: float = 1.0,
) -> list[float]:
    """Sum over each response's tokens of log pi(token | before), in nats; lists of ids."""
    device = next(model.parameters()).device
    width = max(len(ids) for ids in responses)
    vocabulary: int = model.get_input_embeddings().num_embeddings  # type: ignore[operator,union-attr]
    size = max(1, LOGITS_AT_ONCE // (width * vocabulary))
    out: list[float] = []
    for start in tracked(range(0, len(prompts), size), "eval: likelihoods"):
        rows = slice(start, start + size)
        s = Sequences.of(prompts[rows], responses[rows], pad).to(device)
        out += response_logprobs(model, s, temperature).sum(dim=1).tolist()
    return out
