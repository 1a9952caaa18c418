"""What PPO refuses before it begins, and what it does not let pass while it runs."""

import json
from pathlib import Path
from types import SimpleNamespace

import accelerate.utils.launch
import pandas
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

import tiny_models
from pipeline.config.ppo import PPOConfig
from pipeline.config.rewards import Reward
from pipeline.config.schema import Lora
from pipeline.data.template import encode_prompt
from pipeline.engines import start
from pipeline.errors import UserError
from pipeline.models.adapters import add_lora, scorers_on
from pipeline.models.forward import response_scores
from pipeline.models.generation import stops
from pipeline.models.packing import enable_packing
from pipeline.models.sequences import Sequences
from pipeline.ppo import build, rewards
from pipeline.ppo.ema import Ema
from pipeline.ppo.gates import InvariantError
from pipeline.ppo.rewards import Episodes
from pipeline.ppo.rollout import Query
from pipeline.ppo.watch import Watch
from test_ppo_exact import EOS, QUERIES, RESPONSES, make, recorded

# --- weights move, networks train -----------------------------------------------------------------


def test_an_optimizer_over_other_tensors_is_found_out_at_the_first_step():
    ppo = make()
    for group in ppo.optimizer.param_groups[:1]:
        group["params"][:] = [torch.nn.Parameter(p.detach().clone()) for p in group["params"]]
    with pytest.raises(
        InvariantError, match="first optimizer step left the policy network as it was"
    ):
        ppo.update(recorded(ppo))


def test_a_learning_rate_of_zero_is_no_standstill():
    ppo = make(learning_rate=0.0, value_learning_rate=0.0)
    ppo.update(recorded(ppo))


@pytest.mark.parametrize("changes", [{"learning_rate": 1e-30}, {"max_grad_norm": 1e-30}])
def test_a_first_step_smaller_than_rounding_is_no_standstill(changes):
    """As the first of a long warm-up is."""
    ppo = make(value_learning_rate=changes.get("learning_rate"), **changes)
    ppo.update(recorded(ppo))


def test_a_network_with_nothing_to_train_is_refused():
    with pytest.raises(InvariantError, match="the policy network has nothing to train"):
        make(policy_model=tiny_models.policy(0, torch.float64).requires_grad_(False))


def test_a_saved_average_goes_to_the_device_of_its_parameters():
    parameters = [torch.nn.Parameter(torch.zeros(2, device="meta"))]
    ema = Ema(parameters, 0.5)
    ema.load([torch.ones(2)], parameters)
    assert [x.device.type for x in ema.shadow] == ["meta"]


# --- how it was started ---------------------------------------------------------------------------


def test_sizes_that_do_not_divide_by_the_processes_are_refused_with_those_that_do(monkeypatch):
    config = PPOConfig(batch_size=512, minibatches=8)
    build.check_divides(config)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="8 x 3 processes; 504 or 528 would"):
        build.check_divides(config)
    with pytest.raises(UserError, match="8 x 3 processes; 24 would"):
        build.check_divides(PPOConfig(batch_size=8, minibatches=8))


def test_a_launcher_config_is_read_before_anything_slow(monkeypatch):
    start.check()
    source = Path(accelerate.utils.launch.__file__).read_text()
    for engine in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        assert f'"ACCELERATE_USE_{engine}"' in source  # accelerate's own spelling
        with monkeypatch.context() as patch, pytest.raises(UserError, match=engine):
            patch.setenv(f"ACCELERATE_USE_{engine}", "true")
            start.check()
    start.check()


def test_what_is_no_folder_is_refused_in_words(tmp_path):
    with pytest.raises(UserError, match="sft: a folder of a model, not a LlamaForCausalLM"):
        build.build_ppo(PPOConfig(), tiny_models.policy(0))
    with pytest.raises(UserError, match="sft: a folder of a model, not a NoneType"):
        build.build_ppo(PPOConfig(), None)
    with pytest.raises(UserError, match="shared_base needs a reward model trained with lora"):
        tiny_models.policy(0).save_pretrained(tmp_path)
        tiny_models.tokenizer().save_pretrained(tmp_path)
        folder = str(tmp_path)  # a text is a folder, too
        build.build_ppo(PPOConfig(lora=Lora(r=2), shared_base=True), folder, folder)
    with pytest.raises(UserError, match="rewards name rm: give its folder"):
        build.build_ppo(PPOConfig(), tmp_path)


