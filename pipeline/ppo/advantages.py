"""From scores to advantages: with a value network (GAE), or against other responses to the same prompt."""

import torch
from torch import Tensor

from pipeline.config.ppo import PPOConfig
from pipeline.ppo import maths
from pipeline.ppo.maths import AllSum
from pipeline.ppo.rollout import Rollout


def advantages_and_returns(
    rollout: Rollout, scores: Tensor, kl_coef: float, config: PPOConfig, all_sum: AllSum
) -> tuple[Tensor, Tensor]:
    """(B, T) each, before whitening and 0 on padding, from the scores (B,) that the rules have shaped."""
    mask = rollout.response_mask
    rewards = token_rewards_of(rollout, scores, kl_coef, config)
    if config.whiten_rewards:
        rewards = maths.masked_whiten(rewards, mask, keep_mean=True, all_sum=all_sum)
    if config.advantages == "gae":
        return maths.gae(rewards, rollout.values, mask, config.gamma, config.lam)
    totals = maths.masked_row_sums(rewards, mask)
    of_group = maths.leave_one_out if config.advantages == "rloo" else maths.standardised
    ours = of_group(totals.view(-1, config.samples_per_prompt)).view(-1, 1)
    return torch.where(mask, ours, 0.0), torch.where(mask, totals[:, None], 0.0)


def token_rewards_of(rollout: Rollout, scores: Tensor, kl_coef: float, config: PPOConfig) -> Tensor:
    """(B, T), 0 on padding: the penalty for KL, what rewards gave to tokens, and the score (B,) at the end."""
    kl = maths.kl_estimate(rollout.old_logprobs, rollout.ref_logprobs, config.kl_penalty)
    coef = 0.0 if config.kl_in_loss() else kl_coef
    rewards = maths.token_rewards(scores, kl, rollout.response_mask, coef)
    return rewards if rollout.token_scores is None else rewards + rollout.token_scores
