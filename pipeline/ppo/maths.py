"""PPO's arithmetic as pure functions of tensors; imports torch alone.

Shapes: B responses of at most T tokens, vocabulary V. `response_mask` (B, T) is True on real tokens;
the EOS that ends a response is real, what follows is padding. Padding may hold anything, NaN
included: it is replaced through `torch.where` (NaN * 0 is NaN) and never enters a number. Losses
and statistics are *sums* over real tokens; whoever calls divides by the global token count, so that
neither micro-batches nor processes change a number.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

AllSum = Callable[[Tensor], Tensor]
"""Adds a tensor over all processes; the identity on one process."""


def one_process(x: Tensor) -> Tensor:
    """The `AllSum` of a single process."""
    return x


def precise(x: Tensor) -> Tensor:
    """In float64 where the device has it (Apple's has not)."""
    return x if x.device.type == "mps" else x.double()


# --- masked reductions --------------------------------------------------------------------------


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum over real tokens; (B, T) -> scalar."""
    return torch.where(mask, x, 0.0).sum()


def masked_mean(x: Tensor, mask: Tensor, all_sum: AllSum = one_process) -> Tensor:
    """Mean over the real tokens of all processes; 0 when there are none."""
    return all_sum(masked_sum(x, mask)) / all_sum(mask.sum()).clamp(min=1)


def masked_whiten(
    x: Tensor, mask: Tensor, *, keep_mean: bool = False, all_sum: AllSum = one_process
) -> Tensor:
    """Mean 0 (unless `keep_mean`) and variance 1 over the real tokens of all processes; padding is 0.

    The variance is Bessel-corrected as in lm-human-preferences.
    """
    count = all_sum(mask.sum())
    mean = masked_mean(x, mask, all_sum)
    centred = torch.where(mask, x - mean, 0.0)
    variance = all_sum(centred.square().sum()) / (count - 1).clamp(min=1)
    white = centred * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, white + mean, 0.0) if keep_mean else white


# --- distance to the reference --------------------------------------------------------------------


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """Per-token estimates of KL(pi || ref) under samples of pi (joschu.net/blog/kl-approx).

    With D = log pi - log ref: k1 = D, k2 = D^2 / 2, k3 = exp(-D) - 1 + D.
    """
    delta = logprobs - ref_logprobs
    if kind == "k1":
        return delta
    if kind == "k2":
        return delta.square() / 2
    if kind == "k3":
        return torch.expm1(-delta) + delta
    raise ValueError(f"unknown KL estimator {kind!r}")


# --- rewards and advantages ---------------------------------------------------------------------


def missing_eos_scores(scores: Tensor, ended: Tensor, rule: str, penalty: float) -> Tensor:
    """Apply the missing-EOS rule to scores (B,), given ended (B,) bool.

    subtract: score - penalty (InstructGPT's spirit); replace: -penalty (N+, trl); none: as it is.
    """
    if rule == "subtract":
        return torch.where(ended, scores, scores - penalty)
    if rule == "replace":
        return torch.where(ended, scores, torch.full_like(scores, -penalty))
    if rule == "none":
        return scores
    raise ValueError(f"unknown missing-EOS rule {rule!r}")


def token_rewards(scores: Tensor, kl: Tensor, response_mask: Tensor, kl_coef: float) -> Tensor:
    """-kl_coef * kl on every real token, plus the score on the last one (InstructGPT eq. 2).

    scores (B,), kl (B, T), response_mask (B, T) -> (B, T). A response without a token gets nothing.
    """
    rewards = torch.where(response_mask, -kl_coef * kl, 0.0)
    lengths = response_mask.sum(dim=1)
    last = (lengths - 1).clamp(min=0)[:, None]
    at_last = torch.where(lengths > 0, scores, 0.0)[:, None].to(rewards.dtype)
    return rewards.scatter_add(1, last, at_last)


def gae(
    rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438) over real tokens; all (B, T).

    The value after the last real token is 0. Padding is skipped, wherever it stands: the recursion
    carries across it. Returns advantages and returns = advantages + values, both 0 on padding.
    """
    next_value = torch.zeros_like(values[:, 0])
    next_advantage = torch.zeros_like(next_value)
    columns = []
    for t in reversed(range(rewards.shape[1])):
        real = response_mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(real, delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(real, values[:, t], next_value)
        columns.append(torch.where(real, next_advantage, 0.0))
    advantages = torch.stack(columns[::-1], dim=1)
    returns = torch.where(response_mask, advantages + values, 0.0)
    return advantages, returns


def masked_row_sums(x: Tensor, mask: Tensor) -> Tensor:
    """(B, T) -> (B,) over real tokens."""
    return torch.where(mask, x, 0.0).sum(dim=1)


def leave_one_out(rewards: Tensor) -> Tensor:
    """RLOO (arXiv 2402.14740): each reward less the mean of the others of its group; (groups, K)."""
    others = rewards.shape[1] - 1
    return rewards - (rewards.sum(dim=1, keepdim=True) - rewards) / others


def standardised(rewards: Tensor) -> Tensor:
    """GRPO (arXiv 2402.03300): each reward as standard deviations from its group's mean; (groups, K).

    A group whose rewards are all the same pushes nowhere.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return centred / (rewards.std(dim=1, keepdim=True) + 1e-4)


# --- losses -------------------------------------------------------------------------------------


def policy_ratio(logprobs: Tensor, old_logprobs: Tensor, response_mask: Tensor) -> Tensor:
    """pi / pi_old per token, exactly 1 on padding; (B, T)."""
    return torch.where(response_mask, logprobs - old_logprobs, 0.0).exp()


def importance_weights(
    old_logprobs: Tensor, sampler_logprobs: Tensor, response_mask: Tensor, cap: float
) -> Tensor:
    """min(pi_old / pi_sampler, cap) per token, 1 on padding: truncated importance sampling (Ionides,
    2008) of tokens that another precision, or another engine, has drawn; (B, T)."""
    return policy_ratio(old_logprobs, sampler_logprobs, response_mask).clamp(max=cap)


def clipped_policy_loss(
    ratio: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    clip_range: float,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Pessimistic surrogate (arXiv 1707.06347 eq. 7) and the number of clipped tokens, both summed.

    `weights` (B, T) multiply the tokens' losses."""
    advantages = torch.where(response_mask, advantages, 0.0)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    worse = torch.maximum(unclipped, clipped)
    return (
        masked_sum(worse if weights is None else worse * weights, response_mask),
        masked_sum((clipped > unclipped).to(ratio.dtype), response_mask),
    )


def clipped_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    response_mask: Tensor,
    clip_range: float | None,
) -> tuple[Tensor, Tensor]:
    """Half the squared error, the worse of clipped and not, and the clipped tokens; summed.

    Clipping keeps values within clip_range of the rollout's values, an oddity of
    lm-human-preferences (train_policy.py, `vf_losses2`) that InstructGPT's code inherited.
    """
    values = torch.where(response_mask, values, 0.0)
    returns = torch.where(response_mask, returns, 0.0)
    loss = (values - returns).square()
    if clip_range is None:
        return 0.5 * loss.sum(), torch.zeros_like(loss.sum())
    old_values = torch.where(response_mask, old_values, 0.0)
    near = torch.clamp(values, old_values - clip_range, old_values + clip_range)
    clipped = (near - returns).square()
    return 0.5 * torch.maximum(loss, clipped).sum(), (clipped > loss).to(loss.dtype).sum()


def explained_variance(
    values: Tensor, returns: Tensor, response_mask: Tensor, all_sum: AllSum = one_process
) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over real tokens; 0 when returns do not vary."""
    error = returns - values
    residual = error - masked_mean(error, response_mask, all_sum)
    spread = returns - masked_mean(returns, response_mask, all_sum)
    unexplained = all_sum(masked_sum(residual.square(), response_mask))
    total = all_sum(masked_sum(spread.square(), response_mask))
    return torch.where(total > 0, 1 - unexplained / total.clamp(min=1e-12), torch.zeros_like(total))


# --- controllers --------------------------------------------------------------------------------


def adapted_kl_coef(kl_coef: float, kl: float, target: float, episodes: int, horizon: int) -> float:
    """LMHP's proportional controller (arXiv 1909.08593, 2.2): moves log kl_coef towards the target.

    kl and target in nats per response; the error is clipped to +-0.2.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * episodes / horizon)


def lr_factor(total: int, warmup_ratio: float, schedule: str, step: int) -> float:
    """Share of the highest learning rate at a step of `total`: a rise in a line, then constant, linear or
    cosine to 0."""
    warmup = int(warmup_ratio * total)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(total - warmup, 1)
    if schedule == "linear":
        return max(1 - done, 0.0)
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0))) if schedule == "cosine" else 1.0
