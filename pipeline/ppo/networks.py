"""Policy and value behind one forward pass, so that any engine sees a single module."""

import torch
from torch import Tensor, nn

from pipeline.models import (
    hidden_at,
    logits_and_hidden_at,
    logits_at,
    predicting,
    response_logprobs,
    scores_at,
    spread,
)
from pipeline.packing import Model
from pipeline.ppo.maths import logprobs_and_entropy


class PolicyAndValue(nn.Module):
    """A causal policy with its value function: a separate network, or a head on the policy's trunk.

    `value` is a sequence classifier (see `pipeline.models.scores_at`), maybe on the policy's base, or
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

    def forward(
        self,
        ids: Tensor,
        mask: Tensor,
        width: int,
        temperature: float,
        entropy_grad: bool = False,
        ptx: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """ids and mask (B, Q + T), T = width -> logprobs, entropies and values of the T response
        tokens, (B, T) each, 0 on padding, all read at the positions that *predict* the tokens; and
        the summed log-likelihood of the `ptx` batch (ids and mask, right-padded)."""
        where, real = predicting(mask, width), mask[:, -width:].bool()
        if self.value is None:
            logits, hidden = logits_and_hidden_at(self.policy, ids, mask, where)
            values = self._head(hidden)
        else:
            logits = logits_at(self.policy, ids, mask, where)
            values = scores_at(self.value, ids, mask, where)
        tokens = ids[:, -width:][real]
        logprobs, entropies = logprobs_and_entropy(logits, tokens, temperature, entropy_grad)
        likelihood = logits.new_zeros(()) if ptx is None else self._likelihood(*ptx)
        return spread(logprobs, real), spread(entropies, real), spread(values, real), likelihood

    def values(self, ids: Tensor, mask: Tensor, width: int) -> Tensor:
        """Values (B, T) alone, without the policy's logits."""
        where, real = predicting(mask, width), mask[:, -width:].bool()
        if self.value is None:
            return spread(self._head(hidden_at(self.policy, ids, mask, where)), real)
        return spread(scores_at(self.value, ids, mask, where), real)

    def _head(self, hidden: Tensor) -> Tensor:
        """(n, d) -> (n,)"""
        values = self.value_head(hidden).squeeze(-1)
        return values.to(torch.promote_types(values.dtype, torch.float32))

    def _likelihood(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Sum of log pi(x_t | x_<t) over the real tokens of right-padded text, temperature 1."""
        return response_logprobs(self.policy, ids, mask, ids.shape[1] - 1, 1.0).sum()

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
