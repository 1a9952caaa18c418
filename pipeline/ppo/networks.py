"""Policy and value, and their passes: what goes forward and backward at once."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.config.ppo import PPOConfig
from pipeline.engines.start import asked
from pipeline.engines.whole import in_parts
from pipeline.models.adapters import adapter_off
from pipeline.models.forward import (
    in_full,
    layout,
    of_predictions,
    response_logprobs,
    response_scores,
    spread,
)
from pipeline.models.packing import Model, hidden_width, inner
from pipeline.models.sequences import Sequences
from pipeline.models.tokens import logprobs_and_entropy


def autocast(config: PPOConfig, device: torch.device) -> torch.autocast:
    """Within, matrix products are made in the config's precision; weights stay float32.

    accelerate's own follows whoever made the last accelerator of the process.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")


class Outputs(NamedTuple):
    """What losses are made of, (B, T) each at the positions that *predict* the response's tokens and
    0 on padding; None where a pass has nothing to say."""

    logprobs: Tensor | None = None
    entropies: Tensor | None = None
    likelihood: Tensor | None = None  # () of the pretraining text
    values: Tensor | None = None


class PolicyAndValue(nn.Module):
    """A policy with its value function: a separate network, or a head on the policy's trunk.

    `value` is a sequence classifier (see `pipeline.models.forward.response_scores`), maybe on the policy's base, or
    None for a head on the policy's trunk, which starts at zero. Without a `critic` there is neither,
    and every value is 0.
    """

    def __init__(self, policy: Model, value: Model | None, critic: bool = True):
        super().__init__()
        self.policy = policy
        self.value = value
        self.critic = critic
        if value is None and critic:
            dtype = torch.promote_types(policy.dtype, torch.float32)
            self.value_head = nn.Linear(hidden_width(policy), 1, dtype=dtype)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    def passes(self, processes: int = 1) -> list[nn.Module]:
        """Modules whose `Outputs` together are the losses' inputs, each a graph of its own: networks
        that share nothing that trains take turns, so that the activations of one are in memory at a time.

        Of several processes each waits for every gradient of a module, on a shared base the other's too; and
        FSDP2 wraps one module.
        """
        if asked() == "FSDP":
            return [self]
        if not self.critic:
            return [PolicyPass(self.policy)]
        shared = {id(p) for p in self.policy.parameters()}
        if self.value is None or (
            processes > 1 and any(id(p) in shared for p in self.value.parameters())
        ):
            return [self]
        return [PolicyPass(self.policy), ValuePass(self.value)]

    @property
    def _no_split_modules(self) -> list[str]:
        """Where transformers models say which of their layers an engine gathers one at a time."""
        models = [self.policy] if self.value is None else [self.policy, self.value]
        names = {name for model in models for name in inner(model)._no_split_modules or ()}
        return sorted(names & {type(module).__name__ for module in self.modules()})

    def forward(
        self,
        s: Sequences,
        temperature: float,
        entropy_grad: bool = False,
        ptx: Sequences | None = None,
    ) -> Outputs:
        """Everything; `ptx` is a batch of pretraining text."""
        if self.value is not None or not self.critic:
            out = _of_policy(self.policy, s, temperature, entropy_grad, ptx)
            return out._replace(values=self.values(s))
        out, hidden = _of_responses(self.policy, s, temperature, entropy_grad, hidden=True)
        values = spread(self._head(hidden), s.response_mask)
        return out._replace(values=values, likelihood=_likelihood(self.policy, ptx))

    def values(self, s: Sequences) -> Tensor:
        """Values (B, T) alone, without the policy's logits."""
        if not self.critic:
            return torch.zeros(s.response_mask.shape, device=s.response_mask.device)
        if self.value is not None:
            return response_scores(self.value, s)
        return spread(self._head(layout(self.policy).hidden(self.policy, s)), s.response_mask)

    def _head(self, hidden: Tensor) -> Tensor:
        """(n, d) -> (n,)"""
        return in_full(self.value_head, hidden).squeeze(-1)

    def policy_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters of the policy; of a shared base, those of its own adapter."""
        others = {id(p) for p in self.value_parameters()}
        mine = (p for p in self.policy.parameters() if p.requires_grad)
        return [p for p in mine if id(p) not in others]

    def value_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters of the value function alone."""
        if not self.critic:
            return []
        module = self.value_head if self.value is None else self.value
        return [p for p in module.parameters() if p.requires_grad]

    def trained_by_network(self) -> dict[str, list[nn.Parameter]]:
        """Those of each network by name."""
        value = {"value": self.value_parameters()} if self.critic else {}
        return {"policy": self.policy_parameters()} | value

    def base_logprobs(self, s: Sequences, temperature: float) -> Tensor:
        """log pi (B, T) of the responses' tokens, by the policy's base without its adapters."""
        with adapter_off(self.policy):
            return response_logprobs(self.policy, s, temperature)

    def load_trained(self, weights: dict[str, Tensor]) -> None:
        """Go on from what was `trained`, whole."""
        now = self.trained()
        held = {name: in_parts(x, now[name]) for name, x in weights.items()}
        self.load_state_dict(held, strict=False)

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
        s: Sequences,
        temperature: float,
        entropy_grad: bool = False,
        ptx: Sequences | None = None,
    ) -> Outputs:
        """Everything but values."""
        return _of_policy(self.policy, s, temperature, entropy_grad, ptx)


class ValuePass(nn.Module):
    """A separate value network alone."""

    def __init__(self, value: Model):
        super().__init__()
        self.value = value

    def forward(self, s: Sequences, *_: Any, **__: Any) -> Outputs:
        """Values alone; what the policy is told besides makes no difference here."""
        return Outputs(values=response_scores(self.value, s))


def _of_policy(
    policy: Model, s: Sequences, temperature: float, entropy_grad: bool, ptx: Sequences | None
) -> Outputs:
    out, _ = _of_responses(policy, s, temperature, entropy_grad)
    return out._replace(likelihood=_likelihood(policy, ptx))


def _of_responses(
    policy: Model, s: Sequences, temperature: float, entropy_grad: bool, hidden: bool = False
) -> tuple[Outputs, Any]:
    """Of the policy itself, and if asked for the last hidden states (n, d)."""
    of = functools.partial(logprobs_and_entropy, temperature=temperature, entropy_grad=entropy_grad)
    (logprobs, entropies), states = of_predictions(policy, s, of, hidden)
    out = Outputs(spread(logprobs, s.response_mask), spread(entropies, s.response_mask))
    return out, states


def _likelihood(policy: Model, ptx: Sequences | None) -> Tensor | None:
    """Sum of log pi(x_t | x_<t) over the real tokens of texts, temperature 1."""
    return None if ptx is None else response_logprobs(policy, ptx, 1.0).sum()
