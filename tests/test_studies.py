"""Studies over seeds and over-optimisation: what they collect, without running a stage."""

import json
import subprocess
import sys
from datetime import date
from pathlib import Path

import psutil
import pytest
from datasets import Dataset

import fake_stages
import small_run
from pipeline import cli
from pipeline.config.schema import Data
from pipeline.data.forms import load_prompts
from pipeline.errors import UserError
from pipeline.evaluation import calls as steps
from pipeline.evaluation import overopt, seeds
from pipeline.evaluation.judges import load_judge
from pipeline.handoff import artifacts


def evaluation(rate: float, exact: float) -> dict:
    part = {"n": 2, "exact": exact, "judge": 2.0}
    return {
        "models": {
            "sft": {
                "judge": 1.0,
                "exact": 0.5,
                "groups": {"family": {"a|b": {**part, "exact": 0.5}}},
            },
            "ppo": {"judge": 1.5, "exact": exact, "groups": {"family": {"a|b": part}}},
        },
        "comparisons": {
            "ppo_vs_sft": {"rate": rate, "groups": {"family": {"a|b": {"rate": rate}}}}
        },
        "kl": {"ppo_vs_sft": 2.0},
    }


def test_seeds_are_collected_into_min_median_and_max():
    results = {4: evaluation(0.7, 0.6), 5: evaluation(0.4, 0.5), 6: evaluation(0.6, 0.9)}
    values = seeds.collect(results)
    assert values["ppo: win rate over sft"] == {4: 0.7, 5: 0.4, 6: 0.6}
    assert values["ppo: exact, change"] == pytest.approx({4: 0.1, 5: 0.0, 6: 0.4})
    assert values["family a|b: exact, change"] == pytest.approx({4: 0.1, 5: 0.0, 6: 0.4})
    assert "rm: agrees with judge" not in values  # nobody measured it
    lines = seeds.markdown(values, [4, 5, 6]).splitlines()
    assert "| ppo: win rate over sft | 0.400 | 0.600 | 0.700 | 0.700 | 0.400 | 0.600 |" in lines
    assert any(line.startswith(r"| family a\|b: win rate |") for line in lines)


def test_a_quantity_that_one_seed_lacks_has_a_dash():
    table = seeds.markdown({"x": {1: 0.5}}, [1, 2])
    assert table.splitlines()[-1] == "| x | 0.500 | 0.500 | 0.500 | 0.500 | - |"


def test_a_failed_seed_does_not_end_the_study(tmp_path, monkeypatch, capsys):
    calls, evaluated = [], []

    def stage(name, recipe, run, *settings, borrow=None, config=None):
        calls.append((name, run.name, settings))
        if run.name == "r-seed2" and name == "rm":
            raise steps.StepFailed("python -m stages.rm")

    recipe = fake_stages.write_recipe(tmp_path, eval="prompts: {path: p.jsonl}\n")
    monkeypatch.setattr(steps, "ensure_base", lambda recipe: None)
    monkeypatch.setattr(steps, "stage", stage)
    monkeypatch.setattr(steps, "evaluation", lambda *words: evaluated.append(words[2:]))
    with pytest.raises(SystemExit) as ended:
        seeds.main(
            ["--recipe", str(recipe), "--run", str(tmp_path / "r"), "--seeds", "1", "2", "3"]
            + ["--set", "eval.seed=9 ppo.lam=1"]
        )
    assert ended.value.code == 1
    assert [c[0] for c in calls] == ["sft", "rm", "ppo", "sft", "rm", "sft", "rm", "ppo"]
    assert calls[-1] == ("ppo", "r-seed3", ("eval.seed=9", "ppo.lam=1", "seed=3"))
    assert evaluated == [("test", "seed=9")] * 2  # its own settings alone, without their prefix
    assert "Failed: seed 2" in (tmp_path / "r-seeds.md").read_text()


