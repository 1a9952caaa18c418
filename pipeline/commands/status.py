"""A run's stages, what they reached, and what would be made again.

python -m pipeline.commands.status --run checkpoints/tiny --recipe configs/tiny      a table (make status)
python -m pipeline.commands.status ... --plan "sft ppo"    the steps to run, for the Makefile, in a line
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from pipeline import steps
from pipeline.cli import reporting_errors
from pipeline.commands import dry
from pipeline.commands.plan import (
    Plan,
    check_replaced,
    check_used,
    remember_what_fits,
    stale,
    to_run,
)
from pipeline.config.load import AddSettings
from pipeline.errors import UserError
from pipeline.handoff.artifacts import is_published, lock_path, read_manifest
from pipeline.handoff.found import check_there, runs
from pipeline.handoff.remembered import Asked, recall
from pipeline.process.files import Lock


def show(plan: Plan) -> None:
    """Print the table."""
    from rich.console import Console  # a plan for make needs none of it
    from rich.table import Table

    table = Table(title=str(plan.run), title_justify="left", box=None, pad_edge=False)
    for column in ("step", "state", "made", "what it reached"):
        table.add_column(column, overflow="fold")
    for step in steps.TABLE:
        if step in plan.reasons:
            table.add_row(step, _state(plan, step), *_made(plan, step))
    console = Console()
    if not console.is_terminal:
        console = Console(width=240)  # a file or a pipe has no edge to break lines at
    console.print(table)


def _state(plan: Plan, step: str) -> str:
    if step in steps.stages() and (lock := lock_path(plan.run / step)).exists():
        try:
            with Lock(lock):
                pass
        except UserError as error:
            return "running, " + str(error).rpartition("by ")[2].partition(",")[0]
    if plan.borrowed(step):
        return f"borrowed from {plan.borrow}"
    reason = plan.reasons[step]
    if reason is None:
        return "up to date"
    saved = sorted((plan.run / ".work" / step).glob("step-*")) if step in steps.stages() else []
    return f"{reason}; interrupted after {saved[-1].name}" if saved else reason


def _made(plan: Plan, step: str) -> tuple[str, str]:
    """When it was published, and its headline metrics."""
    directory = _directory(plan, step)
    if directory is None or not is_published(directory):
        return "", ""
    manifest = read_manifest(directory)
    numbers = {k: v for k, v in manifest.metrics.items() if isinstance(v, int | float)}
    shown = "  ".join(f"{name} {value:.4g}" for name, value in list(numbers.items())[:5])
    return manifest.created.replace("T", " ").removesuffix("+00:00"), shown


def _directory(plan: Plan, step: str) -> Path | None:
    kind = steps.TABLE[step].kind
    if kind == "base":
        return plan.base
    if kind != "stage":
        return None
    return plan.borrow / step if plan.borrowed(step) and plan.borrow else plan.run / step


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments, as the Makefile gives them; an empty one is an absent one."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.commands.status")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--recipe", default="", help="folder of configs; default: the run's own")
    parser.add_argument("--from", dest="borrow", default="", help="run to borrow stages from")
    for name, step in steps.TABLE.items():
        if step.config is not None:
            parser.add_argument(f"--{name}", default="", help=f"config of {name} for the recipe's")
    parser.add_argument("--base-directory", default="", help="where the base model is made")
    parser.add_argument("--set", action=AddSettings, default="")
    parser.add_argument("--force", default="", help="steps to run anyway; 1 = those asked for")
    parser.add_argument("--dry", action="store_true", help="of a small model on a few local rows")
    parser.add_argument(
        "--plan", help="print the steps that these goals need run, and DRY's settings"
    )
    return parser.parse_args(argv)


def plan_of(args: argparse.Namespace, goals: Iterable[str]) -> Plan:
    """The plan that the arguments describe."""
    force = args.force.split()
    if wrong := [word for word in force if word not in (*steps.TABLE, "1")]:
        raise UserError(
            f"FORCE={wrong[0]}: one of {', '.join(steps.TABLE)}, or 1 for what is asked for"
        )
    recipe = Path(args.recipe) if args.recipe else None
    base = Path(args.base_directory) if args.base_directory else None
    asked = Asked(
        run=args.run,
        recipe=recipe,
        files={n: Path(f) for n in steps.TABLE if (f := getattr(args, n, ""))},
        settings=steps.split_settings(args.set),
        borrow=Path(args.borrow) if args.borrow else None,
    )
    if args.dry and recipe and base:
        asked.dry = dry.settings(recipe, asked.files, base)
        asked.files.setdefault("base", dry.base_config(recipe))
    return stale(asked, goals, force, base)


def _left_out(run: Path, borrow: str | None, name: str) -> bool:
    """Whether a stage is not this run's own: it is there in the run that is borrowed from, or a later one
    was made without it."""
    names = list(steps.stages())
    if name not in names or is_published(run / name) or (run / ".work" / name).is_dir():
        return False
    later = names[names.index(name) + 1 :]
    return bool(borrow and is_published(Path(borrow) / name)) or any(
        is_published(run / other) for other in later
    )


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    args = parse(argv)
    if args.plan is None:
        check_there(args.run)
        # an evaluation that the recipe does not have is no mistake here
        borrow = args.borrow or recall(args.run).borrow
        mine = [n for n in steps.TABLE if n != "eval" and not _left_out(args.run, borrow, n)]
        show(plan_of(args, mine))
        return
    try:
        goals = args.plan.split()
        looks = all(steps.TABLE[name].kind in ("result", "page") for name in goals)
        if looks and not args.borrow and runs(args.run.parent):
            check_there(args.run)  # what is looked at is there, or misspelt
        plan = plan_of(args, goals)
        check_used(plan)
        check_replaced(plan)
        remember_what_fits(plan)
        print(" ".join([*(to_run(plan) or ["nothing"]), *plan.asked.dry]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        print("error")


if __name__ == "__main__":
    with reporting_errors():
        main()
