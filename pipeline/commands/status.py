"""A run's stages, what they reached, and what would be made again.

python -m pipeline.commands.status --run checkpoints/tiny --recipe configs/tiny      a table (make status)
python -m pipeline.commands.status ... --plan "sft ppo"    the steps to run, for the Makefile, in a line
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from pipeline.cli import reporting_errors
from pipeline.commands.plan import _SCHEMAS, STEPS, Plan, recipe_files, stale, to_run
from pipeline.config.load import AddSettings, checkpoints_root, split_settings
from pipeline.config.schema import STAGES
from pipeline.errors import UserError
from pipeline.handoff.artifacts import is_published, lock_path, read_manifest
from pipeline.process.files import Lock


def show(plan: Plan) -> None:
    """Print the table."""
    from rich.console import Console  # a plan for make needs none of it
    from rich.table import Table

    table = Table(title=str(plan.run), title_justify="left", box=None, pad_edge=False)
    for column in ("step", "state", "made", "what it reached"):
        table.add_column(column, overflow="fold")
    for step in STEPS:
        if step in plan.reasons:
            table.add_row(step, _state(plan, step), *_made(plan, step))
    Console(soft_wrap=False).print(table)


def _state(plan: Plan, step: str) -> str:
    if step in STAGES and (lock := lock_path(plan.run / step)).exists():
        try:
            with Lock(lock):
                pass
        except UserError as error:
            return "running, " + str(error).rpartition("by ")[2]
    if plan.borrowed(step):
        return f"borrowed from {plan.borrow}"
    reason = plan.reasons[step]
    if reason is None:
        return "up to date"
    saved = sorted((plan.run / ".work" / step).glob("step-*")) if step in STAGES else []
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
    if step == "base":
        return plan.base
    if step not in STAGES:
        return None
    return plan.borrow / step if plan.borrowed(step) and plan.borrow else plan.run / step


# --- command line ---------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments, as the Makefile gives them; an empty one is an absent one."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.commands.plan")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--recipe", type=Path, required=True, help="folder of configs")
    parser.add_argument("--from", dest="borrow", default="", help="run to borrow stages from")
    for step in _SCHEMAS:
        parser.add_argument(
            f"--{step}", default="", help=f"config of {step} in place of the recipe's"
        )
    parser.add_argument("--base-directory", default="", help="where the base model is made")
    parser.add_argument("--set", action=AddSettings, default="")
    parser.add_argument("--force", default="", help="steps to run anyway; 1 = those asked for")
    parser.add_argument("--plan", help="print the steps that these goals need run")
    return parser.parse_args(argv)


def plan_of(args: argparse.Namespace, goals: Iterable[str]) -> Plan:
    """The plan that the arguments describe."""
    force = args.force.split()
    if wrong := [word for word in force if word not in (*STEPS, "1")]:
        raise UserError(f"FORCE={wrong[0]}: one of {', '.join(STEPS)}, or 1 for what is asked for")
    chosen = {step: Path(file) if (file := getattr(args, step)) else None for step in _SCHEMAS}
    return stale(
        recipe_files(args.recipe, chosen),
        args.run,
        goals,
        split_settings(args.set),
        Path(args.borrow) if args.borrow else None,
        force,
        Path(args.base_directory or checkpoints_root() / "base" / args.recipe.name),
    )


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    args = parse(argv)
    if args.plan is None:
        show(plan_of(args, STEPS))
        return
    try:
        print(" ".join(to_run(plan_of(args, args.plan.split()))) or "nothing")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        print("error")


if __name__ == "__main__":
    with reporting_errors():
        main()
