"""Memory that a stage needs, told before any weight is read: of weights, gradients and optimizer state to
the byte, of activations and logits roughly."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from pipeline.config.ppo import PPOConfig
from pipeline.config.schema import RMConfig, SFTConfig
from pipeline.engines.start import asked, world_size
from pipeline.errors import UserError
from pipeline.handoff.found import read_json
from pipeline.models.device import device
from pipeline.models.loading import config_of
from pipeline.process import memory
from pipeline.process.progress import say

HELD = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "nf4": 0.5}
"""Bytes a weight, at least: what of a quantised model stays float32 is not counted."""
TRAINED = 16.0
"""Bytes a weight that trains: itself, its gradient, and AdamW's two moments, float32 each."""


def check_training(config: SFTConfig | RMConfig, model: str | Path) -> None:
    """UserError when a supervised stage cannot fit; one line when it may not."""
    frozen = config.lora is not None or getattr(config, "head_only", False)
    least = {"the model": _weights(model) * (HELD[config.dtype] if frozen else _trained())}
    tokens = (config.micro_batch_size or config.batch_size // world_size()) * config.max_length
    _check(config, model, least, tokens, [] if frozen else ["lora"])


def check_ppo(config: PPOConfig, sft: Path, rm: Path | None) -> None:
    """The same of PPO, by the networks that it loads."""
    held, policy = HELD[config.dtype], _weights(sft)
    value = _weights(rm or sft)
    least = {"the policy": policy * (held if config.lora else _trained())}
    if not config.lora and not config.offload:
        least["the reference"] = policy * held
    if config.critic() and config.value == "separate" and not config.shared_base:
        least["the value network"] = value * (held if config.value_lora else _trained())
    if not config.offload:
        rewards = (rm if name == "rm" else name for name in config.own_reward_models())
        least["reward models"] = sum(_weights(path) * held for path in rewards if path)
    episodes = config.micro_batch_size or config.batch_size // config.minibatches // world_size()
    tokens = episodes * (config.max_prompt_length + config.max_new_tokens)
    less = [] if config.shared_base else [f"lora{'' if _sharded() else ' and shared_base'}"]
    _check(config, sft, least, tokens, less)


def _check(
    config: SFTConfig | RMConfig | PPOConfig,
    model: str | Path,
    least: dict[str, float],
    tokens: int,
    less: list[str],
) -> None:
    have, need = room(), sum(least.values())
    if not need:  # its files are not known yet
        return
    if config.dtype != "nf4":
        less = [*less, f"dtype: bf16{'' if _sharded() else ', int8 or nf4'} (with lora)"]
    if world_size() > 1 and not _sharded():
        less = [*less, "ENGINE=fsdp2"]
    roles = ", ".join(f"{name} {_gib(size)}" for name, size in least.items() if size)
    if need > have:
        raise UserError(
            f"{config.stage}: weights, gradients and optimizer state need {_gib(need)} GiB ({roles}), there "
            f"are {_gib(have)}; try {', '.join(less) or 'a smaller model'}"
        )
    passing = _activations(model, tokens, config.gradient_checkpointing)
    if need + passing > have:
        less += [] if config.gradient_checkpointing else ["gradient_checkpointing: true"]
        say(
            f"{config.stage}: memory may not suffice: {_gib(need)} GiB ({roles}) and some {_gib(passing)} of "
            f"activations, of {_gib(have)}; try {', '.join([*less, 'a smaller micro_batch_size'])}"
        )


def _sharded() -> bool:
    return asked() == "FSDP"


def _trained() -> float:
    """Bytes a device for each weight that trains: under FSDP its share, but whole weights while they are loaded."""
    return max(HELD["fp32"], TRAINED / world_size()) if _sharded() else TRAINED


def room() -> int:
    """Bytes of the accelerator, or those that this machine lets the process have."""
    if device().type == "cuda":
        return torch.cuda.mem_get_info()[1]
    return memory.limit()


def _weights(path: str | Path) -> int:
    """How many a model has; 0 of one that does not lie here as safetensors."""
    count, whole = 0, Path(path) / "model.safetensors"
    shards = read_json(whole.with_name(f"{whole.name}.index.json")).get("weight_map", {})
    names = {whole.name} if whole.is_file() else set(shards.values())  # as transformers chooses
    try:
        for name in names:
            with safe_open(Path(path) / name, "pt") as file:
                shapes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118
            count += sum(torch.Size(shape).numel() for shape in shapes)
    except (OSError, SafetensorError):
        return 0  # loading it says what is wrong with it
    return count


def _activations(model: str | Path, tokens: int, checkpointing: bool) -> float:
    """Bytes that a pass keeps for going backward, roughly: 20 vectors a layer and token, and logits."""
    config = config_of(model).get_text_config()
    layers, width = (getattr(config, n, 0) or 0 for n in ("num_hidden_layers", "hidden_size"))
    vectors = layers + 20 if checkpointing else 20 * layers
    logits = min(tokens * (getattr(config, "vocab_size", 0) or 0), 2**24)
    return 4.0 * (tokens * vectors * width + 3 * logits)


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g}"
