"""What to say when the disk is full, in whichever library's words that arrives."""

import contextlib
import errno
import shutil
from pathlib import Path

from pipeline.config.schema import PPOConfig, StageConfig
from pipeline.errors import UserError
from pipeline.handoff.lineage import parents_of

_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# safetensors raises its own error with the number in its text; torch.save says only that it failed,
# in one of three ways.
_PHRASES = (
    *(f"os error {number}" for number in _ERRNOS),
    "PytorchStreamWriter failed writing",
    "basic_ios::clear: iostream error",
    "unexpected pos ",
)
_STATES = 3
"""Training states at a time: two are kept while the next is written."""


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, says that a file could not be written for space."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _ERRNOS:
            return True
        if any(phrase in str(error) for phrase in _PHRASES):
            return True
        error = error.__cause__ or error.__context__
    return False


def message(config: StageConfig | None) -> str:
    """What is needed, what there is, and that nothing is lost."""
    told = "no space left to write to, or files may not grow further"
    if config is None:
        return told
    needed = _copies(config) * _model_bytes(config)
    free = shutil.disk_usage(_existing(config.run)).free
    return (
        f"{config.run}: {told}: saved states and the published model take up to {needed} bytes "
        f"({needed / 1e9:.1f} GB), {free} are free. What was saved before is whole: make room and "
        "run the same command again"
    )


def _copies(config: StageConfig) -> int:
    """Sizes of the model on disk at most: in states, with Adam's two moments, and published."""
    networks = 2 if isinstance(config, PPOConfig) and config.value == "separate" else 1
    averages = int(getattr(config, "ema_decay", None) is not None)
    return _STATES * (3 * networks + averages) + 1 + averages


def _model_bytes(config: StageConfig) -> int:
    """Bytes of the biggest model that the stage starts from, as far as it is known."""
    directories = [Path(str(getattr(config, "model", "")) or ".none")]
    with contextlib.suppress(UserError):
        directories += parents_of(config).values()
    sizes = [sum(p.stat().st_size for p in d.glob("*.safetensors")) for d in directories]
    return max(sizes)


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
