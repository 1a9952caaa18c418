"""Forks a process a stage: `python fault_server.py BASE KIND`, then requests as lines of JSON.

The server has imported everything slow and differentiated nothing, so that a child finds torch as
fresh as a process of its own would, seconds earlier. Children are real: they can be killed, they
hold locks, and they end with the exit code of the command line. BASE: a tiny model
of KIND is made there.
"""

import gc
import json
import os
import resource
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState
from transformers import Trainer

import tiny_models
from pipeline import cli
from pipeline.engines import whole
from pipeline.models import loading as models
from pipeline.ppo import trainer
from pipeline.training import checked
from stages import ppo, rm, sft

LOADED = (sft, rm, ppo)


def main(base: Path, kind: str) -> None:
    """Answer requests until there are no more."""
    torch.set_num_threads(1)
    model = tiny_models.policy(0) if kind == "llama" else tiny_models.seq2seq(kind)
    model.save_pretrained(base)
    tiny_models.tokenizer().save_pretrained(base)
    models.load_policy(base)  # fills caches that each child would fill again
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        answer = ended(request["poll"]) if "poll" in request else fork(request)
        print(json.dumps(answer), flush=True)


def ended(pid: int) -> int | None:
    """Exit code of a child, or minus the signal that ended it; None while it runs."""
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def fork(request: dict[str, Any]) -> int:
    """The pid of a child that runs a stage."""
    pid = os.fork()
    if pid == 0:
        os._exit(run(request))
    return pid


def run(request: dict[str, Any]) -> int:
    """The command line of a stage, its output in a file; returns its exit code."""
    os.setpgid(0, 0)
    os.environ.update(request["environment"])
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if limit := request.get("file_bytes"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    code = 1
    if "SHARDED" in os.environ:
        shim()
    if "LATE" in os.environ:
        save = Trainer._save_rng_state
        Trainer._save_rng_state = lambda *args: (time.sleep(1.0), save(*args))[1]
    try:
        cli.main(request["stage"], request["argv"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def shim() -> None:
    """Have accelerate take CPUs for devices that it shards models on; it would quietly turn to DDP."""
    init = PartialState.__init__

    def as_gpus(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if self.distributed_type == "MULTI_CPU":
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = as_gpus
    check = whole.check_wrapped

    def told(model):
        check(model)
        kinds = {type(p).__name__ for p in model.parameters()}
        print("trains by", AcceleratorState().distributed_type, *sorted(kinds))

    checked.check_wrapped = trainer.check_wrapped = told


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
