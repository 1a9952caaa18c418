"""A run against what healthy runs of its recipe look like: bands, departures, what is said and what is not known."""

import json
import random
import shutil
from pathlib import Path

import pytest

import small_run
from pipeline import steps
from pipeline.config.load import load_config
from pipeline.errors import UserError
from pipeline.evaluation import bands, expect, report
from pipeline.evaluation.about import verdicts
from pipeline.evaluation.bands import Expected
from pipeline.evaluation.record import load_record
from pipeline.handoff.artifacts import Manifest
from pipeline.handoff.lineage import identity
from pipeline.handoff.remembered import Made, note

STEPS = range(1, 11)
VERSIONS = {"torch": "2.13.0+cpu", "transformers": "5.23.0", "trl": "1.16.0"}


def curves(seed: int, **changes) -> dict[str, list[dict]]:
    """Records of all stages that learn, with a little noise; changes: stage -> {metric: f(step)}."""
    noise = random.Random(seed)
    plain = {
        "sft": {"train/loss": lambda s: 2 / s},
        "rm": {"train/loss": lambda s: 0.7 - s / 50},
        "ppo": {"objective/scores": lambda s: s / 10, "objective/kl": lambda s: s / 5},
    }
    return {
        stage: [
            {"step": s} | {m: f(s) + noise.gauss(0, 0.02) for m, f in (own | changes.get(stage, {})).items()}
            for s in STEPS
        ]
        for stage, own in plain.items()
    }  # fmt: skip


def make(run: Path, seed: int = 1, versions=None, kl_coef: float = 0.1, **changes) -> Path:
    """A run's manifests and records; the rest of it nobody looks at."""
    for stage, curve in curves(seed, **changes).items():
        small_run.write_jsonl(run / stage / "metrics.jsonl", curve)
        own = {"kl_coef": kl_coef} if stage == "ppo" else {"model": "m"}
        manifest = Manifest(
            stage=stage,
            config={"seed": seed, "learning_rate": 1e-3, **own},
            metrics={"eos_share": 0.9 + seed / 1000, "minutes": 1.0},
            packages=VERSIONS if versions is None else versions,
            created="2026-01-01T00:00:00",
        )
        (run / stage / "manifest.json").write_text(manifest.model_dump_json())
    return run


@pytest.fixture
def recipe(tmp_path) -> Path:
    """A recipe with the bands of four seeds."""
    folder = tmp_path / "recipe"
    folder.mkdir()
    (folder / "sft.yaml").write_text("model: m\n")
    for seed in (1, 2, 3, 4):
        make(tmp_path / f"run-seed{seed}", seed)
    expect.main(words(tmp_path, folder, "--write", "--seeds", "1", "2", "3", "4"))
    return folder


def words(root: Path, recipe: Path, *more: str) -> list[str]:
    return ["--recipe", str(recipe), "--run", str(root / "run"), *more]


def code(root: Path, recipe: Path, *more: str) -> int:
    with pytest.raises(SystemExit) as ended:
        expect.main(words(root, recipe, *more))
    return ended.value.code


# --- bands ----------------------------------------------------------------------------------------


def test_a_band_is_the_mean_and_so_many_deviations_pooled_over_neighbours():
    flat = [[(s, 1.0 + x * (s == 3)) for s in range(1, 8)] for x in (-0.3, 0.0, 0.3)]
    rows = {step: (low, high) for step, low, high in bands.band(flat)}
    half = bands.WIDTH * (4 / 3) ** 0.5  # of a new run, about a mean of three
    assert rows[3] == pytest.approx((1 - half * 0.3 / 5**0.5, 1 + half * 0.3 / 5**0.5), abs=1e-3)
    assert rows[1] == pytest.approx((1 - half * 0.3 / 3**0.5, 1 + half * 0.3 / 3**0.5), abs=1e-3)
    assert rows[7] == pytest.approx((1 - half * bands.LEAST, 1 + half * bands.LEAST), abs=1e-3)


def test_a_trend_is_no_spread():
    """Neighbours lend their spread about their own means: a steep curve has no wide band."""
    steep = [[(s, 10.0 * s + x) for s in range(1, 8)] for x in (-1.0, 0.0, 1.0)]
    for step, low, high in bands.band(steep):
        assert (low + high) / 2 == pytest.approx(10 * step, abs=0.02)
        assert high - low == pytest.approx(2 * bands.WIDTH * (4 / 3) ** 0.5, abs=0.02)


