"""Runs the command lines of stages and of the evaluation, for studies that need several runs."""

import argparse
import signal
import subprocess
import sys
from pathlib import Path

from pipeline.config.load import AddSettings, checkpoints_root
from pipeline.errors import UserError
from pipeline.handoff.artifacts import is_published
from pipeline.process.progress import say
from pipeline.steps import split_settings


class StepFailed(UserError):
    """A command of a study ended with an error, which it has printed."""


def parser(study: str, about: str | None) -> argparse.ArgumentParser:
    """Arguments that all studies have."""
    out = argparse.ArgumentParser(prog=f"python -m pipeline.evaluation.{study}", description=about)
    out.add_argument("--recipe", default="tiny", help="a folder of configs/ (or its path)")
    out.add_argument("--run", type=Path, help="run to start from; default: checkpoints/RECIPE")
    out.add_argument("--set", action=AddSettings, default="", help="the words of SET")
    out.add_argument("settings", nargs="*", help="key=value")
    return out


def asked(args: argparse.Namespace) -> tuple[Path, Path, list[str]]:
    """Recipe, run and settings that a study's command line names."""
    recipe = recipe_folder(args.recipe)
    run = args.run or checkpoints_root() / recipe.name  # where make puts a recipe's run
    return recipe, run, [*split_settings(args.set), *args.settings]


def count(text: str) -> int:
    """An argument that is a number of things, at least one."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text}: a whole number from 1 on")
    return int(text)


def recipe_folder(name: str) -> Path:
    """A recipe's folder from its name (`tiny` is configs/tiny) or its path; UserError without one."""
    for folder in (Path(name), Path("configs") / name):
        if (folder / "sft.yaml").is_file():
            return folder
    raise UserError(f"{name}: no recipe: neither {name} nor configs/{name} has a sft.yaml")


def sibling(run: Path, suffix: str) -> Path:
    """A run beside another: checkpoints/tiny and "seed3" give checkpoints/tiny-seed3."""
    return run.with_name(f"{run.name}-{suffix}")


ASKED_TO_END = (130, 143, -signal.SIGINT, -signal.SIGTERM)


def call(module: str, *words: str) -> None:
    """Run `python -m module words...` and show what it prints; StepFailed if it fails.

    A SIGTERM goes on to it; a command that was asked to end, and has saved its state, ends the study.
    """
    command = ["-m", module, *words]
    say(f"$ python {' '.join(command)}")
    child = subprocess.Popen([sys.executable, *command])
    before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    try:
        code = child.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
    if code in ASKED_TO_END:
        sys.exit(code if code > 0 else 128 - code)
    if code:
        raise StepFailed(f"python {' '.join(command)} failed; its message is above")


def ensure_base(recipe: Path) -> None:
    """Build the recipe's base model if it is one that is built here and is not there yet."""
    config, out = recipe / "base.yaml", checkpoints_root() / "base" / recipe.name
    if config.is_file() and not is_published(out):
        call("pipeline.commands.base", "--config", str(config), "--out", str(out))


def stage(
    name: str,
    recipe: Path,
    run: Path,
    *settings: str,
    borrow: Path | None = None,
    config: Path | None = None,
) -> None:
    """Make a stage of a run unless it is up to date, from the earlier stages of `borrow` or its own."""
    words = ["--config", str(config or recipe / f"{name}.yaml"), "--run", str(run)]
    words += ["--from", str(borrow)] if borrow is not None else []
    call(f"stages.{name}", *words, *settings)


def evaluation(recipe: Path, run: Path, split: str, *settings: str) -> None:
    """Evaluate a run, unless that was done."""
    config = str(recipe / "eval.yaml")
    call("pipeline.evaluation", "--run", str(run), "--config", config, "--split", split, *settings)
