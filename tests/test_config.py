"""Strict YAML, overrides and messages that name every mistake at once."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.commands.show_config import documented
from pipeline.config.evaluation import EvalConfig
from pipeline.config.load import (
    differences,
    load_config,
    strict_yaml,
)
from pipeline.config.ppo import PPOConfig
from pipeline.config.schema import BaseConfig, RMConfig, SFTConfig
from pipeline.config.section import Section
from pipeline.errors import UserError
from pipeline.handoff.lineage import deciding
from pipeline.steps import config_class, overrides, split_settings, stages

SFT = "model: org/name\ndata: {path: org/data}\n"
PPO = "prompts: {path: org/data}\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "stage.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def complaint(tmp_path: Path, cls, text: str, *words: str) -> str:
    with pytest.raises(UserError) as error:
        load_config(cls, write(tmp_path, text), words, {n: config_class(n) for n in stages()})
    return str(error.value)


# --- YAML -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 100000),
        ("-.5", -0.5),
        ("3", 3),
        ("010", 10),
        ("1_000", 1000),
        ("1:30", "1:30"),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("2024-01-01", "2024-01-01"),
        ("~", None),
        ("null", None),
        ("", None),
        ("'3'", "3"),
        ("[1, 2.5]", [1, 2.5]),
        ("{4: 0.5}", {"4": 0.5}),
        (".inf", math.inf),
    ],
)
def test_scalars_are_what_they_look_like(text, value):
    read = strict_yaml.parse(text, "here")
    assert read == value
    assert type(read) is type(value)


def test_a_number_in_e_notation_serves_for_integers(tmp_path):
    path = write(tmp_path, SFT + "max_steps: 1e3\nlearning_rate: 1e-5")
    assert load_config(SFTConfig, path).max_steps == 1000
    assert load_config(SFTConfig, path).learning_rate == 1e-5


def test_a_duplicate_key_hides_no_other_mistake(tmp_path):
    told = complaint(
        tmp_path, SFTConfig, SFT + "seed: 1\nseed: 2\nlerning_rate: 1\nepochs: 1\nepochs: 2"
    )
    for part in (":4: duplicate key `seed`", "lerning_rate: unknown", "duplicate key `epochs`"):
        assert part in told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: 1\nb: 2\na: 3", "here:3: duplicate key `a`"),
        ("a: 1\nb: {c: 1, c: 2}", "here:2: duplicate key `c`"),
        ("a: !!python/object/apply:os.system ['true']", "here:1: tag"),
        ("a: !custom 3", "here:1: tag"),
        ("a: !!int [3]", "here:1: tag"),
        ("a: !!str 3", "here:1: tag"),
        ("a: !!binary aGk=", "here:1: tag"),
        ("a: &x 1\nb: *x", "here:1: anchors"),
        ("a: [1, 2", "here:1:"),
        ("? [a, b]\n: 1", "here:1: a key must be one word"),
        ("a: 1\n---\nb: 2", "here:2:"),
    ],
)
def test_what_is_refused_is_named_by_line(text, told):
    with pytest.raises(UserError) as error:
        strict_yaml.parse(text, "here")
    assert str(error.value).startswith(told)


def test_a_tag_runs_no_code(tmp_path):
    sentinel = tmp_path / "sentinel"
    text = f"model: !!python/object/apply:pathlib.Path.touch ['{sentinel}']"
    complaint(tmp_path, SFTConfig, text)
    assert not sentinel.exists()


def test_a_file_that_is_no_mapping_or_not_there(tmp_path):
    assert "expected `key: value`" in complaint(tmp_path, SFTConfig, "- 1")
    with pytest.raises(UserError, match="no such file"):
        load_config(SFTConfig, tmp_path / "none.yaml")


WORDS = st.text("aé中 1.-+e:#{}[],&*!|>'\"%@`~\\\n\t", max_size=8)


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | WORDS
        | st.floats(allow_nan=False, allow_infinity=False),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
        max_leaves=8,
    )
)
def test_json_is_read_as_json_reads_it(value):
    assert strict_yaml.parse(json.dumps(value, ensure_ascii=False), "here") == value


# --- configs --------------------------------------------------------------------------------------


def test_all_problems_are_told_at_once_with_the_nearest_key(tmp_path):
    told = complaint(
        tmp_path,
        PPOConfig,
        "lerning_rate: 1e-5\nkl_coef: -1\niterations: true\nwandb: {mod: auto}\n"
        "lora: {rank: 3}\nrewards: [{modl: rm}]\nmodel: x\n",
    )
    path = tmp_path / "stage.yaml"
    assert f"{path}: lerning_rate: unknown key (did you mean `learning_rate`?)" in told
    assert f"{path}: kl_coef: input should be greater than or equal to 0, not -1" in told
    assert f"{path}: iterations: input should be a valid integer, not true" in told
    assert f"{path}: wandb.mod: unknown key (did you mean `mode`?)" in told
    assert f"{path}: lora.rank: unknown key; known are r, alpha" in told
    assert f"{path}: rewards.0.modl: unknown key (did you mean `model`?)" in told
    assert f"{path}: model: unknown key (a key of sft)" in told
    assert len(told.splitlines()) == 7
    assert complaint(tmp_path, SFTConfig, "seed: 3") == f"{path}: model: missing"


def test_a_key_is_told_whatever_it_is_called(tmp_path):
    path = tmp_path / "sft.yaml"
    path.write_text('model: m\n"adam_eps[": 1\nstr: 2\ndata: {path: p, Source: 1}\n')
    with pytest.raises(UserError) as caught:
        load_config(SFTConfig, path)
    for key in ("adam_eps[", "str", "data.Source"):
        assert f"{path}: {key}: unknown key" in str(caught.value)


@pytest.mark.parametrize(
    "line",
    ["seed: '3'", "seed: 1.5", "seed: yes", "learning_rate: fast", "threads: 0", "packing: 1"],
)
def test_values_of_another_type_are_errors(tmp_path, line):
    assert line.partition(":")[0] in complaint(tmp_path, SFTConfig, SFT + line)


def test_numbers_that_are_none_are_errors(tmp_path):
    told = complaint(
        tmp_path, PPOConfig, PPO + "learning_rate: .inf\nrewards: [{model: rm, weight: .nan}]"
    )
    assert "learning_rate: not a finite number" in told
    assert "rewards.0.weight: not a finite number" in told


def test_a_rule_over_several_keys_is_told_without_pydantics_words(tmp_path):
    told = complaint(tmp_path, PPOConfig, PPO + "batch_size: 10\nminibatches: 4")
    assert "batch_size 10 does not divide by minibatches 4" in told
    assert "Value error" not in told


def test_strict_json_still_reads_paths_defaults_and_integer_keys(tmp_path):
    sampling = "sampling: {prompts: {path: a/b}, k: {4: 0.5, 9: 0.5}}\n"
    read = load_config(RMConfig, write(tmp_path, sampling))
    assert read.sampling is not None
    assert read.sampling.k == {4: 0.5, 9: 0.5}
    assert read.run == Path("checkpoints/run")


def test_checkpoints_in_a_config_means_the_folder_make_was_given(tmp_path, monkeypatch):
    path = write(
        tmp_path, "model: checkpoints/base/tiny\ndata: {path: [checkpoints/d.jsonl, org/d]}"
    )
    assert load_config(SFTConfig, path).model == "checkpoints/base/tiny"
    monkeypatch.setenv("RLHF_CHECKPOINTS", "/elsewhere")
    moved = load_config(SFTConfig, path)
    assert moved.model == "/elsewhere/base/tiny"
    assert moved.data.path == ["/elsewhere/d.jsonl", "org/d"]


# --- overrides ------------------------------------------------------------------------------------


def test_overrides_reach_groups_lists_and_missing_groups(tmp_path):
    path = write(tmp_path, PPO + "rewards: [{model: rm}]\n")
    words = [
        "kl_coef=1e-3",
        "rewards.0.weight=2",
        "lora.r=8",
        "wandb.mode=offline",
        "stop_tokens=[a]",
    ]
    read = load_config(PPOConfig, path, words)
    assert read.kl_coef == 1e-3
    assert read.rewards[0].weight == 2
    assert read.lora is not None
    assert read.lora.r == 8
    assert read.wandb.mode == "offline"
    assert read.stop_tokens == ["a"]


@pytest.mark.parametrize(
    "word", ["seed", "=3", "a..b=1", "seed.x=1", "rewards.7.weight=1", "seed=[1"]
)
def test_bad_overrides_are_named(tmp_path, word):
    assert word in complaint(tmp_path, PPOConfig, PPO + "seed: 3\nrewards: [{model: rm}]", word)


def test_a_value_that_does_not_fit_is_named_by_the_word_that_set_it(tmp_path):
    words = ["kl_coef=-1", "lora.r=x", "rewards=[{weight: one}]"]
    told = complaint(tmp_path, PPOConfig, PPO + "kl_coef: -2\nlearning_rate: -1\n", *words)
    for word, key in zip(words, ["kl_coef", "lora.r", "rewards.0"], strict=True):
        assert f"{word}: {key}" in told
    assert f"{tmp_path}/stage.yaml: learning_rate" in told
    assert f"{tmp_path}/stage.yaml: kl_coef" not in told


def test_settings_go_to_the_stages_that_have_the_key():
    words = ["seed=3", "ppo.kl_coef=.02", "packing=true", "eval.n=5"]
    assert overrides("sft", words) == ["seed=3", "packing=true"]
    assert overrides("rm", words) == ["seed=3"]
    assert overrides("ppo", words) == ["seed=3", "kl_coef=.02"]
    assert overrides("eval", words) == ["n=5"]


def test_settings_that_no_stage_knows_are_all_told():
    with pytest.raises(UserError) as error:
        overrides("ppo", ["sed=3", "sft.kl_coef=1", "ppo.kl_coeff=1", "run=x", "word"])
    told = str(error.value)
    assert "sed=3: no key `sed` in sft or rm or ppo (did you mean `seed`?)" in told
    assert "sft.kl_coef=1: no key `kl_coef` in sft" in told
    assert "ppo.kl_coeff=1: no key `kl_coeff` in ppo (did you mean `kl_coef`?)" in told
    assert "run=x: use RUN=" in told
    assert "word: not of the form key=value" in told


def test_settings_are_split_as_a_shell_would():
    assert split_settings("""a="x y" 'b=[1, 2]'""") == ["a=x y", "b=[1, 2]"]
    with pytest.raises(UserError, match="SET"):
        split_settings("a='x")


# --- what decides, and show --------------------------------------------------------------------------------


def told(config: SFTConfig) -> dict:
    return deciding(SFTConfig, config.model_dump(mode="json"))


def test_cosmetic_keys_decide_nothing(tmp_path):
    path = write(tmp_path, SFT)
    plain = load_config(SFTConfig, path)
    cosmetic = ["log_every=3", "save_every=7", "wandb.mode=offline", "threads=1"]
    assert told(load_config(SFTConfig, path, cosmetic)) == told(plain)
    assert told(load_config(SFTConfig, path, ["learning_rate=2e-5"])) != told(plain)
    assert told(plain.model_copy(update={"run": Path("x")})) == told(plain)


def test_the_same_config_in_other_words_is_the_same(tmp_path):
    one = load_config(SFTConfig, write(tmp_path, SFT + "learning_rate: 1e-5\nseed: 1"))
    other = load_config(SFTConfig, write(tmp_path, "seed: 1\n" + SFT + "learning_rate: 0.00001"))
    assert told(one) == told(other)


def test_differences_name_old_and_new():
    assert differences({"a": 1, "b": 2}, {"a": 1, "b": 5}) == ["b: 2 -> 5"]


@pytest.mark.parametrize(
    ("cls", "text"), [(SFTConfig, SFT), (PPOConfig, PPO), (BaseConfig, "builder: tiny")]
)
def test_what_is_shown_is_a_config_again(tmp_path, cls, text):
    read = load_config(cls, write(tmp_path, text))
    shown = documented(read)
    assert load_config(cls, write(tmp_path, shown)) == read


def test_shown_keys_carry_their_docs_even_inherited_ones(tmp_path):
    shown = documented(load_config(PPOConfig, write(tmp_path, PPO)))
    assert "# Weight of the per-token KL penalty to the SFT model (beta).\nkl_coef: 0.02" in shown
    assert "# CPU threads; none = as many as torch picks.\nthreads: null" in shown


def test_every_key_says_what_it_does_where_it_is_declared():
    """A key that is only inherited has its text where it stands."""
    sections = [*Section.__subclasses__()]
    assert EvalConfig in sections
    for section in sections:
        sections += [kind for kind in section.__subclasses__() if kind not in sections]
    silent = [
        f"{section.__name__}.{key}"
        for section in sections
        for key, field in section.model_fields.items()
        if section.__module__.startswith("pipeline.") and not field.description
    ]
    assert len(sections) > 12
    assert silent == []
