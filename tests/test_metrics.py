"""Metrics against numbers worked by hand."""

import itertools
import math

import pytest

from pipeline.evaluation import metrics, tallies


def test_tokens_are_words_and_single_chinese_characters():
    assert metrics.tokens("two  red hats .") == ["two", "red", "hats", "."]
    assert metrics.tokens("安娜 found 3个。ok") == ["安", "娜", "found", "3", "个", "。", "ok"]
    assert metrics.tokens(" ") == []


def test_exact_match_ignores_spacing_only():
    assert metrics.exact_match("it was  rome", "it was rome")
    assert metrics.exact_match("安娜 找到", "安娜找到")
    assert not metrics.exact_match("was it rome", "it was rome")


def test_token_overlap_counts_repeated_words_once_each():
    # common: a, b (one of two) = 2 of 4 predicted, 2 of 3 wanted
    overlap = metrics.token_overlap("a b b c", "a b d")
    assert overlap == pytest.approx((2 / 4, 2 / 3, 4 / 7))
    assert metrics.token_overlap("x", "y") == (0, 0, 0)
    assert metrics.token_overlap("", "") == (1, 1, 1)
    assert metrics.token_overlap("", "y") == (0, 0, 0)


def test_perplexity_of_a_uniform_guess_is_the_number_of_choices():
    assert metrics.perplexity(10 * math.log(7), 10) == pytest.approx(7)
    with pytest.raises(ValueError):
        metrics.perplexity(0.0, 0)


def test_wilson_interval_of_a_textbook_case():
    # 8 of 10: centre (0.8 + 3.8415/20) / 1.38415, half width from the formula
    low, high = metrics.wilson(8, 10)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=2e-4)
    assert metrics.wilson(0, 0) == (0, 1)
    assert metrics.wilson(0, 5).low == 0
    assert metrics.wilson(5, 5).high == 1


def test_bootstrap_covers_the_mean_and_is_a_function_of_its_seed():
    values = [0.0, 1.0] * 50
    low, high = metrics.bootstrap_mean(values, seed=3)
    assert 0.38 < low < 0.44
    assert 0.56 < high < 0.62
    assert metrics.bootstrap_mean(values, seed=3) == (low, high)
    assert metrics.bootstrap_mean([2.0, 2.0]) == (2, 2)


def test_win_rate_counts_a_tie_as_half():
    rate = metrics.win_rate([2, 1, 0, 5], [1, 1, 3, 4])
    assert (rate.rate, rate.wins, rate.ties, rate.losses) == (0.625, 2, 1, 1)
    assert rate.low < 0.625 < rate.high
    with pytest.raises(ValueError):
        metrics.win_rate([1.0], [1.0, 2.0])


def test_pairs_of_one_prompt_count_for_less_than_pairs_of_many():
    """Ten prompts of six pairs that are all right or all wrong say no more than ten pairs do."""
    points = [6.0] * 7 + [0.0] * 3
    together = metrics.clustered_wilson(points, [6] * 10)
    assert together == pytest.approx(metrics.wilson(7 * 1.0, 10), abs=0.02)
    spread = metrics.clustered_wilson([4.0, 4.5, 4.0, 4.5] * 3, [6] * 12)  # all prompts alike
    assert spread == pytest.approx(metrics.wilson(51, 72))
    single = metrics.clustered_wilson([1.0] * 7 + [0.0] * 3, [1] * 10)
    assert single == pytest.approx(metrics.wilson(7, 10), abs=0.02)
    assert metrics.clustered_wilson([6.0] * 3, [6] * 3).low < 0.5  # three prompts, whatever their K
    assert metrics.clustered_wilson([], []) == (0, 1) == metrics.clustered_wilson([0.0], [0])


def test_pair_accuracy_skips_tied_ranks_and_halves_tied_scores():
    scores = [[3.0, 1.0, 2.0], [1.0, 1.0], [5.0, 0.0]]
    ranks = [[1, 2, 2], [1, 2], [3, 3]]
    # prompt 1: two untied pairs, both right; prompt 2: scores tie; prompt 3: no pair
    assert metrics.pair_accuracy(scores, ranks) == pytest.approx((2.5 / 3, 3))
    assert metrics.pair_accuracy_by_k(scores, ranks) == {2: (0.5, 1), 3: (1.0, 2)}
    assert math.isnan(metrics.pair_accuracy([[1.0, 2.0]], [[1, 1]]).share)


