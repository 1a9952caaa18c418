"""The labelling page as a person uses it, in the distribution's Chromium."""

import shutil
import socket
import threading
import time
from pathlib import Path

import pytest

from pipeline.commands.label import guide
from pipeline.feedback.store import Candidate, Store, Task

sync_api = pytest.importorskip("playwright.sync_api", reason='needs pip install -e ".[browser]"')
uvicorn = pytest.importorskip("uvicorn", reason="make label installs it")
server = pytest.importorskip("pipeline.feedback.server", reason="make label installs it")
sync_api.expect.set_options(timeout=20_000)  # of a busy machine
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="needs a Chromium, such as Debian's"),
]

FIVE = """Three things help:

1. **Sleep** at the same hours.
2. Leave the phone in another room, see [a summary](https://example.org/sleep).
3. No coffee after noon:

> caffeine has a half-life of about five hours

```python
def sleepy(hours):
    return hours < 7
```"""
TASKS = [
    ([{"role": "user", "content": "How do I sleep better? Three short tips, please."}],
     [FIVE, "Drink warm milk, count *sheep*, and do not worry.", "I cannot help with that.",
      "Sleep is a naturally recurring state of mind and body, characterized by altered consciousness, reduced"]),
    ([{"role": "system", "content": "Answer in the language of the question."},
      {"role": "user", "content": "ما هي عاصمة فرنسا؟"},
      {"role": "assistant", "content": "**باريس**."},
      {"role": "user", "content": "把这句话翻译成中文：good morning"}],
     ["早上好。", "العاصمة هي باريس (Paris)، وفيها برج إيفل.", "בוקר טוב"]),
    ([{"role": "user", "content": "Two words?"}], ["good morning", "hello"]),
    ([{"role": "user", "content": "A table?"}],
     ["| city | people |\n|---|---:|\n| Paris | 2 million |\n| 東京 | 14 million |", "- Paris\n- Tokyo\n  and more", "no"]),
]  # fmt: skip
HOSTILE = [
    "<script>window.sentinel = 1</script><img src=x onerror='window.sentinel = 1'>",
    '[a](javascript:window.sentinel=1) [b](data:text/html,<script>window.sentinel=1</script>) ![c](x"onerror="window.sentinel=1)',
    "`<svg onload=window.sentinel=1>` **<iframe srcdoc='<script>parent.sentinel=1</script>'>** <javascript:window.sentinel=1>",
    "</p></div><style>body{display:none}</style><base href=//evil>"
    + ">" * 3000
    + "*" * 3000
    + "[" * 3000,
]


class Served:
    """A server of a store, in a thread; it can go away and come back at the same address."""

    def __init__(self, store: Store):
        me = server.Person(store.annotator("me", admin=True), "me", True)
        self.app, self.port = server.build(server.Site(store, me)), 0
        self.start()

    def start(self) -> None:
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", self.port))
        self.port = listening.getsockname()[1]
        self.server = uvicorn.Server(
            uvicorn.Config(self.app, log_level="error", timeout_graceful_shutdown=1)
        )
        self.thread = threading.Thread(target=self.server.run, args=([listening],))
        self.thread.start()

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()

    @property
    def url(self) -> str:
        return f"http://localhost:{self.port}/"


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path / "labels.db")
    made.add(
        Task(prompt, [Candidate(text, f"m{i}", None, i < 3) for i, text in enumerate(texts)])
        for prompt, texts in TASKS
    )
    guide(made, None)
    return made


@pytest.fixture
def served(store):
    made = Served(store)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def chromium():
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium, served):
    """Open the page as a browser of one's own; the guideline has been read. No error may reach the console."""
    contexts, errors = [], []

    def go(path: str = "", read: bool = True, **options):
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
        context.set_default_timeout(20_000)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
        page.goto(served.url + path)
        if read:
            page.get_by_role("button", name="Back to the task").click()
        contexts.append(context)
        return page

    yield go
    for context in contexts:
        context.close()
    assert [error for error in errors if "Failed to load resource" not in error] == []


@pytest.fixture
def shot(tmp_path):
    """Keep a picture to look at."""
    return lambda page, name: page.screenshot(path=tmp_path / f"{name}.png")


def ranks(store: Store, name: str = "me") -> list:
    return [label.body.get("ranks") for label in store.labels(store.annotator(name))]


def saved(page) -> None:
    sync_api.expect(page.locator("#status")).to_have_text("Saved.")


def places(page) -> list[str]:
    return page.locator(".place").all_inner_texts()


