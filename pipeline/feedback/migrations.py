"""The schema of labels.db, and what brings an older file up to it."""

import sqlite3
from collections.abc import Iterator

APPLICATION = 0x726C6866
"""SQLite's application_id of our files."""
MIGRATIONS = [
    """
    CREATE TABLE tasks (id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, origin TEXT UNIQUE,
        body TEXT NOT NULL, last INTEGER);
    CREATE TABLE queue (task INTEGER PRIMARY KEY REFERENCES tasks, checks INTEGER NOT NULL,
        wanted INTEGER NOT NULL, labels INTEGER NOT NULL DEFAULT 0, leased INTEGER NOT NULL DEFAULT 0,
        priority REAL NOT NULL DEFAULT 0);
    CREATE INDEX queue_order ON queue (priority DESC, labels + leased, task)
        WHERE NOT checks AND labels + leased < wanted;
    CREATE TABLE annotators (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, token TEXT UNIQUE,
        admin INTEGER NOT NULL DEFAULT 0, created REAL NOT NULL);
    CREATE TABLE events (id INTEGER PRIMARY KEY, uuid TEXT NOT NULL UNIQUE, time REAL NOT NULL,
        annotator INTEGER NOT NULL REFERENCES annotators, task INTEGER NOT NULL REFERENCES tasks,
        kind TEXT NOT NULL CHECK (kind IN ('label', 'skip')), body TEXT NOT NULL);
    CREATE TRIGGER never_changed BEFORE UPDATE ON events
        BEGIN SELECT RAISE(ABORT, 'events are only added'); END;
    CREATE TRIGGER never_removed BEFORE DELETE ON events
        BEGIN SELECT RAISE(ABORT, 'events are only added'); END;
    CREATE TABLE current (task INTEGER NOT NULL, annotator INTEGER NOT NULL, event INTEGER NOT NULL,
        kind TEXT NOT NULL, PRIMARY KEY (task, annotator)) WITHOUT ROWID;
    CREATE INDEX current_of ON current (annotator, event);
    CREATE TABLE leases (annotator INTEGER PRIMARY KEY, task INTEGER NOT NULL, until REAL NOT NULL);
    CREATE TRIGGER leased AFTER INSERT ON leases
        BEGIN UPDATE queue SET leased = leased + 1 WHERE task = new.task; END;
    CREATE TRIGGER free AFTER DELETE ON leases
        BEGIN UPDATE queue SET leased = leased - 1 WHERE task = old.task; END;
    CREATE TRIGGER said AFTER INSERT ON current
        BEGIN UPDATE queue SET labels = labels + (new.kind = 'label') WHERE task = new.task; END;
    CREATE TRIGGER said_again AFTER UPDATE ON current
        BEGIN UPDATE queue SET labels = labels + (new.kind = 'label') - (old.kind = 'label')
            WHERE task = new.task; END;
    CREATE TABLE guidelines (version INTEGER PRIMARY KEY, text TEXT NOT NULL, time REAL NOT NULL);
    """,
]
"""Entry n brings a file of version n to version n + 1."""


def since(version: int) -> Iterator[str]:
    """Statements that bring a file of this version to the newest, one by one: sqlite3's own executescript
    commits what is under way."""
    for script in MIGRATIONS[version:]:
        statement = ""
        for part in script.split(";"):
            statement += part + ";"
            if sqlite3.complete_statement(statement):
                yield statement
                statement = ""
