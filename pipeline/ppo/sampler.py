"""Who answers the prompts of a rollout: the policy's own decoding here, vLLM in `pipeline.ppo.vllm`."""

from typing import Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.config.ppo import PPOConfig
from pipeline.models.generation import Sampled, joined, sample, stops
from pipeline.models.packing import Model
from pipeline.models.tokens import left_pad, pad_id
from pipeline.ppo.networks import autocast

MISMATCH = {"fp32": 1e-3, "half": 0.1}
"""Most that the logprobs of a sampler with the policy's weights differ from the policy's, in nats a token
on average. Measured: 2e-7 in float32, .0013 in our bf16, .034 in vLLM's."""


class Sampler(Protocol):
    """Samples one response to each tokenised prompt from the policy's present weights."""

    name: str
    mismatch: float
    """See `MISMATCH`."""

    def __call__(self, prompts: list[list[int]]) -> Sampled: ...


class PolicySampler:
    """The policy's own responses, in rollout batches."""

    name = "the policy's own decoding"

    def __init__(
        self,
        config: PPOConfig,
        policy: Model,
        tokenizer: PreTrainedTokenizerBase,
        accelerator: Accelerator,
    ):
        self.config, self.policy, self.accelerator = config, policy, accelerator
        self.stop, self.pad = stops(tokenizer, config.stop_tokens), pad_id(tokenizer)
        self.mismatch = MISMATCH["half" if config.rounds() else "fp32"]
        self.forced_lengths: Tensor | None = None
        """(B,) lengths that all responses get, to time equal work."""

    def __call__(self, prompts: list[list[int]]) -> Sampled:
        device = self.accelerator.device
        uniforms = self._uniforms(len(prompts))
        at_once = self.config.rollout_batch_size or len(prompts)
        parts = []
        for start in range(0, len(prompts), at_once):
            rows = slice(start, start + at_once)
            ids, mask = left_pad(prompts[rows], self.pad)
            with autocast(self.config, device):
                parts.append(
                    sample(
                        self.policy,
                        ids.to(device),
                        mask.to(device),
                        max_new_tokens=self.config.max_new_tokens,
                        temperature=self.config.temperature,
                        stop=self.stop,
                        pad_id=self.pad,
                        uniforms=uniforms[rows],
                        lengths=None if self.forced_lengths is None else self.forced_lengths[rows],
                    )
                )
        return joined(parts, self.pad)

    def _uniforms(self, episodes: int) -> Tensor:
        """Random numbers (B, T): all processes' are drawn, so that neither these nor batches change a response."""
        processes, mine = self.accelerator.num_processes, self.accelerator.process_index
        drawn = torch.rand(episodes * processes, self.config.max_new_tokens)
        if processes > 1:  # whoever has drawn other numbers before
            drawn = broadcast(drawn.to(self.accelerator.device)).cpu()
        return drawn[mine * episodes : (mine + 1) * episodes]
