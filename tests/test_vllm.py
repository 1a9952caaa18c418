"""vLLM samples from the policy's present weights, as it was told, and PPO stays exact on top of it."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
import torch
from pydantic import ValidationError

import tiny_models
import vllm_stub
from pipeline.config.ppo import PPOConfig
from pipeline.errors import UserError
from pipeline.ppo.build import build_ppo
from pipeline.ppo.gates import InvariantError
from pipeline.ppo.rollout import Query
from pipeline.ppo.trainer import PPO

QUERIES = [Query(ids) for ids in ([2, 7, 8, 3], [2, 9, 3], [2, 5, 6, 7, 11, 3], [2, 12, 3])]
CONFIG = {
    "prompts": {"path": "none"},
    "rewards": [{"function": "own_rewards:length"}],
    "batch_size": 4,
    "minibatches": 2,
    "iterations": 3,
    "learning_rate": 3e-2,
    "schedule": "constant",
    "max_new_tokens": 6,
    "max_prompt_length": 10,
    "temperature": 0.8,
    "vllm": {},
}


@pytest.fixture
def sft(tmp_path: Path, monkeypatch) -> Path:
    module = SimpleNamespace(
        length=lambda prompts, responses, rows: [float(len(r)) for r in responses]
    )
    monkeypatch.setitem(importlib.sys.modules, "own_rewards", module)
    tiny_models.policy(0).save_pretrained(tmp_path / "sft")
    tiny_models.tokenizer().save_pretrained(tmp_path / "sft")
    return tmp_path / "sft"


def built(sft: Path, **changes) -> PPO:
    torch.manual_seed(3)
    return build_ppo(PPOConfig(**{**CONFIG, **changes}), sft)


def mismatches(ppo: PPO, iterations: int = 3) -> list[float]:
    return [ppo.update(ppo.rollout(QUERIES))["val/sampler_mismatch"] for _ in range(iterations)]


@pytest.mark.parametrize("changes", [{}, {"lora": {"r": 2}}, {"vllm": {"sleep": True}}])
def test_it_samples_from_the_weights_that_were_just_trained(sft, monkeypatch, changes):
    vllm_stub.install(monkeypatch)
    ppo = built(sft, **changes)
    before = [p.detach().clone() for p in ppo.networks.policy_parameters()]
    assert max(mismatches(ppo)) < 1e-5
    after = [p.detach() for p in ppo.networks.policy_parameters()]
    assert max(float((a - b).abs().max()) for a, b in zip(before, after, strict=True)) > 1e-2
    [engine] = vllm_stub.LOADED
    assert bool(engine.asleep) == bool(changes.get("vllm"))


def test_stale_weights_end_the_run_before_the_update(sft, monkeypatch):
    vllm_stub.install(monkeypatch)
    ppo = built(sft)
    monkeypatch.setattr(ppo.sampler.engine, "sync_weights", lambda: None)
    with pytest.raises(InvariantError, match=r"iteration 1: vLLM \(colocate\) sampled from other"):
        mismatches(ppo)
    assert ppo.optimizer_steps == 2  # it stopped before the update


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float32, 1e-3), (torch.bfloat16, 0.1), (torch.float16, 0.1), (None, 0.1)],
)
def test_what_its_logprobs_may_differ_by_fits_the_engine_s_precision(
    sft, monkeypatch, dtype, bound
):
    vllm_stub.install(monkeypatch)
    monkeypatch.setattr(vllm_stub, "DTYPE", dtype)
    assert built(sft).sampler.mismatch == bound


def test_it_is_told_how_to_sample_and_where_to_stop(sft, monkeypatch):
    vllm_stub.install(monkeypatch)
    ppo = built(sft, stop_tokens=["w3", "w5 w6"], vllm={"memory_share": 0.4})
    rollout = ppo.rollout(QUERIES)
    [engine] = vllm_stub.LOADED
    assert engine.options["gpu_memory_utilization"] == 0.4
    assert engine.options["max_model_len"] == 16
    [said] = engine.said
    assert (said.temperature, said.max_tokens, said.logprobs) == (0.8, 6, 0)
    assert said.stop_token_ids == [4, 8]  # <end> and w3
    assert (said.stop, said.include_stop_str_in_output) == (["w3", "w5 w6"], True)
    for ids, ended in zip(rollout.response_ids(), rollout.ended.tolist(), strict=True):
        assert ended == (ids[-1] in (4, 8) or ids[-2:] == [10, 11])
        assert ended or len(ids) == 6


def test_a_server_gets_weights_and_prompts_by_trl_s_client(sft, monkeypatch):
    vllm_stub.install(monkeypatch)
    helper = importlib.import_module("trl.generation.vllm_generation")
    clients = []

    class Client:
        def __init__(self, base_url: str, group_port: int, connection_timeout: float):
            self.engine = vllm_stub.LLM(str(sft), enable_sleep_mode=False, max_model_len=16)
            self.told = base_url, connection_timeout
            clients.append(self)

        def init_communicator(self, device) -> None:
            self.device = device

        def update_named_params(self, metadata, weights) -> None:
            weights = list(weights)
            assert [name for name, *_ in metadata] == [name for name, _ in weights]
            self.engine.load_weights(weights)

        def reset_prefix_cache(self) -> None:
            pass

        def generate(
            self, prompts, features, generation_kwargs, structured_outputs_regex, **params
        ):
            asked = vllm_stub.SamplingParams(**params, **generation_kwargs)
            rows, numbers = vllm_stub.sampled(
                self.engine.model, self.engine.tokenizer, prompts, asked
            )
            logprobs = [[[number] for number in row] for row in numbers]
            return {"prompt_ids": prompts, "completion_ids": rows, "logprobs": logprobs}

    monkeypatch.setattr(helper, "VLLMClient", Client)
    ppo = built(sft, vllm={"mode": "server", "url": "http://gpu:9000", "timeout": 5})
    assert max(mismatches(ppo)) < 1e-5
    [client] = clients
    assert client.told == ("http://gpu:9000", 5.0)
    monkeypatch.setattr(client, "update_named_params", gone)  # it was killed
    with pytest.raises(UserError, match=r"no answer from http://gpu:9000 .*goes on"):
        ppo.rollout(QUERIES)


def gone(*_):
    raise requests.exceptions.ConnectionError("refused")


def test_without_vllm_it_says_so_before_a_model_is_read(tmp_path):
    with pytest.raises(UserError, match=r"vllm: not installed.*\.\[vllm\]"):
        build_ppo(PPOConfig(**CONFIG), tmp_path / "no such folder")


def test_gpus_that_share_its_weights_must_be_there(sft, monkeypatch):
    vllm_stub.install(monkeypatch)
    with pytest.raises(UserError, match="tensor_parallel 2 does not divide.* 1;"):
        built(sft, vllm={"tensor_parallel": 2})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"old_logprobs": "sampler"}, "vllm needs old_logprobs: recompute"),
        ({"rollout_batch_size": 2}, "rollout_batch_size has no effect with vllm"),
        ({"vllm": {"url": "http://gpu"}}, "url: no effect in mode colocate"),
        ({"vllm": {"mode": "server", "sleep": True}}, "sleep: no effect in mode server"),
    ],
)
def test_keys_that_would_do_nothing_are_refused(changes, told):
    with pytest.raises(ValidationError, match=told):
        PPOConfig(**{**CONFIG, **changes})


def test_old_logprobs_are_the_policy_s_own():
    assert PPOConfig(**CONFIG).recompute()
    assert not PPOConfig(**{**CONFIG, "vllm": None}).recompute()