def test_a_variant_takes_another_ppo_config_and_the_models_of_another_study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    fake_stages.write_recipe(tmp_path, eval="prompts: {path: p.jsonl}\n")
    for seed in (1, 2):
        fake_stages.make_all(tmp_path, f"a-seed{seed}")
    Path("other.yaml").write_text(fake_stages.CONFIGS["ppo"] + "kl_coef: 0.5\n")
    evaluated = []

    def call(module: str, *words: str) -> None:
        """What the command line would do, with a stage that publishes a few bytes."""
        if module == "pipeline.evaluation":
            evaluated.append(words[words.index("--run") + 1])
            return
        stage = module.removeprefix("stages.")
        fake_stages.train(
            cli.configured(stage, cli.request(stage, cli.parser(stage).parse_args(words)))
        )

    monkeypatch.setattr(steps, "call", call)
    words = "--run checkpoints/b --from checkpoints/a --ppo other.yaml --seeds 1 2".split()
    with pytest.raises(SystemExit) as ended:
        seeds.main([*words, "--set", "ppo.lam=0.5"])
    assert ended.value.code == 0
    assert evaluated == ["checkpoints/b-seed1", "checkpoints/b-seed2"]
    for seed in (1, 2):
        run = Path(f"checkpoints/b-seed{seed}")
        assert [p.name for p in run.iterdir() if p.name[0] != "."] == ["ppo"]
        manifest = artifacts.read(run / "ppo")
        assert manifest.parents["sft"].path == f"checkpoints/a-seed{seed}/sft"
        assert manifest.parents["rm"].path == f"checkpoints/a-seed{seed}/rm"
        keys = ("kl_coef", "lam", "seed")
        assert [manifest.config[key] for key in keys] == [0.5, 0.5, seed]


def test_a_ppo_config_that_is_not_there_ends_a_study_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fake_stages.write_recipe(tmp_path)
    with pytest.raises(UserError, match=r"none\.yaml: no such file"):
        seeds.main(["--ppo", "none.yaml"])


def test_what_would_end_every_seed_ends_the_study_before_the_first(tmp_path, monkeypatch):
    recipe = fake_stages.write_recipe(tmp_path)
    monkeypatch.setattr(steps, "call", lambda *words: pytest.fail("a stage was started"))
    words = ["--recipe", str(recipe), "--run", str(tmp_path / "r")]
    with pytest.raises(UserError, match=r"eval\.yaml: no such file"):
        seeds.main(words)
    (recipe / "eval.yaml").write_text("prompts: {path: p.jsonl}\n")
    with pytest.raises(UserError, match="no prompts for the split validation"):
        seeds.main([*words, "--split", "validation"])
    with pytest.raises(UserError, match="judge: cannot import 'no_such_judge'"):
        seeds.main([*words, "--set", "eval.judge=no_such_judge"])
    (recipe / "ppo.yaml").write_text("iteration: 3\n")
    with pytest.raises(UserError, match="did you mean `iterations`"):
        seeds.main(words)


def test_perplexity_of_pretraining_text_is_compared_with_sft():
    result = evaluation(0.5, 0.5)
    result["models"]["sft"]["text_perplexity"] = 4.0
    result["models"]["ppo"]["text_perplexity"] = 5.0
    found = seeds.quantities(result)
    assert found["sft: perplexity of pretraining text"] == 4.0
    assert found["ppo: perplexity of pretraining text"] == 5.0
    assert found["ppo: perplexity of pretraining text, ratio to sft"] == 1.25
    assert "base: perplexity of pretraining text" not in found


def test_the_seed_cannot_be_set_twice(tmp_path):
    with pytest.raises(UserError, match=r"ppo\.seed=3: the seeds are those of --seeds"):
        seeds.main(["--recipe", "tiny", "ppo.seed=3"])


def test_no_such_recipe():
    with pytest.raises(UserError, match="nowhere: no recipe"):
        steps.recipe_folder("nowhere")


def test_a_failing_command_raises(capfd):
    with pytest.raises(steps.StepFailed, match="no_such_module"):
        steps.call("no_such_module")
    assert "No module named" in capfd.readouterr().err


# --- over-optimisation ----------------------------------------------------------------------------


def samples(step: int, responses: list[str]) -> list[dict]:
    prompts = ("p", "q")
    return [
        {"step": step, "prompt": p, "response": r, "score": float(step), "ended": True}
        for p, r in zip(prompts, responses, strict=True)
    ]


@pytest.fixture
def judge(monkeypatch):
    return load_judge(small_run.install(monkeypatch, small_run.judge_module()))


def test_samples_kept_along_the_way_are_judged_and_meet_the_kl_of_the_next_rollout(tmp_path, judge):
    kept = samples(0, ["w1", "x"]) + samples(2, ["w1 w1", "w1"]) + samples(3, ["x", "x"])
    small_run.write_jsonl(tmp_path / "samples.jsonl", kept)
    curve = [{"step": s, "objective/kl": float(s - 1)} for s in (1, 2, 3)]
    small_run.write_jsonl(tmp_path / "metrics.jsonl", curve)
    asked = load_prompts([{"prompt": "p"}, {"prompt": "q"}])
    found = overopt.answers(tmp_path, asked)
    points = overopt.trajectory(tmp_path, found, asked, judge)
    small_run.write_jsonl(tmp_path / "metrics.jsonl", [curve[0], curve[2]])  # log_every: 3
    thinned = overopt.trajectory(tmp_path, found, asked, judge)
    assert [p["kl"] for p in thinned] == [0.0, 2.0, 2.0]
    # the small judge gives one per w1 and one for an end
    assert points == [
        {"step": 0, "kl": 0.0, "judge": 1.5, "rm_score": 0.0},
        {"step": 2, "kl": 2.0, "judge": 2.5, "rm_score": 2.0},
        {"step": 3, "kl": 2.0, "judge": 1.0, "rm_score": 3.0},
    ]


