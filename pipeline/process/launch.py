"""How this process was started beside others, from the environment that launchers set."""

import os
from typing import TYPE_CHECKING

from pipeline.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

_ENGINES = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")
_SUPPORTED = ("NO", "MULTI_GPU", "MULTI_CPU", "MULTI_XPU", "MULTI_NPU")
"""accelerate's names of one process, and of several that each hold whole models (DDP)."""


def world_size() -> int:
    """Processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_environment() -> None:
    """UserError when a launcher config asks for an engine that would shard the models."""
    for engine in _ENGINES:
        if os.environ.get(f"ACCELERATE_USE_{engine}", "").lower() in ("1", "true", "yes"):
            check_supported(engine)


def check_supported(distributed_type: str) -> None:
    """UserError unless every process holds whole models: nobody here gathers shards."""
    name = str(getattr(distributed_type, "value", distributed_type))
    if name not in _SUPPORTED:
        raise UserError(
            f"distributed_type {name}: not supported. One process is, and several that each hold whole "
            "models (DDP: distributed_type MULTI_GPU in the launcher's config, as configs/engines/cpu2.yaml)"
        )


def accelerator() -> "Accelerator":
    """Processes and their sums, without a precision: accelerate keeps one a process, that of whoever came
    first, and refuses another."""
    from accelerate import Accelerator  # imports torch
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    return Accelerator(mixed_precision="no")
