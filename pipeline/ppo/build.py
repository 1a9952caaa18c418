"""Builds a PPO object from a config and the artifacts of the earlier stages."""

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from pipeline.config.ppo import PPOConfig
from pipeline.config.rewards import Reward
from pipeline.config.schema import Dtype
from pipeline.data.forms import load_texts
from pipeline.data.kept import like
from pipeline.data.literals import text_ids
from pipeline.data.template import template_hash, tokenizer_hash
from pipeline.engines import start
from pipeline.errors import UserError
from pipeline.models.adapters import add_lora, checkpoint_layers, scorers_on
from pipeline.models.device import placed
from pipeline.models.forward import reward_bias
from pipeline.models.loading import (
    check_policy,
    check_reward,
    config_of,
    fit_tokenizer,
    load_policy,
    load_reward,
    load_tokenizer,
    reward_from_policy,
)
from pipeline.models.needs import check_ppo
from pipeline.models.packing import Model
from pipeline.models.sequences import Sequences
from pipeline.models.tokens import pad_id, right_pad
from pipeline.ppo.ptx import Ptx
from pipeline.ppo.rewards import (
    Episodes,
    Score,
    ensemble,
    function_reward,
    model_reward,
    remote_reward,
    text_model_reward,
    token_function,
    token_sum,
    weighted_sum,
)
from pipeline.ppo.rollout import generator
from pipeline.ppo.sampler import Sampler
from pipeline.ppo.trainer import PPO
from pipeline.ppo.vllm import VLLMSampler, require_vllm
from pipeline.process.progress import say


def build_ppo(config: PPOConfig, sft: Path | str, rm: Path | str | None = None) -> PPO:
    """A PPO that starts from the policy in `sft`, scored as `config.rewards` says.

    `rm` is what the reward `model: rm` means, and where the value network starts. The directories
    are read as they are; `pipeline.run.StageRun` verifies them first when a stage runs.
    """
    if config.vllm is not None:
        require_vllm()
    check_divides(config)
    sft, rm = _folder("sft", sft), None if rm is None else _folder("rm", rm)
    if rm is None and any("rm" in reward.members() for reward in config.rewards):
        raise UserError("build_ppo: rewards name rm: give its folder, rm=..., or other rewards")
    _check_models(config, sft)
    check_ppo(config, sft, rm)
    accelerator = start.accelerator()
    tokenizer = load_tokenizer(sft)
    dtype = config.dtype if config.lora else "fp32"
    origin = config.policy or sft
    policy = add_lora(load_policy(origin, tokenizer, dtype), config.lora, "CAUSAL_LM")
    at_once = config.rollout_batch_size or 64
    terms = _Terms(rm, tokenizer, accelerator.device, at_once, config.dtype, config.offload)
    if config.offload and accelerator.device.type == "cpu":
        say("ppo: offload: this machine has no accelerator; all models are on the CPU anyway")
    if config.shared_base:
        value: Model | None = _on_shared_base(policy, config, rm, terms)
    else:
        value = _value(config, sft, rm, tokenizer)
    if config.gradient_checkpointing:
        for model in (policy, None if config.shared_base else value):
            if model is not None:
                checkpoint_layers(model)
    sequence_terms = [r for r in config.rewards if not r.per_token]
    token_terms = [r for r in config.rewards if r.per_token]
    return PPO(
        config,
        tokenizer,
        policy=policy,
        reference=None if config.lora else load_policy(sft, tokenizer, config.dtype),
        value=value,
        score=weighted_sum([(r.weight, terms.build(r)) for r in sequence_terms]),
        token_score=token_sum([(r.weight, token_function(r.function or "")) for r in token_terms]),
        ptx=_ptx(config, tokenizer, accelerator),
        accelerator=accelerator,
        sampler=_sampler(config, policy, tokenizer, accelerator),
    )


def _folder(name: str, given: object) -> Path:
    if not isinstance(given, str | Path):
        raise UserError(f"build_ppo: {name}: a folder of a model, not a {type(given).__name__}")
    return Path(given)


def _check_models(config: PPOConfig, sft: Path) -> None:
    """UserError, before any weight is read, for a model that does not fit its part."""
    if check_policy(sft).is_encoder_decoder:
        for key, refused, instead in (
            ("ptx_data", config.ptx_data, "its decoder has no likelihood of a text by itself"),
            ("vllm", config.vllm, "vLLM has none of its kind"),
        ):
            if refused is not None:
                raise UserError(f"ppo: {key}: {sft} is an encoder-decoder: {instead}; leave it out")
    for name in {name for reward in config.rewards for name in reward.members()} - {"rm"}:
        check_reward(name)


