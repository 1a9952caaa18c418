"""Invariants checked while PPO runs; each error names the step and the likely cause."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pipeline.engines.whole import local
from pipeline.errors import UserError
from pipeline.ppo.maths import AllSum, masked_mean, one_process
from pipeline.ppo.rollout import Rollout
from pipeline.ppo.sampler import Sampler


class InvariantError(UserError):
    """PPO's own arithmetic does not hold: a fault of the program or of a model, never hidden."""


TOLERANCE = {False: 1e-3, True: 0.25}
"""Nats a token that two passes of the same weights may differ by, computed in float32 or rounded to bf16."""
RATIO_TOLERANCE = {False: 1e-3, True: 0.1}
"""The same of the ratio's two passes, at most in float32 and on average in bf16 (.02 at 135M, single tokens .3)."""


def finite_scores(scores: Tensor, step: int, prompts: list[str], texts: list[str]) -> None:
    """Every score is a number, or the run ends before it can reach a weight."""
    bad = torch.nonzero(~torch.isfinite(scores)).flatten().tolist()
    if bad:
        i = bad[0]
        raise UserError(
            f"ppo: iteration {step}: the reward of sample {i} is {scores[i].item()} "
            f"({len(bad)} of {len(scores)} not finite)\n  prompt:   {prompts[i]!r}\n"
            f"  response: {texts[i]!r}\nMend the reward; the last saved state is untouched."
        )


def finite_step(losses: dict[str, Tensor], grad_norms: dict[str, Tensor], step: int) -> None:
    """Losses and gradient norms are finite; raised before `optimizer.step`."""
    for name, value in {**losses, **grad_norms}.items():
        if not torch.isfinite(value):
            raise InvariantError(
                f"ppo: optimizer step {step}: {name} is {value.item()}; nothing was stepped and the "
                "last saved state is good. Lower learning_rate, or look at this iteration's scores."
            )


def ratio_is_one(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, step: int, rounded: bool):
    """Before the first optimizer step of an iteration the policy is the one that sampled.

    Rounding moves an unlikely token by far more than the others: where it is `rounded` the mean tells.
    """
    tolerance = RATIO_TOLERANCE[rounded]
    off = torch.where(mask, (logprobs - old_logprobs).abs(), 0.0)
    gap = masked_mean(off, mask) if rounded else off.max()
    if not gap <= tolerance:
        raise InvariantError(
            f"ppo: iteration {step}: before any step |log ratio| {'averages' if rounded else 'reaches'} "
            f"{gap.item():.2e} (allowed {tolerance:.0e}). Rollout and update disagree: dropout, another "
            "temperature, another precision, or an attention that depends on padding."
        )


def starts_at_reference(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, rounded: bool):
    """At iteration 0 the policy is the reference."""
    tolerance = TOLERANCE[rounded]
    gap = masked_mean((logprobs - ref_logprobs).abs(), mask)
    if not gap <= tolerance:
        raise InvariantError(
            f"ppo: iteration 0: policy and reference differ by {gap.item():.2e} nats per token "
            f"(allowed {tolerance:.0e}); they must start from the same weights, and dtype "
            "round the reference less than that."
        )


def sampler_is_the_policy(
    rollout: Rollout, sampler: Sampler, step: int, all_sum: AllSum = one_process
) -> None:
    """The sampler's weights are the policy's, as far as its precision lets anybody see (trl#5312).

    The ratio cannot show it where old logprobs are recomputed: they are the policy's own.
    """
    off = (rollout.old_logprobs - rollout.sampler_logprobs).abs()
    gap = masked_mean(off, rollout.response_mask, all_sum)
    if not gap <= sampler.mismatch:
        raise InvariantError(
            f"ppo: iteration {step}: {sampler.name} sampled from other weights than the policy's: its "
            f"logprobs differ by {gap.item():.2e} nats per token (allowed {sampler.mismatch:.0e})"
        )


def something_to_train(networks: dict[str, list[nn.Parameter]]) -> None:
    """Every network has a trainable parameter."""
    for name, parameters in networks.items():
        if not parameters:
            raise InvariantError(
                f"ppo: the {name} network has nothing to train: all of it is frozen"
            )


@contextlib.contextmanager
def moves(
    networks: dict[str, list[nn.Parameter]], optimizer: Optimizer, step: int
) -> Iterator[None]:
    """Within, the first optimizer step moves each network whose gradient is not 0 (trl#3926).

    Looks at one number a parameter, the one with the largest gradient g: no copy of the weights. And
    only where Adam's first step, lr * g / (g + eps), is more than rounding: the first rate of a long
    warm-up, or a gradient that is itself rounding, may leave weights as they are. A parameter that the
    optimizer does not hold counts with the rate of its network.
    """
    looked_at = []
    for (name, parameters), group in zip(networks.items(), optimizer.param_groups, strict=True):
        for p in parameters if step == 0 else ():
            if p.grad is not None and local(p.grad).numel():
                gradient, weight = local(p.grad).flatten(), local(p.detach()).flatten()
                place = gradient.abs().argmax()
                g, before = gradient[place].abs(), weight[place].clone()
                moved = group["lr"] * g / (g + group["eps"])
                if bool(moved > 2 * torch.finfo(p.dtype).eps * before.abs()):
                    looked_at.append((name, p, place, before))
    yield
    moved = {
        name for name, p, i, before in looked_at if bool(local(p.detach()).flatten()[i] != before)
    }
    if still := {name for name, *_ in looked_at} - moved:
        raise InvariantError(
            f"ppo: the first optimizer step left the {' and the '.join(sorted(still))} network as it was "
            "though its gradient is not 0: the optimizer has other tensors"
        )


def mask_is_prefix(
    response_mask: Tensor, responses: Tensor, ended: Tensor, stop: list[int], strings: bool = False
) -> None:
    """Response masks are prefixes; a stop token stands last in a response that ended, else nowhere.

    With stop `strings` a response may end without one.
    """
    lengths = response_mask.sum(dim=1)
    prefix = torch.arange(response_mask.shape[1], device=lengths.device)[None, :] < lengths[:, None]
    is_stop = torch.isin(responses, torch.tensor(stop, device=responses.device)) & response_mask
    last = is_stop.gather(1, (lengths - 1).clamp(min=0)[:, None]).squeeze(1)
    if not (bool((prefix == response_mask).all()) and bool((is_stop.sum(dim=1) == last).all())):
        raise InvariantError(
            "ppo: a response mask is not the prefix that ends at the first stop token"
        )
    if bool((last & ~ended).any()) or (not strings and bool((ended & ~last).any())):
        raise InvariantError("ppo: `ended` disagrees with the last real token of a response")
