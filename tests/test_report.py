"""The report: one self-contained page from whatever a run has."""

import html
import json
import re
from pathlib import Path

import pytest

import small_run
from pipeline.errors import UserError
from pipeline.evaluation import plots, record, report
from test_summary import judged

EVIL = '<script>alert("你好")</script>'


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page of a whole run with hostile and Chinese text in prompts and responses."""
    run = small_run.make_run(tmp_path_factory.mktemp("report"))
    group = {"n": 6, "judge": 1.0, "ended": 1.0, "length": 8.0}
    rate = {"rate": 0.7, "low": 0.6, "high": 0.8}
    versus = {**rate, "wins": 8, "ties": 1, "losses": 3, "difference": 0.5}
    versus |= {"difference_low": 0.1, "difference_high": 0.9, "groups": {"family": {"中文": rate}}}
    model = {**group, "groups": {"family": {"中文": group}}}
    config = {
        "judge": "some.judge",
        "temperature": 1.0,
        "seed": 1,
        "max_new_tokens": 6,
        "samples": 2,
    }
    judged(
        run, config=config, models={"sft": model, "ppo": model}, comparisons={"ppo_vs_sft": versus}
    )
    answers = {
        "sft": {"response": EVIL, "judge": 1.0, "ended": True},
        "ppo": {"response": "谢谢", "judge": 2.0, "ended": False},
    }
    row = {"prompt": f"请 {EVIL}", "groups": {"family": "中文"}, "answers": answers}
    small_run.write_jsonl(run / "eval" / "test_samples.jsonl", [row] * 3)
    study = [
        {"kl": 0.0, "judge": 1.0, "rm_score": 0.1},
        {"kl": 4.0, "judge": -1.0, "rm_score": 0.9},
    ]
    (run / "overopt").mkdir()
    (run / "overopt" / "overopt.json").write_text(
        json.dumps({"judge": "some.judge", "studies": {"beta 0": study}})
    )
    return report.write_report(run).read_text(encoding="utf-8")


def test_text_of_a_run_is_escaped(page):
    assert "<script" not in page
    assert (
        page.count(html.escape(EVIL, quote=False).replace('"', "&#34;")) == 16
    )  # 2 of the first prompts with their answers, 3 of the worst and 3 of the best by the judge


def test_it_needs_nothing_from_outside(page):
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert links
    assert all(link.startswith(("data:", "#")) for link in links)
    assert "http" not in re.sub(r'"data:[^"]*"', "", page)
    assert "@import" not in page


def test_it_shows_every_section(page):
    for text in (
        "Verdict",
        "By kind of prompt",
        "中文",
        "谢谢",
        "not ended",
        "Calibration",
        "Score against length",
        "Over-optimisation",
        "data/train.jsonl",
        "abababababab",
        "kl_coef: 0.05",
        "objective/kl",
        "python -m stages.ppo --config ppo.yaml",
        "70.0 %",
    ):
        assert text in page, text
    assert page.count('class="answer better"') == 9  # samples, and an error of the reward model


@pytest.mark.parametrize("stages", [("sft",), ("base", "sft", "rm")])
def test_a_run_without_later_stages_or_evaluation_has_a_page(tmp_path, stages):
    page = report.write_report(small_run.make_run(tmp_path, stages)).read_text(encoding="utf-8")
    assert "Not evaluated yet" in page
    assert 'id="sft"' in page
    assert 'id="ppo"' not in page


def test_what_a_stage_recorded_of_its_data_is_shown(tmp_path):
    run = small_run.make_run(tmp_path, ("base", "sft"))
    path = run / "sft" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["metrics"] |= {"dropped <long>": 409}
    path.write_text(json.dumps(manifest))
    page = report.write_report(run).read_text(encoding="utf-8")
    assert '<code>examples</code></td><td class="num">90</td>' in page
    assert '<code>dropped &lt;long&gt;</code></td><td class="num">409</td>' in page


def test_an_empty_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="make sft RUN=none"):
        report.write_report(tmp_path / "none")


def test_a_metric_that_was_never_logged_has_no_chart(tmp_path):
    found = record.load_record(small_run.make_run(tmp_path))
    titles = [chart["title"] for chart in report.charts(found, "ppo")]
    assert "Score" in titles
    assert "Score against KL: what each nat bought" in titles
    assert "Clipped tokens" not in titles
    rows = [{"step": 1, "kl": 0.5, "score": 2.0}, {"step": 2, "score": 3.0}]
    assert record.values(rows, "score", over="kl") == [(0.5, 2.0)]


def test_charts_are_svg_data_uris_and_the_same_each_time():
    first = plots.lines({"a": [(1, 0.5), (2, 1.5)], "b": [(1, 1.0)]}, level=0.0)
    assert first.startswith("data:image/svg+xml;base64,")
    assert first == plots.lines({"a": [(1, 0.5), (2, 1.5)], "b": [(1, 1.0)]}, level=0.0)
    assert first != plots.lines({"a": [(1, 0.5), (2, 1.6)], "b": [(1, 1.0)]}, level=0.0)


def test_a_run_looked_at_from_within_and_one_whose_name_has_a_space(tmp_path, monkeypatch):
    run = small_run.make_run(tmp_path, ("base", "sft"))
    monkeypatch.chdir(run)
    page = report.write_report(Path(".")).read_text(encoding="utf-8")
    assert "<h1>run</h1>" in page and f"--run {run}-again" in page
    own = run.rename(tmp_path / "my run")
    assert f"--run &#39;{own}-again&#39;" in report.write_report(own).read_text(encoding="utf-8")


def test_the_last_two_policies_are_compared_by_kind_and_one_prompt_has_no_spread(tmp_path):
    run = small_run.make_run(tmp_path, ("base", "sft"))
    groups = {"family": {"odd": {"n": 3, "judge": 1.0}}}
    versus = {"rate": 0.5, "low": 0.1, "high": 0.9, "groups": {"family": {"odd": {"rate": 0.5}}}}
    models = {"base": {"judge": 0.0, "groups": groups}, "sft": {"judge": 1.0, "groups": groups}}
    judged(run, models=models, comparisons={"sft_vs_base": versus}, kl={})
    [table] = report.family_tables(record.load_record(run))
    assert table["rate"] == "sft over base" and table["rows"][0][-1] == {"rate": 0.5}
    judged(run, models=models, kl={"sft_vs_base": 1.5, "std_error": None})
    rows = dict(report.summary_rows(record.load_record(run)))
    assert rows["KL to BASE, nats per response"] == ["–", "1.50"]
