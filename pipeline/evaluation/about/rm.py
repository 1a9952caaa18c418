"""What the evaluation shows about a reward model.

Human comparisons let reward models reach .63 to .72 (arXiv 2403.17031, 2203.02155).
"""

from typing import Any

from pipeline.evaluation.about import Chart, Verdict
from pipeline.evaluation.record import Record
from pipeline.ppo.preflight import above_length, better_rule, of_rm

ACCURACY_WATCH = 0.60
JUDGE_ACCURACY_WATCH = 0.70
CALIBRATION_WATCH = 0.10

CHARTS = [
    Chart("Loss", {"training": "train/loss"}),
    Chart(
        "Pairs ranked right", {"training": "train/accuracy", "held-out": "validation/accuracy"}, 0.5
    ),
]

EXPECTED = {
    "train/loss": (
        "It learns by heart, or something beside the answers tells them apart: look at its card.",
        "It learns less: learning_rate too high or too low, ranks the wrong way round, or noisier labels.",
    ),
    "train/accuracy": (
        "It learns less: learning_rate, ranks the wrong way round, or noisier labels.",
        "It learns by heart, or something beside the answers tells them apart.",
    ),
    "validation/accuracy": (
        "It ranks less right: learning_rate, noisier labels, or an SFT model whose answers are alike.",
        "Held-out rankings may be among those it learns from, or they are easier.",
    ),
    "accuracy": (
        "It ranks less right: learning_rate, noisier labels, or an SFT model whose answers are alike.",
        "Held-out rankings may be among those it learns from, or they are easier.",
    ),
}


def verdict(record: Record, verdict: Verdict) -> None:
    """What PPO asks of it, its calibration and length, and the judge."""
    own = record.rankings
    metrics = {**(own.metrics() if own else {}), **record.stages["rm"].metrics}
    verdict.findings += [f for f in of_rm(metrics, record.bars) if f.level is not None]
    if own is not None:
        accuracy = own.accuracy.share
        verdict.grade(
            accuracy >= ACCURACY_WATCH,
            f"It ranks {accuracy:.1%} of held-out pairs right (watch below {ACCURACY_WATCH:.0%}).",
            "watch",
        )
        verdict.grade(
            own.calibration_error <= CALIBRATION_WATCH,
            f"Its probabilities are off by {own.calibration_error:.3f} on average (watch above "
            f"{CALIBRATION_WATCH:.2f}).",
            "watch",
        )
        limit = record.limits.score_length_corr
        verdict.grade(
            abs(own.pearson) <= limit,
            f"Scores correlate with length by {own.pearson:+.2f} (watch beyond {limit:.2g}).",
            "watch",
        )
    against = record.result.get("rm") or {}
    if against.get("accuracy") is not None:
        _against_judge(record, verdict, against)


def _against_judge(record: Record, verdict: Verdict, against: dict[str, Any]) -> None:
    accuracy, pairs, longer = against["accuracy"], against["pairs"], against["length_baseline"]
    interval = against["accuracy_low"], against["accuracy_high"]
    rule, bar = better_rule(longer)
    text = (
        f"It agrees with the judge on {accuracy:.3f} of {pairs} untied pairs of SFT responses (95 % "
        f"interval from {interval[0]:.3f}); '{rule}' gets {bar:.3f}"
    )
    level, why = above_length(accuracy, interval, longer, pairs, record.bars)
    if level == "good":
        enough = accuracy >= JUDGE_ACCURACY_WATCH
        verdict.grade(enough, f"{text} (watch below {JUDGE_ACCURACY_WATCH:.2f}).", "watch")
    else:
        verdict.add(level, f"{text} ({level}: {why}).")
    best = against.get("best_of_n") or []
    if len(best) > 1:
        first, last = best[0]["judge"], best[-1]["judge"]
        verdict.grade(
            last > first,
            f"The best of {best[-1]['n']} by its score gets {last:.2f} from the judge, any one "
            f"{first:.2f} (bad unless picking by it helps, watch on too few pairs to tell).",
            "watch" if pairs < record.bars.rm_pairs else "bad",
        )
