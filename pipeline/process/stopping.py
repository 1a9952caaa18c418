"""SIGTERM and Ctrl-C: the first asks a run to save and end at the next safe boundary, the second ends
it now.

A command line installs the handler; a stage that is called as a function keeps its caller's.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

from pipeline.process.progress import is_main_process, say

_NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}

_SAME = 0.5
"""Seconds within which two are one: make and a launcher pass on what their whole group was sent."""

_asked = 0.0  # when, by the monotonic clock; 0 = not yet
_by: int = signal.SIGTERM  # what asked
_training = False


def install() -> None:
    """Handle both from now on."""
    global _asked
    if threading.current_thread() is threading.main_thread():
        _asked = 0.0
        for number in _NAMES:
            signal.signal(number, _handle)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Within, a signal waits until somebody looks at `asked()`; elsewhere, and at the end, it ends the process."""
    global _training
    _training = True
    try:
        yield
    finally:
        _training = False
    if _asked:
        sys.exit(code())


def asked() -> bool:
    """Whether a signal has come."""
    return bool(_asked)


def code() -> int:
    """What a shell reports of a process that the signal has ended: 143 SIGTERM, 130 Ctrl-C."""
    return 128 + _by


def leave(stage: str, step: int) -> NoReturn:
    """End with `code()` after the state of `step` was saved."""
    name = _NAMES[signal.Signals(_by)]
    ending()
    say(f"{stage}: stopped by {name}, saved after step {step}; the same command goes on from there")
    raise SystemExit(code())


def ending() -> None:
    """Heed no further signal: of several processes the first to go has the others sent one."""
    for number in _NAMES if "RANK" in os.environ else ():
        signal.signal(number, signal.SIG_IGN)


def _handle(signum: int, frame: object) -> None:
    global _asked, _by
    if _asked:
        if time.monotonic() - _asked > _SAME:
            os.write(2, b"ended at once: what came after the last saved state is lost\n")
            os._exit(128 + signum)
        return
    _asked, _by = time.monotonic(), signum
    if not _training:
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(code())
    if not is_main_process():
        return
    # not print: the signal may have come in the middle of one
    name = _NAMES[signal.Signals(signum)]
    os.write(
        2, f"{name}: saving at the end of this step; a second one ends the run at once\n".encode()
    )
