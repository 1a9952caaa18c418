"""The store of labels: what is asked of whom, that nothing is lost or overwritten, and files in and out."""

import json
import math
import sqlite3
import subprocess
import sys
from itertools import permutations

import numpy as np
import pytest

from pipeline.config.schema import Data
from pipeline.data.judgements import consensus
from pipeline.data.rankings import load_rankings
from pipeline.errors import UserError
from pipeline.feedback import exchange, migrations, ratings
from pipeline.feedback.posterior import bradley_terry, posterior, verdicts
from pipeline.feedback.store import CHECK_EVERY, LEASE, Candidate, Conflict, Label, Store, Task
from small_run import write_jsonl


def task(name: str, k: int = 3, **changes) -> Task:
    candidates = [
        Candidate(f"{name} {letter}", f"m{i}") for i, letter in enumerate("abcdefghi"[:k])
    ]
    return Task([{"role": "user", "content": name}], candidates, **changes)


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path / "labels.db")
    yield made
    made.close()


def say(
    store: Store, who: int, number: int, ranks=(1, 2, 3), uuid: str | None = None, **more
) -> int:
    uuid = uuid or f"{who} {number} {ranks} {more}"
    return store.save(who, number, "label", {"ranks": list(ranks)}, uuid, **more)


# --- who is asked what ----------------------------------------------------------------------------


def test_two_people_get_two_tasks_and_each_keeps_theirs(store):
    assert store.add(task(f"p{i}") for i in range(3)) == 3
    assert store.add([task("p1")]) == 0
    anna, ben = store.annotator("anna"), store.annotator("ben")
    first, second = store.take(anna), store.take(ben)
    assert first != second
    assert store.take(anna) == first  # a reload
    say(store, anna, first)
    third = store.take(anna)
    assert {first, second, third} == set(store.tasks())
    assert store.take(store.annotator("cleo")) is None  # all are out
    assert store.counts(anna) == (1, 2)


def test_a_lease_that_has_run_out_is_given_to_another(store):
    store.add([task("p")])
    anna, ben = store.annotator("anna"), store.annotator("ben")
    number = store.take(anna, now=1000.0)
    assert store.take(ben, now=1000.0 + LEASE - 1) is None
    assert store.take(ben, now=1000.0 + LEASE) == number
    say(store, anna, number)  # came back late: both count
    say(store, ben, number, (3, 2, 1))
    assert [label.annotator for label in store.labels()] == ["anna", "ben"]


def test_the_least_labelled_comes_first_and_an_overlap_share_is_asked_of_several(store):
    store.add((task(f"p{i}") for i in range(60)), overlap=0.3, votes=2)
    anna, ben = store.annotator("anna"), store.annotator("ben")
    for _ in range(60):
        say(store, anna, store.take(anna))
    assert store.take(anna) is None
    both = []
    while number := store.take(ben):
        both.append(number)
        say(store, ben, number)
    assert 8 < len(both) < 30
    assert store.take(store.annotator("cleo")) is None


def test_preferred_tasks_are_asked_first_and_once_more(store):
    store.add(task(f"p{i}") for i in range(4))
    anna, ben = store.annotator("anna"), store.annotator("ben")
    for _ in range(3):
        say(store, anna, store.take(anna))
    store.prefer({2: 1.0, 3: 2.0})
    order = []
    while number := store.take(ben):
        order.append(number)
        say(store, ben, number)
    assert order == [3, 2, 4]


def test_an_attention_check_comes_after_so_many_labels_and_to_everyone(store):
    store.add(task(f"p{i}") for i in range(CHECK_EVERY + 5))
    store.add([task("check", last=1)])
    check = CHECK_EVERY + 6
    for who in map(store.annotator, ("anna", "ben")):
        store.prefer(dict.fromkeys(store.tasks(), 0.0))
        seen = []
        while (number := store.take(who)) and len(seen) < CHECK_EVERY + 3:
            seen.append(number)
            say(store, who, number)
        assert seen.index(check) == CHECK_EVERY


