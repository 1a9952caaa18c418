"""A sweep over config keys: what is tried, what is made only once, what is refused; without training."""

import json
import os
from pathlib import Path

import pytest

import fake_stages
from pipeline import cli
from pipeline import run as frame
from pipeline.commands import status
from pipeline.config.sweep import load_sweep
from pipeline.errors import UserError
from pipeline.evaluation import calls, sweep
from pipeline.handoff import artifacts

EVAL = "prompts: {path: p.jsonl}\nvalidation_prompts: {path: p.jsonl}\nreference: answer\n"


@pytest.fixture(autouse=True)
def made(tmp_path, monkeypatch):
    """Command lines that are run, with stages that publish a few bytes and evaluations that grade kl_coef."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("WANDB_RUN_GROUP", "")
    monkeypatch.delenv("WANDB_RUN_GROUP")
    fake_stages.write_recipe(tmp_path, eval=EVAL)
    fake_stages.make_base(tmp_path)
    Path("p.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    done: list[str] = []

    def call(module: str, *words: str) -> None:
        run = Path(words[words.index("--run") + 1])
        if module == "pipeline.evaluation":
            assert words[words.index("--split") + 1] == "validation"
            done.append(f"eval {run.name}")
            config = artifacts.read_manifest(run / "ppo").config
            result = {"models": {"ppo": {"token_f1": -abs(config["kl_coef"] - 0.1)}}}
            (run / "eval").mkdir(exist_ok=True)
            (run / "eval/validation.json").write_text(json.dumps(result))
            return
        stage = module.removeprefix("stages.")
        asked = cli.request(stage, cli.parser(stage).parse_args(words))
        config = cli.configured(stage, asked)
        frame.started(config, asked.of(stage), asked.recipe)
        if sweep.is_published(config.run / stage):
            return
        done.append(f"{stage} {run.name}")
        if stage == "ppo" and config.kl_coef == 9:
            raise calls.StepFailed("python -m stages.ppo")
        content = json.dumps(config.model_dump(mode="json", exclude={"run", "borrow"}))
        fake_stages.train(config, content.encode())

    monkeypatch.setattr(calls, "call", call)
    return done


def write(text: str, name: str = "s.yaml") -> Path:
    Path(name).write_text(text)
    return Path(name)


def run(text: str, *words: str, code: int = 0) -> dict:
    with pytest.raises(SystemExit) as ended:
        sweep.main(["--sweep", str(write(text)), *words])
    assert ended.value.code == code
    return json.loads(Path("checkpoints/tiny-s.json").read_text())


GRID = "parameters: {ppo.kl_coef: [0.5, 0.1, 0.05], ppo.lam: 0.9}\n"


def test_what_is_no_number_is_never_the_best(monkeypatch):
    values = iter([float("nan"), -1.0, -0.5])
    monkeypatch.setattr(sweep.Sweep, "_value", lambda *_: next(values))
    assert run(GRID)["best"] == "tiny-s-3"
    page = Path("checkpoints/tiny-s.html").read_text()
    assert page.index("tiny-s-3<") < page.index("tiny-s-2<") < page.index("tiny-s-1<")


def test_a_grid_is_tried_on_one_sft_and_reward_model_and_the_best_is_found(made):
    found = run(GRID)
    assert made[:2] == ["sft tiny", "rm tiny"]  # once, and in the run itself
    assert made[2:] == [f"{what} tiny-s-{n}" for n in (1, 2, 3) for what in ("ppo", "eval")]
    assert found["best"] == "tiny-s-2"
    assert [row["trial"] for row in found["rows"]] == [
        {"ppo.kl_coef": kl, "ppo.lam": 0.9} for kl in (0.5, 0.1, 0.05)
    ]
    manifest = artifacts.read(Path("checkpoints/tiny-s-1/ppo"))
    assert (manifest.config["kl_coef"], manifest.config["lam"]) == (0.5, 0.9)
    assert manifest.parents["rm"].path == "checkpoints/tiny/rm"
    assert os.environ["WANDB_RUN_GROUP"] == "tiny-s"
    page = Path("checkpoints/tiny-s.html").read_text()
    assert page.index("tiny-s-2<") < page.index("tiny-s-3<") < page.index("tiny-s-1<")
    assert "make eval RUN=tiny-s-2" in page and "image/svg+xml" in page


def test_a_killed_sweep_goes_on(made, monkeypatch):
    go_on = calls.call

    def killed(module, *words):
        if "checkpoints/tiny-s-2" in words:
            raise KeyboardInterrupt
        go_on(module, *words)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(calls, "call", killed)
        sweep.main(["--sweep", str(write(GRID))])
    before = list(made)
    assert len(run(GRID)["rows"]) == 3
    trained = [what for what in made[len(before) :] if not what.startswith("eval")]
    assert trained == ["ppo tiny-s-2", "ppo tiny-s-3"]


def test_a_reward_model_that_two_trials_share_is_trained_once(made):
    text = "parameters: {rm.epochs: [1.0, 2.0], ppo.kl_coef: [0.1, 0.2]}\n"
    run(text)
    trained = [what for what in made if not what.startswith("eval")]
    ppo = [f"ppo tiny-s-{n}" for n in (1, 2, 3, 4)]
    assert trained == ["sft tiny", "rm tiny-s-1", *ppo[:2], "rm tiny-s-3", *ppo[2:]]
    taken = artifacts.read(Path("checkpoints/tiny-s-2/rm"))
    assert taken.config["epochs"] == 1.0
    assert artifacts.read(Path("checkpoints/tiny-s-4/rm")).config["epochs"] == 2.0
    assert (
        artifacts.read(Path("checkpoints/tiny-s-2/ppo")).parents["sft"].path
        == "checkpoints/tiny/sft"
    )


def test_a_trial_is_a_run_as_any_other(made, capsys):
    """With what it borrows, and what it took of another trial, it is up to date."""
    run("parameters: {rm.epochs: [1.0, 2.0], ppo.kl_coef: [0.1, 0.2]}\n")
    capsys.readouterr()
    status.main(["--run", "checkpoints/tiny-s-2"])
    states = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    assert ["sft", "borrowed", "from"] in states
    assert ["rm", "up", "to"] in states and ["ppo", "up", "to"] in states


def test_a_stage_s_own_number_needs_neither_later_stages_nor_an_evaluation(made):
    text = "metric: {name: rm.loss, goal: minimize}\nparameters: {rm.epochs: [1.0, 2.0]}\n"
    found = run(text)
    assert made == ["sft tiny", "rm tiny-s-1", "rm tiny-s-2"]
    assert [row["value"] for row in found["rows"]] == [1.0, 1.0]


def test_a_trial_that_fails_does_not_end_the_sweep(made):
    found = run("parameters: {ppo.kl_coef: [9, 0.1]}\n", code=1)
    assert "failed" in found["rows"][0] and found["best"] == "tiny-s-2"
    assert "failed: python -m stages.ppo" in Path("checkpoints/tiny-s.html").read_text()


def test_random_draws_are_within_bounds_distinct_and_the_same_again():
    text = """
