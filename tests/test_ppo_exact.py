"""One PPO update against an independent reference: straight-line float64, one episode at a time.

The reference shares no code with `pipeline.ppo`: every response is run alone, without padding, and
the formulas are written out with Python floats. Weights after the step must agree to 1e-6.
"""

import copy
import functools
import math
from dataclasses import fields, replace

import pytest
import torch

import tiny_models
from pipeline.config.ppo import PPOConfig
from pipeline.ppo.rewards import Episodes
from pipeline.ppo.rollout import PromptStream, Query, Rollout
from pipeline.ppo.trainer import PPO

EOS = 4
QUERIES = [[2, 7, 8, 3], [2, 9, 3], [2, 5, 6, 7, 11, 3], [2, 12, 13, 3]]
RESPONSES = [[10, 11, 12, EOS], [EOS], [14, 15, 16, 17, 18], [20, EOS]]  # the third did not end
SCORES = [0.7, -0.3, 1.1, 0.2]
CONFIG = {
    "prompts": {"path": "none"},
    "batch_size": 4,
    "minibatches": 1,
    "iterations": 3,
    "learning_rate": 1e-2,
    "value_learning_rate": 2e-2,
    "schedule": "constant",
    "kl_coef": 0.1,
    "temperature": 0.7,
    "gamma": 0.97,
    "lam": 0.9,
    "max_new_tokens": 5,
    "max_grad_norm": 0.5,
    "old_logprobs": "recompute",
}


KINDS = {
    "llama": (tiny_models.policy, tiny_models.reward),
    **{
        kind: (
            functools.partial(tiny_models.seq2seq, kind),
            functools.partial(tiny_models.seq2seq_reward, kind),
        )
        for kind in ("bart", "t5")
    },
}
"""Policies and reward models by kind: (seed, dtype) -> model."""


def make(policy_model=None, value_model=None, kind="llama", **changes) -> PPO:
    config = PPOConfig(**{**CONFIG, **changes})
    draw, draw_value = KINDS[kind]
    policy = policy_model or draw(0, torch.float64)
    value = value_model or draw_value(1, torch.float64, bias=0.25)
    return PPO(
        config,
        tiny_models.tokenizer(),
        policy=copy.deepcopy(policy),
        # another reference than the policy, so that the KL is not zero
        reference=draw(5, torch.float64),
        value=None if config.value == "shared" or not config.critic() else copy.deepcopy(value),
        score=lambda episodes: SCORES[: len(episodes.prompts)],
    )


def recorded(ppo: PPO, extra_left: int = 0, extra_right: int = 0, pad: int = 0) -> Rollout:
    """The fixed episodes as a rollout, with as much padding as asked for."""
    q = max(map(len, QUERIES)) + extra_left
    t = max(map(len, RESPONSES)) + extra_right
    lengths = torch.tensor([len(r) for r in RESPONSES])
    rollout = Rollout(
        queries=torch.tensor([[pad] * (q - len(x)) + x for x in QUERIES]),
        query_mask=torch.arange(q)[None] >= q - torch.tensor([len(x) for x in QUERIES])[:, None],
        responses=torch.tensor([x + [pad] * (t - len(x)) for x in RESPONSES]),
        response_mask=torch.arange(t)[None] < lengths[:, None],
        ended=torch.tensor([x[-1] == EOS for x in RESPONSES]),
        scores=torch.tensor(SCORES),
        sampler_logprobs=torch.zeros(4, t, dtype=torch.float64),
        old_logprobs=torch.zeros(4, t),
        ref_logprobs=torch.zeros(4, t),
        values=torch.zeros(4, t),
    )
    return evaluated(ppo, rollout)


@torch.no_grad()
def evaluated(ppo: PPO, rollout: Rollout) -> Rollout:
    old, reference, values = ppo._evaluate(rollout, rollout.sampler_logprobs)
    return replace(rollout, old_logprobs=old, ref_logprobs=reference, values=values)


# --- the reference -------------------------------------------------------------------------------


PREFIX = {"bart": [4, 1], "t5": [0]}
"""What their decoders read before a response."""


def alone(model, query, response):
    """A stock model's output for one episode, and where the response's first token is predicted."""
    if not model.config.is_encoder_decoder:
        return model(torch.tensor([query + response])), len(query) - 1
    prefix = PREFIX[model.config.model_type]
    ids = {
        "input_ids": torch.tensor([query]),
        "decoder_input_ids": torch.tensor([prefix + response]),
    }
    return model(**ids), len(prefix) - 1