def test_a_skipped_task_stays_for_others(store):
    store.add([task("p")])
    anna, ben = store.annotator("anna"), store.annotator("ben")
    store.save(anna, store.take(anna), "skip", {"reason": "unclear"}, "1")
    assert store.take(anna) is None
    assert store.take(ben) == 1


# --- nothing is overwritten -----------------------------------------------------------------------


def test_an_edit_takes_the_place_of_what_it_was_made_from_and_of_nothing_else(store):
    store.add([task("p")])
    anna = store.annotator("anna")
    first = say(store, anna, 1, uuid="one")
    assert say(store, anna, 1, uuid="one") == first  # sent again after a lost answer
    with pytest.raises(Conflict):
        say(store, anna, 1, uuid="two")  # another window does not know of it
    second = say(store, anna, 1, (3, 2, 1), uuid="three", after=first)
    with pytest.raises(Conflict):
        say(store, anna, 1, uuid="four", after=first)
    with pytest.raises(Conflict):
        say(store, store.annotator("ben"), 1, uuid="one")
    [label] = store.labels(anna)
    assert (label.event, label.body["ranks"]) == (second, [3, 2, 1])
    assert store._rows("SELECT count(*) FROM events") == [(2,)]


@pytest.mark.parametrize("change", ["DELETE FROM events", "UPDATE events SET body = ''"])
def test_events_are_only_added(store, change):
    store.add([task("p")])
    say(store, store.annotator("anna"), 1)
    with pytest.raises(sqlite3.IntegrityError, match="only added"):
        store._rows(change)


def test_tokens_are_kept_as_hashes_and_end(store):
    token = store.invite("anna")
    assert store.who(token) == (1, "anna", False)
    assert (
        token.encode()
        not in store.path.read_bytes() + store.path.with_name("labels.db-wal").read_bytes()
    )
    other = store.invite("anna", admin=True)
    assert (store.who(token), store.who(other)) == (None, (1, "anna", True))
    store.revoke("anna")
    assert store.who(other) is None
    assert store.path.stat().st_mode & 0o077 == 0


def test_what_is_saved_is_on_the_disk_before_it_is_called_saved(store):
    with store._writing():
        assert store._db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    assert store._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_full_disk_loses_nothing_that_was_saved(store):
    store.add(task(f"p{i}") for i in range(30))
    anna = store.annotator("anna")
    say(store, anna, 1)
    [(pages,)] = store._rows("PRAGMA page_count")
    store._rows(f"PRAGMA max_page_count={pages + 1}")
    with pytest.raises(sqlite3.OperationalError, match="full"):
        for number in range(2, 31):
            say(store, anna, number, uuid=f"{number}" * 900)
    kept = len(store.labels())
    store._rows("PRAGMA max_page_count=100000")
    say(store, anna, kept + 1, uuid="room again")
    assert len(store.labels()) == kept + 1 > 1


# --- its versions ---------------------------------------------------------------------------------


def test_an_older_file_opens_and_a_newer_one_is_refused(store, monkeypatch):
    store.add([task("p")])
    say(store, store.annotator("anna"), 1)
    newer = [*migrations.MIGRATIONS, "ALTER TABLE tasks ADD COLUMN colour TEXT; PRAGMA optimize;"]
    monkeypatch.setattr(migrations, "MIGRATIONS", newer)
    opened = Store(store.path)
    assert len(opened.labels()) == 1
    assert opened._rows("SELECT colour FROM tasks") == [(None,)]
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"its version is 2, this program knows 1.*newer one"):
        Store(store.path)


@pytest.mark.parametrize("text", ["no database at all, but text", None])
def test_another_file_is_refused_and_stays_as_it_is(tmp_path, text):
    path = tmp_path / "labels.db"
    if text is None:
        sqlite3.connect(path).execute("CREATE TABLE mine (x)")
    else:
        path.write_text(text * 40)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"labels\.db: (not a file of labels|cannot be opened)"):
        Store(path)
    assert path.read_bytes() == before


# --- files ----------------------------------------------------------------------------------------


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