def test_queries_are_a_list_of_prompts():
    ppo = make()
    frame = pandas.DataFrame({"prompt": ["w1"]})  # which iterates over its columns
    for wrong in ("hello", [], [[{"role": "user", "content": "w1"}]], frame, iter(["w1"]), None):
        with pytest.raises(UserError, match="queries: "):
            ppo.queries(wrong)
    assert [q.text for q in ppo.queries(["w1", "w2"])] == ["w1", "w2"]


def test_another_precision_in_the_same_process(tmp_path):
    """Each keeps its own, the earlier ones too when others have been built."""
    for name in ("sft", "rm"):
        model = tiny_models.policy(0) if name == "sft" else tiny_models.reward(1)
        model.save_pretrained(tmp_path / name)
        tiny_models.tokenizer().save_pretrained(tmp_path / name)
    built = []
    for precision in ("fp32", "bf16", "fp32"):
        config = PPOConfig(batch_size=2, minibatches=1, precision=precision, max_new_tokens=3)
        built.append(build.build_ppo(config, tmp_path / "sft", tmp_path / "rm"))
    found = []
    for ppo in built:
        layer, seen = ppo.networks.policy.model.layers[0].self_attn.q_proj, set()
        layer.register_forward_hook(lambda module, args, out, seen=seen: seen.add(out.dtype))
        before = torch.get_autocast_dtype("cpu")
        torch.set_autocast_dtype("cpu", torch.float16)  # the default on GPUs
        try:
            ppo.update(ppo.rollout(ppo.queries(["w1", "w2 w3"])))
        finally:
            torch.set_autocast_dtype("cpu", before)
        found.append(seen)
    assert found == [{torch.float32}, {torch.bfloat16}, {torch.float32}]


# --- rewards --------------------------------------------------------------------------------------


def test_a_reward_model_with_another_template_reads_the_text(tmp_path):
    other = tiny_models.tokenizer()
    other.chat_template = tiny_models.TEMPLATE.replace("<user>", "<user> w9")
    tiny_models.reward(1).save_pretrained(tmp_path)
    other.save_pretrained(tmp_path)
    terms = build._Terms(None, tiny_models.tokenizer(), torch.device("cpu"), batch_size=2)
    episodes = Episodes(
        queries=[[2, 7, 3]],
        response_ids=[[10, 4]],
        prompts=["w2"],
        responses=["w5"],
        rows=[{}],
        messages=[[{"role": "user", "content": "w2"}]],
    )
    found = terms.build(Reward(model=str(tmp_path)))(episodes)
    by_text = rewards.text_model_reward(tiny_models.reward(1), other, 2)(episodes)
    by_ids = rewards.model_reward(tiny_models.reward(1), 0, 2)(episodes)
    assert found == pytest.approx(by_text)
    assert found != pytest.approx(by_ids)


def test_a_date_in_a_row_reaches_a_service_as_text(monkeypatch):
    import datetime

    sent = []

    class Answer:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def read(self):
            return b'{"scores": [1.0]}'

    monkeypatch.setattr(
        rewards.urllib.request, "urlopen", lambda request, timeout: sent.append(request) or Answer()
    )
    row = {"day": datetime.date(2020, 1, 2)}
    episodes = Episodes([[1]], [[4]], ["a"], ["b"], [row])
    assert rewards.remote_reward("http://localhost", None, 0)(episodes) == [1.0]
    assert json.loads(sent[0].data)["rows"] == [{"day": "2020-01-02"}]


def test_samples_show_token_rewards_in_their_scores():
    """Alone they are all of the score."""
    ppo = make()
    ppo.score, ppo.token_score = rewards.weighted_sum([]), lambda e: [[0.5, 1.0] for _ in e.tokens]
    shown: list[dict] = []
    tracker = SimpleNamespace(samples=lambda at, rows: shown.extend(rows))
    Watch(ppo.config, ppo, [Query(ids) for ids in QUERIES], tracker).samples()
    assert [row["score"] for row in shown] == [1.5] * len(QUERIES)