def logprobs_alone(model, query, response, temperature):
    out, first = alone(model, query, response)
    logp = torch.log_softmax(out.logits[0] / temperature, dim=-1)
    return [logp[first + i, token] for i, token in enumerate(response)]


def values_alone(model, query, response, bias):
    out, first = alone(model.model, query, response)
    values = model.score(out.last_hidden_state[0])[:, 0] - bias
    return [values[first + i] for i in range(len(response))]


def reference_step(config: PPOConfig, episodes=range(4), steps: int = 1, kind="llama"):
    """Weights of policy and value after `steps` epochs over the fixed episodes in one minibatch."""
    draw, draw_value = KINDS[kind]
    policy, ref = draw(0, torch.float64), draw(5, torch.float64)
    value = draw_value(1, torch.float64, bias=0.25)
    optimizer = torch.optim.AdamW(
        [{"params": policy.parameters(), "lr": 1e-2}, {"params": value.parameters(), "lr": 2e-2}],
        eps=1e-5,
        weight_decay=0.0,
    )
    old, old_values, advantages, returns = [], [], [], []
    for i in episodes:
        with torch.no_grad():
            lp = [x.item() for x in logprobs_alone(policy, QUERIES[i], RESPONSES[i], 0.7)]
            rp = [x.item() for x in logprobs_alone(ref, QUERIES[i], RESPONSES[i], 0.7)]
            vs = [x.item() for x in values_alone(value, QUERIES[i], RESPONSES[i], 0.25)]
        score = float(torch.tensor(SCORES[i])) - (0.0 if RESPONSES[i][-1] == EOS else 1.0)
        rewards = [-0.1 * (a - b) for a, b in zip(lp, rp, strict=True)]
        rewards[-1] += score
        adv, last = [0.0] * len(vs), 0.0
        for t in reversed(range(len(vs))):
            following = vs[t + 1] if t + 1 < len(vs) else 0.0
            last = rewards[t] + 0.97 * following - vs[t] + 0.97 * 0.9 * last
            adv[t] = last
        old.append(lp)
        old_values.append(vs)
        advantages.append(adv)
        returns.append([a + v for a, v in zip(adv, vs, strict=True)])
    flat = [a for adv in advantages for a in adv]
    mean = sum(flat) / len(flat)
    sigma = math.sqrt(sum((a - mean) ** 2 for a in flat) / (len(flat) - 1) + 1e-8)
    for _ in range(steps):
        policy_loss = value_loss = 0.0
        for n, i in enumerate(episodes):
            new = logprobs_alone(policy, QUERIES[i], RESPONSES[i], 0.7)
            vs = values_alone(value, QUERIES[i], RESPONSES[i], 0.25)
            for t in range(len(new)):
                a, ratio = (advantages[n][t] - mean) / sigma, (new[t] - old[n][t]).exp()
                policy_loss = policy_loss + max(-a * ratio, -a * ratio.clamp(0.8, 1.2))
                clipped = old_values[n][t] + (vs[t] - old_values[n][t]).clamp(-0.2, 0.2)
                target = returns[n][t]
                value_loss = value_loss + 0.5 * max((vs[t] - target) ** 2, (clipped - target) ** 2)
        optimizer.zero_grad()
        ((policy_loss + value_loss) / len(flat)).backward()
        for model in (policy, value):
            norm = torch.stack(
                [p.grad.norm() for p in model.parameters() if p.grad is not None]
            ).norm()
            for p in model.parameters():
                if p.grad is not None:
                    p.grad *= min(1.0, 0.5 / (norm + 1e-6))
        optimizer.step()
    return policy, value


def assert_same(model, expected, rtol=1e-6):
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


