"""Every PPO option changes what it says, and nothing when it is off."""

import copy
import json
import math
import weakref

import pytest
import torch
from accelerate import Accelerator

import tiny_models
from pipeline.config.ppo import PPOConfig
from pipeline.errors import UserError
from pipeline.models.sequences import Sequences
from pipeline.ppo import gates, maths
from pipeline.ppo.build import _ptx
from pipeline.ppo.rollout import PromptStream, Query
from pipeline.ppo.trainer import PPO
from test_ppo_exact import CONFIG, EOS, QUERIES, RESPONSES, SCORES, assert_same, make, recorded

TOKENS = sum(map(len, RESPONSES))


def updated(**changes):
    """(metrics, policy weights) after one update on the fixed episodes."""
    ppo = make(**changes)
    metrics = ppo.update(recorded(ppo))
    return metrics, torch.cat([p.flatten() for p in ppo.networks.policy_parameters()]).detach()


@pytest.fixture(scope="module")
def plain():
    return updated()


@pytest.mark.parametrize(
    "change",
    [
        {"kl_coef": 0.5},
        {"kl_penalty": "k2"},
        {"kl_penalty": "k3"},
        {"gamma": 0.5},
        {"lam": 0.1},
        {"temperature": 1.0},
        {"entropy_coef": 0.3},
        {"whiten_advantages": False},
        {"whiten_rewards": True},
        {"scale_scores": True},
        {"clip_scores": 0.1},
        {"missing_eos": "replace"},
        {"missing_eos": "none"},
        {"missing_eos_penalty": 3.0},
        {"length_penalty": 0.2},
        {"max_grad_norm": 1e-3},
        {"learning_rate": 1e-3},
        {"weight_decay": 0.5},
        {"adam_eps": 1.0},
        {"minibatches": 2},
        {"ppo_epochs": 2},
        {"warmup_ratio": 0.9},
    ],
    ids=str,
)
def test_an_option_moves_the_weights(plain, change):
    assert not torch.equal(updated(**change)[1], plain[1])


@pytest.mark.parametrize(
    "change",
    [{"kl_estimator": "k3"}, {"micro_batch_size": 2}, {"kl_stop": 1e9}, {"ema_decay": 0.9}],
    ids=str,
)
def test_an_option_that_only_measures_or_saves_memory_leaves_the_weights(plain, change):
    torch.testing.assert_close(updated(**change)[1], plain[1], rtol=1e-9, atol=1e-12)


def test_kl_estimator_changes_the_logged_kl_alone(plain):
    k1, k2, k3 = (updated(kl_estimator=k)[0]["objective/kl"] for k in ("k1", "k2", "k3"))
    assert k1 == plain[0]["objective/kl"] and len({k1, k2, k3}) == 3 and min(k2, k3) > 0


@pytest.mark.parametrize("which", ["clip_range", "clip_range_value"])
def test_a_tighter_clip_clips_more(which):
    name = {"clip_range": "policy/clipfrac_avg", "clip_range_value": "val/clipfrac_avg"}[which]
    fractions = [updated(ppo_epochs=3, **{which: c})[0][name] for c in (1e-6, 3.0, 1e9)]
    assert fractions[0] > fractions[1] >= fractions[2] == 0


def test_values_unclipped_when_clip_range_value_is_none():
    assert updated(ppo_epochs=3, clip_range_value=None)[0]["val/clipfrac_avg"] == 0


def test_vf_coef_scales_the_value_gradient():
    one, two = (updated(vf_coef=c, max_grad_norm=1e9)[0]["value/grad_norm"] for c in (1.0, 2.0))
    assert two == pytest.approx(2 * one, rel=1e-4)


def test_the_value_learning_rate_is_its_own():
    ppo = make(value_learning_rate=0.0)
    before = copy.deepcopy(ppo.networks.value)
    ppo.update(recorded(ppo))
    assert_same(ppo.networks.value, before, rtol=0)


