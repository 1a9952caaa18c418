"""Where scores come from: reward models, ensembles, callables, services, and sums of them."""

import asyncio
import http.client
import importlib
import inspect
import json
import math
import statistics
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from pipeline.config.ppo import PPOConfig
from pipeline.data.messages import message
from pipeline.data.template import encode_demonstration
from pipeline.errors import UserError
from pipeline.models.forward import score_sequences
from pipeline.models.tokens import pad_id
from pipeline.ppo import maths
from pipeline.ppo.rollout import Rollout


@dataclass
class Episodes:
    """What a reward may look at, B of each."""

    queries: list[list[int]]
    """Token ids of the prompts, for models that share the tokenizer."""
    response_ids: list[list[int]]
    """Of the responses as reward models read them, each closed by one EOS."""
    prompts: list[str]
    responses: list[str]
    rows: list[dict]
    """The prompt's row of the data file, all columns."""
    messages: list[list[dict[str, str]]] = field(default_factory=list)
    tokens: list[list[str]] = field(default_factory=list)
    """Text of every response token, for rewards per token."""


Score = Callable[[Episodes], list[float]]
"""One float per episode."""
TokenScore = Callable[[Episodes], list[list[float]]]
"""One float per response token of each episode."""


def model_reward(model: nn.Module, pad: int, batch_size: int) -> Score:
    """A reward model with the policy's tokenizer: it reads the tokens that were sampled, or those of the words
    after thinking."""
    return lambda e: score_sequences(model, e.queries, e.response_ids, pad, batch_size)


def text_model_reward(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> Score:
    """A reward model with another tokenizer: it reads text through its own template."""

    def score(episodes: Episodes) -> list[float]:
        prompts, replies = [], []
        for messages, response in zip(episodes.messages, episodes.responses, strict=True):
            whole = [*messages, message("assistant", response)]
            prompt, reply = encode_demonstration(tokenizer, whole)
            prompts.append(prompt)
            replies.append(reply)
        return score_sequences(model, prompts, replies, pad_id(tokenizer), batch_size)

    return score


def ensemble(members: Sequence[Score], aggregate: str, uncertainty_coef: float) -> Score:
    """One score from several reward models (arXiv 2310.02743).

    mean; min (their worst-case optimisation); uncertainty = mean - uncertainty_coef * variance
    (their uncertainty-weighted optimisation, population variance over the members).
    """

    def combine(scores: tuple[float, ...]) -> float:
        if aggregate == "min":
            return min(scores)
        mean = statistics.fmean(scores)
        if aggregate == "mean":
            return mean
        return mean - uncertainty_coef * statistics.pvariance(scores, mean)

    def score(episodes: Episodes) -> list[float]:
        columns = [member(episodes) for member in members]
        return [combine(scores) for scores in zip(*columns, strict=True)]

    return score


def load_function(name: str) -> Callable:
    """`package.module:function`, imported."""
    module_name, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"rewards: cannot import {name!r} ({error}); write it as package.module:function, "
            "importable from the folder you start from"
        ) from error


def function_reward(name: str, timeout: float | None = None) -> Score:
    """A callable of (prompts, responses, rows) -> floats, plain or async; UserError after `timeout` s."""
    function = load_function(name)

    def score(episodes: Episodes) -> list[float]:
        arguments = (episodes.prompts, episodes.responses, episodes.rows)
        values = _call(function, arguments, name, timeout)
        return _checked(values, len(episodes.prompts), name)

    return score


def token_function(name: str) -> TokenScore:
    """A callable of (prompts, responses, rows, tokens' texts) -> for every response one float a token."""
    function = load_function(name)

    def score(episodes: Episodes) -> list[list[float]]:
        arguments = (episodes.prompts, episodes.responses, episodes.rows, episodes.tokens)
        values = _call(function, arguments, name, None)
        if len(values) != len(episodes.tokens):
            raise UserError(f"{name}: {len(values)} lists for {len(episodes.tokens)} responses")
        return [
            _checked(given, len(tokens), f"{name}, sample {i}")
            for i, (given, tokens) in enumerate(zip(values, episodes.tokens, strict=True))
        ]

    return score


