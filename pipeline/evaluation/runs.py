"""Several runs on one page: `python -m pipeline.evaluation.runs checkpoints/a checkpoints/b`.

Writes CHECKPOINTS/reports/NAMES.html: what differs in their configs, their curves over each other, the same
prompts side by side, and which differences are larger than chance. Runs that differ in their seeds alone are one
group: a line with a band.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import steps
from pipeline.cli import reporting_errors
from pipeline.errors import UserError
from pipeline.evaluation import chance, metrics, plots
from pipeline.evaluation.chance import Points
from pipeline.evaluation.rankings import read_scored
from pipeline.evaluation.record import Record, load_record, values
from pipeline.evaluation.report import template
from pipeline.handoff.found import check_there
from pipeline.handoff.lineage import deciding
from pipeline.process.files import write_atomically
from pipeline.process.progress import say

SHOWN = 30
"""Prompts side by side, those first whose grades differ most."""
KL = "KL to SFT, nats a response"
LONGEST = 60
"""Letters of a page's name."""
QUANTITIES = {
    "judge": "Judge's grade",
    "exact": "Exact match",
    "token_f1": "Token F1",
    "chrf": "chrF",
    "ended": "Ends by itself",
    "length": "Length, tokens",
}
"""What is known of every sample, and so compared prompt by prompt; a reward model's score is its own run's."""


@dataclass
class Group:
    """Runs that differ in their seeds alone."""

    name: str
    records: list[Record]

    def policy(self) -> str:
        """The last one that was evaluated in all of them, "" without any."""
        names = [set(record.policies()) for record in self.records]
        return next((p for p in reversed(steps.policies()) if all(p in n for n in names)), "")


def main(argv: list[str] | None = None) -> None:
    """Command line of `make report RUNS="a b"`."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.evaluation.runs", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    say(f"report: {write_page(parser.parse_args(argv).runs)}")


def write_page(runs: list[Path]) -> Path:
    """Write the page of two runs or more beside them; UserError for one that is none."""
    if len({run.resolve() for run in runs}) < 2:
        raise UserError(
            "two different runs or more are compared; of a single one: make report RUN=name"
        )
    for run in runs:
        check_there(run)
    groups = grouped([load_record(run) for run in runs])
    name = "-".join(run.name for run in runs)
    short = name if len(name) <= LONGEST else f"{runs[0].name}-to-{runs[-1].name}"
    out = runs[0].parent / "reports" / f"{short}.html"
    out.parent.mkdir(exist_ok=True)
    write_atomically(out, template("runs.html.jinja").render(context(groups)))
    return out


def grouped(records: list[Record]) -> list[Group]:
    """Records in groups of one config each, in the order they were given."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(json.dumps(_settings(record, seeds=False), sort_keys=True), []).append(
            record
        )
    names = [[record.run.name for record in group] for group in found.values()]
    return [Group(_called(n), g) for n, g in zip(names, found.values(), strict=True)]


def _called(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]} ({len(names)} seeds)"


def _settings(record: Record, seeds: bool = True) -> dict[str, Any]:
    """`stage.key` -> value of all that decides the run, data by its hash."""
    flat: dict[str, Any] = {}
    for name in steps.stages():
        stage = record.stages.get(name)
        flat[name] = "made" if stage else "–"
        config = deciding(steps.TABLE[name].config, stage.config) if stage else {}
        made = (stage.manifest.get("inputs") or {}) if stage else {}
        data = {Path(file).name: hash[:12] for file, hash in made.items()}
        flat |= dict(_flat(config, name)) | dict(_flat(data, f"{name} reads"))
    return {k: v for k, v in flat.items() if seeds or k.rpartition(".")[2] != "seed"}


def _flat(config: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}.{key}")
        else:
            yield f"{prefix}.{key}", value


def context(groups: list[Group]) -> dict[str, Any]:
    """What the template shows."""
    return {
        "groups": groups,
        "title": ", ".join(group.name for group in groups),
        "colours": plots.COLOURS,
        "problems": [
            (r.run.name, problem) for g in groups for r in g.records for problem in r.problems
        ],
        "differing": differing(groups),
        "figures": figures(groups),
        "stages": {name: curves(groups, name) for name in steps.stages()},
        "titles": {name: step.title for name, step in steps.TABLE.items()},
        "samples": samples(groups),
    }


def differing(groups: list[Group]) -> list[tuple[str, list[str]]]:
    """Keys that are not the same in all groups, with each group's values."""
    settings = [[_settings(record) for record in group.records] for group in groups]
    keys = dict.fromkeys(key for group in settings for one in group for key in one)
    rows = []
    for key in keys:
        cells = [
            ", ".join(
                dict.fromkeys(
                    json.dumps(one.get(key, "–"), ensure_ascii=False).strip('"') for one in group
                )
            )
            for group in settings
        ]
        if len(set(cells)) > 1 or ("," in cells[0] and key.endswith(".seed")):
            rows.append((key, cells))
    return rows


