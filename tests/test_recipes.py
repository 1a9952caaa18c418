"""Every recipe in configs, run dry: whole and checked, on its own rows, without a network."""

import json
import re
import shutil
import socket
from pathlib import Path

import pytest

from pipeline.commands import base, status
from pipeline.commands.plan import Plan
from pipeline.config.section import Reads
from pipeline.data.messages import message
from pipeline.data.template import encode_responses, prepare_tokenizer
from pipeline.errors import UserError
from pipeline.evaluation.__main__ import run_evaluation
from pipeline.tiny.base import learnt_tokenizer
from stages import ppo, rm, sft

RECIPES = sorted(path.parent.name for path in Path("configs").glob("*/ppo.yaml"))
STAGES = {"sft": sft, "rm": rm, "ppo": ppo}


def plan_of(root: Path, recipe: Path, *words: str) -> Plan:
    """The plan that `make sft rm ppo DRY=1 RECIPE=...` makes."""
    run, model = root / f"{recipe.name}-dry", root / "base" / f"{recipe.name}-dry"
    places = ["--run", str(run), "--recipe", str(recipe), "--base-directory", str(model)]
    return status.plan_of(status.parse([*places, "--dry", *words]), list(STAGES))


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The folder of runs; whoever opens a connection fails."""

    def refuse(*_):
        raise AssertionError("a dry run went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("RLHF_CHECKPOINTS", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_what_its_dry_run_needs_and_a_readme(root, name):
    plan = plan_of(root, Path("configs", name))
    assert (Path("configs") / name / "README.md").is_file()
    assert f"[{name}](configs/{name})" in Path("README.md").read_text()
    assert plan.reasons["ppo"] and plan.reasons["base"] and "eval" in plan.configs
    for config in plan.configs.values():
        for _, key, kind, text in config.references():
            if kind in (Reads.DATA, Reads.MODEL) and text not in STAGES:
                assert Path(text).exists() or plan.base in [Path(text), *Path(text).parents], key


VARIANTS = sorted(p for p in Path("configs").glob("*/*-*.yaml") if p.parent.name in RECIPES)


@pytest.mark.parametrize("path", VARIANTS, ids=str)
def test_every_variant_can_be_run_dry(root, path):
    step = path.stem.partition("-")[0]
    assert plan_of(root, path.parent, f"--{step}", str(path)).asked.of(step).config == str(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_runs_dry(root, name):
    plan = plan_of(root, Path("configs", name))
    base.build(plan.configs["base"], plan.base)
    for stage, module in STAGES.items():
        module.run(plan.configs[stage])
    result = run_evaluation(plan.run, plan.configs["eval"])
    assert set(result["models"]) >= {"sft", "ppo"}
    for stage in STAGES:
        assert json.loads((plan.run / stage / "manifest.json").read_text())["stage"] == stage


@pytest.fixture
def mine(root):
    """A recipe that somebody copied, in a folder beside ours."""
    return Path(shutil.copytree("configs/smollm2", root / "configs" / "mine"))


def test_what_nothing_local_stands_for_is_told_at_once_with_the_remedy(root, mine):
    shutil.rmtree(mine / "dry")
    for name, text in {"base": None, "sft": "model: a/b\ndata: {path: c/d:e}\n"}.items():
        (mine / f"{name}.yaml").unlink() if text is None else (mine / f"{name}.yaml").write_text(
            text
        )
    with pytest.raises(UserError) as error:
        plan_of(root, mine)
    told = str(error.value)
    assert f"sft.yaml: model: a/b is not here; say in {mine}/dry/base.yaml" in told
    assert f"sft.yaml: data.path: c/d:e is not here; write a few rows in its columns as {mine}/dry/d.jsonl" in told  # fmt: skip
    assert "rm.yaml: data.path: openbmb/UltraFeedback" in told


def test_all_but_sizes_models_and_data_is_the_recipe_s_own_and_checked(root, mine):
    changes = {"kl_coef: 0.05": "kl_coef: 0.25\nrewards: [{model: a/b}]\nvllm: {}\nseed: 7"}
    text = (mine / "ppo.yaml").read_text()
    for old, new in changes.items():
        text = text.replace(old, new)
    (mine / "ppo.yaml").write_text(text)
    config = plan_of(root, mine, "--set", "ppo.iterations=1").configs["ppo"]
    assert (config.kl_coef, config.seed, config.scale_scores) == (0.25, 7, True)
    assert (config.vllm, config.rewards[0].model, config.gates) == (None, "rm", "warn")
    assert (config.iterations, config.batch_size, config.prompts.limit) == (1, 8, 96)
    (mine / "ppo.yaml").write_text(text + "kl_coeff: 1\n")
    with pytest.raises(UserError, match="kl_coeff: unknown key"):
        plan_of(root, mine)


def test_local_models_and_data_are_used_as_they_are_unless_something_stands_for_them(root, mine):
    rows = root / "rows.jsonl"
    rows.write_text((mine / "dry" / "alpaca.jsonl").read_text())
    (mine / "sft.yaml").write_text(f"model: {root / 'model'}\ndata: {{path: {rows}, limit: 5}}\n")
    (root / "model").mkdir()
    config = plan_of(root, mine).configs["sft"]
    assert config.model == str(root / "base" / "mine-dry")
    assert (config.data.path, config.data.limit) == (str(rows), 5)
    (mine / "dry" / "base.yaml").unlink()
    assert plan_of(root, mine).configs["sft"].model == str(root / "model")
    rows.rename(mine / "dry" / rows.name)  # a file that is made elsewhere, such as by a script
    assert plan_of(root, mine).configs["sft"].data.path == str(mine / "dry" / rows.name)


# --- templates ------------------------------------------------------------------------------------

TALK = [("system", "你是助手。"), ("user", "你好"), ("assistant", "您好！"), ("user", "再见")]


def dressed(recipe: str):
    tokenizer = learnt_tokenizer(["a"])
    prepare_tokenizer(tokenizer, Path("configs", recipe, "template.jinja"))
    return tokenizer


def test_the_chinese_template_writes_no_word_of_english():
    tokenizer = dressed("zh")
    prompt, [reply] = encode_responses(tokenizer, [message(*turn) for turn in TALK], ["再见！"])
    text = tokenizer.decode(prompt + reply)
    assert text.endswith(f"\n\n用户：\n再见\n\n助手：\n再见！{tokenizer.eos_token}")
    assert not re.search("[A-Za-z]", text.replace(tokenizer.eos_token, ""))


def test_tldr_s_template_writes_the_post_and_the_summary_alone():
    tokenizer = dressed("tldr-pythia-1b")
    row = json.loads(Path("configs/tldr-pythia-1b/dry/tldr.jsonl").read_text().splitlines()[0])
    asked = [message("user", row["prompt"])]
    prompt, [reply] = encode_responses(tokenizer, asked, [row["completion"]])
    assert tokenizer.decode(prompt) == row["prompt"] and row["prompt"].endswith("TL;DR:")
    assert tokenizer.decode(reply) == row["completion"] + tokenizer.eos_token
