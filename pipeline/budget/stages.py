"""Bytes and seconds of a stage on a machine, by role and by phase."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedConfig

from pipeline.budget.machines import Machine
from pipeline.budget.rehearsal import Batch, Rehearsal, held, over_layers
from pipeline.config.ppo import PPOConfig
from pipeline.config.schema import RMConfig, SFTConfig
from pipeline.models.packing import Model

Numbers = dict[str, float]


@dataclass
class Work:
    """What a stage is to do, as far as it is known."""

    prompt: int  # tokens of a prompt
    response: int
    k: int = 1  # responses of a prompt that are read together
    steps: int | None = None  # optimizer steps (PPO: iterations)
    unknown: list[str] = field(default_factory=list)
    """What had to be assumed, a line each."""


@dataclass
class Estimate:
    """Of a stage on one of the machine's devices."""

    roles: Numbers
    """Bytes of each role at its most; they are not all there at once."""
    peaks: Numbers
    """Bytes of everything at a time, at most, in each phase."""
    seconds: Numbers
    """Of a step (PPO: an iteration) by phase."""
    flops: float
    """Of a step."""
    tokens: float
    """That a step reads and writes, over all devices."""
    steps: int | None

    @property
    def peak(self) -> float:
        """Bytes, at most."""
        return max(self.peaks.values())

    @property
    def step(self) -> float:
        """Seconds."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Sharing:
    """How `count` devices share a network that trains."""

    count: int = 1
    sharded: bool = False  # weights, gradients and the optimizer's state

    @classmethod
    def of(cls, engine: str, count: int) -> "Sharing":
        """By the name of an engine: fsdp2 shares all, ddp nothing."""
        return cls(count, engine.startswith("fsdp") and count > 1)

    def seconds(self, weights: float, trained: float, passes: float, machine: Machine) -> float:
        """A step's traffic between devices: gradients summed, and shared weights gathered in every pass."""
        if self.count == 1:
            return 0.0
        part = (self.count - 1) / self.count / machine.link
        return part * (2 * trained + 2 * passes * weights * self.sharded)


