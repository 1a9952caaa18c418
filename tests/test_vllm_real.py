"""vLLM itself, where it is installed (make test-vllm: its build for CPUs, in .venv-vllm)."""

import functools
import importlib
from types import SimpleNamespace

import pytest
import torch

import tiny_models
from pipeline.config.ppo import PPOConfig
from pipeline.errors import UserError
from pipeline.ppo.build import build_ppo
from pipeline.ppo.gates import InvariantError
from pipeline.ppo.trainer import PPO
from test_vllm import CONFIG, QUERIES

vllm = pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

EXACT = 2e-5
"""Nats a token between its logprobs and ours, both in float32; 1e-6 to 8e-6 were measured."""


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    """A policy with heads of a width that vLLM's attention has."""
    folder = tmp_path_factory.mktemp("vllm") / "sft"
    tiny_models.policy(0, hidden_size=64).save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ppo(sft) -> PPO:
    """On an engine in this process, of which there can be one; in float32, where TRL would take bf16."""
    with pytest.MonkeyPatch.context() as patch:
        length = {"length": lambda prompts, responses, rows: [float(len(r)) for r in responses]}
        patch.setitem(importlib.sys.modules, "own_rewards", SimpleNamespace(**length))
        # its packed float32 weights could not be replaced
        patch.setattr("vllm._custom_ops._supports_onednn", False)
        helper = importlib.import_module("trl.generation.vllm_generation")
        exact = functools.partial(vllm.LLM, dtype="float32", enforce_eager=True)
        patch.setattr(helper, "LLM", exact)
        torch.manual_seed(3)
        changes = {"stop_tokens": ["w3", "w5 w6"], "temperature": 0.8}
        yield build_ppo(PPOConfig(**{**CONFIG, **changes}), sft)


def test_responses_end_where_they_should(ppo):
    rollout = ppo.rollout(QUERIES * 16)
    ends = set()
    for ids, ended in zip(rollout.response_ids(), rollout.ended.tolist(), strict=True):
        kind = "token" if ids[-1] in (4, 8) else "string" if ids[-2:] == [10, 11] else "none"
        assert ended == (kind != "none")
        assert ended or len(ids) == 6
        ends.add(kind)
    assert ends >= {"token", "none"}


def test_its_logprobs_are_ours_and_its_weights_those_just_trained(ppo):
    before = [p.detach().clone() for p in ppo.networks.policy_parameters()]
    gaps = [ppo.update(ppo.rollout(QUERIES))["val/sampler_mismatch"] for _ in range(3)]
    assert 0 < max(gaps) < EXACT
    after = ppo.networks.policy_parameters()
    moved = (float((a - b).detach().abs().max()) for a, b in zip(before, after, strict=True))
    assert max(moved) > 1e-2


def test_an_update_that_it_skipped_ends_the_run(ppo, monkeypatch):
    ppo.update(ppo.rollout(QUERIES))
    monkeypatch.setattr(ppo.sampler.engine, "sync_weights", lambda: None)
    with pytest.raises(InvariantError, match=r"vLLM \(colocate\) sampled from other"):
        ppo.rollout(QUERIES)


def test_an_engine_that_dies_ends_the_run_before_the_update(ppo, monkeypatch):
    worker = ppo.sampler.engine.llm.llm_engine.model_executor.driver_worker
    before, steps = ppo.iteration, ppo.optimizer_steps
    for name in ("execute_model", "sample_tokens"):
        monkeypatch.setattr(worker, name, died, raising=False)
    with pytest.raises(Exception, match=r"worker died"):
        ppo.rollout(QUERIES)
    assert (ppo.iteration, ppo.optimizer_steps) == (before, steps)


def died(*_, **__):
    raise RuntimeError("worker died")


def test_what_this_build_has_not_is_told(sft, monkeypatch):
    """Sleeping and a server's weights want a GPU: the run says so and does not sample from other weights."""
    with pytest.raises(Exception, match="(?i)sleep mode is not supported"):
        vllm.LLM(str(sft), enable_sleep_mode=True)
    config = PPOConfig(
        **{**CONFIG, "vllm": {"mode": "server", "url": "http://127.0.0.1:9", "timeout": 1}}
    )
    with pytest.raises(UserError, match="no answer from http://127.0.0.1:9 .*vllm serve"):
        build_ppo(config, sft)
