"""What people say about responses, in one SQLite file that loses nothing it has called saved.

`events` is only ever added to, one a judgement; `current` is an index on it, the newest event of each
annotator about each task, and `queue` counts each task's labels and leases (by triggers). What is added, said or changed is on the disk before a
method returns (WAL, synchronous=FULL); a lease alone may be lost with the machine.
"""

import contextlib
import hashlib
import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.data.messages import Message
from pipeline.errors import UserError
from pipeline.feedback import migrations

LEASE = 20 * 60.0
"""Seconds that a task is kept for whoever has it on the screen."""
CHECK_EVERY = 20
"""Labels of an annotator between two attention checks."""


class Conflict(Exception):
    """The same person has said something else about this task meanwhile, in another window."""


@dataclass
class Candidate:
    """A response; who labels sees the text, and whether it ended."""

    text: str
    source: str = ""
    """Which model wrote it; for nobody's eyes before the export."""
    score: float | None = None
    """A reward model's."""
    ended: bool = True


@dataclass
class Task:
    """K different responses to one prompt, in the order in which people see them."""

    prompt: list[Message]
    candidates: list[Candidate]
    row: dict[str, Any] = field(default_factory=dict)
    """The prompt's other columns."""
    last: int | None = None
    """An attention check: the response that asks to be put last."""
    origin: str | None = None
    """What was sampled, as `settings:number`; the same is never sampled twice."""

    @property
    def key(self) -> str:
        """What makes it this task: the prompt and the responses, in any order."""
        return _hash(json.dumps([self.prompt, sorted(c.text for c in self.candidates)]))


@dataclass
class Label:
    """The newest judgement of one person about one task."""

    event: int
    uuid: str
    time: float
    annotator: str
    task: int
    kind: str
    body: dict[str, Any]