def drag(page, letter: str, rank: int) -> None:
    start = page.locator(f".answer .letter:text-is('{letter}')")
    start.scroll_into_view_if_needed()
    box, slot = start.bounding_box(), page.locator(f".slot[data-rank='{rank}']").bounding_box()
    page.mouse.move(box["x"] + 9, box["y"] + 9)
    page.mouse.down()
    page.mouse.move(slot["x"] + 30, slot["y"] + 15, steps=4)
    page.mouse.up()


def test_ranked_by_keys_with_a_tie(opened, store, shot):
    page = opened()
    shot(page, "first")
    for key in "1442":  # each digit goes on to the next answer
        page.keyboard.press(key)
    assert places(page) == ["1", "4", "4", "2"]
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("3")
    assert places(page) == ["1", "4", "3", "2"]
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("3")  # the same digit
    shot(page, "tie")
    page.keyboard.press("Enter")
    saved(page)
    assert ranks(store) == [[1, 3, 3, 2]]
    assert page.locator("#progress").inner_text() == "me: 1 done, 3 left"
    assert store.labels()[0].body["seconds"] > 0


def test_ranked_by_dragging_with_a_tie(opened, store, shot):
    page = opened()
    for letter, rank in (("A", 1), ("B", 2), ("C", 2), ("D", 3)):
        drag(page, letter, rank)
    drag(page, "D", 4)
    shot(page, "dragged")
    assert places(page) == ["1", "2", "2", "4"]
    page.get_by_role("button", name="Save").click()
    saved(page)
    assert ranks(store) == [[1, 2, 2, 4]]


def test_a_grade_a_flag_and_a_remark_are_kept(opened, store, shot):
    page = opened()
    first = page.locator(".answer").first
    first.get_by_text("Grade and flags").click()
    first.get_by_label("Overall").select_option("6")
    first.get_by_label("Untrue").check()
    page.get_by_role("textbox", name="A remark").fill("was für ein Text")
    for n in range(4):
        page.locator(".answer").nth(n).get_by_role("radio").nth(n).check()
    shot(page, "grades")
    page.locator("#save").click()
    saved(page)
    [label] = store.labels()
    assert label.body["overall"] == [6, None, None, None]
    assert label.body["flags"] == [["untrue"], [], [], []]
    assert (label.body["comment"], label.body["ranks"]) == ("was für ein Text", [1, 2, 3, 4])


def test_skipped_with_a_reason(opened, store, shot):
    page = opened()
    page.keyboard.press("s")
    shot(page, "skip")
    page.get_by_label("What is asked is unclear").check()
    page.locator("#skipping").get_by_role("button", name="Skip").click()
    saved(page)
    [label] = store.labels()
    assert (label.kind, label.body["reason"]) == ("skip", "unclear")


def test_undone_and_changed_after_it_was_saved(opened, store, shot):
    page = opened()
    page.keyboard.press("1")
    page.keyboard.press("2")
    page.keyboard.press("u")
    assert places(page) == ["1", "", "", ""]
    page.keyboard.press("Control+z")
    assert places(page) == ["", "", "", ""]
    page.keyboard.type("1234")
    page.keyboard.press("Enter")
    saved(page)
    page.get_by_role("button", name="Undo").click()  # what was saved comes back
    sync_api.expect(page.locator("#editing")).to_be_visible()
    shot(page, "editing")
    page.keyboard.press("2")
    page.keyboard.press("Enter")
    saved(page)
    assert ranks(store) == [[2, 2, 3, 4]]
    page.get_by_role("button", name="Yours").click()
    shot(page, "history")
    page.get_by_role("button", name="Change").click()
    assert places(page) == ["2", "2", "3", "4"]
    page.get_by_role("button", name="Leave it as it was").click()
    sync_api.expect(page.locator("#editing")).to_be_hidden()
    assert store._rows("SELECT count(*) FROM events") == [(2,)]


def test_a_second_annotator_comes_by_a_link_and_gets_another_task(opened, store, shot):
    mine = opened()
    hers = opened("#" + store.invite("anna"))
    assert hers.url.endswith("/")  # the token is out of sight
    assert hers.locator("#progress").inner_text().startswith("anna: 0 done")
    assert not hers.get_by_role("link", name="Admin").is_visible()
    assert mine.locator("#conversation").inner_text() != hers.locator("#conversation").inner_text()
    shot(hers, "second")
    for page, keys in ((mine, "1234"), (hers, "321")):
        page.keyboard.type(keys)
        page.keyboard.press("Enter")
        saved(page)
    assert (ranks(store), ranks(store, "anna")) == ([[1, 2, 3, 4]], [[3, 2, 1]])
    stranger = opened("#not-a-token", read=False)
    sync_api.expect(stranger.locator("#notice")).to_contain_text("not known")


