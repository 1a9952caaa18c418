"""One page about a run: `python -m pipeline.evaluation.report --run checkpoints/tiny`.

Writes RUN/report.html, a single file that needs nothing else, from whatever the run has.
"""

import argparse
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from pipeline import steps
from pipeline.cli import reporting_errors
from pipeline.evaluation import mirrored, plots, rounds
from pipeline.evaluation.about import conclusion, verdicts
from pipeline.evaluation.examples import sample_lists, token_view
from pipeline.evaluation.rankings import Measured
from pipeline.evaluation.record import Record, load_record, values
from pipeline.evaluation.rivals import columns
from pipeline.evaluation.summary import (
    AGREEMENT,
    JUDGES,
    agreement_rows,
    formatted,
    judge_rows,
    summary_rows,
)
from pipeline.handoff.lineage import identity
from pipeline.ppo.preflight import better_rule
from pipeline.process.files import write_atomically
from pipeline.process.progress import say


def main(argv: list[str] | None = None) -> None:
    """Command line of `make report`."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.evaluation.report", description=__doc__
    )
    parser.add_argument("--run", type=Path, required=True)
    args = parser.parse_args(argv)
    page = write_report(args.run)
    say(f"report: {page}")
    record = load_record(args.run)
    found = verdicts(record)
    mirrored.report(record, found, conclusion(found), page)


def write_report(run: Path) -> Path:
    """Write RUN/report.html and return its path."""
    out = run / "report.html"
    write_atomically(out, render(load_record(run)))
    return out


def render(record: Record) -> str:
    """The page."""
    return template("report.html.jinja").render(context(record))


def template(name: str) -> Template:
    """A page's template. Everything from a run is text to it, which it escapes."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def context(record: Record) -> dict[str, Any]:
    """What the template shows."""
    found = verdicts(record)
    studies = {n: points for n, points in (record.overopt.get("studies") or {}).items() if points}
    return {
        "run": record.run.name,
        "made_from": Markup(identity("report", None, record.run).mark()),
        "verdicts": found,
        "conclusion": conclusion(found),
        "record": record,
        "evaluate": record.command("eval") if record.evaluable else "",
        "models": record.policies(),
        "summary": summary_rows(record),
        "comparisons": comparison_rows(record),
        "contests": contests(record),
        "families": family_tables(record),
        "charts": {verdict.stage: charts(record, verdict.stage) for verdict in found},
        "titles": {verdict.stage: verdict.title for verdict in found},
        "better_rule": better_rule,
        "ranking_charts": _ranking_charts(record.rankings),
        "against": record.result.get("rm"),
        "samples": sample_lists(record),
        "tokens": token_view(record.tokens),
        "studies": studies,
        "compared": columns(record.compared.get("rows") or {}),
        "rounds": rounds.table(record.rounds.get("rows") or []),
        "overopt_image": plots.root_kl(studies) if studies else "",
        "configs": {
            name: yaml.safe_dump(stage.config, sort_keys=False, allow_unicode=True)
            for name, stage in record.stages.items()
            if stage.config
        },
        "reproduce": reproduce(record),
    }


def comparison_rows(record: Record) -> list[dict[str, Any]]:
    """Win rates with their intervals, in the order of the stages."""
    return [
        {"name": f"{after} over {before}", "by": by, **found}
        for by, suffix in (("judge", ""), ("reward model", "_by_rm"))
        for before, after in pairwise(steps.policies())
        if (found := record.comparison(f"{after}_vs_{before}{suffix}"))
    ]


def contests(record: Record) -> list[dict[str, Any]]:
    """What all judges say of two policies, how far they agree, and where they do not."""
    return [
        {
            "title": " over ".join(name.split("_vs_")),
            "tables": [(JUDGES, judge_rows(found)), (AGREEMENT, agreement_rows(found))],
            "opposed": found["opposed"],
            "examples": found["examples"],
        }
        for name, found in (record.result.get("judges") or {}).items()
    ]


def family_tables(record: Record) -> list[dict[str, Any]]:
    """For each group key a table: value, prompts, grades of every policy, and how often the last one wins
    over the one before it."""
    models = record.policies()
    last = record.model(models[-1]) if models else {}
    grade = next((key for key in ("judge", "token_f1", "rm_score") if key in last), None)
    versus = record.comparison("_vs_".join(models[:-3:-1])).get("groups") or {}
    tables = []
    for key, members in (last.get("groups") or {}).items():
        groups = [record.model(name).get("groups", {}).get(key, {}) for name in models]
        rates, rows = versus.get(key, {}), []
        for value, own in members.items():
            cells = [group.get(value, {}) for group in groups]
            grades = [formatted(cell.get(grade), "{:.2f}") for cell in cells]
            exact = [formatted(cell.get("exact"), "{:.0%}") for cell in cells]
            rows.append((value, own["n"], grades, exact, rates.get(value)))
        has_exact = any(text != "–" for row in rows for text in row[3])
        rate = " over ".join(models[:-3:-1]) if rates else ""
        tables.append({"key": key, "rows": rows, "has_exact": has_exact, "rate": rate})
    return tables


def charts(record: Record, stage: str) -> list[dict[str, str]]:
    """Charts of a stage's curves, those that it logged."""
    out = []
    about = steps.about(stage)
    for chart in about.CHARTS if about else ():
        curve = record.curves[stage]
        series = {name: values(curve, metric, chart.over) for name, metric in chart.series.items()}
        series = {name: points for name, points in series.items() if points}
        if any(len(points) > 1 for points in series.values()):
            source = ", ".join(chart.series[name] for name in series)
            known = record.expected.bands.get(stage, {}) if record.expected else {}
            bands = {
                name: known[metric]
                for name, metric in chart.series.items()
                if metric in known and chart.over == "step"
            }
            image = plots.lines(series, chart.x, chart.level, bands)
            source += ", behind it the band of the recipe's healthy runs" if bands else ""
            out.append({"title": chart.title, "source": source, "image": image})
    return out


def _ranking_charts(measured: Measured | None) -> list[dict[str, str]]:
    if measured is None:
        return []
    return [
        {
            "title": f"Calibration (mean error {measured.calibration_error:.3f})",
            "source": "bigger dots have more pairs",
            "image": plots.calibration(measured.calibration),
        },
        {
            "title": f"Score against length (correlation {measured.pearson:+.2f})",
            "source": "held-out responses",
            "image": plots.scatter(measured.points, "length, tokens", "score"),
        },
    ]


def reproduce(record: Record) -> list[str]:
    """Commands that make the run again from the resolved configs that the page holds."""
    again = shlex.quote(str(record.run.with_name(record.run.name + "-again")))
    return [
        f"python -m {steps.TABLE[name].module} --config {name}.yaml --run {again}"
        for name in steps.stages()
        if name in record.stages
    ]


if __name__ == "__main__":
    with reporting_errors():
        main()
