"""What is wrong with rows, gathered so that one error names the first twenty by file and line."""

from collections import Counter
from dataclasses import dataclass, field

from pipeline.errors import UserError
from pipeline.process.progress import say

SHOWN, ALIKE = 20, 3
"""Lines of an error, and lines that give the same reason."""


class BadRow(Exception):
    """One row cannot be used; the message says why. Caught by whoever knows the row's place."""


@dataclass
class Report:
    """Problems and counts of one data source.

    `allowed` is the share of rows that may be bad; those are dropped and counted.
    """

    allowed: float = 0.0
    rows: int = 0
    problems: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def problem(self, where: str, reason: object) -> None:
        """A row that cannot be used; its first problem counts."""
        self.problems.setdefault(where, f"{where}: {reason}")

    def count(self, what: str, by: int = 1) -> None:
        """Something dropped or merged that is no mistake; `what` reads on from a number."""
        if by:
            self.counts[what] = self.counts.get(what, 0) + by

    def close(self, name: str, kept: int, notes: list[str] | None = None) -> None:
        """Raise a UserError if there were problems or nothing is left, else tell what was counted.

        Notes go to `notes` when a list is given; otherwise they are printed.
        """
        if len(self.problems) > self.allowed * self.rows:
            raise UserError(self._message(name))
        if not kept:
            why = "; ".join(f"{number} {what}" for what, number in self.counts.items())
            raise UserError(f"{name}: nothing to use in {self.rows} rows{why and f' ({why})'}")
        told = list(self.remarks)
        if self.problems:
            first = next(iter(self.problems.values()))
            told.append(f"{len(self.problems)} bad rows dropped, the first: {first}")
        told += [f"{number} {what}" for what, number in self.counts.items()]
        for line in told:
            if notes is None:
                say(f"{name}: {line}")
            else:
                notes.append(f"{name}: {line}")

    def _message(self, name: str) -> str:
        total = len(self.problems)
        seen: Counter[str] = Counter()
        lines: list[str] = []
        for where, line in self.problems.items():
            reason = line.removeprefix(where)
            seen[reason] += 1
            if seen[reason] <= ALIKE and len(lines) < SHOWN:
                lines.append(line)
        if total > len(lines):
            lines.append(f"... and {total - len(lines)} more")
        lines.append(
            f"{name}: {total} problem{'s' * (total > 1)} in {self.rows} rows; "
            "mend them, or allow a share of bad rows (bad_rows)"
        )
        return "\n".join(lines)


def kind(value: object) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "a text"
    if isinstance(value, dict):
        return "an object"
    return "a list" if isinstance(value, list | tuple) else type(value).__name__


def not_utf8(error: UnicodeDecodeError, place: str = "") -> str:
    """What to do about bytes that are no UTF-8."""
    return (
        f"not UTF-8: byte 0x{error.object[error.start]:02x}{place}; recode the file, for example from "
        "GBK: iconv -f GB18030 -t UTF-8 IN > OUT"
    )