def test_a_study_has_the_points_and_prompts_that_are_asked_for(tmp_path, monkeypatch, judge):
    """A finished run is up to date whatever it was watched at: it is used if that is enough, else made again."""
    rows = [{"prompt": p, "day": date(2024, 1, n)} for n, p in enumerate("pqr", 1)]
    Dataset.from_list(rows).to_parquet(tmp_path / "p.parquet")
    source = f"prompts: {{path: {tmp_path / 'p.parquet'}}}\njudge: {judge.name}\n"
    recipe = fake_stages.write_recipe(tmp_path, eval=source, ppo="iterations: 3\n")
    run, trained = small_run.make_run(tmp_path, ("base", "sft", "rm")), []

    def stage(name, recipe, run, *words, borrow=None):
        if name == "rm" or ((run / name).exists() and "--force" not in words):
            return
        said = dict(word.split("=", 1) for word in words if "=" in word)
        trained.append(int(said["sample_every"]))
        texts = [p.row["prompt"] for p in load_prompts(Data(**json.loads(said["sample_prompts"])))]
        last = int(said["iterations"])
        small_run.write_jsonl(
            run / name / "samples.jsonl",
            [
                {"step": s, "prompt": p, "response": "w1", "score": 0.0, "ended": True}
                for s in sorted({*range(0, last, trained[-1]), last})
                for p in texts
            ],
        )
        small_run.write_jsonl(run / name / "metrics.jsonl", [{"step": last, "objective/kl": 1.0}])

    monkeypatch.setattr(steps, "stage", stage)
    monkeypatch.setattr(overopt, "fresh_stages", lambda found: (found, []))
    monkeypatch.setattr(overopt, "best_of_n", lambda *args: {})

    def points(asked: int, prompts: int) -> list[float]:
        study = overopt.Study(recipe, run, prompts, 4, [])
        curves = study.curves(None, asked)
        return [point["step"] for point in curves["PPO"]]

    assert points(3, 2) == [0, 2, 4, 6] and trained == [2, 2]  # with both reward models
    assert points(2, 2) == [0, 3, 6] and trained[2:] == [3, 3]
    assert points(1, 2) == [0, 6] and points(2, 2) == [0, 3, 6] and len(trained) == 4
    assert points(2, 3) == [0, 3, 6] and len(trained) == 6


def test_the_study_is_written_as_numbers(tmp_path):
    points = [
        {"kl": 0.0, "judge": 1.0, "rm_score": 0.0},
        {"kl": 1.0, "judge": 0.0, "rm_score": 1.0},
    ]
    written = json.loads(overopt.write(tmp_path, "some.judge", {"PPO": points}).read_text())
    assert written == {"judge": "some.judge", "studies": {"PPO": points}}


def test_a_study_of_over_optimisation_tells_its_mistakes_before_it_trains(
    tmp_path, monkeypatch, capsys, judge
):
    recipe = fake_stages.write_recipe(
        tmp_path, eval=f"prompts: {{path: p.jsonl}}\njudge: {judge.name}\n", ppo="iteration: 3\n"
    )
    monkeypatch.setattr(steps, "call", lambda *words: pytest.fail("a stage was started"))
    with pytest.raises(UserError, match="did you mean `iterations`"):
        overopt.main(["--recipe", str(recipe), "--run", str(tmp_path / "r")])
    for word in ("--points", "--prompts", "--n", "--iterations"):
        with pytest.raises(SystemExit):
            overopt.main(["--recipe", str(recipe), word, "0"])
        assert f"argument {word}: 0: a whole number from 1 on" in capsys.readouterr().err


@pytest.mark.slow
def test_a_study_that_is_asked_to_end_ends_what_it_runs():
    """And does not go on with the next."""
    code = "from pipeline.evaluation import calls\nfor _ in 'ab': calls.call('http.server', '0')"
    study = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    for line in study.stdout:
        if line.startswith("Serving"):
            break
    [child] = psutil.Process(study.pid).children()
    study.terminate()
    assert study.wait(60) == 143
    assert not child.is_running()
    assert study.stdout.read().count("$ python") == 0
