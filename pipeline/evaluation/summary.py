"""What a run reached, in one table: `python -m pipeline.evaluation.summary --run checkpoints/tiny`.

Printed at the end of `make sft rm ppo`; reads records only, so it takes a fraction of a second.
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.cli import reporting_errors
from pipeline.errors import UserError
from pipeline.evaluation.record import Record, ends, load_record, rankings
from pipeline.evaluation.verdicts import conclusion, verdicts

COLOURS = {"good": "green", "watch": "yellow", "bad": "red"}

Line = tuple[str, str, str]
"""What, before, after."""


def main(argv: list[str] | None = None) -> None:
    """Print the summary of a run."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.evaluation.summary", description=__doc__
    )
    parser.add_argument("--run", type=Path, required=True)
    args = parser.parse_args(argv)
    record = load_record(args.run)
    if not record.stages:
        raise UserError(
            f"{args.run}: nothing has been made yet; begin with: make sft RUN={args.run.name}"
        )
    show(record, Console())


def show(record: Record, console: Console) -> None:
    """The table, where things lie, and what to do next."""
    console.print(table(record))
    for problem in record.problems:
        console.print(Text(f"  ! {problem}", style="yellow"))
    console.print(Text(f"  {conclusion(verdicts(record))}"))
    for what, text in [*places(record), ("next", next_step(record))]:
        console.print(
            Text(f"  {what:<8} {text}", style="bold" if what == "next" else ""), soft_wrap=True
        )


def table(record: Record) -> Table:
    """One block of lines a stage."""
    levels = {verdict.stage: verdict.level for verdict in verdicts(record)}
    out = Table(title=f"{record.run}", title_justify="left", show_edge=False, pad_edge=False)
    for name in ("stage", "measured"):
        out.add_column(name)
    for name in ("before", "after"):
        out.add_column(name, justify="right")
    for stage, lines in (
        ("sft", sft_lines(record)),
        ("rm", rm_lines(record)),
        ("ppo", ppo_lines(record)),
    ):
        if stage not in record.stages:
            continue
        for i, (what, before, after) in enumerate(lines):
            label = Text(
                f"{stage} ({levels[stage]})" if i == 0 else "", style=COLOURS[levels[stage]]
            )
            out.add_row(label, what, before, after)
        out.add_section()
    return out


def sft_lines(record: Record) -> list[Line]:
    """Base model against SFT."""
    metrics = record.stages["sft"].metrics if "sft" in record.stages else {}
    first, last = metrics.get("validation_perplexity_before"), metrics.get("validation_perplexity")
    return [("held-out perplexity", number(first), number(last)), *_graded(record, "base", "sft")]


def rm_lines(record: Record) -> list[Line]:
    """Accuracies beside what length alone reaches."""
    lines = []
    measured = rankings(record.held_out)
    if measured is not None:
        lines.append(
            (
                f"accuracy, {measured.accuracy.pairs} held-out pairs",
                f"{share(measured.length_baseline)} by length",
                share(measured.accuracy.share),
            )
        )
    against = record.result.get("rm") or {}
    if against.get("accuracy") is not None:
        lines.append(
            (
                f"agrees with the judge, {against['pairs']} pairs",
                f"{share(against['length_baseline'])} by length",
                share(against["accuracy"]),
            )
        )
    return lines or [("held-out rankings", "", "none")]


def ppo_lines(record: Record) -> list[Line]:
    """SFT against PPO."""
    curve = record.curves.get("ppo", [])
    first, last = ends(curve, "objective/scores") or (None, None)
    lines = [("score it optimises", number(first), number(last)), *_graded(record, "sft", "ppo")]
    versus = record.comparison("ppo_vs_sft")
    if versus:
        interval = f"{share(versus['low'])} to {share(versus['high'])}"
        lines.append((f"win rate against SFT ({interval})", share(0.5), share(versus["rate"])))
    kl = (record.result.get("kl") or {}).get("ppo_vs_sft")
    kl = kl if kl is not None else (ends(curve, "objective/kl") or (None, None))[1]
    return [*lines, ("KL to SFT, nats per response", number(0.0), number(kl))]


def _graded(record: Record, before: str, after: str) -> list[Line]:
    """Grades that the evaluation has of two policies."""
    old, new = record.model(before), record.model(after)
    shares = {"exact": "exact match", "ended": "ends by itself"}
    lines = [
        (text, share(old.get(key)), share(new.get(key)))
        for key, text in shares.items()
        if key in new
    ]
    if "judge" in new:
        lines.insert(0, ("judge's grade", number(old.get("judge")), number(new["judge"])))
    return lines


def places(record: Record) -> list[tuple[str, str]]:
    """Where the artifacts, the evaluation and the report lie."""
    found = [
        (name, f"{stage.path}{_took(stage.metrics.get('minutes'))}")
        for name, stage in record.stages.items()
        if name != "base"
    ]
    if record.result:
        judge = record.result["config"].get("judge") or "none"
        text = f"{record.run / 'eval'} ({record.result['split']}, {record.result['prompts']} prompts, judge: {judge})"
        found.append(("eval", text))
    if (record.run / "report.html").is_file():
        found.append(("report", str(record.run / "report.html")))
    return found


def _took(minutes: object) -> str:
    return f" ({minutes:.1f} min)" if isinstance(minutes, int | float) else ""


def next_step(record: Record) -> str:
    """The command that makes sense now."""
    suffix = f"RUN={record.run.name}"
    for stage in ("sft", "rm", "ppo"):
        if stage not in record.stages:
            return f"make {stage} {suffix}"
    if not record.stages.keys() <= (record.result.get("artifacts") or {}).keys():
        return f"make eval report {suffix}"
    return (
        f"make report {suffix}"
        if not (record.run / "report.html").is_file()
        else f"make chat {suffix}"
    )


def number(value: float | None) -> str:
    """Three significant digits; a dash for nothing."""
    return "-" if value is None else f"{value:.3g}"


def share(value: float | None) -> str:
    """A share with three decimals."""
    return "-" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    with reporting_errors():
        main()