class Store:
    """One labels.db; several threads and processes may have it open. UserError: not ours, or from a newer version."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.RLock()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        self._db = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
        try:
            self._open()
        except sqlite3.DatabaseError as error:
            raise UserError(f"{path}: cannot be opened: {error}") from None

    def _open(self) -> None:
        has = [self._db.execute(f"PRAGMA {p}").fetchone()[0] for p in _KNOWN]
        if has[0] != migrations.APPLICATION and any(has):
            raise UserError(f"{self.path}: not a file of labels")
        if has[1] > len(migrations.MIGRATIONS):
            raise UserError(
                f"{self.path}: its version is {has[1]}, this program knows {len(migrations.MIGRATIONS)}; it was "
                "made by a newer one, which opens it. Nothing was changed"
            )
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA foreign_keys=ON")
        if has[1] == len(migrations.MIGRATIONS):
            return
        with self._writing():
            done = self._db.execute("PRAGMA user_version").fetchone()[0]
            for statement in migrations.since(done):
                self._db.execute(statement)
            self._db.execute(f"PRAGMA application_id={migrations.APPLICATION}")
            self._db.execute(f"PRAGMA user_version={len(migrations.MIGRATIONS)}")

    @contextlib.contextmanager
    def _writing(self, durably: bool = True) -> Iterator[None]:
        """All of it or nothing; on the disk when it ends, unless the machine's fall may undo it."""
        with self._lock:
            self._db.execute(f"PRAGMA synchronous={'FULL' if durably else 'NORMAL'}")
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # a full disk has rolled it back already
                    self._db.execute("ROLLBACK")
                raise

    def _rows(self, query: str, *values: Any) -> list[tuple]:
        with self._lock:
            return self._db.execute(query, values).fetchall()

    def close(self) -> None:
        """Everything is on the disk already."""
        self._db.close()

    # --- tasks ------------------------------------------------------------------------------------

    def add(self, tasks: Iterable[Task], overlap: float = 0.0, votes: int = 1) -> int:
        """Tasks that are not there yet, each asked of one person, a share `overlap` of `votes` of them;
        the number added."""
        added = 0
        with self._writing():
            for task in tasks:
                body, wanted = asdict(task), votes if _part(task.key) < overlap else 1
                last, origin = body.pop("last"), body.pop("origin")
                cells = (task.key, origin, json.dumps(body, default=str), last)
                told = "INSERT OR IGNORE INTO tasks (key, origin, body, last) VALUES (?, ?, ?, ?)"
                if (new := self._db.execute(told, cells)).rowcount:
                    waits = (new.lastrowid, last is not None, wanted)
                    queued = "INSERT INTO queue (task, checks, wanted) VALUES (?, ?, ?)"
                    added += self._db.execute(queued, waits).rowcount
        return added

    def tasks(self) -> dict[int, Task]:
        """Every task by its number."""
        found = self._rows("SELECT id, body, last, origin FROM tasks ORDER BY id")
        return {number: _task(*cells) for number, *cells in found}

    def task(self, number: int) -> Task | None:
        """One task."""
        found = self._rows("SELECT body, last, origin FROM tasks WHERE id = ?", number)
        return _task(*found[0]) if found else None

    def wanted(self) -> dict[int, int]:
        """How many people's labels each task should have."""
        return dict(self._rows("SELECT task, wanted FROM queue"))  # type: ignore[arg-type]

    def newest(self) -> tuple[int, int]:
        """What changes with every task and every judgement."""
        said = "SELECT (SELECT max(id) FROM tasks), (SELECT max(id) FROM events)"
        return self._rows(said)[0]  # type: ignore[return-value]

    def number_of(self, task: Task) -> int:
        """The number of a task that was added."""
        return self._rows("SELECT id FROM tasks WHERE key = ?", task.key)[0][0]

    def origins(self, settings: str) -> set[int]:
        """The numbers of what was sampled with these settings."""
        found = self._rows("SELECT origin FROM tasks WHERE origin LIKE ?", f"{settings}:%")
        return {int(origin.rpartition(":")[2]) for (origin,) in found}

    def prefer(self, priorities: dict[int, float]) -> None:
        """Ask these tasks first, the highest first, of one person more where enough have answered; the
        priorities of all others end."""
        with self._writing():
            self._db.execute("UPDATE queue SET priority = 0 WHERE priority <> 0")
            first = "UPDATE queue SET priority = ?, wanted = max(wanted, labels + 1) WHERE task = ?"
            self._db.executemany(first, [(high, task) for task, high in priorities.items()])

    # --- people -----------------------------------------------------------------------------------

    def annotator(self, name: str, admin: bool = False) -> int:
        """Number of a person, who is added if need be."""
        with self._writing():
            self._db.execute(
                "INSERT OR IGNORE INTO annotators (name, admin, created) VALUES (?, ?, ?)",
                (name, admin, time.time()),
            )
        return self._rows("SELECT id FROM annotators WHERE name = ?", name)[0][0]

    def invite(self, name: str, admin: bool = False) -> str:
        """A new token of a person, whose old one ends; the file holds its hash alone."""
        number, token = self.annotator(name), secrets.token_urlsafe(24)
        with self._writing():
            told = "UPDATE annotators SET token = ?, admin = ? WHERE id = ?"
            self._db.execute(told, (_hash(token), admin, number))
        return token

    def revoke(self, name: str) -> None:
        """End a person's token; what they said stays."""
        with self._writing():
            self._db.execute("UPDATE annotators SET token = NULL WHERE name = ?", (name,))

    def who(self, token: str) -> tuple[int, str, bool] | None:
        """Number, name and whether an admin, of a token's owner."""
        query = "SELECT id, name, admin FROM annotators WHERE token = ?"
        found = self._rows(query, _hash(token))
        return (found[0][0], found[0][1], bool(found[0][2])) if found else None

    def people(self) -> list[tuple[str, bool, bool]]:
        """Name, whether an admin, whether invited; of everyone."""
        found = self._rows("SELECT name, admin, token IS NOT NULL FROM annotators ORDER BY id")
        return [(name, bool(admin), bool(invited)) for name, admin, invited in found]

    # --- labelling --------------------------------------------------------------------------------

    def take(self, annotator: int, now: float | None = None) -> int | None:
        """The task to put before a person, leased to them: the one they have, a due attention check, else by
        priority the one with the fewest labels; None when nothing is left for them."""
        now = time.time() if now is None else now
        with self._writing(durably=False):
            self._db.execute("DELETE FROM leases WHERE until <= ?", (now,))
            for query in (_HELD, _CHECK, _NEXT):
                if found := self._db.execute(query, {"me": annotator}).fetchone():
                    lease = (annotator, found[0], now + LEASE)
                    self._db.execute(_LEASE, lease)
                    return found[0]
        return None

    def save(
        self,
        annotator: int,
        task: int,
        kind: str,
        body: dict[str, Any],
        uuid: str,
        after: int | None = None,
        when: float | None = None,
    ) -> int:
        """Number of the event that says it, on the disk; said again (the same `uuid`), the first one's.

        `after`: the person's own event about this task that it takes the place of; Conflict if there is
        another one meanwhile.
        """
        with self._writing():
            said = "SELECT id, annotator, task FROM events WHERE uuid = ?"
            if before := self._db.execute(said, (uuid,)).fetchone():
                if before[1:] != (annotator, task):
                    raise Conflict
                return before[0]
            own = "SELECT event FROM current WHERE task = ? AND annotator = ?"
            newest = self._db.execute(own, (task, annotator)).fetchone()
            if (newest[0] if newest else None) != after:
                raise Conflict
            cells = (uuid, when or time.time(), annotator, task, kind, json.dumps(body))
            added = self._db.execute(
                "INSERT INTO events (uuid, time, annotator, task, kind, body) VALUES (?, ?, ?, ?, ?, ?)",
                cells,
            )
            current = (task, annotator, added.lastrowid, kind)
            self._db.execute(_CURRENT, current)
            self._db.execute(
                "DELETE FROM leases WHERE annotator = ? AND task = ?", (annotator, task)
            )
        assert added.lastrowid is not None
        return added.lastrowid

    def labels(self, annotator: int | None = None, task: int | None = None) -> list[Label]:
        """The newest judgements, in their order; of one person, or about one task."""
        asked = {"c.annotator": annotator, "c.task": task}
        given = {name: value for name, value in asked.items() if value is not None}
        where = " AND ".join(f"{name} = ?" for name in given) or "1"
        found = self._rows(_LABELS.format(where), *given.values())
        return [Label(*(*cells, json.loads(body))) for *cells, body in found]

    def counts(self, annotator: int) -> tuple[int, int]:
        """Tasks that a person has judged, and that are there for them still."""
        [(done, left)] = self._rows(_COUNTS.replace(":me", "?1"), annotator)
        return done, left

    # --- guidelines -------------------------------------------------------------------------------

    def guide(self, text: str) -> int:
        """Version of a guideline's text: a new one if it is not the newest."""
        version, newest = self.guideline()
        if text == newest:
            return version
        with self._writing():
            told = "INSERT INTO guidelines VALUES (?, ?, ?)"
            self._db.execute(told, (version + 1, text, time.time()))
        return version + 1

    def guideline(self) -> tuple[int, str]:
        """Version and text of the newest guideline; 0 and none."""
        query = "SELECT version, text FROM guidelines ORDER BY version DESC LIMIT 1"
        return next(iter(self._rows(query)), (0, ""))  # type: ignore[return-value]


