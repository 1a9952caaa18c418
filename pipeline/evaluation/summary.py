"""What a run reached, in one table: `python -m pipeline.evaluation.summary --run checkpoints/tiny`.

Printed at the end of `make sft rm ppo`; reads records only, so it takes a fraction of a second.
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline import steps
from pipeline.cli import reporting_errors
from pipeline.errors import UserError
from pipeline.evaluation.about import Verdict
from pipeline.evaluation.record import Record, load_record
from pipeline.evaluation.verdicts import conclusion, verdicts
from pipeline.handoff.remembered import command

COLOURS = {"good": "green", "watch": "yellow", "bad": "red"}


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
            f"{args.run}: nothing has been made yet; begin with: {command(args.run, 'sft')}"
        )
    show(record, Console())


def show(record: Record, console: Console) -> None:
    """The table, where things lie, and what to do next."""
    found = verdicts(record)
    console.print(table(record, found))
    for problem in record.problems:
        console.print(Text(f"  ! {problem}", style="yellow"))
    for verdict in (verdict for verdict in found if verdict.level != "good"):
        for text in (f.text for f in verdict.findings if f.level == verdict.level):
            console.print(Text(f"  {verdict.stage}: {text}", style=COLOURS[verdict.level]))
    console.print(Text(f"  {conclusion(found)}"))
    for what, text in [*places(record), ("next", next_step(record))]:
        console.print(
            Text(f"  {what:<8} {text}", style="bold" if what == "next" else ""), soft_wrap=True
        )


def table(record: Record, found: list[Verdict]) -> Table:
    """One block of lines a stage."""
    out = Table(title=Text(str(record.run)), title_justify="left", show_edge=False, pad_edge=False)
    for name in ("stage", "measured"):
        out.add_column(name)
    for name in ("before", "after"):
        out.add_column(name, justify="right")
    for verdict in found:
        about = steps.about(verdict.stage)
        for i, line in enumerate(about.lines(record) if about else ()):
            label = f"{verdict.stage} ({verdict.level})" if i == 0 else ""
            out.add_row(Text(label, style=COLOURS[verdict.level]), *line)
        out.add_section()
    return out


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
