"""Bytes by role, tokens a second and hours of a recipe on a machine, from configs alone: `make plan`.

`python -m pipeline.budget --run checkpoints/tiny --recipe configs/tiny --gpus 8xH100 --engine fsdp2`
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from transformers import PreTrainedConfig

from pipeline import steps
from pipeline.bench.table import grid
from pipeline.budget import machines, stages
from pipeline.budget.machines import Machine
from pipeline.budget.rehearsal import parameters
from pipeline.budget.stages import Estimate, Work, of_ppo, of_training
from pipeline.cli import reporting_errors
from pipeline.commands.plan import Plan
from pipeline.commands.status import parse, plan_of
from pipeline.config.ppo import PPOConfig
from pipeline.config.schema import RMConfig, SFTConfig
from pipeline.config.section import Reads
from pipeline.data.forms import load_demonstrations
from pipeline.data.rankings import load_rankings
from pipeline.engines.start import check_fits
from pipeline.errors import UserError
from pipeline.models.loading import config_of, quiet
from pipeline.training.trainers import steps_of

Config = SFTConfig | RMConfig | PPOConfig

_SUPERVISED: Sequence[dict[str, Any]] = (
    {"micro_batch_size": 1},
    {"gradient_checkpointing": True},
    {"lora": {}},
    {"dtype": "bf16"},
)
SWITCHES: dict[str, Sequence[dict[str, Any]]] = {
    "sft": _SUPERVISED,
    "rm": _SUPERVISED,
    "ppo": (
        {"micro_batch_size": 1, "rollout_batch_size": 8},
        {"gradient_checkpointing": True},
        {"lora": {}},
        {"shared_base": True, "value_lora": None},
        {"dtype": "bf16"},
    ),
}
"""What takes less memory, the cheapest first; each on top of those before it."""

UNKNOWN = """\
Not known here:
- lengths: every prompt and response is taken as long as the config allows; shorter ones take less of both
- reward functions, services, labelers, judges, reading data, saving: no seconds are counted for them
- vLLM: rollouts are counted as if sampled by the policy itself
- what allocators waste: {waste}"""
_WASTE = (
    "a tenth or so on a GPU (assumed)",
    "of what comes and goes glibc keeps gaps, 0.4 to 1.4 times as much again (measured; `resident` counts as much again)",
)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    own = argparse.ArgumentParser(prog="python -m pipeline.budget", add_help=False)
    own.add_argument("--gpus", default="", help='such as "8xH100"; none = this machine')
    own.add_argument("--engine", default="", help="how several share a network: configs/engines")
    args, rest = own.parse_known_args(argv)
    plan = plan_of(parse(rest), [])
    machine = (
        machines.named(args.gpus) if args.gpus else None
    )  # a misspelt one before anything slow
    quiet()
    shape = _shape(plan)
    machine = machine or machines.here(getattr(plan.configs["sft"], "threads", None))
    print(f"machine: {machine.describe()}")
    if not machine.measured:
        print(
            f"  by data sheets: {machines.FLOPS:.0%} of the peaks of products, {machines.MEMORY:.0%} of "
            "memory's; assumed, not measured"
        )
    name = (shape.architectures or [shape.model_type])[0]
    print(f"model:   {name}, {parameters(shape) / 1e6:,.4g} million parameters\n")
    for stage in steps.stages():
        if (config := plan.configs.get(stage)) is not None:
            assert isinstance(config, Config)
            _tell(config, shape, machine, args.engine)
    print(UNKNOWN.format(waste=_WASTE[machine.measured and not machine.accelerated]))


def _shape(plan: Plan) -> PreTrainedConfig:
    """The config of the model that the first stage starts from."""
    sft = plan.configs.get("sft")
    if not isinstance(sft, SFTConfig):
        raise UserError("plan: there is no sft.yaml, whose `model` all stages have the shape of")
    if "base" in plan.configs and not Path(sft.model).exists():
        raise UserError(f"plan: {sft.model} is not there yet: make base")
    config = config_of(sft.model)
    if config.is_encoder_decoder:
        raise UserError(
            f"plan: {sft.model} is an encoder-decoder; causal models alone are known here"
        )
    return config


def _tell(config: Config, shape: PreTrainedConfig, machine: Machine, engine: str) -> None:
    """A stage's tables, and what makes it fit."""
    work = work_of(config)
    e = estimate(config, shape, machine, work, engine)
    most, fits = need(e, machine), need(e, machine) <= machine.memory
    print(f"{config.stage}: {'fits' if fits else 'does not fit'}: ", end="")
    print(
        f"{_gib(most)} of {_gib(machine.memory)} GiB"
        + (" a GPU" if machine.accelerated else " resident")
    )
    roles = [[name, _gib(size)] for name, size in e.roles.items() if size]
    print(grid(["role", "GiB"], [*roles, ["all at once, at most", _gib(e.peak)]]))
    each = [[name, f"{seconds:.3g}"] for name, seconds in e.seconds.items() if seconds]
    what = "iteration" if isinstance(config, PPOConfig) else "step"
    print(
        grid(
            [f"an {what}" if what[0] == "i" else f"a {what}", "s"],
            [*each, ["in all", f"{e.step:.3g}"]],
        )
    )
    said = f"{e.tokens / e.step:,.0f} tokens/s, {e.flops / e.step / 1e12:.3g} TFLOP/s a device"
    if work.steps:
        said += f"; {work.steps} {what}s: {work.steps * e.step / 3600:.2g} hours"
    print(said)
    for line in work.unknown:
        print(line)
    if not fits:
        print(_advice(config, shape, machine, work, engine))
    print()


