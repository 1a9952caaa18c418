"""Rounds of collecting rankings: whom they ask, what they learn from, where they wait, what they tell."""

import json
import math
from itertools import combinations
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

import fake_stages
import small_run
import tiny_models
from pipeline.config.ppo import PPOConfig
from pipeline.config.schema import Lora
from pipeline.data.template import encode_responses
from pipeline.errors import UserError
from pipeline.evaluation import calls as steps
from pipeline.evaluation import rounds
from pipeline.evaluation.ranked import rank_by
from pipeline.evaluation.record import load_record
from pipeline.evaluation.report import render
from pipeline.feedback import comparisons
from pipeline.handoff import artifacts
from pipeline.models.forward import score_sequences
from pipeline.ppo.build import build_ppo
from stages import rm
from test_comparisons import LABELER, config, read

# --- the reward model's stage ---------------------------------------------------------------------


@pytest.fixture
def labeler(tmp_path, monkeypatch) -> str:
    (tmp_path / "own_labeler.py").write_text(LABELER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "own_labeler"


def asking(root: Path, labeler: str, ranked: list[int], **sampling):
    """A config that knows rankings of some prompts, and samples more."""
    known = [
        {"prompt": small_run.PROMPTS[i]["prompt"], "responses": ["w1", "w2 w3"], "ranks": [1, 2]}
        for i in ranked
    ]
    known[-1]["ranks"] = [1, 2] if len(known) == 1 else [1, 1]
    path = small_run.write_jsonl(root / "known.jsonl", known)
    own = config(root, labeler).sampling
    assert own is not None
    keys = own.model_dump(exclude_unset=True)
    return config(root, labeler, data={"path": str(path)}, sampling={**keys, **sampling})


def texts(rows: list[dict]) -> set[str]:
    return {row["prompt"][-1]["content"] for row in rows}


def test_new_rankings_are_of_prompts_that_nobody_ranked_and_are_learnt_with_the_others(
    tmp_path, labeler, capsys
):
    small_run.make_run(tmp_path, ("base", "sft"))
    known = [0, 2, 4, 6, 8]
    # the last, whose responses tie, is not learnt from, nor asked again
    asked = asking(tmp_path, labeler, known, count=7)
    folder = rm.run(asked)
    assert texts(read(folder / "rankings.jsonl")) == {
        p["prompt"] for i, p in enumerate(small_run.PROMPTS) if i not in known
    }
    manifest = artifacts.read(folder, "rm")
    held_out = {row["prompt"] for row in read(folder / "held_out.jsonl")}
    assert manifest.metrics["prompts"] + len(held_out) == 11
    with pytest.raises(UserError, match=r"sampling\.count 8: 7 of 12 prompts have no ranking yet"):
        rm.run(asking(tmp_path, labeler, known, count=8).model_copy(update={"seed": 2}))


def test_another_model_is_asked_and_is_a_parent(tmp_path, labeler):
    run = small_run.make_run(tmp_path, ("base", "sft"))
    other = small_run.make_run(tmp_path / "other", ("base", "sft", "rm", "ppo"), first_seed=7)
    folder = rm.run(asking(tmp_path, labeler, [0], count=4, model=str(other / "ppo")))
    parents = artifacts.read(folder, "rm").parents
    assert str(other / "ppo") in {parent.path for parent in parents.values()}
    assert any(parent.path == str(run / "sft") for parent in parents.values())
    # seeds and prompts alike, the SFT model answers otherwise
    other_answers = read(folder / "rankings.jsonl")
    own = rm.run(
        asking(tmp_path, labeler, [0], count=4).model_copy(
            update={"run": tmp_path / "b", "borrow": run}
        )
    )
    own_answers = read(own / "rankings.jsonl")
    assert texts(own_answers) == texts(other_answers)
    assert own_answers != other_answers


def test_prompts_are_chosen_where_the_reward_model_can_least_tell(tmp_path, labeler, monkeypatch):
    run = small_run.make_run(tmp_path, ("base", "sft", "rm"))
    pools = []
    whole = comparisons._least_sure
    monkeypatch.setattr(
        comparisons, "_least_sure", lambda a, rows: pools.append(rows) or whole(a, rows)
    )
    asked = asking(tmp_path, labeler, [0], count=2, unsure=str(run / "rm"))
    folder = rm.run(asked.model_copy(update={"run": tmp_path / "b", "borrow": run}))
    [pool] = pools
    assert len(pool) == 8  # four times as many
    model, tokenizer = tiny_models.reward(2), tiny_models.tokenizer()
    worth = []
    for row in pool:
        prompt, responses = encode_responses(tokenizer, row["prompt"], row["responses"])
        scores = score_sequences(model, [prompt] * len(responses), responses, 0)
        own = list(dict(zip(row["responses"], scores, strict=True)).values())
        p = [torch.sigmoid(torch.tensor(a - b)).item() for a, b in combinations(own, 2)]
        worth.append(sum(x * (1 - x) for x in p) / max(len(p), 1))
    best = sorted(range(8), key=worth.__getitem__)[-2:]
    assert texts(read(folder / "rankings.jsonl")) == texts([pool[i] for i in best])
    assert math.isclose(max(worth), max(worth[i] for i in best))


@pytest.mark.parametrize(
    ("sampling", "told"),
    [
        ({"unsure": "x/y"}, "give a count"),
        ({"model": "ppo"}, "later stages of this run"),
        ({"count": 2, "unsure": "rm"}, "later stages of this run"),
    ],
)
def test_what_cannot_be_sampled_is_told(tmp_path, sampling, told):
    with pytest.raises(ValidationError, match=told):
        asking(
            tmp_path, "own_labeler", [0], **{"count": 4, **sampling} if told[0] != "g" else sampling
        )


def test_both_data_and_sampling_want_a_count(tmp_path):
    with pytest.raises(ValidationError, match=r"or, for both, sampling\.count"):
        asking(tmp_path, "own_labeler", [0])


# --- PPO from another policy ----------------------------------------------------------------------


def test_ppo_goes_on_from_a_policy_and_keeps_the_sft_model_as_its_reference(tmp_path):
    run = small_run.make_run(tmp_path, ("base", "sft", "rm", "ppo"))
    keys = {"batch_size": 4, "minibatches": 1, "max_new_tokens": 4, "gates": "off"}
    ppo = build_ppo(PPOConfig(policy=str(run / "ppo"), **keys), run / "sft", run / "rm")
    same = build_ppo(PPOConfig(**keys), run / "sft", run / "rm")
    queries = [row["prompt"] for row in small_run.PROMPTS[:4]]
    moved, still = (p.rollout(p.queries(queries)) for p in (ppo, same))
    gap = (moved.old_logprobs - moved.ref_logprobs)[moved.response_mask].abs().max()
    assert gap > 0.01
    assert torch.allclose(still.old_logprobs, still.ref_logprobs, atol=1e-5)
    for own, path in ((ppo.networks.policy, run / "ppo"), (ppo.reference, run / "sft")):
        kept = tiny_models.policy({"ppo": 3, "sft": 1}[path.name])
        assert torch.equal(next(own.parameters()), next(kept.parameters()))
    with pytest.raises(ValidationError, match="leave out policy or lora"):
        PPOConfig(policy=str(run / "ppo"), lora=Lora(), **keys)


# --- make round -----------------------------------------------------------------------------------

RM = "sampling: {prompts: {path: p.jsonl, limit: 4}, count: 9}\ndata: {path: [own.jsonl], columns: {chosen: better}}\n"


class Commands:
    """Stands for the stages: notes their settings, and publishes what a round looks at."""

    def __init__(self, monkeypatch):
        self.words: list[tuple] = []
        self.waiting = False
        monkeypatch.setattr(steps, "ensure_base", lambda recipe: None)
        monkeypatch.setattr(steps, "stage", self.stage)
        monkeypatch.setattr(steps, "evaluation", self.evaluation)

    def stage(self, name, recipe, run, *settings, borrow=None, config=None):
        self.words.append((name, run.name, settings, borrow and borrow.name))
        if name == "rm" and self.waiting:
            small_run.write_jsonl(run / "to_rank.jsonl", [{}])
            raise steps.StepFailed("python -m stages.rm")
        rows = [{"prompt": f"{run.name} {i}"} for i in range(3)]
        small_run.write_jsonl(run / name / "rankings.jsonl", rows)
        (run / name / "manifest.json").write_text(json.dumps({"metrics": {"accuracy": 0.7}}))

    def evaluation(self, recipe, run, split, *settings):
        self.words.append(("eval", run.name, (split, *settings), None))
        grade = float(run.name[-1])
        answers = [
            {"prompt": p, "answers": {"ppo": {"judge": judge}}}
            for p, judge in (("a", grade), ("b", 5.0), ("c", -grade), ("d", grade))
        ]
        small_run.write_jsonl(run / "eval" / f"{split}_samples.jsonl", answers)
        result = {
            "models": {"ppo": {"judge": grade}},
            "comparisons": {"ppo_vs_sft": {"rate": 0.6}},
            "kl": {"ppo_vs_sft": 1.5},
        }
        (run / "eval" / f"{split}.json").write_text(json.dumps(result))


@pytest.fixture
def commands(tmp_path, monkeypatch) -> Commands:
    monkeypatch.chdir(tmp_path)
    fake_stages.write_recipe(
        tmp_path, rm=RM, eval="prompts: {path: p.jsonl}\nvalidation_prompts: {path: v.jsonl}\n"
    )
    return Commands(monkeypatch)


def test_each_round_asks_the_newest_policy_and_learns_from_all_rankings(commands, capsys):
    words = "--run checkpoints/r --from checkpoints/a --unsure --start policy"
    Path("checkpoints/a/sft").mkdir(parents=True)
    Path("checkpoints/a/sft/manifest.json").write_text("{}")
    rounds.main([*words.split(), "seed=4"])
    assert commands.words == [
        (
            "rm",
            "r-round1",
            ("seed=4", "rm.sampling.prompts.limit=null", 'rm.data.path=["own.jsonl"]'),
            "a",
        ),
        ("ppo", "r-round1", ("seed=4",), "a"),
        ("eval", "r-round1", ("validation",), None),
    ]
    commands.words.clear()
    rounds.main([*words.split(), "--to", "3", "seed=4"])
    assert [word[:2] for word in commands.words] == [
        (step, f"r-round{n}") for n in (2, 3) for step in ("rm", "ppo", "eval")
    ]
    asked = dict(word.split("=", 1) for word in commands.words[3][2])
    assert asked["rm.sampling.model"] == "checkpoints/r-round2/ppo"
    assert asked["rm.sampling.unsure"] == "checkpoints/r-round2/rm"
    assert json.loads(asked["rm.data.path"]) == [
        "own.jsonl",
        *(
            {"path": f"checkpoints/r-round{n}/rm/rankings.jsonl", "columns": {}, "only": {}}
            for n in (1, 2)
        ),
    ]
    assert commands.words[4][2] == ("seed=4", "ppo.policy=checkpoints/r-round2/ppo")
    told = json.loads(Path("checkpoints/r/rounds/rounds.json").read_text())
    rows = told["rows"]
    assert [row["rankings"] for row in rows] == [3, 6, 9]
    # of four prompts a and d get better, b stays, c gets worse
    assert [row["wins_before"] for row in rows] == [None, 0.625, 0.625]
    assert "| 3 | 9 | 0.700 | 0.600 | 0.625 | 3.000 | 1.500 |" in capsys.readouterr().out


@pytest.mark.parametrize("evaluated", [True, False])
def test_an_evaluation_that_is_there_is_not_replaced_by_a_rounds(commands, evaluated):
    for name in ("sft", "ppo"):
        Path(f"checkpoints/r0/{name}").mkdir(parents=True)
        Path(f"checkpoints/r0/{name}/manifest.json").write_text("{}")
    if evaluated:
        commands.evaluation(None, Path("checkpoints/r0"), "validation")
        commands.words.clear()
    rounds.main("--run checkpoints/r0 --set eval.n=2".split())
    own = [word[1] for word in commands.words if word[0] == "eval"]
    assert own == [*(() if evaluated else ["r0"]), "r0-round1"]


def test_a_round_without_labels_waits_and_goes_on(commands, tmp_path):
    fake_stages.write_recipe(
        tmp_path, rm="sampling: {prompts: {path: p.jsonl}}\n", eval="prompts: {path: p.jsonl}\n"
    )
    Path("checkpoints/r/sft").mkdir(parents=True)
    Path("checkpoints/r/sft/manifest.json").write_text("{}")
    commands.waiting = True
    with pytest.raises(
        UserError, match=r"waits for people: make label RUN=r-round1, .*to_rank\.jsonl"
    ):
        rounds.main(["--run", "checkpoints/r", "--prompts", "7"])
    assert commands.words == [("rm", "r-round1", ("rm.sampling.count=7",), "r")]
    commands.waiting = False
    rounds.main(["--run", "checkpoints/r"])
    assert [word[:2] for word in commands.words[1:]] == [
        ("rm", "r-round1"),
        ("ppo", "r-round1"),
        ("eval", "r-round1"),
    ]


def test_what_people_said_on_the_page_ends_the_wait(commands, tmp_path, monkeypatch):
    monkeypatch.setattr(rounds, "Store", Path)
    fake_stages.write_recipe(
        tmp_path, rm="sampling: {prompts: {path: p.jsonl}}\n", eval="prompts: {path: p.jsonl}\n"
    )
    told = [(2, 1), (1, 0)]

    def fill(store, path):
        found = told.pop(0)
        commands.waiting = found[1] > 0
        return found

    monkeypatch.setattr(rounds, "fill", fill)
    commands.waiting = True
    Path("checkpoints/r-round1").mkdir(parents=True)
    Path("checkpoints/r-round1/labels.db").touch()
    with pytest.raises(UserError, match="waits for people"):
        rounds.main(["--run", "checkpoints/r"])
    rounds.main(["--run", "checkpoints/r"])
    assert [word[0] for word in commands.words] == ["sft", "rm", "rm", "rm", "ppo", "eval"]


def test_a_judge_ranks_by_wins_what_nobody_has_ranked(tmp_path):
    asked = []

    def longer(contest):
        """Likes the longer one; says nothing of the word w9."""
        asked.extend(contest.texts())
        pairs = [(a, b) for _, a, b in contest.texts()]
        told = [
            None if "w9" in (a, b) else (len(a) > len(b)) + (len(a) == len(b)) / 2 for a, b in pairs
        ]
        return told, {}

    rows = [
        {"prompt": [{"role": "user", "content": "w1"}], "responses": ["a", "ccc", "bb", "dd"]},
        {"prompt": [{"role": "user", "content": "w2"}], "responses": ["a", "b"], "ranks": [2, 1]},
        {
            "prompt": [{"role": "user", "content": "w3"}],
            "responses": ["a", "w9", "ccc"],
            "ended": [True, True, False],
        },
    ]
    path = small_run.write_jsonl(tmp_path / "to_rank.jsonl", rows)
    assert rank_by(longer, path) == 2
    assert [row["ranks"] for row in read(path)] == [[3, 1, 2, 2], [2, 1], [3, 2, 1]]
    assert len(asked) == 6 + 3
    assert rank_by(longer, path) == 0


def test_what_a_person_saves_while_a_judge_ranks_is_not_overwritten(tmp_path):
    row = {"prompt": [{"role": "user", "content": "w1"}], "responses": ["a", "b"]}
    path = small_run.write_jsonl(tmp_path / "to_rank.jsonl", [row])

    def slow(contest):
        small_run.write_jsonl(path, [row | {"ranks": [2, 1]}])
        return [1.0], {}

    with pytest.raises(UserError, match=r"to_rank\.jsonl: changed meanwhile"):
        rank_by(slow, path)
    assert read(path)[0]["ranks"] == [2, 1] and list(tmp_path.iterdir()) == [path]


def test_a_round_by_a_judge_of_the_recipe(commands, tmp_path, monkeypatch):
    fake_stages.write_recipe(
        tmp_path,
        rm="sampling: {prompts: {path: p.jsonl}, labeler: some.labeler, count: 4}\n",
        eval="prompts: {path: p.jsonl}\njudges: [{reward: a/b, name: theirs}]\n",
    )
    monkeypatch.setattr("pipeline.evaluation.panel.panel", lambda config: {"theirs": "it"})
    ranked = []

    def rank(judging, path):
        ranked.append((judging, path.name))
        commands.waiting = False
        return 4

    monkeypatch.setattr("pipeline.evaluation.ranked.rank_by", rank)
    commands.waiting = True
    rounds.main("--run checkpoints/r --judge theirs".split())
    assert ranked == [("it", "to_rank.jsonl")]
    assert [word[:2] for word in commands.words] == [
        (step, "r-round1" if step != "sft" else "r") for step in ("sft", "rm", "rm", "ppo", "eval")
    ]
    assert "rm.sampling.labeler=null" in commands.words[1][2]
    with pytest.raises(UserError, match=r"--judge ours: .*eval\.yaml has no such judge \(theirs\)"):
        rounds.main("--run checkpoints/r --judge ours".split())


def test_a_recipe_that_samples_nothing_is_told_at_once(commands, tmp_path):
    fake_stages.write_recipe(tmp_path, eval="prompts: {path: p.jsonl}\n")
    with pytest.raises(UserError, match=r"rm\.yaml: sampling: a round samples what is ranked"):
        rounds.main(["--run", "checkpoints/r"])
    assert not commands.words


def test_the_report_shows_the_rounds(tmp_path):
    run = small_run.make_run(tmp_path)
    row = dict.fromkeys(rounds.COLUMNS, 0.125) | {"round": 1, "run": "x", "rankings": 33}
    (run / "rounds").mkdir()
    (run / "rounds" / "rounds.json").write_text(json.dumps({"split": "validation", "rows": [row]}))
    page = render(load_record(run))
    assert '<h2 id="rounds">Rounds</h2>' in page and ">33</td>" in page


@pytest.mark.slow
def test_two_rounds_of_the_real_stages(tmp_path, labeler, monkeypatch, capfd):
    """Killed in the second one's PPO, the same command goes on."""
    monkeypatch.setenv("RLHF_CHECKPOINTS", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run = small_run.make_run(tmp_path, ("base",))
    own = config(tmp_path, labeler)
    prompts = {"path": str(tmp_path / "prompts.jsonl")}
    files = {
        "sft": {"model": str(tmp_path / "base"), "data": {**prompts, "columns": {"completion": "answer"}}, "max_steps": 1, "validation_fraction": 0.2},
        "rm": own.model_dump(mode="json", exclude_unset=True, include={"sampling", "demonstrations", "max_steps", "batch_size", "validation_fraction"}),
        "ppo": {"prompts": prompts, "batch_size": 4, "minibatches": 1, "max_new_tokens": 4, "iterations": 2, "gates": "off"},
        "eval": {"prompts": prompts, "max_new_tokens": 4, "candidates": 1},
    }  # fmt: skip
    for name, keys in files.items():
        (tmp_path / "recipe").mkdir(exist_ok=True)
        (tmp_path / "recipe" / f"{name}.yaml").write_text(json.dumps(keys))
    words = ["--recipe", str(tmp_path / "recipe"), "--run", str(run), "--prompts", "5"]
    rounds.main(words)
    monkeypatch.setenv("PIPELINE_FAULT", "ppo:update:2:kill")
    with pytest.raises(steps.StepFailed):
        rounds.main(words)
    monkeypatch.delenv("PIPELINE_FAULT")
    rounds.main(words)
    rows = json.loads((run / "rounds" / "rounds.json").read_text())["rows"]
    assert [(row["round"], row["rankings"]) for row in rows] == [(1, 5), (2, 10)]
    first, second = (
        artifacts.read(tmp_path / f"run-round{n}" / "rm", "rm").metrics["prompts"] for n in (1, 2)
    )
    assert second > first
    capfd.readouterr()