def test_calibration_bins_by_predicted_probability():
    # sigmoid(0) = .5, sigmoid(.2) = .55, sigmoid(3) = .953
    rows = metrics.calibration([0.0, 0.2, -0.2, 3.0, 3.0, -3.0], bins=5)
    assert [row.pairs for row in rows] == [3, 3]
    assert rows[0].observed == pytest.approx(0.5)
    assert rows[1].observed == pytest.approx(2 / 3)
    assert rows[1].predicted == pytest.approx(1 / (1 + math.exp(-3)))
    expected = (abs(rows[0].predicted - 0.5) + abs(rows[1].predicted - 2 / 3)) / 2
    assert metrics.calibration_error(rows) == pytest.approx(expected)


def test_a_huge_margin_stays_in_the_last_bin():
    assert metrics.calibration([1000.0, 1000.0], bins=5) == [(1.0, 1.0, 2)]


def test_correlations():
    assert metrics.pearson([1, 2, 3], [2, 4, 7]) == pytest.approx(5 / math.sqrt(2 * 38 / 3))
    assert metrics.pearson([1, 1], [0, 5]) == 0


def test_best_of_n_is_the_mean_over_all_subsets():
    proxy, gold = [0.3, -1.0, 2.0, 0.5, 1.1], [1.0, 4.0, 0.0, 2.0, -3.0]
    for n in range(1, 6):
        best = [
            gold[max(chosen, key=lambda i: proxy[i])]
            for chosen in itertools.combinations(range(5), n)
        ]
        assert metrics.best_of_n(proxy, gold, n) == pytest.approx(sum(best) / len(best))
    with pytest.raises(ValueError):
        metrics.best_of_n(proxy, gold, 6)


def test_kl_of_best_of_n():
    assert metrics.kl_of_best_of_n(1) == 0
    assert metrics.kl_of_best_of_n(4) == pytest.approx(math.log(4) - 0.75)


def test_groups_are_tallied_apart_and_rows_without_the_key_left_out():
    rows = [{"family": "a"}, {"family": "b"}, {"family": "a"}, {}]
    groups = tallies.memberships(rows, ["family", "absent"])
    assert groups == {"family": {"a": [0, 2], "b": [1]}}
    answers = tallies.Answers(
        ["w"] * 4, [1, 2, 3, 6], [True, True, False, False], grades={"judge": [1, 2, 4, 5]}
    )
    table = tallies.summary(answers, groups)
    assert (table["n"], table["length"], table["ended"], table["judge"]) == (4, 3, 0.5, 3)
    assert table["groups"]["family"]["a"] == {"n": 2, "length": 2, "ended": 0.5, "judge": 2.5}
    versus = tallies.comparison([1, 2, 4, 5], [0, 3, 4, 4], groups)
    assert (versus["rate"], versus["difference"]) == (0.625, 0.25)
    assert versus["groups"]["family"]["b"]["rate"] == 0


def test_a_group_called_none_is_not_the_rows_without_one():
    rows = [{"family": "None"}, {"family": None}, {}]
    assert tallies.memberships(rows, ["family"]) == {"family": {"None": [0]}}


def test_agreement_of_a_reward_model_that_likes_length():
    grades, lengths = [[1.0, 0.0], [0.0, 2.0]], [[5, 3], [4, 1]]
    found = tallies.agreement([[5.0, 3.0], [4.0, 1.0]], grades, lengths)
    assert (found["pairs"], found["accuracy"], found["length_baseline"]) == (2, 0.5, 0.5)


def test_best_of_rows_double_n_and_tell_proxy_from_judge():
    rows = tallies.best_of([[0.0, 1.0, 2.0]], [[3.0, 0.0, 0.0]])
    assert [row["n"] for row in rows] == [1, 2]
    assert rows[0]["judge"] == pytest.approx(1)
    assert rows[0]["rm_score"] == pytest.approx(1)
    # best of 2 by proxy is never the first response; by the judge it is in 2 of 3 pairs
    assert rows[1]["judge"] == 0
    assert rows[1]["judge_by_judge"] == pytest.approx(2)
