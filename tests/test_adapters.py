"""Policy, reference, reward and value as adapters on one base equal four models of their own."""

import copy
from pathlib import Path

import pytest
import torch

import tiny_models
from pipeline.config.ppo import PPOConfig
from pipeline.config.schema import Lora
from pipeline.errors import UserError
from pipeline.models.adapters import (
    ADAPTER,
    AdapterScorer,
    add_lora,
    merged,
    save_adapter,
)
from pipeline.models.forward import score_sequences
from pipeline.models.loading import load_reward, reward_from_policy
from pipeline.ppo.build import build_ppo
from pipeline.ppo.rewards import model_reward
from pipeline.ppo.rollout import Query
from pipeline.ppo.trainer import PPO

QUERIES = [Query(ids) for ids in ([2, 7, 8, 3], [2, 9, 3], [2, 5, 6, 7, 11, 3], [2, 12, 3])]
CONFIG = {
    "prompts": {"path": "none"},
    "batch_size": 4,
    "minibatches": 2,
    "ppo_epochs": 2,
    "iterations": 4,
    "learning_rate": 1e-2,
    "max_new_tokens": 6,
    "kl_coef": 0.1,
    "lora": {"r": 2},
    "shared_base": True,
}


def _shaken(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Adapters as training leaves them: their B matrices start at zero and would show nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run's sft and a reward model trained on it with LoRA, as the stages publish them."""
    run = tmp_path_factory.mktemp("run")
    tokenizer = tiny_models.tokenizer()
    tiny_models.policy(0).save_pretrained(run / "sft")
    tokenizer.save_pretrained(run / "sft")
    torch.manual_seed(2)
    model = _shaken(add_lora(reward_from_policy(run / "sft", tokenizer), Lora(r=3), "SEQ_CLS"), 1)
    save_adapter(model, run / "rm" / ADAPTER)
    whole = merged(model)
    whole.config.reward_bias = 0.25
    whole.save_pretrained(run / "rm")
    tokenizer.save_pretrained(run / "rm")
    return run


def shared(run: Path, **changes) -> PPO:
    torch.manual_seed(5)
    return build_ppo(PPOConfig(**{**CONFIG, **changes}), run / "sft", run / "rm")


def separate(run: Path, like: PPO) -> PPO:
    """Four models, the trainable ones from the same weights as `like`'s."""
    tokenizer = tiny_models.tokenizer()
    policy = add_lora(tiny_models.policy(0), Lora(r=2), "CAUSAL_LM")
    mine = dict(like.networks.policy.named_parameters())
    with torch.no_grad():
        for name, p in policy.named_parameters():
            p.copy_(mine[name])
    value = _shaken(add_lora(reward_from_policy(run / "sft", tokenizer), Lora(r=3), "SEQ_CLS"), 1)
    torch.manual_seed(2)
    again = add_lora(reward_from_policy(run / "sft", tokenizer), Lora(r=3), "SEQ_CLS")
    value.load_state_dict(_shaken(again, 1).state_dict())
    value.config.reward_bias = 0.25
    reward = load_reward(run / "rm")
    config = PPOConfig(**{**CONFIG, "shared_base": False, "value_lora": {"r": 3}})
    return PPO(config, tokenizer, policy, None, value, model_reward(reward, 0, 64))


def test_adapters_go_where_they_are_told():
    lora = Lora(r=2, target_modules=["q_proj", "v_proj"])
    model = add_lora(tiny_models.policy(0), lora, "CAUSAL_LM")
    adapted = {name.split(".")[-4] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == {"q_proj", "v_proj"}


def test_a_shared_base_learns_what_four_models_learn(run):
    one = shared(run)
    four = separate(run, one)
    for _ in range(2):
        rollouts = []
        for ppo in (one, four):
            torch.manual_seed(7)
            rollouts.append(ppo.rollout(QUERIES))
        a, b = rollouts
        assert a.response_ids() == b.response_ids()
        for name in ("scores", "values", "old_logprobs", "ref_logprobs"):
            torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-4, atol=1e-4)
        left, right = one.update(a), four.update(b)
        for name in ("loss/policy_avg", "loss/value_avg", "policy/grad_norm", "value/grad_norm"):
            assert left[name] == pytest.approx(right[name], rel=2e-3, abs=1e-5), name
    by_name = dict(four.networks.policy.named_parameters())
    for name, p in one.networks.policy.named_parameters():
        if ".default." in name:
            torch.testing.assert_close(p, by_name[name], rtol=1e-2, atol=2e-3)


def test_networks_on_one_base_take_turns_in_one_process(run):
    ppo = shared(run)
    assert len(ppo.passes) == 2 and len(ppo.networks.passes(2)) == 1
    s = ppo.rollout(QUERIES)
    outputs = [network(s, 1.0) for network in ppo.passes]
    assert [out.values is None for out in outputs] == [True, False]
    together = ppo.networks(s, 1.0)
    assert torch.equal(outputs[0].logprobs, together.logprobs)
    assert torch.equal(outputs[1].values, together.values)


def test_one_base_serves_all_and_only_the_adapters_train(run):
    ppo = shared(run)
    base = {n: p.clone() for n, p in ppo.networks.named_parameters() if "lora_" not in n}
    unique = {id(p) for p in ppo.networks.parameters()}
    plain = sum(1 for _ in tiny_models.policy(0).parameters())
    adapters = [n for n, _ in ppo.networks.named_parameters() if "lora_" in n]
    assert len(unique) == plain + len(adapters) + 1  # the value head
    before = {n: p.clone() for n, p in ppo.networks.named_parameters()}
    ppo.update(ppo.rollout(QUERIES))
    moved = {n for n, p in ppo.networks.named_parameters() if not torch.equal(p, before[n])}
    assert any(".default." in n for n in moved) and any(".value." in n for n in moved)
    assert any(n.endswith("score.weight") for n in moved)
    assert not any(".reward." in n for n in moved)
    assert moved & base.keys() == {n for n in moved if n.endswith("score.weight")}
    policy, value = ppo.networks.policy_parameters(), ppo.networks.value_parameters()
    assert not {id(p) for p in policy} & {id(p) for p in value}
    assert len(policy) + len(value) == len(ppo.networks.trained())


def test_the_reference_stays_the_base_and_the_reward_stays_the_reward(run):
    ppo = shared(run)
    sequences = [q.ids + [10, 11, 4] for q in QUERIES]
    wanted = score_sequences(load_reward(run / "rm"), [[]] * len(sequences), sequences, 0)
    for _ in range(2):
        rollout = ppo.rollout(QUERIES)
        ids = torch.cat([rollout.queries, rollout.responses], dim=1)
        mask = torch.cat([rollout.query_mask, rollout.response_mask], dim=1).long()
        base = tiny_models.policy(0)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = base(ids, attention_mask=mask, position_ids=positions).logits
        width = rollout.responses.shape[1]
        logp = torch.log_softmax(logits[:, -width - 1 : -1], -1)
        logp = logp.gather(-1, rollout.responses[..., None])[..., 0]
        real = rollout.response_mask
        torch.testing.assert_close(rollout.ref_logprobs[real], logp[real], rtol=1e-4, atol=1e-4)
        episodes = ppo.episodes(QUERIES, [[10, 11, 4]] * 4)
        assert ppo.score(episodes) == pytest.approx(wanted, rel=1e-4, abs=1e-4)
        ppo.update(rollout)


def test_what_is_published_is_the_policy_with_its_own_adapter(run):
    ppo = shared(run)
    ppo.update(ppo.rollout(QUERIES))
    ids = torch.tensor([[2, 7, 8, 3, 10]])
    with torch.no_grad():
        wanted = ppo.networks.policy(ids).logits
        plain = merged(copy.deepcopy(ppo.networks.policy))
        torch.testing.assert_close(plain(ids).logits, wanted, rtol=1e-4, atol=1e-4)
    assert not any("lora" in name for name, _ in plain.named_parameters())


def test_a_shared_base_goes_on_from_its_saved_state(run):
    ppo = shared(run)
    ppo.update(ppo.rollout(QUERIES))
    state, random = copy.deepcopy(ppo.state_dict()), torch.get_rng_state()
    ppo.update(ppo.rollout(QUERIES))
    again = shared(run)
    again.load_state_dict(state)
    torch.set_rng_state(random)
    again.update(again.rollout(QUERIES))
    wanted = ppo.networks.trained()
    assert all(torch.equal(p, wanted[n]) for n, p in again.networks.trained().items())


def test_without_a_reward_model_the_value_adapter_starts_at_the_base(run, tmp_path):
    (tmp_path / "rewards.py").write_text("")
    config = PPOConfig(**{**CONFIG, "rewards": [{"function": "test_adapters:length"}]})
    torch.manual_seed(0)
    ppo = build_ppo(config, run / "sft", None)
    assert isinstance(ppo.networks.value, AdapterScorer)
    metrics = ppo.update(ppo.rollout(QUERIES))
    assert metrics["value/grad_norm"] > 0


def length(prompts, responses, rows):
    return [float(len(response)) for response in responses]


def test_a_reward_model_without_an_adapter_is_refused_with_the_remedy(run, tmp_path):
    tiny_models.reward(1).save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"shared_base needs a reward model trained with lora.*rm\.yaml"
    ):
        build_ppo(PPOConfig(**CONFIG), run / "sft", tmp_path)


@pytest.mark.parametrize(
    ("change", "need"),
    [
        ({"lora": None}, "lora"),
        ({"value": "shared"}, "value: separate"),
        ({"value_lora": {"r": 2}}, "no value_lora"),
    ],
)
def test_options_that_do_not_go_with_a_shared_base_are_refused(change, need):
    with pytest.raises(ValueError, match=f"shared_base needs {need}"):
        PPOConfig(**{**CONFIG, **change})
