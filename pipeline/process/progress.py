"""What a run tells: a bar on a terminal, plain lines elsewhere."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Self, TypeVar

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 5.0
SECONDS_UNTOLD = 2.0
_bars: list[Any] = []  # rich consoles of bars being shown; say() prints above the innermost


def say(text: str) -> None:
    """Print a line, above a bar if one is shown; from the main process alone."""
    if not is_main_process():
        return
    if _bars:
        _bars[-1].print(text, markup=False, highlight=False)
    else:
        print(text, flush=True)


def is_main_process() -> bool:
    """Whether this is the only process or the first of several (`accelerate launch`, torchrun)."""
    return os.environ.get("RANK", "0") == "0"


def tracked(items: Sequence[T], description: str | None) -> Iterator[T]:
    """The items; with progress if they take longer than two seconds and have a description."""
    began, bar = time.monotonic(), None
    with contextlib.ExitStack() as stack:
        for done, item in enumerate(items):
            yield item
            if bar is not None:
                bar.advance()
            elif description is not None and time.monotonic() - began > SECONDS_UNTOLD:
                bar = stack.enter_context(track(len(items), description))
                bar.advance(done + 1)


class track:
    """`with track(50, "ppo") as bar: bar.advance(1, kl=1.2)` shows progress to `total`.

    A rich bar on a terminal; else lines like `ppo  12/50  kl 1.20` every 5 s or 10 %.
    """

    def __init__(self, total: int, description: str):
        self.total, self.description = total, description
        self.done = 0
        self.fields: dict[str, Any] = {}
        self._bar: Any = None
        self._told = 0
        self._told_at = 0.0

    def __enter__(self) -> Self:
        self._told_at = time.monotonic()
        if is_main_process() and sys.stdout.isatty():
            self._bar = _rich_bar()
            self._task = self._bar.add_task(self.description, total=self.total, fields="")
            self._bar.start()
            _bars.append(self._bar.console)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            _bars.pop()
            self._bar.stop()
        elif kind is None and self._told < self.done:
            self._line()

    def advance(self, n: int = 1, **fields: Any) -> None:
        """`n` more are done; `fields` are shown beside the count."""
        self.done += n
        self.fields |= fields
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, fields=self._shown())
        elif self._is_time():
            self._line()

    def _is_time(self) -> bool:
        """A tenth further or 5 seconds later, but no more than about two lines a second."""
        waited = time.monotonic() - self._told_at
        further = (self.done - self._told) * 10 >= self.total and waited > 0.5
        return further or waited >= SECONDS_BETWEEN_LINES

    def _line(self) -> None:
        self._told, self._told_at = self.done, time.monotonic()
        width = len(str(self.total))
        say(f"{self.description}  {self.done:>{width}}/{self.total}  {self._shown()}".rstrip())

    def _shown(self) -> str:
        return "  ".join(f"{name} {_short(value)}" for name, value in self.fields.items())


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _rich_bar() -> Any:
    from rich import progress

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[fields]}", markup=False),
    )
