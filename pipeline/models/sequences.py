"""What goes into a model: prompts and the responses to them, apart."""

from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from pipeline.models.tokens import left_pad, right_pad


@dataclass
class Sequences:
    """B prompts of at most Q tokens, left-padded, and a response of at most T to each, right-padded."""

    queries: Tensor  # (B, Q) ids
    query_mask: Tensor  # (B, Q) bool
    responses: Tensor  # (B, T) ids
    response_mask: Tensor  # (B, T) bool, True = a real token, the EOS that ends a response included

    @classmethod
    def of(cls, queries: list[list[int]], responses: list[list[int]], pad: int) -> "Sequences":
        """From lists of ids."""
        return Sequences(*left_pad(queries, pad), *right_pad(responses, pad))

    @staticmethod
    def within(batch: dict[str, Tensor]) -> "Sequences":
        """Those that a collator has put among other tensors."""
        return Sequences(**{f.name: batch[f.name] for f in fields(Sequences)})

    @staticmethod
    def of_texts(ids: Tensor, mask: Tensor) -> "Sequences":
        """Right-padded texts (B, W), of which all but the first token is to be predicted."""
        return Sequences(ids[:, :1], mask[:, :1].bool(), ids[:, 1:], mask[:, 1:].bool())

    def __len__(self) -> int:
        return len(self.queries)

    def rows(self, indices: Tensor | slice) -> Self:
        """Those at `indices`, tensors only."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        picked: dict[str, Any] = {
            n: v[indices] if isinstance(v, Tensor) else None for n, v in values.items()
        }
        return replace(self, **picked)

    def to(self, device: torch.device) -> Self:
        """On a device."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(
            self, **{n: v.to(device) for n, v in values.items() if isinstance(v, Tensor)}
        )
