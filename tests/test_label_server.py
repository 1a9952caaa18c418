"""The labelling page's server: who gets in, what is sent and saved, and what an admin is told."""

import json
import socket
import uuid
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="make label installs it")
pytest.importorskip("krippendorff", reason="make label installs it")
pytest.importorskip("choix", reason="make label installs it")
from starlette.testclient import TestClient

import small_run
from pipeline.commands import label as command
from pipeline.errors import UserError
from pipeline.feedback import admin, exchange, migrations, server
from pipeline.feedback.ratings import keep
from pipeline.feedback.server import Person, Site, build
from pipeline.feedback.store import Candidate, Store, Task

HERE = {"origin": "http://localhost"}


def task(name: str, k: int = 3, **changes) -> Task:
    candidates = [Candidate(f"{name} {i}", f"hidden-source-{i}", float(i), i > 0) for i in range(k)]
    return Task([{"role": "user", "content": name}], candidates, **changes)


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path / "labels.db")
    made.add(task(f"p{i}") for i in range(3))
    made.guide("# Read")
    yield made
    made.close()


def client(store: Store, local: bool = True, token: str | None = None, **changes) -> TestClient:
    me = Person(store.annotator("me", admin=True), "me", True) if local else None
    app = build(Site(store, me, **changes))
    cookies = {"label": token} if token else {}
    return TestClient(
        app,
        base_url="http://localhost",
        headers=HERE,
        cookies=cookies,
        raise_server_exceptions=False,
    )


def body(task: int = 1, **changes) -> dict:
    ranks = changes.pop("ranks", [1, 2, 2])
    own = {"uuid": str(uuid.uuid4()), "task": task, "seconds": 2.5, "guideline": 1}
    k = len(ranks)
    return own | {"ranks": ranks, "overall": [7, *[None] * (k - 1)], "flags": [[]] * k} | changes


# --- labelling ------------------------------------------------------------------------------------


def test_a_task_is_ranked_edited_and_skipped(store):
    page = client(store)
    told = page.get("/api/next").json()
    assert (told["name"], told["done"], told["left"]) == ("me", 0, 3)
    assert told["guideline"] == {"version": 1, "text": "# Read"}
    assert told["task"]["responses"][0] == {"text": "p0 0", "ended": False}
    said = body(flags=[["untrue"], [], []])
    first = page.post("/api/label", json=said).json()["saved"]
    assert page.post("/api/label", json=said).json()["saved"] == first
    assert page.post("/api/label", json=body()).status_code == 409
    mine = page.get("/api/task/1").json()["mine"]
    assert (mine["event"], mine["ranks"], mine["flags"][0]) == (first, [1, 2, 2], ["untrue"])
    assert page.post("/api/label", json=body(ranks=[3, 2, 1], after=first)).json()["saved"] > first
    skip = {k: v for k, v in body(2).items() if k not in ("ranks", "overall", "flags")}
    assert page.post("/api/skip", json=skip | {"reason": "unclear"}).is_success
    told = page.get("/api/history").json()
    assert [(one["task"], one["kind"], one["ranks"]) for one in told] == [
        (2, "skip", None),
        (1, "label", [3, 2, 1]),
    ]
    assert page.get("/api/next").json()["task"]["id"] == 3
    assert page.get(f"/api/task/{10**20}").status_code == 404


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"ranks": [1, 2]}, "has 3 answers"),
        ({"ranks": [0, 1, 2]}, "greater than or equal to 1"),
        ({"overall": [8, None, None]}, "less than or equal to 7"),
        ({"flags": [["nice"], [], []]}, "fails_task"),
        ({"uuid": "x"}, "uuid"),
        ({"task": 99}, "no such task"),
        ({"task": 10**20}, "task: Input should be less than"),
        ({"guideline": 10**400}, "guideline: "),
        ({"annotator": "ben"}, "Extra inputs"),
    ],
)
def test_what_cannot_be_is_refused_with_a_sentence(store, change, told):
    answer = client(store).post("/api/label", json=body() | change)
    assert answer.status_code in (404, 422)
    assert told in answer.json()["error"]
    assert store.labels() == []


