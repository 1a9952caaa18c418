"""What a run tells: a bar on a terminal, plain lines elsewhere."""

import contextlib
import math
import os
import statistics
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

    A rich bar on a terminal, with a panel of `more` below it if that is given; else lines like
    `ppo  12/50  kl 1.20  12 min left` every 5 s or 10 %. `done`: what an earlier process has done.
    """

    def __init__(self, total: int, description: str, done: int = 0):
        self.total, self.description = total, description
        self.done = self._before = done
        self.fields: dict[str, Any] = {}
        self.curves: dict[str, list[float]] = {}
        self._ticks: list[float] = []  # seconds of each step, by the clock
        self._bar: Any = None
        self._told = 0
        self._told_at = 0.0

    def __enter__(self) -> Self:
        self._told_at = self._last = time.monotonic()
        if is_main_process() and sys.stdout.isatty():
            self._bar = _rich_bar()
            self._task = self._bar.add_task(
                self.description, total=self.total, fields="", curves={}
            )
            self._bar.start()
            _bars.append(self._bar.console)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            _bars.pop()
            self._bar.stop()
        elif kind is None and self._told < self.done:
            self._line()

    def advance(self, n: int = 1, more: dict[str, float] | None = None, **fields: Any) -> None:
        """`n` more are done; `fields` are shown beside the count, the course of `more` on a terminal alone."""
        self.done += n
        self.fields |= fields
        if n:
            now = time.monotonic()
            self._ticks += [(now - self._last) / n] * n
            self._last = now
        for name, value in (more or {}).items():
            self.curves.setdefault(name, []).append(value)
        if self._bar is not None:
            shown = f"{self._shown()}  {self._left()}".strip()
            self._bar.update(self._task, completed=self.done, fields=shown, curves=self.curves)
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
        shown = f"{self._shown()}  {self._left()}".strip()
        say(f"{self.description}  {self.done:>{width}}/{self.total}  {shown}".rstrip())

    def seconds_left(self) -> float | None:
        """By what the steps of this process took, those that stalled counted less; None before any."""
        if not self._ticks:
            return None
        mean = sum(self._ticks) / len(self._ticks)
        each = (mean + statistics.median(self._ticks)) / 2
        return each * (self.total - self.done)

    def _left(self) -> str:
        """Told from a twentieth on, where it is a minute or more."""
        left, done = self.seconds_left(), self.done - self._before
        if left is None or left < 60 or done * 20 < self.total - self._before:
            return ""
        hours, minutes = divmod(round(left / 60), 60)
        return f"{hours} h {minutes:02} min left" if hours else f"{minutes} min left"

    def _shown(self) -> str:
        return "  ".join(f"{name} {_short(value)}" for name, value in self.fields.items())


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _rich_bar() -> Any:
    from rich import progress
    from rich.panel import Panel
    from rich.table import Table

    class Live(progress.Progress):
        def get_renderables(self) -> Iterator[Any]:
            yield self.make_tasks_table(self.tasks)
            for curves in (task.fields["curves"] for task in self.tasks):
                if curves:
                    table = Table.grid(padding=(0, 2))
                    for name, values in curves.items():
                        table.add_row(name, f"{values[-1]:.4g}", spark(values))
                    yield Panel(table, expand=False)

    return Live(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[fields]}", markup=False),
    )


def spark(values: Sequence[float], width: int = 40) -> str:
    """The course of the last values as a line of bars; those that are no number are blank."""
    shown = values[-width:]
    real = [value for value in shown if math.isfinite(value)]
    low, high = min(real, default=0.0), max(real, default=0.0)
    step = (high - low) / 7 or 1.0
    return "".join("▁▂▃▄▅▆▇█"[round((v - low) / step)] if math.isfinite(v) else " " for v in shown)
