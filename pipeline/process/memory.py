"""This process's memory: kept once it was used, its peak, and what to say when it is out.

Out of memory comes in whichever library's words; nothing is retried. Imports no torch.
"""

import contextlib
import ctypes
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

_PHRASES = ("DefaultCPUAllocator: can't allocate", "CUDA out of memory", "CUBLAS_STATUS_ALLOC")

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def keep_freed() -> None:
    """Have glibc's malloc keep blocks up to 32 MiB for reuse; other allocators are left as they are.

    It gives them back to the system as soon as some are free at a time, and the next ones have every
    page cleared and mapped again: at each step of a training. (Larger ones would leave gaps.)
    """
    _mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)  # the most that glibc takes
    _mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


@contextlib.contextmanager
def returned_at_once() -> Iterator[None]:
    """Within, larger blocks go back to the system when they are freed.

    A model is converted tensor by tensor as it is read, and the gaps that this leaves between the weights
    that stay would be as large as the model.
    """
    _mallopt(_M_MMAP_THRESHOLD, 2**19)
    try:
        yield
    finally:
        _mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)


def _mallopt(name: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(name, value)


def peak_mb() -> float:
    """Peak memory in MiB: of the accelerator if there is one, else of this process, resident."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):  # rusage's would count what the parent had
                return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def resident() -> int:
    """Bytes of this process in memory now."""
    return psutil.Process().memory_info().rss


def limit(root: Path = Path("/")) -> int:
    """Bytes that this process may have: the machine's, or those of its cgroups if they are fewer, and swap."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return sys.maxsize
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    sizes, swap = [kib["MemTotal"] << 10], [kib.get("SwapTotal", 0) << 10]
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        own = root / "sys/fs/cgroup" / ("memory" if controllers else "") / path.lstrip("/")
        name = "memory.limit_in_bytes" if controllers else "memory.max"
        for folder in (own, *own.parents):
            for file, found in ((name, sizes), ("memory.swap.max", swap)):
                with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                    found.append(int((folder / file).read_text()))
    return min(sizes) + min(swap)


def is_out(error: BaseException) -> bool:
    """Whether an error says that an accelerator's or this machine's memory did not suffice."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True  # torch's, which is not imported here
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _PHRASES)


@contextlib.contextmanager
def relieved_by(key: str) -> Iterator[None]:
    """Name the config key that makes what happens within smaller."""
    try:
        yield
    except Exception as error:
        if is_out(error):
            error.add_note(key)
        raise


def message(error: BaseException) -> str:
    """The library's first line, and the key to make smaller."""
    first = (str(error).strip() or "out of memory").splitlines()[0]
    keys = getattr(error, "__notes__", None) or ["micro_batch_size"]
    return f"{first}\nTry a smaller {keys[0]}: less memory, the same numbers. Nothing was changed."
