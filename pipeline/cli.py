"""Command line of a stage: everything a user can get wrong is told before the slow imports."""

import argparse
import contextlib
import gc
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from pipeline import run, steps
from pipeline.config.load import AddSettings
from pipeline.config.schema import Data, StageConfig
from pipeline.data.forms import load_demonstrations, load_prompts
from pipeline.data.rankings import load_rankings
from pipeline.engines import start
from pipeline.errors import UserError
from pipeline.handoff import artifacts, datafiles, sealed
from pipeline.handoff.artifacts import is_published
from pipeline.handoff.lineage import missing, why_stale
from pipeline.handoff.remembered import Asked
from pipeline.process import disk, faults, memory, stopping
from pipeline.process.progress import is_main_process, say


def main(stage: str, argv: list[str] | None = None) -> None:
    """Run `stages.STAGE` unless it is up to date; always ends the process.

    Exit codes: 0 done, 2 a mistake of the user's, 130 stopped by Ctrl-C and 143 by SIGTERM (of a
    training under way, its state saved), 1 anything else.
    """
    stopping.install()
    start.ends_with_its_launcher()
    with reporting_errors():
        args = parser(stage).parse_intermixed_args(argv)
        faults.setup(stage, steps.phases())
        start.check()
        asked = request(stage, args)
        config = configured(stage, asked)
        start.check_fits(config)
        run.started(config, asked.of(stage), asked.recipe)
        if args.force:
            if is_main_process():
                run.start_again(config)
        elif (
            args.config is None
            and (told := asked.replaces(stage))
            and is_published(config.run / stage)
        ):
            raise UserError(f"{stage}: {told}; another --run, or --force")
        elif (reason := why_stale(stage, config, config.run)) is None:
            say(f"{stage}: up to date ({config.run / stage})")
            sys.exit(0)
        elif reason != "not made yet":
            say(f"{stage}: made again, {reason}")
        if problems := missing(config):  # told before the slow imports
            raise UserError("\n".join(f"{asked.of(stage).config}: {told}" for told in problems))
        check_rows(config)
    with reporting_errors(config):
        try:
            final = _imported(stage, config).run(config)
            say(f"{stage}: published {final}")
        except run.UpToDate:
            say(f"{stage}: up to date ({config.run / stage}), another process has just made it")
    sys.exit(0)


AT_ONCE = 2**23
"""Bytes of data that are read before the imports, in less than a second."""


def check_rows(config: StageConfig) -> None:
    """UserError for rows that the stage cannot use, where reading them twice costs nothing."""
    readers: dict[str, dict[str, Callable]] = {
        "sft": {"data": load_demonstrations, "validation_data": load_demonstrations},
        "rm": {"data": load_rankings},
        "ppo": {"prompts": load_prompts},
    }
    for key, read in readers.get(config.stage, {}).items():
        data = getattr(config, key)
        if not isinstance(data, Data):
            continue
        several = data.path if isinstance(data.path, list) else [data.path]
        paths = [part.path if isinstance(part, Data) else part for part in several]
        if all(isinstance(path, str) and Path(path).exists() for path in paths):  # and no hub ids
            files = [file for path in paths for file in datafiles.files(path)[0]]
            if sum(file.stat().st_size for file in files) < AT_ONCE:
                read(data, [])


def _imported(stage: str, config: StageConfig) -> ModuleType:
    """The stage's module. What its imports build is there to stay: looking for garbage in it, now or
    later, would cost a tenth of the start-up and find nothing.

    What TRL and peft import where it is installed, and this stage needs later or never, is not there
    meanwhile: a fifth of the start-up."""
    quantized = getattr(config, "dtype", "fp32") in ("int8", "nf4")
    hidden = {"wandb", *(() if quantized else ("bitsandbytes",))} - sys.modules.keys()
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    gc.disable()
    try:
        return importlib.import_module(steps.TABLE[stage].module)
    finally:
        gc.freeze()
        gc.enable()
        for name in hidden:
            del sys.modules[name]


def parser(stage: str) -> argparse.ArgumentParser:
    """Arguments of `python -m stages.STAGE`."""
    arguments = argparse.ArgumentParser(prog=f"python -m {steps.TABLE[stage].module}")
    add_arguments(arguments)
    arguments.add_argument("--from", type=Path, dest="borrow", help="run whose stages to borrow")
    arguments.add_argument("--force", action="store_true", help="start again, whatever is there")
    return arguments


def add_arguments(arguments: argparse.ArgumentParser) -> None:
    """What every step's command line has: a run, and what it is made with if it was not made before."""
    arguments.add_argument("--run", type=Path, help="directory of the run, e.g. checkpoints/tiny")
    arguments.add_argument("--config", type=Path, help="the step's YAML file")
    arguments.add_argument("--recipe", type=Path, help="folder that has it; default: the run's own")
    arguments.add_argument(
        "--set", action=AddSettings, default="", help='several settings in one: "seed=3 ppo.lam=1"'
    )
    arguments.add_argument("settings", nargs="*", metavar="key=value", help="override a key")


def request(name: str, args: argparse.Namespace) -> Asked:
    """What a step's command line asks for; the run remembers the rest."""
    words = args.settings
    if steps.TABLE[name].kind != "stage":  # all that stands alone there is its own
        words = [w if w.startswith(f"{name}.") else f"{name}.{w}" for w in words]
    if args.run is None and args.config is None:
        raise UserError(
            f"{name}: which run? --run checkpoints/NAME (and --config FILE for a new one)"
        )
    return Asked(
        run=args.run or getattr(steps.load(name, args.config), "run", None) or Path("."),
        recipe=args.recipe,
        files={name: args.config} if args.config else {},
        settings=[*steps.split_settings(args.set), *words],
        borrow=getattr(args, "borrow", None),
    )


def configured(stage: str, asked: Asked) -> StageConfig:
    """The stage's config as asked for."""
    made = asked.of(stage)
    config = steps.load(stage, made.config, made.settings)
    assert isinstance(config, StageConfig)
    return config.model_copy(update={"run": asked.run, "borrow": asked.borrow})


@contextlib.contextmanager
def reporting_errors(config: StageConfig | None = None) -> Iterator[None]:
    """Errors that a user can act on become a message and an exit code, without a traceback."""
    try:
        yield
    except UserError as error:
        _stop(f"error: {error}", 2)
    except KeyboardInterrupt:
        _stop(f"interrupted{_kept(config)}", 130)
    except Exception as error:
        if disk.is_full(error):
            room = (config.run, run.bytes_needed(config)) if config else (None,)
            _stop(f"error: {disk.message(*room)}", 1)
        if start.lost_another(error):
            stopping.ending()
            sys.exit(start.LOST)
        if not memory.is_out(error):
            raise
        _stop(f"error: {memory.message(error)}", 1)


def _kept(config: StageConfig | None) -> str:
    """What an interrupted stage has saved, in words."""
    if config is None:
        return ""
    if found := sealed.states(artifacts.work_path(config.run / config.stage)):
        return (
            f"; saved after step {sealed.step_of(found[-1])}, the same command goes on from there"
        )
    return "; no training state was saved yet"


def _stop(message: str, code: int) -> None:
    if start.first_to_tell():
        print(message, file=sys.stderr, flush=True)
    sys.exit(code)
