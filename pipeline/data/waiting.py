"""The lines of a `to_rank.jsonl` that wait for ranks, and ranks put into them; what is there stays, to the byte."""

import json
from pathlib import Path
from typing import Any

from pipeline.data.problems import BadRow
from pipeline.data.readers import Row, decoded
from pipeline.data.strict_json import parse_line
from pipeline.errors import UserError
from pipeline.process.files import write_atomically


def is_ranked(row: dict[str, Any]) -> bool:
    """Whether a line has ranks, or scores; null and an empty list are none."""
    return bool(row.get("ranks") or row.get("scores"))


class Waiting:
    """A file as it was read. UserError with file and line: what is no object of JSON."""

    def __init__(self, path: Path):
        self.path, self._read = path, path.read_bytes()
        self.rows = dict[int, Row]()
        """Of the lines without ranks, by their place from 0."""
        for at, raw in enumerate(self._read.split(b"\n")):
            where = f"{path}:{at + 1}"
            try:
                values = parse_line(decoded(raw)) if raw.strip() else {"ranks": True}
            except BadRow as error:
                raise UserError(f"{where}: {error}") from None
            if not is_ranked(values):
                self.rows[at] = Row(values, where)

    def put(self, ranks: dict[int, list]) -> None:
        """Write ranks by their line's place. UserError, and nothing written, where somebody has saved the file meanwhile."""
        lines = self._read.decode().split("\n")
        for at, own in ranks.items():
            end = "\r" * lines[at].endswith("\r")
            row = self.rows[at].values | {"ranks": own}
            lines[at] = json.dumps(row, ensure_ascii=False) + end
        if ranks:
            write_atomically(self.path, "\n".join(lines), over=self._read)
