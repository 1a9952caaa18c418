"""What was measured, as Markdown."""

import statistics
from collections.abc import Sequence
from typing import Any

from pipeline.bench import floor
from pipeline.bench.overlay import VERSION
from pipeline.bench.shapes import CASES, SIZES, Case, draw, size_of

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
    if whole.get("growth"):
        parts += ["## As it grows\n", growth_table(whole["growth"])]
    if whole.get("startup"):
        parts += ["## Start-up\n", startup_table(whole["startup"])]
    return "\n".join(parts)


def _machine(machine: dict[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in machine.items()) + "\n"


def _about(whole: dict[str, Any]) -> str:
    size = SIZES[whole["size"]]
    work = draw(size)
    tokens = sum(map(len, work.prompts)) + work.response_tokens
    return (
        f"{size.episodes} rollouts an iteration, {size.epochs} epochs of {size.minibatches} "
        f"minibatches; Llamas of {size.layers} layers x {size.hidden}, vocabulary "
        f"{size.vocabulary:,}; {tokens:,} real tokens, of them {work.response_tokens:,} sampled, the "
        "same lengths on both sides. Seconds are medians of "
        f"{whole['iterations']} iterations after a warm-up, the two sides in turns. `floor` is the "
        "time of the matrix products over real tokens at the fastest such product measured between "
        "the iterations; `CPU` adds up the threads' seconds; `x floor` is how many times that an iteration took.\n"
    )


def ppo_table(size: str, results: Sequence[Result]) -> str:
    """A row for each side of each case, and how many times faster ours was."""
    said = "iteration,CPU,TRL / ours,tokens/s,peak MiB,x floor".split(",")
    rows = [row for result in results for row in _ppo_rows(size, result)]
    return grid(["case", "", *PHASES, *said], rows)


def _ppo_rows(size: str, result: Result) -> list[list[str]]:
    case = CASES[result["case"]]
    if "not_run" in result:
        return [[case.title, f"not run: {result['not_run']}"]]
    tokens = draw(SIZES[size], case.full).response_tokens
    rows = []
    for side, name in SIDES.items():
        title = case.title if side == "ours" else ""
        if side in result["failed"]:
            rows.append([title, f"{name} failed: {result['failed'][side]}"])
            continue
        answers = result["answers"][side]
        seconds = median(answers)
        rows.append(
            [
                title,
                name,
                *(f"{median([a['phases'] for a in answers], name):.2f}" for name in PHASES),
                f"{seconds:.2f}",
                f"{median(answers, 'cpu_seconds'):.2f}",
                ratio(result) if side == "ours" else "",
                f"{tokens / seconds:.0f}",
                f"{max(a['peak_mb'] for a in answers):.0f}",
                _distance(size, case, result, seconds),
            ]
        )
    return rows


def floor_seconds(size: str, case: Case, flops: float) -> float:
    """The least an iteration can take at so many operations a second."""
    work = draw(size_of(size), case.full)
    return sum(floor.of_ppo(size_of(size), work, case.lora).values()) / flops


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
        return [case.title, f"not run: {reason}"]
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


def growth_table(rows: Sequence[dict[str, Any]]) -> str:
    """Our iteration beside its floor, as one thing grows. By CPU seconds, which show a cliff on a machine that
    is busy too."""
    cells = [
        [row["grows"], f"{row['to']:,}"]
        + (
            [f"failed: {row['failed']}"]
            if row["failed"]
            else [f"{row[key]:.2f}" for key in ("seconds", "cpu_seconds", "floor")]
            + [f"{row['cpu_seconds'] / row['floor']:.1f}", f"{row['peak_mb']:.0f}"]
        )
        for row in rows
    ]
    return grid(["", "", "seconds", "CPU", "floor", "CPU / floor", "peak MiB"], cells)


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
    return statistics.median(answer.get(key, 0.0) for answer in answers)


def ratio(result: Result) -> str:
    """How many times faster our side was."""
    if result["failed"]:
        return ""
    return f"{median(result['answers']['theirs']) / median(result['answers']['ours']):.2f}"


def grid(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, its columns aligned to be read as text too; short rows are filled up."""
    whole = [[*row, *[""] * (len(head) - len(row))] for row in [head, *rows]]
    cells = [[cell.replace("|", r"\|") for cell in row] for row in whole]
    # a sentence in a cell would stretch its column
    widths = [max(len(row[i]) for row in cells if len(row[i]) < 60) for i in range(len(head))]
    lines = [" | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
    rule = "|".join("-" * (width + 2) for width in widths)
    return (
        "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])]) + "\n"
    )
