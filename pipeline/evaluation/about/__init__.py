"""What the evaluation shows about each step, a module a step, named in the table of steps.

Each has CHARTS (its curves in the report), EXPECTED (what it usually means that one of them, or a number of the
manifest, is below its band or above: `pipeline.evaluation.expect`) and verdict(record, verdict) (its findings).
Here are the words that several of them use. Thresholds are rules of thumb; those that PPO has too, as a bar of its gates or the
limit of an alarm, are the ones of the run's own config.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from pipeline import steps
from pipeline.evaluation import expect
from pipeline.evaluation.expect import Departure
from pipeline.evaluation.record import Record
from pipeline.ppo.preflight import Finding, Level

RANK: dict[Level | None, int] = {None: 0, "good": 0, "watch": 1, "bad": 2}
EOS_WATCH = 0.98


class Chart(NamedTuple):
    """Curves of metrics.jsonl on one axes."""

    title: str
    series: dict[str, str]  # legend -> metric
    level: float | None = None  # dashed
    x: str = "step"
    over: str = "step"  # what is logged along the x axis


@dataclass
class Verdict:
    """All findings about one step; its level is that of the worst."""

    stage: str
    findings: list[Finding] = field(default_factory=list)

    @property
    def level(self) -> Level:
        """`watch` when nothing was found."""
        worst = max(self.findings, key=lambda finding: RANK[finding.level], default=None)
        return (worst and worst.level) or "watch"

    @property
    def title(self) -> str:
        """The step's, from the table."""
        return steps.TABLE[self.stage].title

    def add(self, level: Level, text: str) -> None:
        """One more finding."""
        self.findings.append(Finding(level, text))

    def grade(self, good: bool, text: str, otherwise: Level = "bad") -> None:
        """A finding that is good or else something worse."""
        self.add("good" if good else otherwise, text)

    def ended(self, share: float, bar: float) -> None:
        """How many responses end by themselves; `bar` is that of PPO's gate."""
        level: Level = "bad" if share < bar else "watch" if share < EOS_WATCH else "good"
        text = f"{share:.1%} of responses end by themselves"
        self.add(level, f"{text} (watch below {EOS_WATCH:.0%}, bad below {bar:.0%}).")

    def wins(self, versus: dict, other: str) -> None:
        """How often the judge prefers it."""
        text = (
            f"The judge prefers it to {other} in {versus['rate']:.1%} of prompts "
            f"(95 % interval {versus['low']:.1%} to {versus['high']:.1%}; bad when all below 50 %, "
            "watch when 50 % is inside)."
        )
        self.add(
            "bad" if versus["high"] < 0.5 else "watch" if versus["low"] <= 0.5 else "good", text
        )


def verdicts(record: Record) -> list[Verdict]:
    """One verdict for each step that the run has and somebody has something to say of."""
    out = []
    for stage in record.stages:
        if about := steps.about(stage):
            verdict = Verdict(stage)
            about.verdict(record, verdict)
            for departure in departures(record, stage):
                verdict.add("watch", str(departure))
            if not verdict.findings:
                remedy = f": {record.command('eval')}" if record.evaluable else ""
                verdict.add("watch", f"Nothing was measured yet{remedy}.")
            out.append(verdict)
    return out


def departures(record: Record, stage: str) -> list[Departure]:
    """What left the band of the recipe's healthy runs; nothing of a stage that was made otherwise than those."""
    expected, own = record.expected, record.stages[stage]
    if expected is None or expect.caveats(expected, own):
        return []
    return expect.departures(expected, own)


def conclusion(found: list[Verdict]) -> str:
    """The stage to look at first, in one sentence."""
    bad = [v for v in found if v.level == "bad"]
    watch = [v for v in found if v.level == "watch"]
    if not found:
        return "No stage has been made yet."
    if bad:
        later = " Later stages build on it; mend it first." if bad[0] is not found[-1] else ""
        return f"Bad: {bad[0].title}.{later}"
    if watch:
        return f"No stage is bad; look at: {', '.join(v.title for v in watch)}."
    return "Every stage passes its checks."