def test_long_curves_are_thinned_and_a_step_between_is_held_against_a_line():
    long = [[(s, s + x) for s in range(1, 302)] for x in (0.0, 1.0, 2.0)]
    rows = bands.band(long)
    assert len(rows) == bands.POINTS and (rows[0][0], rows[-1][0]) == (1, 301)
    assert bands.left([(s, s + 1.0) for s in range(1, 302)], rows) is None
    assert bands.left([(s, s + 40.0) for s in range(5, 302)], rows).step == 5


BAND = [(1, 0.0, 1.0), (2, 0.0, 1.0), (3, 1.0, 2.0), (5, 1.0, 2.0)]


@pytest.mark.parametrize(
    ("curve", "step"),
    [
        ([(1, 0.5), (2, 0.5), (3, 1.5), (5, 1.5)], None),
        ([(1, 0.5), (2, 1.5), (3, 1.5), (5, 1.5)], None),  # one point alone
        ([(1, 0.5), (2, 1.5), (3, 2.5), (5, 1.5)], 2),
        ([(1, 0.5), (2, 1.5), (3, 0.5), (5, 1.5)], 2),  # on the other side in the next
        ([(1, 0.5), (2, 0.5), (3, 1.5), (5, 2.5)], 5),  # the last has none after it
        ([(0, 9.0), (1, 0.5), (6, 9.0), (7, 9.0)], None),  # where there is no band
        ([], None),
    ],
)
def test_a_band_is_left_at_the_first_of_two_points_outside(curve, step):
    found = bands.left(curve, BAND)
    assert (found and found.step) == step


# --- a run ----------------------------------------------------------------------------------------


def test_a_healthy_run_of_another_seed_stays_within(tmp_path, recipe, capsys):
    make(tmp_path / "run", 9)
    assert code(tmp_path, recipe) == 0
    out = capsys.readouterr().out
    assert "seeds 1 2 3 4" in out and "ppo: within its bands (2 curves, up to step 10)" in out
    assert "made with another" not in out and "not known" not in out


def test_what_left_is_told_with_its_step_its_side_and_its_meaning(tmp_path, recipe, capsys):
    drift = {
        "objective/kl": lambda s: s / 5 + 4 * (s >= 6),
        "objective/scores": lambda s: s / 10 - 2 * (s >= 4),
    }
    make(tmp_path / "run", 9, ppo=drift)
    assert code(tmp_path, recipe) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "its band" in line]
    assert [line.split()[1] for line in lines if "within" not in line] == ["objective/scores", "objective/kl"]  # fmt: skip
    assert "objective/scores is below its band from step 4 on: -1." in lines[2]
    assert lines[2].endswith(steps.about("ppo").EXPECTED["objective/scores"][0])
    assert "objective/kl is above its band from step 6 on" in lines[3]
    assert lines[3].endswith(steps.about("ppo").EXPECTED["objective/kl"][1])


def test_a_number_that_a_stage_has_once_is_held_too(tmp_path, recipe, capsys):
    run = make(tmp_path / "run", 9)
    manifest = json.loads((run / "sft" / "manifest.json").read_text())
    manifest["metrics"]["eos_share"] = 0.1
    (run / "sft" / "manifest.json").write_text(json.dumps(manifest))
    assert code(tmp_path, recipe) == 1
    assert "sft: eos_share is below its band in the end: 0.1" in capsys.readouterr().out


def test_a_stage_is_looked_at_while_it_trains(tmp_path, recipe, capsys):
    run = make(tmp_path / "run", 9, ppo={"objective/kl": lambda s: 5.0})
    work = run / ".work" / "ppo"
    work.parent.mkdir()
    shutil.move(run / "ppo", work)
    rows = (work / "metrics.jsonl").read_text().splitlines(keepends=True)
    (work / "metrics.jsonl").write_text("".join(rows[:3]))
    (work / "made_from.json").write_text(json.dumps({"config": {"kl_coef": 0.3}}))
    assert code(tmp_path, recipe) == 1
    out = capsys.readouterr().out
    assert "objective/kl is above its band from step 1 on" in out and "kl_coef: 0.1 -> 0.3" in out


