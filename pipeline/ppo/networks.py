"""Policy and value behind one forward pass, so that any engine sees a single module."""

import torch
from torch import Tensor, nn

from pipeline.models import Model, accepts, response_logits, token_scores
from pipeline.ppo.maths import logprobs_of, masked_sum, position_ids


class PolicyAndValue(nn.Module):
    """A causal policy with its value function: a separate network, or a head on the policy's trunk.

    `value` is a sequence classifier (see `pipeline.models.token_scores`), or None for a shared
    trunk, whose head starts at zero.
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
        attention_mask: Tensor,
        width: int,
        ptx: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """ids (B, Q + T) -> logits (B, T, V) and values (B, T), both read at the positions that
        *predict* the T response tokens, and the summed log-likelihood of the `ptx` batch."""
        if self.value is None:
            logits, values = self._shared(ids, attention_mask, width)
        else:
            logits = response_logits(self.policy, ids, attention_mask, width)
            values = token_scores(self.value, ids, attention_mask)[:, -width - 1 : -1]
        likelihood = logits.new_zeros(()) if ptx is None else self._likelihood(*ptx)
        return logits, values, likelihood

    def _shared(self, ids: Tensor, attention_mask: Tensor, width: int) -> tuple[Tensor, Tensor]:
        kwargs = {"position_ids": position_ids(attention_mask)}
        out = self.policy(
            input_ids=ids,
            attention_mask=attention_mask,
            use_cache=False,
            output_hidden_states=True,
            **(kwargs if accepts(self.policy, "position_ids") else {}),
        )
        predicting = slice(-width - 1, -1)
        values = self.value_head(out.hidden_states[-1][:, predicting]).squeeze(-1)
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        return out.logits[:, predicting], values

    def _likelihood(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Sum of log pi(x_t | x_<t) over the real tokens of right-padded text, temperature 1."""
        logits = response_logits(self.policy, ids, mask, ids.shape[1] - 1)
        return masked_sum(logprobs_of(logits, ids[:, 1:], 1.0), mask[:, 1:].bool())

    def policy_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters of the policy."""
        return [p for p in self.policy.parameters() if p.requires_grad]

    def value_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters of the value function alone."""
        module = self.value_head if self.value is None else self.value
        return [p for p in module.parameters() if p.requires_grad]
