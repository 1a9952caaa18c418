"""The loss of a micro-batch: its share of the means over the whole minibatch's real tokens."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.config.ppo import PPOConfig
from pipeline.ppo import maths
from pipeline.ppo.networks import Outputs
from pipeline.ppo.ptx import PtxBatch
from pipeline.ppo.rollout import Rollout

Sums = dict[str, Tensor]
"""Statistics by name, to be summed over micro-batches and processes."""


@dataclass
class Minibatch:
    """The episodes of an optimizer step, or some of them, and where they push."""

    rollout: Rollout
    advantages: Tensor  # (B, T)
    returns: Tensor  # (B, T)
    tokens: Tensor  # real tokens of the step, over all processes and micro-batches
    ptx: PtxBatch | None
    first: bool  # the policy is still the one that sampled
    kl_coef: float = 0.0  # of a KL penalty in the loss, where it is not in the rewards

    def rows(self, episodes: slice) -> "Minibatch":
        """A micro-batch of it."""
        return replace(
            self,
            rollout=self.rollout.rows(episodes),
            advantages=self.advantages[episodes],
            returns=self.returns[episodes],
            ptx=self.ptx and self.ptx.rows(episodes),
        )


def losses(outputs: Outputs, batch: Minibatch, config: PPOConfig) -> tuple[Tensor, Sums]:
    """The loss of what a pass has put out, and its statistics."""
    parts = []
    if outputs.logprobs is not None and outputs.entropies is not None:
        parts.append(_policy(outputs.logprobs, outputs.entropies, batch, config))
    if outputs.values is not None:
        parts.append(_value(outputs.values, batch, config))
    if outputs.likelihood is not None and batch.ptx is not None:
        parts.append(_pretraining(outputs.likelihood, batch.ptx, config))
    sums = {name: value.detach() for _, some in parts for name, value in some.items()}
    return torch.stack([loss for loss, _ in parts]).sum(), sums


def _policy(
    logprobs: Tensor, entropies: Tensor, batch: Minibatch, config: PPOConfig
) -> tuple[Tensor, Sums]:
    rollout, mask = batch.rollout, batch.rollout.response_mask
    ratio = maths.policy_ratio(logprobs, rollout.old_logprobs, mask)
    loss, clipped = maths.clipped_policy_loss(
        ratio, batch.advantages, mask, config.clip_range, _sampler_weights(rollout, config)
    )
    if batch.kl_coef:
        kl = maths.kl_estimate(logprobs, rollout.ref_logprobs, config.kl_penalty)
        loss = loss + batch.kl_coef * maths.masked_sum(kl, mask)
    entropy = maths.masked_sum(entropies, mask)
    new, ratio = logprobs.detach(), ratio.detach()
    log_ratio = torch.where(mask, new - rollout.old_logprobs, 0.0)
    mismatch = torch.where(mask, new - rollout.sampler_logprobs, 0.0)
    return (loss - config.entropy_coef * entropy) / batch.tokens, {
        "policy_loss": loss,
        "entropy": entropy,
        "approxkl": 0.5 * log_ratio.square().sum(),  # LMHP's: half the mean squared log ratio
        "policy_clipped": clipped,
        "ratio": maths.masked_sum(ratio, mask),
        "ratio_off": maths.masked_sum(
            (ratio - 1).square(), mask
        ),  # float32 would lose it in squares
        "mismatch": mismatch.abs().sum() * batch.first,
        "mismatch_tokens": mask.sum() * batch.first,
    }


def _value(values: Tensor, batch: Minibatch, config: PPOConfig) -> tuple[Tensor, Sums]:
    rollout = batch.rollout
    loss, clipped = maths.clipped_value_loss(
        values, rollout.values, batch.returns, rollout.response_mask, config.clip_range_value
    )
    return config.vf_coef * loss / batch.tokens, {"value_loss": loss, "value_clipped": clipped}


def _pretraining(likelihood: Tensor, ptx: PtxBatch, config: PPOConfig) -> tuple[Tensor, Sums]:
    return -config.ptx_coef * likelihood / ptx.tokens, {
        "ptx_likelihood": likelihood,
        "ptx_tokens": ptx.texts.response_mask.sum(),
    }


def _sampler_weights(rollout: Rollout, config: PPOConfig) -> Tensor | None:
    """Truncated importance weights of the tokens, old policy over sampler, if configured."""
    if config.sampler_correction is None:
        return None
    return maths.importance_weights(
        rollout.old_logprobs,
        rollout.sampler_logprobs,
        rollout.response_mask,
        config.sampler_correction,
    )
