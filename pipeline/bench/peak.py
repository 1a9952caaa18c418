"""A worker that measures how fast this machine multiplies matrices: `... peak fp32`."""

import sys
import time

import torch

from pipeline.bench import shared
from pipeline.bench.turns import Turns

SECONDS = 0.7


def main(precision: str) -> None:
    """Answer each turn with the operations a second of the best of several shapes."""
    turns = Turns(shared.wait)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    # milliseconds each, so that the best of many is undisturbed on a busy machine too
    sides = (512, 1024) if device == "cpu" else (4096, 8192)
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    turns(device=name, threads=torch.get_num_threads())
    while True:
        turns(flops=max(speed(side, dtype, device) for side in sides))


def speed(side: int, dtype: torch.dtype, device: str) -> float:
    """Operations a second of square products, the fastest of those that fit into a moment."""
    a = torch.randn(side, side, dtype=dtype, device=device)
    best, until = float("inf"), time.perf_counter() + SECONDS / 2
    while time.perf_counter() < until:
        shared.wait()
        start = time.perf_counter()
        a @ a
        shared.wait()
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


if __name__ == "__main__":
    main(sys.argv[1])
