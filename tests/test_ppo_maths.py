"""Every pure function of PPO against numbers worked by hand, NaN in the padding included."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.models import tokens
from pipeline.ppo import maths

NAN = float("nan")
F, T = False, True


def tensor(*rows, dtype=torch.float64):
    return torch.tensor(rows, dtype=dtype)


def random_batch(seed: int, rows: int = 4, width: int = 6):
    """Values, mask with prefixes of every length (0 included), NaN where the mask is False."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, width + 1, (rows,), generator=g)
    lengths[0] = width  # at least one whole row
    mask = tokens.mask_from_lengths(lengths, width)
    x = torch.randn(rows, width, generator=g, dtype=torch.float64)
    return torch.where(mask, x, NAN), mask


seeds = st.integers(0, 10_000)


# --- lengths and masks ---------------------------------------------------------------------------


def test_mask_is_true_on_real_tokens_only():
    assert tokens.mask_from_lengths(torch.tensor([0, 1, 3]), 3).tolist() == [
        [F, F, F],
        [T, F, F],
        [T, T, T],
    ]


def test_positions_count_real_tokens_from_zero():
    assert tokens.position_ids(torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])).tolist() == [
        [0, 0, 0, 1, 2],
        [0, 1, 2, 2, 2],
    ]


# --- reductions ----------------------------------------------------------------------------------


def test_masked_mean_skips_padding():
    assert maths.masked_mean(tensor([1, 2, NAN]), torch.tensor([[T, T, F]])) == 1.5


def test_masked_mean_of_nothing_is_zero():
    assert maths.masked_mean(tensor([NAN]), torch.tensor([[F]])) == 0


def test_whiten_is_centred_and_ignores_padding():
    x, mask = tensor([1, 2, 3, 6, NAN]), torch.tensor([[T, T, T, T, F]])
    white = maths.masked_whiten(x, mask)
    sigma = math.sqrt((4 + 1 + 0 + 9) / 3)  # mean 3, Bessel
    expected = tensor([-2 / sigma, -1 / sigma, 0, 3 / sigma, 0])
    torch.testing.assert_close(white, expected, rtol=1e-7, atol=1e-7)
    kept = maths.masked_whiten(x, mask, keep_mean=True)
    torch.testing.assert_close(kept[:, :4], expected[:, :4] + 3, rtol=1e-7, atol=1e-7)
    assert kept[0, 4] == 0


def test_whitening_uses_sums_of_all_processes():
    """Two processes with halves of the data get what one process with all of it gets."""
    x, mask = random_batch(3)
    whole = maths.masked_whiten(x, mask)
    halves = [(x[:2], mask[:2]), (x[2:], mask[2:])]

    count = mask.sum()
    mean = torch.where(mask, x, 0.0).sum() / count
    variance = torch.where(mask, x - mean, 0.0).square().sum() / (count - 1)
    for half, half_mask in halves:
        globals_ = iter([count, mean * count, count, variance * (count - 1)])
        white = maths.masked_whiten(half, half_mask, all_sum=lambda _, it=globals_: next(it))
        rows = slice(0, 2) if half is halves[0][0] else slice(2, 4)
        torch.testing.assert_close(white, whole[rows])


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_whitened_values_have_mean_0_and_variance_1(seed):
    x, mask = random_batch(seed)
    white = maths.masked_whiten(x, mask)
    n = mask.sum()
    assert white.sum().abs() / n < 1e-7
    assert abs(white.square().sum() / (n - 1) - 1) < 1e-5
    assert (white[~mask] == 0).all()


# --- distributions -------------------------------------------------------------------------------


def test_logprobs_divide_logits_by_the_temperature():
    logits = torch.log(torch.tensor([[[1.0, 4.0]]]))
    one = tokens.logprobs_of(logits, torch.tensor([[1]]), 1.0)
    half = tokens.logprobs_of(logits, torch.tensor([[1]]), 0.5)  # odds 1:16
    assert one.item() == pytest.approx(math.log(0.8), abs=1e-6)
    assert half.item() == pytest.approx(math.log(16 / 17), abs=1e-6)


def test_entropy_of_a_fair_and_of_a_loaded_coin():
    logits = torch.log(torch.tensor([[[0.5, 0.5], [0.9, 0.1]]]))
    fair, loaded = tokens.entropy_of(logits, 1.0)[0].tolist()
    assert fair == pytest.approx(math.log(2), abs=1e-6)
    assert loaded == pytest.approx(-0.9 * math.log(0.9) - 0.1 * math.log(0.1), abs=1e-6)


