"""accelerate's launcher with one message in the place of a traceback, and time to save after a signal.

`python -m pipeline.engines --config_file configs/engines/ddp.yaml --num_processes 4 -m stages.ppo ...`
"""

import contextlib
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from pipeline.engines.start import LAUNCH, LOST


def main(argv: list[str]) -> int:
    """Run until all processes have ended; returns an exit code, theirs if they told why."""
    import psutil
    import torch
    from accelerate.commands import launch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.ERROR)  # torchrun's own account of what went wrong
    if not torch.accelerator.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # or there would be independent runs
    args = launch.launch_command_parser().parse_args(argv)
    if args.num_processes is None:
        args.num_processes = _processes(args.config_file)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no hints on DDP's settings
    args.signals_to_handle = "SIGQUIT"  # torchrun would kill what has not saved within 30 s

    def forward(number: int, _: object) -> None:
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[LAUNCH] = folder
        try:
            launch.launch_command(args)
        except ChildFailedError as error:
            return _ended(error.failures, (Path(folder) / "told").exists())
    return 0


def _processes(config: str | None) -> int:
    """As many as the config says, else one a device, on CPUs two."""
    import torch
    from accelerate.commands.config.config_args import load_config_from_file

    told = load_config_from_file(config).num_processes
    return told if told > 0 else (torch.accelerator.device_count() or 2)


def _ended(failures: dict[int, Any], told: bool) -> int:
    """The exit code, after a line about processes that could not say why they ended."""
    first = min(failures.values(), key=lambda f: (f.exitcode == LOST, f.timestamp))
    code = first.exitcode
    if code < 0 and not told:
        name = signal.Signals(-code).name
        print(
            f"error: process {first.local_rank} was ended by {name}, and so the others were; the same "
            "command goes on from the last saved state",
            file=sys.stderr,
        )
    return code if code > 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