ROWS = [
    {"prompt": "one", "responses": ["a", "b", "b", "c"], "ranks": [1, 2, 2, 4], "family": "x",
     "annotator": "anna", "time": "2026-01-02T03:04:05+00:00", "sources": ["s", "s", "p", "p"]},
    {"prompt": "one", "responses": ["c", "b", "a"], "ranks": [3, 2, 1], "family": "x",
     "annotator": "ben", "time": "2026-01-02T03:04:06+00:00", "sources": ["p", "p", "s"]},
    {"prompt": [{"role": "user", "content": "二"}], "responses": ["好", "שלום"], "ranks": [2, 1], "family": "y",
     "annotator": "ben", "time": 1.5, "sources": ["s", "p"]},
]  # fmt: skip


def test_what_is_imported_is_exported_with_who_said_it_and_trains(store, tmp_path):
    pytest.importorskip("choix", reason="make label installs it")
    file = write_jsonl(tmp_path / "in.jsonl", ROWS)
    assert exchange.bring(store, file) == {"tasks": 2, "labels": 3}
    assert exchange.bring(store, file) == {"labels that were there": 3}
    out = tmp_path / "out.jsonl"
    assert exchange.export(store, out) == 3
    first = rows_of(out)[0]
    ranks = dict(zip(first["responses"], first["ranks"], strict=True))
    assert ranks == {"a": 1, "b": 2, "c": 3}
    assert dict(zip(first["responses"], first["sources"], strict=True)) == {
        "a": "s",
        "b": "s, p",
        "c": "p",
    }
    assert (first["annotator"], first["time"], first["family"]) == ("anna", ROWS[0]["time"], "x")
    loaded = load_rankings(Data(path=str(out), votes="majority"), notes=[])
    assert [sorted(zip(r.responses, r.ranks, strict=True)) for r in loaded] == [
        [("a", 1), ("b", 2), ("c", 3)],
        [("שלום", 1), ("好", 2)],
    ]
    again = Store(tmp_path / "again.db")
    exchange.bring(again, out)
    exchange.export(again, tmp_path / "twice.jsonl")
    assert (tmp_path / "twice.jsonl").read_text() == out.read_text()
    with pytest.raises(UserError, match="not overwritten"):
        exchange.export(store, out)


def test_what_was_said_in_a_chat_goes_to_the_same_store(store, tmp_path):
    prompt = [{"role": "user", "content": "p"}]
    kept = ratings.keep(tmp_path, prompt, ["a", "b"], ranks=[2, 1], model="ppo")
    assert ratings.keep(tmp_path, prompt, ["a"], rating=6, model="ppo") != kept
    assert exchange.bring(store, kept) == {"tasks": 1, "labels": 1}


def test_people_in_a_file_never_take_the_place_of_one_another(store, tmp_path):
    pytest.importorskip("choix", reason="make label installs it")
    other = [{**ROWS[1], "ranks": [1, 2, 3]}]
    exchange.bring(store, write_jsonl(tmp_path / "in.jsonl", ROWS))
    told = exchange.bring(store, write_jsonl(tmp_path / "other.jsonl", other))
    assert told == {"labels left out, of people who have judged the same otherwise": 1}
    assert len(store.labels()) == 3


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "p"}, "`responses` is no list of texts"),
        ({"responses": ["a", "b"]}, "no user message"),
        ({"prompt": "p", "responses": list("abcdefghij")}, "10 responses; at most 9"),
        ({"prompt": "p", "responses": ["a", "b"], "ranks": [1]}, "2 responses, and `ranks`"),
        (
            {"prompt": "p", "responses": ["a", "a"], "ranks": [1, 2]},
            "the same response at two ranks",
        ),
        ({"prompt": "p", "responses": ["a", "b"], "ranks": [1.5, 2]}, "a whole number"),
        ({"prompt": "p", "responses": ["a", "b"], "ranks": [math.inf, 2]}, "a whole number"),
        ({"prompt": "p", "responses": ["a", "b"], "ranks": [math.nan, 2]}, "a whole number"),
        ({"prompt": "p", "responses": ["a", "b"], "ranks": [[1, 2], [1]]}, "`ranks` is no list of"),
        (
            {"prompt": "p", "responses": ["a", "b"], "overall": [5]},
            "`overall` is no list of as many",
        ),
        ({"prompt": "p", "responses": ["a", "b"], "flags": [[]]}, "`flags` is no list of as many"),
        ({"prompt": "p", "responses": ["a", "b"], "sources": [None, "m"]}, "`sources` holds"),
    ],
)
def test_what_cannot_be_ranked_is_told_by_its_line(store, tmp_path, row, told):
    file = write_jsonl(tmp_path / "in.jsonl", [ROWS[0], row])
    with pytest.raises(UserError, match=rf"in\.jsonl:2: .*{told}"):
        exchange.bring(store, file)
    assert store.tasks() == {}


