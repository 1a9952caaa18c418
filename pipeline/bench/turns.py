"""Long-lived workers that take turns: one line asks for a step, one line of JSON answers.

Imports, preparation and warm-up are thus outside of what is timed, and two sides can be measured in
alternation, A B A B, so that a busy machine slows both alike.
"""

import contextlib
import functools
import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.process.memory import peak_mb

Answer = dict[str, Any]
"""seconds, cpu_seconds (of all threads, spinning included), phases (name -> seconds), peak_mb, and
what a worker adds."""


class WorkerFailed(Exception):
    """A worker ended instead of answering; the message holds its last words."""


class Worker:
    """The asking side: `with Worker(...) as worker: worker.turn()`."""

    def __init__(self, module: str, words: list[str], environment: dict[str, str], log: Path):
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            self.process: Any = subprocess.Popen(
                [sys.executable, "-m", module, *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env={**os.environ, **environment},
            )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def ready(self) -> Answer:
        """Wait until it is prepared."""
        return self._answer()

    def turn(self) -> Answer:
        """One step."""
        with contextlib.suppress(BrokenPipeError):  # its last words are read below
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Answer:
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise WorkerFailed(last_words(self.log))
        return json.loads(line)


def last_words(log: Path) -> str:
    """The last line of a log that says something."""
    with log.open(errors="replace") as file:
        lines = deque((line.strip() for line in file if line.strip()), maxlen=1)
    return lines[0] if lines else "no message"


class Phases:
    """Seconds by phase since the last `reset`; a phase within another is not counted twice."""

    def __init__(self, wait: Callable[[], None] = lambda: None):
        self.wait = wait
        """Returns when an accelerator is done with what it was given."""
        self.reset()

    def reset(self) -> None:
        """Forget all phases."""
        self.seconds: dict[str, float] = {}
        self._inner = [0.0]  # seconds of phases within the one that is open
        self._rest: tuple[str, float] | None = None

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens within as a phase, less the phases within it."""
        self.wait()
        self._inner.append(0.0)
        start = time.perf_counter()
        yield
        self.wait()
        seconds = time.perf_counter() - start
        self._add(name, seconds - self._inner.pop())
        self._inner[-1] += seconds

    def timed(self, owner: Any, name: str, phase: str) -> None:
        """Have a function or method of `owner` count as a phase from now on."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with self.phase(phase):
                return function(*args, **kwargs)

        setattr(owner, name, wrapper)

    def rest(self, name: str) -> None:
        """From here to `end` is one phase, unless this is called again."""
        self.wait()
        self._rest = name, time.perf_counter()

    def end(self) -> None:
        """Close the phase that `rest` opened."""
        self.wait()
        if self._rest is not None:
            name, since = self._rest
            self._add(name, time.perf_counter() - since)

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


class Turns(Phases):
    """The answering side. `turns()` ends a step, or the preparation, and waits for the next.

    What happens between two calls is a step; the process ends when nobody asks any more.
    """

    def __init__(self, wait: Callable[[], None] = lambda: None):
        super().__init__(wait)
        self.noted: dict[str, Any] = {}
        """What answers say besides, until it is replaced."""
        self._began: tuple[float, float] | None = None
        # libraries print; only answers may reach the asking side
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def __call__(self, **more: Any) -> None:
        """End of a step; `more` goes into its answer."""
        self.end()
        answer = {"phases": self.seconds, "peak_mb": peak_mb(), **self.noted, **more}
        if self._began is not None:
            answer["seconds"] = time.perf_counter() - self._began[0]
            answer["cpu_seconds"] = time.process_time() - self._began[1]
        print(json.dumps(answer), file=self._answers, flush=True)
        if not sys.stdin.readline():
            sys.exit(0)
        self.reset()
        self._began = time.perf_counter(), time.process_time()