def test_a_response_that_was_cut_off_reads_the_same_to_both_kinds_of_reward_model():
    """Closed by one EOS, by its tokens and by its text."""
    ppo, model = make(), tiny_models.reward(1)
    messages = [{"role": "user", "content": "w2"}]
    query = Query(encode_prompt(ppo.tokenizer, messages), "w2", {}, messages)
    for ids in ([10], [10, EOS]):
        episodes = ppo.episodes([query], [ids])
        by_text = rewards.text_model_reward(model, ppo.tokenizer, 1)(episodes)
        by_tokens = rewards.model_reward(model, 0, 1)(episodes)
        wanted = rewards.score_sequences(model, [query.ids], [[10, EOS]], 0)
        assert by_text == by_tokens == wanted


# --- models ---------------------------------------------------------------------------------------


def projecting() -> OPTForCausalLM:
    """As OPT-350M does: hidden states of 16 become 8 before the output layer."""
    sizes = {"vocab_size": 29, "hidden_size": 16, "ffn_dim": 32, "word_embed_proj_dim": 8}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    torch.manual_seed(0)
    config = OPTConfig(**sizes, dropout=0.0, pad_token_id=0, eos_token_id=4, bos_token_id=2)
    return OPTForCausalLM(config).double().eval()


@pytest.mark.parametrize("old_logprobs", ["recompute", "sampler"])
def test_a_shared_value_head_fits_a_model_that_projects_its_last_states(old_logprobs):
    """By both ways to its hidden states: with the logits, and alone."""
    policy = projecting()
    ppo = make(policy_model=policy, value="shared", old_logprobs=old_logprobs)
    torch.nn.init.ones_(ppo.networks.value_head.weight)
    rollout = recorded(ppo)
    hidden = policy.model(torch.tensor([QUERIES[0] + RESPONSES[0]])).last_hidden_state[0]
    wanted = hidden[len(QUERIES[0]) - 1 : -1].sum(dim=1)
    found = rollout.values[0, : len(wanted)]
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-6, atol=1e-8)
    if old_logprobs == "recompute":  # these episodes have no sampler's logprobs
        assert ppo.update(rollout)["value/grad_norm"] > 0


def test_a_value_adapter_fits_a_model_that_projects_its_last_states():
    policy = add_lora(projecting(), Lora(r=2), "CAUSAL_LM")
    _, value = scorers_on(policy, None, Lora(r=2))
    s = Sequences.of(QUERIES, RESPONSES, 0)
    assert response_scores(value, s).shape == s.response_mask.shape


def test_positions_that_depend_on_the_batch_are_not_packed():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny_models.policy(0, rope_parameters=rope)
    assert enable_packing(model) == "its positions depend on the longest sequence of a batch"


def test_stop_strings_are_matched_by_text_however_they_are_spelled():
    table = {"<unk>": 0, "<end>": 1, "\n": 2, "\n\n": 3, "User": 4, " User": 5, "x": 6}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(table, unk_token="<unk>")),
        unk_token="<unk>",
        eos_token="<end>",
    )
    tokenizer.decode = lambda ids, **_: "".join({v: k for k, v in table.items()}[i] for i in ids)
    stop = stops(tokenizer, ["\n\n", "User"])
    hits = stop.hits(torch.tensor([[6, 3], [2, 2], [6, 2], [6, 5], [6, 4], [6, 1], [6, 6]]))
    assert hits.tolist() == [True, True, False, True, True, True, False]


@pytest.mark.parametrize("minibatches", [1, 2])
def test_a_minibatch_is_a_permutation_of_all_episodes(minibatches):
    ppo = make(minibatches=minibatches, ppo_epochs=2)
    drawn = list(ppo._minibatches(len(QUERIES)))
    for epoch in range(2):
        part = torch.cat(drawn[epoch * minibatches : (epoch + 1) * minibatches])
        assert sorted(part.tolist()) == [0, 1, 2, 3]
