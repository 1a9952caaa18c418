"""What the evaluation shows about supervised fine-tuning."""

from pipeline.evaluation.about import Chart, Verdict
from pipeline.evaluation.record import Record
from pipeline.ppo.preflight import of_sft

CHARTS = [
    Chart("Loss", {"training": "train/loss", "held-out": "validation/loss"}),
    Chart(
        "Token accuracy",
        {"training": "train/token_accuracy", "held-out": "validation/token_accuracy"},
    ),
]

EXPECTED = {
    "train/loss": (
        "What it is to say stands in what it is asked, or another model or data.",
        "It learns less: learning_rate too high or too low, another model or data, or labels masked that "
        "should not be.",
    ),
    "train/token_accuracy": (
        "It learns less: learning_rate, another model or data, or labels masked that should not be.",
        "What it is to say stands in what it is asked, or another model or data.",
    ),
    "validation/loss": (
        "Held-out rows may be among those it learns from, or they are others.",
        "It learns less, or by heart: fewer epochs if train/loss is within its band.",
    ),
    "eos_share": (
        "Its answers do not end: EOS is masked in the labels, or sample_tokens cuts.",
        "",
    ),
}


def verdict(record: Record, verdict: Verdict) -> None:
    """Perplexity, what PPO asks of it, and the judge."""
    metrics, sft = record.stages["sft"].metrics, record.model("sft")
    before, after = map(metrics.get, ("validation_perplexity_before", "validation_perplexity"))
    if before is not None and after is not None:
        verdict.grade(
            after < before,
            f"Held-out perplexity went from {before:.3g} to {after:.3g} (bad unless it falls).",
        )
    verdict.findings += [f for f in of_sft(metrics, record.bars) if f.level is not None]
    if "ended" in sft:
        verdict.ended(sft["ended"], record.bars.eos_share)
    if versus := record.comparison("sft_vs_base"):
        verdict.wins(versus, "the base model")
