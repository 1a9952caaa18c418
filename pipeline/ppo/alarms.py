"""Signs of a PPO run going wrong while it still runs; no torch, and nothing here stops a run.

An alarm depends on its own iteration and on the first one alone, so a run that was cut off and goes
on writes the same record. What each sign means: arXiv 2210.10760 (KL), 2310.03716 (length).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pipeline.config.ppo import AlarmLimits
from pipeline.process.progress import say

Metrics = Mapping[str, Any]
"""One iteration's numbers by name, as metrics.jsonl has them; a number that was NaN is None."""

PREFIX = "alarm/"


class Alarms:
    """Marks each iteration with `alarm/NAME` 0.0 or 1.0, and says an alarm the first time it rings.

    `rows`: what a run that goes on has recorded already. `tell(title, text)` is told of an alarm as well.
    """

    def __init__(
        self,
        limits: AlarmLimits,
        rows: Iterable[Metrics] = (),
        tell: Callable[[str, str], None] | None = None,
    ):
        self.limits, self.tell = limits, tell
        self.first: Metrics | None = None
        self.told: set[str] = set()
        for row in rows:
            self.first = self.first or row
            self.told |= {name for name, value in row.items() if name.startswith(PREFIX) and value}

    def __call__(self, iteration: int, metrics: Metrics) -> dict[str, float]:
        """Alarms of an iteration (from 1), all of them."""
        self.first = self.first or metrics
        rings = ringing(iteration, metrics, self.first, self.limits)
        marked = {f"{PREFIX}{name}": float(rang) for name, rang in rings.items()}
        for name, meaning in meanings(self.limits).items():
            if rings[name] and f"{PREFIX}{name}" not in self.told:
                self.told.add(f"{PREFIX}{name}")
                say(f"ppo: alarm: iteration {iteration}: {meaning}")
                if self.tell:
                    self.tell(f"alarm {name}", f"iteration {iteration}: {meaning}")
        return marked


def ringing(
    iteration: int, metrics: Metrics, first: Metrics, limits: AlarmLimits
) -> dict[str, bool]:
    """Name of every alarm -> whether it rings; a number that is missing rings none."""
    longer = _ratio(metrics, first, "response/length")
    explained: Any = metrics.get("val/explained_variance")
    settled = iteration > limits.value_warmup and explained is not None
    per_token = _number(metrics, "objective/kl") / (_number(metrics, "response/length") or 1.0)
    correlation = abs(_number(metrics, "objective/score_length_corr"))
    return {
        "kl_per_token": per_token > limits.kl_per_token,
        "length": longer > limits.length or longer < 1 / limits.length,
        "score_length_corr": correlation > limits.score_length_corr,
        "repeated_ngrams": _number(metrics, "response/repeated_ngrams") > limits.repeated_ngrams,
        "explained_variance": settled and explained < limits.explained_variance,
    }


def meanings(limits: AlarmLimits) -> dict[str, str]:
    """Name of every alarm -> what it means that it rings, with its limit and what helps."""
    return {
        "kl_per_token": f"KL to SFT is over {limits.kl_per_token:.3g} nats a token, where scores may rise while "
        "answers get worse; look at the samples, raise kl_coef or stop there",
        "length": f"responses are over {limits.length:.3g} times as long or as short as at first; "
        "look at the samples",
        "score_length_corr": f"scores follow length, r beyond {limits.score_length_corr:.2g}; mend the "
        "reward or set length_penalty",
        "repeated_ngrams": f"over {limits.repeated_ngrams:.0%} of the responses' 4-grams repeat "
        "earlier ones; raise kl_coef",
        "explained_variance": "the value network explains less than "
        f"{limits.explained_variance:.2g} of the variance of returns; raise value_learning_rate",
    }


def _number(metrics: Metrics, name: str) -> float:
    """A number of an iteration; 0, which rings nothing, when it is missing."""
    return metrics.get(name) or 0.0


def _ratio(metrics: Metrics, first: Metrics, name: str) -> float:
    """A number as a multiple of the first iteration's; 1, which rings nothing, when it is missing."""
    now, then = metrics.get(name), first.get(name)
    return 1.0 if now is None or not then else now / then
