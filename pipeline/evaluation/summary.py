"""What a run reached: `python -m pipeline.evaluation.summary --run checkpoints/tiny`.

Printed at the end of `make sft rm ppo`; reads records only, so it takes a fraction of a second.
"""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline import steps
from pipeline.cli import reporting_errors
from pipeline.evaluation.about import conclusion, verdicts
from pipeline.evaluation.record import Record, load_record

COLOURS = {"good": "green", "watch": "yellow", "bad": "red"}

ROWS = (
    ("judge", "Judge's grade", "{:.3f}"),
    ("exact", "Exact match", "{:.1%}"),
    ("token_precision", "Token precision", "{:.3f}"),
    ("token_recall", "Token recall", "{:.3f}"),
    ("token_f1", "Token F1", "{:.3f}"),
    ("chrf", "chrF", "{:.1f}"),
    ("ended", "Ends by itself", "{:.1%}"),
    ("length", "Length, tokens", "{:.1f}"),
    ("rm_score", "Reward model's score", "{:.3f}"),
    ("perplexity", "Held-out perplexity", "{:.3f}"),
    ("text_perplexity", "Perplexity of pretraining text", "{:.3f}"),
)
"""Evaluated quantity, its name, its format."""


def main(argv: list[str] | None = None) -> None:
    """Print the summary of a run."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.evaluation.summary", description=__doc__
    )
    parser.add_argument("--run", type=Path, required=True)
    args = parser.parse_args(argv)
    show(load_record(args.run), Console())


def show(record: Record, console: Console) -> None:
    """The table, where things lie, and what to do next."""
    found = verdicts(record)
    console.print(Text(str(record.run), style="italic"))
    if record.policies():
        console.print(table(record))
    for judges in judge_tables(record.result):
        console.print(judges)
    for problem in record.problems:
        console.print(Text(f"  ! {problem}", style="yellow"))
    for verdict in found:
        console.print(Text(f"{verdict.stage} ({verdict.level})", style=COLOURS[verdict.level]))
        for finding in verdict.findings:
            level = finding.level or "watch"
            console.print(Text(f"  {level:<7}{finding.text}", style=COLOURS[level]))
    console.print(Text(f"  {conclusion(found)}"))
    for what, text in [*places(record), ("next", next_step(record))]:
        console.print(
            Text(f"  {what:<8} {text}", style="bold" if what == "next" else ""), soft_wrap=True
        )


def table(record: Record) -> Table:
    """What was measured of every policy."""
    out = Table("measured", show_edge=False, pad_edge=False)
    for name in record.policies():
        out.add_column(name, justify="right")
    for name, cells in summary_rows(record):
        out.add_row(name, *cells)
    return out


def summary_rows(record: Record) -> list[tuple[str, list[str]]]:
    """Name of a quantity and its value for each evaluated policy."""
    names = record.policies()
    models = [record.model(name) for name in names]
    rows = [
        (name, [formatted(model.get(key), form) for model in models])
        for key, name, form in ROWS
        if any(key in model for model in models)
    ]
    kl = dict(record.result.get("kl") or {})
    error = kl.pop("std_error", None)
    spread = "" if error is None else f" ± {error:.2f}"
    for key, value in kl.items():
        policy, _, other = key.partition("_vs_")
        cells = [f"{value:.2f}{spread}" if name == policy else "–" for name in names]
        rows.append((f"KL to {other.upper()}, nats per response", cells))
    return rows


JUDGES = ("judges", "wins (95 %)", "at equal length", "wins / ties / losses", "judged")
AGREEMENT = ("judges", "both judged", "agree", "Cohen's κ", "one says win, the other loss")


def judge_rows(found: dict[str, Any]) -> list[list[str]]:
    """What each judge says of a contest (see `pipeline.evaluation.panel`), under `JUDGES`."""
    rows = []
    for name, own in found["judges"].items():
        counts = f"{own['wins']} / {own['ties']} / {own['losses']}"
        equal = own.get("at_equal_length")
        shares = [
            "–" if part is None else f"{part[key]:.1%} ({part['low']:.1%} to {part['high']:.1%})"
            for part, key in ((own if own["judged"] else None, "rate"), (equal, "value"))
        ]
        rows.append([name, *shares, counts, str(own["judged"])])
    return rows


def agreement_rows(found: dict[str, Any]) -> list[list[str]]:
    """How far each two judges of a contest agree, under `AGREEMENT`."""
    rows = []
    for name, own in found["agreement"].items():
        table = own["table"]
        opposed = table["win"]["loss"] + table["loss"]["win"]
        kappa = formatted(own["kappa"], "{:.2f}")
        rows.append(
            [name, str(own["judged"]), formatted(own["same"], "{:.1%}"), kappa, str(opposed)]
        )
    return rows


def judge_tables(result: dict[str, Any]) -> list[Table]:
    """Of every contest: what the judges say, and how far they agree."""
    out = []
    for contest, found in (result.get("judges") or {}).items():
        first, _, second = contest.partition("_vs_")
        for titles, rows in ((JUDGES, judge_rows(found)), (AGREEMENT, agreement_rows(found))):
            if rows:
                table = Table(show_edge=False, pad_edge=False)
                for title in (f"{first} over {second}", *titles[1:]):
                    table.add_column(
                        Text(title), justify="left" if table.columns == [] else "right"
                    )
                for row in rows:
                    table.add_row(*map(Text, row))
                out.append(table)
    return out


def formatted(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def places(record: Record) -> list[tuple[str, str]]:
    """Where the artifacts, the evaluation and the report lie."""
    found = [
        (name, f"{stage.path}{_took(stage.metrics.get('minutes'))}")
        for name, stage in record.stages.items()
        if name in steps.stages()
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
    names = list(steps.stages())
    if names[0] not in record.stages:
        return record.command(names[0])
    last = max(names.index(name) for name in names if name in record.stages)
    if names[last + 1 :]:  # one before it that is not there was not needed: PPO on other rewards
        return record.command(names[last + 1])
    evaluated = (record.result.get("artifacts") or {}).keys()
    if record.evaluable and not record.stages.keys() <= evaluated:
        return record.command("eval", "report")
    reported = (record.run / "report.html").is_file()
    return record.command("chat" if reported else "report")


if __name__ == "__main__":
    with reporting_errors():
        main()
