"""What an iteration is measured by: means over the real tokens or episodes of all processes."""

import contextlib
import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline.config.ppo import PPOConfig
from pipeline.ppo import maths
from pipeline.ppo.maths import AllSum
from pipeline.ppo.rollout import Rollout


def of_rollout(
    rollout: Rollout,
    scores: Tensor,
    advantages: Tensor,
    returns: Tensor,
    config: PPOConfig,
    kl_coef: float,
    all_sum: AllSum,
) -> dict[str, float]:
    """The objective and the batch, before any step. `scores` (B,) are those the rules have shaped,
    `advantages` and `returns` (B, T) those before whitening."""
    mask = rollout.response_mask
    episodes = all_sum(torch.tensor(float(len(rollout)), device=mask.device))
    lengths = mask.sum(dim=1).float()
    dense = 0.0 if rollout.token_scores is None else rollout.token_scores.sum(dim=1)

    def mean(x: Tensor) -> float:
        return (all_sum(maths.precise(x).sum()) / episodes).item()

    kl = maths.kl_estimate(rollout.old_logprobs, rollout.ref_logprobs, config.kl_estimator)
    penalty = maths.kl_estimate(rollout.old_logprobs, rollout.ref_logprobs, config.kl_penalty)
    non_score = -kl_coef * torch.where(mask, penalty, 0.0).sum(dim=1)
    mean_advantage = maths.masked_mean(advantages, mask, all_sum)
    spread = maths.masked_mean((advantages - mean_advantage).square(), mask, all_sum).sqrt()
    explained = maths.explained_variance(rollout.values, returns, mask, all_sum)
    return {
        "objective/kl": mean(torch.where(mask, kl, 0.0).sum(dim=1)),
        "objective/scores": mean(rollout.scores + dense),
        "objective/rlhf_reward": mean(scores + dense + non_score),
        "objective/non_score_reward": mean(non_score),
        "objective/entropy": mean(torch.where(mask, -rollout.old_logprobs, 0.0).sum(dim=1)),
        "objective/kl_coef": kl_coef,
        "objective/score_length_corr": correlation(rollout.scores, lengths, episodes, all_sum),
        "response/length": mean(lengths),
        "response/truncated": mean(~rollout.ended),
        "response/repeated_ngrams": _share(
            repeated_ngrams(rollout.response_ids()), mask.device, all_sum
        ),
        "val/num_eos_tokens": all_sum(rollout.ended.sum()).item(),
        **({"val/explained_variance": explained.item()} if config.critic() else {}),
        "val/advantage_mean": mean_advantage.item(),
        "val/advantage_std": spread.item(),
    }


def repeated_ngrams(responses: list[list[int]], n: int = 4) -> tuple[int, int]:
    """(n-grams that occurred before in the same response, all n-grams) of responses' real tokens."""
    repeated = total = 0
    for ids in responses:
        grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
        repeated += len(grams) - len(set(grams))
        total += len(grams)
    return repeated, total


def _share(counts: tuple[int, int], device: torch.device, all_sum: AllSum) -> float:
    """(part, whole) as a share over all processes; 0 of nothing."""
    part, whole = all_sum(torch.tensor(counts, device=device)).tolist()
    return part / max(whole, 1)


def correlation(x: Tensor, y: Tensor, episodes: Tensor, all_sum: AllSum) -> float:
    """Pearson's r of (B,) and (B,) over all processes; 0 when either does not vary."""
    x = x - all_sum(x.sum()) / episodes
    y = y - all_sum(y.sum()) / episodes
    xy, xx, yy = all_sum(torch.stack([x * y, x * x, y * y]).sum(dim=1)).tolist()
    return xy / math.sqrt(xx * yy) if xx * yy > 0 else 0.0


def of_update(total: dict[str, float]) -> dict[str, float]:
    """Means over the real tokens of all minibatches, from their sums; gradient norms over steps."""
    tokens, steps = total["tokens"], total["steps"]
    ratio = total["ratio"] / tokens
    metrics = {
        "loss/policy_avg": total["policy_loss"] / tokens,
        "policy/approxkl_avg": total["approxkl"] / tokens,
        "policy/clipfrac_avg": total["policy_clipped"] / tokens,
        "policy/entropy_avg": total["entropy"] / tokens,
        "policy/grad_norm": total["policy/grad_norm"] / steps,
        "val/ratio": ratio,
        "val/ratio_var": total["ratio_off"] / tokens - (ratio - 1) ** 2,
        "val/sampler_mismatch": total["mismatch"] / total["mismatch_tokens"],
    }
    if "value_loss" in total:
        metrics["loss/value_avg"] = total["value_loss"] / tokens
        metrics["value/grad_norm"] = total["value/grad_norm"] / steps
        metrics["val/clipfrac_avg"] = total["value_clipped"] / tokens
    if "ptx_tokens" in total:
        metrics["loss/ptx_avg"] = -total["ptx_likelihood"] / total["ptx_tokens"]
    return metrics


class Clock:
    """Seconds by phase of one iteration."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time what happens within, as `time/PHASE`."""
        start = time.perf_counter()
        yield
        self.seconds[f"time/{phase}"] = time.perf_counter() - start
