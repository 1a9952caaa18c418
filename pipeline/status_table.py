"""`make status`: a run's stages, what they reached, and what would be made again."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline.artifacts import is_published, lock_path, read_manifest
from pipeline.errors import UserError
from pipeline.files import Lock
from pipeline.schema import STAGES
from pipeline.status import STEPS, Plan


def show(plan: Plan) -> None:
    """Print the table."""
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