def test_the_gradient_norm_is_really_clipped():
    for limit in (1e-3, 0.5):
        ppo = make(max_grad_norm=limit)
        norms = []
        step = ppo.optimizer.step

        def spy(norms=norms, ppo=ppo, step=step):
            for parameters in (ppo.networks.policy_parameters(), ppo.networks.value_parameters()):
                norms.append(
                    torch.stack([p.grad.norm() for p in parameters if p.grad is not None])
                    .norm()
                    .item()
                )
            step()

        ppo.optimizer.step = spy
        metrics = ppo.update(recorded(ppo))
        assert max(norms) <= limit * 1.001 < metrics["policy/grad_norm"]


def test_kl_stop_ends_the_updates_of_an_iteration():
    ppo = make(ppo_epochs=4, kl_stop=1e-6)
    ppo.update(recorded(ppo))
    assert ppo.optimizer_steps == 2  # the first step moves the policy, the second sees it and stops
    free = make(ppo_epochs=4)
    free.update(recorded(free))
    assert free.optimizer_steps == 4


def test_adaptive_kl_moves_the_coefficient_after_each_iteration():
    ppo = make(kl_target=0.01, kl_horizon=100)
    metrics = ppo.update(recorded(ppo))
    expected = maths.adapted_kl_coef(0.1, metrics["objective/kl"], 0.01, 4, 100)
    assert ppo.kl_coef == pytest.approx(expected) != 0.1


@pytest.mark.parametrize(
    ("schedule", "warmup", "factors"),
    [
        ("constant", 0.0, [1, 1, 1, 1]),
        ("linear", 0.0, [1, 0.75, 0.5, 0.25]),
        ("cosine", 0.0, [1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)]),
        ("constant", 0.5, [0.5, 1, 1, 1]),
        ("linear", 0.5, [0.5, 1, 1, 0.5]),
    ],
)
def test_learning_rate_schedules(schedule, warmup, factors):
    found = [maths.lr_factor(4, warmup, schedule, step) for step in range(4)]
    assert found == pytest.approx(factors)


def test_stop_tokens_end_responses_besides_eos():
    ppo = make(stop_tokens=["w3"])
    ppo.iteration = 1
    stop = ppo.tokenizer.convert_tokens_to_ids("w3")
    torch.manual_seed(0)
    ids = [ids for _ in range(30) for ids in _sampled(ppo)]
    ending = [row[-1] for row in ids if len(row) < 5]
    assert stop in ending and set(ending) <= {stop, EOS}
    assert not any(stop in row[:-1] for row in ids)


def _sampled(ppo):
    return ppo.rollout([Query(ids) for ids in QUERIES]).response_ids()


def test_stop_strings_of_several_tokens_end_responses_too():
    ppo = make(stop_tokens=["w3 w4"], max_new_tokens=16, temperature=5.0)
    ppo.iteration = 1  # the reference differs from the policy on purpose
    texts, ended = [], []
    for _ in range(60):
        rollout = ppo.rollout([Query(ids) for ids in QUERIES])
        texts += [ppo.tokenizer.decode(ids) for ids in rollout.response_ids()]
        ended += rollout.ended.tolist()
    stopped = [text for text, end in zip(texts, ended, strict=True) if end]
    assert any(text.endswith("w3 w4") for text in stopped)
    assert all("w3 w4" not in text.removesuffix("w3 w4") for text in texts)


def test_ema_follows_the_policy_at_its_rate():
    ppo = make(ema_decay=0.75)
    start = [p.detach().clone() for p in ppo.networks.policy_parameters()]
    ppo.update(recorded(ppo))
    for average, old, new in zip(
        ppo.ema.shadow, start, ppo.networks.policy_parameters(), strict=True
    ):
        torch.testing.assert_close(average, 0.75 * old + 0.25 * new)
    live = [p.detach().clone() for p in ppo.networks.policy_parameters()]
    with ppo.ema.swapped_in(ppo.networks.policy_parameters()):
        assert torch.equal(ppo.networks.policy_parameters()[0], ppo.ema.shadow[0])
    assert all(
        torch.equal(a, b) for a, b in zip(live, ppo.networks.policy_parameters(), strict=True)
    )


# --- the pretraining mix -------------------------------------------------------------------------


