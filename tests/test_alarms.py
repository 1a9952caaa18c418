"""Alarms while PPO runs: when each rings, that it is said once, and that a resumed run is the same."""

import json

import pytest

import small_run
from pipeline.config.ppo import AlarmLimits, PPOConfig
from pipeline.evaluation.about import verdicts
from pipeline.evaluation.record import load_record
from pipeline.ppo.alarms import Alarms, meanings, ringing
from pipeline.ppo.measures import repeated_ngrams
from test_ppo_exact import RESPONSES, evaluated, make, recorded

CALM = {
    "objective/kl": 2.9,
    "response/length": 10.0,
    "objective/score_length_corr": 0.1,
    "response/repeated_ngrams": 0.01,
    "val/explained_variance": 0.5,
}
LOUD = {
    "kl_per_token": ("objective/kl", 4.1),
    "length": ("response/length", 20.1),
    "score_length_corr": ("objective/score_length_corr", -0.71),
    "repeated_ngrams": ("response/repeated_ngrams", 0.21),
    "explained_variance": ("val/explained_variance", -0.01),
}
LIMITS = AlarmLimits()


def rung(metrics: dict, iteration: int = 9, **limits) -> set[str]:
    rings = ringing(iteration, metrics, CALM, AlarmLimits(**limits))
    assert rings.keys() == meanings(LIMITS).keys() == LOUD.keys()
    return {name for name, rang in rings.items() if rang}


def test_a_calm_iteration_rings_nothing():
    assert rung(CALM) == set()


@pytest.mark.parametrize("name", LOUD)
def test_each_alarm_rings_alone_and_at_its_limit(name):
    metric, value = LOUD[name]
    assert rung({**CALM, metric: value}) == {name}
    wider = {"kl_per_token": 0.42, "length": 3, "score_length_corr": 0.8,
             "repeated_ngrams": 0.3, "explained_variance": -1}  # fmt: skip
    assert rung({**CALM, metric: value}, **{name: wider[name]}) == set()


def test_responses_that_shrink_ring_too():
    assert rung({**CALM, "response/length": 4.9, "objective/kl": 1.0}) == {"length"}


def test_a_fresh_value_network_may_be_bad_at_first():
    bad = {**CALM, "val/explained_variance": -2.0}
    assert rung(bad, iteration=5) == set()
    assert (
        rung(bad, iteration=6) == rung(bad, iteration=1, value_warmup=0) == {"explained_variance"}
    )


def test_a_number_that_is_not_there_rings_nothing():
    assert rung(dict.fromkeys(CALM)) == rung({}) == set()
    assert rung({name: float("nan") for name in CALM}) == set()


def test_an_alarm_is_said_when_it_begins_and_not_again(capsys):
    alarms = Alarms(LIMITS)
    loud = {**CALM, "objective/kl": 50.0}
    marks = [
        alarms(i, m)["alarm/kl_per_token"] for i, m in enumerate([CALM, loud, loud, CALM, loud], 1)
    ]
    assert marks == [0.0, 1.0, 1.0, 0.0, 1.0]
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("ppo: alarm: iteration 2: KL to SFT is over 0.4 nats a token")


def test_a_run_that_goes_on_compares_with_its_first_iteration_and_says_nothing_again(capsys):
    run = [CALM, {**CALM, "response/length": 15.0}, {**CALM, "response/length": 21.0}] * 2
    straight = Alarms(LIMITS)
    rows = [m | straight(i, m) for i, m in enumerate(run, 1)]
    capsys.readouterr()
    resumed = Alarms(LIMITS, json.loads(json.dumps(rows[:3])))
    assert [m | resumed(i, m) for i, m in enumerate(run[3:], 4)] == rows[3:]
    assert rows[5]["alarm/length"] == 1.0  # 2.1 of the first, though 1.4 of the iteration before
    assert capsys.readouterr().out == ""


def test_limits_and_gates_change_no_weight():
    assert {"gates", "gate_bars", "alarms"} <= PPOConfig.cosmetic


# --- repeated n-grams -----------------------------------------------------------------------------


def test_ngrams_that_occurred_before_in_the_same_response_are_counted():
    assert repeated_ngrams([[1, 2, 3, 4, 1, 2, 3, 4]]) == (1, 5)
    assert repeated_ngrams([[7] * 10]) == (6, 7)
    assert repeated_ngrams([[1, 2, 3, 4], [1, 2, 3, 4]]) == (0, 2)  # another response's
    assert repeated_ngrams([[1, 1, 1], []]) == (0, 0)


def test_padding_has_no_ngrams():
    """Only the third response, of five tokens, has more than one 4-gram."""
    assert RESPONSES[2] == [14, 15, 16, 17, 18]
    for pad in (0, 8):
        ppo = make()
        assert ppo.update(recorded(ppo, extra_right=pad))["response/repeated_ngrams"] == 0.0
    ppo = make()
    rollout = recorded(ppo)
    rollout.responses[2] = 14
    rollout = evaluated(ppo, rollout)
    assert ppo.update(rollout)["response/repeated_ngrams"] == pytest.approx(1 / 3)


# --- the report -----------------------------------------------------------------------------------


def test_the_verdict_says_when_an_alarm_began(tmp_path):
    run = small_run.make_run(tmp_path)
    record = load_record(run)
    record.curves["ppo"] = [
        {"step": s, "objective/kl": 2.6 if s >= 4 else 2.0, "response/length": 25.0 if s in (2, 3) else 9.0}
        for s in range(1, 7)
    ]  # fmt: skip
    assert not [f for f in verdicts(record)[-1].findings if "KL to SFT is over" in f.text]
    record.limits = AlarmLimits(kl_per_token=0.25)
    verdict = verdicts(record)[-1]
    told = [finding for finding in verdict.findings if finding.text.startswith("Alarm")]
    assert [finding.level for finding in told] == ["watch", "watch"]
    assert told[0].text.startswith("Alarm from iteration 4 on: KL to SFT is over 0.25 nats a")
    assert told[1].text.startswith("Alarm from iteration 2 to 3: responses are over 2 times")