def test_ranks_go_into_the_lines_that_wait_for_them(store, tmp_path):
    waiting = [{k: v for k, v in row.items() if k in ("prompt", "responses")} for row in ROWS[::2]]
    kept = '{"prompt":   "mine", "responses": ["x", "y"], "ranks": [2, 1]}'
    file = write_jsonl(tmp_path / "to_rank.jsonl", waiting)
    file.write_text(kept + "\n" + file.read_text())
    exchange.bring(store, file)
    assert exchange.fill(store, file) == (0, 2)
    exchange.bring(store, write_jsonl(tmp_path / "in.jsonl", ROWS[:2]))
    assert exchange.fill(store, file) == (1, 1)
    lines = file.read_text().splitlines()
    assert lines[0] == kept
    assert json.loads(lines[1])["ranks"] == [[1, 2, 2, 3], [1, 2, 2, 3]]
    assert "ranks" not in json.loads(lines[2])
    [several] = map(json.loads, lines[1:2])
    copy = write_jsonl(tmp_path / "copy.jsonl", [several])
    assert list(exchange.bring(Store(tmp_path / "other.db"), copy)) == [
        "tasks",
        "with several people's ranks, not said whose: tasks alone",
    ]


def test_only_the_lines_that_are_filled_change(store, tmp_path):
    rows = [{"prompt": "alike", "responses": ["a", "a"], "ranks": ranks} for ranks in (None, [])]
    lines = [
        b'{"prompt":  "p", "ranks": [1]}\r',
        *(json.dumps(r).encode() + b"\r" for r in rows),
        b"",
    ]
    file = tmp_path / "to_rank.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    assert exchange.fill(store, file) == (2, 0)
    filled = file.read_bytes().split(b"\n")
    assert filled[0] == b"\xef\xbb\xbf" + lines[0]
    assert [json.loads(line)["ranks"] for line in filled[1:3]] == [[1, 1], [1, 1]]
    assert all(line.endswith(b"\r") for line in filled[:3]) and filled[3] == b""


@pytest.mark.parametrize(
    "line", [b"[1]", b'{"a": "\xff"}', b'{"a": "\\ud83d"}', b'{"prompt": "p"}']
)
def test_a_faulty_line_is_told_and_nothing_is_filled(store, tmp_path, line):
    file = tmp_path / "to_rank.jsonl"
    file.write_bytes(before := b'{"prompt": "p", "responses": ["a", "a"]}\n' + line)
    with pytest.raises(UserError, match=r"to_rank\.jsonl:2: "):
        exchange.fill(store, file)
    assert file.read_bytes() == before


def test_what_a_person_saves_while_lines_are_filled_is_not_overwritten(
    store, tmp_path, monkeypatch
):
    file = write_jsonl(tmp_path / "to_rank.jsonl", [{"prompt": "p", "responses": ["a", "a"]}])
    monkeypatch.setattr(
        exchange,
        "shuffled",
        lambda task, made=exchange.shuffled: file.write_text("{}") and made(task),
    )
    with pytest.raises(UserError, match=r"to_rank\.jsonl: changed meanwhile"):
        exchange.fill(store, file)
    assert file.read_text() == "{}"


