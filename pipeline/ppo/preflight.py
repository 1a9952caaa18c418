"""Whether the SFT and the reward model are fit for PPO, by the numbers in their manifests; no torch.

PPO cannot mend what they lack: a policy that never ends, a reward that knows only length. Better told
before a run than guessed after it. The report and the summary say the same of them, by the same bars.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipeline import steps
from pipeline.config.ppo import GateBars, PPOConfig
from pipeline.errors import UserError
from pipeline.handoff.artifacts import Manifest
from pipeline.process.progress import say

Level = Literal["good", "watch", "bad"]

Metrics = Mapping[str, Any]
"""Headline metrics of a manifest, flat; those of older versions lack some."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at, in words that name its bar; `level` is None when nobody measured it."""

    level: Level | None
    text: str


def check(
    config: PPOConfig,
    parents: Mapping[str, Manifest],
    tell: Callable[[str, str], None] | None = None,
) -> None:
    """Look at the artifacts PPO starts from, name -> manifest, as `config.gates` says.

    UserError names every number that is below its bar, and what to do. `tell(title, text)` is told of what
    is below, and of a warning, as well.
    """
    if config.gates == "off":
        return
    failed = []
    for name, manifest in parents.items():
        gate = steps.gates(manifest.stage)
        found = list(gate(manifest.metrics, config.gate_bars)) if gate else []
        failed += [f"{name}: {finding.text}" for finding in found if finding.level == "bad"]
        for finding in (f for f in found if f.level == "watch"):
            say(f"ppo: warning: {name}: {finding.text}")
        if tell and (low := [f.text for f in found if f.level in ("watch", "bad")]):
            tell(f"gates of {name}", "\n".join(low))
        if missing := [finding.text for finding in found if finding.level is None]:
            say(f"ppo: gates: {name}: not measured: {', '.join(missing)}")
    if failed and config.gates == "refuse":
        advice = (
            "Mend the stage, move the bar (ppo.gate_bars), or go on all the same: ppo.gates=warn"
        )
        raise UserError("\n".join(["ppo: not fit to begin:", *(f"  {x}" for x in failed), advice]))
    for line in failed:
        say(f"ppo: warning: {line}")


def of_sft(metrics: Metrics, bars: GateBars) -> Iterator[Finding]:
    """Findings about an SFT model, good ones too."""
    longer = "train longer, or on demonstrations that end, or raise sft.sample_tokens"
    yield _gate(metrics, "eos_share", "at least", bars.eos_share, longer)
    cleaner = "look at the SFT samples: empty, cut off, or going on with the next turn"
    yield _gate(metrics, "format", "at least", bars.format, cleaner)


def of_rm(metrics: Metrics, bars: GateBars) -> Iterator[Finding]:
    """Findings about a reward model, good ones too."""
    yield _accuracy(metrics, bars)
    sizes = sorted(int(name.removeprefix("pairs_k")) for name in metrics if "pairs_k" in name)
    for k in sizes:
        if metrics[f"pairs_k{k}"] >= bars.rm_pairs:
            yield _accuracy(metrics, bars, f"_k{k}")
    deaf = "such a model does not heed its attention mask; take another"
    yield _gate(metrics, "padding_gap", "at most", bars.padding_gap, deaf)
    again = "scores are not centred on the demonstrations; train it again"
    yield _gate(metrics, "demonstration_mean", "at most", bars.demonstration_mean, again)
    yield _best_of_n(metrics, bars)


def _accuracy(metrics: Metrics, bars: GateBars, suffix: str = "") -> Finding:
    """Accuracy against that of length. Older artifacts have no interval, and a K has none."""
    name = f"accuracy{suffix}"
    value, longer = metrics.get(name), metrics.get(f"length_baseline{suffix}")
    if value is None or longer is None:
        return Finding(None, name)
    rule, bar = better_rule(longer)
    low, high = metrics.get(f"{name}_low", value), metrics.get(f"{name}_high", value)
    pairs = metrics.get(f"pairs{suffix}")
    text = f"{name} is {value:.3g}"
    text += f" on {pairs} pairs" if pairs is not None else ""
    if low < value:
        text += f" (95 % interval from {low:.3g})"
    text += f", must exceed the {bar:.3g} of '{rule}'"
    text += f" by {bars.rm_margin:.3g}" if bars.rm_margin else ""
    level, why = above_length(value, (low, high), longer, pairs, bars)
    if level == "good":
        return Finding(level, text)
    return Finding(
        level, f"{text}: {why}; {'hold out' if level == 'watch' else 'give it'} more rankings"
    )


def above_length(
    value: float, interval: tuple[float, float], longer: float, pairs: int | None, bars: GateBars
) -> tuple[Level, str]:
    """Whether an accuracy exceeds that of the better rule of length by more than chance, and if not why.

    Few pairs cannot tell, whichever way they fall, unless it is worse than a coin for certain.
    """
    low, high = interval
    _, bar = better_rule(longer)
    if low - bar > bars.rm_margin:
        return "good", ""
    if _few(pairs, bars) and high >= 0.5:
        return "watch", "too few pairs to tell"
    better = value - bar > bars.rm_margin
    return "bad", f"no better than length{' by more than chance' if better else ''}"


def _few(pairs: int | None, bars: GateBars) -> bool:
    return pairs is not None and pairs < bars.rm_pairs


def better_rule(longer: float) -> tuple[str, float]:
    """Name and accuracy of the better rule of length, from that of "the longer one wins"."""
    return (
        ("the longer one wins", longer) if longer >= 0.5 else ("the shorter one wins", 1 - longer)
    )


def _best_of_n(metrics: Metrics, bars: GateBars) -> Finding:
    """What it likes best of several is better, to those who ranked them, than any one."""
    sizes = [int(name.removeprefix("best_of_")) for name in metrics if name.startswith("best_of_")]
    if len(sizes) < 2:
        return Finding(None, "best_of_n")
    any_one, value = metrics[f"best_of_{min(sizes)}"], metrics[f"best_of_{max(sizes)}"]
    more = f" by {bars.best_of_n:.3g}" if bars.best_of_n else ""
    text = f"best_of_{max(sizes)} is {value:.3g}, must exceed the {any_one:.3g} of any one{more}"
    if value - any_one > bars.best_of_n:
        return Finding("good", text)
    if _few(metrics.get("pairs"), bars):
        return Finding("watch", f"{text}: too few pairs to tell; hold out more rankings")
    return Finding("bad", f"{text}: picking by it does not help; train it more")


RULES: dict[str, Callable[[float, float], bool]] = {
    "at least": lambda value, bar: value >= bar,
    "at most": lambda value, bar: abs(value) <= bar,
}


def _gate(metrics: Metrics, name: str, rule: str, bar: float, remedy: str) -> Finding:
    value = metrics.get(name)
    if value is None:
        return Finding(None, name)
    text = f"{name} is {value:.3g}, must be {rule} {bar:.3g}"
    return Finding("good", text) if RULES[rule](value, bar) else Finding("bad", f"{text}: {remedy}")