def of_training(
    config: SFTConfig | RMConfig,
    shape: PreTrainedConfig,
    machine: Machine,
    work: Work,
    engine: str = "",
) -> Estimate:
    """Of stage 1 or 2."""
    share = -(-config.batch_size // machine.count)
    micro = min(config.micro_batch_size or share, share)
    passes = -(-share // micro)
    sft = isinstance(config, SFTConfig)
    batch = Batch(micro * work.k, work.prompt, work.response, work.k)

    def numbers(shallow: PreTrainedConfig) -> Numbers:
        r = Rehearsal(shallow, machine, config.precision, config.gradient_checkpointing)
        model = (r.policy if sft else r.scorer)(config.lora, config.dtype)
        if isinstance(config, RMConfig) and config.head_only:
            model.requires_grad_(False).score.requires_grad_(True)
        tile = 2**27 // r.text.vocab_size  # TRL's: 4096 tokens of 32768 words

        def losses():
            if sft:
                return r.logprobs(model, batch, "all", tile)
            return r.scores(model, batch, "end")

        _updates(r, [(model, losses)], passes, 1)
        weights, trained = held(model, config.dtype)
        return {**r.meter.numbers, "weights": weights, "trained": trained}

    n = over_layers(shape, numbers)
    sharing = Sharing.of(engine, machine.count)
    roles = _trained_roles("policy" if sft else "reward", n["weights"], n["trained"], sharing)
    moving = n["weights"] * (1 - 1 / machine.count) * sharing.sharded
    state = 3 * n["trained"] * (1 - 1 / machine.count) * sharing.sharded
    peak = machine.program + n["weights"] + n["update peak"] - moving - state
    roles |= _passing(n, "update", 3 * n["trained"])
    link = sharing.seconds(n["weights"], n["trained"], passes, machine)
    return Estimate(
        roles | {"the program": machine.program},
        {"update": peak},
        {"update": n["update seconds"], "between devices": link},
        n["update flops"],
        config.batch_size * work.k * (work.prompt + work.response),
        work.steps,
    )


def of_ppo(
    config: PPOConfig,
    shape: PreTrainedConfig,
    machine: Machine,
    work: Work,
    engine: str = "",
) -> Estimate:
    """Of stage 3."""
    share = -(-config.batch_size // machine.count)
    mini = -(-share // config.minibatches)
    micro = min(config.micro_batch_size or mini, mini)
    passes = -(-mini // micro)
    own = len(config.own_reward_models())

    def numbers(shallow: PreTrainedConfig) -> Numbers:
        return _of_networks(config, shallow, machine, work, (share, micro, passes), own)

    n = over_layers(shape, numbers)
    sharing = Sharing.of(engine, machine.count)
    kept, part = 1 / machine.count, 1 - 1 / machine.count
    roles = _trained_roles("policy", n["policy"], n["policy trained"], sharing)
    for name, size in _trained_roles("value", n["value"], n["value trained"], sharing).items():
        roles[name] = roles.get(name, 0.0) + size
    roles |= {"reference": n["reference"], "reward": n["reward"], "moving average": n["ema"]}
    trained, weights = n["policy trained"] + n["value trained"], n["policy"] + n["value"]
    moving = weights * part * sharing.sharded
    state = 3 * trained * part * sharing.sharded
    frozen = n["reference"] + n["reward"]
    always = machine.program + weights - moving + n["ema"] + (0.0 if config.offload else frozen)
    optimizer = 2 * trained * (kept if sharing.sharded else 1.0)
    brought = frozen if config.offload else 0.0
    peaks = {
        "rollout": always + optimizer + n["cache"] + n["rollout peak"] + moving * kept,
        "scoring": always + optimizer + brought + n["scoring peak"],
        "update": always + n["update peak"] - state,
    }
    roles |= {**_passing(n, "update", 3 * trained), "KV cache": n["cache"]}
    seconds = {p: n[f"{p} seconds"] for p in ("rollout", "scoring", "update")}
    often = config.ppo_epochs * config.minibatches
    seconds["between devices"] = often * sharing.seconds(weights, trained, passes, machine)
    return Estimate(
        roles | {"the program": machine.program},
        peaks,
        seconds,
        sum(n[f"{p} flops"] for p in ("rollout", "scoring", "update")),
        config.batch_size * (work.prompt + work.response),
        work.steps,
    )


def _of_networks(
    config: PPOConfig,
    shape: PreTrainedConfig,
    machine: Machine,
    work: Work,
    sizes: tuple[int, int, int],
    own: int,
) -> Numbers:
    """An iteration of PPO on one device, rehearsed; `own`: reward models with weights of their own."""
    share, micro, passes = sizes
    r = Rehearsal(shape, machine, config.precision, config.gradient_checkpointing)
    policy = r.policy(config.lora, config.dtype if config.lora else "fp32")
    weights, trained = held(policy, config.dtype)
    n = {"policy": weights, "policy trained": trained, "value": 0.0, "value trained": 0.0}
    frozen = r.scorer(None, config.dtype).eval().requires_grad_(False)
    value = None
    if (
        config.shared_base
    ):  # the value network's and the reward model's adapters on the policy's base
        value = r.scorer(config.lora, config.dtype)
        n["value"] = n["value trained"] = held(value, config.dtype)[1]
        n["reward"] = n["value"]
    elif config.critic() and config.value == "separate":
        value = r.scorer(config.value_lora, config.dtype if config.value_lora else "fp32")
        n["value"], n["value trained"] = held(value, config.dtype)
    one = held(frozen, config.dtype)[0]
    n["reward"] = n.get("reward", 0.0) + own * one
    reference = policy if config.lora else r.policy(None, config.dtype).requires_grad_(False)
    n["reference"] = 0.0 if config.lora else held(reference, config.dtype)[0]
    n["ema"] = n["policy trained"] if config.ema_decay else 0.0

    at_once = min(config.rollout_batch_size or share, share)
    rows = Batch(at_once, work.prompt, work.response, config.samples_per_prompt)
    parts = -(-share // at_once)
    with r.phase("rollout", parts):
        r.prefill(policy, rows)
    with r.fake:
        decoder = r.cache(policy, rows)
    n["cache"] = sum(x.nbytes for layer in decoder.cache.layers for x in (layer.keys, layer.values))
    with r.phase("rollout", parts * work.response):
        r.token(decoder, at_once)

    batch = Batch(micro, work.prompt, work.response, config.samples_per_prompt)
    often = -(-share // micro)
    with r.phase("scoring", often):
        r.logprobs(reference, batch)
        if value is not None:
            r.scores(value, batch)
    with r.phase("scoring", often * config.recompute()):
        r.logprobs(policy, batch)
    with r.phase("scoring", often * (own + config.shared_base)):
        r.scores(frozen, batch, "end")
    turns = [(policy, lambda: r.logprobs(policy, batch))]
    if value is not None:
        turns.append((value, lambda: r.scores(value, batch)))
    _updates(r, turns, passes, config.ppo_epochs * config.minibatches)
    return {**r.meter.numbers, **n}


def _updates(
    r: Rehearsal, turns: list[tuple[Model, Callable[[], Tensor]]], passes: int, steps: int
) -> None:
    """Optimizer steps of so many micro-batches each, of which two are rehearsed: the second finds gradients."""
    trained = [p for model, _ in turns for p in model.parameters() if p.requires_grad]
    with r.phase("update", 0):
        optimizer = torch.optim.AdamW(trained, fused=True)
        for p in trained:
            p.grad = torch.zeros_like(p)
        optimizer.step()  # makes its state
        optimizer.zero_grad()
    few = min(passes, 2)
    for _ in range(few):
        for _, losses in turns:
            with r.phase("update", steps * passes / few, grad=True):
                losses().sum().backward()
    with r.phase("update", steps):
        clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def _trained_roles(name: str, weights: float, trained: float, sharing: Sharing) -> Numbers:
    """Bytes of a network on a device, of its gradients and of AdamW's two moments."""
    part = 1 / sharing.count if sharing.sharded else 1.0
    return {name: weights * part, "gradients": trained * part, "optimizer": 2 * trained * part}


def _passing(n: Numbers, phase: str, state: float) -> Numbers:
    """Bytes of a pass beyond weights and the state of training: logits, and the rest."""
    logits = n[f"{phase} logits"]
    return {"activations": max(n[f"{phase} peak"] - state - logits, 0.0), "logits": logits}
