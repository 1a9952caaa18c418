"""The pages in a browser: light, dark, phone and print; nothing serious to axe-core, nothing from a network."""

import shutil
from pathlib import Path

import pytest

import small_run
from pipeline.evaluation import runs
from pipeline.evaluation.report import write_report
from test_examples import ROWS, episode
from test_summary import judged

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SIZES = {"light": (1280, 900), "dark": (1280, 900), "phone": (390, 844), "print": (794, 1123)}


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> list[Path]:
    """A report with every kind of example, and one of two runs."""
    made = []
    for name in ("a", "b"):
        root = tmp_path_factory.mktemp(name)
        run = small_run.make_run(root).rename(root / name)
        model = {
            "n": 4,
            "judge": 1.0,
            "ended": 1.0,
            "groups": {"family": {"x": {"n": 4, "judge": 1.0}}},
        }
        rate = {"rate": 0.7, "low": 0.6, "high": 0.8, "wins": 8, "ties": 1, "losses": 3}
        rate |= {"difference": 0.5, "difference_low": 0.1, "difference_high": 0.9}
        judged(run, models={"sft": model, "ppo": model}, comparisons={"ppo_vs_sft": rate})
        small_run.write_jsonl(run / "eval" / "test_samples.jsonl", ROWS)
        numbers = {
            "advantage": [-2.0, 1.0],
            "reward": [-0.1, 1.5],
            "kl": [0.2, 0.0],
            "value": [1, 2],
        }
        small_run.write_jsonl(run / "ppo" / "tokens.jsonl", [episode(3, **numbers)] * 3)
        made.append(run)
    return [write_report(made[0]), runs.write_page(made)]


@pytest.mark.slow
@pytest.mark.parametrize("way", SIZES)
@pytest.mark.parametrize("which", [0, 1], ids=["report", "runs"])
def test_a_page_is_whole_readable_and_alone(pages, way, which):
    browser_of = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="it carries axe-core")
    if CHROMIUM is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    width, height = SIZES[way]
    with browser_of.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(
            color_scheme="dark" if way == "dark" else "light",
            viewport={"width": width, "height": height},
        )
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.emulate_media(media="print" if way == "print" else "screen")
        page.goto(pages[which].as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        found = axe.Axe().run(page).response["violations"]
        wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        if way == "light" and which == 0:  # the colours follow the choice
            token = page.locator(".token").first
            colour = "e => getComputedStyle(e).backgroundColor"
            before = token.evaluate(colour)
            page.check("#by-kl")
            assert token.evaluate(colour) != before and "KL" in token.get_attribute("title")
        browser.close()
    assert not [
        (one["id"], one["nodes"][0]["html"])
        for one in found
        if one["impact"] in ("serious", "critical")
    ]
    assert wide <= 0
    assert not [url for url in asked if not url.startswith(("file:", "data:"))]