def test_where_responses_come_from_is_nowhere_before_the_export(store):
    page = client(store)
    page.post("/api/label", json=body())
    for path in ("next", "task/1", "history", "admin"):
        answer = page.get(f"/api/{path}")
        assert answer.is_success
        assert "hidden-source" not in answer.text
    rows = [json.loads(line) for line in page.get("/api/admin/labels.jsonl").text.splitlines()]
    assert rows[0]["sources"] == [f"hidden-source-{i}" for i in range(3)]


# --- who gets in ----------------------------------------------------------------------------------


def test_a_token_opens_a_cookie_that_no_script_reads(store):
    token = store.invite("anna")
    page = client(store, local=False, public="https://rank.example.org")
    assert page.get("/api/next").status_code == 401
    assert page.post("/api/session", json={"token": "wrong"}).status_code == 401
    answer = page.post("/api/session", json={"token": token})
    cookie = answer.headers["set-cookie"].lower()
    assert answer.json() == {"name": "anna"}
    assert all(word in cookie for word in ("httponly", "samesite=strict", "secure"))
    page = client(store, local=False, token=token)
    assert page.get("/api/next").json()["name"] == "anna"
    store.revoke("anna")
    assert page.get("/api/next").status_code == 401


def test_a_person_sees_nothing_of_others_and_no_admins_view(store):
    ben = store.annotator("ben")
    store.save(ben, 1, "label", {"ranks": [1, 2, 3]}, "ben's")
    page = client(store, local=False, token=store.invite("anna"))
    assert page.get("/api/task/1").status_code == 404
    for path in ("admin", "admin/labels.jsonl"):
        assert page.get(f"/api/{path}").status_code == 403
    for path in ("invite", "revoke"):
        assert page.post(f"/api/admin/{path}", json={"name": "me"}).status_code == 403
    assert page.post("/api/label", json=body(uuid="ben's")).status_code == 422
    [label] = store.labels(ben)
    assert label.body["ranks"] == [1, 2, 3]


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://elsewhere.org"},
        {"origin": "null"},
        {"origin": "http://["},
        {"host": "["},
        {"origin": ""},
        {"content-type": "text/plain"},
        {
            "host": "elsewhere.org",
            "origin": "http://elsewhere.org",
        },  # a name that leads to 127.0.0.1
    ],
)
def test_another_sites_page_saves_nothing(store, headers):
    text = json.dumps(body())
    answer = client(store).post(
        "/api/label", content=text, headers={"content-type": "application/json"} | headers
    )
    assert answer.status_code == 403
    assert store.labels() == []


def test_what_is_large_or_too_often_is_refused(store, monkeypatch):
    page = client(store)
    large = page.post("/api/label", json=body(comment="x" * 70_000))
    assert large.status_code == 413
    monkeypatch.setattr(server, "BURST", 5.0)
    assert {page.get("/api/next").status_code for _ in range(12)} == {200, 429}
    stranger = client(store, local=False)
    codes = [stranger.post("/api/session", json={"token": "x"}).status_code for _ in range(12)]
    assert codes[:10] == [401] * 10 and codes[-1] == 429


def test_the_browser_is_told_to_run_nothing_but_the_pages_own_files(store):
    page = client(store)
    for path in ("/", "/admin", "/static/label.js", "/api/next", "/nothing"):
        policy = page.get(path).headers["content-security-policy"]
        assert "default-src 'none'; script-src 'self'" in policy and "unsafe" not in policy
    for name in ("label.html", "admin.html"):
        text = (server.PAGE / name).read_text()
        assert "://" not in text and "style=" not in text
        assert text.count("<script") == text.count('<script type="module" src="/static/') == 1
    for name in ("label.js", "admin.js", "markdown.js"):
        assert "innerHTML" not in (server.PAGE / name).read_text()


def test_a_full_disk_is_told_and_what_was_saved_stays(store):
    store.add(task(f"more {i}") for i in range(20))
    page = client(store)
    page.post("/api/label", json=body(1))
    [(pages,)] = store._rows("PRAGMA page_count")
    store._rows(f"PRAGMA max_page_count={pages}")
    answers = [page.post("/api/label", json=body(n, comment="x" * 2000)) for n in range(2, 12)]
    full = [answer for answer in answers if answer.status_code == 507]
    assert "Not saved: the disk is full" in full[0].json()["error"]
    saved = 1 + sum(answer.is_success for answer in answers)
    assert len(store.labels()) == saved < 11


