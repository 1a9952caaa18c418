"""SIGTERM: the first asks a run to save and end at the next safe boundary, the second ends it now.

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

from pipeline.process.progress import say

CODE = 143
"""What a shell reports of a process that SIGTERM has ended."""

_SAME = 0.5
"""Seconds within which two are one: make and a launcher pass on what their whole group was sent."""

_asked = 0.0  # when, by the monotonic clock; 0 = not yet
_training = False


def install() -> None:
    """Handle SIGTERM from now on."""
    global _asked
    if threading.current_thread() is threading.main_thread():
        _asked = 0.0
        signal.signal(signal.SIGTERM, _handle)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Within, a SIGTERM waits until somebody looks at `asked()`: steps are not cut in half.

    Elsewhere, and at the end of this, it ends the process by SystemExit: what is worth it is saved.
    """
    global _training
    _training = True
    try:
        yield
    finally:
        _training = False
    if _asked:
        sys.exit(CODE)


def asked() -> bool:
    """Whether a SIGTERM has come."""
    return bool(_asked)


def leave(stage: str, step: int) -> NoReturn:
    """End with 143 after the state of `step` was saved."""
    say(
        f"{stage}: stopped by SIGTERM, saved after step {step}; the same command goes on from there"
    )
    raise SystemExit(CODE)


def _handle(signum: int, frame: object) -> None:
    global _asked
    if _asked:
        if time.monotonic() - _asked > _SAME:
            os._exit(CODE)
        return
    _asked = time.monotonic()
    if not _training:
        sys.exit(CODE)
    # not print: the signal may have come in the middle of one
    os.write(2, b"SIGTERM: saving at the end of this step; a second one ends the run at once\n")
