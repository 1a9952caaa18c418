"""PPO's rivals on a run of real stages at tiny size: each is made once, kept, and judged like the others."""

import json
import statistics

import pytest
import torch

import small_run
import tiny_models
from pipeline.config.ppo import PPOConfig
from pipeline.config.schema import Data, Lora, RMConfig, SFTConfig
from pipeline.data.rankings import load_rankings
from pipeline.errors import UserError
from pipeline.evaluation import compare, dpo, report
from pipeline.evaluation.metrics import kl_of_best_of_n
from pipeline.handoff.found import find_stages
from pipeline.models.loading import load_policy, load_tokenizer
from stages import ppo, rm, sft

ROWS = [{"prompt": f"w{i} w{j}", "completion": f"w{i}"} for i in range(2, 8) for j in range(9, 13)]
RANKED = [
    {"prompt": r["prompt"], "responses": ["w1", r["completion"], "w20 w20"], "ranks": [1, 2, 2]}
    for r in ROWS
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of all stages, and a recipe to judge it by."""
    root = tmp_path_factory.mktemp("compare")
    tiny_models.policy(0, initializer_range=0.1).save_pretrained(root / "base")
    tiny_models.tokenizer().save_pretrained(root / "base")
    data = Data(path=str(small_run.write_jsonl(root / "rows.jsonl", ROWS)))
    ranked = Data(path=str(small_run.write_jsonl(root / "ranked.jsonl", RANKED)))
    run, one = root / "run", {"wandb": {"mode": "disabled"}, "threads": 1}
    shared = {"run": run, "learning_rate": 1e-2, "max_length": 32, **one}
    model = {"model": str(root / "base"), "data": data, "batch_size": 12, "sample_tokens": 4}
    sft.run(SFTConfig(**model, epochs=8, validation_fraction=0.2, **shared))
    rm.run(RMConfig(data=ranked, epochs=4, batch_size=6, **shared))
    ppo.run(PPOConfig(
        run=run, prompts=data, batch_size=8, minibatches=2, iterations=2, max_new_tokens=4,
        learning_rate=1e-3, gates="off", **one,
    ))  # fmt: skip
    recipe = root / "recipe"
    recipe.mkdir()
    (recipe / "sft.yaml").write_text("model: none\n")
    (recipe / "eval.yaml").write_text(
        f"prompts: {{path: {data.path}}}\nvalidation_prompts: {{path: {data.path}, limit: 8}}\n"
        "judge: small_judge\nn: 16\nmax_new_tokens: 4\nthreads: 1\n"
    )
    return run


def compared(run, monkeypatch, *words: str) -> dict:
    small_run.install(monkeypatch, small_run.judge_module())
    recipe = run.parent / "recipe"
    compare.main(["--recipe", str(recipe), "--run", str(run), "--betas", "0.1", "1", *words])
    return json.loads((run / "compare" / "compare.json").read_text())


def test_every_rival_is_judged_and_shown_and_nothing_is_made_twice(run, monkeypatch, capsys):
    found = compared(run, monkeypatch)
    rows = found["rows"]
    dpo_name = next(name for name in rows if name.startswith("DPO"))
    assert list(rows) == [
        *("SFT", "PPO", "best of 4", "SFT on the best-ranked", "RLOO", dpo_name)
    ]  # fmt: skip
    assert rows["SFT"]["wins"] == 0.5 and rows["SFT"]["kl"] == pytest.approx(0, abs=1e-5)
    assert rows["best of 4"]["kl"] == pytest.approx(kl_of_best_of_n(4))
    assert rows["best of 4"]["rm_score"] > rows["SFT"]["rm_score"]
    assert rows[dpo_name]["kl"] > 0 and rows["RLOO"]["minutes"] >= rows["best of 4"]["minutes"]
    tried = found["dpo_on_validation"]
    assert dpo_name == f"DPO, beta {max(tried, key=tried.get)}" and len(tried) == 2
    page = report.write_report(run).read_text(encoding="utf-8")
    assert "PPO and its rivals" in page and "SFT on the best-ranked" in page
    models = [run.parent / f"run-compare-{name}" for name in ("best/sft", "rloo/ppo")]
    models += [run / "compare" / f"dpo-{beta}" for beta in ("0.1", "1")]
    before = [(path / "model.safetensors").stat().st_mtime_ns for path in models]
    rloo = json.loads((models[1] / "manifest.json").read_text())["config"]
    assert rloo["advantages"] == "rloo" and rloo["kl_coef"] == PPOConfig().kl_coef
    capsys.readouterr()
    assert compared(run, monkeypatch) == found and "up to date" in capsys.readouterr().out
    other = compared(run, monkeypatch, "--n", "2")  # judged again, and nothing trained again
    assert "best of 2" in other["rows"] and other["rows"]["PPO"] == rows["PPO"]
    held_out_models_judge_too(run, monkeypatch, rows)
    assert before == [(path / "model.safetensors").stat().st_mtime_ns for path in models]


def held_out_models_judge_too(run, monkeypatch, before: dict) -> None:
    """One with another tokenizer's ids, which only ever sees text; and never the one that was optimised."""
    other = run.parent / "other" / "rm"
    tiny_models.reward(7).save_pretrained(other)
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}w9 {{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(other)
    rows = compared(run, monkeypatch, "--judge-models", str(other))["rows"]
    for name, row in rows.items():
        assert 0 <= row["by other"] <= 1 and row["by other_low"] < row["by other_high"]
        assert {k: v for k, v in row.items() if not k.startswith("by ")} == before[name]
    assert rows["SFT"]["by other"] == rows["SFT"]["by other_even"] == 0.5
    head = (run / "compare" / "compare.md").read_text().splitlines()[2]
    assert "| by other | by other, at equal length | KL to SFT |" in head
    with pytest.raises(UserError, match="optimised this very model"):
        compared(run, monkeypatch, "--judge-models", str(run / "rm"))
    with pytest.raises(UserError, match="nowhere"):
        compared(run, monkeypatch, "--judge-models", str(run / "nowhere"))


def test_the_best_ranked_are_what_people_put_first(run, monkeypatch):
    compared(run, monkeypatch)
    rows = [json.loads(line) for line in (run / "compare" / "best.jsonl").open()]
    held_out = [json.loads(line) for line in (run / "rm" / "held_out.jsonl").open()]
    assert {row["messages"][-1]["content"] for row in rows} == {"w1"}
    assert len(rows) == len(RANKED) - len(held_out)  # what the reward model was trained on


def test_the_reward_model_is_published_with_its_card(run):
    card = json.loads((run / "rm" / "card.json").read_text())
    manifest = json.loads((run / "rm" / "manifest.json").read_text())
    for key in ("accuracy", "pairs", "demonstration_mean", "padding_gap"):
        assert card[key] == pytest.approx(manifest["metrics"][key])
    assert "card.json" in manifest["files"]


def test_a_run_without_ppo_is_refused(tmp_path, run):
    recipe = run.parent / "recipe"
    with pytest.raises(UserError, match="needs ppo, rm, sft first"):
        compare.main(["--recipe", str(recipe), "--run", str(tmp_path), "eval.judge=null"])


def test_medians_take_a_policy_as_one_whatever_its_beta():
    tables = [{"PPO": {"wins": x}, f"DPO, beta {x}": {"wins": 1 - x}} for x in (0.1, 0.3, 0.4)]
    found = compare.medians(tables)
    assert found == {"PPO": {"wins": 0.3}, "DPO": {"wins": 0.7}}
    assert "| DPO | 0.700 |" in compare.markdown(found, "x").splitlines()


def test_prompts_weigh_the_same_however_many_pairs_they_have():
    rows = [
        {"prompt": "w1", "responses": ["w2", "w3"], "ranks": [1, 2]},
        {"prompt": "w4", "responses": ["w5", "w6", "w7", "w8"], "ranks": [1, 2, 3, 4]},
        {"prompt": "w10", "responses": ["w1", "w2 w2 w2 w2 w2 w2"], "ranks": [2, 1]},
    ]
    rankings = load_rankings(rows)
    tokenizer = tiny_models.tokenizer()
    found = dpo.pairs(rankings, tokenizer, max_length=7, seed=1)
    assert len(found) == 2 * dpo.PAIRS  # the last has a pair that is too long
    first, second = found[: dpo.PAIRS], found[dpo.PAIRS :]
    assert all(row == first[0] for row in first)
    assert len({(str(r["chosen_ids"]), str(r["rejected_ids"])) for r in second}) == dpo.PAIRS
    said = [tokenizer.decode(first[0][key]) for key in ("prompt_ids", "chosen_ids", "rejected_ids")]
    assert said == ["<user> w1 <bot>", "w2 <end>", "w3 <end>"]


@pytest.mark.parametrize("lora", [None, Lora(r=4)])
def test_the_loss_of_dpo_is_the_papers(run, tmp_path, monkeypatch, lora):
    """Trained for a step, and held against the formula on models that run each response alone."""
    stages = find_stages(run)
    stages["ppo"].manifest["config"]["lora"] = lora and lora.model_dump()
    stages["rm"].manifest["config"] |= {"max_steps": 2, "batch_size": 96, "log_every": 1}
    rankings = load_rankings(Data(path=str(run.parent / "ranked.jsonl")))
    dpo.train_dpo(stages, rankings, 0.5, tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").open()]
    assert lines[0]["train/loss"] == pytest.approx(0.6931, abs=1e-3)  # log 2, before any step
    tokenizer = load_tokenizer(run / "sft")
    models = [load_policy(path, tokenizer) for path in (tmp_path / "out", run / "sft")]
    assert any(
        not torch.equal(p, q)
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True)
    )
    margins = []
    for row in dpo.pairs(rankings, tokenizer, 32, 0):
        said = [_logprob(model, row, key) for model in models for key in ("chosen", "rejected")]
        margins.append(0.5 * (said[0] - said[1] - said[2] + said[3]))
    loss = statistics.fmean(
        -torch.nn.functional.logsigmoid(torch.tensor(m)).item() for m in margins
    )
    assert loss < lines[0]["train/loss"]
    assert not (tmp_path / "out" / "work").exists()


@torch.no_grad()
def _logprob(model, row: dict, key: str) -> float:
    prompt, ids = row["prompt_ids"], row[f"{key}_ids"]
    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum().item()


def test_beta_is_not_chosen_on_test_prompts(run):
    recipe = run.parent / "without"
    recipe.mkdir()
    (recipe / "sft.yaml").write_text("model: none\n")
    text = (run.parent / "recipe" / "eval.yaml").read_text()
    kept = [line for line in text.splitlines() if "validation_prompts" not in line]
    (recipe / "eval.yaml").write_text("\n".join(kept) + "\n")
    with pytest.raises(UserError, match="validation_prompts: DPO's beta is chosen on them"):
        compare.main(["--recipe", str(recipe), "--run", str(run), "eval.judge=null"])


def test_dpo_goes_on_from_states_of_the_same_artifacts_alone(run, monkeypatch):
    """A run that was killed leaves states; those of another SFT model are thrown away."""
    from pipeline.evaluation import dpo as module

    small_run.install(monkeypatch, small_run.judge_module())
    config = compare.load_config(compare.EvalConfig, run.parent / "recipe" / "eval.yaml", [])
    study = compare.Study(run.parent / "recipe", run, config, 4, 4, [7.0])
    seen = []

    def killed(stages, rankings, beta, out):
        seen.append((out / "work").exists())
        (out / "work").mkdir(parents=True, exist_ok=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "train_dpo", killed)
    for made_from in (study.made_from, study.made_from, {"sft": "another"}):
        study.made_from = made_from
        with pytest.raises(KeyboardInterrupt):
            study._dpo()
    assert seen == [False, True, False]


def test_an_empty_answer_is_nothing_to_learn_though_it_ranks_best(run, monkeypatch):
    config = compare.load_config(compare.EvalConfig, run.parent / "recipe" / "eval.yaml", [])
    small_run.install(monkeypatch, small_run.judge_module())
    study = compare.Study(run.parent / "recipe", run, config, 4, 4, [7.0])
    rows = [{"prompt": f"w{i}", "responses": ["", "w2"], "ranks": [i, 3 - i]} for i in (1, 2)]
    monkeypatch.setattr(study, "_rankings", lambda: load_rankings(rows))
    monkeypatch.setattr(study, "_stage", lambda *_, **__: run / "sft")
    study._best_ranked()
    [row] = [json.loads(line) for line in (run / "compare" / "best.jsonl").open()]
    assert [m["content"] for m in row["messages"]] == ["w2", "w2"]
