"""Machines by what bounds a training on them: this one, measured, and GPUs by their makers' figures."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.bench import machine, shared
from pipeline.errors import UserError
from pipeline.models import needs
from pipeline.models.device import device
from pipeline.process import memory


@dataclass(frozen=True)
class Machine:
    """`count` devices of a kind; rates are of one, and what is reached of them, not their peaks."""

    name: str
    count: int
    memory: float  # bytes
    float32: float  # operations a second of matrix products
    bf16: float
    bandwidth: float  # bytes a second to and from memory
    link: float  # bytes a second from one device to another
    launch: float  # seconds that an operation takes at least
    program: float  # bytes taken before any model is there
    measured: bool = False
    accelerated: bool = True

    def describe(self) -> str:
        """In a line."""
        rates = f"{self.float32 / 1e12:.3g} float32 and {self.bf16 / 1e12:.3g} bf16 TFLOP/s"
        gib = f"{self.memory / 2**30:.0f} GiB, {self.bandwidth / 1e9:.0f} GB/s"
        return f"{self.count} x {self.name}: {gib}, {rates} reached"


FLOPS, MEMORY = 0.5, 0.8
"""What is reached of a GPU's peaks in matrix products and in memory traffic. Assumed, not measured."""
LAUNCH, CONTEXT = 10e-6, 1.5 * 2**30
"""Seconds an operation, most of them PyTorch's and transformers' own on the CPU, and bytes of CUDA's context
and libraries. Assumed, not measured."""

NETWORK = 50e9
"""Bytes a second between machines, a GPU: 400 Gbit/s."""
GPUS = {
    # GB, TFLOP/s of dense float32 (not TF32) and bf16, GB/s of memory, GB/s one way to a neighbour
    "B200": (180, 75, 2250, 8000, 900),
    "H200": (141, 67, 989, 4800, 450),
    "H100": (80, 67, 989, 3350, 450),
    "A100": (80, 19.5, 312, 2039, 300),
    "A100-40GB": (40, 19.5, 312, 1555, 300),
    "MI300X": (192, 163, 1307, 5300, 448),
    "L40S": (48, 91.6, 362, 864, 32),
    "L4": (24, 30.3, 121, 300, 32),
    "A10": (24, 31.2, 125, 600, 32),
    "RTX4090": (24, 82.6, 165, 1008, 32),
    "RTX3090": (24, 35.6, 71, 936, 16),
}
"""Of the makers' data sheets (SXM versions where there are several)."""
A_NODE = 8
"""GPUs of one machine at most; more are taken for several machines on a network of 400 Gbit/s a GPU."""


def named(text: str) -> Machine:
    """`8xH100`, or `H100`; UserError for a GPU that is not known."""
    match = re.fullmatch(r"(?:(\d+)\s*[x*]\s*)?(\S+)", text.strip(), re.IGNORECASE)
    by_name = {name.lower(): name for name in GPUS}
    count = int(match[1] or 1) if match else 0
    if match is None or match[2].lower() not in by_name or not count:
        raise UserError(f'GPUS={text}: a number and a kind, as "8xH100"; known: {", ".join(GPUS)}')
    name = by_name[match[2].lower()]
    gigabytes, float32, bf16, bandwidth, link = GPUS[name]
    link = min(link, 50) if count > A_NODE else link
    return Machine(
        name,
        count,
        memory=gigabytes * 1e9,
        float32=float32 * 1e12 * FLOPS,
        bf16=bf16 * 1e12 * FLOPS,
        bandwidth=bandwidth * 1e9 * MEMORY,
        link=link * 1e9 * MEMORY,
        launch=LAUNCH,
        program=CONTEXT,
    )


REACHED = 0.6
"""Of what this machine does at its best: products of large squares, copies. As three stages' steps showed."""


def here(threads: int | None = None) -> Machine:
    """This machine's accelerator or processor, measured in a second or two."""
    if threads is not None:
        torch.set_num_threads(threads)
    kind, count = device().type, torch.get_num_threads()
    name = (
        torch.cuda.get_device_name()
        if kind == "cuda"
        else machine.describe(count, kind)["processor"]
    )
    float32, bf16 = [REACHED * _products(dtype, kind) for dtype in (torch.float32, torch.bfloat16)]
    bandwidth, launch = REACHED * _bandwidth(kind), _launch(kind) / REACHED
    return Machine(
        name if kind == "cuda" else f"{name}, {count} threads",
        torch.cuda.device_count() if kind == "cuda" else 1,
        needs.room(),
        float32,
        bf16,
        bandwidth,
        NETWORK,
        launch,
        CONTEXT if kind == "cuda" else memory.resident(),
        measured=True,
        accelerated=kind == "cuda",
    )


def _best(run: Callable[[], object], kind: str) -> float:
    """Seconds of the fastest of several runs. Of a processor's own time: others may use it too."""
    clock = time.perf_counter if kind == "cuda" else time.process_time
    best = float("inf")
    for _ in range(8):
        shared.wait()
        start = clock()
        run()
        shared.wait()
        best = min(best, clock() - start)
    return best / (1 if kind == "cuda" else torch.get_num_threads())


def _products(dtype: torch.dtype, kind: str) -> float:
    """Operations a second of square matrix products."""
    side = 8192 if kind == "cuda" else 512 if dtype == torch.bfloat16 else 1024
    a = torch.ones(side, side, dtype=dtype, device=kind)
    return 2 * side**3 / _best(lambda: a @ a, kind)


def _bandwidth(kind: str) -> float:
    """Bytes a second of copies that no cache holds."""
    source = torch.ones(2**25, device=kind)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source), kind)


def _launch(kind: str) -> float:
    """Seconds that an operation of a small network takes, forward and backward."""
    layers = nn.Sequential(*(nn.Linear(16, 16, device=kind) for _ in range(50)))
    x = torch.ones(4, 16, device=kind)
    # a layer forward; its two products and a sum backward
    return _best(lambda: layers(x).sum().backward(), kind) / (50 * 4)