# --- the admin's view -----------------------------------------------------------------------------


def test_an_admin_is_told_numbers_that_can_be_counted_by_hand(store):
    store.add([task("check", last=2)])
    said = {"anna": ([1, 2, 3], [1, 1, 2]), "ben": ([1, 3, 2], [2, 1, 1])}
    for name, (first, check) in said.items():
        who = store.annotator(name)
        keep = {"seconds": 4.0 if name == "anna" else 6.0, "comment": ""}
        store.save(who, 1, "label", {"ranks": first, **keep}, f"{name} 1")
        store.save(who, 4, "label", {"ranks": check, **keep}, f"{name} 4")
    store.save(store.annotator("anna"), 2, "skip", {"reason": "unclear"}, "skip")
    told = admin.Overview(store).told()
    assert told["progress"] == {
        "tasks": 3, "labelled": 1, "complete": 1, "labels": 2, "wanted": 4, "skips": {"unclear": 1},
    }  # fmt: skip
    assert told["agreement"]["pairs"] == 3
    assert told["agreement"]["share"] == pytest.approx(2 / 3, abs=1e-4)
    # pairs +,+ +,+ and +,- and the other way round: of 12 values 6 are +; D_o = 4 / 12, D_e = 2 * 6 * 6 / (12 * 11)
    assert told["agreement"]["alpha"] == pytest.approx(1 - (4 / 12) / (72 / 132), abs=1e-4)
    anna, ben = told["people"]
    assert (anna["labels"], anna["skips"], anna["seconds"]) == (1, 1, 4.0)
    assert anna["agreement"] == ben["agreement"] == pytest.approx(2 / 3, abs=1e-4)
    assert (anna["checks"], ben["checks"]) == ([1, 1], [0, 1])
    [dispute] = told["disagreements"]
    assert dispute["task"] == 1
    assert [one["name"] for one in dispute["rankings"]] == ["anna", "ben"]
    assert [one["task"] for one in told["next"]["disagreement"]] == [1]
    assert {one["task"] for one in told["next"]["margin"]} == {1, 2, 3}


def test_what_the_reward_model_cannot_tell_is_asked_first(store):
    store.add(
        [
            Task(
                [{"role": "user", "content": "close"}],
                [Candidate("a", "", 1.0), Candidate("b", "", 1.01)],
            )
        ]
    )
    page = client(store)
    assert page.post("/api/admin/prefer", json={"by": "margin", "number": 1}).json() == {
        "preferred": 1
    }
    assert page.get("/api/next").json()["task"]["id"] == 4


def test_an_admin_invites_and_ends_an_invitation(store):
    page = client(store)
    token = page.post("/api/admin/invite", json={"name": "anna"}).json()["token"]
    assert store.who(token)[1:] == ("anna", False)
    assert page.get("/api/admin").json()["people"][1]["invited"]
    page.post("/api/admin/revoke", json={"name": "anna"})
    assert store.who(token) is None
    assert not page.get("/api/admin").json()["people"][1]["invited"]
    assert page.post("/api/admin/invite", json={"name": "<b>"}).status_code == 422


def test_nothing_said_yet_is_no_error(tmp_path):
    told = admin.overview(Store(tmp_path / "new.db"))
    assert told["progress"]["tasks"] == 0 and told["agreement"]["alpha"] is None


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    return small_run.make_run(tmp_path, ("base", "sft"))


def label(run: Path, *words: str) -> None:
    command.main(["--run", str(run), "--prompts", str(run.parent / "prompts.jsonl"), *words])


@pytest.fixture
def served(monkeypatch):
    """Serving is noted and not done."""
    calls = []
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: calls.append(self.config.app))
    return calls


def test_the_command_samples_serves_and_exports(run, served, capsys, tmp_path):
    label(run, "--port", "0", "--max-new-tokens", "4", "--invite", "anna", "--checks", "0")
    out = capsys.readouterr().out
    assert "12 tasks added" in out
    assert "label: anna: http://127.0.0.1:" in out
    store = Store(run / "labels.db")
    with pytest.raises(UserError, match="nobody has ranked anything yet"):
        label(run, "--export", str(tmp_path / "out.jsonl"))
    k = len(store.task(1).candidates)
    store.save(store.annotator("me"), 1, "label", {"ranks": list(range(1, k + 1))}, "1")
    label(run, "--export", str(tmp_path / "out.jsonl"))
    assert "1 rankings in" in capsys.readouterr().out
    label(run, "--port", "0", "--max-new-tokens", "4", "--checks", "0")
    assert "all of them are there" in capsys.readouterr().out


