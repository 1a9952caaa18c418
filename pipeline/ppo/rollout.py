"""The record of one batch of episodes, and how prompts become one."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor


@dataclass
class Query:
    """A prompt ready to be sampled from: token ids, text, its row of the data, its messages."""

    ids: list[int]
    text: str = ""
    row: dict = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)


@dataclass
class Rollout:
    """B episodes: Q prompt tokens (left-padded), T response tokens (right-padded).

    The response mask is made once, from lengths, and never changes its meaning: True = a real
    token, the EOS that ends a response included.
    """

    queries: Tensor  # (B, Q) ids
    query_mask: Tensor  # (B, Q) bool
    responses: Tensor  # (B, T) ids
    response_mask: Tensor  # (B, T) bool
    ended: Tensor  # (B,) bool, a stop token was sampled
    scores: Tensor  # (B,) from the reward, before any rule
    sampler_logprobs: Tensor  # (B, T) as the tokens were drawn, at the sampler's precision
    old_logprobs: Tensor  # (B, T) under the policy that sampled
    ref_logprobs: Tensor  # (B, T) under the frozen SFT model
    values: Tensor  # (B, T) at the positions that predict the tokens
    token_scores: Tensor | None = None  # (B, T) from rewards per token, if any
    prompts: list[str] | None = None
    texts: list[str] | None = None

    def __len__(self) -> int:
        return len(self.queries)

    def rows(self, indices: Tensor | slice) -> "Rollout":
        """The episodes at `indices`, tensors only."""
        picked = {
            f.name: getattr(self, f.name)[indices]
            for f in fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        return replace(self, **picked, prompts=None, texts=None)

    def inputs(self) -> tuple[Tensor, Tensor]:
        """What the networks read: ids (B, Q + T) and their attention mask."""
        ids = torch.cat([self.queries, self.responses], dim=1)
        return ids, torch.cat([self.query_mask, self.response_mask], dim=1).long()

    def response_ids(self) -> list[list[int]]:
        """Real response tokens of each episode."""
        return [
            row[real].tolist() for row, real in zip(self.responses, self.response_mask, strict=True)
        ]


def prompt_text(messages: list[dict[str, str]]) -> str:
    """A prompt as callables and judges read it: the user's words, or a transcript of several turns."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{m['role']}: {m['content']}" for m in messages)


class PromptStream:
    """Endless batches of queries: each epoch is a permutation drawn from (seed, epoch) alone.

    A batch is a function of its number, so a resumed run needs no stored position. Every process
    takes its own slice of the global batch.
    """

    def __init__(self, queries: list[Query], batch_size: int, seed: int):
        self.queries, self.batch_size, self.seed = queries, batch_size, seed

    def batch(self, number: int, process: int = 0, processes: int = 1) -> list[Query]:
        """The `number`-th batch (from 0), this process's share of it."""
        indices = self._indices(number * self.batch_size)
        share = self.batch_size // processes
        mine = [next(indices) for _ in range(self.batch_size)][
            process * share : (process + 1) * share
        ]
        return [self.queries[i] for i in mine]

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