def with_text(ppo, rows):
    """Attach a fixed ptx stream of right-padded rows, repeated as often as asked."""

    def batch(step, count):
        ids = torch.tensor(rows)[torch.arange(count) % len(rows)]
        return Sequences.of_texts(ids, ids != 0)

    ppo.ptx = batch
    return ppo


PTX = {"ptx_coef": 0.5, "ptx_data": {"path": "none"}, "ptx_ratio": 2}


def test_ptx_adds_the_text_likelihood_whatever_the_micro_batch():
    """Gradient with ptx - gradient without = -coef * d(mean log-likelihood), computed apart."""
    rows = [[5, 6, 7, 4], [8, 9, 4, 0]]
    grads = {}
    for name, changes in {"off": {}, "on": PTX, "micro": {**PTX, "micro_batch_size": 1}}.items():
        ppo = make(max_grad_norm=1e9, **changes)
        if name != "off":
            with_text(ppo, rows)
        ppo.optimizer.step, ppo.optimizer_steps = lambda: None, 1
        held = []
        zero = ppo.optimizer.zero_grad
        ppo.optimizer.zero_grad = lambda held=held, ppo=ppo, zero=zero: (
            held.extend(p.grad.clone() for p in ppo.networks.policy_parameters()),
            zero(),
        )
        metrics = ppo.update(recorded(ppo))
        assert ("loss/ptx_avg" in metrics) == (name != "off")
        grads[name] = held
    model = tiny_models.policy(0, torch.float64)
    total = 0.0
    for row in ([5, 6, 7, 4], [8, 9, 4]):
        logp = torch.log_softmax(model(torch.tensor([row])).logits[0], dim=-1)
        total = total + sum(logp[t, row[t + 1]] for t in range(len(row) - 1))
    (-0.5 * total / 5).backward()
    for off, on, micro, p in zip(*grads.values(), model.parameters(), strict=True):
        torch.testing.assert_close(on - off, p.grad, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(micro, on, rtol=1e-9, atol=1e-12)


def test_ptx_texts_are_cut_at_their_longest(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"text": "w1 " * 30}) + "\n")
    for longest in (5, 9):
        data = {"ptx_coef": 0.5, "ptx_data": {"path": str(path)}, "ptx_max_length": longest}
        config = PPOConfig(prompts={"path": "none"}, **data)
        texts = _ptx(config, tiny_models.tokenizer(), Accelerator())(0, 3)
        assert texts.responses.shape == texts.response_mask.shape == (3, longest - 1)
        assert texts.query_mask.all() and texts.response_mask.all()


def test_a_special_token_that_a_ptx_text_spells_is_letters(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"text": "w1 <end> w2"}) + "\n")
    config = PPOConfig(prompts={"path": "none"}, ptx_coef=0.5, ptx_data={"path": str(path)})
    tokenizer = tiny_models.tokenizer()
    texts = _ptx(config, tokenizer, Accelerator())(0, 1)
    assert texts.responses.tolist() == [tokenizer.encode("<unk> w2 <end>")]


def test_ptx_examples_come_in_the_configured_ratio():
    counts = []
    ppo = with_text(make(**{**PTX, "ptx_ratio": 3, "minibatches": 2}), [[5, 6, 4]])
    inner = ppo.ptx
    ppo.ptx = lambda step, count: counts.append(count) or inner(step, count)
    ppo.update(recorded(ppo))
    assert counts == [6, 6]


# --- models --------------------------------------------------------------------------------------


def test_a_shared_trunk_learns_with_a_value_head_of_its_own():
    ppo = make(value="shared")
    assert ppo.networks.value is None
    rollout = recorded(ppo)
    assert torch.equal(rollout.values, torch.zeros_like(rollout.values))  # the head starts at zero
    ppo.update(rollout)
    assert ppo.networks.value_head.weight.abs().sum() > 0


def test_separate_networks_take_turns_so_that_one_has_its_activations_in_memory():
    ppo = make(micro_batch_size=2)
    policy, value = ppo.passes
    made, gone = [], []
    policy.register_forward_hook(lambda _, __, out: made.append(weakref.ref(out.logprobs)))
    value.register_forward_pre_hook(lambda _, __: gone.append(made[-1]() is None))
    ppo.update(recorded(ppo))
    assert gone == [True, True]
    assert len(make(value="shared").passes) == 1


