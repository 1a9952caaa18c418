"""Several runs on one page, and what of their differences is chance."""

import re

import numpy as np
import pytest

import small_run
from pipeline.errors import UserError
from pipeline.evaluation import chance, runs
from pipeline.evaluation.record import load_record
from test_summary import judged


def points(values) -> chance.Points:
    return {str(n): (float(value), 1.0) for n, value in enumerate(values)}


def run_of(root, name: str, shift: float = 0.0, prompts: int = 40, **ppo):
    """A run whose PPO's grades are those of any other plus `shift`, on the same prompts."""
    (root / name).mkdir()
    base = {"model": "owner/base"}
    made = small_run.make_run(root / name, sft=base, rm=base, ppo=base | ppo)
    run = made.rename(root / name / name)
    grades = np.random.default_rng(0).normal(size=prompts)
    rows = []
    for number, grade in enumerate(grades):
        answers = {
            policy: {
                "response": f"{name} {policy}",
                "judge": float(value),
                "ended": True,
                "length": 3,
            }
            for policy, value in (("sft", grade), ("ppo", grade + shift * (1 + number % 3)))
        }
        rows.append({"prompt": f"p{number} <b>", "groups": {}, "answers": answers})
    judged(run, models={"sft": {"judge": 0.0}, "ppo": {"judge": 0.0}})
    small_run.write_jsonl(run / "eval" / "test_samples.jsonl", rows)
    return run


def test_a_difference_on_the_same_prompts_is_paired_and_so_much_narrower():
    values = np.random.default_rng(1).normal(size=60)
    before, after = points(values), points(values + 0.1)
    paired = chance.difference([before], [after])
    assert paired.paired and paired.real and paired.value == pytest.approx(0.1)
    other = {f"other {key}": value for key, value in after.items()}
    apart = chance.difference([before], [other])
    assert not apart.paired and not apart.real and apart.value == pytest.approx(0.1)


def test_no_difference_is_found_larger_than_chance_in_one_of_twenty():
    """Two draws of the same: the interval leaves 0 out in about 3 of 60."""
    random = np.random.default_rng(2)
    drawn = [[points(row) for row in random.normal(size=(2, 50))] for _ in range(60)]
    found = sum(chance.difference([a], [b]).real for a, b in drawn)
    assert 1 <= found <= 8


def test_seeds_that_differ_widen_an_interval_that_prompts_alone_would_not():
    runs = [points(np.full(50, value)) for value in (0.2, 0.8, 0.5)]
    one, several = chance.of(runs[:1]), chance.of(runs)
    assert one.low == one.high == pytest.approx(0.2)
    assert several.value == pytest.approx(0.5) and several.low < 0.4 < 0.6 < several.high


def test_a_share_of_pairs_is_the_ratio_of_sums():
    assert chance.of([{"a": (1.0, 1.0), "b": (1.0, 3.0)}]).value == pytest.approx(0.5)


def test_means_with_errors_differ_by_the_normal_distribution():
    apart = chance.difference_of_means([(1.0, 0.3)], [(2.0, 0.4)])
    assert (apart.value, apart.low) == pytest.approx(
        (1.0, 1.0 - 1.96 * 0.5), abs=1e-3
    ) and apart.real
    known = chance.of_means([(1.0, 0.0), (3.0, 0.0)])  # of two seeds that lie 2 apart
    assert (known.value, known.high) == pytest.approx((2.0, 2.0 + 1.96), abs=1e-3)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Two seeds of one way, and another way that is better on every prompt."""
    root = tmp_path_factory.mktemp("three")
    made = [run_of(root, "a"), run_of(root, "b", 0.01, seed=4), run_of(root, "c", 0.5, kl_coef=0.2)]
    return made


def test_runs_that_differ_in_their_seeds_alone_are_one_way(three):
    groups = runs.grouped([load_record(run) for run in three])
    assert [group.name for group in groups] == ["a … b (2 seeds)", "c"]
    differing = dict(runs.differing(groups))
    assert differing["ppo.kl_coef"] == ["0.05", "0.2"]
    assert differing["ppo.seed"] == ["3, 4", "3"]
    assert not [key for key in differing if key.startswith(("sft.", "rm."))]


def test_the_page_tells_figures_differences_and_the_same_prompts(three):
    out = runs.write_page(three)
    assert out.name == "a-b-c.html" and out.parent.name == "reports"
    page = out.read_text()
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))
    assert re.search(r"Judge's grade .*?, paired\): larger than chance", text.replace("&#39;", "'"))
    assert "p1 &lt;b&gt;" in page and "<b>c" not in page.replace("<b><i", "")
    assert page.count("data:image/svg+xml") > 4 and "http" not in re.sub(r'"data:[^"]*"', "", page)


def test_what_is_no_two_runs_is_told_in_a_line(three, tmp_path):
    with pytest.raises(UserError, match="two different runs or more"):
        runs.write_page([three[0], three[0]])
    with pytest.raises(UserError, match="no such run; there are"):
        runs.write_page([three[0], tmp_path / "none"])
    assert not (tmp_path / "reports").exists()
