"""Gates before PPO: what each number is, and what happens below its bar."""

import random

import pytest

import tiny_models
from pipeline.config.ppo import GateBars, PPOConfig
from pipeline.config.schema import SFTConfig
from pipeline.data.forms import Demonstration
from pipeline.data.template import role_markers, well_formed
from pipeline.errors import UserError
from pipeline.evaluation import rankings
from pipeline.evaluation.rankings import Scored
from pipeline.handoff.artifacts import Manifest
from pipeline.models.generation import Response
from pipeline.ppo import preflight
from stages import ppo, sft

SFT = {"eos_share": 0.9, "format": 0.8}
RM = {
    "accuracy": 0.7, "length_baseline": 0.5, "pairs_k4": 300, "accuracy_k4": 0.7,
    "length_baseline_k4": 0.5, "pairs_k9": 36, "accuracy_k9": 0.4, "length_baseline_k9": 0.6,
    "pairs": 2000, "accuracy_low": 0.66, "padding_gap": 1e-6, "demonstration_mean": -0.01, "best_of_1": 0.5, "best_of_2": 0.6,
    "best_of_10": 0.7,
}  # fmt: skip


def parents(**changes) -> dict[str, Manifest]:
    """Manifests of an SFT and a reward model that pass, but for some numbers."""
    of = {"sft": SFT, "rm": RM}
    return {
        stage: Manifest(stage=stage, metrics={k: changes.get(k, v) for k, v in metrics.items()})
        for stage, metrics in of.items()
    }


def test_good_numbers_pass_without_a_word(capsys):
    preflight.check(PPOConfig(), parents())  # K = 9 is bad, but 36 pairs say nothing
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"eos_share": 0.31}, "sft: eos_share is 0.31, must be at least 0.5: train longer"),
        ({"format": 0.2}, "sft: format is 0.2, must be at least 0.5: look at the SFT samples"),
        (
            {"accuracy": 0.5, "accuracy_low": 0.46},
            "rm: accuracy is 0.5 on 2000 pairs (95 % interval from 0.46), must exceed the 0.5 of 'the "
            "longer one wins': no better than length; give it more rankings",
        ),
        (
            {"length_baseline": 0.28},
            "rm: accuracy is 0.7 on 2000 pairs (95 % interval from 0.66), must exceed the 0.72 of 'the "
            "shorter one wins': no better than length; give it more rankings",
        ),
        (
            {"length_baseline": 0.67},
            "rm: accuracy is 0.7 on 2000 pairs (95 % interval from 0.66), must exceed the 0.67 of 'the "
            "longer one wins': no better than length by more than chance; give it more rankings",
        ),
        ({"accuracy_k4": 0.4}, "rm: accuracy_k4 is 0.4 on 300 pairs, must exceed the 0.5 of"),
        ({"pairs_k9": 200}, "rm: accuracy_k9 is 0.4 on 200 pairs, must exceed the 0.6 of"),
        ({"padding_gap": 0.02}, "rm: padding_gap is 0.02, must be at most 0.01"),
        ({"demonstration_mean": -0.2}, "rm: demonstration_mean is -0.2, must be at most 0.1"),
        ({"best_of_10": 0.5}, "rm: best_of_10 is 0.5, must exceed the 0.5 of any one"),
    ],
    ids=str,
)
def test_below_a_bar_ppo_refuses_or_warns_with_the_same_words(change, told, capsys):
    with pytest.raises(UserError) as refused:
        preflight.check(PPOConfig(), parents(**change))
    assert f"\n  {told}" in str(refused.value) and "gates=warn" in str(refused.value)
    preflight.check(PPOConfig(gates="warn"), parents(**change))
    assert f"ppo: warning: {told}" in capsys.readouterr().out
    preflight.check(PPOConfig(gates="off"), parents(**change))
    assert capsys.readouterr().out == ""
    alerts: list[tuple[str, str]] = []
    preflight.check(PPOConfig(gates="warn"), parents(**change), lambda *alert: alerts.append(alert))
    stage, _, text = told.partition(": ")
    below = dict(alerts)[f"gates of {stage}"]
    assert any(line.startswith(text) for line in below.splitlines())


@pytest.mark.parametrize(
    "bars",
    [
        {"eos_share": 0.95}, {"format": 0.95}, {"rm_margin": 0.25}, {"rm_pairs": 30},
        {"padding_gap": 1e-7}, {"demonstration_mean": 0.001}, {"best_of_n": 0.3},
    ],
    ids=str,
)  # fmt: skip
def test_every_bar_can_be_moved(bars):
    with pytest.raises(UserError, match="not fit to begin"):
        preflight.check(PPOConfig(gate_bars=bars), parents())


