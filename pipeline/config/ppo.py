"""Every key of ppo.yaml, documented where it is declared; see `pipeline.config.schema`."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.config.rewards import Reward
from pipeline.config.schema import Data, Dtype, Fraction, Lora, Positive, Schedule, StageConfig
from pipeline.config.section import ModelName, Section, Text


class GateBars(Section):
    """What the SFT and the reward model must have reached before PPO begins (`pipeline.ppo.preflight`).

    All are compared with the headline metrics in the manifests of these stages.
    """

    eos_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Least share of the SFT model's responses that end by EOS within `sft.sample_tokens`."""
    format: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Least share that end so, are not empty and hold no token or role marker of the template."""
    rm_margin: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The reward model's held-out accuracy must exceed that of "the longer one wins" and of "the shorter
    one wins" by more than this and, on all pairs together, by more than chance."""
    rm_pairs: Positive = 200
    """A K with fewer held-out pairs says nothing; fewer in all are too few to tell from chance, which is
    a warning."""
    padding_gap: Annotated[float, Field(gt=0)] = 1e-2
    """Most that a score may change with the padding beside it."""
    demonstration_mean: Annotated[float, Field(gt=0)] = 0.1
    """Most that the demonstrations' mean score may be away from 0."""
    best_of_n: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The response it likes best of several must beat more of the others than any one does, by more than this."""


class AlarmLimits(Section):
    """Beyond these PPO raises an alarm (`pipeline.ppo.alarms`); none of them stops a run."""

    kl_per_token: Annotated[float, Field(gt=0)] = 0.4
    """`objective/kl` over `response/length` above so many nats; `kl_limit` is what stops a run. On the tiny recipe
    0.3 rings before gold is lost and in two of ten good runs as well, 0.4 in none of these and as it is lost."""
    length: Annotated[float, Field(gt=1)] = 2.0
    """`response/length` so many times the first iteration's, or that many times shorter."""
    score_length_corr: Annotated[float, Field(gt=0, lt=1)] = 0.7
    """`objective/score_length_corr` beyond this, either way (arXiv 2310.03716)."""
    repeated_ngrams: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """`response/repeated_ngrams` above this."""
    explained_variance: Annotated[float, Field(lt=1)] = 0.0
    """`val/explained_variance` below this: worse than a constant."""
    value_warmup: Annotated[int, Field(ge=0)] = 5
    """First iterations in which the value network, fresh from the reward model, may be so."""