def test_a_lost_connection_loses_nothing(opened, store, served, shot):
    page = opened()
    page.keyboard.type("4321")
    served.stop()
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#notice")).to_contain_text("Not saved yet")
    sync_api.expect(page.locator("#notice")).to_be_in_viewport()
    shot(page, "lost")
    served.start()
    saved(page)
    sync_api.expect(page.locator("#notice")).to_be_hidden()
    assert ranks(store) == [[4, 3, 2, 1]]


def test_closed_before_it_was_saved_it_is_sent_the_next_time(opened, store, served):
    page = opened()
    page.context.route("**/api/label", lambda route: route.abort())
    page.keyboard.type("4321")
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("#notice")).to_contain_text("Not saved yet")
    page.context.unroute("**/api/label")
    page.reload()
    sync_api.expect(page.locator("#progress")).to_have_text("me: 1 done, 3 left")
    assert ranks(store) == [[4, 3, 2, 1]]


def test_an_answer_that_got_lost_saves_once(opened, store):
    page = opened()
    lost = []

    def once(route):
        if not lost:
            lost.append(route.fetch())  # the server has it, the page does not know
            route.abort()
        else:
            route.continue_()

    page.route("**/api/label", once)
    page.keyboard.type("1234")
    page.keyboard.press("Enter")
    saved(page)
    assert store._rows("SELECT count(*) FROM events") == [(1,)]


def test_a_reload_in_the_middle_keeps_what_was_done(opened, store, shot):
    page = opened()
    page.keyboard.type("13")
    page.get_by_role("textbox", name="A remark").fill("half way")
    before = page.locator("#conversation").inner_text()
    page.reload()
    sync_api.expect(page.locator(".place").first).to_have_text("1")
    assert places(page) == ["1", "3", "", ""]
    assert page.locator("#conversation").inner_text() == before
    assert page.get_by_role("textbox", name="A remark").input_value() == "half way"
    page.locator(".answer").nth(2).click(position={"x": 300, "y": 10})
    page.keyboard.type("24")
    page.keyboard.press("Enter")
    saved(page)
    assert ranks(store) == [[1, 3, 2, 4]]


def test_two_windows_do_not_overwrite_each_other(opened, store):
    page = opened()
    other = page.context.new_page()
    other.goto(page.url)
    for window, keys in ((page, "1234"), (other, "4321")):
        sync_api.expect(window.locator(".answer")).to_have_count(4)
        window.bring_to_front()
        window.keyboard.type(keys)
    page.bring_to_front()
    page.keyboard.press("Enter")
    saved(page)
    other.bring_to_front()
    other.keyboard.press("Enter")
    sync_api.expect(other.locator("#notice")).to_contain_text("in another window")
    assert ranks(store) == [[1, 2, 3, 4]]


def test_on_a_phone_with_a_finger(opened, store, shot):
    page = opened(viewport={"width": 375, "height": 720}, has_touch=True, is_mobile=True)
    assert page.locator("#bar").bounding_box()["height"] < 0.3 * 720
    shot(page, "phone")
    for n in range(4):
        page.locator(".answer").nth(n).locator(".ranks label").nth(3 - n).tap()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    shot(page, "phone-ranked")
    page.locator("#save").tap()
    saved(page)
    assert ranks(store) == [[4, 3, 2, 1]]


def test_arabic_hebrew_and_chinese_stand_as_they_are_read(opened, store, shot):
    store.prefer({2: 1.0})
    page = opened(color_scheme="dark")
    shot(page, "scripts-dark")
    direction = "el => getComputedStyle(el).direction"
    turn = page.locator(".turn .prose p")
    found = [turn.nth(n).evaluate(direction) for n in range(4)]
    assert found == ["ltr", "rtl", "rtl", "ltr"]


def test_markdown_is_shown(opened, store, shot):
    page = opened()
    first = page.locator(".answer").first
    assert first.locator("ol > li").count() == 3
    assert first.locator("strong").inner_text() == "Sleep"
    assert first.locator("pre code").inner_text() == "def sleepy(hours):\n    return hours < 7"
    link = first.locator(".prose a")
    assert link.get_attribute("rel") == "noopener noreferrer nofollow"
    store.prefer({4: 1.0})
    page.keyboard.type("1234")
    page.keyboard.press("Enter")
    saved(page)
    shot(page, "table")
    assert page.locator("table td").all_inner_texts() == [
        "Paris",
        "2 million",
        "東京",
        "14 million",
    ]


