"""Faults on demand, to show that a run survives them: `PIPELINE_FAULT=stage:phase:step:action[@process]`.

    PIPELINE_FAULT=ppo:update:3:kill make ppo      # dies in the third iteration's update
    PIPELINE_FAULT=sft:step:2:term,sft:step:2:term make sft
    PIPELINE_FAULT=sft:step:2:kill@1 make sft PROCESSES=2   # in the second process alone

Stages call `at("phase", step)` where such a thing can happen; without the variable it is one `if`.
No torch here: `nan` and `oom` are told to the caller or raised by name.
"""

import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

from pipeline.errors import UserError

VARIABLE = "PIPELINE_FAULT"
PHASES = {
    "load": "the state to go on from is chosen; step = its number, 0 at the start",
    "rollout": "responses are sampled and scored (ppo), or about to be ranked (rm, step 0)",
    "update": "gradients of the step are being computed",
    "step": "the optimizer has stepped (ppo: the iteration is over), nothing is recorded yet",
    "eval": "validation or samples are about to be measured",
    "mid-write": "a training state is written and not sealed",
    "before-rename": "it is sealed and not in its place",
    "after-rename": "it is in its place, older ones are not pruned",
    "prune": "an older one is half removed",
    "export": "the model is saved and not published; step 0",
    "publish": "step 1: sealed, 2: renamed, 3: training states removed, 4: the old one moved away, "
    "5: in its place",
}
"""Phase -> the moment it names."""
ACTIONS = {
    "kill": "kill -9",
    "term": "SIGTERM to itself",
    "nan": "a value that is not a number (rollout, update)",
    "oom": "torch.OutOfMemoryError",
    "enospc": "no space left on the device",
    "slow": "two seconds of nothing; say it several times for more",
}
_CAN_BE_NAN = ("rollout", "update")
_SECONDS = 2.0

_planned: dict[tuple[str, int], list[str]] = {}  # (phase, step) -> actions


def setup(stage: str, known: Mapping[str, Collection[str]]) -> None:
    """Plan this stage's faults from the environment; `known`: stage -> phases, told by the UserError."""
    _planned.clear()
    for word in filter(None, os.environ.get(VARIABLE, "").split(",")):
        word, _, process = word.strip().partition("@")
        owner, phase, step, action = _parse(word, known)
        if owner == stage and process in ("", os.environ.get("RANK", "0")):
            _planned.setdefault((phase, step), []).append(action)


def clear() -> None:
    """Plan none."""
    _planned.clear()


def at(phase: str, step: int) -> bool:
    """Let what is planned for this moment happen; whether the caller has to make a value NaN."""
    if not _planned:
        return False
    actions = _planned.get((phase, step), [])
    for action in actions:
        _ACT[action]()
    return "nan" in actions


def watch_gradient(parameter: Any, step: Callable[[], int]) -> None:
    """Have phase "update" happen whenever the gradient of a tensor is computed in step `step()`."""
    if os.environ.get("ACCELERATE_USE_FSDP") and any(phase == "update" for phase, _ in _planned):
        raise UserError(f"{VARIABLE}: phase update: FSDP2 tells nobody of gradients; take step")
    if _planned:
        parameter.register_hook(
            lambda gradient: gradient * float("nan") if at("update", step()) else None
        )


def _parse(word: str, known: Mapping[str, Collection[str]]) -> tuple[str, str, int, str]:
    parts = word.split(":")
    stage, phase, step, action = parts if len(parts) == 4 else ("", "", "", "")
    lacks = stage in known and phase in PHASES and phase not in known[stage]
    lacking = f"; {stage} has no phase {phase}" if lacks else ""
    if (
        phase not in known.get(stage, ())
        or action not in ACTIONS
        or not (step.isascii() and step.isdigit() and len(step) < 10)
        or (action == "nan" and phase not in _CAN_BE_NAN)
    ):
        raise UserError(
            f"{VARIABLE}={word}: not stage:phase:step:action{lacking}\n"
            f"  stages:  {', '.join(known)}\n  phases:\n{_listed(PHASES)}\n"
            f"  actions:\n{_listed(ACTIONS)}"
        )
    return stage, phase, int(step), action


def _listed(meanings: dict[str, str]) -> str:
    return "\n".join(f"    {name:<14}{meaning}" for name, meaning in meanings.items())


def _out_of_memory() -> None:
    torch = sys.modules.get("torch")
    raise getattr(torch, "OutOfMemoryError", MemoryError)("a planned fault: out of memory")


def _no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a planned fault")


_ACT: dict[str, Callable[[], Any]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "nan": lambda: None,
    "oom": _out_of_memory,
    "enospc": _no_space,
    "slow": lambda: time.sleep(_SECONDS),
}