def estimate(
    config: Config, shape: PreTrainedConfig, machine: Machine, work: Work, engine: str
) -> Estimate:
    """Of any stage."""
    if isinstance(config, PPOConfig):
        return of_ppo(config, shape, machine, work, engine)
    return of_training(config, shape, machine, work, engine)


def need(e: Estimate, machine: Machine) -> float:
    """Bytes that a device has to have."""
    if machine.accelerated:
        return 1.1 * e.peak
    kept = machine.program + sum(
        e.roles.get(name, 0.0) for name in ("policy", "value", "reference", "reward")
    )
    return e.peak + max(e.peak - kept, 0.0)


def work_of(config: Config) -> Work:
    """What a config says of a stage's work, and the rows of data that are here."""
    if isinstance(config, PPOConfig):
        return Work(config.max_prompt_length, config.max_new_tokens, steps=config.iterations)
    k, rows, unknown = 1, None, []
    if isinstance(config, RMConfig):
        k = max(config.sampling.k) if config.sampling else 2
        response = config.max_length // 2
        read: Callable[..., Sequence] = load_rankings
        if config.sampling:
            response = min(config.sampling.max_new_tokens, config.max_length - 1)
    else:
        read, response = load_demonstrations, config.max_length - 1
    names = [
        r.name for r in config.references() if r.reads is Reads.DATA and r.key.startswith("data.")
    ]
    if config.data is not None and all(Path(name).exists() for name in names):
        rows = len(read(config.data, seed=config.seed))
    steps_ = config.max_steps or (rows and steps_of(config.epochs, rows, config.batch_size))
    if not steps_:
        unknown = ["how many steps: its data are not here yet"]
    return Work(config.max_length - response, response, k, steps_, unknown)


def _advice(
    config: Config, shape: PreTrainedConfig, machine: Machine, work: Work, engine: str
) -> str:
    """The first of the switches after which it fits, or what is left over after all of them."""
    said = list[str]()
    for changed, by, word in _switched(config, machine, engine):
        said.append(word)
        left = need(estimate(changed, shape, machine, work, by), machine)
        if left <= machine.memory:
            return f"fits with {', '.join(said)}: {_gib(left)} GiB"
    return f"still {_gib(left)} GiB with {', '.join(said)}: more GPUs, or a smaller model"


def _switched(config: Config, machine: Machine, engine: str) -> Iterator[tuple[Config, str, str]]:
    if machine.count > 1 and not stages.Sharing.of(engine, machine.count).sharded:
        engine = "fsdp2"
        yield config, engine, "ENGINE=fsdp2"
    for keys in SWITCHES[config.stage]:
        try:
            changed = type(config).model_validate({**config.model_dump(), **keys})
            check_fits(changed, stages.Sharing.of(engine, machine.count).sharded)
        except (ValidationError, UserError):  # another key or the engine stands against it
            continue
        if changed != config:
            config = changed
            words = (
                f"{key}: {str(value).lower()}" for key, value in keys.items() if value is not None
            )
            yield config, engine, ", ".join(words)


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g}"


if __name__ == "__main__":
    with reporting_errors():
        main()