def test_what_an_older_artifact_did_not_measure_is_one_line_and_no_error(capsys):
    old = {"sft": Manifest(stage="sft"), "rm": Manifest(stage="rm", metrics={"accuracy": 0.7})}
    preflight.check(PPOConfig(), {**old, "base": Manifest(stage="base")})
    assert capsys.readouterr().out.splitlines() == [
        "ppo: gates: sft: not measured: eos_share, format",
        "ppo: gates: rm: not measured: accuracy, padding_gap, demonstration_mean, best_of_n",
    ]


def test_few_pairs_are_said_to_be_few_and_do_not_end_it(capsys):
    few = parents(accuracy=0.657, accuracy_low=0.49, pairs=35, pairs_k4=35)
    preflight.check(PPOConfig(), few)
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("ppo: warning: rm: accuracy is 0.657 on 35 pairs")
    assert line.endswith("too few pairs to tell; hold out more rankings")


@pytest.mark.parametrize("accuracy", [0.45, 0.5])
def test_few_pairs_that_fall_the_wrong_way_are_few_all_the_same(accuracy, capsys):
    few = {
        "accuracy": accuracy,
        "accuracy_low": 0.3,
        "accuracy_high": 0.62,
        "pairs": 40,
        "best_of_10": 0.45,
    }
    found = list(preflight.of_rm({**RM, "pairs_k4": 40, **few}, GateBars()))
    assert [f.level for f in found if "accuracy" in f.text or "best_of" in f.text] == ["watch"] * 2
    assert all("too few pairs to tell" in f.text for f in found if f.level == "watch")
    certain = {
        **RM,
        **few,
        "pairs_k4": 40,
        "accuracy": 0.2,
        "accuracy_low": 0.1,
        "accuracy_high": 0.35,
    }
    assert next(preflight.of_rm(certain, GateBars())).level == "bad"  # worse than a coin


def test_random_scores_do_not_pass_where_people_prefer_short_answers():
    """Of 100 reward models that know nothing, on 300 pairs of which the shorter is better in 58 %."""
    passed = 0
    for seed in range(100):
        random.seed(seed)
        items = []
        for _ in range(300):
            lengths = [5, 9] if random.random() < 0.58 else [9, 5]
            scores = [random.random(), random.random()]
            items.append(Scored("p", ["a", "b"], [1, 2], lengths, scores))
        found = preflight.of_rm(rankings.measure(items).metrics(), GateBars())
        passed += next(iter(found)).level != "bad"
    assert passed <= 2


def test_every_reward_model_among_the_rewards_is_looked_at():
    other = Manifest(stage="rm", metrics={**RM, "accuracy": 0.4, "accuracy_low": 0.36})
    with pytest.raises(UserError, match="reward_1: accuracy is 0.4"):
        preflight.check(PPOConfig(), {**parents(), "reward_1": other})


def test_the_stage_refuses_before_a_model_is_loaded(tmp_path, monkeypatch):
    tiny_models.policy(0).save_pretrained(tmp_path / "base")
    tiny_models.tokenizer().save_pretrained(tmp_path / "base")
    shared = {"run": tmp_path, "wandb": {"mode": "disabled"}, "batch_size": 4}
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": "w1"} for i in range(20)]
    config = SFTConfig(
        model=str(tmp_path / "base"), max_steps=1, validation_fraction=0.5, sample_tokens=1,
        learning_rate=1e-9, **shared,
    )  # fmt: skip
    sft.run(config, rows)
    monkeypatch.setattr(ppo, "build_ppo", lambda *args: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match="sft: eos_share is 0, must"):
        ppo.run(PPOConfig(rewards=[{"function": "a:b"}], minibatches=1, **shared), rows)


# --- what the stages measure ----------------------------------------------------------------------


def test_a_response_is_well_formed_when_it_is_words_and_then_eos():
    tokenizer = tiny_models.tokenizer()
    markers = role_markers(tokenizer)
    assert markers == ["<user>", "<bot>"]

    def good(text: str) -> bool:
        return well_formed(tokenizer, tokenizer.encode(text), markers)

    assert good("w1 w2 <end>")
    for bad in ("w1 w2", "<end>", "w1 <pad> <end>", "w1 <end> <user> w2 <end>", "w1 <bot> <end>"):
        assert not good(bad), bad