def test_a_lora_policy_is_its_own_reference():
    from pipeline.config.schema import Lora
    from pipeline.models.adapters import add_lora

    base = tiny_models.policy(0)
    policy = add_lora(copy.deepcopy(base), Lora(r=2), "CAUSAL_LM")
    config = PPOConfig(**{**CONFIG, "lora": {"r": 2}})
    value = add_lora(tiny_models.reward(1), Lora(r=2), "SEQ_CLS")
    ppo = PPO(config, tiny_models.tokenizer(), policy, None, value, lambda e: SCORES)
    torch.manual_seed(0)
    for expected in (True, False):
        rollout = ppo.rollout([Query(ids) for ids in QUERIES])
        same = torch.allclose(rollout.old_logprobs, rollout.ref_logprobs, atol=1e-6)
        assert same == expected
        alone = [
            base(torch.tensor([q + r])).logits[0] / 0.7
            for q, r in zip(QUERIES, rollout.response_ids(), strict=True)
        ]
        for i, (q, r) in enumerate(zip(QUERIES, rollout.response_ids(), strict=True)):
            logp = torch.log_softmax(alone[i], dim=-1)
            expected_ref = torch.stack([logp[len(q) - 1 + t, token] for t, token in enumerate(r)])
            torch.testing.assert_close(
                rollout.ref_logprobs[i, : len(r)], expected_ref, rtol=1e-4, atol=1e-4
            )
        ppo.update(rollout)
    frozen = [n for n, p in policy.named_parameters() if not p.requires_grad]
    assert frozen and all("lora_" not in n for n in frozen)
    assert any("score" in n for n, p in value.named_parameters() if p.requires_grad)


# --- the sampler's logprobs ----------------------------------------------------------------------


@pytest.mark.parametrize("value", ["separate", "shared"])
def test_bf16_multiplies_in_bf16_keeps_float32_weights_and_comes_near(value):
    found, dtypes = {}, {}
    for precision in ("fp32", "bf16"):
        keys = {"precision": precision, "value": value, "old_logprobs": None, "learning_rate": 1e-4}
        ppo = PPO(
            PPOConfig(**{**CONFIG, **keys}),
            tiny_models.tokenizer(),
            policy=tiny_models.policy(0),
            reference=tiny_models.policy(0),
            value=None if value == "shared" else tiny_models.reward(1),
            score=lambda episodes: SCORES,
        )
        seen = dtypes.setdefault(precision, set())
        layer = ppo.networks.policy.model.layers[0].self_attn.q_proj
        layer.register_forward_hook(lambda module, args, out, seen=seen: seen.add(out.dtype))
        torch.manual_seed(4)
        rollout = ppo.rollout([Query(ids) for ids in QUERIES])
        found[precision] = rollout, ppo.update(rollout)
        assert {p.dtype for p in ppo.networks.parameters()} == {torch.float32}
    assert dtypes == {"fp32": {torch.float32}, "bf16": {torch.bfloat16}}
    (exact, _), (rounded, metrics) = found["fp32"], found["bf16"]
    assert rounded.old_logprobs.dtype == rounded.values.dtype == torch.float32
    assert exact.old_logprobs is exact.sampler_logprobs
    assert rounded.old_logprobs is not rounded.sampler_logprobs  # recomputed
    assert metrics["val/sampler_mismatch"] < 0.1
    assert metrics["val/ratio"] == pytest.approx(1, abs=0.05)
    assert exact.response_ids()[0][0] == rounded.response_ids()[0][0]


def test_old_logprobs_are_the_samplers_in_fp32_and_recomputed_where_asked_or_in_bf16():
    assert not PPOConfig(prompts={"path": "none"}).recompute()
    assert PPOConfig(prompts={"path": "none"}, precision="bf16").recompute()
    for kind in ("sampler", "recompute"):
        ppo = make(old_logprobs=kind)
        ppo.iteration = 1  # the reference differs from the policy on purpose
        rollout = ppo.rollout([Query(ids) for ids in QUERIES])
        assert (rollout.old_logprobs is rollout.sampler_logprobs) == (kind == "sampler")
        mask = rollout.response_mask
        torch.testing.assert_close(
            rollout.old_logprobs[mask].float(),
            rollout.sampler_logprobs[mask].float(),
            rtol=1e-4,
            atol=1e-5,
        )