def test_all_seeds_are_looked_at_though_the_first_left(tmp_path, recipe, capsys):
    make(tmp_path / "run-seed8", 8, ppo={"objective/kl": lambda s: 5.0})
    make(tmp_path / "run-seed9", 9)
    assert code(tmp_path, recipe, "--seeds", "8", "9") == 1
    assert "run-seed9" in capsys.readouterr().out
    assert code(tmp_path, recipe, "--seeds", "9", "2") == 0


# --- what is not known ----------------------------------------------------------------------------


def test_another_config_or_version_is_told_and_nothing_is_promised(tmp_path, recipe, capsys):
    make(tmp_path / "run", 9, kl_coef=0.2, versions={"torch": "2.11.0", "trl": VERSIONS["trl"]})
    assert code(tmp_path, recipe) == 0
    out = capsys.readouterr().out
    assert "ppo: made with another kl_coef: 0.1 -> 0.2 (the bands need not fit)" in out
    assert "sft: made with another" not in out and "trl" not in out
    assert "sft: torch 2.11.0, the bands are of 2.13.0+cpu: not known to fit" in out
    make(tmp_path / "run", 9, versions={})
    assert code(tmp_path, recipe) == 0
    assert "sft: its packages' versions are not known" in capsys.readouterr().out


def test_what_cannot_be_looked_at_is_an_error(tmp_path, recipe):
    with pytest.raises(UserError, match="no such run; there are: run-seed1, run-seed2"):
        expect.main(words(tmp_path, recipe))
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="nothing to look at yet; begin with: make sft RUN=run"):
        expect.main(words(tmp_path, recipe))
    (recipe / "expect.yaml").unlink()
    with pytest.raises(
        UserError, match="expect.yaml: not there; .* make seeds RECIPE=recipe SEEDS"
    ):
        expect.main(words(tmp_path, recipe))
    (recipe / "expect.yaml").write_text("seeds: [1]\nbands: {ppo: {a: [[1, 2]]}}\n")
    with pytest.raises(UserError, match=r"packages: missing[\s\S]*bands.ppo.a.0"):
        expect.main(words(tmp_path, recipe))


def test_bands_are_made_of_three_whole_runs_that_are_alike(tmp_path, recipe):
    before = (recipe / "expect.yaml").read_text()
    for seeds, told in (
        ("1 2", "three seeds or more"),
        ("1 2 8", "run-seed8: has no sft yet: make sft RUN=run-seed8"),
        ("1 2 7", r"run-seed7: its ppo is not made as that of .*run-seed1: kl_coef: 0.1 -> 0.2"),
    ):
        make(tmp_path / "run-seed7", 7, kl_coef=0.2)
        with pytest.raises(UserError, match=told):
            expect.main(words(tmp_path, recipe, "--write", "--seeds", *seeds.split()))
    assert (recipe / "expect.yaml").read_text() == before


# --- the report -----------------------------------------------------------------------------------


def test_the_report_shows_the_band_and_says_what_left_it(tmp_path, recipe, monkeypatch):
    run = make(tmp_path / "run", 9, ppo={"objective/kl": lambda s: 5.0})
    made = Made(config="ppo.yaml")
    plain = report.write_report(run).read_text()
    before = identity("report", None, run)
    assert "healthy runs" not in plain
    note(run, "ppo", made, recipe, None)
    assert identity("report", None, run) != before
    page = report.write_report(run).read_text()
    assert page.count("behind it the band of the recipe") == 4
    told = [f for f in verdicts(load_record(run))[-1].findings if "its band" in f.text]
    assert [f.level for f in told] == ["watch"] and told[0].text.startswith("objective/kl is above")
    make(run, 9, kl_coef=0.2, ppo={"objective/kl": lambda s: 5.0})  # nobody said that these stay
    assert not [f for f in verdicts(load_record(run))[-1].findings if "its band" in f.text]


RECIPES = sorted(Path("configs").glob("*/expect.yaml"))


@pytest.mark.parametrize("file", RECIPES, ids=str)
def test_bands_of_our_recipes_are_of_curves_that_somebody_explains(file):
    found = load_config(Expected, file)
    assert found.bands.keys() == {"sft", "rm", "ppo"} and len(found.seeds) >= 3
    for stage, metrics in found.bands.items():
        assert metrics.keys() <= steps.about(stage).EXPECTED.keys()
        shown = [m for chart in steps.about(stage).CHARTS for m in chart.series.values()]
        assert set(shown) & metrics.keys()
