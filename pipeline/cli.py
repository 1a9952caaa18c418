"""Command line of a stage: everything a user can get wrong is told before the slow imports."""

import argparse
import contextlib
import gc
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from pipeline import run
from pipeline.config.load import AddSettings, load_config, split_settings, stage_overrides
from pipeline.config.schema import STAGES, StageConfig
from pipeline.errors import UserError
from pipeline.handoff.lineage import inputs_of
from pipeline.process import disk, faults, memory, stopping
from pipeline.process.progress import is_main_process, say


def main(stage: str, argv: list[str] | None = None) -> None:
    """Run `stages.STAGE` unless it is up to date; always ends the process.

    Exit codes: 0 done, 2 a mistake of the user's, 130 interrupted, 143 saved and stopped by SIGTERM,
    1 anything else.
    """
    stopping.install()
    with reporting_errors():
        args = parser(stage).parse_args(argv)
        faults.setup(stage)
        config = configured(stage, args)
        if args.force:
            if is_main_process():
                run.start_again(config)
        elif (reason := run.why_stale(config)) is None:
            say(f"{stage}: up to date ({config.run / stage})")
            sys.exit(0)
        elif reason != "not made yet":
            say(f"{stage}: made again, {reason}")
        inputs_of(config)  # data that is not there is told before the slow imports
    with reporting_errors(config):
        final = _imported(stage).run(config)
        say(f"{stage}: published {final}")
    sys.exit(0)


def _imported(stage: str) -> ModuleType:
    """`stages.STAGE`. What its imports build is there to stay: looking for garbage in it, now or
    later, would cost a tenth of the start-up and find nothing."""
    gc.disable()
    try:
        return importlib.import_module(f"stages.{stage}")
    finally:
        gc.freeze()
        gc.enable()


def parser(stage: str) -> argparse.ArgumentParser:
    """Arguments of `python -m stages.STAGE`."""
    arguments = argparse.ArgumentParser(prog=f"python -m stages.{stage}")
    arguments.add_argument("--config", type=Path, required=True, help="the stage's YAML file")
    arguments.add_argument("--run", type=Path, help="directory of the run, e.g. checkpoints/tiny")
    arguments.add_argument("--from", type=Path, dest="borrow", help="run whose stages to borrow")
    arguments.add_argument("--force", action="store_true", help="start again, whatever is there")
    arguments.add_argument(
        "--set", action=AddSettings, default="", help='several settings in one: "seed=3 ppo.lam=1"'
    )
    arguments.add_argument("settings", nargs="*", metavar="key=value", help="override a key")
    return arguments


def configured(stage: str, args: argparse.Namespace) -> StageConfig:
    """The stage's config with the command line put over it."""
    words = stage_overrides(stage, [*split_settings(args.set), *args.settings])
    config = load_config(STAGES[stage], args.config, words)
    places = {"run": args.run, "borrow": args.borrow}
    return config.model_copy(update={key: path for key, path in places.items() if path})


@contextlib.contextmanager
def reporting_errors(config: StageConfig | None = None) -> Iterator[None]:
    """Errors that a user can act on become a message and an exit code, without a traceback."""
    try:
        yield
    except UserError as error:
        _stop(f"error: {error}", 2)
    except KeyboardInterrupt:
        _stop("interrupted", 130)
    except Exception as error:
        if disk.is_full(error):
            _stop(f"error: {disk.message(config)}", 1)
        if not memory.is_out(error):
            raise
        _stop(f"error: {memory.message(error)}", 1)


def _stop(message: str, code: int) -> None:
    if is_main_process() or code == 1:
        print(message, file=sys.stderr, flush=True)
    sys.exit(code)