def test_role_markers_that_are_plain_words_count_too():
    tokenizer = tiny_models.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'w8 ' if m.role == 'user' else 'w9 ' }}{{ m.content }} "
        "{% endfor %}{% if add_generation_prompt %}w9 {% endif %}"
    )
    markers = role_markers(tokenizer)
    assert markers == ["w8", "w9"]
    assert not well_formed(tokenizer, tokenizer.encode("w1 w8 w2 <end>"), markers)
    assert well_formed(tokenizer, tokenizer.encode("w1 w2 <end>"), markers)


def test_the_sft_stage_counts_ended_and_well_formed_responses(monkeypatch):
    tokenizer = tiny_models.tokenizer()
    said = ["w1 <end>", "w1 w2", "<end>", "w1 <user> w2 <end>"]
    seen = []

    def answer(policy, tokenizer, prompts, max_new_tokens, progress):
        seen.append((len(prompts), max_new_tokens))
        ids = [tokenizer.encode(text) for text in said]
        return [Response(i, tokenizer.decode(i), i[-1] == tokenizer.eos_token_id) for i in ids]

    monkeypatch.setattr(sft, "generate", answer)
    turns = [[{"role": "user", "content": f"w{i % 4}"}, {"role": "assistant", "content": "w5"}]
             for i in range(8)]  # fmt: skip
    items = [Demonstration(messages, "") for messages in turns]
    items.append(Demonstration([{"role": "user", "content": "w1 " * 99}, turns[0][1]], ""))
    config = SFTConfig(model="none", sample_tokens=7, max_length=50)
    samples, metrics = sft._answers(config, None, tokenizer, items)
    assert seen == [(4, 7)]  # each prompt once, and none that is too long
    assert metrics == {"eos_share": 0.75, "format": 0.25}
    assert [s["prompt"] for s in samples] == ["w0", "w1", "w2", "w3"]
    assert sft._answers(config, None, tokenizer, []) == ([], {})


def scored(ranks: list[int], scores: list[float]) -> Scored:
    return Scored("p", ["r"] * len(ranks), ranks, [1] * len(ranks), scores)


def test_best_of_n_rises_from_a_half_with_a_good_model_and_falls_with_a_bad_one():
    assert rankings.quality([1, 2, 2, 4]) == pytest.approx([1, 0.5, 0.5, 0])
    good = rankings.best_of_n([scored([1, 2, 3], [3.0, 2.0, 1.0])])
    bad = rankings.best_of_n([scored([1, 2, 3], [1.0, 2.0, 3.0])])
    # of the pairs (1, 2), (1, 3), (2, 3) the best has quality 1, 1 and 1/2
    assert good == pytest.approx({1: 0.5, 2: 2.5 / 3, 3: 1.0})
    assert bad == pytest.approx({1: 0.5, 2: 0.5 / 3, 3: 0.0})


def test_best_of_n_of_a_model_that_cannot_tell_is_a_half_in_whatever_order():
    for ranks in ([1, 2, 3], [3, 2, 1]):
        constant = rankings.best_of_n([scored(ranks, [0.0, 0.0, 0.0])])
        assert constant == pytest.approx({1: 0.5, 2: 0.5, 3: 0.5})


def test_best_of_n_goes_to_the_commonest_k_and_leaves_smaller_ones_out():
    items = [scored([1, 2, 3], [3.0, 2.0, 1.0])] * 2 + [scored([1, 2], [0.0, 1.0])]
    assert rankings.best_of_n(items) == pytest.approx({1: 0.5, 2: 2.5 / 3, 3: 1.0})


def test_scores_that_are_no_numbers_are_told():
    with pytest.raises(UserError, match="1 scores of held-out responses are not finite"):
        rankings.measure([scored([1, 2], [float("nan"), 0.0])])


def test_accuracy_baseline_and_pairs_are_measured_for_each_k():
    items = [scored([1, 2], [1.0, 0.0]), scored([1, 2, 3], [1.0, 2.0, 3.0])]
    items[1].lengths = [3, 2, 1]
    found = rankings.measure(items).metrics()
    assert (found["accuracy_k2"], found["length_baseline_k2"], found["pairs_k2"]) == (1, 0.5, 1)
    assert (found["accuracy_k3"], found["length_baseline_k3"], found["pairs_k3"]) == (0, 1, 3)
