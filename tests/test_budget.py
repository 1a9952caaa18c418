"""`make plan`: bytes of a pass by rehearsal are those that it takes, and what is said of machines."""

import dataclasses

import pytest
import torch

import tiny_models
from pipeline.budget import machines
from pipeline.budget.__main__ import _switched
from pipeline.budget.rehearsal import Batch, Rehearsal, held, over_layers, parameters
from pipeline.budget.stages import Sharing, Work, of_ppo
from pipeline.config.ppo import PPOConfig
from pipeline.errors import UserError

H100 = machines.named("8xH100")


def test_a_machine_is_a_number_and_a_kind():
    assert (H100.count, H100.memory, H100.measured) == (8, 80e9, False)
    assert machines.named("a100-40gb").count == 1
    assert machines.named("64xH100").link < H100.link, "between machines it is a network"
    for wrong in ("8xH1000", "0xH100", "H100 8"):
        with pytest.raises(UserError, match="8xH100"):
            machines.named(wrong)


def test_sizes_come_from_the_config_alone_and_are_exact():
    config = tiny_models.llama_config(num_hidden_layers=7)
    whole = tiny_models.policy(0, num_hidden_layers=7)
    assert parameters(config) == sum(p.numel() for p in whole.parameters())


def test_what_a_pass_keeps_for_its_backward_is_counted():
    """By hand: an exponential keeps its output and makes its gradient, beside its input."""
    r = Rehearsal(tiny_models.llama_config(), H100, "fp32", False)
    with r.phase("pass", grad=True):
        x = torch.zeros(1000, requires_grad=True)
        x.exp().sum().backward()
    assert r.meter.numbers["pass peak"] == pytest.approx(4 * 3000, rel=0.01)


def test_adapters_alone_have_gradients_and_a_rounded_base_is_smaller():
    r = Rehearsal(tiny_models.llama_config(), H100, "fp32", False)
    whole, trained = held(r.policy(None, "fp32"), "fp32")
    assert whole == trained
    config = PPOConfig(lora={"r": 2}, dtype="bf16")
    small, adapters = held(r.policy(config.lora, "bf16"), "bf16")
    assert small - adapters == whole / 2 and 0 < adapters < whole


def test_depth_is_linear():
    config = tiny_models.llama_config(num_hidden_layers=9)

    def numbers(shallow):
        r = Rehearsal(shallow, H100, "fp32", False)
        model = r.policy(None, "fp32")
        with r.phase("pass", grad=True):
            r.logprobs(model, Batch(2, 4, 4)).sum().backward()
        return dict(r.meter.numbers)

    assert over_layers(config, numbers)["pass peak"] == pytest.approx(
        numbers(config)["pass peak"], rel=0.02
    )


def test_sharing_divides_what_an_engine_shares():
    config, shape = PPOConfig(batch_size=8, minibatches=1), tiny_models.llama_config()
    alone = of_ppo(config, shape, H100, Work(4, 4), "ddp").roles
    shared = of_ppo(config, shape, H100, Work(4, 4), "fsdp2").roles
    assert shared["optimizer"] == alone["optimizer"] / 8
    assert shared["policy"] == alone["policy"] / 8
    assert not Sharing.of("ddp", 8).sharded and not Sharing.of("fsdp2", 1).sharded


def test_what_is_advised_is_what_the_stage_takes():
    """Not shared_base on top of fsdp2, which refuses it."""
    two = dataclasses.replace(H100, count=2)
    words = [word for _, _, word in _switched(PPOConfig(), two, "ddp")]
    assert words[0] == "ENGINE=fsdp2" and any("lora" in word for word in words)
    assert not any("shared_base" in word for word in words)
    one = [word for _, _, word in _switched(PPOConfig(), dataclasses.replace(H100, count=1), "")]
    assert any("shared_base" in word for word in one)
