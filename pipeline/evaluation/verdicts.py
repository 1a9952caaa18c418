"""Which stage is bad: plain sentences from a run's record, every threshold named in them.

Thresholds are rules of thumb. Those that PPO has too, as a bar of its gates or the limit of an alarm,
are the ones of the run's own config.
"""

from pipeline import steps
from pipeline.evaluation.about import Verdict
from pipeline.evaluation.record import Record


def verdicts(record: Record) -> list[Verdict]:
    """One verdict for each step that the run has and somebody has something to say of."""
    out = []
    for stage in record.stages:
        if about := steps.about(stage):
            verdict = Verdict(stage)
            about.verdict(record, verdict)
            if not verdict.findings:
                remedy = f": {record.command('eval')}" if record.evaluable else ""
                verdict.add("watch", f"Nothing was measured yet{remedy}.")
            out.append(verdict)
    return out


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
