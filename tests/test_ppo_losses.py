"""Each loss by itself: what it pushes, with which weight, over how many tokens."""

import math

import pytest
import torch

from pipeline.config.ppo import PPOConfig
from pipeline.models.sequences import Sequences
from pipeline.ppo.losses import Minibatch, losses
from pipeline.ppo.networks import Outputs
from pipeline.ppo.ptx import PtxBatch
from pipeline.ppo.rollout import Rollout

MASK = torch.tensor([[True, True, False], [True, False, False]])
TOKENS = 12.0  # of the whole minibatch, of which this is a quarter
NAN_PADDED = torch.where(MASK, torch.tensor(-1.0), torch.nan)


def batch(**changes) -> Minibatch:
    whatever = torch.zeros(2, 3)
    rollout = Rollout(
        queries=torch.ones(2, 1, dtype=torch.long),
        query_mask=torch.ones(2, 1, dtype=torch.bool),
        responses=torch.ones(2, 3, dtype=torch.long),
        response_mask=MASK,
        ended=torch.tensor([True, True]),
        scores=torch.zeros(2),
        sampler_logprobs=NAN_PADDED,
        old_logprobs=NAN_PADDED,
        ref_logprobs=whatever,
        values=torch.where(MASK, 0.0, torch.nan),
    )
    advantages = torch.where(MASK, torch.tensor([[2.0, -1.0, 9.0], [0.5, 9.0, 9.0]]), torch.nan)
    returns = torch.where(MASK, torch.tensor([[0.1, -0.1, 9.0], [0.1, 9.0, 9.0]]), torch.nan)
    made = Minibatch(rollout, advantages, returns, torch.tensor(TOKENS), None, first=True)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def config(**changes) -> PPOConfig:
    return PPOConfig(prompts={"path": "none"}, **changes)


def gradient(of: str, batch: Minibatch, config: PPOConfig, **outputs) -> torch.Tensor:
    leaf = outputs[of].requires_grad_()
    loss, _ = losses(Outputs(**outputs), batch, config)
    loss.backward()
    return leaf.grad


def test_logprobs_are_pushed_by_their_advantages():
    logprobs = torch.where(MASK, -1.0, torch.nan)
    found = gradient("logprobs", batch(), config(), logprobs=logprobs, entropies=torch.zeros(2, 3))
    wanted = [[-2.0 / TOKENS, 1.0 / TOKENS, 0.0], [-0.5 / TOKENS, 0.0, 0.0]]
    torch.testing.assert_close(found, torch.tensor(wanted))


@pytest.mark.parametrize("coef", [0.0, 0.3])
def test_entropy_is_pushed_up_by_its_coefficient(coef):
    found = gradient(
        "entropies",
        batch(),
        config(entropy_coef=coef),
        logprobs=torch.full((2, 3), -1.0),
        entropies=torch.ones(2, 3),
    )
    torch.testing.assert_close(found, torch.where(MASK, -coef / TOKENS, 0.0))


@pytest.mark.parametrize("coef", [1.0, 0.25])
def test_values_are_pushed_to_their_returns_by_their_coefficient(coef):
    values = torch.zeros(2, 3)
    found = gradient("values", batch(), config(vf_coef=coef), values=values)
    wanted = torch.tensor([[-0.1, 0.1, 0.0], [-0.1, 0.0, 0.0]]) * coef / TOKENS
    torch.testing.assert_close(found, wanted)


def texts(ids):
    return Sequences.of_texts(ids, torch.ones_like(ids))


def test_the_text_is_made_more_likely_by_its_coefficient():
    text = PtxBatch(texts(torch.ones(2, 3)), torch.tensor(8.0), ratio=1)
    found = gradient(
        "likelihood",
        batch(ptx=text),
        config(ptx_coef=27.8, ptx_data={"path": "none"}),
        likelihood=torch.tensor(-5.0),
    )
    assert found.item() == pytest.approx(-27.8 / 8)


def test_a_pass_reports_its_own_statistics_alone():
    logprobs = torch.where(MASK, math.log(1.5) - 1, torch.nan)
    _, of_policy = losses(Outputs(logprobs, torch.ones(2, 3)), batch(), config())
    _, of_value = losses(Outputs(values=torch.ones(2, 3)), batch(), config())
    assert of_value.keys() == {"value_loss", "value_clipped"}
    assert not of_policy.keys() & of_value.keys()
    assert of_policy["ratio"].item() == pytest.approx(3 * 1.5)
    assert (
        of_policy["policy_clipped"].item() == 2
    )  # the ratio of the negative advantage gains nothing
    assert of_policy["entropy"].item() == 3
    assert of_policy["mismatch"].item() == pytest.approx(3 * math.log(1.5))
    assert of_policy["mismatch_tokens"].item() == 3


def test_the_mismatch_is_measured_before_the_first_step_alone():
    outputs = Outputs(torch.zeros(2, 3), torch.ones(2, 3))
    _, later = losses(outputs, batch(first=False), config())
    assert later["mismatch"].item() == later["mismatch_tokens"].item() == 0


def test_a_micro_batch_has_its_own_rows_and_the_steps_tokens():
    text = PtxBatch(texts(torch.arange(8).view(4, 2)), torch.tensor(4.0), ratio=2)
    part = batch(ptx=text).rows(slice(1, 2))
    assert part.tokens == TOKENS and len(part.rollout) == 1
    assert part.advantages[0, 0] == 0.5 and part.returns[0, 0] == pytest.approx(0.1)
    assert part.ptx.texts.responses.tolist() == [[5], [7]] and part.ptx.tokens == 4