def test_the_mismatch_of_sampler_and_training_is_measured():
    for gap in (0.0, 0.25):
        ppo = make(ppo_epochs=2)
        rollout = recorded(ppo)
        rollout.sampler_logprobs = rollout.old_logprobs + gap
        assert ppo.update(rollout)["val/sampler_mismatch"] == pytest.approx(gap, abs=1e-9)


def test_the_samplers_error_is_weighed_out_up_to_the_cap():
    """Tokens drawn too rarely count for more: the loss is that with weights written out."""
    gap = torch.tensor(0.4)
    losses = {}
    for cap in (None, 1.2, 9.0):
        ppo = make(sampler_correction=cap, whiten_advantages=False, learning_rate=0.0)
        rollout = recorded(ppo)
        rollout.sampler_logprobs = rollout.old_logprobs - gap
        losses[cap] = ppo.update(rollout)["loss/policy_avg"]
    assert losses[1.2] == pytest.approx(1.2 * losses[None], rel=1e-6)
    assert losses[9.0] == pytest.approx(math.exp(0.4) * losses[None], rel=1e-6)
    with pytest.raises(ValueError, match="sampler_correction needs old_logprobs: recompute"):
        make(sampler_correction=2.0, old_logprobs="sampler")


def test_the_rate_that_is_recorded_is_one_that_was_stepped_with():
    ppo = make(learning_rate=1e-3, schedule="linear", warmup_ratio=0.0, iterations=2)
    assert [ppo.update(recorded(ppo))["lr"] for _ in range(2)] == pytest.approx([1e-3, 5e-4])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_ratios_spread_is_about_its_mean(dtype):
    """A policy that moved a little between rollout and update: ratios written out from its logprobs."""
    models = tiny_models.policy(0, dtype), tiny_models.reward(1, dtype, bias=0.25)
    ppo = make(*models, learning_rate=0.0, value_learning_rate=0.0, kl_coef=0.0)
    rollout = recorded(ppo)
    moved = rollout.old_logprobs - torch.where(rollout.response_mask, 9e-4, 0.0)
    moved[0, 0] += 5e-4
    ratios = (rollout.old_logprobs - moved)[rollout.response_mask].double().exp()
    rollout.old_logprobs = moved
    metrics = ppo.update(rollout)
    exact = dtype == torch.float64
    assert metrics["val/ratio"] == pytest.approx(ratios.mean().item(), rel=1e-9 if exact else 1e-6)
    expected = ratios.var(correction=0).item()
    assert metrics["val/ratio_var"] == pytest.approx(expected, rel=1e-3 if exact else 0.05)


def test_an_update_stopped_early_by_its_kl_does_not_confuse_the_next():
    ppo = make(kl_stop=1e-9, ppo_epochs=3, learning_rate=1e-2)
    ppo.iteration = 1
    for _ in range(4):
        before = ppo.optimizer_steps
        ppo.update(ppo.rollout([Query(ids) for ids in QUERIES]))
        assert ppo.optimizer_steps - before in (1, 2)  # 1 is before any drift


# --- invariants at run time ----------------------------------------------------------------------


def test_a_policy_that_changes_between_rollout_and_update_is_caught():
    ppo = make()
    rollout = recorded(ppo)
    with torch.no_grad():
        ppo.networks.policy.lm_head.weight *= 1.1
    with pytest.raises(gates.InvariantError, match=r"iteration 0.*log ratio"):
        ppo.update(rollout)


