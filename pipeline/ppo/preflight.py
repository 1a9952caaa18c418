"""Whether the SFT and the reward model are fit for PPO, by the numbers in their manifests; no torch.

PPO cannot mend what they lack: a policy that never ends, a reward that knows only length. Better told
before a run than guessed after it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.config.schema import GateBars, PPOConfig
from pipeline.errors import UserError
from pipeline.handoff.artifacts import Manifest
from pipeline.process.progress import say

Metrics = Mapping[str, Any]
"""Headline metrics of a manifest, flat; those of older versions lack some."""


@dataclass(frozen=True)
class Finding:
    """One number against its bar, in words; `passed` is None when it was not measured."""

    metric: str
    text: str = ""
    passed: bool | None = None


def check(config: PPOConfig, parents: Mapping[str, Manifest]) -> None:
    """Look at the artifacts PPO starts from, name -> manifest, as `config.gates` says.

    UserError names every number that is below its bar, and what to do.
    """
    if config.gates == "off":
        return
    failed = []
    for name, manifest in parents.items():
        found = look(manifest.stage, manifest.metrics, config.gate_bars)
        failed += [f"{name}: {finding.text}" for finding in found if finding.passed is False]
        if missing := [finding.metric for finding in found if finding.passed is None]:
            say(f"ppo: gates: {name}: not measured: {', '.join(missing)}")
    if failed and config.gates == "refuse":
        advice = (
            "Mend the stage, move the bar (ppo.gate_bars), or go on all the same: ppo.gates=warn"
        )
        raise UserError("\n".join(["ppo: not fit to begin:", *(f"  {x}" for x in failed), advice]))
    for line in failed:
        say(f"ppo: warning: {line}")


def look(stage: str, metrics: Metrics, bars: GateBars) -> list[Finding]:
    """Findings about one artifact, good ones too; none about a stage that has no gates."""
    gates = {"sft": _sft, "rm": _rm}.get(stage)
    return list(gates(metrics, bars)) if gates else []


def _sft(metrics: Metrics, bars: GateBars) -> Iterator[Finding]:
    longer = "train longer, or on demonstrations that end, or raise sft.sample_tokens"
    yield _gate(metrics, "eos_share", "at least", bars.eos_share, longer)
    cleaner = "look at the SFT samples: empty, cut off, or going on with the next turn"
    yield _gate(metrics, "format", "at least", bars.format, cleaner)


def _rm(metrics: Metrics, bars: GateBars) -> Iterator[Finding]:
    yield from _accuracies(metrics, bars)
    deaf = "such a model does not heed its attention mask; take another"
    yield _gate(metrics, "padding_gap", "at most", bars.padding_gap, deaf)
    again = "scores are not centred on the demonstrations; train it again"
    yield _gate(metrics, "demonstration_mean", "at most", bars.demonstration_mean, again)
    yield _best_of_n(metrics, bars)


def _accuracies(metrics: Metrics, bars: GateBars) -> Iterator[Finding]:
    """Accuracy above that of "the longer one wins": overall, and for each K with enough pairs."""
    sizes = sorted(int(name.removeprefix("pairs_k")) for name in metrics if "pairs_k" in name)
    enough = [k for k in sizes if metrics[f"pairs_k{k}"] >= bars.rm_pairs]
    for suffix in ("", *(f"_k{k}" for k in enough)):
        name, baseline = f"accuracy{suffix}", metrics.get(f"length_baseline{suffix}")
        of_what = "of 'the longer one wins'"
        yield _above(metrics, name, baseline, of_what, bars.rm_margin, "give it more rankings")


def _best_of_n(metrics: Metrics, bars: GateBars) -> Finding:
    """What it likes best of several is better, to those who ranked them, than any one."""
    sizes = [int(name.removeprefix("best_of_")) for name in metrics if name.startswith("best_of_")]
    if len(sizes) < 2:
        return Finding("best_of_n")
    any_one, remedy = metrics[f"best_of_{min(sizes)}"], "picking by it does not help; train it more"
    return _above(metrics, f"best_of_{max(sizes)}", any_one, "of any one", bars.best_of_n, remedy)


RULES: dict[str, Callable[[float, float], bool]] = {
    "at least": lambda value, bar: value >= bar,
    "at most": lambda value, bar: abs(value) <= bar,
}


def _gate(metrics: Metrics, name: str, rule: str, bar: float, remedy: str) -> Finding:
    value = metrics.get(name)
    if value is None:
        return Finding(name)
    passed = RULES[rule](value, bar)
    text = f"{name} is {value:.3g}, must be {rule} {bar:.3g}: {remedy}"
    return Finding(name, text, passed)


def _above(
    metrics: Metrics, name: str, other: float | None, of_what: str, margin: float, remedy: str
) -> Finding:
    """A number that must exceed another by more than a margin."""
    value = metrics.get(name)
    if value is None or other is None:
        return Finding(name)
    more = f" by {margin:.3g}" if margin else ""
    text = f"{name} is {value:.3g}, must exceed the {other:.3g} {of_what}{more}: {remedy}"
    return Finding(name, text, value - other > margin)
