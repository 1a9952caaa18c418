"""The machine that a measurement was made on."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # x86, x86, ARM
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")


def describe(threads: int, device: str) -> dict[str, Any]:
    """Processor, threads, versions, and how busy the machine was before."""
    return {
        "processor": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "device": device,
        "system": platform.system(),
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def multiplies_bf16() -> bool:
    """Whether the processor has instructions for bf16; without them a step takes minutes."""
    return bool(BF16_FLAGS & set((_cpuinfo("flags") or _cpuinfo("Features")).split()))


def has_cuda() -> bool:
    """Whether torch can use an NVIDIA or AMD GPU."""
    import torch  # slow, and the benchmark's own process needs it for nothing else

    return torch.cuda.is_available()


def _cpuinfo(key: str) -> str:
    """What Linux says of the first processor; nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    found = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in found if name.strip() == key), "")
