"""What was measured, as Markdown and as a picture."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from pipeline.bench import floor
from pipeline.bench.overlay import VERSION
from pipeline.bench.shapes import CASES, Case, draw, size_named
from pipeline.evaluation.plots import COLOURS, INK, STYLE

PHASES = ("generation", "reference", "reward and value", "optimisation")
SIDES = {"ours": "ours", "theirs": f"TRL {VERSION}"}

Result = dict[str, Any]
"""case; either not_run, or answers (side -> list), failed (side -> message), flops (a second)."""


def markdown(whole: dict[str, Any]) -> str:
    """The page: machine, PPO by phases, the other stages, start-up."""
    parts = [f"# make bench SIZE={whole['size']}\n", _machine(whole["machine"])]
    results = whole["results"]
    if chosen := [r for r in results if CASES[r["case"]].task == "ppo"]:
        parts += ["## PPO\n", _about(whole), ppo_table(whole["size"], chosen)]
    if chosen := [r for r in results if CASES[r["case"]].task != "ppo"]:
        parts += ["## Reward model and SFT, an optimizer step\n", steps_table(chosen)]
    if whole.get("startup"):
        parts += ["## Start-up\n", startup_table(whole["startup"])]
    return "\n".join(parts)


def _machine(machine: dict[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in machine.items()) + "\n"


def _about(whole: dict[str, Any]) -> str:
    size = size_named(whole["size"])
    work = draw(size)
    return (
        f"{size.episodes} rollouts an iteration, {size.epochs} epochs of {size.minibatches} "
        f"minibatches; Llamas of {size.layers} layers x {size.hidden}, vocabulary "
        f"{size.vocabulary:,}; {work.tokens:,} real tokens, of them {work.response_tokens:,} sampled, the "
        "same lengths on both sides. Seconds are medians of "
        f"{whole['iterations']} iterations after a warm-up, the two sides in turns. `floor` is the "
        "time of the matrix products over real tokens at the fastest such product measured between "
        "the iterations; `CPU` adds up the threads' seconds; `x floor` is how many times that an iteration took.\n"
    )


def ppo_table(size: str, results: Sequence[Result]) -> str:
    """A row for each side of each case, and how many times faster ours was."""
    head = [
        "case",
        "",
        *PHASES,
        "iteration",
        "CPU",
        "TRL / ours",
        "tokens/s",
        "peak MiB",
        "x floor",
    ]
    rows = [row for result in results for row in _ppo_rows(size, result)]
    return grid(head, rows)


def _ppo_rows(size: str, result: Result) -> list[list[str]]:
    case, width = CASES[result["case"]], len(PHASES) + 6
    if "not_run" in result:
        return [[case.title, f"not run: {result['not_run']}", *[""] * width]]
    rows = []
    for side, name in SIDES.items():
        title = case.title if side == "ours" else ""
        if side in result["failed"]:
            rows.append([title, f"{name} failed: {result['failed'][side]}", *[""] * width])
            continue
        answers = result["answers"][side]
        seconds = median(answers)
        rows.append(
            [
                title,
                name,
                *(f"{phase(answers, p):.2f}" for p in PHASES),
                f"{seconds:.2f}",
                f"{median(answers, 'cpu_seconds'):.2f}",
                ratio(result) if side == "ours" else "",
                f"{_work(size, case).response_tokens / seconds:.0f}",
                f"{max(a['peak_mb'] for a in answers):.0f}",
                _distance(size, case, result, seconds),
            ]
        )
    return rows


def _work(size: str, case: Case) -> Any:
    return draw(size_named(size), case.full)


def floor_seconds(size: str, case: Case, flops: float) -> float:
    """The least an iteration can take at so many operations a second."""
    return floor.of_ppo(size_named(size), _work(size, case), case.lora).total / flops


def _distance(size: str, case: Case, result: Result, seconds: float) -> str:
    if not result.get("flops"):
        return ""
    least = floor_seconds(size, case, result["flops"])
    return f"{seconds / least:.1f} x {least:.2f} s"


def steps_table(results: Sequence[Result]) -> str:
    """A row a stage: milliseconds of a step on both sides, and the goal."""
    head = ["case", "ours, ms", "TRL, ms", "TRL / ours", "goal", "ours, peak MiB", "TRL, peak MiB"]
    return grid(head, [_step_row(result) for result in results])


def _step_row(result: Result) -> list[str]:
    case = CASES[result["case"]]
    if result.get("not_run") or result["failed"]:
        reason = result.get("not_run") or "; ".join(result["failed"].values())
        return [case.title, f"not run: {reason}", *[""] * 5]
    ours, theirs = (result["answers"][side] for side in SIDES)
    return [
        case.title,
        f"{1000 * median(ours):.0f}",
        f"{1000 * median(theirs):.0f}",
        ratio(result),
        f">= {goal(case):.2f}",
        *(f"{max(a['peak_mb'] for a in answers):.0f}" for answers in (ours, theirs)),
    ]


def goal(case: Case) -> float:
    """Pairs cost K - 1 forward passes a response instead of one; SFT is the same trainer."""
    return 0.8 * (case.k - 1) if case.task == "rm" else 0.95


def startup_table(rows: Sequence[dict[str, Any]]) -> str:
    """Seconds until a command does something."""
    cells = [
        [row["what"], f"{row['seconds']:.2f}" if "seconds" in row else f"not run: {row['not_run']}"]
        + [f"<= {row['goal']}"]
        for row in rows
    ]
    return grid(["", "seconds", "goal"], cells)


def median(answers: Sequence[dict[str, Any]], key: str = "seconds") -> float:
    """Seconds of a step, or its `cpu_seconds`, which other programs on the machine do not change."""
    return statistics.median(answer[key] for answer in answers)


def phase(answers: Sequence[dict[str, Any]], name: str) -> float:
    """Seconds of a phase of a step."""
    return statistics.median(answer["phases"].get(name, 0.0) for answer in answers)


def ratio(result: Result) -> str:
    """How many times faster our side was."""
    if result["failed"]:
        return ""
    return f"{median(result['answers']['theirs']) / median(result['answers']['ours']):.2f}"


def grid(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, its columns aligned to be read as text too."""
    cells = [[cell.replace("|", r"\|") for cell in row] for row in [head, *rows]]
    # a sentence in a cell would stretch its column
    widths = [max(len(row[i]) for row in cells if len(row[i]) < 60) for i in range(len(head))]
    lines = [" | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
    rule = "|".join("-" * (width + 2) for width in widths)
    return (
        "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])]) + "\n"
    )


# --- the picture ----------------------------------------------------------------------------------


def picture(whole: dict[str, Any], path: Path) -> None:
    """One bar a side and case, its phases side by side; nothing when no PPO was timed."""
    bars = [
        (f"{CASES[result['case']].title}\n{name}", result["answers"][side])
        for result in whole["results"]
        if CASES[result["case"]].task == "ppo" and "not_run" not in result
        for side, name in SIDES.items()
        if side not in result["failed"]
    ]
    if not bars:
        return
    with mpl.rc_context({**STYLE, "axes.grid.axis": "x"}):
        figure = Figure(figsize=(8.0, 0.9 + 0.55 * len(bars)), layout="constrained")
        axes = figure.add_subplot()
        labels = [label for label, _ in bars]
        left = [0.0] * len(bars)
        for colour, name in zip(COLOURS, PHASES, strict=False):
            widths = [phase(answers, name) for _, answers in bars]
            axes.barh(labels, widths, left=left, color=colour, label=name, height=0.62)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        rest = [max(median(answers) - a, 0.0) for (_, answers), a in zip(bars, left, strict=True)]
        axes.barh(labels, rest, left=left, color=INK, label="other", height=0.62)
        axes.invert_yaxis()
        axes.set_xlabel(f"seconds an iteration, size {whole['size']}")
        axes.legend(ncols=len(PHASES) + 1, loc="lower center", bbox_to_anchor=(0.4, 1.0))
        figure.savefig(path, dpi=150)