def test_the_command_takes_what_was_said_in_a_chat(run, served, capsys, tmp_path):
    asked = [{"role": "user", "content": "w1"}]
    keep(run, asked, ["w2", "w3 w4"], ranks=[2, 1], model="ppo")
    label(run, "--export", str(tmp_path / "said.jsonl"))
    assert "1 judgements of make chat" in capsys.readouterr().out
    [row] = map(json.loads, (tmp_path / "said.jsonl").read_text().splitlines())
    assert dict(zip(row["responses"], row["ranks"], strict=True)) == {"w2": 2, "w3 w4": 1}


def test_beyond_this_machine_tokens_are_insisted_on_and_tls_is_explained(run, served, capsys):
    rows = [{"prompt": "a", "responses": ["b", "c"]}]
    file = small_run.write_jsonl(run.parent / "in.jsonl", rows)
    label(run, "--import", str(file), "--host", "0.0.0.0", "--port", "0")
    out = capsys.readouterr().out
    assert "the admin's link" in out and "TLS" in out
    page = TestClient(served[0], base_url="http://somewhere:1")
    assert page.get("/api/next").status_code == 401


def test_what_waits_to_be_ranked_is_ranked_on_the_page(run, served, capsys):
    rows = [{"prompt": [{"role": "user", "content": "a"}], "responses": ["b", "c"]}]
    waiting = small_run.write_jsonl(run / "to_rank.jsonl", rows)
    label(run, "--port", "0")
    assert "1 tasks" in capsys.readouterr().out
    store = Store(run / "labels.db")
    texts = [one.text for one in store.task(1).candidates]
    ranks = [1 if text == "c" else 2 for text in texts]
    store.save(store.annotator("me"), 1, "label", {"ranks": ranks}, "1")
    label(run, "--export", str(run / "out.jsonl"))
    assert json.loads(waiting.read_text())["ranks"] == [2, 1]
    assert "goes on" in capsys.readouterr().out
    label(run, "--port", "0")  # what was filled comes back as nobody's label
    store.save(store.annotator("anna"), 1, "label", {"ranks": ranks}, "2")
    small_run.write_jsonl(
        waiting, [*rows, {"prompt": "d", "responses": ["e", "f"], "ranks": [1, 2]}]
    )
    exchange.fill(store, waiting)
    label(run, "--port", "0")
    assert [one.annotator for one in store.labels()] == ["me", "anna"]
    assert len(store.tasks()) == 1
    waiting.write_text('{"torn')
    with pytest.raises(UserError, match=r"to_rank\.jsonl:1: bad JSON"):
        label(run, "--export", str(run / "again.jsonl"))
    assert not (run / "again.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--models", "ppo"], "--models ppo: no such model; this run has base, sft"),
        (["--models", "elsewhere/ppo"], "--models elsewhere/ppo: no such model"),
        (["--k", "10", "--number", "0"], "--k is from 2 to 9; --number is at least 1"),
        (["--import", "nothing.jsonl"], "nothing.jsonl: no such file"),
        (["--public", "rank.example.org"], "--public is an address such as"),
    ],
)
def test_bad_input_is_one_line_before_anything_slow(run, served, words, told):
    with pytest.raises(UserError) as error:
        label(run, "--port", "0", *words)
    assert str(error.value).startswith(told) and "\n" not in str(error.value)
    assert not served


def test_a_port_in_use_an_empty_queue_and_a_newer_file_are_one_line_each(run, served, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(UserError, match=f"--port {port}: Address already in use; give another"):
            label(run, "--port", port)
    same = small_run.write_jsonl(
        run.parent / "in.jsonl", [{"prompt": "a", "responses": ["b", "b"]}]
    )
    with pytest.raises(UserError, match="nothing to rank"):
        label(run, "--port", "0", "--import", str(same))
    Store(run / "labels.db")._rows(f"PRAGMA user_version={len(migrations.MIGRATIONS) + 1}")
    with pytest.raises(UserError, match="made by a newer one"):
        label(run, "--port", "0")
