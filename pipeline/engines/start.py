"""How this process was started beside others: which engine was asked for, and which really runs."""

import datetime
import os
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.schema import StageConfig
from pipeline.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

LAUNCH = "PIPELINE_LAUNCH"
"""Variable: a folder that the processes of one launch share, for a word between them."""
LOST = 75
"""Exit code of a process that ended because another had; the launcher says what happened."""

_ASKED = {"FSDP": "FSDP", "DEEPSPEED": "DEEPSPEED"}
"""Word in accelerate's variables -> the `distributed_type` that it must become."""
_SHARDED_NEVER = {
    "vllm": "it is handed whole models; leave it out (the policy's own decoding gathers once a rollout), or ENGINE=ddp",
    "shared_base": "its adapters take turns on one base; shared_base: false, or ENGINE=ddp",
    "dtype": "rounded weights cannot be cut up; bf16 can, or ENGINE=ddp",
}
"""Keys of configs that FSDP2 refuses."""
_WHOLE = ("MULTI_GPU", "MULTI_CPU", "MULTI_XPU", "MULTI_NPU", "MULTI_MLU", "MULTI_HPU")
"""accelerate's names of several processes that each hold whole models (DDP)."""
_BROKEN = ("gloo", "NCCL", "Connection closed by peer", "Connection reset", "Broken pipe")


def world_size() -> int:
    """Processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this is."""
    return int(os.environ.get("RANK", "0"))


def asked() -> str:
    """The engine that a launcher's variables ask for: one of `_ASKED`, DDP, or NO with one process."""
    for name in ("MEGATRON_LM", "PARALLELISM_CONFIG"):
        if _set(name):
            raise UserError(f"{name}: not supported; ENGINE=ddp and ENGINE=fsdp2 are")
    return next((n for n in _ASKED if _set(n)), "DDP" if world_size() > 1 else "NO")


def _set(name: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true", "yes")


def check() -> None:
    """UserError, before anything slow, for an engine that trains no stage here."""
    engine = asked()
    if engine not in ("NO", "DDP", "FSDP"):
        raise UserError(
            f"{engine}: not supported; ENGINE=fsdp2 shards models too, and ENGINE=ddp none"
        )
    if engine == "FSDP" and os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError(
            "FSDP, version 1: not supported; ENGINE=fsdp2, or fsdp_version: 2 in your config"
        )


def check_fits(config: StageConfig, sharded: bool | None = None) -> None:
    """UserError for what a stage is asked to do and its engine (or one that shards) cannot, with what can."""
    sharded = asked() == "FSDP" if sharded is None else sharded
    for key, told in _SHARDED_NEVER.items() if sharded else ():
        value = getattr(config, key, None)
        if value and value not in ("fp32", "bf16"):
            raise UserError(f"{config.stage}: {key}: not with ENGINE=fsdp2: {told}")


def check_started(config: StageConfig | None = None) -> None:
    """UserError unless the engine that runs is the one that was asked for, over all its processes, and fits the stage.

    accelerate starts independent runs where it finds no device, and DDP where it was asked for FSDP.
    """
    check()  # a script of one's own has not come by the command line
    if config is not None:
        check_fits(config)
    engine = asked()
    if engine == "NO":
        return
    from accelerate import PartialState  # imports torch
    from accelerate.utils import InitProcessGroupKwargs

    wait = InitProcessGroupKwargs(timeout=datetime.timedelta(hours=2)).to_kwargs()
    PartialState(cpu=_set("CPU"), **wait)
    state = accelerator().state
    found = str(getattr(state.distributed_type, "value", state.distributed_type))
    if state.num_processes != world_size():
        raise UserError(
            f"{world_size()} processes were started and run by themselves, each as if it were alone: "
            "accelerate found no device for them. Start them with ENGINE=ddp, or on CPUs with "
            "ACCELERATE_USE_CPU=true"
        )
    if found not in (_WHOLE if engine == "DDP" else (_ASKED[engine],)):
        raise UserError(
            f"{engine} was asked for and became {found}: accelerate shards no model on this machine's "
            "devices. ENGINE=ddp works here"
        )


def together() -> None:
    """Wait until all processes are here."""
    if world_size() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def anywhere(flag: bool) -> bool:
    """Whether it holds in any process: a signal reaches them at different moments, or not all of them."""
    if world_size() == 1:
        return flag
    import torch
    from accelerate import PartialState
    from accelerate.utils import reduce

    return bool(reduce(torch.tensor(float(flag), device=PartialState().device)))


def wait_for(path: Path) -> None:
    """Wait for a file that the first process makes, however long it takes: collectives time out."""
    while not path.exists():
        time.sleep(0.1)


def accelerator() -> "Accelerator":
    """Processes and their sums, without a precision: accelerate keeps one a process, that of whoever came
    first, and refuses another."""
    from accelerate import Accelerator  # imports torch
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=world_size() > 1)
    return Accelerator(mixed_precision="no")


# --- how it ends ------------------------------------------------------------------------------------


def lost_another(error: BaseException) -> bool:
    """Whether an error is what a process sees when another has gone."""
    import torch

    known = isinstance(error, torch.distributed.DistError)
    broken = isinstance(error, RuntimeError) and any(word in str(error) for word in _BROKEN)
    return world_size() > 1 and (known or broken)


def first_to_tell() -> bool:
    """Whether no other process of this launch has said yet why it ends: one message, not one a process."""
    folder = os.environ.get(LAUNCH)
    if folder is None:
        return True
    try:
        (Path(folder) / "told").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def ends_with_its_launcher() -> None:
    """Stop, as by SIGTERM, when the launcher is gone: nobody else would end what it has started."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    if os.environ.get(LAUNCH):
        threading.Thread(target=watch, daemon=True).start()
