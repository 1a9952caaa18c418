"""Rollouts by vLLM, colocated or on a server, through TRL's stable helper.

vLLM keeps weights of its own, maybe rounded, so they are handed to it before every rollout, and the
ratio's denominator comes from a forward pass of the policy (`old_logprobs: recompute`); what vLLM said
of its tokens is kept as the sampler's logprobs, for `val/sampler_mismatch` and `sampler_correction`.
"""

import contextlib
import importlib.util
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.config.ppo import PPOConfig
from pipeline.errors import UserError
from pipeline.models.generation import Sampled, stops
from pipeline.models.packing import Model
from pipeline.models.tokens import mask_from_lengths, pad_id
from pipeline.ppo.sampler import MISMATCH


def require_vllm() -> None:
    """UserError unless vLLM is installed."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            'vllm: not installed. `.venv/bin/pip install -e ".[vllm]"` on Linux with a GPU, '
            "or leave `vllm` out of ppo.yaml"
        )


class VLLMSampler:
    """Samples responses to tokenised prompts from the policy's current weights."""

    def __init__(
        self,
        config: PPOConfig,
        policy: Model,
        tokenizer: PreTrainedTokenizerBase,
        accelerator: Accelerator,
    ):
        assert config.vllm is not None
        from trl.generation.vllm_generation import VLLMGeneration  # it imports vLLM

        self.stop = stops(tokenizer, config.stop_tokens)
        self.device = accelerator.device
        self.pad_id = pad_id(tokenizer)
        keys = config.vllm
        self.name = f"vLLM ({keys.mode})"
        self.url = keys.url if keys.mode == "server" else None
        if accelerator.num_processes % keys.tensor_parallel:
            raise UserError(
                f"vllm.tensor_parallel {keys.tensor_parallel} does not divide the number of processes, "
                f"{accelerator.num_processes}; start as many with ENGINE="
            )
        with self._answered():
            self.engine = VLLMGeneration(
                model=policy,
                accelerator=accelerator,
                processing_class=tokenizer,
                mode=keys.mode,
                server_base_url=keys.url,
                server_timeout=keys.timeout,
                gpu_memory_utilization=keys.memory_share,
                tensor_parallel_size=keys.tensor_parallel,
                enable_sleep_mode=keys.sleep,
                max_model_length=config.max_prompt_length + config.max_new_tokens,
                temperature=config.temperature,  # and no top-k, top-p or penalty, its defaults here
                max_completion_length=config.max_new_tokens,
                logprobs=0,  # of the sampled token alone
                generation_kwargs={
                    "stop_token_ids": self.stop.ids,
                    "stop": self.stop.strings,
                    "include_stop_str_in_output": True,
                },
            )
        self.mismatch = MISMATCH["fp32" if self._dtype() == torch.float32 else "half"]

    def _dtype(self) -> torch.dtype | None:
        """Of its weights, where that can be seen: in this process."""
        engine = getattr(getattr(self.engine, "llm", None), "llm_engine", None)
        return getattr(getattr(engine, "model_config", None), "dtype", None)

    @contextlib.contextmanager
    def _answered(self) -> Iterator[None]:
        """Within, a server that is not there, or no longer, is a UserError."""
        try:
            yield
        except OSError as error:  # requests' and TRL's own are such
            if self.url is None:
                raise
            raise UserError(
                f"vllm: no answer from {self.url} ({type(error).__name__}); start `vllm serve` there as "
                "`vllm.mode` in show-config says, then the same command goes on"
            ) from error

    def __call__(self, prompts: list[list[int]]) -> Sampled:
        """One response to each prompt (lists of token ids)."""
        with self._answered():
            self.engine.sync_weights()
            _, responses, logprobs, _ = self.engine.generate(
                prompts, images=None, num_generations=1
            )
        lengths = torch.tensor([len(ids) for ids in responses])
        real = mask_from_lengths(lengths, int(lengths.max()))
        ended = [bool(self.stop.hits(torch.tensor([ids]))) for ids in responses]
        return Sampled(
            responses=_filled(real, responses, self.pad_id).to(self.device),
            lengths=lengths.to(self.device),
            ended=torch.tensor(ended, device=self.device),
            logprobs=_filled(real, [[t[0] for t in row] for row in logprobs], 0.0).to(self.device),
        )


def _filled(real: Tensor, rows: list[list], value: float) -> Tensor:
    """Rows of numbers where `real` (B, T) is true, `value` elsewhere."""
    flat = torch.tensor([number for row in rows for number in row])
    return flat.new_full(real.shape, value).masked_scatter(real, flat)
