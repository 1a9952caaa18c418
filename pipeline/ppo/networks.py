"""Policy and value, and their passes: what goes forward and backward at once."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.models.loading import (
    hidden_at,
    logits_and_hidden_at,
    logits_at,
    predicting,
    response_logprobs,
    scores_at,
    spread,
)
from pipeline.models.packing import Model
from pipeline.ppo.maths import logprobs_and_entropy


class Outputs(NamedTuple):
    """What losses are made of, (B, T) each at the positions that *predict* the response's tokens and
    0 on padding; None where a pass has nothing to say."""

    logprobs: Tensor | None = None
    entropies: Tensor | None = None
    likelihood: Tensor | None = None  # () of the pretraining text
    values: Tensor | None = None


class PolicyAndValue(nn.Module):
    """A causal policy with its value function: a separate network, or a head on the policy's trunk.

    `value` is a sequence classifier (see `pipeline.models.loading.scores_at`), maybe on the policy's base, or
    None for a head on the policy's trunk, which starts at zero.
    """

    def __init__(self, policy: Model, value: Model | None):
        super().__init__()
        self.policy = policy
        self.value = value
        if value is None:
            self.value_head = nn.Linear(policy.config.hidden_size, 1, dtype=policy.dtype)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    def passes(self) -> list[nn.Module]:
        """Modules whose `Outputs` together are the losses' inputs, each a graph of its own: networks
        that share no parameter take turns, so that the activations of one are in memory at a time."""
        shared = {id(p) for p in self.policy.parameters()}
        if self.value is None or any(id(p) in shared for p in self.value.parameters()):
            return [self]
        return [PolicyPass(self.policy), ValuePass(self.value)]

    def forward(
        self,
        ids: Tensor,
        mask: Tensor,
        width: int,
        temperature: float,
        entropy_grad: bool = False,
        ptx: tuple[Tensor, Tensor] | None = None,
    ) -> Outputs:
        """Everything. ids and mask (B, Q + T), T = width; `ptx` is a batch of pretraining text (ids
        and mask, right-padded)."""
        if self.value is not None:
            out = _of_policy(self.policy, ids, mask, width, temperature, entropy_grad, ptx)
            return out._replace(values=self.values(ids, mask, width))
        logits, hidden = logits_and_hidden_at(self.policy, ids, mask, predicting(mask, width))
        out = _of_logits(logits, ids, mask, width, temperature, entropy_grad)
        values = spread(self._head(hidden), mask[:, -width:].bool())
        return out._replace(values=values, likelihood=_likelihood(self.policy, ptx))

    def values(self, ids: Tensor, mask: Tensor, width: int) -> Tensor:
        """Values (B, T) alone, without the policy's logits."""
        if self.value is not None:
            return _values(self.value, ids, mask, width)
        hidden = hidden_at(self.policy, ids, mask, predicting(mask, width))
        return spread(self._head(hidden), mask[:, -width:].bool())

    def _head(self, hidden: Tensor) -> Tensor:
        """(n, d) -> (n,)"""
        values = self.value_head(hidden).squeeze(-1)
        return values.to(torch.promote_types(values.dtype, torch.float32))

    def policy_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters of the policy; of a shared base, those of its own adapter."""
        others = {id(p) for p in self.value_parameters()}
        mine = (p for p in self.policy.parameters() if p.requires_grad)
        return [p for p in mine if id(p) not in others]

    def value_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters of the value function alone."""
        module = self.value_head if self.value is None else self.value
        return [p for p in module.parameters() if p.requires_grad]

    def trained(self) -> dict[str, Tensor]:
        """Trainable parameters by name: what training changes, and so what a saved state needs."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}


class PolicyPass(nn.Module):
    """A policy alone, without its value function."""

    def __init__(self, policy: Model):
        super().__init__()
        self.policy = policy

    def forward(
        self,
        ids: Tensor,
        mask: Tensor,
        width: int,
        temperature: float,
        entropy_grad: bool = False,
        ptx: tuple[Tensor, Tensor] | None = None,
    ) -> Outputs:
        """Everything but values."""
        return _of_policy(self.policy, ids, mask, width, temperature, entropy_grad, ptx)


class ValuePass(nn.Module):
    """A separate value network alone."""

    def __init__(self, value: Model):
        super().__init__()
        self.value = value

    def forward(self, ids: Tensor, mask: Tensor, width: int, *_, **__) -> Outputs:
        """Values alone; what else the policy is told makes no difference here."""
        return Outputs(values=_values(self.value, ids, mask, width))


def _values(value: Model, ids: Tensor, mask: Tensor, width: int) -> Tensor:
    return spread(scores_at(value, ids, mask, predicting(mask, width)), mask[:, -width:].bool())


def _of_policy(
    policy: Model,
    ids: Tensor,
    mask: Tensor,
    width: int,
    temperature: float,
    entropy_grad: bool,
    ptx: tuple[Tensor, Tensor] | None,
) -> Outputs:
    logits = logits_at(policy, ids, mask, predicting(mask, width))
    out = _of_logits(logits, ids, mask, width, temperature, entropy_grad)
    return out._replace(likelihood=_likelihood(policy, ptx))


def _of_logits(
    logits: Tensor, ids: Tensor, mask: Tensor, width: int, temperature: float, entropy_grad: bool
) -> Outputs:
    """Logits (n, V) that predict the n real ones of the last `width` tokens."""
    real = mask[:, -width:].bool()
    tokens = ids[:, -width:][real]
    logprobs, entropies = logprobs_and_entropy(logits, tokens, temperature, entropy_grad)
    return Outputs(spread(logprobs, real), spread(entropies, real))


def _likelihood(policy: Model, ptx: tuple[Tensor, Tensor] | None) -> Tensor | None:
    """Sum of log pi(x_t | x_<t) over the real tokens of right-padded text, temperature 1."""
    if ptx is None:
        return None
    ids, mask = ptx
    return response_logprobs(policy, ids, mask, ids.shape[1] - 1, 1.0).sum()