@pytest.mark.parametrize("rows_at_a_time", [1, 3, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_walk_over_the_logits_gives_logprobs_gradient_and_entropy(
    rows_at_a_time, dtype, monkeypatch
):
    monkeypatch.setattr(tokens._TokenLogprobs, "FLOATS", 11 * rows_at_a_time)
    torch.manual_seed(0)
    logits = (3 * torch.randn(7, 11)).to(dtype)
    ids, weights = torch.randint(11, (7,)), torch.randn(7)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    got = []
    for entropy_grad in (False, True):  # True = the two plain formulas
        x = logits.clone().requires_grad_()
        logprobs, entropies = tokens.logprobs_and_entropy(x, ids, 0.7, entropy_grad)
        assert entropies.requires_grad == entropy_grad
        (logprobs * weights).sum().backward()
        got.append((logprobs.detach(), entropies.detach(), x.grad))
    for ours, plain in zip(*got, strict=True):
        torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance)


def test_kl_estimators_average_to_the_true_kl_and_k3_has_the_right_sign():
    """pi = (.7, .3), ref = (.99, .01): KL 0.7777; the flipped k3 of two libraries gives 7.72."""
    pi, ref = torch.tensor([0.7, 0.3]), torch.tensor([0.99, 0.01])
    true = (pi * (pi / ref).log()).sum().item()
    assert true == pytest.approx(0.7777, abs=1e-4)
    for kind in ("k1", "k3"):
        assert (pi * maths.kl_estimate(pi.log(), ref.log(), kind)).sum().item() == pytest.approx(
            true, abs=1e-6
        )
    k2 = (pi * maths.kl_estimate(pi.log(), ref.log(), "k2")).sum().item()
    assert k2 == pytest.approx(
        0.7 * math.log(0.7 / 0.99) ** 2 / 2 + 0.3 * math.log(30) ** 2 / 2, abs=1e-6
    )


def test_unknown_kl_estimator_is_an_error():
    with pytest.raises(ValueError, match="k4"):
        maths.kl_estimate(torch.zeros(1), torch.zeros(1), "k4")


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_k2_and_k3_are_never_negative_and_all_vanish_at_equality(seed):
    x, mask = random_batch(seed)
    y, _ = random_batch(seed + 1)
    both = mask & ~y.isnan()
    for kind in ("k2", "k3"):
        assert (maths.kl_estimate(x, y, kind)[both] >= 0).all()
    for kind in ("k1", "k2", "k3"):
        assert (maths.kl_estimate(x, x, kind)[mask] == 0).all()


# --- rewards and advantages ----------------------------------------------------------------------


def test_the_score_lands_on_the_last_real_token():
    mask = torch.tensor([[T, T, F], [T, T, T], [F, F, F]])
    kl = tensor([0.1, 0.2, NAN], [0.0, 0.0, 0.4], [NAN, NAN, NAN])
    rewards = maths.token_rewards(torch.tensor([1.0, 2.0, 5.0]), kl, mask, kl_coef=0.5)
    expected = tensor([-0.05, 0.9, 0], [0, 0, 1.8], [0, 0, 0])
    torch.testing.assert_close(rewards, expected)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("subtract", [0.5, -0.5]), ("replace", [0.5, -1.0]), ("none", [0.5, 0.5])],
)
def test_missing_eos_rules(rule, expected):
    scores, ended = torch.tensor([0.5, 0.5]), torch.tensor([T, F])
    assert maths.missing_eos_scores(scores, ended, rule, 1.0).tolist() == expected


def test_gae_on_paper():
    mask = torch.ones(1, 3, dtype=torch.bool)
    advantages, returns = maths.gae(tensor([0, 0, 1]), tensor([0.5, 0.5, 0.5]), mask, 0.5, 0.5)
    assert advantages.tolist() == [[-0.28125, -0.125, 0.5]]
    assert returns.tolist() == [[0.21875, 0.375, 1.0]]


def test_gae_never_reads_padding_on_either_side():
    rewards = tensor([NAN, 0, 0, 1, NAN], [0, NAN, 0, NAN, 1])
    values = tensor([NAN, 0.5, 0.5, 0.5, NAN], [0.5, NAN, 0.5, NAN, 0.5])
    mask = ~rewards.isnan()
    advantages, returns = maths.gae(rewards, values, mask, 0.5, 0.5)
    for row in (0, 1):
        assert advantages[row][mask[row]].tolist() == [-0.28125, -0.125, 0.5]
        assert returns[row][mask[row]].tolist() == [0.21875, 0.375, 1.0]
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()