class VLLM(Section):
    """Responses are sampled by vLLM: `.venv/bin/pip install -e ".[vllm]"`, an NVIDIA GPU."""

    mode: Literal["colocate", "server"] = "colocate"
    """colocate = on the GPUs that train; server = where `vllm serve RUN/sft --logprobs-mode
    processed_logprobs --weight-transfer-config '{"backend": "nccl"}'` runs."""
    memory_share: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Of each GPU's memory, for vLLM's weights and cache; colocate."""
    tensor_parallel: Positive = 1
    """GPUs that share one copy of its weights; must divide the number of processes; colocate."""
    sleep: bool = False
    """Give that memory back while the networks are updated; colocate."""
    url: Text = "http://localhost:8000"
    """Of the server."""
    timeout: Annotated[float, Field(gt=0)] = 240.0
    """Seconds to wait until the server is up."""

    @model_validator(mode="after")
    def _read(self):
        other = {
            "server": {"memory_share", "tensor_parallel", "sleep"},
            "colocate": {"url", "timeout"},
        }
        if unread := sorted(self.model_fields_set & other[self.mode]):
            raise ValueError(f"{', '.join(unread)}: no effect in mode {self.mode}")
        return self


class PPOConfig(StageConfig):
    """Stage 3: PPO against the reward. Names and values follow arXiv 2203.02155, appendix C.4."""

    stage: ClassVar[str] = "ppo"
    cosmetic: ClassVar[set[str]] = StageConfig.cosmetic | {
        *("gates", "gate_bars", "alarms", "rollout_batch_size", "sample_prompts", "sample_every"),
        "offload",
    }

    log_every: Positive = 1
    """Iterations between lines of metrics.jsonl; the first and the last always have one."""
    save_every: Positive = 10
    """Iterations between saved training states."""

    # what is optimised
    prompts: Data | None = None
    """Training prompts, needed unless they come in memory; responses in the file are ignored."""
    rewards: list[Reward] = [Reward(model="rm")]
    """Terms of the score, summed with their weights."""
    max_prompt_length: Positive = 256
    """Longer prompts (in tokens) are dropped and counted."""
    too_long: Fraction = 0.1
    """Share of the prompts that may be over `max_prompt_length`; more are refused."""
    max_new_tokens: Positive = 64
    """Longest response, in tokens."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides the logits in sampling and in every logprob: old, new and reference."""

    # how much
    iterations: Positive = 50
    """Rollout + update rounds."""
    batch_size: Positive = 512
    """Episodes per iteration over all processes."""
    minibatches: Positive = 8
    """Optimizer steps per epoch over one rollout; batch_size must divide by it."""
    micro_batch_size: Positive | None = None
    """Episodes per forward and backward pass and process; changes memory, not numbers."""
    rollout_batch_size: Positive | None = None
    """Episodes generated at once per process; none = the process's whole share."""
    vllm: VLLM | None = None
    """Sample with vLLM; `{}` takes its defaults. It draws from random numbers of its own, so that a run
    that was stopped goes on, but not to the same bytes."""
    ppo_epochs: Positive = 1
    """Passes over each rollout."""

    # the objective
    kl_coef: Annotated[float, Field(ge=0)] = 0.02
    """Weight of the per-token KL penalty to the SFT model (beta)."""
    kl_penalty: Literal["k1", "k2", "k3"] = "k1"
    """Estimator used in the penalty (joschu.net/blog/kl-approx)."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of `objective/kl` in the log."""
    kl_target: Annotated[float, Field(gt=0)] | None = None
    """Nats per response; when set, kl_coef follows LMHP's proportional controller."""
    kl_horizon: Positive = 10000
    """Episodes over which that controller acts."""
    kl_stop: Annotated[float, Field(gt=0)] | None = None
    """End an iteration's updates once the approximate KL to the rollout policy (nats per token) exceeds this."""
    kl_limit: Annotated[float, Field(gt=0)] | None = None
    """Stop the run, publishing what was reached, once objective/kl (nats per response) exceeds this."""
    advantages: Literal["gae", "rloo", "grpo"] = "gae"
    """gae = by a value network; the others need none, but several samples a prompt: rloo = the reward less the
    mean of the others' (arXiv 2402.14740), grpo = standard deviations from the group's mean, and the KL
    penalty in the loss (arXiv 2402.03300). Losses are means over the tokens of the batch in all three."""
    samples_per_prompt: Positive = 1
    """Responses to each prompt of a batch; batch_size counts responses and must divide by it."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount of later rewards, per token; with gae."""
    lam: Annotated[float, Field(ge=0, le=1)] = 0.95
    """GAE's lambda (arXiv 1506.02438): 1 = least bias, 0 = least variance."""
    clip_range: Annotated[float, Field(gt=0)] = 0.2
    """The policy's ratio gains nothing outside 1 +- this."""
    clip_range_value: Annotated[float, Field(gt=0)] | None = 0.2
    """Values move at most so far from their rollout values; none = not clipped."""
    vf_coef: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the value loss."""
    entropy_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of an entropy bonus."""
    whiten_advantages: bool | None = None
    """Mean 0 and variance 1 over the real tokens of the whole rollout; none = with gae alone."""
    whiten_rewards: bool = False
    """Divide token rewards by their standard deviation, mean kept (hurts in practice; off)."""
    scale_scores: bool = False
    """Divide scores by their running standard deviation."""
    clip_scores: Annotated[float, Field(gt=0)] | None = None
    """Limit scores to +- this before anything is added."""
    missing_eos: Literal["subtract", "replace", "none"] = "subtract"
    """What happens to the score of a response that did not end."""
    missing_eos_penalty: Annotated[float, Field(ge=0)] = 1.0
    """Subtracted from the score, or its negative put in the score's place."""
    stop_tokens: list[Text] = []
    """What ends a response besides EOS: tokens, or strings of several that are looked for in its text."""
    old_logprobs: Literal["sampler", "recompute"] | None = None
    """Where the ratio's denominator comes from: kept while sampling, or a forward pass like the
    update's; none = sampler in fp32, where they agree; recompute in bf16 (precision) and on a rounded
    base (dtype with lora), where they do not quite, and with vllm, whose weights may be rounded."""
    sampler_correction: Annotated[float, Field(ge=1)] | None = None
    """Weigh tokens by old policy / sampler, at most this (truncated importance sampling); with recompute."""
    length_penalty: Annotated[float, Field(ge=0)] = 0.0
    """Subtracted from the score per response token."""

    # the pretraining mix (PPO-ptx)
    ptx_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the pretraining log-likelihood; InstructGPT's PPO-ptx uses 27.8."""
    ptx_data: Data | None = None
    """Plain text (key `text`) or demonstrations for it."""
    ptx_ratio: Positive = 8
    """Pretraining examples per episode."""
    ptx_max_length: Positive = 256
    """Longer texts are cut to so many tokens."""

    # the optimizer
    learning_rate: Annotated[float, Field(ge=0)] = 1e-5
    """Of the policy, at its highest."""
    value_learning_rate: Annotated[float, Field(ge=0)] | None = None
    """None = the policy's."""
    schedule: Schedule = "linear"
    """How it falls after the warm-up: to 0 by a cosine or a line, or not."""
    warmup_ratio: Fraction = 0.0
    """Share of all optimizer steps in which it rises from 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's."""
    adam_eps: Annotated[float, Field(gt=0)] = 1e-5
    """1e-5 as in LMHP and N+ (arXiv 2403.17031)."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Policy and value gradients are clipped to this separately."""
    gradient_checkpointing: bool = False
    """Keep the layers' inputs alone and compute the rest again going backward, in policy and value."""

    # the models
    policy: ModelName | None = None
    """Where the policy starts, such as another run's `ppo`; none = at the SFT model, which is the reference
    in any case."""
    value: Literal["separate", "shared"] = "separate"
    """separate = a network initialised from the reward model; shared = a head on the policy's trunk."""
    lora: Lora | None = None
    """Adapters on the policy; the reference is the policy with adapters off."""
    value_lora: Lora | None = None
    """Adapters on the separate value network."""
    shared_base: bool = False
    """One base in memory: policy, reward model and value network are adapters on it, the reference has
    none. Needs `lora`, and a reward model that was trained with lora from the same SFT model; the value
    adapter starts as the reward model's."""
    dtype: Dtype = "fp32"
    """Of weights that are not trained: reference, reward models, and what is under `lora` and `value_lora`.
    bf16 takes half the memory; int8 and nf4 hold the linear layers in a quarter and an eighth. What is
    published has its adapters merged into fp32 weights."""
    offload: Literal["cpu"] | None = None
    """Where reference and reward models wait while they are not used; none = on the accelerator."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Also publish an exponential moving average of the policy (InstructGPT: 0.992), in `RUN/ppo/ema`."""

    # what is watched
    gates: Literal["refuse", "warn", "off"] = "refuse"
    """What happens when the SFT or the reward model is below a bar: PPO refuses, or says so and begins."""
    gate_bars: GateBars = GateBars()
    """The bars: eos_share, format, rm_margin, rm_pairs, padding_gap, demonstration_mean, best_of_n."""
    alarms: AlarmLimits = AlarmLimits()
    """Beyond these an iteration is marked `alarm/NAME` 1 in the record, and the first time it is said."""
    sample_prompts: Data | None = None
    """Fixed prompts whose responses are shown side by side; none = the first of `prompts`."""
    sample_every: Positive = 10
    """Iterations between those samples."""

    @model_validator(mode="after")
    def _consistent(self):
        sampled = not self.recompute()
        wrong = {
            f"batch_size {self.batch_size} does not divide by minibatches {self.minibatches}": (
                self.batch_size % self.minibatches
            ),
            f"batch_size {self.batch_size} does not divide by samples_per_prompt "
            f"{self.samples_per_prompt}": self.batch_size % self.samples_per_prompt,
            f"advantages: {self.advantages} compares responses to one prompt: samples_per_prompt "
            "of 2 or more": not self.critic() and self.samples_per_prompt < 2,
            f"advantages: {self.advantages} has no value network: no shared_base, value_lora, "
            "value_learning_rate": not self.critic()
            and (self.shared_base or self.value_lora or self.value_learning_rate is not None),
            "advantages: grpo has its penalty in the loss, where k1 has no gradient: kl_penalty k3 "
            "or k2": self.kl_in_loss() and self.kl_penalty == "k1",
            "ptx_coef > 0 and ptx_data go together": (self.ptx_coef > 0) != bool(self.ptx_data),
            "sampler_correction needs old_logprobs: recompute": sampled and self.sampler_correction,
            "vllm needs old_logprobs: recompute": sampled and self.vllm,
            "vllm needs dtype: fp32 with lora, it is given merged weights": (
                self.vllm and self.lora and self.dtype != "fp32"
            ),
            "policy: adapters (lora) start on the SFT model, whose weights are their reference: leave out "
            "policy or lora": self.policy and self.lora,
            "rollout_batch_size has no effect with vllm": self.vllm and self.rollout_batch_size,
            "value_lora needs value: separate": self.value == "shared" and self.value_lora,
            "shared_base needs lora": self.shared_base and not self.lora,
            "shared_base needs value: separate": self.shared_base and self.value == "shared",
            "shared_base needs no value_lora": self.shared_base and self.value_lora,
            "offload has nothing to move: the reference is the policy's base, and no other reward model is "
            "loaded": self.offload and self.lora and not self.own_reward_models(),
            "offload needs dtype: fp32 or bf16": self.offload and self.dtype in ("int8", "nf4"),
            "lora.dropout must be 0: PPO's logprobs need dropout off": any(
                lora and lora.dropout for lora in (self.lora, self.value_lora)
            ),
        }
        if problems := [told for told, is_so in wrong.items() if is_so]:
            raise ValueError("; ".join(problems))
        return self

    def own_reward_models(self) -> set[str]:
        """Reward models that are networks of their own."""
        names = {name for reward in self.rewards for name in reward.members()}
        return names - {"rm"} if self.shared_base else names

    def value_lr(self) -> float:
        """The value network's learning rate at its highest."""
        own = self.value_learning_rate
        return self.learning_rate if own is None else own

    def critic(self) -> bool:
        """Whether there is a value function."""
        return self.advantages == "gae"

    def kl_in_loss(self) -> bool:
        """Whether the KL penalty is a term of the loss, and not of the rewards."""
        return self.advantages == "grpo"

    def whitens(self) -> bool:
        """Whether advantages are whitened over the whole rollout."""
        return self.critic() if self.whiten_advantages is None else self.whiten_advantages

    def rounds(self) -> bool:
        """Whether the policy computes in bf16, or its base is rounded."""
        return self.precision != "fp32" or (self.lora is not None and self.dtype != "fp32")

    def recompute(self) -> bool:
        """Whether old logprobs come from a forward pass like the update's, not from the sampler."""
        if self.old_logprobs is None:
            return self.rounds() or self.vllm is not None
        return self.old_logprobs == "recompute"