def test_imported_again_after_an_edit_adds_nothing_and_says_so(store, tmp_path):
    file = write_jsonl(tmp_path / "in.jsonl", ROWS[:1])
    exchange.bring(store, file)
    [said] = store.labels()
    say(store, store.annotator("anna"), 1, (3, 2, 1), after=said.event)
    assert exchange.bring(store, file) == {"labels that were there": 1}


# --- what to believe ------------------------------------------------------------------------------


def test_strengths_are_those_of_hand_numbers():
    pytest.importorskip("choix", reason="make label installs it")
    better, worse = bradley_terry(np.array([[0, 3.0], [1.0, 0]]))
    assert better - worse == pytest.approx(np.log(3), abs=1e-6)
    found = posterior([Label(1, "u", 0.0, "anna", 7, "label", {"ranks": [2, 1]})])
    assert found.strengths[7][1] - found.strengths[7][0] == pytest.approx(
        np.log(0.8 / 0.2), abs=1e-6
    )
    assert found.difficulty[7] == pytest.approx(0.4, abs=1e-6)


def test_careless_people_are_found_out_and_count_less():
    pytest.importorskip("choix", reason="make label installs it")
    rng = np.random.default_rng(0)
    right = {"anna": 0.95, "ben": 0.9, "cleo": 0.85, "dora": 0.5, "evil": 0.1}
    orders = list(permutations((1, 2, 3)))
    labels = [
        Label(0, "", 0.0, name, number, "label", {"ranks": list(ranks)})
        for number in range(150)
        for name, share in right.items()
        for ranks in [(1, 2, 3) if rng.random() < share else orders[rng.integers(1, 6)]]
    ]
    found = posterior(labels)
    said = [found.reliability[name] for name in right]
    assert min(said[:3]) > 0.85 > 0.75 > said[3] > said[4]
    by_task = [[one.body["ranks"] for one in labels[at : at + 5]] for at in range(0, 750, 5)]
    majority = sum(min(range(3), key=places.__getitem__) == 0 for places in map(consensus, by_task))
    assert sum(np.argmax(s) == 0 for s in found.strengths.values()) == 145 > majority
    by = {label.annotator: found.probability(label) for label in labels[:5]}
    assert min(by.values()) >= 0 and max(by.values()) <= 1
    assert all(len(verdicts(label)) == 3 for label in labels[:2])


# --- killed ---------------------------------------------------------------------------------------

KILLED = """
import os, random, signal, sys, threading, time
from pathlib import Path
from pipeline.feedback.store import Candidate, Store, Task
path, kills = Path(sys.argv[1]), int(sys.argv[2])
store = Store(path)
store.add(Task([{"role": "user", "content": str(i)}], [Candidate("a"), Candidate("b")]) for i in range(5000))
people = [store.annotator(f"a{i}") for i in range(4)]
store.close()

def work(who, told):
    while True:
        task, uuid = store.take(who), f"{os.getpid()}-{who}-{time.monotonic_ns()}"
        store.save(who, task, "label", {"ranks": [1, 2]}, uuid)
        os.write(told, f"{uuid} {task}\\n".encode())

saved = []
for kill in range(kills):
    read, write = os.pipe()
    child = os.fork()
    if not child:
        store = Store(path)
        for who in people:
            threading.Thread(target=work, args=(who, write)).start()
        time.sleep(60)
    os.close(write)
    saved += [os.read(read, 4096)]
    time.sleep(random.random() * 0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(read, 65536):
        saved.append(more)
    os.close(read)
told = dict(line.split() for line in b"".join(saved).decode().splitlines())
store = Store(path)
there = {label.uuid: str(label.task) for label in store.labels()}
assert store._rows("PRAGMA integrity_check") == [("ok",)]
lost = {uuid: task for uuid, task in told.items() if there.get(uuid) != task}
print(kills, len(told), len(there), len(lost))
"""


@pytest.mark.fault
def test_killed_a_hundred_times_under_load_it_loses_nothing_it_called_saved(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "labels.db"), "100"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    kills, told, there, lost = map(int, done.stdout.split())
    assert (kills, lost) == (100, 0)
    assert there >= told >= 100