def check_divides(config: PPOConfig) -> None:
    """UserError unless every process gets as many episodes of each minibatch, and whole groups."""
    processes = start.world_size()
    for key in ("minibatches", "samples_per_prompt"):
        unit = getattr(config, key) * processes
        if config.batch_size % unit:
            below = config.batch_size // unit * unit
            fit = " or ".join(str(size) for size in (below, below + unit) if size)
            raise UserError(
                f"ppo: batch_size {config.batch_size} does not divide by {key} "
                f"{getattr(config, key)} x {processes} processes; {fit} would"
            )


class _Terms:
    """Turns reward entries of the config into scores; each model is loaded once."""

    def __init__(
        self,
        rm: Path | None,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        batch_size: int,
        dtype: Dtype = "fp32",
        home: str | None = None,
    ):
        self.rm, self.tokenizer, self.device, self.batch_size = rm, tokenizer, device, batch_size
        self.dtype, self.home = dtype, home
        self._models: dict[str, Score] = {}

    def add(self, name: str, model: nn.Module) -> None:
        """A reward model that is there already, with the policy's tokenizer."""
        self._models[name] = self._score(model.to(self.device), self.tokenizer)

    def build(self, reward: Reward) -> Score:
        if reward.function is not None:
            return function_reward(reward.function, reward.timeout)
        if reward.url is not None:
            return remote_reward(reward.url, reward.timeout, reward.retries)
        for name in reward.members():
            if name not in self._models:
                self._models[name] = self._model(name)
        members = [self._models[name] for name in reward.members()]
        if len(members) == 1:
            return members[0]
        return ensemble(members, reward.aggregate, reward.uncertainty_coef)

    def _model(self, name: str) -> Score:
        path = self.rm if name == "rm" else name
        assert path is not None, "the stage makes `rm` a parent when a reward names it"
        model, own = load_reward(path, self.dtype), load_tokenizer(path)
        fit_tokenizer(model, own)
        score = self._score(model.requires_grad_(False).to(self.home or self.device), own)

        def scored(episodes: Episodes) -> list[float]:
            with placed(model, self.device, self.home):
                return score(episodes)

        return scored

    def _score(self, model: nn.Module, own: PreTrainedTokenizerBase) -> Score:
        mine, other = self.tokenizer, own
        if (tokenizer_hash(mine), template_hash(mine)) == (
            tokenizer_hash(other),
            template_hash(other),
        ):
            return model_reward(model, pad_id(own), self.batch_size)
        return text_model_reward(model, own, self.batch_size)


def _on_shared_base(policy: Model, config: PPOConfig, rm: Path | None, terms: _Terms) -> nn.Module:
    """The value network, and the reward model if there is one, as adapters on the policy's base."""
    assert config.lora is not None, "checked by the schema"
    bias = 0.0 if rm is None else reward_bias(config_of(rm))
    reward, value = scorers_on(policy, rm, config.lora, bias)
    if reward is not None:
        terms.add("rm", reward)
    return value


def _value(
    config: PPOConfig, sft: Path, rm: Path | None, tokenizer: PreTrainedTokenizerBase
) -> nn.Module | None:
    """The value network: the run's reward model to start from, else the SFT trunk with a new head.

    None for a head on the policy's trunk, or no value function at all.
    """
    if config.value == "shared" or not config.critic():
        return None
    dtype = config.dtype if config.value_lora else "fp32"
    model = load_reward(rm, dtype) if rm else reward_from_policy(sft, tokenizer, dtype)
    return add_lora(model, config.value_lora, "SEQ_CLS")


def _sampler(
    config: PPOConfig, policy: Model, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator
) -> Sampler | None:
    """vLLM if it is asked for; None for the policy's own decoding."""
    if config.vllm is None:
        return None
    return VLLMSampler(config, policy, tokenizer, accelerator)


def _ptx(
    config: PPOConfig, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator
) -> Ptx | None:
    """Batches of pretraining text, a function of the optimizer step alone."""
    if config.ptx_data is None:
        return None
    texts = load_texts(config.ptx_data, seed=config.seed)
    rows = like(texts)
    for text in texts:
        ids = text_ids(tokenizer, text) + [tokenizer.eos_token_id]
        if len(ids) > 1:
            rows.append(ids[: config.ptx_max_length])
    processes, mine = accelerator.num_processes, accelerator.process_index

    def batch(step: int, count: int) -> Sequences:
        draws = generator(config.seed, step, 0)  # every process draws for all and takes its share
        picked = torch.randint(len(rows), (count * processes,), generator=draws).tolist()
        own = [rows[i] for i in picked[mine * count : (mine + 1) * count]]
        return Sequences.of_texts(*right_pad(own, pad_id(tokenizer))).to(accelerator.device)

    return batch