@given(seeds)
@settings(max_examples=30, deadline=None)
def test_gae_with_lambda_0_is_the_td_error_and_with_lambda_1_the_return_less_the_value(seed):
    rewards, mask = random_batch(seed)
    values = torch.where(mask, random_batch(seed + 1)[0].nan_to_num(), NAN)
    td, _ = maths.gae(rewards, values, mask, 0.9, 0.0)
    monte_carlo, _ = maths.gae(rewards, values, mask, 0.9, 1.0)
    for b, length in enumerate(mask.sum(1).tolist()):
        for t in range(length):
            following = values[b, t + 1] if t + 1 < length else 0.0
            torch.testing.assert_close(td[b, t], rewards[b, t] + 0.9 * following - values[b, t])
            total = sum(0.9 ** (s - t) * rewards[b, s] for s in range(t, length))
            torch.testing.assert_close(monte_carlo[b, t], total - values[b, t])


# --- losses --------------------------------------------------------------------------------------


def test_ratio_is_exactly_one_on_padding():
    ratio = maths.policy_ratio(tensor([math.log(2), NAN]), tensor([0, NAN]), torch.tensor([[T, F]]))
    torch.testing.assert_close(ratio, tensor([2, 1]))


def test_clipped_policy_loss_by_hand():
    """Ratios 1.5, 1.5, .5, .5 with advantages 1, -1, 1, -1 and clip .2."""
    ratio = tensor([1.5, 1.5, 0.5, 0.5, NAN])
    advantages = tensor([1, -1, 1, -1, NAN])
    mask = torch.tensor([[T, T, T, T, F]])
    ratio[0, 4] = 1  # what policy_ratio puts on padding
    loss, clipped = maths.clipped_policy_loss(ratio, advantages, mask, 0.2)
    assert loss.item() == pytest.approx(-1.2 + 1.5 - 0.5 + 0.8)  # the pessimistic one each time
    assert clipped.item() == 2  # the first and the last


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_at_ratio_one_the_loss_is_minus_the_advantages_and_nothing_is_clipped(seed):
    advantages, mask = random_batch(seed)
    loss, clipped = maths.clipped_policy_loss(torch.ones_like(advantages), advantages, mask, 0.2)
    torch.testing.assert_close(loss, -maths.masked_sum(advantages, mask))
    assert clipped == 0


def test_clipped_value_loss_by_hand():
    """old 0, return 1: value 0.5 is clipped to 0.2 (error .8 > .5); value -1 to -.2 (error 2 stays)."""
    mask = torch.tensor([[T, T, F]])
    args = tensor([0.5, -1, NAN]), tensor([0, 0, NAN]), tensor([1, 1, NAN]), mask
    loss, clipped = maths.clipped_value_loss(*args, 0.2)
    assert loss.item() == pytest.approx(0.5 * (0.8**2 + 2**2))
    assert clipped.item() == 1
    loss, clipped = maths.clipped_value_loss(*args, None)
    assert loss.item() == pytest.approx(0.5 * (0.5**2 + 2**2))
    assert clipped.item() == 0


def test_explained_variance_by_hand():
    mask = torch.tensor([[T, T, T, F]])
    returns = tensor([1, 2, 3, NAN])
    assert maths.explained_variance(returns, returns, mask) == 1
    assert maths.explained_variance(torch.full_like(returns, 7), returns, mask) == 0
    half = tensor([1, 2, 2, NAN])  # residuals 0 0 1 around 1/3: 2/3 of 2
    assert maths.explained_variance(half, returns, mask).item() == pytest.approx(1 - (2 / 3) / 2)
    assert maths.explained_variance(half, torch.ones_like(half), mask) == 0


def test_adaptive_kl_moves_towards_the_target_within_20_percent():
    assert maths.adapted_kl_coef(
        0.1, kl=6.6, target=6, episodes=100, horizon=1000
    ) == pytest.approx(0.1 * 1.01)
    assert maths.adapted_kl_coef(0.1, kl=60, target=6, episodes=100, horizon=1000) == pytest.approx(
        0.1 * 1.02
    )
    assert maths.adapted_kl_coef(0.1, kl=0, target=6, episodes=100, horizon=1000) == pytest.approx(
        0.1 * 0.98
    )


def test_leave_one_out_takes_the_mean_of_the_others_by_hand():
    """Not of all: that would shrink every advantage by (K - 1) / K, which Adam would hide."""
    found = maths.leave_one_out(torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]]))
    assert found.tolist() == [[1 - 4, 2 - 3.5, 6 - 1.5], [-1.5, -1.5, 3.0]]


def test_standardised_by_hand():
    found = maths.standardised(torch.tensor([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]]))
    deviation = (((1 - 3) ** 2 + (2 - 3) ** 2 + (6 - 3) ** 2) / 2) ** 0.5
    expected = [x / (deviation + 1e-4) for x in (-2, -1, 3)]
    assert found[0].tolist() == pytest.approx(expected) and found[1].tolist() == [0, 0, 0]