def test_in_bf16_a_token_that_rounding_moves_far_passes_and_dropout_does_not():
    old, mask = torch.full((16, 32), -1.0), torch.ones(16, 32, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    noise = 0.03 * torch.randn(old.shape, generator=generator)  # as measured of a model of 135M
    noise[3, 7] = 0.3  # and its farthest token
    gates.ratio_is_one(old + noise, old, mask, 2, True)
    with pytest.raises(gates.InvariantError, match="reaches 3"):
        gates.ratio_is_one(old + noise, old, mask, 2, False)
    with pytest.raises(gates.InvariantError, match="averages"):
        gates.ratio_is_one(old + 5 * noise, old, mask, 2, True)
    padded = torch.where(torch.arange(32) < 4, noise, torch.nan)  # padding is never read
    gates.ratio_is_one(old + padded, old, ~torch.isnan(padded), 2, True)


def test_a_policy_that_is_not_the_reference_at_the_start_is_caught():
    with pytest.raises(gates.InvariantError, match="reference"):
        make().rollout([Query(ids) for ids in QUERIES])


def test_dropout_left_on_is_caught():
    policy = tiny_models.policy(0, attention_dropout=0.5)
    ppo = make(policy_model=policy.train(), value_model=tiny_models.reward(1))
    with pytest.raises(gates.InvariantError, match="dropout"):
        ppo.update(recorded(ppo))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_stops_before_any_step(bad):
    ppo = make()
    ppo.iteration = 1
    ppo.score = lambda episodes: [0.0, 0.0, bad, 0.0]
    with pytest.raises(UserError, match="iteration 1: the reward of sample 2"):
        ppo.rollout([Query(ids, f"prompt {i}") for i, ids in enumerate(QUERIES)])


def test_a_gradient_that_is_not_finite_stops_before_the_step():
    ppo = make()
    rollout = recorded(ppo)
    rollout.ref_logprobs[0, 0] = float("nan")
    before = [p.detach().clone() for p in ppo.networks.parameters()]
    with pytest.raises(gates.InvariantError, match="nothing was stepped"):
        ppo.update(rollout)
    assert all(torch.equal(a, b) for a, b in zip(before, ppo.networks.parameters(), strict=True))


def test_a_mask_that_hides_the_eos_is_caught():
    responses, ended = torch.tensor([[5, EOS, 0]]), torch.tensor([True])
    right = torch.tensor([[True, True, False]])
    gates.mask_is_prefix(right, responses, ended, [EOS])
    for mask, says in (([True, False, False], "ended"), ([False, True, False], "mask")):
        with pytest.raises(gates.InvariantError, match=says):
            gates.mask_is_prefix(torch.tensor([mask]), responses, ended, [EOS])
    with pytest.raises(gates.InvariantError, match="mask"):  # goes on after its EOS
        gates.mask_is_prefix(torch.ones(1, 3, dtype=torch.bool), responses, ended, [EOS])
    with pytest.raises(gates.InvariantError, match="ended"):
        gates.mask_is_prefix(right, responses, ~ended, [EOS], strings=True)
    going_on = torch.tensor([[True, False, False]])  # ended by a string, without a stop token
    gates.mask_is_prefix(going_on, responses, ended, [EOS], strings=True)


# --- prompts and state ---------------------------------------------------------------------------


def test_batches_are_a_function_of_their_number_and_cover_every_prompt():
    queries = [Query([i]) for i in range(10)]
    stream = PromptStream(queries, batch_size=4, seed=1)
    drawn = [q.ids[0] for n in range(5) for q in stream.batch(n)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10)) and drawn[:10] != drawn[10:]
    assert [q.ids for q in stream.batch(3)] == [[i] for i in drawn[12:16]]
    halves = [stream.batch(2, process=p, processes=2) for p in (0, 1)]
    assert halves[0] + halves[1] == stream.batch(2)


def test_a_loaded_state_goes_on_exactly():
    straight = make(kl_target=0.01, scale_scores=True, ema_decay=0.9, schedule="linear")
    straight.update(recorded(straight))
    state = copy.deepcopy(straight.state_dict())
    resumed = make(kl_target=0.01, scale_scores=True, ema_decay=0.9, schedule="linear")
    resumed.load_state_dict(state)
    metrics = [ppo.update(recorded(ppo)) for ppo in (straight, resumed)]
    assert metrics[0] == metrics[1]
    assert_same(straight.networks, resumed.networks, rtol=0)
    assert all(
        torch.equal(a, b) for a, b in zip(straight.ema.shadow, resumed.ema.shadow, strict=True)
    )
