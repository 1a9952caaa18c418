"""Token arithmetic that every model's passes share: padding, masks, positions, log-probabilities; torch
alone."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# --- padding, masks, positions --------------------------------------------------------------------


def pad_id(tokenizer: Any) -> int:
    """The id that padding has."""
    return int(tokenizer.pad_token_id)


def left_pad(rows: list[list[int]], value: int) -> tuple[Tensor, Tensor]:
    """Lists of ids -> ids (B, Q), left-padded, and a bool mask of the real ones."""
    width = max(len(ids) for ids in rows)
    ids = torch.tensor([[value] * (width - len(row)) + row for row in rows], dtype=torch.long)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(width)[None, :] >= width - lengths[:, None]


def right_pad(rows: list[list[int]], value: int) -> tuple[Tensor, Tensor]:
    """Lists of ids -> ids (B, T), right-padded, and a bool mask of the real ones."""
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    ids = torch.tensor([row + [value] * (width - len(row)) for row in rows], dtype=torch.long)
    return ids, mask_from_lengths(lengths, width)


def to_the_left(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (B, Q) with their real tokens moved to the left, and the mask of those."""
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)
    return ids.gather(1, order), mask.gather(1, order)


def mask_from_lengths(lengths: Tensor, width: int) -> Tensor:
    """lengths (B,) -> (B, width) bool, True on the first lengths[b] positions of row b."""
    return torch.arange(width, device=lengths.device)[None, :] < lengths[:, None]


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions that count real tokens only, 0 at the first; (B, L) -> (B, L)."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


# --- distributions ------------------------------------------------------------------------------


def logprobs_of(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """log pi(ids) at a temperature, in float32 at least; logits (..., V), ids (...) -> (...)."""
    flat = scaled(logits, temperature).flatten(end_dim=-2)
    losses = torch.nn.functional.cross_entropy(flat, ids.flatten(), reduction="none")
    return -losses.view(ids.shape)


def logprobs_and_entropy(
    logits: Tensor, ids: Tensor, temperature: float, entropy_grad: bool
) -> tuple[Tensor, Tensor]:
    """log pi(ids) and the entropy of their distributions; logits (n, V), ids (n,) -> (n,) and (n,).

    Without a gradient of the entropy both come from one walk over the logits, a few rows at a time,
    and no other tensor of their size is kept: on large vocabularies that is what memory goes to.
    """
    if entropy_grad:
        return logprobs_of(logits, ids, temperature), entropy_of(logits, temperature)
    return _TokenLogprobs.apply(logits, ids, temperature)


class _TokenLogprobs(torch.autograd.Function):
    """Log-probabilities, with their gradient, and entropies, without."""

    FLOATS = 2**19  # of logits at a time: what a core's cache holds

    @staticmethod
    def forward(ctx, logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        precise = torch.promote_types(logits.dtype, torch.float32)
        logprobs, entropies = torch.empty(2, len(logits), dtype=precise, device=logits.device)
        for rows in _TokenLogprobs.slices(logits):
            every = torch.log_softmax(scaled(logits[rows], temperature), dim=-1)
            logprobs[rows] = every.gather(1, ids[rows, None]).squeeze(1)
            entropies[rows] = -every.exp().mul_(every).sum(dim=-1)
        chosen = scaled(logits.gather(1, ids[:, None]).squeeze(1), temperature)
        ctx.save_for_backward(logits, ids, chosen - logprobs)  # the last: log of the partition sum
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor):  # type: ignore[override]
        logits, ids, log_z = ctx.saved_tensors
        grad = grad / ctx.temperature
        out = torch.empty_like(logits)
        for rows in _TokenLogprobs.slices(logits):
            part = scaled(logits[rows], ctx.temperature) - log_z[rows, None]
            out[rows] = part.exp_().mul_(-grad[rows, None])
        out.scatter_add_(1, ids[:, None], grad[:, None].to(out.dtype))
        return out, None, None

    @staticmethod
    def slices(logits: Tensor) -> list[slice]:
        """Rows to work on at a time."""
        size = max(1, _TokenLogprobs.FLOATS // logits.shape[1])
        return [slice(start, start + size) for start in range(0, len(logits), size)]


def entropy_of(logits: Tensor, temperature: float) -> Tensor:
    """Entropy in nats of each next-token distribution; (..., V) -> (...)."""
    logits = scaled(logits, temperature)
    log_z = logits.logsumexp(dim=-1)
    return log_z - (torch.softmax(logits, dim=-1) * logits).sum(dim=-1)


def scaled(logits: Tensor, temperature: float) -> Tensor:
    """Logits divided by a temperature, in float32 at least."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if temperature == 1.0 else logits / temperature


# --- a few rows at a time -------------------------------------------------------------------------

OfLogits = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""Logits (m, V) and ids (m,) -> some (m,) numbers, each a function of its own row."""


def in_slices(
    head: Callable[[Tensor], Tensor],
    trains: bool,
    hidden: Tensor,
    ids: Tensor,
    of: OfLogits,
    rows: int,
) -> tuple[Tensor, ...]:
    """`of(head(hidden), ids)` for hidden (n, d), ids (n,), with the logits of `rows` rows in memory at a time.

    Going backward a head that trains computes them again. One that does not is spared that: what its rows'
    gradients would be is known while their logits are there.
    """
    parts = []
    for x, tokens in zip(hidden.split(rows), ids.split(rows), strict=True):

        def mine(x: Tensor, tokens: Tensor = tokens) -> tuple[Tensor, ...]:
            return of(head(x), tokens)

        if torch.is_grad_enabled() and not trains:
            parts.append(_OfFrozenHead.apply(x, mine))
        else:
            parts.append(checkpoint(mine, x, use_reentrant=False))
    return tuple(map(torch.cat, zip(*parts, strict=True)))


class _OfFrozenHead(torch.autograd.Function):
    """Numbers (m,) of rows (m, d) with their gradients, which going backward are only weighed."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, of: Callable[[Tensor], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            x = hidden.detach().requires_grad_()
            out = of(x)
            grads = [
                torch.autograd.grad(y.sum(), x, retain_graph=True)[0] if y.requires_grad else None
                for y in out
            ]
        plain = tuple(y.detach() for y in out)
        ctx.mark_non_differentiable(*(y for y, g in zip(plain, grads, strict=True) if g is None))
        ctx.save_for_backward(*grads)
        return plain

    @staticmethod
    def backward(ctx, *weights: Tensor):  # type: ignore[override]
        pairs = zip(weights, ctx.saved_tensors, strict=True)
        parts = [w[:, None].to(g.dtype) * g for w, g in pairs if g is not None]
        return torch.stack(parts).sum(dim=0), None
