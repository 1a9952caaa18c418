"""The record of one batch of episodes, and how prompts become one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.data.forms import Prompt
from pipeline.data.kept import like
from pipeline.data.messages import message, prompt_text
from pipeline.data.template import encode_prompt
from pipeline.errors import UserError, at
from pipeline.models.sequences import Sequences
from pipeline.process.progress import tracked


@dataclass
class Query:
    """A prompt ready to be sampled from: token ids, text, its row of the data, its messages."""

    ids: list[int]
    text: str = ""
    row: dict = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)


def queries_of(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt | str]
) -> Sequence[Query]:
    """Prompts, or plain user texts, as token ids. UserError for anything else."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not prompts:
        shown = repr(prompts) if isinstance(prompts, str | list) else type(prompts).__name__
        raise UserError(f"queries: a list of prompts or of texts, not {shown}")
    found = like(prompts)
    for p in tracked(prompts, "ppo: encoding prompts"):
        prompt = Prompt([message("user", p)], {}, "") if isinstance(p, str) else p
        if not isinstance(prompt, Prompt):
            raise UserError(f"queries: {p!r}: neither a text nor a `Prompt` (see load_prompts)")
        with at(prompt.where):
            ids = encode_prompt(tokenizer, prompt.messages)
        found.append(Query(ids, prompt_text(prompt.messages), prompt.row, prompt.messages))
    return found


@dataclass
class Rollout(Sequences):
    """B episodes, with all that an update needs of them; the response mask never changes its meaning."""

    ended: Tensor  # (B,) bool, a stop token was sampled
    scores: Tensor  # (B,) from the reward, before any rule
    sampler_logprobs: Tensor  # (B, T) as the tokens were drawn, at the sampler's precision
    old_logprobs: Tensor  # (B, T) under the policy that sampled
    ref_logprobs: Tensor  # (B, T) under the frozen SFT model
    values: Tensor  # (B, T) at the positions that predict the tokens
    token_scores: Tensor | None = None  # (B, T) from rewards per token, if any
    prompts: list[str] | None = None
    texts: list[str] | None = None

    def response_ids(self) -> list[list[int]]:
        """Real response tokens of each episode."""
        return real_rows(self.responses, self.response_mask)


def everywhere(accelerator: Accelerator, rollout: Rollout, *others: Tensor) -> tuple[Any, ...]:
    """The episodes, and `others` (B, T), of all processes in each, in order, tensors alone: minibatches agree."""
    if accelerator.num_processes == 1:
        return rollout, *others

    def gathered(x: Tensor, left: bool = False) -> Tensor:
        whole = x.to(torch.uint8) if x.dtype == torch.bool else x  # gloo gathers no bool
        if x.dim() > 1:
            whole = accelerator.pad_across_processes(whole, dim=1, pad_first=left)
        return accelerator.gather(whole).to(x.dtype)

    values = {name: x for name, x in vars(rollout).items() if isinstance(x, Tensor)}
    mine = {name: gathered(x, left=name in ("queries", "query_mask")) for name, x in values.items()}
    whole = replace(rollout, **mine, prompts=None, texts=None)
    return whole, *(gathered(x) for x in others)


def real_rows(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The real ids of each row, as lists."""
    return [row[real].tolist() for row, real in zip(ids, mask, strict=True)]


class PromptStream:
    """Endless batches of queries: each epoch is a permutation drawn from (seed, epoch) alone.

    A batch is a function of its number, so a resumed run needs no stored position. Every process
    takes its own slice of the global batch. Of every prompt there are `samples` one after the other.
    """

    def __init__(self, queries: Sequence[Query], batch_size: int, seed: int, samples: int = 1):
        self.queries, self.prompts, self.seed = queries, batch_size // samples, seed
        self.samples = samples

    def batch(self, number: int, process: int = 0, processes: int = 1) -> list[Query]:
        """The `number`-th batch (from 0), this process's share of it."""
        indices = self._indices(number * self.prompts)
        share = self.prompts // processes
        mine = [next(indices) for _ in range(self.prompts)][process * share : (process + 1) * share]
        return [self.queries[i] for i in mine for _ in range(self.samples)]

    def _indices(self, position: int) -> Iterator[int]:
        epoch, offset = divmod(position, len(self.queries))
        while True:
            order = torch.randperm(len(self.queries), generator=generator(self.seed, epoch))
            yield from order.tolist()[offset:]
            epoch, offset = epoch + 1, 0


def generator(*key: int) -> torch.Generator:
    """A CPU generator that is a function of its key; the global one stays untouched."""
    seed = 0
    for part in key:
        seed = (seed * 1_000_003 + part + 1) % (2**63)
    return torch.Generator().manual_seed(seed)