@pytest.mark.parametrize("bypass", [False, True], ids=["policy", "no policy"])
def test_hostile_text_cannot_run(opened, store, bypass):
    """Without the content security policy, too: text only ever becomes text."""
    prompt = [{"role": "user", "content": text} for text in HOSTILE]
    store.add([Task(prompt, [Candidate(text) for text in HOSTILE])])
    store.prefer({5: 1.0})
    for name in ("anna", "ben"):
        said = {"ranks": [1, 2, 3, 4] if name == "anna" else [4, 3, 2, 1], "comment": HOSTILE[0]}
        store.save(store.annotator(name), 5, "label", said, name)
    store.prefer({5: 1.0})
    page = opened(bypass_csp=bypass)
    sync_api.expect(page.locator(".answer")).to_have_count(4)
    for link in page.locator("#task a").all():
        assert link.get_attribute("href").startswith("http")
    found = page.locator("#task").locator("script, img, iframe, svg, style, base, object")
    assert found.count() == 0
    page.keyboard.type("1234")
    page.keyboard.press("Enter")
    saved(page)
    page.get_by_role("button", name="Yours").click()
    assert page.evaluate("window.sentinel") is None
    page.goto(page.url + "admin")
    sync_api.expect(page.locator("#disagreements details")).to_have_count(1)
    page.locator("#disagreements summary").click()
    assert page.locator("main").locator("script, img, iframe, svg").count() == 0
    assert page.evaluate("window.sentinel") is None


def test_an_admin_looks_on_and_invites(opened, store, shot):
    for n, (name, own) in enumerate(
        {"anna": [1, 2, 3, 4], "ben": [2, 1, 3, 3], "cleo": [1, 2, 3, 4]}.items()
    ):
        store.save(store.annotator(name), 1, "label", {"ranks": own, "seconds": 20.0 + n}, name)
    page = opened("admin", read=False)
    sync_api.expect(page.locator("#people tbody tr")).to_have_count(4)
    page.locator("#disagreements summary").click()
    page.get_by_label("Invite").fill("dora")
    page.get_by_role("button", name="Make a link").click()
    sync_api.expect(page.locator("#link")).to_contain_text("shown once")
    shot(page, "admin")
    link = page.locator("#link").inner_text().split()[0]
    page.get_by_role("button", name="the most disputed").click()
    sync_api.expect(page.locator("#status")).to_have_text("1 tasks come first.")
    hers = opened(link.partition("/#")[2] and "#" + link.partition("#")[2])
    assert hers.locator("#progress").inner_text().startswith("dora")
    assert "sleep better" in hers.locator("#conversation").inner_text()
    with page.expect_download() as coming:
        page.get_by_role("link", name="Export").click()
    assert len(Path(coming.value.path()).read_text().splitlines()) == 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(opened, store, scheme):
    package = pytest.importorskip(
        "axe_playwright_python", reason='needs pip install -e ".[browser]"'
    )
    source = (Path(package.__file__).parent / "axe.min.js").read_text()
    for name, own in {"anna": [1, 2, 3, 4], "ben": [4, 3, 2, 1]}.items():
        store.save(store.annotator(name), 1, "label", {"ranks": own}, name)

    def look(page) -> list:
        page.evaluate(source)
        found = page.evaluate("axe.run()")
        return [
            (one["id"], one["impact"], [node["html"][:90] for node in one["nodes"]])
            for one in found["violations"]
            if one["impact"] in ("serious", "critical", "moderate")
        ]

    options = {"color_scheme": scheme, "bypass_csp": True}  # for axe's own script
    page = opened(read=False, **options)
    sync_api.expect(page.locator("#guideline")).to_be_visible()
    assert look(page) == []
    page.get_by_role("button", name="Back to the task").click()
    page.locator(".answer summary").first.click()
    page.keyboard.press("Escape")
    assert look(page) == []
    page.get_by_role("button", name="Skip…").click()
    assert look(page) == []
    admins = opened("admin", read=False, **options)
    sync_api.expect(admins.locator("#people tbody tr")).to_have_count(3)
    admins.locator("#disagreements summary").click()
    assert look(admins) == []


def test_nothing_left_and_a_new_guideline_are_told(opened, store, served, tmp_path, shot):
    page = opened()
    for _ in range(4):
        k = page.locator(".answer").count()
        page.keyboard.type("1234"[:k])
        page.keyboard.press("Enter")
        saved(page) if store.counts(1)[1] else time.sleep(0.5)
    sync_api.expect(page.locator("#empty")).to_have_text("Nothing is left to rank. Thank you!")
    (tmp_path / "new.md").write_text("# Shorter is better")
    guide(store, tmp_path / "new.md")
    page.reload()
    sync_api.expect(page.locator("#guideline")).to_contain_text("version 2")
    sync_api.expect(page.locator("#guideline")).to_contain_text("Shorter is better")