method: random
run_cap: 20
parameters:
  ppo: {parameters: {kl_coef: {min: 0.001, max: 0.1, distribution: log_uniform_values}}}
  ppo.minibatches: {values: [2, 4]}
  ppo.iterations: {min: 3, max: 5}
  ppo.lam: {min: 0.5, max: 1}
"""
    trials = load_sweep(write(text)).trials()
    assert trials == load_sweep(write(text)).trials()
    assert len(trials) == 20 and all(trials.count(trial) == 1 for trial in trials)
    assert all(0.001 <= trial["ppo.kl_coef"] <= 0.1 for trial in trials)
    assert sum(trial["ppo.kl_coef"] < 0.01 for trial in trials) in range(
        4, 17
    )  # even in its logarithm
    assert {trial["ppo.iterations"] for trial in trials} == {3, 4, 5}
    few = load_sweep(write("method: random\nrun_cap: 9\nparameters: {seed: [1, 2]}\n")).trials()
    assert len(few) == 2


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("parameters: {ppo.kl_cof: [1]}", "s.yaml: ppo.kl_cof=1: no key `kl_cof` in ppo (did you mean `kl_coef`?)"),
        ("parameters: {ppo.kl_coef: [high]}", "kl_coef: input should be a valid number, not \"high\""),
        ("parameters: {ppo.alarms.kl_per_tokn: [1]}", "alarms.kl_per_tokn: unknown key (did you mean `kl_per_token`?)"),
        ("parameters: {ppo.kl_coef: {min: 0, max: 1}}", "a grid needs values"),
        ("method: random\nparameters: {ppo.kl_coef: [1]}", "run_cap: say how many"),
        ("method: bayes\nparameters: {ppo.kl_coef: [1]}", "s.yaml: method: input should be 'grid' or 'random', not \"bayes\""),
        ("program: train.py\nparameters: {ppo.kl_coef: [1]}", "s.yaml: program: unknown key"),
        ("parameters: {ppo.kl_coef: {values: [1], min: 0, max: 1}}", "give values, value, or min and max"),
        ("parameters: {ppo.kl_coef: []}", "at least 1 item"),
        ("parameters: {}", "parameters: nothing to try"),
        ("parameters: {eval.seed: [1, 2]}", "eval.seed: trials are measured alike"),
        ("metric: {name: modls.ppo.judge}\nparameters: {ppo.kl_coef: [1]}", "no such number (did you mean `models`?)"),
        ("metric: {name: sft.loss}\nparameters: {ppo.kl_coef: [1]}", "no swept key touches it"),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_anything_runs(made, text, told):
    with pytest.raises(UserError) as error:
        sweep.main(["--sweep", str(write(text + "\n"))])
    assert told in str(error.value) and "s.yaml" in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert made == []


def test_a_metric_that_nobody_measured_names_those_that_were(made):
    text = "metric: {name: models.ppo.token_f2}\nparameters: {ppo.kl_coef: [0.1]}\n"
    with pytest.raises(
        UserError, match=r"no number models\.ppo\.token_f2 \(did you mean `models.ppo.token_f1`"
    ):
        sweep.main(["--sweep", str(write(text))])


def test_a_file_that_changed_since_is_refused_unless_forced(made):
    run(GRID)
    with pytest.raises(
        UserError, match=r"s\.yaml: changed since checkpoints/tiny-s\.json was begun"
    ):
        sweep.main(["--sweep", str(write(GRID.replace("0.05", "0.2")))])
    with pytest.raises(UserError, match="settings"):
        sweep.main(["--sweep", str(write(GRID)), "ppo.gamma=0.9"])
    assert len(run(GRID)["rows"]) == 3  # as it was
    assert len(run("parameters: {ppo.kl_coef: [0.5]}\n", "--force")["rows"]) == 1


def test_without_validation_prompts_nothing_can_be_chosen(made):
    Path("configs/tiny/eval.yaml").write_text("prompts: {path: p.jsonl}\n")
    with pytest.raises(UserError, match="validation_prompts: a sweep chooses on them"):
        sweep.main(["--sweep", str(write(GRID))])