# --- figures --------------------------------------------------------------------------------------


def figures(groups: list[Group]) -> list[dict[str, Any]]:
    """Headline figures of the last policies: each group's value and interval, and its difference to the
    first group's with the interval of that."""
    rows = []
    for title, of in _quantities().items():
        points = [[of(record, group.policy()) for record in group.records] for group in groups]
        rows.append((title, _cells(points, chance.of, chance.difference)))
    kl = [[_kl(record, group.policy()) for record in group.records] for group in groups]
    rows.append((KL, _cells(kl, chance.of_means, chance.difference_of_means)))
    return [
        {"title": title, "cells": cells} for title, cells in rows if any(c["own"] for c in cells)
    ]


def _cells(found: list[list[Any]], of: Callable, difference: Callable) -> list[dict[str, Any]]:
    """What is known of each group and of its difference to the first, None where a run lacks it."""
    first = found[0]
    return [
        {
            "own": of(group) if all(group) else None,
            "versus": difference(first, group)
            if all(group + first) and group is not first
            else None,
        }
        for group in found
    ]


def _kl(record: Record, name: str) -> chance.Mean | tuple[()]:
    """Mean and standard error of a policy's KL to SFT."""
    found = record.result.get("kl") or {}
    value, error = found.get(f"{name}_vs_sft"), found.get("std_error")
    return (value, error or 0.0) if value is not None else ()


def _quantities() -> dict[str, Any]:
    """Title -> function of a record and a policy's name: the figure by prompt, {} where it is unknown."""
    found: dict[str, Any] = {
        title: lambda record, name, key=key: _by_prompt(record, name, key)
        for key, title in QUANTITIES.items()
    }
    return found | {
        "Preferred to its own SFT, by the judge": _wins,
        "Reward model: held-out pairs": _pairs,
    }


def _by_prompt(record: Record, name: str, key: str) -> Points:
    answers = ((row["prompt"], row["answers"].get(name, {})) for row in record.samples)
    return {prompt: (float(one[key]), 1.0) for prompt, one in answers if one.get(key) is not None}


def _wins(record: Record, name: str) -> Points:
    """1 for a prompt whose answer the judge prefers to SFT's, half for a tie."""
    before, after = _by_prompt(record, "sft", "judge"), _by_prompt(record, name, "judge")
    if name == "sft":
        return {}
    both = ((prompt, after[prompt][0] - before[prompt][0]) for prompt in after if prompt in before)
    return {prompt: (0.5 if gap == 0 else float(gap > 0), 1.0) for prompt, gap in both}


def _pairs(record: Record, _: str) -> Points:
    """Of each held-out ranking, untied pairs that are right, and all."""
    items = read_scored(record.stages["rm"].path) if "rm" in record.stages else []
    points = metrics.pair_points([i.scores for i in items], [i.ranks for i in items])
    return {
        json.dumps([item.prompt, item.responses]): point
        for item, point in zip(items, points, strict=True)
    }


# --- curves ---------------------------------------------------------------------------------------


def curves(groups: list[Group], stage: str) -> list[dict[str, str]]:
    """Charts of a stage with a line a group."""
    about, out = steps.about(stage), []
    for chart in about.CHARTS if about else ():
        for legend, metric in chart.series.items():
            lines = {
                group.name: found
                for group in groups
                if (
                    found := [
                        s for r in group.records if (s := values(r.curves.get(stage, []), metric))
                    ]
                )
            }
            if any(len(series) > 1 for runs in lines.values() for series in runs):
                title = chart.title if len(chart.series) == 1 else f"{chart.title}, {legend}"
                places = [group.name for group in groups]
                image = plots.bands(places, lines, chart.x, chart.level)
                out.append({"title": title, "source": metric, "image": image})
    return out


# --- samples --------------------------------------------------------------------------------------


def samples(groups: list[Group]) -> list[dict[str, Any]]:
    """Prompts that all groups answered, with the answer of each one's first run."""
    answered = [
        {
            row["prompt"]: row["answers"][name]
            for row in group.records[0].samples
            if name in row["answers"]
        }
        for group in groups
        for name in [group.policy()]
    ]
    rows = []
    for prompt in answered[0]:
        if all(prompt in answers for answers in answered):
            own = [{"name": g.name, **a[prompt]} for g, a in zip(groups, answered, strict=True)]
            grades = [answer["judge"] for answer in own if answer.get("judge") is not None]
            best = max(grades, default=0.0)
            for answer in own:
                answer["better"] = len(set(grades)) > 1 and answer.get("judge") == best
            rows.append(
                {"prompt": prompt, "answers": own, "spread": statistics.pstdev(grades or [0.0])}
            )
    return sorted(rows, key=lambda row: -row["spread"])[:SHOWN]


if __name__ == "__main__":
    with reporting_errors():
        main()