_KNOWN = ("application_id", "user_version", "schema_version")
_HELD = "SELECT task FROM leases WHERE annotator = :me"
_LEASE = "INSERT INTO leases VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET until = excluded.until"
_CURRENT = """
    INSERT INTO current VALUES (?, ?, ?, ?)
    ON CONFLICT DO UPDATE SET event = excluded.event, kind = excluded.kind"""
_UNSEEN = "NOT EXISTS (SELECT 1 FROM current c WHERE c.task = q.task AND c.annotator = :me)"
_CHECK = f"""
    SELECT task FROM queue q WHERE checks AND {_UNSEEN} AND {CHECK_EVERY} <= (
        SELECT count(*) FROM current WHERE annotator = :me AND event > coalesce((
            SELECT max(c.event) FROM current c JOIN queue seen ON seen.task = c.task
            WHERE c.annotator = :me AND seen.checks), 0))
    ORDER BY task LIMIT 1"""
_NEXT = f"""
    SELECT task FROM queue q WHERE NOT checks AND labels + leased < wanted AND {_UNSEEN}
    ORDER BY priority DESC, labels + leased, task LIMIT 1"""
_COUNTS = f"""
    SELECT (SELECT count(*) FROM current WHERE annotator = :me),
        (SELECT count(*) FROM queue q WHERE NOT checks AND labels < wanted AND {_UNSEEN})"""
_LABELS = """
    SELECT e.id, e.uuid, e.time, a.name, e.task, e.kind, e.body FROM current c
    JOIN events e ON e.id = c.event JOIN annotators a ON a.id = c.annotator
    WHERE {} ORDER BY e.id"""


def _task(body: str, last: int | None, origin: str | None) -> Task:
    cells = json.loads(body)
    cells["candidates"] = [Candidate(**one) for one in cells["candidates"]]
    return Task(**cells, last=last, origin=origin)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _part(key: str) -> float:
    """Where a key lies between 0 and 1."""
    return int(key[:8], 16) / 2**32