# --- the tests -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("left", "right"), [(0, 0), (3, 0), (0, 4), (2, 2)])
@pytest.mark.parametrize("micro", [None, 1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_an_update_equals_the_reference_whatever_the_padding_and_micro_batch(
    left, right, micro, kind
):
    ppo = make(micro_batch_size=micro, kind=kind)
    ppo.update(recorded(ppo, left, right))
    policy, value = reference_step(ppo.config, kind=kind)
    assert_same(ppo.networks.policy, policy)
    assert_same(ppo.networks.value, value)


def test_entropy_is_over_real_tokens_alone():
    """Logits on padding are finite, so only a mask keeps them out of the mean and of the bonus."""
    total, count = 0.0, 0
    model = tiny_models.policy(0, torch.float64)
    for query, response in zip(QUERIES, RESPONSES, strict=True):
        logits = model(torch.tensor([query + response])).logits[0] / 0.7
        p = torch.softmax(logits[len(query) - 1 : -1], dim=-1)
        total -= (p * p.log()).sum().item()
        count += len(response)
    weights = []
    for right in (0, 5):
        ppo = make(entropy_coef=0.3)
        metrics = ppo.update(recorded(ppo, extra_right=right))
        assert metrics["policy/entropy_avg"] == pytest.approx(total / count, rel=1e-6)
        weights.append(ppo.networks.policy)
    assert_same(*weights)


def test_two_epochs_equal_the_reference_with_clipping_at_work():
    ppo = make(ppo_epochs=2)
    metrics = ppo.update(recorded(ppo))
    policy, value = reference_step(ppo.config, steps=2)
    assert_same(ppo.networks.policy, policy)
    assert_same(ppo.networks.value, value)
    assert metrics["policy/clipfrac_avg"] > 0 and metrics["val/clipfrac_avg"] > 0


def test_an_empty_response_changes_nothing():
    """Nothing is read at index -1 and nothing divided by its length."""
    weights = []
    for empty in (False, True):
        ppo = make()
        rollout = recorded(ppo, 1, 1)
        if empty:
            row = rollout.rows(slice(1, 2))
            row.response_mask = torch.zeros_like(row.response_mask)
            row.scores, row.ended = torch.tensor([9.9]), torch.tensor([False])
            names = [
                f.name for f in fields(Rollout) if isinstance(getattr(row, f.name), torch.Tensor)
            ]
            both = {n: torch.cat([getattr(rollout, n), getattr(row, n)]) for n in names}
            rollout = replace(rollout, **both)
            rollout = evaluated(ppo, rollout)
            assert rollout.old_logprobs[4].eq(0).all() and rollout.values[4].eq(0).all()
        metrics = ppo.update(rollout)
        assert all(math.isfinite(value) for value in metrics.values())
        weights.append((ppo.networks.policy, ppo.networks.value))
    for one, other in zip(*weights, strict=True):
        assert_same(one, other)


def test_pad_equal_to_eos_changes_nothing():
    weights = []
    for pad in (0, EOS):
        ppo = make()
        ppo.update(recorded(ppo, 2, 2, pad=pad))
        weights.append(ppo.networks.policy)
    assert_same(*weights)


def test_a_rollout_samples_scores_and_measures_what_the_reference_measures():
    ppo = make()
    ppo.iteration = 1  # the reference differs from the policy on purpose
    torch.manual_seed(3)
    rollout = ppo.rollout([Query(ids, "", {}) for ids in QUERIES])
    for i, (query, response) in enumerate(zip(QUERIES, rollout.response_ids(), strict=True)):
        length = len(response)
        assert 1 <= length <= 5 and (length == 5 or response[-1] == EOS)
        with torch.no_grad():
            alone = torch.stack(logprobs_alone(ppo.networks.policy, query, response, 0.7))
            values = torch.stack(values_alone(ppo.networks.value, query, response, 0.25))
        torch.testing.assert_close(rollout.old_logprobs[i, :length], alone, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(rollout.values[i, :length], values, rtol=1e-8, atol=1e-8)
    assert rollout.scores.tolist() == pytest.approx(SCORES)


def test_with_learning_rate_zero_ratio_stays_one_and_kl_zero():
    ppo = make(learning_rate=0.0, value_learning_rate=0.0, ppo_epochs=2)
    ppo.reference = copy.deepcopy(ppo.networks.policy)
    for _ in range(2):
        metrics = ppo.update(ppo.rollout([Query(ids, "", {}) for ids in QUERIES]))
        assert metrics["objective/kl"] == pytest.approx(0, abs=1e-9)
        assert metrics["val/ratio"] == pytest.approx(1, abs=1e-9)
        assert metrics["policy/approxkl_avg"] == pytest.approx(0, abs=1e-12)


def test_a_rollout_draws_from_the_global_generator_and_never_seeds_it():
    ppo = make()
    ppo.iteration = 1
    torch.manual_seed(3)
    first = ppo.rollout([Query(ids, "", {}) for ids in QUERIES])
    second = ppo.rollout([Query(ids, "", {}) for ids in QUERIES])
    torch.manual_seed(3)
    again = ppo.rollout([Query(ids, "", {}) for ids in QUERIES])
    assert first.response_ids() == again.response_ids() != second.response_ids()


def test_scores_reach_the_reward_with_the_sampled_tokens():
    seen: list[Episodes] = []
    ppo = make()
    ppo.iteration = 1
    ppo.score = lambda episodes: seen.append(episodes) or SCORES
    rollout = ppo.rollout([Query(ids, f"p{i}", {"n": i}) for i, ids in enumerate(QUERIES)])
    closed = [ids if ids[-1] == EOS else [*ids, EOS] for ids in rollout.response_ids()]
    assert closed != rollout.response_ids()  # one was cut off, and is read with the end it lacks
    assert seen[0].queries == QUERIES and seen[0].response_ids == closed
    assert seen[0].prompts == ["p0", "p1", "p2", "p3"] and seen[0].rows[2] == {"n": 2}


# --- advantages against other responses to the same prompt -----------------------------------------


GROUPED = {
    "rloo": {"advantages": "rloo", "samples_per_prompt": 2},
    "grpo": {"advantages": "grpo", "samples_per_prompt": 2, "kl_penalty": "k3"},
}


def grouped_reference_step(kind: str):
    """The policy after one step of REINFORCE leave-one-out or GRPO on two pairs of episodes."""
    policy, ref = (tiny_models.policy(seed, torch.float64) for seed in (0, 5))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2, eps=1e-5, weight_decay=0.0)
    old, frozen, rewards = [], [], []
    for i in range(4):
        with torch.no_grad():
            old.append([x.item() for x in logprobs_alone(policy, QUERIES[i], RESPONSES[i], 0.7)])
            frozen.append([x.item() for x in logprobs_alone(ref, QUERIES[i], RESPONSES[i], 0.7)])
        reward = float(torch.tensor(SCORES[i])) - (0.0 if RESPONSES[i][-1] == EOS else 1.0)
        if kind == "rloo":
            reward -= 0.1 * sum(a - b for a, b in zip(old[i], frozen[i], strict=True))
        rewards.append(reward)
    loss, tokens = 0.0, sum(map(len, RESPONSES))
    for i in range(4):
        mine, other = rewards[i], rewards[i ^ 1]
        deviation = abs(mine - other) / math.sqrt(2)  # of two, over n - 1
        advantage = mine - other if kind == "rloo" else (mine - other) / 2 / (deviation + 1e-4)
        new = logprobs_alone(policy, QUERIES[i], RESPONSES[i], 0.7)
        for t, logp in enumerate(new):
            ratio = (logp - old[i][t]).exp()
            loss = loss + max(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2))
            if kind == "grpo":
                away = frozen[i][t] - logp
                loss = loss + 0.1 * (away.exp() - 1 - away)
    (loss / tokens).backward()
    norm = torch.stack([p.grad.norm() for p in policy.parameters()]).norm()
    for p in policy.parameters():
        p.grad *= min(1.0, 0.5 / (norm + 1e-6))
    optimizer.step()
    return policy


@pytest.mark.parametrize("micro", [None, 1, 3])
@pytest.mark.parametrize("kind", GROUPED)
def test_an_update_without_a_value_network_equals_the_reference(kind, micro):
    ppo = make(**GROUPED[kind], value_learning_rate=None, micro_batch_size=micro, value_model=None)
    metrics = ppo.update(recorded(ppo, 1, 2))
    assert_same(ppo.networks.policy, grouped_reference_step(kind))
    assert not ppo.networks.value_parameters()
    assert not [name for name in metrics if "value" in name or "explained" in name]


def test_a_group_whose_rewards_are_all_the_same_pushes_nowhere():
    for kind in GROUPED:
        ppo = make(**GROUPED[kind], value_learning_rate=None, kl_coef=0.0)
        rollout = replace(
            recorded(ppo), scores=torch.ones(4), ended=torch.ones(4, dtype=torch.bool)
        )
        assert ppo.update(rollout)["policy/grad_norm"] == pytest.approx(0, abs=1e-12)


def test_every_prompt_of_a_batch_comes_samples_times_and_in_one_process():
    stream = PromptStream([Query([i]) for i in range(6)], 8, seed=1, samples=2)
    whole = [stream.batch(number) for number in range(3)]
    ids = [[query.ids[0] for query in batch] for batch in whole]
    assert all(batch[::2] == batch[1::2] for batch in ids)
    first = [i for batch in ids for i in batch][:12]
    assert sorted(first) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]  # one epoch
    assert stream.batch(1, 0, 2) + stream.batch(1, 1, 2) == whole[1]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"advantages": "rloo"}, "samples_per_prompt of 2 or more"),
        ({**GROUPED["grpo"], "kl_penalty": "k1"}, "kl_penalty k3"),
        ({**GROUPED["rloo"], "value_lora": {}}, "no value network"),
        ({"samples_per_prompt": 3}, "does not divide by samples_per_prompt 3"),
    ],
)
def test_options_that_do_not_go_together_are_refused(changes, told):
    with pytest.raises(ValueError, match=told):
        PPOConfig(**{**CONFIG, "value_learning_rate": None, **changes})