def _call(function: Callable, arguments: tuple, name: str, timeout: float | None):
    """Call a plain or async function within a time limit."""

    def work():
        result = function(*arguments)
        return asyncio.run(result) if inspect.iscoroutine(result) else result

    if timeout is None:
        return work()
    answer: Future = Future()

    def deliver() -> None:
        try:
            answer.set_result(work())
        except BaseException as error:
            answer.set_exception(error)

    # a daemon, unlike an executor's threads: a call that never returns must not keep Python alive
    threading.Thread(target=deliver, daemon=True).start()
    try:
        return answer.result(timeout)
    except FutureTimeout as error:
        if answer.done():
            raise  # the function's own
        raise UserError(f"rewards: {name} took longer than its timeout of {timeout} s") from error


_FAILURES = (OSError, http.client.HTTPException, ValueError, KeyError, TypeError)
"""No answer, an answer that is no HTTP, or not the JSON asked for."""


def remote_reward(url: str, timeout: float | None, retries: int) -> Score:
    """A service: POST {prompts, responses, rows}, answered by {scores}; tried again after 1, 2, 4 ... seconds."""

    def score(episodes: Episodes) -> list[float]:
        body = {"prompts": episodes.prompts, "responses": episodes.responses, "rows": episodes.rows}
        request = urllib.request.Request(
            url, json.dumps(body, default=str).encode(), {"Content-Type": "application/json"}
        )
        for attempt in range(retries + 1):
            try:
                with urllib.request.urlopen(request, timeout=timeout) as answer:
                    scores = json.loads(answer.read())["scores"]
                    return _checked(scores, len(episodes.prompts), url)
            except _FAILURES as error:
                if attempt == retries:
                    raise UserError(
                        f"rewards: {url} failed {retries + 1} times: {error}"
                    ) from error
                time.sleep(2**attempt)
        raise AssertionError("unreachable")

    return score


def _checked(values, count: int, name: str) -> list[float]:
    """Numbers, as many as asked for."""
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise UserError(f"rewards: {name}: not a list of numbers: {error}") from error
    if len(numbers) != count:
        raise UserError(f"rewards: {name}: {len(numbers)} numbers where {count} were needed")
    return numbers


def weighted_sum(terms: Sequence[tuple[float, Score]]) -> Score:
    """Sum of weight * score over the terms; 0 without any."""

    def score(episodes: Episodes) -> list[float]:
        totals = [0.0] * len(episodes.prompts)
        for weight, term in terms:
            totals = [t + weight * s for t, s in zip(totals, term(episodes), strict=True)]
        return totals

    return score


def token_sum(terms: Sequence[tuple[float, TokenScore]]) -> TokenScore | None:
    """Sum of weight * score token by token; None without any term."""
    if not terms:
        return None

    def score(episodes: Episodes) -> list[list[float]]:
        totals = [[0.0] * len(tokens) for tokens in episodes.tokens]
        for weight, term in terms:
            for total, given in zip(totals, term(episodes), strict=True):
                total[:] = [t + weight * s for t, s in zip(total, given, strict=True)]
        return totals

    return score


class RunningScale:
    """Standard deviation of all scores so far, over all processes, to divide scores by."""

    def __init__(self) -> None:
        self.count, self.mean, self.m2 = 0.0, 0.0, 0.0

    def update(self, count: float, total: float, squares: float) -> None:
        """Merge a batch given its count, sum and sum of squares (Chan et al.'s parallel rule)."""
        mean = total / count
        m2 = max(squares - total * mean, 0.0)
        delta, merged = mean - self.mean, self.count + count
        self.m2 += m2 + delta**2 * self.count * count / merged
        self.mean += delta * count / merged
        self.count = merged

    @property
    def std(self) -> float:
        """At least 1e-4, so that equal scores stay finite."""
        return max(math.sqrt(self.m2 / max(self.count - 1, 1.0)), 1e-4)


def shaped_scores(
    rollout: Rollout, config: PPOConfig, scale: RunningScale, all_sum: maths.AllSum
) -> Tensor:
    """Scores (B,) after scaling, clipping, the missing-EOS rule and the length penalty."""
    scores = rollout.scores
    if config.scale_scores:
        moments = torch.stack([torch.ones_like(scores), scores, scores.square()])
        scale.update(*all_sum(maths.precise(moments).sum(dim=1)).tolist())
        scores = scores / scale.std
    if config.clip_scores is not None:
        scores = scores.clamp(-config.clip_scores, config.clip_scores)
    scores = maths.missing_eos_scores(
        scores, rollout.ended, config.missing_eos, config.missing_eos_penalty
    )
    return scores - config.length_penalty * rollout.response_mask.sum(dim=1)
